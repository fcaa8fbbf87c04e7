"""How long a row may be under one joint noise: what a liar among hospitals can put in a sum.

A site's row is the sum of its patients' gradients, each clipped to norm 1 (in units of
`privacy.clip`), so that m declared patients sum to m at most. Honest sums are far shorter: patients
pull in many directions, and near the optimum they cancel. A liar's need not be, and fourteen full
rows of fifty outweigh the rest. So all rows are held to one length, a small share of a mean site's
patients, the cap: honest rows are cut to it too, and what they agree on still adds up, as under the
geometric median, where every row counts by its direction.

The projection onto a ball moves no two rows apart, so that a patient moves a sum no further than
before: noise and epsilon stay as they are. All of it follows from public facts, so that a site cuts
its own row, and aggregators hold every site to the same in secret.
"""

import math

from medfed.core.checks import PlanError
from medfed.learn.algorithms import ALGORITHMS
from medfed.privacy import guarantee as guarantees
from medfed.privacy.guarantee import Guarantee
from medfed.study import Study

TRAVEL = 50.0
"""How far a model may go in a run whose every row is cut and points one way: in units of weights on
columns of scale 1, some ten times what a model needs, as liars and disagreement take most of it.
"""

LEAST = 0.02
"""The least cap where the server's step has a length of its own (fedadam and its like)."""

ABOVE_NOISE = 1.5
"""The least cap beside the length of the noise on a mean row: what is shorter is not heard."""

OUTVOTED = 0.02
"""Liars' share of the sites times the cap from which on they outweigh the rest: near the optimum an
honest site's sum is about a twentieth of its patients long.
"""


def cap(study: Study, guarantee: Guarantee) -> float:
    """Return how long a site's clipped sum may be, as a share of a mean site's patients: in (0, 1].

    `robustness.cap` where it is set. Else 1 where no site is said to lie; and where some may, the
    least with which the model still learns: far enough in the run's rounds, and above the noise.
    Measured on made-up networks of hospitals: docs/robustness.md.
    """
    robust = study.robustness
    wary = robust.max_malicious > 0 or robust.rule == "auto"
    if not holds_rows(study) or not (robust.cap or wary):
        return 1.0
    if robust.cap:
        return robust.cap

    release = next(iter(guarantee.releases.values()))
    patients = sum(one.expected for one in guarantee.releases.values())
    noise = release.noise_multiplier * math.sqrt(guarantee.parameters) / patients
    return min(1.0, max(_least_to_learn(study, guarantee.clip), ABOVE_NOISE * noise))


def check(study: Study, guarantee: Guarantee, malicious: int) -> None:
    """Raise PlanError where no cap that was not asked for holds so many `malicious` sites back."""
    share = cap(study, guarantee)
    part = malicious / len(guarantee.releases)
    if study.robustness.cap or not holds_rows(study) or part * share <= OUTVOTED:
        return

    more = "raise privacy.epsilon, or enrol more patients"
    if _least_to_learn(study, guarantee.clip) < share:
        why = f"the noise on a mean row is as long: {more}"
    elif "training.rounds" in study.chosen:
        why = f"so few patients bear no more and no larger steps at this epsilon: {more}"
    else:
        why = (
            "shorter rows would not get far enough in so few and small steps: raise "
            "training.rounds or training.learning_rate, or leave both to medfed"
        )
    raise PlanError(
        f"robustness.max_malicious={study.robustness.max_malicious:g} is not borne: rows would "
        f"have to be held to {OUTVOTED / part:.2g} of a mean site's patients, and are to "
        f"{share:.2g}, as {why}. Or set robustness.cap, and see what it bears in a simulation."
    )


def _least_to_learn(study: Study, clip: float) -> float:
    """Return the cap with which weights can move by TRAVEL in the study's rounds."""
    training = study.training
    slots = ALGORITHMS[training.algorithm].start(training)
    if "v" in slots:  # the step is divided by its own usual size
        return LEAST
    step = training.learning_rate * clip * (training.server_learning_rate or 1.0)
    if "momentum" in slots:
        step /= 1 - training.server_momentum
    return TRAVEL / (training.rounds * step)


def holds_rows(study: Study) -> bool:
    """Say whether somebody holds rows to the norm of clipped sums: three aggregators, in secret."""
    joint = guarantees.asked(study) and guarantees.mode(study) != "site"
    return joint and study.security.aggregation == "three-party"


def row_limits(study: Study, guarantee: Guarantee) -> dict[str, float]:
    """Return each site's longest row, in clipping norms.

    Its declared patients; and with a cap no more than that share of a mean site's, the same for
    large and small ones: the largest third of hospitals may hold two thirds of the patients, and
    must not outvote the rest.
    """
    releases = guarantee.releases
    share = cap(study, guarantee)
    if share == 1:
        return {name: float(one.size) for name, one in releases.items()}
    most = share * sum(one.expected for one in releases.values()) / len(releases)
    return {name: min(float(one.size), most) for name, one in releases.items()}
