"""A csv line by line: what pandas reads of a sound table, and no line that another can change."""

import codecs
import csv
import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed.core.checks import DataError
from medfed.data import line_reader, readers
from medfed.data.layout import of_header
from medfed.data.tables import read
from medfed.study import Data

CELL = st.text(
    st.characters(codec="utf-8", exclude_characters="\r\n\0", exclude_categories=("Cs",)),
    max_size=6,
)


def _write(path: Path, rows: list[list[str]]) -> Path:
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(rows)
    path.write_text(stream.getvalue(), encoding="utf-8", newline="")
    return path


@given(st.lists(st.lists(CELL, min_size=3, max_size=3), max_size=8))
def test_a_sound_table_is_read_as_by_pandas(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]]
) -> None:
    path = _write(tmp_path_factory.mktemp("t") / "t.csv", [["a", "b", "c"], ["x", "y", "z"], *rows])
    frame, broken = line_reader.read(path)
    pd.testing.assert_frame_equal(
        frame, read(path), check_index_type=False, check_column_type=False, check_dtype=False
    )
    assert broken == []


def test_compressed_marked_and_foreign_line_ends(tmp_path: Path) -> None:
    text = "a,y\r\n1,0\r\n\r\n2,1\r\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.encode()))
    frame, broken = line_reader.read(tmp_path / "t.csv.gz")
    assert list(frame.columns) == ["a", "y"] and frame.index.tolist() == [2, 4] and broken == []
    assert frame["a"].tolist() == ["1", "2"]


SOUND = ["p1,north,1", "p2,south,2", 'p3,"north, or so",3', "p4,east,4"]
LINES = st.one_of(
    st.sampled_from(
        [
            '"',
            'p,"x,1',
            'p,x,1"',
            "p,x",
            "p,x,1,2",
            ",,",
            '""""',
            'p,"x"y,1',
            "\0,\0,\0",
            "é,\x85,\x0b",
        ]
    ),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=12),
)


@given(st.lists(st.tuples(st.integers(0, 4), LINES), max_size=4))
def test_no_line_changes_another(
    tmp_path_factory: pytest.TempPathFactory, odd: list[tuple[int, str]]
) -> None:
    """The law: whatever stands between them, sound lines are read as if they stood alone."""
    rows = list(SOUND)
    for place, text in odd:
        rows.insert(place, text)
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_bytes("\n".join(["id,place,n", *rows]).encode())
    frame, broken = line_reader.read(path)
    numbers = [2 + i for i, row in enumerate(rows) if row in SOUND]
    assert frame.loc[numbers].to_numpy().tolist() == [next(csv.reader([row])) for row in SOUND]
    assert not set(broken) & set(numbers)


def test_a_csv_read_as_a_whole_does_change() -> None:
    """The power of the law above: one open quote and pandas reads other rows, or none."""
    text = "id,place,n\n" + 'p0,"x,1\n' + "\n".join(SOUND) + "\n"
    assert len(pd.read_csv(io.StringIO(text), dtype=str)) < len(SOUND)


def test_a_byte_that_is_no_text_stays_in_its_cell(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("a,b\nü,1\n".encode() + b"\xff\xfe,2\n" + "ö,3\n".encode())
    frame, broken = line_reader.read(tmp_path / "t.csv")
    assert (
        frame["a"].tolist()[::2] == ["ü", "ö"]
        and frame["b"].tolist() == ["1", "2", "3"]
        and broken == []
    )


def test_a_cell_with_a_line_break_is_no_record_in_any_of_its_lines(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('id,note\np1,"one\ntwo"\np2,x\n')
    frame, broken = line_reader.read(tmp_path / "t.csv")
    assert frame["id"].tolist() == ["p2"] and broken == [2, 3]


def test_a_table_without_header_or_with_two_separators_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(DataError, match="has no header"):
        read(tmp_path / "empty.csv", private=True)
    (tmp_path / "s.csv").write_text("a,b;y\n1,2;0\n")
    with pytest.raises(
        DataError, match=r"its header can be parted.*separator = \",\" or separator = \";\""
    ):
        read(tmp_path / "s.csv", private=True)


def test_a_table_of_no_rows_is_a_table(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,y\n")
    frame = read(tmp_path / "t.csv", private=True)
    assert list(frame.columns) == ["a", "y"] and len(frame) == 0 and frame.index.dtype == np.int64


@pytest.mark.parametrize("byte", [b"\xff", b"\x00", b"\n"])
@pytest.mark.parametrize("codec", ["utf-16-le", "utf-16-be"])
def test_a_stray_byte_of_utf_16_costs_its_own_line(tmp_path: Path, codec: str, byte: bytes) -> None:
    rows = [text.encode(codec) for text in ("a,b\n", "1,x\n", "2,y\n", "3,z\n")]
    mark = codecs.BOM_UTF16_LE if codec == "utf-16-le" else codecs.BOM_UTF16_BE
    path = tmp_path / "t.csv"
    path.write_bytes(mark + rows[0] + rows[1][:3] + byte + rows[1][3:] + rows[2] + rows[3])
    frame, _ = line_reader.read(path)
    assert frame["a"].tolist()[-2:] == ["2", "3"] and frame["b"].tolist()[-2:] == ["y", "z"]


def test_the_header_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.csv"
    path.write_text("a,b\n1,2\n", encoding="utf-8")
    seen: list[Path] = []

    def counted(path: Path, *given: Any) -> Any:
        seen.append(path)
        return of_header(path, *given)

    for module in (line_reader, readers):
        monkeypatch.setattr(module, "of_header", counted)
    found = readers.read(path, Data(), private=True)
    assert (
        seen == [path]
        and found.layouts["t.csv"].separator == ","
        and found.frame["a"].tolist() == ["1"]
    )
