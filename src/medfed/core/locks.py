"""Lock files: one process at a time, named to whoever comes second,
and known to be gone when it died.

The kernel decides where it has locks (flock): it lets go of a dead process's. Shares without them
answer ENOLCK or EOPNOTSUPP; there the file itself is the lock, as only one process can make it, and
what it says of its maker decides whether that process is gone. A file that a process of another
machine left is never taken over: nobody here can see whether it runs.
"""

import errno
import importlib
import json
import os
import platform
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

_FLOCK: Any = importlib.import_module("fcntl") if os.name == "posix" else None
_UNKNOWN = {errno.ENOLCK, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP}
"""What a file system without flock answers."""

_TRIES = 200
_PAUSE = 0.01  # seconds, in which a maker writes its name into its file


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock file: on which machine, which it is, and since when."""

    host: str
    boot: str  # of the kernel that it runs under
    pids: str  # the namespace in which its pid is it
    pid: int
    started: str  # in the kernel's ticks: a pid that is given out again starts later
    since: str

    @classmethod
    def here(cls) -> "Holder":
        """Return this process."""
        pid = os.getpid()
        return cls(
            platform.node(),
            _read_boot(),
            _read_namespace(),
            pid,
            _read_start(pid),
            datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def describe(self) -> str:
        """Return who it is, in words."""
        return f"process {self.pid} on {self.host}, since {self.since}"

    def is_of_this_machine(self) -> bool:
        """Say whether it runs, or ran before a restart, on this machine."""
        return self.boot == _read_boot() or self.host == platform.node()

    def may_live(self) -> bool:
        """Say whether it may still run; of other machines and containers nobody here can tell."""
        if self.boot != _read_boot():
            return not self.is_of_this_machine()  # else the machine was restarted since
        if self.pids != _read_namespace():
            return True
        return _lives(self.pid) and _read_start(self.pid) == self.started


class HeldError(Exception):
    """Another process holds the file; `removable` where only a person can tell that it is gone."""

    def __init__(self, holder: Holder | None, removable: bool) -> None:
        super().__init__(holder.describe() if holder else "another process")
        self.removable = removable


def take(path: Path) -> int:
    """Return the open lock file, which this process now holds. Raises HeldError, or OSError where
    it cannot be made.
    """
    for _ in range(_TRIES):
        handle, made = _open(path)
        try:
            if _win(handle, made, path):
                return handle
        except OSError:
            if made:  # and could not be signed: it would be in the way of the next
                path.unlink(missing_ok=True)
            os.close(handle)
            raise
        except HeldError:
            os.close(handle)
            raise
        os.close(handle)
    raise HeldError(None, removable=True)


def let_go(path: Path, handle: int) -> None:
    """Give up a lock: its file goes first, while nobody else can have taken it."""
    mine = _is_at(handle, path)
    if _FLOCK is None:  # systems that keep an open file where it is
        os.close(handle)
    with suppress(OSError):
        if mine:
            path.unlink()
    if _FLOCK is not None:
        os.close(handle)


def _open(path: Path) -> tuple[int, bool]:
    """Return the lock file, open, and whether it was made just now."""
    while True:
        with suppress(FileExistsError):
            return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        with suppress(FileNotFoundError):  # let go of meanwhile
            return os.open(path, os.O_RDWR), False


def _win(handle: int, made: bool, path: Path) -> bool:
    """Take an open lock file, or return False where it is no longer the one at `path`.
    Raises HeldError.
    """
    locked = _flock(handle)
    if locked is None:
        return _win_by_name(handle, made, path)
    if not _is_at(handle, path):
        return False

    holder = _read(path)
    if not locked:
        for _ in range(_TRIES):
            if holder or not _is_at(handle, path):
                break
            time.sleep(_PAUSE)
            holder = _read(path)
        if not _is_at(handle, path):
            return False
        raise HeldError(holder, removable=False)
    if holder and not holder.is_of_this_machine():
        raise HeldError(holder, removable=True)
    _sign(handle)
    return True


def _win_by_name(handle: int, made: bool, path: Path) -> bool:
    """Take a lock file where there is no flock: its maker has it, unless that process is gone."""
    if made:
        _sign(handle)
        return True
    holder = _read(path)
    for _ in range(_TRIES):
        if holder or not path.exists():
            break
        time.sleep(_PAUSE)
        holder = _read(path)
    if not path.exists():
        return False
    if holder is None or holder.may_live():
        raise HeldError(holder, removable=True)
    _clear(path, holder)
    return False


def _clear(path: Path, gone: Holder) -> None:
    """Take away a dead process's file;
    one process at a time, so that nobody takes away the next one's.
    """
    guard = path.with_name(f"{path.name}.clearing")
    try:
        handle = os.open(guard, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except FileExistsError:
        left = _read(guard)
        if left and not left.may_live():
            guard.unlink(missing_ok=True)
        time.sleep(_PAUSE)
        return

    try:
        _sign(handle)
        if _read(path) == gone:
            path.unlink(missing_ok=True)
    finally:
        os.close(handle)
        guard.unlink(missing_ok=True)


def _flock(handle: int) -> bool | None:
    """Say whether the kernel gives the lock to this process; None where it has no such locks."""
    if _FLOCK is None:
        return None
    try:
        _FLOCK.flock(handle, _FLOCK.LOCK_EX | _FLOCK.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNKNOWN:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            return False
        raise
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Say whether an open file is still the one at its place:
    a lock on an unlinked file holds nobody off.
    """
    try:
        there = path.stat()
    except OSError:
        return False
    mine = os.fstat(handle)
    return (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev)


def _sign(handle: int) -> None:
    """Write this process into its lock file."""
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(asdict(Holder.here())).encode())


def _read(path: Path) -> Holder | None:
    """Return who has written itself into a lock file; None where nobody has, or not yet."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


@cache
def _read_boot() -> str:
    """Return what tells this kernel's run from any other: containers of a machine share it, a
    restart changes it.
    """
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


@cache
def _read_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_start(pid: int) -> str:
    """Return when a process began, in ticks since the machine did;
    empty where it has ended, or nobody says.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return ""
    state, *rest = stat[stat.rfind(b")") + 2 :].split()
    if state in (b"Z", b"X"):
        return ""
    return rest[18].decode()


def _lives(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
