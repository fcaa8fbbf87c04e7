"""Figures agree with vectors, with two accountants of our own and with Opacus; a filter never lets
too much through.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medfed.core.checks import PlanError
from medfed.privacy import accounting
from medfed.privacy.accounting import (
    ORDERS,
    RenyiDPAccountant,
    budget_mu,
    budget_rdp,
    calibrate,
    delta_from_rdp,
    epsilon_from_rdp,
    epsilon_of,
    fits,
    gaussian_delta,
    gaussian_epsilon,
    gdp_mu,
    group,
    left,
    pld_epsilon,
    rdp,
)
from medfed.privacy.privacy_events import (
    Composed,
    Event,
    Gaussian,
    Laplace,
    Leaf,
    PoissonGaussian,
    RandomisedResponse,
    TruncatedPoissonGaussian,
    capped,
    from_json,
    to_json,
)

VECTORS = json.loads((Path(__file__).parent / "vectors" / "accounting.json").read_text())
SHARED = Path(os.environ.get("MEDFED_DATA", "")).parent / "vectors" / "accounting.json"
POISSON = VECTORS["poisson_gaussian"]
TRUNCATED = VECTORS["truncated_poisson"]
RTOL = 1e-3

NOISE = st.floats(0.5, 50)
LEAVES: st.SearchStrategy[Leaf] = st.one_of(
    st.builds(Gaussian, NOISE, st.integers(1, 1000)),
    st.builds(PoissonGaussian, st.floats(1e-4, 1), NOISE, st.integers(1, 1000)),
    st.builds(
        TruncatedPoissonGaussian,
        st.integers(1, 10**6),
        st.floats(1e-4, 1),
        st.integers(1, 10**4),
        NOISE,
        st.integers(1, 9),
    ),
    st.builds(Laplace, NOISE, st.integers(1, 1000)),
    st.builds(RandomisedResponse, st.integers(2, 20), st.floats(0.01, 5), st.integers(1, 1000)),
)
ONE_OF_EACH: tuple[Leaf, ...] = (
    Gaussian(4.0, 2),
    PoissonGaussian(0.1, 2.0, 5),
    TruncatedPoissonGaussian(100, 0.1, 30, 3.0, 2),
    Laplace(5.0, 3),
    RandomisedResponse(4, 0.3, 2),
)


def _poisson(row: dict[str, Any]) -> PoissonGaussian:
    return PoissonGaussian(row["q"], row["sigma"], row["steps"])


def _truncated(row: dict[str, Any]) -> TruncatedPoissonGaussian:
    return TruncatedPoissonGaussian(row["n"], row["q"], row["cap"], row["sigma"], row["steps"])


# vectors ------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.exists(), reason="the shared vectors are not at hand")
def test_our_copy_of_the_vectors_is_the_shared_one() -> None:
    shared = json.loads(SHARED.read_text())
    assert {name: VECTORS[name] for name in shared} == shared


@pytest.mark.parametrize("row", POISSON, ids=str)
def test_poisson_vectors(row: dict[str, Any]) -> None:
    event = _poisson(row)
    delta = row["delta"]
    assert epsilon_of(event, delta) == pytest.approx(row["rdp"], rel=RTOL)
    assert pld_epsilon(event, delta) == pytest.approx(row["pld"], rel=RTOL)
    assert (
        epsilon_of(replace(event, noise_multiplier=event.noise_multiplier / 2), delta)
        > 1.5 * row["rdp"]
    )


@pytest.mark.parametrize("row", TRUNCATED, ids=str)
def test_truncated_poisson_vectors(row: dict[str, Any]) -> None:
    """Those are exact for n patients; ours must hold for any number of them, so it costs more, and
    no more than that of a cap that is always reached."""
    event = _truncated(row)
    delta = row["delta"]
    half = PoissonGaussian(event.probability, event.noise_multiplier / 2, event.count)
    assert row["pld"] * (1 - RTOL) <= pld_epsilon(event, delta) <= epsilon_of(event, delta)
    assert pld_epsilon(event, delta) == pld_epsilon(half, delta)
    plain = PoissonGaussian(event.probability, event.noise_multiplier, event.count)
    assert pld_epsilon(plain, delta) <= row["pld"] * (1 + RTOL)


@pytest.mark.parametrize("row", VECTORS["gaussian_closed_form"], ids=str)
def test_closed_form_vectors(row: dict[str, Any]) -> None:
    sigma = row["sigma"]
    epsilon = row["epsilon"]
    delta = row["delta"]
    assert gaussian_epsilon(sigma, delta) == pytest.approx(epsilon, rel=1e-8)
    assert gaussian_delta(sigma, epsilon) == pytest.approx(delta, rel=1e-6)
    assert 1 / budget_mu(epsilon, delta) == pytest.approx(sigma, rel=1e-8)
    assert gaussian_epsilon(sigma / 2, delta) > 2 * epsilon


@pytest.mark.parametrize("row", VECTORS["opacus_prv"]["rows"], ids=str)
def test_opacus_agrees(row: dict[str, Any]) -> None:
    ours = pld_epsilon(_poisson(row), row["delta"])
    assert row["low"] <= ours <= row["high"]
    assert ours == pytest.approx(row["estimate"], rel=RTOL)
    assert row["low"] <= epsilon_of(_poisson(row), row["delta"])


# accountants of our own ---------------------------------------------------------------------------


@given(st.floats(0.3, 100), st.integers(1, 1000))
@settings(max_examples=10)
def test_gaussians_by_three_accountants(z: float, count: int) -> None:
    event = Gaussian(z * math.sqrt(count), count)
    exact = gaussian_epsilon(z, 1e-6)
    assert epsilon_of(event, 1e-6, "gdp") == pytest.approx(exact, rel=1e-9)
    assert epsilon_of(event, 1e-6, "pld") == pytest.approx(exact, rel=RTOL, abs=1e-4)
    assert exact <= epsilon_of(event, 1e-6, "rdp") <= 1.25 * exact + 1e-3


@given(st.floats(0.3, 30), st.floats(0, 5))
def test_closed_form_is_the_integral(sigma: float, epsilon: float) -> None:
    """delta = the integral of (P - e^epsilon Q)+ for P = N(1, sigma^2), Q = N(0, sigma^2)."""
    x = np.linspace(-12 * sigma, 12 * sigma + 1, 40_001)
    excess = stats.norm.pdf(x, 1, sigma) - math.exp(epsilon) * stats.norm.pdf(x, 0, sigma)
    integral = float(np.trapezoid(excess.clip(0), x))
    assert gaussian_delta(sigma, epsilon) == pytest.approx(integral, abs=1e-7)


def _divergences(
    log_p: np.ndarray, log_q: np.ndarray, step: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the Rényi divergences at ORDERS in both directions by summing over a grid."""
    order = np.array(ORDERS)[:, None]

    def one(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
        total = np.logaddexp.reduce(order * log_p + (1 - order) * log_q, axis=1) + math.log(step)
        return total / (order[:, 0] - 1)

    return one(log_p, log_q), one(log_q, log_p)


@pytest.mark.parametrize(("q", "z"), [(0.01, 1.0), (0.1, 0.8), (0.3, 4.0), (0.5, 1.3)])
def test_poisson_sampled_gaussian_is_the_integral(q: float, z: float) -> None:
    x = np.arange(-40 * z, 40 * z + 2100 / 4, z / 64)[:40_000]
    base = stats.norm.logpdf(x, 0, z)
    mixed = np.logaddexp(math.log1p(-q) + base, math.log(q) + stats.norm.logpdf(x, 1, z))
    removed, added = _divergences(mixed, base, z / 64)
    order = np.array(ORDERS)
    within, whole = order < 12, order % 1 == 0  # beyond, the grid ends too soon
    found = rdp(PoissonGaussian(q, z))[within]
    true = np.maximum(removed, added)[within]
    assert found[whole[within]] == pytest.approx(true[whole[within]], rel=1e-6)
    assert np.all(found >= true * (1 - 1e-9))
    assert np.all(found <= true[np.searchsorted(order, np.ceil(order[within]))] * (1 + 1e-6))


@pytest.mark.parametrize(
    ("q", "z", "cap"), [(0.3, 2.0, 1), (0.3, 2.0, 2), (0.7, 5.0, 2), (0.05, 1.0, 1)]
)
def test_truncated_bound_covers_the_true_mechanism(q: float, z: float, cap: int) -> None:
    """Three patients of value -1 and one of +1, every batch enumerated; sums of at most `cap` of
    those drawn.
    """

    def outcomes(values: tuple[int, ...]) -> dict[int, float]:
        found: dict[int, float] = {}
        for size in range(len(values) + 1):
            for drawn in combinations(values, size):
                kept = list(combinations(drawn, min(cap, size)))
                for subset in kept:
                    p = q**size * (1 - q) ** (len(values) - size) / len(kept)
                    found[sum(subset)] = found.get(sum(subset), 0.0) + p
        return found

    def log_density(values: tuple[int, ...]) -> np.ndarray:
        parts = [
            math.log(p) + stats.norm.logpdf(x, mean, z) for mean, p in outcomes(values).items()
        ]
        return np.logaddexp.reduce(parts, axis=0)

    x = np.arange(-25 * z, 25 * z, z / 64)
    true = np.maximum(
        *_divergences(log_density((-1, -1, -1, 1)), log_density((-1, -1, -1)), z / 64)
    )
    low = np.array(ORDERS) < 8
    bound = rdp(TruncatedPoissonGaussian(4, q, cap, z))
    assert np.all(bound[low] >= true[low] * (1 - 1e-9))
    plain = rdp(PoissonGaussian(q, z))
    assert np.any(plain[low] < true[low])  # to call it Poisson would be wrong


def test_what_a_cap_costs_is_told_by_neither_the_cap_nor_the_population() -> None:
    half = PoissonGaussian(0.1, 1.5, 10)
    delta = 1e-6
    for population, cap in ((40, 40), (100, 40), (4000, 40), (10**6, 1), (1, 10**6)):
        event = TruncatedPoissonGaussian(population, 0.1, cap, 3.0, 10)
        assert np.array_equal(rdp(event), rdp(half)) and pld_epsilon(event, delta) == pld_epsilon(
            half, delta
        )
    assert capped(0.1, 3.0, 10) == half
    assert epsilon_of(half, delta) > 2 * epsilon_of(PoissonGaussian(0.1, 3.0, 10), delta)


def _full_batches(n: int, q: float, cap: int) -> tuple[dict[int, float], dict[int, float]]:
    """Return the sum's law without x and with it: x pulls by +1, each of the n others by -1, the
    lowest coins stay.
    """
    without: Counter[int] = Counter()
    with_x: Counter[int] = Counter()
    for drawn, p in enumerate(stats.binom.pmf(np.arange(n + 1), n, q).tolist()):
        stays = min(1.0, cap / (drawn + 1))
        without[-min(drawn, cap)] += p
        with_x[-min(drawn, cap)] += p * (1 - q * stays)
        with_x[1 - min(drawn, cap - 1)] += p * q * stays
    return without, with_x


def _measured(n: int, q: float, cap: int, z: float, steps: int, delta: float) -> float:
    """Return the epsilon that an adversary reaches, from below: exact laws, binned, composed over
    the steps.
    """
    from dp_accounting.pld.privacy_loss_distribution import from_two_probability_mass_functions

    edges = np.arange(-cap - 12 * z, 12 * z, z / 100)
    laws = []
    for law in _full_batches(n, q, cap):
        mass = np.diff(sum(p * stats.norm.cdf(edges, mean, z) for mean, p in law.items()))
        laws.append({place: math.log(m) for place, m in enumerate(mass.tolist()) if m > 1e-300})
    both = (
        from_two_probability_mass_functions(low, high, pessimistic_estimate=False)
        for low, high in (laws, laws[::-1])
    )
    return max(float(found.self_compose(steps).get_epsilon_for_delta(delta)) for found in both)


@pytest.mark.parametrize(("accountant", "cap"), [("rdp", 45), ("pld", 32)])
def test_a_capped_batch_of_more_patients_than_declared_costs_no_more_than_claimed(
    accountant: str, cap: int
) -> None:
    """The site declares 100 patients. An event that trusts this claims 1 where 1.5 is measured."""
    q = 0.25
    steps = 20
    delta = 1e-5
    z = calibrate(lambda z: capped(q, z, steps), 1.0, delta, accountant)
    true = (50, 100, 130, 150, 180, 220, 260, 400, 2000)
    assert max(_measured(n, q, cap, z, steps, delta) for n in true) <= 1.0
    # the measurement has power: with the noise that 100 patients would need it exceeds
    if accountant == "rdp":
        assert _measured(220, q, cap, 4.904, steps, delta) > 1.5


@pytest.mark.parametrize(("categories", "epsilon"), [(2, 0.5), (2, 3.0), (5, 1.0)])
def test_randomised_response_is_the_sum_over_answers(categories: int, epsilon: float) -> None:
    true = np.full(categories, 1.0)
    true[0] = math.exp(epsilon)
    log_p = np.log(true / true.sum())
    expected, _ = _divergences(log_p, np.roll(log_p, 1), 1.0)
    assert rdp(RandomisedResponse(categories, epsilon)) == pytest.approx(expected, rel=1e-6)
    assert pld_epsilon(RandomisedResponse(categories, epsilon), 1e-12) == pytest.approx(
        epsilon, abs=1e-4
    )


def test_laplace_is_the_integral() -> None:
    x = np.arange(-60, 61, 4e-3) + 2e-3
    expected, _ = _divergences(stats.laplace.logpdf(x, 1, 2), stats.laplace.logpdf(x, 0, 2), 4e-3)
    assert rdp(Laplace(2.0)) == pytest.approx(expected, rel=1e-4)
    assert pld_epsilon(Laplace(2.0), 1e-12) == pytest.approx(0.5, abs=1e-4)


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda e: e.kind)
def test_pld_is_below_rdp(event: Event) -> None:
    assert 0 < pld_epsilon(event, 1e-6) <= epsilon_of(event, 1e-6)


def test_an_order_whose_series_does_not_converge_is_bounded_in_silence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert np.all(np.isfinite(rdp(PoissonGaussian(0.5, 0.8))))
    assert capfd.readouterr().err == ""


def test_a_divergence_lost_in_rounding_is_not_free() -> None:
    """dp-accounting reads a divergence of 0 or below as epsilon 0, however often it is paid."""
    assert np.all(rdp(PoissonGaussian(1e-8, 1e4)) > 0)


# laws ---------------------------------------------------------------------------------------------


@given(st.floats(1e-3, 0.5), st.floats(0.8, 20), st.integers(1, 500), st.floats(1.01, 2))
@settings(max_examples=6)
def test_epsilon_grows_with_count_and_probability_and_falls_with_noise(
    q: float, z: float, count: int, more: float
) -> None:
    whole = np.array(ORDERS) % 1 == 0  # the others are bounds, not values

    def cost(event: Event) -> np.ndarray:
        return rdp(event)[whole]

    base = cost(PoissonGaussian(q, z, count))
    rounding = 1e-12 * count
    assert np.all(cost(PoissonGaussian(q, z, count + 1)) > base)
    assert np.all(cost(PoissonGaussian(q * more, z, count)) >= base - rounding)
    assert np.all(cost(PoissonGaussian(q, z * more, count)) <= base + rounding)
    assert np.all(cost(Gaussian(z, count)) >= base - rounding)  # sampling never costs


@given(st.sampled_from(ONE_OF_EACH), st.sampled_from(ONE_OF_EACH), st.integers(1, 9))
def test_composition_adds_up_in_any_order(one: Leaf, two: Leaf, times: int) -> None:
    both = rdp(Composed((one, two)))
    assert both == pytest.approx(rdp(one) + rdp(two))
    assert both == pytest.approx(rdp(Composed((two, Composed((one,))))))
    assert rdp(replace(one, count=one.count * times)) == pytest.approx(times * rdp(one))


@given(st.floats(0.05, 8), st.floats(1e-9, 1e-2), st.floats(1, 100))
def test_epsilon_and_delta_are_inverse(epsilon: float, delta: float, z: float) -> None:
    paid = rdp(Gaussian(z))
    assert delta_from_rdp(paid, max(epsilon_from_rdp(paid, delta), 1e-9)) <= delta * (1 + 1e-6)
    assert epsilon_from_rdp(paid, max(delta_from_rdp(paid, epsilon), 1e-300)) <= epsilon * (
        1 + 1e-6
    )
    assert gaussian_delta(z, gaussian_epsilon(z, delta)) <= delta


def test_mu_is_of_gaussians_alone() -> None:
    assert gdp_mu(Gaussian(2.0, 16)) == pytest.approx(2.0)
    assert gdp_mu(Composed((Gaussian(3.0), Gaussian(4.0)))) == pytest.approx(5 / 12)
    assert all(gdp_mu(Composed((Gaussian(3.0), event))) is None for event in ONE_OF_EACH[1:])
    with pytest.raises(PlanError, match=r"privacy\.accountant='rdp'"):
        epsilon_of(Laplace(2.0), 1e-6, "gdp")


def test_a_group_pays_for_each_member() -> None:
    assert group(1.0, 1e-6, 1) == pytest.approx((1.0, 1e-6))
    assert group(0.5, 1e-6, 3) == pytest.approx((1.5, 1e-6 * (1 + math.exp(0.5) + math.exp(1))))
    assert group(1.0, 0.1, 9)[1] == 1
    # a Gaussian's group of k is the Gaussian of sigma / k: the bound must cover it
    k = 3
    sigma = 12.0
    epsilon, delta = group(gaussian_epsilon(sigma, 1e-6), 1e-6, k)
    assert gaussian_delta(sigma / k, epsilon) <= delta


# calibration --------------------------------------------------------------------------------------

SCHEDULES: list[tuple[str, Callable[[float], Event]]] = [
    ("rdp", lambda z: Gaussian(z, 30)),
    ("gdp", lambda z: Gaussian(z, 30)),
    ("rdp", lambda z: PoissonGaussian(0.1, z, 200)),
    ("rdp", lambda z: TruncatedPoissonGaussian(100, 0.25, 45, z, 20)),
    ("rdp", lambda z: Composed((Gaussian(z, 5), Laplace(20.0)))),
    ("gdp", lambda z: Composed((Gaussian(z, 5), Gaussian(2 * z, 7)))),
]


@pytest.mark.parametrize(("accountant", "event_of"), SCHEDULES)
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-6), (4.0, 1e-4)])
def test_calibrated_noise_meets_the_target_and_a_thousandth_less_does_not(
    accountant: str, event_of: Callable[[float], Event], epsilon: float, delta: float
) -> None:
    z = calibrate(event_of, epsilon, delta, accountant)
    assert epsilon_of(event_of(z), delta, accountant) <= epsilon
    if accountant == "rdp":  # what the filter lets through, at its fixed order
        nothing = np.zeros(len(ORDERS))
        assert fits(nothing, rdp(event_of(z)), epsilon, delta)
        assert not fits(nothing, rdp(event_of(0.999 * z)), epsilon, delta)
    else:
        assert epsilon_of(event_of(0.999 * z), delta, accountant) > epsilon


@pytest.mark.parametrize(
    "event_of", [lambda z: Gaussian(z, 30), lambda z: PoissonGaussian(0.1, z, 200)]
)
def test_calibration_by_pld_needs_less_noise(event_of: Callable[[float], Event]) -> None:
    z = calibrate(event_of, 1.0, 1e-6, "pld")
    assert pld_epsilon(event_of(z), 1e-6) <= 1 < pld_epsilon(event_of(0.999 * z), 1e-6)
    assert z < 0.99 * calibrate(event_of, 1.0, 1e-6, "rdp")


def test_the_filters_order_costs_little_of_the_noise() -> None:
    z = calibrate(lambda z: PoissonGaussian(0.05, z, 1000), 1.0, 1e-6)
    assert epsilon_of(PoissonGaussian(0.05, 0.99 * z, 1000), 1e-6) > 1
    z = calibrate(lambda z: Gaussian(z, 30), 1.0, 1e-6)
    assert epsilon_of(Gaussian(0.9985 * z, 30), 1e-6) > 1


@pytest.mark.parametrize("epsilon", [None, 0, -1.0, math.nan, math.inf])
def test_an_epsilon_that_is_no_target_is_refused(epsilon: Any) -> None:
    with pytest.raises(PlanError, match="epsilon="):
        calibrate(Gaussian, epsilon, 1e-6)


@pytest.mark.parametrize("delta", [None, 0, -1e-6, math.nan, 1, 2.0])
def test_a_delta_that_is_no_target_is_refused(delta: Any) -> None:
    for ask in (
        lambda: calibrate(Gaussian, 1.0, delta),
        lambda: epsilon_of(Gaussian(1.0), delta, "pld"),
    ):
        with pytest.raises(PlanError, match="delta="):
            ask()
    with pytest.raises(PlanError, match="delta="):
        RenyiDPAccountant(delta)


def test_a_target_that_no_noise_meets_is_refused() -> None:
    with pytest.raises(PlanError, match="no noise multiplier"):
        calibrate(lambda z: Composed((Gaussian(z), Laplace(0.1))), 1.0, 1e-6)
    with pytest.raises(PlanError, match="depends on it"):
        calibrate(lambda z: Laplace(5.0), 1.0, 1e-6)


def test_an_unknown_accountant_is_refused() -> None:
    with pytest.raises(PlanError, match="did you mean 'rdp'"):
        epsilon_of(Gaussian(1.0), 1e-6, "rpd")
    with pytest.raises(PlanError, match="accountant='moments'"):
        calibrate(Gaussian, 1.0, 1e-6, "moments")


# the filter ---------------------------------------------------------------------------------------


@given(
    st.lists(st.sampled_from(ONE_OF_EACH), min_size=1, max_size=30),
    st.floats(0.2, 5),
    st.floats(1e-8, 1e-3),
)
@settings(max_examples=25)
def test_what_the_filter_lets_through_never_exceeds_the_target(
    events: list[Leaf], epsilon: float, delta: float
) -> None:
    spent = np.zeros(len(ORDERS))
    for event in events * 20:
        if fits(spent, rdp(event), epsilon, delta):
            spent = spent + rdp(event)
        assert epsilon_from_rdp(spent, delta) <= epsilon
        assert 0 <= left(spent, epsilon, delta) <= epsilon


@pytest.mark.parametrize("rounds", [1, 30, 1000])
def test_the_filter_lets_a_calibrated_schedule_through_and_no_round_more(rounds: int) -> None:
    one = Gaussian(calibrate(lambda z: Gaussian(z, rounds), 1.0, 1e-6))
    spent = np.zeros(len(ORDERS))
    for _ in range(rounds):
        assert fits(spent, rdp(one), 1.0, 1e-6)
        spent = spent + rdp(one)
    assert not fits(spent, rdp(one), 1.0, 1e-6)
    assert 0.999 < epsilon_from_rdp(spent, 1e-6) <= 1
    assert left(spent, 1.0, 1e-6) < 0.02


@given(st.floats(0.01, 20), st.floats(1e-9, 1e-2))
@settings(max_examples=30)
def test_the_budget_is_the_conversion_at_one_order(epsilon: float, delta: float) -> None:
    budget = budget_rdp(epsilon, delta)
    (fixed,) = np.flatnonzero(budget > -math.inf)
    at_that_order = np.full(len(ORDERS), math.inf)
    at_that_order[fixed] = budget[fixed]
    assert epsilon_from_rdp(at_that_order, delta) <= epsilon
    at_that_order[fixed] = budget[fixed] + 1e-9
    # there by total variation
    assert epsilon_from_rdp(at_that_order, delta) > epsilon or budget[fixed] < 1e-3
    assert left(np.zeros(len(ORDERS)), epsilon, delta) <= epsilon


def test_why_the_filters_order_is_fixed() -> None:
    """Among orders that are each within budget, an analyst picks by the first answer's loss the one
    that serves best.

    Each order's factor exp((a - 1)(L - R_a)) on delta has mean 1; the largest of them has not.
    """
    z = 5.0
    order = np.array(ORDERS)
    loss = stats.norm.ppf((np.arange(40_000) + 0.5) / 40_000, 0.5 / z**2, 1 / z)[:, None]
    factor = np.exp((order - 1) * (loss - rdp(Gaussian(z))))[:, order < 15]
    assert factor.mean(0) == pytest.approx(np.ones(factor.shape[1]), rel=0.1)
    assert factor.max(1).mean() > 1.8
    assert np.sum(budget_rdp(1.0, 1e-6) > -math.inf) == 1


def test_what_fits_one_patient_must_fit_them_all() -> None:
    one = rdp(Gaussian(5.0))
    fresh = np.zeros(len(ORDERS))
    tired = rdp(Gaussian(6.0))
    assert fits(fresh, one, 1.0, 1e-6)
    assert not fits(tired, one, 1.0, 1e-6)
    assert fits(np.stack([fresh, fresh]), one, 1.0, 1e-6)
    assert not fits(np.stack([fresh, tired]), one, 1.0, 1e-6)
    assert fits(tired, one, math.inf, 1e-6)
    assert left(tired, math.inf, 1e-6) == math.inf


@pytest.mark.parametrize("event", ONE_OF_EACH, ids=lambda e: e.kind)
def test_one_order_by_itself_says_what_all_orders_say(event: Leaf) -> None:
    spent = rdp(Gaussian(10.0))
    for epsilon in (0.5, 0.8, 1.0, 1.5, 2.0, 4.0):
        alone = accounting._event_fits(spent, event, epsilon, 1e-6)
        assert alone == fits(spent, rdp(event), epsilon, 1e-6)


@given(st.lists(st.floats(1, 100), min_size=1, max_size=40), st.floats(0.1, 5))
@settings(max_examples=50)
def test_the_gaussian_filter_never_exceeds_the_target(noises: list[float], epsilon: float) -> None:
    delta = 1e-6
    spent = 0.0
    paid = []
    for z in noises:
        mu = gdp_mu(Gaussian(z))
        assert mu is not None
        if spent + mu**2 <= budget_mu(epsilon, delta) ** 2:
            spent += mu**2
            paid.append(Gaussian(z))
    assert not paid or epsilon_of(Composed(tuple(paid)), delta, "gdp") <= epsilon


# events as data -----------------------------------------------------------------------------------


@given(st.lists(LEAVES, min_size=1, max_size=4))
def test_events_come_back_from_json(leaves: list[Leaf]) -> None:
    for event in (*leaves, Composed(tuple(leaves))):
        assert from_json(json.loads(json.dumps(to_json(event)))) == event


GOOD: dict[str, Any] = {
    "kind": "poisson_gaussian",
    "probability": 0.1,
    "noise_multiplier": 2.0,
    "count": 3,
}


@pytest.mark.parametrize(
    "change",
    [
        {"probability": 0.0},
        {"probability": 1.1},
        {"probability": math.nan},
        {"noise_multiplier": 0.0},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": "2"},
        {"noise_multiplier": None},
        {"noise_multiplier": True},
        {"count": 0},
        {"count": -3},
        {"count": 2.5},
        {"count": True},
        {"extra": 1},
        {"kind": "poisson"},
        {"kind": "zero_cost"},
        {"kind": "composed"},
        {"kind": "composed", "events": []},
        {"kind": None},
        {"kind": ["gaussian"]},
    ],
    ids=str,
)
def test_tampered_events_are_refused(change: dict[str, Any]) -> None:
    assert from_json(GOOD) == PoissonGaussian(0.1, 2.0, 3)
    with pytest.raises(PlanError, match=r"expected|did you mean|known"):
        from_json({**GOOD, **change})


@pytest.mark.parametrize("missing", ["kind", "probability", "noise_multiplier", "count"])
def test_events_with_a_field_missing_are_refused(missing: str) -> None:
    with pytest.raises(PlanError, match="expected"):
        from_json({name: value for name, value in GOOD.items() if name != missing})


@pytest.mark.parametrize(
    "events", [[], "gaussian", [3], [{"kind": "composed", "events": [GOOD]}]], ids=str
)
def test_compositions_of_anything_but_events_are_refused(events: object) -> None:
    assert from_json({"kind": "composed", "events": [GOOD]}) == Composed(
        (PoissonGaussian(0.1, 2.0, 3),)
    )
    with pytest.raises(PlanError, match="expected"):
        from_json({"kind": "composed", "events": events})


@pytest.mark.parametrize("kind", ["shuffled", "fixed_size"])
def test_batches_without_a_proof_are_refused_with_the_reason(kind: str) -> None:
    with pytest.raises(PlanError, match=r"0\.468 .* 6\.31"):
        from_json({**GOOD, "kind": kind})


def test_the_reason_is_true() -> None:
    """One epoch at q = 0.001, sigma = 0.8: Poisson reads 0.468; a patient who is surely in one
    batch pays 6.31.
    """
    assert pld_epsilon(PoissonGaussian(0.001, 0.8, 1000), 1e-6) == pytest.approx(0.468, abs=1e-3)
    assert gaussian_epsilon(0.8, 1e-6) == pytest.approx(6.31, abs=5e-3)


def test_what_is_no_event_is_refused() -> None:
    class Free:
        count = 1

    stranger: Any = Free()
    accountant = RenyiDPAccountant(1e-6)
    with pytest.raises(PlanError, match="unknown"):
        accountant.charge(stranger)
    with pytest.raises(PlanError, match="unknown"):
        Composed((Gaussian(1.0), stranger))
    assert accountant.entries == ()
    assert accountant.epsilon() == 0


# the accountant -----------------------------------------------------------------------------------


def test_the_accountant_keeps_what_was_charged() -> None:
    accountant = RenyiDPAccountant(1e-6)
    entries = [accountant.charge(event, f"round {i}") for i, event in enumerate(ONE_OF_EACH)]
    assert accountant.entries == tuple(entries)
    assert [entry.label for entry in entries][:2] == ["round 0", "round 1"]
    assert [entry.event for entry in entries] == list(ONE_OF_EACH)
    assert all(a.epsilon < b.epsilon for a, b in pairwise(entries))
    assert (
        entries[-1].epsilon
        == accountant.epsilon()
        == pytest.approx(epsilon_of(Composed(ONE_OF_EACH), 1e-6))
    )
    assert accountant.epsilon(1e-4) < accountant.epsilon()


def test_the_accountant_finds_noise_for_what_is_left() -> None:
    accountant = RenyiDPAccountant(1e-6)
    fresh = accountant.noise_for(lambda z: Gaussian(z, 10), 1.0)
    assert fresh == calibrate(lambda z: Gaussian(z, 10), 1.0, 1e-6)
    accountant.charge(Laplace(4.0))
    z = accountant.noise_for(lambda z: Gaussian(z, 10), 1.0)
    assert z > 1.1 * fresh
    assert accountant.charge(Gaussian(z, 10)).epsilon <= 1
    with pytest.raises(PlanError, match="no noise multiplier"):
        accountant.noise_for(lambda z: Gaussian(z, 10), 0.5)


def test_other_adjacencies_are_refused() -> None:
    with pytest.raises(PlanError, match="adjacency='replace_one'"):
        RenyiDPAccountant(1e-6, adjacency="replace_one")


def test_orders_are_written_into_ledgers_and_so_are_pinned() -> None:
    assert (len(ORDERS), ORDERS[0], ORDERS[-1], math.fsum(ORDERS)) == (
        171,
        1.1,
        2048.0,
        pytest.approx(12451.0),
    )
    assert sorted(set(ORDERS)) == list(ORDERS)
    assert accounting.ORDERS_VERSION == 1


def test_costs_cannot_be_written_to() -> None:
    for shared in (rdp(Gaussian(1.0)), budget_rdp(1.0, 1e-6)):
        with pytest.raises(ValueError, match="read-only"):
            shared[0] = 0.0
