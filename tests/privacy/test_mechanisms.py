"""Noise on the grid: exact probabilities where they can be counted, statistics with power where
they cannot.

Keys of the statistical tests are fixed, so what passes once always passes.
"""

import hashlib
import math
import os
import threading
from collections import Counter
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES
from cryptography.hazmat.primitives.ciphers.modes import ECB
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medfed.core.checks import DataError, PlanError
from medfed.core.entropy import Entropy
from medfed.privacy import mechanisms
from medfed.privacy.mechanisms import (
    DiscreteGaussian,
    delta_cost,
    discrete_laplace,
    exact_discrete_gaussian,
    gaussian_float,
    geometric_noise,
    grid_sensitivity,
    randomised_response,
    randomised_response_frequencies,
    round_to_grid,
)

ALPHA = 1e-3


def _key(name: object) -> bytes:
    return hashlib.blake2b(str(name).encode(), digest_size=32).digest()


def _entropy(name: object) -> Entropy:
    return Entropy(_key(name))


class Script(Entropy):
    """Hands out the words it is given."""

    def __init__(self, *words: int) -> None:
        super().__init__()
        self.left = list(words)

    def words(self, count: int) -> np.ndarray:
        taken = self.left[:count]
        self.left = self.left[count:]
        assert len(taken) == count
        return np.array(taken, np.uint64)


# Entropy


def _aes_ctr(key: bytes, words: int) -> np.ndarray:
    """Counter mode by hand: the counters 0, 1, ... as big-endian blocks, each encrypted alone."""
    counters = b"".join(number.to_bytes(16, "big") for number in range((words + 1) // 2))
    return np.frombuffer(Cipher(AES(key), ECB()).encryptor().update(counters), np.uint64)[:words]


@settings(max_examples=30)
@given(st.binary(min_size=32, max_size=32), st.lists(st.integers(0, 70), max_size=6))
def test_words_are_aes_in_counter_mode_however_they_are_asked_for(
    key: bytes, counts: list[int]
) -> None:
    entropy = Entropy(key)
    drawn = [entropy.words(count) for count in counts]
    assert [len(words) for words in drawn] == counts
    assert np.array_equal(
        np.concatenate([*drawn, np.empty(0, np.uint64)]), _aes_ctr(key, sum(counts))
    )


def test_words_longer_than_a_piece_are_the_same_stream() -> None:
    assert np.array_equal(_entropy("long").words(100_001), _aes_ctr(_key("long"), 100_001))


def test_no_word_comes_twice() -> None:
    once = Entropy()
    again = Entropy()
    words = np.concatenate([once.words(1000), once.words(1000), again.words(1000)])
    assert len(np.unique(words)) == 3000


def test_key_has_256_bits() -> None:
    with pytest.raises(ValueError, match="key size"):
        Entropy(bytes(16))


def test_a_forked_process_takes_a_new_key(monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = _entropy("fork")
    entropy.words(10)
    monkeypatch.setattr(os, "getpid", lambda: -1)
    assert not np.isin(entropy.words(10), _aes_ctr(_key("fork"), 100)).any()


def test_threads_share_one_stream_without_repeating_it() -> None:
    entropy = _entropy("threads")
    drawn = []
    threads = [
        threading.Thread(target=lambda: drawn.extend(entropy.words(2000) for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert np.array_equal(
        np.sort(np.concatenate(drawn)), np.sort(_aes_ctr(_key("threads"), 160_000))
    )


def test_uniform_numbers_are_uniform_on_their_grid() -> None:
    u = _entropy("uniform").uniform(50_000)
    assert stats.kstest(u, "uniform").pvalue > ALPHA
    assert stats.kstest(u**1.03, "uniform").pvalue < ALPHA
    assert Script(0, 2**64 - 1, 2**11).uniform(3).tolist() == [0, 1 - 2**-53, 2**-53]


@given(st.fractions(0, 1), st.integers(0, 2**64 - 1))
def test_a_coin_compares_a_word_with_p(p: Fraction, word: int) -> None:
    assert Script(word).bernoulli(p, 1)[0] == (word < math.floor(p * 2**64))


def test_coins_are_true_as_often_as_p_says() -> None:
    heads = int(_entropy("coins").bernoulli(0.3, 50_000).sum())
    assert stats.binomtest(heads, 50_000, 0.3).pvalue > ALPHA
    assert stats.binomtest(heads, 50_000, 0.31).pvalue < ALPHA
    assert not _entropy("never").bernoulli(0, 100).any()
    assert _entropy("always").bernoulli(1, 100).all()


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_a_coin_needs_a_probability(p: float) -> None:
    with pytest.raises(PlanError, match="expected a probability"):
        Entropy().bernoulli(p, 1)


@pytest.mark.parametrize("n", [2, 3, 5, 8, 100])
def test_integers_below_n_are_as_likely_as_each_other(n: int) -> None:
    counts = np.bincount(_entropy(("below", n)).below(n, 20_000), minlength=n)
    assert len(counts) == n
    assert stats.chisquare(counts).pvalue > ALPHA
    # a remainder, the classic mistake
    leaning = np.bincount(_entropy(("below", n)).below(2 * n + 1, 20_000) % n)
    assert n > 8 or stats.chisquare(leaning).pvalue < ALPHA


def test_a_word_beyond_n_is_drawn_again() -> None:
    assert Script(3 << 62, 1 << 62, 3 << 62, 2 << 62).below(3, 2).tolist() == [2, 1]
    assert Script(2**64 - 1).below(2**63, 1).tolist() == [2**63 - 1]
    assert Script(2**64 - 1, 5).below(1, 1).tolist() == [0]
    for n in (0, 2**63 + 1):
        with pytest.raises(PlanError, match="expected 1 to 2"):
            Entropy().below(n, 1)


# Exact probabilities of the tables and of their sums


def _column_masses(table: mechanisms._AliasTable) -> Counter[int]:
    """P(x) 2^128 as the table's own edges say, counted in whole numbers."""
    n = len(table.edge)
    masses = Counter[int]()
    assert int(table.shift) == 64 - (n.bit_length() - 1)
    for column in range(n):
        edge = (int(table.edge[column]) << 64 | int(table.fine[column])) - column * (2**128 // n)
        assert 0 <= edge <= 2**128 // n
        masses[int(table.value[2 * column + 1])] += edge
        masses[int(table.value[2 * column])] += 2**128 // n - edge
    return masses


def _table_masses(table: mechanisms._Table) -> Counter[int]:
    """P(x) 2^128 of a table: 2^112 for every quarter word that is the value's own, and its part of
    the others.
    """
    own = Counter(table.direct.tolist())
    left = own.pop(mechanisms._REST)
    masses = Counter({x: n * 2**112 for x, n in own.items()})
    for x, mass in _column_masses(table.rest).items():
        part, lost = divmod(mass * left, 2**16)
        assert lost == 0
        masses[x] += part
    return masses


def _density(variance: mpmath.mpf, most: int) -> dict[int, mpmath.mpf]:
    """The discrete Gaussian's probabilities up to `most`, its normaliser by Jacobi's theta
    function.
    """
    q = mpmath.exp(-1 / (2 * variance))
    normaliser = mpmath.jtheta(3, 0, q) if variance < 50 else mpmath.sqrt(2 * mpmath.pi * variance)
    right = [mpmath.exp(-mpmath.mpf(x * x) / (2 * variance)) / normaliser for x in range(most + 1)]
    return {x: right[abs(x)] for x in range(-most, most + 1)}


def _distance(masses: dict[int, int], total: int, sigma: mpmath.mpf) -> mpmath.mpf:
    """Total variation between counted masses and the discrete Gaussian."""
    density = _density(sigma**2, max(map(abs, masses)))
    inside = sum(abs(mpmath.mpf(masses.get(x, 0)) / total - p) for x, p in density.items())
    return (inside + 1 - sum(density.values())) / 2


@pytest.mark.parametrize("sigma", [0.3, 0.7, 3.0, 57.3, 204.7, 400.0, 806.0])
def test_a_tables_masses_are_the_discrete_gaussians(sigma: float) -> None:
    table = DiscreteGaussian(sigma)._top
    with mpmath.workdps(50):
        masses = _table_masses(table)
        exact = mpmath.mpf(sigma)
        assert sum(masses.values()) == 2**128
        assert max(map(abs, masses)) >= 10.16 * sigma
        assert _distance(masses, 2**128, exact) <= table.total_variation <= 2.0**-75
        assert _distance(masses, 2**128, exact * (1 + mpmath.mpf(2) ** -70)) > table.total_variation


@pytest.mark.parametrize("sigma", [806.5, 1000.0])
def test_a_sums_masses_are_the_discrete_gaussians(sigma: float) -> None:
    """The convolution itself, counted: X_low + k X_high from the masses of both tables."""
    noise = DiscreteGaussian(sigma)
    [(k, low)] = noise._lower
    sums = Counter[int]()
    lower = list(_table_masses(low).items())
    for high, many in _table_masses(noise._top).items():
        for x, few in lower:
            sums[x + k * high] += many * few
    with mpmath.workdps(100):  # the masses' unit is 2^-256
        exact = mpmath.mpf(sigma)
        assert sum(sums.values()) == 2**256
        assert _distance(sums, 2**256, exact) <= noise.total_variation
        assert _distance(sums, 2**256, exact * (1 + mpmath.mpf(2) ** -60)) > noise.total_variation


@settings(max_examples=25)
@given(st.floats(0.5, 2.0**40))
def test_tables_variances_add_up_and_the_stated_bound_holds_for_every_sigma(sigma: float) -> None:
    noise = DiscreteGaussian(sigma)
    variance = Fraction(0)
    scale = 1
    for k, table in noise._lower:
        assert table is mechanisms._table(Fraction(2 * k) ** 2)
        variance += scale**2 * 4 * k**2
        scale *= k
    rest = (Fraction(sigma) ** 2 - variance) / scale**2
    assert noise._top is mechanisms._table(rest)
    assert rest <= 806**2
    assert not noise._lower or rest >= 21
    assert all(1 / (1 / 4 + k**2 / later) > 3.9 for k, later in _above(noise))
    assert noise.total_variation <= mechanisms.worst_total_variation(sigma) < 2.0**-74
    tables = [noise._top, *(table for _, table in noise._lower)]
    assert all(len(table.rest.edge) <= 1 << 14 for table in tables)
    assert all((table.direct == mechanisms._REST).sum() <= 1 << 12 for table in tables)
    assert len(tables) <= 2 or sigma > 806 * 403


def _above(noise: DiscreteGaussian) -> list[tuple[int, float]]:
    """Each sum's k, and k^2 times its X_high's variance."""
    variance = Fraction(noise.sigma) ** 2
    found = []
    for k, _ in noise._lower:
        found.append((k, float(variance - 4 * k**2)))
        variance = variance / k**2 - 4
    return found


def test_a_word_on_the_edge_is_decided_by_a_second_word() -> None:
    table = DiscreteGaussian(3.0)._top.rest
    width = 2**64 // len(table.edge)

    shared = [
        c
        for c, edge in enumerate(table.edge.tolist())
        if 1 < edge - c * width < width - 1 and table.fine[c]
    ]
    column = shared[len(shared) // 2]
    edge = int(table.edge[column])
    fine = int(table.fine[column])
    after = table.value[2 * column]
    before = table.value[2 * column + 1]
    assert table.sample(3, Script(edge - 1, edge, edge + 1, fine - 1)).tolist() == [
        before,
        before,
        after,
    ]
    assert table.sample(3, Script(edge - 1, edge, edge + 1, fine)).tolist() == [
        before,
        after,
        after,
    ]


def _plain(table: mechanisms._Table, count: int, entropy: Entropy) -> list[int]:
    """Draws by a loop: quarter words in order, then a word for each that its table
    sends further.
    """
    words = entropy.words(-(-count // 4)).tolist()
    quarters = [word >> 16 * i & 0xFFFF for word in words for i in range(4)][:count]
    drawn = [int(table.direct[quarter]) for quarter in quarters]
    further = [i for i, value in enumerate(drawn) if value == mechanisms._REST]
    for i, word in zip(further, entropy.words(len(further)).tolist(), strict=True):
        column = word >> int(table.rest.shift)
        drawn[i] = int(table.rest.value[2 * column + (word < int(table.rest.edge[column]))])
    return drawn


@pytest.mark.parametrize("count", [1, 41, 1000])
@pytest.mark.parametrize("sigma", [0.7, 300.0, 2.0**12, 2.0**25, 2.0**36])
def test_draws_are_the_plain_loops(sigma: float, count: int) -> None:
    noise = DiscreteGaussian(sigma)
    entropy = _entropy("plain")
    total = _plain(noise._top, count, entropy)
    for k, table in reversed(noise._lower):
        total = [
            k * high + low for high, low in zip(total, _plain(table, count, entropy), strict=True)
        ]
    assert noise.sample(count, _entropy("plain")).tolist() == total


def test_tables_are_made_once() -> None:
    assert DiscreteGaussian(2.0**20)._top is DiscreteGaussian(2.0**20)._top


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 2.0**57])
def test_sigma_out_of_range_is_refused(sigma: float) -> None:
    with pytest.raises(PlanError, match="grid units: expected a number in"):
        DiscreteGaussian(sigma)


# The draws' distribution: accepted, and others rejected


def _fit(drawn: np.ndarray, sigma: float) -> float:
    """Chi-square p-value of integers against the discrete Gaussian, in up to 40 cells of about
    equal probability.
    """
    edges = np.unique(np.floor(stats.norm.ppf(np.linspace(0, 1, 41)[1:-1]) * sigma)) + 0.5
    if sigma < 1000:
        x = np.arange(-math.ceil(12 * sigma), math.ceil(12 * sigma) + 1)
        p = np.exp(-(x**2) / (2 * sigma**2))
        cells = np.bincount(np.searchsorted(edges, x), p / p.sum(), len(edges) + 1)
    else:  # a rounded Gaussian is this near: its variance is larger by 1/12
        cells = np.diff(stats.norm.cdf(np.concatenate([[-np.inf], edges, [np.inf]]), scale=sigma))
    counts = np.bincount(np.searchsorted(edges, drawn), minlength=len(cells))
    return float(stats.chisquare(counts, cells * len(drawn)).pvalue)


SIGMAS = [0.7, 3.0, 300.0, 500.0, 2.0**12, 2.0**25, 2.0**36]  # of one table, two, three, four
WRONG = [0.5, 2 / 3, 0.97, 1.03, 1.5]


@pytest.mark.parametrize("sigma", SIGMAS)
def test_draws_have_this_sigma_and_no_other(sigma: float) -> None:
    drawn = DiscreteGaussian(sigma).sample(60_000, _entropy(sigma))
    assert drawn.dtype == np.int64
    assert _fit(drawn, sigma) > ALPHA
    assert [wrong for wrong in WRONG if _fit(drawn, sigma * wrong) > ALPHA] == []


@pytest.mark.parametrize("sigma", [1000.0, 2.0**25])
def test_low_digits_of_a_wide_sum_are_uniform(sigma: float) -> None:
    """A sum whose low part is too narrow for its k has gaps that no histogram of wide
    cells sees.
    """
    noise = DiscreteGaussian(sigma)
    k = noise._lower[0][0]
    digits = noise.sample(100_000, _entropy(("digits", sigma))) % k
    assert stats.chisquare(np.bincount(digits, minlength=k)).pvalue > ALPHA
    narrow = DiscreteGaussian(k / 3).sample(100_000, _entropy("narrow")) % k
    assert stats.chisquare(np.bincount(narrow, minlength=k)).pvalue < ALPHA


@pytest.mark.parametrize("sigma", [0.7, 3.0, Fraction(5, 2), 300.0])
def test_exact_draws_have_this_sigma_and_no_other(sigma: float | Fraction) -> None:
    drawn = exact_discrete_gaussian(sigma, 15_000, _entropy(("exact", sigma)))
    assert _fit(drawn, float(sigma)) > ALPHA
    assert [
        wrong
        for wrong in (0.5, 2 / 3, 0.95, 1.05, 1.5)
        if _fit(drawn, float(sigma) * wrong) > ALPHA
    ] == []


@pytest.mark.parametrize("sigma", [0.7, 3.0, 500.0, 2.0**25 + 0.1])
def test_fast_and_exact_draws_look_alike(sigma: float) -> None:
    exact = exact_discrete_gaussian(sigma, 6000, _entropy(("slow", sigma)))

    def alike(fast: float) -> bool:
        drawn = DiscreteGaussian(fast).sample(60_000, _entropy(("fast", sigma)))
        cuts = np.unique(np.quantile(drawn, np.linspace(0, 1, 21)[1:-1])) + 0.5
        table = [
            np.bincount(np.searchsorted(cuts, x), minlength=len(cuts) + 1) for x in (exact, drawn)
        ]
        return bool(stats.chi2_contingency(table).pvalue > ALPHA)

    assert alike(sigma)
    assert [wrong for wrong in (0.5, 2 / 3, 0.9, 1.1, 1.5) if alike(wrong * sigma)] == []


@pytest.mark.parametrize(("numerator", "denominator"), [(0, 1), (1, 3), (1, 1), (5, 2)])
def test_exact_coins_are_true_with_probability_exp(numerator: int, denominator: int) -> None:
    coins = mechanisms._Coins(_entropy(numerator))
    p = math.exp(-numerator / denominator)
    heads = sum(coins.exp(numerator, denominator) for _ in range(20_000))
    assert stats.binomtest(heads, 20_000, p).pvalue > ALPHA
    assert stats.binomtest(heads, 20_000, p - 0.03).pvalue < ALPHA


@given(st.integers(1, 2**140), st.integers(0, 2**30))
def test_exact_integers_are_below_n(n: int, seed: int) -> None:
    coins = mechanisms._Coins(_entropy(seed))
    assert all(0 <= coins.below(n) < n for _ in range(5))


# Independence and the size of noise in known inputs


def variance_interval(n: int, confidence: float = 0.999) -> tuple[float, float]:
    """The interval of mean(x^2) / sigma^2 over n draws that holds `confidence` of the probability
    (chi-square).
    """
    low, high = stats.chi2.ppf([(1 - confidence) / 2, (1 + confidence) / 2], n) / n
    return float(low), float(high)


def _has_variance(drawn: np.ndarray, sigma: float) -> bool:
    low, high = variance_interval(drawn.size)
    return bool(low < np.mean((drawn / sigma) ** 2) < high)


@pytest.mark.parametrize("sigma", [3.0, 300.0, 2.0**25])
def test_a_known_input_tells_planted_faults_of_the_noise(sigma: float) -> None:
    """100 coordinates suffice for half the sigma; what is reused across rounds adds up wrongly."""
    noise = DiscreteGaussian(sigma)
    entropy = _entropy(("known", sigma))
    rounds = np.stack([noise.sample(100, entropy) for _ in range(10)])
    assert _has_variance(rounds[0], sigma)
    assert not _has_variance(DiscreteGaussian(sigma / 2).sample(100, entropy), sigma)
    assert not _has_variance(DiscreteGaussian(sigma * 2 / 3).sample(100, entropy), sigma)
    assert not _has_variance(DiscreteGaussian(sigma * 3 / 2).sample(100, entropy), sigma)
    assert not _has_variance(np.zeros(100), sigma)
    assert _has_variance(rounds.sum(0), sigma * math.sqrt(10))
    assert not _has_variance(np.repeat(rounds[:1], 10, 0).sum(0), sigma * math.sqrt(10))


def test_variance_interval_holds_its_confidence() -> None:
    drawn = DiscreteGaussian(2.0**20).sample(100 * 4000, _entropy("interval")).reshape(4000, 100)
    low, high = variance_interval(100, 0.95)
    inside = int(sum(low < square < high for square in np.mean((drawn / 2.0**20) ** 2, axis=1)))
    assert stats.binomtest(inside, 4000, 0.95).pvalue > ALPHA
    assert stats.binomtest(inside, 4000, 0.97).pvalue < ALPHA


@pytest.mark.parametrize("sigma", [0.7, 300.0, 2.0**25])
def test_draws_are_independent_of_the_ones_before(sigma: float) -> None:
    """Sums over runs of 64 have 64 times the variance of one, also where a run crosses the blocks
    that are drawn.
    """
    n = 1 << 18
    drawn = DiscreteGaussian(sigma).sample(n, _entropy(("independent", sigma))).astype(float)
    assert n > 2 * mechanisms._BLOCK
    spread = drawn.std()

    def independent(x: np.ndarray) -> bool:
        lags = [
            abs(np.mean(x[:-lag] * x[lag:])) / spread**2 * math.sqrt(n) for lag in (1, 2, 3, n // 2)
        ]
        return _has_variance(x.reshape(-1, 64).sum(1), 8 * spread) and max(lags) < stats.norm.isf(
            ALPHA / 8
        )

    assert independent(drawn)
    # one in 32 repeats
    assert not independent(np.where(np.arange(n) % 32 == 0, np.roll(drawn, 1), drawn))
    assert not independent(drawn + 0.1 * spread)  # a bias


def test_the_same_noise_never_comes_twice() -> None:
    noise = DiscreteGaussian(2.0**30)
    entropy = Entropy()
    first = noise.sample(50, entropy)
    second = noise.sample(50, entropy)
    elsewhere = noise.sample(50, Entropy())
    assert not (first == second).any()
    assert not (first == elsewhere).any()


# Accounting


@pytest.mark.parametrize("variance", [0.3, 1.0, 1.7**2, 3.36])
def test_smoothing_bounds_how_much_a_sum_depends_on_its_centre(variance: float) -> None:
    with mpmath.workdps(60):
        v = mpmath.mpf(variance)
        sums = [
            sum(mpmath.exp(-((j + mpmath.mpf(c) / 8) ** 2) / (2 * v)) for j in range(-40, 41))
            for c in range(5)
        ]
        worst = max(abs(x / mpmath.sqrt(2 * mpmath.pi * v) - 1) for x in sums)
        assert worst <= mechanisms._smoothing(variance) <= 1.02 * worst


@pytest.mark.parametrize("sigma", [2.0, 3.0])
def test_a_rounded_continuous_gaussian_is_the_discrete_one(sigma: float) -> None:
    """Integrated over y at 40 digits: the trapezoid rule with step 1/8 is exact to far more for
    such functions.
    """

    def distance(rounding: float) -> mpmath.mpf:
        v_r = mpmath.mpf(rounding) ** 2
        v_c = mpmath.mpf(sigma) ** 2 - v_r
        most = math.ceil(14 * sigma)
        step = 8
        tooth = [
            sum(mpmath.exp(-((z - mpmath.mpf(i) / step) ** 2) / (2 * v_r)) for z in range(-40, 41))
            for i in range(step)
        ]
        joint = dict.fromkeys(range(most + 1), mpmath.mpf(0))

        for i in range(-step * most, step * most + 1):
            y = mpmath.mpf(i) / step
            weight = (
                mpmath.exp(-(y**2) / (2 * v_c))
                / mpmath.sqrt(2 * mpmath.pi * v_c)
                / step
                / tooth[i % step]
            )
            for z in joint:
                joint[z] += weight * mpmath.exp(-((z - y) ** 2) / (2 * v_r))

        density = _density(mpmath.mpf(sigma) ** 2, most)
        return sum(abs(p - joint[abs(z)]) for z, p in density.items()) / 2

    with mpmath.workdps(40):
        assert all(
            distance(rounding) <= mechanisms._smoothing(rounding**2) for rounding in (0.7, 1.2, 1.7)
        )
        assert distance(0.7) > mechanisms._smoothing(1.7**2)
    assert mechanisms._smoothing(1.7**2) <= DiscreteGaussian(sigma).total_variation


def test_continuous_sigma_is_less_by_the_rounding() -> None:
    assert DiscreteGaussian(5.0).continuous_sigma == pytest.approx(
        math.sqrt(25 - 1.7**2), rel=1e-15
    )
    with pytest.raises(PlanError, match=r"sigma=1\.7 grid units: expected above 1\.7"):
        _ = DiscreteGaussian(1.7).continuous_sigma


PMFS = st.lists(st.floats(0.01, 1), min_size=5, max_size=5).map(lambda x: np.array(x) / sum(x))


@given(PMFS, PMFS, PMFS, PMFS, st.floats(0, 3), st.floats(0, 0.2))
def test_delta_cost_covers_what_two_near_distributions_can_do(
    p: np.ndarray, q: np.ndarray, p_off: np.ndarray, q_off: np.ndarray, epsilon: float, t: float
) -> None:
    def delta(one: np.ndarray, two: np.ndarray) -> float:
        return float(np.maximum(one - math.exp(epsilon) * two, 0).sum())

    near_p, near_q = (1 - t) * p + t * p_off, (1 - t) * q + t * q_off  # within t of p and of q
    assert delta(near_p, near_q) <= delta(p, q) + delta_cost(t, 1, epsilon) + 1e-12


def test_delta_cost_is_reached_and_adds_up() -> None:
    p = np.array([0.5, 0.5])
    q = np.array([0.25, 0.75])
    t = 0.1
    move = np.array([t, -t])
    before = (p - 1.5 * q)[0]
    after = (p + move - 1.5 * (q - move))[0]
    assert after - before == pytest.approx(delta_cost(t, 1, math.log(1.5)))
    assert delta_cost(2.0**-74, 10**9, 1.0) == pytest.approx((1 + math.e) * 1e9 * 2.0**-74)


# The grid

VECTORS = st.lists(st.floats(-1e6, 1e6), min_size=7, max_size=7).map(
    lambda x: torch.tensor(x, dtype=torch.float64)
)


@given(VECTORS, VECTORS, st.integers(-30, 4))
def test_rounding_moves_a_distance_by_no_more_than_is_said(
    a: torch.Tensor, b: torch.Tensor, bits: int
) -> None:
    unit = 2.0**bits
    one = round_to_grid(a, unit)
    two = round_to_grid(b, unit)
    assert one.dtype == torch.int64
    assert ((one.double() * unit - a).abs() <= unit / 2).all()
    bound = grid_sensitivity(float((a - b).norm()), unit, a.numel())
    assert float((one - two).double().norm()) <= bound * (1 + 1e-12)


def test_rounding_reaches_what_is_said() -> None:
    a = torch.full((100,), 0.501)
    b = torch.full((100,), 0.499)
    moved = float((round_to_grid(a, 1.0) - round_to_grid(b, 1.0)).double().norm())
    assert 0.9 * grid_sensitivity(0.02, 1.0, 100) < moved <= grid_sensitivity(0.0201, 1.0, 100)


def test_a_float32_sum_is_rounded_exactly() -> None:
    assert round_to_grid(torch.tensor([[1.0, -1.5], [2.0**-20, 0.0]]), 2.0**-20).tolist() == [
        [2**20, -3 * 2**19],
        [1, 0],
    ]
    assert round_to_grid(torch.empty(0), 1.0).shape == (0,)


@given(st.lists(st.floats(-(2.0**40), 2.0**40, width=32), max_size=5), st.integers(-30, 4))
def test_float32_is_rounded_as_its_float64_twin(values: list[float], bits: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    if x.numel() == 0 or float(x.abs().max()) < 2.0 ** (61 + bits):
        assert torch.equal(round_to_grid(x, 2.0**bits), round_to_grid(x.double(), 2.0**bits))


@pytest.mark.parametrize("unit", [0.1, 0.0, -0.5, math.nan, math.inf])
def test_a_grid_is_a_power_of_two(unit: float) -> None:
    with pytest.raises(PlanError, match="expected a power of two"):
        round_to_grid(torch.zeros(2), unit)


@pytest.mark.parametrize(
    ("x", "sigma"),
    [
        (math.nan, 0.0),
        (math.inf, 0.0),
        (2.0**62, 0.0),
        (-(2.0**62), 0.0),
        (2.0**61, 2.0**58),
        (0.0, 2.0**59),
    ],
)
def test_noise_that_might_wrap_is_refused_and_the_value_stays_unsaid(
    x: float, sigma: float
) -> None:
    with pytest.raises(PlanError, match="head-room") as refusal:
        round_to_grid(torch.tensor([0.0, x]), 1.0, sigma)
    assert x == 0 or str(x) not in str(refusal.value)
    assert round_to_grid(torch.tensor([2.0**61]), 1.0, 2.0**57).tolist() == [2**61]


def test_float_noise_is_gaussian_and_reproducible() -> None:
    drawn = gaussian_float((100, 200), 3.0, np.random.default_rng(5))
    assert drawn.shape == (100, 200)
    assert drawn.dtype == torch.float32
    assert stats.kstest(drawn.numpy().ravel(), stats.norm(scale=3).cdf).pvalue > ALPHA
    for wrong in (2.0, 2.8, 3.2, 4.5):
        assert stats.kstest(drawn.numpy().ravel(), stats.norm(scale=wrong).cdf).pvalue < ALPHA
    assert torch.equal(drawn, gaussian_float((100, 200), 3.0, np.random.default_rng(5)))


# Randomised response


@given(st.integers(2, 1000), st.floats(1e-3, 60))
def test_odds_of_a_true_report_are_e_to_the_epsilon_and_never_more(k: int, epsilon: float) -> None:
    keep = mechanisms._keep_probability(k, epsilon)
    with mpmath.workdps(60):
        odds = mpmath.mpf(keep.numerator) / (keep.denominator - keep.numerator) * (k - 1)
        target = mpmath.exp(epsilon)
        assert odds <= target
        steps = keep + Fraction(1, 2**64)  # the next probability up is too much
        assert (
            steps >= 1
            or mpmath.mpf(steps.numerator) / (steps.denominator - steps.numerator) * (k - 1)
            > target
        )


def test_reports_have_the_stated_probabilities() -> None:
    k = 4
    epsilon = 1.0
    n = 20_000
    for truth in range(k):
        counts = np.bincount(
            randomised_response(np.full(n, truth), k, epsilon, _entropy(("rr", truth))), minlength=k
        )

        def fits(epsilon: float, truth: int = truth, counts: np.ndarray = counts) -> bool:
            p = np.where(np.arange(k) == truth, math.exp(epsilon), 1.0)
            return bool(stats.chisquare(counts, n * p / p.sum()).pvalue > ALPHA)

        assert fits(1.0)
        assert not fits(0.85)
        assert not fits(1.15)


def test_estimated_shares_are_unbiased_with_the_stated_error() -> None:
    k = 3
    epsilon = 0.8
    n = 500
    repeats = 400
    truth = np.repeat([0, 1, 2], [300, 150, 50])
    entropy = _entropy("shares")

    runs = [
        randomised_response_frequencies(randomised_response(truth, k, epsilon, entropy), k, epsilon)
        for _ in range(repeats)
    ]
    shares, errors = (np.array(column) for column in zip(*runs, strict=True))
    pull = (shares - np.array([0.6, 0.3, 0.1])) / errors
    assert np.allclose(shares.sum(1), 1)
    assert (np.abs(pull.mean(0)) < stats.norm.isf(ALPHA) / math.sqrt(repeats)).all()
    assert all(_has_variance(column, 1.0) for column in pull.T)
    assert not any(
        _has_variance(column * 1.3, 1.0) or _has_variance(column / 1.3, 1.0) for column in pull.T
    )
    raw = np.bincount(randomised_response(np.repeat(truth, 50), k, epsilon, entropy)) / (50 * n)
    assert abs(raw[0] - 0.6) > 0.1  # uncorrected reports are biased: the estimator has work to do


def test_reports_keep_their_shape_and_boundaries() -> None:
    reports = randomised_response(np.array([[0, 1, 2], [2, 1, 0]], np.uint64), 3, 200.0, Entropy())
    assert reports.tolist() == [[0, 1, 2], [2, 1, 0]]  # a lie has probability 2^-64
    assert reports.dtype == np.int64
    assert randomised_response(True, 2, 1.0, Entropy()).shape == ()
    assert randomised_response([], 2, 1.0, Entropy()).shape == (0,)


@pytest.mark.parametrize("value", [[0, 7191], [-7191], [0.5], [math.nan], ["7191"]])
def test_a_value_that_is_no_category_is_refused_and_not_quoted(value: list[object]) -> None:
    with pytest.raises(DataError, match="categories=3: expected integers 0 to 2") as refusal:
        randomised_response(value, 3, 1.0, Entropy())  # type: ignore[arg-type]
    assert "7191" not in str(refusal.value)


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf])
def test_epsilon_is_finite_and_above_zero(epsilon: float) -> None:
    for call in (
        lambda: randomised_response([0], 2, epsilon, Entropy()),
        lambda: randomised_response_frequencies([0], 2, epsilon),
        lambda: discrete_laplace([0.5], 0, 1, 0.1, epsilon, Entropy()),
    ):
        with pytest.raises(PlanError, match=f"epsilon={epsilon}: expected a finite number above 0"):
            call()


def test_one_category_and_no_reports_are_refused() -> None:
    with pytest.raises(PlanError, match="categories=1: expected at least 2"):
        randomised_response([0], 1, 1.0, Entropy())
    with pytest.raises(DataError, match="expected at least one"):
        randomised_response_frequencies([], 2, 1.0)


# Discrete Laplace noise


def _laplace_fit(noise: np.ndarray, scale: float) -> float:
    """Chi-square p-value against probabilities proportional to exp(-|z| / scale), tails beyond 4
    scales joined.
    """
    most = math.ceil(4 * scale)
    q = math.exp(-1 / scale)
    z = np.arange(-most, most + 1)
    p = (1 - q) / (1 + q) * q ** np.abs(z)
    p[0] = p[-1] = q**most / (1 + q)
    return float(
        stats.chisquare(
            np.bincount(noise.clip(-most, most) + most, minlength=len(z)), p * len(noise)
        ).pvalue
    )


@pytest.mark.parametrize(
    ("low", "high", "unit", "epsilon"), [(0, 1, 1, 1.0), (34, 42, 0.5, 2.0), (0, 5, 1, 0.7)]
)
def test_laplace_noise_has_this_scale_and_no_other(
    low: float, high: float, unit: float, epsilon: float
) -> None:
    entropy = _entropy(("laplace", epsilon))
    scale = (high - low) / unit / epsilon
    noise = np.rint(
        (discrete_laplace(np.full(20_000, low), low, high, unit, epsilon, entropy) - low) / unit
    )
    assert _laplace_fit(noise.astype(int), scale) > ALPHA
    assert [
        wrong
        for wrong in (0.5, 2 / 3, 0.9, 1.1, 1.5)
        if _laplace_fit(noise.astype(int), wrong * scale) > ALPHA
    ] == []


@pytest.mark.parametrize("epsilon", [0.3, 2.0])
def test_geometric_noise_has_scale_one_over_epsilon_and_no_other(epsilon: float) -> None:
    noise = geometric_noise((200, 100), epsilon, _entropy(("geometric", epsilon)))
    assert noise.dtype == np.int64
    assert noise.shape == (200, 100)
    assert _laplace_fit(noise.ravel(), 1 / epsilon) > ALPHA
    assert [
        wrong
        for wrong in (0.5, 2 / 3, 0.9, 1.1, 1.5)
        if _laplace_fit(noise.ravel(), wrong / epsilon) > ALPHA
    ] == []


def test_laplace_tails_fall_by_e_to_the_epsilon_over_the_range() -> None:
    """The ratio that the guarantee is: how much likelier a report is from `low` than
    from `high`.
    """
    n = 40_000
    from_low, from_high = (
        discrete_laplace(np.full(n, x), 0, 2, 1, 1.0, _entropy(("tail", x))) for x in (0, 2)
    )
    # every such report has the ratio e exactly
    below = int((from_low <= 0).sum())
    above = int((from_high <= 0).sum())
    error = math.sqrt(1 / below + 1 / above)
    assert abs(math.log(below / above) - 1.0) < 3.3 * error
    assert error < 0.03


@given(
    st.lists(st.floats(allow_nan=False), min_size=2, max_size=2),
    st.floats(-50, 50),
    st.floats(0.5, 50),
    st.integers(1, 40),
)
def test_a_reading_moves_the_report_by_no_more_than_the_range(
    reading: list[float], low: float, width: float, steps: int
) -> None:
    """With the noise held still; the noise's scale is for this many steps."""
    unit = width / steps
    one, two = (discrete_laplace(x, low, low + width, unit, 1.0, _entropy("held")) for x in reading)
    moved = (one - two) / unit
    assert moved == pytest.approx(np.rint(moved), abs=1e-6)
    assert abs(moved) <= math.ceil(width / unit - 1e-9) + 1e-6


def test_reports_of_readings_lie_on_the_grid_about_the_clamped_reading() -> None:
    reading = np.array([[36.6, -math.inf], [99.0, 41.97]])
    # so little noise that there is none
    reports = discrete_laplace(reading, 34, 42, 0.1, 1e6, Entropy())
    assert reports == pytest.approx(np.array([[36.6, 34.0], [42.0, 42.0]]))
    assert discrete_laplace(37.0, 34, 42, 0.1, 1.0, Entropy()).shape == ()


@pytest.mark.parametrize(
    ("low", "high", "unit", "message"),
    [
        (1, 1, 0.1, "expected finite low < high"),
        (2, 1, 0.1, "expected finite low < high"),
        (-math.inf, 1, 0.1, "expected finite low < high"),
        (math.nan, 1, 0.1, "expected finite low < high"),
        (0, 1, 0, "unit=0: expected a finite number above 0"),
        (0, 1, math.nan, "unit=nan: expected a finite number above 0"),
        (0, 1, 1e-30, "unit=1e-30: expected high - low"),
    ],
)
def test_a_range_that_is_none_is_refused(
    low: float, high: float, unit: float, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        discrete_laplace([0.5], low, high, unit, 1.0, Entropy())


def test_a_reading_that_is_no_number_is_refused_and_its_neighbours_stay_unsaid() -> None:
    with pytest.raises(DataError, match="got NaN") as refusal:
        discrete_laplace([71.91, math.nan], 0, 100, 1, 1.0, Entropy())
    assert "71.91" not in str(refusal.value)
