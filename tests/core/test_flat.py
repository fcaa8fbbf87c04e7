"""Parameters as one vector: every number has one place, and stacks cut like single vectors."""

import pytest
import torch
from torch import Tensor, nn

from medfed.core.flat import Layout, fill, select_trained, vector


class Odd(nn.Module):
    """A scalar, an empty and a nested parameter, and one that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.inner = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
        self.frozen = nn.Parameter(torch.full((4,), 9.0), requires_grad=False)


@pytest.fixture
def odd() -> Odd:
    return Odd()


def test_layout_counts_and_orders_trained_parameters(odd: Odd) -> None:
    layout = Layout.of(odd)
    names = ["scalar", "empty", "inner.0.weight", "inner.0.bias", "inner.1.weight", "inner.1.bias"]
    assert list(layout.shapes) == list(select_trained(odd)) == names
    assert layout.size == 1 + 0 + 6 + 2 + 2 + 2 == len(vector(odd))


def test_filling_with_its_own_vector_changes_nothing(odd: Odd) -> None:
    before = {name: p.detach().clone() for name, p in odd.named_parameters()}
    fill(odd, vector(odd))
    assert all(torch.equal(p, before[name]) for name, p in odd.named_parameters())


def test_vector_of_a_filled_module_is_what_filled_it(odd: Odd) -> None:
    theta_P = torch.arange(13.0)
    assert fill(odd, theta_P) is odd
    assert torch.equal(vector(odd), theta_P)
    assert odd.inner[0].weight.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert odd.frozen.tolist() == [9.0] * 4


def test_vector_is_a_copy(odd: Odd) -> None:
    before = vector(odd)
    vector(odd).add_(1)
    assert torch.equal(vector(odd), before)


def test_vector_of_a_single_parameter_is_a_copy() -> None:
    model = nn.Linear(3, 1, bias=False)
    before = vector(model)
    vector(model).add_(1)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("stack", [(), (1,), (4,), (2, 3)])
def test_pieces_of_a_stack_are_the_stacks_of_pieces(odd: Odd, stack: tuple[int, ...]) -> None:
    layout = Layout.of(odd)
    theta = torch.randn(*stack, layout.size)
    rows = theta.reshape(-1, layout.size)
    for name, piece in layout.pieces(theta):
        assert piece.shape == (*stack, *layout.shapes[name])
        alone: list[Tensor] = [dict(layout.pieces(row))[name] for row in rows]
        assert torch.equal(piece.reshape(len(rows), *layout.shapes[name]), torch.stack(alone))


def test_a_shared_parameter_has_one_place() -> None:
    layer = nn.Linear(3, 3)
    assert Layout.of(nn.Sequential(layer, nn.ReLU(), layer)).size == 12
