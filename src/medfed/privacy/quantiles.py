"""The range in which most of a column lies, from noised counts of its values: coarse cells first,
finer ones inside.

The first query counts by decades of either sign, as nothing is known of the column. Each later one
cuts what was found into equal cells and narrows it to the cells that hold the outer quantiles; the
last tells those quantiles. Which they are follows from the noise: the 5 % from either end where it
lets them be seen, at most the quartiles, and then the range is as much wider as it would be of a
bell-shaped column. So a range is about that of nine values of ten.

Everything here follows from noised counts and public numbers. F columns, C cells between C - 1
ascending edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

_DECADES = 10.0 ** np.arange(-9, 13)
_FIRST_EDGES = np.concatenate([-_DECADES[::-1], _DECADES])
# the outer two have no end
_FIRST_ENDS = np.concatenate([[-10 * _DECADES[-1]], _FIRST_EDGES, [10 * _DECADES[-1]]])
# of a first cell, in decades: 0 is that which holds 0
_SIZE = np.abs(np.arange(len(_FIRST_EDGES) + 1) - len(_DECADES))

INNER = 8
"""Equal cells of what was found so far; there is one more at each end, for what lies beyond."""

CELLS = (len(_FIRST_EDGES) + 1, INNER + 2, INNER + 2, INNER + 2)
"""Cells of each query. Four of few cells:
a quantile is a sum of cells, each of which has noise of its own.
"""

TIMES = len(CELLS)
"""How often counts are asked for."""

WIDEST = (float(_FIRST_EDGES[0]), float(_FIRST_EDGES[-1]))
"""The range of a column of which the noise shows nothing:
whatever may be in it is encoded as about 0.
"""

LEAST = 12.0
"""Patients, as a multiple of the noise on a cell, whose quantiles the noise lets be seen."""

_ENOUGH = LEAST / 2
"""Known values of a column, as the same multiple, from which on they are told:
fewer are known by their decades.
"""

_OUTER = 0.05
_INMOST = 0.25
_CHANCE = 0.02
"""The chance that noise alone makes any of all columns' first cells look filled."""

_CHANCE_FAR = 1e-4
"""The same of cells decades larger than those of other values:
what they widen, later cells cannot narrow again.
"""


@dataclass(frozen=True)
class Range:
    """What was found of a column. told: whether by quantiles;
    else its decades, or WIDEST where `known` is 0.
    """

    low: float
    high: float
    told: bool
    known: float  # about how many patients have a value: noised
    # a decade that holds values and stands apart from all others
    apart: tuple[float, float] | None = None
    # False where nearly all are in one cell of the last turn, or some beyond all decades
    resolved: bool = True

    @property
    def ends(self) -> tuple[float, float]:
        """The range as an encoding has it."""
        return self.low, self.high


class Search:
    """The search for F ranges at once:
    `edges` to count by, then `take` the noised counts; TIMES times.
    """

    def __init__(self, columns: int, noise_sd: float) -> None:
        """`noise_sd`: the standard deviation of the noise on each cell; 0 where there is none."""
        self.sd = noise_sd
        self.turn = 0
        self.found = [Range(*WIDEST, told=False, known=0.0)] * columns

    def edges(self) -> np.ndarray:
        """Return the edges [F, C - 1] of this turn's cells."""
        if self.turn == 0:
            return np.tile(_FIRST_EDGES, (len(self.found), 1))
        return np.stack([_cut(one.low, one.high) for one in self.found])

    def take(self, counts_FC: np.ndarray) -> None:
        """Narrow each range by this turn's noised counts."""
        edges = self.edges()
        first = self.turn == 0
        last = self.turn == TIMES - 1
        for place, (one, count_C) in enumerate(zip(self.found, counts_FC, strict=True)):
            if first:
                self.found[place] = _decades(
                    count_C, self.sd, self._bar(_CHANCE), self._bar(_CHANCE_FAR)
                )
            elif one.known > _ENOUGH * self.sd:
                self.found[place] = _narrow(one, count_C, edges[place], self.sd, last)
        self.turn += 1

    def _bar(self, chance: float) -> float:
        """Return how many patients a first cell must hold to be seen above the noise,
        but for such a chance.
        """
        return self.sd * NormalDist().inv_cdf(1 - chance / (len(self.found) * CELLS[0]))


def _decades(count_C: np.ndarray, sd: float, near: float, far: float) -> Range:
    """Return the decades that hold all but a few of the values,
    among cells that stand out of the noise.

    Those out to one decade more than is seen must hold `near`, larger ones `far`.
    """
    seen_C = count_C > near
    most = int(np.argmax(count_C))
    reach = int(_SIZE[most]) + 1
    while seen_C[reach == _SIZE].any():
        reach += 1
    count_C = np.where(seen_C & ((reach >= _SIZE) | (count_C > far)), count_C, 0.0)
    known = float(count_C.sum())
    if known <= 0:
        return Range(*WIDEST, told=False, known=0.0)

    share_C = count_C / known
    few = _level(known, sd) / 2
    sum_C = np.cumsum(share_C)
    low = int(np.argmax(sum_C > few))
    high = int(np.argmax(sum_C >= 1 - few))
    apart = next(
        (_ends(cell) for cell in (low, high) if _stands_apart(cell, most, share_C > 0.01)), None
    )
    bounded = low > 0 and high < len(count_C) - 1
    return Range(
        _ends(low)[0], _ends(high)[1], told=False, known=known, apart=apart, resolved=bounded
    )


def _ends(cell: int) -> tuple[float, float]:
    """Return the ends of a first cell."""
    return float(_FIRST_ENDS[cell]), float(_FIRST_ENDS[cell + 1])


def _stands_apart(cell: int, most: int, seen_C: np.ndarray) -> bool:
    """Say whether a cell is larger than all that is joined
    to the fullest by filled neighbours, of either sign.

    A column of which most is 0 has none: a flag is no code.
    """
    joined: set[int] = set()
    more = {most}
    while more:
        joined |= more
        more = {other for one in joined for other in _beside(one) if seen_C[other]} - joined
    alone = joined.isdisjoint({cell, *_beside(cell)})
    return bool(_SIZE[most] > 0 and alone and _SIZE[cell] > max(_SIZE[list(joined)]))


def _beside(cell: int) -> list[int]:
    """Return the first cells next to one: a decade more, one less, and of the other sign."""
    last = CELLS[0] - 1
    return [other for other in (cell - 1, cell + 1, last - cell) if 0 <= other <= last]


def _narrow(one: Range, count_C: np.ndarray, edges: np.ndarray, sd: float, last: bool) -> Range:
    """Return what is left of a range:
    between the cells of its outer quantiles, the last time between these.
    """
    level = _level(one.known, sd)
    width = float(edges[1] - edges[0])
    total = max(float(count_C.sum()), one.known / 2)
    low_cell, low = _crossing(count_C, edges, level * total)
    high_cell, high = _crossing(count_C[::-1], edges[::-1], level * total)

    if last:
        wider = (high - low) * (_bell(level) - 1) / 2
        low = low - wider
        high = high + wider
    else:
        low = max(one.low, low_cell - width / 2)
        high = min(one.high, high_cell + width / 2)

    if high - low < width:
        middle = (low + high) / 2
        low = middle - width / 2
        high = middle + width / 2

    in_one = last and _in_one_cell(count_C, one.known, sd)
    return replace(one, low=low, high=high, told=True, resolved=one.resolved and not in_one)


def _in_one_cell(count_C: np.ndarray, known: float, sd: float) -> bool:
    """Say whether nearly all values are in one cell, and no other stands out of the noise."""
    second, most = np.sort(count_C)[-2:]
    return bool(most > 0.8 * known and second < max(4 * sd, 0.05 * known))


def _crossing(count_C: np.ndarray, edges: np.ndarray, wanted: float) -> tuple[float, float]:
    """Return where the sum of cells from an end on reaches `wanted`:
    that cell's edge on this side, and the place.
    """
    sum_C = np.maximum.accumulate(np.maximum(np.cumsum(count_C), 0.0))
    cell = int(np.argmax(sum_C >= wanted)) if sum_C[-1] >= wanted else len(edges)
    if cell in (0, len(edges)):
        end = float(edges[min(cell, len(edges) - 1)])
        return end, end
    before = sum_C[cell - 1]
    at = float(edges[cell - 1])
    return at, at + float((wanted - before) / (sum_C[cell] - before) * (edges[cell] - at))


def _level(known: float, sd: float) -> float:
    """Return how far from either end the quantiles are that this noise lets be seen."""
    return min(_INMOST, max(_OUTER, 3 * sd / known))


def _bell(level: float) -> float:
    """Return how much further out a bell-shaped column's 5 % quantile is than that of `level`."""
    return NormalDist().inv_cdf(_OUTER) / NormalDist().inv_cdf(level)


def _cut(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, INNER + 1)


def count(values_F: Sequence[np.ndarray], edges: np.ndarray) -> np.ndarray:
    """Return how many values of each column lie in each cell, int64 [F, C];
    an edge belongs to the cell above.
    """
    cells = edges.shape[1] + 1
    pairs = zip(values_F, edges, strict=True)
    found = [
        np.bincount(np.searchsorted(own, values, side="right"), minlength=cells)
        for values, own in pairs
    ]
    return np.stack(found).astype(np.int64)
