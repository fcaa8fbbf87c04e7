"""What the cells of a table's columns look like, for whoever proposes what the columns are."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from medfed.data import dates, doubts, mapping, numerals, survey_doubts
from medfed.data.raw_columns import canonical
from medfed.study import Data

MOST_LABELS = 10
"""Different cells of a column that may be labels."""

_DATE_LIKE = r"\d{1,4}[./-]\d{1,2}[./-]\d{2,4}(?:\D.*)?"
_EIGHT_DIGITS = r"\d{8}"


@dataclass(frozen=True)
class ColumnShape:
    """What a column's cells look like."""

    name: str
    known: int
    distinct: int
    numbers: float  # share of the known cells
    # in which all cells are dates; several where day and month may stand either way
    forms: tuple[str, ...]
    dated: bool  # all cells look like dates, whether or not one form reads them
    limits: tuple[str, ...]  # results beyond a detection limit, where all else are numbers
    labels: tuple[str, ...]  # the different cells, where they are few
    suffixes: tuple[str, ...]  # what stands behind the numbers, where most have something
    spelt: str  # how most of it spells numbers, where that is none that is read
    gaps: tuple[str, ...]  # words for what is missing that a study does not take for it by itself

    @property
    def words(self) -> set[str]:
        """The words of its name, and all of them as one."""
        parts = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.name).casefold())
        return {*parts, "".join(parts)}


def describe_shape(values: pd.Series) -> ColumnShape:
    """Return what the cells of a column look like, those that mean 'not measured' left out."""
    texts = canonical(values)
    known_N = ~(values.isna() | texts.isin(Data().missing_values)).to_numpy(dtype=bool)
    texts = texts[known_N]
    gaps = tuple(doubts.gap_words(texts.unique()))
    texts = texts[~texts.isin(gaps)]

    number_N = pd.to_numeric(texts, errors="coerce").notna()
    share = float(number_N.mean()) if len(texts) else 0.0
    different = [str(text) for text in texts.unique()]
    suffixes = tuple(survey_doubts.units_of(different))
    spelt = ""
    if not suffixes and share < 0.5:
        spelt = numerals.form_of(different) or ""
    if spelt:
        texts = pd.Series(numerals.set_points(list(texts), spelt), dtype=object)
        share = float(pd.to_numeric(texts, errors="coerce").notna().mean())

    dated = _is_dated(texts)
    return ColumnShape(
        name=str(values.name),
        known=len(texts),
        distinct=len(different),
        numbers=share,
        forms=tuple(dates.forms(different)) if dated else (),
        dated=dated,
        limits=_limits(different, suffixes) if share < 1 else (),
        labels=tuple(sorted(different)) if len(different) <= MOST_LABELS else (),
        suffixes=suffixes,
        spelt=spelt,
        gaps=gaps,
    )


def _is_dated(texts: pd.Series) -> bool:
    """Say whether all texts look like dates; of eight digits several have to be days."""
    if not len(texts) or not texts.iloc[0][:1].isdigit():
        return False
    if texts.str.fullmatch(_EIGHT_DIGITS).all():
        return len(texts) > 1 and bool(dates.digits(texts.astype(float).to_numpy()).all())
    return bool(
        texts.str.fullmatch(_DATE_LIKE).all() and dates.are_dates(list(texts.unique())).all()
    )


def _limits(different: Sequence[str], suffixes: Sequence[str]) -> tuple[str, ...]:
    """Return the results beyond a detection limit among a column's texts, where the others are
    several numbers.
    """
    bare = {mapping.without_suffix(text, suffixes) or "" for text in different}
    beyond = {text for text in bare if mapping.is_limit(text)}
    others = pd.to_numeric(pd.Series(sorted(bare - beyond), dtype=object), errors="coerce")
    if len(others) > 1 and bool(others.notna().all()):
        return tuple(sorted(beyond))
    return ()


def find_named(shapes: Sequence[ColumnShape], words: str) -> list[ColumnShape]:
    """Return the columns one of whose words is asked for, in the order of what is asked."""
    order = words.split()
    rank = {word: place for place, word in enumerate(order)}
    found = [
        (min(rank[w] for w in shape.words if w in rank), shape)
        for shape in shapes
        if shape.words & rank.keys()
    ]
    return [shape for _, shape in sorted(found, key=lambda pair: pair[0])]
