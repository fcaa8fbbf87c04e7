"""What a ledger is told and tells: cohorts, charges, limits, the lifetime budget, accounts."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from medfed.core.checks import PlanError
from medfed.core.patient_ids import Rule
from medfed.privacy.privacy_events import Event


@dataclass(frozen=True)
class Cohort:
    """A site's roster of patients, enrolled; `id` is the digest of site and pseudonyms."""

    id: str
    site: str
    patients: int


@dataclass(frozen=True)
class Charge:
    """What each patient of a cohort pays for: an event of a run's round."""

    study: str
    run: str
    cohort: Cohort
    round: int
    label: str
    event: Event


@dataclass(frozen=True)
class Limits:
    """What a study wants no patient to exceed, at its delta: over its own runs, and over all
    studies. inf: no limit.

    The ledger's `Lifetime` holds beside them. `sampler`: the part of any delta that the noise
    sampler takes. `planned`: how many charges of a label a site may have in one run, where a fixed
    plan is what epsilon was worked out for; `alone`: in all runs of the study together, as nothing
    but the plan limits what is asked, and a run's name is the coordinator's to say.
    """

    epsilon: float
    delta: float
    lifetime_epsilon: float = math.inf
    sampler: float = 0.0
    planned: Mapping[str, int] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True)
class Lifetime:
    """What no patient of a site may exceed over all studies,
    who is one patient, and who decided so, and why.
    """

    epsilon: float
    delta: float
    identity: Rule = "canonical"
    operator: str = ""  # empty: nobody, the first run took what its study says
    reason: str = ""

    def __post_init__(self) -> None:
        """Refuse what bounds nothing."""
        if not 0 < self.epsilon < math.inf:
            raise PlanError(
                f"lifetime epsilon={self.epsilon:g}; expected a number above 0, and not inf"
            )
        if not 0 < self.delta < 1:
            raise PlanError(
                f"lifetime delta={self.delta:g}; expected a number in (0, 1), below 1 / number "
                "of patients"
            )
        if self.identity not in ("canonical", "exact"):
            raise PlanError(f"identity={self.identity!r}; expected 'canonical' or 'exact'")


@dataclass(frozen=True)
class Anchor:
    """The last head that a ledger told, as its own file beside the ledger."""

    ledger: str  # the id of its genesis
    seq: int
    head: str


@dataclass(frozen=True)
class Spent:
    """A study's account at one site: the epsilon of the `worst` of its `patients`, those who have
    paid most there.
    """

    study: str
    site: str
    epsilon: float
    delta: float
    charges: int
    patients: int
    worst: int
