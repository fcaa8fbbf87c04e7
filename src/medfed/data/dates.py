"""Dates as tables write them: the forms that a text may have,
what a declared form reads, what a date becomes.

Whether 03.04.2024 is in March or in April no text says, so a form is declared and nothing is
guessed; where several forms would read all of a column, all of them are named. A time of day may
follow any form; a zone is passed over: the date is the one that the clock on the wall showed.

n rows.
"""

import re
from collections.abc import Sequence
from functools import cache

import numpy as np
import pandas as pd

FORMS = (
    *("iso", "dd.mm.yyyy", "dd/mm/yyyy", "dd-mm-yyyy", "mm/dd/yyyy", "mm-dd-yyyy", "mm.dd.yyyy"),
    *("yyyy/mm/dd", "yyyy.mm.dd", "yyyymmdd"),
)
"""The forms that a study can declare."""

SHORT = "two-digit years"
"""In place of a form: dates whose century nobody can tell."""

_TIME = (
    r"(?:(?:T|\s+)(?P<hour>\d{1,2}):(?P<minute>\d\d)(?::(?P<second>\d\d)(?:[.,]\d+)?)?"
    r"\s*(?:Z|[+-]\d\d:?\d\d)?)?"
)
_SHORT = r"(?:\d{1,2}[./-]){2}\d\d"
_STRICT = {
    "iso": r"(?P<year>\d{4})-(?P<month>\d\d)-(?P<day>\d\d)",
    "yyyymmdd": r"(?P<year>\d{4})(?P<month>\d\d)(?P<day>\d\d)",
}
_PARTS = {"dd": r"(?P<day>\d{1,2})", "mm": r"(?P<month>\d{1,2})", "yyyy": r"(?P<year>\d{4})"}
_YEARS = (1850, 2150)  # of eight digits that are taken for a date


@cache
def _pattern(form: str) -> re.Pattern[str]:
    parts = _STRICT.get(form) or re.sub(
        "dd|mm|yyyy", lambda part: _PARTS[part[0]], form.replace(".", r"\.")
    )
    return re.compile(parts + _TIME)


def read(texts: Sequence[str | None], form: str) -> np.ndarray:
    """Return texts [n] as datetime64[s] [n]; NaT for one that is not of this form, or names a day
    that never was.
    """
    pattern = _pattern(form)
    names = ("year", "month", "day", "hour", "minute", "second")
    found = np.full((len(texts), len(names)), -1, dtype=np.int64)
    for row, text in enumerate(texts):
        if match := pattern.fullmatch(text) if text is not None else None:
            found[row] = [int(part or 0) for part in match.group(*names)]
    return _moments(*found.T)


def _moments(
    year: np.ndarray,
    month: np.ndarray,
    day: np.ndarray,
    hour: np.ndarray,
    minute: np.ndarray,
    second: np.ndarray,
) -> np.ndarray:
    """Return moments [n]; NaT where a part is out of its range."""
    month_N = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    day_N = month_N.astype("datetime64[D]") + (day - 1)
    sound = (
        (year > 0)
        & (month >= 1)
        & (month <= 12)
        & (day >= 1)
        & (day_N.astype("datetime64[M]") == month_N)
    )
    sound &= (hour < 24) & (minute < 60) & (second < 60)
    moment_N: np.ndarray = day_N.astype("datetime64[s]") + (hour * 3600 + minute * 60 + second)

    return np.where(sound, moment_N, np.datetime64("NaT"))


def write(moment_N: np.ndarray, form: str) -> list[str | None]:
    """Return moments [n] as texts of a form, None for NaT; `read` reads them back."""
    if form == "iso":
        pattern = "%Y-%m-%d"
    else:
        pattern = form.replace("dd", "%d").replace("mm", "%m").replace("yyyy", "%Y")
    told = pd.Series(moment_N)
    day = told.dt.strftime(pattern)
    timed = day + told.dt.strftime(" %H:%M:%S")
    whole = told.isna() | (told == told.dt.normalize())
    return [None if pd.isna(text) else text for text in day.where(whole, timed)]


def forms(texts: Sequence[str]) -> list[str]:
    """Return the forms that read all of these texts, the one of most digits last; [SHORT] for
    two-digit years.
    """
    if not texts:
        return []
    found = [form for form in FORMS if not np.isnat(read(texts, form)).any()]
    if not found and all(re.fullmatch(_SHORT + _TIME, text) for text in texts):
        return [SHORT]
    return found


def are_dates(texts: Sequence[str]) -> np.ndarray:
    """Say of each text [n] whether some form reads it,
    or it is a date with a year of two digits, bool [n].
    """
    found: np.ndarray = np.array(
        [bool(re.fullmatch(_SHORT + _TIME, text)) for text in texts], dtype=bool
    )
    for form in FORMS:
        found |= ~np.isnat(read(texts, form))
    return found


def digits(number_N: np.ndarray) -> np.ndarray:
    """Say of each number [n] whether it is a date of eight digits, 20240131, of a year that
    patients live in.
    """
    whole = (
        np.isfinite(number_N)
        & (number_N == np.floor(number_N))
        & (number_N >= 1e7)
        & (number_N < 1e8)
    )
    number = np.where(whole, number_N, 0).astype(np.int64)
    zero = np.zeros_like(number)
    moment_N = _moments(number // 10000, number // 100 % 100, number % 100, zero, zero, zero)
    low, high = _YEARS
    found: np.ndarray = (
        whole & ~np.isnat(moment_N) & (number // 10000 >= low) & (number // 10000 <= high)
    )
    return found


def number(moment_N: np.ndarray, becomes: str, reference_N: np.ndarray | None = None) -> np.ndarray:
    """Return what dates [n] become, float64 [n]; NaN where a date, or its reference, is NaT.

    A year of an age is from one birthday to the next, so that ages are whole on birthdays; who was
    born on 29 February has it on 1 March in other years. Days have the time of day as their
    fraction.
    """
    if reference_N is None:
        reference_N = moment_N
    gone = np.isnat(moment_N) | np.isnat(reference_N)
    moment_N = np.where(gone, np.datetime64(0, "s"), moment_N)
    other_N = np.where(gone, np.datetime64(0, "s"), reference_N)
    month_N = moment_N.astype("datetime64[M]")
    match becomes:
        case "age":
            found = _age(moment_N, other_N)
        case "days since":
            found = (moment_N - other_N).astype(np.int64) / 86400
        case "days until":
            found = (other_N - moment_N).astype(np.int64) / 86400
        case "year":
            found = month_N.astype("datetime64[Y]").astype(np.int64) + 1970
        case "month":
            found = month_N.astype(np.int64) % 12 + 1
        case _:
            # 1970 began on a Thursday
            found = (moment_N.astype("datetime64[D]").astype(np.int64) + 3) % 7 + 1
    return np.where(gone, np.nan, found.astype(np.float64))


def _age(born_N: np.ndarray, at_N: np.ndarray) -> np.ndarray:
    """Return ages in years, negative before birth."""
    day_N = born_N.astype("datetime64[D]")
    at_N = at_N.astype("datetime64[D]")
    months = at_N.astype("datetime64[M]").astype(np.int64) - day_N.astype("datetime64[M]").astype(
        np.int64
    )
    year = months // 12
    year = np.where(_birthday(day_N, year) > at_N, year - 1, year)
    year = np.where(_birthday(day_N, year + 1) <= at_N, year + 1, year)
    last = _birthday(day_N, year)
    coming = _birthday(day_N, year + 1)
    age: np.ndarray = year + (at_N - last).astype(np.int64) / (coming - last).astype(np.int64)
    return age


def _birthday(day_N: np.ndarray, year: np.ndarray) -> np.ndarray:
    """Return the day on which somebody becomes `year` [n] years old."""
    month_N = day_N.astype("datetime64[M]")
    place = (day_N - month_N.astype("datetime64[D]")).astype(np.int64)
    first = (month_N.astype(np.int64) + 12 * year).astype("datetime64[M]").astype("datetime64[D]")
    found: np.ndarray = first + place  # 29 February overflows into 1 March
    return found


def texts(values: pd.Series) -> pd.Series:
    """Return a column of moments as texts, each as its own cell says; any other column as it is.

    Written by the column, one cell with a time of day would put a time into all of them.
    """
    if not pd.api.types.is_datetime64_any_dtype(values):
        return values
    return pd.Series(write(wall_clock(values), "iso"), index=values.index, dtype=object)


def wall_clock(values: pd.Series) -> np.ndarray:
    """Return a column of dates as datetime64[s] [n], the zone left off."""
    if getattr(values.dt, "tz", None) is None:
        return values.to_numpy(dtype="datetime64[s]")
    try:
        wall_N: np.ndarray = values.dt.tz_localize(None).to_numpy(dtype="datetime64[s]")
        return wall_N
    except Exception:  # a moment at the end of time, whose zone cannot be reckoned
        return np.array(
            [_clock(values, place) for place in range(len(values))], dtype="datetime64[s]"
        )


def _clock(values: pd.Series, place: int) -> np.datetime64:
    """Return one moment without its zone; NaT where that cannot be reckoned."""
    try:
        return np.datetime64(values.iloc[place].tz_localize(None), "s")
    except Exception:
        return np.datetime64("NaT")
