"""Figures from noised counts: without bias, intervals that cover with and without many noises,
honest where few are.
"""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from sklearn import metrics as sk

from medfed.core.decision import CELLS, logit, sound, tally
from medfed.core.entropy import Entropy
from medfed.monitor import noised
from medfed.monitor.metrics import Figure
from medfed.monitor.noised import Noised, edges_for, variance
from medfed.privacy.mechanisms import geometric_noise

SHARE = 0.6
GAP = 1.1
SPREAD = 0.35
CENTRE = 0.5
"""Scores like those of a private model of a stroke trial: within a logit of each other, so wide
cells see nothing.
"""

TRUTH = 0.7817
"""Their AUROC: the normal law at GAP / sqrt(2)."""


def _patients(random: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    y = (random.random(n) < SHARE).astype(int)
    return CENTRE + SPREAD * (random.normal(size=n) + GAP * (y - SHARE)), y


def _edges(threshold: float = 0.5) -> np.ndarray:
    made_up = 0.2 + 0.5 * np.random.default_rng(0).normal(size=512)  # near, but not where they lie
    return edges_for(made_up, CELLS, threshold)


def _fast_noise(
    random: np.random.Generator, shape: Sequence[int], epsilon: float, noises: int
) -> np.ndarray:
    """The law of `geometric_noise`, from numpy: the difference of two geometric numbers."""
    stop = 1 - math.exp(-epsilon)
    size = (noises, *shape)
    return (random.geometric(stop, size) - random.geometric(stop, size)).sum(0)


def _drawn(
    n: int, epsilon: float, noises: int, draws: int, halved: bool = False
) -> tuple[np.ndarray, float]:
    """Return the errors of AUROC, and how often its interval covers the truth."""
    random = np.random.default_rng(n + noises)
    edges = _edges()
    errors = []
    covered = []
    for _ in range(draws):
        count = tally(*_patients(random, n), edges)
        noise = _fast_noise(random, count.shape, epsilon, noises)
        found = Noised(edges, count + noise, variance(epsilon, noises)).measure()["auroc"]
        if found.value is None or found.low is None or found.high is None:
            continue
        middle = (found.low + found.high) / 2
        half = (found.high - found.low) / (4 if halved else 2)
        errors.append(found.value - TRUTH)
        covered.append(abs(TRUTH - middle) <= half + 2.5e-4)
    return np.array(errors), float(np.mean(covered))


@pytest.mark.parametrize(
    ("n", "epsilon", "noises"), [(1600, 1.5, 1), (1600, 1.5, 49), (1600, 0.5, 1), (400, 1.5, 1)]
)
def test_auroc_is_unbiased_and_its_interval_covers(n: int, epsilon: float, noises: int) -> None:
    errors, covered = _drawn(n, epsilon, noises, 300)
    standard = errors.std() / math.sqrt(len(errors))
    assert len(errors) == 300 and abs(errors.mean()) < 0.004 + 3 * standard
    assert covered >= 0.93
    assert _drawn(n, epsilon, noises, 300, halved=True)[1] < 0.85


def test_counts_cut_at_0_are_biased() -> None:
    """What was done before: each site's noised counts, cut, put together."""
    random = np.random.default_rng(0)
    edges = np.arange(-3.0, 4.0)
    errors = []
    for _ in range(40):
        z, y = _patients(random, 1600)
        site = random.integers(49, size=1600)
        each = [tally(z[site == k], y[site == k], edges) for k in range(49)]
        cut = sum(np.maximum(count + _fast_noise(random, count.shape, 1.5, 1), 0) for count in each)
        errors.append((Noised(edges, np.asarray(cut), 0.0).measure()["auroc"].value or 0) - TRUTH)
    assert np.mean(errors) < -0.02


def test_few_patients_say_little_and_say_so() -> None:
    errors, covered = _drawn(123, 0.5, 1, 200)
    assert covered >= 0.93 and len(errors) < 200  # of some nothing can be said at all
    random = np.random.default_rng(1)
    edges = _edges()
    told = []
    for _ in range(100):
        count = tally(*_patients(random, 123), edges)
        found = Noised(
            edges, count + _fast_noise(random, count.shape, 0.5, 4), variance(0.5, 4)
        ).measure()["auroc"]
        told.append((found.high or 0.0) - (found.low or 0.0) if found.value is not None else 1.0)
    assert np.median(told) > 0.5


@pytest.mark.parametrize("name", ["accuracy", "precision", "recall", "f1", "brier"])
@pytest.mark.parametrize("noises", [1, 20])
def test_shares_are_unbiased_and_their_intervals_cover(name: str, noises: int) -> None:
    random = np.random.default_rng(3)
    edges = _edges(0.6)
    z, y = _patients(random, 400_000)
    truth = Noised(edges, tally(z, y, edges), 0.0).measure(0.6)[name].value
    assert truth is not None
    errors = []
    inside = []
    for _ in range(300):
        count = tally(*_patients(random, 1200), edges)
        noise = _fast_noise(random, count.shape, 1.0, noises)
        found = Noised(edges, count + noise, variance(1.0, noises)).measure(0.6)[name]
        assert found.value is not None and found.low is not None and found.high is not None
        errors.append(found.value - truth)
        inside.append(found.low - 2.5e-4 <= truth <= found.high + 2.5e-4)
    assert abs(np.mean(errors)) < 0.001 + 3.5 * np.std(errors) / math.sqrt(300)
    assert np.mean(inside) >= 0.92


def test_without_noise_figures_are_scikit_learns_but_for_ties() -> None:
    edges = _edges(0.55)
    z, y = _patients(np.random.default_rng(5), 5000)
    found = Noised(edges, tally(z, y, edges), 0.0).measure(0.55)
    hit = z >= logit(0.55)
    assert found["accuracy"].value == pytest.approx(sk.accuracy_score(y, hit), abs=1e-12)
    assert found["precision"].value == pytest.approx(sk.precision_score(y, hit), abs=1e-12)
    assert found["recall"].value == pytest.approx(sk.recall_score(y, hit), abs=1e-12)
    assert found["f1"].value == pytest.approx(sk.f1_score(y, hit), abs=1e-12)
    assert found["auroc"].value == pytest.approx(sk.roc_auc_score(y, z), abs=0.004)
    assert found["brier"].value == pytest.approx(
        sk.brier_score_loss(y, 1 / (1 + np.exp(-z))), abs=0.002
    )
    assert found["ece"] == Figure(None)
    assert (
        Noised(edges, tally(z, y, edges), 0.0).confusion(0.55)
        == sk.confusion_matrix(y, hit).tolist()
    )


def test_the_noise_has_the_variance_that_intervals_count_with() -> None:
    drawn = geometric_noise((4000,), 0.7, Entropy())
    assert drawn.var() == pytest.approx(variance(0.7), rel=0.25)
    assert drawn.var() != pytest.approx(variance(0.7, 2), rel=0.25)


@pytest.mark.parametrize(
    "logits", [np.zeros(5), np.array([np.nan, np.inf]), np.linspace(-40, 40, 100)]
)
def test_edges_are_sound_wherever_scores_lie(logits: np.ndarray) -> None:
    for threshold in (0.5, 0.02, 0.999):
        edges = edges_for(logits, CELLS, threshold)
        assert sound(edges) and len(edges) == CELLS - 1
        assert np.isclose(edges, logit(threshold)).any()


def test_nobody_has_no_figures() -> None:
    found = Noised(_edges(), np.zeros((CELLS, 2), dtype=np.int64), variance(1.0))
    assert (
        set(found.measure().values()) == {Figure(None)}
        and found.n == 0
        and found.log_loss() is None
    )
    assert noised.variance(1.0) > 0
