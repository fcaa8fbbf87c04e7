"""How commands end: in one line, with a code for scripts, whatever the output can say and whoever
reads it.
"""

import io
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from medfed import cli
from medfed.cli import ending
from medfed.core.checks import DataError, RunError, WriteError, advising
from medfed.runs import drive, execute
from tests.faults import FAULTS, HOMES, Fault
from tests.tables import STUDY, invented, write_study

COMMAND = [sys.executable, "-m", "medfed"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study of three hospitals, one of them Zürich."""
    folder = tmp_path_factory.mktemp("endings")
    frame = invented()
    frame["hospital"] = frame["hospital"].replace("north", "Zürich")
    write_study(
        folder, STUDY.replace('"invented"', '"Gemüse €"').replace("rounds = 4", "rounds = 2"), frame
    )
    return folder


def ended(*words: object) -> int:
    """Run a command in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["medfed", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            cli.main()
    return int(exit.value.code or 0)


def real(*words: object, **environment: str) -> "subprocess.CompletedProcess[bytes]":
    """Run a command in a process of its own."""
    told = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([*COMMAND, *map(str, words)], env=told, capture_output=True)


# Output that cannot say a name --------------------------------------------------------------------


@contextmanager
def ascii_only() -> Iterator[list[str]]:
    """Give this process the output of PYTHONIOENCODING=ascii; afterwards what was printed, and
    said, is in the list.
    """
    out = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    err = io.TextIOWrapper(io.BytesIO(), "ascii", "strict")
    err.reconfigure(errors="backslashreplace")  # as Python has it always
    told: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        yield told
    for stream in (out, err):
        stream.flush()
        assert isinstance(stream.buffer, io.BytesIO)
        told.append(stream.buffer.getvalue().decode("ascii"))


@pytest.mark.parametrize("form", ["", "--json", "--quiet", "--log text", "--log json"])
def test_a_name_that_the_output_cannot_say_is_replaced(
    place: Path, tmp_path: Path, form: str
) -> None:
    study = place / "study.toml"
    run = tmp_path / "run"
    with ascii_only() as told:
        assert ended("run", study, "--out", run, *form.split()) == 0
        assert ended("data", "show", study) == 0
        assert ended("run", study, "--out", run) == 2
    out, err = told
    assert "Z?rich" in out and f"error --out '{run}' is not an empty folder" in err
    assert "Traceback" not in out + err


def test_what_a_run_left_is_shown_with_replacements(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert ended("run", place / "study.toml", "--out", run, "--quiet") == 0
    with ascii_only() as told:
        assert (
            ended("show", run) == ended("show", run, "--json") == ended("watch", run, "--once") == 0
        )
        assert ended("report", run) == ended("quarantine", "list", run) == ended("studies") == 0
    assert "Gem?se ?" in told[0] and told[1] == ""


def test_a_mended_study_is_printed_in_escapes_that_toml_reads(place: Path) -> None:
    with ascii_only() as told:
        assert ended("study", "fix", place / "study.toml") == 0
    assert tomllib.loads(told[0])["study"]["name"] == "Gemüse €"


UNCOERCED = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "environment", [pytest.param({"PYTHONIOENCODING": "ascii"}, marks=pytest.mark.long), UNCOERCED]
)
def test_a_real_process_prints_what_it_can(
    place: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    done = real("run", place / "study.toml", "--out", tmp_path / "run", **environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"Z" in done.stdout and b"rich" in done.stdout


def test_a_study_is_read_in_utf_8_whatever_the_locale(place: Path, tmp_path: Path) -> None:
    """Under ISO-8859-1 a category `männlich` would never match, and half of a column be missing."""
    code = "import sys; from medfed.study import load; print(ascii(load(sys.argv[1]).study.name))"
    (tmp_path / "bom.toml").write_bytes(b"\xef\xbb\xbf" + (place / "study.toml").read_bytes())
    for path in (place / "study.toml", tmp_path / "bom.toml"):
        words = [
            sys.executable,
            "-X",
            "utf8=0",
            "-W",
            "error::EncodingWarning",
            "-X",
            "warn_default_encoding",
        ]
        environment = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
        read = subprocess.run(
            [*words, "-c", code, str(path)], env=environment, capture_output=True, text=True
        )
        assert read.stdout == ascii("Gemüse €") + "\n", read.stderr


def test_a_study_in_another_encoding_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.toml").write_bytes(
        (place / "study.toml").read_text("utf-8").replace("€", "").encode("latin-1")
    )
    assert ended("study", "check", tmp_path / "study.toml") == 2
    assert re.search(r"error study=.* not in UTF-8 .*; save it as UTF-8", capsys.readouterr().err)


# Readers that go away -----------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["studies"], ["studies", "--json"], ["--help"]])
def test_nobody_reading_any_more_is_no_error(words: list[str]) -> None:
    """As in `medfed studies | head -0`."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, *words], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.stderr == b"" and done.returncode in (0, 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_that_is_full_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*COMMAND, "studies"], stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 2
    assert re.fullmatch(
        rb"error (a file, or )?standard output,? cannot be used: No space left on device\. Free the disk.*\n",
        done.stderr,
    )


def test_no_output_at_all_is_fine() -> None:
    assert (
        subprocess.run(["/bin/sh", "-c", '"$0" -m medfed studies >&-', sys.executable]).returncode
        == 0
    )


# Failures -----------------------------------------------------------------------------------------


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have `medfed show` fail."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("medfed.monitor.summary.summarise", fail)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "events.jsonl").write_bytes(b"")
    return tmp_path


def test_an_unexpected_error_is_one_line_that_quotes_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failing(monkeypatch, ValueError("could not convert string to float: 'Müller'"))
    assert ended("show", run) == ending.UNEXPECTED == 3
    said = capsys.readouterr()
    assert re.fullmatch(
        r"error unexpected ValueError at medfed/cli/__init__\.py, line \d+; run again with --debug for the whole.*\n",
        said.err,
    )
    assert said.out == ""


@pytest.mark.parametrize("words", [["--debug", "show"], ["show", "--debug"]])
def test_debug_shows_the_traceback(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    failing(monkeypatch, ValueError("what it says"))
    assert ended(*words, run) == 3
    said = capsys.readouterr().err
    assert "Traceback (most recent call last)" in said and "ValueError: what it says" in said


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            MemoryError(),
            2,
            r"memory does not suffice \(medfed/.*\): end other programs, or ask for less",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            2,
            "memory does not suffice",
        ),
        (
            PermissionError(13, "Permission denied", "a/folder"),
            2,
            r"a/folder cannot be used: Permission denied\. Make",
        ),
        (
            OSError(5, "Input/output error", b"a/file"),
            2,
            r"a/file cannot be used: Input/output error\. Look at the disk",
        ),
        (
            OSError(28, "No space left on device"),
            2,
            r"a file, or standard output, cannot be used: No space left on device\. Free",
        ),
        (OSError("something else"), 3, "unexpected OSError"),
        (RecursionError(), 3, "unexpected RecursionError"),
        (DataError("row 3 is torn; mend it"), 2, "row 3 is torn; mend it"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_every_failure_is_worded(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int,
    words: str,
) -> None:  # fmt: skip
    failing(monkeypatch, error)
    assert ended("show", run) == code
    assert re.match(f"error {words}", capsys.readouterr().err)


def test_the_innermost_advice_is_told_and_words_of_ours_need_none() -> None:
    for error, notes in (
        (WriteError("full"), ["inner"]),
        (KeyboardInterrupt(), ["inner"]),
        (RunError("what to do is said"), []),
    ):
        with pytest.raises(type(error)) as raised, advising("outer"), advising("inner"):
            raise error
        assert getattr(raised.value, "__notes__", []) == notes


@pytest.mark.parametrize(
    ("moment", "way_on"),
    [("rehearse", r"Nothing was trained\."), ("decide", r"`medfed resume .*run` goes on from its")],
)
def test_ctrl_c_says_whether_the_run_can_be_resumed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str,
    way_on: str,
) -> None:  # fmt: skip
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(drive if moment == "decide" else execute, moment, interrupt)
        assert ended("run", place / "study.toml", "--out", tmp_path / "run", "--quiet") == 130
    assert re.search(rf"^error interrupted\. {way_on}", capsys.readouterr().err, re.M)
    assert ended("resume", tmp_path / "run", "--quiet") == (0 if moment == "decide" else 2)


def heed_ctrl_c() -> None:
    """A shell lets what it starts in the background ignore Ctrl-C, and so do all its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_a_real_ctrl_c_ends_with_130_and_resumes(place: Path, tmp_path: Path) -> None:
    words = [
        "run",
        place / "study.toml",
        "--set",
        "training.rounds=4000",
        "--out",
        tmp_path / "run",
        "--quiet",
    ]
    child = subprocess.Popen(
        [*COMMAND, *map(str, words)], stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    record = tmp_path / "run" / "events.jsonl"
    while not record.exists() or '"round_finished"' not in record.read_text():
        assert child.poll() is None
        time.sleep(0.01)

    child.send_signal(signal.SIGINT)
    told = child.communicate()[1]
    assert child.returncode == 130
    assert told == (
        f"error interrupted. `medfed resume {tmp_path / 'run'}` goes on from its last whole "
        "round.\n"
    )
    assert not (tmp_path / "run" / ".lock").exists()


# Users --------------------------------------------------------------------------------------------


def test_without_a_home_nothing_is_downloaded_into_a_folder_called_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MEDFED_DATA", raising=False)
    FAULTS["homeless"](Fault(tmp_path, monkeypatch.setattr))
    assert ended("data", "get", "heart") == 2
    assert re.match(
        r"error this user has no home folder.* given by --data or MEDFED_DATA",
        capsys.readouterr().err,
    )
    assert not list(tmp_path.iterdir())


BE_NOBODY = """
import getpass, os, pwd, sys
import medfed.screens.console, medfed.runs  # where Python itself is closed to others, nothing can be imported later
from medfed import cli
os.setgroups([])
os.setgid(54321)
os.setuid(54321)
cli.main()
"""
"""A user that the system's list does not know."""


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can be somebody else"
)
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("privacy ledger", r"error this user has no home folder.* Set MEDFED_HOME"),
        ("quarantine lift run north --reason x", r"error operator=''; .* Set --operator"),
    ],
)
def test_a_user_that_the_system_does_not_know_is_told_what_to_set(words: str, said: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in HOMES}
    command = [sys.executable, "-c", BE_NOBODY, *words.split()]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and re.match(said, done.stderr), done.stderr
