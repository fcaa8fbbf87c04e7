"""Which columns are features: by name, pattern and kind; what is left out may hold anything. Dates
are asked about.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from tests.tables import PRIVATE, STUDY, invented, write_study

from medfed import runs
from medfed.core.checks import DataError, MedfedError, PlanError
from medfed.core.streams import Streams
from medfed.data import mapping, sources
from medfed.data.features import features_of
from medfed.data.frames import number_rows
from medfed.data.headers import feature_names, refuse_misnamed
from medfed.data.site_table import SiteTable
from medfed.data.tables import clean
from medfed.planning import fix, recipe
from medfed.study import Data, Feature, load

COLUMNS = ["lab_crp", "lab_k", "note", "sex", "age", "y", "site"]
DATA = Data(target="y", site="site")


def _clean(data: Data, **columns: Any) -> SiteTable:
    rows = len(next(iter(columns.values())))
    frame = number_rows(pd.DataFrame({**columns, "y": ["0", "1"] * (rows // 2)}, dtype=str))
    return clean("St. Mary", frame, data, Streams(1))


def _refusal(data: Data, **columns: Any) -> str:
    with pytest.raises(DataError) as caught:
        _clean(data, **columns)
    return str(caught.value)


NOTE = Feature(date="iso", becomes="age", reference="age")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({}, ["lab_crp", "lab_k", "note", "sex", "age"]),
        ({"features": ("lab_*",)}, ["lab_crp", "lab_k"]),
        ({"features": ("age", "lab_?")}, ["age", "lab_k"]),
        ({"features": ("*",)}, ["lab_crp", "lab_k", "note", "sex", "age"]),
        ({"exclude": ("lab_*", "note")}, ["sex", "age"]),
        ({"features": ("lab_*", "age"), "exclude": ("*_k",)}, ["lab_crp", "age"]),
        ({"time": "age"}, ["lab_crp", "lab_k", "note", "sex"]),
        ({"dictionary": {"note": Feature(date="iso")}}, ["lab_crp", "lab_k", "sex", "age"]),
        ({"dictionary": {"note": NOTE}}, ["lab_crp", "lab_k", "note", "sex"]),
    ],
)
def test_features_are_those_that_names_and_patterns_take(
    keys: dict[str, Any], told: list[str]
) -> None:
    data = replace(DATA, **keys)
    assert features_of(COLUMNS, data) == told and not list(refuse_misnamed(COLUMNS, data))


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"features": ("labs_*",)}, "data.features[0]='labs_*' matches no column of the table; "),
        (
            {"exclude": ("notes",)},
            "data.exclude[0]='notes' matches no column of the table; did you mean 'note'?",
        ),
        ({"exclude": ("x_*",)}, "data.exclude[0]='x_*' matches no column"),
        ({"exclude": ("site",)}, "data.exclude holds 'site', which the study needs"),
        (
            {"exclude": ("age",), "features": ("age", "sex")},
            "data.exclude takes it out; keep one of the two",
        ),
        ({"exclude": ("*",)}, "no feature column"),
        (
            {"features": ("age",), "dictionary": {"age": Feature(date="iso")}},
            "set data.dictionary.age.becomes = 'age'",
        ),
    ],
)
def test_what_takes_no_column_is_refused(keys: dict[str, Any], told: str) -> None:
    texts = [str(one.error) for one in refuse_misnamed(COLUMNS, replace(DATA, **keys))]
    assert any(told in text for text in texts), texts


def test_an_excluded_column_may_hold_anything() -> None:
    notes = [f"patient says {i}" for i in range(70)]
    data = Data(
        target="y", exclude=("note", "d*"), dictionary={"died": Feature(date="iso", becomes="age")}
    )
    table = _clean(data, a=["1"] * 70, note=notes, died=["31.12.2024"] * 70)
    assert table.features() == ["a"]
    frame = pd.DataFrame({"a": ["1"], "note": ["x"], "died": ["soon"], "y": ["0"]}, dtype=str)
    assert mapping.apply(frame, data).equals(frame)


def test_kinds_take_columns_by_what_they_hold(tmp_path: Path) -> None:
    study = load(write_study(tmp_path, STUDY, invented(60)))
    assert sources.frames(study.set("data.features", ["numbers"]))[1].features == ("age", "lactate")
    assert sources.frames(study.set("data.features", ["texts", "age"]))[1].features == (
        "age",
        "ward",
    )
    result = runs.simulate(study.set("data.features", ["numbers"]).set("training.rounds", 1))
    assert [column.name for column in result.encoding.columns] == ["age", "lactate"]


def test_under_a_claim_kinds_would_follow_from_cells(tmp_path: Path) -> None:
    study = load(write_study(tmp_path, PRIVATE, invented(60)))
    with pytest.raises(
        PlanError, match=r"data.features holds 'numbers' and a privacy claim do not compose"
    ):
        runs.open_sites(study.set("data.features", ["numbers"]), None)
    # a pattern takes names of the header
    assert not recipe.examine(study.set("data.features", ["la*", "age"]))[1]


def test_a_pattern_needs_its_features_described_under_a_claim(tmp_path: Path) -> None:
    study = load(write_study(tmp_path, PRIVATE, invented(60).assign(lab_x=1.0))).set(
        "data.features", ["*"]
    )
    with pytest.raises(MedfedError, match="lab_x"):
        fix.check(tmp_path / "study.toml", ['data.features=["*"]'])
    assert not recipe.examine(study.set("data.exclude", ["lab_*"]))[1]


def test_a_refusal_of_a_wide_table_is_short() -> None:
    wide = [f"gene {i}" for i in range(4_000)]
    data = Data(
        target="outcome", features=tuple(f"gen {i}" for i in range(4_000)), exclude=("probe_*",)
    )
    with pytest.raises(DataError) as caught:
        feature_names(pd.DataFrame(columns=[*wide, "y"]), data)
    assert len(str(caught.value)) < 8_000
    assert "data.features names 4000 columns that the table lacks" in str(caught.value)


# dates and limits that nobody has declared --------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "told"),
    [
        (
            ["31.12.2024", "1.2.2024"],
            "(dd.mm.yyyy). Say what they become: data.dictionary.born.date = 'dd.mm.yyyy'",
        ),
        (
            ["03/04/2024", "05/06/2024"],
            "(dd/mm/yyyy or mm/dd/yyyy). Which of the forms it is only you know;",
        ),
        (["12/31/2024", "05/06/2024"], "(mm/dd/yyyy)"),
        (["20241231", "20240229"], "(yyyymmdd)"),
        (["2024-12-31T10:00", "2024-12-31"], "(iso)"),
        (["31.12.24", "01.02.23"], "years of two digits"),
        (["31.12.2024", "2024-12-31"], "of several forms"),
    ],
)
def test_dates_are_asked_about_with_the_lines_to_add(texts: list[str], told: str) -> None:
    error = _refusal(Data(target="y"), a=["1", "2"], born=texts)
    assert "site 'St. Mary', column 'born': dates are not features" in error and told in error
    assert 'data.exclude = ["born"]' in error


def test_numbers_of_eight_digits_that_are_declared_numbers_are_numbers() -> None:
    data = Data(target="y", dictionary={"a": Feature(range=(0, 3e7))})
    assert _clean(data, a=["20241231", "20240229"]).numbers["a"].tolist() == [20241231, 20240229]
    assert len(_clean(Data(target="y"), a=["20241231", "99999999"]).numbers["a"]) == 2


@pytest.mark.parametrize("below", [1, 3])
def test_detection_limits_are_asked_about_and_make_no_categories(below: int) -> None:
    """Where most cells lay beyond the limit, the numbers became categories."""
    cells = ["<0.3"] * below + ["0.5", "1.2", "7"][: 4 - below]
    error = _refusal(Data(target="y"), a=cells)
    assert "column 'a': results beyond a detection limit (<0.3), row 2" in error
    assert "data.dictionary.a.limits = 'limit', 'half' or 'indicator'" in error


# a run --------------------------------------------------------------------------------------------

ENTRIES = {
    "born": {"date": "dd.mm.yyyy", "becomes": "age", "reference": "admitted", "range": [0, 120]},
    "admitted": {"date": "iso"},
    "crp": {"limits": "indicator", "range": [0, 500]},
    "smoker": {"boolean": True},
}


def _rich(rows: int = 60) -> pd.DataFrame:
    rng = np.random.default_rng(1)
    frame = invented(rows)
    frame["admitted"] = "2024-05-01"
    frame["born"] = [f"{rng.integers(1, 28):02}.03.{rng.integers(1930, 2000)}" for _ in range(rows)]
    frame["crp"] = np.where(rng.random(rows) < 0.3, "<0.3", rng.integers(1, 300, rows).astype(str))
    frame["smoker"] = rng.choice(["ja", "N", "1", "false"], rows)
    return frame


@pytest.mark.parametrize("text", [STUDY, PRIVATE])
def test_a_run_has_what_is_declared_and_predicts_from_raw_rows(tmp_path: Path, text: str) -> None:
    frame = _rich()
    study = load(write_study(tmp_path, text, frame)).set("training.rounds", 1)
    for name, entry in ENTRIES.items():
        study = study.set(f"data.dictionary.{name}", entry)
    result = runs.run(study, tmp_path / "run")
    columns = {column.name: column for column in result.encoding.columns}
    assert columns.keys() >= {"born", "crp", "crp below limit", "crp above limit", "smoker"}
    assert "admitted" not in columns and columns["smoker"].categories == ("no", "yes")
    raw = frame.drop(columns=["died", "hospital"])
    told = result.predict(raw)
    mapped = raw.assign(
        smoker=raw["smoker"].map({"ja": "yes", "1": "yes", "N": "no", "false": "no"})
    )
    assert told.equals(result.predict(mapped)) and np.isfinite(told.to_numpy()).all()
    assert runs.load(tmp_path / "run").predict(raw).equals(told)
