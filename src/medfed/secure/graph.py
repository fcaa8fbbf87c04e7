"""A sparse random graph for masks (after Bell et al. 2020): who masks with whom in a large cohort.

Every two of n members are neighbours with probability p, independently, as a public seed says that
nobody knew while members and keys could still be chosen. Of a member with k_v neighbours, 1 + tau
k_v holders rebuild a seed, itself one of them.

What it keeps, against a server with f members of its choice before the graph is drawn, that says
after it who dropped out, and may keep boxes back (h = n - f honest ones). Three events, none of
them more likely than 2^-41, 2^-42 and 2^-42, each by a union bound over all that the server can
pick:

0. Two lists are confirmed. One of them has (n + f) / 2 true signatures at most. Each member
   verifies a sample, which it draws after the server has told all signatures: `find_checks`.
1. Honest sets A and B, of a and s - a, without an edge between; lost < a <= s / 2, where s is the
   number of honest ones who confirm at least: (n + f) / 2 + 1 - f. At most the sum over a of
   C(h, a) C(h - a, s - a) (1 - p)^(a (s - a)).
2. A set C of c <= lost (or 1) honest ones, each with tau k_v neighbours among C and the liars:
   for any theta > 0 at most C(h, c) times the mean of exp(theta (1 - tau) (2 X + Y) - theta tau
   Z), with X, Y, Z binomial of p and c (c - 1) / 2, c f, c (h - c) pairs.

If none happens, a server opens the rows of all honest ones on the list but `lost`, or nothing. A
sum is opened over a set C of them that shares no mask with the rest A, and whose members' self
seeds all have 1 + tau k_v holders who answer. Of two listed ones whose boxes were kept back, so
that they share no mask, neither confirms, nor answers. So the s who confirm share masks with all
their neighbours in A and C; some x of them are in the one, s - x in the other, and by 1 the side
with fewer of them has `lost` members at most. If that is C, those who answer to its members are in
C or lie, which 2 excludes. By 2 for c = 1, nobody opens both seeds of one member either.

In a sparse graph a server can cut off a few, by saying that all neighbours of one dropped out: so
`lost` is above 0, and is taken off where honest parts of the noise are counted. Drop-outs that
nobody chose leave a seed that cannot be rebuilt with probability 2^-20: that round is aborted.

`design` works in floats on fixed grids: parties agree unless a bound is met to the last bits, and
else their terms differ and no round is opened.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from medfed.core.entropy import expand

BITS = 42
"""Each of the events that would break a graph has at most the probability 2^-BITS."""

LIVE_BITS = 20
"""A seed cannot be rebuilt with at most the probability 2^-LIVE_BITS, where chance drops out."""

SIGNED_BITS = 41
"""A list that too few signed passes some member's sample with at most the probability
2^-SIGNED_BITS.
"""

SMALL = 64
"""Up to so many members, everybody is everybody's neighbour."""

SPARSE = 0.5
"""A graph of more than this share of all pairs is not worth a phase and signatures more."""

PARTS = 256
"""tau is told in parts of this."""

WORD = 2**16
"""p is told in parts of this."""

_ROWS = 2**24  # pairs that are drawn at once
_THETA = np.geomspace(0.02, 30, 150)  # any theta gives a bound


@dataclass(frozen=True)
class Sparse:
    """A graph's law. `edge` is p in parts of WORD, `share` tau in parts of PARTS, `lost` how many
    honest rows a server can cut off, `checks` how many signatures each member verifies.
    """

    edge: int
    share: int
    lost: int
    checks: int

    def threshold(self, neighbours: int) -> int:
        """Return how many holders rebuild a seed of a member with so many neighbours: 1 + tau k,
        rounded up.
        """
        return 1 + -(-self.share * neighbours // PARTS)

    def draw(self, seed: bytes, n: int) -> tuple[NDArray[np.int64], ...]:
        """Return the neighbours of each of n members, by number from 0, ascending.

        Args:
            seed: 32 bytes that all know.
            n: how many members.
        """
        found = [np.flatnonzero(row) + start for start, row in _draw_pairs(seed, n, self.edge)]
        return _by_member(found, n)

    def draw_one(self, seed: bytes, n: int, member: int) -> NDArray[np.int64]:
        """Return what `draw` does of one member alone, which is faster."""
        before: list[NDArray[np.int64]] = []
        after = np.empty(0, np.int64)
        for start, chosen in _draw_pairs(seed, n, self.edge):
            rows = chosen.reshape(-1, n)
            first = start // n
            before.append(np.flatnonzero(rows[: max(0, member - first), member]) + first)
            if first <= member < first + len(rows):
                after = np.flatnonzero(rows[member - first, member + 1 :]) + member + 1
        return np.concatenate([*before, after])


def _draw_pairs(seed: bytes, n: int, edge: int) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """Yield which ordered pairs i n + j are chosen, row after row, some rows at once, with the
    number of their first: one stream of 16-bit words. Those with i < j count.
    """
    step = 4 * max(1, _ROWS // n)  # whole words of 64 bits
    for start in range(0, n, step):
        pairs = min(step, n - start) * n
        words = expand(seed, -(-pairs // 4), start * n // 4).view("<u2")[:pairs]
        yield start * n, words < edge


def _by_member(found: Sequence[NDArray[np.int64]], n: int) -> tuple[NDArray[np.int64], ...]:
    """Return the neighbours of each member from the chosen pairs."""
    row, column = np.divmod(np.concatenate(found), n)
    above = column > row
    one = row[above]
    other = column[above]
    both = np.concatenate([one * n + other, other * n + one]).astype(np.uint32)  # n below 2^16
    both.sort()
    ends, neighbours = np.divmod(both.astype(np.int64), n)
    cuts = np.cumsum(np.bincount(ends, minlength=n))[:-1]
    return tuple(np.split(neighbours, cuts))


@lru_cache(maxsize=256)
def design(n: int, liars: int, gone: int) -> Sparse | None:
    """Return the law of the sparsest graph that keeps its promise; None where everybody had better
    be everybody's neighbour.

    Args:
        n: how many members.
        liars: how many of them work with the server.
        gone: how many may drop out; the lists have n - gone members or more.
    """
    if n <= SMALL:
        return None
    for degree in range(8, math.floor(SPARSE * (n - 1)) + 1, max(1, n // 256)):
        edge = math.ceil(WORD * degree / (n - 1))
        lost = find_lost(n, liars, edge)
        if lost is None or lost > (n - gone - liars) // 8:
            continue
        share = _find_share(n, liars, lost, edge)
        if share is not None and fail_to_rebuild(n, gone, edge, share) <= -LIVE_BITS:
            return Sparse(edge, share, lost, find_checks(n, liars, n - gone))
    return None


def find_lost(n: int, liars: int, edge: int) -> int | None:
    """Return the least number of honest rows that event 1 does not keep together; None where it
    keeps nothing.
    """
    holds = np.flatnonzero(_fail_to_join(n, liars, edge) <= -BITS)
    return int(holds[0]) if len(holds) else None


def fail_to_join(n: int, liars: int, lost: int, edge: int) -> float:
    """Return log2 of the bound on event 1: more than `lost` honest members are cut off."""
    return float(_fail_to_join(n, liars, edge)[lost])


def _fail_to_join(n: int, liars: int, edge: int) -> NDArray[np.float64]:
    """Return log2 of that bound for lost = 0, 1 ..."""
    honest = n - liars
    sure = (n + liars) // 2 + 1 - liars
    a_A = np.arange(1, sure // 2 + 1)
    sets_A = np.array([_choose(honest, a) + _choose(honest - a, sure - a) for a in a_A.tolist()])
    terms_A = sets_A + a_A * (sure - a_A) * math.log1p(-edge / WORD)
    tail_A: NDArray[np.float64] = np.logaddexp.accumulate(terms_A[::-1])[::-1] / math.log(2)
    return tail_A


def _find_share(n: int, liars: int, lost: int, edge: int) -> int | None:
    """Return the least tau, in PARTS, under which event 2 is as rare as it must be."""
    low = 0
    high = PARTS
    if fail_small(n, liars, lost, edge, high) > -BITS:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        if fail_small(n, liars, lost, edge, middle) <= -BITS:
            high = middle
        else:
            low = middle
    return high


def fail_small(n: int, liars: int, lost: int, edge: int, share: int) -> float:
    """Return log2 of the bound on event 2: sets of at most `lost` members, or 1."""
    honest = n - liars
    tau = share / PARTS
    total = -math.inf
    for c in range(1, max(lost, 1) + 1):
        pairs = ((c * (c - 1) // 2, 2 - 2 * tau), (c * liars, 1 - tau), (c * (honest - c), -tau))
        total = np.logaddexp(total, _choose(honest, c) + _tail(pairs, edge))
    return float(total) / math.log(2)


def fail_to_rebuild(n: int, gone: int, edge: int, share: int) -> float:
    """Return log2 of the bound on the chance that some seed has too few holders, where those who
    drop out were not chosen by the graph.
    """
    tau = share / PARTS
    pairs = ((gone, tau), (n - 1 - gone, tau - 1))
    return (math.log(n) + _tail(pairs, edge)) / math.log(2)


def find_checks(n: int, liars: int, quorum: int) -> int:
    """Return how many of `quorum` signatures of one list a member verifies, drawn in secret once
    all are told, so that (n + f) / 2 true ones at most would pass for all of them at no member.
    """
    true = (n + liars) // 2
    passes = math.log2(n)
    for checks in range(min(true, quorum)):
        if passes <= -SIGNED_BITS:
            return checks
        passes += math.log2((true - checks) / (quorum - checks))
    return min(true + 1, quorum)


def fail_to_check(n: int, liars: int, quorum: int, checks: int) -> float:
    """Return log2 of the bound on event 0, where each member verifies so many signatures."""
    true = (n + liars) // 2
    if checks > true:
        return -math.inf
    drawn = (math.log2((true - at) / (quorum - at)) for at in range(checks))
    return math.log2(n) + sum(drawn)


def add_logs(terms: Sequence[float]) -> float:
    """Return log2 of a sum, from log2 of its terms."""
    return float(np.logaddexp2.reduce(terms))


def _tail(pairs: tuple[tuple[int, float], ...], edge: int) -> float:
    """Return the logarithm of Chernoff's bound on P[sum of weight x binomial(count, p) >= 0]."""
    p = edge / WORD
    exponent = np.zeros_like(_THETA)
    for count, weight in pairs:
        exponent += count * np.log1p(p * np.expm1(_THETA * weight))
    return min(0.0, float(exponent.min()))


def _choose(n: int, k: int) -> float:
    """Return the logarithm of n over k."""
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
