"""Min-Max and Min-Sum: as far along a direction as honest rows are apart, and no further.

R rows that liars judge by, M numbers in a row.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from medfed.robust.attacks.attack import Attack, Sight, add, ratio

Direction = Callable[[Sight], Tensor]  # to p [M], as long as the spread


def _against_spread(sight: Sight) -> Tensor:
    return -sight.spread_M()


def _against_mean(sight: Sight) -> Tensor:
    """Return the paper's inverse unit vector, at that length."""
    return _as_long_as_spread(sight, -sight.mean_M())


def _against_signs(sight: Sight) -> Tensor:
    return _as_long_as_spread(sight, -sight.mean_M().sign())


def _as_long_as_spread(sight: Sight, p_M: Tensor) -> Tensor:
    scaled_M: Tensor = ratio(p_M, p_M.norm()) * sight.spread_M().norm()
    return scaled_M


def _min_max(sight: Sight, direction: Direction) -> Tensor:
    """Go as far as no honest row is further from the lie
    than the two furthest honest rows are from each other.

    |m + g p - x_i|^2 = a_i + 2 g b_i + g^2 c is at most the diameter's square: the least root over
    i, no search.
    """
    seen_RM = sight.seen_RM()
    mean_M = sight.mean_M()
    p_M = direction(sight)
    if len(seen_RM) == 1:
        # rows of that spread would be sqrt(2) spreads apart: g = 1
        return sight.all_send(mean_M + p_M)
    off_RM = mean_M - seen_RM
    c = p_M.square().sum()
    a_R = off_RM.square().sum(1)
    b_R = off_RM @ p_M
    room_R = (_distances_RR(seen_RM).max() - a_R).clamp(min=0)
    return sight.all_send(mean_M + ratio((b_R.square() + c * room_R).sqrt() - b_R, c).min() * p_M)


def _min_sum(sight: Sight, direction: Direction) -> Tensor:
    """Go as far as the lie's squared distances from honest rows sum to no more than those of the
    worst honest row.
    """
    seen_RM = sight.seen_RM()
    mean_M = sight.mean_M()
    p_M = direction(sight)
    if len(seen_RM) == 1:
        return sight.all_send(mean_M + p_M)
    off_RM = mean_M - seen_RM
    c = p_M.square().sum()
    count = len(seen_RM)
    b = (off_RM @ p_M).mean()
    room = _distances_RR(seen_RM).sum(1).max() / count - off_RM.square().sum() / count
    return sight.all_send(mean_M + ratio((b.square() + c * room.clamp(min=0)).sqrt() - b, c) * p_M)


def _distances_RR(seen_RM: Tensor) -> Tensor:
    """Return squared distances between rows, by differences from the first:
    no cancellation of a large mean.
    """
    off_RM = seen_RM - seen_RM[0]
    gram_RR = off_RM @ off_RM.T
    return (gram_RR.diagonal()[:, None] + gram_RR.diagonal() - 2 * gram_RR).clamp(min=0)


for _suffix, _direction in (
    ("", _against_spread),
    ("-unit", _against_mean),
    ("-sign", _against_signs),
):
    for _name, _go in (("min-max", _min_max), ("min-sum", _min_sum)):
        add(
            Attack(
                _name + _suffix,
                "Shejwalkar and Houmansadr, NDSS 2021",
                "row",
                on_rows=partial(_go, direction=_direction),
            )
        )
