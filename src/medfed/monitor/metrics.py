"""What a model is worth on test patients: figures as scikit-learn's, intervals in closed form.

A site does not send its test patients' outputs as they are. It sends a `Scores`: probabilities
rounded to 1/128 of a logit, with their labels, sorted, without ids; for regression five sums.
Figures of one site and of all sites are both functions of that. Rounding moves a probability by at
most 0.001, and ties in AUROC count one half.

N test records, C classes (C = 1 for binary: the positive one).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from scipy import stats
from sklearn import metrics as sk
from torch import Tensor

from medfed.core.checks import SiteError
from medfed.core.types import Task

_BINS_PER_LOGIT = 128
_LIMIT = 32
_CONFIDENCE = 0.95
ECE_BINS = 10
_Z = float(stats.norm.ppf(0.5 + _CONFIDENCE / 2))

CLASS_METRICS = ("accuracy", "auroc", "precision", "recall", "f1", "brier", "ece")
NUMBER_METRICS = ("mae", "rmse", "r2")

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval; None where undefined (one class only, no rows)."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Histogram:
    """A binary test: how many records of each label were told each probability. Every binary figure
    follows from it.
    """

    said: np.ndarray  # [C] probability of the positive label, ascending
    count: np.ndarray  # [C, 2] records, by label

    def measure(self, threshold: float = 0.5, intervals: bool = True) -> dict[str, Figure]:
        """Return every figure, records being called positive from `threshold` on."""
        (_, false), (missed, true) = self.confusion(threshold)
        n = self.count.sum()
        positives = true + missed
        values = {
            "accuracy": float((n - false - missed) / n),
            "auroc": self.auroc(),
            "precision": _divide(true, true + false),
            "recall": _divide(true, positives),
            "f1": _divide(2 * true, 2 * true + false + missed),
            "brier": self.brier(),
            "ece": self.calibration_error(),
        }
        bounds: dict[str, Interval] = {}

        if intervals:
            bounds = {
                "accuracy": wilson(n - false - missed, n),
                "precision": wilson(true, true + false),
                "recall": wilson(true, positives),
                "auroc": self.auroc_interval(),
                "f1": f1_interval(true, false + missed),
                "brier": self.brier_interval(),
            }

        return {
            name: Figure(value, *bounds.get(name, (None, None))) for name, value in values.items()
        }

    def confusion(self, threshold: float) -> np.ndarray:
        """Return how many records of each label [row] are called each label [column]."""
        called = self.said >= threshold
        return np.stack([self.count[~called].sum(0), self.count[called].sum(0)], 1)

    def auroc(self) -> float | None:
        """Return the share of pairs, a positive and a negative,
        that are in order, ties half; None for one class.
        """
        negative, positive = self.count.sum(0)
        if negative * positive == 0:
            return None
        return float(self.count[:, 1] @ self._below() / positive)

    def auroc_interval(self) -> Interval:
        """Return DeLong's interval, corrected for skewness:
        what the bootstrap of both labels tends to, in O(C).

        With h(x, y) = 1 where positive x lies above negative y and 1/2 at a tie, resampling n
        positives and m negatives gives h's Hoeffding parts a variance of s10/n + s01/m + s11/(nm),
        exactly, and a third cumulant of k10/n^2 + k01/m^2 + 6 E[h10 h01 h]/(nm), to leading order.
        DeLong et al. 1988; Sun and Xu 2014 for the ranks.
        """
        count = self.count.astype(np.float64)
        m, n = count.sum(0)
        if min(m, n) < 2:
            return None, None
        negative = count[:, 0] / m
        positive = count[:, 1] / n
        value = float(positive @ self._below())
        above = 1 - np.cumsum(positive) + positive / 2
        part_10 = self._below() - value
        part_01 = above - value
        s10 = positive @ part_10**2
        s01 = negative @ part_01**2
        s11 = value * (1 - value) - positive @ negative / 4 - s10 - s01
        pulled = negative * part_01
        joint = (positive * part_10) @ (np.cumsum(pulled) - pulled / 2)
        third = positive @ part_10**3 / n**2 + negative @ part_01**3 / m**2 + 6 * joint / (n * m)

        return _skewed_interval(value, s10 / n + s01 / m + s11 / (n * m), third)

    def brier(self) -> float:
        """Return the mean squared error of the probability."""
        return float((self._errors() * self.count).sum() / self.count.sum())

    def brier_interval(self) -> Interval:
        """Return the interval of a mean of independent errors, corrected for their skewness."""
        n = self.count.sum()
        value = self.brier()
        if n < 2:
            return None, None
        off = self._errors() - value
        variance, third = (float((off**power * self.count).sum() / n) for power in (2, 3))
        return _skewed_interval(value, variance / n, third / n**2)

    def reliability(self) -> np.ndarray:
        """Return (records, mean probability said,
        share that was so) [bins, 3] of each tenth that holds records.
        """
        inner = np.linspace(0, 1, ECE_BINS + 1)[1:-1]
        place = np.searchsorted(inner, self.said)
        records = self.count.sum(1)
        sums = [
            np.bincount(place, of, ECE_BINS)
            for of in (records, records * self.said, self.count[:, 1])
        ]
        table = np.stack([of[sums[0] > 0] for of in sums], 1)
        return np.concatenate([table[:, :1], table[:, 1:] / table[:, :1]], 1)

    def calibration_error(self) -> float:
        """Return the expected calibration error over ten equal bins (Naeini et al. 2015)."""
        records, said, so = self.reliability().T
        return float(np.abs(so - said) @ records / records.sum())

    def log_loss(self) -> float:
        """Return the mean cross-entropy."""
        each = -np.log(np.maximum(np.stack([1 - self.said, self.said], 1), 1e-15))
        return float((each * self.count).sum() / self.count.sum())

    def _below(self) -> np.ndarray:
        """Return the share [C] of negatives below each cell, those in it counted half."""
        negative = self.count[:, 0]
        below: np.ndarray = (np.cumsum(negative) - negative / 2) / negative.sum()
        return below

    def _errors(self) -> np.ndarray:
        return np.stack([np.square(self.said), np.square(1 - self.said)], 1)


def _divide(above: float, below: float) -> float | None:
    return float(above / below) if below else None


class Scored(Protocol):
    """What a test came to: of a site, of all, or of noised counts (`monitor.noised`)."""

    @property
    def n(self) -> int:
        """The number of test records."""
        ...

    def measure(self, threshold: float, intervals: bool) -> dict[str, Figure]:
        """Return every figure."""
        ...

    def log_loss(self) -> float | None:
        """Return the mean loss."""
        ...

    def confusion(self, threshold: float) -> list[list[int]]:
        """Return how many records of each label were called each label."""
        ...

    def calibration(self) -> list[list[float]]:
        """Return (records, mean probability said, share that was so) of tenths."""
        ...


@dataclass(frozen=True)
class Scores:
    """What a site tells of its test: `bins` int16 [N, C] with `label` int64 [N], or the `sums` [5]
    of a regression.
    """

    task: Task
    bins: Tensor
    label: Tensor
    sums: Tensor

    @classmethod
    def of(cls, task: Task, outputs: Tensor, target: Tensor, scale: float = 1.0) -> "Scores":
        """Round outputs [N, C] against targets [N]; `scale` undoes the target's scaling."""
        if task == "regression":
            y = target.double() * scale
            error = (outputs.squeeze(-1).double() - target.double()) * scale
            parts = [
                float(len(y)),
                error.abs().sum(),
                error.square().sum(),
                y.sum(),
                y.square().sum(),
            ]
            sums = torch.stack([torch.as_tensor(p, dtype=torch.float64) for p in parts])
            return cls(
                task, torch.zeros(0, 1, dtype=torch.int16), torch.zeros(0, dtype=torch.int64), sums
            )

        bins = round_outputs(task, outputs)
        order = np.lexsort([target.numpy(), *bins.numpy().T[::-1]])
        return cls(task, bins[order], target.long()[order], torch.zeros(5, dtype=torch.float64))

    @classmethod
    def from_tensors(cls, task: Task, tensors: Mapping[str, Tensor], outputs: int) -> "Scores":
        """Take what a site tells, of a model of so many outputs;
        raise SiteError where that is no test's scores.
        """
        bins = tensors["bins"]
        label = tensors["label"]
        sums = tensors["sums"]
        alike = (
            bins.dtype == torch.int16 and label.dtype == torch.int64 and sums.dtype == torch.float64
        )
        shaped = bins.shape == (len(label), outputs) and label.ndim == 1 and sums.shape == (5,)
        if not (
            alike
            and shaped
            and np.isfinite(sums.numpy()).all()
            and _are_in_range(bins, label, outputs)
        ):
            raise SiteError("its answer is no test's scores; run the same medfed everywhere")
        return cls(task, bins, label, sums)

    @classmethod
    def all(cls, scores: Sequence["Scores"]) -> "Scores":
        """Put the scores of several sites together."""
        first = scores[0]
        bins = torch.cat([s.bins for s in scores])
        label = torch.cat([s.label for s in scores])
        return cls(first.task, bins, label, torch.stack([s.sums for s in scores]).sum(0))

    @property
    def n(self) -> int:
        """The number of test records."""
        if self.task == "regression":
            return int(self.sums[0])
        return len(self.label)

    def probability(self) -> np.ndarray:
        """Return rounded probabilities [N, C]; rows of several classes are made to sum to 1."""
        p: np.ndarray = torch.sigmoid(self.bins.double() / _BINS_PER_LOGIT).numpy()
        if self.task != "binary":
            p = p / p.sum(1, keepdims=True)
        return p

    def histogram(self) -> Histogram:
        """Return a binary test's records by probability and label."""
        place = self.bins[:, 0].numpy().astype(np.int64) + _LIMIT * _BINS_PER_LOGIT
        count = np.bincount(2 * place + self.label.numpy(), minlength=2).astype(np.int64)
        count = np.append(count, 0)[: len(count) + len(count) % 2].reshape(-1, 2)
        held = np.flatnonzero(count.any(1))
        return Histogram(1 / (1 + np.exp(_LIMIT - held / _BINS_PER_LOGIT)), count[held])

    def measure(self, threshold: float = 0.5, intervals: bool = True) -> dict[str, Figure]:
        """Return what `measure` returns."""
        return measure(self, intervals, threshold)

    def log_loss(self) -> float | None:
        """Return what `log_loss` returns."""
        return log_loss(self)

    def confusion(self, threshold: float = 0.5) -> list[list[int]]:
        """Return what `confusion` returns."""
        return confusion(self, threshold)

    def calibration(self) -> list[list[float]]:
        """Return what `calibration` returns."""
        return calibration(self)

    def tensors(self) -> dict[str, Tensor]:
        """Return what goes over the wire."""
        return {"bins": self.bins, "label": self.label, "sums": self.sums}


def round_outputs(task: Task, outputs: Tensor) -> Tensor:
    """Return a classifier's outputs [N, C] as whole steps of a logit, int16."""
    logits = outputs.double()
    if task != "binary":
        logits = torch.logit(logits.softmax(-1), eps=1e-15)
    return (logits.clamp(-_LIMIT, _LIMIT) * _BINS_PER_LOGIT).round().to(torch.int16)


def names(task: Task) -> tuple[str, ...]:
    """Return the names of a task's figures."""
    return NUMBER_METRICS if task == "regression" else CLASS_METRICS


def _are_in_range(bins: Tensor, label: Tensor, outputs: int) -> bool:
    if len(label) == 0:
        return True
    # thousands of small sites
    steps = bins.numpy()
    labels = label.numpy()
    most = _LIMIT * _BINS_PER_LOGIT
    return bool(
        -most <= steps.min()
        and steps.max() <= most
        and labels.min() >= 0
        and labels.max() < max(2, outputs)
    )


def measure(scores: Scores, intervals: bool = True, threshold: float = 0.5) -> dict[str, Figure]:
    """Return every figure of the task with 95 % intervals (or without, which is faster).

    A binary record is called positive from `threshold` on. Precision, recall, F1 and AUROC of
    several classes are macro averages, AUROC one against the rest. Records are taken as
    independent: where a patient has several, intervals are too narrow.
    """
    if scores.task == "regression":
        return _measure_number(scores)
    if scores.n == 0:
        return {name: Figure(None) for name in CLASS_METRICS}
    if scores.task == "binary":
        return scores.histogram().measure(threshold, intervals)
    y = scores.label.numpy()
    p = scores.probability()
    figures = _measure_classes(y, p)
    bounds = {}
    if intervals:
        bounds["accuracy"] = wilson(int((p.argmax(1) == y).sum()), len(y))

    return {name: Figure(value, *bounds.get(name, (None, None))) for name, value in figures.items()}


def macro(per_site: Mapping[str, Mapping[str, Figure]]) -> dict[str, Figure]:
    """Return the plain mean over sites of each figure, over the sites where it is defined."""
    named = next(iter(per_site.values()), {})
    means: dict[str, Figure] = {}
    for name in named:
        values = [v for site in per_site.values() if (v := site[name].value) is not None]
        means[name] = Figure(float(np.mean(values)) if values else None)
    return means


def mean_difference(n: float, total: float, square: float) -> Figure:
    """Return the mean of n paired differences with its 95 % interval,
    from their sum and sum of squares.
    """
    if n == 0:
        return Figure(None)
    mean = total / n
    if n < 2:
        return Figure(mean)
    half = float(stats.norm.ppf(0.5 + _CONFIDENCE / 2)) * math.sqrt(
        max(0.0, square / n - mean * mean) / (n - 1)
    )
    return Figure(mean, mean - half, mean + half)


def squared_error(task: Task, outputs: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    """Return each record's squared error [N]: of the chances, summed over classes, or of a number
    in its own unit.
    """
    z_NC = outputs.double()
    if task == "regression":
        return ((z_NC.squeeze(-1) - target.double()) * scale).square()
    if task == "binary":
        return (torch.sigmoid(z_NC.squeeze(-1)) - target.double()).square()
    so = torch.nn.functional.one_hot(target.long(), z_NC.shape[-1])
    return (z_NC.softmax(-1) - so).square().sum(-1)


def log_loss(scores: Scores) -> float | None:
    """Return the mean loss on the test records: cross-entropy; for a regression squared error."""
    if scores.n == 0:
        return None
    if scores.task == "regression":
        return float(scores.sums[2] / scores.sums[0])
    if scores.task == "binary":
        return scores.histogram().log_loss()
    p = scores.probability()
    return float(-np.log(np.maximum(p[np.arange(len(p)), scores.label.numpy()], 1e-15)).mean())


def _measure_classes(y: np.ndarray, p: np.ndarray) -> dict[str, float | None]:
    hit = p.argmax(1)
    labels = np.arange(p.shape[1])
    auroc = None
    if len(np.unique(y)) == p.shape[1]:
        # of two classes, either against the other is the same
        ranked = p if len(labels) > 2 else p[:, 1]
        auroc = float(sk.roc_auc_score(y, ranked, multi_class="ovr", labels=labels))
    averages = sk.precision_recall_fscore_support(
        y, hit, labels=labels, average="macro", zero_division=0
    )
    return {
        "accuracy": float(sk.accuracy_score(y, hit)),
        "auroc": auroc,
        "precision": float(averages[0]),
        "recall": float(averages[1]),
        "f1": float(averages[2]),
        "brier": float(np.square(p - np.eye(len(labels))[y]).sum(1).mean()),
        "ece": _top_label(y, p).calibration_error(),
    }


def confusion(scores: Scores, threshold: float = 0.5) -> list[list[int]]:
    """Return how many records of each label [row] were predicted as each label [column];
    empty for a regression.
    """
    if scores.task == "regression" or scores.n == 0:
        return []
    if scores.task == "binary":
        return scores.histogram().confusion(threshold).astype(int).tolist()  # type: ignore[no-any-return]
    p = scores.probability()
    labels = np.arange(p.shape[1])
    counts: list[list[int]] = sk.confusion_matrix(
        scores.label.numpy(), p.argmax(1), labels=labels
    ).tolist()
    return counts


def calibration(scores: Scores) -> list[list[float]]:
    """Return (records, mean probability said, share that was so) of each of ten equal bins that
    holds any record.

    Of several classes the probability is that of the predicted one. Empty for a regression.
    """
    if scores.task == "regression" or scores.n == 0:
        return []
    if scores.task == "binary":
        return scores.histogram().reliability().tolist()  # type: ignore[no-any-return]
    return _top_label(scores.label.numpy(), scores.probability()).reliability().tolist()  # type: ignore[no-any-return]


def _top_label(y: np.ndarray, p: np.ndarray) -> Histogram:
    """Return, of several classes, whether the predicted one was right, by its probability."""
    said, place = np.unique(p.max(1), return_inverse=True)
    right = (p.argmax(1) == y).astype(int)
    return Histogram(said, np.bincount(2 * place + right, minlength=2 * len(said)).reshape(-1, 2))


def _measure_number(scores: Scores) -> dict[str, Figure]:
    n, absolute, square, total, total_square = scores.sums.tolist()
    if n == 0:
        return {name: Figure(None) for name in NUMBER_METRICS}
    mae = absolute / n
    spread = total_square - total * total / n
    absolute_error = Figure(mae)
    r2 = Figure(None)
    if n > 1:
        variance = max(0.0, (square - n * mae * mae) / (n - 1))
        half = float(stats.t.ppf(0.5 + _CONFIDENCE / 2, n - 1)) * math.sqrt(variance / n)
        absolute_error = Figure(mae, mae - half, mae + half)
    if spread > max(1e-12 * total_square, 1e-300):
        r2 = Figure(1 - square / spread)
    return {"mae": absolute_error, "rmse": Figure(math.sqrt(square / n)), "r2": r2}


def wilson(hits: float, of: float) -> Interval:
    """Return Wilson's interval of a share."""
    if of == 0:
        return None, None
    share = hits / of
    z = _Z
    middle = (share + z * z / (2 * of)) / (1 + z * z / of)
    half = z / (1 + z * z / of) * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    low = float(middle - half)
    high = float(middle + half)
    if hits == 0:
        low = 0.0
    if hits == of:
        high = 1.0
    return low, high


def f1_interval(true: float, wrong: float) -> Interval:
    """Return the interval of F1 = 2 true / (2 true + wrong); None where resamples would not vary.

    F1 = 2 J / (1 + J), where J is the share of `true` among all records that are positive or called
    so: a binomial.
    """
    of = true + wrong
    if true == 0 or wrong == 0:
        return None, None
    j = true / of
    low, high = _skewed_interval(j, j * (1 - j) / of, j * (1 - j) * (1 - 2 * j) / of**2)
    assert low is not None and high is not None
    return 2 * low / (1 + low), 2 * high / (1 + high)


def _skewed_interval(value: float, variance: float, third: float) -> Interval:
    """Return the central interval of a share's law from
    its first three cumulants (Cornish and Fisher 1938).
    """
    if variance < 1e-15:
        return None, None
    sd = math.sqrt(variance)
    skewness = min(2.0, max(-2.0, third / sd**3))
    z = np.array([-_Z, _Z])
    z = z + skewness * (z**2 - 1) / 6 - skewness**2 * (2 * z**3 - 5 * z) / 36
    low, high = value + sd * z
    return min(value, max(0.0, float(low))), max(value, min(1.0, float(high)))
