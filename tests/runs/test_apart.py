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


@pytest.mark.long
def test_a_site_that_dies_says_so_and_the_run_goes_on_by_the_command_that_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blind: None
) -> None:
    """Under a lifetime budget: the sites of this machine pay from its operator's one ledger."""
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))
    private = PRIVATE.replace('scope = "run"', 'scope = "study"\nspare_rounds = 1')
    study = medfed.load_study(write_study(tmp_path, private))
    started: list[Processes] = []
    start = Processes.start.__func__  # type: ignore[attr-defined]

    def remember(cls: type[Processes], *args: Any) -> Processes:
        started.append(start(cls, *args))
        return started[-1]

    def kill(event: Any) -> None:
        victim = started[0].processes[1]
        if isinstance(event, RoundStarted) and event.round == 3 and victim.pid is not None:
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()

    monkeypatch.setattr(Processes, "start", classmethod(remember))
    out = tmp_path / "run"
    cut = run_apart(study, out, listeners=[kill])
    assert not cut.complete and cut.summary["rounds"] == 2
    assert "south: the site's process has ended" in cut.summary["reason"]
    assert not any(process.is_alive() for process in started[0].processes)

    with pytest.raises(medfed.RunError, match="Resume it with --processes"):
        medfed.resume(out)
    whole = told("resume", out, "--processes")
    assert whole.exit_code == 0, whole.output
    assert json.loads((out / "summary.json").read_text())["rounds"] == 4
    assert {path.name for path in (out / "sites").iterdir()} >= {"north", "south", "east"}
    spent = told("privacy", "ledger", out, "--json")
    assert spent.exit_code == 0, spent.output
    by_site = {one["site"]: one["charges"] for one in json.loads(spent.output)["accounts"]}
    assert by_site == {"north": 5, "south": 4, "east": 5}  # round 3 was paid, and lost


def test_what_stands_against_a_node_is_its_answer_to_everything() -> None:
    """Its own refusal in its own words; of an unforeseen error no more than kind and line."""

    def refuse() -> Any:
        raise MedfedError("the site's ledger is in use")

    def fail() -> Any:
        raise ValueError("patient 0007")

    for make, told in ((refuse, "the site's ledger is in use"), (fail, "ValueError")):
        with pytest.raises(MedfedError, match=told) as refused:
            parties._refuse_on_error(make)("survey", b"")
        assert "0007" not in str(refused.value)


def test_devices_are_refused_with_the_way_out(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY)).set("sites.kind", "device")
    with pytest.raises(medfed.MedfedError, match="Leave --processes out"):
        run_apart(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_of_one_process_does_not_resume_as_many(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY))

    class Stop(BaseException):
        pass

    def stop(event: Any) -> None:
        if isinstance(event, RoundStarted) and event.round == 2:
            raise Stop

    with pytest.raises(Stop):
        medfed.run(study, tmp_path / "run", listeners=[stop])
    with pytest.raises(medfed.RunError, match="without --processes"):
        resume_apart(tmp_path / "run")
