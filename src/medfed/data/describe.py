"""What lies at each site: rows, features, gaps, classes, skew. A function of the sites' surveys."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from rich.markup import escape
from rich.table import Table


def skew(labels: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
    """Return each site's label skew:
    total variation distance between its class shares and those of all sites.

    0: the same mix; 1: nothing in common.
    """
    names = sorted({name for site in labels.values() for name in site})
    counts = np.array(
        [[site.get(name, 0) for name in names] for site in labels.values()], dtype=float
    )
    everywhere = counts.sum(0) / counts.sum()
    shares = counts / counts.sum(1, keepdims=True)
    return dict(zip(labels, (0.5 * np.abs(shares - everywhere).sum(1)).tolist(), strict=True))


def describe(surveys: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the description as plain JSON: per site the survey, share of missing cells, classes
    and label skew.
    """
    labels = {name: s["labels"] for name, s in surveys.items()}
    skews = skew(labels) if all(labels.values()) else dict.fromkeys(labels)
    sites = {}

    for name, survey in surveys.items():
        rows = survey["train"] + survey["test"]
        missing = {feature: count / rows for feature, count in survey["missing"].items()}
        sites[name] = {
            "rows": rows,
            "patients": survey["patients"],
            "spellings": survey.get("spellings", 0),
            "at_sites": survey.get("at_sites", {}),
            "train": survey["train"],
            "test": survey["test"],
            "classes": survey["labels"],
            "label_skew": skews[name],
            "missing": missing,
            "missing_share": float(np.mean(list(missing.values()))),
            "outside": dict(survey.get("outside", {})),
            "far": dict(survey.get("far", {})),
            "dropped": dict(survey.get("dropped", {})),
        }

    features = sorted({feature for s in sites.values() for feature in s["missing"]})
    texts = sorted(
        {feature for s in surveys.values() for feature, found in s["texts"].items() if found}
    )
    return {"features": features, "texts": texts, "sites": sites}


def tables(found: Mapping[str, Any], everything: bool = False) -> list[Table]:
    """Return the description as tables for a terminal: sites, and the features that have gaps.

    Of many sites, or many features, the gaps are summed up, the worst first, unless `everything` is
    asked for.
    """
    sites = found["sites"]
    labels = sorted({label for s in sites.values() for label in s["classes"]})
    texts = f", of them text: {', '.join(found['texts'])}" if found["texts"] else ", all numbers"
    first = Table(
        box=None, title=escape(f"{len(found['features'])} features{texts}"), title_justify="left"
    )

    for title in (
        "site",
        "patients",
        "rows",
        "train",
        "test",
        *labels,
        "label skew",
        "missing cells",
    ):
        first.add_column(escape(title), justify="left" if title == "site" else "right")

    for name, s in sites.items():
        counts = [
            f"{s['classes'].get(k, 0)} ({s['classes'].get(k, 0) / s['rows']:.0%})" for k in labels
        ]
        sizes = [str(s[key]) for key in ("patients", "rows", "train", "test")]
        skew_text = "-" if s["label_skew"] is None else f"{s['label_skew']:.2f}"
        first.add_row(escape(name), *sizes, *counts, skew_text, f"{s['missing_share']:.1%}")

    several = {name: s["spellings"] for name, s in sites.items() if s.get("spellings")}
    if several:
        told = ", ".join(f"{name} {count}" for name, count in several.items())
        first.caption = escape(f"patients written in more than one way (see data.identity): {told}")
        first.caption_justify = "left"

    if shared := _at_several_sites(sites):
        first.caption = "\n".join(filter(None, (str(first.caption or ""), escape(shared))))
        first.caption_justify = "left"

    if left_out := _left_out(sites):
        first.caption = "\n".join(
            filter(None, (str(first.caption or ""), escape(f"left out by data.drop: {left_out}")))
        )
        first.caption_justify = "left"

    gaps = [f for f in found["features"] if any(s["missing"].get(f, 1) > 0 for s in sites.values())]
    strange = _strange(sites)
    if not gaps:
        return [first, *strange]
    wide = len(sites) > MOST_COLUMNS or len(gaps) > MOST_LINES
    second = _sum_gaps(sites, gaps) if wide and not everything else _each(sites, gaps)

    return [first, second, *strange]


def _at_several_sites(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how many patients have records at more than one site, and what follows;
    under a claim that it is not told.
    """
    if len(sites) < 2:
        return ""
    told = [s["at_sites"] for s in sites.values()]
    if any(one is None for one in told):
        return (
            "patients at more than one site: not told under a privacy claim, where nothing of "
            "patients is told without noise; privacy.max_sites_per_patient attests it"
        )
    records = Counter[int]()  # a patient at k sites is counted at each of them
    for one in told:
        records.update(one)
    patients = {places: count // places for places, count in sorted(records.items()) if places > 1}
    if not patients:
        return ""

    each = ", ".join(f"{count} at {places} sites" for places, count in patients.items())
    return (
        f"patients at more than one site: {sum(patients.values())} ({each}); each site trains on "
        f"its own records of them. A privacy claim needs "
        f"privacy.max_sites_per_patient={max(patients)}"
    )


def _left_out(sites: Mapping[str, Mapping[str, Any]]) -> str:
    """Say how many rows were left out at which site; those that name no site once."""
    told: dict[str, list[str]] = {}
    for name, s in sites.items():
        for what, count in s.get("dropped", {}).items():
            told.setdefault(what, []).append(
                f"{count}" if what == "rows without site" else f"{name} {count}"
            )
    return "; ".join(f"{what}: {', '.join(dict.fromkeys(counts))}" for what, counts in told.items())


MOST_COLUMNS = 8
"""Sites of whom each has a column of its own."""

MOST_LINES = 40
"""Features whose gaps are told one by one."""


def _each(sites: Mapping[str, Mapping[str, Any]], gaps: Sequence[str]) -> Table:
    """Return each site's share of missing values, feature by feature."""
    table = Table(box=None, title="missing values", title_justify="left")
    for title in ("feature", *sites):
        table.add_column(escape(title), justify="left" if title == "feature" else "right")
    for feature in gaps:
        table.add_row(
            escape(feature), *(f"{s['missing'].get(feature, 1):.0%}" for s in sites.values())
        )
    return table


def _sum_gaps(sites: Mapping[str, Mapping[str, Any]], gaps: Sequence[str]) -> Table:
    """Return where values are missing most:
    over all rows, at how many sites wholly, and at which most of all.
    """
    rows = sum(s["rows"] for s in sites.values())
    share = {
        f: sum(s["missing"].get(f, 1) * s["rows"] for s in sites.values()) / rows for f in gaps
    }
    worst = sorted(gaps, key=lambda f: -share[f])
    table = Table(box=None, title="missing values, the worst first", title_justify="left")
    for title in ("feature", "of all rows", "sites with no value", "most at"):
        table.add_column(title, justify="left" if title in ("feature", "most at") else "right")

    for feature in worst[:MOST_LINES]:
        lack = {name: s["missing"].get(feature, 1) for name, s in sites.items()}
        most = sorted(lack, key=lambda name: -lack[name])[:5]
        told = ", ".join(f"{name} {lack[name]:.0%}" for name in most if lack[name])
        empty = sum(value == 1 for value in lack.values())
        table.add_row(escape(feature), f"{share[feature]:.0%}", str(empty), escape(told))

    if len(worst) > MOST_LINES:
        table.caption = (
            f"and {len(worst) - MOST_LINES} features with fewer gaps; --all tells each site's"
        )
        table.caption_justify = "left"

    return table


def _strange(sites: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Return a table of numbers that may be wrong, or nothing where there is none."""
    words = {
        "outside": "outside the declared range",
        "far": "1,000 times as far from the median as any other",
    }
    table = Table(box=None, title="numbers to look at", title_justify="left")
    for title in ("site", "feature", "what", "rows", "first of them"):
        table.add_column(title, justify="right" if title == "rows" else "left")
    for name, s in sites.items():
        for kind, what in words.items():
            for feature, told in s[kind].items():
                first = ", ".join(map(str, told["first"]))
                table.add_row(escape(name), escape(feature), what, str(told["rows"]), first)
    if table.row_count:
        return [table]
    return []


def figure(found: Mapping[str, Any], title: str) -> go.Figure:
    """Return the figure: patients and classes of each site, and where values are missing."""
    sites = found["sites"]
    labels = sorted({label for s in sites.values() for label in s["classes"]})
    gaps = [f for f in found["features"] if any(s["missing"].get(f, 1) > 0 for s in sites.values())]
    drawn = make_subplots(
        rows=2 if gaps else 1,
        cols=1,
        subplot_titles=["Rows of each site, by class", "Share of missing values"][
            : 2 if gaps else 1
        ],
        vertical_spacing=0.18,
    )
    names = list(sites)
    # Okabe and Ito
    palette = [
        "#0072B2",
        "#E69F00",
        "#009E73",
        "#CC79A7",
        "#56B4E9",
        "#D55E00",
        "#F0E442",
        "#000000",
    ]
    if labels:
        for i, label in enumerate(labels):
            counts = [sites[n]["classes"].get(label, 0) for n in names]
            text = [f"{c} ({c / sites[n]['rows']:.0%})" for c, n in zip(counts, names, strict=True)]
            drawn.add_bar(
                name=label, x=names, y=counts, text=text, marker_color=palette[i % 8], row=1, col=1
            )
    else:
        drawn.add_bar(
            name="rows",
            x=names,
            y=[sites[n]["rows"] for n in names],
            marker_color=palette[0],
            row=1,
            col=1,
        )
    if gaps:
        z = [[sites[n]["missing"].get(f, 1) for n in names] for f in gaps]
        drawn.add_heatmap(
            x=names, y=gaps, z=z, zmin=0, zmax=1, colorscale="Blues", texttemplate="%{z:.0%}",
            colorbar={"title": "missing", "y": 0.2, "len": 0.4, "tickformat": ".0%"}, row=2, col=1,
        )  # fmt: skip
    drawn.update_layout(
        title=title, barmode="stack", template="plotly_white", height=900 if gaps else 500
    )
    return drawn
