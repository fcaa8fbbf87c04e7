"""Tests of noise: the needed multiplier against known values, p-values that hold, and the power
that is stated.
"""

import numpy as np
import pytest
from scipy import stats

from medfed.privacy import accounting, factorisation, noise_tests, privacy_events


def test_the_needed_multiplier_is_the_known_one() -> None:
    assert noise_tests.needed_multiplier(1.0, 1e-6, 1) == pytest.approx(4.224678889, rel=1e-8)
    assert noise_tests.needed_multiplier(4.886554117, 1e-6, 1) == pytest.approx(1.0, rel=1e-8)
    assert noise_tests.needed_multiplier(1.0, 1e-6, 100) == pytest.approx(42.24678889, rel=1e-8)


def test_with_sampling_it_is_what_the_other_accountants_ask_for() -> None:
    need = noise_tests.needed_multiplier(1.0, 1e-6, 60, 0.1)
    assert accounting.pld_epsilon(
        privacy_events.PoissonGaussian(0.1, need, 60), 1e-6
    ) == pytest.approx(1.0, rel=0.01)
    told = accounting.calibrate(
        lambda z: privacy_events.PoissonGaussian(0.1, z, 60), 1.0, 1e-6, "rdp"
    )
    assert 0.999 * need < told < 1.35 * need


@pytest.mark.parametrize(("rounds", "band"), [(30, 4), (7, 3), (5, 9)])
def test_strategies_agree_with_the_ones_that_are_used(rounds: int, band: int) -> None:
    ours = noise_tests.strategy_coefficients(rounds, band)
    theirs = factorisation.coefficients(rounds, band)
    np.testing.assert_allclose(ours, theirs, atol=2.0**-13)
    norm = noise_tests.strategy_norm(theirs, rounds, len(theirs))
    assert norm == pytest.approx(factorisation.sensitivity(theirs, rounds, len(theirs)), rel=1e-12)


def test_whitening_gives_back_the_draws() -> None:
    rng = np.random.default_rng(0)
    drawn = [rng.normal(0, 1e6, 50).round().astype(np.int64) for _ in range(20)]
    given = iter(drawn)
    c = factorisation.coefficients(20, 5)
    noise = factorisation.Correlated(c, 50, lambda count: next(given))
    white = noise_tests.whiten(np.stack([noise.next() for _ in range(20)]).astype(float), c)
    assert np.abs(white - np.stack(drawn)).max() <= 0.5


@pytest.mark.parametrize("numbers", [200, 20_000])
def test_the_power_that_is_stated_is_there(numbers: int) -> None:
    """At the stated factors the test refuses 95 of 100 draws; at 1 it refuses as seldom as
    it says.
    """
    alpha = 1e-3
    rng = np.random.default_rng(1)
    for factor in noise_tests.power(numbers, alpha):
        square = stats.chi2.rvs(numbers, size=4000, random_state=rng) * factor**2
        refused = [noise_tests._variance(s, numbers) < alpha for s in square]
        assert 0.93 < np.mean(refused) < 0.97
    honest = stats.chi2.rvs(numbers, size=4000, random_state=rng)
    assert np.mean([noise_tests._variance(s, numbers) < alpha for s in honest]) < 0.004


def test_reuse_is_found_of_any_sign_and_scale_and_not_where_there_is_none() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((50, 12))
    assert noise_tests.against_law(x, np.ones(50)).p["reuse"] > 0.01
    x[31] = -0.3 * x[4]
    assert noise_tests.against_law(x, np.ones(50)).p["reuse"] < 1e-12


@pytest.mark.parametrize("lag", [1, 13, 200])
def test_a_correlation_at_any_lag_is_found(lag: int) -> None:
    x = np.random.default_rng(3).standard_normal(5000 + lag)
    mixed = (x[lag:] + 0.3 * x[:-lag]) / np.sqrt(1.09)
    assert noise_tests.against_law(mixed.reshape(50, 100), np.ones(50)).p["lags"] < 1e-6


def test_numbers_off_the_grid_are_told_apart() -> None:
    rng = np.random.default_rng(4)
    noise = rng.normal(0, 1e6, (100, 50))
    assert noise_tests.on_grid(np.rint(noise)) == 1
    share = noise_tests.on_grid(noise)
    assert share is not None and share < 0.4
    assert noise_tests.on_grid(np.full((2, 5), 1e9)) is None
