"""Clients' rows laid end to end: a ragged stack without padding.

K clients, N rows of all clients, F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One client's encoded records: x [n, F] float32, y [n], and which patient each record belongs to."""

    x: Tensor
    y: Tensor
    patient: Tensor  # int64 [n], 0 .. patients-1, numbered at the site

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Stack:
    """A cohort's rows: client k owns rows offset_K[k] .. offset_K[k] + size_K[k] - 1."""

    x_NF: Tensor
    y_N: Tensor
    offset_K: Tensor
    size_K: Tensor

    @classmethod
    def of(cls, clients: Sequence[Rows]) -> "Stack":
        """Lay the clients end to end; one client alone is not copied."""
        size_K = torch.tensor([len(rows) for rows in clients], dtype=torch.int64)
        if len(clients) == 1:
            return cls(clients[0].x, clients[0].y, torch.zeros(1, dtype=torch.int64), size_K)
        return cls(
            torch.cat([rows.x for rows in clients]),
            torch.cat([rows.y for rows in clients]),
            size_K.cumsum(0) - size_K,
            size_K,
        )

    def __len__(self) -> int:
        """Return K."""
        return len(self.size_K)
