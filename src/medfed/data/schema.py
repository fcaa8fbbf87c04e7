"""New records held to what a model was trained on: a number is a number, a category one that it knows.

Without it a batch of `1,5` and `2,5` would count as missing, and `M` for `m` as a category never met.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import pandas as pd

from medfed.core.checks import DataError, some
from medfed.core.refusals import Refusal, refuse
from medfed.data.doubts import fold
from medfed.data.preprocess import Column, Encoding
from medfed.data.tables import canonical, misnamed
from medfed.study import Data, Feature

Unseen = Literal["missing", "refuse"]


def hold(frame: pd.DataFrame, encoding: Encoding, data: Data, unseen: Unseen = "missing") -> pd.DataFrame:
    """Return the records with numbers as numbers, or raise DataError for all that is not as it was in training.

    Rows are named by the frame's index. A category that no site had is missing, or refused (`unseen`); one that is
    known in another spelling is refused.
    """
    if not len(frame):
        raise DataError("the table to predict has no row; give it one record or more")
    refuse(misnamed([str(name) for name in frame.columns], data))

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
            refused += _unknown(column, text, known, unseen)
    refuse(refused)
    return held


def _no_numbers(column: Column, text: pd.Series, which: np.ndarray) -> Iterator[Refusal]:
    if not which.any():
        return
    cells = text[which]
    comma = cells.str.fullmatch(r"[+-]?\d+,\d+").all()
    hint = "decimal commas? Write points" if comma else "correct them, or leave the cells empty"
    where = f"column {column.name!r}: a number in training, and none in row {some(cells.index)} ({cells.iloc[0]!r})"
    yield Refusal(DataError(f"{where}; {hint}"))


def _unknown(column: Column, text: pd.Series, known: np.ndarray, unseen: Unseen) -> Iterator[Refusal]:
    strange = known & ~text.isin(column.categories).to_numpy(dtype=bool)
    if not strange.any():
        return
    folded = {fold(category): category for category in column.categories}
    for one, rows in text[strange].groupby(text[strange]):
        meant = folded.get(fold(str(one)))
        if meant is None and unseen == "missing":
            continue
        expected = f"write {meant!r}" if meant else f"expected one of {some(map(repr, column.categories), 10)}"
        yield Refusal(DataError(f"column {column.name!r}: {one!r} in row {some(rows.index)}; {expected}"))


def categories(encoding: Encoding) -> dict[str, Feature]:
    """Return a dictionary in which each category column has the categories that a model knows."""
    return {c.name: Feature(categories=c.categories) for c in encoding.columns if c.kind == "category"}
