"""Inner products of shared rows: right, hidden, and proven; a party that tells others is found."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from medfed.core.checks import AbortError
from medfed.core.entropy import Words
from medfed.secure import field, products
from medfed.secure.line import Line, Pair
from medfed.secure.products import Inner, Products
from tests.secure import three

COIN, LATER = b"c" * 32, b"r" * 32


def add(made: Products, first: Words, second: Words) -> None:
    made.add(first, second, [field.digits(first), field.digits(second)])


def party(
    line: Line, held: Pair, every: bool, lie: Callable[[Products], None] | None = None
) -> three.Steps:
    """Play one party: work out in two goes, tell, and prove; return the shared inner products."""
    K, M = held.first.shape
    made = Products(K, M, every)
    for at in (slice(0, M // 3), slice(M // 3, M)):
        add(made, held.first[:, at], held.second[:, at])
    if lie:
        lie(made)
    inner = yield from made.tell(line)

    def columns(which: int, start: int, count: int) -> Words:
        return (held.first, held.second)[which][:, start : start + count]

    def toss() -> three.Steps:
        yield from line.swap(b"", b"")
        return LATER

    yield from made.prove(line, columns, COIN, toss)
    return inner


def run(
    x_KM: NDArray[np.int64],
    every: bool = True,
    lie: Callable[[Products], None] | None = None,
    liar: str = "q",
) -> dict[str, Inner]:
    lines = three.lines()
    held = three.shared(x_KM.view(np.uint64), np.random.default_rng(1))
    return three.play(
        {
            name: party(lines[name], held[name], every, lie if name == liar else None)
            for name in three.NAMES
        }
    )


@pytest.mark.parametrize("every", [True, False])
@pytest.mark.parametrize(("K", "M"), [(1, 1), (2, 5), (3, 700), (17, 40), (40, 33)])
@pytest.mark.parametrize("largest", [1, 2**40, 2**63])
def test_inner_products_are_those_of_the_rows(K: int, M: int, largest: int, every: bool) -> None:
    x_KM = np.random.default_rng(K).integers(-largest, largest - (largest == 2**63), (K, M))
    found = run(x_KM, every)
    pairs = found["p"].pairs
    expected = [(k, h) for k in range(K) for h in range(k, K)]
    assert sorted(pairs) == (expected if every else [(k, k) for k in range(K)])
    x = x_KM.astype(object)
    words = three.whole({name: inner.words for name, inner in found.items()})
    assert words.tolist() == [int(x[k] @ x[h]) % 2**64 for k, h in pairs]
    squares = three.whole({name: inner.squares(K) for name, inner in found.items()})
    assert squares.tolist() == [int(row @ row) % 2**64 for row in x]


def test_more_rows_than_are_combined_at_a_time() -> None:
    x_KM = np.random.default_rng(2).integers(-9, 10, (products._ROWS + 3, 4))
    found = run(x_KM)
    words = three.whole({name: inner.words for name, inner in found.items()})
    assert words.view(np.int64).tolist() == (x_KM @ x_KM.T)[np.triu_indices(len(x_KM))].tolist()


def moved(at: int, by: int) -> Callable[[Products], None]:
    """Return a lie: the number `at` of those that are told is another."""

    def lie(made: Products) -> None:
        told = made._sums
        made._sums = lambda: [D + by * (i == at) for i, D in enumerate(told())]  # type: ignore[method-assign]

    return lie


@pytest.mark.parametrize("liar", three.NAMES)
@pytest.mark.parametrize("by", [1, -1, 2**22, 2**63, 2**64, -(2**64)])
@pytest.mark.parametrize("at", [0, 4, 12])
def test_another_product_is_found(at: int, by: int, liar: str) -> None:
    """Also where it changes nothing mod 2^64: what is told is held to whole numbers."""
    x_KM = np.random.default_rng(3).integers(-(2**30), 2**30, (3, 50))
    with pytest.raises(AbortError, match=rf"products that '{liar}' told do not hold"):
        run(x_KM, lie=moved(at, by), liar=liar)


def test_a_product_beyond_the_field_is_refused() -> None:
    """One more by p would hold in the field, and be another number mod 2^64."""
    with pytest.raises(AbortError, match="product that none can be"):
        run(np.ones((2, 3), np.int64), lie=moved(1, products.P))


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_another_message_of_the_proof_is_found(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the liar sends to either side: products, coefficients, the coin's swap, the fold."""
    swap = Line.swap
    x_KM = np.random.default_rng(4).integers(-(2**30), 2**30, (3, 50))

    def lying(self: Line, left: bytes, right: bytes) -> Any:
        if self.me == "r" and self._step == step - 1:
            left, right = (bytes([m[0] ^ 1]) + m[1:] if m else m for m in (left, right))
        return (yield from swap(self, left, right))

    monkeypatch.setattr(Line, "swap", lying)
    if step == 3:
        run(x_KM)  # nothing is sent there
        return
    with pytest.raises(AbortError, match="do not hold"):
        run(x_KM)


def low_bits(runs: int, monkeypatch: pytest.MonkeyPatch, bare: bool = False) -> NDArray[np.bool_]:
    """Return the low bit of one party's share of a product of two rows of one number, as it would
    be opened.
    """
    if bare:
        monkeypatch.setattr(Line, "streams", lambda self, count: (np.zeros(count, np.uint64),) * 2)
    rng = np.random.default_rng(5)
    found = []
    for _ in range(runs):
        held = three.shared(np.array([[3], [5]], np.uint64), rng)
        told: dict[str, Inner] = three.play(
            {name: _tell(line, held[name]) for name, line in three.lines().items()}
        )
        found.append(told["p"].words.first[1] & np.uint64(1))
    return np.array(found, bool)


def _tell(line: Line, held: Pair) -> three.Steps:
    made = Products(*held.first.shape, every=True)
    add(made, held.first, held.second)
    return (yield from made.tell(line))


def test_a_share_of_a_product_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its low bits are even coins. Without masks they are odd ones: the test would see it."""
    assert stats.binomtest(int(low_bits(150, monkeypatch).sum()), 150).pvalue > 1e-4
    # so many that odd coins pass for even ones once in 100,000
    bare = low_bits(600, monkeypatch, bare=True)
    # a a' + a b' + b a' is odd 3 times of 8
    assert stats.binomtest(int(bare.sum()), 600, 3 / 8).pvalue > 1e-4
    assert stats.binomtest(int(bare.sum()), 600).pvalue < 0.05


def test_what_the_right_one_sees_of_a_proof_is_uniform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden products and A(r) look alike whatever the rows; without what hides them they do not."""

    def seen() -> tuple[list[float], list[float]]:
        kept: dict[int, list[bytes]] = {1: [], 4: []}
        swap = Line.swap

        def spied(self: Line, left: bytes, right: bytes) -> Any:
            if self.me == "p" and self._step + 1 in kept:
                kept[self._step + 1].append(right or left)
            return (yield from swap(self, left, right))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Line, "swap", spied)
            for _ in range(40):
                run(np.zeros((2, 64), np.int64))
        first = [int.from_bytes(one[:16], "little") / 2**120 for one in kept[1]]
        fold = [int.from_bytes(one[:4], "little") / 2**22 for one in kept[4]]
        return first, fold

    for numbers in seen():
        assert stats.kstest(numbers, "uniform").pvalue > 1e-4
    monkeypatch.setattr(Line, "streams", lambda self, count: (np.zeros(count, np.uint64),) * 2)
    hidden, _ = seen()
    assert stats.kstest(hidden, "uniform").pvalue < 1e-6


def test_numbers_of_the_field_are_reduced() -> None:
    rng = np.random.default_rng(7)
    for limbs in (6, 7, 11, 13):
        sums = [rng.integers(0, 2**53, 50) for _ in range(limbs)]
        expected = [
            sum(int(one[i]) << (22 * n) for n, one in enumerate(sums)) % products.P
            for i in range(50)
        ]
        found = products._reduce(sums)
        assert found.shape == (6, 50) and found.max() < 2**22 and found[5].max() < 2**17
        whole = [
            sum(int(found[n, i]) << (22 * n) for n in range(6)) % products.P for i in range(50)
        ]
        assert whole == expected
    words = rng.integers(0, 2**64, 20, np.uint64)
    found = products._limbs_of_words(words).astype(np.int64)
    assert [sum(int(found[n, i]) << (22 * n) for n in range(6)) for i in range(10)] == [
        (int(words[2 * i]) | int(words[2 * i + 1]) << 64) % 2**127 for i in range(10)
    ]
