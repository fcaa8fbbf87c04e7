"""Numbers that cannot be what they say: beyond a declared range, or far from all others of their column."""

from collections.abc import Sequence

import numpy as np

_FAR = 1e3  # times as far from the median as any other value of the column
_FAR_OF_FEW = 1e12  # where fewer than _FEW others differ from the median
_FEW = 5


def hold(values: np.ndarray, ends: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values [n] held to [low, high], and which of them [n] lay beyond; NaN stays, no range has no end."""
    if not len(ends):
        return values, np.zeros(len(values), dtype=bool)
    low, high = ends
    return np.clip(values, low, high), (values < low) | (values > high)


def far(values: np.ndarray) -> np.ndarray:
    """Say of each value [n] whether it lies absurdly far from the others: a slip, another unit, a code for a gap.

    Far is a gap, not a tail: a value is far where it and what lies beyond it, fewer than half of all, are at least
    1,000 times as far from the median as the farthest of the rest; of fewer than five others it takes 10^12. A column
    that spans ten decades without a gap has none.
    """
    known = values[np.isfinite(values)]
    if len(known) < 3:
        return np.zeros(len(values), dtype=bool)
    median = float(np.median(known))
    with np.errstate(over="ignore"):
        distance = np.minimum(np.abs(values - median), np.finfo(np.float64).max)
    distance[distance <= 1e-6 * abs(median)] = 0  # rounding
    steps, counts = np.unique(np.append(distance[np.isfinite(distance)], abs(median)), return_counts=True)
    steps, counts = steps[steps > 0], counts[steps > 0]
    beyond = np.cumsum(counts[::-1])[::-1]  # how many lie at least that far
    first = np.inf

    for i in range(len(steps) - 1, 0, -1):
        others = int(counts[:i].sum())
        least = _FAR if others >= _FEW else _FAR_OF_FEW
        if 2 * beyond[i] >= len(known):
            break
        if steps[i] / steps[i - 1] >= least:
            first = steps[i]
    return np.asarray(distance >= first)
