"""How a text table is written: read alike in every form, guessed where it may be, and under a claim
by the header alone."""

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.awkward.forms import DATA, clean, packed, spelt, text

from medfed.core.checks import DataError
from medfed.data import line_reader, readers
from medfed.data.layout import TextLayout, guess, of_header
from medfed.data.readers import read
from medfed.study import Data, Format

SEPARATORS = (",", ";", "\t", "|")
SPELLINGS = (
    (".", ""),
    (",", ""),
    (",", "."),
    (".", "'"),
    (",", "\u00a0"),
    (".", ","),
    (",", " "),
    (".", "\u2019"),
)
ENCODINGS = {"utf-8": "utf-8", "utf-8-sig": "utf-8", "cp1252": "cp1252", "utf-16": "utf-16"}
PACKINGS = ("", ".gz", ".zst", ".zip")
SIGNS = {"": "none", "\u00a0": " ", "\u2019": "'"}


def _forms() -> list[tuple[str, tuple[str, str], str, str]]:
    forms = itertools.product(SEPARATORS, SPELLINGS, ENCODINGS, PACKINGS)
    every = [form for form in forms if not (form[2] == "cp1252" and form[1][1] == "\u202f")]
    return every[::3]  # 3 divides no length: every pair is met


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_text(text(clean()), encoding="utf-8")
    return read(path, DATA, private=False).frame


def test_one_table_is_one_in_every_form(right: pd.DataFrame, tmp_path: Path) -> None:
    for separator, (decimal, thousands), encoding, packing in _forms():
        content = text(spelt(clean(), decimal, thousands), separator).encode(encoding)
        path = packed(tmp_path / f"t.csv{packing}", content)
        found = read(path, DATA, private=False)
        form = (separator, decimal, thousands, encoding, packing)
        assert found.frame.equals(right), form
        layout = found.layouts[path.name]
        assert layout == TextLayout(
            separator,
            decimal,
            SIGNS.get(thousands, thousands),
            ENCODINGS[encoding],
            guessed=layout.guessed,
        ), form
        assert (layout.guessed.keys() >= {"decimal"}) == (decimal == ","), form
        said = Format(
            separator=layout.separator, decimal=layout.decimal, thousands=layout.thousands
        )  # type: ignore[arg-type]
        claimed = read(path, replace(DATA, format=said), private=True).frame
        assert claimed.to_numpy().tolist() == right.to_numpy().tolist(), form
        assert claimed.index.tolist() == right.index.tolist() and list(claimed) == list(right), form


# a guess is a value, and says why -----------------------------------------------------------------


def _guessed(folder: Path, content: str, name: str = "t.csv", **format: Any) -> TextLayout:
    (folder / name).write_bytes(content.encode("cp1252"))
    return read(folder / name, replace(DATA, format=Format(**format)), private=False).layouts[name]


def test_what_is_guessed_is_told_and_what_is_said_is_not(tmp_path: Path) -> None:
    layout = _guessed(tmp_path, "Ward list\n\nid;größe;y\n1;1.234,5;0\n2;3,5;1\n\nTotal 2\n")
    assert layout == TextLayout(";", ",", ".", "cp1252", 2, 1, layout.guessed)

    assert set(layout.guessed) == {
        "separator",
        "decimal",
        "thousands",
        "encoding",
        "skip",
        "footer",
    }
    assert "'1.234,5' in t.csv, column 'größe', row 4" in layout.guessed["thousands"]
    said = {
        "separator": ";",
        "decimal": ",",
        "thousands": ".",
        "encoding": "cp1252",
        "skip": 2,
        "footer": 1,
    }
    assert (
        _guessed(
            tmp_path, "Ward list\n\nid;größe;y\n1;1.234,5;0\n2;3,5;1\n\nTotal 2\n", **said
        ).guessed
        == {}
    )
    assert _guessed(tmp_path, "id,a\n1,0.5\n").guessed.keys() == {"separator"}


def test_row_numbers_are_lines_of_the_file_below_titles(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("Ward list\n\nid;a;y\n1;1,5;0\n\n2;3,5;1\n")
    assert read(tmp_path / "t.csv", DATA, private=False).frame.index.tolist() == [4, 6]
    said = replace(DATA, format=Format(skip=2, decimal=","))
    assert read(tmp_path / "t.csv", said, private=True).frame.index.tolist() == [4, 6]


@pytest.mark.parametrize(
    ("cells", "decimal", "thousands"),
    [
        ([["1,5"], ["1234"]], ",", "none"),
        ([["1,234"], ["0,5"]], ",", "none"),  # one convention for the file
        ([["1.234"], ["0,5"]], ",", "."),
        ([["1,234"], ["0.5"]], ".", ","),
        ([["1.234.567"], ["12"]], ",", "."),
        ([["1,234,567"], ["12"]], ".", ","),
        ([["1 234"], ["12"]], ".", " "),
        ([["1'234,5"], ["12"]], ",", "'"),
        ([["-1,5e3"], ["12"]], ",", "none"),
        ([["12"], ["13"]], ".", "none"),
        ([["A,1"], ["B,2"]], ".", "none"),  # texts
        ([["31.12.2024"], ["01.01.2024"]], ".", "none"),  # dates
    ],
)
def test_cells_decide_how_numbers_are_spelt(
    tmp_path: Path, cells: list[list[str]], decimal: str, thousands: str
) -> None:
    (tmp_path / "t.csv").write_text(text([["a", "b"], *([cell[0], "x"] for cell in cells)], ";"))
    layout = read(tmp_path / "t.csv", DATA, private=False).layouts["t.csv"]
    assert (layout.decimal, layout.thousands) == (decimal, thousands)


@pytest.mark.parametrize("cell", ["1,234", "1.234", "-999,000"])
def test_what_no_cell_decides_is_asked_for(tmp_path: Path, cell: str) -> None:
    (tmp_path / "t.csv").write_text(f"a;b\n{cell};x\n5;y\n")
    with pytest.raises(
        DataError,
        match=r"column 'a', row 2 may be a decimal or thousands.*\[data.format\]: decimal =",
    ):
        read(tmp_path / "t.csv", DATA, private=False)
    for decimal, value in (
        (",", cell.replace(".", "").replace(",", ".")),
        (".", cell.replace(",", "")),
    ):
        said = replace(DATA, format=Format(decimal=decimal))  # type: ignore[arg-type]
        assert read(tmp_path / "t.csv", said, private=False).frame["a"].tolist()[0] == value


def test_points_in_a_comma_table_are_decimals(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b\n1.234,x\n5,y\n")
    assert read(tmp_path / "t.csv", DATA, private=False).frame["a"].tolist() == ["1.234", "5"]


def test_ids_and_sites_are_never_spelt_anew(tmp_path: Path) -> None:
    content = "subject;hospital;a\n1,5;1.000;1,5\n00017;2.000;2,5\n"
    (tmp_path / "t.csv").write_text(content)
    for private, format in ((False, Format()), (True, Format(decimal=",", thousands="."))):
        frame = read(tmp_path / "t.csv", replace(DATA, format=format), private).frame
        assert frame.to_numpy().tolist() == [["1,5", "1.000", "1.5"], ["00017", "2.000", "2.5"]]


def test_files_of_a_study_decide_together(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a;b\n1,234;x\n5;y\n")
    (tmp_path / "b.csv").write_text("a;b\n0,5;x\n5;y\n")
    frame = read(tmp_path, DATA, private=False).frame
    assert frame["a"].tolist() == ["1.234", "5", "0.5", "5"]
    assert frame.index.tolist() == ["a.csv:2", "a.csv:3", "b.csv:2", "b.csv:3"]
    (tmp_path / "b.csv").write_text("a;b\n0.5;x\n5;y\n")
    assert read(tmp_path, DATA, private=False).frame["a"].tolist() == ["1234", "5", "0.5", "5"]
    (tmp_path / "a.csv").write_text("a;b\n1,5;x\n5;y\n")
    with pytest.raises(
        DataError, match=r"'1,5' in a\.csv, column 'a', row 2; '0\.5' in b\.csv, column 'a', row 2"
    ):
        read(tmp_path, DATA, private=False)


def test_encodings_of_a_study_that_differ_name_both_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes("a,b\nä,x\n".encode("cp1252"))
    (tmp_path / "b.csv").write_bytes(b"a,b\ny,x\n")
    assert len(read(tmp_path, DATA, private=False).frame) == 2  # ASCII is both
    (tmp_path / "b.csv").write_bytes("a,b\nä,x\n".encode())
    with pytest.raises(DataError, match=r"encoding: a\.csv seems to have 'cp1252', b\.csv 'utf-8'"):
        read(tmp_path, DATA, private=False)


def test_an_encoding_is_found_behind_the_first_megabyte(tmp_path: Path) -> None:
    rows = ["a,b", *(f"x,{i}" for i in range(200_000)), "ä,1"]
    (tmp_path / "t.csv").write_bytes("\n".join(rows).encode("cp1252"))
    found = read(tmp_path / "t.csv", DATA, private=False)
    assert found.frame["a"].iloc[-1] == "ä" and "encoding" in found.layouts["t.csv"].guessed
    (tmp_path / "t.csv").write_bytes(
        "\n".join([*rows[:5], "ö,1\n"]).encode() + "ä,1".encode("cp1252")
    )
    with pytest.raises(DataError, match="UTF-8 in some lines and not in others"):
        read(tmp_path / "t.csv", DATA, private=False)


# under a claim the header alone decides -----------------------------------------------------------

LINE = st.one_of(
    st.sampled_from(
        ['"', "1,5", "1.5", "1;2;3", "a|b|c|d", "\t\t", "p1,5;x;1", "ä;ö;ü", "\ufeff", "'"]
    ),
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=("Cs",)), max_size=12),
)


@given(
    st.lists(LINE, max_size=4),
    st.lists(LINE, max_size=4),
    st.sampled_from(SEPARATORS),
    st.sampled_from([*ENCODINGS]),
)
def test_no_record_changes_how_a_claimed_table_is_read(
    tmp_path_factory: pytest.TempPathFactory,
    one: list[str],
    other: list[str],
    separator: str,
    encoding: str,
) -> None:
    folder = tmp_path_factory.mktemp("t")
    layouts = []
    for name, rows in (("a.csv", one), ("b.csv", other)):
        content = "\n".join([separator.join(("größe", "b", "y")), *rows]) + "\n"
        (folder / name).write_bytes(content.encode(encoding, "replace"))
        layouts.append(of_header(folder / name, Format(decimal="."), "t")[0])
    assert layouts[0] == layouts[1] and layouts[0].separator == separator


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 4), LINE), max_size=4),
    st.sampled_from(SEPARATORS),
    st.sampled_from([*ENCODINGS]),
)
def test_no_line_changes_another_in_any_form(
    tmp_path_factory: pytest.TempPathFactory,
    odd: list[tuple[int, str]],
    separator: str,
    encoding: str,
) -> None:
    """The law of `line_reader`, for every separator and encoding."""
    sound = [
        separator.join(cells)
        for cells in (("p1", "Süd", "1,5"), ("p2", "Süd", "2"), ("p3", "x", "1.000,5"))
    ]
    if separator == ",":
        sound = [
            separator.join(cells)
            for cells in (("p1", "Süd", '"1,5"'), ("p2", "Süd", "2"), ("p3", "x", "7"))
        ]

    rows = list(sound)
    for place, line in odd:
        rows.insert(place, line)
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_bytes(
        "\n".join([separator.join(("größe", "place", "n")), *rows]).encode(encoding, "replace")
    )
    frame, broken = line_reader.read(path, Format(decimal=","))
    numbers = [2 + i for i, row in enumerate(rows) if row in sound]
    expected = [next(csv.reader([row], delimiter=separator)) for row in rows if row in sound]
    assert frame.loc[numbers].to_numpy().tolist() == expected
    assert not set(broken) & set(numbers)


def test_a_separator_that_goes_with_decimal_commas_asks_for_the_sign(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a;b\n1,5;secret\n")
    with pytest.raises(
        DataError, match=r"under a claim no cell is looked at to see.*decimal = \",\" or"
    ) as caught:
        read(tmp_path / "t.csv", DATA, private=True)
    assert "secret" not in str(caught.value) and "1,5" not in str(caught.value)


def test_the_header_alone_is_read_as_with_its_rows(tmp_path: Path) -> None:
    for name, content in (
        ("t.csv", "Titel\n\na;größe;b\n1;2;3\n4;5;6\n"),
        ("t.tsv", "a\tgröße\tb\n1\t2\t3\n"),
    ):
        (tmp_path / name).write_bytes(content.encode("cp1252"))
        assert readers.header(tmp_path / name, DATA, private=False) == ["a", "größe", "b"]
        assert guess(tmp_path / name, Format(), "t")[1] == ["a", "größe", "b"]


def test_columns_that_a_study_leaves_out_say_nothing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a;version;y\n1,5;1.2;0\n2,5;1.3;1\n")
    with pytest.raises(DataError, match="decimal commas and decimal points"):
        read(tmp_path / "t.csv", Data(target="y"), private=False)
    frame = read(tmp_path / "t.csv", Data(target="y", features=("a",)), private=False).frame
    assert frame["a"].tolist() == ["1.5", "2.5"] and frame["version"].tolist() == ["1.2", "1.3"]
