"""The threat model's table: its figures are those of the terms that rounds are played on."""

import pytest

from medfed.planning import coalitions
from medfed.planning.cohorts import cohorts
from medfed.planning.resolved import colluding, graph_of, holders, least_rows
from medfed.secure.masking import MaskingTerms
from medfed.study import Study


def masked(share: float = 0.3) -> Study:
    return Study().set("security.aggregation", "masked").set("security.colluding", share)


def names(n: int) -> list[str]:
    return [f"site {number:04d}" for number in range(n)]


@pytest.mark.parametrize("n", [10, 49, 149, 200, 1000])
def test_rows_neighbours_and_dropouts_are_those_of_the_terms(n: int) -> None:
    study = masked()
    found = coalitions.count(study, n)
    stay = least_rows(study, n)
    terms = MaskingTerms.choose(
        names(n), 1, (n - stay) / n, found.liars, sparse=graph_of(study, n) is not None
    )
    assert (terms.quorum, terms.degree) == (n - found.dropouts, found.neighbours)
    assert terms.sparse == graph_of(study, n)
    lost = terms.sparse.lost if terms.sparse else 0
    assert found.rows == stay - found.liars - lost == holders(study, names(n))
    assert 2 * terms.quorum > n + found.liars  # one list


def test_default_settings_reach_a_sparse_graph_in_large_cohorts_alone() -> None:
    assert graph_of(masked(), 49) is None and graph_of(masked(), 100) is None
    for n in (200, 1000, 5000):
        law = graph_of(masked(), n)
        assert law is not None
        assert coalitions.fail(law, n, n - least_rows(masked(), n), colluding(masked(), n)) <= -40


def test_more_sites_than_f_are_promised_nothing_and_the_table_says_so() -> None:
    law = graph_of(masked(), 1000)
    assert law is not None
    chances = [coalitions.fail(law, 1000, 100, liars) for liars in (200, 300, 350, 450, 850)]
    assert chances == sorted(chances) and chances[-1] == 0
    assert coalitions.count(masked(), 10).breaks == "4 sites"  # 7 of 10 sign, twice: 4 did both


def test_a_quorum_that_lets_many_stay_away_is_borne() -> None:
    """With training.quorum=.7, 300 of 1,000 may drop out: more neighbours, fewer honest parts."""
    few = masked().set("training.quorum", 0.7)
    assert (least_rows(few, 1000), least_rows(masked(), 1000)) == (700, 900)
    law, usual = graph_of(few, 1000), graph_of(masked(), 1000)
    assert law is not None and usual is not None and law.edge > usual.edge
    assert holders(few, names(1000)) < holders(masked(), names(1000))


def test_noise_counts_on_the_least_round_of_all() -> None:
    """Groups of which one masks on a sparse graph and a larger one on all pairs."""
    sizes = [n for n in range(120, 180) if graph_of(masked(), n)]
    assert sizes
    study = masked().set("fleet.schedule", "cyclic").set("fleet.groups", 2)
    clients = names(2 * sizes[0] - 10)
    rows = holders(study, clients)
    for n in range(sizes[0] - 25, sizes[0] + 25):
        few = coalitions.count(masked(), n).rows
        assert rows <= few or n not in cohorts(study, clients)
