"""Four pages and one report of a run, each a function of its event log and of the claim beside it.

Every chart has its numbers in a table below, so that a page reads without scripts and prints.
Nothing is loaded from outside; the drawing library is inside each page. Nothing is of one patient:
of a fleet of devices, each of which is one patient's, only counts are shown.
"""

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path

from medfed.core import files
from medfed.monitor.events import Tested
from medfed.monitor.metrics import Figure
from medfed.screens import elements, reports
from medfed.screens.sentences import merge_alike
from medfed.screens.story import LEVELS, SHOWN, Story

HEADLINE = ("auroc", "accuracy", "r2", "mae")  # of a test's figures, those that a page begins with
STYLE = Path(__file__).parent / "static" / "style.css"  # of the pages here and of the live ones
_STYLE = """
body {max-width: 68rem}
summary {cursor: pointer; color: #005a8c}
@media print {
nav, details:not([open]) {display: none} body {max-width: none} h2 {break-after: avoid}
}
"""

PAGES = {
    "training_dashboard.html": "Training",
    "device_analysis.html": "Sites and devices",
    "privacy_audit.html": "Privacy",
    "security_analysis.html": "Security",
    "report.html": "Report",
}
"""The title of each page of a run."""
FOUR = tuple(PAGES)[:4]
_UNKNOWN = Figure(None)


# The pages


def write_dashboards(folder: str | Path, out: str | Path | None = None) -> dict[str, Path]:
    """Write the four pages of a run into its reports/, or into `out`; return where each is.

    Raises RunError where the folder holds no events, or events of a newer schema.
    """
    folder = Path(folder)
    return write_pages(Story.of(folder), Path(out) if out else folder / "reports")


def write_pages(story: Story, place: Path, names: Sequence[str] = FOUR) -> dict[str, Path]:
    """Write some of `PAGES` into a folder; return where each is."""
    written = {name: page(story, name) for name in names}
    files.make_folder(place)
    with files.hold(place):
        for name, text in written.items():
            files.write(place / name, text)
    return {name: place / name for name in names}


def write_report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write one page with everything, an executive page first, for printing; return where."""
    return _write_page(Path(folder), "report.html", out)


def write_security_page(folder: str | Path, out: str | Path | None = None) -> Path:
    """Write the page on security alone; return where."""
    return _write_page(Path(folder), "security_analysis.html", out)


def _write_page(folder: Path, name: str, out: str | Path | None) -> Path:
    path = Path(out) if out else folder / "reports" / name
    files.make_folder(path.parent)
    files.write(path, page(Story.of(folder), name))
    return path


def page(story: Story, name: str) -> str:
    """Return one of `PAGES` as HTML that is whole in itself."""
    return _page(PAGES[name], story, _BODIES[name](story))


# What each page says


def _everything(story: Story) -> str:
    parts = "".join(
        (
            "<section "
            f'style="break-before:page"><h1>{PAGES[name]}</h1>{_BODIES[name](story)}</section>'
        )
        for name in FOUR
    )
    return _executive(story) + parts


def _executive(story: Story) -> str:
    s = story.summary
    sees = story.planned.sees if story.planned else {}
    protects = "Nothing is claimed of patients' privacy."

    if story.claim and story.claim["claimed"]:
        protects = (
            "Whether any one training patient took part changes the odds of whatever was "
            f"released by a factor of at most e^{story.claim['epsilon']:.3f}, but for a chance "
            f"of {story.claim['target']['delta']:g}."
        )

    suspects = ", ".join(one["site"] for one in s["suspects"]) or "nobody"
    lines = [
        (
            "what was asked",
            f"{s['algorithm']} with {s['model']}, {s['rounds_asked']} rounds, {len(s['sites'])} "
            "sites",
        ),
        ("what came out", _outcome(story)),
        ("what protects patients", protects),
        ("who could see what", "; ".join(f"{party}: {sight}" for party, sight in sees.items())),
        ("who was suspected", suspects),
        ("what malicious sites could do", s["bears"] or "not told"),
        (
            "what is not promised",
            "a model for clinical use: that needs validation and approval which no training gives",
        ),
    ]
    return _verdict(story) + elements.table(("", ""), lines)


def _verdict(story: Story) -> str:
    s = story.summary
    why = f": {s['reason']}" if s["reason"] else ""
    kind = "verdict" if s["status"] == "complete" else "verdict bad"
    words = (
        f"The run is {s['status']} after {s['rounds']} of {s['rounds_asked']} rounds{why}. "
        f"{_outcome(story)}"
    )
    return f'<p class="{kind}">{escape(words)}</p>'


def _outcome(story: Story) -> str:
    test = story.summary["test"]
    if not test:
        return "No test of the federated model is on record."
    bounds = story.summary.get("intervals") or {}
    told = []
    for name in HEADLINE:
        if test.get(name) is not None:
            low, high = bounds.get(name) or (None, None)
            told.append(f"{name} {test[name]:.3f}{elements.between(low, high, '95 %: ')}")
    records = f"{test['n']:,} held-out record{'s' * (test['n'] != 1)}"
    if story.summary.get("test_noised"):
        records = f"about {records} (a noised count)"
    return f"On {records} of all sites: {', '.join(told)}."


def _training(story: Story) -> str:
    s = story.summary
    last = story.last_test()
    names = [name for name in HEADLINE if last and name in last.all_sites]
    body = _verdict(story) + elements.key_figures(
        {
            **{name: elements.number((s["test"] or {}).get(name)) for name in names},
            "rounds": f"{s['rounds']} of {s['rounds_asked']}",
            "time a round": elements.number(s["seconds"]["per_round"], " s"),
            "sent": elements.size(s["bytes"]["up"] + s["bytes"]["down"]),
        }
    )

    # Curves by round: how good the model is, and what a round takes
    curves = {
        name: {t: one.all_sites[name].value for t, one in story.tests.items()} for name in names
    }
    body += elements.chart(
        "How well the model does, round by round",
        "Measured on held-out records of all sites together, of which nobody's trained the model.",
        curves,
        "round",
    )
    losses = {"training loss": {t: one.loss for t, one in story.rounds.items()}}
    body += elements.chart(
        "Training loss",
        "Weighted over the sites; under secure aggregation it is not told.",
        losses,
        "round",
    )
    body += elements.chart(
        "Time of a round", "From the question to the last answer.",
        {"seconds": {t: one.seconds for t, one in story.rounds.items()}}, "round",
    )  # fmt: skip
    body += elements.chart(
        "Bytes of a round", "What sites sent, and what they were sent.",
        {
            "from sites": {t: float(one.bytes_up) for t, one in story.rounds.items()},
            "to sites": {t: float(one.bytes_down) for t, one in story.rounds.items()},
        }, "round",
    )  # fmt: skip

    # The last test: of all sites, of each, and of what the model is measured against
    if last:
        body += (
            "<h2>The last test</h2><p class=note>With 95 % intervals where they were measured. "
            "ece and brier say how well predicted chances are calibrated: 0 is best.</p>"
        )
        body += _table_of_tests(story, last) + _confusion(last) + _calibration(last)
    return body


def _table_of_tests(story: Story, last: Tested) -> str:
    """Return the figures of the last test: of all sites, of each, and of the baselines."""
    figures = list(last.all_sites)
    lines = [
        [
            "all sites",
            _count(last, last.n),
            *(elements.interval(last.all_sites[name]) for name in figures),
        ]
    ]
    lines += [
        [
            site,
            _count(last, last.site_n[site]),
            *(elements.interval(mine.get(name, _UNKNOWN)) for name in figures),
        ]
        for site, mine in list(last.per_site.items())[:SHOWN]
    ]
    lines += [
        [
            f"baseline: {name}",
            _count(one, one.n),
            *(elements.interval(one.all_sites.get(f, _UNKNOWN)) for f in figures),
        ]
        for name, one in story.baselines.items()
    ]
    return elements.table(("", "records", *figures), lines)


def _count(tested: Tested, records: int) -> int | str:
    """Return a count of a test's records as it is shown: with "about" where it is noised."""
    return f"about {records}" if tested.noised else records


def _confusion(tested: Tested) -> str:
    if not tested.confusion:
        return ""
    names = tested.labels or [str(i) for i in range(len(tested.confusion))]
    lines = [[f"is {name}", *row] for name, row in zip(names, tested.confusion, strict=False)]
    head = ("records", *(f"predicted {name}" for name in names))
    said = (
        "Held-out records of all sites. A binary model predicts the second label from a chance "
        "of one half on."
    )
    if tested.noised:
        said += " The counts are noised: about so many."
    return f"<h2>Right and wrong, counted</h2><p class=note>{said}</p>{elements.table(head, lines)}"


def _calibration(tested: Tested) -> str:
    if not tested.calibration:
        return ""
    drawn = {said: truth for _, said, truth in tested.calibration}
    caption = (
        "Records by the chance that the model gave them, in tenths: what it said, and how often "
        "it was so. On the dashed line both are the same."
    )
    chart = elements.chart(
        "Calibration", caption, {"the model": drawn, "perfect": {0.0: 0.0, 1.0: 1.0}}, "chance said"
    )
    lines = [
        [int(count), elements.number(said), elements.number(truth)]
        for count, said, truth in tested.calibration
    ]
    return chart + elements.table(("records", "chance said", "share that was so"), lines)


def _devices(story: Story) -> str:
    s = story.summary
    sizes = story.planned.sizes if story.planned else {}
    asked = len(story.rounds) or 1
    share = sum(len(one.clients) for one in story.rounds.values()) / (asked * max(1, len(sizes)))
    body = _verdict(story) + elements.key_figures(
        {
            "sites": f"{len(sizes):,}",
            "took part, on average": f"{share:.0%}",
            "left out": f"{len(story.excluded)} times",
            "sent by all": elements.size(s["bytes"]["up"]),
        }
    )

    # Devices are counted
    if not story.sites:
        counts = {t: float(len(one.clients)) for t, one in story.rounds.items()}
        body += (
            "<p class=note>Each device is one patient's: none is named, only how many took "
            "part.</p>"
        )
        return body + elements.chart(
            "Devices that took part", "By round.", {"devices": counts}, "round"
        )

    # Sites are named, each with what it brought
    body += (
        "<h2>The sites</h2><p class=note>Weight: the mean share of a site's row in the model's "
        "steps, by a rule where there is one, else by its records.</p>"
    )
    body += _table_of_sites(story)
    if len(story.sites) <= 20:
        times = {
            name: {
                t: one.site_seconds[list(one.clients).index(name)]
                for t, one in story.rounds.items()
                if name in one.clients
            }
            for name in story.sites
        }
        body += elements.chart(
            "Time at each site", "What local work took, by round.", times, "round"
        )
    if story.excluded:
        left = [[one.round, one.site, one.reason] for one in merge_alike(story.excluded)[:SHOWN]]
        body += "<h2>Left out, and why</h2>" + elements.table(("round", "site", "reason"), left)
    return body + (
        "<h2>Profiles of devices</h2><p class=note>Battery, memory and reliability are not "
        "measured yet.</p>"
    )


def _table_of_sites(story: Story) -> str:
    """Return each site's records, how often it took part or was left out, its time and weight."""
    sizes = story.planned.sizes if story.planned else {}
    participation = story.summary["participation"]
    counts_are_told = not story.summary["test_noised"]
    seconds = story.seconds()
    left_out = story.left_out()
    weights = _mean_weights(story)

    lines = [
        [
            name,
            sizes[name]["train"],
            sizes[name]["test"] if counts_are_told else "not told",
            participation.get(name, 0),
            left_out[name],
            f"{statistics.median(seconds[name]):.4g} s" if seconds.get(name) else "-",
            f"{weights[name]:.1%}" if name in weights else "-",
        ]
        for name in story.sites
    ]
    head: Sequence[str] = (
        "site",
        "training records",
        "test records",
        "rounds",
        "left out",
        "median time",
        "weight",
    )
    return elements.table(head, lines)


def _privacy(story: Story) -> str:
    s = story.summary
    claim = story.claim

    # What is guaranteed
    if claim is None or not claim["claimed"]:
        body = (
            '<p class="verdict bad">Nothing is claimed: no epsilon was asked for, noise came '
            "from a seed, or the run "
        )
        body += "has not ended. A model trained so can leak who was in it.</p>"
    else:
        body = (
            '<p class="verdict">Whether any one training patient took part, with all records, '
            "changes the odds of whatever this run released by a factor of at most "
            f"e<sup>{claim['epsilon']:.3f}</sup>, but for a chance of "
            f"{claim['target']['delta']:g}.<br>{escape(claim['trust_model'])}</p>"
        )
        body += elements.key_figures(
            {
                "epsilon spent": f"{claim['epsilon']:.4f}",
                "epsilon asked": f"{claim['target']['epsilon']:g}",
                "delta": f"{claim['target']['delta']:g}",
                "declared patients": f"{claim['patients']['declared']:,}",
            }
        )

    # What was spent, by round and by patients
    spent = {t: one.privacy.get("epsilon") for t, one in story.rounds.items()}
    if any(value is not None for value in spent.values()):
        told = {t: float(str(value)) for t, value in spent.items() if value is not None}
        body += elements.chart(
            "Budget spent, round by round",
            "Epsilon of everything released so far, of the patients who have paid most.",
            {"epsilon": told},
            "round",
        )
    if story.finished and story.finished.spread:
        body += (
            "<h2>Patients by what they spent</h2><p class=note>Every patient of a site pays "
            "alike for the rounds that the site took part in. Sizes are the declared ones and "
            "rounds are public: the counts tell of nobody, and need no noise.</p>"
        )
        lines = [[f"{epsilon:.4f}", int(count)] for epsilon, count in story.finished.spread]
        body += elements.table(("epsilon spent in this run", "declared patients"), lines)

    # Who could see what, and the claim that a reviewer reads
    if story.planned:
        body += "<h2>Who could see what</h2>" + elements.table(
            ("party", "could see"), list(story.planned.sees.items())
        )
    if claim:
        body += (
            "<h2>The claim, item by item</h2><p class=note>In the order in which NIST SP "
            "800-226 asks.</p>"
        )
        body += elements.table(("item", ""), list(reports.claim_lines(claim)))
    by_phase = s["bytes_by_phase"]
    if by_phase:
        body += "<h2>Bytes of each phase of secure rounds</h2>"
        body += elements.table(
            ("phase", "bytes"), [[name, f"{count:,}"] for name, count in by_phase.items()]
        )
    return body


def _security(story: Story) -> str:
    body = _threat(story)

    # Evidence, and what was done about it
    scores = story.suspicion()
    loud = sorted(scores, key=lambda name: -sum(scores[name].values()))[:10]
    body += elements.chart(
        "Suspicion, round by round",
        "The strongest evidence against a site in a round, 0 to 10; an odd but honest hospital "
        "may stay at 2.5. The ten with most are shown. A score is evidence and no proof: a row "
        "may be odd because its patients are.",
        {name: scores[name] for name in loud},
        "round",
    )
    if story.audits:
        lines = [
            [one.round, one.client, LEVELS[one.level], one.action, "; ".join(one.evidence)]
            for one in story.audits[:SHOWN]
        ]
        body += "<h2>What was done about whom</h2>"
        body += elements.table(("round", "site", "level", "action", "evidence"), lines)
    if story.excluded:
        body += "<h2>Rows that did not count</h2>"
        left = merge_alike(story.excluded)[:SHOWN]
        body += elements.table(
            ("round", "site", "reason"), [[o.round, o.site, o.reason] for o in left]
        )
    if story.taken_back:
        lines = [
            [o.round, elements.number(o.before), elements.number(o.after)] for o in story.taken_back
        ]
        body += "<h2>Rounds taken back</h2>" + elements.table(
            ("round", "loss before", "loss after"), lines
        )
    if story.given_up:
        body += "<h2>Rounds given up</h2>" + elements.table(
            ("round", "by", "reason"), [[o.round, o.operator, o.reason] for o in story.given_up]
        )
    if story.trail:
        body += (
            "<p class=note>Check signatures and chain with <code>medfed trail verify "
            "RUN</code>.</p>"
        )
    return body


def _threat(story: Story) -> str:
    """Return the highest level of threat, in a sentence, and how much was looked at."""
    s = story.summary
    level = max((one.level for one in story.audits), default=0)
    named = ", ".join(f"{one['site']} (since round {one['since']})" for one in s["suspects"])
    looked = bool(story.inspected) or level > 0
    kind = "note"
    if not looked:
        words = "Highest level of threat: not known, as no rule compared rows. "
    else:
        kind = "verdict bad" if level >= 2 else "verdict"
        words = f"Highest level of threat: {LEVELS[level]}. "
        words += f"Suspected: {named}." if named else "Nobody was suspected."
    if story.planned and story.planned.bears:
        words += f" Malicious clients: {story.planned.bears}."
    body = f'<p class="{kind}">{escape(words)}</p>'
    body += elements.key_figures(
        {
            "warned or left out": f"{len(s['suspects'])}",
            "rounds inspected": f"{len(story.inspected)}",
            "rows refused": f"{len(story.excluded)}",
            "rounds taken back": f"{len(story.taken_back)}",
            "rounds given up": f"{len(story.given_up)}",
            "signed entries in the trail": f"{story.trail}" if story.trail else "no trail",
        }
    )
    if not story.inspected:
        body += (
            "<p class=note>No rule compared rows in this run (robustness.rule), so nothing is "
            "known of how they lie among each other. Rows that are not finite, out of bound or "
            "unsigned are refused all the same.</p>"
        )
    return body


_BODIES: Mapping[str, Callable[[Story], str]] = {
    "training_dashboard.html": _training,
    "device_analysis.html": _devices,
    "privacy_audit.html": _privacy,
    "security_analysis.html": _security,
    "report.html": _everything,
}


def _mean_weights(story: Story) -> dict[str, float]:
    """Return each site's mean weight: a rule's, else its share of the records that took part."""
    total: Counter[str] = Counter()
    for number, one in story.rounds.items():
        inspected = story.inspected.get(number)
        weights: dict[str, float] = {}
        if inspected:
            weights = dict(inspected.weights)
        elif story.planned:
            weights = {name: float(story.planned.sizes[name]["train"]) for name in one.clients}
        whole = sum(weights.values()) or 1.0
        total.update({name: weight / whole for name, weight in weights.items()})
    return {name: weight / len(story.rounds) for name, weight in total.items()}


# HTML


@cache
def _read_style() -> str:
    return STYLE.read_text(encoding="utf-8") + _STYLE


def _page(title: str, story: Story, body: str) -> str:
    from plotly.offline import get_plotlyjs

    study = escape(str(story.summary["study"]))
    links = "".join(
        f'<a href="{name}">{escape(text)}</a>' for name, text in list(PAGES.items())[: len(FOUR)]
    )
    cut = ""
    if story.cut:
        cut = (
            "<p class=note>The event log ends within a line: this page shows what was written "
            "before.</p>"
        )
    warned = "".join(f"<li>{escape(text)}</li>" for text in story.summary["warnings"][:20])
    warnings = ""
    if warned:
        warnings = (
            f"<details open><summary>Warnings of the run</summary><ul>{warned}</ul></details>"
        )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(title)}: {study}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_read_style()}</style>"
        f'<script>{get_plotlyjs()}</script></head><body><nav aria-label="pages">{links}</nav>'
        f"<main><h1>{escape(title)}: {study}</h1>{cut}{_findings(story)}{body}{warnings}"
        "</main></body></html>\n"
    )


def _findings(story: Story) -> str:
    """Return what the run's figures mean, as a page's first lines."""
    kinds = {"warning": "verdict bad", "note": "note"}
    told = story.summary["findings"]
    return "".join(
        f'<p class="{kinds[one["level"]]}">{escape(one["text"])} {escape(one["next"])}</p>'
        for one in told
    )
