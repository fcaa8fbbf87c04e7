"""What is doubtful about one site's cleaned records, found by the site itself: see `doubts`.

Few records look like anything: what could be chance once in a million tables is not doubted.

N rows.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pandas as pd

from medfed.core import quotes
from medfed.data import cells
from medfed.data.doubts import FEW, Doubt, Mend, leave_out_column, name_mend, quotable, quote_cells
from medfed.data.site_table import SiteTable
from medfed.study import Data, Feature, described

CHANCE = 1e-6
"""How often a column that knows nothing of the labels may be doubted for telling them."""

_COUNTS = re.compile(
    r"(unnamed: ?\d+|index|level_0|row|rownum|row_?number|row_?id|lfd\.? ?nr\.?|#)?"
)


def find(table: SiteTable, frame: pd.DataFrame, data: Data) -> Iterator[Doubt]:
    """Yield what is doubtful about a site's cleaned records; `frame` are their cells, its index
    their rows [rows].
    """
    for doubt in _find_each(table, frame, data):
        yield replace(
            doubt, examples=quote_cells(doubt.column, frame.loc[list(doubt.rows), doubt.column])
        )


def _find_each(table: SiteTable, frame: pd.DataFrame, data: Data) -> Iterator[Doubt]:
    row_N = frame.index.to_numpy()
    if len(table) < FEW:
        coded = {}
    else:
        coded = {doubt.column: doubt for doubt in _find_codes(table, frame, data)}

    yield from coded.values()
    yield from (doubt for doubt in _find_outside(table, data) if doubt.column not in coded)
    if len(table) < FEW:
        return

    if data.task != "regression":
        label_N = np.unique(table.label, return_inverse=True)[1]
    else:
        label_N = table.label

    for name in table.features():
        values = table.numbers.get(name)
        if not described(data.dictionary.get(name, Feature())) and (
            doubt := _doubt_identifier(name, values, row_N, data)
        ):
            yield doubt
            continue
        if doubt := _doubt_copy(name, table, label_N, row_N, data):
            yield doubt


def _find_outside(table: SiteTable, data: Data) -> Iterator[Doubt]:
    """Yield the columns of which most values lie beyond their declared range:
    another unit, a lost decimal sign.
    """
    for name, rows in table.findings.outside.items():
        values = table.numbers.get(name)
        known = len(table) if values is None else int(np.isfinite(values).sum())
        if len(rows) * 2 > known:
            low, high = data.dictionary[name].range
            text = (
                f"has {len(rows)} of {known} values outside the declared range [{low:g}, "
                f"{high:g}]: another unit?"
            )
            yield Doubt("outside-most", name, text, tuple(rows[:5]), len(rows))


def _find_codes(table: SiteTable, frame: pd.DataFrame, data: Data) -> Iterator[Doubt]:
    """Yield the columns in which a number stands for what was not measured: -999, 9999."""
    numbers = {**table.numbers, **({data.target: table.label} if data.task == "regression" else {})}
    for name, values in numbers.items():
        feature = data.dictionary.get(name, Feature())
        beyond = None
        # held to the range's ends, which a code is not
        if rows := table.findings.outside.get(name):
            beyond = frame.index.isin(rows)
            values = values.copy()
            values[beyond] = pd.to_numeric(frame.loc[beyond, name], errors="coerce")
        found = cells.codes(values, beyond)
        if not len(found):
            continue
        where = np.flatnonzero(np.isin(values, found))
        first = np.sort([np.flatnonzero(values == code)[0] for code in found])[: quotes.MOST]
        meant = {f"{code:.0f}" for code in found if code % 1 == 0}
        meant |= {str(cell).strip() for cell in frame[name].iloc[where] if float(cell) % 1}
        text = "holds what stands for no value in other tables, and far from all other values"
        text, mend = name_mend(text, name, "missing", [*feature.missing, *sorted(meant)])
        if name == data.target and mend:
            mend = {("data", "missing_values"): [*data.missing_values, *sorted(meant)]}
        yield Doubt(
            "missing-code", name, text, tuple(frame.index[first].tolist()), len(where), mend
        )


def _doubt_identifier(
    name: str, values: np.ndarray | None, row_N: np.ndarray, data: Data
) -> Doubt | None:
    """Return that a column of whole numbers counts rows, or names records."""
    if values is None or not np.isfinite(values[:FEW]).all() or (values[:FEW] % 1).any():
        return None
    if not np.isfinite(values).all() or (values % 1).any():
        return None
    leave = leave_out_column(name)
    steps = np.diff(values)
    if (steps == 1).all() or (row_N.dtype != object and (steps == np.diff(row_N)).all()):
        text = "counts the rows of the file, as an index does; it is no measurement"
        return Doubt("row-number", name, text, mend=leave)

    distinct = len(np.unique(values))
    if distinct > 0.9 * len(values) and _COUNTS.fullmatch(name.strip().casefold()):
        return Doubt(
            "row-number",
            name,
            "numbers the rows, as an index does; it is no measurement",
            mend=leave,
        )
    if quotable(name) or distinct < min(64, 0.5 * len(values)):
        return None
    text = (
        f"looks like what names patients or records: {distinct} different whole numbers in "
        f"{len(values)} rows"
    )
    names: Mend = {} if data.patient else {("data", "patient"): name}

    return Doubt("identifier", name, text, mend={**names, **leave})


def _doubt_copy(
    name: str, table: SiteTable, label_N: np.ndarray, row_N: np.ndarray, data: Data
) -> Doubt | None:
    """Return that a column, or its gaps, says what is to be predicted."""
    columns = len(table.features())
    cells = table.texts[name] if name in table.texts else table.numbers[name]
    known = ~pd.isna(cells)

    def doubt(code: str, text: str) -> Doubt:
        first = np.sort(np.unique(cells[known].astype(str), return_index=True)[1])[: quotes.MOST]
        return Doubt(
            code,
            name,
            text,
            tuple(row_N[known][first].tolist()),
            int(known.sum()),
            leave_out_column(name),
        )

    if data.task == "regression":
        if (
            name in table.numbers
            and known.sum() >= FEW
            and _is_linear(cells[known], label_N[known])
        ):
            return doubt("target-copy", f"is {data.target!r} itself, or a multiple of it")
        return None
    if not known.all() and _is_one_to_one(known, label_N) and _is_unlikely(label_N, columns):
        text = (
            f"is empty exactly where {data.target!r} is one label, and filled where it is the other"
        )
        return doubt("gaps-copy-target", f"{text}: its gaps tell the answer")
    if _decides(cells[known], label_N[known], columns):
        return doubt(
            "target-copy",
            f"says {data.target!r} in other words: each of its values goes with one label",
        )
    if (
        name in table.numbers
        and _separates(cells[known], label_N[known])
        and _is_unlikely(label_N[known], columns)
    ):
        return doubt("separates", f"alone tells the labels of {data.target!r} apart, in every row")
    return None


def _is_linear(values: np.ndarray, target: np.ndarray) -> bool:
    spread = np.ptp(values)
    if spread == 0 or np.ptp(target) == 0:
        return False
    with np.errstate(all="ignore"):
        return bool(abs(np.corrcoef(values, target)[0, 1]) > 1 - 1e-12)


def _is_unlikely(label_N: np.ndarray, columns: int) -> bool:
    """Say whether labels could hardly fall so that a
    column that knows nothing of them tells them apart.
    """
    counts = np.unique(label_N, return_counts=True)[1]
    if len(counts) < 2:
        return False
    ways = math.lgamma(counts.sum() + 1) - sum(math.lgamma(count + 1) for count in counts)
    return ways > math.log(2 * columns / CHANCE)


def _is_one_to_one(cells: np.ndarray, label_N: np.ndarray) -> bool:
    """Say whether each value goes with one label and each label with one value, of two or more.

    Hardly any column looks so in its first rows; only then all are looked at.
    """
    for some_N in (slice(_GLANCE), slice(None)):
        pairs = set(zip(cells[some_N].tolist(), label_N[some_N].tolist(), strict=True))
        values, labels = ({pair[side] for pair in pairs} for side in (0, 1))
        if not len(pairs) == len(values) == len(labels):
            return False
    return len(pairs) > 1


def _decides(cells: np.ndarray, label_N: np.ndarray, columns: int) -> bool:
    """Say whether each value goes with one label, where chance would hardly have it so.

    Of a value in s rows all have one label by a chance of the sum of the labels' shares to the
    power s.
    """
    for some_N in (slice(_GLANCE), slice(None)):
        pairs = set(zip(cells[some_N].tolist(), label_N[some_N].tolist(), strict=True))
        if len(pairs) > len({value for value, _ in pairs}):
            return False
        if len(pairs) > _MOST_VALUES:
            return False
    counts = np.unique(cells.astype(str), return_counts=True)[1]
    shares = np.unique(label_N, return_counts=True)[1] / max(1, len(label_N))
    if len(shares) < 2:
        return False
    log_chance = np.log(np.power(shares[None, :], counts[:, None]).sum(1)).sum()
    return bool(len(counts) > 1 and log_chance < math.log(CHANCE / columns))


def _separates(values: np.ndarray, label_N: np.ndarray) -> bool:
    """Say whether two labels lie on two sides of a number."""
    for some_N in (slice(_GLANCE), slice(None)):
        labels = np.unique(label_N[some_N])
        if len(labels) != 2:
            continue
        first = values[some_N][label_N[some_N] == labels[0]]
        second = values[some_N][label_N[some_N] == labels[1]]
        if not (first.max() < second.min() or second.max() < first.min()):
            return False
    return len(labels) == 2


_GLANCE = 64
_MOST_VALUES = 48  # of a column that may say a label in other words
