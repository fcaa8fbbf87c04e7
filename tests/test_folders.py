"""A run's folder is its own: made in one step, written by one process, and never outside the folder
of runs.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import medfed
from medfed import runs
from medfed.core import files
from medfed.core.checks import MedfedError, PlanError, RunError, StudyError
from medfed.runs import drive, execute, folders, simulation
from medfed.study import Study
from tests.tables import PRIVATE, STUDY, write_study

HELD = rf"is in use by another run, or a command that writes into it: process {os.getpid()} on .*, since 20"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.chdir(tmp_path)
    return medfed.load_study(write_study(tmp_path, STUDY)).set("training.rounds", 2)


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Noon(datetime):
    """A clock that stands."""

    @classmethod
    def now(cls, tz: Any = None) -> "Noon":
        return cls(2026, 3, 1, 12, 0, 0, tzinfo=tz)


def meanwhile(patch: pytest.MonkeyPatch, name: str, act: Any) -> None:
    """Have something happen once, right before a run calls a function."""
    where = {"open_sites": simulation, "decide": drive}.get(name, execute)
    real = getattr(where, name)

    def first(*arguments: Any, **options: Any) -> Any:
        patch.setattr(where, name, real)
        act()
        return real(*arguments, **options)

    patch.setattr(where, name, first)


# one folder, one run ------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["open_sites", "rehearse", "freeze", "Drive"])
def test_runs_of_one_second_have_a_folder_each(
    study: Study, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(folders, "datetime", Noon)
    others: list[Path | None] = []
    meanwhile(
        monkeypatch, moment, lambda: others.append(medfed.run(study.set("study.seed", 9)).folder)
    )
    first = medfed.run(study).folder
    runs_of_it = [Path("runs/invented-20260301-120000"), Path("runs/invented-20260301-120000-2")]
    assert [first, *others] == runs_of_it
    for folder, seed in zip(runs_of_it, (3, 9), strict=True):
        frozen = (folder / "study.toml").read_text()
        log = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
        assert f"seed = {seed}" in frozen and log[0]["seed"] == seed
        assert [one["event"] for one in log].count("run_started") == 1
        assert runs.load(folder).complete and not (folder / ".lock").exists()


@pytest.mark.parametrize("moment", ["open_sites", "rehearse", "enrol", "freeze", "Drive"])
@pytest.mark.parametrize("text", [STUDY, PRIVATE], ids=["open", "private"])
def test_a_second_run_into_one_folder_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, text: str
) -> None:
    """From the first moment on: under a claim a second one would enrol into the first
    one's ledger.
    """
    study = medfed.load_study(write_study(tmp_path, text)).set("security.aggregation", "masked")

    def again() -> None:
        with pytest.raises(RunError, match=HELD):
            medfed.run(study.set("study.seed", 9), tmp_path / "run")

    meanwhile(monkeypatch, moment, again)
    result = medfed.run(study, tmp_path / "run")
    assert result.complete
    runs.verify_model(tmp_path / "run")
    if text == PRIVATE:
        claim = json.loads((tmp_path / "run" / "privacy.json").read_text())
        spent = runs.ledger_accounts(tmp_path / "run", claim["target"]["delta"])["accounts"]
        assert max(one["epsilon"] for one in spent) == pytest.approx(claim["epsilon"], rel=1e-6)


@pytest.mark.slow
def test_three_processes_at_once_leave_one_whole_run(tmp_path: Path) -> None:
    write_study(tmp_path, PRIVATE)
    code = "import medfed, sys; medfed.run(medfed.load_study(sys.argv[1]), sys.argv[2])"
    command = [sys.executable, "-c", code, str(tmp_path / "study.toml"), str(tmp_path / "run")]
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(command, env=alone, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    told = [child.communicate()[1] for child in started]
    refused = [text for child, text in zip(started, told, strict=True) if child.returncode]
    assert len(refused) == 2 and all(
        re.search(r"RunError: .*(is in use by another run|is not an empty)", t) for t in refused
    )
    claim = json.loads((tmp_path / "run" / "privacy.json").read_text())
    spent = runs.ledger_accounts(tmp_path / "run", claim["target"]["delta"])["accounts"]
    assert max(one["epsilon"] for one in spent) == pytest.approx(claim["epsilon"], rel=1e-6)


@pytest.mark.parametrize("way", ["plain", "masked"])
def test_who_resumes_what_another_has_just_finished_writes_nothing(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    study = study.set("security.aggregation", way)
    folder = tmp_path / "run"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    meanwhile(monkeypatch, "decide", lambda: die())
    with pytest.raises(KeyboardInterrupt):
        medfed.run(study, folder)

    held = files.hold
    left = dict[str, bytes]()

    def first(place: Path, *name: str) -> Any:
        monkeypatch.setattr(files, "hold", held)
        assert medfed.resume(folder).complete
        left.update(contents(folder))
        return held(place, *name)

    monkeypatch.setattr(files, "hold", first)
    assert medfed.resume(folder).complete
    assert contents(folder) == left
    if way == "masked":
        runs.verify_model(folder)


@pytest.mark.parametrize(
    "command",
    [medfed.resume, lambda folder: medfed.run(medfed.load_study(folder / "study.toml"), folder)],
)
def test_a_run_that_is_written_is_resumed_by_nobody_else(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    def again() -> None:
        with pytest.raises(RunError, match=HELD):
            command(tmp_path / "run")

    meanwhile(monkeypatch, "decide", again)
    assert medfed.run(study, tmp_path / "run").complete


# what is made, and what is left -------------------------------------------------------------------


def test_a_plan_that_does_not_stand_leaves_no_folder(tmp_path: Path, study: Study) -> None:
    for out in (tmp_path / "a" / "b" / "run", None):
        with pytest.raises(MedfedError):
            medfed.run(study.set("data.target", "dide"), out)
        assert {path.name for path in tmp_path.iterdir()} == {"study.toml", "cohort.csv"}
    (tmp_path / "mine").mkdir()
    with pytest.raises(MedfedError):
        medfed.run(study.set("data.target", "dide"), tmp_path / "mine")
    assert not list((tmp_path / "mine").iterdir())


def test_what_a_killed_start_left_is_an_empty_folder(tmp_path: Path, study: Study) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text("")
    assert medfed.run(study, tmp_path / "run").complete


@pytest.mark.parametrize(
    "name", ["../../oops", "/oops", "a/b", "..", ".", "a\\b", "a\0b", "a\nb", "x" * 201]
)
def test_a_study_s_name_leads_nowhere(tmp_path: Path, study: Study, name: str) -> None:
    with pytest.raises(
        StudyError, match=r"study.name=.*; expected a printable name without slashes"
    ):
        study.set("study.name", name)
    unchecked = dataclasses.replace(study, study=dataclasses.replace(study.study, name=name))
    with pytest.raises(
        PlanError, match=r"study.name=.*; expected a printable name without slashes"
    ):
        medfed.run(unchecked)
    assert {path.name for path in tmp_path.iterdir()} == {"study.toml", "cohort.csv"}


@pytest.mark.parametrize("name", ["Zürich 2026", "..almost", "[bold]x", "ein-fall_3.2"])
def test_a_study_s_name_is_the_folder_s(study: Study, name: str) -> None:
    folder = medfed.run(study.set("study.name", name)).folder
    assert folder and folder.parent == Path("runs") and folder.name.startswith(f"{name}-")


# those who write beside the run -------------------------------------------------------------------


def test_a_client_is_lifted_while_the_run_goes_on(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    meanwhile(
        monkeypatch,
        "decide",
        lambda: runs.lift_quarantine(folder, "north", "a repaired sensor", "Ada"),
    )
    medfed.run(study.set("training.rounds", 1), folder)
    assert [
        json.loads(line)["operator"] for line in (folder / runs.OVERRIDES).read_text().splitlines()
    ] == ["Ada"]


def test_an_override_that_a_crash_tore_is_none(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    meanwhile(monkeypatch, "decide", lambda: die())
    with pytest.raises(KeyboardInterrupt):
        medfed.run(study, folder)
    (folder / runs.OVERRIDES).write_text('{"client": "no')
    runs.lift_quarantine(folder, "south", "looked at", "Ada")
    assert medfed.resume(folder).complete
    lines = (folder / runs.OVERRIDES).read_text().splitlines()
    assert [json.loads(line)["client"] for line in lines] == ["south"]


def test_pages_are_written_by_one_at_a_time(tmp_path: Path, study: Study) -> None:
    medfed.run(study, tmp_path / "run")
    (tmp_path / "run" / "reports").mkdir()
    with files.hold(tmp_path / "run" / "reports"), pytest.raises(RunError, match="in use by"):
        medfed.create_interactive_dashboards(tmp_path / "run")
