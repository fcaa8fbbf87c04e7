"""Tables joined by patient: one row beside each, what is missing counted, and no row that stops a
claimed reading.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.tables import PRIVATE, STUDY, invented, write_study
from tests.test_cli import medfed as command

import medfed
from medfed import runs
from medfed.core.checks import DataError
from medfed.data import sources
from medfed.data.doubts import Doubt
from medfed.study import Data, Join, Study

STAYS = "subject,hospital,age,y\np1,north,50,0\n00017,north,60,1\np3,south,70,0\n,south,80,1\n"
LABS = "subject,lactate,n\n17,1.5,9007199254740993\np1 ,2.5,2\np9,3.5,3\n"


def _study(folder: Path, labs: str = LABS, stays: str = STAYS, **join: Any) -> Study:
    (folder / "stays.csv").write_text(stays)
    (folder / "labs.csv").write_text(labs)
    data = Data(
        table="stays.csv",
        target="y",
        site="hospital",
        patient="subject",
        join=(Join("labs.csv", **join),),
    )
    return Study(data=data, folder=folder)


@pytest.mark.parametrize("private", [False, True])
def test_rows_find_each_other_by_the_rule_of_identity(tmp_path: Path, private: bool) -> None:
    found = sources.read(_study(tmp_path), private=private)
    assert list(found.frame) == ["subject", "hospital", "age", "y", "lactate", "n"]
    assert found.frame["lactate"].fillna("").tolist() == ["2.5", "1.5", "", ""]
    assert found.frame.index.tolist() == [2, 3, 4, 5] and found.unmatched == {"labs.csv": 2}
    assert sources.columns_of(_study(tmp_path), private) == list(found.frame)


def test_whole_numbers_stay_whole_beside_gaps(tmp_path: Path) -> None:
    study = _study(tmp_path)
    labs = pd.DataFrame({"subject": ["p1", "17"], "n": [2**60 + 1, 2], "flag": [True, False]})
    labs.to_parquet(tmp_path / "labs.parquet")
    frame = sources.read(study.set("data.join", [{"table": "labs.parquet"}])).frame
    assert frame["n"].tolist()[:2] == [2**60 + 1, 2] and frame["n"].isna().tolist() == [
        False,
        False,
        True,
        True,
    ]
    assert frame["flag"].tolist()[:2] == [True, False]


def test_a_row_that_stands_twice_is_named_and_under_a_claim_is_none(tmp_path: Path) -> None:
    study = _study(tmp_path, LABS + "P1,7,7\n")
    with pytest.raises(
        DataError,
        match=r"join\[0\]\.table='labs\.csv': a value of 'subject' stands more than once in row 3, 5",
    ):
        sources.read(study)
    frame = sources.read(study, private=True).frame
    assert frame["lactate"].fillna("").tolist() == ["", "1.5", "", ""]


@pytest.mark.parametrize(
    ("labs", "join", "error"),
    [
        (
            LABS,
            {"on": ("subjct",)},
            r"join\[0\]\.on='subjct' is no column of the table; did you mean 'subject'",
        ),
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
            sources.read(study, private=private)


def test_several_columns_join(tmp_path: Path) -> None:
    labs = "subject,hospital,lactate\np1,south,1\np1,north,2\np3,,3\n"
    frame = sources.read(_study(tmp_path, labs, on=("subject", "hospital"))).frame
    assert frame["lactate"].fillna("").tolist() == ["2", "", "", ""]


def test_a_study_file_joins(tmp_path: Path) -> None:
    study = _study(tmp_path)
    read_back = Study(folder=tmp_path).set("data.table", "stays.csv").set("data.target", "y")
    read_back = read_back.set("data.join", [{"table": "labs.csv", "on": "subject"}])
    assert (
        read_back.data.join == (Join("labs.csv", ("subject",)),)
        and 'table = "labs.csv"' in read_back.toml()
    )
    assert study.digest() != study.set("data.join", []).digest()


def _joined(folder: Path, text: str, lacking: int = 3) -> Study:
    """Write stays and laboratories that lack patients, and a study that joins them."""
    frame = invented()
    labs = frame[["subject"]].assign(crp=np.random.default_rng(0).integers(1, 90, len(frame)))
    blood = frame[["subject"]].assign(gas=np.random.default_rng(1).integers(1, 90, len(frame)))
    labs.drop(index=frame.index[frame["hospital"] == "south"][:lacking]).to_csv(
        folder / "labs.csv", index=False
    )
    blood.drop(index=[0, 1]).to_csv(folder / "blood.csv", index=False)
    joins = '[[data.join]]\ntable = "labs.csv"\n[[data.join]]\ntable = "blood.csv"\n'
    return medfed.load_study(
        write_study(folder, text.replace("[training]", joins + "[training]", 1), frame)
    )


@pytest.mark.usefixtures("one_thread")
def test_rows_that_a_table_lacks_are_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = _joined(tmp_path, STUDY)
    south = invented().index[invented()["hospital"] == "south"][:3] + 2
    told = (
        "site 'south', column 'subject' finds no row in labs.csv (row "
        f"{', '.join(map(str, south))}). "
    )
    warned = medfed.simulate(study).summary["warnings"]
    assert [told in text for text in warned].count(True) == 1
    assert sum("finds no row in blood.csv (row 2" in text for text in warned) == 1
    assert command("data", "show", tmp_path / "study.toml") == 0
    shown = capsys.readouterr().out
    assert told in shown and "blood.csv" in shown and "p00" not in shown  # rows, and no patient
    quiet = study.set("data.accept", ["unjoined:subject"])
    assert not any("finds no row" in text for text in medfed.simulate(quiet).summary["warnings"])


@pytest.mark.usefixtures("one_thread")
def test_many_are_counted_and_a_row_that_is_left_out_is_not(tmp_path: Path) -> None:
    found = runs.survey(_joined(tmp_path, STUDY, 40))
    (doubt,) = [
        Doubt.from_json(told, "south")
        for told in found["south"]["doubts"]
        if "labs" in told["text"]
    ]
    assert doubt.count == 40 and len(doubt.rows) == 5 and "and 35 more" in doubt.sentence()


@pytest.mark.usefixtures("one_thread")
def test_under_a_claim_a_join_tells_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entries = "".join(f"[data.dictionary.{name}]\nrange = [0, 300]\n" for name in ("crp", "gas"))
    study = _joined(tmp_path, PRIVATE.replace("[training]", entries + "[training]", 1))
    assert not any("finds no row" in text for text in medfed.simulate(study).summary["warnings"])
    assert "labs.csv has no row for row" in caplog.text  # the site's own log
