"""Correlated noise against dense matrices, brute force over all participation patterns, and
jax-privacy's figures.
"""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.linalg import toeplitz

from medfed.core.checks import PlanError
from medfed.privacy.factorisation import (
    UNIT,
    Correlated,
    coefficients,
    expected_error,
    gain,
    grid_sensitivity,
    most_uses,
    sensitivity,
)

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


# Plain twins: everything as T x T matrices


def dense(c_B: Floats, rounds: int) -> Floats:
    """C, T x T."""
    column_T = np.zeros(rounds)
    column_T[: len(c_B)] = c_B[:rounds]
    return np.asarray(toeplitz(column_T, np.zeros(rounds)))


def dense_error(C_TT: Floats) -> float:
    """Root mean square over rounds of the sum of all noise so far: the rows of A C^{-1}."""
    return float(
        np.sqrt(np.mean((np.tril(np.ones_like(C_TT)) @ np.linalg.inv(C_TT)) ** 2) * len(C_TT))
    )


def patterns(rounds: int, separation: int) -> list[tuple[int, ...]]:
    """All sets of rounds that lie at least `separation` apart."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(range(rounds), k) for k in range(rounds + 1)
    )
    return [p for p in subsets if all(b - a >= separation for a, b in itertools.pairwise(p))]


def brute_force(C_TT: Floats, separation: int, uses: int) -> float:
    """Largest |C d| over all patterns and signs of d in {-1, 1}; the first sign is free."""
    most = 0.0
    for pattern in patterns(len(C_TT), separation):
        if 0 < len(pattern) <= uses:
            signs = np.array(
                [(1, *rest) for rest in itertools.product((1, -1), repeat=len(pattern) - 1)]
            )
            most = max(most, float(np.linalg.norm(C_TT[:, list(pattern)] @ signs.T, axis=0).max()))
    return most


def draws(seed: int, sigma: float) -> Callable[[int], Integers]:
    rng = np.random.default_rng(seed)
    return lambda count: np.rint(rng.normal(0, sigma, count)).astype(np.int64)


# Coefficients


def test_coefficients_are_the_square_root_of_the_prefix_sum() -> None:
    assert coefficients(100, 5).tolist() == [1, 0.5, 0.375, 0.3125, 1120 / UNIT]
    c_B = coefficients(100, 100)
    assert np.convolve(c_B, c_B)[:100] == pytest.approx(np.ones(100), abs=2e-3)
    assert (c_B * UNIT == np.rint(c_B * UNIT)).all()


@given(st.integers(1, 400))
def test_coefficients_never_rise_and_their_inverse_stays_small(band: int) -> None:
    c_B = coefficients(500, band)
    assert (np.diff(c_B) <= 0).all() and c_B[0] == 1 and c_B[-1] > 0
    assert expected_error(c_B, 500) <= expected_error(c_B[:1], 500)


def test_a_band_beyond_the_last_round_is_cut() -> None:
    assert coefficients(3, 10).tolist() == coefficients(3, 3).tolist()


@pytest.mark.parametrize(("rounds", "band"), [(0, 1), (5, 0), (5, -1)])
def test_no_band_is_refused(rounds: int, band: int) -> None:
    with pytest.raises(PlanError, match=rf"rounds={rounds}, band={band}: expected 1 or more"):
        coefficients(rounds, band)


# Sensitivity


@pytest.mark.parametrize("rounds", [1, 2, 5, 8, 10])
@pytest.mark.parametrize(("separation", "band"), [(1, 1), (2, 2), (3, 3), (3, 2), (5, 4), (12, 12)])
@pytest.mark.parametrize("uses", [None, 1, 2])
def test_sensitivity_is_the_worst_of_all_patterns(
    rounds: int, separation: int, band: int, uses: int | None
) -> None:
    c_B = coefficients(rounds, band)
    worst = brute_force(dense(c_B, rounds), separation, uses or rounds)
    assert sensitivity(c_B, rounds, separation, uses) == pytest.approx(worst, rel=1e-12)


def test_overlapping_columns_are_refused_as_the_figure_would_be_too_small() -> None:
    c_B = coefficients(8, 3)
    column_norms = np.linalg.norm(dense(c_B, 8), axis=0)
    claimed = max(math.hypot(*column_norms[list(p)]) for p in patterns(8, 2))
    assert brute_force(dense(c_B, 8), separation=2, uses=8) > 1.15 * claimed
    with pytest.raises(
        PlanError, match=r"separation=2 and band=3 do not compose.*band=2.*fleet\.groups=3"
    ):
        sensitivity(c_B, 8, 2)


def test_starting_anew_after_a_crash_needs_no_more_noise() -> None:
    c_B = coefficients(9, 3)
    rounds = 9
    separation = 3
    for crash in range(rounds):
        C_TT = dense(c_B, rounds)
        C_TT[crash:, :crash] = 0  # noise from before the crash is not taken back
        assert brute_force(C_TT, separation, rounds) <= sensitivity(c_B, rounds, separation) + 1e-12


@given(st.data())
def test_rounding_moves_a_run_by_no_more_than_grid_sensitivity(data: st.DataObject) -> None:
    """Two neighbouring runs release the same; how far apart are the means of the draws that explain
    it?
    """
    rounds = data.draw(st.integers(1, 8))
    separation = data.draw(st.integers(1, 4))
    size = data.draw(st.integers(1, 3))
    band = data.draw(st.integers(1, separation))
    c_B = coefficients(rounds, band)
    pattern = data.draw(st.sampled_from(patterns(rounds, separation)))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    released_TP = rng.integers(-(10**6), 10**6, (rounds, size))
    with_TP = rng.integers(-1000, 1000, (rounds, size))
    without_TP = with_TP.copy()
    per_use = 0.0

    for t in pattern:
        row = rng.integers(-3, 4, size)
        without_TP[t] -= row
        per_use = max(per_use, float(np.linalg.norm(row)))

    moved_TP = explained(c_B, released_TP - with_TP) - explained(c_B, released_TP - without_TP)
    bound = grid_sensitivity(c_B, rounds, separation, per_use, size)
    assert np.linalg.norm(moved_TP) <= bound + 1e-9
    reached = {t + i for t in pattern for i in range(band)}
    assert not moved_TP[[t for t in range(rounds) if t not in reached]].any()


def explained(c_B: Floats, noise_TP: Integers) -> Integers:
    """The draws z that give this noise: n_t + round(c_1 n_{t-1} + ...), in Python's way."""
    whole = [int(v * UNIT) for v in c_B]
    taken_TP = np.zeros_like(noise_TP)
    for t in range(len(noise_TP)):
        total_P = sum(
            (w * noise_TP[t - i] for i, w in enumerate(whole) if 0 < i <= t),
            np.zeros_like(noise_TP[0]),
        )
        taken_TP[t] = [math.floor(v / UNIT + 0.5) for v in total_P.tolist()]
    return noise_TP + taken_TP


def test_the_rounding_term_is_needed() -> None:
    """A use of one unit a coordinate: half a unit is taken back, which rounding makes 1 or 0."""
    c_B = [1.0, 0.5]
    noise_TP = np.array([[0] * 50, [0] * 50])
    use_TP = np.array([[1] * 50, [0] * 50])
    moved_TP = explained(np.array(c_B), noise_TP) - explained(np.array(c_B), noise_TP + use_TP)
    per_use = math.sqrt(50)
    assert (
        sensitivity(c_B, 2, 2) * per_use
        < np.linalg.norm(moved_TP)
        <= grid_sensitivity(c_B, 2, 2, per_use, 50)
    )


def test_grid_sensitivity_at_the_size_of_a_network() -> None:
    """195,841 numbers, 100 rounds in ten groups, 2^-20 a unit: rounding costs one per mille."""
    c_B = coefficients(100, 10)
    per_use = 2**20 + math.sqrt(195_841)
    ratio = grid_sensitivity(c_B, 100, 10, per_use, 195_841) / (sensitivity(c_B, 100, 10) * per_use)
    assert 1 < ratio < 1.001
    assert grid_sensitivity([1.0], 100, 10, per_use, 195_841) == math.sqrt(10) * per_use


# What it buys

# Computed with jax-privacy 2.0.0 in float64: toeplitz.optimal_max_error_strategy_coefs (the same
# closed form as ours) cut to the band, sensitivity.get_sensitivity_banded and
# toeplitz.per_query_error. `optimised` is the gain of the coefficients that
# toeplitz.optimize_banded_toeplitz finds for the mean error.
JAX_PRIVACY = [
    # rounds, separation = band, sensitivity, gain (mean), gain (last round), gain if optimised
    # (mean)
    (100, 100, 1.5910, 2.998, 3.950, 3.064),
    (100, 10, 4.2324, 2.338, 2.471, 2.412),
    (100, 4, 6.0998, 1.732, 1.762, 1.815),
    (100, 2, 7.9057, 1.329, 1.335, 1.371),
    (60, 6, 4.0294, 1.925, 2.016, 1.974),
    (30, 5, 3.0624, 1.708, 1.820, 1.724),
    (400, 20, 6.3496, 3.271, 3.393, 3.524),
    (1000, 50, 6.7969, 4.769, 4.986, 5.202),
]


@pytest.mark.parametrize(
    ("rounds", "band", "sensitivity_", "mean", "last", "optimised"), JAX_PRIVACY
)
def test_figures_are_those_of_jax_privacy(
    rounds: int, band: int, sensitivity_: float, mean: float, last: float, optimised: float
) -> None:
    c_B = coefficients(rounds, band)
    assert sensitivity(c_B, rounds, band) == pytest.approx(sensitivity_, rel=1e-3)
    assert gain(c_B, rounds, band) == pytest.approx(mean, rel=2e-3)
    C_TT = dense(c_B, rounds)
    last_row = np.linalg.norm(np.linalg.solve(C_TT.T, np.ones(rounds)))
    independent = math.sqrt(most_uses(rounds, band) * rounds)
    assert independent / (sensitivity(c_B, rounds, band) * last_row) == pytest.approx(
        last, rel=2e-3
    )
    # why no table of optimised coefficients is shipped
    assert gain(c_B, rounds, band) > 0.91 * optimised


def test_gains_of_the_notes() -> None:
    """100 rounds: one participation 3.0 times better, ten participations at separation ten 2.3
    times.
    """
    assert gain(coefficients(100, 100), 100, 100, uses=1) == pytest.approx(3.0, abs=0.05)
    assert gain(coefficients(100, 10), 100, 10) == pytest.approx(2.3, abs=0.05)
    assert gain(coefficients(100, 1), 100, 10) == pytest.approx(1)


@pytest.mark.parametrize(("rounds", "band"), [(1, 1), (7, 3), (40, 10), (40, 40)])
def test_expected_error_is_that_of_the_dense_matrix(rounds: int, band: int) -> None:
    c_B = coefficients(rounds, band)
    assert expected_error(c_B, rounds) == pytest.approx(dense_error(dense(c_B, rounds)), rel=1e-12)


def test_at_full_participation_correlation_gains_nothing() -> None:
    rounds = 60
    left_T = rounds - np.arange(rounds)
    independent = math.sqrt(rounds) * dense_error(np.eye(rounds))
    for a in np.linspace(-0.5, 0.9, 29):
        C_TT = dense(np.array([1.0, a]), rounds)
        worst = np.linalg.norm(np.abs(C_TT).sum(1))  # used in every round, signs chosen to add up
        assert independent <= worst * dense_error(C_TT) * (1 + 1e-12)
    C_TT = np.diag(left_T**0.25)  # no correlation, but later rounds get more noise
    best = independent / (np.linalg.norm(np.diag(C_TT)) * dense_error(C_TT))
    assert 1.05 < best < 3 / math.sqrt(8) < 1.061


# The stream


@given(st.integers(1, 12), st.integers(1, 6), st.integers(0, 2**32), st.floats(0, 30))
def test_what_is_taken_back_is_right_to_half_a_unit(
    rounds: int, band: int, seed: int, log_sigma: float
) -> None:
    """In whole numbers, without error: -1/2 <= c_1 n_{t-1} + ... - (z_t - n_t) < 1/2."""
    c_B = coefficients(rounds, band)
    sigma = 2.0**log_sigma
    noise = Correlated(c_B, 3, draws(seed, sigma))
    noise_TP = np.array([noise.next() for _ in range(rounds)])
    again = draws(seed, sigma)
    fresh_TP = np.array([again(3) for _ in range(rounds)])
    assert (explained(c_B, noise_TP) == fresh_TP).all()
    for t, column in itertools.product(range(rounds), range(3)):
        taken = sum(
            int(v * UNIT) * int(noise_TP[t - i, column]) for i, v in enumerate(c_B) if 0 < i <= t
        )
        assert (
            -UNIT // 2 <= taken - UNIT * int(fresh_TP[t, column] - noise_TP[t, column]) < UNIT // 2
        )


def test_wide_noise_is_the_dense_inverse_times_the_draws() -> None:
    c_B = coefficients(30, 7)
    rounds = 30
    noise = Correlated(c_B, 5, draws(3, 2.0**35))
    again = draws(3, 2.0**35)
    noise_TP = np.array([noise.next() for _ in range(rounds)])
    fresh_TP = np.array([again(5) for _ in range(rounds)])
    exact_TP = np.linalg.solve(dense(c_B, rounds), fresh_TP)
    assert np.abs(noise_TP - exact_TP).max() < 10


def covariance_fits(noise_TP: Integers, expected_TT: Floats) -> bool:
    """Whether the sample covariance over coordinates lies within 5 standard errors of `expected_TT`
    everywhere.
    """
    count = noise_TP.shape[1]
    found_TT = noise_TP @ noise_TP.T.astype(np.float64) / count
    diagonal_T = np.diag(expected_TT)
    error_TT = np.sqrt((np.outer(diagonal_T, diagonal_T) + expected_TT**2) / count)
    return bool((np.abs(found_TT - expected_TT) < 5 * error_TT).all())


def test_covariance_is_the_inverse_of_ctc() -> None:
    c_B = coefficients(8, 4)
    rounds = 8
    sigma = 50.0
    noise = Correlated(c_B, 40_000, draws(11, sigma))
    noise_TP = np.array([noise.next() for _ in range(rounds)])
    C_TT = dense(c_B, rounds)
    right_TT = sigma**2 * np.linalg.inv(C_TT.T @ C_TT)
    assert covariance_fits(noise_TP, right_TT)
    for wrong_TT in (
        right_TT * (2 / 3) ** 2,
        right_TT * (3 / 2) ** 2,
        sigma**2 * np.eye(rounds),  # independent
        sigma**2 * np.linalg.inv(C_TT @ C_TT.T),  # the wrong way round
        # a band less
        sigma**2 * np.linalg.inv((D_TT := dense(coefficients(8, 3), rounds)).T @ D_TT),
    ):
        assert not covariance_fits(noise_TP, wrong_TT)


def test_sums_of_the_stream_have_the_expected_error() -> None:
    c_B = coefficients(100, 10)
    rounds = 100
    sigma = 1000.0
    noise = Correlated(c_B, 4000, draws(5, sigma))
    sums_TP = np.cumsum([noise.next() for _ in range(rounds)], axis=0)
    assert np.sqrt(np.mean(sums_TP.astype(np.float64) ** 2)) == pytest.approx(
        sigma * expected_error(c_B, rounds), rel=0.02
    )


def test_a_band_of_one_is_independent_noise() -> None:
    noise = Correlated([1.0], 4, draws(1, 100.0))
    again = draws(1, 100.0)
    for _ in range(3):
        assert (noise.next() == again(4)).all()


def test_rounds_passed_over_keep_their_place() -> None:
    """A patient of rounds 0 and 3 stays three rows apart although rounds 1 and 2 came
    to nothing.
    """
    c_B = coefficients(6, 3)
    every = Correlated(c_B, 4, draws(2, 100.0))
    some = Correlated(c_B, 4, draws(2, 100.0))
    whole = [every.next() for _ in range(6)]
    for t in (0, 3, 5):
        assert (some.next(t) == whole[t]).all()
    with pytest.raises(PlanError, match=r"round=5: rounds before 6 have had their noise"):
        some.next(5)


def test_what_is_handed_out_is_not_what_is_kept() -> None:
    spoiled = Correlated([1, 0.5], 4, draws(2, 100.0))
    clean = Correlated([1, 0.5], 4, draws(2, 100.0))
    spoiled.next()[:] = 0
    clean.next()
    assert (spoiled.next() == clean.next()).all()


@pytest.mark.parametrize("c", [[], [0.5, 1], [1, math.nan], [[1.0]]])
def test_what_is_no_strategy_is_refused(c: list[float]) -> None:
    for use in (lambda: Correlated(c, 1, draws(0, 1.0)), lambda: sensitivity(c, 5, 5)):
        with pytest.raises(PlanError, match=r"expected coefficients \[1, c_1, \.\.\.\]"):
            use()


def test_coefficients_off_the_grid_are_refused() -> None:
    with pytest.raises(PlanError, match=r"expected whole multiples of 1/4096"):
        Correlated([1, 1 / 3], 1, draws(0, 1.0))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (lambda count: np.zeros(count), r"sample gave float64 \(4,\); expected int64 \(4,\)"),
        (lambda count: np.zeros(1, np.int64), r"sample gave int64 \(1,\); expected int64 \(4,\)"),
        (
            lambda count: np.full(count, 2**62 // 7680 + 1),
            r"overflows 64 bits",
        ),  # their sum, in units
        (lambda count: np.full(count, -(2**63)), r"overflows 64 bits"),
    ],
)
def test_draws_that_cannot_be_used_are_refused(
    sample: Callable[[int], Integers], message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        Correlated(coefficients(10, 3), 4, sample).next()


def test_the_widest_noise_allowed_does_not_overflow() -> None:
    c_B = coefficients(200, 100)
    rounds = 150
    whole = [int(v * UNIT) for v in c_B]
    edge = (1 << 62) // sum(whole) // 2
    fresh = [edge if t % 2 else -edge for t in range(rounds)]
    left = iter(fresh)
    noise = Correlated(c_B, 1, lambda count: np.full(count, next(left)))
    found = [int(noise.next()[0]) for _ in range(rounds)]
    for t in range(rounds):
        taken = sum(w * found[t - i] for i, w in enumerate(whole) if 0 < i <= t)
        assert found[t] == fresh[t] - (taken + UNIT // 2) // UNIT
