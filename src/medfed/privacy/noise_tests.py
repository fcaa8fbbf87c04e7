"""Tests of drawn noise against its law, and how much of it a claim needs by a second reckoning.

Whoever knows a sum and sees it released has the noise itself, number by number. Then a wrong
standard deviation, a key that is used again or a number without noise needs no coins to guess: each
is a test with a known law. A test of variance over N numbers tells 1 from 1 +- 3 / sqrt(N / 2),
where guesses about canaries tell it from nothing.

Nothing here reads what the code under test says of its own noise: the multiplier is worked out
anew, by closed form or by dp-accounting's privacy loss distributions.

V vectors (rounds, or rounds times sites), P numbers of each.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]

_MOST = 1 << 20  # numbers that shape and lags are read from
_PAIRED = 2000  # vectors that are compared two by two
_SMALL = 1 << 18  # grid steps: below it float32 holds a fraction of a step


# How much noise a claim needs


@lru_cache(maxsize=256)
def needed_multiplier(
    epsilon: float,
    delta: float,
    releases: int,
    probability: float = 1.0,
    cap: int = 0,
    population: int = 0,
) -> float:
    """Return the standard deviation over sensitivity that `releases` Gaussian sums need for
    (epsilon, delta).

    Without sampling by the closed form for mu-GDP, delta = F(mu/2 - epsilon/mu) - e^epsilon F(-mu/2
    - epsilon/mu), mu = sqrt(releases) / multiplier (Dong, Roth and Su 2022, eq. 6); with it by
    privacy loss distributions, within 1e-3.
    """
    if probability < 1:
        return _by_loss_distribution(epsilon, delta, releases, probability, cap, population)

    def excess(log_mu: float) -> float:
        mu = math.exp(log_mu)
        above = stats.norm.logcdf(mu / 2 - epsilon / mu)
        below = epsilon + stats.norm.logcdf(-mu / 2 - epsilon / mu)
        return float(np.exp(above) * -np.expm1(min(below - above, 0.0))) - delta

    mu = math.exp(float(optimize.brentq(excess, math.log(1e-6), math.log(1e3), xtol=1e-12)))
    return math.sqrt(releases) / mu


def _by_loss_distribution(
    epsilon: float, delta: float, releases: int, probability: float, cap: int, population: int
) -> float:
    from dp_accounting.pld import privacy_loss_distribution as pld

    def spend(multiplier: float) -> float:
        step = 1e-3 if multiplier > 0.5 else 1e-2
        once: Any
        if cap:
            once = pld.from_truncated_subsampled_gaussian_mechanism(
                population, probability, cap, multiplier, value_discretization_interval=step
            )
        else:
            once = pld.from_gaussian_mechanism(
                multiplier, value_discretization_interval=step, sampling_prob=probability
            )
        return float(once.self_compose(releases).get_epsilon_for_delta(delta))

    low = high = 1.0
    while spend(high) > epsilon:
        low = high
        high = 1.5 * high
    while low == high or spend(low) <= epsilon:
        low, high = low / 1.5, low
    while high > low * 1.001:
        middle = math.sqrt(low * high)
        if spend(middle) <= epsilon:
            high = middle
        else:
            low = middle
    return high


def strategy_coefficients(rounds: int, band: int) -> Floats:
    """Return the banded square root of the prefix-sum matrix,
    c_j = c_(j-1) (2j - 1) / 2j, by recurrence.
    """
    j = np.arange(1, min(band, rounds))
    return np.concatenate([[1.0], np.cumprod((2 * j - 1) / (2 * j))])


def strategy_norm(c_B: ArrayLike, rounds: int, separation: int) -> float:
    """Return the norm of the columns of the strategy's matrix that one patient uses,
    from the matrix itself.
    """
    c = np.asarray(c_B, np.float64)
    total = 0.0
    for use in range(0, rounds, separation):
        column = np.zeros(rounds)
        reach = min(len(c), rounds - use)
        column[use : use + reach] = c[:reach]
        total += float(column @ column)
    return math.sqrt(total)


def whiten(noise_TP: Floats, c_B: ArrayLike) -> Floats:
    """Return what correlated noise was made from, C n:
    independent draws, up to a rounding of half a step.
    """
    fresh_TP = np.zeros_like(noise_TP)
    for lag, c in enumerate(np.asarray(c_B, np.float64)[: len(noise_TP)]):
        fresh_TP[lag:] += c * noise_TP[: len(noise_TP) - lag]
    return fresh_TP


# Whether noise follows its law


@dataclass(frozen=True)
class Law:
    """What came of the tests: p-values by name, each already for all its comparisons, and the
    measured deviation.
    """

    vectors: int
    numbers: int
    ratio: float  # standard deviation over what was expected
    p: dict[str, float]


def against_law(noise_VP: Floats, sigma_V: Floats) -> Law:
    """Test vectors of noise against independent Gaussians around 0 of standard deviation sigma_V.

    Each p-value is exact, or holds to the size of what is compared: chi-square for variances (of
    all numbers, of the worst vector, of the worst coordinate), normal for means, Kolmogorov and
    Smirnov for the shape. "lags" is the largest correlation of the whole sequence with itself,
    moved; "reuse" that of any two vectors, of either sign and any scale: 1 where a key or a counter
    came back.
    """
    x_VP = noise_VP / sigma_V[:, None]
    square_VP = x_VP**2
    V, P = x_VP.shape
    p = {
        "variance": _variance(square_VP.sum(), V * P),
        "variance of a vector": _least([_variance(s, P) for s in square_VP.sum(1)]),
        "variance of a coordinate": _worst_variance(square_VP.sum(0), V),
        "mean": _two_sided(float(x_VP.sum()) / math.sqrt(V * P)),
        "mean of a coordinate": min(
            1.0, P * _two_sided(float(np.abs(x_VP.sum(0)).max()) / math.sqrt(V))
        ),
        "shape": _shape(x_VP),
        "lags": _lags(x_VP.ravel()[:_MOST]),
        "reuse": _reuse(x_VP[:_PAIRED]),
    }

    return Law(V, V * P, math.sqrt(float(square_VP.mean())), p)


def too_small(square: float, numbers: int) -> float:
    """Return how likely a sum of squares so small or smaller is, in units of the variance."""
    return float(stats.chi2.cdf(square, numbers))


def too_large(square: float, numbers: int) -> float:
    """Return how likely so large a sum of squares is, or a larger one."""
    return float(stats.chi2.sf(square, numbers))


def on_grid(noise_VP: Floats) -> float | None:
    """Return the share of numbers that are whole, of those small enough to tell;
    None where fewer than 20 are.
    """
    small = noise_VP[np.abs(noise_VP) < _SMALL]
    if len(small) < 20:
        return None
    return float((np.abs(small - np.rint(small)) < 0.1).mean())


def power(numbers: int, alpha: float, chance: float = 0.95) -> tuple[float, float]:
    """Return the factors of the standard deviation,
    below 1 and above, that "variance" refuses with that chance.

    `numbers` are what was drawn and `alpha` is the p-value below which the test refuses: computed
    from chi-square.
    """
    low = stats.chi2.ppf(alpha / 2, numbers)
    high = stats.chi2.isf(alpha / 2, numbers)
    return (
        math.sqrt(low / stats.chi2.ppf(chance, numbers)),
        math.sqrt(high / stats.chi2.ppf(1 - chance, numbers)),
    )


def _variance(square: float, numbers: int) -> float:
    return min(1.0, 2 * min(too_small(square, numbers), too_large(square, numbers)))


def _worst_variance(square_P: Floats, vectors: int) -> float:
    tail = min(too_small(float(square_P.min()), vectors), too_large(float(square_P.max()), vectors))
    return min(1.0, 2 * len(square_P) * tail)


def _least(values: list[float]) -> float:
    return min(1.0, len(values) * min(values))


def _two_sided(z: float) -> float:
    return float(2 * stats.norm.sf(abs(z)))


def _shape(x_VP: Floats) -> float:
    flat = x_VP.ravel()
    some = flat[:: max(1, len(flat) // 100_000)]
    return float(stats.kstest(some, "norm").pvalue)


def _lags(x_N: Floats) -> float:
    """Judge the largest autocorrelation at any lag up to half the length."""
    n = len(x_N)
    if n < 64:
        return 1.0
    spectrum = np.fft.rfft(x_N, 2 * n)
    product_L = np.fft.irfft(np.abs(spectrum) ** 2, 2 * n)[1 : n // 2]
    scale = float(x_N @ x_N) / n or 1.0
    z_L = product_L / (scale * np.sqrt(n - np.arange(1, n // 2)))
    return min(1.0, len(z_L) * _two_sided(float(np.abs(z_L).max())))


def _reuse(x_VP: Floats) -> float:
    """Judge the largest correlation of two vectors; about 0, the law is Student's with P - 1
    degrees of freedom.
    """
    V, P = x_VP.shape
    if V < 2 or P < 2:
        return 1.0
    norm_V1 = np.linalg.norm(x_VP, axis=1, keepdims=True)
    unit_VP = x_VP / np.where(norm_V1 > 0, norm_V1, 1)
    r_VV = unit_VP @ unit_VP.T
    np.fill_diagonal(r_VV, 0)
    r = min(float(np.abs(r_VV).max()), 1 - 1e-15)
    t = r * math.sqrt((P - 1) / (1 - r**2))
    return float(min(1.0, V * (V - 1) * stats.t.sf(t, P - 1)))
