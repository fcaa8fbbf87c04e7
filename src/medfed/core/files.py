"""Writing that survives a crash: beside the place,
flushed to disk, then renamed; by one process at a time.
"""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medfed.core import locks
from medfed.core.checks import RunError, WriteError

LOCK = ".lock"
"""The file by which a process holds a folder."""

_UNFLUSHED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.EACCES,
    errno.EPERM,
}
"""What shares answer (CIFS, FUSE) that cannot open or flush a folder,
though what is in it is whole.
"""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


def write(path: Path, content: bytes | str, private: bool = False) -> None:
    """Write a whole file or nothing: readers see the old content until all of the new is on disk.

    `private`: its owner alone may read it. Raises WriteError where the disk refuses, or somebody
    has put a link where it is written first; what was there before is still there then. A link in
    the file's own place is replaced, and what it leads to stays.
    """
    data = content.encode() if isinstance(content, str) else content
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        try:
            with open(beside, "wb", opener=_open_itself) as file:
                if private:
                    os.chmod(beside, 0o600)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            with suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        flush_folder(path.parent)


def _open_itself(path: str, flags: int) -> int:
    """Open a file that is no link: somebody could have put one there, to a file of another's."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it is there. Raises WriteError."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def explained(path: Path, *but: type[OSError]) -> Iterator[None]:
    """Turn what the system refuses of a file or folder, `but` these, into WriteError: what, why,
    and what mends it.
    """
    try:
        yield
    except but:
        raise
    except OSError as error:
        raise WriteError(
            f"{path} cannot be written: {error.strerror or error}. {way_out(error)}."
        ) from error


def is_full(error: OSError) -> bool:
    """Say whether the system refuses for want of room."""
    return error.errno in _FULL


def way_out(error: OSError) -> str:
    """Return what a person can do about a refusal of the system."""
    if is_full(error):
        return "Free the disk, or the quota"
    if error.errno in _FORBIDDEN:
        return "Make the folder writable, or name another"
    if error.errno == errno.EIO:
        return "Look at the disk, or the share: it fails"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return "Name another: something else is in its place"
    return "Look at the folder, or name another"


def flush_folder(folder: Path) -> bool:
    """Flush a rename to disk; return False where systems or shares let no folder be flushed."""
    if not hasattr(os, "O_DIRECTORY"):
        return False
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in _UNFLUSHED:
            raise
        return False
    return True


@contextmanager
def hold(folder: Path, name: str = LOCK) -> Iterator[None]:
    """Hold a folder until the block ends, or this process does.

    Raises RunError where another process holds it, which it names; WriteError where it cannot be
    written.
    """
    path = folder / name
    try:
        with explained(path):
            handle = locks.take(path)
    except locks.HeldError as error:
        way = f"Wait for it (`medfed watch {folder}`), or give another --out"
        if error.removable:
            way = f"Wait for it; if that process runs nowhere any more, remove {path}"
        raise RunError(
            f"{folder} is in use by another run, or a command that writes into it: {error}. {way}."
        ) from error

    try:
        yield
    finally:
        locks.let_go(path, handle)
