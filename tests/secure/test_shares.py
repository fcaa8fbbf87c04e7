"""Shamir's laws: any t rebuild, t - 1 say nothing, what is no share is refused."""

import contextlib
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from medfed.core.checks import CodecError, PlanError, QuorumError
from medfed.secure.shares import PRIME, SIZE, rebuild, split


@settings(max_examples=60)
@given(st.binary(min_size=32, max_size=32), st.data())
def test_any_t_shares_rebuild(secret, data):
    points = data.draw(st.lists(st.integers(1, PRIME - 1), min_size=1, max_size=8, unique=True))
    threshold = data.draw(st.integers(1, len(points)))
    shares = dict(zip(points, split(secret, threshold, points), strict=True))
    some = data.draw(st.permutations(points))[:threshold]
    assert rebuild({point: shares[point] for point in some}, threshold) == secret
    assert rebuild(shares, threshold) == secret
    with pytest.raises(QuorumError, match="expected"):
        rebuild({point: shares[point] for point in some[1:]}, threshold)


def test_the_least_and_the_largest_secret_and_the_prime():
    for secret in (bytes(32), b"\xff" * 32):
        assert rebuild(dict(zip((1, 2, 3), split(secret, 2, (1, 2, 3)), strict=True)), 2) == secret
    assert all(pow(base, PRIME - 1, PRIME) == 1 for base in (2, 3, 5, 7, 11))


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32])
def test_fewer_than_t_shares_are_uniform_whatever_the_secret(secret):
    draws = [split(secret, 3, (1, 2, 3)) for _ in range(8000)]
    for share in (0, 1):
        assert chisquare(np.bincount([d[share][1] for d in draws], minlength=256)).pvalue > 1e-6
    joint = [(d[0][1] >> 4) * 16 + (d[1][1] >> 4) for d in draws]
    assert chisquare(np.bincount(joint, minlength=256)).pvalue > 1e-6
    leaky = [split(secret, 1, (1,))[0][1] for _ in range(8000)]  # power: threshold 1 hides nothing
    assert chisquare(np.bincount(leaky, minlength=256)).pvalue < 1e-9


@pytest.mark.parametrize("points", [(0, 1, 2), (1, 1, 2), (1, 2, PRIME), (1, -2, 3)])
def test_points_that_are_none_are_refused(points):
    with pytest.raises(PlanError, match="points"):
        split(bytes(32), 2, points)


@pytest.mark.parametrize("threshold", [0, 4])
def test_a_threshold_out_of_range_or_a_secret_of_another_length_is_refused(threshold):
    with pytest.raises(PlanError, match="threshold"):
        split(bytes(32), threshold, (1, 2, 3))
    with pytest.raises(PlanError, match="32"):
        split(bytes(31), 2, (1, 2, 3))


@settings(max_examples=100)
@given(st.dictionaries(st.integers(-2, 9), st.binary(max_size=40), min_size=2, max_size=4))
def test_garbage_is_refused_or_gives_some_secret(shares):
    with contextlib.suppress(CodecError):
        assert len(rebuild(shares, 2)) == 32


def test_a_wrong_share_or_point_gives_another_secret():
    secret = os.urandom(32)
    one, two = split(secret, 2, (1, 2))
    for wrong in ({1: one, 3: two}, {1: two, 2: one}, {1: one, 2: two[:-1] + bytes([two[-1] ^ 1])}):
        with contextlib.suppress(CodecError):
            assert rebuild(wrong, 2) != secret
    for share in (b"", bytes(SIZE - 1), b"\xff" * SIZE):
        with pytest.raises(CodecError, match="share"):
            rebuild({1: one, 2: share}, 2)
