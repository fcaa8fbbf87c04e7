"""The claim: what a run guarantees to a patient, in words and numbers that a reviewer can check
(privacy.json).

Its fields are what NIST SP 800-226 asks a differential privacy guarantee to state.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from medfed.core import files
from medfed.core.checks import PlanError, RunError, plain, some
from medfed.core.types import JSON
from medfed.data.features import open_columns
from medfed.planning.plan import Plan
from medfed.planning.resolved import excess, holders
from medfed.privacy import accounting
from medfed.privacy.guarantee import (
    COUNT_NOISE,
    GRID,
    SLACK,
    Guarantee,
    counted_together,
    ranges_sensitivity,
    repeat,
    resolve,
    summed_sd,
)
from medfed.privacy.quantiles import LEAST
from medfed.privacy.run_meter import RunMeter
from medfed.privacy.statement import Statement, combine_charged
from medfed.screens import reports
from medfed.study import Study

_TRUST = {
    "site": (
        "Each site adds noise to every local step before anything leaves it; nobody else need "
        "be trusted."
    ),
    "central": (
        "The coordinator sees each site's clipped sum, and its counts, without noise, adds the "
        "noise, and is trusted with it."
    ),
    "plain": (
        "One noise is added to the sum of all sites' rows. security.aggregation='plain': "
        "whoever combines the rows sees each site's clipped sum, and its counts, without noise, "
        "and is trusted with it. In this engine that is the process that runs the simulation."
    ),
    "masked": (
        "Rows are summed under masks and each site adds a part of the noise to its own: the "
        "server sees the noised sum alone. Trusted are {holders} of the sites that stay to the "
        "end: not to tell the server their parts of the noise."
    ),
    "three-party": (
        "Rows are shared among three aggregators, each of which adds a part of the noise before "
        "the sum is opened: nobody sees a row or a sum without noise. Trusted are any two of "
        "the three: two that work together read every row."
    ),
}
_MECHANISM = {
    "independent": (
        "Gaussian mechanism on sums of clipped per-patient gradients: discrete Gaussian noise "
        "on an integer grid."
    ),
    "correlated": (
        "Matrix mechanism (banded Toeplitz strategy) on sums of clipped per-patient gradients: "
        "discrete Gaussian noise on an integer grid, correlated over rounds."
    ),
}
_CHARGE_SCOPE = {
    "independent": "a round",
    "correlated": "the whole run: its noise is correlated over rounds",
}
_GENERATOR = {
    "seed": "SplitMix64 from the study's seed: nothing is claimed",
    "system": (
        "AES-256 in counter mode, key from the operating system; exact tables of the discrete "
        "Gaussian, whose total variation distance from the ideal is charged to delta"
    ),
}


def claim(
    plan: Plan, budget: RunMeter, told: Mapping[str, Statement], together: bool = True
) -> JSON:
    """Return the claim of a run that has spent what `budget`
    counts and each site has `told` of its ledger.

    `together`: all parties were in one process, which sees who is at which site.
    """
    guarantee = plan.guarantee
    study = plan.study
    assert guarantee is not None
    spent = budget.claim()
    uses: dict[str, int] = getattr(budget, "uses", {})
    asked: dict[str, int] = getattr(budget, "asked", {})
    patients = sum(release.size for release in guarantee.releases.values())
    counted = 0.0 if spent["epsilon"] is None else float(str(spent["epsilon"]))

    return {
        "schema": SCHEMA,
        "study": study.study.name,
        "digest": study.digest(),
        "claimed": not guarantee.simulation_only,
        "epsilon": spent["epsilon"],
        "delta": spent["delta"],
        "target": {"epsilon": guarantee.epsilon, "delta": guarantee.delta},
        "unit": "patient: all records of one training patient, over the whole run",
        "adjacency": _adjacency(plan),
        "trust_model": _trust(plan, together),
        "mechanism": _MECHANISM["correlated" if guarantee.strategy else "independent"],
        "clipping": {"kind": guarantee.clipping, "norm": guarantee.clip, "slack": SLACK},
        "noise": _noise(plan),
        "sampling": _sampling(guarantee),
        "steps_per_round": _once_or_by_site(
            guarantee, {name: release.steps for name, release in guarantee.releases.items()}
        ),
        "rounds": {
            "planned": study.training.rounds,
            "spare": study.privacy.spare_rounds,
            "paid": max(uses.values()),
        },
        "ranges": _ranges(plan, asked.get("ranges", 0)),
        "threshold": _threshold(plan, asked.get("threshold", 0)),
        "vote": _vote(plan, asked.get("vote", 0)),
        "held_out": _held_out(plan),
        "charge_scope": _CHARGE_SCOPE["correlated" if guarantee.strategy else "independent"],
        "patients": {
            "declared": patients,
            "one_over_n": 1 / patients,
            "delta_below_one_over_n": guarantee.delta < 1 / patients,
        },
        "accountant": {
            "name": _ACCOUNTANTS[guarantee.accountant],
            "version": f"dp-accounting {version('dp-accounting')}",
            "delta_taken_by_the_noise_sampler": guarantee.delta_sampler,
        },
        "second_accountant": None if guarantee.simulation_only else _second(guarantee, uses, asked),
        "composition": {
            "scope": study.privacy.scope,
            "meaning": _SCOPE[study.privacy.scope],
            "ledger": combine_charged(told, counted),
        },
        "max_sites_per_patient": guarantee.max_sites,
        "unprotected": _list_unprotected(plan),
        "assumptions": _assumptions(plan, together),
        "random_generator": _GENERATOR["seed" if guarantee.simulation_only else "system"],
        "audit": None,
    }


SCHEMA = 2
"""Of `privacy.json`. In 1 `noise_sd_ratio` was `standard_deviations_of_need`, `charge_scope` was
`a_payment_covers`.
"""

_ACCOUNTANTS = {
    "gdp": (
        "Gaussian differential privacy, exact for Gaussian steps on all patients (Dong et al. 2022)"
    ),
    "rdp": "Renyi differential privacy (Mironov 2017; Mironov et al. 2019)",
    "pld": "privacy loss distribution (Koskela et al. 2020)",
}
_SCOPE = {
    "study": "all runs of the study on the same patients, in the sites' lifetime ledger",
    "run": (
        "this run alone. Other runs on the same patients are not counted: for public data and "
        "benchmarks only"
    ),
}


def _trust(plan: Plan, together: bool) -> str:
    assert plan.guarantee is not None
    mode = plan.guarantee.mode
    way = plan.study.security.aggregation
    kind = way if mode == "shared" else mode
    said = _TRUST[kind].format(holders=holders(plan.study, plan.participants))
    if mode == "shared" and way != "plain":
        if plan.rule is not None:
            said += (
                " A rule reads how rows compare: their Gram matrix, noised too, is opened each "
                "round to the coordinator and the aggregators, and paid for within the round."
            )
        if not plan.study.security.federation:
            said += (
                " The coordinator says whose keys count, and is trusted not to put its own in "
                "another's place: the study names no list of members (security.federation)."
            )
        if together:
            said += " In this engine all parties run in one process, whose owner sees everything."
        else:
            said += " Each party ran in a process of one machine, whose owner sees everything."
    return said


def _noise(plan: Plan) -> JSON:
    """Return what noise a round's sum carries:
    its multiplier, and its standard deviation in steps of the grid.
    """
    guarantee = plan.guarantee
    assert guarantee is not None
    releases = guarantee.releases

    return {
        "mode": guarantee.mode,
        "multiplier": _once_or_by_site(
            guarantee, {name: release.noise_multiplier for name, release in releases.items()}
        ),
        "grid": f"C x {GRID:g}",
        "sd_in_grid_steps": _once_or_by_site(
            guarantee, {name: guarantee.sigma_units(name) for name in releases}
        ),
        "noise_sd_ratio": _noise_excess(plan),
        "count_noise": COUNT_NOISE if guarantee.clipping == "adaptive" else None,
        "strategy": list(guarantee.strategy) or None,
    }


def _once_or_by_site(guarantee: Guarantee, each: Mapping[str, float]) -> float | dict[str, float]:
    """Return a figure of all sites by site; once where noise is joint, as they are alike then."""
    if guarantee.joint:
        return next(iter(each.values()))
    return dict(each)


def _noise_excess(plan: Plan) -> float:
    """Return how many times the needed standard deviation
    the sum carries where every holder adds its part.
    """
    guarantee = plan.guarantee
    assert guarantee is not None
    if guarantee.joint and not guarantee.simulation_only:
        return excess(plan.study, plan.participants)
    return 1.0


def _adjacency(plan: Plan) -> str:
    if plan.study.sites.kind == "device":
        return (
            "one patient's records against none on the same device; that the device takes part "
            "is seen"
        )
    return "add or remove one patient"


def _sampling(guarantee: Guarantee) -> str:
    sampled = [release for release in guarantee.releases.values() if release.probability < 1]
    if not sampled:
        return (
            "every patient of a participating site takes part in every step; no amplification "
            "is claimed"
        )

    sites = len(guarantee.releases)
    if guarantee.joint:
        size = sum(release.size for release in guarantee.releases.values()) / sites
    else:
        size = sampled[0].size
    expected = size * sampled[0].probability
    cap = sampled[0].cap

    law = f"each patient by an independent secret coin (Poisson), {expected:g} expected in a batch"
    if guarantee.joint and sites > 1:
        law += ", at a site of the mean size"
    if cap:
        law += f", truncated to {cap} patients and counted with half the noise"
    if len(sampled) == len(guarantee.releases):
        return law
    return f"{law}; sites of no more patients take all of them"


def _second(guarantee: Guarantee, uses: dict[str, int], asked: dict[str, int]) -> JSON:
    """Recompute the worst patient's epsilon by another accountant."""
    name = "rdp" if guarantee.accountant == "pld" else "pld"
    events = {
        guarantee.compose_paid(guarantee.releases[n], count, asked) for n, count in uses.items()
    }
    found = [
        accounting.epsilon_of(event, guarantee.delta - guarantee.delta_sampler, name)
        for event in events
        if event
    ]
    return {"name": _ACCOUNTANTS[name], "epsilon": max(found, default=0.0)}


def _ranges(plan: Plan, times: int) -> JSON | None:
    """Return what finding ranges has released of training patients; None where all are declared."""
    guarantee = plan.guarantee
    assert guarantee is not None
    if "ranges" not in guarantee.queries:
        return None
    query = guarantee.queries["ranges"]
    columns = open_columns(plan.study)

    return {
        "unit": (
            "patient: one known cell of each column, so that a patient moves one count of each by 1"
        ),
        "mechanism": (
            "discrete Gaussian noise on counts of training patients by value; of them follow ranges"
        ),
        "columns": list(columns),
        "found": {name: list(ends) for name, ends in plan.encoding.found_ranges().items()},
        "sensitivity": ranges_sensitivity(len(columns)),
        "noise_multiplier": query.noise_multiplier,
        "epsilon_alone": query.epsilon,
        "noised_at": _noised_at(plan.study),
        "times": query.times,
        "released": times,
    }


def _threshold(plan: Plan, times: int) -> JSON | None:
    """Return what choosing the threshold on training patients has released; None where nothing."""
    guarantee = plan.guarantee
    rule = plan.study.rule()
    assert guarantee is not None
    if not rule.chosen:
        return None
    return {
        "rule": plan.study.data.threshold,
        "mechanism": (
            "discrete Gaussian noise on counts of training patients by score, one record each"
        ),
        "noise_multiplier": guarantee.queries["threshold"].noise_multiplier,
        "noised_at": _noised_at(plan.study),
        "released": times,
    }


def _vote(plan: Plan, times: int) -> JSON | None:
    """Return what a vote of sites on their own models has released; None where there is none."""
    guarantee = plan.guarantee
    assert guarantee is not None
    if "vote" not in guarantee.queries:
        return None
    if plan.study.data.test_is_public:
        payers = "training patients"
    else:
        payers = "training and held-out patients, these beside their test"

    return {
        "unit": (
            "patient: a site's own model and its test move by any patient of the site, its vote "
            "by 1 at most"
        ),
        "mechanism": "discrete Gaussian noise on the sum of the sites' votes, each between 0 and 1",
        "noise_multiplier": guarantee.queries["vote"].noise_multiplier,
        "noised_at": _noised_at(plan.study),
        "paid_by": payers,
        "released": times,
    }


def _held_out(plan: Plan) -> JSON | None:
    """Return what a test on held-out patients who are not public releases of each; None where they
    are, or none is.
    """
    study = plan.study
    if study.data.test_is_public or not study.privacy.evaluation_epsilon:
        return None
    return {
        "unit": "patient: one record of one held-out patient, for each test",
        "mechanism": "two-sided geometric noise on counts of scores by label",
        "epsilon": study.privacy.evaluation_epsilon,
        "noised_at": _noised_at(study),
        "paid": "once" if counted_together(study) else "at each site that holds the patient out",
    }


def _noised_at(study: Study) -> str:
    return "the sum of all sites" if counted_together(study) else "each site"


def _list_unprotected(plan: Plan) -> list[str]:
    study = plan.study
    public = plan.study.data.test_is_public
    listed = [
        "declared sizes of the sites, names of columns, labels and sites: public constants of "
        "the study",
        "which sites took part in which round, and how long they took",
        "that a site refused its table or a round, with the reason",
    ]
    if public:
        listed.append("how many records are held out for testing at each site")

    if study.sites.kind == "device":
        listed.append(
            "which patients have a device, and when it takes part; hidden is what their records "
            "hold"
        )

    if public:
        listed.append(
            "held-out patients: declared public test data; their figures are told as they are"
        )

    if study.privacy.scope == "run" and study.monitor.baselines and public:
        listed.append(
            "baselines (each site alone, pooled rows): trained without noise, for comparison on "
            "public data"
        )

    return listed


_READ_OFF = (
    "these records are public: ranges, categories, labels or sizes were read off them "
    "(data.read_from_records=true), and nothing here covers that"
)
_PUBLIC = (
    "ranges, categories and labels in the data dictionary are public knowledge, not taken from "
    "these patients"
)


def _assumptions(plan: Plan, together: bool) -> list[str]:
    study = plan.study
    how = "attested, not measured"
    if study.data.patient and together:
        how = "checked by name in this process"

    found = [
        f"no patient has records at more than {study.privacy.max_sites_per_patient} sites ({how})",
        _READ_OFF if study.data.read_from_records else _PUBLIC,
        "model, features and settings were chosen without looking at these training patients, or "
        "that was charged",
    ]
    if plan.away:
        found.append(
            f"{some(plan.away)} answered nothing when the run was resumed: counted there is all "
            "that the plan holds; what its patients have spent in other runs is not"
        )
    if not study.data.patient:
        found.append("one row is one patient: the table names no patient column")
    else:
        found.append(
            "each patient has one id, but for spellings that the identity rule takes for one"
        )

    return found


def read(folder: Path) -> dict[str, Any]:
    """Return a run's claim; raise RunError where there is none."""
    path = folder / "privacy.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"{str(folder)!r} holds no claim: no epsilon was asked for, or the run has not ended "
            f"({plain(error)})"
        ) from error
    return found


def outlook(plan: Plan) -> dict[str, Any]:
    """Return what the noise will be, before training: for the study's own mode and the other one.

    snr is the largest possible ratio of signal to noise in the gradient of one step, all patients
    pulling one way; over a round's and a run's steps it grows by their square root where they are
    averaged.
    """
    guarantee = plan.guarantee
    study = plan.study
    if guarantee is None:
        raise PlanError(
            "the study asks for no guarantee. Set privacy.epsilon=1.0 and privacy.delta=1e-6, "
            "and see what it costs."
        )
    sizes = {name: release.size for name, release in guarantee.releases.items()}
    modes: dict[str, Any] = {}
    for noise in dict.fromkeys((guarantee.mode, "site", "shared")):
        # sites' noise is never correlated
        correlated = study.privacy.correlated and noise != "site"
        privacy = dataclasses.replace(study.privacy, noise=noise, correlated=correlated)
        other = dataclasses.replace(study, privacy=privacy)
        each = guarantee
        if noise != guarantee.mode:
            each = resolve(other, sizes, plan.parameters)
        modes[noise] = [_outlook(each, name, study.training.rounds) for name in _choose_shown(each)]
    return {
        "study": study.study.name,
        "epsilon": guarantee.epsilon,
        "delta": guarantee.delta,
        "patients": sum(sizes.values()),
        "parameters": plan.parameters,
        "rounds": study.training.rounds,
        "accountant": _ACCOUNTANTS[guarantee.accountant],
        "ranges": _ranges_ahead(plan),
        "modes": modes,
    }


def _ranges_ahead(plan: Plan) -> JSON | None:
    """Return with how much noise ranges will be found: on each count of all sites, in patients;
    None where none are.
    """
    guarantee = plan.guarantee
    columns = open_columns(plan.study)
    assert guarantee is not None
    if not columns:
        return None
    each = guarantee.query_sd("ranges", ranges_sensitivity(len(columns)))
    sd = summed_sd(plan.study, each, len(plan.participants))
    return {
        "columns": list(columns),
        "epsilon": plan.study.privacy.ranges_epsilon,
        "noise_sd": sd,
        "least": LEAST * sd,
    }


def _choose_shown(guarantee: Guarantee) -> list[str]:
    """Name one client of each kind: all alike need one line."""
    seen = {
        (r.size, r.steps, r.probability): name
        for name, r in reversed(list(guarantee.releases.items()))
    }
    return list(reversed(seen.values()))


def _outlook(guarantee: Guarantee, name: str, rounds: int) -> dict[str, Any]:
    release = guarantee.releases[name]
    snr = guarantee.signal_to_noise(name)
    whole = repeat(guarantee.whole(name), guarantee.copies)
    return {
        "site": name,
        "declared": release.size,
        "probability": release.probability,
        "steps_per_round": release.steps,
        "noise_multiplier": release.noise_multiplier,
        "epsilon_of_a_round": guarantee.epsilon_of(release.event()),
        "epsilon": guarantee.epsilon_of(whole),
        "snr_step": snr,
        "snr_run": snr * math.sqrt(release.steps * rounds),
    }


def write_page(run: str | Path, out: str | Path | None = None) -> Path:
    """Write a run's claim as a page and return where:
    `out`, or reports/privacy.html in the run's folder.
    """
    run = Path(run)
    path = Path(out) if out else run / "reports" / "privacy.html"
    page = reports.privacy_page(read(run))
    files.make_folder(path.parent)
    files.write(path, page)
    return path
