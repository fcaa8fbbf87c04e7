"""A stack holds each client's rows, unchanged and in order."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from medfed.data.federated import Rows, Stack


def _rows(n: int, start: int) -> Rows:
    x = torch.arange(start, start + 3 * n, dtype=torch.float32).reshape(n, 3)
    return Rows(x, x[:, 0] % 2, torch.arange(n))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_every_client_finds_its_own_rows(sizes: list[int]) -> None:
    clients = [_rows(n, 100 * k) for k, n in enumerate(sizes)]
    stack = Stack.of(clients)
    assert len(stack) == len(clients)
    assert stack.size_K.tolist() == sizes == [len(rows) for rows in clients]
    for k, rows in enumerate(clients):
        own = slice(int(stack.offset_K[k]), int(stack.offset_K[k] + stack.size_K[k]))
        assert torch.equal(stack.x_NF[own], rows.x)
        assert torch.equal(stack.y_N[own], rows.y)


def test_one_client_is_not_copied() -> None:
    rows = _rows(4, 0)
    assert Stack.of([rows]).x_NF.data_ptr() == rows.x.data_ptr()
