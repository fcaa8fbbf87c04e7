"""Randomness that secrets rest on: AES-256 in counter mode, its key from the operating system, or
from a shared seed.

`core.streams` is the other kind: reproducible, and never to be used for noise, masks or keys.
"""

import math
import os
import threading
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from numpy.typing import NDArray

from medfed.core.checks import PlanError

Words = NDArray[np.uint64]
Integers = NDArray[np.int64]

_ZEROS = bytes(1 << 18)  # what is encrypted, a piece at a time


class Entropy:
    """A stream of random 64-bit words: AES-256 in counter mode, its key from the operating system.

    One lock guards the stream, so threads may share an instance; one each is faster. A forked
    process takes a new key: it would repeat its parent's noise otherwise. `key` (32 bytes) is a
    secret of whoever draws: who knows it can subtract the noise. What is said below of
    distributions holds as far as AES-256 is a pseudorandom permutation.
    """

    def __init__(self, key: bytes | None = None) -> None:
        self._start(os.urandom(32) if key is None else key)

    def _start(self, key: bytes) -> None:
        self._stream = threading.Lock(), Cipher(AES256(key), CTR(bytes(16))).encryptor()
        self._process = os.getpid()

    def words(self, count: int) -> Words:
        """Return [count] words, uniform on 0 .. 2^64 - 1 and never handed out before."""
        if os.getpid() != self._process:
            self._start(os.urandom(32))
        # before version 43, cryptography asks for 15 bytes to spare
        buffer = bytearray(8 * count + 15)
        view = memoryview(buffer)
        lock, cipher = self._stream
        with lock:
            for start in range(0, 8 * count, len(_ZEROS)):
                cipher.update_into(_ZEROS[: 8 * count - start], view[start:])
        return np.frombuffer(buffer, np.uint64, count)

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Return [count] numbers uniform on the 2^53 steps of [0, 1)."""
        return (self.words(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def bernoulli(self, p: float | Fraction, count: int) -> NDArray[np.bool_]:
        """Return coins [count], True with probability p rounded down to a multiple of 2^-64."""
        if not 0 <= p <= 1:
            raise PlanError(f"p={p}: expected a probability. Pass a number from 0 to 1.")
        if p == 1:
            return np.ones(count, np.bool_)
        return self.words(count) < np.uint64(math.floor(Fraction(p) * 2**64))

    def below(self, n: int, count: int) -> Integers:
        """Return [count] integers uniform on 0 ..
        n - 1, n at most 2^63; a word that would lean is drawn again.
        """
        if not 1 <= n <= 2**63:
            raise PlanError(f"n={n}: expected 1 to 2^63. Draw from fewer numbers.")
        shift = np.uint64(64 - max(1, (n - 1).bit_length()))
        drawn = self.words(count) >> shift
        while (beyond := drawn >= np.uint64(n)).any():
            drawn[beyond] = self.words(int(beyond.sum())) >> shift
        return drawn.view(np.int64)


def expand(seed: bytes, count: int, start: int = 0, out: Words | None = None) -> Words:
    """Return words [count] number start, start + 1, ... of the stream of a seed of 32 bytes, into
    `out` if given.

    Two parties that share the seed get the same words; to anybody else they are uniform as far as
    AES-256 is a pseudorandom permutation. One seed makes one stream: derive a seed for each
    purpose.
    """
    if len(seed) != 32:
        raise PlanError(f"a seed of {len(seed)} bytes: expected 32. Derive it with HKDF.")
    words = np.empty(count, np.uint64) if out is None else out
    skip = start % 2  # a cipher block is two words
    cipher = Cipher(AES256(seed), CTR((start // 2).to_bytes(16, "big"))).encryptor()
    if skip:
        words[:1] = np.frombuffer(cipher.update(bytes(16))[8:], np.uint64)[:count]
    view = words.data.cast("B")[8 * skip :]
    buffer = bytearray(min(len(view), len(_ZEROS)) + 15)

    for at in range(0, len(view), len(_ZEROS)):
        piece = min(len(_ZEROS), len(view) - at)
        if len(view) - at >= piece + 15:  # room to spare: straight into place
            cipher.update_into(_ZEROS[:piece], view[at:])
        else:
            cipher.update_into(_ZEROS[:piece], buffer)
            view[at : at + piece] = buffer[:piece]

    return words
