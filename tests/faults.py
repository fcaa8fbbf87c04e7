"""What machines do to files, homes, clocks and output, put under a command on purpose: the faults
of `test_faults`.

A fault is put in by `put(target, name, value)`: `monkeypatch.setattr` in this process, `setattr` in
a real one, where `shim/sitecustomize.py` does it before the command begins. Only files below `root`
are touched by it.
"""

import builtins
import errno
import io
import os
import pwd
import stat
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

Put = Callable[[Any, str, Any], None]

HOMES = (
    "HOME",
    "XDG_DATA_HOME",
    "XDG_CACHE_HOME",
    "USER",
    "LOGNAME",
    "LNAME",
    "USERNAME",
    "MEDFED_HOME",
)
"""What tells a user's home or name."""


@dataclass
class Fault:
    """A fault that strikes at the `at`-th chance, or at each where `at` is 0; `hits` counts those
    that struck.
    """

    root: Path
    put: Put
    at: int = 0
    chances: int = 0
    hits: int = 0

    def strikes(self, place: Any) -> bool:
        """Count a chance at a file, or a file's number, and say whether the fault strikes."""
        if not self._inside(place):
            return False
        self.chances += 1
        if self.at in (0, self.chances):
            self.hits += 1
            return True
        return False

    def _inside(self, place: Any) -> bool:
        if isinstance(place, int):
            try:
                place = os.readlink(f"/proc/self/fd/{place}")
            except OSError:
                return False
        path = os.path.abspath(os.fsdecode(place))
        return path == str(self.root) or path.startswith(f"{self.root}{os.sep}")


def _refused(number: int, place: Any = None) -> OSError:
    name = None if place is None or isinstance(place, int) else os.fsdecode(place)
    return OSError(number, os.strerror(number), name)


# Files --------------------------------------------------------------------------------------------


def full(fault: Fault, number: int = errno.ENOSPC) -> None:
    """Refuse a write, as a full disk does."""

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            if fault.strikes(self.fileno()):
                raise _refused(number)
            return super().write(data)

    opened = io.open
    written = os.write

    def open_(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
              newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:  # fmt: skip
        if not set(mode) & set("wax+"):
            return opened(file, mode, buffering, encoding, errors, newline, closefd, opener)
        raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        return io.TextIOWrapper(buffered, encoding, errors, newline)

    def write(handle: int, data: bytes) -> int:
        if fault.strikes(handle):
            raise _refused(number)
        return written(handle, data)

    fault.put(io, "open", open_)
    fault.put(builtins, "open", open_)
    fault.put(os, "write", write)


def unflushed(fault: Fault, number: int = errno.EIO) -> None:
    """Fail to flush a file or a folder."""
    flush = os.fsync

    def fsync(handle: int) -> None:
        if fault.strikes(handle):
            raise _refused(number)
        flush(handle)

    fault.put(os, "fsync", fsync)


def unflushed_folders(fault: Fault, number: int = errno.EINVAL) -> None:
    """Refuse to flush folders, as CIFS and FUSE do."""
    flush = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode) and fault.strikes(handle):
            raise _refused(number)
        flush(handle)

    fault.put(os, "fsync", fsync)


def closed_folders(fault: Fault, number: int = errno.EACCES) -> None:
    """Refuse to open folders as such."""
    opened = os.open

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: Any = None) -> int:
        if flags & os.O_DIRECTORY and fault.strikes(path):
            raise _refused(number, path)
        return opened(path, flags, mode, dir_fd=dir_fd)

    fault.put(os, "open", open_)


def unmoved(fault: Fault, number: int = errno.EXDEV) -> None:
    """Refuse to rename."""
    for name in ("replace", "rename"):
        real = getattr(os, name)

        def move(source: Any, target: Any, *more: Any, real: Any = real, **options: Any) -> None:
            if fault.strikes(target):
                raise _refused(number, source)
            real(source, target, *more, **options)

        fault.put(os, name, move)


def read_only(fault: Fault, number: int = errno.EROFS) -> None:
    """Let nothing be opened for writing, made, moved or removed."""
    opened = io.open
    low = os.open
    made = os.mkdir

    def open_(file: Any, mode: str = "r", *more: Any, **options: Any) -> Any:
        if set(mode) & set("wax+") and not isinstance(file, int) and fault.strikes(file):
            raise _refused(number, file)
        return opened(file, mode, *more, **options)

    def open_low(path: Any, flags: int, mode: int = 0o777, *, dir_fd: Any = None) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and fault.strikes(path):
            raise _refused(number, path)
        return low(path, flags, mode, dir_fd=dir_fd)

    def mkdir(path: Any, *more: Any, **options: Any) -> None:
        if not os.path.exists(path) and fault.strikes(path):
            raise _refused(number, path)
        made(path, *more, **options)

    fault.put(io, "open", open_)
    fault.put(builtins, "open", open_)
    fault.put(os, "open", open_low)
    fault.put(os, "mkdir", mkdir)
    unmoved(fault, number)


def unlocked(fault: Fault, number: int = errno.ENOLCK) -> None:
    """Know no locks, as some shares do."""
    import fcntl

    def flock(handle: int, operation: int) -> None:
        fault.hits += 1
        raise _refused(number)

    fault.put(fcntl, "flock", flock)


# Users, clocks, languages -------------------------------------------------------------------------


def homeless(fault: Fault) -> None:
    """Be a user without a home, a name or a line in the system's list of users."""

    def unknown(*_: Any) -> Any:
        fault.hits += 1
        raise KeyError("uid not found")

    fault.put(os, "environ", _without(os.environ))
    fault.put(pwd, "getpwuid", unknown)
    fault.put(pwd, "getpwnam", unknown)


def _without(environ: Any) -> Any:
    """Return an environment like this one that tells no home."""
    mine = {
        os.fsencode(name): os.fsencode(value)
        for name, value in environ.items()
        if name not in HOMES
    }
    return type(environ)(
        mine, environ.encodekey, environ.decodekey, environ.encodevalue, environ.decodevalue
    )


def backwards(fault: Fault) -> None:
    """Have the clock go back by a year, after its second reading."""
    real = time.time
    year = timedelta(days=365).total_seconds()

    def late() -> bool:
        fault.chances += 1
        fault.hits += fault.chances > 2
        return fault.chances > 2

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(real() - year * late(), tz)

    for name, module in list(sys.modules.items()):
        if name.startswith("medfed") and vars(module).get("datetime") is datetime:
            fault.put(module, "datetime", Clock)
    fault.put(time, "time", lambda: real() - year * late())


def in_zone(fault: Fault, name: str) -> None:
    """Be in another time zone; who puts it in takes it out again."""
    fault.hits += 1
    os.environ["TZ"] = name
    time.tzset()


FAULTS: dict[str, Callable[[Fault], None]] = {
    "full": full,
    "quota": lambda fault: full(fault, errno.EDQUOT),
    "broken disk": lambda fault: full(fault, errno.EIO),
    "unflushed": unflushed,
    "folders unflushed": unflushed_folders,
    "folders unflushed, ENOTSUP": lambda fault: unflushed_folders(fault, errno.ENOTSUP),
    "folders closed": closed_folders,
    "no rename": unmoved,
    "rename forbidden": lambda fault: unmoved(fault, errno.EACCES),
    "read-only": read_only,
    "forbidden": lambda fault: read_only(fault, errno.EACCES),
    "no locks": unlocked,
    "homeless": homeless,
    "backwards": backwards,
    "zone ahead": lambda fault: in_zone(fault, "Pacific/Kiritimati"),
    "no such zone": lambda fault: in_zone(fault, "Not/AZone"),
}
