"""The pages of `medfed serve`: the list of runs, a run as it happens, the login."""

from collections.abc import Mapping
from html import escape
from typing import Any
from urllib.parse import quote

from medfed.screens import dashboards
from medfed.screens.feeds import Feed, Runs
from medfed.screens.sentences import SCORES

FILES = ("summary.json", "events.jsonl", "privacy.json")
"""What of a run's folder can be downloaded: never checkpoints, sites' states, ledgers or keys."""


def files(feed: Feed) -> list[str]:
    """Return what of a run can be downloaded here;
    a site's page leaves out the log, which tells of all sites.
    """
    return [
        name
        for name in FILES
        if (feed.folder / name).is_file() and not (feed.site and name == "events.jsonl")
    ]


def missing() -> str:
    """Return the page of what is not there."""
    return _page("Not found", "<p>There is no such run, page or file here.</p>")


def login(why: str) -> str:
    """Return the page that asks for the token."""
    told = f'<p class="verdict bad">{escape(why)}</p>' if why else ""
    body = (
        f"{told}<p>Type the token that <code>medfed serve</code> printed, or open the address that "
        "it printed.</p>"
        '<form method="post" action="/login"><label>Token <input type="password" name="token" '
        'autocomplete="off" required></label> <button>Enter</button></form>'
    )
    return _page("medfed", body)


def home(runs: Runs) -> str:
    """Return the list of runs."""
    lines = "".join(_line(name, summary) for name, summary in runs.summaries().items())
    whose = f", as {runs.site} may see them" if runs.site else ""
    head = "".join(
        f'<th scope="col">{name}</th>'
        for name in ("run", "study", "status", "rounds", "score", "epsilon")
    )
    if lines:
        body = (
            "<div "
            f"class=wide><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
        )
    else:
        body = (
            "<p class=note>No run yet. Start one with <code>medfed run STUDY</code> and load "
            "this page again.</p>"
        )
    return _page(f"Runs{whose}", body)


def _line(name: str, s: Mapping[str, Any]) -> str:
    test = s.get("test") or {}
    privacy = s.get("privacy") or {}
    score = next((f"{n} {test[n]:.4f}" for n in SCORES if test.get(n) is not None), "-")
    epsilon = privacy.get("epsilon")
    cells = (
        str(s["study"]),
        "complete" if s["status"] == "complete" else "no end yet, or incomplete",
        f"{s['rounds']} of {s['rounds_asked']}",
        score,
        "-" if epsilon is None else f"{epsilon:.4f}",
    )
    told = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
    return f'<tr><td><a href="/runs/{quote(name)}">{escape(name)}</a></td>{told}</tr>'


def run(name: str, feed: Feed) -> str:
    """Return a run's live page, empty: its script fills it."""
    place = f"/runs/{quote(name)}"
    pages = "".join(
        f'<a href="{place}/pages/{page}">{title}</a>' for page, title in dashboards.PAGES.items()
    )
    kept = "".join(f'<a href="{place}/files/{name}" download>{name}</a>' for name in files(feed))
    figures = (
        ("rounds", "rounds", ""),
        ("score", "score", " id=score-name"),
        ("epsilon", "epsilon spent", ""),
        ("seconds", "time a round", ""),
        ("sent", "sent", ""),
        ("suspects", "suspected", ""),
    )
    cells = "".join(
        f"<div><dt{extra}>{label}</dt><dd id={key}>-</dd></div>" for key, label, extra in figures
    )
    charts = "".join(
        f'<figure id="{key}-chart" hidden><figcaption></figcaption>'
        '<svg viewBox="0 0 630 185" role="img"></svg></figure>'
        for key in ("score", "loss", "seconds")
    )
    sites = (
        "site",
        "training records",
        "test records",
        "rounds",
        "left out",
        "last loss",
        "last time, s",
        "threat",
    )
    rounds = ("round", "took part", "loss", "score", "seconds", "epsilon")

    if feed.site:
        whose = (
            f"<p class=note>As {escape(feed.site)} may see it: other sites' figures are left "
            "out.</p>"
        )
    else:
        whose = ""

    body = (
        f'{whose}<p class="verdict open" id=status role=status>waiting for the run</p>'
        f"<p class=note><span id=last></span> <span id=line>connecting</span>.</p><dl>{cells}</dl>"
        "<noscript><p class=note>This page needs its script; the pages below read without.</p>"
        "</noscript>"
        f"<nav aria-label=pages><strong>Pages</strong> {pages}</nav>"
        f"<nav aria-label=downloads><strong>Downloads</strong> {kept}</nav>"
        f"<div class=charts>{charts}</div>"
        f"<h2>Sites</h2>{_table('site-rows', sites)}<p class=note id=devices hidden></p>"
        f"<h2>The last rounds</h2>{_table('round-rows', rounds)}"
        "<section id=warnings hidden><h2>Warnings</h2><ul id=warning-list></ul></section>"
        "<h2 id=log-title>Log</h2><ol class=log id=log tabindex=0 aria-labelledby=log-title></ol>"
    )
    return _page(
        name, body, '<script src="/static/live.js" defer></script>', f' data-feed="{place}/live"'
    )


def _table(key: str, head: tuple[str, ...]) -> str:
    top = "".join(f'<th scope="col">{name}</th>' for name in head)
    return (
        "<div class=wide tabindex=0 role=region "
        f'aria-label="{head[0]}s"><table><thead><tr>{top}</tr></thead>'
    ) + (f"<tbody id={key}></tbody></table></div>")


def _page(title: str, body: str, script: str = "", data: str = "") -> str:
    name = escape(title)
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{name}</title><meta '
        'name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" '
        'href="data:,"><link rel="stylesheet" '
        f'href="/static/style.css">{script}</head><body><nav aria-label="house"><a href="/">All '
        f"runs</a></nav><main{data}><h1>{name}</h1>{body}</main></body></html>\n"
    )
