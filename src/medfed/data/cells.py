"""Numbers that cannot be what they say: beyond a declared range, far from all others of their
column, or codes.
"""

from collections.abc import Sequence

import numpy as np

_FAR = 1e3  # times as far from the median as any other value of the column
_FAR_OF_FEW = 1e12  # where fewer than _FEW others differ from the median
_FEW = 5
_SMALL = 64  # rows of a site on average, up to which many sites are taken as one


def hold(values: np.ndarray, ends: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return the values [n] held to [low, high], and which of them [n] lay beyond; NaN stays, no
    range has no end.
    """
    if not len(ends):
        return values, np.zeros(len(values), dtype=bool)
    low, high = ends
    return np.clip(values, low, high), (values < low) | (values > high)


def far(values: np.ndarray) -> np.ndarray:
    """Say of each value [n] whether it lies absurdly far from the others: a slip, another unit, a
    code for a gap.

    Far is a gap, not a tail: a value is far where it and what lies beyond it, fewer than half of
    all, are at least 1,000 times as far from the median as the farthest of the rest; of fewer than
    five others it takes 10^12. A column that spans ten decades without a gap has none.
    """
    known = values[np.isfinite(values)]
    if len(known) < 3:
        return np.zeros(len(values), dtype=bool)
    median = float(np.median(known))
    with np.errstate(over="ignore"):
        distance = np.minimum(np.abs(values - median), np.finfo(np.float64).max)
    distance[distance <= 1e-6 * abs(median)] = 0  # rounding
    steps, counts = np.unique(
        np.append(distance[np.isfinite(distance)], abs(median)), return_counts=True
    )
    steps, counts = steps[steps > 0], counts[steps > 0]
    beyond = np.cumsum(counts[::-1])[::-1]  # how many lie at least that far
    others = np.cumsum(counts)[:-1]
    least = np.where(others >= _FEW, _FAR, _FAR_OF_FEW)
    gap = (steps[1:] / steps[:-1] >= least) & (2 * beyond[1:] < len(known))
    first = steps[1:][gap].min(initial=np.inf)

    return np.asarray(distance >= first)


_WHOLE = [int(digit * places) for digit in "789" for places in range(1, 9)]
_PARTS = [
    number / 10**places
    for number in _WHOLE
    for places in (1, 2)
    if number >= 777 * 10 ** (places - 1)
]
CODES = np.array(
    sorted([-n for n in (*_WHOLE, *_PARTS)] + [n for n in (*_WHOLE, *_PARTS) if n >= 77]),
    dtype=float,
)
"""Numbers that stand for no value in many tables: -9, -99, 999, 8888, 99.9."""

OFTEN = 3  # times that a code stands in a column; fewer may be chance


def codes(values: np.ndarray, beyond: np.ndarray | None = None) -> np.ndarray:
    """Return which numbers stand for what was not measured among the values [n] of a column.

    Such a code is one of CODES, often met, and outside of all other values: below 0 where none of
    them is; else as far from them as they span, or a quarter of that where it lies beyond a
    declared range (`beyond` [n]), and no step that a long tail takes. A column of nothing but one
    such number holds it too, unless it is a small one.
    """
    known_N = np.isfinite(values)
    if (
        not known_N.any()
        or not np.isin([values[known_N].min(), values[known_N].max()], CODES).any()
    ):
        return np.array([])

    found, counts = np.unique(values[known_N & np.isin(values, CODES)], return_counts=True)
    found = found[counts >= OFTEN]
    if beyond is not None:
        outside = np.isin(found, values[beyond])
    else:
        outside = np.zeros(len(found), dtype=bool)

    while len(found):
        others = values[known_N & ~np.isin(values, found)]
        if not len(others):
            return found[(found < 0) | (found >= 777)]
        kept = np.array(
            [_is_apart(code, others, wide) for code, wide in zip(found, outside, strict=True)]
        )
        if kept.all():
            break
        found = found[kept]
        outside = outside[kept]

    return found


def _is_apart(code: float, others: np.ndarray, outside: bool) -> bool:
    """Say whether a code lies far from the other values of its column; `outside` its declared
    range, less is far.
    """
    low = float(others.min())
    high = float(others.max())
    if code < 0:
        far = 0.25 if outside else 2
        return code < low and (low >= 0 or low - code >= far * (high - low))
    far = 0.25 if outside else 1
    if low == high or code - high < far * (high - low):
        return False
    if code < 2 * high and not outside:
        return False
    middle, upper = np.quantile(others, [0.5, 0.75])
    if high <= 0 or high - middle <= _LONG * (upper - middle):
        return True
    span = np.log(high / others[others > 0].min(initial=high))
    return bool(np.log(code / high) >= 0.25 * span)


_LONG = 8  # times the upper quartile's distance from the median: a tail beyond that is a long one


def far_all(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return `far` of each site's values [n]: site k owns values ends[k] .. ends[k+1] - 1.

    Only where two neighbouring distances lie 1,000 times apart can anything be far; many small
    sites are looked through for that in one go.
    """
    found = np.zeros(len(values), dtype=bool)
    sites = len(ends) - 1
    for k in range(sites) if len(values) > _SMALL * sites else _gaps(values, ends):
        own = slice(ends[k], ends[k + 1])
        found[own] = far(values[own])
    return found


def _gaps(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the sites [K'] of whose distances from the median,
    its own from zero among them, two lie far apart.
    """
    sites = len(ends) - 1
    known = np.isfinite(values)
    every_N = np.repeat(np.arange(sites), np.diff(ends))
    site_N = every_N[known]
    size_K = np.bincount(site_N, minlength=sites)
    if not len(site_N):
        return np.unique(every_N[np.isinf(values)])
    ordered = values[known][np.lexsort((values[known], site_N))]
    start_K = np.cumsum(size_K) - size_K
    low = start_K + (size_K - 1) // 2
    high = start_K + size_K // 2
    last = len(ordered) - 1
    with np.errstate(over="ignore", invalid="ignore"):
        median_K = (ordered[np.minimum(low, last)] + ordered[np.minimum(high, last)]) / 2
        distance_N = np.abs(values[known] - median_K[site_N])
        every = np.concatenate([distance_N, np.abs(median_K)])
        owner = np.concatenate([site_N, np.arange(sites)])
        # a little less than `far` takes for rounding
        every[every <= 1e-7 * np.abs(median_K)[owner]] = 0
        order = np.lexsort((every, owner))
        every = every[order]
        owner = owner[order]
        gap = (
            (every[1:] >= 0.999 * _FAR * every[:-1]) & (every[:-1] > 0) & (owner[1:] == owner[:-1])
        )
    wild = ~np.isfinite(every[1:]) & (owner[1:] == owner[:-1])
    return np.unique(np.concatenate([owner[1:][gap | wild], every_N[np.isinf(values)]]))
