"""A log is followed as it grows: whole lines only, again from the start where it was cut back,
damage by its number.
"""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import medfed
from medfed.core.checks import RunError
from medfed.monitor.events import Event, Log, RoundStarted, RunFinished, Warned, line, read
from medfed.screens.live import CHUNK, Tail
from medfed.screens.live import follow as follow_stamped
from tests.tables import STUDY, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")

DONE = RunFinished("complete", 1, 0.1, "")


def follow(path: Path, **options: Any) -> Iterator[Event]:
    return (told.event for told in follow_stamped(path, **options))


def taken(tail: Tail) -> tuple[list[Event], bool]:
    told, restarted = tail.read()
    return [one.event for one in told], restarted


def test_half_a_line_waits_for_its_other_half(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(tmp_path / "events.jsonl")
    first = line(Warned("one")).encode() + b"\n"
    second = line(Warned("two")).encode() + b"\n"
    path.write_bytes(first + second[:10])
    assert taken(tail) == ([Warned("one")], False)
    assert taken(tail) == ([], False)
    path.write_bytes(first + second)
    assert taken(tail) == ([Warned("two")], False)


def test_a_log_that_was_cut_back_is_told_again(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    tail = Tail(tmp_path / "events.jsonl")
    lines = [line(Warned(text)) + "\n" for text in ("one", "two", "three")]
    path.write_text("".join(lines))
    assert len(tail.read()[0]) == 3
    path.write_text(lines[0] + line(Warned("other")) + "\n")
    assert taken(tail) == ([Warned("one"), Warned("other")], True)


def test_a_long_line_and_many_of_them_come_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    told: list[Event] = [
        Warned("x" * (3 * CHUNK)),
        *(RoundStarted(t, ["a"]) for t in range(5000)),
        DONE,
    ]
    path.write_text("".join(line(event) + "\n" for event in told))
    assert list(follow(path)) == told


def test_damage_is_told_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text(line(Warned("one")) + "\n" + '{"schema": 1}\n')
    tail = Tail(path)
    assert taken(tail) == ([Warned("one")], False)  # what is before the damage is told first
    with pytest.raises(RunError, match="line 2 is damaged"):
        tail.read()
    with pytest.raises(RunError, match="line 2 is damaged"):
        list(follow(path, once=True))
    path.write_text(line(Warned("one")).replace('"schema": 1', '"schema": 7') + "\n")
    with pytest.raises(RunError, match="schema=7"):
        list(follow(path, once=True))
    with pytest.raises(RunError, match="cannot be read"):
        list(follow(tmp_path / "nothing", once=True))


def test_events_arrive_while_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    seen = list[Event]()
    arrived = threading.Event()
    path.touch()

    def watch() -> None:
        for event in follow(path, every=0.01):
            seen.append(event)
            arrived.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    with Log(path) as log:
        log.emit(Warned("first"))
        assert arrived.wait(30) and seen == [Warned("first")]  # before the run ends
        log.emit(DONE)
    watcher.join(30)
    assert seen == [Warned("first"), DONE]


def test_a_run_that_was_killed_and_resumed_is_followed_to_its_end(tmp_path: Path) -> None:
    """A real process, ended by SIGKILL in round 3."""
    study = write_study(tmp_path, STUDY)
    run = tmp_path / "run"
    script = (
        "import os, signal, medfed\nfrom medfed.monitor.events import RoundStarted\ndef "
        "stop(event):\n    if isinstance(event, RoundStarted) and event.round == 3: "
        "os.kill(os.getpid(), signal.SIGKILL)\n"
        f"medfed.run(medfed.load_study({str(study)!r}).set('training.rounds', 4), {str(run)!r}, "
        "listeners=[stop])\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    before = list(follow(run / "events.jsonl", once=True))
    assert isinstance(before[-1], RoundStarted) and before[-1].round == 3
    medfed.resume(run)
    assert list(follow(run / "events.jsonl")) == list(read(run / "events.jsonl"))


def test_the_command_shows_a_run_as_it_was_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, STUDY)
    run = tmp_path / "run"
    assert command("run", study, "--out", run) == 0
    shown = [text for text in capsys.readouterr().out.splitlines() if text.startswith("round ")]
    assert command("watch", run) == 0
    watched = capsys.readouterr().out.splitlines()
    assert shown and [text for text in watched if text.startswith("round ")] == shown
    assert command("watch", tmp_path / "nothing", "--once") == 2
    assert "cannot be read" in capsys.readouterr().err
