"""Aggregation rules: how much each client's row counts.

A rule reads rows only through their Gram matrix G = X X^T. So it costs one matrix product and K x K work, and it can
run where rows are secret and G is all that is opened.
"""

from collections.abc import Callable

from torch import Tensor

Rule = Callable[[Tensor], Tensor]
"""G_KK -> w_K, weights that sum to 1."""

RULES: dict[str, Rule | None] = {"mean": None}
"""The rules by name. None takes the clients' public weights and needs no Gram matrix: breakdown point 0."""
