"""Reports for people: pages made from what a run left behind, readable without a network."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from medfed.core.checks import some

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 "
    "1rem;color:#1c2733}"
    "h1{font-size:1.5rem}p.verdict{font-size:1.15rem;padding:1rem;border-left:5px solid "
    "#2a7f62;background:#eef6f2}p.none{border-color:#b3261e;background:#fbeeed}"
    "th{text-align:left;vertical-align:top;padding:.35rem 1.5rem .35rem "
    "0;white-space:nowrap}td{padding:.35rem 0}td{padding-right:1.5rem}tr{border-top:1px solid "
    "#d8dee4}table{border-collapse:collapse;width:100%}"
)


def claim_lines(claim: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a claim as (item, text) lines, in the order in which a reviewer asks."""
    epsilon = claim["epsilon"]
    target = claim["target"]
    if epsilon is None:
        spent = "nothing is claimed"
    else:
        spent = f"{epsilon:.6f} (target {target['epsilon']:g})"
    patients = claim["patients"]
    clip = claim["clipping"]
    second = claim["second_accountant"]
    yield "epsilon", spent
    yield (
        "delta",
        f"{target['delta']:g}; 1/n is {patients['one_over_n']:.3g} for {patients['declared']:,} "
        "declared patients",
    )
    yield "unit", claim["unit"]
    yield "adjacency", claim["adjacency"]
    yield "trust model", claim["trust_model"]
    yield "mechanism", claim["mechanism"]
    yield (
        "clipping",
        f"{clip['kind']}, norm C = {clip['norm']:g}, rounding slack {clip['slack']:.2g} counted",
    )
    yield from _noise_lines(claim["noise"])
    yield "sampling", claim["sampling"]
    rounds = claim["rounds"]
    covered = claim.get("charge_scope") or claim["a_payment_covers"]  # schema 1 calls it so
    yield (
        "rounds",
        f"{rounds['planned']} planned; payments: {rounds['paid']}, each for {covered}; "
        f"noised steps in a round: {_per_site(claim['steps_per_round'])}",
    )
    if ranges := claim.get("ranges"):
        yield (
            "ranges",
            f"{ranges['mechanism']}; {ranges['times']} times for {len(ranges['columns'])} "
            f"columns, noise multiplier {ranges['noise_multiplier']:.6g}, epsilon "
            f"{ranges['epsilon_alone']:g} alone, within the whole",
        )
    yield "accountant", f"{claim['accountant']['name']}; {claim['accountant']['version']}"
    if second:
        yield "second accountant", f"{second['name']}: epsilon {second['epsilon']:.6f}"
    scope = claim["composition"]
    yield "composition", scope["meaning"]
    if scope["ledger"]:
        yield from _ledger_lines(scope["ledger"])
    yield "random generator", claim["random_generator"]
    yield "not protected", "; ".join(claim["unprotected"])
    yield "assumptions", "; ".join(claim["assumptions"])
    yield "audit", _audit(claim["audit"])


def _noise_lines(noise: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "noise multiplier", _per_site(noise["multiplier"])
    yield "grid", f"step {noise['grid']}; noise sd in steps: {_per_site(noise['sd_in_grid_steps'])}"
    # schema 1 calls it so
    excess = noise.get("noise_sd_ratio", noise.get("standard_deviations_of_need", 1.0))
    if excess > 1:
        yield (
            "joint noise",
            f"{excess:.2f} times the standard deviation needed: more parties add a part than "
            "must be honest",
        )


def _ledger_lines(ledger: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    head = ledger["head"]
    if not isinstance(head, str):  # each site has a ledger of its own
        head = ", ".join(f"{one} ({site})" for site, one in head.items())
    yield (
        "ledger",
        f"epsilon over all runs of the study {ledger['epsilon_all_runs']:.6f}; head {head}",
    )
    if bound := ledger.get("lifetime"):
        yield (
            "lifetime budget",
            f"epsilon {bound['epsilon']:g} at delta {bound['delta']:g} for each patient over "
            "all studies, kept in the sites' ledger; ids are one patient by the rule "
            f"{bound['identity']!r}",
        )


def privacy_page(claim: Mapping[str, Any]) -> str:
    """Return a claim as one page of HTML without outside parts."""
    rows = "".join(
        f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
        for name, text in claim_lines(claim)
    )
    name = escape(str(claim["study"]))
    if claim["claimed"]:
        verdict = (
            "Whether any one training patient took part, with all records, changes the "
            "probability of whatever this run released by a factor of at most "
            f"e<sup>{claim['epsilon']:.3f}</sup>, but for a chance of "
            f"{claim['target']['delta']:g}."
        )
    else:
        verdict = (
            "Nothing is claimed: the noise of this run came from a seed (privacy.simulation_only)."
        )

    kind = "verdict" if claim["claimed"] else "verdict none"
    return _page(f"Privacy of {name}", f'<p class="{kind}">{verdict}</p><table>{rows}</table>')


def _page(title: str, body: str) -> str:
    """Return a page under a title; both are HTML already."""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{title}</h1>{body}</body></html>\n"
    )


def _per_site(value: float | Mapping[str, float]) -> str:
    if isinstance(value, Mapping):
        return some((f"{site} {number:.6g}" for site, number in value.items()), 8)
    return f"{value:.6g}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "none yet; `medfed audit RUN` runs one on a twin"
    return "; ".join(f"{part['name']}: {part['told']}" for part in audit["parts"])


def comparison_page(found: Mapping[str, Any]) -> str:
    """Return a comparison of algorithms (`Comparison.to_json`)
    as one page of HTML without outside parts.
    """
    names = [name for name, value in found["table"][0].items() if isinstance(value, Mapping)]
    head = "".join(
        f"<th scope=col>{escape(name)}</th>"
        for name in ("algorithm", *names, "accuracy", "seconds", "MB up")
    )
    body = "".join(
        f"<tr><th scope=row>{escape(line['algorithm'])}</th>"
        + "".join(
            f"<td>{line[name]['mean']:.4g} &plusmn; {line[name]['sd']:.2g}</td>" for name in names
        )
        + f"<td>{_share(line['accuracy'])}</td>"
        f"<td>{line['seconds']:.2f}</td><td>{line['bytes_up'] / 1e6:.2f}</td></tr>"
        for line in found["table"]
    )
    pairs = "".join(
        f"<tr><td>{escape(d['figure'])}</td><td>{escape(d['first'])} - {escape(d['second'])}</td>"
        f"<td>{d['mean']:+.4g}</td><td>{d['p']:.3f}</td></tr>"
        for d in found["differences"]
    )
    verdicts = "".join(f"<li>{escape(text)}</li>" for text in found["verdicts"])
    score = escape(found["table"][0]["score"])
    said = (
        f"{found['table'][0]['seeds']} seeds, noise: {escape(found['noise'])}; mean and "
        "standard deviation over seeds."
    )

    return _page(
        f"Algorithms on {escape(found['study'])}",
        f"<ul>{verdicts}</ul>{_curves(found['runs'], score)}<p>{said} The target is a score of "
        f"{found['target']:.4f}.</p><table><tr>{head}</tr>{body}</table><h2>Differences, seed by "
        "seed</h2><p>Mean of first minus second; p of Wilcoxon's signed ranks, after Holm.</p>"
        f"<table><tr><th>figure</th><th>pair</th><th>difference</th><th>p</th></tr>{pairs}</table>",
    )


# Okabe and Ito
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def _curves(trained: Sequence[Mapping[str, Any]], score: str) -> str:
    """Return the mean score of each algorithm by round as a drawing."""
    by_name: dict[str, list[Sequence[float]]] = {}
    for run in trained:
        by_name.setdefault(run["algorithm"], []).append(run["curve_T"])
    means = {
        name: [sum(column) / len(column) for column in zip(*curves, strict=True)]
        for name, curves in by_name.items()
    }
    low = min(min(mean) for mean in means.values())
    high = max(max(mean) for mean in means.values())
    rounds = max(len(mean) for mean in means.values())
    span = (high - low) or 1.0
    lines = ""
    keys = ""

    for i, (name, mean) in enumerate(means.items()):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(
            f"{60 + 720 * t / max(1, rounds - 1):.1f},{280 - 250 * (value - low) / span:.1f}"
            for t, value in enumerate(mean)
        )
        lines += f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
        keys += (
            f'<text x="{70 + 130 * i}" y="320" fill="{colour}" '
            f'font-weight="600">{escape(name)}</text>'
        )

    return (
        f'<svg viewBox="0 0 800 335" role="img" aria-label="mean {score} by round; the table '
        'below has the numbers" style="width:100%;font:14px system-ui,sans-serif"><text x="0" '
        f'y="34">{high:.3f}</text><text x="0" y="284">{low:.3f}</text><line x1="60" y1="280" '
        'x2="780" y2="280" stroke="#8a949e"/><text x="60" y="300">round 1</text><text x="780" '
        f'y="300" text-anchor="end">{rounds}</text>{lines}{keys}</svg>'
    )
