"""The sparse graph: independent edges that all draw alike, and bounds that hold against exact
enumeration and against graphs that were drawn.
"""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom, binomtest, chisquare

from medfed.secure import graph
from medfed.secure.graph import PARTS, WORD, Sparse, design


def adjacency(law, seed, n):
    found_NN = np.zeros((n, n), bool)
    for at, near in enumerate(law.draw(seed, n)):
        found_NN[at, near] = True
    return found_NN


def seeds(count):
    return [number.to_bytes(32) for number in range(count)]


# drawing ------------------------------------------------------------------------------------------


def test_a_graph_is_symmetric_without_loops_and_the_same_for_all():
    law = Sparse(20_000, 128, 1, 9)
    for n in (5, 64, 333):
        found_NN = adjacency(law, b"s" * 32, n)
        assert (found_NN == found_NN.T).all() and not found_NN.diagonal().any()
        assert (adjacency(law, b"s" * 32, n) == found_NN).all()
    assert (adjacency(law, b"t" * 32, 333) != found_NN).any()


def test_drawing_in_pieces_is_drawing_at_once(monkeypatch):
    law = Sparse(9000, 128, 1, 9)
    for n in (65, 202, 331):
        whole_NN = adjacency(law, bytes(32), n)
        for member in (0, 1, n // 2, n - 1):
            assert (
                law.draw_one(bytes(32), n, member).tolist()
                == np.flatnonzero(whole_NN[member]).tolist()
            )
        monkeypatch.setattr(graph, "_ROWS", 3 * n)
        assert (adjacency(law, bytes(32), n) == whole_NN).all()
        for member in (0, 1, n // 2, n - 1):
            near = law.draw_one(bytes(32), n, member)
            assert near.tolist() == np.flatnonzero(whole_NN[member]).tolist()
        monkeypatch.undo()


def test_edges_are_independent_with_their_probability():
    """Single edges, pairs that share an end, and triangles; and a law of 1.1 p is told apart."""
    edge = 26_214
    p = edge / WORD
    n = 40
    drawn = np.array([adjacency(Sparse(edge, 128, 1, 9), seed, n) for seed in seeds(400)])
    upper = drawn[:, *np.triu_indices(n, 1)]
    assert binomtest(int(upper.sum()), upper.size, p).pvalue > 1e-6
    assert binomtest(int(upper.sum()), upper.size, 1.1 * p).pvalue < 1e-9

    degrees = drawn[:, 0].sum(1)  # of one member, over graphs: binomial
    bins = np.clip(degrees, 9, 22)
    law = [binom.cdf(9, n - 1, p), *binom.pmf(range(10, 22), n - 1, p), binom.sf(21, n - 1, p)]
    assert chisquare(np.bincount(bins - 9, minlength=14), np.array(law) * 400).pvalue > 1e-6

    triangles = drawn[:, 0, 1::3] & drawn[:, 1::3, 2][:, :13] & drawn[:, 0, 2][:, None]
    counted = triangles[:, 1:]  # three different members
    total = int(counted.sum())
    assert abs(total - counted.size * p**3) < 6 * math.sqrt(counted.size * p**3) * 3


# the events, exactly ------------------------------------------------------------------------------


def graphs_of(n):
    pairs = list(itertools.combinations(range(n), 2))
    for bits in range(2 ** len(pairs)):
        near = [set() for _ in range(n)]
        for at, (i, j) in enumerate(pairs):
            if bits >> at & 1:
                near[i].add(j)
                near[j].add(i)
        yield bits.bit_count(), len(pairs), near


def cut_off(near, honest, sure):
    """The most members of the smaller side of two honest sets, of `sure` together, without an edge
    between.
    """
    worst = 0
    for size in range(1, sure // 2 + 1):
        for a in itertools.combinations(honest, size):
            free = set(honest) - set(a) - set().union(*(near[v] for v in a))
            if len(free) >= sure - size:
                worst = size
    return worst


def small_opens(near, honest, liars, lost, share):
    """Whether a set of at most `lost` honest members has enough holders in it and among liars."""
    for size in range(1, max(lost, 1) + 1):
        for c in itertools.combinations(honest, size):
            inside = set(c) | set(liars)
            if all(PARTS * len(near[v] & inside) >= share * len(near[v]) for v in c):
                return True
    return False


def opened(near, listed, refusing, liars, share):
    """The sets of honest rows that a server can open: it says who is listed, and keeps the boxes
    between `refusing` ones back, who then neither confirm nor answer.
    """
    masks = {v: near[v] & listed - (refusing if v in refusing else set()) for v in listed}
    left = set(listed)
    while left:
        part = {left.pop()}
        while grown := set().union(*(masks[v] for v in part)) - part:
            part |= grown
        left -= part
        answers = (part | set(listed)) - refusing | set(liars)
        if all(
            len(near[v] & answers) + (v not in refusing) >= 1 + share * len(near[v]) / PARTS
            for v in part
        ):
            yield part


def test_where_no_event_happens_all_but_a_few_rows_are_opened_or_none():
    """The proof, played: every list and every set of refusing ones, on 300 graphs of seven."""
    n, liars = 7, (6,)
    honest = set(range(6))
    sure = (n + 1) // 2 + 1 - 1
    rng = np.random.default_rng(0)
    held = broken = 0
    for _ in range(300):
        near_NN = np.triu(rng.random((n, n)) < 0.6, 1)
        near = [set(np.flatnonzero(row).tolist()) for row in near_NN | near_NN.T]
        lost = cut_off(near, honest, sure)
        for share in (128, 192):
            event = small_opens(near, honest, liars, lost, share)
            for size in range(sure, 7):
                for listed in map(set, itertools.combinations(honest, size)):
                    for number in range(size - sure + 1):
                        for refusing in map(set, itertools.combinations(listed, number)):
                            for part in opened(near, listed, refusing, liars, share):
                                few = len(part) < size - lost
                                assert event or not few
                                held += not few
                                broken += few
    assert held > 1000 and broken > 100  # where event 2 happens, a server does read fewer rows


@pytest.mark.parametrize(
    "edge",
    [
        3 * WORD // 4,
        *(pytest.param(edge, marks=pytest.mark.long) for edge in (WORD // 2, 15 * WORD // 16)),
    ],
)
def test_both_bounds_hold_of_all_graphs_of_six(edge):
    """Every graph, with its exact probability: the events are no likelier than their bounds, and
    where a bound says something it is within a factor of what is true.
    """
    n = 6
    p = Fraction(edge, WORD)
    honest = (0, 1, 2, 3, 4)
    liars = (5,)
    everybody = tuple(range(n))
    cut = dict.fromkeys((0, 1), Fraction(0))
    opens = dict.fromkeys(((1, 160), (1, 256), (2, 200)), Fraction(0))
    for edges, pairs, near in graphs_of(n):
        weight = p**edges * (1 - p) ** (pairs - edges)
        worst = cut_off(near, everybody, n // 2 + 1)
        for lost in cut:
            cut[lost] += weight * (worst > lost)
        for lost, share in opens:
            opens[lost, share] += weight * small_opens(near, honest, liars, lost, share)
    for lost, true in cut.items():
        assert math.log2(true or 2**-60) <= graph.fail_to_join(n, 0, lost, edge) + 1e-9
    for (lost, share), true in opens.items():
        bound = graph.fail_small(n, 1, lost, edge, share)
        assert math.log2(true) <= bound + 1e-9
    assert graph.fail_to_join(n, 0, 0, edge) < math.log2(cut[0]) + 6


def test_the_bound_on_single_members_holds_of_exact_binomials():
    """Event 2 for c = 1, and seeds that cannot be rebuilt: summed exactly over neighbours here and
    there.
    """
    for n, f, edge, share in ((100, 30, 30_000, 176), (300, 60, 12_000, 150)):
        p = edge / WORD
        inside, outside = np.arange(f + 1), np.arange(n - f)
        joint = np.outer(binom.pmf(inside, f, p), binom.pmf(outside, n - f - 1, p))
        bad = PARTS * inside[:, None] >= share * (inside[:, None] + outside[None])
        exact = math.log2((n - f) * joint[bad].sum())
        assert exact <= graph.fail_small(n, f, 1, edge, share) <= exact + 9

        few = (PARTS - share) * outside[None] < share * inside[:, None]  # here: f drop out
        exact = math.log2(n * joint[few].sum())
        assert exact <= graph.fail_to_rebuild(n, f, edge, share) <= exact + 9


def test_what_is_drawn_fails_no_oftener_than_the_bound_says():
    """Bounds of one in a few: 600 graphs of 40 members, all honest ones tried; and a bound of a
    graph twice as dense is refuted by these graphs.
    """
    n, f, edge, share = 40, 12, 14_000, 150
    honest = n - f
    isolated = 0
    for seed in seeds(600):
        near_NN = adjacency(Sparse(edge, share, 1, 9), seed, n)
        own = near_NN[:honest]
        isolated += bool((PARTS * own[:, honest:].sum(1) >= share * own.sum(1)).any())
    bound = 2 ** graph.fail_small(n, f, 1, edge, share)
    assert binomtest(isolated, 600, min(bound, 1.0), alternative="greater").pvalue > 1e-6
    denser = 2 ** graph.fail_small(n, f, 1, 2 * edge, share)
    assert isolated > 0 and binomtest(isolated, 600, denser, alternative="greater").pvalue < 1e-6


def test_checks_are_as_many_as_needed():
    """Sampling without replacement, exactly: all drawn signatures true though too few are."""
    for n, f, quorum in ((150, 45, 135), (1000, 300, 900), (1000, 300, 950)):
        true = (n + f) // 2
        checks = graph.find_checks(n, f, quorum)
        passes = Fraction(math.comb(true, checks), math.comb(quorum, checks)) * n
        assert passes <= Fraction(1, 2**graph.SIGNED_BITS)
        fewer = Fraction(math.comb(true, checks - 1), math.comb(quorum, checks - 1)) * n
        assert fewer > Fraction(1, 2**graph.SIGNED_BITS)
    assert graph.find_checks(1000, 300, 651) == 651  # no slack: all of them


# designs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "liars", "gone"),
    [(150, 45, 15), (300, 90, 30), (1000, 300, 100), (1000, 300, 349), (5000, 1500, 500)],
)
def test_a_design_keeps_its_promise_and_a_sparser_one_does_not(n, liars, gone):
    law = design(n, liars, gone)
    assert law is not None
    assert graph.fail_to_join(n, liars, law.lost, law.edge) <= -graph.BITS
    assert graph.fail_to_join(n, liars, law.lost - 1, law.edge) > -graph.BITS
    assert graph.fail_small(n, liars, law.lost, law.edge, law.share) <= -graph.BITS
    assert graph.fail_small(n, liars, law.lost, law.edge, law.share - 1) > -graph.BITS
    assert graph.fail_to_rebuild(n, gone, law.edge, law.share) <= -graph.LIVE_BITS


def test_small_cohorts_and_many_liars_have_no_sparse_graph():
    assert design(64, 19, 6) is None
    assert design(200, 99, 20) is None
    assert design(1000, 300, 600) is None


def test_every_drawn_graph_bears_its_dropouts():
    """A tenth of 300, a hundred times: everybody's seed has its holders."""
    law = design(300, 90, 30)
    rng = np.random.default_rng(0)
    for seed in seeds(100):
        near_NN = adjacency(law, seed, 300)
        gone = rng.choice(300, 30, replace=False)
        alive = near_NN.sum(1) - near_NN[:, gone].sum(1)
        need = np.array([law.threshold(k) for k in near_NN.sum(1).tolist()])
        assert (alive + 1 >= need).all()
