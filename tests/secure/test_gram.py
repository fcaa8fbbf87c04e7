"""The Gram matrix of rows that nobody sees: exact, noised, and harmless to read where rows are
within their bound.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from medfed.core.checks import AbortError, PlanError
from medfed.core.entropy import Integers
from medfed.robust.rules import ALONE, MIXINGS, rule_of
from medfed.secure import field, three_party
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.line import Line
from medfed.secure.three_party import (
    WEIGHT,
    Opened,
    Selection,
    SharingAggregator,
    SharingTerms,
    in_turn,
    relay,
    run_protocol,
    share,
)

THREE = ("p", "q", "r")
SCOPE = Scope("study", "run", 1)
CLIENTS = tuple("abcdefgh")
_KEYS = [Identity.new(name, "aggregator") for name in THREE] + [
    Identity.new(name, "site") for name in CLIENTS
]
_ROSTER = Roster.of(*(one.public for one in _KEYS))

SECRET = [
    name
    for last in ALONE
    for name in (last, *(f"{mixing}+{last}" for mixing in MIXINGS))
    if (rule := rule_of(name, 2)).needs == "gram"
    and not rule.weighs_few_rows
    and rule.smallest_n() <= 7
]


def posts() -> dict[str, Post]:
    return {one.name: Post(one, _ROSTER) for one in _KEYS}


def uniform(gram_KK: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.full(len(gram_KK), 1 / len(gram_KK))


def opened(
    x_KM: Integers, bound: float = 1e6, terms: SharingTerms | None = None, **more: Any
) -> Opened:
    selection = Selection(**{"rule": uniform, **more})
    rows = dict(zip(CLIENTS, x_KM, strict=False))
    terms = terms or SharingTerms(x_KM.shape[1], bound, THREE)
    return run_protocol(posts(), SCOPE, rows, terms, selection=selection)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 6), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_it_equals_the_integer_computation(K: int, M: int, seed: int) -> None:
    x_KM = np.random.default_rng(seed).integers(-1000, 1001, (K, M))
    w_K = np.random.default_rng(seed + 1).dirichlet(np.ones(K)) + 1e-3
    terms = SharingTerms(M, 1e6, THREE, fewest_kept=1)
    found = opened(x_KM, terms=terms, rule=lambda gram: w_K / w_K.sum())
    assert found.gram_KK is not None and np.array_equal(found.gram_KK, x_KM @ x_KM.T)
    steps = np.rint(WEIGHT * w_K / w_K.sum()).astype(np.int64)
    assert list(found.weights.values()) == steps.tolist()
    assert np.array_equal(found.total_M, steps @ x_KM)


def test_long_rows_are_taken_in_blocks() -> None:
    x_KM = np.random.default_rng(3).integers(-(2**20), 2**20, (4, three_party._COLUMNS + 77))
    found = opened(x_KM, bound=2.0**29)
    assert np.array_equal(found.gram_KK, x_KM @ x_KM.T)


def test_rows_are_weighed_as_means_where_sizes_differ() -> None:
    """A rule that keeps every row gives the mean of means: sums of 10 and of 40 patients count
    alike.
    """
    x_KM = np.array([[100, 0], [0, 400], [1000, 1000]])
    sizes = {"a": 10, "b": 40, "c": 50}
    seen: list[NDArray[np.float64]] = []

    def rule(gram_KK: NDArray[np.float64]) -> NDArray[np.float64]:
        seen.append(gram_KK)
        return uniform(gram_KK)

    found = opened(x_KM, rule=rule, scale={name: 1 / size for name, size in sizes.items()})
    means = x_KM / np.array([[10], [40], [50]])
    np.testing.assert_allclose(seen[0], means @ means.T)
    np.testing.assert_allclose(found.total_M / WEIGHT * (1 / 10), means.mean(0), rtol=1e-4)


def noises(gram: float, total: float) -> dict[str, Callable[..., Any]]:
    rng = np.random.default_rng(5)
    return {
        "gram_noise": lambda K, _: np.rint(rng.normal(0, gram, K * (K + 1) // 2)).astype(np.int64),
        "gram_spread": lambda K: gram,
        "sum_noise": lambda M, most, _: np.rint(rng.normal(0, total * most / WEIGHT, M)).astype(
            np.int64
        ),
    }


def test_noise_lies_on_both_openings_from_all_three() -> None:
    """Each adds a part of its own: three times the variance of one. A sum whose weights are small
    needs less.
    """
    x_KM = np.random.default_rng(4).integers(-50, 51, (8, 400))
    grams = []
    sums = []
    parts = noises(1e4, 1e6)
    for _ in range(30):
        found = opened(x_KM, **parts)
        assert found.gram_KK is not None
        grams.append((found.gram_KK - x_KM @ x_KM.T)[np.triu_indices(8)])
        sums.append(found.total_M - np.full(8, WEIGHT // 8) @ x_KM)
        assert np.array_equal(found.gram_KK, found.gram_KK.T)
    for errors, sigma in ((grams, 1e4 * 3**0.5), (sums, 1e6 / 8 * 3**0.5)):
        found_all = np.concatenate(errors)
        assert stats.kstest(found_all / sigma, "norm").pvalue > 1e-4
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(found_all / sigma / wrong, "norm").pvalue < 1e-4


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_one_patient_moves_the_upper_triangle_no_more_than_is_said(
    K: int, M: int, seed: int
) -> None:
    """s B sqrt(K + 3), and nearly reached where all rows and the step point the same way."""
    rng = np.random.default_rng(seed)
    x_KM = rng.normal(size=(K, M))
    step = rng.normal(size=M)
    x_KM *= rng.uniform(0.5, 1, (K, 1)) / np.linalg.norm(x_KM, axis=1, keepdims=True)
    moved = x_KM.copy()
    moved[0] += 0.1 * step / np.linalg.norm(step)
    moved[0] /= max(1, np.linalg.norm(moved[0]))
    s = float(np.linalg.norm(moved[0] - x_KM[0]))
    upper = np.triu_indices(K)
    assert np.linalg.norm((moved @ moved.T - x_KM @ x_KM.T)[upper]) <= s * (K + 3) ** 0.5 + 1e-12
    same = np.ones((K, 1))
    less = np.array([[0.999], *same[1:]])
    most = np.linalg.norm((less @ less.T - same @ same.T)[upper])
    assert most > 0.99 * 0.001 * (K + 3) ** 0.5


def test_the_wrap_attack_harms_without_the_check_and_is_excluded_with_it() -> None:
    """2^32 e_0 has the square 0 mod 2^64, and its products read every other row's first number."""
    x_KM = np.random.default_rng(6).integers(-1000, 1001, (4, 30))
    x_KM[3] = 0
    x_KM[3, 0] = 2**32
    words = x_KM.view(np.uint64)
    unchecked = field.matmul(words, words.T.copy()).view(np.int64)
    assert unchecked[3, 3] == 0  # it looks like a row of zeros
    assert np.array_equal(unchecked[3, :3] >> 32, x_KM[:3, 0])  # and reads
    found = opened(x_KM)
    assert "out of bound" in found.excluded["d"] and found.accepted == ["a", "b", "c"]
    assert found.gram_KK is not None and found.gram_KK.shape == (3, 3)
    assert np.array_equal(found.gram_KK, x_KM[:3] @ x_KM[:3].T)


def test_an_aggregator_that_tells_another_share_of_a_gram_matrix_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swap = Line.swap

    def lying(self: Line, left: bytes, right: bytes) -> Any:
        if self.me == "p" and len(right) == 8 * 6:
            right = bytes(48)
        return (yield from swap(self, left, right))

    monkeypatch.setattr(Line, "swap", lying)
    with pytest.raises(AbortError, match="different shares of what is opened"):
        opened(np.arange(12).reshape(3, 4))


def test_a_rule_that_keeps_too_few_rows_opens_nothing() -> None:
    def lone(gram_KK: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.eye(len(gram_KK))[0]

    with pytest.raises(AbortError, match="keeps 1 rows"):
        opened(np.arange(12).reshape(3, 4), rule=lone)
    for weights in (np.full(3, np.nan), np.full(3, 0.7), np.ones(1), np.ones((3, 3)) / 9):
        with pytest.raises(AbortError, match="no weights to 3 rows"):
            opened(np.arange(12).reshape(3, 4), rule=lambda gram, w=weights: w)


def test_noise_on_a_gram_matrix_comes_with_what_it_can_be() -> None:
    """Without a standard deviation nobody could hold another's part of it to any range."""
    made = noises(1.0, 1.0)
    for lacking in ("gram_noise", "gram_spread"):
        with pytest.raises(PlanError, match="give both or none"):
            Selection(uniform, **{name: one for name, one in made.items() if name != lacking})


def along(rng: np.random.Generator, K: int, M: int) -> Integers:
    """Rows that vary along one direction, around a part that all share."""
    shared_M, way_M = rng.integers(-(2**12), 2**12, (2, M))
    x_KM: Integers = np.rint(shared_M + rng.normal(0, 1, K)[:, None] * way_M).astype(np.int64)
    return x_KM


def test_a_rule_whose_weight_gathers_on_one_row_opens_nothing() -> None:
    """The geometric median of rows along a line is one of them: every row has a weight above 0,
    and the sum is one site's row to five decimals.
    """
    rng = np.random.default_rng(11)
    gathered = 0

    def median(gram_KK: NDArray[np.float64]) -> NDArray[np.float64]:
        w_K: NDArray[np.float64] = rule_of("geometric-median", 1)(torch.from_numpy(gram_KK)).numpy()
        return w_K

    for _ in range(12):
        x_KM = along(rng, 5, 40)
        try:
            found = opened(x_KM, rule=median)
        except AbortError as error:
            assert "the rule keeps" in str(error)
            gathered += 1
            continue
        off_K = np.linalg.norm(found.total_M / WEIGHT - x_KM, axis=1)
        assert off_K.min() > 1e-3 * np.linalg.norm(x_KM - x_KM.mean(0), axis=1).max()
    assert gathered


def test_a_row_that_is_shrunk_counts_where_its_part_does() -> None:
    """Rows of 100 times another's norm, each held to it, hide that one as well as it hides them."""
    x_KM = np.diag([10, 1000, 1000])
    w_K = np.array([0.98, 0.01, 0.01])
    terms = SharingTerms(3, 1e6, THREE, fewest_kept=3)
    found = opened(x_KM, terms=terms, rule=lambda gram: w_K)
    assert len(found.weights) == 3
    with pytest.raises(AbortError, match="keeps 1 rows"):
        opened(np.diag([10, 10, 10]), terms=terms, rule=lambda gram: w_K)


@pytest.mark.parametrize("name", SECRET)
def test_a_rule_that_may_run_in_secret_gathers_on_no_row(name: str) -> None:
    """Lines, clusters, copies, rows far away: no rule that a study may set opens fewer rows than
    honest ones less liars.
    """
    rng = np.random.default_rng(12)
    rule = rule_of(name, 2)
    for shape in range(40):
        x_KM = along(rng, 7, 30).astype(float)
        if shape % 2:
            x_KM[3:] += rng.normal(0, 1e4, 30)
        if shape % 4 > 1:
            x_KM[5:] *= 1e3
        if shape % 8 > 3:
            x_KM[1] = x_KM[2] = x_KM[0]
        gram_KK = x_KM @ x_KM.T
        w_K = rule(torch.from_numpy(gram_KK), key=shape).numpy()
        assert three_party.count_rows(w_K, gram_KK) >= 3, (shape, w_K)


def test_rows_whose_products_would_wrap_are_refused_when_planning() -> None:
    SharingTerms(10, 2.0**25, THREE).check(gram=True)
    with pytest.raises(PlanError, match="robust rule"):
        SharingTerms(10, 2.0**31, THREE).check(gram=True)


def test_a_sum_that_no_rows_make_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    total = SharingAggregator._sum

    def adding(self: SharingAggregator, *args: object) -> object:
        return total(self, *args) + np.uint64(2**40 * (self.post.me.name == "p"))  # type: ignore[arg-type]

    mail = posts()
    terms = SharingTerms(4, 1000, THREE)
    sites = {name: np.full(4, 7) for name in "abc"}
    uploads = {name: share(mail[name], SCOPE, row_M, terms) for name, row_M in sites.items()}
    three = in_turn(
        {name: SharingAggregator(mail[name], terms, SCOPE.study, SCOPE.run) for name in THREE}
    )
    assert relay(three, SCOPE, uploads, terms).total_M.tolist() == [21] * 4
    monkeypatch.setattr(SharingAggregator, "_sum", adding)
    mail = posts()
    three = in_turn(
        {name: SharingAggregator(mail[name], terms, SCOPE.study, SCOPE.run) for name in THREE}
    )
    with pytest.raises(AbortError, match="did not follow the protocol"):
        relay(three, SCOPE, uploads, terms, spread=1000)
