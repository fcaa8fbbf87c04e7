"""What a party has done once for ever: it holds for whoever has the file, in whatever process."""

import json
from pathlib import Path

import pytest
import torch

from medfed.core.checks import RecordError
from medfed.secure.identity import Scope
from medfed.secure.record import Record

ONE, OTHER = b"1" * 32, b"2" * 32


def scope(round: int, run: str = "run", study: str = "study") -> Scope:
    return Scope(study, run, round)


@pytest.fixture(params=["memory", "file"])
def record(request: pytest.FixtureRequest, tmp_path: Path) -> Record:
    return Record(tmp_path / "keys" / "record" if request.param == "file" else None)


def test_rounds_of_an_act_never_fall_and_each_is_for_one_thing(record: Record) -> None:
    assert record.last("rows", "study", "run") == (0, b"")
    record.commit("rows", scope(2), ONE, ["a", "b"])
    record.commit("rows", scope(2), ONE, ["a", "b"])
    for said, what, found in (
        (scope(2), OTHER, r"round=2: rows was done for something else already \(round 2"),
        (scope(1), ONE, r"round=1: rows was done after it already \(round 2"),
        (scope(1), OTHER, r"round=1: rows was done after it already \(round 2"),
    ):
        with pytest.raises(RecordError, match=found):
            record.commit("rows", said, what)
    assert record.last("rows", "study", "run") == (2, ONE)
    record.commit("rows", scope(3), ONE, ["c"])
    assert record.last("rows", "study", "run") == (3, ONE)


def test_acts_runs_and_studies_are_apart(record: Record) -> None:
    record.commit("rows", scope(5), ONE)
    for act, where in (
        ("weights", scope(1)),
        ("rows", scope(1, run="other")),
        ("rows", scope(1, study="other")),
    ):
        record.commit(act, where, OTHER)
        assert record.last(act, where.study, where.run) == (1, OTHER)
    assert record.last("rows", "study", "run") == (5, ONE)


def test_names_are_told_of_that_very_round_alone(record: Record) -> None:
    """Of a later round whoever stayed away from an earlier one may be again."""
    assert record.names("rows", scope(0)) is None and record.names("rows", scope(1)) is None
    record.commit("rows", scope(1), ONE, ["a", "b"])
    assert record.names("rows", scope(1)) == ["a", "b"]
    assert record.names("rows", scope(2)) is None and record.names("weights", scope(1)) is None
    record.commit("rows", scope(2), ONE, ["a"])
    assert record.names("rows", scope(2)) == ["a"] and record.names("rows", scope(1)) is None


def test_what_was_begun_goes_no_further_once_any_act_of_a_later_round_was_done(
    record: Record,
) -> None:
    record.refuse_behind(scope(1))
    record.commit("rows", scope(1), ONE)
    record.refuse_behind(scope(1))
    record.commit("model", scope(2), ONE)
    with pytest.raises(RecordError, match=r"round=1 is over .*round 2 was begun since"):
        record.refuse_behind(scope(1))
    record.refuse_behind(scope(2))
    record.refuse_behind(scope(1, run="other"))


@pytest.mark.parametrize("act", ["list", "rows", "weights", "model"])
def test_a_round_of_other_rows_can_be_given_up_and_nothing_else(act: str, record: Record) -> None:
    record.commit(act, scope(2), ONE)
    ways = ("give the round up", "start a new run")
    for round, way in ((2, ways[act == "model"]), (1, ways[1])):
        with pytest.raises(RecordError, match=way):
            record.commit(act, scope(round), OTHER)


def test_another_process_on_the_same_file_is_heard_before_anything_is_done(tmp_path: Path) -> None:
    """Each of these had read the file before the other wrote."""
    path = tmp_path / "record"
    first, second, third, fourth = (Record(path) for _ in range(4))
    for one in (first, second, third, fourth):
        assert one.last("rows", "study", "run") == (0, b"")
    first.commit("rows", scope(2), ONE, ["a", "b"])
    assert second.names("rows", scope(2)) == ["a", "b"]
    with pytest.raises(RecordError, match="done after it already"):
        third.commit("rows", scope(1), OTHER)
    with pytest.raises(RecordError, match="round=1 is over"):
        fourth.refuse_behind(scope(1))

    fifth = Record(path)
    first.commit("rows", scope(7, run="other"), ONE)
    fifth.commit("rows", scope(3), OTHER)  # and nothing of the other's is lost
    assert Record(path).last("rows", "study", "other") == (7, ONE)
    assert Record(path).last("rows", "study", "run") == (3, OTHER)


MEMORY = {"offset": torch.arange(3.0)}


def same(found: tuple[bytes, dict[str, torch.Tensor]] | None, answer: bytes) -> bool:
    assert found is not None
    told, memory = found
    return told == answer and torch.equal(memory["offset"], MEMORY["offset"]) and len(memory) == 1


def test_a_question_that_is_repeated_gets_the_answer_that_was_kept(record: Record) -> None:
    record.commit("model", scope(1), ONE)
    assert record.recall(scope(1), ONE) is None
    record.keep(scope(1), ONE, b"the row", MEMORY)
    assert same(record.recall(scope(1), ONE), b"the row")
    assert same(record.recall(scope(1), ONE), b"the row")
    record.keep(scope(2), ONE, b"the next", MEMORY)
    assert record.recall(scope(1), ONE) is None
    if record.path is not None:  # on disk the last one is there for whoever asks next
        assert same(record.recall(scope(2), ONE), b"the next")


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (scope(2), ONE),
        (scope(1), OTHER),
        (scope(1, run="other"), ONE),
        (scope(1, study="other"), ONE),
    ],
)
def test_another_question_gets_no_answer_that_was_kept(
    other: Scope, what: bytes, record: Record
) -> None:
    record.commit("model", scope(1), ONE)
    record.keep(scope(1), ONE, b"the row", MEMORY)
    assert record.recall(other, what) is None


def test_an_answer_outlasts_a_restart_where_there_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "record"
    Record(path).keep(scope(1), ONE, b"the row", MEMORY)
    assert same(Record(path).recall(scope(1), ONE), b"the row")
    assert Record(path).recall(scope(1), OTHER) is None
    assert Record(tmp_path / "another").recall(scope(1), ONE) is None
    assert (path.with_suffix(".answer").stat().st_mode & 0o077) == 0


def test_a_damaged_answer_is_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "record"
    Record(path).keep(scope(1), ONE, b"the row", MEMORY)
    beside = path.with_suffix(".answer")
    data = bytearray(beside.read_bytes())
    data[-1] ^= 1
    beside.write_bytes(data)
    with pytest.raises(RecordError, match="is damaged"):
        Record(path).recall(scope(1), ONE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"runs": {}}',
        '{"form": "medfed record 2", "runs": {}}',
        '{"form": "medfed record 1"}',
        '{"form": "medfed record 1", "runs": {"study run": {"rows": [1, "zz", []]}}}',
        '{"form": "medfed record 1", "runs": {"study run": {"rows": [true, "31", []]}}}',
        '{"form": "medfed record 1", "runs": {"study run": {"rows": [2.0, "31", []]}}}',
        '{"form": "medfed record 1", "runs": {"study run": {"rows": [1, "31"]}}}',
    ],
)
def test_a_file_that_cannot_be_read_is_never_an_empty_record(text: str, tmp_path: Path) -> None:
    path = tmp_path / "record"
    path.write_text(text)
    for act in (
        lambda one: one.last("rows", "study", "run"),
        lambda one: one.names("rows", scope(1)),
        lambda one: one.refuse_behind(scope(1)),
        lambda one: one.commit("rows", scope(1), ONE),
    ):
        with pytest.raises(RecordError, match="is no record of secure rounds"):
            act(Record(path))
    assert path.read_text() == text


def test_a_record_is_its_owners_alone_and_says_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "keys" / "record"
    Record(path).commit("rows", scope(1), ONE, ["a"])
    assert (path.stat().st_mode & 0o077) == 0
    told = json.loads(path.read_text())
    assert told["form"] == "medfed record 1"
    assert told["runs"] == {"study run": {"rows": [1, ONE.hex(), ["a"]]}}
