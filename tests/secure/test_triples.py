"""Bits that three multiply: right, and verified; whoever sends another word is found."""

from typing import Any

import numpy as np
import pytest

from medfed.core.checks import AbortError
from medfed.secure import triples
from medfed.secure.line import Line, Pair
from tests.secure import three


def party(line: Line, x: Pair, verified: bool = True) -> three.Steps:
    """Turn words into bits, say of each whether one is set, verify; return both."""
    bits = yield from line.to_bits(x)
    some = yield from line.any_bit(bits)
    made = yield from triples.prepare(line)
    if verified:
        yield from triples.verify(line, made, b"k" * 32)
    return bits, some


def run(words: np.ndarray, verified: bool = True) -> tuple[np.ndarray, np.ndarray]:
    lines = three.lines()
    held = three.shared(words, np.random.default_rng(3))
    found = three.play({name: party(lines[name], held[name], verified) for name in three.NAMES})
    bits, some = (
        three.whole({name: two[i] for name, two in found.items()}, bits=True) for i in range(2)
    )
    return bits, some


def test_bits_are_those_of_the_words() -> None:
    rng = np.random.default_rng(4)
    words = rng.integers(0, 2**64, (3, 7), np.uint64)
    words[0, :3] = (0, 1, 2**63)
    bits, some = run(words)
    assert (bits == words).all()
    assert (some == (words != 0)).all()


@pytest.mark.parametrize("liar", three.NAMES)
@pytest.mark.parametrize("step", [*range(1, 16), 16])
def test_one_flipped_bit_of_any_message_is_found(
    step: int, liar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of the 14 layers, the random products, what is opened of them, and the hashes."""
    swap = Line.swap
    words = np.arange(6, dtype=np.uint64)

    def lying(self: Line, left: bytes, right: bytes) -> Any:
        if self.me == liar and self._step == step - 1:
            left, right = (m[:3] + bytes([m[3] ^ 4]) + m[4:] if m else m for m in (left, right))
        return (yield from swap(self, left, right))

    monkeypatch.setattr(Line, "swap", lying)
    with pytest.raises(AbortError, match=r"do not hold|is wrong|different shares"):
        run(words)


def test_without_verification_a_flipped_bit_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    swap = Line.swap
    words = np.arange(6, dtype=np.uint64)

    def lying(self: Line, left: bytes, right: bytes) -> Any:
        if self.me == "p" and self._step == 13:  # the last layer
            left = bytes([left[0] ^ 1]) + left[1:]
        return (yield from swap(self, left, right))

    monkeypatch.setattr(Line, "swap", lying)
    lines = three.lines()
    held = three.shared(words, np.random.default_rng(3))
    found = three.play({name: party(lines[name], held[name], False) for name in three.NAMES})
    # the liar's left neighbour has the other word, and what is opened to it follows from that
    shares = {name: two[1] for name, two in found.items()}
    opened = shares["r"].first ^ shares["r"].second ^ shares["q"].first
    assert (opened != (words != 0)).sum() == 1


def test_buckets_hold_what_the_failure_asks() -> None:
    for products in (2, 100, 230, 2_300, 36_000):
        held = triples.buckets(products)
        assert products ** (held - 1) >= 2**40 > products ** (held - 2)


def test_a_wrong_bucket_alike_passes_as_seldom_as_is_said() -> None:
    """With small buckets, a liar who spoils a random product and its likes: the bound is met."""
    N, B, passed, runs = 8, 2, 0, 4000
    for run_ in range(runs):
        bad = np.zeros(B * (N + 1), bool)
        bad[:B] = True  # the best that it can do: just one whole bucket
        order = triples._shuffle(int(run_).to_bytes(32, "little"), len(bad))
        buckets = bad[order[B:]].reshape(B, N)
        passed += not bad[order[:B]].any() and bool((buckets.all(0) | ~buckets.any(0)).all())
    assert 0 < passed / runs <= N ** (1 - B)
