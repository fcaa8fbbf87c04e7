"""Checkpoints: the server's state after a round, on disk, with a checksum. A damaged one is passed
over, and told.
"""

import hashlib
from pathlib import Path
from typing import Any

from medfed.compliance.trail import Trail
from medfed.core import codec, files
from medfed.core.checks import CodecError, RunError, plain
from medfed.learn.algorithms import Server

_DIGEST = 32


def write(folder: Path, server: Server, header: dict[str, Any], keep: int) -> None:
    """Write the state after a round beside the earlier ones, of which the last `keep` stay.

    Args:
        folder: of the run's checkpoints; made where it is missing.
        server: the state.
        header: what a resumed run needs beside it.
        keep: how many stay.
    """
    files.make_folder(folder)
    _write(folder, server, header)
    for old in sorted(folder.glob("round-*.checkpoint"))[:-keep]:
        with files.explained(old):
            old.unlink()


def amend(folder: Path, round: int, more: dict[str, Any]) -> None:
    """Write the checkpoint of a round anew, with `more` in its header; all else stays."""
    server, header = _read(_path(folder, round))
    _write(folder, server, header | more)


def read_last(folder: Path) -> tuple[Server, dict[str, Any], str]:
    """Return the newest whole checkpoint of a `folder`: state, header, and a note on damaged ones.

    Raises RunError where none is whole.
    """
    damaged: list[str] = []
    for path in sorted(folder.glob("round-*.checkpoint"), reverse=True):
        try:
            server, header = _read(path)
        except (CodecError, OSError) as error:
            damaged.append(f"{path.name} is damaged ({plain(error)})")
            continue
        return server, header, "; ".join(damaged)
    raise RunError(
        f"{folder}: no whole checkpoint. {'; '.join(damaged) or 'None was written'}. Start the "
        "study again."
    )


def vouch(server: Server, trail: Trail) -> dict[str, Any]:
    """Return what binds a state to a run's trail: how far the trail goes, and its writer's
    signature of that and of the state.
    """
    head = trail.tell_head()
    return {"trail": head, "signature": trail.sign(vouched(server, head["head"])).hex()}


def vouched(server: Server, head: str) -> bytes:
    """Return what the coordinator signs of a state, where the trail's last line has hash `head`:
    so neither another run's state nor an earlier round's passes for it.
    """
    return b"medfed checkpoint" + hashlib.sha256(_encode(server, {})).digest() + head.encode()


def _encode(server: Server, header: dict[str, Any]) -> bytes:
    tensors = {"w": server.w_P, **{f"slot.{name}": value for name, value in server.slots.items()}}
    return codec.encode({**header, "round": server.round}, tensors)


def _write(folder: Path, server: Server, header: dict[str, Any]) -> None:
    payload = _encode(server, header)
    files.write(_path(folder, server.round), hashlib.sha256(payload).digest() + payload)


def _read(path: Path) -> tuple[Server, dict[str, Any]]:
    content = path.read_bytes()
    digest = content[:_DIGEST]
    payload = content[_DIGEST:]
    if hashlib.sha256(payload).digest() != digest:
        raise CodecError("its checksum does not agree")
    header, tensors = codec.decode(payload)
    slots = {
        name.removeprefix("slot."): value
        for name, value in tensors.items()
        if name.startswith("slot.")
    }
    return Server(header["round"], tensors["w"], slots), header


def _path(folder: Path, round: int) -> Path:
    return folder / f"round-{round:06d}.checkpoint"
