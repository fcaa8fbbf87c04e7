"""Named randomness: bits that no neighbour moves, and statistics that would notice a bias."""

import hashlib
from itertools import permutations, product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from medfed.core import streams
from medfed.core.streams import Streams, patient_fraction

KEYS = st.integers(-(2**63), 2**63 - 1)
KEY_LISTS = st.lists(KEYS, min_size=1, max_size=6)
ALPHA = 1e-3  # the draws are fixed by the seed, so a test that passes always passes


def _int64(keys: list[int]) -> Tensor:
    return torch.tensor(keys, dtype=torch.int64)


def _keys(count: int, name: str = "statistics") -> Tensor:
    return _int64([Streams(7).key(name, i) for i in range(count)])


def _splitmix64(key: int, count: int) -> list[int]:
    """SplitMix64 as published, in Python's integers."""
    mask = (1 << 64) - 1
    words = []
    for _ in range(count):
        key = (key + 0x9E3779B97F4A7C15) & mask
        z = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        words.append(z ^ (z >> 31))
    return words


# Keys


def test_keys_of_different_purposes_rounds_clients_and_seeds_all_differ() -> None:
    purposes = list(
        product(range(3), ["batches", "selection", "noise"], range(20), ["a", "b", "ab", "1", "11"])
    )
    assert len({Streams(seed).key(*rest) for seed, *rest in purposes}) == len(purposes)


def test_key_knows_where_one_part_of_the_context_ends() -> None:
    assert Streams(1).key("x", "ab", "c") != Streams(1).key("x", "a", "bc")
    assert Streams(1).key("x", 1, 23) != Streams(1).key("x", 12, 3)
    assert Streams(1).key("2x") != Streams(12).key("x")


def test_key_is_pinned_for_good() -> None:
    """A changed key would change every run ever made."""
    digest = hashlib.blake2b(b'[42, "batches", "3", "site a"]', digest_size=8).digest()
    assert Streams(42).key("batches", 3, "site a") == int.from_bytes(digest, "little", signed=True)


@given(st.lists(st.text(max_size=8), min_size=1, max_size=6, unique=True), st.integers(0, 99))
def test_cohorts_keys_are_the_clients_own(clients: list[str], round: int) -> None:
    together = Streams(3).key_K("batches", round, clients)
    alone = [Streams(3).key_K("batches", round, [client])[0] for client in clients]
    assert together.dtype == torch.int64
    assert torch.equal(together, torch.stack(alone))
    assert together.tolist() == [Streams(3).key("batches", round, client) for client in clients]


def test_another_stream_never_moves_this_one() -> None:
    quiet = Streams(5).generator("selection", 2).random(8)
    busy = Streams(5)
    busy.generator("noise", 2).random(1000)
    busy.key_K("batches", 2, ["a", "b"])
    assert np.array_equal(busy.generator("selection", 2).random(8), quiet)


def test_no_stream_touches_a_global_generator() -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    streams.uniform(_keys(3), 5)
    streams.shuffles(_keys(3), torch.tensor([1, 2, 3]))
    Streams(0).generator("selection").random()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # type: ignore[index]


def test_generators_of_two_purposes_are_uncorrelated() -> None:
    one = Streams(5).generator("selection", 1).random(20_000)
    two = Streams(5).generator("noise", 1).random(20_000)
    assert stats.pearsonr(one, two).pvalue > ALPHA
    assert stats.pearsonr(one, 0.05 * one + two).pvalue < ALPHA


# Words: a counter generator


def test_words_are_the_published_vector_of_splitmix64() -> None:
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [
        word % (1 << 64) for word in streams.words(_int64([1234567]), 4)[0].tolist()
    ] == expected


@given(KEYS, st.integers(0, 40))
def test_words_are_splitmix64_for_every_key(key: int, count: int) -> None:
    assert [
        word % (1 << 64) for word in streams.words(_int64([key]), count)[0].tolist()
    ] == _splitmix64(key, count)


@given(KEY_LISTS, st.integers(0, 30), st.integers(0, 30))
def test_a_word_is_a_function_of_key_and_number(keys: list[int], before: int, count: int) -> None:
    key_K = _int64(keys)
    whole = streams.words(key_K, before + count)
    assert torch.equal(whole[:, before:], streams.words(key_K, count, start=before))
    assert torch.equal(whole[:, :before], streams.words(key_K, before))


@given(KEY_LISTS, st.integers(1, 20))
def test_a_client_alone_draws_the_bits_that_it_draws_in_a_stack(
    keys: list[int], count: int
) -> None:
    key_K = _int64(keys)
    for k in range(len(keys)):
        alone = key_K[k : k + 1]
        assert torch.equal(streams.words(key_K, count)[k], streams.words(alone, count)[0])
        assert torch.equal(streams.uniform(key_K, count)[k], streams.uniform(alone, count)[0])
        assert torch.equal(streams.subkey(key_K, count)[k], streams.subkey(alone, count)[0])


@given(KEYS, st.integers(1, 20))
def test_a_single_key_without_a_client_axis_draws_the_same(key: int, count: int) -> None:
    assert torch.equal(
        streams.uniform(torch.tensor(key), count), streams.uniform(_int64([key]), count)[0]
    )
    assert torch.equal(
        streams.subkey(torch.tensor(key), count), streams.subkey(_int64([key]), count)[0]
    )


def test_subkeys_drawn_together_are_the_ones_drawn_alone() -> None:
    key_K = _keys(7)
    together = streams.subkeys(key_K, 9)
    for number in range(9):
        assert torch.equal(together[:, number], streams.subkey(key_K, number))


def test_subkeys_of_many_keys_and_numbers_all_differ() -> None:
    # also neighbours; 0 is where the finaliser stays
    key_K = torch.cat([_keys(50), torch.arange(1, 50)])
    branches = torch.stack([streams.subkey(key_K, number) for number in range(100)])
    assert len(branches.unique()) == branches.numel()
    assert not torch.isin(branches, streams.words(key_K, 200)).any()


# Uniform numbers: accepted, and planted faults rejected


def _looks_uniform(u: np.ndarray) -> bool:
    return bool(stats.kstest(u, "uniform").pvalue > ALPHA)


def _looks_independent(one: np.ndarray, two: np.ndarray) -> bool:
    """Chi-square on 16 x 16 cells."""
    cell = np.floor(one * 16).astype(int) * 16 + np.floor(two * 16).astype(int)
    return bool(stats.chisquare(np.bincount(cell, minlength=256)).pvalue > ALPHA)


def _draws() -> np.ndarray:
    return streams.uniform(_keys(40), 5000).double().numpy()


def test_uniform_numbers_are_uniform_in_every_direction() -> None:
    u = _draws()
    assert _looks_uniform(u.ravel())
    assert _looks_independent(u[:, :-1].ravel(), u[:, 1:].ravel())  # neighbours in a stream
    assert _looks_independent(u[:-1].ravel(), u[1:].ravel())  # neighbouring clients


def test_uniformity_test_has_power() -> None:
    u = _draws()
    assert not _looks_uniform(u.ravel() ** 1.02)
    assert not _looks_uniform(u.ravel() * 0.99)
    # one in twenty repeats its neighbour
    repeated = np.where(np.arange(4999) % 20 == 0, u[:, :-1], u[:, 1:])
    assert not _looks_independent(u[:, :-1].ravel(), repeated.ravel())


def test_keys_that_are_neighbours_give_independent_numbers() -> None:
    """A counter generator could hide one stream shifted in another."""
    u = streams.uniform(torch.arange(2000), 100).double().numpy()
    assert _looks_uniform(u.ravel())
    assert _looks_independent(u[:-1].ravel(), u[1:].ravel())
    assert _looks_independent(u[:-1, 1:].ravel(), u[1:, :-1].ravel())


def test_neighbouring_subkeys_give_independent_numbers() -> None:
    u = (
        torch.stack([streams.uniform(streams.subkey(_keys(20), n), 100) for n in range(100)])
        .double()
        .numpy()
    )
    assert _looks_independent(u[:-1].ravel(), u[1:].ravel())
    assert _looks_independent(u[:, :-1].ravel(), u[:, 1:].ravel())


def test_every_bit_of_a_word_is_fair() -> None:
    words = streams.words(_keys(40), 5000).numpy().view(np.uint64).ravel()
    for bit in range(64):
        ones = int(((words >> np.uint64(bit)) & np.uint64(1)).sum())
        assert stats.binomtest(ones, len(words)).pvalue > ALPHA / 64


def test_uniform_numbers_lie_on_the_grid_of_0_to_1() -> None:
    u = streams.uniform(_keys(20), 5000)
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert torch.equal(u * 2**24, (u * 2**24).round())


# Shuffles


@given(st.lists(st.tuples(KEYS, st.integers(0, 40)), min_size=1, max_size=6))
def test_a_shuffle_is_a_permutation_for_each_size(clients: list[tuple[int, int]]) -> None:
    keys, sizes = zip(*clients, strict=True)
    order = streams.shuffles(_int64(list(keys)), _int64(list(sizes)))
    assert order.shape == (len(keys), max(sizes))
    for row, size in zip(order, sizes, strict=True):
        assert sorted(row[:size].tolist()) == list(range(size))


@given(st.lists(st.tuples(KEYS, st.integers(1, 40)), min_size=1, max_size=6))
def test_a_shuffle_does_not_depend_on_the_other_clients(clients: list[tuple[int, int]]) -> None:
    keys, sizes = zip(*clients, strict=True)
    key_K = _int64(list(keys))
    size_K = _int64(list(sizes))
    together = streams.shuffles(key_K, size_K)
    for k, size in enumerate(sizes):
        alone = streams.shuffles(key_K[k : k + 1], size_K[k : k + 1])
        assert torch.equal(together[k, :size], alone[0])


def _orders_are_fair(order_KS: np.ndarray) -> bool:
    """Chi-square over all orders of S things."""
    number = {order: i for i, order in enumerate(permutations(range(order_KS.shape[1])))}
    counts = np.bincount([number[tuple(row)] for row in order_KS.tolist()], minlength=len(number))
    return bool(stats.chisquare(counts).pvalue > ALPHA)


def test_every_order_of_five_is_as_likely_and_a_naive_shuffle_is_caught() -> None:
    K = 30_000
    assert _orders_are_fair(streams.shuffles(_keys(K), torch.full((K,), 5)).numpy())
    draw = np.random.default_rng(0)
    naive = np.tile(np.arange(5), (K, 1))
    for i in range(5):  # swap with any place instead of a later one: the classic mistake
        j = draw.integers(0, 5, K)
        naive[np.arange(K), i], naive[np.arange(K), j] = (
            naive[np.arange(K), j],
            naive[np.arange(K), i],
        )
    assert not _orders_are_fair(naive)


def test_a_row_is_at_every_place_as_often_in_a_stack_of_unequal_sizes() -> None:
    """The filler of short clients must not push their rows anywhere."""
    K = 20_000
    size_K = torch.where(torch.arange(K) % 2 == 0, 7, 50)
    order = streams.shuffles(_keys(K), size_K)[::2, :7].numpy()
    for row in range(7):
        places = np.argwhere(order == row)[:, 1]
        assert stats.chisquare(np.bincount(places, minlength=7)).pvalue > ALPHA / 7


def test_orders_of_two_epochs_are_independent() -> None:
    K = 30_000
    first, second = (
        streams.shuffles(streams.subkey(_keys(K), e), torch.full((K,), 4)).numpy() for e in range(2)
    )
    cells = np.bincount(first[:, 0] * 4 + second[:, 0], minlength=16)
    assert stats.chisquare(cells).pvalue > ALPHA
    assert stats.chisquare(np.bincount(first[:, 0] * 4 + first[:, 0], minlength=16)).pvalue < ALPHA


# Patients


@given(KEYS, st.text(max_size=20))
def test_a_patients_fraction_is_a_function_of_key_and_patient(key: int, patient: str) -> None:
    fraction = patient_fraction(key, patient)
    assert 0 <= fraction < 1
    assert patient_fraction(key, patient) == fraction


def test_a_patients_fraction_is_below_one_for_the_highest_hash(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Highest:
        def digest(self) -> bytes:
            return b"\xff" * 8

    monkeypatch.setattr(hashlib, "blake2b", lambda *_, **__: Highest())
    assert 0.999 < patient_fraction(0, "anybody") < 1


def test_other_patients_do_not_move_a_patient() -> None:
    few = {p: patient_fraction(9, p) for p in ["p3", "p1"]}
    many = {p: patient_fraction(9, p) for p in [f"p{i}" for i in range(100)]}
    assert few == {p: many[p] for p in few}


def test_patients_are_spread_uniformly_and_independently_between_keys() -> None:
    one = np.array([patient_fraction(1, f"p{i}") for i in range(20_000)])
    two = np.array([patient_fraction(2, f"p{i}") for i in range(20_000)])
    assert _looks_uniform(one)
    assert _looks_independent(one[:-1], one[1:])
    assert _looks_independent(one, two)
    assert not _looks_uniform(one**1.05)
    assert not _looks_independent(one, np.where(np.arange(20_000) % 10 == 0, one, two))
