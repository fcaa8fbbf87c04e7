"""Clients' rows laid end to end: a ragged stack without padding.

K clients, N rows of all clients, F features, I patients of all clients.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """One client's encoded records: x [n, F] float32, y [n], and each record's patient."""

    x: Tensor
    y: Tensor
    patient: Tensor  # int64 [n], 0 .. patients-1, numbered at the site
    # int64 [n], the stream of each record's patient: a function of who it is alone
    key: Tensor | None = None

    def __len__(self) -> int:
        return len(self.y)

    def at(self, rows: Tensor) -> "Rows":
        """Return the rows marked in a mask, bool [n]."""
        key = None if self.key is None else self.key[rows]
        return Rows(self.x[rows], self.y[rows], self.patient[rows], key)


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


@dataclass(frozen=True)
class Patients:
    """A cohort's patients: client k owns patients offset_K[k] .. offset_K[k] + size_K[k] - 1.

    Patient i owns rows first_I[i] .. first_I[i] + count_I[i] - 1, and the stream key_I[i].
    """

    x_NF: Tensor
    y_N: Tensor
    first_I: Tensor
    count_I: Tensor
    key_I: Tensor
    offset_K: Tensor
    size_K: Tensor

    @classmethod
    def of(cls, clients: Sequence[Rows]) -> "Patients":
        """Sort each client's rows by patient and lay the clients end to end.

        Where nobody has a patient, there is one blank that nobody owns: slots without a patient
        need a row to repeat.
        """
        sorted_ = [_by_patient(rows) for rows in clients]
        if not any(len(rows) for rows in clients):
            return cls._empty(clients[0], len(clients))
        count_I = torch.cat([count for _, count in sorted_])
        size_K = torch.tensor([len(count) for _, count in sorted_], dtype=torch.int64)
        first_I = count_I.cumsum(0) - count_I
        key_N = torch.cat([rows.patient if rows.key is None else rows.key for rows, _ in sorted_])

        return cls(
            torch.cat([rows.x for rows, _ in sorted_]),
            torch.cat([rows.y for rows, _ in sorted_]),
            first_I,
            count_I,
            key_N[first_I],
            size_K.cumsum(0) - size_K,
            size_K,
        )

    @classmethod
    def _empty(cls, rows: Rows, clients: int) -> "Patients":
        blank = torch.zeros(1, dtype=torch.int64)
        none_K = torch.zeros(clients, dtype=torch.int64)
        x_NF = rows.x.new_zeros(1, *rows.x.shape[1:])
        y_N = rows.y.new_zeros(1)
        return cls(x_NF, y_N, blank, blank + 1, blank, none_K, none_K)

    @cached_property
    def records_K(self) -> Tensor:
        """The most records of one patient of each client [K]; 0 where it has none."""
        client_I = torch.repeat_interleave(torch.arange(len(self)), self.size_K)
        place_I = (
            torch.arange(len(client_I))
            + (self.offset_K - self.size_K.cumsum(0) + self.size_K)[client_I]
        )
        most_K = torch.zeros(len(self), dtype=torch.int64)
        return most_K.scatter_reduce_(0, client_I, self.count_I[place_I], "amax")

    @property
    def records(self) -> int:
        """R, the most records of one of their patients; 1 where there is none."""
        return max(1, int(self.records_K.max()))

    def of_clients(self, members: Tensor) -> "Patients":
        """Return the patients of some clients; rows are shared, not copied."""
        return Patients(
            self.x_NF,
            self.y_N,
            self.first_I,
            self.count_I,
            self.key_I,
            self.offset_K[members],
            self.size_K[members],
        )

    def __len__(self) -> int:
        """Return K."""
        return len(self.size_K)


def _by_patient(rows: Rows) -> tuple[Rows, Tensor]:
    """Return the rows with each patient's side by side, and how many each has."""
    if len(rows) == 0 or bool((rows.patient.diff() > 0).all()):
        return rows, torch.ones(len(rows), dtype=torch.int64)
    order = torch.argsort(rows.patient, stable=True)
    _, counts = torch.unique_consecutive(rows.patient[order], return_counts=True)
    key = None if rows.key is None else rows.key[order]
    return Rows(rows.x[order], rows.y[order], rows.patient[order], key), counts
