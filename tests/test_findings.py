"""Runs that came to nothing say so first: in the console, in summary.json, on every page."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import medfed
from medfed.cli import app
from medfed.screens.dashboards import PAGES, write_pages
from medfed.screens.story import Story
from medfed.study import Study
from tests.tables import PRIVATE, invented
from tests.wide_tables import write

ROWS = 900


def _table(
    seed: int = 0, columns: int = 12
) -> tuple[pd.DataFrame, np.ndarray, np.random.Generator]:
    """Return columns and a site without a label, the columns as an array, and the generator for
    what follows.
    """
    rng = np.random.default_rng(seed)
    x_NF = rng.standard_normal((ROWS, columns))
    frame = pd.DataFrame(x_NF, columns=[f"c{i}" for i in range(columns)])
    frame["hospital"] = rng.choice(["north", "south", "east"], ROWS)
    return frame, x_NF, rng


def _codes(study: Study) -> tuple[list[str], dict[str, Any]]:
    summary = medfed.simulate(study.set("monitor.evaluate_every", 20)).summary
    return [one["code"] for one in summary["findings"]], summary


def test_a_regression_diverges_at_the_rate_of_old_and_not_at_the_chosen_one(tmp_path: Path) -> None:
    """Columns that go together, as those of real tables do, bend the loss most where they all
    point.
    """
    frame, x_NF, rng = _table(columns=60)
    x_NF = 0.6 * x_NF + 0.8 * rng.standard_normal((ROWS, 1))
    frame.iloc[:, :60] = x_NF
    frame["y"] = x_NF[:, :20].sum(1) + 4 * rng.standard_normal(ROWS)
    study = write(tmp_path, frame, data__task="regression", data__preprocess="standard")
    codes, summary = _codes(study.set("training.learning_rate", 0.1))
    assert codes[0] == "loss-grew"
    assert summary["status"] == "incomplete" or codes[1] == "not-better-than-constant"
    codes, summary = _codes(study)
    assert codes == [] and summary["test"]["r2"] > 0.5


def test_noise_alone_is_called_noise(tmp_path: Path) -> None:
    frame, _, rng = _table()
    frame["y"] = rng.integers(2, size=ROWS)
    assert "not-better-than-chance" in _codes(write(tmp_path, frame))[0]


def test_two_in_a_hundred_are_never_called(tmp_path: Path) -> None:
    frame, x_NF, rng = _table()
    score_N = x_NF[:, 0] + rng.logistic(size=ROWS) * 0.3
    frame["y"] = (score_N > np.quantile(score_N, 0.98)).astype(int)
    codes, summary = _codes(write(tmp_path, frame))
    assert "one-class" in codes and "not-better-than-chance" not in codes
    assert summary["findings"][codes.index("one-class")]["text"].startswith(
        "The model calls everybody '0'"
    )


def test_sites_that_are_better_alone_are_told(tmp_path: Path) -> None:
    """At one hospital the label means the opposite."""
    frame, x_NF, rng = _table()
    sign_N = np.where(frame["hospital"] == "north", 1, -1)
    frame["y"] = (x_NF[:, 0] * sign_N + rng.logistic(size=ROWS) * 0.3 > 0).astype(int)
    codes, summary = _codes(write(tmp_path, frame, monitor__baselines=True))
    assert "own-better" in codes
    compared = summary["compared"]
    assert (
        compared["n"] == summary["test"]["n"]
        and 0 < compared["interval"][0] < compared["own_better"]
    )
    brier = summary["test"]["brier"] - summary["baselines"]["local"]["test"]["brier"]
    # scores are rounded, squared errors are not
    assert compared["own_better"] == pytest.approx(brier, abs=2e-3)


def test_sites_alike_are_not(tmp_path: Path) -> None:
    frame, x_NF, rng = _table()
    frame["y"] = (x_NF[:, 0] + rng.logistic(size=ROWS) * 0.3 > 0).astype(int)
    many = {"monitor__baselines": True, "training__rounds": 40}  # its loss has come to rest by then
    codes, summary = _codes(write(tmp_path, frame, **many))
    assert codes == [] and summary["compared"]["own_better"] < 0


@pytest.fixture
def nothing(tmp_path: Path) -> Path:
    """Return a private study of made-up patients whose outcome follows nothing."""
    frame = invented()
    frame["died"] = np.random.default_rng(5).permutation(frame["died"].to_numpy())
    frame.to_csv(tmp_path / "cohort.csv", index=False)
    (tmp_path / "study.toml").write_text(PRIVATE)
    return tmp_path


def test_a_private_run_that_learned_nothing_says_so_first(nothing: Path) -> None:
    told = CliRunner().invoke(
        app, ["run", str(nothing / "study.toml"), "--out", str(nothing / "run")]
    )
    assert told.exit_code == 0
    after = told.output.split("privacy spent")[1].splitlines()[1:]
    assert after[0].startswith("warning: The model cannot be told from chance: AUROC")
    assert "At epsilon 1 noise" in after[0]
    summary = json.loads((nothing / "run" / "summary.json").read_text())

    assert (
        summary["findings"][0]["code"] == "not-better-than-chance"
        and next(iter(summary)) == "findings"
    )
    shown = CliRunner().invoke(app, ["show", str(nothing / "run")]).output.splitlines()
    assert shown[1] == after[0]
    assert "note: Not compared" in told.output
    write_pages(Story.of(nothing / "run"), nothing / "pages", tuple(PAGES))
    for name in PAGES:
        body = (nothing / "pages" / name).read_text().split("</h1>", 1)[1]
        assert body.startswith('<p class="verdict bad">The model cannot be told from chance')


def test_quiet_runs_say_it_on_standard_error(nothing: Path) -> None:
    words = ["run", str(nothing / "study.toml"), "--out", str(nothing / "run"), "--json"]
    told = CliRunner().invoke(app, words)
    assert json.loads(told.stdout)["findings"] and "cannot be told from chance" in told.stderr
