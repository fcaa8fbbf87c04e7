"""Attacks on rows, each by what its round alone tells.

F liars at hand, R rows that they judge by, M numbers in a row.
"""

import math
from statistics import NormalDist

import torch
from torch import Tensor

from medfed.core import streams
from medfed.robust.attacks.attack import Attack, Sight, add, ratio
from medfed.robust.attacks.records import flip_labels


def flip_signs(sight: Sight) -> Tensor:
    return -4 * sight.own_FM  # by 4, so that 30 % of the clients turn the mean: .7 - .3 x 4 < 0


add(Attack("sign-flip", "Li et al., RSA, AAAI 2019, arXiv:1811.03761", "row", on_rows=flip_signs))


def _scale(sight: Sight) -> Tensor:
    # n / eta with eta = 1: a row of flipped labels replaces the mean
    return sight.clients * sight.own_FM


add(
    Attack(
        "scaled", "Bagdasaryan et al., AISTATS 2020, arXiv:1807.00459", "row", flip_labels, _scale
    )
)


def _gaussian(sight: Sight) -> Tensor:
    """Noise with 200 times the root mean square of the liar's own numbers."""
    size_F1 = sight.own_FM.square().mean(1, keepdim=True).sqrt()
    return 200 * size_F1 * streams.normal(sight.key_F(), sight.own_FM.shape[1])


add(
    Attack("gaussian", "Blanchard et al., NeurIPS 2017, arXiv:1703.02757", "row", on_rows=_gaussian)
)


def alie_z(clients: int, liars: int) -> float:
    """Return z_max of ALIE (eq. in algorithm 3): s honest clients lie further from the mean, so
    liars pass for them.

    Below 0 where the liars are too few for the paper's argument.
    """
    supporters = clients // 2 + 1 - liars
    return NormalDist().inv_cdf((clients - liars - supporters) / (clients - liars))


def _alie(sight: Sight) -> Tensor:
    return sight.all_send(sight.mean_M() - alie_z(sight.clients, sight.liars) * sight.spread_M())


add(Attack("alie", "Baruch et al., NeurIPS 2019, arXiv:1902.06156", "row", on_rows=_alie))


def _ipm_large(sight: Sight) -> Tensor:
    """The mean becomes -(n - f)/n of the honest one:
    epsilon is twice the (n - f)/f that makes it zero.
    """
    return sight.all_send(-2 * (sight.clients - sight.liars) / sight.liars * sight.mean_M())


add(
    Attack(
        "ipm-large",
        "Xie et al., Fall of Empires, UAI 2019, arXiv:1903.03936",
        "row",
        on_rows=_ipm_large,
    )
)


def _ipm(sight: Sight) -> Tensor:
    return sight.all_send(-0.5 * sight.mean_M())


add(Attack("ipm", "Xie et al., Fall of Empires, UAI 2019, arXiv:1903.03936", "row", on_rows=_ipm))


def _oppose(sight: Sight) -> Tensor:
    """Go against the mean, as long as may be: to the length that a liar's row is cut to, else to
    that of the longest row that the liars judge by.
    """
    mean_M = sight.mean_M()
    length_F = sight.limit_F
    if length_F is None:
        length_F = sight.seen_RM().norm(dim=1).max().expand(len(sight.own_FM))
    return -length_F[:, None] * ratio(mean_M, mean_M.norm())


add(
    Attack(
        "opposed",
        "after Xie et al., Fall of Empires, UAI 2019, arXiv:1903.03936",
        "row",
        on_rows=_oppose,
    )
)


def _fang(sight: Sight) -> Tensor:
    """Draw each number beyond the honest rows' extreme, on the side against the mean's sign: up to
    twice the extreme, or half of it where that is the way out (the paper's b = 2).

    Without honest rows 3 to 4 spreads from the mean: the paper's partial knowledge.
    """
    mean_M = sight.mean_M()
    drawn_FM = streams.uniform(sight.key_F(), sight.own_FM.shape[1]).double()
    if sight.honest_HM is None:
        return mean_M - mean_M.sign() * (3 + drawn_FM) * sight.spread_M()

    down_M = mean_M > 0
    edge_M = torch.where(down_M, sight.honest_HM.amin(0), sight.honest_HM.amax(0))
    far_M = torch.where((edge_M < 0) == down_M, 2 * edge_M, edge_M / 2)
    return edge_M + drawn_FM * (far_M - edge_M)


add(Attack("fang", "Fang et al., USENIX Security 2020, arXiv:1911.11815", "row", on_rows=_fang))


def _mimic(sight: Sight) -> Tensor:
    """Send the row that is furthest out along the direction in which honest rows differ most.

    Over-represents one honest client, so that heterogeneous cohorts lean to it. A liar alone sends
    its own row.
    """
    seen_RM = sight.seen_RM()
    off_RM = seen_RM - seen_RM.mean(0)
    lead_R = torch.linalg.eigh(off_RM @ off_RM.T).eigenvectors[:, -1]
    along_R = seen_RM @ (lead_R @ off_RM)
    return sight.all_send(seen_RM[along_R.abs().argmax()])


add(Attack("mimic", "Karimireddy et al., ICLR 2022, arXiv:2006.09365", "row", on_rows=_mimic))


def _free_rider(sight: Sight) -> Tensor:
    return torch.zeros_like(sight.own_FM)


add(Attack("free-rider", "Lin et al. 2019, arXiv:1911.12560", "row", on_rows=_free_rider))


def _stale(sight: Sight) -> Tensor:
    """Last round's row again; in the first round nothing."""
    if sight.before_FM is None:
        return _free_rider(sight)
    return sight.before_FM


add(Attack("stale", "after Fraboni et al., AISTATS 2021, arXiv:2006.11901", "row", on_rows=_stale))


def _colluding(sight: Sight) -> Tensor:
    """A random direction for all liars and rounds, a hundred times as long as the liar's row."""
    direction_M = sight.direction_M()
    lies_FM: Tensor = (
        100 * sight.own_FM.norm(dim=1, keepdim=True) * direction_M / direction_M.norm()
    )
    return lies_FM


add(
    Attack(
        "colluding",
        "after Blanchard et al., NeurIPS 2017, arXiv:1703.02757",
        "row",
        on_rows=_colluding,
    )
)


def _not_a_number(sight: Sight) -> Tensor:
    return torch.full_like(sight.own_FM, math.nan)


add(Attack("nan", "a broken or hostile client", "row", on_rows=_not_a_number))


def _infinite(sight: Sight) -> Tensor:
    return torch.full_like(sight.own_FM, math.inf)


add(Attack("inf", "a broken or hostile client", "row", on_rows=_infinite))
