"""Who is held out by a column or by time, and hospitals that are tested and never trained on."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tests.tables import PRIVATE, STUDY, invented, write_study

from medfed import runs
from medfed.core.checks import DataError
from medfed.screens.dashboards import write_report
from medfed.study import Study, load


def _study(folder: Path, frame: pd.DataFrame, text: str = STUDY, **keys: Any) -> Study:
    study = load(write_study(folder, text, frame)).set("training.rounds", 2)
    for key, value in keys.items():
        study = study.set(f"data.{key}", value)
    return study


def _tested(study: Study, column: str = "subject") -> set[str]:
    return {str(name) for site in runs.open_sites(study, None) for name in _held(site.table)}


def _held(table: Any) -> np.ndarray:
    return np.asarray(table.ids[np.unique(table.patient[table.test])])


# a column that marks rows -------------------------------------------------------------------------


def test_the_texts_that_mean_held_out_are_declared(tmp_path: Path) -> None:
    frame = invented(60)
    frame["cohort"] = np.where(
        np.arange(60) % 3 == 0, "Validierung", np.where(np.arange(60) % 3 == 1, "A", "B")
    )
    study = _study(tmp_path, frame, test="cohort", test_values=["validierung"])
    assert _tested(study) == set(frame["subject"][::3])
    with pytest.raises(
        DataError, match=r"column 'cohort': neither test nor train in row .*data.test_values"
    ):
        _tested(_study(tmp_path, frame, test="cohort"))
    recode = {"Validierung": "test", "A": "train", "B": "train"}
    recoded = _study(tmp_path, frame, test="cohort").set(
        "data.dictionary", {"cohort": {"recode": recode}}
    )
    assert _tested(recoded) == set(frame["subject"][::3])
    frame.loc[4, "cohort"] = ""
    with pytest.raises(DataError, match=r"column 'cohort': no mark in row 6"):
        _tested(_study(tmp_path, frame, test="cohort", test_values=["Validierung"]))


# by time ------------------------------------------------------------------------------------------


def _dated() -> pd.DataFrame:
    frame = invented(60)
    frame["admitted"] = np.where(np.arange(60) < 45, "31.12.2023", "01.01.2024")
    return frame


GERMAN = {"admitted": {"date": "dd.mm.yyyy"}}


@pytest.mark.parametrize("text", [STUDY, PRIVATE])
def test_rows_of_a_day_or_later_are_held_out(tmp_path: Path, text: str) -> None:
    study = _study(tmp_path, _dated(), text, time="admitted", test_from="2024-01-01")
    study = study.set("data.dictionary.admitted", GERMAN["admitted"])
    assert _tested(study) == set(invented(60)["subject"][45:])
    assert runs.simulate(study).summary["status"] == "complete"
    # as it is frozen, a run's study asks for the same
    resumed = runs.run(study, tmp_path / "run").study
    assert runs.read_plan(tmp_path / "run")[0].digest() == resumed.digest() and _tested(
        resumed
    ) == _tested(study)


@pytest.mark.parametrize("text", [STUDY, PRIVATE])
def test_who_comes_back_later_is_tested_on_with_every_row(tmp_path: Path, text: str) -> None:
    frame = _dated()
    frame.loc[50, ["subject", "hospital"]] = frame.loc[2, ["subject", "hospital"]]
    study = _study(tmp_path, frame, text, time="admitted", test_from="2024-01-01")
    study = study.set("data.dictionary.admitted", GERMAN["admitted"])
    assert frame.loc[2, "subject"] in _tested(study)
    for site in runs.open_sites(study, None):
        assert not set(_held(site.table)) & set(
            site.table.ids[np.unique(site.table.patient[~site.table.test])]
        )


def test_a_row_without_a_date_is_told_or_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    frame = _dated()
    frame.loc[3, "admitted"] = ""
    keys = {"time": "admitted", "test_from": "2024-01-01"}
    study = _study(tmp_path, frame, **keys).set("data.dictionary.admitted", GERMAN["admitted"])
    with pytest.raises(
        DataError, match=r"column 'admitted': no date in row 5.*data.drop = \['rows without time'\]"
    ):
        _tested(study)
    assert _tested(study.set("data.drop", ["rows without time"])) == set(frame["subject"][45:])
    claim = _study(tmp_path, frame, PRIVATE, **keys).set(
        "data.dictionary.admitted", GERMAN["admitted"]
    )
    # no cell stops a claim: the row is trained on
    assert _tested(claim) == set(frame["subject"][45:])
    assert "column 'admitted': no date, so it counts as missing, in row 5" in caplog.text


def test_dates_of_another_form_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"column 'admitted'.*no date of the form iso in row .*These are dd.mm.yyyy"
    ):
        _tested(_study(tmp_path, _dated(), time="admitted", test_from="2024-01-01"))


# validation sites ---------------------------------------------------------------------------------


def _marked() -> pd.DataFrame:
    frame = invented(90)
    frame["part"] = np.where(np.arange(90) % 4 == 0, "test", "train")
    frame.loc[frame["hospital"] == "east", "part"] = "test"
    return frame


def _without_east(frame: pd.DataFrame) -> pd.DataFrame:
    east = frame["hospital"] == "east"
    return frame.drop(frame.index[east])


@pytest.mark.parametrize("aggregation", ["plain", "three-party"])
def test_a_site_of_test_rows_alone_is_tested_and_never_trained_on(
    tmp_path: Path, aggregation: str
) -> None:
    keys = {"test": "part", "preprocess": "none"}
    study = _study(tmp_path, _marked(), **keys).set("monitor.baselines", True)
    study = study.set("security.aggregation", aggregation).set("security.min_group", 2)
    if aggregation == "plain":
        study = study.set("training.algorithm", "scaffold")
    with_east = runs.run(study, tmp_path / "with")
    summary = with_east.summary
    assert any(
        "site 'east' has no training row: it validates from outside" in text
        for text in summary["warnings"]
    )
    assert set(summary["per_site"]) == {"north", "south", "east"}
    assert (
        summary["participation"]["east"] == 0
        and summary["per_site"]["east"]["accuracy"] is not None
    )
    assert set(summary["compared"]["sites"]) == {"north", "south"}  # it has no model of its own
    pages = write_report(tmp_path / "with", tmp_path / "report.html")
    assert "east" in pages.read_text(encoding="utf-8")
    (tmp_path / "else").mkdir()
    other = _study(tmp_path / "else", _without_east(_marked()), **keys).set(
        "monitor.baselines", False
    )
    other = other.set("security.aggregation", aggregation).set("security.min_group", 2)
    other = other.set("training.algorithm", study.training.algorithm)
    # bit for bit as if it had not been there
    assert torch.equal(with_east.w_P, runs.simulate(other).w_P)


def test_a_site_whose_few_patients_fall_to_the_test_is_one_too(tmp_path: Path) -> None:
    frame = invented(60)
    frame.loc[[0], "hospital"] = "tiny"
    for seed in range(40):
        study = _study(tmp_path, frame).set("study.seed", seed)
        tiny = next(site for site in runs.open_sites(study, None) if site.name == "tiny")
        if tiny.table.test.all():
            break
    warned = runs.simulate(study).summary["warnings"]
    assert any("site 'tiny' has no training row" in text for text in warned)


def test_nobody_to_train_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no site has a training row"):
        runs.simulate(_study(tmp_path, invented(40).assign(part="test"), test="part"))


def test_under_a_claim_a_declared_site_of_test_rows_is_tested_and_nobody_of_it_is_charged(
    tmp_path: Path,
) -> None:
    study = _study(tmp_path, _marked(), PRIVATE, test="part").set("data.exclude", ["hospital_"][:0])
    result = runs.run(study, tmp_path / "run")
    assert set(result.summary["per_site"]) == {"north", "south", "east"}
    accounts = runs.ledger_accounts(tmp_path / "run")["accounts"]
    assert all(account["site"] != "east" or account["patients"] == 0 for account in accounts)
