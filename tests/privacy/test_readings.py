"""Single readings: reports without bias, their stated errors, and events that cover what a report
gives away.
"""

import doctest
import gzip
import hashlib
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import medfed
from medfed.core.checks import DataError, MedfedError, PlanError
from medfed.core.entropy import Entropy
from medfed.privacy import accounting, readings
from medfed.privacy.accounting import epsilon_of
from medfed.privacy.mechanisms import discrete_laplace_variance
from medfed.privacy.privacy_events import Composed, Laplace, RandomisedResponse
from medfed.privacy.readings import (
    Estimate,
    estimate_mean,
    estimate_shares,
    report_category,
    report_number,
)

STATES = ("low", "in range", "high")


def _entropy(name: object) -> Entropy:
    return Entropy(hashlib.blake2b(str(name).encode(), digest_size=32).digest())


def test_the_documented_example_runs() -> None:
    assert doctest.testmod(readings).failed == 0


def test_readings_are_public() -> None:
    assert medfed.report_category is report_category
    assert medfed.estimate_mean is estimate_mean


# Categories


@settings(max_examples=20)
@given(epsilon=st.floats(0.05, 4), k=st.integers(2, 6), seed=st.integers(0, 99))
def test_the_event_says_what_was_reported(epsilon: float, k: int, seed: int) -> None:
    names = [f"state {i}" for i in range(k)]
    report, event = report_category(names[seed % k], names, epsilon, _entropy(seed))
    assert report in names
    assert event == RandomisedResponse(k, epsilon)


def test_the_truth_is_told_as_often_as_its_epsilon_allows() -> None:
    epsilon = 1.0
    entropy = _entropy("truth")
    n = 6000
    drawn = Counter(report_category("high", STATES, epsilon, entropy)[0] for _ in range(n))
    told = stats.binomtest(drawn["high"], n, math.exp(epsilon) / (math.exp(epsilon) + 2))
    assert told.pvalue > 1e-3
    for wrong in (0.8, 1.2):  # another epsilon is refuted by the same reports
        assert (
            stats.binomtest(drawn["high"], n, math.exp(wrong) / (math.exp(wrong) + 2)).pvalue < 1e-3
        )
    assert stats.chisquare([drawn["low"], drawn["in range"]]).pvalue > 1e-3


def test_shares_are_without_bias_and_their_errors_are_those_seen() -> None:
    truth = ["high"] * 30 + ["low"] * 15 + ["in range"] * 55
    epsilon = 1.0
    entropy = _entropy("shares")
    scores = []
    for _ in range(120):
        reports = [report_category(state, STATES, epsilon, entropy)[0] for state in truth]
        found = estimate_shares(reports, STATES, epsilon)
        scores.append(
            [(found[s].value - truth.count(s) / len(truth)) / found[s].error for s in STATES]
        )
    score = np.array(scores)[:, :2]  # the third follows from the other two
    assert np.abs(score.mean(0)).max() < 4 / math.sqrt(len(score))
    spread = (score**2).sum(0)
    for factor, holds in ((1, True), (2 / 3, False), (3 / 2, False)):
        low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], len(score)) * factor**2
        assert all((low < spread) & (spread < high)) is holds


# Numbers


def _renyi(order: float, epsilon: float, steps: int) -> float:
    """The exact divergence of discrete Laplace noise between readings at both ends of the range."""
    z = np.arange(-60 * steps / epsilon // 1, 60 * steps / epsilon // 1 + steps + 1)
    log_p = -np.abs(z) * epsilon / steps
    log_q = -np.abs(z - steps) * epsilon / steps
    scale = math.log(math.tanh(epsilon / steps / 2))
    return float(np.log(np.exp(order * log_p + (1 - order) * log_q + scale).sum()) / (order - 1))


@pytest.mark.parametrize(("epsilon", "steps"), [(1.0, 1), (1.0, 5), (0.5, 360), (3.0, 10)])
def test_the_event_of_a_number_covers_it_at_every_order(epsilon: float, steps: int) -> None:
    _, event = report_number(0.0, 0.0, float(steps), 1.0, epsilon, _entropy(steps))
    counted = accounting.rdp(event)
    exact = [_renyi(order, epsilon, steps) for order in accounting.ORDERS[:120]]
    assert (counted[:120] >= np.array(exact) - 1e-9).all()


def test_the_event_laplace_would_not_cover_a_number() -> None:
    """Why `report_number` is accounted otherwise: with one step, discrete Laplace noise is a coin
    of full bias.
    """
    order = accounting.ORDERS.index(2.0)
    assert _renyi(2.0, 1.0, 1) > accounting.rdp(Laplace(1.0))[order] * 1.15
    assert _renyi(2.0, 1.0, 1) == pytest.approx(
        accounting.rdp(RandomisedResponse(2, 1.0))[order], rel=1e-6
    )


def test_a_mean_is_without_bias_and_its_error_is_the_one_seen() -> None:
    random = np.random.default_rng(0)
    entropy = _entropy("mean")
    where = (40.0, 400.0, 1.0, 2.0)
    values = random.integers(40, 401, 60)
    scores = []
    for _ in range(120):
        found = estimate_mean([report_number(v, *where, entropy)[0] for v in values], *where)
        scores.append((found.value - values.mean()) / found.error)
    assert abs(np.mean(scores)) < 4 / math.sqrt(len(scores))
    spread = float(np.square(scores).sum())
    for factor, holds in ((1, True), (2 / 3, False), (3 / 2, False)):
        low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], len(scores)) * factor**2
        assert bool(low < spread < high) is holds


@given(epsilon=st.floats(0.01, 8), steps=st.integers(1, 400))
def test_the_variance_is_that_of_the_distribution(epsilon: float, steps: int) -> None:
    q = math.exp(-epsilon / steps)
    expected = 0.25 * 2 * q / (1 - q) ** 2
    assert discrete_laplace_variance(0.0, steps * 0.5, 0.5, epsilon) == pytest.approx(
        expected, rel=1e-6
    )


def test_a_number_beyond_the_range_is_held_in_it() -> None:
    # as good as no noise
    report, _ = report_number(math.inf, 0.0, 10.0, 1.0, 1e6, _entropy("held"))
    assert report == 10.0


# Bad input


@pytest.mark.parametrize(
    ("ask", "error", "words"),
    [
        (lambda: report_category("Ada", STATES, 1.0), DataError, "none of the 3 categories"),
        (lambda: report_category("low", STATES, 0.0), PlanError, "epsilon=0.0"),
        (lambda: report_category("low", STATES, math.nan), PlanError, "epsilon=nan"),
        (lambda: report_category("low", ("low",), 1.0), PlanError, "categories=1"),
        (lambda: report_category("low", ("low", "low"), 1.0), PlanError, "each name once"),
        (lambda: report_category("l", "low", 1.0), PlanError, "each name once"),
        (lambda: report_number(math.nan, 0, 1, 0.1, 1.0), DataError, "NaN"),
        (lambda: report_number(0.5, 1, 0, 0.1, 1.0), PlanError, "low < high"),
        (lambda: report_number(0.5, 0, 1, 0.0, 1.0), PlanError, "unit=0.0"),
        (lambda: estimate_mean([], 0, 1, 0.1, 1.0), DataError, "at least one"),
        (lambda: estimate_mean([1.0], 0, 1, 0.1, -1.0), PlanError, "epsilon=-1.0"),
        (lambda: estimate_shares([], STATES, 1.0), DataError, "at least one"),
        (lambda: estimate_shares(["hihg"], STATES, 1.0), DataError, "high"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(
    ask: object, error: type[MedfedError], words: str
) -> None:
    with pytest.raises(error, match=words):
        ask()  # type: ignore[operator]


def test_a_refusal_quotes_no_reading() -> None:
    with pytest.raises(DataError) as caught:
        report_category("Ada Lovelace", STATES, 1.0)
    assert "Ada" not in str(caught.value)


# On real readings


@pytest.mark.needs("data")
def test_glucose_of_a_fleet_of_sensors(data_dir: Path) -> None:
    """4,000 real glucose readings, each as if from a wearer of its own: state and mean, without any
    reading told.
    """
    with gzip.open(data_dir / "cgm_hall2018" / "cgm_hall_19subjects.csv.gz", "rt") as file:
        head = file.readline().strip().split(",")
        glucose = np.array([float(line.split(",")[head.index("gl")]) for line in file])[::8][:4000]
    states = [STATES[int(g >= 70) + int(g > 140)] for g in glucose]
    entropy = _entropy("cgm")
    where = (40.0, 400.0, 1.0, 1.0)

    found = estimate_shares(
        [report_category(s, STATES, 1.0, entropy)[0] for s in states], STATES, 1.0
    )
    mean = estimate_mean([report_number(g, *where, entropy)[0] for g in glucose], *where)

    truth: list[tuple[Estimate, float]] = [
        (found[s], states.count(s) / len(states)) for s in STATES
    ]
    for estimate, true in [*truth, (mean, float(glucose.mean()))]:
        assert abs(estimate.value - true) < 4.5 * estimate.error
    assert found["in range"].error < 0.03
    assert mean.error < 10
    # every five minutes: what one wearer would pay
    day = Composed((RandomisedResponse(3, 1.0),) * 288)
    assert epsilon_of(day, 1e-6) > 150
