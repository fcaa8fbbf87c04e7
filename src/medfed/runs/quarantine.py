"""Whom a run holds something against, and what its operators decide."""

from collections.abc import Iterable, Mapping
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
from medfed.runs.decisions import OVERRIDES, read_decisions, sign_off, write_down
from medfed.runs.folders import read_name, read_plan
from medfed.runs.results import is_complete


def list_quarantined(folder: str | Path) -> list[dict[str, Any]]:
    """Return who has something held against it in a run:
    its sum, and the last round that it sits out (0: none).
    """
    recorded = _read_events(Path(folder))
    rounds = [event for event in recorded if isinstance(event, events.Inspected)]
    most = max((event.most for event in rounds), default=0)
    held = _replay(recorded, most, rounds[-1].sit_out if rounds else None).standings
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

    The word is signed with the coordinator's own keys where the study names a list of members.

    Raises RunError for a client that the run does not know, without reason or name, or where the
    run is complete; KeyFileError without those keys.
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
    study, _ = read_plan(folder)
    # the run itself goes on meanwhile, and reads what is whole
    with files.hold(folder, f"{OVERRIDES}.lock"):
        write_down(folder / OVERRIDES, study, read_name(folder), {"client": client, **word})


def _read_events(folder: Path) -> list[events.Event]:
    return list(events.read(folder / "events.jsonl"))


def replay_watch(plan: Plan, log: Log) -> Watch:
    """Return what is held against the clients by the rounds that a resumed run has behind it."""
    return _replay(log.events(), plan.rule.f if plan.rule else 0, plan.may_sit_out)


def _replay(recorded: Iterable[events.Event], most: int, sit_out: int | None) -> Watch:
    watch = Watch(most, sit_out=sit_out)
    for event in recorded:
        match event:
            case events.Inspected():
                watch, _ = _step(watch, event)
            case events.SecurityAudit(action="lift"):
                watch = watch.lift(event.client)
    return watch


def take_overrides(
    watch: Watch, plan: Plan, run: str, folder: Path | None, round: int, log: Log
) -> Watch:
    """Take in what operators have decided since the last round, and tell it.

    Args:
        watch: what is held against whom.
        plan: the run's.
        run: its name.
        folder: the run's; None: nothing is decided.
        round: how many rounds are behind.
        log: takes what was decided.

    Raises RunError for a line that no operator of this run has signed, or on no client of its; and
    where decisions are missing that the log tells of.
    """
    if folder is None:
        return watch
    known = [
        (event.client, tuple(event.evidence))
        for event in log.events()
        if isinstance(event, events.SecurityAudit) and event.action == "lift"
    ]
    path = folder / OVERRIDES
    lifts = [_lift(path, plan, round, asked) for asked in read_decisions(path, plan.study, run)]
    if [(lift.client, tuple(lift.evidence)) for lift in lifts[: len(known)]] != known:
        raise RunError(
            f"{path} lacks decisions that were taken in, as the log tells: lines are missing, or "
            "others are in their place. Restore it from a copy."
        )
    for lift in lifts[len(known) :]:
        watch = watch.lift(lift.client)
        log.emit(lift)
    return watch


def _lift(path: Path, plan: Plan, round: int, asked: Mapping[str, Any]) -> events.SecurityAudit:
    """Return the event of a decision; raise RunError where it is on no client of the run."""
    client = str(asked.get("client"))
    if client not in plan.sizes:
        raise RunError(
            f"{path} lifts client={client!r}, which takes no part in this run; restore the file"
        )
    why = (f"operator {asked['operator']}: {asked['reason']}",)
    lift = events.screen(events.SecurityAudit(round, client, 0, 0.0, "lift", why))
    assert isinstance(lift, events.SecurityAudit)
    return lift


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
