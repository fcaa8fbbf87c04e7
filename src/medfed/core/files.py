"""Writing that survives a crash: beside the place, flushed to disk, then renamed."""

import os
from pathlib import Path

from medfed.core.checks import RunError


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
            f"{path} cannot be written: {error.strerror}. Free the disk, then `medfed resume` the run."
        ) from error


def _sync_folder(folder: Path) -> None:
    """Flush a rename to disk, on systems that let a folder be opened."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
