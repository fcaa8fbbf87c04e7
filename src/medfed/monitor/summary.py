"""summary.json: what a run came to, as a function of its events. What was not measured is null."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from medfed.monitor import verdict
from medfed.monitor.events import (
    Compared,
    Event,
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
    """Return the summary of a run, finished or not; rounds that a resumed run did again count once."""
    tally = Tally()
    for event in events:
        tally.add(event)
    return tally.summary


class Tally:
    """Takes a run's events as they come, and says at any time what the run has come to.

    `rounds` by number; `latest` the last test of each model. Rounds that a resumed run does again are forgotten first.
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
        self.compared: Compared | None = None
        self.voted: Voted | None = None
        self.ranges: RangesFound | None = None
        self._earlier, self._up, self._down = 0.0, 0, 0
        self._summary: dict[str, Any] | None = None

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self._summary = None
        match event:
            case RunStarted():
                self.started = event
            case Planned():
                self.planned, self._up, self._down = event, event.bytes_up, event.bytes_down
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
                self._earlier = sum(r.seconds for r in self.rounds.values())
                self.compared, self.voted = None, None
                self.finished = None
            case SiteExcluded():
                self.excluded.append(event)
            case SecurityAudit():
                self.audits.append(event)
            case RolledBack():
                self.taken_back.append(event)
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
        self._up, self._down = self._up + event.bytes_up, self._down + event.bytes_down

    @property
    def main(self) -> str:
        """Under which name the model that the run is about is tested."""
        return main_model(self.planned.algorithm if self.planned else "")

    @property
    def summary(self) -> dict[str, Any]:
        """What summary.json says, as far as events have been taken in."""
        if self._summary is None:
            told = self._summarise()
            self._summary = {"findings": verdict.findings(told), **told}
        return self._summary

    def _summarise(self) -> dict[str, Any]:
        started, planned, finished, rounds = self.started, self.planned, self.finished, self.rounds
        sites = list(planned.sizes) if planned else []
        final, tested = self.latest.get("federated"), self.latest.get(self.main)
        times = [r.seconds for r in rounds.values()]
        took_part = Counter(client for r in rounds.values() for client in r.clients)
        return {
            "study": started.study if started else None,
            "purpose": started.purpose if started else None,
            "digest": started.digest if started else None,
            "status": finished.status if finished else "incomplete",
            "reason": finished.reason if finished else None,
            "algorithm": planned.algorithm if planned else None,
            "model": planned.model if planned else None,
            "parameters": planned.parameters if planned else None,
            "rounds": len(rounds),
            "rounds_asked": started.rounds if started else None,
            "sites": sites,
            "decision": _decision(planned, final),
            "test": _plain(final.all_sites, final.n) if final else None,
            "test_noised": final.noised if final else False,
            "intervals": _intervals(final.all_sites) if final else None,
            "macro": _plain(final.macro, None) if final else None,
            "per_site": _per_site(final) if final else {},
            "baselines": {name: _baseline(test) for name, test in self.latest.items() if name != "federated"},
            "loss": _losses(rounds, tested),
            "labels": list(tested.labels) if tested else [],
            "confusion": [list(row) for row in tested.confusion] if tested else [],
            "learning_rate": _rate(planned),
            "compared": _comparison(self.compared),
            "vote": _vote(self.voted),
            "ranges": _ranges(self.ranges),
            "privacy": _privacy(planned, rounds, finished),
            "seconds": {
                "total": round(self._earlier + finished.seconds, 3) if finished else None,
                "per_round": round(sum(times) / len(times), 6) if times else None,
            },
            "bytes": {"up": self._up, "down": self._down},
            "bytes_by_phase": dict(sum((Counter(r.phases) for r in rounds.values()), Counter())),
            "participation": {site: took_part[site] for site in sites},
            "excluded": [{"round": e.round, "site": e.site, "reason": e.reason} for e in self.excluded],
            "left_out": left_out(self.excluded),
            "suspects": _suspects(self.audits),
            "bears": planned.bears if planned else None,
            "chosen": {key: dict(one) for key, one in planned.chosen.items()} if planned else {},
            "taken_back": [{"round": e.round, "before": e.before, "after": e.after} for e in self.taken_back],
            "warnings": list(self.warnings),
            "versions": dict(started.versions) if started else None,
            "machine": dict(started.machine) if started else None,
        }


def _decision(planned: Planned | None, final: Tested | None) -> dict[str, Any] | None:
    """Return from which probability which label is called, and from what that follows; None but of two labels."""
    if planned is None or final is None or final.threshold is None:
        return None
    rule, decided = planned.threshold, final.decided
    return {"positive": planned.positive, "threshold": final.threshold, "decided": decided, "rule": rule}


def left_out(excluded: Iterable[SiteExcluded]) -> list[dict[str, Any]]:
    """Return a round's equal reasons once: how many sites share each, and the first few of them."""
    return [
        {"round": round, "reason": reason, "sites": len(events), "first": [event.site for event in events[:5]]}
        for (round, reason), events in group_alike(excluded).items()
    ]


def _suspects(audits: Iterable[SecurityAudit]) -> list[dict[str, Any]]:
    """Return who was warned or left out, the first to be so first: since when, what was done, on what evidence."""
    found: dict[str, dict[str, Any]] = {}
    for one in audits:
        if one.action in ("warn", "quarantine", "lift"):
            entry = found.setdefault(one.client, {"site": one.client, "since": one.round, "level": 0, "actions": []})
            entry["level"] = max(entry["level"], one.level)
            entry["actions"].append({"round": one.round, "action": one.action, "evidence": list(one.evidence)})
    return list(found.values())


def _privacy(
    planned: Planned | None, rounds: Mapping[int, RoundFinished], finished: RunFinished | None
) -> dict[str, Any] | None:
    """Return what has been spent by the last event that tells."""
    told = [finished.privacy if finished else {}, rounds[max(rounds)].privacy if rounds else {}]
    return next((dict(p) for p in told if p), dict(planned.privacy) if planned else None)


def _losses(rounds: Mapping[int, RoundFinished], tested: Tested | None) -> dict[str, float | None]:
    """Return the training losses of the first and the last round that told one, and the loss on held-out records."""
    known = [rounds[number].loss for number in sorted(rounds)]
    return {
        "first": known[0] if known else None,
        "last": known[-1] if known else None,
        "test": tested.loss if tested else None,
    }


def _rate(planned: Planned | None) -> dict[str, Any] | None:
    if planned is None:
        return None
    return {"first": planned.learning_rate or None, "chosen": bool(planned.rate_chosen)}


def _comparison(told: Compared | None) -> dict[str, Any] | None:
    if told is None:
        return None
    own = told.own_better
    return {"n": told.n, "own_better": own.value, "interval": [own.low, own.high], "sites": dict(told.sites)}


def _ranges(told: RangesFound | None) -> dict[str, Any] | None:
    if told is None:
        return None
    return {"found": {name: list(ends) for name, ends in told.ranges.items()}, "noise_sd": told.noise_sd}


def _vote(told: Voted | None) -> dict[str, Any] | None:
    if told is None:
        return None
    own = told.own_better
    return {"sites": told.sites, "own_better": own.value, "interval": [own.low, own.high]}


def main_model(algorithm: str) -> str:
    """Return under which name the model that a run is about is tested; other tested models are its baselines."""
    return algorithm if algorithm in BASELINES else "federated"


def _plain(figures: Mapping[str, Figure], n: int | None) -> dict[str, float | int | None]:
    values: dict[str, float | int | None] = {name: figure.value for name, figure in figures.items()}
    return values if n is None else {**values, "n": n}


def _intervals(figures: Mapping[str, Figure]) -> dict[str, list[float] | None]:
    return {name: None if f.low is None or f.high is None else [f.low, f.high] for name, f in figures.items()}


def _per_site(tested: Tested) -> dict[str, Any]:
    return {site: _plain(figures, tested.site_n[site]) for site, figures in tested.per_site.items()}


def _baseline(tested: Tested) -> dict[str, Any]:
    return {
        "test": _plain(tested.all_sites, tested.n),
        "intervals": _intervals(tested.all_sites),
        "macro": _plain(tested.macro, None),
        "per_site": _per_site(tested),
    }
