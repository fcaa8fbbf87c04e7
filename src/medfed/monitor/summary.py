"""summary.json: what a run came to, as a function of its events. What was not measured is null."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from medfed.monitor import verdict
from medfed.monitor.events import (
    Compared,
    Event,
    GivenUp,
    Planned,
    RangesFound,
    Resumed,
    RolledBack,
    RoundFinished,
    RunFinished,
    RunStarted,
    SecurityAudit,
    SiteExcluded,
    Tested,
    Voted,
    Warned,
    group_alike,
)
from medfed.monitor.metrics import Figure

BASELINES = ("local", "pooled")
"""What a federated model is measured against: each site alone, and one model on all rows."""


def summarise(events: Iterable[Event]) -> dict[str, Any]:
    """Return the summary of a run, finished or not; rounds done again on resuming count once."""
    tally = Tally()
    for event in events:
        tally.add(event)
    return tally.summary


class Tally:
    """Takes a run's events as they come, and says at any time what the run has come to.

    `rounds` by number; `latest` the last test of each model. Rounds that a resumed run does again
    are forgotten first.
    """

    def __init__(self) -> None:
        self.started: RunStarted | None = None
        self.planned: Planned | None = None
        self.finished: RunFinished | None = None
        self.rounds: dict[int, RoundFinished] = {}
        self.latest: dict[str, Tested] = {}
        self.excluded: list[SiteExcluded] = []
        self.warnings: list[str] = []
        self.audits: list[SecurityAudit] = []
        self.taken_back: list[RolledBack] = []
        self.given_up: list[GivenUp] = []
        self.compared: Compared | None = None
        self.voted: Voted | None = None
        self.ranges: RangesFound | None = None
        self._earlier = 0.0
        self._up = 0
        self._down = 0
        self._summary: dict[str, Any] | None = None

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self._summary = None
        match event:
            case RunStarted():
                self.started = event
            case Planned():
                self.planned = event
                self._up = event.bytes_up
                self._down = event.bytes_down
            case RangesFound():
                self.ranges = event
            case Warned():
                self.warnings.append(event.text)
            case Resumed(round=last):
                self.rounds = {number: r for number, r in self.rounds.items() if number <= last}
                self.latest = {model: t for model, t in self.latest.items() if t.round <= last}
                self.excluded = [e for e in self.excluded if e.round <= last]
                self.audits = [e for e in self.audits if e.round <= last]
                self.taken_back = [e for e in self.taken_back if e.round <= last]
                self.given_up = [e for e in self.given_up if e.round <= last]
                self._earlier = sum(r.seconds for r in self.rounds.values())
                self.compared = None
                self.voted = None
                self.finished = None
            case SiteExcluded():
                self.excluded.append(event)
            case SecurityAudit():
                self.audits.append(event)
            case RolledBack():
                self.taken_back.append(event)
            case GivenUp():
                self.given_up.append(event)
            case RoundFinished():
                self.rounds[event.round] = event
                self._count_bytes(event)
            case Tested():
                self.latest[event.model] = event
                if event.model == self.main:
                    self._count_bytes(event)
            case Compared():
                self.compared = event
            case Voted():
                self.voted = event
            case RunFinished():
                self.finished = event

    def _count_bytes(self, event: RoundFinished | Tested) -> None:
        self._up = self._up + event.bytes_up
        self._down = self._down + event.bytes_down

    @property
    def main(self) -> str:
        """Under which name the model that the run is about is tested."""
        return main_model(_field(self.planned, "algorithm", ""))

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says, as far as events have been taken in."""
        if self._summary is None:
            told = self._summarise()
            self._summary = {"findings": verdict.findings(told), **told}
        return self._summary

    def _summarise(self) -> dict[str, Any]:
        started = self.started
        planned = self.planned
        finished = self.finished
        federated = self.latest.get("federated")
        tested = self.latest.get(self.main)
        sites = list(_field(planned, "sizes", ()))
        took_part = Counter(client for r in self.rounds.values() for client in r.clients)
        if federated:
            figures = _figures(federated)
        else:
            figures = {"test": None, "intervals": None, "macro": None, "per_site": {}}

        return {
            # What was asked, and whether it came to its end
            "study": _field(started, "study"),
            "purpose": _field(started, "purpose"),
            "digest": _field(started, "digest"),
            "status": _field(finished, "status", "incomplete"),
            "reason": _field(finished, "reason"),
            "algorithm": _field(planned, "algorithm"),
            "model": _field(planned, "model"),
            "parameters": _field(planned, "parameters"),
            "rounds": len(self.rounds),
            "rounds_asked": _field(started, "rounds"),
            "sites": sites,
            # What the model is worth
            "decision": _decision(planned, federated),
            "test": figures["test"],
            "test_noised": _field(federated, "noised", False),
            "intervals": figures["intervals"],
            "macro": figures["macro"],
            "per_site": figures["per_site"],
            "baselines": {
                name: _figures(test) for name, test in self.latest.items() if name != "federated"
            },
            "loss": _losses(self.rounds, tested),
            "labels": list(_field(tested, "labels", ())),
            "confusion": [list(row) for row in _field(tested, "confusion", ())],
            "learning_rate": _rate(planned),
            "compared": _comparison(self.compared),
            "vote": _vote(self.voted),
            "ranges": _ranges(self.ranges),
            # What it cost
            "privacy": _privacy(planned, self.rounds, finished),
            "seconds": _seconds(self._earlier, self.rounds, finished),
            "bytes": {"up": self._up, "down": self._down},
            "bytes_by_phase": dict(
                sum((Counter(r.phases) for r in self.rounds.values()), Counter())
            ),
            # Who took part, who did not, and what else was told
            "participation": {site: took_part[site] for site in sites},
            "excluded": [
                {"round": e.round, "site": e.site, "reason": e.reason} for e in self.excluded
            ],
            "left_out": left_out(self.excluded),
            "suspects": _suspects(self.audits),
            "bears": _field(planned, "bears"),
            "chosen": {key: dict(one) for key, one in _field(planned, "chosen", {}).items()},
            "taken_back": [
                {"round": e.round, "before": e.before, "after": e.after} for e in self.taken_back
            ],
            "given_up": [
                {"round": e.round, "operator": e.operator, "reason": e.reason}
                for e in self.given_up
            ],
            "warnings": list(self.warnings),
            "versions": dict(started.versions) if started else None,
            "machine": dict(started.machine) if started else None,
        }


def _field(event: Event | None, name: str, default: Any = None) -> Any:
    """Return a field of an event; the default where the event has not come."""
    if event is None:
        return default
    return getattr(event, name)


def _decision(planned: Planned | None, final: Tested | None) -> dict[str, Any] | None:
    """Return from which probability which label is called,
    and from what that follows; None but of two labels.
    """
    if planned is None or final is None or final.threshold is None:
        return None
    rule = planned.threshold
    decided = final.decided
    return {
        "positive": planned.positive,
        "threshold": final.threshold,
        "decided": decided,
        "rule": rule,
    }


def left_out(excluded: Iterable[SiteExcluded]) -> list[dict[str, Any]]:
    """Return a round's equal reasons once: how many sites share each, and the first few of them."""
    return [
        {
            "round": round,
            "reason": reason,
            "sites": len(events),
            "first": [event.site for event in events[:5]],
        }
        for (round, reason), events in group_alike(excluded).items()
    ]


def _suspects(audits: Iterable[SecurityAudit]) -> list[dict[str, Any]]:
    """Return who was warned or left out, the first to be so first:
    since when, what was done, on what evidence.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in audits:
        if one.action in ("warn", "quarantine", "lift"):
            entry = found.setdefault(
                one.client, {"site": one.client, "since": one.round, "level": 0, "actions": []}
            )
            entry["level"] = max(entry["level"], one.level)
            entry["actions"].append(
                {"round": one.round, "action": one.action, "evidence": list(one.evidence)}
            )
    return list(found.values())


def _privacy(
    planned: Planned | None, rounds: Mapping[int, RoundFinished], finished: RunFinished | None
) -> dict[str, Any] | None:
    """Return what has been spent by the last event that tells."""
    if finished and finished.privacy:
        return dict(finished.privacy)
    if rounds and rounds[max(rounds)].privacy:
        return dict(rounds[max(rounds)].privacy)
    return dict(planned.privacy) if planned else None


def _seconds(
    earlier: float, rounds: Mapping[int, RoundFinished], finished: RunFinished | None
) -> dict[str, float | None]:
    """Return how long the run took, with the seconds before its last resumption,
    and a round of it on average.
    """
    seconds: dict[str, float | None] = {"total": None, "per_round": None}
    if finished:
        seconds["total"] = round(earlier + finished.seconds, 3)
    if rounds:
        seconds["per_round"] = round(sum(r.seconds for r in rounds.values()) / len(rounds), 6)
    return seconds


def _losses(rounds: Mapping[int, RoundFinished], tested: Tested | None) -> dict[str, float | None]:
    """Return the training losses of the first and the last round that told one, that of three
    quarters of the way, and the loss on held-out records.
    """
    losses = [rounds[number].loss for number in sorted(rounds)] or [None]
    return {
        "first": losses[0],
        "late": losses[3 * (len(losses) - 1) // 4],
        "last": losses[-1],
        "test": _field(tested, "loss"),
    }


def _rate(planned: Planned | None) -> dict[str, Any] | None:
    if planned is None:
        return None
    return {"first": planned.learning_rate or None, "chosen": bool(planned.rate_chosen)}


def _comparison(told: Compared | None) -> dict[str, Any] | None:
    if told is None:
        return None
    own = told.own_better
    return {
        "n": told.n,
        "own_better": own.value,
        "interval": [own.low, own.high],
        "sites": dict(told.sites),
    }


def _ranges(told: RangesFound | None) -> dict[str, Any] | None:
    if told is None:
        return None
    return {
        "found": {name: list(ends) for name, ends in told.ranges.items()},
        "noise_sd": told.noise_sd,
    }


def _vote(told: Voted | None) -> dict[str, Any] | None:
    if told is None:
        return None
    own = told.own_better
    return {"sites": told.sites, "own_better": own.value, "interval": [own.low, own.high]}


def main_model(algorithm: str) -> str:
    """Return under which name the model that a run is about is tested;
    other tested models are its baselines.
    """
    return algorithm if algorithm in BASELINES else "federated"


def _values(figures: Mapping[str, Figure]) -> dict[str, float | None]:
    return {name: figure.value for name, figure in figures.items()}


def _intervals(figures: Mapping[str, Figure]) -> dict[str, list[float] | None]:
    intervals: dict[str, list[float] | None] = {}
    for name, figure in figures.items():
        low = figure.low
        high = figure.high
        intervals[name] = None if low is None or high is None else [low, high]
    return intervals


def _figures(tested: Tested) -> dict[str, Any]:
    """Return what a test came to: of all sites with intervals, the sites' average, and of each."""
    return {
        "test": {**_values(tested.all_sites), "n": tested.n},
        "intervals": _intervals(tested.all_sites),
        "macro": _values(tested.macro),
        "per_site": {
            site: {**_values(mine), "n": tested.site_n[site]}
            for site, mine in tested.per_site.items()
        },
    }
