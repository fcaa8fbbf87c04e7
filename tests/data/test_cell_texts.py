"""What a cell says is a matter of that cell: one patient's gap or time of day changes no other cell
of its column.

The attack: one gap in a column of 18-digit codes made floats of all of them, and every other
patient's category was missing; one admission with an hour put an hour into every date.
"""

import datetime as dt
import decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from medfed.core.streams import Streams
from medfed.data import readers
from medfed.data.mapping import find_different
from medfed.data.partition import row_patients
from medfed.data.raw_columns import canonical
from medfed.data.tables import clean
from medfed.study import Data, Feature

PLAIN = Data(target="y")
CODES = [900000000000207008, 900000000000441003]
KINDS: dict[str, tuple[list[object], pa.DataType]] = {
    "large codes": (CODES, pa.int64()),
    "small codes": ([11, 12], pa.int8()),
    "unsigned": ([2**63 + 1, 3], pa.uint64()),
    "flags": ([True, False], pa.bool_()),
    "floats": ([0.1, 2.0], pa.float64()),
    "short floats": ([0.5, 2.0], pa.float32()),
    "texts": (["a", "b"], pa.string()),
    "decimals": ([decimal.Decimal("1.10"), decimal.Decimal("2.00")], pa.decimal128(9, 2)),
    "days": ([dt.date(2024, 1, 2), dt.date(2024, 3, 4)], pa.date32()),
    "moments": ([dt.datetime(2024, 1, 2), dt.datetime(2024, 3, 4)], pa.timestamp("us")),
    "moments with a zone": (
        [dt.datetime(2024, 1, 2), dt.datetime(2024, 3, 4)],
        pa.timestamp("us", tz="UTC"),
    ),
    "words of a list": (["a", "b"], pa.dictionary(pa.int8(), pa.string())),
}
ODD: dict[str, object] = {
    "moments": dt.datetime(2024, 5, 6, 7, 8, 9, 10),
    "moments with a zone": dt.datetime(2024, 5, 6, 7, 8, 9, 10),
    "floats": 1e300,
    "short floats": float("nan"),
    "small codes": -128,
    "unsigned": 2**64 - 1,
}


def column(folder: Path, kind: str, odd: list[object], data: Data = PLAIN) -> pd.DataFrame:
    values, type_ = KINDS[kind]
    cells = [*values * 5, *odd]
    path = folder / f"t{len(cells)}.parquet"
    pq.write_table(pa.table({"x": pa.array(cells, type_), "y": ["0"] * len(cells)}), path)
    return readers.read(path, data, private=True).frame


@pytest.mark.parametrize("odd", ["gap", "odd"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_cell_more_changes_no_other(tmp_path: Path, kind: str, odd: str) -> None:
    before = column(tmp_path, kind, [])
    after = column(tmp_path, kind, [None if odd == "gap" else ODD.get(kind, KINDS[kind][0][0])])
    many = len(before)
    assert canonical(after["x"])[:many].tolist() == canonical(before["x"]).tolist()
    assert row_patients(after)[:many].tolist() == row_patients(before).tolist()
    texts = []
    for frame in (before, after):
        code_N, text_U = find_different(frame["x"])
        texts.append([text_U[code] for code in code_N[:many]])
    assert texts[0] == texts[1]


def test_a_gap_leaves_the_codes_of_all_others_declared(tmp_path: Path) -> None:
    codes = tuple(map(str, CODES))
    data = Data(
        target="y", dictionary={"x": Feature(categories=codes), "y": Feature(categories=("0", "1"))}
    )
    frame = column(tmp_path, "large codes", [None], data)
    assert clean("s", frame, data, Streams(0), private=True).texts["x"][:2].tolist() == list(codes)


@pytest.mark.parametrize("first", [-0.0, 0.0, 5.0])
def test_a_minus_before_zero_is_no_other_number(first: float) -> None:
    """The attack: the first cell's -0.0 had every other patient's 0 read as -0, which is
    no `no`.
    """
    for dtype in ("float64", "object"):
        code_N, text_U = find_different(pd.Series([first, 0.0, 1.0, 0.0], dtype=dtype))
        assert [text_U[code] for code in code_N[1:]] == ["0", "1", "0"]


def test_a_truth_and_a_one_are_read_as_each_says() -> None:
    code_N, text_U = find_different(pd.Series([True, 1, 1.0, "1"], dtype=object))
    assert [text_U[code] for code in code_N] == ["True", "1", "1", "1"]


def test_the_end_of_time_in_another_zone_is_a_gap_of_its_own() -> None:
    end = pd.Timestamp("9999-12-31T23:59:59").as_unit("s").tz_localize("UTC")
    moments = pd.Series([end, pd.Timestamp("2024-01-02", tz="UTC").as_unit("s")]).dt.tz_convert(
        "Europe/Zurich"
    )
    assert canonical(moments).tolist()[1] == "2024-01-02 01:00:00"


def test_frames_that_pandas_made_are_read_as_far_as_they_hold(tmp_path: Path) -> None:
    """A frame of a program: its whole numbers are floats already where one is missing, and say so
    to all.
    """
    assert canonical(pd.Series([3.0, np.nan])).tolist()[0] == "3"
