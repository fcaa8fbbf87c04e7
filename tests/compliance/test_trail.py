"""The trail: what is changed, removed, added, moved or cut is found, by its line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import medfed
from medfed import runs
from medfed.compliance.trail import Trail, verify
from medfed.core.checks import TrailError
from medfed.secure.identity import Identity, holds
from tests.tables import PRIVATE, write_study
from tests.test_cli import medfed as command

KEY = Identity.new("coordinator", "coordinator")


def opened(path: Path, key: Identity = KEY) -> Trail:
    return Trail.open(path, key.name, key.public.signing, key.sign)


@pytest.fixture
def written(tmp_path: Path) -> Trail:
    trail = opened(tmp_path / "trail" / "trail.jsonl")
    for n in range(5):
        trail.append("event", {"n": n, "name": "Zürich"})
    return trail


def test_what_was_written_holds_and_goes_on_after_a_restart(written: Trail) -> None:
    found = verify(written.path, holds, written.head)
    assert [entry["facts"].get("n") for entry in found.entries] == [
        None,
        0,
        1,
        2,
        3,
        4,
    ] and found.head == written.head
    again = opened(written.path, Identity.new("coordinator", "coordinator"))
    again.append("event", {"n": 5})
    assert len(verify(written.path, holds, again.head).entries) == 8


def test_a_torn_last_line_is_found_and_cut_off_on_opening(written: Trail) -> None:
    with open(written.path, "ab") as file:
        file.write(b'{"number": 6, "ti')
    with pytest.raises(TrailError, match="line 7: cut off"):
        verify(written.path, holds)
    assert verify(opened(written.path).path, holds).entries[-1]["facts"]["torn_bytes"] == 17


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], str]] = {
    "fact": (
        lambda lines: [line.replace(b'"n": 2', b'"n": 3') for line in lines],
        "line 4: 'coordinator' did not sign",
    ),
    "time": (lambda lines: [lines[0].replace(b"20", b"19", 1), *lines[1:]], "line 1"),
    "removed": (lambda lines: lines[:2] + lines[3:], "line 3: does not follow"),
    "doubled": (lambda lines: [*lines[:3], lines[2], *lines[3:]], "line 4: does not follow"),
    "moved": (lambda lines: [lines[0], lines[2], lines[1], *lines[3:]], "line 2: does not follow"),
    "cut": (lambda lines: lines[:-1], "lines are missing"),
    "emptied": (lambda lines: [], "cut off"),
    "garbage": (lambda lines: [*lines[:2], b"{}", *lines[3:]], "line 3: no entry"),
    "no json": (lambda lines: [*lines[:2], b"\xff", *lines[3:]], "line 3: no entry"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_found(written: Trail, name: str) -> None:
    change, said = CHANGES[name]
    lines = written.path.read_bytes().splitlines()
    written.path.write_bytes(b"".join(line + b"\n" for line in change(lines)))
    with pytest.raises(TrailError, match=said):
        verify(written.path, holds, written.head)


def test_a_line_signed_by_another_key_is_found(written: Trail) -> None:
    other = Identity.new("coordinator", "coordinator")
    Trail(written.path, "coordinator", other.sign, written.number, written.head).append(
        "event", {"n": 9}
    )
    with pytest.raises(TrailError, match="line 7: 'coordinator' did not sign"):
        verify(written.path, holds)


@given(st.binary(max_size=120))
def test_no_bytes_crash_the_reader(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(data)
    with pytest.raises(TrailError):
        verify(path, holds)


@pytest.mark.parametrize("way", ["masked", "three-party"])
def test_a_run_leaves_a_trail_that_the_command_checks(
    tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    study = medfed.load_study(write_study(tmp_path, PRIVATE)).set("security.aggregation", way)
    folder = medfed.run(study, tmp_path / "run").folder
    assert folder is not None
    found = runs.verify_trail(folder)
    sums = [entry["facts"] for entry in found.entries if entry["kind"] == "opened sum"]
    assert [facts["round"] for facts in sums] == [1, 2, 3, 4] and len(sums[0]["uploads"]) == 3
    capsys.readouterr()
    assert command("trail", "verify", folder) == 0
    said = capsys.readouterr().out
    assert "7 lines hold" in said and found.head in said
    path = folder / "trail" / "trail.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))
    assert command("trail", "verify", folder) == 2
    assert "lines are missing" in capsys.readouterr().err
    assert json.loads((folder / "summary.json").read_text())["trail"]["head"] == found.head


def test_a_plain_run_has_none(tmp_path: Path) -> None:
    folder = medfed.run(medfed.load_study(write_study(tmp_path, PRIVATE)), tmp_path / "run").folder
    assert folder is not None and not (folder / "trail").exists()
    with pytest.raises(TrailError, match="rows nobody sees"):
        runs.verify_trail(folder)
