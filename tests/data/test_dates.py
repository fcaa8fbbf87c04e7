"""Dates: a declared form reads its own and nothing else; ages are whole on birthdays."""

from datetime import date

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.data import dates

DAYS = st.dates(date(1, 1, 1), date(9999, 12, 31))
MODERN = st.dates(date(1900, 1, 1), date(2100, 1, 1))


@settings(max_examples=40)
@given(DAYS, st.sampled_from(dates.FORMS))
def test_what_is_written_is_read_back(day: date, form: str) -> None:
    moment = np.array([day], dtype="datetime64[s]")
    (text,) = dates.write(moment, form)
    assert dates.read([text], form) == moment and form in dates.forms([text or ""])


@pytest.mark.parametrize(
    ("text", "form", "meant"),
    [
        ("31.12.2024", "dd.mm.yyyy", "2024-12-31"),
        ("1.2.2024", "dd.mm.yyyy", "2024-02-01"),
        ("03/04/2024", "dd/mm/yyyy", "2024-04-03"),
        ("03/04/2024", "mm/dd/yyyy", "2024-03-04"),
        ("20240131", "yyyymmdd", "2024-01-31"),
        ("2024-01-31", "iso", "2024-01-31"),
        ("2024-01-31T23:59:00+01:00", "iso", "2024-01-31T23:59:00"),
        ("2024-01-31 10:30:15.25", "iso", "2024-01-31T10:30:15"),
        ("31.12.2024 07:05", "dd.mm.yyyy", "2024-12-31T07:05:00"),
        ("29.02.2000", "dd.mm.yyyy", "2000-02-29"),
    ],
)
def test_a_form_reads_its_dates(text: str, form: str, meant: str) -> None:
    assert dates.read([text], form)[0] == np.datetime64(meant)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("31.02.2024", "dd.mm.yyyy"),
        ("29.02.1900", "dd.mm.yyyy"),
        ("12/31/2024", "dd/mm/yyyy"),
        ("31.12.24", "dd.mm.yyyy"),
        ("2024-1-31", "iso"),
        ("00.01.2024", "dd.mm.yyyy"),
        ("2024-01-31 25:00", "iso"),
        ("31.12.2024 noon", "dd.mm.yyyy"),
        ("", "iso"),
        (None, "iso"),
    ],
)
def test_what_is_no_such_day_is_not_read(text: str | None, form: str) -> None:
    assert np.isnat(dates.read([text], form)[0])


def test_forms_name_all_that_would_read_a_column() -> None:
    assert dates.forms(["03/04/2024", "05/06/2024"]) == ["dd/mm/yyyy", "mm/dd/yyyy"]
    assert dates.forms(["03/04/2024", "13/06/2024"]) == ["dd/mm/yyyy"]
    assert dates.forms(["31.12.24"]) == [dates.SHORT]
    assert dates.forms(["31.12.2024", "tall"]) == []


@settings(max_examples=60)
@given(MODERN, MODERN)
def test_an_age_is_a_number_of_birthdays_and_a_part_of_a_year(born: date, at: date) -> None:
    (age,) = dates.number(*_moments(born), "age", _moments(at)[0])
    years = at.year - born.year - ((at.month, at.day) < (born.month, born.day))
    assert np.floor(age) == years
    assert age == pytest.approx((at - born).days / 365.2425, abs=0.01)


@settings(max_examples=60)
@given(MODERN, MODERN)
def test_days_and_parts_are_those_of_the_calendar(day: date, other: date) -> None:
    (moment,) = _moments(day)
    (reference,) = _moments(other)
    assert dates.number(moment, "days since", reference) == [(day - other).days]
    assert dates.number(moment, "days until", reference) == [(other - day).days]
    parts = [dates.number(moment, part)[0] for part in ("year", "month", "weekday")]
    assert parts == [day.year, day.month, day.isoweekday()]


def test_a_time_of_day_is_a_part_of_a_day_and_a_gap_stays_one() -> None:
    moment = dates.read(["2024-01-02 06:00", None], "iso")
    assert np.array_equal(
        dates.number(moment, "days since", dates.read(["2024-01-01"] * 2, "iso")),
        [1.25, np.nan],
        True,
    )
    assert np.isnan(dates.number(moment[1:], "month")[0])


def test_eight_digits_are_a_date_only_where_they_are_a_day() -> None:
    found = dates.digits(np.array([20240131, 20240231, 12345678, 1.5, np.nan, 19000101]))
    assert found.tolist() == [True, False, False, False, False, True]


def _moments(day: date) -> tuple[np.ndarray]:
    return (np.array([day], dtype="datetime64[s]"),)
