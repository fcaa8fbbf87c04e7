"""Writing whole files or none, by real refusals of the system."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medfed.core import files
from medfed.core.checks import RunError, WriteError

PRELUDE = """
import os, signal, sys
from pathlib import Path
from medfed.core import files
from medfed.core.checks import RunError
place = Path(sys.argv[1])
"""

FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    files.write(place, b"n" * int(sys.argv[2]))
except RunError as error:
    print(error)
    sys.exit(3)
"""

DIES_BEFORE_THE_RENAME = """
os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
files.write(place, b"new")
"""


def _child(code: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )


def _no_leftovers(folder: Path, *expected: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(expected)


@pytest.mark.parametrize("content", ["text ü\n", b"bytes\0\xff\r\n", "", b""])
def test_content_comes_back(tmp_path: Path, content: str | bytes) -> None:
    files.write(tmp_path / "file", content)
    assert (tmp_path / "file").read_bytes() == (
        content.encode() if isinstance(content, str) else content
    )
    assert _no_leftovers(tmp_path, "file")


def test_the_new_takes_the_place_of_the_old(tmp_path: Path) -> None:
    files.write(tmp_path / "file", "old and longer")
    files.write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert _no_leftovers(tmp_path, "file")


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE there")
@pytest.mark.parametrize("size", [101, 1_000_000])
def test_a_full_disk_leaves_the_old_content(tmp_path: Path, size: int) -> None:
    (tmp_path / "file").write_text("old")
    result = _child(FULL_DISK, tmp_path / "file", size)
    assert result.returncode == 3, result.stderr
    assert str(tmp_path / "file") in result.stdout
    assert os.strerror(27) in result.stdout  # EFBIG: the system refused, nobody pretended
    assert (tmp_path / "file").read_text() == "old"
    assert _no_leftovers(tmp_path, "file")


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE there")
def test_what_fits_the_disk_is_written(tmp_path: Path) -> None:
    assert _child(FULL_DISK, tmp_path / "file", 100).returncode == 0
    assert (tmp_path / "file").stat().st_size == 100


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL there")
def test_a_crash_before_the_rename_leaves_the_old_content(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    assert _child(DIES_BEFORE_THE_RENAME, tmp_path / "file").returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_text() == "old"


def test_content_is_on_disk_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync = os.fsync
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("flush"), fsync(handle))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b))[1])
    files.write(tmp_path / "file", "new")
    assert done[:2] == ["flush", "rename"]
    if hasattr(os, "O_DIRECTORY"):
        assert done[2:] == ["flush"]  # the rename itself


def test_a_missing_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="absent"):
        files.write(tmp_path / "absent" / "file", "new")


def test_a_folder_in_the_way_is_told_and_stays(tmp_path: Path) -> None:
    (tmp_path / "file").mkdir()
    (tmp_path / "file" / "inside").write_text("old")
    with pytest.raises(RunError):
        files.write(tmp_path / "file", "new")
    assert (tmp_path / "file" / "inside").read_text() == "old"
    assert _no_leftovers(tmp_path, "file")


def test_nothing_is_written_through_a_link_that_others_put_there(tmp_path: Path) -> None:
    """The name beside the place can be guessed: what it led to was overwritten."""
    victim = tmp_path / "victim"
    victim.write_text("kept")
    (tmp_path / f".told.{os.getpid()}.tmp").symlink_to(victim)
    with pytest.raises(WriteError, match="told cannot be written"):
        files.write(tmp_path / "told", "new")
    assert victim.read_text() == "kept"
    files.write(tmp_path / "told", "new")  # the link is gone
    assert (tmp_path / "told").read_text() == "new" and victim.read_text() == "kept"

    (tmp_path / "linked").symlink_to(victim)
    files.write(tmp_path / "linked", "new")  # takes the link's place
    assert victim.read_text() == "kept" and not (tmp_path / "linked").is_symlink()
