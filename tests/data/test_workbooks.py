"""Workbooks and statistics packages: exact numbers, ISO dates, and no cell that stops a claimed
reading.
"""

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import openpyxl
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyreadstat
import pytest

from medfed.core.checks import DataError
from medfed.data.readers import header, read
from medfed.study import Data, Format

DATA = Data(target="y")


def _workbook(path: Path, *rows: list[Any], formats: dict[str, str] | None = None) -> Path:
    book = openpyxl.Workbook()
    assert book.active is not None
    for row in rows:
        book.active.append(row)
    for place, format in (formats or {}).items():
        book.active[place].number_format = format
    book.save(path)
    return path


def _only(path: Path, data: Data = DATA, private: bool = False) -> list[list[object]]:
    cells: list[list[object]] = read(path, data, private).frame.to_numpy(dtype=object).tolist()
    return cells


def test_cells_of_a_workbook_are_what_a_csv_of_them_would_hold(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 1, 31, 12, 30)

    path = _workbook(
        tmp_path / "t.xlsx",
        ["id", "whole", "real", "day", "moment", "flag", "text", "gap"],
        [1e15, 3.0, 0.1, datetime.date(2024, 1, 31), moment, True, "00017", None],
        [
            9007199254740991,
            -3,
            1e-7,
            datetime.date(1923, 5, 6),
            moment,
            False,
            "Mu\u0308ller",
            "#N/A",
        ],
    )
    first, second = _only(path)
    assert first == [
        str(10**15),
        "3",
        "0.1",
        "2024-01-31",
        "2024-01-31 12:30:00",
        "True",
        "00017",
        "",
    ]
    assert second[:3] == ["9007199254740991", "-3", "1e-07"] and second[6] == "Müller"
    assert header(path, DATA, private=False) == [
        "id",
        "whole",
        "real",
        "day",
        "moment",
        "flag",
        "text",
        "gap",
    ]


def test_a_cell_that_is_no_date_stops_no_claimed_reading(tmp_path: Path) -> None:
    path = _workbook(
        tmp_path / "t.xlsx",
        ["a", "b"],
        [1.5, "x"],
        [1e300, "y"],
        [2.5, "z"],
        formats={"A3": "[h]:mm", "A4": "0.0"},
    )
    frame = read(path, DATA, private=True).frame
    assert frame["b"].tolist() == ["x", "z"] and frame.index.tolist() == [2, 4]
    with pytest.raises(DataError, match="a cell in row 3 cannot be read"):
        read(path, DATA, private=False)


def _sav(path: Path, frame: pd.DataFrame, **options: Any) -> Path:
    {"sav": pyreadstat.write_sav, "dta": pyreadstat.write_dta, "xpt": pyreadstat.write_xport}[
        path.suffix[1:]
    ](frame, str(path), **options)
    return path


@pytest.mark.parametrize("name", ["t.sav", "t.dta", "t.xpt"])
@pytest.mark.parametrize("private", [False, True])
def test_dates_of_statistics_packages_are_iso(tmp_path: Path, name: str, private: bool) -> None:
    days = pd.Series([datetime.date(2024, 1, 31), None, datetime.date(1923, 5, 6)], dtype=object)
    moments = pd.Series(pd.to_datetime(["2024-01-31 12:30:15", None, "1923-05-06 00:00:00"]))
    frame = pd.DataFrame(
        {"day": days, "moment": moments, "n": [1.5, None, 3.0], "w": ["ä", "", "b"]}
    )
    read_back = _only(_sav(tmp_path / name, frame), private=private)
    assert [row[0] for row in read_back] == ["2024-01-31", None, "1923-05-06"]
    assert [row[1] for row in read_back] == ["2024-01-31 12:30:15", None, "1923-05-06"]
    assert [row[2] for row in read_back][::2] == [1.5, 3.0] and [row[3] for row in read_back][
        ::2
    ] == ["ä", "b"]


def test_an_absurd_date_stops_no_reading(tmp_path: Path) -> None:
    frame = pd.DataFrame({"d": [13e9, 1e300], "y": ["a", "b"]})
    path = _sav(tmp_path / "t.sav", frame, variable_format={"d": "DATE11"})
    for private in (False, True):
        assert _only(path, private=private) == [["1994-09-26", "a"], ["1e+300", "b"]]


def test_times_are_refused_by_the_file_s_own_word(tmp_path: Path) -> None:
    frame = pd.DataFrame({"seen": [60.0, None], "y": ["a", "b"]})
    path = _sav(tmp_path / "t.sav", frame, variable_format={"seen": "TIME8"})
    for private in (False, True):
        with pytest.raises(DataError, match="times or durations in column 'seen'"):
            read(path, DATA, private)


def test_labels_or_codes_is_a_choice_and_user_missing_is_missing(tmp_path: Path) -> None:
    frame = pd.DataFrame({"sex": [1.0, 2.0, 1.0], "lactate": [1.5, -9.0, 2.5]})
    labels = {"sex": {1.0: "weiblich", 2.0: "männlich"}}
    path = _sav(
        tmp_path / "t.sav", frame, variable_value_labels=labels, missing_ranges={"lactate": [-9]}
    )
    codes = read(path, DATA, private=False).frame
    assert codes["sex"].tolist() == [1.0, 2.0, 1.0] and codes["lactate"].isna().tolist() == [
        False,
        True,
        False,
    ]
    words = read(path, replace(DATA, format=Format(labels="labels")), private=False).frame
    assert words["sex"].tolist() == [
        "weiblich",
        "männlich",
        "weiblich",
    ] and words.index.tolist() == [2, 3, 4]


def test_whole_numbers_with_gaps_stay_whole_in_parquet(tmp_path: Path) -> None:
    ids = pa.array([2**60, None, 2**60 + 1], pa.int64())
    pq.write_table(
        pa.table({"id": ids, "day": pa.array([0, 2**31 - 1, None], pa.date32())}),
        tmp_path / "t.parquet",
    )
    frame = read(tmp_path / "t.parquet", DATA, private=True).frame
    assert (
        frame["id"].tolist()[::2] == [2**60, 2**60 + 1] and frame["day"].tolist()[0] == "1970-01-01"
    )


def test_bytes_that_are_no_text_stay_in_their_cell_of_a_parquet_file(tmp_path: Path) -> None:
    texts = pa.array([b"o\xcc\x88", b"\xff\xfe", None]).view(pa.string())
    pq.write_table(pa.table({"w": texts, "y": ["a", "b", "c"]}), tmp_path / "t.parquet")
    frame = read(tmp_path / "t.parquet", DATA, private=True).frame
    assert frame["w"].tolist()[:2] == ["ö", "\ufffd\ufffd"] and frame["y"].tolist() == [
        "a",
        "b",
        "c",
    ]
