"""New records are held to what the model was trained on: nothing is silently taken for missing."""

from collections.abc import Iterator

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


def test_decimal_commas_are_refused_in_a_batch_of_any_size(result: Result, batch: pd.DataFrame) -> None:
    commas = batch.assign(lactate=["1,5", "2,25", "0,3", "4,0", "", "7,1"])
    assert "column 'lactate': a number in training, and none in row 0, 1, 2, 3, 5 ('1,5'); decimal commas" in refusal(
        result, commas
    )
    assert "row 0 ('1,5')" in refusal(result, commas[:1])


def test_a_known_category_in_another_spelling_is_refused(result: Result, batch: pd.DataFrame) -> None:
    assert "column 'ward': 'ICU' in row 2, 5; write 'icu'" in refusal(
        result, batch.assign(ward=["icu", "er", "ICU"] * 2)
    )


def test_a_category_never_met_is_missing_unless_refused(result: Result, batch: pd.DataFrame) -> None:
    strange = batch.assign(ward="theatre")
    pd.testing.assert_frame_equal(result.predict(strange), result.predict(batch.assign(ward=None)))
    assert "'theatre' in row 0, 1, 2, 3, 4 and 1 more; expected one of 'er', 'icu', 'ward'" in refusal(
        result, strange, unseen="refuse"
    )


def test_many_categories_never_met_are_missing_too(result: Result) -> None:
    batch = invented(200, seed=9).assign(ward=[f"room {i}" for i in range(200)])
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
    pd.testing.assert_frame_equal(result.predict(codes), result.predict(batch.assign(lactate=np.nan)))
