"""Inner products of rows that three parties share, with proofs that each party told the right ones.

Party i holds the shares x_i and x_(i+1) of every row. Of x_k.x_h it alone can work out the cross
terms of its two, so it tells them, and proves that they are right to the others: the left one knows
x_i, the right one x_(i+1), and each of them learns nothing of the other's (distributed zero
knowledge, after Boneh, Boyle, Corrigan-Gibbs, Gilboa, Ishai 2019).

1. Telling. A word is cut into digits of 22 bits. Per pair of rows and per s, the prover works out
   D_s, the sum of products of digits j and j' with j + j' = s: whole numbers below 2^68. It hides
   each by a mask m of 120 bits that the left one knows too, and sends v = D + m to the right one.
   So D = v - m is shared, and with it its residue mod 2^64.
2. Collapsing. Coins chi_k, one a row, and rho turn all statements into one: with A = sum_k chi_k
   sum_j rho^j (digit j of x_i in row k), and B alike of x_(i+1), <A, B> = sum_kh chi_k chi_h sum_s
   rho^s D_s,kh. Both sides are polynomials in the coins, of degree 6 at most, in the field of p =
   2^127 - 1; all that is compared is below p, so that what holds there holds of whole numbers.
3. Folding. A and B are cut into S blocks, and A(X) = sum_b A_b X^b, B(X) = sum_b B_b X^(S-1-b):
   <A, B> is the coefficient of X^(S-1) in A(X) B(X). The prover shares all coefficients between the
   two, who evaluate at a coin r: the left one sends A(r) to the right one, who has B(r). A block of
   random numbers on either side, of degree S, hides what A(r) and B(r) would say.

A wrong D passes with probability below (6 + 2 S) / p. K rows, M numbers in a row.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medfed.core.checks import AbortError
from medfed.core.entropy import Words, expand
from medfed.secure import field
from medfed.secure.line import Line, Pair, Sends

P = 2**127 - 1
"""The order of the field of proofs, a Mersenne prime."""

GROUP = 16
"""Rows whose products are worked out together, where only squares are asked for."""

_LIMBS = 6  # of a number of the field
_SUMS = 2 * field.DIGITS - 1  # values of s
_DIGITS = range(field.DIGITS)
_MASK = 120  # bits of what hides a D
_CHUNK = 512  # products of 44 bits that sum below 2^53, exact in float64

Floats = NDArray[np.float64]
Limbs = NDArray[np.float32]
Columns = Callable[[int, int, int], Words]
"""(which share: 0 or 1, first column, count) -> words [K, count]."""


@dataclass(frozen=True)
class Inner:
    """Shared inner products of rows: of `pairs` (k, h), k <= h, in their order."""

    pairs: list[tuple[int, int]]
    words: Pair

    def squares(self, K: int) -> Pair:
        """Return x_k.x_k for the K rows."""
        index = {pair: i for i, pair in enumerate(self.pairs)}
        return self.words.at([index[k, k] for k in range(K)])

    def upper(self, rows: Sequence[int]) -> Pair:
        """Return the upper triangle of the Gram matrix of some rows, in order, row by row."""
        index = {pair: i for i, pair in enumerate(self.pairs)}
        return self.words.at([index[k, h] for k in rows for h in rows if k <= h])


class Products:
    """A party's part in the inner products of K rows: work out, tell, prove."""

    def __init__(self, K: int, length: int, every: bool) -> None:
        """Begin with no column.

        Args:
            K: rows.
            length: M, numbers in a row.
            every: whether all pairs are asked for; else squares alone.
        """
        size = K if every else GROUP
        self.groups = [range(at, min(at + size, K)) for at in range(0, K, size)]
        self.length = length
        self.blocks = _SHORT if length * len(self.groups) < 2**16 else _LONG
        self.pairs = [(k, h) for rows in self.groups for k in rows for h in rows if k <= h]
        self._cross = [_Exact((field.DIGITS * len(rows),) * 2) for rows in self.groups]
        self._own = [np.zeros((len(rows), len(rows)), np.uint64) for rows in self.groups]
        self._next = [np.zeros((len(rows), len(rows)), np.uint64) for rows in self.groups]
        self._every = every

    def add(self, first: Words, second: Words, digits: Sequence[Floats]) -> None:
        """Take in some columns [K, count] of both shares, and the `field.digits` of either."""
        for g, rows in enumerate(self.groups):
            at = slice(rows.start, rows.stop)
            a, b = (one[:, at].reshape(field.DIGITS * len(rows), -1) for one in digits)
            self._cross[g].add(a, b)
            for total, words in ((self._own[g], first[at]), (self._next[g], second[at])):
                if self._every:
                    total += _gram(words)
                else:
                    total[np.diag_indices(len(rows))] += np.einsum("km,km->k", words, words)

    def tell(self, line: Line) -> Generator[Sends, Sends, Inner]:
        """Send what hides this party's cross terms; return the inner products, shared.

        Raises AbortError where the left one sends no such numbers.
        """
        D = self._sums()
        count = len(D)
        left, right = line.streams(2 * count)
        self.masks = _integers(left, _MASK)
        theirs = _integers(right, _MASK)
        self.sent = [d + m for d, m in zip(D, self.masks, strict=True)]
        self.heard = _read(line, (yield from line.from_left(_write(self.sent))), count)
        if max(self.heard, default=0) >= 2 ** (_MASK + 1):
            raise AbortError(f"{line.left!r} sent a product that none can be; the round ends")
        self.theirs = theirs

        own = self._local(self._own) + self._words(self.heard) - self._words(self.masks)
        after = self._local(self._next) + self._words(self.sent) - self._words(theirs)
        # Of different rows only the cross terms were worked out where squares alone are asked for.
        asked = [i for i, (k, h) in enumerate(self.pairs) if self._every or k == h]
        return Inner([self.pairs[i] for i in asked], Pair(own, after).at(asked))

    def _sums(self) -> list[int]:
        """Return D, by pair and s: see step 1."""
        found: list[int] = []
        for rows, cross in zip(self.groups, self._cross, strict=True):
            n = len(rows)
            table = cross.total().reshape(field.DIGITS, n, field.DIGITS, n)
            for k in range(n):
                for h in range(k, n):
                    for s in range(_SUMS):
                        pairs = [(j, s - j) for j in _DIGITS if s - j in _DIGITS]
                        D = sum(int(table[j, k, i, h]) for j, i in pairs)
                        if k != h:
                            D += sum(int(table[j, h, i, k]) for j, i in pairs)
                        found.append(D)
        return found

    def _words(self, numbers: list[int]) -> Words:
        """Return what numbers by pair and s come to mod 2^64: a square has its cross term twice."""
        found = []
        for at, (k, h) in enumerate(self.pairs):
            parts = numbers[_SUMS * at : _SUMS * (at + 1)]
            value = sum(part << (field.LIMB * s) for s, part in enumerate(parts))
            found.append(value * (2 if k == h else 1) % 2**64)
        return np.array(found, np.uint64)

    def _local(self, grams: list[Words]) -> Words:
        return np.concatenate([gram[np.triu_indices(len(gram))] for gram in grams])

    # The proof ---------------------------------------------------------------------------------

    def prove(
        self,
        line: Line,
        columns: Columns,
        coin: bytes,
        toss: Callable[[], Generator[Sends, Sends, bytes]],
    ) -> Generator[Sends, Sends, None]:
        """Prove own cross terms to the others, and see that the left one's are right.

        Guarantee: with at most one dishonest party, cross terms that are not those of the shares
        pass with probability below 2^-120; nobody learns of a share that it does not hold.

        Edge cases:
        - a wrong product, or a wrong word in its proof: AbortError at an honest party, and so
          nothing is opened; which of the two others lied is not known.

        Args:
            line: between the three.
            columns: the rows' shares, once more.
            coin: 32 bytes that nobody knew when cross terms were told.
            toss: tosses the next coin, which nobody knows before all coefficients are told.
        """
        # Collapse: both shares of all rows, by the coins.
        K = self.groups[-1].stop
        *chi, rho = (value % P for value in _integers(expand(coin, 2 * (K + 1)), 127))
        own, after = (self._collapse(columns, which, chi, rho) for which in (0, 1))
        size = own.shape[2]

        # Tell: all coefficients of the product but the one that is proven, shared by the others.
        hidden = [_limbs_of_words(words)[:, None] for words in line.streams(2 * size)]
        A = np.concatenate([own, hidden[0]], 1)
        coefficients = _multiply(A, after)
        mine, theirs = (
            [value % P for value in _integers(words, 127)]
            for words in line.streams(2 * len(coefficients))
        )
        told = [(c - m) % P for c, m in zip(coefficients, mine, strict=True)]
        given = _read(line, (yield from line.from_left(_write(told))), len(told))

        # Fold: A(r) of the right one's proof goes to the left one, who has its B(r).
        r = int.from_bytes((yield from toss())[:16], "little") % P or 1
        weights = self._weights(chi, rho)
        seen = _fold(np.concatenate([after, hidden[1]], 1), _powers(r, self.blocks + 1))
        share = _evaluate(theirs, r, -_weigh(weights, self.theirs))
        sent = seen.astype(np.uint32).tobytes() + _write([share])
        _, found = yield from line.swap(sent, b"")
        alpha, other = _read_fold(line, found, size)

        # Compare, for the left one's proof.
        beta = _fold(own, _powers(r, self.blocks)[::-1])
        claimed = other + _evaluate(given, r, _weigh(weights, self.heard))
        if (claimed - _inner(alpha, beta)) % P:
            raise AbortError(
                f"products that {line.left!r} told do not hold, as {line.right!r} and "
                f"{line.me!r} see it: one of the others did not follow the protocol. Nothing is "
                "opened; run the round again."
            )

    def _weights(self, chi: list[int], rho: int) -> list[int]:
        """Return chi_k chi_h rho^s, by pair and s."""
        powers = _powers(rho, _SUMS)
        return [chi[k] * chi[h] * power % P for k, h in self.pairs for power in powers]

    def _collapse(self, columns: Columns, which: int, chi: list[int], rho: int) -> Limbs:
        """Return sum_k chi_k sum_j rho^j (digit j of row k), group by group, as limbs [6, S, t]."""
        powers = _powers(rho, field.DIGITS)
        factors = [
            [
                _split([chi[k] * power % P for power in powers for k in rows[at : at + _ROWS]])
                for at in range(0, len(rows), _ROWS)
            ]
            for rows in self.groups
        ]
        size = -(-self.length * len(self.groups) // self.blocks)
        flat = np.zeros((_LIMBS, self.blocks * size), np.float32)  # 22 bits are exact
        for start in range(0, self.length, _WIDE):
            count = min(_WIDE, self.length - start)
            digits = field.digits(columns(which, start, count))
            for g, rows in enumerate(self.groups):
                sums = np.zeros((_LIMBS, count), np.int64)
                for i, factor in enumerate(factors[g]):
                    at = slice(rows.start + i * _ROWS, min(rows.start + (i + 1) * _ROWS, rows.stop))
                    sums += (factor @ digits[:, at].reshape(-1, count)).astype(np.int64)
                at_g = g * self.length + start
                flat[:, at_g : at_g + count] = _reduce(list(sums))
        return flat.reshape(_LIMBS, self.blocks, size)


_SHORT, _LONG = 4, 16  # S, into how many blocks a proof folds
_ROWS = 128  # rows whose digits are combined at a time: 3 128 2^44 < 2^53
_WIDE = 1 << 14  # columns that are unfolded at a time


class _Exact:
    """Products of matrices of numbers below 2^22, added up exactly."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._low = np.zeros(shape, np.int64)
        self._high = np.zeros(shape, np.int64)

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        """Add a b^T, of a [n, c] and b [p, c]."""
        for start in range(0, a.shape[1], _CHUNK):
            left, right = (m[:, start : start + _CHUNK].astype(np.float64) for m in (a, b))
            part = (left @ right.T).astype(np.int64)
            self._low += part & (2**26 - 1)
            self._high += part >> 26

    def total(self) -> NDArray[np.object_]:
        """Return the sum, of Python's integers."""
        found: NDArray[np.object_] = self._low.astype(object) + (self._high.astype(object) << 26)
        return found


def _gram(words: Words) -> Words:
    return field.matmul(words, words.T)


# Numbers of the field ---------------------------------------------------------------------------


def _integers(words: Words, bits: int) -> list[int]:
    """Return whole numbers below 2^bits, of two words each."""
    data = np.ascontiguousarray(words).tobytes()
    return [
        int.from_bytes(data[at : at + 16], "little") >> (128 - bits)
        for at in range(0, len(data), 16)
    ]


def _powers(x: int, count: int) -> list[int]:
    found = [1]
    while len(found) < count:
        found.append(found[-1] * x % P)
    return found


def _split(values: list[int]) -> Floats:
    """Return the limbs [6, n] of n numbers."""
    mask = 2**field.LIMB - 1
    return np.array(
        [[(value >> (field.LIMB * i)) & mask for value in values] for i in range(_LIMBS)],
        np.float64,
    )


def _limbs_of_words(words: Words) -> NDArray[np.float32]:
    """Return the limbs [6, n] of n random numbers, of two words each."""
    low, high = words.reshape(-1, 2).T
    mask = np.uint64(2**field.LIMB - 1)
    found = [low & mask, (low >> np.uint64(22)) & mask]
    found.append((low >> np.uint64(44)) | ((high & np.uint64(3)) << np.uint64(20)))
    found += [(high >> np.uint64(at)) & mask for at in (2, 24)]
    found.append((high >> np.uint64(46)) & np.uint64(2**17 - 1))
    return np.stack(found).astype(np.float32)


def _reduce(sums: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return limbs [6, c] below 2^22 of what sums come to mod p, the least first; top bits below
    2^127.
    """
    mask = 2**field.LIMB - 1
    while True:
        limbs = []
        carry = np.zeros_like(sums[0])
        for value in sums:
            value = value + carry
            limbs.append(value & mask)
            carry = value >> field.LIMB
        while carry.any():
            limbs.append(carry & mask)
            carry = carry >> field.LIMB
        limbs += [np.zeros_like(carry)] * (_LIMBS - len(limbs))
        high = limbs[_LIMBS:]
        top = limbs[_LIMBS - 1] >> (127 - field.LIMB * (_LIMBS - 1))
        if not high and not top.any():
            return np.stack(limbs)

        # 2^127 counts 1, and 2^132, where the seventh limb begins, 32.
        limbs[_LIMBS - 1] = limbs[_LIMBS - 1] & (2**17 - 1)
        sums = limbs[:_LIMBS]
        sums[0] = sums[0] + top
        for i, limb in enumerate(high):
            if i < _LIMBS:
                sums[i] = sums[i] + (limb << 5)
            else:
                sums.append(limb << 5)


def _compose(table: NDArray[np.object_]) -> NDArray[np.object_]:
    """Return the numbers [n, p] of a table [6, n, 6, p] of products of limbs."""
    shifts = np.array(
        [[1 << (field.LIMB * (i + j)) for j in range(_LIMBS)] for i in range(_LIMBS)], object
    )
    found: NDArray[np.object_] = (table * shifts[:, None, :, None]).sum((0, 2))
    return found


def _multiply(A: Limbs, B: Limbs) -> list[int]:
    """Return the coefficients of A(X) B(X), of blocks [6, S + 1, t] and [6, S, t], but for the one
    of X^(S-1).
    """
    S, size = B.shape[1:]
    exact = _Exact((_LIMBS * (S + 1), _LIMBS * S))
    exact.add(A.reshape(-1, size), B.reshape(-1, size))
    products = _compose(exact.total().reshape(_LIMBS, S + 1, _LIMBS, S))
    found = [0] * (2 * S)
    for b in range(S + 1):
        for c in range(S):
            found[b + S - 1 - c] += products[b, c]
    return [value % P for n, value in enumerate(found) if n != S - 1]


def _evaluate(coefficients: list[int], r: int, proven: int) -> int:
    """Return the polynomial at r, of its coefficients and of the one that is proven."""
    S = (len(coefficients) + 1) // 2
    whole = [*coefficients[: S - 1], proven, *coefficients[S - 1 :]]
    return sum(c * power for c, power in zip(whole, _powers(r, len(whole)), strict=True)) % P


def _fold(blocks: Limbs, factors: list[int]) -> NDArray[np.int64]:
    """Return the sum of blocks [6, n, t] times n factors, as limbs [6, t]."""
    n = blocks.shape[1]
    limbs = _split(factors)
    spread = np.zeros((2 * _LIMBS - 1, _LIMBS, n))
    for i in range(_LIMBS):
        spread[i : i + _LIMBS, i] = limbs
    sums = spread.reshape(len(spread), -1) @ blocks.reshape(_LIMBS * n, -1).astype(np.float64)
    return _reduce(list(sums.astype(np.int64)))


def _inner(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    exact = _Exact((_LIMBS, _LIMBS))
    exact.add(a.astype(np.float64), b.astype(np.float64))
    return int(_compose(exact.total()[:, None, :, None])[0, 0])


def _weigh(weights: list[int], numbers: list[int]) -> int:
    return sum(w * x for w, x in zip(weights, numbers, strict=True)) % P


def _write(numbers: list[int]) -> bytes:
    return b"".join(number.to_bytes(16, "little") for number in numbers)


def _read(line: Line, data: bytes, count: int) -> list[int]:
    """Return numbers that the left one sent; raise AbortError where they are not as many."""
    if len(data) != 16 * count:
        raise AbortError(
            f"{line.left!r} sent {len(data)} bytes of products; expected {16 * count}. The round "
            "ends."
        )
    return [int.from_bytes(data[at : at + 16], "little") for at in range(0, len(data), 16)]


def _read_fold(line: Line, data: bytes, size: int) -> tuple[NDArray[np.int64], int]:
    """Return A(r) and a share of the product at r, as the right one sent them."""
    end = 4 * _LIMBS * size
    if len(data) != end + 16:
        raise AbortError(
            f"{line.right!r} sent {len(data)} bytes of a proof; expected {end + 16}. The round "
            "ends."
        )
    limbs = np.frombuffer(data[:end], np.uint32).reshape(_LIMBS, size).astype(np.int64)
    if limbs.max(initial=0) >= 2**field.LIMB:
        raise AbortError(f"{line.right!r} sent numbers of no field; the round ends")
    return limbs, int.from_bytes(data[end:], "little")
