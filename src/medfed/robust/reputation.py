"""From one round's evidence to what is done about a client: a sum over rounds, so that one odd
round expels nobody.

Each client has a CUSUM (Page 1954): what its score exceeds `detection.TOLERATED` by is added, what
it falls short by is taken off, never below 0. A hospital that is odd for good at that level stays
where it is. Above WARN it is warned; above QUARANTINE it is left out for REST rounds, and then on
probation, half way to a warning. Never are more left out than the study says may lie. Evidence that
accuses the honest as easily (`INCONCLUSIVE`) is told and not added.

All of it is a function of the findings told so far, so a resumed run that reads them again judges
the same.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum

from medfed.robust.detection import INCONCLUSIVE, TOLERATED, Finding

WARN = 5.0
QUARANTINE = 12.0
REST = 10
"""Rounds that a quarantined client sits out."""


class ThreatLevel(IntEnum):
    """How bad it is. CRITICAL: more clients lie, by their sums, than the rule bears."""

    NONE = 0
    LOW = 1
    ELEVATED = 2
    HIGH = 3
    CRITICAL = 4


@dataclass(frozen=True)
class Standing:
    """One client's sum, and until which round it sits out (0: it does not)."""

    total: float = 0.0
    until: int = 0
    warned: bool = False

    @property
    def reputation(self) -> float:
        """Return 1 for nothing held against it, 0 at quarantine."""
        return max(0.0, 1 - self.total / QUARANTINE)


@dataclass(frozen=True)
class Ruling:
    """What is done about a client after a round: warn, quarantine, probation, clear or none."""

    round: int
    client: str
    level: ThreatLevel
    total: float
    action: str
    evidence: tuple[str, ...]


@dataclass(frozen=True)
class Watch:
    """What is held against each client so far.

    `most` may lie, and so many may be left out at once, or `sit_out` where that is less.
    """

    most: int
    standings: Mapping[str, Standing] = field(default_factory=dict)
    sit_out: int | None = None

    def out(self, round: int) -> frozenset[str]:
        """Return who sits out a round."""
        return frozenset(name for name, one in self.standings.items() if round <= one.until)

    @property
    def level(self) -> ThreatLevel:
        """Return the federation's level:
        that of its worst client, CRITICAL where more lie than `most`.
        """
        totals = [one.total for one in self.standings.values()]
        if sum(total >= QUARANTINE for total in totals) > self.most:
            return ThreatLevel.CRITICAL
        return max((_level(total) for total in totals), default=ThreatLevel.NONE)

    def lift(self, client: str) -> "Watch":
        """Return the next watch, with nothing held against a client: an operator's decision."""
        return replace(self, standings={**self.standings, client: Standing()})

    def step(
        self, round: int, clients: Collection[str], findings: Iterable[Finding]
    ) -> "tuple[Watch, list[Ruling]]":
        """Take a round's findings on the clients that took part;
        return the next watch, and what changes.
        """
        # What is said of whom.
        by_client: dict[str, list[Finding]] = {name: [] for name in clients}
        for finding in findings:
            by_client.setdefault(finding.client, []).append(finding)
        standings = dict(self.standings)
        decisions: list[Ruling] = []

        # Who has sat out comes back on probation.
        for name, one in self.standings.items():
            if one.until and round == one.until:
                standings[name] = Standing(WARN / 2)
                decisions.append(
                    Ruling(round, name, ThreatLevel.LOW, WARN / 2, "probation", ("it has sat out",))
                )

        # Each sum grows or falls; where it crosses a line, something is done.
        for name, found in by_client.items():
            before = standings.get(name, Standing())
            score = max((f.score for f in found if f.kind not in INCONCLUSIVE), default=0.0)
            now = replace(
                before, total=min(max(0.0, before.total + score - TOLERATED), 2 * QUARANTINE)
            )
            action = "none"
            if now.total >= QUARANTINE:
                sitting = sum(round < other.until for other in standings.values())
                if sitting < (self.most if self.sit_out is None else self.sit_out):
                    now = replace(now, until=round + REST, warned=True)
                    action = "quarantine"
                elif not before.warned:
                    now = replace(now, warned=True)
                    action = "warn"
            elif now.total >= WARN and not before.warned:
                now = replace(now, warned=True)
                action = "warn"
            elif before.warned and now.total == 0:
                now = replace(now, warned=False)
                action = "clear"
            standings[name] = now
            if action != "none":
                words = tuple(f"{f.kind}: {f.evidence}" for f in found)
                decisions.append(Ruling(round, name, _level(now.total), now.total, action, words))
        return replace(self, standings=standings), decisions


def _level(total: float) -> ThreatLevel:
    if total >= QUARANTINE:
        return ThreatLevel.HIGH
    if total >= WARN:
        return ThreatLevel.ELEVATED
    return ThreatLevel.LOW if total > 0 else ThreatLevel.NONE


def detect_byzantine_devices(
    rounds: Iterable[tuple[Sequence[str], Sequence[Finding]]], most: int
) -> dict[str, float]:
    """Return who is suspected after these rounds,
    with the sum held against each, worst first; the brief's name.

    rounds: of each, who took part and what it said against whom (`detection.inspect`).
    """
    watch = Watch(most)
    for number, (clients, findings) in enumerate(rounds, 1):
        watch, _ = watch.step(number, clients, findings)
    held = {name: one.total for name, one in watch.standings.items() if one.total >= WARN}
    return dict(sorted(held.items(), key=lambda item: -item[1]))
