"""Invented institutions: distinct, and a longer list begins with the shorter one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed import create_medical_device_names
from medfed.study import load


@given(st.integers(0, 400))
def test_names_are_distinct_and_as_many_as_asked(count: int) -> None:
    names = create_medical_device_names(count)
    assert len(names) == len(set(names)) == count
    assert all(name == name.strip() != "" for name in names)


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_longer_list_begins_with_the_shorter(few: int, more: int) -> None:
    assert create_medical_device_names(few + more)[:few] == create_medical_device_names(few)


def test_the_bundled_studies_sites_are_the_first_four() -> None:
    assert load("breast-cancer").sites.names == tuple(create_medical_device_names())


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError, match="count=-1; expected 0 or more"):
        create_medical_device_names(-1)
