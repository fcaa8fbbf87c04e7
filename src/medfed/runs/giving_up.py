"""Rounds that an operator gives up on record: each is spent, and the run goes on with the next.

A secure round that stopped between its list (masked) or its rows (three-party) being written down
and its opening is played again with the same sites or not at all. Where one of them is gone for
good, somebody has to say so.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from medfed.compliance.trail import Verified
from medfed.core import files
from medfed.core.checks import RunError
from medfed.monitor import events
from medfed.privacy.guarantee import asked
from medfed.rounds import checkpoints, way
from medfed.rounds.way import OPENED
from medfed.runs.decisions import GIVEN_UP, read_decisions, sign_off, write_down
from medfed.runs.folders import read_name, read_plan
from medfed.runs.results import is_complete
from medfed.runs.stopped import check_trail
from medfed.study import Study


def give_up(folder: str | Path, reason: str, operator: str) -> int:
    """Give up the round that a stopped run could not end, on record; return its number.

    The next `resume` counts it as spent and goes on after it with the model as it was. The word is
    signed with the coordinator's own keys.

    Guarantee: a round is given up once, and none but the one after the last checkpoint, once it has
    been tried. What its sites have paid stays paid. Without noise no round is given up that was
    opened: beside the sum of the next one, over other sites and of the same model, it would tell
    the rows of whoever is gone.

    Raises RunError where a round is played again with whoever is there (rows are not secret, or
    parties keep no record), the run is complete, runs, or has not tried the round; where the round
    was opened and no noise hides its rows; and without reason or name. TrailError where the trail
    lacks what the run has written; KeyFileError without the coordinator's keys.
    """
    folder = Path(folder)
    study, _ = read_plan(folder)
    word = sign_off(reason, operator, "who gives a round up")
    if why := _never_stuck(study):
        raise RunError(
            f"{folder}: {why}; such a round is played again with whoever is there. `medfed resume "
            f"{folder}`"
        )

    with files.hold(folder):
        if is_complete(folder):
            raise RunError(f"{folder} is complete; there is no round to give up")
        number = _find_stopped(folder, study)
        write_down(folder / GIVEN_UP, study, read_name(folder), {"round": number, **word})
    return number


def _never_stuck(study: Study) -> str:
    """Say why a study's rounds are played again with whoever is there; empty where they are not."""
    if study.security.aggregation == "plain":
        return "security.aggregation='plain'"
    if not study.security.federation:
        return (
            "security.federation is not set, so that what parties have written down ends with "
            "their process"
        )
    return ""


def _find_stopped(folder: Path, study: Study) -> int:
    """Return the round that a run has tried in vain; raise RunError where there is none to give
    up.
    """
    server, header, _ = checkpoints.read_last(folder / "checkpoints")
    trail = check_trail(folder, study, server, header)
    number = server.round + 1
    if number > study.training.rounds:
        raise RunError(f"{folder}: all {server.round} rounds are behind; none is left to give up")
    if number in read_given_up(folder, study, server.round, trail):
        raise RunError(
            f"{folder}: round {number} is given up already; `medfed resume {folder}` goes on after "
            "it"
        )

    # Tried, and not ended: what the log tells after the last checkpoint.
    tried = False
    log = folder / "events.jsonl"
    told = list(events.read(log))
    before = log.read_bytes()[: header["events"]].count(b"\n")
    for event in told[before:]:
        if isinstance(event, events.RoundStarted) and event.round == number:
            tried = True
        if isinstance(event, events.RoundFinished) and event.round == number:
            tried = False
    if not tried:
        raise RunError(
            f"{folder}: round {number} has not failed since the last checkpoint; try it first: "
            f"`medfed resume {folder}`"
        )
    refuse_opened(folder, study, number, way.tell_rounds(trail.entries if trail else ()))
    return number


def refuse_opened(
    folder: Path, study: Study, number: int, told: Collection[tuple[int, str]]
) -> None:
    """Raise RunError where a round that is given up was opened, and no noise hides its rows.

    Args:
        folder: the run's.
        study: its study.
        number: the round's.
        told: the rounds of its trail, each with what is told of it.
    """
    if not hides_rows(study) and (number, OPENED) in told:
        raise RunError(
            f"{folder}: round {number} was opened before the run stopped, and no noise hides its "
            "rows: beside the next sum, of the same model, it would tell those of whoever is gone. "
            "Resume with the same sites, or start a new run."
        )


def hides_rows(study: Study) -> bool:
    """Say whether noise hides the difference of two sums of one model."""
    return asked(study) and not study.privacy.simulation_only


def read_given_up(
    folder: Path, study: Study, behind: int, trail: Verified | None
) -> dict[int, events.GivenUp]:
    """Return what operators have given up in a run, by round: what its trail tells, and the
    decision on the next round that it does not tell of yet.

    Args:
        folder: the run's.
        study: its study.
        behind: how many rounds the run has behind it.
        trail: the run's, checked; None where it has none.

    Raises RunError for a line that no operator of this run has signed, and for one on a round that
    the run is not at.
    """
    path = folder / GIVEN_UP
    if (path.exists() or path.is_symlink()) and (why := _never_stuck(study)):
        raise RunError(f"{folder}: {why}, so no round is given up; remove {GIVEN_UP}")

    told = way.tell_rounds(trail.entries if trail else ())
    found = {
        number: events.GivenUp(number, facts["operator"], facts["reason"])
        for (number, kind), facts in told.items()
        if kind == way.GIVEN_UP
    }
    for one in read_decisions(path, study, read_name(folder)):
        decided = _read_line(path, one)
        if decided.round in found:
            continue
        if decided.round != behind + 1:
            raise RunError(
                f"{path} gives up round {decided.round}, and the run is at round {behind + 1}; "
                "restore the file, or take the line out"
            )
        found[decided.round] = decided
    return found


def _read_line(path: Path, one: Mapping[str, Any]) -> events.GivenUp:
    number = one.get("round")
    if type(number) is not int:
        raise RunError(f"{path} is not what `medfed give-up` writes (round={number!r}); restore it")
    decided = events.screen(events.GivenUp(number, one["operator"], one["reason"]))
    assert isinstance(decided, events.GivenUp)
    return decided
