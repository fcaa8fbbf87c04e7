"""New records are held to what the model was trained on: nothing is silently taken for missing."""

from collections.abc import Iterator
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pandas as pd
import pytest
from tests.tables import STUDY, invented, write_study

import medfed
from medfed.core.checks import DataError
from medfed.runs import Result


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    text = STUDY + '[data.dictionary.lactate]\nmissing = ["-9"]\n'
    return medfed.simulate(medfed.load_study(write_study(tmp_path_factory.mktemp("study"), text)))


@pytest.fixture
def batch() -> Iterator[pd.DataFrame]:
    yield invented(6, seed=9).drop(columns=["died", "hospital", "subject"])


def refusal(result: Result, frame: pd.DataFrame, **options: str) -> str:
    with pytest.raises(DataError) as caught:
        result.predict(frame, **options)  # type: ignore[arg-type]
    return str(caught.value)


def test_texts_predict_as_numbers_do(result: Result, batch: pd.DataFrame) -> None:
    texts = batch.astype(str).replace("nan", "")
    pd.testing.assert_frame_equal(result.predict(texts), result.predict(batch))


def test_decimal_commas_are_refused_in_a_batch_of_any_size(
    result: Result, batch: pd.DataFrame
) -> None:
    commas = batch.assign(lactate=["1,5", "2,25", "0,3", "4,0", "", "7,1"])
    assert (
        "column 'lactate': a number in training, and none in row 0, 1, 2, 3, 5 ('1,5'); decimal "
        "commas"
    ) in refusal(result, commas)
    assert "row 0 ('1,5')" in refusal(result, commas[:1])


def test_a_known_category_in_another_spelling_is_refused(
    result: Result, batch: pd.DataFrame
) -> None:
    assert "column 'ward': 'ICU' in row 2, 5; write 'icu'" in refusal(
        result, batch.assign(ward=["icu", "er", "ICU"] * 2)
    )


def test_a_category_never_met_is_missing_unless_refused(
    result: Result, batch: pd.DataFrame
) -> None:
    strange = batch["ward"].astype(object)
    empty = batch["ward"].astype(object)
    strange[[1, 4]] = "theatre"
    empty[[1, 4]] = None
    strange = batch.assign(ward=strange)
    pd.testing.assert_frame_equal(result.predict(strange), result.predict(batch.assign(ward=empty)))
    assert "'theatre' in row 1, 4; expected one of 'er', 'icu', 'ward'" in refusal(
        result, strange, unseen="refuse"
    )
    one = batch[:1].assign(ward="theatre")
    pd.testing.assert_frame_equal(result.predict(one), result.predict(one.assign(ward=None)))


@pytest.mark.parametrize("rows", [2, 4, 6, 200])
def test_a_whole_column_never_met_is_another_coding(result: Result, rows: int) -> None:
    batch = invented(rows, seed=9).assign(ward=[f"room {i}" for i in range(rows)])
    told = refusal(result, batch)
    assert (
        f"column 'ward': {rows} of {rows} cells are none of" in told
        and "'er', 'icu', 'ward'" in told
    )


def test_many_categories_never_met_are_missing_too(result: Result) -> None:
    batch = invented(200, seed=9)
    batch["ward"] = [f"room {i}" if i % 2 else "icu" for i in range(200)]
    assert len(result.predict(batch)) == 200


def test_a_row_is_predicted_from_itself_alone(result: Result, batch: pd.DataFrame) -> None:
    gaps = batch.assign(lactate=[np.nan, *batch["lactate"][1:]], ward=[None, *batch["ward"][1:]])
    alone = pd.concat([result.predict(gaps.iloc[[i]]) for i in range(len(gaps))])
    pd.testing.assert_frame_equal(result.predict(gaps), alone, check_index_type=False, rtol=1e-5)


def test_all_that_is_wrong_is_told_at_once(result: Result, batch: pd.DataFrame) -> None:
    told = refusal(result, batch.assign(age="old", ward="ICU"))
    assert "2 things" in told and "'age'" in told and "'ward'" in told


def test_a_column_that_is_absent_is_named(result: Result, batch: pd.DataFrame) -> None:
    assert "'lactate' is no column of the table" in refusal(result, batch.drop(columns="lactate"))


def test_an_empty_table_is_said_to_be_empty(result: Result, batch: pd.DataFrame) -> None:
    assert "has no row" in refusal(result, batch[:0])


def test_what_is_declared_missing_is_missing(result: Result, batch: pd.DataFrame) -> None:
    codes = batch.assign(lactate=["-9", "-9.0", "?", "NA", "", None])
    pd.testing.assert_frame_equal(
        result.predict(codes), result.predict(batch.assign(lactate=np.nan))
    )


STAYS = (
    STUDY.replace('target = "died"', 'target = "gestorben"').replace(
        '"cohort.csv"', '"cohort.csv"\nexclude = ["note"]'
    )
    + """
[data.dictionary.geboren]
date = "dd.mm.yyyy"
becomes = "age"
reference = "Eintritt"
range = [0, 120]
[data.dictionary.Eintritt]
date = "dd.mm.yyyy"
[data.dictionary.note]
doc = "in the table, and no feature"
"""
)


def stays() -> pd.DataFrame:
    rows = np.arange(192)
    frame = invented(192)[["hospital", "subject", "died"]].rename(columns={"died": "gestorben"})
    frame["geboren"] = pd.Series(
        pd.Timestamp("1940-01-01") + pd.to_timedelta(rows * 90, "D")
    ).dt.strftime("%d.%m.%Y")
    frame["Eintritt"] = "01.02.2024"
    frame["note"] = "x"
    frame["Kreatinin (µmol/l)"] = np.random.default_rng(0).normal(90, 9, len(frame)).round(1)
    frame["Geschlecht"] = np.where(rows % 2, "männlich", "weiblich")
    return frame


@pytest.fixture(scope="module")
def stayed(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return medfed.simulate(
        medfed.load_study(write_study(tmp_path_factory.mktemp("stays"), STAYS, stays()))
    )


def test_a_date_that_an_age_is_counted_to_is_asked_for(stayed: Result) -> None:
    told = refusal(stayed, stays().drop(columns="Eintritt"))
    assert "'Eintritt' is no column of the table" in told and "'geboren'" in told


def test_what_the_model_does_not_know_need_not_be_there(stayed: Result) -> None:
    new = stays().drop(columns=["note", "gestorben", "hospital", "subject"])
    pd.testing.assert_frame_equal(stayed.predict(new), stayed.predict(stays()))


def test_names_and_texts_are_brought_to_one_form(stayed: Result) -> None:
    """A decomposed umlaut, and the Greek mu in place of the micro sign: as a macOS file and another
    keyboard write.
    """
    new = stays()
    other = new.rename(columns=lambda name: normalize("NFD", name).replace("\u00b5", "\u03bc"))
    other["Geschlecht"] = other["Geschlecht"].map(lambda text: normalize("NFD", text))
    pd.testing.assert_frame_equal(stayed.predict(other), stayed.predict(new))


def test_a_column_in_another_unit_is_not_taken_for_the_studys(stayed: Result) -> None:
    told = refusal(stayed, stays().rename(columns={"Kreatinin (µmol/l)": "Kreatinin (mg/dl)"}))
    assert "'Kreatinin (mg/dl)' is in another unit" in told
    assert "study fix" not in told and "[data" not in told and "did you mean" not in told
    told = refusal(
        stayed, stays().rename(columns={"Geschlecht": "geschlecht", "geboren": "Geboren"})
    )
    assert "did you mean 'geschlecht'?" in told and "study fix" not in told


def test_a_path_is_read_as_the_study_reads_its_table(stayed: Result, tmp_path: Path) -> None:
    new = stays().drop(columns=["gestorben", "subject", "hospital"])
    new.assign(
        **{"Kreatinin (µmol/l)": new["Kreatinin (µmol/l)"].map(lambda x: str(x).replace(".", ","))}
    ).to_csv(tmp_path / "new.csv", sep=";", index=False, encoding="cp1252")
    for path in (tmp_path / "new.csv", str(tmp_path / "new.csv")):
        told = stayed.predict(path)
        np.testing.assert_array_equal(told.to_numpy(), stayed.predict(new).to_numpy())
        assert list(told.index) == list(range(2, len(new) + 2))  # rows as in the file
        assert list(stayed.decide(path).index) == list(told.index)
    with pytest.raises(DataError, match="a DataFrame, or the path of a table"):
        stayed.predict(new.to_dict())  # type: ignore[arg-type]
