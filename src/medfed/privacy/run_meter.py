"""The coordinator's count of what a run has spent, charged before any site is asked to work.

Each site keeps its own ledger of its patients (ledger.py) and refuses by itself; this count is what
the round, the progress and the summary read.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from medfed.core.checks import BudgetError
from medfed.core.types import JSON
from medfed.privacy.guarantee import NOTHING, Guarantee


class RunMeter(Protocol):
    """Charged before each round; refuses by raising what the target cannot bear."""

    def charge(self, round: int, clients: Sequence[str]) -> None:
        """Pay for one round of these clients, before they are asked to work."""
        ...

    def write_off(self, round: int, clients: Sequence[str]) -> None:
        """Count a round of these clients that was given up, where no payment ahead covers it."""
        ...

    def leave(self, away: Collection[str]) -> None:
        """Count clients that are away, and are asked nothing, for all that the plan holds."""
        ...

    def take_over(self, uses: Mapping[str, int], asked: Mapping[str, int] = NOTHING) -> None:
        """Take over for how many rounds clients have paid by their own ledgers,
        where that is more than is known.

        And for how many queries of each label, as the ledgers have it.
        """
        ...

    def put(self, label: str) -> None:
        """Note that a query is put to sites, whatever comes of it."""
        ...

    def ask(self, label: str) -> None:
        """Count a query that training patients were asked."""
        ...

    def assume(self, silent: Collection[str]) -> None:
        """Count what clients that tell nothing of their ledgers may have paid for."""
        ...

    def claim(self) -> JSON:
        """Return what is guaranteed so far: epsilon, delta, unit, noise; None where nothing is."""
        ...

    def spread(self) -> list[tuple[float, int]]:
        """Return how many declared patients have spent which epsilon so far, least first; empty
        without a claim.
        """
        ...


class NoClaim:
    """The budget of a run without noise: charges nothing and claims nothing."""

    def charge(self, round: int, clients: Sequence[str]) -> None:
        """Let every round pass."""

    def write_off(self, round: int, clients: Sequence[str]) -> None:
        """Let every round pass."""

    def leave(self, away: Collection[str]) -> None:
        """Count nothing."""

    def take_over(self, uses: Mapping[str, int], asked: Mapping[str, int] = NOTHING) -> None:
        """Take nothing over."""

    def put(self, label: str) -> None:
        """Note nothing."""

    def ask(self, label: str) -> None:
        """Count nothing."""

    def assume(self, silent: Collection[str]) -> None:
        """Assume nothing."""

    def claim(self) -> JSON:
        """Say that no epsilon was computed."""
        return {"epsilon": None, "delta": None, "unit": "patient", "noise": "none"}

    def spread(self) -> list[tuple[float, int]]:
        """Tell of nobody."""
        return []


class Metered:
    """The budget of a run under a guarantee: counts clients' rounds against the calibrated plan."""

    def __init__(self, guarantee: Guarantee, scope: str, recalls: bool = False) -> None:
        """Begin with nothing spent.

        Args:
            guarantee: of the run.
            scope: `privacy.scope`.
            recalls: whether a round that was paid for and got lost is answered by the same bytes,
            and not paid for again.
        """
        self.guarantee = guarantee
        self.recalls = recalls
        self.ahead: dict[str, int] = {}  # rounds paid beyond those that are behind
        self.scope = scope
        self.uses = dict.fromkeys(guarantee.releases, 0)
        # how often each query was asked of patients who paid for it
        self.asked: Mapping[str, int] = {}
        self.unsure = Counter[str]()  # queries put to sites, of which maybe nobody has answered
        self.recalled = Counter[str]()  # by client, rounds not counted as it has paid before
        self.away: frozenset[str] = frozenset()  # who pays for nothing more

    def charge(self, round: int, clients: Sequence[str]) -> None:
        """Count the round; raise BudgetError, charging nobody, where a client has no round left."""
        recalled = {name for name in clients if self.recalls and self.ahead.get(name)}
        self._count(round, clients, recalled)

    def write_off(self, round: int, clients: Sequence[str]) -> None:
        """Count a round that was given up; raise as `charge` does.

        Guarantee: it counts at least once for each client, and never less than ledgers told: who
        has paid for attempts at it is ahead by them already (`take_over`).
        """
        self._count(round, clients, {name for name in clients if self.ahead.get(name)})

    def _count(self, round: int, clients: Sequence[str], paid: Collection[str]) -> None:
        """Count a round, which those who have `paid` are ahead by."""
        guarantee = self.guarantee
        clients = [name for name in clients if name not in self.away]
        paid = [name for name in paid if name not in self.away]
        if guarantee.strategy:  # a correlated run is paid once, in full
            self.uses |= dict.fromkeys(clients, 1)
            return

        self.ahead |= {name: self.ahead[name] - 1 for name in paid}
        self.recalled.update(paid)
        after = {name: self.uses[name] + (name not in paid) for name in clients}
        over = [name for name, uses in after.items() if uses > guarantee.uses]
        if over:
            raise BudgetError(
                f"round {round}: site {over[0]!r} has paid for {guarantee.uses} rounds, which is "
                f"all that privacy.epsilon={guarantee.epsilon:g} bears; left: 0. Raise "
                "privacy.epsilon or plan with privacy.spare_rounds."
            )
        self.uses |= after

    def leave(self, away: Collection[str]) -> None:
        """Count clients for every round of the plan, the spare ones too, as no ledger pays for
        more: what theirs hold nobody can ask. They are charged no more.
        """
        self.away = frozenset(away) & self.uses.keys()
        self.uses |= dict.fromkeys(self.away, self.guarantee.uses)

    def take_over(self, uses: Mapping[str, int], asked: Mapping[str, int] = NOTHING) -> None:
        """Count the rounds that were paid for, though a crash lost them, and the queries; nothing
        counts for less.
        """
        self.asked = {
            label: max(asked.get(label, 0), self.asked.get(label, 0))
            for label in {**self.asked, **asked}
        }
        self.ahead = {name: max(0, uses.get(name, 0) - known) for name, known in self.uses.items()}
        self.uses = {name: max(known, uses.get(name, 0)) for name, known in self.uses.items()}

    def put(self, label: str) -> None:
        """Note one query."""
        self.unsure[label] += 1

    def ask(self, label: str) -> None:
        """Count one query."""
        self.asked = {**self.asked, label: self.asked.get(label, 0) + 1}

    def assume(self, silent: Collection[str]) -> None:
        """Count what clients that tell nothing of their ledgers may have paid for: each query that
        was put to them, answered or not, and a round anew that they had paid for; up to what the
        plan holds, as no ledger pays for more. Of those who are away every query of the plan.
        """
        if not silent or self.guarantee.simulation_only:
            return
        queries = self.guarantee.queries
        worst = {label: min(n, queries[label].times) for label, n in self.unsure.items()}
        if self.away:
            worst = {label: query.times for label, query in queries.items()}
        again = {
            name: min(self.uses[name] + self.recalled[name], self.guarantee.uses) for name in silent
        }
        self.take_over(again, worst)

    def claim(self) -> JSON:
        """Return the epsilon spent by the patients who have paid most."""
        guarantee = self.guarantee
        epsilon: float | None = None
        delta: float | None = None
        if not guarantee.simulation_only:
            epsilon = guarantee.cost(self.uses, self.asked)
            delta = guarantee.delta

        return {
            "epsilon": epsilon,
            "delta": delta,
            "unit": "patient",
            "noise": guarantee.mode,
            "target_epsilon": guarantee.epsilon,
            "noise_multiplier": max(
                release.noise_multiplier for release in guarantee.releases.values()
            ),
            "scope": self.scope,
            "simulation_only": guarantee.simulation_only,
        }

    def spread(self) -> list[tuple[float, int]]:
        """Return how many declared patients have spent which epsilon, least first.

        All patients of a client pay alike, for the rounds that it took part in: sizes and rounds
        are public, so that nothing is told of anybody, and no noise is needed.
        """
        guarantee = self.guarantee
        if guarantee.simulation_only:
            return []

        alike: dict[tuple[object, int], list[str]] = {}  # thousands of devices are of few kinds
        for name, uses in self.uses.items():
            alike.setdefault((guarantee.releases[name], uses), []).append(name)

        spent: Counter[float] = Counter()
        for (_, uses), names in alike.items():
            epsilon = guarantee.cost({names[0]: uses}, self.asked)
            spent[round(epsilon, 6)] += sum(guarantee.releases[name].size for name in names)
        return sorted(spent.items())
