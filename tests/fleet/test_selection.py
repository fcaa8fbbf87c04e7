"""Drawing sites: as many as asked, each subset as likely, in the federation's order."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from medfed.core.streams import Streams
from medfed.fleet.selection import draw

SITES = ["e", "b", "a", "d", "c"]


@given(st.lists(st.text(max_size=3), min_size=1, max_size=12, unique=True), st.data())
def test_a_draw_is_a_subset_in_order(sites: list[str], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(sites)))
    drawn = draw(sites, count, np.random.default_rng(data.draw(st.integers(0, 9))))
    assert len(drawn) == len(set(drawn)) == count
    assert drawn == [site for site in sites if site in drawn]


@pytest.mark.parametrize("count", [0, 5, 6])
def test_all_are_taken_without_a_draw(count: int) -> None:
    generator = np.random.default_rng(0)
    assert draw(SITES, count, generator) == SITES
    assert generator.random() == np.random.default_rng(0).random()


def _every_pair_is_as_likely(draws: list[tuple[str, ...]]) -> bool:
    pairs = list(combinations(SITES, 2))
    return bool(stats.chisquare([draws.count(pair) for pair in pairs]).pvalue > 1e-3)


def test_every_subset_is_as_likely_and_a_lean_is_caught() -> None:
    lotteries = [Streams(4).generator("selection", round) for round in range(4000)]
    fair = [tuple(draw(SITES, 2, lottery)) for lottery in lotteries]
    assert _every_pair_is_as_likely(fair)
    leaning = np.random.default_rng(1).choice(5, (4000, 2), p=[0.24, 0.19, 0.19, 0.19, 0.19])
    pairs = [tuple(SITES[i] for i in sorted(row)) for row in leaning if row[0] != row[1]]
    assert not _every_pair_is_as_likely(pairs)


def test_rounds_are_independent_and_reproducible() -> None:
    def first(round: int) -> int:
        return SITES.index(draw(SITES, 1, Streams(4).generator("selection", round))[0])

    drawn = np.array([first(round) for round in range(5000)])
    cells = np.bincount(drawn[:-1] * 5 + drawn[1:], minlength=25)
    assert stats.chisquare(cells).pvalue > 1e-3
    assert [first(round) for round in range(20)] == drawn[:20].tolist()
