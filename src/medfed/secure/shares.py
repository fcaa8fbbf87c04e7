"""Shamir's secret sharing (1979):
of the parts of a secret any `threshold` rebuild it, and fewer say nothing.

The secret is the value at 0 of a random polynomial of degree threshold - 1 over the integers mod
PRIME; a share is its value at another point. PRIME is the least prime above 2^256, so that every 32
bytes are a secret.
"""

import secrets
from collections.abc import Mapping, Sequence

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
    coefficients = [secrets.randbelow(PRIME) for _ in range(threshold - 1)] + [
        int.from_bytes(secret)
    ]
    return [_value(coefficients, point).to_bytes(SIZE) for point in points]


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
    total = 0
    for point in used:
        over = 1
        under = 1
        for other in used:
            if other != point:
                over = over * other % PRIME
                under = under * (other - point) % PRIME
        # Lagrange's polynomial of this point, at 0
        total += _number(shares[point]) * over * pow(under, -1, PRIME)
    if (secret := total % PRIME) >= 2**256:
        raise CodecError(
            "shares that make no secret of 32 bytes; at least one is wrong. Ask other parties."
        )
    return secret.to_bytes(32)


def _value(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in coefficients:  # Horner, highest power first
        value = (value * point + coefficient) % PRIME
    return value


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
