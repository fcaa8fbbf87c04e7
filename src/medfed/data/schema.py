"""New records held to what a model was trained on:
a number is a number, a category one that it knows.

Without it a batch of `1,5` and `2,5` would count as missing, and `M` for `m` as a category never
met.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal
from unicodedata import normalize

import numpy as np
import pandas as pd

from medfed.core import quotes
from medfed.core.checks import DataError, closest, some
from medfed.core.refusals import Refusal, refuse
from medfed.data import mapping, units
from medfed.data.doubts import fold, quotable
from medfed.data.encoding import Column, Encoding
from medfed.data.features import limit_columns
from medfed.data.raw_columns import canonical
from medfed.study import Data, Feature

Unseen = Literal["missing", "refuse"]

_MANY = 5
"""Unknown cells of a column,
from which on most of it is a coding of its own and no single new category.
"""


def fit(frame: pd.DataFrame, encoding: Encoding, data: Data) -> tuple[pd.DataFrame, Data]:
    """Return new records under the study's names, their texts in its Unicode form, and what the
    study says of them.

    Raises DataError for every column that the model needs and the table lacks.
    """
    if not len(frame):
        raise DataError("the table to predict has no row; give it one record or more")
    needed = _needed_columns(encoding, data)
    here = {_one_form(str(name)): name for name in frame.columns}
    found = {name: name if name in frame.columns else here.get(_one_form(name)) for name in needed}
    others = [str(name) for name in frame.columns if name not in found.values()]
    refuse(_lacking(name, needed[name], others) for name, column in found.items() if column is None)
    taken = pd.DataFrame(
        {name: _texts_in_one_form(frame[column]) for name, column in found.items()}, frame.index
    )
    entries = {name: entry for name, entry in data.dictionary.items() if name in needed}
    features = tuple(column.name for column in encoding.columns)
    alone = replace(
        data, site="", patient="", test="", time="", test_from="", features=features, exclude=()
    )

    return taken, replace(alone, dictionary=entries)


def _needed_columns(encoding: Encoding, data: Data) -> dict[str, str]:
    """Return the columns that the model is given or is counted from,
    each with the one that it is for, or "".
    """
    made = {
        column: name
        for name, entry in data.dictionary.items()
        for column in limit_columns(name, entry)
    }
    needed = {made.get(column.name, column.name): "" for column in encoding.columns}
    for name in tuple(needed):
        entry = data.dictionary.get(name, Feature())
        if entry.becomes and entry.reference and mapping.moment(entry.reference) is None:
            needed.setdefault(entry.reference, name)
    return needed


def _lacking(name: str, of: str, others: Sequence[str]) -> Refusal:
    what = f"{of!r} is counted from it" if of else "the model was trained on it"
    close = closest(name, others)
    if close and units.differ(name, close):
        way = f"{close!r} is in another unit: convert it, and name it as in training"
    else:
        if close:
            way = f"did you mean {close!r}? Rename it"
        else:
            way = "give it, with empty cells where nothing was measured"
    return Refusal(DataError(f"{name!r} is no column of the table, and {what}; {way}"))


def _one_form(text: str) -> str:
    """Return a text in NFC, a Greek mu as the micro sign."""
    return normalize("NFC", text).replace("\N{GREEK SMALL LETTER MU}", "\N{MICRO SIGN}")


def _texts_in_one_form(values: pd.Series) -> pd.Series:
    if pd.api.types.is_numeric_dtype(values.dtype) or pd.api.types.is_datetime64_any_dtype(
        values.dtype
    ):
        return values
    return values.map(lambda cell: normalize("NFC", cell) if isinstance(cell, str) else cell)


def hold(
    frame: pd.DataFrame, encoding: Encoding, data: Data, unseen: Unseen = "missing"
) -> pd.DataFrame:
    """Return the records with numbers as numbers,
    or raise DataError for all that is not as it was in training.

    Rows are named by the frame's index. A category that no site had is missing, or refused
    (`unseen`); one that is known in another spelling is refused.
    """
    held = frame.copy()
    refused: list[Refusal] = []
    for column in encoding.columns:
        values = frame[column.name]
        text = canonical(values)
        absent = {*data.missing_values, *data.dictionary.get(column.name, Feature()).missing}
        known = ~(values.isna() | text.isin(absent)).to_numpy(dtype=bool)

        if column.kind == "number":
            number = pd.to_numeric(text.where(known), errors="coerce").astype(float)
            refused += _no_numbers(column, text, known & ~np.isfinite(number.to_numpy()))
            held[column.name] = number
        else:
            spelt = {_one_form(category): category for category in column.categories}
            text = pd.Series(
                [spelt.get(_one_form(str(cell)), cell) for cell in text], text.index, dtype=object
            )
            held[column.name] = values.astype(object).where(~known, text)
            refused += _refuse_unknown(column, text, known, unseen)

    refuse(refused)
    return held


def _no_numbers(column: Column, text: pd.Series, which: np.ndarray) -> Iterator[Refusal]:
    if not which.any():
        return
    cells = text[which]
    comma = cells.str.fullmatch(r"[+-]?\d+,\d+").all()
    hint = "decimal commas? Write points" if comma else "correct them, or leave the cells empty"
    where = (
        f"column {column.name!r}: a number in training, and none in row {some(cells.index)} "
        f"({cells.iloc[0]!r})"
    )
    yield Refusal(DataError(f"{where}; {hint}"))


def _refuse_unknown(
    column: Column, text: pd.Series, known: np.ndarray, unseen: Unseen
) -> Iterator[Refusal]:
    strange = known & ~text.isin(column.categories).to_numpy(dtype=bool)
    if not strange.any():
        return
    folded = {fold(category): category for category in column.categories}
    never = strange & ~text.map(fold).isin(folded).to_numpy(dtype=bool)
    cells = int(known.sum())

    if (
        unseen == "missing"
        and never.sum() * 2 > cells > 1
        and (never.sum() >= _MANY or never.sum() == cells)
    ):
        few = some(map(repr, column.categories))
        told = (
            f"column {column.name!r}: {never.sum()} of {cells} cells are none of the categories "
            f"in training ({few})"
        )
        there = quotes.there(text[never]) if quotable(column.name) else ""
        yield Refusal(
            DataError(f"{told}: another coding? Write those, or leave the cells empty{there}")
        )
        return

    for one, rows in text[strange].groupby(text[strange]):
        meant = folded.get(fold(str(one)))
        if meant is None and unseen == "missing":
            continue
        if meant:
            expected = f"write {meant!r}"
        else:
            expected = f"expected one of {some(map(repr, column.categories), 10)}"
        yield Refusal(
            DataError(f"column {column.name!r}: {one!r} in row {some(rows.index)}; {expected}")
        )


def categories(encoding: Encoding) -> dict[str, Feature]:
    """Return a dictionary in which each category column has the categories that a model knows."""
    return {
        c.name: Feature(categories=c.categories) for c in encoding.columns if c.kind == "category"
    }
