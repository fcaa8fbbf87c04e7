"""Noise that a guarantee can rest on:
integers on a grid, from a cipher keyed by the operating system.

Float noise on float sums leaks through its rounding (Mironov 2012; arXiv:2112.05307). So a release
is rounded to a grid and gets discrete Gaussian noise, P(x) proportional to exp(-x^2 / 2 sigma^2)
over the integers.

Why accounting for the continuous Gaussian holds for the discrete one (Peikert 2010, theorem 3.1):
take y from N(0, s_c^2), then z from the discrete Gaussian of width s_r centred at y. As z's
normaliser is the same for every y up to a factor 1 +- e, z's probabilities are those of a discrete
Gaussian of sigma^2 = s_c^2 + s_r^2 up to such a factor, e = 2 exp(-2 pi^2 s_r^2) + ... Adding an
integer vector before or after the second draw is the same. So an integer release with discrete
noise is the continuous mechanism with noise s_c = sqrt(sigma^2 - s_r^2), post-processed, up to a
total variation that is charged to delta: `DiscreteGaussian.continuous_sigma`,
`DiscreteGaussian.total_variation` and `delta_cost`. Here s_r = 1.7, e < 2^-81.

N draws, n columns of an alias table, k categories. Words are 64 bits, a quarter of one 16; grid
units are integers.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import lru_cache
from itertools import repeat

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from medfed.core.checks import DataError, PlanError
from medfed.core.entropy import Entropy, Integers, Words

Floats = NDArray[np.float64]

_BLOCK = 1 << 16  # draws at a time, so that what lies between two steps stays in the cache
_BASE = 806  # the widest discrete Gaussian drawn from one table
_REACH = 10.16  # a table reaches so many sigma to each side, at least: 8192 values of the widest
_QUARTERS = 1 << 16  # values of a quarter word
_REST = -(1 << 15)  # in a table of values: look further
_ROUNDING = 1.7  # s_r of the module's docstring
_HEADROOM = 8  # standard deviations


# Discrete Gaussian noise


@dataclass(frozen=True, eq=False)
class _AliasTable:
    """Walker's alias method for integers around 0, their probabilities whole multiples of 2^-128.

    A word's top bits name a column. The word itself, compared with the column's edge, says which of
    the column's two values is drawn; where the two are equal (once in 2^51 draws) a second word
    decides between `fine` edges. So a draw costs one word and its probabilities are exact to 128
    bits.
    """

    shift: np.uint64
    edge: Words  # [n]
    fine: Words  # [n]
    value: NDArray[np.int16]  # [2n]: from the edge on, below the edge

    @classmethod
    def of(cls, masses: Sequence[int]) -> "_AliasTable":
        """Return the table of integers -n/2 ..
        n/2 - 1 with these masses, whole numbers that sum to 2^128.
        """
        n = len(masses)
        edges, owner = _alias(masses)
        value = np.stack([np.array(owner), np.arange(n)], axis=1).ravel() - n // 2
        return cls(
            shift=np.uint64(65 - n.bit_length()),
            edge=np.array([edge >> 64 for edge in edges], np.uint64),
            fine=np.array([edge % 2**64 for edge in edges], np.uint64),
            value=value.astype(np.int16),
        )

    def sample(self, count: int, entropy: Entropy) -> NDArray[np.int16]:
        """Draw [count] integers."""
        word = entropy.words(count)
        column = (word >> self.shift).view(np.int64)
        edge = self.edge.take(column)
        below = word < edge
        tie = word == edge
        if tie.any():
            below[tie] = entropy.words(int(tie.sum())) < self.fine[column[tie]]
        return self.value.take(2 * column + below)


def _masses(variance: Fraction) -> list[int]:
    """Return P(x) 2^128 for x = -n/2 .. n/2 - 1, whole numbers of sum 2^128; n/2 > 10.16 sigma.

    70 digits: by recurrence 8192 steps lose 9 of them, and 39 are used.
    """
    half = 1 << (2 * math.ceil(_REACH * math.sqrt(variance)) + 1).bit_length() - 1
    with localcontext(prec=70):
        step = (-Decimal(variance.denominator) / (2 * Decimal(variance.numerator))).exp()
        weight = Decimal(1)
        ratio = step
        weights = [Decimal(1)]
        # exp(-x^2 / 2v): each ratio to the one before is the last ratio times exp(-1/v)
        for _ in range(1, half):
            weight = weight * ratio
            ratio = ratio * step * step
            weights.append(weight)
        unit = 2**128 / (2 * sum(weights, Decimal()) - 1)
        right = [int((weight * unit).to_integral_value()) for weight in weights[1:]]
    return [0, *reversed(right), 2**128 - 2 * sum(right), *right]


def _alias(masses: Sequence[int]) -> tuple[list[int], list[int]]:
    """Fill n columns of 2^128 / n each from at most two masses (Vose 1991, in whole numbers, so
    nothing is lost).

    Returns each column's edge, counted from the start of column 0, and the index that owns the
    column from there on.
    """
    n = len(masses)
    width = 2**128 // n
    left = list(masses)
    owner = list(range(n))
    edges = [i * width for i in range(n)]
    small = [i for i in range(n) if left[i] < width]
    large = [i for i in range(n) if left[i] > width]

    while small:
        i = small.pop()
        j = large[-1]
        edges[i] += left[i]
        owner[i] = j
        left[j] -= width - left[i]
        if left[j] <= width:
            large.pop()
            if left[j] < width:
                small.append(j)

    return edges, owner


@dataclass(frozen=True, eq=False)
class _Table:
    """Integers around 0, their probabilities whole multiples of 2^-128; nearly every draw is one
    look at 16 bits.

    A mass is a whole number of 2^-16 and a remainder. `direct` gives a value as many quarter words
    as its mass has whole ones. Those left over, a power of two of them, go on to `rest`, which has
    the remainders for masses. So no mass is rounded (a condensed table: Marsaglia, Tsang and Wang
    2004), and a draw of sigma = 400 looks further 3 times in a hundred.
    """

    direct: NDArray[np.int16]  # [2^16]
    rest: _AliasTable
    total_variation: float

    @classmethod
    def of(cls, masses: Sequence[int], total_variation: float) -> "_Table":
        """Return the table of integers -n/2 ..
        n/2 - 1 with these masses, whole numbers that sum to 2^128.
        """
        unit = 2**128 // _QUARTERS
        whole = [mass // unit for mass in masses]
        left = _QUARTERS - sum(whole)
        # a power of two, so that the remainders' masses stay whole
        spare = 1 << (left - 1).bit_length()
        for x in sorted(range(len(whole)), key=whole.__getitem__, reverse=True):
            given = min(whole[x], spare - left)
            whole[x] -= given
            left += given
        rest = [
            (mass - unit * n) * (_QUARTERS // spare) for mass, n in zip(masses, whole, strict=True)
        ]
        values = np.arange(len(masses)) - len(masses) // 2
        direct = np.full(_QUARTERS, _REST, np.int16)
        direct[spare:] = np.repeat(values, whole)
        return cls(direct, _AliasTable.of(rest), total_variation)

    def sample(self, count: int, entropy: Entropy) -> NDArray[np.int16]:
        """Draw [count] integers."""
        quarter = entropy.words(-(-count // 4)).view(np.uint16)[:count]
        drawn: NDArray[np.int16] = self.direct.take(quarter)
        further = np.flatnonzero(drawn == _REST)
        drawn[further] = self.rest.sample(len(further), entropy)
        return drawn


@lru_cache(maxsize=64)
def _table(variance: Fraction) -> _Table:
    """Return the discrete Gaussian's table; `DiscreteGaussian` derives the total variation."""
    masses = _masses(variance)
    return _Table.of(
        masses, _beyond(len(masses) // 2 - 1, math.sqrt(variance)) + len(masses) * 2.0**-128
    )


def _beyond(most: float, sigma: float) -> float:
    """Bound the probability beyond -most .. most: both tails' integral by the least normaliser."""
    return (
        2
        * sigma**2
        / most
        * math.exp(-(most**2) / (2 * sigma**2))
        / max(1.0, sigma * math.sqrt(2 * math.pi))
    )


def _smoothing(variance: float) -> float:
    """Bound the total variation from sums of exp(-(j + c)^2 / 2v) over integers j being almost the
    same for every c.

    Poisson's summation: they differ from sqrt(2 pi v) by a factor 1 +- e, e = 2 sum over m >= 1 of
    exp(-2 pi^2 v m^2). Probabilities off by a factor 1 +- e are off by e / (1 - e) in total
    variation once they sum to 1; where such a sum divides, by e / (1 - 2e).
    """
    first = math.exp(-2 * math.pi**2 * variance)
    e = 2 * first / (1 - first)
    return e / (1 - 2 * e)


class DiscreteGaussian:
    """Integer noise, P(x) proportional to exp(-x^2 / 2 sigma^2), for 0 < sigma <= 2^56 grid units.

    Up to sigma = 806 a draw is one look into a table. Wider noise is a sum X = X_low + k X_high of
    two narrower ones with sigma^2 = s_low^2 + k^2 s_high^2, where s_low = 2k and X_high is drawn
    the same way. Both are equally wide where two suffice, up to sigma = 324,000: a narrow table
    looks further less often.

    `total_variation` bounds the distance of one draw from that distribution, and equally from the
    rounded continuous Gaussian of `continuous_sigma` (less than 2^-74 up to sigma = 2^40). It is
    the sum of
    - for each table, the tails beyond m >= 10.16 sigma: both together at most 2 sigma^2/m exp(-m^2
      / 2 sigma^2) / (sigma sqrt(2 pi)), the integral over the least normaliser;
    - for each table, n 2^-128: n - 1 masses rounded by at most 2^-128 each, their sum put right at
      0;
    - for each sum, `_smoothing` of v = 1 / (k^2/s_low^2 + 1/s_high^2). For P(X = x) sums exp(-(x -
      kj)^2 / 2 s_low^2
      - j^2 / 2 s_high^2) over j, which is exp(-x^2 / 2 sigma^2) times a sum of exp(-(j - c)^2 / 2v)
        with c
      proportional to x (the convolution theorem of Peikert 2010 and of Micciancio and Peikert
      2013). Here v > 3.9;
    - for the way to the continuous Gaussian, `_smoothing` of 1.7^2 (see the module).
    """

    def __init__(self, sigma: float) -> None:
        if not 0 < sigma <= 2**56:
            raise PlanError(
                f"sigma={sigma} grid units: expected a number in (0, 2^56]. Take another noise "
                "or grid."
            )
        self.sigma = float(sigma)
        self.total_variation = _smoothing(_ROUNDING**2)
        self._lower: list[tuple[int, _Table]] = []  # (k, table of s_low = 2k)
        variance = Fraction(sigma) ** 2
        while variance > _BASE**2:
            # so s_high > 38
            k = min(_BASE // 2, math.isqrt(math.isqrt(math.floor(variance)) // 2) + 1)
            self._lower.append((k, _table(Fraction(2 * k) ** 2)))
            variance = variance / k**2 - 4
            self.total_variation += _smoothing(1 / (1 / 4 + 1 / float(variance)))
        self._top = _table(variance)
        self.total_variation += (
            sum(table.total_variation for _, table in self._lower) + self._top.total_variation
        )

    @property
    def continuous_sigma(self) -> float:
        """The noise of the continuous Gaussian that this one is no weaker than, up to
        `total_variation`.
        """
        if self.sigma <= _ROUNDING:
            raise PlanError(
                f"sigma={self.sigma} grid units: expected above {_ROUNDING} to be counted as a "
                "Gaussian. Take a finer grid."
            )
        return math.sqrt(self.sigma**2 - _ROUNDING**2)

    def sample(self, count: int, entropy: Entropy) -> Integers:
        """Draw [count] independent integers."""
        drawn = np.empty(count, np.int64)
        for start in range(0, count, _BLOCK):
            block = drawn[start : start + _BLOCK]
            block[:] = self._top.sample(len(block), entropy)
            for k, table in reversed(self._lower):
                block *= k
                # numpy adds mixed types slowly
                block += table.sample(len(block), entropy).astype(np.int64)
        return drawn


def worst_total_variation(sigma: float) -> float:
    """Bound `DiscreteGaussian.total_variation` of every noise up to this sigma,
    whatever tables it is drawn from.
    """
    tables = 1
    rest = sigma
    while rest > _BASE:
        tables = tables + 1
        rest = rest / (_BASE // 2)
    each = _beyond(_REACH * _BASE, _BASE) + 2**14 * 2.0**-128 + _smoothing(3.9)
    return _smoothing(_ROUNDING**2) + tables * each


def delta_cost(total_variation: float, samples: int, epsilon: float) -> float:
    """Return what to add to delta for `samples` draws that are each within `total_variation` of
    what was accounted for.

    P' and Q' within t of P and Q: P'(S) <= P(S) + t <= e^epsilon (Q'(S) + t) + delta + t, and t
    adds up over draws.
    """
    # beyond, either figure is far above 1
    return (1 + math.exp(min(epsilon, 700.0))) * samples * total_variation


# Exact sampling, slow


class _Coins:
    """Exact draws in Python's integers from an Entropy's words (Canonne, Kamath and Steinke 2020,
    arXiv:2004.00010).
    """

    def __init__(self, entropy: Entropy) -> None:
        self._words: Iterator[int] = (
            word for count in repeat(256) for word in entropy.words(count).tolist()
        )

    def below(self, n: int) -> int:
        """Return an integer uniform on 0 .. n - 1."""
        bits = (n - 1).bit_length()
        while True:
            drawn = 0
            for _ in range(0, bits, 64):
                drawn = drawn << 64 | next(self._words)
            drawn >>= -bits % 64
            if drawn < n:
                return drawn

    def exp(self, numerator: int, denominator: int) -> bool:
        """Return True with probability exp(-numerator / denominator) (algorithm 1)."""
        whole, rest = divmod(numerator, denominator)
        return all(self._exp(1, 1) for _ in range(whole)) and self._exp(rest, denominator)

    def _exp(self, numerator: int, denominator: int) -> bool:
        k = 1
        while self.below(k * denominator) < numerator:
            k += 1
        return k % 2 == 1

    def laplace(self, t: int, s: int) -> int:
        """Return x with probability proportional to exp(-|x| s/t) (algorithm 2)."""
        while True:
            u = self.below(t)
            if not self.exp(u, t):
                continue
            v = 0
            while self.exp(1, 1):
                v += 1
            magnitude = (u + t * v) // s
            negative = self.below(2)
            if magnitude or not negative:  # else 0 would come twice
                if negative:
                    return -magnitude
                return magnitude

    def gaussian(self, variance: Fraction) -> int:
        """Return x with probability proportional to exp(-x^2 / 2 variance) (algorithm 3)."""
        a, b = variance.as_integer_ratio()
        t = math.isqrt(a // b) + 1
        while True:
            x = self.laplace(t, 1)
            if self.exp((abs(x) * t * b - a) ** 2, 2 * a * b * t**2):
                return x


def exact_discrete_gaussian(sigma: Fraction | float, count: int, entropy: Entropy) -> Integers:
    """Draw [count] integers from the discrete Gaussian without any error: slow, the reference of
    `DiscreteGaussian`.
    """
    coins = _Coins(entropy)
    variance = Fraction(sigma) ** 2
    return np.array([coins.gaussian(variance) for _ in range(count)], np.int64)


# The grid


def round_to_grid(x: Tensor, unit: float, sigma: float = 0.0) -> Tensor:
    """Return x in whole grid units (int64), rounded to nearest; `unit` is a power of two, so the
    scaling is exact.

    |round(a) - round(b)|_2 <= |a - b|_2 / unit + sqrt(d) for d coordinates, as each moves by at
    most 1/2: see `grid_sensitivity`. Raises PlanError where x is not finite or noise of `sigma`
    grid units might wrap: 8 standard deviations must fit below 2^62.
    """
    if not (0 < unit < math.inf and math.frexp(unit)[0] == 0.5):
        raise PlanError(f"unit={unit}: expected a power of two. Set unit=2**-20, say.")
    # scaling and rounding are exact there too
    narrow = x.dtype == torch.float32 and 2.0**-100 < unit < 2.0**100
    scaled = (x if narrow else x.double()) / unit
    limit = 2**62 - _HEADROOM * sigma
    # not so for NaN either; x is private and goes unquoted
    if x.numel() and not _largest(scaled) < limit:
        raise PlanError(
            f"unit={unit}, sigma={sigma} grid units: expected finite x and 8 sigma of head-room "
            "below 2^62 grid units. Clip x or take a coarser grid."
        )
    return scaled.round_().to(torch.int64)


def _largest(x: Tensor) -> float:
    """Return the largest |x|; NaN where one is."""
    low, high = x.aminmax()
    return max(-float(low), float(high))


def grid_sensitivity(clip: float, unit: float, dimension: int) -> float:
    """Return the L2 sensitivity, in grid units,
    of a rounded sum of [dimension] rows of norm at most `clip`.
    """
    return clip / unit + math.sqrt(dimension)


def gaussian_float(shape: Sequence[int], sigma: float, generator: np.random.Generator) -> Tensor:
    """Draw float32 noise N(0, sigma^2): for simulation_only, as neither its rounding nor its
    generator is private.
    """
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32)) * sigma


# Single readings, noised where they arise (local differential privacy)


def randomised_response(
    value: ArrayLike, categories: int, epsilon: float, entropy: Entropy
) -> Integers:
    """Report each value (0 ..
    k-1) truly with probability e^epsilon / (e^epsilon + k - 1), else one of the others.

    Each report is epsilon-locally private, delta = 0 (Kairouz, Bonawitz and Ramage 2016): the odds
    are rounded down to multiples of 2^-64, so no two values' probabilities of a report have a ratio
    above e^epsilon. Raises DataError, which quotes no value, where one is not a category.
    """
    keep = _keep_probability(categories, epsilon)
    truth = _categories(value, categories)
    kept = entropy.bernoulli(keep, truth.size).reshape(truth.shape)
    step = 1 + entropy.below(categories - 1, truth.size).reshape(truth.shape)
    return np.where(kept, truth, (truth + step) % categories)


def randomised_response_frequencies(
    reports: ArrayLike, categories: int, epsilon: float
) -> tuple[Floats, Floats]:
    """Return unbiased estimates [k] of the values' shares from reports [N],
    and their standard errors [k].

    The error is that of the noise, for shares among these N devices; estimates may lie outside 0 ..
    1.
    """
    keep = float(_keep_probability(categories, epsilon))
    other = (1 - keep) / (categories - 1)
    report = _categories(reports, categories).ravel()
    if not report.size:
        raise DataError("reports: expected at least one, got none. Wait for the devices to report.")
    share = (np.bincount(report, minlength=categories) / report.size - other) / (keep - other)
    likely = share.clip(0, 1)
    variance = (likely * keep * (1 - keep) + (1 - likely) * other * (1 - other)) / report.size
    return share, np.sqrt(variance) / (keep - other)


def _keep_probability(categories: int, epsilon: float) -> Fraction:
    """Return the largest multiple of 2^-64, below 1, whose odds against one other category are at
    most e^epsilon.
    """
    _above_zero("epsilon", epsilon)
    if categories < 2:
        raise PlanError(
            f"categories={categories}: expected at least 2. One category needs no report."
        )
    with localcontext(prec=60):
        keep = 2**64 / (1 + (categories - 1) * (-Decimal(epsilon)).exp())
    return Fraction(min(int(keep), 2**64 - 1), 2**64)


def _categories(value: ArrayLike, categories: int) -> Integers:
    number = np.asarray(value)
    if number.size and (
        number.dtype.kind not in "biu" or number.min() < 0 or number.max() >= categories
    ):
        raise DataError(
            f"categories={categories}: expected integers 0 to {categories - 1}. Number them from 0."
        )
    return number.astype(np.int64)


def discrete_laplace(
    reading: ArrayLike, low: float, high: float, unit: float, epsilon: float, entropy: Entropy
) -> Floats:
    """Report each reading clamped to the public [low, high], on a grid of step `unit` from low,
    plus Laplace noise.

    Each report is epsilon-locally private, delta = 0: with R = (high - low) / unit steps, rounded
    up, the noise z has probability proportional to exp(-|z| epsilon / R), drawn without error in
    whole numbers (Canonne, Kamath and Steinke 2020, algorithm 2; about 7 microseconds each).
    Reports may lie outside [low, high]; clamping them would bias their mean. Raises DataError,
    which quotes no value, for NaN; infinite readings are clamped.
    """
    scale = _laplace_scale(low, high, unit, epsilon)
    true = np.asarray(reading, np.float64)
    if np.isnan(true).any():
        raise DataError(
            "reading: expected numbers, got NaN. Send no report where the device has no reading."
        )

    index = np.rint((true.clip(low, high) - low) / unit)
    coins = _Coins(entropy)
    noise = np.array(
        [coins.laplace(scale.numerator, scale.denominator) for _ in range(true.size)], np.float64
    )

    return np.asarray(low + unit * (index + noise.reshape(true.shape)))


def discrete_laplace_variance(low: float, high: float, unit: float, epsilon: float) -> float:
    """Return the variance of the noise of `discrete_laplace`, in the reading's unit squared."""
    return unit**2 / (2 * math.sinh(1 / (2 * float(_laplace_scale(low, high, unit, epsilon)))) ** 2)


def _laplace_scale(low: float, high: float, unit: float, epsilon: float) -> Fraction:
    """Return R / epsilon, R the steps of the grid from low to high."""
    for name, number in (("unit", unit), ("epsilon", epsilon)):
        _above_zero(name, number)
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise PlanError(
            f"low={low}, high={high}: expected finite low < high. Set the public range of the "
            "reading."
        )
    # 0.3 / 0.1 is 3 steps; never less than rint of a reading gives
    steps = math.ceil((high - low) / unit - 1e-9)
    if not 1 <= steps <= 2**53:
        raise PlanError(
            f"unit={unit}: expected high - low = {high - low} to hold 1 to 2^53 steps. Set unit "
            "anew."
        )
    return steps / Fraction(epsilon)


def geometric_noise(shape: Sequence[int], epsilon: float, entropy: Entropy) -> Integers:
    """Return whole-number Laplace noise for counts of which a patient moves one by one:
    epsilon-private, delta = 0.

    P(z) is proportional to exp(-epsilon |z|), drawn without error as in `discrete_laplace`.
    """
    _above_zero("epsilon", epsilon)
    coins = _Coins(entropy)
    scale = 1 / Fraction(epsilon)
    drawn = [coins.laplace(scale.numerator, scale.denominator) for _ in range(math.prod(shape))]
    return np.array(drawn, np.int64).reshape(tuple(shape))


def _above_zero(name: str, number: float) -> None:
    if not 0 < number < math.inf:
        raise PlanError(f"{name}={number}: expected a finite number above 0. Set {name} to one.")
