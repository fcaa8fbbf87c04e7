"""Who has paid for what: balances of patients, worked out from a ledger's verified rows.

*The filter.* A charge passes if the worst patient of its cohort stays within (epsilon, delta) with
it, however events were chosen. Where all that a patient pays for is Gaussian, mu^2 adds up against
a limit (Smith and Thakurta 2022, arXiv:2210.17520); else Rényi divergences add up at one order,
which the target fixes (Feldman and Zrnic 2021, arXiv:2008.11193; Whitehouse et al. 2023,
arXiv:2203.05481). So the *kind* of events picks the filter, and a study settles it before it sees a
release; who lets releases steer even that is held to 2 delta, as one of two filters held.

Patients of the same cohorts share every balance, and equal histories share one evaluation.
"""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from medfed.core.checks import BudgetError, LedgerError, PlanError
from medfed.privacy import accounting, privacy_events
from medfed.privacy.accounting import Floats
from medfed.privacy.ledger_entries import Charge, Lifetime, Limits, Spent
from medfed.privacy.ledger_file import SAY_LIFETIME, write_json
from medfed.privacy.privacy_events import Event

_ROUNDING = 1e-12  # of a sum of floats, relative


Tally = defaultdict[str, defaultdict[str, Counter[str]]]
"""cohort -> study -> event -> how often."""

Group = frozenset[str]
"""The cohorts that some patients are in, and no others: they share every balance."""

History = frozenset[tuple[str, int]]
"""What was paid for: events, as JSON, each with how often. Equal histories share one evaluation."""


def _begin_tally() -> Tally:
    return defaultdict(lambda: defaultdict(Counter))


class Balances:
    """Who has paid for what: a view of the verified rows, in memory."""

    def __init__(self) -> None:
        self.charged = _begin_tally()
        self.sites: dict[str, str] = {}  # of each cohort
        self._group: dict[str, Group] = {}  # of each patient
        self._patients: Counter[Group] = Counter()  # how many are in a group
        self._groups: defaultdict[str, set[Group]] = defaultdict(set)  # of each cohort

    def admit(self, cohort: str, site: str, names: Sequence[str]) -> None:
        """Put the patients of a new cohort into the groups that they form with it."""
        self.sites[cohort] = site

        # Each of them leaves the group of its cohorts so far for the one with this cohort added.
        leaving = Counter(self._group.get(name, Group()) for name in names)
        joined = {group: group | {cohort} for group in leaving}
        self._group.update({name: joined[self._group.get(name, Group())] for name in names})

        for group, patients in leaving.items():
            self._patients[group] -= patients
            if self._patients[group] <= 0:  # nobody is left in it
                del self._patients[group]
                for other in group:
                    self._groups[other].remove(group)
            self._patients[joined[group]] = patients
            for other in joined[group]:
                self._groups[other].add(joined[group])

    def refuse_overspend(
        self, charges: Sequence[Charge], limits: Limits, lifetime: Lifetime | None
    ) -> None:
        """Raise BudgetError where `charges` together exceed a limit for any patient."""
        asked = _begin_tally()
        for charge in charges:
            asked[charge.cohort.id][charge.study][write_event(charge.event)] += 1
        another = (
            "A study's runs share privacy.epsilon, all of which a whole one takes: resume it, "
            "or set another study.name"
        )
        less = "Lower privacy.epsilon, all of which a whole run takes, or have"

        # Of charges to one cohort in one study the first tells, as all of them are asked together.
        kinds = {(charge.study, charge.cohort.id): charge for charge in reversed(charges)}
        for charge in kinds.values():
            for study, epsilon, way in (
                (charge.study, limits.epsilon, another),
                (None, limits.lifetime_epsilon, f"{less} privacy.lifetime_epsilon raised"),
            ):
                if epsilon != math.inf:  # NaN is refused below
                    self._refuse_over(charge, asked, study, epsilon, limits.delta, way)
            if lifetime:
                delta = lifetime.delta - limits.sampler
                way = f"{less} the site's operator raise it: {SAY_LIFETIME}"
                self._refuse_over(charge, asked, None, lifetime.epsilon, delta, way)

    def _refuse_over(
        self, c: Charge, asked: Tally, study: str | None, epsilon: float, delta: float, way: str
    ) -> None:
        # Whom it would be too much for: by group, what they have paid and what is asked.
        over: dict[Group, tuple[History, History]] = {}
        for group in self._groups[c.cohort.id]:
            before = _history(self.charged, group, study)
            more = _history(asked, group, study)
            if not _fits(before, more, epsilon, delta):
                over[group] = before, more
        if not over:
            return

        # Told of those who have least left.
        before, more = min(over.values(), key=lambda case: _left(case[0], epsilon, delta))
        where = "this study" if study is not None else "all studies"
        raise BudgetError(
            f"study {c.study!r}, site {c.cohort.site!r}, round {c.round}: refused, and nothing "
            f"was charged. In {where} {sum(self._patients[group] for group in over)} of "
            f"{c.cohort.patients} patients have spent up to epsilon="
            f"{_epsilon(before, delta):.4g} of {epsilon:g} (delta={delta:g}); left for one "
            f"release: {_left(before, epsilon, delta):.4g}, asked: {_epsilon(more, delta):.4g}. "
            f"{way}."
        )

    def worst(
        self, delta: float, study: str | None, site: str | None, pseudonym: str | None
    ) -> float:
        """Return the epsilon at `delta` of the patient who has paid most, over what is asked for.

        `study`, `site`, `pseudonym`: one of these alone; None: all.
        """
        groups = self._patients if pseudonym is None else [self._group.get(pseudonym, Group())]
        histories = {_history(self.charged, self._at(site, group), study) for group in groups}
        return max((_epsilon(history, delta) for history in histories), default=0.0)

    def list_spent(
        self, delta: float, study: str | None, site: str | None, pseudonym: str | None
    ) -> list[Spent]:
        """Return the accounts of each study at each site, over what is asked for."""
        cohorts: defaultdict[tuple[str, str], set[str]] = defaultdict(set)
        for cohort in self._at(
            site, self.charged if pseudonym is None else self._group.get(pseudonym, Group())
        ):
            for name in self.charged.get(cohort, ()):
                if study in (None, name):
                    cohorts[name, self.sites[cohort]].add(cohort)
        return [
            self._sum_up(*where, mine, delta, pseudonym) for where, mine in sorted(cohorts.items())
        ]

    def _sum_up(
        self, study: str, site: str, cohorts: set[str], delta: float, pseudonym: str | None
    ) -> Spent:
        if pseudonym is None:
            size = {
                group: self._patients[group] for cohort in cohorts for group in self._groups[cohort]
            }
        else:
            size = {self._group[pseudonym]: 1}
        patients: Counter[float] = Counter()
        for group, count in size.items():
            patients[_epsilon(_history(self.charged, group & cohorts, study), delta)] += count
        epsilon = max(patients, default=0.0)
        charges = sum(self.charged[cohort][study].total() for cohort in cohorts)
        return Spent(study, site, epsilon, delta, charges, patients.total(), patients[epsilon])

    def _at(self, site: str | None, cohorts: Iterable[str]) -> list[str]:
        return [cohort for cohort in cohorts if site in (None, self.sites[cohort])]


def _history(charged: Tally, cohorts: Iterable[str], study: str | None) -> History:
    """Return what a patient of these cohorts paid for in a study; None: in all."""
    total: Counter[str] = Counter()
    for cohort in cohorts:
        for name, events in charged[cohort].items() if cohort in charged else ():
            if study in (None, name):
                total.update(events)
    return frozenset(total.items())


@lru_cache(maxsize=4096)
def _fits(before: History, more: History, epsilon: float, delta: float) -> bool:
    """Say whether the filter lets `more` pass; see the head of this file."""
    mu = _mu(frozenset((Counter(dict(before)) + Counter(dict(more))).items()))
    if mu is None:
        return accounting.fits(_rdp(before), _rdp(more), epsilon, delta)
    return mu <= accounting.budget_mu(epsilon, delta) * (1 + _ROUNDING)


def _left(history: History, epsilon: float, delta: float) -> float:
    """Return the epsilon of the largest Gaussian that may follow."""
    mu = _mu(history)
    if mu is None:
        return accounting.left(_rdp(history), epsilon, delta)
    rest = accounting.budget_mu(epsilon, delta) ** 2 - mu**2
    if rest > 0:
        return accounting.gaussian_epsilon(rest**-0.5, delta)
    return 0.0


@lru_cache(maxsize=4096)
def _epsilon(history: History, delta: float) -> float:
    """Return the epsilon of what was paid for: exact for Gaussians, else by Rényi divergences."""
    mu = _mu(history)
    if mu is None:
        return accounting.epsilon_from_rdp(_rdp(history), delta)
    if mu > 0:
        return accounting.gaussian_epsilon(1 / mu, delta)
    return 0.0


def _mu(history: History) -> float | None:
    """Return the mu of what was paid for; None unless all of it is Gaussian."""
    squares = 0.0
    for event, count in sorted(history):
        mu = accounting.gdp_mu(read_event(event))
        if mu is None:
            return None
        squares += count * mu**2
    return math.sqrt(squares)


def _rdp(history: History) -> Floats:
    """Return the Rényi divergences, at accounting.ORDERS, of what was paid for."""
    zero = np.zeros(len(accounting.ORDERS))
    return sum(
        (count * accounting.rdp(read_event(event)) for event, count in sorted(history)), zero
    )


@lru_cache(maxsize=4096)
def write_event(event: Event) -> str:
    return write_json(privacy_events.to_json(event))


@lru_cache(maxsize=4096)
def read_event(text: str) -> Event:
    try:
        return privacy_events.from_json(json.loads(text))
    except (PlanError, ValueError) as error:
        raise LedgerError(
            f"event {text} cannot be accounted: {error} If a newer medfed wrote it, update."
        ) from error
