"""Tables: understood alike in every format; what is wrong is named by site, column and row."""

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from medfed.core.checks import DataError, MedfedError, PlanError
from medfed.core.refusals import Refusal, refuse
from medfed.core.streams import Streams
from medfed.data import raw_columns
from medfed.data.frames import Frames, number_rows
from medfed.data.headers import feature_names
from medfed.data.raw_columns import canonical
from medfed.data.site_table import SiteTable
from medfed.data.tables import clean, clean_all, read
from medfed.study import Data, Feature

DATA = Data(target="y")


def _clean(data: Data = DATA, **columns: object) -> SiteTable:
    columns.setdefault("y", ["0", "1"] * (len(next(iter(columns.values()))) // 2))  # type: ignore[call-overload]
    return clean("St. Mary", number_rows(pd.DataFrame(columns)), data, Streams(1))


def _refusal(data: Data = DATA, **columns: object) -> str:
    with pytest.raises(DataError) as caught:
        _clean(data, **columns)
    return str(caught.value)


# cells --------------------------------------------------------------------------------------------


def test_text_in_a_numeric_column_is_named() -> None:
    error = _refusal(a=["1", "2", "high", "4", "5", "low"])
    assert "site 'St. Mary', column 'a': text in a numeric column, row 4, 7." in error


@pytest.mark.parametrize("value", ["inf", "-inf", "Infinity"])
def test_an_infinite_value_is_named(value: str) -> None:
    error = _refusal(a=["1", "2", "3", value])
    assert "site 'St. Mary', column 'a': infinite value in row 5" in error


@pytest.mark.parametrize("gap", ["", "?", "NA", " nan ", None])
def test_a_missing_target_is_named(gap: object) -> None:
    error = _refusal(a=["1", "2", "3"], y=["0", gap, "1"])
    assert "site 'St. Mary', target 'y': no value in row 3" in error


@pytest.mark.parametrize("text", ["tall", "inf"])
def test_a_target_that_is_no_number_is_named(text: str) -> None:
    error = _refusal(Data(target="y", task="regression"), a=["1", "2", "3"], y=["1.5", "2", text])
    assert "site 'St. Mary', target 'y': not a finite number in row 4" in error


def test_many_labels_ask_for_a_regression() -> None:
    error = _refusal(a=["1"] * 70, y=[str(i / 7) for i in range(70)])
    assert "target 'y': 70 different values; for a number set data.task='regression'" in error


def test_free_text_is_named() -> None:
    error = _refusal(a=["1"] * 70, note=[f"patient says {i}" for i in range(70)])
    assert "site 'St. Mary', column 'note': 70 different texts look like free text" in error


def test_declared_categories_are_no_free_text() -> None:
    data = replace(DATA, dictionary={"note": Feature(categories=tuple(f"t{i}" for i in range(70)))})
    assert _clean(data, note=[f"t{i}" for i in range(70)]).texts["note"].tolist() == [
        f"t{i}" for i in range(70)
    ]


@pytest.mark.parametrize("as_text", [False, True])
def test_dates_are_refused(as_text: bool) -> None:
    dates = pd.to_datetime(["2020-01-31", "2021-06-01"]).to_series(index=[0, 1])
    error = _refusal(a=["1", "2"], born=dates.astype(str) if as_text else dates)
    assert "site 'St. Mary', column 'born': dates are not features" in error


def test_refusing_gaps_names_them() -> None:
    data = replace(DATA, on_missing="refuse")
    assert "site 'St. Mary', column 'a': missing in row 3, 5;" in _refusal(
        data, a=["1", "?", "3", ""]
    )
    assert len(_clean(data, a=["1", "2", "3", "4"])) == 4


def test_refusing_gaps_refuses_unknown_categories() -> None:
    data = replace(DATA, on_missing="refuse", dictionary={"a": Feature(categories=("x", "y"))})
    assert "column 'a': missing in row 4" in _refusal(data, a=["x", "y", "z", "x"])


def test_many_rows_are_counted_not_listed() -> None:
    assert "row 2, 3, 4, 5, 6 and 5 more" in _refusal(
        replace(DATA, on_missing="refuse"), a=["?"] * 10
    )


def test_missing_tokens_of_table_and_feature() -> None:
    data = replace(DATA, missing_values=("", "-9"), dictionary={"a": Feature(missing=("0",))})
    table = _clean(data, a=["0", "0.0", "-9", "-9.0", "", "7"], b=["0"] * 6)
    assert np.isnan(table.numbers["a"]).tolist() == [True] * 5 + [False]
    assert table.numbers["b"].tolist() == [0.0] * 6


def test_one_is_one_however_it_is_written() -> None:
    assert canonical(pd.Series(["1.0", " 1", "1", "1.", "1.00 "])).tolist() == ["1"] * 5
    assert canonical(pd.Series(["1.5", "x.0", "-2.0", "10.0"])).tolist() == [
        "1.5",
        "x.0",
        "-2",
        "10",
    ]
    data = replace(DATA, dictionary={"a": Feature(categories=("0", "1"))})
    assert _clean(data, a=["1.0", " 1", "1", "0"]).texts["a"].tolist() == ["1", "1", "1", "0"]
    assert _clean(a=["1", "2"], y=["1.0", "0"]).label.tolist() == ["1", "0"]


def test_a_category_that_is_not_declared_is_missing() -> None:
    data = replace(DATA, dictionary={"a": Feature(categories=("x", "y"))})
    assert _clean(data, a=["x", "z", "y", "?"]).texts["a"].tolist() == ["x", None, "y", None]


def test_mostly_text_is_text() -> None:
    table = _clean(a=["red", "blue", "red", "2"], b=["1", "2", "3", "?"])
    assert table.features() == ["a", "b"]
    assert table.texts["a"].tolist() == ["red", "blue", "red", "2"]
    assert set(table.numbers) == {"b"}


def test_floats_are_taken_to_the_last_bit() -> None:
    values = np.random.default_rng(0).normal(size=400) * 10.0 ** np.random.default_rng(1).integers(
        -300, 300, 400
    )
    assert _clean(a=values, y=["0", "1"] * 200).numbers["a"].tolist() == values.tolist()


# under a claim: the dictionary decides, and no row stops anything ---------------------------------

DECLARED = Data(
    target="y",
    preprocess="dictionary",
    dictionary={
        "a": Feature(range=(0, 10)),
        "w": Feature(categories=("x", "z")),
        "y": Feature(categories=("0", "1")),
    },
)


def _private(data: Data = DECLARED, **columns: object) -> SiteTable:
    return clean("St. Mary", number_rows(pd.DataFrame(columns)), data, Streams(1), private=True)


def test_a_bad_cell_is_missing_and_the_own_log_names_its_row(
    caplog: pytest.LogCaptureFixture,
) -> None:
    table = _private(
        a=["3", "high", "inf", "1e30", "2020-01-31"], w=["x", "5", "q", "", "z"], y=list("01010")
    )
    assert np.array_equal(table.numbers["a"], [3, np.nan, np.nan, 10, np.nan], equal_nan=True)
    assert table.texts["w"].tolist() == ["x", None, None, None, "z"]
    assert (
        "column 'a': no finite number where one is declared, so it counts as missing, in row 3, "
        "4, 6"
    ) in caplog.text
    assert "column 'w': no declared category, so it counts as missing, in row 3, 4" in caplog.text
    assert "column 'a': held to its declared range in row 5" in caplog.text
    assert not any(word in caplog.text for word in ("high", "1e30", "2020", "q"))


@pytest.mark.parametrize("cells", [["red", "blue", "2"], ["1", "2", "red"], ["1", "2", "3"]])
def test_what_a_column_is_does_not_follow_its_cells(cells: list[str]) -> None:
    table = _private(a=cells, w=cells, y=["0", "1", "0"])
    assert list(table.numbers) == ["a"] and list(table.texts) == ["w"]


def test_a_column_that_the_dictionary_does_not_describe_is_refused_by_name() -> None:
    for kind in ("dictionary", "none"):
        with pytest.raises(
            PlanError, match=r"the feature 'note' without a public range or categories"
        ):
            _private(replace(DECLARED, preprocess=kind), a=["1"], w=["x"], note=["7"], y=["0"])  # type: ignore[arg-type]


def test_records_without_a_declared_label_take_no_part() -> None:
    table = _private(a=["1"] * 5, w=["x"] * 5, y=["0", "perhaps", "", "1", None])
    assert table.taking_part().tolist() == [True, False, False, True, False]
    assert table.keep_taking_part().label.tolist() == ["0", "1"] and set(table.label) == {"0", "1"}


def test_numbers_that_are_predicted_are_held_in_training_and_in_tests() -> None:
    data = replace(
        DECLARED, task="regression", dictionary={**DECLARED.dictionary, "y": Feature(range=(-1, 1))}
    )
    table = _private(data, a=["1"] * 4, w=["x"] * 4, y=["1e30", "-7", "0.5", "tall"])
    assert table.label.tolist()[:3] == [1, -1, 0.5] and table.taking_part().tolist() == [
        True,
        True,
        True,
        False,
    ]
    plain = clean(
        "s",
        number_rows(pd.DataFrame({"a": [1, 2], "w": ["x", "z"], "y": [1e30, 0]})),
        data,
        Streams(1),
    )
    assert plain.label.tolist() == [1e30, 0] and plain.findings.outside == {"y": [2]}

    with pytest.raises(
        PlanError, match=r"data\.task='regression' without data\.dictionary\.y\.range"
    ):
        _private(
            replace(data, dictionary={k: v for k, v in data.dictionary.items() if k != "y"}),
            a=[1],
            w=["x"],
            y=[1],
        )


def test_a_site_without_rows_is_a_site() -> None:
    table = _private(a=[], w=[], y=[])
    assert len(table) == 0 and list(table.numbers) == ["a"] and len(table.ids) == 0


def test_a_patient_without_a_clear_mark_is_trained_on() -> None:
    data = replace(DECLARED, test="set", patient="id")
    marks = ["test", "maybe", "test", "train", "test", ""]
    ids = list("abccde")
    table = _private(data, a=["1"] * 6, w=["x"] * 6, y=["0"] * 6, id=ids, set=marks)
    assert dict(zip(ids, table.test.tolist(), strict=True)) == {
        "a": True,
        "b": False,
        "c": False,
        "d": True,
        "e": False,
    }


def test_patients_are_numbered_by_name_not_by_row() -> None:
    data = replace(DATA, patient="id")
    table = _clean(data, a=["1", "2", "3", "4"], id=list("dbda"))
    assert table.ids.tolist() == ["a", "b", "d"] and table.patient.tolist() == [2, 1, 2, 0]


# columns ------------------------------------------------------------------------------------------

FRAME = pd.DataFrame(
    {"age": [1], "hospital": ["a"], "subject": ["p"], "held": ["test"], "outcome": ["0"]}
)


@pytest.mark.parametrize(
    ("change", "key", "close"),
    [
        ({"target": "outcom"}, "data.target='outcom'", "outcome"),
        ({"site": "hospitl"}, "data.site='hospitl'", "hospital"),
        ({"patient": "subjekt"}, "data.patient='subjekt'", "subject"),
        ({"test": "helt"}, "data.test='helt'", "held"),
        ({"features": ("age", "agee")}, "data.features[1]='agee'", "age"),
        ({"dictionary": {"age1": Feature()}}, "data.dictionary.age1", "age"),
    ],
)
def test_no_such_column_offers_the_nearest(change: dict[str, Any], key: str, close: str) -> None:
    with pytest.raises(DataError) as caught:
        feature_names(FRAME, replace(Data(target="outcome"), **change))
    assert key in str(caught.value) and f"did you mean {close!r}?" in str(caught.value)


def test_features_are_every_column_that_is_nothing_else() -> None:
    data = Data(target="outcome", site="hospital", patient="subject", test="held")
    assert feature_names(FRAME, data) == ["age"]
    with pytest.raises(DataError, match="the table has no feature column"):
        feature_names(FRAME.drop(columns="age"), data)


@pytest.mark.parametrize("role", ["target", "patient", "test"])
def test_a_target_is_no_feature(role: str) -> None:
    data = replace(Data(target="outcome", features=("age", "subject")), **{role: "subject"})
    with pytest.raises(DataError, match=rf"data\.features holds 'subject', which is data\.{role}"):
        feature_names(FRAME, data)


def test_no_target_lists_the_columns() -> None:
    with pytest.raises(DataError, match=r"data\.target is not set.*age, hospital"):
        feature_names(FRAME, Data())


def test_a_site_without_rows_is_refused_by_name() -> None:
    with pytest.raises(DataError, match=r"site 'St\. Mary' has no row"):
        clean("St. Mary", FRAME[:0], Data(target="outcome"), Streams(0))


# held-out rows marked by the table ----------------------------------------------------------------

MARKED = Data(target="y", test="set", patient="id")


@pytest.mark.parametrize(
    "words", [("test", "train"), ("1", "0"), ("yes", "no"), ("TRUE", " False"), ("1.0", "0.0")]
)
def test_marked_rows_are_held_out(words: tuple[str, str]) -> None:
    table = _clean(
        MARKED, a=["1", "2", "3", "4"], id=list("abcd"), set=[words[i] for i in (0, 1, 1, 0)]
    )
    assert table.test.tolist() == [True, False, False, True]


def test_a_row_marked_as_nothing_is_named() -> None:
    error = _refusal(MARKED, a=["1", "2"], id=["a", "b"], set=["test", "maybe"])
    assert "site 'St. Mary', column 'set': neither test nor train in row 3" in error


def test_a_patient_on_both_sides_is_named() -> None:
    error = _refusal(
        MARKED, a=["1"] * 4, id=["a", "b", "a", "c"], set=["test", "test", "train", "train"]
    )
    assert "site 'St. Mary', column 'set': a patient with rows on both sides in row 2, 4" in error


# files --------------------------------------------------------------------------------------------


def _mixed(rows: int = 40) -> pd.DataFrame:
    random = np.random.default_rng(3)
    frame = pd.DataFrame(
        {
            "real": random.normal(size=rows) * 1e-7,
            "whole": random.integers(0, 9, rows),
            "gaps": np.where(random.random(rows) < 0.3, np.nan, random.integers(0, 5, rows)),
            "word": pd.Series(random.choice(["a", "b", "c"], rows), dtype=object),
            "flag": random.random(rows) < 0.5,
            "y": random.integers(0, 2, rows),
        }
    )
    frame.loc[::7, "word"] = None
    return frame


def _write(frame: pd.DataFrame, path: Path) -> Path:
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False)
    return path


@pytest.mark.parametrize("split", ["patient", "stratified"])
def test_every_format_gives_the_same_table(tmp_path: Path, split: Any) -> None:
    data = Data(target="y", split=split)
    frames = [
        read(_write(_mixed(), tmp_path / name)) for name in ("t.csv", "t.csv.gz", "t.parquet")
    ]
    first, *others = (clean("s", frame, data, Streams(1)) for frame in frames)
    assert set(first.numbers) == {"real", "whole", "gaps"} and set(first.texts) == {"word", "flag"}
    assert first.numbers["real"].tolist() == _mixed()["real"].tolist()
    for other in others:
        assert other.features() == first.features()
        for name, values in first.numbers.items():
            assert np.array_equal(values, other.numbers[name], equal_nan=True)
        for name, values in first.texts.items():
            assert values.tolist() == other.texts[name].tolist()
        for field in ("label", "patient", "test"):
            assert getattr(first, field).tolist() == getattr(other, field).tolist()


def test_true_and_false_are_two_categories() -> None:
    table = _clean(
        a=[True, False, True, True], b=pd.Series([True, None, False, True], dtype="boolean")
    )
    assert table.texts["a"].tolist() == ["True", "False", "True", "True"]
    assert table.texts["b"].tolist() == ["True", None, "False", "True"]


def test_blank_lines_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,y\n1,0\n\n2,1\n,\nhigh,1\n3,0\n\n")
    frame = read(tmp_path / "t.csv")
    assert frame.index.tolist() == [2, 4, 6, 7]
    with pytest.raises(DataError, match=r"column 'a': text in a numeric column, row 6\."):
        clean("s", frame, DATA, Streams(0))


def test_row_numbers_survive_the_choice_of_a_site(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("site,a,y\nx,1,0\ny,1,0\nx,2,1\ny,bad,1\ny,3,1\n")
    frame = read(tmp_path / "t.csv")
    with pytest.raises(DataError, match=r"site 'y', column 'a': text in a numeric column, row 5\."):
        clean("y", frame[frame["site"] == "y"], replace(DATA, site="site"), Streams(0))


def _corrupt_gz(path: Path) -> None:
    content = bytearray(gzip.compress(b"a,y\n" + b"1,2\n" * 5000, mtime=0))
    content[20:30] = b"\xff" * 10
    path.write_bytes(content)


def _cut_gz(path: Path) -> None:
    content = gzip.compress(
        b"a,y\n" + bytes(np.random.default_rng(0).integers(48, 57, 5000, dtype=np.uint8))
    )
    path.write_bytes(content[: len(content) // 2])


def _cut_parquet(path: Path) -> None:
    _mixed().to_parquet(path)
    path.write_bytes(path.read_bytes()[:-10])


BAD_FILES: list[tuple[str, Callable[[Path], object], str]] = [
    ("none.csv", lambda path: None, "does not exist"),
    (
        "t.docx",
        lambda path: path.write_bytes(b"PK"),
        "expected a name that ends in .csv, .csv.gz or .parquet",
    ),
    ("t.xlsx", lambda path: path.write_bytes(b"PK"), "cannot be read"),
    ("empty.csv", lambda path: path.write_text(""), "cannot be read"),
    ("header.csv", lambda path: path.write_text("a,y\n"), "has no row beside its header"),
    ("header.parquet", lambda path: _mixed()[:0].to_parquet(path), "has no row beside its header"),
    (
        "wide.csv",
        lambda path: path.write_text("a,y\n1,0,5\n2,1,5\n"),
        "rows have more fields than the header",
    ),
    (
        "semicolons.csv",
        lambda path: path.write_text("a;y,z\n1;0,1\n"),
        "can be parted in several ways",
    ),
    ("ragged.csv", lambda path: path.write_text("a,y\n1,0\n2,1,5\n"), "cannot be read"),
    (
        "latin.csv",
        lambda path: path.write_bytes("a,y\nmęża,1\n".encode("cp1250")),
        "fit several encodings",
    ),
    ("folder.csv", lambda path: path.mkdir(), "cannot be read"),
    ("plain.csv.gz", lambda path: path.write_text("a,y\n1,0\n"), "cannot be read"),
    ("corrupt.csv.gz", _corrupt_gz, "cannot be read"),
    ("cut.csv.gz", _cut_gz, "cannot be read"),
    ("text.parquet", lambda path: path.write_text("a,y\n1,0\n"), "cannot be read"),
    ("cut.parquet", _cut_parquet, "cannot be read"),
]


@pytest.mark.parametrize(
    ("name", "make", "reason"), BAD_FILES, ids=[name for name, *_ in BAD_FILES]
)
def test_a_bad_file_is_named(
    tmp_path: Path, name: str, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / name)
    with pytest.raises(DataError) as caught:
        read(tmp_path / name)
    assert name in str(caught.value) and reason in str(caught.value)


def test_patients_in_several_spellings_are_counted_for_the_site_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = Data(target="y", patient="id")
    columns = {"a": ["1", "2", "3", "4"], "id": ["017", "17", "p", "q"], "y": ["0", "1", "0", "1"]}
    table = clean("St. Mary", number_rows(pd.DataFrame(columns)), data, Streams(1))
    assert (table.spellings, len(table.ids)) == (1, 3)
    assert (
        "'St. Mary': 1 patients are written in more than one way, taken as one person each"
        in caplog.text
    )
    assert "017" not in caplog.text
    exact = clean(
        "St. Mary", number_rows(pd.DataFrame(columns)), replace(data, identity="exact"), Streams(1)
    )
    assert (exact.spellings, len(exact.ids)) == (1, 4)
    assert "taken as several people each" in caplog.text


# many sites as one --------------------------------------------------------------------------------

CELLS = {
    "a": ["1", "2.5", "1.0", " 3", "", "?", "-7", "1e9"],
    "b": ["1", "2", "red", "blue", ""],
    "c": ["x", "y", "z", "w", ""],
    "d": ["2020-01-01", "2021-05-05", "u"],
}
IDS = ["1", "01", "1.0", "p", "P", " q", "r", "", "?"]
MANY = {
    "plain": (Data(target="y", patient="id"), False),
    "no column of patients": (
        Data(target="y", features=("a", "b", "c"), missing_values=("", "?")),
        False,
    ),
    "exact, stratified": (
        Data(target="y", patient="id", identity="exact", split="stratified"),
        False,
    ),
    "marked": (Data(target="y", patient="id", test="set", missing_patient="own"), False),
    "no gap": (Data(target="y", features=("a",), on_missing="refuse"), False),
    "a number": (Data(target="a", task="regression", features=("b",)), False),
    "private": (
        Data(
            target="y",
            patient="id",
            features=("a", "b", "c"),
            missing_patient="own",
            missing_values=("", "?"),
            dictionary={
                "a": Feature(range=(0.0, 10.0)),
                "b": Feature(range=(0.0, 5.0)),
                "c": Feature(categories=("x", "y")),
                "y": Feature(categories=("0", "1")),
            },
        ),
        True,
    ),
}
MANY["private, marked"] = (replace(MANY["private"][0], test="set"), True)


PLAIN = [
    *(
        "0",
        "-9",
        "-9.0",
        " -9.00 ",
        "-9e0",
        "17",
        "1e5",
        " 2.50",
        "-.5",
        "3.",
        "1e400",
        "inf",
        "nan",
        "NA",
        "",
        "  ",
    ),
    *("0.1", "123456789.123456789", "-0", "+9.0"),
]
ODD = ["+4", "1_000", "1,5", "0x1A", "yes", "7e", "\u0661"]
"""What only the slow way may decide."""


@pytest.mark.parametrize("seed", range(40))
def test_plain_numbers_are_read_as_the_slow_way_reads_them(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    random = np.random.default_rng(seed)
    cells = random.choice(PLAIN + ODD * (seed % 4 == 0), int(random.integers(1, 30)))
    frames = Frames.one("a", pd.DataFrame({"x": cells}, dtype=str))
    feature = Feature(missing=tuple(random.choice(["-9", "0", "9", "2.5"], 2)))
    read = raw_columns.RawColumn(frames, "x", feature, ["", "NA"], [], private=True)
    monkeypatch.setattr(raw_columns, "_read_plain_numbers", lambda *_: None)
    plain = raw_columns.RawColumn(frames, "x", feature, ["", "NA"], [], private=True)
    assert np.array_equal(read.numeric, plain.numeric, equal_nan=True) and list(read.texts) == list(
        plain.texts
    )
    assert np.array_equal(read.missing, plain.missing) and np.array_equal(
        read.not_number, plain.not_number
    )


def _sites(random: np.random.Generator, clean_cells: bool) -> Frames:
    """Return up to six sites of up to eight rows; with `clean_cells` most of them can
    be cleaned.
    """
    n = int(random.integers(1, 30))
    sites = int(random.integers(1, 7))
    cells = {name: values[: 4 if clean_cells else None] for name, values in CELLS.items()}
    columns: dict[str, Any] = {
        name: random.choice(values, n) for name, values in cells.items() if name != "d"
    }
    columns["d"] = random.choice(CELLS["d"][2:] if clean_cells else CELLS["d"], n)
    columns["id"] = random.choice(IDS[:7] if clean_cells else IDS, n)
    columns["set"] = (
        random.choice(["test", "train", "0"], n) if not clean_cells else np.repeat("train", n)
    )
    columns["y"] = random.choice(["0", "1"] if clean_cells else ["0", "1", "2", ""], n, p=None)
    names = [f"s{k}" for k in range(sites)]
    return Frames.split(number_rows(pd.DataFrame(columns)), random.choice(names, n), names)


def _told(table: SiteTable) -> dict[str, Any]:
    """Return a table in what compares by value."""
    columns = {name: values.tolist() for name, values in (table.numbers | table.texts).items()}
    rows = [table.label, table.patient, table.test, table.ids, table.taking_part()]
    kinds = (sorted(table.numbers), sorted(table.texts), [values.dtype for values in rows])
    return {"columns": str(columns), "rows": str([values.tolist() for values in rows]), "kinds": kinds,
            "found": (table.findings, table.spellings, table.left_out is None)}  # fmt: skip


@pytest.mark.parametrize("clean_cells", [True, False])
@pytest.mark.parametrize("case", MANY)
def test_sites_are_cleaned_together_as_each_alone(
    case: str, clean_cells: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The plain twin: a site after the other; what is wrong with any of them is told together."""
    data, private = MANY[case]
    ended = set()
    for seed in range(6):
        frames = _sites(np.random.default_rng(seed), clean_cells)
        caplog.clear()
        alone: Any = []
        unclean: list[Refusal] = []

        for site, frame in frames.items():
            try:
                alone.append(_told(clean(site, frame, data, Streams(1), private)))
            except MedfedError as error:
                unclean += list(error.refusals) or [Refusal(error)]

        try:
            refuse(unclean)
        except MedfedError as error:
            alone = (type(error), str(error))

        said = sorted(record.getMessage() for record in caplog.records)
        caplog.clear()
        together: Any = []

        try:
            together = [_told(table) for table in clean_all(frames, data, Streams(1), private)]
        except MedfedError as error:
            together = (type(error), str(error))

        assert together == alone, seed
        if not isinstance(alone, tuple):
            assert sorted(record.getMessage() for record in caplog.records) == said
        ended.add(type(alone))

    assert list in ended or not clean_cells


def test_the_first_of_many_sites_that_cannot_be_cleaned_is_named_with_its_rows() -> None:
    frame = number_rows(pd.DataFrame({"a": ["1"] * 4000, "y": ["0", "1"] * 2000}))
    frame.loc[[2500, 2501, 3900], "a"] = "oops"
    names = [f"clinic {k:04d}" for k in range(1000)]
    with pytest.raises(
        DataError,
        match=r"site 'clinic 0624', column 'a': text in a numeric column, row 2500, 2501\.",
    ):
        clean_all(Frames.split(frame, np.repeat(names, 4), names), DATA, Streams(1))


# the order of rows --------------------------------------------------------------------------------


@pytest.mark.parametrize("patient", ["", "who"])
@pytest.mark.parametrize("private", [False, True])
def test_the_order_of_rows_of_a_file_means_nothing(patient: str, private: bool) -> None:
    rng = np.random.default_rng(0)

    frame = pd.DataFrame(
        {
            "a": rng.integers(0, 9, 200).astype(str),
            "b": rng.choice(["x", "y", ""], 200),
            "who": rng.integers(0, 60, 200).astype(str),
            "y": rng.choice(["0", "1", "", "?"] if private else ["0", "1"], 200),
        }
    )
    described = {
        "a": Feature(range=(0, 9)),
        "b": Feature(categories=("x", "y")),
        "y": Feature(categories=("0", "1")),
    }
    data = replace(DATA, patient=patient, features=("a", "b"), dictionary=described)
    one, other = (
        clean("s", number_rows(f), data, Streams(1), private).sort_by_patient()
        for f in (frame, frame[::-1])
    )
    assert one.ids.tolist() == other.ids.tolist()
    for left, right in [(one.numbers["a"], other.numbers["a"]), (one.texts["b"], other.texts["b"])]:
        assert left.tolist() == right.tolist()
    for name in ("label", "patient", "test"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()
    assert one.taking_part().tolist() == other.taking_part().tolist()


def test_values_outside_a_range_are_refused_by_choice() -> None:
    data = replace(DATA, on_outside="refuse", dictionary={"a": Feature(range=(0, 5))})
    error = _refusal(data, a=["1", "2", "7", "4"])
    assert "site 'St. Mary', column 'a': outside the declared range [0, 5] in row 4" in error
    assert _clean(data, a=["1", "2", "3", "4"]).numbers["a"].tolist() == [1, 2, 3, 4]
