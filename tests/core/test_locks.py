"""One writer at a time, by real processes: with the kernel's locks and, as on shares that have
none, without.
"""

import errno
import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from medfed.core import files, locks
from medfed.core.checks import RunError
from medfed.core.locks import Holder

pytestmark = pytest.mark.skipif(
    sys.platform == "win32", reason="processes are killed and asked for"
)

PRELUDE = """
import errno, os, sys, time
from pathlib import Path
from medfed.core import files, locks
from medfed.core.checks import RunError

def unknown(handle, operation):
    raise OSError(int(sys.argv[2]), "no locks here")

if int(sys.argv[2]):
    locks._FLOCK = type("", (), {"LOCK_EX": 2, "LOCK_NB": 4, "flock": staticmethod(unknown)})
folder = Path(sys.argv[1])
"""

TAKES_TURNS = """
done, end = 0, time.monotonic() + 20
while done < 60:
    assert time.monotonic() < end, done
    try:
        with files.hold(folder):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))  # fails where somebody else is inside
            (folder / "inside").unlink()
            done += 1
    except RunError:
        pass
"""

HOLDS = """
with files.hold(folder):
    print("holds", flush=True)
    time.sleep(60)
"""

KINDS = [
    pytest.param(0, id="flock"),
    pytest.param(errno.ENOLCK, id="ENOLCK"),
    pytest.param(errno.ENOTSUP, id="ENOTSUP"),
]


def _start(code: str, folder: Path, unknown: int) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", PRELUDE + code, str(folder), str(unknown)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Take this process's locks away, as a share does."""

    def take(number: int) -> None:
        def unknown(handle: int, operation: int) -> None:
            raise OSError(number, "no locks here")

        if number:
            monkeypatch.setattr(
                locks,
                "_FLOCK",
                type("", (), {"LOCK_EX": 2, "LOCK_NB": 4, "flock": staticmethod(unknown)}),
            )

    return take


def _leave(folder: Path, holder: Holder) -> None:
    (folder / files.LOCK).write_text(json.dumps(asdict(holder)))


@pytest.mark.parametrize("unknown", KINDS[:2])
def test_two_are_never_inside_at_once(tmp_path: Path, unknown: int) -> None:
    """A lock on a file that its last holder has unlinked holds nobody off: it is looked at again
    once it is held.
    """
    if unknown:
        # of one who died: all find it, one may clear it
        _leave(tmp_path, replace(Holder.here(), started="1"))
    children = [_start(TAKES_TURNS, tmp_path, unknown) for _ in range(4)]
    told = [child.communicate()[1] for child in children]
    assert [child.returncode for child in children] == [0] * 4, told
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_is_no_longer_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first lets go, file and all, and the third takes it, between the second's open and its
    lock.
    """
    path = tmp_path / files.LOCK
    first = locks.take(path)
    flock = locks._flock
    third: list[int] = []

    def meanwhile(handle: int) -> bool | None:
        monkeypatch.setattr(locks, "_flock", flock)
        locks.let_go(path, first)
        third.append(locks.take(path))
        return flock(handle)

    monkeypatch.setattr(locks, "_flock", meanwhile)
    with pytest.raises(locks.HeldError):
        locks.take(path)
    locks.let_go(path, third[0])


def test_who_comes_late_to_a_dead_one_s_file_does_not_clear_the_next_one_s(
    tmp_path: Path, without: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(errno.ENOLCK)
    path = tmp_path / files.LOCK
    clear = locks._clear
    _leave(tmp_path, replace(Holder.here(), started="1"))
    next_one: list[int] = []

    def meanwhile(place: Path, gone: Holder) -> None:
        monkeypatch.setattr(locks, "_clear", clear)
        next_one.append(locks.take(path))
        clear(place, gone)

    monkeypatch.setattr(locks, "_clear", meanwhile)
    with pytest.raises(locks.HeldError):
        locks.take(path)
    locks.let_go(path, next_one[0])
    assert not list(tmp_path.iterdir())


def test_a_clearing_that_died_is_cleared_too(
    tmp_path: Path, without: Callable[[int], None]
) -> None:
    without(errno.ENOLCK)
    dead = replace(Holder.here(), started="1")
    _leave(tmp_path, dead)
    (tmp_path / f"{files.LOCK}.clearing").write_text(json.dumps(asdict(dead)))
    with files.hold(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unknown", KINDS)
def test_the_second_is_told_who_holds_it_and_a_killed_holder_is_gone(
    tmp_path: Path, unknown: int, without: Callable[[int], None]
) -> None:
    without(unknown)
    child = _start(HOLDS, tmp_path, unknown)
    assert child.stdout and child.stdout.readline() == "holds\n"
    who = rf"process {child.pid} on {re.escape(platform.node())}, since \d{{4}}-\d\d-\d\dT"
    with pytest.raises(RunError, match=who), files.hold(tmp_path):
        pass
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / files.LOCK).exists()
    with files.hold(tmp_path):
        assert json.loads((tmp_path / files.LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / files.LOCK).exists()


@pytest.mark.parametrize("unknown", KINDS)
def test_another_machine_s_lock_is_never_taken_over(
    tmp_path: Path, unknown: int, without: Callable[[int], None]
) -> None:
    without(unknown)
    _leave(tmp_path, replace(Holder.here(), host="elsewhere", boot="another"))
    before = (tmp_path / files.LOCK).read_bytes()
    with pytest.raises(
        RunError, match=rf"on elsewhere, since .*remove {re.escape(str(tmp_path / files.LOCK))}"
    ):
        files.hold(tmp_path).__enter__()
    assert (tmp_path / files.LOCK).read_bytes() == before


@pytest.mark.parametrize("unknown", KINDS)
def test_what_was_left_before_a_restart_is_taken_over(
    tmp_path: Path, unknown: int, without: Callable[[int], None]
) -> None:
    without(unknown)
    _leave(tmp_path, replace(Holder.here(), boot="the one before"))
    with files.hold(tmp_path):
        assert locks._read(tmp_path / files.LOCK) == replace(Holder.here(), since=_since(tmp_path))


def _since(folder: Path) -> str:
    found = locks._read(folder / files.LOCK)
    assert found
    return found.since


def test_without_locks_a_pid_given_out_again_is_somebody_else(
    tmp_path: Path, without: Callable[[int], None]
) -> None:
    without(errno.ENOLCK)
    here = Holder.here()
    if not here.started:
        pytest.skip("this system does not say when a process began")
    _leave(tmp_path, here)
    with pytest.raises(RunError, match=f"process {here.pid} on"), files.hold(tmp_path):
        pass
    _leave(tmp_path, replace(here, started="1"))
    with files.hold(tmp_path):
        pass


def test_without_locks_a_container_s_pid_says_nothing(
    tmp_path: Path, without: Callable[[int], None]
) -> None:
    without(errno.ENOLCK)
    _leave(tmp_path, replace(Holder.here(), pids="pid:[1]", pid=2**22 + 1))
    with (
        pytest.raises(RunError, match="if that process runs nowhere any more, remove"),
        files.hold(tmp_path),
    ):
        pass


@pytest.mark.parametrize("content", ["", "{", '{"pid": 3}', "[]", "\0\0"])
def test_a_torn_lock_file_is_nobody_s_where_the_kernel_decides(
    tmp_path: Path, content: str
) -> None:
    (tmp_path / files.LOCK).write_text(content)
    with files.hold(tmp_path):
        pass


def test_without_locks_a_torn_lock_file_is_left_to_a_person(
    tmp_path: Path, without: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(errno.ENOLCK)
    monkeypatch.setattr(locks, "_PAUSE", 0.0)
    (tmp_path / files.LOCK).write_text("{")
    with pytest.raises(
        RunError,
        match=r"another process\. Wait for it; if that process runs nowhere any more, remove",
    ):
        files.hold(tmp_path).__enter__()


def test_a_lock_that_a_person_removed_meanwhile_is_not_taken_from_the_next(tmp_path: Path) -> None:
    with files.hold(tmp_path):
        (tmp_path / files.LOCK).unlink()
        other = locks.take(tmp_path / files.LOCK)
    assert (tmp_path / files.LOCK).exists()
    locks.let_go(tmp_path / files.LOCK, other)
    assert not (tmp_path / files.LOCK).exists()


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with (
        pytest.raises(RunError, match=r"absent.*cannot be written: No such file"),
        files.hold(tmp_path / "absent"),
    ):
        pass
