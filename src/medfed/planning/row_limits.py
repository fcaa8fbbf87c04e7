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
from medfed.planning.cohorts import cohort
from medfed.privacy import guarantee as guarantees
from medfed.privacy.guarantee import GRID, Guarantee
from medfed.study import Study

TRAVEL = 50.0
"""How far a model may go in a run whose every row is cut and points one way: in units of weights on
columns of scale 1, some ten times what a model needs, as liars and disagreement take most of it.
"""

LEAST = 0.02
"""The least cap where the server's step has a length of its own (fedadam and its like)."""

ABOVE_NOISE = 1.25
"""The least cap beside the length of the noise on a mean row: what is shorter is not heard."""

OUTVOTED = 0.02
"""How long all liars' rows may be together, as a share of a round's patients, before they outweigh
the rest: near the optimum an honest site's sum is about a twentieth of its patients long.
"""

MOST_OF_ALL = 0.45
"""The most of the length of a round's rows that liars may hold."""


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

    # three parts of noise lie on a sum, of which two suffice
    patients = _mean_site(guarantee) * cohort(study, [*guarantee.releases])
    sigma = guarantee.sigma_units() * GRID * math.sqrt(3 / 2)
    noise = sigma * math.sqrt(guarantee.parameters) / patients
    return min(1.0, max(_least_to_learn(study, guarantee.clip), ABOVE_NOISE * noise))


def _mean_site(guarantee: Guarantee) -> float:
    """Return how many patients a mean site expects to draw."""
    releases = guarantee.releases.values()
    return sum(one.expected for one in releases) / len(releases)


def hold_by_liars(study: Study, guarantee: Guarantee, malicious: int) -> float:
    """Return the share of the length of a round's rows that so many sites may hold, where the
    longest lie and the shortest are honest.
    """
    n = cohort(study, [*guarantee.releases])
    longest = sorted(row_limits(study, guarantee).values(), reverse=True)
    return sum(longest[:malicious]) / sum(longest[:malicious] + longest[malicious - n :])


def check(study: Study, guarantee: Guarantee, malicious: int) -> None:
    """Raise PlanError where no cap holds so many `malicious` sites of a round back, but where one
    was asked for that holds them to less than the rest.
    """
    share = cap(study, guarantee)
    if not holds_rows(study):
        return

    if share < 1 and guarantee.clipping == "adaptive":
        raise PlanError(
            "privacy.clipping='adaptive' and rows that are held to one length (robustness.cap) do "
            "not compose: the count beside the gradient leaves a liar room. Set "
            "privacy.clipping='fixed'."
        )
    if not malicious:
        return

    longest = sorted(row_limits(study, guarantee).values(), reverse=True)[:malicious]
    n = cohort(study, [*guarantee.releases])
    weight = sum(longest) / (n * _mean_site(guarantee))
    where = f"robustness.max_malicious={study.robustness.max_malicious:g} is not borne"
    if weight > OUTVOTED and not study.robustness.cap:
        raise PlanError(
            f"{where}: rows would have to be held to {share * OUTVOTED / weight:.2g} of a mean "
            f"site's patients, and are to {share:.2g}, as {_why(study, guarantee)}. Or set "
            "robustness.cap, and see what it bears in a simulation."
        )

    part = hold_by_liars(study, guarantee, malicious)
    if part > MOST_OF_ALL:
        raise PlanError(
            f"{where}: sites are of such different size that {malicious} of a round hold "
            f"{part:.0%} of the length of its rows. Leave very small sites out or join them to "
            "others, or set a smaller robustness.cap."
        )


def _why(study: Study, guarantee: Guarantee) -> str:
    """Say what keeps rows from being held to less, and what would change that."""
    more = "raise privacy.epsilon, or enrol more patients"
    if _least_to_learn(study, guarantee.clip) < cap(study, guarantee):
        return f"the noise on a mean row is as long: {more}"
    if "training.rounds" in study.chosen:
        return f"so few patients bear no more and no larger steps at this epsilon: {more}"
    return (
        "shorter rows would not get far enough in so few and small steps: raise "
        "training.rounds or training.learning_rate, or leave both to medfed"
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
    most = share * _mean_site(guarantee)
    return {name: min(float(one.size), most) for name, one in releases.items()}
