"""One feature column as it was read: which cells are missing, whether it is text or number, what
stands against it.

Errors name the first of the sites whose rows it holds, the column, and rows of the file.

K sites, N rows, U different texts.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from medfed.core import quotes, toml
from medfed.core.checks import DataError, some
from medfed.data import dates, doubts, numerals
from medfed.data.features import features_of
from medfed.data.frames import Frames
from medfed.study import KINDS, Data, Feature

_MOST_CATEGORIES = 64  # a text column with more is taken for free text or an identifier
_LIMIT_LIKE = r"(?:[<>]=?|=[<>]|[≤≥⩽⩾])\s*[+-]?[\d.,]+"


Notes = list[tuple[object, ...]]
"""What goes into the sites' own log once they are cleaned: a text and its words."""


def with_kinds(frame: pd.DataFrame, data: Data) -> Data:
    """Return a data table whose features name the columns that "numbers" or "texts" take, by what
    their cells hold.
    """
    columns = [str(name) for name in frame.columns]
    asked = [kind for kind in data.features if kind in KINDS and kind not in columns]
    if not asked:
        return data
    named = features_of(
        columns, replace(data, features=tuple(f for f in data.features if f not in asked) or ("",))
    )
    found = [name for name in features_of(columns, replace(data, features=())) if name not in named]
    texts = {name for name in found if _is_text(frame[name], name, data)}
    taken = [name for name in found if ("texts" if name in texts else "numbers") in asked]
    return replace(data, features=tuple(name for name in columns if name in {*named, *taken}))


def _is_text(values: pd.Series, name: str, data: Data) -> bool:
    feature = data.dictionary.get(name, Feature())
    column = RawColumn(
        Frames.one("", values.to_frame()),
        name,
        feature,
        data.missing_values,
        notes=[],
        private=True,
    )
    return bool(column.is_text()[0])


def canonical(values: pd.Series) -> pd.Series:
    """Return texts without outer blanks, whole numbers without '.0':
    so that '1.0', ' 1' and 1 are one category.
    """
    values = dates.texts(values)
    if pd.api.types.is_float_dtype(values.dtype):
        values = values + 0.0  # -0.0 is 0
    text = values.astype(str).str.strip()
    whole = text.str.fullmatch(r"[+-]?\d+\.0*")
    return text.where(~whole, text.str.replace(r"\.0*$", "", regex=True))


def _read_plain_numbers(values: pd.Series, absent: set[str]) -> tuple[pd.Series, np.ndarray] | None:
    """Return texts that are all plain numbers, or missing, as numbers, and which are missing
    [rows]; None where not.

    As `canonical` and `pandas.to_numeric` read them, in a tenth of the time.
    """
    if not isinstance(values.dtype, pd.StringDtype):
        return None
    text_N = pc.utf8_trim_whitespace(pa.array(values.array))
    gone_N = pc.or_(
        pc.is_null(text_N), pc.is_in(text_N, value_set=pa.array(sorted(absent), text_N.type))
    )

    try:
        number_N = pc.if_else(gone_N, pa.scalar(None, text_N.type), text_N).cast(pa.float64())
    except pa.ArrowInvalid:
        return None

    number = number_N.to_numpy(zero_copy_only=False)
    missing = gone_N.to_numpy(zero_copy_only=False).copy()
    codes = [float(code) for code in absent if re.fullmatch(r"[+-]?\d+", code)]
    like = np.flatnonzero(np.isin(number, codes)) if codes else np.array([], dtype=np.int64)
    if len(like):  # "-9.0" is the code "-9"
        missing[like] = canonical(values.iloc[like]).isin(absent)

    return pd.Series(np.where(missing, np.nan, number), values.index), missing


class RawColumn:
    """One feature column of several sites while it is being understood;
    an error is worded for the first of them.
    """

    def __init__(
        self,
        frames: Frames,
        name: str,
        feature: Feature,
        missing_values: Sequence[str],
        notes: Notes,
        private: bool = False,
    ) -> None:
        values = frames.frame[name]
        self.where = f"site {frames.names[0]!r}, column {name!r}"
        self.frames = frames
        self.name = name
        self.feature = feature
        self.notes = notes
        self.private = private

        if pd.api.types.is_datetime64_any_dtype(values) and not private:
            raise DataError(f"{self.where}: {self._no_dates(['iso'])}")
        self.values = values
        absent = {*missing_values, *feature.missing}
        plain = None if feature.categories else _read_plain_numbers(values, absent)
        self.numeric, self.missing = plain or self._read(absent)
        self.not_number = ~self.missing & self.numeric.isna().to_numpy()

    def _read(self, absent: set[str]) -> tuple[pd.Series, np.ndarray]:
        """Return what `_read_plain_numbers` does, of any column: what is no number is NaN."""
        missing: np.ndarray = (self.values.isna() | self.texts.isin(absent)).to_numpy(dtype=bool)
        if self.feature.categories:
            strange = ~missing & ~self.texts.isin(self.feature.categories).to_numpy(dtype=bool)
            if self.private:
                self._tell("no declared category", strange)
            missing = missing | strange
        return pd.to_numeric(self.texts.where(~missing), errors="coerce").astype(float), missing

    @cached_property
    def texts(self) -> pd.Series:
        """The cells as `canonical` has them."""
        return canonical(self.values)

    def rows(self, which: np.ndarray) -> str:
        return some(self.values.index[which])

    def _no_dates(self, forms: Sequence[str]) -> str:
        """Say that a column of dates is no feature, and the lines that make it one; `forms` would
        read all of it.
        """
        way = (
            f"{self.key('date')} = '{forms[0] if forms else 'dd.mm.yyyy'}', "
            f"{self.key('becomes')} = 'age' and "
        )
        way += f"{self.key('reference')} = '2024-12-31' (a date, or a date column)"
        leave = f"or leave it out: data.exclude = [{toml.literal(self.name)}]"
        if forms == [dates.SHORT]:
            return (
                "dates are not features, and these have years of two digits: write out the "
                f"century, {leave}"
            )
        which = f" ({' or '.join(forms)})" if forms else ", of several forms"
        say = "Which of the forms it is only you know; say" if len(forms) > 1 else "Say"
        return f"dates are not features{which}. {say} what they become: {way}; {leave}"

    def _all_dates(self) -> bool:
        """Say whether all cells of a column without a
        range are numbers of eight digits that are days.
        """
        if self.private or self.feature.range or self.feature.categories:
            return False
        number_N = self.numeric.to_numpy(dtype=np.float64)[~self.missing]
        glance = number_N[:64]  # hardly any column of numbers begins so
        return len(number_N) > 1 and bool(
            dates.digits(glance).all() and dates.digits(number_N).all()
        )

    def is_declared_text(self) -> np.ndarray:
        """Return the same of every site [K], whatever its cells are."""
        return np.full(len(self.frames), bool(self.feature.categories))

    def is_text(self) -> np.ndarray:
        """Return at which sites it is text [K]:
        where the dictionary says so, or most cells are no numbers.
        """
        if self.feature.categories or self.feature.range:
            return self.is_declared_text()
        if self._all_dates():
            raise DataError(f"{self.where}: {self._no_dates(['yyyymmdd'])}")
        worded_N = self.not_number
        if worded_N.any() and not self.private:
            worded_N = worded_N & ~self._limit_like  # a number in all but its sign
        most_K: np.ndarray = self.frames.count(worded_N) * 2 > self.frames.count(~self.missing)
        return most_K

    @cached_property
    def _limit_like(self) -> np.ndarray:
        """Which cells are results beyond a detection limit [rows]."""
        found = np.zeros(len(self.values), dtype=bool)
        code_N, texts = pd.factorize(self.texts[self.not_number].astype(object))
        found[self.not_number] = np.array(
            [bool(re.fullmatch(_LIMIT_LIKE, str(t))) for t in texts], dtype=bool
        )[code_N]
        return found

    def number(self, asked: np.ndarray) -> np.ndarray:
        """Return the column as numbers [rows]; only rows that are `asked` for must be."""
        not_number = self.not_number & asked
        infinite = np.isinf(self.numeric.to_numpy()) & asked
        if self.private:
            self._tell("no finite number where one is declared", not_number | infinite)
            return self.numeric.mask(infinite).to_numpy(dtype=np.float64)
        if not_number.any():
            raise DataError(f"{self.where}: {self._no_numbers(not_number)}")
        if infinite.any():
            raise DataError(
                f"{self.where}: infinite value in row {self.rows(infinite)}; correct or empty "
                "the cell"
            )
        return self.numeric.to_numpy(dtype=np.float64)

    def _no_numbers(self, which: np.ndarray) -> str:
        """Say what stands against a column of numbers that holds text,
        and the way out: most of it, or some cells.
        """
        declared = self.key("categories")
        rows = self.rows(which)
        if not (which & ~self._limit_like).any():
            (example,) = quotes.examples(self.texts[which][:1]) or ("<0.3",)
            return (
                f"results beyond a detection limit ({example}), row {rows}. Say what they become: "
                f"{self.key('limits')} = 'limit', 'half' or 'indicator'"
            )

        there = quotes.there(self.values[which]) if doubts.quotable(self.name) else ""
        if self.feature.range and which.sum() * 2 > (~self.missing).sum():
            if form := numerals.form_of(self.texts[which].unique()):
                return (
                    f"numbers spelt as texts, row {rows}: set {self.key('numbers')} = "
                    f"{toml.literal(form)}.{there}"
                )
            return (
                f"text in a numeric column, row {rows}: it is declared a number by "
                f"{self.key('range')}, and most of it is text. Declare {declared} in place of "
                f"the range.{there}"
            )

        return (
            f"text in a numeric column, row {rows}. Correct the rows, add the "
            f"text to data.missing_values, or declare {declared}.{there}"
        )

    def key(self, name: str) -> str:
        """Return the key of this column's entry in the dictionary."""
        return toml.key("data", "dictionary", self.name, name)

    def _tell(self, what: str, which: np.ndarray) -> None:
        """Write into the site's own log what counts as missing."""
        for k, rows in self.frames.rows(which):
            text = "site %r, column %r: %s, so it counts as missing, in row %s"
            self.notes.append((text, self.frames.names[k], self.name, what, some(rows, 50)))

    def text(self, asked: np.ndarray) -> np.ndarray:
        """Return the column as texts [rows]; only rows that are `asked` for must be."""
        known = asked & ~self.missing
        if not self.feature.categories and known.any():
            self._refuse_gap_words(known)
            code_N, found = pd.factorize(self.texts.to_numpy(dtype=object))
            dated_U = dates.are_dates([str(text) for text in found])
            of_K = self.frames.count(known)

            all_K = (self.frames.count(known & dated_U[code_N]) == of_K) & (of_K > 0)
            if all_K.any():
                here_U = np.unique(code_N[known & all_K[self.frames.site_N]])
                raise DataError(
                    f"{self.where}: {self._no_dates(dates.forms([str(found[u]) for u in here_U]))}"
                )

            most = int(count_distinct(self.frames, code_N, known).max())
            if most > _MOST_CATEGORIES:
                raise DataError(
                    f"{self.where}: {most} different texts look like free text or an identifier. "
                    f"Leave the column out of data.features, or declare {self.key('categories')}."
                )

        texts: np.ndarray = self.texts.to_numpy(dtype=object, copy=True)
        texts[self.missing] = None
        return texts

    def _refuse_gap_words(self, known: np.ndarray) -> None:
        """Raise DataError where numbers stand among nothing but words for what was not measured."""
        numbers = known & ~self.not_number
        words = self.texts[known & self.not_number].unique()
        gaps = doubts.gap_words(words)
        if numbers.any() and len(gaps) == len(words):
            raise DataError(
                f"{self.where}: numbers, and more often {some(map(repr, gaps))}, row "
                f"{self.rows(known & self.not_number)}. If that means 'not measured', set "
                f"{self.key('missing')} = {toml.literal(gaps)}."
            )


def count_distinct(frames: Frames, code_N: np.ndarray, which_N: np.ndarray) -> np.ndarray:
    """Return how many different codes each site's marked rows hold, [K]."""
    many = int(code_N.max(initial=0)) + 1
    pairs = np.unique(frames.site_N[which_N] * many + code_N[which_N])
    distinct_K: np.ndarray = np.bincount(pairs // many, minlength=len(frames))
    return distinct_K


def suggest_entry(values: pd.Series, data: Data) -> dict[str, list[Any]]:
    """Return what a public column may be declared as, read off its cells: {"range": ends} or
    {"categories": texts}.

    A range is rounded outwards to two digits of its width. Nothing for a date, a free text or a
    column without a value.
    """
    frames = Frames.one("", values.to_frame())
    column = RawColumn(
        frames, str(values.name), Feature(), data.missing_values, notes=[], private=True
    )
    if not column.is_text().any():
        known = column.number(np.ones(len(values), dtype=bool))
        known = known[np.isfinite(known)]
        if len(known):
            return {"range": _round_outwards(float(known.min()), float(known.max()))}
        return {}

    texts = sorted(column.texts[~column.missing].unique())
    if len(texts) <= _MOST_CATEGORIES:
        return {"categories": texts}
    return {}


def _round_outwards(low: float, high: float) -> list[float]:
    if low == high:
        return [low - 1, high + 1]
    step = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [
        round(math.floor(low / step) * step, digits),
        round(math.ceil(high / step) * step, digits),
    ]
