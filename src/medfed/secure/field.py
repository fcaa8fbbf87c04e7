"""Residues mod 2^64: fixed point in and out, and exact integer products by float64 matrix products.

numpy has no fast product of 64-bit integers. So words are cut into limbs small enough for every
partial sum of a float64 product to stay below 2^53, where floats are exact; the parts are put
together mod 2^64.

n, p rows, m the inner dimension, J projections. uint64 arrays wrap, which is the arithmetic mod
2^64.
"""

import numpy as np
from numpy.typing import NDArray

from medfed.core.checks import PlanError
from medfed.core.entropy import Entropy, Integers, Words

HEADROOM = 8
"""Standard deviations of noise that must fit below 2^63: with 4, about 13 of 200,000 numbers a
round would wrap.
"""

LIMB = 22
"""Bits of a limb of a word: 2^22 2^22 512 = 2^53."""

DIGITS = 3
"""Limbs of a word."""

_FROM_2_52 = np.uint64(0x4330000000000000)
_BLOCK = 512
_PAIRS = [(i, j) for i in range(3) for j in range(3 - i)]  # whose shift is below 64 bits


def encode(
    x: NDArray[np.floating], bits: int, bound: float, entropy: Entropy | None = None
) -> Integers:
    """Return x in whole steps of 2^-bits (int64), to nearest; with `entropy` rounded up or down at
    random, unbiased.

    Random rounding is unconditional: floor(x 2^bits + u), u uniform. Either way a number moves by
    less than a step, so a patient who moves a sum of d numbers by c moves its steps by at most c
    2^bits + sqrt(d). Raises PlanError, which quotes no number, where one is not finite or above
    `bound` in size.
    """
    scaled = np.asarray(x, np.float64)
    if not (np.abs(scaled) <= bound).all():  # NaN is not either
        raise PlanError(
            f"a row has a number that is not finite or above security.bound={bound:g}; raise the "
            "bound"
        )

    scaled = scaled * 2.0**bits
    if entropy is None:
        rounded = np.rint(scaled)
    else:
        rounded = np.floor(scaled + entropy.uniform(scaled.size).reshape(scaled.shape))

    return rounded.astype(np.int64)


def decode(steps: Integers, bits: int) -> NDArray[np.float64]:
    """Return steps of 2^-bits as numbers."""
    return steps.astype(np.float64) * 2.0**-bits


def check_headroom(terms: int, bound: float, bits: int, sigma: float = 0.0) -> None:
    """Raise PlanError unless `terms` numbers of size `bound`, and 8 standard deviations of noise,
    sum below 2^63.
    """
    if terms * (bound * 2.0**bits + 1) + HEADROOM * sigma >= 2.0**63:
        raise PlanError(
            f"security.bound={bound:g} and security.fraction_bits={bits} do not compose with "
            f"weights that sum to {terms:,} and noise of {sigma:g} steps: the sum could wrap at "
            "2^63. Lower the bound or the bits."
        )


def matmul(a_nm: Words, b_mp: Words) -> Words:
    """Return the product [n, p] mod 2^64, exact."""
    total = np.zeros((a_nm.shape[0], b_mp.shape[1]), np.uint64)
    for start in range(0, a_nm.shape[1], _BLOCK):
        left = digits(a_nm[:, start : start + _BLOCK])
        right = digits(b_mp[start : start + _BLOCK])
        for i, j in _PAIRS:
            total += (left[i] @ right[j]).astype(np.uint64) << np.uint64(LIMB * (i + j))
    return total


def digits(words: Words) -> NDArray[np.float64]:
    """Return the three digits [3, ...] of words, of 22, 22 and 20 bits, the least first."""
    mask = np.uint64((1 << LIMB) - 1)
    found = np.empty((DIGITS, *words.shape))
    part = np.empty_like(words)
    for j in range(DIGITS):
        np.right_shift(words, np.uint64(LIMB * j), out=part)
        part &= mask
        # a number below 2^52 as the last bits of a float from 2^52 on: processors convert slower
        part |= _FROM_2_52
        np.subtract(part.view(np.float64), 2.0**52, out=found[j])
    return found


def project(ternary_Jm: NDArray[np.float64], digits_3nm: NDArray[np.float64]) -> Words:
    """Return x R^T [n, J] mod 2^64, exact, for the `digits` of x and R of -1, 0, 1 (float64) of at
    most 2^20 columns.
    """
    n = digits_3nm.shape[1]
    parts = digits_3nm.reshape(DIGITS * n, -1) @ ternary_Jm.T
    low, middle, high = parts.astype(np.int64).view(np.uint64).reshape(DIGITS, n, -1)
    total: Words = low + (middle << np.uint64(LIMB)) + (high << np.uint64(2 * LIMB))
    return total
