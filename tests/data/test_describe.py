"""What lies at each site, as numbers, as tables and as a figure."""

import io
from typing import Any

import pytest
from rich.console import Console

from medfed.data import describe

SURVEYS: dict[str, dict[str, Any]] = {
    "a": {
        "train": 6,
        "test": 2,
        "patients": 4,
        "labels": {"no": 8},
        "missing": {"age": 0, "chol": 4},
        "texts": {},
    },
    "b": {
        "train": 6,
        "test": 2,
        "patients": 8,
        "labels": {"no": 4, "yes": 4},
        "missing": {"age": 0, "chol": 8},
        "texts": {},
    },
}


def test_skew_is_the_distance_from_the_mix_of_all() -> None:
    assert describe.skew({"a": {"n": 10}, "b": {"y": 10}}) == {"a": 0.5, "b": 0.5}
    assert describe.skew({"a": {"n": 1, "y": 3}, "b": {"n": 10, "y": 30}}) == {"a": 0.0, "b": 0.0}
    assert describe.skew({"a": {"n": 1}, "b": {"y": 99}})["a"] == pytest.approx(0.99)


def test_shares_of_missing_cells() -> None:
    found = describe.describe(SURVEYS)
    assert found["features"] == ["age", "chol"]
    assert found["sites"]["a"]["missing"] == {"age": 0, "chol": 0.5}
    assert [found["sites"][n]["missing_share"] for n in "ab"] == [0.25, 0.5]
    assert (found["sites"]["a"]["rows"], found["sites"]["a"]["patients"]) == (8, 4)
    assert found["sites"]["a"]["label_skew"] == 0.25


def test_a_regression_has_no_skew() -> None:
    found = describe.describe({name: {**s, "labels": {}} for name, s in SURVEYS.items()})
    assert found["sites"]["a"]["label_skew"] is None
    assert len(describe.figure(found, "t").data) == 2


def _shown(found: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    for table in describe.tables(found):
        console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_tell_classes_and_gaps() -> None:
    text = _shown(describe.describe(SURVEYS))
    assert "4 (50%)" in text and "missing values" in text and "100%" in text
    whole = {name: {**s, "missing": {"age": 0}} for name, s in SURVEYS.items()}
    assert "missing values" not in _shown(describe.describe(whole))


@pytest.mark.parametrize("name", ["[bold]x[/]", "[red]", "[/]", "a\\"])
def test_names_are_shown_as_they_are(name: str) -> None:
    surveys = {
        name: {**SURVEYS["a"], "labels": {name: 8}, "missing": {name: 4}, "texts": {name: ["u"]}},
        "b": SURVEYS["b"],
    }
    assert _shown(describe.describe(surveys)).count(name) >= 3


def test_the_figure_counts_every_row() -> None:
    drawn = describe.figure(describe.describe(SURVEYS), "cohort")
    assert sum(sum(trace.y) for trace in drawn.data if trace.type == "bar") == 16
    assert drawn.layout.title.text == "cohort"
