"""What leaves a client, and how rows become one: links around one combine.

A link changes rows one by one at the client (`client`) and undoes at the server what can be undone on the sum
(`server`). Links are row-wise by law: a cohort sent as one stack equals its clients sent one by one, bit for bit.

K clients, M numbers in a row.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from medfed.robust.rules import Rule


class Link(Protocol):
    """One transformation of rows: clipping, fixed point, masks, shares, compression."""

    def client(self, message_KM: Tensor) -> Tensor:
        """Transform each row by itself, at its client."""
        ...

    def server(self, mean_M: Tensor) -> Tensor:
        """Undo on the combined row what `client` did to each."""
        ...


class Float32:
    """Rows travel as float32, whatever they were computed in."""

    def client(self, message_KM: Tensor) -> Tensor:
        return message_KM.to(torch.float32)

    def server(self, mean_M: Tensor) -> Tensor:
        return mean_M


PLAIN: tuple[Link, ...] = (Float32(),)
"""The links of security.aggregation = "plain"."""


def send(message_KM: Tensor, links: Sequence[Link]) -> Tensor:
    """Pass rows through the clients' halves of the links, first to last."""
    for link in links:
        message_KM = link.client(message_KM)
    return message_KM


def finite(row_KM: Tensor) -> Tensor:
    """Say of each row [K] whether all its numbers are finite; one pass, no mask as large as the rows."""
    if row_KM.shape[1] == 0:
        return torch.ones(len(row_KM), dtype=torch.bool)
    low_K, high_K = row_KM.aminmax(dim=1)  # NaN wins both
    return torch.isfinite(low_K) & torch.isfinite(high_K)


def combine(message_KM: Tensor, weight_K: Tensor, rule: Rule | None, links: Sequence[Link]) -> Tensor:
    """Return the combined row [M]: weights times the rows, through the servers' halves, last to first.

    The weights are the rule's, or without one the clients' public weights weight_K [K]; they sum to 1.
    """
    w_K = weight_K if rule is None else rule(message_KM @ message_KM.T)
    mean_M = w_K.to(message_KM.dtype) @ message_KM
    for link in reversed(links):
        mean_M = link.server(mean_M)
    return mean_M
