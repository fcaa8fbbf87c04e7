"""What leaves a client: row by row, and back in the opposite order at the server."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from medfed.links.wire import (
    PLAIN,
    Float32,
    Grid,
    Link,
    Remembered,
    combine,
    finite,
    into_ball,
    send,
)
from medfed.privacy.guarantee import GRID

SHAPES = st.tuples(st.integers(1, 6), st.integers(0, 9), st.integers(0, 99))


def _rows(shape: tuple[int, int, int], dtype: torch.dtype = torch.float64) -> Tensor:
    K, M, seed = shape
    return torch.randn(K, M, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def _shares(K: int) -> Tensor:
    weight_K = torch.arange(1.0, K + 1, dtype=torch.float64)
    return weight_K / weight_K.sum()


@dataclass(frozen=True)
class Plus(Link):
    """A link for tests: adds at the client, takes away at the server; tells when it is asked."""

    number: float
    told: list[str]

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        self.told.append(f"client +{self.number:g}")
        return message_KM + self.number, memory

    def server(self, mean_M: Tensor, round: int) -> Tensor:
        self.told.append(f"server -{self.number:g}, round {round}")
        return mean_M - self.number


@dataclass(frozen=True)
class Times(Link):
    """A link for tests that does not commute with Plus."""

    number: float
    told: list[str]

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        self.told.append(f"client x{self.number:g}")
        return message_KM * self.number, memory

    def server(self, mean_M: Tensor, round: int) -> Tensor:
        self.told.append(f"server /{self.number:g}, round {round}")
        return mean_M / self.number


class Centred(Link):
    """A planted offender: each row depends on the others."""

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        return message_KM - message_KM.mean(0), memory


def _is_row_wise(links: tuple[Link, ...], message_KM: Tensor) -> bool:
    together = send(message_KM, links)
    return torch.equal(together, torch.cat([send(row[None], links) for row in message_KM]))


@given(SHAPES)
def test_a_stack_is_sent_like_its_clients_one_by_one(shape: tuple[int, int, int]) -> None:
    assert _is_row_wise(PLAIN, _rows(shape))
    assert _is_row_wise((Plus(3, []), Float32(), Times(0.1, [])), _rows(shape))
    assert _is_row_wise((Grid(),), _rows(shape))


def test_a_link_that_mixes_rows_is_caught() -> None:
    assert not _is_row_wise((Centred(),), _rows((3, 5, 0)))


def test_rows_travel_as_float32_whatever_they_were() -> None:
    row = torch.tensor([[1 + 2**-40, 1e-50, float("nan")]], dtype=torch.float64)
    sent = send(row, PLAIN)
    assert sent.dtype == torch.float32
    assert sent[0, :2].tolist() == [1, 0]
    assert sent[0, 2].isnan()  # nothing is hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_row_is_finite_when_all_its_numbers_are(dtype: torch.dtype) -> None:
    high = torch.finfo(dtype).max
    row_KM = torch.zeros(6, 40, dtype=dtype)
    row_KM[1] = high  # their sum would not be finite
    row_KM[2, 7], row_KM[3, 0], row_KM[4, -1] = float("nan"), float("inf"), -float("inf")
    row_KM[5, :2] = torch.tensor([float("inf"), -float("inf")])
    assert finite(row_KM).tolist() == [True, True, False, False, False, False]
    assert finite(row_KM[:, :0]).tolist() == [True] * 6


def test_sending_leaves_the_message_as_it_was() -> None:
    message_KM = _rows((3, 4, 0))
    before = message_KM.clone()
    send(message_KM, PLAIN)
    combine(message_KM, _shares(3), PLAIN)
    assert torch.equal(message_KM, before)


@given(SHAPES)
def test_the_combined_row_is_numpys_weighted_mean(shape: tuple[int, int, int]) -> None:
    row_KM = _rows(shape)
    weight_K = _shares(shape[0])
    if shape[1] == 0:
        assert combine(row_KM, weight_K, PLAIN).shape == (0,)
        return
    expected = np.average(row_KM.numpy(), axis=0, weights=np.arange(1, shape[0] + 1))
    np.testing.assert_allclose(
        combine(row_KM, weight_K, ()).numpy(), expected, rtol=1e-12, atol=1e-12
    )
    single = combine(send(row_KM, PLAIN), weight_K, PLAIN)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_one_client_is_its_own_mean() -> None:
    row = _rows((1, 6, 3), torch.float32)
    assert torch.equal(combine(row, torch.ones(1, dtype=torch.float64), PLAIN), row[0])


@given(SHAPES, st.integers(0, 99))
def test_the_order_of_clients_does_not_matter(shape: tuple[int, int, int], seed: int) -> None:
    row_KM = _rows(shape)
    weight_K = _shares(shape[0])
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    one = combine(row_KM, weight_K, ())
    two = combine(row_KM[order], weight_K[order], ())
    assert torch.allclose(one, two, rtol=1e-12, atol=1e-12)


def test_links_run_first_to_last_at_the_client_and_last_to_first_at_the_server() -> None:
    told: list[str] = []
    links = (Plus(3, told), Times(8, told), Plus(1, told))
    row_KM = torch.tensor([[1.0, 2.0], [5.0, 10.0]])
    sent = send(row_KM, links)
    assert sent.tolist() == [[33, 41], [65, 105]]
    assert told == ["client +3", "client x8", "client +1"]
    told.clear()
    mean_M = combine(sent, torch.tensor([0.75, 0.25]), links, 9)
    assert told == ["server -1, round 9", "server /8, round 9", "server -3, round 9"]
    assert mean_M.tolist() == [2, 4]  # the mean of what went in: the links are undone


@given(SHAPES)
def test_rows_on_the_grid_sum_exactly_and_come_back_within_half_a_step_each(
    shape: tuple[int, int, int],
) -> None:
    row_KM = _rows(shape)
    sent = send(row_KM, (Grid(),))
    assert sent.dtype == torch.int64
    total_M = combine(sent, None, (Grid(),))
    assert torch.equal(total_M, combine(sent.flip(0), None, (Grid(),)))
    assert bool(((total_M - row_KM.sum(0)).abs() <= shape[0] * GRID / 2 + 1e-12).all())


# the ball -----------------------------------------------------------------------------------------


@given(
    st.integers(1, 60),
    st.floats(-1, 1),
    st.floats(0.2, 5),
    st.sampled_from([1.0, 20.0, 1e6]),
    st.integers(0, 10**6),
)
def test_a_projection_never_moves_two_rows_apart(
    M: int, lean: float, far: float, radius: float, seed: int
) -> None:
    """Also where one lies within and the other without, where they are nearly alike, and with the
    errors of floats.
    """
    draw = torch.Generator().manual_seed(seed)
    one = torch.randn(M, generator=draw, dtype=torch.float64)
    one *= far * radius / one.norm()
    step = torch.randn(M, generator=draw, dtype=torch.float64) + lean * one / one.norm() * M**0.5
    pair_2M = torch.stack([one, one + step / step.norm()])
    held_2M = into_ball(pair_2M, [radius, radius])
    assert (
        float((held_2M[1] - held_2M[0]).norm())
        <= float((pair_2M[1] - pair_2M[0]).norm()) + radius * 2.0**-46
    )
    assert all(float(row.norm()) <= radius * (1 + 2.0**-47) for row in held_2M)


def test_rows_within_their_ball_stay_bit_for_bit_and_others_keep_their_direction() -> None:
    row_KM = _rows((4, 9, 1))
    norm_K = row_KM.norm(dim=1)
    assert into_ball(row_KM, (norm_K * 1.001).tolist()) is row_KM
    held_KM = into_ball(row_KM, [1e9, float(norm_K[1]) / 2, 1e9, float(norm_K[3]) / 10])
    assert torch.equal(held_KM[[0, 2]], row_KM[[0, 2]])
    torch.testing.assert_close(held_KM[1], row_KM[1] / 2)
    torch.testing.assert_close(held_KM[3], row_KM[3] / 10)
    assert not into_ball(torch.zeros(2, 3), [0.0, 0.0]).any()
