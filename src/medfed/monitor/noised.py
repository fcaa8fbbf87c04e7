"""A binary test on patients who are not public: figures from a noised histogram, with intervals
that know the noise.

One record of each test patient is counted, in a cell of logits and under its label. A patient more
or less moves one count by one, so that whole-number Laplace noise of P(z) ~ exp(-epsilon |z|) on
every count is epsilon-private with delta = 0, whatever the cells are, as long as they do not follow
from test patients. They are placed by the released model on made-up rows (`Encoding.invent_rows`):
public facts. Everything here is computed from noised counts, and costs nothing more.

Where sites trust whoever combines their rows, their counts are summed first and noised once; else
each site noises its own, and the sum carries every site's noise. Counts are never cut at 0: a cut
is a bias, and over sites it adds up.

C cells, `variance` of the noise in a count.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy import stats

from medfed.core.decision import CELLS, logit
from medfed.monitor.metrics import CLASS_METRICS, Figure

_REACH, _GROWTH = 8.0, 3.5  # the outermost edges lie 8 spreads out; cells grow outwards, 16 times
_GRID = np.linspace(0, 1, 2001)  # on which an interval's ends are found
_Z = float(stats.norm.ppf(0.975))


def edges_for(logits: np.ndarray, cells: int = CELLS, threshold: float = 0.5) -> np.ndarray:
    """Return the edges [cells - 1] between cells, for scores that lie about as `logits` do.

    Cells are narrow about the median and grow outwards. One edge is at the threshold, so that who
    is called is exact.
    """
    finite = logits[np.isfinite(logits)]
    centre = 0.0
    spread = 1.0
    if len(finite):
        centre = float(np.median(finite))
        spread = float(np.std(finite))
    steps = np.sinh(_GROWTH * np.linspace(-1, 1, cells - 1)) / math.sinh(_GROWTH)
    found = centre + max(spread, 0.05) * _REACH * steps
    found[np.argmin(np.abs(found - logit(threshold)))] = logit(threshold)
    return np.sort(found)


def variance(epsilon: float, noises: int = 1) -> float:
    """Return the variance of `noises` whole-number Laplace noises of that epsilon together."""
    ratio = math.exp(-epsilon)
    return noises * 2 * ratio / (1 - ratio) ** 2


@dataclass(frozen=True)
class Noised:
    """Noised counts [C, 2] by cell and label; they may be below 0."""

    edges: np.ndarray
    count: np.ndarray
    variance: float

    @property
    def n(self) -> int:
        """How many records there are, as far as the noise lets one say."""
        return max(0, round(float(self.count.sum())))

    def measure(self, threshold: float = 0.5, intervals: bool = True) -> dict[str, Figure]:
        """Return the figures, always with 95 % intervals; None where noise hides if there is
        anything to divide by.

        No calibration error: it adds up sizes of differences, of which noise makes any number.
        """
        called = self._calls(threshold)[:, None]
        positive = np.array([0.0, 1.0])
        every = np.ones((len(self.count), 2))
        right = np.where(positive == 1, called, ~called)
        squares = np.square(self._probabilities()[:, None] - positive)
        figures = {
            "accuracy": self._ratio(right, every),
            "auroc": self._auroc(),
            "precision": self._ratio(called * positive, called * every),
            "recall": self._ratio(called * positive, every * positive),
            "f1": self._ratio(2 * called * positive, called * every + positive),
            "brier": self._ratio(squares, every),
        }
        if figures["precision"].value is None or figures["recall"].value is None:
            figures["f1"] = Figure(None)  # of two figures of which one is not known

        return {name: figures.get(name, Figure(None)) for name in CLASS_METRICS}

    def confusion(self, threshold: float) -> list[list[int]]:
        """Return about how many records of each label [row] are called each label [column]."""
        called = self._calls(threshold)
        counts = np.stack([self.count[~called].sum(0), self.count[called].sum(0)], 1)
        return np.maximum(counts, 0).tolist()  # type: ignore[no-any-return]

    def log_loss(self) -> float | None:
        """Return the mean cross-entropy; None where noise hides whether there are records."""
        said = self._probabilities()
        figure = self._quotient(-np.log(np.stack([1 - said, said], 1)), np.ones((len(said), 2)))
        return None if figure is None else max(0.0, figure)

    def calibration(self) -> list[list[float]]:
        """Return nothing: see `measure`."""
        return []

    def _auroc(self) -> Figure:
        """Mann and Whitney's U over noised counts:
        unbiased, as the noises of both labels are independent.

        The interval holds every A for which T(A) = sum of p_i n_j (h_ij - A) may be 0, as Fieller's
        does: T(A) has no division, and its variance is known, from the noise exactly and from
        sampling as far as counts tell. h is 1 where the positive's cell is above, 1/2 in the same
        cell.
        """
        n, p = self.count.astype(np.float64).T
        h = np.tri(len(p), k=-1) + np.eye(len(p)) / 2
        total = p.sum() * n.sum()
        ranked = float(p @ h @ n)
        by_positive = (h @ n)[:, None] - n.sum() * _GRID
        by_negative = (h.T @ p)[:, None] - p.sum() * _GRID
        pairs = sum(
            np.square(value - _GRID) * np.count_nonzero(h == value) for value in (0.0, 0.5, 1.0)
        )
        noise = self.variance * (np.square(by_positive).sum(0) + np.square(by_negative).sum(0))
        noise = np.maximum(noise - self.variance**2 * pairs, self.variance**2 * pairs)
        sampling = p @ np.square(by_positive) + n @ np.square(by_negative)
        off = ranked - _GRID * total
        certain = min(p.sum(), n.sum()) > _Z * math.sqrt(self.variance * len(p))

        return _bound(ranked / total if certain else None, off, noise + np.maximum(sampling, 0))

    def _ratio(self, above: np.ndarray, below: np.ndarray) -> Figure:
        """Return the quotient of two sums over counts,
        with weights [C, 2] each, and Fieller's interval.
        """
        weights = above[..., None] - below[..., None] * _GRID
        off = np.tensordot(self.count, weights, 2)
        noise = self.variance * np.square(weights).sum((0, 1))
        sampling = np.tensordot(self.count, np.square(weights), 2)
        return _bound(self._quotient(above, below), off, noise + np.maximum(sampling, 0))

    def _quotient(self, above: np.ndarray, below: np.ndarray) -> float | None:
        whole = float((self.count * below).sum())
        certain = whole > _Z * math.sqrt(self.variance * float(np.square(below).sum()))
        if certain:
            return float((self.count * above).sum()) / whole
        return None

    def _calls(self, threshold: float) -> np.ndarray:
        """Return which cells are called positive [C]: those beginning at the threshold or above."""
        return np.append(-math.inf, self.edges) >= logit(threshold) - 1e-9

    def _probabilities(self) -> np.ndarray:
        """Return the probability in each cell's middle [C]; open ones, as wide as the neighbour."""
        e = self.edges
        middle = np.concatenate(
            [[1.5 * e[0] - 0.5 * e[1]], (e[1:] + e[:-1]) / 2, [1.5 * e[-1] - 0.5 * e[-2]]]
        )
        said: np.ndarray = 1 / (1 + np.exp(-middle.clip(-30, 30)))
        return said


def _bound(value: float | None, off: np.ndarray, variance: np.ndarray) -> Figure:
    """Return a share with the interval of all grid values that data do not speak against."""
    if value is None:
        return Figure(None)
    likely = _GRID[np.abs(off) <= _Z * np.sqrt(variance)]
    value = min(1.0, max(0.0, float(value)))
    if not len(likely):
        return Figure(value, value, value)
    return Figure(value, min(float(likely[0]), value), max(float(likely[-1]), value))
