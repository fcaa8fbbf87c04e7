"""Min-Max and Min-Sum: as far as honest rows are apart, and no further.

R rows that liars judge by, M numbers in a row.
"""

import torch
from torch import Tensor

from medfed.robust.attacks.attack import Attack, Sight, add


def _min_max(sight: Sight) -> Tensor:
    """Go as far as no honest row is further from the lie
    than the two furthest honest rows are from each other.

    |m + g p - x_i|^2 = a_i + 2 g b_i + g^2 c is at most the diameter's square: the least root over
    i, no search.
    """
    seen_RM = sight.seen_RM()
    mean_M = sight.mean_M()
    p_M = -sight.spread_M()
    if len(seen_RM) == 1:
        # rows of that spread would be sqrt(2) spreads apart: g = 1
        return sight.all_send(mean_M + p_M)
    off_RM = mean_M - seen_RM
    c = p_M.square().sum()
    a_R = off_RM.square().sum(1)
    b_R = off_RM @ p_M
    room_R = (_distances_RR(seen_RM).max() - a_R).clamp(min=0)
    return sight.all_send(mean_M + _ratio((b_R.square() + c * room_R).sqrt() - b_R, c).min() * p_M)


def _min_sum(sight: Sight) -> Tensor:
    """Go as far as the lie's squared distances from honest rows sum to no more than those of the
    worst honest row.
    """
    seen_RM = sight.seen_RM()
    mean_M = sight.mean_M()
    p_M = -sight.spread_M()
    if len(seen_RM) == 1:
        return sight.all_send(mean_M + p_M)
    off_RM = mean_M - seen_RM
    c = p_M.square().sum()
    count = len(seen_RM)
    b = (off_RM @ p_M).mean()
    room = _distances_RR(seen_RM).sum(1).max() / count - off_RM.square().sum() / count
    return sight.all_send(mean_M + _ratio((b.square() + c * room.clamp(min=0)).sqrt() - b, c) * p_M)


def _distances_RR(seen_RM: Tensor) -> Tensor:
    """Return squared distances between rows, by differences from the first:
    no cancellation of a large mean.
    """
    off_RM = seen_RM - seen_RM[0]
    gram_RR = off_RM @ off_RM.T
    return (gram_RR.diagonal()[:, None] + gram_RR.diagonal() - 2 * gram_RR).clamp(min=0)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0: rows without spread leave no direction."""
    return a / b if b > 0 else torch.zeros_like(a)


add(Attack("min-max", "Shejwalkar and Houmansadr, NDSS 2021", "row", on_rows=_min_max))
add(Attack("min-sum", "Shejwalkar and Houmansadr, NDSS 2021", "row", on_rows=_min_sum))
