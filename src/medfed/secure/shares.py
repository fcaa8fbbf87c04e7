"""Shamir's secret sharing (1979):
of the parts of a secret any `threshold` rebuild it, and fewer say nothing.

The secret is the value at 0 of a random polynomial of degree threshold - 1 over the integers mod
PRIME; a share is its value at another point. PRIME is the least prime above 2^256, so that every 32
bytes are a secret.
"""

import math
import operator
import secrets
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from medfed.core.checks import CodecError, PlanError, QuorumError

PRIME = 2**256 + 297
"""The field's modulus."""

SIZE = 33
"""Bytes of a share: a number below PRIME, big-endian."""


def split(secret: bytes, threshold: int, points: Sequence[int]) -> list[bytes]:
    """Return one share of the secret (32 bytes) for each point; any `threshold` of them rebuild it.

    Fewer shares are uniform and independent of the secret. Points are distinct, from 1 to PRIME -
    1: the point 0 is the secret itself. The coefficients come from the operating system. Raises
    PlanError.
    """
    return split_all([secret], threshold, points)[0]


def split_all(every: Sequence[bytes], threshold: int, points: Sequence[int]) -> list[list[bytes]]:
    """Return what `split` does of each secret, with a polynomial of its own, at the same points."""
    for secret in every:
        if len(secret) != 32:
            raise PlanError(
                f"a secret of {len(secret)} bytes; expected 32. Share a key, and encrypt the rest "
                "under it."
            )
    if not 1 <= threshold <= len(points):
        raise PlanError(
            f"threshold={threshold} of {len(points)} shares; expected 1 to {len(points)}. Lower it."
        )

    _check_points(points, PlanError)
    powers = _powers(tuple(points), threshold)
    found: list[list[bytes]] = []
    for secret in every:
        drawn = [secrets.randbelow(PRIME) for _ in range(threshold - 1)]
        polynomial = [int.from_bytes(secret), *drawn]
        found.append([_combine(polynomial, x).to_bytes(SIZE) for x in powers])
    return found


def rebuild(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """Return the secret (32 bytes) from shares by point;
    of more than `threshold`, the first ones are used.

    A share that was altered gives another secret, mostly unnoticed: compare with a commitment.
    Raises QuorumError where there are too few; CodecError where a point or a share cannot be one,
    or the shares make no secret.
    """
    if len(shares) < threshold:
        raise QuorumError(
            f"{len(shares)} shares of a secret; expected {threshold} or more. Wait for more "
            "parties."
        )
    used = sorted(shares)[:threshold]
    _check_points(used, CodecError)
    numbers = [_number(shares[point]) for point in used]
    if (secret := _combine(numbers, _weigh(tuple(used)))) >= 2**256:
        raise CodecError(
            "shares that make no secret of 32 bytes; at least one is wrong. Ask other parties."
        )
    return secret.to_bytes(32)


@lru_cache(maxsize=4)  # a cohort's points are the same from round to round
def _powers(points: tuple[int, ...], threshold: int) -> list[list[int]]:
    """Return of each point x the powers 1, x, x^2 ... below `threshold`."""
    found: list[list[int]] = []
    for point in points:
        powers = [1]
        for _ in range(threshold - 1):
            powers.append(powers[-1] * point % PRIME)
        found.append(powers)
    return found


def _combine(numbers: Sequence[int], factors: Sequence[int]) -> int:
    """Return the sum of products, mod PRIME: a polynomial's value from its point's powers, or a
    secret from shares and their weights.
    """
    total: int = sum(map(operator.mul, numbers, factors))
    return total % PRIME


@lru_cache(maxsize=4)  # members of a complete graph have the same holders
def _weigh(points: tuple[int, ...]) -> list[int]:
    """Return the weights of shares at these points: Lagrange's polynomials at 0.

    Of point i: the product of all others, over that of (other - i). One inversion serves them all.
    """
    whole = math.prod(points) % PRIME
    under = [point * rest % PRIME for point, rest in zip(points, _rests(points), strict=True)]

    # before[i]: the product of all before i; then backwards, with the inverse of all of them
    before = [1]
    for value in under:
        before.append(before[-1] * value % PRIME)
    inverse = pow(before[-1], -1, PRIME) * whole % PRIME

    weights = [0] * len(points)
    for at in reversed(range(len(points))):
        weights[at] = inverse * before[at] % PRIME
        inverse = inverse * under[at] % PRIME
    return weights


def _rests(points: tuple[int, ...]) -> list[int]:
    """Return for each point the product of (other - point)."""
    if max(points) >= 2**16:
        return [math.prod(x - point for x in points if x != point) for point in points]
    x = np.array(points, np.int64)
    apart = x[None] - x[:, None]
    np.fill_diagonal(apart, 1)
    three = np.pad(apart, ((0, 0), (0, -len(x) % 3)), constant_values=1).reshape(len(x), -1, 3)
    return [math.prod(row) for row in three.prod(2).tolist()]  # products of three below 2^48


def _number(share: bytes) -> int:
    if len(share) != SIZE or (number := int.from_bytes(share)) >= PRIME:
        raise CodecError(
            f"{len(share)} bytes that are no share; expected {SIZE}, below the prime. Ask its "
            "holder again."
        )
    return number


def _check_points(points: Sequence[int], error: type[PlanError] | type[CodecError]) -> None:
    if len(set(points)) != len(points) or not all(0 < point < PRIME for point in points):
        raise error(
            f"points={list(points)[:9]}; expected distinct ones from 1 to the prime. Number the "
            "parties from 1."
        )
