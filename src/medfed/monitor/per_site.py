"""The figures of thousands of sites in one go: of each what `metrics` says of it alone.

K sites, N test records of all sites end to end, C classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from medfed.core.types import Task
from medfed.monitor.metrics import ECE_BINS, Figure, Scored, Scores, round_outputs


def scores_each(
    task: Task, outputs: Tensor, target: Tensor, sizes: Sequence[int], scale: float = 1.0
) -> list[Scores]:
    """Return `Scores.of` for each site, of outputs [N, C] and targets [N];
    site k owns the next sizes[k] rows.
    """
    if task == "regression":
        parts = zip(
            torch.split(outputs, list(sizes)), torch.split(target, list(sizes)), strict=True
        )
        return [Scores.of(task, z, y, scale) for z, y in parts]
    bins = round_outputs(task, outputs)
    none = torch.zeros(5, dtype=torch.float64)
    site_N = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort([target.numpy(), *bins.numpy().T[::-1], site_N])
    bins_K = torch.split(bins[order], list(sizes))
    label_K = torch.split(target.long()[order], list(sizes))
    return [Scores(task, b, y, none) for b, y in zip(bins_K, label_K, strict=True)]


def measure_each(
    scores: Mapping[str, Scored], threshold: float = 0.5, intervals: bool = False
) -> dict[str, dict[str, Figure]]:
    """Return `measure` of each site; without intervals those of a binary test come from one pass
    over all records.
    """
    plain = [one for one in scores.values() if isinstance(one, Scores) and one.task == "binary"]
    if intervals or not plain or len(plain) < len(scores):
        return {name: one.measure(threshold, intervals) for name, one in scores.items()}
    values = _binary_figures(Scores.all(plain), np.array([one.n for one in plain]), threshold)
    columns = [column.tolist() for column in values.values()]
    rows = zip(*columns, strict=True)
    return {
        site: {
            name: Figure(None if value != value else value)
            for name, value in zip(values, row, strict=True)
        }
        for site, row in zip(scores, rows, strict=True)
    }


def _binary_figures(union: Scores, size_K: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """Return each figure [K], NaN where it is undefined; site k owns the next size_K[k] records."""
    K = len(size_K)
    y_N = union.label.numpy()
    p_N = union.probability()[:, 0]
    site_N = np.repeat(np.arange(K), size_K)
    called_N = p_N >= threshold

    def total(weight_N: np.ndarray) -> np.ndarray:
        total_K: np.ndarray = np.bincount(site_N, weight_N, K)
        return total_K

    true = total(called_N & (y_N == 1))
    called = total(called_N)
    positive = total(y_N)
    with np.errstate(divide="ignore", invalid="ignore"):  # 0 / 0 is undefined, and NaN
        return {
            "accuracy": total(called_N == y_N) / size_K,
            "auroc": _auroc(y_N, p_N, site_N, positive, size_K - positive),
            "precision": true / called,
            "recall": true / positive,
            "f1": 2 * true / (called + positive),
            "brier": total(np.square(p_N - y_N)) / size_K,
            "ece": _calibration_error(y_N, p_N, site_N, K) / size_K,
        }


def _auroc(
    y_N: np.ndarray,
    p_N: np.ndarray,
    site_N: np.ndarray,
    positive_K: np.ndarray,
    negative_K: np.ndarray,
) -> np.ndarray:
    """Return Mann and Whitney's U of each site over its pairs [K], ties half; NaN for one class."""
    order = np.lexsort((p_N, site_N))
    y = y_N[order]
    p = p_N[order]
    site = site_N[order]
    first = np.ones(len(y), dtype=bool)
    first[1:] = (p[1:] != p[:-1]) | (site[1:] != site[:-1])
    tie = np.cumsum(first) - 1
    negatives = np.cumsum(np.bincount(tie, y == 0)) if len(y) else np.zeros(0)
    here = np.bincount(tie, y == 0) if len(y) else negatives
    before = np.cumsum(negative_K) - negative_K  # of the sites before
    below = (negatives - here / 2)[tie] - before[site]
    wins_K: np.ndarray = np.bincount(site, below * y, len(positive_K))
    auroc_K: np.ndarray = wins_K / (positive_K * negative_K)

    return auroc_K


def _calibration_error(
    y_N: np.ndarray, p_N: np.ndarray, site_N: np.ndarray, sites: int
) -> np.ndarray:
    """Return each site's sum over ten equal bins of |so - said|, records [K]."""
    inner = np.linspace(0, 1, ECE_BINS + 1)[1:-1]
    bin_N = site_N * ECE_BINS + np.searchsorted(inner, p_N)
    so, said = (np.bincount(bin_N, of, sites * ECE_BINS) for of in (y_N, p_N))
    error_K: np.ndarray = np.abs(so - said).reshape(sites, ECE_BINS).sum(1)
    return error_K
