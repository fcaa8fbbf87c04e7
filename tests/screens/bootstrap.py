"""The slow reference for intervals: scipy's percentile bootstrap of the records themselves."""

import math
import warnings
from typing import Any

import numpy as np
from scipy import stats


def bootstrap(
    data: tuple[np.ndarray, ...], statistic: Any, paired: bool, resamples: int = 1000
) -> tuple[float | None, float | None]:
    """Percentile bootstrap, seeded: the same scores give the same interval. None where resamples do
    not vary.
    """
    if min(map(len, data)) < 2:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            data,
            statistic,
            n_resamples=resamples,
            paired=paired,
            vectorized=True,
            confidence_level=0.95,
            method="percentile",
            batch=max(1, 4_000_000 // sum(map(len, data))),
            rng=np.random.default_rng(0),
        ).confidence_interval

    low = float(interval.low)
    high = float(interval.high)
    return (None, None) if math.isnan(low) or low == high else (low, high)


def auroc(positive: np.ndarray, negative: np.ndarray, axis: int = -1) -> Any:
    """AUROC as Mann and Whitney's U, for many resamples at once; equal to scikit-learn's."""
    ranks = stats.rankdata(np.concatenate([positive, negative], axis), axis=axis)
    n = positive.shape[axis]
    m = negative.shape[axis]
    u = ranks[..., :n].sum(axis) - n * (n + 1) / 2
    return u / (n * m)


def f1(y: np.ndarray, hit: np.ndarray, axis: int = -1) -> Any:
    """F1, for many resamples at once; equal to scikit-learn's."""
    return 2 * (y * hit).sum(axis) / np.maximum((y + hit).sum(axis), 1)


def of(
    name: str, y: np.ndarray, p: np.ndarray, resamples: int = 1000
) -> tuple[float | None, float | None]:
    """Return the interval of one figure of a binary test: labels [N], probabilities [N]."""
    if name == "auroc":
        return bootstrap((p[y == 1], p[y == 0]), auroc, False, resamples)
    if name == "f1":
        return bootstrap((y, (p >= 0.5).astype(int)), f1, True, resamples)
    return bootstrap((np.square(p - y),), lambda e, axis: e.mean(axis), True, resamples)
