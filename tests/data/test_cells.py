"""Numbers beyond a range are held to it; numbers far from all others are found, and tails
are not.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tables import real_tables

from medfed.data import cells

NUMBERS = st.lists(st.one_of(st.floats(allow_nan=True, allow_infinity=False)), max_size=30)


@given(NUMBERS, st.tuples(st.floats(-1e6, 0), st.floats(1, 1e6)))
def test_what_is_held_lies_within_and_the_rest_is_untouched(
    values: list[float], ends: tuple[float, float]
) -> None:
    given_ = np.array(values, dtype=np.float64)
    held, beyond = cells.hold(given_, ends)
    known = ~np.isnan(given_)
    assert ((held[known] >= ends[0]) & (held[known] <= ends[1])).all()
    assert (
        np.array_equal(held[~beyond], given_[~beyond], equal_nan=True)
        and np.isnan(held[~known]).all()
    )
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
        assert (
            cells.far(np.r_[column, odd, odd, 1e5 * abs(odd) if abs(odd) < 1e200 else odd]).sum()
            == 3
        )


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


# Codes for what was not measured ------------------------------------------------------------------

LIKELY: dict[str, np.ndarray] = {
    "ages": np.round(RNG.uniform(18, 94, 300)),
    "creatinine": RNG.lognormal(4.4, 0.4, 300).round(1),
    "counts": RNG.poisson(0.4, 300).astype(float),
    "a flag": RNG.integers(0, 2, 300).astype(float),
    "a score": RNG.integers(0, 29, 300).astype(float),
    "skewed": RNG.lognormal(1, 1, 300).round(1),
}


CODES = [[-999.0], [999.0], [9999.0], [-9.0], [8888.0], [-999.0, -888.0], [-9.0, 9999.0], [999.9]]


@pytest.mark.parametrize("column", LIKELY)
@pytest.mark.parametrize("times", [3, 30, 250])
@pytest.mark.parametrize(
    "several",
    [[-999.0], [999.0], [9999.0], [-9.0], [8888.0], [-999.0, -888.0], [-9.0, 9999.0], [999.9]],
)
def test_a_code_that_is_often_met_is_found(column: str, times: int, several: list[float]) -> None:
    values = LIKELY[column].copy()
    for place, code in enumerate(several):
        values[place : times + place : len(several)] = code
    counts = {code: int((values == code).sum()) for code in several}
    expected = [code for code in sorted(several) if counts[code] >= cells.OFTEN]
    assert cells.codes(values).tolist() == expected
    assert cells.codes(LIKELY[column]).tolist() == []


@pytest.mark.parametrize("code", [-1.0, 0.0, 120.0, 100.0, 95.0, 1000.0, -10.0])
def test_a_plausible_number_is_no_code(code: float) -> None:
    values = LIKELY["ages"].copy()
    values[:30] = code
    assert cells.codes(values).tolist() == []


@pytest.mark.parametrize("values", [LIKELY["ages"], LIKELY["a score"]])
def test_99_among_numbers_near_it_is_one_of_them(values: np.ndarray) -> None:
    near = values + (98 - values.max())
    near[:40] = 99
    assert cells.codes(near).tolist() == []


def test_a_site_that_writes_a_code_for_all_is_found_and_a_small_constant_is_not() -> None:
    assert cells.codes(np.full(30, -99.0)).tolist() == [-99] and cells.codes(
        np.full(30, 9999.0)
    ).tolist() == [9999]
    assert not len(cells.codes(np.full(30, 99.0))) and not len(cells.codes(np.full(30, 8.0)))
    assert not len(cells.codes(np.array([]))) and not len(cells.codes(np.full(3, np.nan)))


def test_beyond_a_declared_range_less_is_far() -> None:
    values = np.append(np.round(RNG.uniform(0, 60, 100)), [88, 88, 88])
    assert cells.codes(values).tolist() == [] and cells.codes(values, values > 60).tolist() == [88]


PLAUSIBLE: dict[str, Callable[[int], np.ndarray]] = {
    "lognormal, sd 3": lambda n: RNG.lognormal(0, 3, n),
    "lognormal, sd 3, whole": lambda n: np.round(RNG.lognormal(3, 3, n)),
    "lognormal, sd 1, whole": lambda n: np.round(RNG.lognormal(3, 1, n)),
    "counts, mostly zero": lambda n: RNG.poisson(30, n) * (RNG.random(n) < 0.1),
    "counts, overdispersed": lambda n: RNG.negative_binomial(0.1, 0.005, n),
    "power law": lambda n: RNG.zipf(1.6, n).clip(0, 10**7),
    "lengths of stay": lambda n: RNG.geometric(0.02, n),
    "ages": lambda n: RNG.integers(0, 105, n),
    "percentages with 100s": lambda n: np.minimum(100, np.round(RNG.normal(92, 8, n))),
    "percentages up to 99": lambda n: np.minimum(99, np.round(RNG.normal(92, 8, n))),
    "saturations": lambda n: np.where(RNG.random(n) < 0.5, 99, RNG.integers(85, 100, n)),
    "scores with a ceiling": lambda n: np.minimum(88, RNG.integers(0, 100, n)),
    "base excess": lambda n: np.round(RNG.normal(0, 6, n)),
    "below zero": lambda n: np.round(RNG.normal(-5, 2, n)),
    "student, 2 degrees": lambda n: np.round(RNG.standard_t(2, n) * 10),
}


@pytest.mark.parametrize("kind", PLAUSIBLE)
def test_no_tail_no_ceiling_and_no_plausible_number_is_doubted(kind: str) -> None:
    drawn = [
        PLAUSIBLE[kind](size).astype(float) for size in (20, 50, 200, 2000) for _ in range(100)
    ]
    assert [values for values in drawn if len(cells.codes(values))] == []


def test_no_column_of_the_real_tables_is_doubted(data_dir: Path) -> None:
    """They were looked through by hand: their gaps are empty cells, ? and zeros."""
    found = {
        (name, column): cells.codes(
            pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
        ).tolist()
        for name, table in real_tables(data_dir).items()
        for column in table.columns
    }
    assert found and {where: codes for where, codes in found.items() if codes} == {}
