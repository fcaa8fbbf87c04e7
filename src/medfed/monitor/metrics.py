"""What a model is worth on test patients: figures by scikit-learn, intervals by Wilson and by bootstrap.

A site does not send its test patients' outputs as they are. It sends a `Scores`: probabilities rounded to 1/128 of a
logit, with their labels, sorted, without ids; for regression five sums. Figures of one site and of all sites are both
functions of that. Rounding moves a probability by at most 0.001, and ties in AUROC count one half.

N test records, C classes (C = 1 for binary: the positive one).
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from torch import Tensor

from medfed.core.types import Task

_BINS_PER_LOGIT, _LIMIT = 128, 32
_RESAMPLES, _CONFIDENCE, ECE_BINS = 1000, 0.95, 10
CELLS = 8
"""Cells of the histogram that stands for a test on patients who are not public."""

CLASS_METRICS = ("accuracy", "auroc", "precision", "recall", "f1", "brier", "ece")
NUMBER_METRICS = ("mae", "rmse", "r2")


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval; None where it is undefined (one class only, no rows)."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Scores:
    """What a site tells of its test: `bins` int16 [N, C] with `label` int64 [N], or the `sums` [5] of a regression."""

    task: Task
    bins: Tensor
    label: Tensor
    sums: Tensor

    @classmethod
    def of(cls, task: Task, outputs: Tensor, target: Tensor, scale: float = 1.0) -> "Scores":
        """Round the model's outputs [N, C] against targets [N]; `scale` undoes the target's scaling."""
        if task == "regression":
            y, error = target.double() * scale, (outputs.squeeze(-1).double() - target.double()) * scale
            parts = [float(len(y)), error.abs().sum(), error.square().sum(), y.sum(), y.square().sum()]
            sums = torch.stack([torch.as_tensor(p, dtype=torch.float64) for p in parts])
            return cls(task, torch.zeros(0, 1, dtype=torch.int16), torch.zeros(0, dtype=torch.int64), sums)
        bins = rounded(task, outputs)
        order = np.lexsort([target.numpy(), *bins.numpy().T[::-1]])
        return cls(task, bins[order], target.long()[order], torch.zeros(5, dtype=torch.float64))

    @classmethod
    def of_counts(cls, counts: np.ndarray) -> "Scores":
        """Return the scores whose histogram [CELLS, 2] is `counts`, each in its cell's middle; below 0 counts as 0."""
        whole = np.maximum(np.rint(counts), 0).astype(np.int64)
        middle = (np.arange(CELLS) - CELLS / 2 + 0.5) * _BINS_PER_LOGIT
        bins = np.repeat(np.tile(middle[:, None], 2).ravel(), whole.ravel()).astype(np.int16)
        label = np.repeat(np.tile(np.arange(2), CELLS), whole.ravel())
        return cls("binary", torch.from_numpy(bins)[:, None], torch.from_numpy(label), torch.zeros(5).double())

    def counts(self) -> np.ndarray:
        """Return the histogram [CELLS, 2] of a binary test: cells one logit wide, the outer ones open, by label."""
        cell = np.floor(self.bins[:, 0].numpy() / _BINS_PER_LOGIT + CELLS / 2).clip(0, CELLS - 1).astype(np.int64)
        return np.bincount(2 * cell + self.label.numpy(), minlength=2 * CELLS).reshape(CELLS, 2)

    @classmethod
    def all(cls, scores: Sequence["Scores"]) -> "Scores":
        """Put the scores of several sites together."""
        first = scores[0]
        bins, label = torch.cat([s.bins for s in scores]), torch.cat([s.label for s in scores])
        return cls(first.task, bins, label, torch.stack([s.sums for s in scores]).sum(0))

    @property
    def n(self) -> int:
        """The number of test records."""
        return int(self.sums[0]) if self.task == "regression" else len(self.label)

    def probability(self) -> np.ndarray:
        """Return the rounded probabilities [N, C]; rows of several classes are brought back to sum 1."""
        p = torch.sigmoid(self.bins.double() / _BINS_PER_LOGIT).numpy()
        return p if self.task == "binary" else p / p.sum(1, keepdims=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return what goes over the wire."""
        return {"bins": self.bins, "label": self.label, "sums": self.sums}


def rounded(task: Task, outputs: Tensor) -> Tensor:
    """Return a classifier's outputs [N, C] as whole steps of a logit, int16."""
    logits = outputs.double() if task == "binary" else torch.logit(outputs.double().softmax(-1), eps=1e-15)
    return (logits.clamp(-_LIMIT, _LIMIT) * _BINS_PER_LOGIT).round().to(torch.int16)


def names(task: Task) -> tuple[str, ...]:
    """Return the names of a task's figures."""
    return NUMBER_METRICS if task == "regression" else CLASS_METRICS


def measure(scores: Scores, intervals: bool = True) -> dict[str, Figure]:
    """Return every figure of the task with 95 % intervals (or without, which is faster).

    Precision, recall, F1 and AUROC of several classes are macro averages, AUROC one against the rest. Records are
    taken as independent: where a patient has several, intervals are too narrow.
    """
    if scores.task == "regression":
        return _measure_number(scores)
    if scores.n == 0:
        return {name: Figure(None) for name in CLASS_METRICS}
    binary = scores.task == "binary"
    y, p = scores.label.numpy(), scores.probability()
    figures = _measure_binary(y, p[:, 0]) if binary else _measure_classes(y, p)
    bounds = _intervals(y, p, binary) if intervals else {}
    return {name: Figure(value, *bounds.get(name, (None, None))) for name, value in figures.items()}


def macro(per_site: Mapping[str, Mapping[str, Figure]]) -> dict[str, Figure]:
    """Return the plain mean over sites of each figure, over the sites where it is defined."""
    named = next(iter(per_site.values()), {})
    means: dict[str, Figure] = {}
    for name in named:
        values = [v for site in per_site.values() if (v := site[name].value) is not None]
        means[name] = Figure(float(np.mean(values)) if values else None)
    return means


def log_loss(scores: Scores) -> float | None:
    """Return the mean loss on the test records: cross-entropy, or squared error for a regression."""
    if scores.n == 0:
        return None
    if scores.task == "regression":
        return float(scores.sums[2] / scores.sums[0])
    p = scores.probability()
    p = np.concatenate([1 - p, p], 1) if scores.task == "binary" else p
    return float(-np.log(np.maximum(p[np.arange(len(p)), scores.label.numpy()], 1e-15)).mean())


def _measure_binary(y: np.ndarray, p: np.ndarray) -> dict[str, float | None]:
    hit = (p >= 0.5).astype(int)
    both = len(np.unique(y)) == 2
    return {
        "accuracy": float(sk.accuracy_score(y, hit)),
        "auroc": float(sk.roc_auc_score(y, p)) if both else None,
        "precision": float(sk.precision_score(y, hit)) if hit.any() else None,
        "recall": float(sk.recall_score(y, hit)) if y.any() else None,
        "f1": float(sk.f1_score(y, hit)) if y.any() or hit.any() else None,
        "brier": float(sk.brier_score_loss(y, p)),
        "ece": _calibration_error(y, p),
    }


def _measure_classes(y: np.ndarray, p: np.ndarray) -> dict[str, float | None]:
    hit, labels = p.argmax(1), np.arange(p.shape[1])
    every = len(np.unique(y)) == p.shape[1]
    ranked = p if len(labels) > 2 else p[:, 1]  # of two classes, either against the other is the same
    averages = sk.precision_recall_fscore_support(y, hit, labels=labels, average="macro", zero_division=0)
    return {
        "accuracy": float(sk.accuracy_score(y, hit)),
        "auroc": float(sk.roc_auc_score(y, ranked, multi_class="ovr", labels=labels)) if every else None,
        "precision": float(averages[0]),
        "recall": float(averages[1]),
        "f1": float(averages[2]),
        "brier": float(np.square(p - np.eye(len(labels))[y]).sum(1).mean()),
        "ece": _calibration_error((hit == y).astype(int), p.max(1)),
    }


def confusion(scores: Scores) -> list[list[int]]:
    """Return how many records of each label [row] were predicted as each label [column]; empty for a regression."""
    if scores.task == "regression" or scores.n == 0:
        return []
    p = scores.probability()
    hit = (p[:, 0] >= 0.5).astype(int) if scores.task == "binary" else p.argmax(1)
    labels = np.arange(max(2, p.shape[1]))
    counts: list[list[int]] = sk.confusion_matrix(scores.label.numpy(), hit, labels=labels).tolist()
    return counts


def calibration(scores: Scores) -> list[list[float]]:
    """Return (records, mean probability said, share that was so) of each of ten equal bins that holds any record.

    Of several classes the probability is that of the predicted one. Empty for a regression.
    """
    if scores.task == "regression" or scores.n == 0:
        return []
    y, p = scores.label.numpy(), scores.probability()
    if scores.task == "binary":
        return _reliability(y, p[:, 0]).tolist()  # type: ignore[no-any-return]
    return _reliability((p.argmax(1) == y).astype(int), p.max(1)).tolist()  # type: ignore[no-any-return]


def _reliability(y: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Return (records, said, so) [bins, 3], from scikit-learn's calibration curve."""
    truth, said = calibration_curve(y, p, n_bins=ECE_BINS)
    inner = np.linspace(0, 1, ECE_BINS + 1)[1:-1]
    counts = np.bincount(np.searchsorted(inner, p), minlength=ECE_BINS)  # the bins that calibration_curve fills
    return np.stack([counts[counts > 0], said, truth], 1)


def _calibration_error(y: np.ndarray, p: np.ndarray) -> float:
    """Expected calibration error over ten equal bins (Naeini et al. 2015)."""
    count, said, truth = _reliability(y, p).T
    return float(np.abs(truth - said) @ count / len(y))


def _intervals(y: np.ndarray, p: np.ndarray, binary: bool) -> dict[str, tuple[float | None, float | None]]:
    hit = (p[:, 0] >= 0.5).astype(int) if binary else p.argmax(1)
    bounds = {"accuracy": _wilson(int((hit == y).sum()), len(y))}
    if not binary:
        return bounds
    score = p[:, 0]
    bounds["precision"] = _wilson(int((hit * y).sum()), int(hit.sum()))
    bounds["recall"] = _wilson(int((hit * y).sum()), int(y.sum()))
    bounds["auroc"] = _bootstrap((score[y == 1], score[y == 0]), _auroc, paired=False)
    bounds["f1"] = _bootstrap((y, hit), _f1, paired=True)
    bounds["brier"] = _bootstrap((np.square(score - y),), lambda e, axis: e.mean(axis), paired=True)
    return bounds


def _wilson(hits: int, of: int) -> tuple[float | None, float | None]:
    if of == 0:
        return None, None
    interval = stats.binomtest(hits, of).proportion_ci(_CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def _bootstrap(data: tuple[np.ndarray, ...], statistic: Any, paired: bool) -> tuple[float | None, float | None]:
    """Percentile bootstrap, seeded: the same scores give the same interval. None where resamples do not vary."""
    if min(map(len, data)) < 2:
        return None, None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            data,
            statistic,
            n_resamples=_RESAMPLES,
            paired=paired,
            vectorized=True,
            confidence_level=_CONFIDENCE,
            method="percentile",
            batch=max(1, 4_000_000 // sum(map(len, data))),
            rng=np.random.default_rng(0),
        ).confidence_interval
    low, high = float(interval.low), float(interval.high)
    return (None, None) if math.isnan(low) or low == high else (low, high)


def _auroc(positive: np.ndarray, negative: np.ndarray, axis: int = -1) -> Any:
    """AUROC as Mann and Whitney's U, for many resamples at once; equal to scikit-learn's."""
    ranks = stats.rankdata(np.concatenate([positive, negative], axis), axis=axis)
    n, m = positive.shape[axis], negative.shape[axis]
    u = ranks[..., :n].sum(axis) - n * (n + 1) / 2
    return u / (n * m)


def _f1(y: np.ndarray, hit: np.ndarray, axis: int = -1) -> Any:
    return 2 * (y * hit).sum(axis) / np.maximum((y + hit).sum(axis), 1)


def _measure_number(scores: Scores) -> dict[str, Figure]:
    n, absolute, square, total, total_square = scores.sums.tolist()
    if n == 0:
        return {name: Figure(None) for name in NUMBER_METRICS}
    mae, spread = absolute / n, total_square - total * total / n
    half = None
    if n > 1:
        variance = max(0.0, (square - n * mae * mae) / (n - 1))
        half = float(stats.t.ppf(0.5 + _CONFIDENCE / 2, n - 1)) * math.sqrt(variance / n)
    return {
        "mae": Figure(mae, None if half is None else mae - half, None if half is None else mae + half),
        "rmse": Figure(math.sqrt(square / n)),
        "r2": Figure(1 - square / spread if spread > max(1e-12 * total_square, 1e-300) else None),
    }
