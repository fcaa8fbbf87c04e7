"""summary.json: what a run came to, as a function of its events. What was not measured is null."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from medfed.monitor.events import (
    Event,
    Planned,
    Resumed,
    RolledBack,
    RoundFinished,
    RunFinished,
    RunStarted,
    SecurityAudit,
    SiteExcluded,
    Tested,
    Warned,
)
from medfed.monitor.metrics import Figure

BASELINES = ("local", "pooled")
"""What a federated model is measured against: each site alone, and one model on all rows."""


def summarise(events: Iterable[Event]) -> dict[str, Any]:
    """Return the summary of a run, finished or not; rounds that a resumed run did again count once."""
    tally = Tally()
    for event in events:
        tally.add(event)
    return tally.summary()


class Tally:
    """Takes a run's events as they come, and says at any time what the run has come to."""

    def __init__(self) -> None:
        self._started: RunStarted | None = None
        self._planned: Planned | None = None
        self._finished: RunFinished | None = None
        self._rounds: dict[int, RoundFinished] = {}
        self._tests: dict[str, Tested] = {}
        self._excluded: list[SiteExcluded] = []
        self._warnings: list[str] = []
        self._audits: list[SecurityAudit] = []
        self._taken_back: list[RolledBack] = []
        self._earlier, self._up, self._down = 0.0, 0, 0

    def add(self, event: Event) -> None:
        """Take in the next event."""
        match event:
            case RunStarted():
                self._started = event
            case Planned():
                self._planned, self._up, self._down = event, event.bytes_up, event.bytes_down
            case Warned():
                self._warnings.append(event.text)
            case Resumed(round=last):
                self._rounds = {number: r for number, r in self._rounds.items() if number <= last}
                self._tests = {model: t for model, t in self._tests.items() if t.round <= last}
                self._excluded = [e for e in self._excluded if e.round <= last]
                self._audits = [e for e in self._audits if e.round <= last]
                self._taken_back = [e for e in self._taken_back if e.round <= last]
                self._earlier = sum(r.seconds for r in self._rounds.values())
                self._finished = None
            case SiteExcluded():
                self._excluded.append(event)
            case SecurityAudit():
                self._audits.append(event)
            case RolledBack():
                self._taken_back.append(event)
            case RoundFinished():
                self._rounds[event.round] = event
                self._sent(event)
            case Tested():
                self._tests[event.model] = event
                if event.model == main_model(self._planned.algorithm if self._planned else ""):
                    self._sent(event)
            case RunFinished():
                self._finished = event

    def _sent(self, event: RoundFinished | Tested) -> None:
        self._up, self._down = self._up + event.bytes_up, self._down + event.bytes_down

    def summary(self) -> dict[str, Any]:
        """Return what summary.json says."""
        started, planned, finished, rounds = self._started, self._planned, self._finished, self._rounds
        sites = list(planned.sizes) if planned else []
        final = self._tests.get("federated")
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
            "test": _plain(final.all_sites, final.n) if final else None,
            "intervals": _intervals(final.all_sites) if final else None,
            "macro": _plain(final.macro, None) if final else None,
            "per_site": _per_site(final) if final else {},
            "baselines": {name: _baseline(test) for name, test in self._tests.items() if name != "federated"},
            "privacy": _privacy(planned, rounds, finished),
            "seconds": {
                "total": round(self._earlier + finished.seconds, 3) if finished else None,
                "per_round": round(sum(times) / len(times), 6) if times else None,
            },
            "bytes": {"up": self._up, "down": self._down},
            "bytes_by_phase": dict(sum((Counter(r.phases) for r in rounds.values()), Counter())),
            "participation": {site: took_part[site] for site in sites},
            "excluded": [{"round": e.round, "site": e.site, "reason": e.reason} for e in self._excluded],
            "suspects": _suspects(self._audits),
            "bears": planned.bears if planned else None,
            "taken_back": [{"round": e.round, "before": e.before, "after": e.after} for e in self._taken_back],
            "warnings": list(self._warnings),
            "versions": dict(started.versions) if started else None,
            "machine": dict(started.machine) if started else None,
        }


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
