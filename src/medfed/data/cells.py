"""Numbers that cannot be what they say: beyond a declared range, or far from all others of their column."""

from collections.abc import Sequence

import numpy as np

_FAR = 1e3  # times as far from the median as any other value of the column
_FAR_OF_FEW = 1e12  # where fewer than _FEW others differ from the median
_FEW = 5
_SMALL = 64  # rows of a site on average, up to which many sites are taken as one


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
    others = np.cumsum(counts)[:-1]
    least = np.where(others >= _FEW, _FAR, _FAR_OF_FEW)
    gap = (steps[1:] / steps[:-1] >= least) & (2 * beyond[1:] < len(known))
    first = steps[1:][gap].min(initial=np.inf)
    return np.asarray(distance >= first)


def far_all(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return `far` of each site's values [n]: site k owns values ends[k] .. ends[k+1] - 1.

    Only where two neighbouring distances lie 1,000 times apart can anything be far; many small sites are looked
    through for that in one go.
    """
    found = np.zeros(len(values), dtype=bool)
    sites = len(ends) - 1
    for k in range(sites) if len(values) > _SMALL * sites else _gaps(values, ends):
        own = slice(ends[k], ends[k + 1])
        found[own] = far(values[own])
    return found


def _gaps(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Return the sites [K'] of whose distances from the median, its own from zero among them, two lie far apart."""
    sites = len(ends) - 1
    known = np.isfinite(values)
    every_N = np.repeat(np.arange(sites), np.diff(ends))
    site_N = every_N[known]
    size_K = np.bincount(site_N, minlength=sites)
    if not len(site_N):
        return np.unique(every_N[np.isinf(values)])
    ordered = values[known][np.lexsort((values[known], site_N))]
    start_K = np.cumsum(size_K) - size_K
    low, high = start_K + (size_K - 1) // 2, start_K + size_K // 2
    last = len(ordered) - 1
    with np.errstate(over="ignore", invalid="ignore"):
        median_K = (ordered[np.minimum(low, last)] + ordered[np.minimum(high, last)]) / 2
        distance_N = np.abs(values[known] - median_K[site_N])
        every = np.concatenate([distance_N, np.abs(median_K)])
        owner = np.concatenate([site_N, np.arange(sites)])
        every[every <= 1e-7 * np.abs(median_K)[owner]] = 0  # a little less than `far` takes for rounding
        order = np.lexsort((every, owner))
        every, owner = every[order], owner[order]
        gap = (every[1:] >= 0.999 * _FAR * every[:-1]) & (every[:-1] > 0) & (owner[1:] == owner[:-1])
    wild = ~np.isfinite(every[1:]) & (owner[1:] == owner[:-1])
    return np.unique(np.concatenate([owner[1:][gap | wild], every_N[np.isinf(values)]]))
