"""The trail: what happened in a run, line by line, signed and chained so that a later change shows.

A line is a JSON object with the sha256 of the line before and its writer's signature. Who writes
first tells its public key (kind "opened"); a resumed run opens again. So what is changed, removed,
added or put in another order is found. Where a trail must end, whose key may write it and what its
lines bind is its reader's to ask: `runs.verification` of a run's, `consortium` of a list of
members. Its head, the hash of its last line, finds any other trail in its place where it is kept
elsewhere.
"""

import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from medfed.core import files
from medfed.core.checks import TrailError

_FIRST = "0" * 64
_FIELDS = ("number", "time", "writer", "kind", "facts", "previous", "signature")


@dataclass
class Trail:
    """A trail that is being written by one party."""

    path: Path
    writer: str
    sign: Callable[[bytes], bytes]
    number: int = 0
    head: str = _FIRST

    @classmethod
    def open(
        cls, path: Path, writer: str, public: bytes, sign: Callable[[bytes], bytes]
    ) -> "Trail":
        """Begin a trail, or go on with one;
        its first line says with which key, `public`, the next are signed.

        A last line that a crash tore is cut off, and the opening line says so. Raises WriteError
        where the system refuses, TrailError where something else is in the file's place: a link
        would have lines written into whatever it leads to.
        """
        files.make_folder(path.parent)
        _refuse_no_file(path)
        with files.explained(path):
            before = path.read_bytes() if path.exists() else b""
            whole = before[: before.rfind(b"\n") + 1]
            torn = len(before) - before.rfind(b"\n") - 1
            if torn:
                os.truncate(path, len(whole))

        lines = whole.splitlines()
        trail = cls(
            path, writer, sign, len(lines), sha256(lines[-1]).hexdigest() if lines else _FIRST
        )
        trail.append("opened", {"public": public.hex()} | ({"torn_bytes": torn} if torn else {}))

        return trail

    def append(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Write a line; it is on disk when this returns.

        Guarantee: the line holds the hash of the one before and the writer's signature of all of
        it, so that none before it can be changed, removed or moved without a break that `verify`
        finds.

        Edge cases:
        - a crash may leave half a line: `open` cuts it off, and says so in the next one;
        - a number that is not finite is a ValueError, and nothing is written;
        - a full disk is a WriteError, and the head stays where it was.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        entry = {
            "number": self.number,
            "time": time,
            "writer": self.writer,
            "kind": kind,
            "facts": facts,
        }
        entry["previous"] = self.head
        line = json.dumps(
            {**entry, "signature": self.sign(_signing_input(entry)).hex()}, allow_nan=False
        ).encode()

        with files.explained(self.path), open(self.path, "ab") as file:
            file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())

        self.number = self.number + 1
        self.head = sha256(line).hexdigest()

    def tell_head(self) -> dict[str, Any]:
        """Return how far the trail goes, as what lies beside it tells it."""
        return {"entries": self.number, "head": self.head}


@dataclass(frozen=True)
class Verified:
    """A trail that holds: its entries, its head, and the hash of each line."""

    entries: list[dict[str, Any]]
    head: str
    hashes: list[str]


def verify(
    path: Path,
    check: Callable[[bytes, bytes, bytes], bool],
    head: str = "",
    stopped: bool = False,
) -> Verified:
    """Return a trail's entries where every line follows the one before and is signed; `head` is
    known elsewhere.

    `check(public, signature, data)` says whether a signature holds; `stopped` says that its writer
    is to go on with it, so that a last line that a crash tore is none. Raises TrailError naming the
    first line that fails.

    Guarantee: no line was changed, added, removed or moved since it was written, by anybody without
    the writer's key.

    Edge cases:
    - a trail that was cut at its end, or written anew as a whole, holds in itself: `head` finds it,
      where it was kept elsewhere;
    - a writer's key is the one that its opening line tells: whose it is, a list of the consortium
      says;
    - a torn last line is refused: resuming the run cuts it off;
    - a line that says the same in other bytes (a name twice, a number that is none, more spaces)
      is refused, as readers may differ in what they take from it; so is a link in the file's place.
    """
    data = read_file(path, "Give a run whose rows nobody sees.")

    entries: list[dict[str, Any]] = []
    hashes: list[str] = []
    previous = _FIRST
    keys = dict[str, bytes]()

    for number, line in enumerate(data.split(b"\n")[:-1]):
        entry = _parse_entry(path, number, line, previous)
        if entry["kind"] == "opened":
            keys[entry["writer"]] = parse_hex(entry["facts"].get("public"))
        signature = parse_hex(entry.pop("signature"))
        if entry["writer"] not in keys or not check(
            keys[entry["writer"]], signature, _signing_input(entry)
        ):
            raise TrailError(
                f"{path}, line {number + 1}: {entry['writer']!r} did not sign it; the trail was "
                "changed here"
            )
        entries.append(entry)
        previous = sha256(line).hexdigest()
        hashes.append(previous)

    if not data.endswith(b"\n") and not stopped:
        raise TrailError(
            f"{path}, line {len(entries) + 1}: cut off; a crash tore it, or somebody did. Resume "
            "the run."
        )
    if head and head != previous:
        raise TrailError(
            f"{path}: its last line has hash {previous[:16]}..., expected {head[:16]}...; lines "
            "are missing"
        )

    return Verified(entries, previous, hashes)


def read_file(path: Path, advice: str) -> bytes:
    """Return a file's content; raise TrailError with `advice` where there is no file to read.

    A link is refused: what it leads to can be exchanged without touching the folder.
    """
    _refuse_no_file(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise TrailError(f"{path} cannot be read: {error.strerror}. {advice}") from error


def _refuse_no_file(path: Path) -> None:
    """Raise TrailError where a link, a folder or a device is in a file's place."""
    try:
        kind = path.lstat().st_mode
    except OSError:  # not there: reading, or making it, says so
        return
    if not stat.S_ISREG(kind):
        there = "a link" if stat.S_ISLNK(kind) else "a folder" if stat.S_ISDIR(kind) else "no file"
        raise TrailError(
            f"{path} is {there}; expected a file of this folder itself. Restore it from a copy."
        )


def _parse_entry(path: Path, number: int, line: bytes, previous: str) -> dict[str, Any]:
    where = f"{path}, line {number + 1}"
    try:
        entry = json.loads(line)
        kinds = {"number": int, "writer": str, "kind": str, "facts": dict, "time": str}
        if not isinstance(entry, dict) or tuple(entry) != _FIELDS:
            raise ValueError(f"expected the fields {', '.join(_FIELDS)}")
        if not all(type(entry[name]) is kind for name, kind in kinds.items()):
            raise ValueError("a field of another kind")
        if json.dumps(entry, allow_nan=False).encode() != line:
            raise ValueError("it is not written as a trail writes it")
    except (ValueError, RecursionError) as error:
        raise TrailError(f"{where}: no entry ({error}); the trail was changed here") from error
    if entry["number"] != number or entry["previous"] != previous:
        raise TrailError(
            f"{where}: does not follow the line before; a line was changed, removed, added or moved"
        )
    return entry


def _signing_input(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(["medfed trail 1", entry], sort_keys=True, separators=(",", ":")).encode()


def parse_hex(text: object) -> bytes:
    """Return the bytes of a text of hex digits in the one spelling that is written; else none."""
    try:
        data = bytes.fromhex(text) if isinstance(text, str) else b""
    except ValueError:
        return b""
    return data if data.hex() == text else b""
