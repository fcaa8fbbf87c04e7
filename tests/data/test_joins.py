"""Tables joined by patient: one row beside each, what is missing counted, and no row that stops a claimed reading."""

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medfed.core.checks import DataError
from medfed.data import sources
from medfed.study import Data, Join, Study

STAYS = "subject,hospital,age,y\np1,north,50,0\n00017,north,60,1\np3,south,70,0\n,south,80,1\n"
LABS = "subject,lactate,n\n17,1.5,9007199254740993\np1 ,2.5,2\np9,3.5,3\n"


def _study(folder: Path, labs: str = LABS, stays: str = STAYS, **join: Any) -> Study:
    (folder / "stays.csv").write_text(stays)
    (folder / "labs.csv").write_text(labs)
    data = Data(table="stays.csv", target="y", site="hospital", patient="subject", join=(Join("labs.csv", **join),))
    return Study(data=data, folder=folder)


@pytest.mark.parametrize("private", [False, True])
def test_rows_find_each_other_by_the_rule_of_identity(tmp_path: Path, private: bool) -> None:
    found = sources.reading(_study(tmp_path), private=private)
    assert list(found.frame) == ["subject", "hospital", "age", "y", "lactate", "n"]
    assert found.frame["lactate"].fillna("").tolist() == ["2.5", "1.5", "", ""]
    assert found.frame.index.tolist() == [2, 3, 4, 5] and found.unmatched == {"labs.csv": 2}
    assert sources.columns_of(_study(tmp_path), private) == list(found.frame)


def test_whole_numbers_stay_whole_beside_gaps(tmp_path: Path) -> None:
    study = _study(tmp_path)
    labs = pd.DataFrame({"subject": ["p1", "17"], "n": [2**60 + 1, 2], "flag": [True, False]})
    labs.to_parquet(tmp_path / "labs.parquet")
    frame = sources.reading(study.set("data.join", [{"table": "labs.parquet"}])).frame
    assert frame["n"].tolist()[:2] == [2**60 + 1, 2] and frame["n"].isna().tolist() == [False, False, True, True]
    assert frame["flag"].tolist()[:2] == [True, False]


def test_a_row_that_stands_twice_is_named_and_under_a_claim_is_none(tmp_path: Path) -> None:
    study = _study(tmp_path, LABS + "P1,7,7\n")
    with pytest.raises(
        DataError, match=r"join\[0\]\.table='labs\.csv': a value of 'subject' stands more than once in row 3, 5"
    ):
        sources.reading(study)
    frame = sources.reading(study, private=True).frame
    assert frame["lactate"].fillna("").tolist() == ["", "1.5", "", ""]


@pytest.mark.parametrize(
    ("labs", "join", "error"),
    [
        (LABS, {"on": ("subjct",)}, r"join\[0\]\.on='subjct' is no column of the table; did you mean 'subject'"),
        (LABS.replace("subject", "id"), {}, r"join\[0\]\.on='subject' is no column of labs\.csv"),
        (LABS.replace("lactate", "age"), {}, "column 'age' is in both tables"),
    ],
)
def test_a_join_that_cannot_be_is_refused_by_its_headers(
    tmp_path: Path, labs: str, join: dict[str, Any], error: str
) -> None:
    study = _study(tmp_path, labs, **join)
    for private in (False, True):
        with pytest.raises(DataError, match=error):
            sources.columns_of(study, private)
        with pytest.raises(DataError, match=error):
            sources.reading(study, private=private)


def test_several_columns_join(tmp_path: Path) -> None:
    labs = "subject,hospital,lactate\np1,south,1\np1,north,2\np3,,3\n"
    frame = sources.reading(_study(tmp_path, labs, on=("subject", "hospital"))).frame
    assert frame["lactate"].fillna("").tolist() == ["2", "", "", ""]


def test_a_study_file_joins(tmp_path: Path) -> None:
    study = _study(tmp_path)
    read_back = Study(folder=tmp_path).set("data.table", "stays.csv").set("data.target", "y")
    read_back = read_back.set("data.join", [{"table": "labs.csv", "on": "subject"}])
    assert read_back.data.join == (Join("labs.csv", ("subject",)),) and 'table = "labs.csv"' in read_back.toml()
    assert study.digest() != study.set("data.join", []).digest()
