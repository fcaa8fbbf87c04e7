"""What parties of a secure round agree on: the bound on a row, the noise and the scales follow from
what is claimed, and from nothing where nothing is.
"""

import math

import pytest

from medfed.planning import terms
from medfed.planning.resolved import Resolved
from medfed.privacy.guarantee import GRID
from medfed.secure.identity import Identity, Post, Roster
from medfed.secure.record import Record
from tests.adversaries.world import (
    AGGREGATORS,
    NUMBERS,
    facts_of,
    names_of,
    sizes_of,
    study_of,
    tell,
)

SITES = names_of(5)
LARGEST = 40 + 5 * 4
"""Declared patients of the largest of the five."""


def facts(claim: bool, **settings: object) -> Resolved:
    study = study_of("three-party", claim)._with(
        {name.replace("__", "."): value for name, value in settings.items()}
    )
    return facts_of(study, tell(sizes_of(SITES)))


def aggregator(of: Resolved) -> terms.three_party.SharingAggregator:
    key = Identity.new(AGGREGATORS[0], "aggregator")
    return terms.aggregator_of(of, Post(key, Roster.of(key.public)), "run", Record())


@pytest.mark.parametrize(
    ("clipping", "longest"), [("fixed", 1.0), ("adaptive", math.hypot(1, 0.5))]
)
def test_under_joint_noise_a_row_is_no_longer_than_the_largest_declared_sum(
    clipping: str, longest: float
) -> None:
    """In units of the clipping norm, a step of rounding a number, and the room that clips leave."""
    found = facts(True, privacy__clipping=clipping)
    bound = terms.terms_of(found).bound
    least = LARGEST * longest / GRID
    assert least < bound < least * 1.003 + math.sqrt(found.message)


def test_without_joint_noise_a_row_is_held_to_the_studys_own_bound() -> None:
    steps = 2.0**20
    settings = {"security__fraction_bits": 20, "security__bound": 3.0}
    for found in (facts(False, **settings), facts(True, privacy__noise="site", **settings)):
        wide = terms.terms_of(found)
        numbers = math.sqrt(found.message)
        assert wide.bound == pytest.approx(3 * steps * numbers + numbers)
    held = terms.terms_of(facts(False, robustness__bound=2.0, **settings))
    assert held.bound == pytest.approx(2 * steps + math.sqrt(NUMBERS), rel=1e-5)
    ruled = terms.terms_of(facts(False, robustness__rule="multi-krum", **settings))
    assert ruled.bound == pytest.approx(3 * steps + math.sqrt(NUMBERS), rel=1e-5)


def test_an_aggregator_adds_noise_where_it_is_joint_and_claimed() -> None:
    assert aggregator(facts(True)).noise is not None
    for without in (
        facts(False),
        facts(True, privacy__noise="site"),
        facts(True, privacy__simulation_only=True),
    ):
        assert aggregator(without).noise is None


def test_rows_are_weighed_by_the_rule_as_means_and_noised_where_they_are_sums() -> None:
    rule = {"robustness__rule": "multi-krum", "robustness__max_malicious": 0.2}
    summed = facts(True, **rule)
    guarantee = summed.guarantee
    assert guarantee is not None
    scale = terms.scales(summed)
    assert scale == {name: 1 / guarantee.releases[name].expected for name in SITES}
    chosen = terms.selection(summed, terms.terms_of(summed))
    assert chosen is not None and chosen.scale == scale
    assert chosen.gram_noise and chosen.gram_spread and chosen.sum_noise
    for bare in (facts(False, **rule), facts(True, privacy__noise="site", **rule)):
        assert terms.scales(bare) == {}
        chosen = terms.selection(bare, terms.terms_of(bare))
        assert chosen is not None and not chosen.scale
        assert (chosen.gram_noise, chosen.gram_spread, chosen.sum_noise) == (None, None, None)
    assert terms.selection(facts(True), terms.terms_of(facts(True))) is None
