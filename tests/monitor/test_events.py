"""The event log: what is written is read, what is cut or damaged is told, and nothing that is no
number is written.
"""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from medfed.core.checks import RunError
from medfed.monitor.events import (
    EVENTS,
    SCHEMA,
    WITHHELD,
    Compared,
    Event,
    GivenUp,
    Inspected,
    Log,
    Planned,
    RangesFound,
    Resumed,
    RolledBack,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    SecurityAudit,
    SiteExcluded,
    Voted,
    Warned,
    line,
    parse,
    read,
    screen,
)
from medfed.monitor.events import Tested as ModelTested
from medfed.monitor.metrics import Figure

FIGURES = {"auroc": Figure(0.1 + 0.2, 0.25, 0.5), "f1": Figure(None)}

SAMPLES: list[Event] = [
    RunStarted("study", "HRESCH", "abc", 7, 3, {"torch": "2"}, {"threads": 2, "system": "x"}),
    Planned(
        "fedavg",
        "logistic",
        3,
        2,
        3,
        "rules",
        {"ä": {"train": 3, "test": 1}},
        {"ä": {"0": 4}},
        {"epsilon": None},
        1,
        2,
    ),
    Warned('a "quoted"\nline'),
    RoundStarted(1, ["ä", "b"]),
    SiteExcluded(1, "b", "late"),
    RoundFinished(1, ["ä"], 0.5, [0.5, None], [0.1], [4], 0.2, 100, 200),
    ModelTested(1, "federated", 4, None, FIGURES, FIGURES, {"ä": FIGURES}, {"ä": 4}, 0.1, 10, 20),
    Inspected(
        1, {"ä": 1.0}, [{"client": "ä", "score": 2.5, "kind": "far", "evidence": "far off"}], 1
    ),
    SecurityAudit(1, "ä", 2, 7.5, "warn", ["far: far off"]),
    RolledBack(1, 0.5, None),
    GivenUp(2, "Ada", "gone for good"),
    Compared(3, 4, Figure(0.01, 0.1 + 0.2, None), {"ä": [4, 0.01, None, None]}),
    Voted(3, 150, Figure(60.5, 0.1 + 0.2, 93.0), 15.4),
    RangesFound(3, {"ä": [0.1 + 0.2, 1e12]}, 14.5),
    Resumed(1, 3, ""),
    RunFinished("complete", 3, 1.5, ""),
]


ODD = "a\nb\x1b[2J\u2028c\ud800d"
"""Line ends, a terminal's escape, half a letter."""


@pytest.mark.parametrize(
    "event",
    [
        GivenUp(2, ODD, ODD),
        SecurityAudit(1, "ä", 0, 0.0, "lift", [ODD]),
        SiteExcluded(1, "b", ODD),
        RunFinished("incomplete", 3, 1.5, ODD),
        Warned(ODD),
    ],
)
def test_free_texts_hold_nothing_that_ends_a_line_or_moves_a_cursor(
    event: Event, tmp_path: Path
) -> None:
    """A site's reason and an operator's word went to terminals and pages as they were."""
    with Log(tmp_path / "events.jsonl") as log:
        log.emit(event)
    (found,) = read(tmp_path / "events.jsonl")
    end = "\n" if isinstance(event, Warned) else " "
    assert f"a{end}b [2J c d" in texts(found)
    assert isinstance(found, type(event))
    by_hand = _write(tmp_path / "log", line(event).replace("\\ud800", " "), "")
    assert texts(*read(by_hand)) == texts(found)


def texts(event: Event) -> list[object]:
    return [part for one in vars(event).values() for part in (one if type(one) is list else [one])]


def test_half_a_letter_in_a_log_is_damage(tmp_path: Path) -> None:
    path = _write(tmp_path / "log", line(Warned("x\ud800")), line(Warned("y")), "")
    with pytest.raises(RunError, match="line 1 is damaged"):
        list(read(path))
    path = _write(tmp_path / "log", line(Warned("\U0001f600")), "")
    assert list(read(path)) == [Warned("\U0001f600")]


@pytest.mark.parametrize(
    "text",
    ["a" * 200_000, "a.b" * 70_000, "mrn" + ":" * 200_000, "mrn:" * 50_000, "born " * 40_000],
)
def test_screening_takes_time_by_length_alone(text: str) -> None:
    """A reason of 200,000 letters took minutes."""
    began = time.perf_counter()
    assert screen(Warned(text)) == Warned(text)
    assert time.perf_counter() - began < 2


@pytest.mark.parametrize(
    "text",
    [
        "write to ada.b+c@example.org now",
        "x" * 1000 + "@a.b",
        "MRN 12",
        "mrn:= #abc9",
        "patient id x-y-1",
        "mrn mrn ssn: q7",
        "born: mrn:ssn7",
        "078-05-1120",
        "2001-02-03",
    ],
)
def test_whatever_stands_before_an_identifier_it_is_withheld(text: str) -> None:
    assert screen(Warned(text)) == Warned(WITHHELD)


@pytest.mark.parametrize("text", ["a@b", "mrn", "mrn x 7", "1-2-3", "borne 7"])
def test_what_looks_like_none_is_told(text: str) -> None:
    assert screen(Warned(text)) == Warned(text)


def _write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_a_sample_of_every_event() -> None:
    assert {type(event) for event in SAMPLES} == set(EVENTS.values())
    assert list(EVENTS)[:2] == ["run_started", "planned"]


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: type(event).__name__)
def test_an_event_is_read_as_it_was_written(event: Event) -> None:
    assert parse(line(event)).event == event
    assert "\n" not in line(event)


def test_a_log_tells_its_listeners_and_keeps_its_order(tmp_path: Path) -> None:
    heard: list[Event] = []
    with Log(tmp_path / "events.jsonl", [heard.append]) as log:
        for event in SAMPLES:
            log.emit(event)
        assert log.offset() == (tmp_path / "events.jsonl").stat().st_size
    assert heard == SAMPLES == list(read(tmp_path / "events.jsonl")) == log.events()


def test_a_reopened_log_goes_on(tmp_path: Path) -> None:
    for event in SAMPLES:
        with Log(tmp_path / "events.jsonl") as log:
            log.emit(event)
    assert list(read(tmp_path / "events.jsonl")) == SAMPLES


def test_a_log_without_a_file_is_kept_in_memory() -> None:
    with Log() as log:
        log.emit(SAMPLES[0])
        assert log.events() == SAMPLES[:1] and log.offset() == 0


@pytest.mark.parametrize("change", [{"schema": SCHEMA + 1}, {"event": "round_restarted"}])
def test_a_newer_schema_or_unknown_event_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    text = json.dumps({**json.loads(line(SAMPLES[2])), **change})
    with pytest.raises(RunError, match="Use the medfed that wrote it"):
        parse(text)
    with pytest.raises(RunError, match="this medfed reads schema 1"):
        list(read(_write(tmp_path / "log", text, "")))


def test_a_field_that_a_later_medfed_added_is_passed_over() -> None:
    assert parse(json.dumps({**json.loads(line(SAMPLES[2])), "colour": "red"})).event == SAMPLES[2]


@pytest.mark.parametrize("kept", [1, 10, 60])
def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path, kept: int) -> None:
    path = _write(tmp_path / "log", line(SAMPLES[0]), line(SAMPLES[2]), line(SAMPLES[1])[:kept])
    assert list(read(path)) == [SAMPLES[0], SAMPLES[2]]


@pytest.mark.parametrize(
    "damage", ['{"schema": 1, "ev', "5", "[]", '"x"', "null", "{}", '{"schema":1,"event":"warned"}']
)
def test_a_damaged_line_in_the_middle_is_refused_with_its_number(
    tmp_path: Path, damage: str
) -> None:
    path = _write(tmp_path / "log", line(SAMPLES[0]), damage, line(SAMPLES[2]), "")
    with pytest.raises(RunError, match="log, line 2 is damaged"):
        list(read(path))


def test_bytes_that_are_no_text_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        line(SAMPLES[0]).encode() + b"\n\xff\xfe\n" + line(SAMPLES[2]).encode() + b"\n"
    )
    with pytest.raises(RunError, match="line 2 is damaged"):
        list(read(tmp_path / "log"))


def test_no_log_is_told(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="none cannot be read"):
        list(read(tmp_path / "none"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_never_written(tmp_path: Path, value: float) -> None:
    with (
        Log(tmp_path / "events.jsonl") as log,
        pytest.raises(ValueError, match="not JSON compliant"),
    ):
        log.emit(RoundFinished(1, ["a"], value, [value], [0.1], [4], 0.2, 1, 2))
    assert (tmp_path / "events.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    "text",
    [
        "cannot read row of anna.berg@clinic.example",
        "bad value in MRN: 00123987",
        "patient id=77123 twice",
        "born 1961 is missing",
        "date 1961-04-05 is not a number",
        "call 555-123-4567",
        "123-45-6789 twice",
    ],
)
def test_what_looks_like_an_identifier_is_withheld(text: str, tmp_path: Path) -> None:
    told: list[Event] = []
    with Log(tmp_path / "events.jsonl", [told.append]) as log:
        for event in (
            Warned(text),
            SiteExcluded(1, "a", text),
            RunFinished("incomplete", 1, 0.1, text),
            SecurityAudit(1, "a", 0, 0.0, "lift", ["operator Ito: appeal", text]),
            GivenUp(1, "Ito", text),
            GivenUp(2, text, "gone"),
        ):
            log.emit(event)
    assert text not in (tmp_path / "events.jsonl").read_text() and text not in str(told)
    assert (tmp_path / "events.jsonl").read_text().count("withheld") == 6 and "appeal" in str(told)


@pytest.mark.parametrize(
    "text",
    [
        "its row has shape (3,); expected 4 numbers",
        "round 12: 3 of 10 sites answered, training.quorum=0.9",
        "robustness.bound=1e-06 and 1,000,000 rows",
        "site 'St. Mary 2' was late by 3.25 s",
    ],
)
def test_what_is_no_identifier_is_told(text: str) -> None:
    told: list[Event] = []
    Log(None, [told.append]).emit(Warned(text))
    assert told == [Warned(text)]
