"""`medfed run --processes`: every site a process of its own, the coordinator without a record."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import medfed
from medfed import runs
from medfed.cli import app
from medfed.core.checks import MedfedError
from medfed.data import sources
from medfed.monitor.events import RoundStarted
from medfed.runs import parties
from medfed.runs.parties import Processes, resume_apart, run_apart
from tests.tables import PRIVATE, STUDY, write_study

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


def told(*words: str) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def same_but_for_chance(folder: Path) -> dict[str, Any]:
    """Return a summary without what differs between two runs of one process too."""
    summary = json.loads((folder / "summary.json").read_text())
    for name in ("seconds", "trail", "started", "finished"):
        summary.pop(name, None)
    return dict(summary)


@pytest.fixture
def blind(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no record be read in this process, the coordinator's."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the coordinator reads records")

    monkeypatch.setattr(sources, "read", refuse)


def test_a_run_over_processes_leaves_what_the_plain_command_leaves(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Site names that only records say, and rows that are masked."""
    study = STUDY.replace("rounds = 4", "rounds = 2") + '[security]\naggregation = "masked"\n'
    write_study(tmp_path, study)
    file = tmp_path / "study.toml"
    assert told("run", file, "--out", tmp_path / "plain", "--quiet").exit_code == 0

    request.getfixturevalue("blind")
    apart = told("run", file, "--out", tmp_path / "apart", "--processes", "--json")
    assert apart.exit_code == 0, apart.output
    assert same_but_for_chance(tmp_path / "apart") == same_but_for_chance(tmp_path / "plain")
    models = [tmp_path / name / "model.safetensors" for name in ("apart", "plain")]
    assert models[0].read_bytes() == models[1].read_bytes()
    assert runs.verify_model(tmp_path / "apart")["rounds"] == 2

    wrong = told("resume", tmp_path / "plain", "--processes")
    assert wrong.exit_code == 0  # it is finished
