"""Reports for people: pages made from what a run left behind, readable without a network."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1c2733}"
    "h1{font-size:1.5rem}p.verdict{font-size:1.15rem;padding:1rem;border-left:5px solid #2a7f62;background:#eef6f2}"
    "p.none{border-color:#b3261e;background:#fbeeed}"
    "th{text-align:left;vertical-align:top;padding:.35rem 1.5rem .35rem 0;white-space:nowrap}td{padding:.35rem 0}"
    "tr{border-top:1px solid #d8dee4}table{border-collapse:collapse;width:100%}"
)


def claim_lines(claim: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a claim as (item, text) lines, in the order in which a reviewer asks."""
    epsilon, target = claim["epsilon"], claim["target"]
    spent = "nothing is claimed" if epsilon is None else f"{epsilon:.6f} (target {target['epsilon']:g})"
    patients, clip, noise, second = claim["patients"], claim["clipping"], claim["noise"], claim["second_accountant"]
    yield "epsilon", spent
    yield (
        "delta",
        f"{target['delta']:g}; 1/n is {patients['one_over_n']:.3g} for {patients['declared']:,} declared patients",
    )
    yield "unit", claim["unit"]
    yield "adjacency", claim["adjacency"]
    yield "trust model", claim["trust_model"]
    yield "mechanism", claim["mechanism"]
    yield "clipping", f"{clip['kind']}, norm C = {clip['norm']:g}, rounding slack {clip['slack']:.2g} counted"
    yield "noise multiplier", _per_site(noise["multiplier"])
    yield "grid", f"step {noise['grid']}; noise sd in steps: {_per_site(noise['sd_in_grid_steps'])}"
    if (excess := noise.get("standard_deviations_of_need", 1.0)) > 1:
        yield (
            "joint noise",
            f"{excess:.2f} times the standard deviation needed: more parties add a part than must be honest",
        )
    yield "sampling", claim["sampling"]
    rounds = claim["rounds"]
    yield (
        "rounds",
        f"{rounds['planned']} planned; payments: {rounds['paid']}, each for {claim['a_payment_covers']}; "
        f"noised steps in a round: {_per_site(claim['steps_per_round'])}",
    )
    yield "accountant", f"{claim['accountant']['name']}; {claim['accountant']['version']}"
    if second:
        yield "second accountant", f"{second['name']}: epsilon {second['epsilon']:.6f}"
    scope = claim["composition"]
    yield "composition", scope["meaning"]
    if scope["ledger"]:
        ledger = scope["ledger"]
        yield "ledger", f"epsilon over all runs of the study {ledger['epsilon_all_runs']:.6f}; head {ledger['head']}"
    yield "random generator", claim["random_generator"]
    yield "not protected", "; ".join(claim["unprotected"])
    yield "assumptions", "; ".join(claim["assumptions"])
    yield "audit", _audit(claim["audit"])


def privacy_page(claim: Mapping[str, Any]) -> str:
    """Return a claim as one page of HTML without outside parts."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in claim_lines(claim))
    name = escape(str(claim["study"]))
    if claim["claimed"]:
        verdict = (
            f"Whether any one training patient took part, with all records, changes the probability of whatever this "
            f"run released by a factor of at most e<sup>{claim['epsilon']:.3f}</sup>, but for a chance of "
            f"{claim['target']['delta']:g}."
        )
    else:
        verdict = "Nothing is claimed: the noise of this run came from a seed (privacy.simulation_only)."
    kind = "verdict" if claim["claimed"] else "verdict none"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Privacy of {name}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f'<h1>Privacy of {name}</h1><p class="{kind}">{verdict}</p><table>{rows}</table></body></html>\n'
    )


def _per_site(value: float | Mapping[str, float]) -> str:
    if isinstance(value, Mapping):
        listed = [f"{site} {number:.6g}" for site, number in list(value.items())[:8]]
        return ", ".join(listed) + (f" and {len(value) - 8} more" if len(value) > 8 else "")
    return f"{value:.6g}"


def _audit(audit: Mapping[str, Any] | None) -> str:
    if audit is None:
        return "none yet; `medfed audit RUN` runs one on a twin"
    return "; ".join(f"{part['name']}: {part['told']}" for part in audit["parts"])
