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

_LIMB = 22  # bits; 2^22 2^22 512 = 2^53
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
        left = _limbs(a_nm[:, start : start + _BLOCK])
        right = _limbs(b_mp[start : start + _BLOCK])
        for i, j in _PAIRS:
            total += (left[i] @ right[j]).astype(np.uint64) << np.uint64(_LIMB * (i + j))
    return total


def _limbs(x: Words) -> list[NDArray[np.float64]]:
    mask = np.uint64((1 << _LIMB) - 1)
    return [((x >> np.uint64(_LIMB * i)) & mask).astype(np.float64) for i in range(3)]


def project(ternary_Jm: NDArray[np.float64], x_nm: Words) -> Words:
    """Return x R^T [n, J] mod 2^64, exact, for R of -1, 0, 1 (float64) of at most 2^20 columns."""
    low = (x_nm & np.uint64(0xFFFFFFFF)).astype(np.float64) @ ternary_Jm.T
    high = (x_nm >> np.uint64(32)).astype(np.float64) @ ternary_Jm.T
    return low.astype(np.int64).view(np.uint64) + (
        high.astype(np.int64).view(np.uint64) << np.uint64(32)
    )
