"""TOML as people paste it: whatever a column is called, what is printed is read back as it was."""

import tomllib
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from medfed.core import toml
from medfed.core.toml import Ask

NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = (
    st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False)
    | NAMES
    | st.lists(NAMES, max_size=2)
)


@given(st.lists(NAMES, min_size=1, max_size=4))
@example(["data", "dictionary", "heart rate", "range"])
@example(["größe.1", 'a "b"', "it's", "", " = 0", "a\nb", "#"])
def test_a_key_is_read_back_whatever_its_names(names: list[str]) -> None:
    assert toml.path(toml.key(*names)) == tuple(names)


def test_names_are_quoted_where_they_must_be() -> None:
    assert toml.key("data", "dictionary", "age") == "data.dictionary.age"
    assert toml.key("data", "heart rate", "a.b", "größe") == 'data."heart rate"."a.b"."größe"'
    # no TOML
    assert toml.path("data.dictionary.heart rate.range") == (
        "data",
        "dictionary",
        "heart rate",
        "range",
    )


@given(st.lists(NAMES, min_size=1, max_size=3), st.sampled_from(["[1, 2]", "a=b", "", '"x"']))
@example(["privacy", "sizes", 'a=b "c"'], "3")
def test_a_setting_is_parted_outside_its_names(names: list[str], value: str) -> None:
    assert toml.setting(f"{toml.key(*names)}={value}") == (toml.key(*names), "=", value)
    assert toml.setting("training.rounds") == ("training.rounds", "", "")


@given(st.dictionaries(NAMES, VALUES | st.dictionaries(NAMES, VALUES, max_size=3), max_size=3))
@example({"a": {"b": {"c": {}}, "d": 1}})
def test_a_document_is_read_back(tables: dict[str, Any]) -> None:
    assert tomllib.loads("\n".join(toml.document(tables))) == tables


def test_blanks_stand_last_and_say_once_what_they_ask_for() -> None:
    blank = Ask({"range": []}, "its range\nin its unit")
    tables = {
        "data": {"b c": blank, "a": blank, "z": 1},
        "privacy": {"sizes": Ask({}, "a line a site")},
    }
    assert "\n".join(toml.document(tables, {("data", "z"): "was 2"})) == (
        "\n[data]\nz = 1  # was 2\n# FILL IN: its range\n# in its unit\n"
        '"b c" = { range = [] }\na = { range = [] }\n\n[privacy.sizes]\n# FILL IN: a line a site'
    )
