"""The attack that knows the rule, and asks it.

F liars at hand, L all liars, H honest clients, K all clients, M numbers in a row, B basis rows.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from medfed.core import streams
from medfed.robust.attacks.attack import Attack, Sight, add, find

FIXED = (
    "sign-flip",
    "scaled",
    "gaussian",
    "alie",
    "ipm-large",
    "ipm",
    "min-max",
    "min-sum",
    "mimic",
    "free-rider",
    "colluding",
)
"""What "adaptive" tries beside its own directions."""


def _adaptive(sight: Sight) -> Tensor:
    """Send what moves the rule's result furthest from the honest mean, the rule known and asked.

    Candidates are the fixed attacks, and m + g p for p against the mean and against the spread, g =
    2^-5 .. 2^10, then finer around the best. Every candidate is a combination of a few basis rows,
    so one Gram matrix serves all. Without honest rows the liars draw n - f from what they take for
    the mean and the spread.
    """
    if sight.honest_HM is None:
        sight = replace(sight, honest_HM=_imagined_HM(sight))
    assert sight.honest_HM is not None
    game = _Game.of(sight, sight.honest_HM)
    strengths = [2.0**e for e in range(-5, 11)]
    best = max(
        game.list_fixed() + [game.towards(p, g) for p, g in product(game.directions, strengths)],
        key=game.harm,
    )
    if best.direction is not None:
        finer = [best.strength * 2.0 ** (e / 8) for e in range(-7, 8)]
        best = max([game.towards(best.direction, g) for g in finer], key=game.harm)

    lie_FM: Tensor = best.mix_LB[: len(sight.own_FM)] @ game.basis_BM
    return lie_FM


add(Attack("adaptive", "after Shejwalkar and Houmansadr, NDSS 2021", "row", on_rows=_adaptive))


def _imagined_HM(sight: Sight) -> Tensor:
    names = [f"imagined {i}" for i in range(sight.clients - sight.liars)]
    key_H = sight.streams.key_K("attack", sight.round, names)
    return sight.mean_M() + sight.spread_M() * streams.normal(key_H, sight.own_FM.shape[1])


@dataclass(frozen=True)
class _Lie:
    """A candidate: how the L liars' rows are mixed from the basis; its direction, if it has one."""

    mix_LB: Tensor
    direction: int | None = None
    strength: float = 0.0


@dataclass(frozen=True)
class _Game:
    """The honest rows, the fixed attacks' and the directions as one basis, and its Gram matrix."""

    basis_BM: Tensor
    gram_BB: Tensor
    honest: int
    liars: int
    at_hand: int
    rule: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, sight: Sight, honest_HM: Tensor) -> "_Game":
        mean_M = sight.mean_M()
        spread_M = sight.spread_M()
        lies = [find(name).on_rows(sight) for name in FIXED]
        basis_BM = torch.cat([honest_HM, *lies, mean_M[None], -mean_M[None], -spread_M[None]])
        F = len(sight.own_FM)
        rule = sight.rule or _mean
        return cls(basis_BM, basis_BM @ basis_BM.T, len(honest_HM), max(sight.liars, F), F, rule)

    @property
    def directions(self) -> tuple[int, int]:
        B = len(self.basis_BM)
        return B - 2, B - 1

    def list_fixed(self) -> list[_Lie]:
        """Return the fixed attacks; liars that are not at hand send what those at hand do."""
        eye_BB = torch.eye(len(self.basis_BM), dtype=torch.float64)
        member_L = torch.arange(self.liars) % self.at_hand
        return [_Lie(eye_BB[self.honest + a * self.at_hand + member_L]) for a in range(len(FIXED))]

    def towards(self, direction: int, strength: float) -> _Lie:
        """Return the lie m + g p of all liars."""
        mix_B = torch.zeros(len(self.basis_BM), dtype=torch.float64)
        mix_B[-3] = 1
        mix_B[direction] = strength
        return _Lie(mix_B.expand(self.liars, -1), direction, strength)

    def harm(self, lie: _Lie) -> float:
        """Return the squared distance of the rule's result from the honest mean."""
        eye_HB = torch.eye(self.honest, len(self.basis_BM), dtype=torch.float64)
        mix_KB = torch.cat([eye_HB, lie.mix_LB])
        off_B = self.rule(mix_KB @ self.gram_BB @ mix_KB.T).double() @ mix_KB - eye_HB.mean(0)
        return float(off_B @ self.gram_BB @ off_B)


def _mean(gram_KK: Tensor) -> Tensor:
    return gram_KK.new_full((len(gram_KK),), 1 / len(gram_KK))
