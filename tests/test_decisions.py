"""From where on a label is called: declared or chosen on training rows, told, kept with the model,
and used.
"""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors import safe_open

import medfed
from medfed import runs
from medfed.core.checks import PlanError, StudyError
from medfed.monitor import events
from medfed.monitor.events import Tested as ModelTested
from medfed.screens.console import Progressing, decision_lines
from medfed.study import Study
from tests.tables import invented, write_study


@pytest.fixture
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return medfed.load_study(write_study(tmp_path_factory.mktemp("study"))).set(
        "training.rounds", 3
    )


def test_as_many_are_called_as_are_positive(study: Study) -> None:
    result = medfed.simulate(study.set("data.threshold", "prevalence"))
    sites = runs.open_sites(study, None)
    called = 0
    positive = 0
    rows = 0
    for site in sites:
        assert site.table is not None
        frame = invented()
        held_in = frame[frame["hospital"] == site.name][~site.table.test]
        called += int((result.decide(held_in) == result.summary["decision"]["positive"]).sum())
        positive += int(
            (site.table.label[~site.table.test] == result.encoding.target.labels[1]).sum()
        )
        rows += len(held_in)
    assert abs(called - positive) <= max(2, 0.05 * rows)
    assert result.summary["decision"]["decided"] == "prevalence, chosen on training rows of 3 sites"


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_every_figure_that_calls_uses_the_threshold(
    tmp_path: Path, study: Study, threshold: float
) -> None:
    result = medfed.run(study.set("data.threshold", threshold), tmp_path / "run")
    assert result.folder
    (tested,) = [
        e
        for e in events.read(result.folder / "events.jsonl")
        if isinstance(e, ModelTested) and e.round == 3
    ]
    (absent, _), (missed, true) = tested.confusion
    found = result.summary["test"]
    assert found["recall"] == pytest.approx(true / (true + missed))
    assert found["accuracy"] == pytest.approx((true + absent) / found["n"])
    sums = {
        name: sum(site[name] * site["n"] for site in result.summary["per_site"].values())
        for name in ("accuracy",)
    }
    # each site's own at it, too
    assert sums["accuracy"] == pytest.approx(found["accuracy"] * found["n"])
    assert result.summary["decision"] == {
        "positive": result.encoding.target.labels[1],
        "threshold": threshold,
        "decided": "declared",
        "rule": str(threshold),
    }


def test_the_model_keeps_its_threshold_and_calls_by_it(tmp_path: Path, study: Study) -> None:
    result = medfed.run(study.set("data.threshold", "sensitivity>=0.9"), tmp_path / "run")
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        kept = json.loads(file.metadata()["medfed"])["decision"]
    assert kept == result.summary["decision"]
    loaded = runs.load(tmp_path / "run")
    frame = invented()
    positive = result.encoding.target.labels[1]
    expected = result.predict(frame)[positive] >= kept["threshold"]
    assert np.array_equal(loaded.decide(frame) == positive, expected)


def test_baselines_choose_by_the_same_rule(study: Study) -> None:
    told: list[ModelTested] = []
    listener = lambda event: told.append(event) if isinstance(event, ModelTested) else None  # noqa: E731
    asked = study.set("data.threshold", "prevalence").set("monitor.baselines", True)
    medfed.simulate(asked, listeners=[listener])
    last = {event.model: event for event in told}
    assert set(last) == {"federated", "local", "pooled"}
    assert [last[name].decided.split(" of ")[1] for name in last] == [
        "3 sites",
        "3 sites",
        "1 site",
    ]
    assert len({event.threshold for event in last.values()}) > 1 and 0.5 not in {
        e.threshold for e in last.values()
    }


def test_the_first_lines_say_which_label_is_positive(study: Study) -> None:
    told = io.StringIO()
    console = Console(file=told, width=200)
    result = medfed.simulate(
        study.set("data.threshold", "youden"), listeners=[Progressing(console)]
    )
    positive = result.encoding.target.labels[1]
    said = told.getvalue()
    assert (
        f"positive: {positive!r}, called from a probability on that is chosen after training by "
        "'youden'"
    ) in said
    assert said.index("positive:") < said.index("round 1")
    (line,) = decision_lines(result.summary)
    assert line.startswith(f"{positive!r} is called from probability ") and "youden" in line


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"data.threshold": "1.5"}, StudyError, "data.threshold='1.5'; expected a number in"),
        (
            {"data.threshold": "youden", "security.aggregation": "three-party"},
            PlanError,
            "without a privacy claim",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(
    study: Study, settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        medfed.simulate(study._with(settings))


def test_a_threshold_is_one_of_two_labels(tmp_path: Path) -> None:
    study = (
        medfed.load_study(write_study(tmp_path))
        .set("data.target", "age")
        .set("data.task", "regression")
    )
    with pytest.raises(PlanError, match="a threshold is one of two labels"):
        medfed.simulate(study.set("data.threshold", 0.3))
