"""Attacks that need several rounds: what a look at one of them does not tell.

F liars at hand, M numbers in a row.
"""

from collections.abc import Callable

from torch import Tensor

from medfed.robust.attacks.attack import Attack, Sight, add
from medfed.robust.attacks.rows import flip_signs

BLOCK = 5
"""Rounds that "on-off" lies, and then is honest."""

CYCLE = 5
"""Of so many rounds "duty-cycle" lies in one."""


def _drift(sight: Sight) -> Tensor:
    """Send the mean and one spread in a direction that is the same in all rounds: hardly further
    out than an honest row, but it does not average out.
    """
    direction_M = sight.direction_M()
    step_M = sight.spread_M().norm() * direction_M / direction_M.norm()
    return sight.all_send(sight.mean_M() + step_M)


add(Attack("drift", "after Karimireddy et al., ICML 2021, arXiv:2012.10333", "row", on_rows=_drift))


def _flip_when(lies: Callable[[Sight], bool]) -> Callable[[Sight], Tensor]:
    """Return sign-flip in rounds in which `lies`, and honesty in the others."""

    def send(sight: Sight) -> Tensor:
        return flip_signs(sight) if lies(sight) else sight.own_FM

    return send


def _is_on(sight: Sight) -> bool:
    return (sight.round - 1) // BLOCK % 2 == 0


def _is_duty(sight: Sight) -> bool:
    return sight.round % CYCLE == 1


def _is_late(sight: Sight) -> bool:
    return 2 * sight.round > sight.rounds


TRUST = "after Sun et al., A Trust Evaluation Framework, INFOCOM 2006"

add(Attack("on-off", TRUST, "row", on_rows=_flip_when(_is_on)))
add(Attack("duty-cycle", TRUST, "row", on_rows=_flip_when(_is_duty)))
add(Attack("late", TRUST, "row", on_rows=_flip_when(_is_late)))
