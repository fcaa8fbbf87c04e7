"""Attacks on the wire: a row's whole steps, behind the links.

F liars at hand, M numbers in a row.
"""

import torch
from torch import Tensor

from medfed.core import streams
from medfed.core.checks import PlanError
from medfed.robust.attacks.attack import Attack, Sight, add


def _wrap(sight: Sight) -> Tensor:
    """Add 2^63 to half of the numbers, drawn by each liar:
    sums mod 2^64 are off by 2^63 in half of theirs.

    (x + 2^63)^2 = x^2 mod 2^64: a norm that is computed in words does not notice. Raises PlanError
    for rows that are not whole steps in 64 bits.
    """
    if sight.own_FM.dtype != torch.int64:
        raise PlanError(
            "attack='wrap' acts on whole steps (int64), and these rows are "
            f"{sight.own_FM.dtype}; use security.aggregation='three-party', where rows are "
            "words, or attack='scaled'."
        )
    chosen_FM = streams.words(sight.key_F(), sight.own_FM.shape[1]) < 0
    return torch.where(chosen_FM, sight.own_FM ^ -(1 << 63), sight.own_FM)


add(Attack("wrap", "arithmetic mod 2^64", "wire", on_rows=_wrap))
