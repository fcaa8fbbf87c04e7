"""Rules choose the threshold that they say, and a patient moves what they read by no more than they
say.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.core import decision
from medfed.core.decision import EXACT_EDGES, ThresholdRule, parse, tally

RULES = [ThresholdRule("prevalence"), ThresholdRule("sensitivity", 0.9), ThresholdRule("youden")]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("0.5", ThresholdRule("fixed", 0.5)),
        ("0.02", ThresholdRule("fixed", 0.02)),
        ("prevalence", ThresholdRule("prevalence")),
        ("youden", ThresholdRule("youden")),
        ("sensitivity>=0.9", ThresholdRule("sensitivity", 0.9)),
        ("sensitivity >= .95", ThresholdRule("sensitivity", 0.95)),
    ],
)
def test_rules_are_read(text: str, rule: ThresholdRule) -> None:
    assert parse(text) == rule and rule.chosen == (rule.name != "fixed")


@pytest.mark.parametrize(
    "text", ["", "0", "1", "1.5", "nan", "half", "sensitivity", "sensitivity>=1", "sensitivity>=x"]
)
def test_anything_else_is_no_rule(text: str) -> None:
    assert parse(text) is None


def _scores(n: int = 20_000, share: float = 0.02) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    y = (random.random(n) < share).astype(int)
    return -4 + 0.8 * random.normal(size=n) + 1.2 * y, y


@pytest.mark.parametrize("cells", [EXACT_EDGES, np.linspace(-7, -1, 31)], ids=["exact", "coarse"])
def test_rules_choose_what_they_say(cells: np.ndarray) -> None:
    z, y = _scores()
    count = tally(z, y, cells)
    found = {rule.name: rule.choose(cells, rule.vector(count)) for rule in RULES}
    called = {name: z >= decision.logit(threshold or 0.5) for name, threshold in found.items()}
    assert called["prevalence"].mean() == pytest.approx(y.mean(), rel=0.05)
    assert 0.9 <= called["sensitivity"][y == 1].mean() < (0.92 if len(cells) > 100 else 0.97)
    edges = cells[:, None]
    best = max((z >= edges)[:, y == 1].mean(1) - (z >= edges)[:, y == 0].mean(1))
    gain = called["youden"][y == 1].mean() - called["youden"][y == 0].mean()
    assert gain == pytest.approx(best, abs=1e-12)
    assert not (z >= 0).any() or (z >= 0).mean() < 0.001  # where 0.5 calls nobody


@given(
    st.sampled_from(RULES),
    st.lists(st.tuples(st.integers(-5, 5), st.integers(0, 1)), max_size=20),
    st.tuples(st.integers(-5, 5), st.integers(0, 1)),
)
@settings(deadline=None)
def test_a_patient_moves_the_vector_by_the_sensitivity_at_most(
    rule: ThresholdRule, others: list[tuple[int, int]], more: tuple[int, int]
) -> None:
    cells = np.linspace(-4, 4, 7)
    with_, without = (
        np.array(rows, dtype=float).reshape(-1, 2) for rows in ([*others, more], others)
    )
    vectors = [
        rule.vector(tally(rows[:, 0], rows[:, 1], cells)).astype(float) for rows in (with_, without)
    ]
    assert np.linalg.norm(vectors[0] - vectors[1]) <= rule.sensitivity() + 1e-12


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_noise_that_hides_chooses_nothing_and_less_noise_chooses(rule: ThresholdRule) -> None:
    z, y = _scores(50_000, 0.1)
    cells = np.linspace(-7, -1, 15)
    vector = rule.vector(tally(z, y, cells)).astype(float)
    random = np.random.default_rng(1)
    exact = rule.choose(cells, vector)
    assert exact is not None
    found = [
        rule.choose(cells, vector + 20 * random.normal(size=len(vector)), 20.0) for _ in range(50)
    ]
    assert all(
        one is not None and abs(decision.logit(one) - decision.logit(exact)) < 1.0 for one in found
    )
    hidden = [
        rule.choose(cells, vector + 1e5 * random.normal(size=len(vector)), 1e5) for _ in range(50)
    ]
    assert sum(one is None for one in hidden) >= 45


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
@pytest.mark.parametrize("label", [0, 1])
def test_one_class_chooses_nothing(rule: ThresholdRule, label: int) -> None:
    count = tally(np.linspace(-2, 2, 50), np.full(50, label), EXACT_EDGES)
    found = rule.choose(EXACT_EDGES, rule.vector(count))
    assert found is None or rule.name == "sensitivity"  # which reads positives alone


def test_edges_are_sound_or_not() -> None:
    assert decision.sound(EXACT_EDGES)
    for bad in ([], [0.0, 0.0], [1.0, 0.0], [0.0, math.inf], list(range(5000))):
        assert not decision.sound(np.array(bad, dtype=float))
