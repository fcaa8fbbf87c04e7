"""Each rule of the Gram matrix is its plain definition on rows; none is moved further than the
theory allows.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from medfed.core.checks import DataError, PlanError
from medfed.robust import rules
from medfed.robust.rules import ALONE, blocks_of, distances, gram, rule_of, weigh

Rows = NDArray[np.float64]
GRAM = [name for name, rule in ALONE.items() if rule.needs == "gram"]
ALL = [*GRAM, *(f"nnm+{name}" for name in GRAM)]
SHAPES = st.tuples(
    st.integers(7, 11), st.integers(1, 2), st.integers(1, 6), st.integers(0, 2**32 - 1)
)


def rows(shape: tuple[int, int, int, int]) -> tuple[Rows, int]:
    K, f, M, seed = shape
    return np.random.default_rng(seed).normal(size=(K, M)), f


def combined(name: str, x: Rows, f: int, radius: float | None = None) -> Rows:
    """What the weights make of the rows: they come from the Gram matrix alone."""
    w_K = rule_of(name, f, radius=radius)(gram([torch.from_numpy(x)]))
    found: Rows = (w_K @ torch.from_numpy(x)).numpy()
    return found


# the same by definition ---------------------------------------------------------------------------


def plain_scores(x: Rows, f: int) -> Rows:
    # the same digits, as two nearest rows tie
    away = distances(gram([torch.from_numpy(x)])).numpy()
    return np.array(
        [sorted(np.delete(row, k))[: len(x) - f - 1] for k, row in enumerate(away)]
    ).sum(1)


def plain_mean(x: Rows, f: int) -> Rows:
    return np.asarray(x.mean(0))


def plain_krum(x: Rows, f: int) -> Rows:
    return np.asarray(x[plain_scores(x, f).argmin()])


def plain_multi_krum(x: Rows, f: int) -> Rows:
    return np.asarray(x[plain_scores(x, f).argsort(kind="stable")[: len(x) - f]].mean(0))


def plain_geometric_median(x: Rows, f: int) -> Rows:
    z = x.mean(0)
    for _ in range(3000):
        weight = 1 / np.maximum(np.linalg.norm(x - z, axis=1), 1e-9)
        z = weight @ x / weight.sum()
    return np.asarray(z)


def plain_norm_clipping(x: Rows, f: int) -> Rows:
    length = np.linalg.norm(x, axis=1)
    radius = np.sort(length)[(len(x) - 1) // 2]
    return np.asarray((x * np.minimum(1, radius / length)[:, None]).mean(0))


def subsets(x: Rows, f: int, cost: Callable[[Rows], tuple[float, ...]]) -> Rows:
    return np.asarray(
        min((x[list(c)] for c in itertools.combinations(range(len(x)), len(x) - f)), key=cost).mean(
            0
        )
    )


def plain_minimum_diameter(x: Rows, f: int) -> Rows:
    def cost(part: Rows) -> tuple[float, ...]:
        away = np.linalg.norm(part[:, None] - part[None], axis=2)
        return (round(float(away.max()), 9), float((away**2).sum()))

    return subsets(x, f, cost)


def plain_smea(x: Rows, f: int) -> Rows:
    return subsets(x, f, lambda part: (float(np.linalg.norm(part - part.mean(0), 2)),))


def plain_caf(x: Rows, f: int) -> Rows:
    c = np.ones(len(x))
    best = x.mean(0)
    least = np.inf
    while c.sum() > len(x) - 2 * f:
        mean = c @ x / c.sum()
        values, vectors = np.linalg.eigh(((x - mean) * c[:, None]).T @ (x - mean) / c.sum())
        if values[-1] < least:
            best = mean
            least = values[-1]
        away = ((x - mean) @ vectors[:, -1]) ** 2
        c = c * (1 - away / away[c > 0].max()).clip(min=0)
    return np.asarray(best)


PLAIN: dict[str, Callable[[Rows, int], Rows]] = {
    name: globals()[f"plain_{name.replace('-', '_')}"] for name in GRAM
}


@pytest.mark.parametrize("name", [name for name in GRAM if name != "geometric-median"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(SHAPES)
def test_a_rule_is_its_definition_on_rows(name: str, shape: tuple[int, int, int, int]) -> None:
    x, f = rows(shape)
    np.testing.assert_allclose(combined(name, x, f), PLAIN[name](x, f), atol=1e-7, rtol=1e-7)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(SHAPES)
def test_no_point_has_less_distance_to_all_than_the_geometric_median(
    shape: tuple[int, int, int, int],
) -> None:
    """Where it lies is not unique on a line, and steps towards a row are slow: how good it is, is
    compared.
    """
    x, f = rows(shape)

    def away(z: Rows) -> float:
        return float(np.linalg.norm(x - z, axis=1).sum())

    found = combined("geometric-median", x, f)
    others = [
        plain_geometric_median(x, f),
        *x,
        *(found + np.random.default_rng(1).normal(size=(20, x.shape[1])) * 0.01),
    ]
    assert away(found) <= min(away(z) for z in others) * (1 + 1e-5)


@given(SHAPES)
def test_clipping_around_a_reference_is_its_definition(shape: tuple[int, int, int, int]) -> None:
    """The reference is the last row; the radius is the rows' median distance from it."""
    x, f = rows(shape)
    v = centre = np.full(x.shape[1], 0.5)
    radius = np.sort(np.linalg.norm(x - centre, axis=1))[(len(x) - 1) // 2]
    for _ in range(3):
        away = np.linalg.norm(x - v, axis=1)
        v = v + ((x - v) * np.minimum(1, radius / away)[:, None]).mean(0)
    np.testing.assert_allclose(
        combined("centred-clipping", np.vstack([x, centre]), f), v, atol=1e-7
    )


def test_trust_follows_a_reference() -> None:
    """Rows against the reference get nothing, the others its norm (Cao et al. 2021)."""
    x = np.array([[2.0, 0], [0, 3], [-5, 0], [1, 0]])  # the last is the reference
    w_K = rule_of("fltrust", 1)(gram([torch.from_numpy(x)])).numpy()
    assert w_K[0] * 2 == pytest.approx(1) and w_K[1] == w_K[2] == 0
    against = rule_of("fltrust", 1)(
        gram([torch.tensor([[-1.0, 0], [0, 1], [-2, 0], [1, 0]]).double()])
    )
    assert against.tolist() == [0, 0, 0, 1]


@given(SHAPES)
def test_nearest_neighbours_are_mixed(shape: tuple[int, int, int, int]) -> None:
    x, f = rows(shape)
    near = np.argsort(((x[:, None] - x[None]) ** 2).sum(2), axis=1)[:, : len(x) - f]
    found = rules.nearest_mixing(gram([torch.from_numpy(x)]), f, 0).numpy() @ x
    np.testing.assert_allclose(found, x[near].mean(1), atol=1e-9)


@given(SHAPES)
def test_buckets_hold_every_row_once(shape: tuple[int, int, int, int]) -> None:
    x, f = rows(shape)
    g_KK = gram([torch.from_numpy(x)])
    t_JK = rules.bucketing(g_KK, f, key=shape[3])
    assert len(t_JK) == (len(x) + 1) // 2 and torch.allclose(
        t_JK.sum(1), torch.ones(len(t_JK)).double()
    )
    assert ((t_JK > 0).sum(0) == 1).all()
    # others in other rounds
    assert any(not torch.equal(t_JK, rules.bucketing(g_KK, f, key)) for key in range(5))


@given(SHAPES)
def test_rules_of_rows_by_definition(shape: tuple[int, int, int, int]) -> None:
    x, f = rows(shape)
    t_KM = torch.from_numpy(x)
    np.testing.assert_allclose(
        rule_of("coordinate-median", f).combine(t_KM).numpy(), np.median(x, axis=0)
    )
    trimmed = np.sort(x, axis=0)[f : len(x) - f].mean(0)
    np.testing.assert_allclose(rule_of("trimmed-mean", f).combine(t_KM).numpy(), trimmed)
    if len(x) >= 4 * f + 3:
        away = distances(gram([t_KM])).numpy()
        left = list(range(len(x)))
        chosen = []
        for _ in range(len(x) - 2 * f):
            near_K = [sum(sorted(away[k][left])[: max(1, len(left) - f)]) for k in left]
            chosen.append(left.pop(int(np.argmin(near_K))))
        kept = x[chosen]
        near = np.argsort(np.abs(kept - np.median(kept, axis=0)), axis=0)[: len(kept) - 2 * f]
        found = rule_of("bulyan", f).combine(t_KM).numpy()
        np.testing.assert_allclose(found, np.take_along_axis(kept, near, 0).mean(0))


# ByzFL's results ----------------------------------------------------------------------------------

RECORDED = json.loads((Path(__file__).parent / "vectors" / "byzfl.json").read_text())


@pytest.mark.parametrize("name", sorted(RECORDED["cases"][0]["found"]))
@pytest.mark.parametrize("case", RECORDED["cases"], ids=lambda case: f"{len(case['rows'])} rows")
def test_byzfl_finds_the_same(name: str, case: dict[str, object]) -> None:
    rule = rule_of(
        name, int(str(case["f"])), radius=RECORDED["radius"] if name == "centred-clipping" else None
    )
    row_KM = torch.tensor(case["rows"], dtype=torch.float64)
    if rule.needs == "reference":
        row_KM = torch.cat([row_KM, torch.tensor([case["reference"]], dtype=torch.float64)])
    want = torch.tensor(case["found"][name], dtype=torch.float64)  # type: ignore[index]
    torch.testing.assert_close(rule.combine(row_KM), want, atol=1e-5, rtol=1e-5)


# symmetry -----------------------------------------------------------------------------------------


TIED = {
    f"nnm+{name}" for name in ("krum", "multi-krum", "minimum-diameter", "smea", "caf")
}  # mixed rows are often equal


@pytest.mark.parametrize("name", [name for name in ALL if name not in TIED])
# a rule that chooses jumps where two choices are close
@settings(max_examples=10, deadline=None, derandomize=True)
@given(SHAPES)
def test_rotation_and_order_change_nothing_but_ties(
    name: str, shape: tuple[int, int, int, int]
) -> None:
    x, f = rows((*shape[:2], shape[2] + 2, shape[3]))
    turn = np.linalg.qr(np.random.default_rng(shape[3] + 1).normal(size=(x.shape[1],) * 2))[0]
    order = np.random.default_rng(shape[3] + 2).permutation(len(x))
    found = combined(name, x, f)
    tolerance = 5e-3 if "median" in name else 1e-5  # Weiszfeld's steps end where they are small
    np.testing.assert_allclose(combined(name, x @ turn, f), found @ turn, atol=tolerance)
    np.testing.assert_allclose(combined(name, x[order], f), found, atol=tolerance)


@pytest.mark.parametrize(
    "name", ["mean", "multi-krum", "minimum-diameter", "smea", "caf", "nnm+krum", "nnm+caf"]
)
def test_without_liars_it_is_the_mean_where_theory_says_so(name: str) -> None:
    x, _ = rows((9, 0, 4, 3))
    np.testing.assert_allclose(combined(name, x, 0), x.mean(0), atol=1e-9)


# resilience ---------------------------------------------------------------------------------------


def lies(honest: Rows, f: int, rng: np.random.Generator) -> list[Rows]:
    mean = honest.mean(0)
    spread = honest.std(0)
    one = rng.normal(size=honest.shape[1])
    told = [
        -4 * mean,
        mean - 1.5 * spread,
        mean + 1e6 * one,
        0 * mean,
        mean + spread.max() * one,
        honest[0],
    ]
    return [np.repeat(lie[None], f, axis=0) for lie in told] + [
        rng.normal(scale=30, size=(f, len(mean)))
    ]


BOUNDED = ["krum", "geometric-median", "coordinate-median", "trimmed-mean"]


@pytest.mark.parametrize("name", [*BOUNDED, *(f"nnm+{name}" for name in BOUNDED)])
@pytest.mark.parametrize(("n", "f"), [(10, 3), (20, 6), (9, 1)])
def test_error_stays_below_the_theorys_bound(name: str, n: int, f: int) -> None:
    """|R - mean(H)|^2 <= kappa mean |x - mean(H)|^2 over the honest H (Allouah et al. 2023, table 1
    and lemma 1).
    """
    rule = rule_of(name, f)
    rng = np.random.default_rng(7)
    worst = 0.0
    bound = rule.kappa(n)
    assert bound is not None
    for _ in range(8):
        honest = rng.normal(size=(n - f, 8)) + 2
        for lie in lies(honest, f, rng):
            found = rule.combine(torch.from_numpy(np.concatenate([honest, lie]))).numpy()
            variance = ((honest - honest.mean(0)) ** 2).sum(1).mean()
            worst = max(worst, float(((found - honest.mean(0)) ** 2).sum() / variance))
    assert 0 < worst <= bound


def test_the_mean_is_moved_at_will_and_the_default_is_not() -> None:
    honest = np.random.default_rng(1).normal(size=(7, 5)) + 1
    x = np.concatenate([honest, np.full((3, 5), -1e6)])
    assert np.abs(x.mean(0) - honest.mean(0)).max() > 1e5
    assert np.abs(combined("nnm+geometric-median", x, 3) - honest.mean(0)).max() < 1


# the matrix ---------------------------------------------------------------------------------------


def test_blocks_sum_to_the_matrix_and_distances_keep_their_digits() -> None:
    """Rows of float32 that differ in the fifth digit: their distances are right to three, taken by
    blocks.
    """
    rng = np.random.default_rng(2)
    common = rng.normal(size=4000) * 100
    apart = rng.normal(size=(6, 4000)) * 1e-3
    x = torch.from_numpy(common + apart).float()
    exact = ((x.double()[:, None] - x.double()[None]) ** 2).sum(2)
    assert torch.allclose(distances(gram(blocks_of(x, 777))), exact, rtol=1e-3)
    assert torch.allclose(gram([x]), x.double() @ x.double().T, rtol=1e-5)
    with pytest.raises(DataError, match="at least one block"):
        gram([])


def test_many_rows_are_multiplied_in_tiles() -> None:
    x = torch.randn(600, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(gram([x]), x @ x.T)
    w_K = torch.linspace(0, 1, 600, dtype=torch.float64)
    torch.testing.assert_close(weigh(blocks_of(x, 7), w_K), w_K @ x)


@pytest.mark.parametrize("name", [*ALL, "bucketing+geometric-median"])
@pytest.mark.parametrize("value", [0.0, 3.0])
def test_rows_that_are_all_the_same_come_back(name: str, value: float) -> None:
    x = np.full((9, 3), value)
    np.testing.assert_allclose(combined(name, x, 2), x[0], atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_a_noised_matrix_gives_finite_weights(name: str) -> None:
    """Noise larger than the rows: square distances and norms below zero."""
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=(9, 9)))
    w_K = rule_of(name, 1)((noise + noise.T) / 2)
    assert w_K.isfinite().all() and w_K.abs().sum() < 2 and (w_K > -1e-9).all()


# what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "f", "least", "breakdown"),
    [
        ("krum", 2, 7, 0.5),
        ("multi-krum", 3, 9, 0.5),
        ("nnm+caf", 3, 7, 0.5),
        ("bulyan", 2, 11, 0.25),
        ("bucketing+krum", 2, 13, 0.25),
    ],
)
def test_too_few_rows_for_the_liars_are_refused(
    name: str, f: int, least: int, breakdown: float
) -> None:
    rule = rule_of(name, f)
    assert rule.smallest_n() == least and rule.breakdown == breakdown
    rule.check(least)
    with pytest.raises(PlanError, match=f"expected n >= {least}"):
        rule.check(least - 1)


def test_what_is_no_rule_is_refused() -> None:
    with pytest.raises(PlanError, match=r"did you mean 'krum'"):
        rule_of("krumm", 1)
    with pytest.raises(PlanError, match="is no step before a rule"):
        rule_of("krum+krum", 1)
    with pytest.raises(PlanError, match="needs a rule after it"):
        rule_of("nnm", 1)
    with pytest.raises(PlanError, match="in plain sight"):
        rule_of("trimmed-mean", 1)(torch.eye(9))
    with pytest.raises(DataError, match="not finite"):
        rule_of("krum", 1)(torch.full((7, 7), torch.nan))
    with pytest.raises(PlanError, match="sets of rows"):
        rule_of("smea", 16)(torch.eye(40, dtype=torch.float64))
    with pytest.raises(PlanError, match="at most 16"):
        rule_of("minimum-diameter", 17)(torch.eye(40, dtype=torch.float64))
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="radius"):
            rule_of("centred-clipping", 1, radius=bad)


def test_every_rule_names_its_paper() -> None:
    for name in (*ALONE, "nnm+geometric-median"):
        assert all("arXiv:" in paper for paper in rule_of(name, 1).papers)
