"""summary.json is a function of the events."""

import json
from pathlib import Path

import pytest

import medfed
from medfed.monitor.events import (
    Event,
    Resumed,
    RoundFinished,
    RunFinished,
    RunStarted,
    SiteExcluded,
    read,
)
from medfed.monitor.events import Tested as ModelTested
from medfed.monitor.metrics import Figure
from medfed.monitor.summary import summarise
from tests.tables import STUDY, invented, write_study


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> medfed.Result:
    """A real run of two rounds, baselines too."""
    study = medfed.load_study(write_study(tmp_path_factory.mktemp("study"))).set(
        "training.rounds", 2
    )
    return medfed.run(study.set("monitor.baselines", True), tmp_path_factory.mktemp("run"))


def test_summary_json_is_computed_from_the_events_alone(finished: medfed.Result) -> None:
    assert finished.folder
    written = json.loads((finished.folder / "summary.json").read_text())
    assert written == summarise(read(finished.folder / "events.jsonl")) == finished.summary


def test_a_summary_tells_the_run(finished: medfed.Result) -> None:
    found = finished.summary
    assert (found["status"], found["rounds"], found["rounds_asked"]) == ("complete", 2, 2)
    assert set(found["sites"]) == {"north", "south", "east"} == set(found["per_site"])
    assert found["participation"] == {site: 2 for site in found["sites"]}
    assert set(found["baselines"]) == {"local", "pooled"}
    assert found["test"]["n"] == sum(site["n"] for site in found["per_site"].values())
    low, high = found["intervals"]["auroc"]
    assert low <= found["test"]["auroc"] <= high
    assert found["privacy"]["epsilon"] is None
    assert found["digest"] == finished.study.digest()
    assert found["seconds"]["total"] >= 0 and min(found["bytes"].values()) > 0


def test_a_log_without_its_end_is_incomplete(finished: medfed.Result) -> None:
    assert finished.folder
    recorded = [
        event
        for event in read(finished.folder / "events.jsonl")
        if not isinstance(event, RunFinished)
    ]
    found = summarise(recorded)
    assert (found["status"], found["rounds"], found["seconds"]["total"]) == ("incomplete", 2, None)
    nothing = summarise([])
    assert nothing["study"] is None and nothing["test"] is None and nothing["rounds"] == 0


def _round(number: int, up: int = 10) -> RoundFinished:
    return RoundFinished(number, ["a"], 0.5, [0.5], [0.1], [4], 0.25, up, 20)


def _tested(number: int) -> ModelTested:
    figures = {"auroc": Figure(number / 10)}
    return ModelTested(
        number, "federated", 4, 0.1, figures, figures, {"a": figures}, {"a": 4}, 0.1, 1, 2
    )


STARTED = RunStarted("s", "HRESCH", "d", 0, 4, {}, {})


def test_rounds_that_a_resumed_run_did_again_count_once() -> None:
    recorded: list[Event] = [
        STARTED,
        _round(1),
        _round(2),
        _round(3),
        SiteExcluded(3, "b", "late"),
        Resumed(2, 4, ""),
    ]
    recorded += [_round(3), _round(4), _tested(4), RunFinished("complete", 4, 1.0, "")]
    found = summarise(recorded)
    assert (found["rounds"], found["status"], found["excluded"]) == (4, "complete", [])
    assert found["seconds"]["total"] == 1.5  # two rounds before the resumption, one second after it
    assert found["bytes"] == {"up": 51, "down": 102}  # what was sent twice was sent


def test_what_was_tested_after_the_resumed_round_is_not_known_any_more() -> None:
    found = summarise([STARTED, _round(1), _tested(1), _round(2), _tested(2), Resumed(1, 4, "")])
    assert (found["rounds"], found["test"]) == (1, None)


def test_a_real_resumed_run_counts_rounds_once(finished: medfed.Result, tmp_path: Path) -> None:
    """The log of a run whose last round was lost, resumed: the same summary but for times."""
    assert finished.folder
    copy = tmp_path / "run"
    for path in finished.folder.rglob("*"):
        if path.is_file() and path.name not in (
            "round-000002.checkpoint",
            "model.safetensors",
            "summary.json",
        ):
            (copy / path.relative_to(finished.folder)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(finished.folder)).write_bytes(path.read_bytes())
    again = medfed.resume(copy).summary
    for key in ("rounds", "status", "test", "per_site", "participation", "baselines", "warnings"):
        assert again[key] == finished.summary[key], key


def test_predict_needs_no_column_but_the_features(tmp_path: Path) -> None:
    frame = invented(120).assign(part=["test" if i % 4 == 0 else "train" for i in range(120)])
    path = write_study(tmp_path, STUDY.replace("[training]", 'test = "part"\n[training]'), frame)
    result = medfed.simulate(medfed.load_study(path).set("training.rounds", 1))
    said = result.predict(frame[["age", "lactate", "ward"]])
    assert said.columns.tolist() == ["yes"] and said["yes"].between(0, 1).all() and len(said) == 120
