"""Numbers beyond a range are held to it; numbers far from all others are found, and tails are not."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed.data import cells

NUMBERS = st.lists(st.one_of(st.floats(allow_nan=True, allow_infinity=False)), max_size=30)


@given(NUMBERS, st.tuples(st.floats(-1e6, 0), st.floats(1, 1e6)))
def test_what_is_held_lies_within_and_the_rest_is_untouched(values: list[float], ends: tuple[float, float]) -> None:
    given_ = np.array(values, dtype=np.float64)
    held, beyond = cells.hold(given_, ends)
    known = ~np.isnan(given_)
    assert ((held[known] >= ends[0]) & (held[known] <= ends[1])).all()
    assert np.array_equal(held[~beyond], given_[~beyond], equal_nan=True) and np.isnan(held[~known]).all()
    assert beyond.sum() == ((given_ < ends[0]) | (given_ > ends[1])).sum()


def test_without_a_range_nothing_is_beyond_it() -> None:
    held, beyond = cells.hold(np.array([1e30, -1.0]), ())
    assert held.tolist() == [1e30, -1.0] and not beyond.any()


RNG = np.random.default_rng(5)
COHORT = RNG.normal(60, 12, 200).round(1)
ODD: dict[str, tuple[np.ndarray, float]] = {
    # column, what is far in it
    "a slip": (COHORT, 1e30),
    "below": (COHORT, -1e30),
    "a code for a gap": (COHORT, -99999.0),
    "the largest float": (COHORT, 1.7e308),
    "another unit": (RNG.lognormal(0, 0.5, 100), 1e6),
    "three patients": (np.array([1.2, 3.4]), 1e30),
    "all alike": (np.full(9, 5.0), 1e30),
    "mostly zero": (np.r_[np.zeros(50), RNG.poisson(3, 20)], 1e14),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_far_is_found_and_nothing_else(name: str) -> None:
    column, odd = ODD[name]
    assert not cells.far(column).any()
    found = cells.far(np.r_[column, odd, np.nan])
    assert found.nonzero()[0].tolist() == [len(column)]
    if len(column) > 20:  # several may be far, one farther than the others
        assert cells.far(np.r_[column, odd, odd, 1e5 * abs(odd) if abs(odd) < 1e200 else odd]).sum() == 3


TAILS: dict[str, Callable[[int], np.ndarray]] = {
    "normal": lambda n: RNG.normal(size=n),
    "lognormal": lambda n: RNG.lognormal(0, 3, n),
    "ten decades": lambda n: 10 ** RNG.uniform(-3, 7, n),
    "Pareto": lambda n: RNG.pareto(1, n).round(2),
    "Cauchy": lambda n: RNG.standard_cauchy(n).round(2),
    "counts": lambda n: RNG.poisson(0.1, n).astype(float),
    "mostly zero": lambda n: np.where(RNG.random(n) < 0.9, 0, RNG.lognormal(0, 2, n)).round(2),
    "codes": lambda n: RNG.choice([0.0, 1.0, 9.0, 99.0, 999.0], n),
    "rounding": lambda n: 0.3 + RNG.choice([0, 1e-17, 5e-17], n),
}


@pytest.mark.parametrize("name", TAILS)
@pytest.mark.parametrize("rows", [3, 40, 400])
def test_a_tail_is_not_far(name: str, rows: int) -> None:
    assert not any(cells.far(TAILS[name](rows)).any() for _ in range(50))


def test_half_of_a_column_is_not_far_from_the_other_half() -> None:
    assert not cells.far(np.r_[RNG.normal(size=20), RNG.normal(1e9, 1, 20)]).any()
