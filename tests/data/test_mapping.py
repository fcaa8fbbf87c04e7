"""Cells and rows as the study declares them: each follows from its row alone, with and without a
claim.
"""

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tables import STUDY, invented, write_study

from medfed import runs
from medfed.core.checks import DataError, MedfedError, StudyError
from medfed.core.streams import Streams
from medfed.data import describe, mapping, sources
from medfed.data.frames import number_rows
from medfed.data.tables import clean
from medfed.study import Data, Feature, Study, from_tables, load


def _map(dictionary: dict[str, Any], private: bool = False, **columns: Any) -> pd.DataFrame:
    """Map columns beside a target; rows are numbered from 2."""
    rows = len(next(iter(columns.values())))
    data = from_tables({"data": {"target": "y", "dictionary": dictionary}}).data
    frame = number_rows(pd.DataFrame({**columns, "y": ["0"] * rows}, dtype=str))
    return mapping.apply(frame, mapping.complete(data), private)


def _refusal(dictionary: dict[str, Any], **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        _map(dictionary, **columns)
    return str(caught.value)


def _cells(frame: pd.DataFrame, name: str) -> list[str | None]:
    return [None if pd.isna(cell) else cell for cell in frame[name]]


# cells --------------------------------------------------------------------------------------------


def test_an_age_is_counted_to_a_day_or_to_another_date() -> None:
    born = {"date": "dd.mm.yyyy", "becomes": "age", "reference": "2024-07-01"}
    assert _cells(_map({"born": born}, born=["01.07.1960", "", "01.07.2000"]), "born") == [
        "64",
        None,
        "24",
    ]
    both = {"born": {**born, "reference": "admitted"}, "admitted": {"date": "iso"}}
    found = _map(both, born=["01.07.1960", "01.07.1960"], admitted=["2010-07-01", ""])
    assert _cells(found, "born") == ["50", None]
    assert _cells(found, "admitted") == ["2010-07-01", ""]  # a reference is left as it is


def test_a_stay_is_days_since_and_a_date_column_of_its_type_needs_no_form() -> None:
    data = mapping.complete(
        Data(
            target="y",
            dictionary={
                "out": Feature(date="dd.mm.yyyy", becomes="days since", reference="in"),
                "in": Feature(date="iso"),
            },
        )
    )
    frame = number_rows(
        pd.DataFrame(
            {"in": ["2024-01-30 12:00"], "out": pd.to_datetime(["2024-02-01"]), "y": ["1"]},
            dtype=None,
        )
    )
    assert _cells(mapping.apply(frame, data), "out") == ["1.5"]


@pytest.mark.parametrize(("becomes", "told"), [("year", "2024"), ("month", "12"), ("weekday", "2")])
def test_parts_of_a_date(becomes: str, told: str) -> None:
    assert _cells(
        _map({"d": {"date": "dd.mm.yyyy", "becomes": becomes}}, d=["31.12.2024"]), "d"
    ) == [told]


def test_a_date_of_another_form_is_named_with_its_fix() -> None:
    entry = {"date": "dd/mm/yyyy", "becomes": "month"}
    error = _refusal({"d": entry}, d=["03/04/2024", "12/31/2024", "soon"])
    assert "column 'd': no date of the form dd/mm/yyyy in row 3, 4." in error
    error = _refusal({"d": entry}, d=["03/04/2024", "12/31/2024"])
    assert "These are mm/dd/yyyy: declare that, data.dictionary.d.date = 'mm/dd/yyyy'" in error
    assert "four digits" in _refusal({"d": entry}, d=["03/04/24"])


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("limit", ["0.3", "100", "0.3", "5", "1.5", None]),
        ("half", ["0.15", "100", "0.15", "2.5", "1.5", None]),
    ],
)
def test_detection_limits(kind: str, told: list[str | None]) -> None:
    found = _map({"crp": {"limits": kind}}, crp=["<0.3", "> 100", "< 0,3", "≤5", "1.5", "?"])
    assert _cells(found, "crp") == told and list(found) == ["crp", "y"]


def test_an_indicator_stands_beside_the_limit_whatever_the_cells_are() -> None:
    found = _map({"crp": {"limits": "indicator", "factor": 10}}, crp=["<0.3", ">100", "7", ""])
    assert _cells(found, "crp") == ["3", "1000", "70", None]
    assert _cells(found, "crp below limit") == ["1", "0", "0", "0"]
    assert _cells(found, "crp above limit") == ["0", "1", "0", "0"]
    plain = _map({"crp": {"limits": "indicator"}}, private=True, crp=["7", "8"])
    assert _cells(plain, "crp below limit") == ["0", "0"] and "crp above limit" in plain


def test_thousands_or_a_decimal_comma_is_not_guessed() -> None:
    assert _cells(_map({"crp": {"limits": "limit"}}, crp=["<1,234", "<0,234"]), "crp") == [
        "<1,234",
        "0.234",
    ]


BOOLEANS = {
    "yes": [
        "yes",
        "Y",
        "true",
        "T",
        "1",
        "1.0",
        "ja",
        "Oui",
        "si",
        "sì",
        "sí",
        "+",
        "Positive",
        "pos",
    ],
    "no": ["no", "N", "false", "F", "0", "0.0", "nein", "non", "-", "negative", "NEG"],
}


@pytest.mark.parametrize("told", BOOLEANS)
def test_yes_and_no_in_any_spelling(told: str) -> None:
    texts = BOOLEANS[told]
    assert _cells(_map({"b": {"boolean": True}}, b=texts), "b") == [told] * len(texts)


def test_minus_is_no_where_it_elsewhere_means_missing() -> None:
    data = Data(target="y", missing_values=("", "-"), dictionary={"b": Feature(boolean=True)})
    frame = number_rows(pd.DataFrame({"b": ["+", "-", ""], "y": ["0", "1", "0"]}, dtype=str))
    assert _cells(mapping.apply(frame, mapping.complete(data)), "b") == ["yes", "no", None]
    own = Data(target="y", dictionary={"b": Feature(boolean=True, missing=("-",))})
    assert _cells(mapping.apply(frame, mapping.complete(own)), "b") == ["yes", None, None]


def test_an_x_beside_empty_cells_is_no_boolean() -> None:
    error = _refusal({"b": {"boolean": True}}, b=["x", "", "x"])
    assert (
        "column 'b': neither yes nor no in row 2, 4. Correct the cells, or say what they mean: "
        in error
    )
    assert "data.dictionary.b.recode" in error


def test_without_a_declaration_texts_stay() -> None:
    assert _cells(_map({}, b=["Yes", "no", "1"]), "b") == ["Yes", "no", "1"]


def test_recoding_compares_as_cells_are_written() -> None:
    recode = {"Yes": "yes", "1": "yes", "0.0": "no", "unknown": ""}
    found = _map({"b": {"recode": recode}}, b=[" Yes", "1.0", "0", "no", "unknown"])
    assert _cells(found, "b") == ["yes", "yes", "no", "no", None]


def test_a_unit_is_converted_and_what_means_missing_is_not() -> None:
    found = _map({"k": {"factor": 88.42, "missing": ["-9"]}}, k=["1", "-9", "2.5", "high"])
    assert _cells(found, "k") == ["88.42", None, str(2.5 * 88.42), "high"]


def test_a_converted_number_is_never_taken_for_a_code() -> None:
    """32 degrees Fahrenheit are 0 degrees Celsius, and 0 may mean that nobody measured."""
    study = from_tables(
        {
            "data": {
                "target": "y",
                "table": "t.csv",
                "dictionary": {"t": {"factor": 0.5, "offset": -16, "missing": ["0"]}},
            }
        }
    )
    frame = number_rows(
        pd.DataFrame({"t": ["32", "0", "40", "50"], "y": ["0", "1", "0", "1"]}, dtype=str)
    )
    table = clean("a", mapping.apply(frame, study.data), study.data, Streams(1))
    assert np.array_equal(table.numbers["t"], [0.0, np.nan, 4.0, 9.0], equal_nan=True)


def test_faults_of_all_columns_are_told_at_once_with_their_sites() -> None:
    data = mapping.complete(
        Data(target="y", dictionary={"a": Feature(boolean=True), "b": Feature(boolean=True)})
    )
    frame = number_rows(
        pd.DataFrame({"a": ["1", "2"], "b": ["3", "x"], "y": ["0", "1"]}, dtype=str)
    )
    with pytest.raises(DataError) as caught:
        mapping.apply(frame, data, site=pd.Series(["north", "south"], index=frame.index))
    assert "site 'south', column 'a': neither yes nor no in row 3" in str(caught.value)
    assert "column 'b' at north, south: neither yes nor no in row 2, 3" in str(caught.value)


def test_under_a_claim_a_cell_that_cannot_be_read_is_missing_and_only_the_site_knows(
    caplog: pytest.LogCaptureFixture,
) -> None:
    entries = {"b": {"boolean": True}, "d": {"date": "iso", "becomes": "year"}}
    found = _map(entries, private=True, b=["maybe", "1"], d=["2024-01-01", "soon"])
    assert _cells(found, "b") == [None, "yes"] and _cells(found, "d") == ["2024", None]
    assert "column 'b': neither yes nor no, so it counts as missing, in row 2" in caplog.text
    assert "maybe" not in caplog.text and {record.levelno for record in caplog.records} == {
        logging.WARNING
    }


OTHER = Feature(date="iso")
ENTRIES = {
    "date": {"a": Feature(date="dd.mm.yyyy", becomes="age", reference="2024-01-01")},
    "until another": {
        "a": Feature(date="dd.mm.yyyy", becomes="days until", reference="other"),
        "other": OTHER,
    },
    "limit": {"a": Feature(limits="indicator", factor=2.0, offset=-1.0)},
    "half": {"a": Feature(limits="half")},
    "boolean": {"a": Feature(boolean=True, recode={"maybe": "yes"})},
    "recode": {"a": Feature(recode={"1": "a", "ja": "", "<0.3": "b"}, missing=("?",))},
    "unit": {"a": Feature(factor=88.42, offset=0.5, missing=("1",))},
}
CELLS = st.sampled_from(
    [
        "",
        "1",
        "1.0",
        " 1 ",
        "ja",
        "maybe",
        "<0.3",
        "> 100",
        "31.12.1999",
        "01.02.2003 10:00",
        "nan",
        "1e5",
        "?",
        "-",
    ]
)


@pytest.mark.parametrize("kind", ENTRIES)
@pytest.mark.parametrize("private", [True, False])
@settings(max_examples=8)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=2, max_size=6), cut=st.integers(1, 5))
def test_a_row_is_mapped_alike_whatever_rows_stand_beside_it(
    kind: str, private: bool, rows: list[tuple[str, str]], cut: int
) -> None:
    """Also what is in doubt: without a claim the rows that an error names are those of
    its parts.
    """
    data = mapping.complete(Data(target="y", dictionary=ENTRIES[kind]))
    whole = _mapped(data, rows, private)
    assert whole == [
        row for part in (rows[:cut], rows[cut:]) if part for row in _mapped(data, part, private)
    ]


@pytest.mark.parametrize("kind", ENTRIES)
@settings(max_examples=20)
@given(
    texts=st.lists(
        st.one_of(st.text(max_size=12), CELLS, st.sampled_from(["1e308", "-1e308", "<1e999"])),
        min_size=1,
    )
)
def test_no_cell_stops_a_claim(kind: str, texts: list[str]) -> None:
    data = mapping.complete(Data(target="y", dictionary=ENTRIES[kind]))
    frame = pd.DataFrame({"a": texts, "other": texts}, dtype=object)
    found = mapping.apply(frame, data, private=True)
    assert len(found) == len(frame) and list(found) == mapping.columns(["a", "other"], data)


def _mapped(data: Data, rows: list[tuple[str, str]], private: bool) -> list[list[str | None]]:
    """Return each row as it is mapped; one in doubt is empty."""
    frame = number_rows(pd.DataFrame(rows, columns=["a", "other"], dtype=str))
    site = (
        None if private else pd.Series([str(number) for number in frame.index], index=frame.index)
    )
    try:
        mapped = mapping.apply(frame, data, private, site)
    except DataError as error:
        bad = {
            int(row)
            for text in re.findall(r"in row ([\d, ]+)", str(error))
            for row in text.split(",")
        }
        good = [row for number, row in enumerate(rows, 2) if number not in bad]
        rest = iter(_mapped(data, good, private)) if good else iter(())
        return [[] if number in bad else next(rest) for number in range(2, len(rows) + 2)]

    return [
        [None if pd.isna(cell) else cell for cell in row] for row in mapped.to_numpy(dtype=object)
    ]


# what is declared ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "told"),
    [
        ({"becomes": "age", "reference": "2024-01-01"}, "becomes='age'; expected date"),
        ({"date": "iso", "becomes": "age"}, "reference=''; expected a date, or a date column"),
        ({"date": "iso", "becomes": "month", "reference": "x"}, "reference='x'; expected none"),
        ({"factor": 0.0}, "factor=0.0; expected a finite number but 0"),
        ({"boolean": True, "limits": "half"}, "expected one of boolean, date, and limits"),
        ({"date": "dd.mm.yy"}, "date='dd.mm.yy'; expected one of"),
    ],
)
def test_entries_that_do_not_go_together_are_refused(entry: dict[str, Any], told: str) -> None:
    with pytest.raises(StudyError) as caught:
        from_tables({"data": {"dictionary": {"a": entry}}})
    assert told in str(caught.value)


def test_columns_beside_a_target_would_give_it_away() -> None:
    with pytest.raises(StudyError, match="give it away"):
        from_tables({"data": {"target": "a", "dictionary": {"a": {"limits": "indicator"}}}})


def test_completing_again_changes_nothing() -> None:
    entries = {"a": Feature(limits="indicator"), "b": Feature(boolean=True)}
    once = mapping.complete(Data(target="y", time="d", test_from="2024-01-01", dictionary=entries))
    assert mapping.complete(once) == once
    assert once.dictionary["a below limit"].range == (0.0, 1.0) and once.dictionary[
        "b"
    ].categories == ("no", "yes")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"drop": ["rows without patient"], "patient": ""}, "no data.patient names a column"),
        ({"drop": ["rows without patient"], "missing_patient": "own"}, "keep one of the two"),
        ({"test_values": ["x"]}, "no data.test, the column"),
        ({"test_from": "2024-01-01"}, "no data.time, the column"),
        (
            {"time": "admitted", "test_from": "2024-01-01", "test": "ward"},
            "both say who is held out",
        ),
        (
            {"time": "admited", "test_from": "2024-01-01"},
            "data.time='admited' is no column of the table; did you mean",
        ),
        (
            {"dictionary": {"age": {"date": "iso", "becomes": "age", "reference": "admited"}}},
            "did you mean 'admitted'",
        ),
    ],
)
def test_keys_about_rows_that_do_not_go_together_are_refused(
    tmp_path: Path, keys: dict[str, Any], told: str
) -> None:
    study = _study(tmp_path, invented(40).assign(admitted="2023-01-01"), exclude=["admitted"])
    for key, value in keys.items():
        study = study.set(f"data.{key}", value)
    with pytest.raises(MedfedError) as caught:
        runs.survey(study)
    assert told in str(caught.value)


# rows ---------------------------------------------------------------------------------------------


def _study(folder: Path, frame: pd.DataFrame, **keys: Any) -> Study:
    study = load(write_study(folder, STUDY, frame))
    for key, value in keys.items():
        study = study.set(f"data.{key}", value)
    return study


def test_rows_without_target_site_or_patient_are_left_out_and_counted(tmp_path: Path) -> None:
    frame = invented(60)
    frame.loc[3, "hospital"] = "NA"
    frame.loc[4, "died"] = ""
    frame.loc[[5, 6], "subject"] = ["?", None]
    place = frame.loc[[4, 5, 6], "hospital"].tolist()

    for what, told in (
        ("rows without target", "data.drop = ['rows without target']"),
        ("rows without site", "no site named in row 5; name it, or leave the rows out: data.drop"),
        ("rows without patient", "data.drop = ['rows without patient']"),
    ):
        every = ["rows without target", "rows without site", "rows without patient"]
        with pytest.raises(DataError) as caught:
            runs.survey(_study(tmp_path, frame, drop=[one for one in every if one != what]))
        assert told in str(caught.value)

    study = _study(tmp_path, frame, drop=every)
    frames, _ = sources.frames(study)
    assert not {5, 6, 7, 8} & set(frames.frame.index) and len(frames.frame) == 56
    counted = [(name, what, n) for name, of in frames.dropped.items() for what, n in of.items()]
    assert sum(n for _, what, n in counted if what == "rows without patient") == 2
    assert (place[0], "rows without target", 1) in counted
    shown = describe.tables(describe.describe(runs.survey(study)))[0].caption
    assert "left out by data.drop: rows without site: 1; " in str(shown) and f"{place[0]} 1" in str(
        shown
    )
    warned = runs.simulate(
        study.set("training.rounds", 1).set("training.learning_rate", 0.1)
    ).summary["warnings"]
    assert "1 rows without site left out, as data.drop says" in warned
    assert f"site {place[0]!r}: 1 rows without target left out, as data.drop says" in warned


def test_a_recoded_target_is_missing_before_rows_are_dropped(tmp_path: Path) -> None:
    frame = invented(60)
    frame.loc[frame["died"] == "no", "died"] = "No"
    frame.loc[[1, 2], "died"] = "unknown"
    study = _study(tmp_path, frame, drop=["rows without target"])
    study = study.set("data.dictionary", {"died": {"recode": {"No": "no", "unknown": ""}}})
    frames, _ = sources.frames(study)
    assert set(frames.frame["died"]) == {"no", "yes"} and len(frames.frame) == 58


def test_a_site_of_which_every_row_is_dropped_is_not_forgotten(tmp_path: Path) -> None:
    frame = invented(60)
    frame.loc[frame["hospital"] == "east", "died"] = ""
    with pytest.raises(DataError, match="site 'east' has no row"):
        runs.survey(_study(tmp_path, frame, drop=["rows without target"]))


def test_spellings_of_one_label_at_two_hospitals_are_one_label(tmp_path: Path) -> None:
    """Yes at one hospital, 1 at another: they were four classes."""
    frame = invented(60)
    for place, yes, no in (("north", "Yes", "No"), ("south", "1", "0")):
        here = frame["hospital"] == place
        frame.loc[here, "died"] = np.where(frame.loc[here, "died"] == "yes", yes, no)
    study = _study(tmp_path, frame).set("data.dictionary", {"died": {"boolean": True}})
    told = runs.survey(study)
    assert {label for one in told.values() for label in one["labels"]} == {"no", "yes"}
