"""Bitwise products of three parties, verified before anything is opened.

A dishonest party can send another word than its part of an AND, which flips bits of the result and
is seen by nobody. So each AND is checked against a random product of the same kind, and those
against each other (Furukawa, Lindell, Nof, Weinstein 2017): more random products are made than
needed, some are opened, the rest are put into buckets in an order drawn afterwards, and of each
bucket all but one are spent on checking that one. A wrong product passes only where a whole bucket
is wrong alike.

Words are verified 16 at a time: such a product is wrong where one bit of it is. N products are
verified with B N + B random ones: of N buckets, B in each, a wrong one passes with probability at
most N^(1 - B).
"""

import math
from collections.abc import Generator

import numpy as np

from medfed.core.checks import AbortError
from medfed.core.entropy import Words, expand
from medfed.secure.line import Line, Pair, Sends

FAILURE = 40
"""Bits: a wrong product passes with probability 2^-40 at most."""


UNIT = 16
"""Words that are verified together."""


def buckets(products: int) -> int:
    """Return B, how many random products a bucket holds."""
    return 1 + math.ceil(FAILURE / math.log2(max(products, 2)))


def prepare(line: Line) -> Generator[Sends, Sends, tuple[Pair, Pair, Pair]]:
    """Return random products for all that the line has multiplied, not yet verified.

    They must be sent before the coin is tossed by which `verify` draws their order.
    """
    N = -(-sum(len(x.first) for x, _, _ in line.multiplied) // UNIT)
    count = UNIT * buckets(N) * (N + 1)
    done = list(line.multiplied)
    a = line.random(count)
    b = line.random(count)
    c = yield from line.both(a, b)
    line.multiplied = done  # these verify the others, and themselves
    return _in_units(a), _in_units(b), _in_units(c)


def verify(line: Line, made: tuple[Pair, Pair, Pair], coin: bytes) -> Generator[Sends, Sends, None]:
    """Verify all bits that the line has multiplied, by what `prepare` made.

    Guarantee: with at most one dishonest party, a word that is not the product of the other two
    passes with probability at most 2^-40, whatever its author saw; and the two honest parties
    learn of the multiplied words nothing but that they hold.

    Edge cases:
    - a wrong product, or a word opened two ways: AbortError, and nothing is opened;
    - a wrong random product ends the round too, though the others' results were right.

    Args:
        line: between the three.
        made: the random products.
        coin: 32 bytes that nobody knew when the products were made.
    """
    x, y, z = (_in_units(Pair.join([one[i] for one in line.multiplied])) for i in range(3))
    N = len(x.first)
    B = buckets(N)
    order = _shuffle(coin, B * (N + 1))
    shown = order[:B]
    table = order[B:].reshape(B, N)  # column n: the bucket of product n
    a, b, c = made

    # Open some, and the differences by which the others are compared: in a bucket all with its
    # first, and the first with the product itself.
    heads = [one.at(table[0]) for one in made]
    others = [[one.at(table[i]) for one in made] for i in range(1, B)]
    compared = [([x, y, z], heads), *((heads, other) for other in others)]
    differences = [one[i].xor(two[i]) for one, two in compared for i in (0, 1)]
    opened = yield from line.reveal(
        Pair.join([a.at(shown), b.at(shown), c.at(shown), *differences])
    )
    shown_a, shown_b, shown_c = opened[: 3 * B].reshape(3, B, UNIT)
    if (shown_a & shown_b != shown_c).any():
        raise AbortError(
            "a random product is wrong: one of the three did not follow the protocol. Nothing is "
            "opened; run the round again."
        )

    # (a + rho) (b + sigma) must be what the other product says.
    words = opened[3 * B :].reshape(len(compared), 2, N, UNIT)
    left = []
    for (one, two), (rho, sigma) in zip(compared, words, strict=True):
        linear = two[1].mask(rho).xor(two[0].mask(sigma))
        left.append(one[2].xor(two[2]).xor(linear).flip(rho & sigma, line.place))
    yield from line.see_zero(Pair.join(left), "products of shared bits")
    line.multiplied = []


def _in_units(words: Pair) -> Pair:
    """Return words as units [N, 16], the last one filled up with zeros."""
    more = -len(words.first) % UNIT
    first, second = (np.pad(part, (0, more)) for part in (words.first, words.second))
    return Pair(first.reshape(-1, UNIT), second.reshape(-1, UNIT))


def _shuffle(coin: bytes, count: int) -> np.ndarray:
    """Return 0 .. count - 1 in an order that the coin decides: by a word each, ties of which have
    probability count^2 / 2^65.
    """
    keys: Words = expand(coin, count)
    return np.argsort(keys, kind="stable")
