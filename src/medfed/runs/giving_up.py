"""Rounds that an operator gives up on record: each is spent, and the run goes on with the next.

A secure round that stopped between its list (masked) or its rows (three-party) being written down
and its opening is played again with the same sites or not at all. Where one of them is gone for
good, somebody has to say so.
"""

import json
from pathlib import Path

from medfed.core import files
from medfed.core.checks import RunError
from medfed.monitor import events
from medfed.privacy.guarantee import asked
from medfed.rounds import checkpoints
from medfed.rounds.way import OPENED, read_rounds
from medfed.runs.decisions import sign_off
from medfed.runs.folders import read_plan
from medfed.runs.results import is_complete
from medfed.runs.sealing import TRAIL
from medfed.study import Study

GIVEN_UP = "given-up.jsonl"
"""Which rounds operators gave up, one line each; a run takes them in where it comes to them."""


def give_up(folder: str | Path, reason: str, operator: str) -> int:
    """Give up the round that a stopped run could not end, on record; return its number.

    The next `resume` counts it as spent and goes on after it with the model as it was.

    Guarantee: a round is given up once, and none but the one after the last checkpoint, once it has
    been tried. What its sites have paid stays paid. Without noise no round is given up that was
    opened: beside the sum of the next one, over other sites and of the same model, it would tell
    the rows of whoever is gone.

    Raises RunError where rows are not secret (such a round goes on with whoever is there), the run
    is complete, runs, or has not tried the round; where the round was opened and no noise hides its
    rows; and without reason or name.
    """
    folder = Path(folder)
    study, _ = read_plan(folder)
    word = sign_off(reason, operator, "who gives a round up")
    if study.security.aggregation == "plain":
        raise RunError(
            f"{folder}: security.aggregation='plain'; such a round is played again with whoever is "
            f"there. `medfed resume {folder}`"
        )

    with files.hold(folder):
        if is_complete(folder):
            raise RunError(f"{folder} is complete; there is no round to give up")
        number = _find_stopped(folder, study)
        line = json.dumps({"round": number, **word}) + "\n"
        files.write(folder / GIVEN_UP, _read(folder) + line)
    return number


def _find_stopped(folder: Path, study: Study) -> int:
    """Return the round that a run has tried in vain; raise RunError where there is none to give
    up.
    """
    server, header, _ = checkpoints.read_last(folder / "checkpoints")
    number = server.round + 1
    if number > study.training.rounds:
        raise RunError(f"{folder}: all {server.round} rounds are behind; none is left to give up")
    if number in read_given_up(folder):
        raise RunError(
            f"{folder}: round {number} is given up already; `medfed resume {folder}` goes on after "
            "it"
        )

    # Tried, and not ended: what the log tells after the last checkpoint.
    tried = False
    before = (folder / "events.jsonl").read_bytes()[: header["events"]].count(b"\n")
    for event in list(events.read(folder / "events.jsonl"))[before:]:
        if isinstance(event, events.RoundStarted) and event.round == number:
            tried = True
        if isinstance(event, events.RoundFinished) and event.round == number:
            tried = False
    if not tried:
        raise RunError(
            f"{folder}: round {number} has not failed since the last checkpoint; try it first: "
            f"`medfed resume {folder}`"
        )

    hidden = asked(study) and not study.privacy.simulation_only
    if not hidden and (number, OPENED) in read_rounds(folder / TRAIL):
        raise RunError(
            f"{folder}: round {number} was opened before the run stopped, and no noise hides its "
            "rows: beside the next sum, of the same model, it would tell those of whoever is gone. "
            "Resume with the same sites, or start a new run."
        )
    return number


def read_given_up(folder: Path | None) -> dict[int, events.GivenUp]:
    """Return what operators have given up in a run, by round; raise RunError where the file was
    changed.
    """
    if folder is None:
        return {}
    found: dict[int, events.GivenUp] = {}
    for line in _read(folder).splitlines():
        try:
            one = json.loads(line)
            decided = events.GivenUp(one["round"], str(one["operator"]), str(one["reason"]))
            if type(decided.round) is not int or decided.round in found:
                raise ValueError(f"round={decided.round!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{folder / GIVEN_UP} is not what `medfed give-up` writes ({error}); restore it"
            ) from error
        found[decided.round] = events.screen(decided)  # type: ignore[assignment]
    return found


def _read(folder: Path) -> str:
    path = folder / GIVEN_UP
    if not path.exists():
        return ""
    with files.explained(path):
        return path.read_text(encoding="utf-8")
