"""What a party has seen of each consortium's list of members: how many lines, and the last's hash.

A list is signed and chained, so nobody else can add to it, but an older copy of it holds as well as
the newest, and would bring a revoked member back. So each party keeps the head of the last list
that it has seen in a file of its own, beside its key file, and takes no list that does not go on
from there. A party that has seen none takes what it is given.
"""

import json
import re
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from medfed.compliance.trail import read_file
from medfed.core import files
from medfed.core.checks import RunError, TrailError, WriteError

READER = "members.lists"
"""The file of whoever reads runs and lists on a machine, in the folder of the site's ledger."""

_FORMAT = "medfed lists seen 1"
_WAIT = 10.0  # seconds for another process of this party, which writes a few bytes
_PAUSE = 0.02


@dataclass(frozen=True)
class Head:
    """How far a list was seen: its lines, and the sha256 of the last of them."""

    lines: int
    head: str


def beside(key_file: Path) -> Path:
    """Return where the owner of a key file keeps what it has seen."""
    return key_file.with_name(f"{key_file.name}.lists")


def read(path: Path) -> dict[str, Head]:
    """Return what a party has seen, by the consortium's fingerprint; none where it has no file.

    Raises TrailError where the file is there and cannot be read: without it an older list would
    pass.
    """
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError:  # something is there: reading it says what is wrong
        pass
    way = (
        "It holds the heads of the lists of members that this party has seen. Restore it from a "
        "copy; where there is none, ask the consortium for the number of lines and the last hash "
        "of its list (`medfed federation show`), compare, then remove the file."
    )
    try:
        told = json.loads(read_file(path, way))
        if set(told) != {"format", "lists"} or told["format"] != _FORMAT:
            raise ValueError(f"expected format {_FORMAT!r}")
        found = {name: Head(**one) for name, one in told["lists"].items()}
        if not all(map(_is_head, found.values())):
            raise ValueError("a head that is none")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise TrailError(f"{path} is damaged ({error}). {way}") from error
    return found


def keep_up(path: Path, consortium: str, hashes: Sequence[str], source: Path) -> None:
    """Take in a list that holds: refuse one that lacks the head last seen, remember a longer one.

    Two processes of one party may do so at once. Raises TrailError where the list is older than one
    that was seen, or another, or the file of what was seen cannot be read; WriteError where it
    cannot be written.

    Args:
        path: the party's own file.
        consortium: the fingerprint of the list's key.
        hashes: sha256 of each line of the list.
        source: the list's file, for what an error says.
    """
    if _is_newest(path, consortium, hashes, source):
        return
    files.make_folder(path.parent)
    with _hold(path):
        if _is_newest(path, consortium, hashes, source):  # written meanwhile
            return
        lists = read(path) | {consortium: Head(len(hashes), hashes[-1])}
        content = {"format": _FORMAT, "lists": {name: asdict(one) for name, one in lists.items()}}
        files.write(path, json.dumps(content, indent=1) + "\n")


def _is_newest(path: Path, consortium: str, hashes: Sequence[str], source: Path) -> bool:
    """Say whether a list ends where it was last seen; raise TrailError where it lacks that line."""
    last = read(path).get(consortium)
    if last is None:
        return False
    if hashes[last.lines - 1 : last.lines] != [last.head]:
        older = "an older list was put back"
        if len(hashes) >= last.lines:
            older = "another list was written under the same key"
        raise TrailError(
            f"{source} has {len(hashes)} lines; line {last.lines} with hash {last.head[:16]}... "
            f"was seen before ({path}) and is not among them: {older}, rolled back or forked. A "
            "revoked member could be back on it. Restore the newest list from the consortium."
        )
    return last.lines == len(hashes)


def _is_head(one: Head) -> bool:
    return (
        type(one.lines) is int
        and one.lines > 0
        and isinstance(one.head, str)
        and re.fullmatch("[0-9a-f]{64}", one.head) is not None
    )


def _hold(path: Path) -> ExitStack:
    """Hold a party's file, after waiting for another process that writes it just now."""
    until = time.monotonic() + _WAIT
    while True:
        with ExitStack() as held:
            try:
                held.enter_context(files.hold(path.parent, f"{path.name}.lock"))
            except WriteError:
                raise
            except RunError:
                if time.monotonic() > until:
                    raise
            else:
                return held.pop_all()
        time.sleep(_PAUSE)
