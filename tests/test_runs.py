"""A run leaves what it promises, tells only what its events say, and survives being killed at any
moment.
"""

import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

import medfed
from medfed import runs
from medfed.core import checks, files
from medfed.monitor import events
from medfed.monitor.events import Event, Resumed
from medfed.monitor.summary import summarise
from medfed.rounds import checkpoints
from medfed.runs import execute
from medfed.study import Study
from tests.tables import SITES, STUDY, invented, plain, write_study

PROMISED = {
    "study", "rounds", "sites", "test", "per_site", "privacy", "seconds", "bytes",
    "participation", "excluded", "versions",
}  # fmt: skip


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path))


def model_bits(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_run_folder_holds_what_is_promised(tmp_path: Path, study: Study) -> None:
    result = medfed.run(study, tmp_path / "run")
    assert result.complete and result.folder == tmp_path / "run"
    assert {
        "study.toml",
        "plan.json",
        "events.jsonl",
        "checkpoints",
        "model.safetensors",
        "summary.json",
    } <= {path.name for path in (tmp_path / "run").iterdir()}
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary.keys() >= PROMISED
    assert summary["rounds"] == 4 and summary["sites"] == sorted(
        SITES, key=list(summary["sites"]).index
    )

    assert set(summary["test"]) == {
        "accuracy",
        "auroc",
        "precision",
        "recall",
        "f1",
        "brier",
        "ece",
        "n",
    }
    assert summary["privacy"] == {
        "epsilon": None,
        "delta": None,
        "unit": "patient",
        "noise": "none",
    }
    assert summary["participation"] == dict.fromkeys(SITES, 4) and summary["excluded"] == []
    assert summary["test"]["n"] == sum(site["n"] for site in summary["per_site"].values())


def test_the_summary_is_a_function_of_the_events(tmp_path: Path, study: Study) -> None:
    result = medfed.run(study.set("monitor.baselines", True), tmp_path / "run")
    again = summarise(events.read(tmp_path / "run" / "events.jsonl"))
    assert again == result.summary == json.loads((tmp_path / "run" / "summary.json").read_text())
    assert medfed.load(tmp_path / "run").summary == again


def test_bytes_are_what_crossed_the_port(study: Study) -> None:
    told: list[Event] = []
    summary = medfed.simulate(study.set("monitor.baselines", True), listeners=[told.append]).summary
    parameters = summary["parameters"]
    rounds = 4
    sites = 3
    (planned,) = [event for event in told if isinstance(event, events.Planned)]
    # the model goes out to train and to test, float32
    weights = 4 * parameters * sites * (2 * rounds)
    down = summary["bytes"]["down"] - planned.bytes_down
    up = summary["bytes"]["up"] - planned.bytes_up
    assert weights < down < weights + 300 * sites * 2 * rounds  # headers are small
    assert (
        4 * parameters * sites * rounds
        < up
        < 4 * parameters * sites * rounds + 800 * sites * 2 * rounds
    )
    # digits x numbers x order statistics x thresholds
    assert planned.bytes_up > 16 * 2 * 6 * 16 * 8 * sites


def test_the_same_seed_gives_the_same_bits_and_another_seed_others(
    tmp_path: Path, study: Study
) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        medfed.run(study.set("study.seed", seed), tmp_path / name)
    weights = [
        safetensors.torch.load_file(tmp_path / n / "model.safetensors")["0.weight"] for n in "abc"
    ]
    assert model_bits(tmp_path / "a") == model_bits(tmp_path / "b")
    assert not torch.equal(weights[0], weights[2])


def test_what_is_measured_does_not_change_what_is_trained(study: Study) -> None:
    plain = medfed.simulate(study)
    watched = medfed.simulate(study.set("monitor.evaluate_every", 3).set("monitor.baselines", True))
    assert torch.equal(plain.w_P, watched.w_P)


def test_the_pooled_baseline_learns_from_every_row_and_local_from_ones_own(study: Study) -> None:
    summary = medfed.simulate(study.set("monitor.baselines", True)).summary
    assert set(summary["baselines"]) == {"local", "pooled"}
    assert summary["baselines"]["pooled"]["test"]["n"] == summary["test"]["n"]
    assert set(summary["baselines"]["local"]["per_site"]) == set(SITES)
    own = medfed.simulate(study.set("training.algorithm", "local")).summary
    assert own["baselines"]["local"]["per_site"] == summary["baselines"]["local"]["per_site"]
    assert own["test"] is None  # no global model was trained


def test_a_saved_model_predicts_what_the_run_predicted(tmp_path: Path, study: Study) -> None:
    result = medfed.run(study, tmp_path / "run")
    table = invented(50, seed=9).drop(columns=["died", "hospital", "subject"])
    table.loc[3, "ward"] = "never seen"
    first = result.predict(table)
    again = medfed.load(tmp_path / "run").predict(table)
    pd.testing.assert_frame_equal(first, again)
    assert (
        list(first.columns) == ["yes"]
        and first["yes"].between(0, 1).all()
        and first["yes"].std() > 0.05
    )


@pytest.mark.parametrize("task", ["multiclass", "regression"])
def test_other_tasks_run_to_the_end(tmp_path: Path, task: str) -> None:
    frame = invented()
    if task == "multiclass":
        frame["died"] = np.digitize(frame["age"], [50, 65])
    else:
        frame["died"] = 3 * frame["age"] + 5

    study = (
        medfed.load_study(write_study(tmp_path, frame=frame))
        .set("data.task", task)
        .set("training.rounds", 15)
    )
    study = study.set("data.accept", ["target-copy"])  # the target is made of age
    result = medfed.run(study, tmp_path / "run")
    test = result.summary["test"]
    assert test["r2"] > 0.9 if task == "regression" else test["auroc"] > 0.9
    predicted = result.predict(frame)

    if task == "multiclass":
        assert list(predicted.columns) == ["0", "1", "2"]
        assert np.allclose(predicted.sum(axis=1), 1, atol=1e-5)
    else:
        assert np.corrcoef(predicted["died"], frame["died"])[0, 1] > 0.95


def test_a_model_of_ones_own_trains_by_the_fallback(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_model.py").write_text(
        "from torch import nn\n"
        "class Residual(nn.Module):\n"
        "    def __init__(self, features, outputs):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Linear(features, features), nn.Linear(features, outputs)\n"
        "    def forward(self, x):\n"
        "        return self.b(x + self.a(x).relu())\n"
        "def make(features, outputs):\n"
        "    return Residual(features, outputs)\n"
    )

    monkeypatch.syspath_prepend(str(tmp_path))
    own = study.set("model.name", "own_model:make")
    told: list[Event] = []
    result = medfed.simulate(own, listeners=[told.append])
    assert next(e.path for e in told if isinstance(e, events.Planned)) == "func"
    loop = medfed.simulate(own.set("training.path", "loop"))
    torch.testing.assert_close(result.w_P, loop.w_P, rtol=1e-4, atol=1e-5)


# resuming -----------------------------------------------------------------------------------------


class Crash(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


@pytest.mark.parametrize(
    "algorithm",
    [
        "fedavg",
        "scaffold",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("fedadam", "local")),
    ],
)
def test_a_run_killed_at_any_write_resumes_to_the_same_bits(
    tmp_path: Path, study: Study, algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study.set("training.algorithm", algorithm)
    writes = count_writes(monkeypatch)
    medfed.run(study, tmp_path / "whole")
    total = writes()
    assert total >= 8
    resumed = 0
    for number in range(total):
        for after in (False, True):
            folder = tmp_path / f"{number}-{after}"
            with monkeypatch.context() as patch:
                crash_at(patch, number, after)
                with pytest.raises(Crash):
                    medfed.run(study, folder)
            try:
                result = medfed.resume(folder)
            except medfed.RunError as error:
                # killed before a first checkpoint
                assert number <= 2, f"write {number} was lost: {error}"
                continue
            resumed += 1
            assert model_bits(folder) == model_bits(tmp_path / "whole"), (
                f"write {number}, after={after}"
            )
            assert result.summary["rounds"] == 4 and result.complete
    assert resumed >= 2 * (total - 3)


def count_writes(patch: pytest.MonkeyPatch) -> Callable[[], int]:
    calls: list[Path] = []
    real = files.write

    def write(path: Path, content: bytes | str, private: bool = False) -> None:
        calls.append(path)
        real(path, content, private)

    patch.setattr(files, "write", write)
    return lambda: len(calls)


def crash_at(patch: pytest.MonkeyPatch, number: int, after: bool) -> None:
    count = iter(range(10_000))
    real = files.write

    def write(path: Path, content: bytes | str, private: bool = False) -> None:
        crash = next(count) == number
        if crash and not after:
            raise Crash
        real(path, content, private)
        if crash:
            raise Crash

    patch.setattr(files, "write", write)


def test_a_damaged_checkpoint_is_passed_over_and_told(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study.set("training.algorithm", "scaffold")
    medfed.run(study, tmp_path / "whole")
    last = interrupted(tmp_path / "run", study, monkeypatch, rounds=3)
    damaged = bytearray(last.read_bytes())
    damaged[-1] ^= 1
    last.write_bytes(damaged)
    told: list[Event] = []
    medfed.resume(tmp_path / "run", listeners=[told.append])
    (resumed,) = [event for event in told if isinstance(event, Resumed)]
    assert resumed.round == 2 and "round-000003.checkpoint is damaged" in resumed.note
    assert model_bits(tmp_path / "run") == model_bits(tmp_path / "whole")


@pytest.mark.parametrize("cut", [0, 10, 100])
def test_a_cut_checkpoint_is_passed_over_too(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    last = interrupted(tmp_path / "run", study, monkeypatch, rounds=2)
    last.write_bytes(last.read_bytes()[:cut])
    assert medfed.resume(tmp_path / "run").summary["rounds"] == 4


def test_no_whole_checkpoint_is_an_error_that_says_so(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = interrupted(tmp_path / "run", study, monkeypatch, rounds=1)
    for path in last.parent.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(
        medfed.RunError, match=r"no whole checkpoint.*round-000000.checkpoint is damaged"
    ):
        medfed.resume(tmp_path / "run")


def interrupted(folder: Path, study: Study, monkeypatch: pytest.MonkeyPatch, rounds: int) -> Path:
    """Leave a run that was killed right after the checkpoint of a round; return that checkpoint."""
    real = checkpoints.write

    def write(place: Path, server: Any, header: dict[str, Any], keep: int) -> None:
        real(place, server, header, keep)
        if server.round == rounds:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write", write)
        with pytest.raises(Crash):
            medfed.run(study, folder)
    return folder / "checkpoints" / f"round-{rounds:06d}.checkpoint"


def test_a_run_whose_table_is_gone_loads_and_is_not_resumed(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a folder that moved to another machine."""
    medfed.run(study, tmp_path / "whole")
    interrupted(tmp_path / "run", study, monkeypatch, rounds=2)
    (tmp_path / "cohort.csv").unlink()
    rows = invented(5, seed=9).drop(columns=["died", "hospital", "subject"])
    assert len(medfed.load(tmp_path / "whole").predict(rows)) == 5
    with pytest.raises(medfed.DataError, match="cohort"):
        medfed.resume(tmp_path / "run")


def test_changed_study_or_data_is_refused(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", study, monkeypatch, rounds=2)
    invented(241).to_csv(tmp_path / "cohort.csv", index=False)
    with pytest.raises(medfed.RunError, match="the data has changed"):
        medfed.resume(tmp_path / "run")
    frozen = tmp_path / "run" / "study.toml"
    frozen.write_text(frozen.read_text().replace("rounds = 4", "rounds = 9"))
    with pytest.raises(medfed.RunError, match="was changed after the run began"):
        medfed.resume(tmp_path / "run")
    with pytest.raises(medfed.RunError, match="is not a run folder"):
        medfed.resume(tmp_path)


KILLED = STUDY + '\n[model]\nname = "mlp"\n[model.options]\nhidden = [64, 32]\ndropout = 0.2\n'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "rounds_seen"),
    [
        ("scaffold", 1),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in [("fedyogi", 7), ("fednova", 15)]
        ),
    ],
)
def test_a_process_killed_by_sigkill_resumes_to_the_same_bits(
    tmp_path: Path, algorithm: str, rounds_seen: int
) -> None:
    path = write_study(tmp_path, KILLED)
    command = [sys.executable, "-m", "medfed", "run", str(path), "--quiet"]
    settings = [f"training.algorithm={algorithm}", "training.rounds=40", "training.local_epochs=4"]
    command += [word for setting in settings for word in ("--set", setting)]
    # two threads a product crawl where the machine is busy
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, env=alone)
    child = subprocess.Popen([*command, "--out", str(tmp_path / "run")], env=alone)
    record = tmp_path / "run" / "events.jsonl"
    finished = 0
    while finished < rounds_seen:
        assert child.poll() is None, "the run ended before it could be killed; give it more rounds"
        finished = record.read_text().count('"round_finished"') if record.exists() else 0
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert not (tmp_path / "run" / "summary.json").exists()
    subprocess.run(
        [*command[:3], "resume", str(tmp_path / "run"), "--quiet"], check=True, env=alone
    )
    assert model_bits(tmp_path / "run") == model_bits(tmp_path / "whole")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rounds"] == 40 and summary["status"] == "complete"


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_a_reason_and_it_resumes(tmp_path: Path) -> None:
    path = write_study(tmp_path)
    command = [
        sys.executable,
        "-m",
        "medfed",
        "run",
        str(path),
        "--set",
        "training.rounds=30",
        "--out",
    ]
    subprocess.run([*command, str(tmp_path / "whole"), "--quiet"], check=True)
    limit = (tmp_path / "whole" / "events.jsonl").stat().st_size // 2

    def no_larger_file() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    full = subprocess.run(
        [*command, str(tmp_path / "run"), "--quiet"],
        preexec_fn=no_larger_file,
        capture_output=True,
        text=True,
    )
    assert full.returncode == 2
    assert re.search(r"events.jsonl cannot be written: File too large. Free the disk", full.stderr)
    done = medfed.resume(tmp_path / "run")
    assert done.complete and done.summary["rounds"] == 30
    assert model_bits(tmp_path / "run") == model_bits(tmp_path / "whole")


# refusals -----------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path, study: Study) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "precious").write_text("keep me")
    with pytest.raises(medfed.RunError, match="is not an empty folder; give another"):
        medfed.run(study, folder)
    assert [path.name for path in folder.iterdir()] == ["precious"]


def test_bad_data_leaves_no_folder(tmp_path: Path, study: Study) -> None:
    for key, value, words in (
        ("data.target", "dide", "did you mean 'died'"),
        ("training.algorithm", "fedavgg", "did you mean 'fedavg'"),
        ("model.name", "mpl", "did you mean 'mlp'"),
        ("fleet.clients_per_round", 9, "there are 3 sites"),
    ):
        with pytest.raises(medfed.MedfedError, match=words):
            medfed.run(study.set(key, value), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_training_that_diverges_is_incomplete_and_says_why(tmp_path: Path, study: Study) -> None:
    wild = (
        study.set("training.learning_rate", 1e5)
        .set("data.task", "regression")
        .set("data.target", "age")
    )
    result = medfed.run(
        wild.set("data.features", ["lactate"]).set("training.local_epochs", 50), tmp_path / "run"
    )
    assert not result.complete and result.summary["status"] == "incomplete"
    assert {e["reason"] for e in result.summary["excluded"]} == {
        "training did not stay finite; lower training.learning_rate"
    }


@pytest.mark.needs("data")
def test_heart_runs_with_a_feature_that_a_whole_site_lacks() -> None:
    result = medfed.simulate(medfed.load_study("heart").set("training.rounds", 3))
    assert result.complete and set(result.summary["per_site"]) == {
        "cleveland",
        "hungarian",
        "switzerland",
        "va",
    }
    assert any(
        "'switzerland' has no value at all of chol" in text for text in result.summary["warnings"]
    )


THE_BRIEFS = {
    "model.options": '{dropout = 0.3, norm = "layer"}',
    "training.local_steps": 0,
    "training.local_epochs": 10,
    "training.batch_size": 32,
    "training.optimizer": "adam",
    "training.learning_rate": 0.001,
    "training.weight_decay": 0.0001,
    "training.average": 0,
    "monitor.baselines": "false",
}


def test_the_brief_s_network_learns_in_three_rounds() -> None:
    """The brief's own layers, without noise: what privacy is measured against."""
    study = plain(
        medfed.load_study("brief", [f"{key}={value}" for key, value in THE_BRIEFS.items()])
    )
    result = medfed.simulate(study)
    assert result.summary["parameters"] == 193_473
    assert result.summary["rounds"] == 3 and result.summary["test"]["accuracy"] > 0.9


@pytest.mark.slow
def test_the_bundled_brief_learns_under_its_guarantee() -> None:
    summary = medfed.simulate(medfed.load_study("brief").set("monitor.baselines", False)).summary
    assert summary["rounds"] == 3 and summary["test"]["auroc"] > 0.85
    assert 0.99 < summary["privacy"]["epsilon"] <= 1 and summary["privacy"]["delta"] == 1e-6


def test_a_one_class_site_trains_on_with_a_warning_and_null_figures(tmp_path: Path) -> None:
    frame = invented()
    frame.loc[frame["hospital"] == "east", "died"] = "no"
    summary = medfed.simulate(medfed.load_study(write_study(tmp_path, frame=frame))).summary
    assert summary["status"] == "complete" and summary["per_site"]["east"]["auroc"] is None
    assert any("'east' trains on one class only ('no')" in text for text in summary["warnings"])


def test_clients_can_be_drawn(study: Study) -> None:
    summary = medfed.simulate(
        study.set("fleet.clients_per_round", 2).set("training.rounds", 12)
    ).summary
    assert (
        sum(summary["participation"].values()) == 24 and min(summary["participation"].values()) > 0
    )


def test_the_run_uses_the_working_folder_by_default(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = medfed.run(study)
    assert result.folder is not None and re.fullmatch(
        r"runs/invented-\d{8}-\d{6}", os.fspath(result.folder)
    )


def test_open_sites_gives_each_site_its_rows_only(study: Study) -> None:
    sites = runs.open_sites(study, None)
    counts = invented()["hospital"].value_counts()
    assert {site.name: len(site.table or ()) for site in sites} == counts.to_dict()


def test_two_runs_at_once_do_not_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found it empty; the second to come is told, and leaves the first one's files alone."""
    study = medfed.load_study(write_study(tmp_path, STUDY)).set("training.rounds", 2)
    begun = execute.freeze

    def meanwhile(*arguments: Any) -> Any:
        monkeypatch.setattr(execute, "freeze", begun)
        for again in (
            lambda: medfed.run(study, tmp_path / "run"),
            lambda: files_held(tmp_path / "run"),
        ):
            with pytest.raises(checks.RunError, match=r"in use by another run|not an empty folder"):
                again()
        return begun(*arguments)

    monkeypatch.setattr(execute, "freeze", meanwhile)
    assert medfed.run(study, tmp_path / "run").complete
    assert not (tmp_path / "run" / ".lock").exists()


def files_held(folder: Path) -> None:
    with files.hold(folder):
        raise AssertionError("held twice")
