"""Writing that survives a crash: beside the place, flushed to disk, then renamed."""

import errno
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medfed.core.checks import RunError

_LOCKS: Any = importlib.import_module("fcntl") if os.name == "posix" else None


def write(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: readers see the old content until all of the new is on disk.

    Raises RunError where the disk refuses; what was there before is still there then.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        _sync_folder(path.parent)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise RunError(
            f"{path} cannot be written: {error.strerror}. {_way_out(error)}, then `medfed resume` a run that has not "
            "ended."
        ) from error


def _way_out(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "Free the disk" if full else "Make the folder writable"


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk, on systems that let a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def held(folder: Path, name: str = ".lock") -> Iterator[None]:
    """Hold a folder until the block ends, or this process does; raise RunError where another process holds it."""
    if _LOCKS is None:  # no such locks on this system
        yield
        return
    with open(folder / name, "w") as file:
        try:
            _LOCKS.flock(file, _LOCKS.LOCK_EX | _LOCKS.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"{folder} is in use by another run. Wait for it (`medfed watch {folder}`), or give another --out."
            ) from error
        try:
            yield
        finally:
            (folder / name).unlink(missing_ok=True)
