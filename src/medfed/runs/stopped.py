"""A stopped run's trail, held to what lies beside it before the run goes on: what was written into
it is there, and nobody else has written.

Who writes in the folder can still put all of it back to how it was at an earlier time, and cut what
was written after the last checkpoint where neither log nor summary tells of it yet.
"""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from medfed.compliance import consortium, trail
from medfed.compliance.trail import Verified
from medfed.core.checks import TrailError, some
from medfed.learn.algorithms import Server
from medfed.monitor import events
from medfed.rounds import checkpoints
from medfed.rounds.aggregation import COORDINATOR
from medfed.rounds.way import GIVEN_UP, OPENED
from medfed.runs import sealing
from medfed.runs.results import read_summary
from medfed.secure.identity import holds
from medfed.study import Study


def check_trail(
    folder: Path, study: Study, server: Server, header: Mapping[str, Any]
) -> Verified | None:
    """Return the trail with which a stopped run goes on, every line checked; None where it has
    none yet.

    Args:
        folder: the run's.
        study: its study.
        server: the state that its last checkpoint holds.
        header: of that checkpoint.

    Raises TrailError where a line was changed or is missing that checkpoint, summary or log tell
    of, or a key wrote it that was never the coordinator's; or where the coordinator has not signed
    the checkpoint. Whose key it is a list of members says: without one nobody could tell.
    """
    path = folder / sealing.TRAIL
    told = list(_heads_beside(folder, header))
    if not path.exists() and not path.is_symlink():
        if told or (study.security.aggregation != "plain" and any(_rounds_told(folder))):
            raise _missing(path, "all of it")
        return None

    found = trail.verify(path, holds, stopped=True)
    for one in told:
        at = one["entries"] - 1
        head = one.get("head")
        if found.hashes[at : at + 1] != [head]:
            raise _missing(path, f"line {at + 1} with hash {str(head)[:16]}...")
    known = {(e["facts"].get("round"), e["kind"]) for e in found.entries}
    if lacking := [number for number, kind in _rounds_told(folder) if (number, kind) not in known]:
        raise _missing(path, f"what was done in round {some(lacking)}")
    if members := consortium.members_of(study, [COORDINATOR]):
        _refuse_strangers(path, found, members.approved_keys())
        _refuse_other_state(folder, found, server, header)
    return found


def _heads_beside(folder: Path, header: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield how far the trail went by the last checkpoint, and by the summary of an earlier end."""
    if "trail" in header:
        yield header["trail"]
    summary = read_summary(folder)
    if summary and summary.get("trail"):
        yield summary["trail"]


def _rounds_told(folder: Path) -> Iterator[tuple[int, str]]:
    """Yield the rounds that the log tells the end of, and by what line of the trail they ended."""
    if not (folder / "events.jsonl").exists():
        return
    for event in events.read(folder / "events.jsonl"):
        if isinstance(event, events.RoundFinished):
            yield event.round, OPENED
        if isinstance(event, events.GivenUp):
            yield event.round, GIVEN_UP


def _missing(path: Path, what: str) -> TrailError:
    return TrailError(
        f"{path} lacks {what}, which the run's checkpoint, summary or log tells of: lines are "
        "missing, or it was written anew. Restore it from a copy; the run cannot go on without "
        "what it has opened."
    )


def _refuse_strangers(path: Path, found: Verified, approved: Collection[tuple[str, str]]) -> None:
    """Raise TrailError where a key wrote lines that the consortium never approved."""
    for number, entry in enumerate(found.entries, 1):
        key = str(entry["facts"].get("public"))
        if entry["kind"] == "opened" and (entry["writer"], key) not in approved:
            raise TrailError(
                f"{path}, line {number}: {entry['writer']!r} signed with keys that the list of "
                "members never approved; lines were added. Restore it from a copy."
            )


def _refuse_other_state(
    folder: Path, found: Verified, server: Server, header: Mapping[str, Any]
) -> None:
    """Raise TrailError where a checkpoint is not as the coordinator left it.

    A model from before, under a later round's name, would be played over other sites again, and the
    difference of two sums of one model is a row.
    """
    if not any(entry["kind"] in (OPENED, GIVEN_UP) for entry in found.entries):
        return  # no sum has left yet
    head = header.get("trail") or {"entries": 0, "head": ""}
    before = [e for e in found.entries[: head["entries"]] if e["kind"] == "opened"]
    signature = header.get("signature")
    key = before[-1]["facts"].get("public") if before else None
    said = checkpoints.vouched(server, str(head["head"]))
    if not holds(trail.parse_hex(key), trail.parse_hex(signature), said):
        raise TrailError(
            f"{folder / 'checkpoints'}: the last checkpoint, of round {server.round}, is not what "
            "the coordinator signed; it was changed, or put there. Restore it from a copy, or "
            "start the study again."
        )
