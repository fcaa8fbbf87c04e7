"""Fixed point and exact products mod 2^64, against Python's integers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.core.checks import PlanError
from medfed.core.entropy import Entropy, expand
from medfed.secure import field

sizes = st.integers(1, 6)


@given(sizes, st.integers(1, 1200), sizes, st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_products_are_those_of_whole_numbers(n: int, m: int, p: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    a, b = (random.integers(0, 2**64, shape, dtype=np.uint64) for shape in ((n, m), (m, p)))
    if seed % 3 == 0:
        a[:] = b[:] = 2**64 - 1  # the largest partial sums
    exact = (a.astype(object) @ b.astype(object)) % 2**64
    assert (field.matmul(a, b) == exact.astype(np.uint64)).all()


@given(sizes, st.integers(1, 3000), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_projections_are_those_of_whole_numbers(n: int, m: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    x = random.integers(0, 2**64, (n, m), dtype=np.uint64)
    ternary = random.integers(-1, 2, (5, m))
    if seed % 3 == 0:
        x[:] = 2**64 - 1
        ternary[:] = 1
    exact = (x.astype(object) @ ternary.T.astype(object)) % 2**64
    assert (
        field.project(ternary.astype(np.float64), field.digits(x)) == exact.astype(np.uint64)
    ).all()


@given(st.lists(st.floats(-60, 60), min_size=1, max_size=50), st.integers(1, 40))
def test_there_and_back_is_off_by_half_a_step(numbers: list[float], bits: int) -> None:
    x = np.array(numbers)
    steps = field.encode(x, bits, 64.0)
    assert steps.dtype == np.int64 and np.abs(field.decode(steps, bits) - x).max() <= 2.0 ** -(
        bits + 1
    )


def test_random_rounding_is_unbiased_and_moves_less_than_a_step() -> None:
    x = np.full(40_000, 0.3)
    steps = field.encode(x, 1, 1.0, Entropy(bytes(32)))  # .6 of a step: 1 in 60 %
    assert set(steps.tolist()) == {0, 1} and abs(steps.mean() - 0.6) < 5 * np.sqrt(0.24 / 40_000)
    assert set(field.encode(x, 1, 1.0).tolist()) == {1}


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf, 65.0, -1e300])
def test_what_has_no_place_is_refused_and_not_quoted(wrong: float) -> None:
    with pytest.raises(PlanError, match=r"security\.bound=64") as refusal:
        field.encode(np.array([1.0, wrong]), 20, 64.0)
    assert "300" not in str(refusal.value) and "65" not in str(refusal.value)


def test_headroom() -> None:
    field.check_headroom(2**20, 1.0, 40)
    for terms, sigma in ((2**23, 0.0), (2**20, 2.0**60)):  # 8 standard deviations of 2^60 are 2^63
        with pytest.raises(PlanError, match="could wrap"):
            field.check_headroom(terms, 1.0, 40, sigma)


@given(st.integers(0, 300), st.integers(0, 50_000), st.binary(min_size=32, max_size=32))
@settings(max_examples=30, deadline=None)
def test_a_stream_is_the_same_from_any_start(count: int, start: int, seed: bytes) -> None:
    whole = expand(seed, start + count)
    into = np.zeros(count, np.uint64)
    assert (expand(seed, count, start) == whole[start:]).all()
    assert (expand(seed, count, start, into) == into).all() and (into == whole[start:]).all()


def test_a_seed_has_32_bytes() -> None:
    with pytest.raises(PlanError, match="31 bytes"):
        expand(bytes(31), 4)
