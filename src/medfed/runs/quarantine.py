"""Whom a run holds something against, and what its operators decide."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from medfed.core import files
from medfed.core.checks import (
    RunError,
    some,
)
from medfed.monitor import events
from medfed.monitor.events import Log
from medfed.planning.plan import Plan
from medfed.robust.detection import Finding
from medfed.robust.reputation import Ruling, Watch
from medfed.runs.decisions import sign_off
from medfed.runs.results import is_complete

OVERRIDES = "overrides.jsonl"
"""What operators decided about quarantined clients, one line each;
a run takes it in before its next round.
"""


def list_quarantined(folder: str | Path) -> list[dict[str, Any]]:
    """Return who has something held against it in a run:
    its sum, and the last round that it sits out (0: none).
    """
    recorded = _read_events(Path(folder))
    most = max((event.most for event in recorded if isinstance(event, events.Inspected)), default=0)
    held = _replay(recorded, most).standings
    return [
        {
            "client": name,
            "total": round(one.total, 3),
            "until": one.until,
            "reputation": round(one.reputation, 3),
        }
        for name, one in sorted(held.items(), key=lambda item: -item[1].total)
        if one.total or one.until
    ]


def lift_quarantine(folder: str | Path, client: str, reason: str, operator: str) -> None:
    """Have a run hold nothing against a client from its next round on: an appeal that an operator
    grants, on record.

    Raises RunError for a client that the run does not know, without reason or name, or where the
    run is complete.
    """
    folder = Path(folder)
    planned = next(
        (event for event in _read_events(folder) if isinstance(event, events.Planned)), None
    )
    known = list(planned.sizes) if planned else []
    if client not in known:
        raise RunError(
            f"client={client!r} takes no part in {folder}; expected one of {some(known)}"
        )
    word = sign_off(reason, operator, "an override")
    if is_complete(folder):
        raise RunError(f"{folder} is complete; there is no next round to take part in")
    line = json.dumps({"client": client, **word}) + "\n"
    # the run itself goes on meanwhile, and reads what is whole
    with files.hold(folder, f"{OVERRIDES}.lock"):
        files.write(folder / OVERRIDES, "".join(_read_overrides(folder)) + line)


def _read_overrides(folder: Path) -> list[str]:
    """Return the whole lines of what operators have decided, each with its end."""
    if not (folder / OVERRIDES).exists():
        return []
    lines = (folder / OVERRIDES).read_text(encoding="utf-8").splitlines(keepends=True)
    return [line for line in lines if line.endswith("\n")]


def _read_events(folder: Path) -> list[events.Event]:
    return list(events.read(folder / "events.jsonl"))


def replay_watch(plan: Plan, log: Log) -> Watch:
    """Return what is held against the clients by the rounds that a resumed run has behind it."""
    return _replay(log.events(), plan.rule.f if plan.rule else 0)


def _replay(recorded: Iterable[events.Event], most: int) -> Watch:
    watch = Watch(most)
    for event in recorded:
        match event:
            case events.Inspected():
                watch, _ = _step(watch, event)
            case events.SecurityAudit(action="lift"):
                watch = watch.lift(event.client)
    return watch


def take_overrides(watch: Watch, folder: Path | None, round: int, log: Log) -> Watch:
    """Take in what operators have decided since the last round, and tell it."""
    if folder is None:
        return watch
    done = sum(
        isinstance(event, events.SecurityAudit) and event.action == "lift" for event in log.events()
    )
    for line in _read_overrides(folder)[done:]:
        asked = json.loads(line)
        watch = watch.lift(asked["client"])
        why = (f"operator {asked['operator']}: {asked['reason']}",)
        log.emit(events.SecurityAudit(round, asked["client"], 0, 0.0, "lift", why))
    return watch


def judge(watch: Watch, log: Log) -> Watch:
    """Take in what the last round said against its clients, and tell what is done about it."""
    last = log.latest.get(events.Inspected)
    started = log.latest.get(events.RoundStarted)
    if not isinstance(last, events.Inspected) or not isinstance(started, events.RoundStarted):
        return watch
    if last.round != started.round:
        return watch
    watch, decisions = _step(watch, last)
    for one in decisions:
        log.emit(
            events.SecurityAudit(
                one.round, one.client, int(one.level), round(one.total, 3), one.action, one.evidence
            )
        )
    return watch


def _step(watch: Watch, event: events.Inspected) -> tuple[Watch, list[Ruling]]:
    findings = [Finding(**one) for one in event.findings]  # type: ignore[arg-type]
    return watch.step(event.round, event.weights.keys(), findings)
