"""What operators decide about a run: who, what and why, on record, one signed line each in a file
of its folder.

Whoever can write in the folder can write a line, and none that counts: a line names its run, its
place in the file and its kind, and holds the coordinator's signature. Where a study names no list
of members nobody has a key that outlasts a run: its lines are bound to their run, and no more.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from medfed.compliance import consortium
from medfed.compliance.trail import read_file
from medfed.core import files
from medfed.core.checks import RunError, refuse_unprintable
from medfed.rounds.aggregation import COORDINATOR
from medfed.secure.identity import holds
from medfed.study import Study


def sign_off(reason: str, operator: str, kind: str) -> dict[str, str]:
    """Return an operator's word as it goes on record, with the time.

    Raises RunError without reason or name, which says what `kind` of decision stays on record; and
    where either is longer than pages bear, or holds what does not print.
    """
    if not reason.strip() or not operator.strip():
        raise RunError(
            f"reason={reason!r}, operator={operator!r}; expected both: {kind} stays on record"
        )
    word = {"reason": reason.strip(), "operator": operator.strip()}
    for name, text in word.items():
        refuse_unprintable(name, text)
    return {**word, "time": datetime.now(UTC).isoformat(timespec="seconds")}


def write_down(path: Path, study: Study, run: str, facts: Mapping[str, Any]) -> None:
    """Write a decision into a file of a run's folder, after those that it holds.

    Signed with the coordinator's own keys where the study names a list of members. Raises as
    `read_decisions` does for a line that is there and none of this run's, KeyFileError without the
    keys, SignatureError where they are not those of the list.
    """
    before = _read_lines(path)
    number = len(read_decisions(path, study, run))
    entry = {"run": run, "number": number, **facts, "key": ""}
    signature = ""
    if members := consortium.members_of(study, [COORDINATOR]):
        me = consortium.own_keys(study, COORDINATOR, "coordinator")
        consortium.refuse_unapproved(members, me.public, "coordinator")
        entry["key"] = me.public.signing.hex()
        signature = me.sign(_signing_input(path, entry)).hex()
    line = json.dumps({**entry, "signature": signature}) + "\n"
    files.write(path, "".join(before) + line)


def read_decisions(path: Path, study: Study, run: str) -> list[dict[str, Any]]:
    """Return what operators have decided in a file of a run's folder, in order; none without it.

    Guarantee: where the study names a list of members, each line was written for this run and this
    file, in this place, by a coordinator's key that the consortium approved and has not revoked.

    Edge cases:
    - lines that are missing at the end are not noticed here: a decision is then not taken;
    - a last line that a crash tore is none;
    - a link, or no file, in its place is refused, as is a line that says the same in other bytes.

    Raises RunError for a line that is none of these.
    """
    found: list[dict[str, Any]] = []
    lines = _read_lines(path)
    members = consortium.members_of(study, [COORDINATOR]) if lines else None
    vouched = members.vouched_keys() if members else set()
    for number, line in enumerate(lines):
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict) or json.dumps(entry) + "\n" != line:
                raise ValueError("it is not written as medfed writes it")
            signature = bytes.fromhex(entry.pop("signature"))
            told = entry["run"], entry["number"], type(entry["number"])
            if told != (run, number, int):
                raise ValueError(f"it is line {told[1]!r} of run {told[0]!r}, not {number} of this")
            for name in ("reason", "operator", "time"):
                refuse_unprintable(name, entry[name])
            key = bytes.fromhex(entry["key"])
            if members and (COORDINATOR, entry["key"]) not in vouched:
                raise ValueError("no key of a coordinator on the list of members signed it")
            if members and not holds(key, signature, _signing_input(path, entry)):
                raise ValueError("its signature does not hold")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, RunError) as error:
            raise RunError(
                f"{path}, line {number + 1} is not what `medfed {WRITERS[path.name]}` writes "
                f"({error}); restore the file, or take the line out"
            ) from error
        found.append(entry)
    return found


GIVEN_UP = "given-up.jsonl"
"""Which rounds operators gave up, one line each; a run takes them in where it comes to them."""

OVERRIDES = "overrides.jsonl"
"""What operators decided about quarantined clients, one line each; a run takes it in before its
next round.
"""

WRITERS = {GIVEN_UP: "give-up", OVERRIDES: "quarantine lift"}
"""By which command an operator writes into a file."""


def _read_lines(path: Path) -> list[str]:
    """Return the whole lines of a file, each with its end; none where there is no file."""
    if not path.exists() and not path.is_symlink():
        return []
    lines = read_file(path, "Restore it from a copy.").decode("utf-8", "replace").split("\n")
    return [f"{line}\n" for line in lines[:-1]]


def _signing_input(path: Path, entry: Mapping[str, Any]) -> bytes:
    told = ["medfed decision 1", path.name, entry]
    return json.dumps(told, sort_keys=True, separators=(",", ":")).encode()
