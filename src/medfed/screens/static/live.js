// The live page of one run. The server sends the whole view at each change; this draws it. Texts are set as text, so
// that nothing a run says can become a part of the page.
"use strict";

const main = document.querySelector("main");
const byId = (id) => document.getElementById(id);

const plain = (value, digits = 4) =>
  value === null || value === undefined ? "-" : typeof value === "number" ? String(+value.toPrecision(digits)) : value;

function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB"];
  let power = 0;
  while (bytes >= 1000 && power < 3) { bytes /= 1000; power += 1; }
  return `${+bytes.toPrecision(3)} ${units[power]}`;
}

function fill(id, rows) {
  byId(id).replaceChildren(...rows.map((cells) => {
    const row = document.createElement("tr");
    row.append(...cells.map((value) => {
      const cell = document.createElement("td");
      cell.textContent = plain(value);
      if (typeof value === "number") cell.className = "n";
      return cell;
    }));
    return row;
  }));
}

function draw(id, title, points) {
  const figure = byId(id);
  figure.hidden = points.length === 0;
  if (figure.hidden) return;
  const svg = figure.querySelector("svg"), space = "http://www.w3.org/2000/svg";
  const values = points.map((point) => point[1]), first = points[0][0], last = points.at(-1)[0];
  const low = Math.min(...values), high = Math.max(...values), span = high - low || 1, wide = last - first || 1;
  const x = (t) => 56 + 560 * (t - first) / wide, y = (value) => 150 - 130 * (value - low) / span;
  const add = (name, attributes, text = "") => {
    const part = document.createElementNS(space, name);
    for (const [key, value] of Object.entries(attributes)) part.setAttribute(key, value);
    part.textContent = text;
    return part;
  };
  svg.setAttribute("aria-label", `${title}: ${plain(values.at(-1))} after round ${last}; the table of rounds has more`);
  svg.replaceChildren(
    add("line", {x1: 56, y1: 158, x2: 620, y2: 158}),
    add("text", {x: 0, y: 24}, plain(high, 3)), add("text", {x: 0, y: 154}, plain(low, 3)),
    add("text", {x: 56, y: 178}, `round ${first}`), add("text", {x: 620, y: 178, "text-anchor": "end"}, String(last)),
    add("polyline", {points: points.map(([t, value]) => `${x(t).toFixed(1)},${y(value).toFixed(1)}`).join(" ")}),
    add("circle", {cx: x(last), cy: y(values.at(-1)), r: 4}),
  );
  figure.querySelector("figcaption").textContent = title;
}

function show(view) {
  const status = byId("status");
  const ended = view.status === "complete" ? "verdict" : view.status === "incomplete" ? "verdict bad" : "verdict open";
  const words = view.status === "no end yet" ? `${view.rounds} of ${plain(view.rounds_asked)} rounds so far` :
    `The run is ${view.status} after ${view.rounds} of ${plain(view.rounds_asked)} rounds`;
  status.className = view.trouble ? "verdict bad" : ended;
  status.textContent = `${words}${view.reason ? `: ${view.reason}` : ""}.${view.trouble ? ` ${view.trouble}` : ""}`;
  byId("last").textContent = `Last event: ${plain(view.last)}.`;
  byId("rounds").textContent = `${view.rounds} of ${plain(view.rounds_asked)}`;
  byId("score-name").textContent = view.score.name || "score";
  byId("score").textContent = view.score.value === null ? "-" : view.score.value.toFixed(4);
  const privacy = view.privacy || {};
  byId("epsilon").textContent = privacy.epsilon === null || privacy.epsilon === undefined ? "none claimed" :
    `${privacy.epsilon.toFixed(4)} of ${plain(privacy.target_epsilon)}`;
  byId("seconds").textContent = view.seconds_per_round === null ? "-" : `${plain(view.seconds_per_round)} s`;
  byId("sent").textContent = size(view.bytes.up + view.bytes.down);
  byId("suspects").textContent = Array.isArray(view.suspects) ? view.suspects.join(", ") || "nobody" : view.suspects;
  draw("score-chart", `${view.score.name || "score"} on held-out records, all sites`, view.curves.score);
  draw("loss-chart", "training loss", view.curves.loss);
  draw("seconds-chart", "seconds of a round", view.curves.seconds);
  fill("site-rows", view.sites.map((one) =>
    [one.site, one.train, one.test, one.rounds, one.left_out, one.loss, one.seconds, one.threat]));
  byId("devices").hidden = view.sites.length > 0;
  byId("devices").textContent = `${view.participants} participants: none is named here.`;
  fill("round-rows", view.recent.map((one) =>
    [one.round, one.clients, one.loss, one.score, one.seconds, one.epsilon]));
  byId("warnings").hidden = view.warnings.length === 0;
  byId("warning-list").replaceChildren(...view.warnings.map((text) => {
    const item = document.createElement("li");
    item.textContent = text;
    return item;
  }));
  byId("log").replaceChildren(...view.log.slice().reverse().map(([when, text]) => {
    const item = document.createElement("li"), time = document.createElement("time");
    time.textContent = when;
    item.append(time, text);
    return item;
  }));
  main.dataset.version = view.version;
}

const source = new EventSource(main.dataset.feed);
source.onmessage = (message) => { byId("line").textContent = "connected"; show(JSON.parse(message.data)); };
source.onerror = () => { byId("line").textContent = "no connection to the server; trying again"; };
