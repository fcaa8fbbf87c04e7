"""What a simulated attack is, and what liars see; the registry of attacks, and who lies.

An attack without knowledge of honest rows judges by what the liars would have sent honestly. One
liar alone has one such row: it takes last round's beside it, or else takes the spread of the row's
own numbers for the spread between clients.

F liars at hand, H honest clients, R rows that liars judge by, K all clients, M numbers in a row;
N records, D features.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from medfed.core import streams
from medfed.core.checks import PlanError, StudyError, nearest
from medfed.core.streams import Streams

Stage = Literal["data", "row", "wire"]


@dataclass(frozen=True)
class Records:
    """A liar's training records x_ND, y_N;
    `labels` counts the classes, 0 where a number is predicted.
    """

    x_ND: Tensor
    y_N: Tensor
    labels: int
    key: int  # of the liar's stream


@dataclass(frozen=True)
class Sight:
    """What liars see when they make their rows: what they would honestly send, and perhaps more.

    `clients` and `liars` are the whole cohort's n and f, even where one liar acts at a time. Raises
    PlanError unless 0 < f < n/2.
    """

    own_FM: Tensor
    names: Sequence[str]  # of the F liars: each has its own stream, and all share one
    streams: Streams
    round: int
    clients: int
    liars: int
    honest_HM: Tensor | None = None
    before_FM: Tensor | None = None  # their own honest rows of the round before
    # the Gram rule that "adaptive" knows; None is the mean
    rule: Callable[[Tensor], Tensor] | None = None
    limit_F: Tensor | None = None  # to what length each liar's row is cut; None: it is not
    rounds: int = 0  # of the whole run; 0: they do not know

    def __post_init__(self) -> None:
        if not 0 < 2 * self.liars < self.clients:
            raise PlanError(
                f"liars={self.liars} of clients={self.clients}; an attack is simulated with at "
                "least one liar and fewer than half. Change robustness.malicious."
            )

    def seen_RM(self) -> Tensor:
        """Return the rows that the liars judge by:
        the honest ones, or their own of this round and the last.
        """
        if self.honest_HM is not None:
            return self.honest_HM
        if len(self.own_FM) > 1 or self.before_FM is None:
            return self.own_FM
        return torch.cat([self.own_FM, self.before_FM])

    def mean_M(self) -> Tensor:
        """Return what the liars take for the honest rows' mean."""
        seen_RM = self.seen_RM() if self.honest_HM is not None else self.own_FM
        return seen_RM.mean(0)

    def spread_M(self) -> Tensor:
        """Return what liars take for the standard deviation between clients, number by number."""
        seen_RM = self.seen_RM()
        if len(seen_RM) > 1:
            return seen_RM.std(0)
        return seen_RM.std(correction=0).expand(seen_RM.shape[1])

    def key_F(self) -> Tensor:
        """Return each liar's stream for this round."""
        return self.streams.key_K("attack", self.round, self.names)

    def direction_M(self) -> Tensor:
        """Return a random direction, of any length, that all liars share in all rounds."""
        shared_1 = torch.tensor([self.streams.key("attack")], dtype=torch.int64)
        return streams.normal(shared_1, self.own_FM.shape[1])[0]

    def all_send(self, lie_M: Tensor) -> Tensor:
        """Return lies [F, M], the same from everyone."""
        return lie_M.expand_as(self.own_FM)


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0: rows without spread leave no direction."""
    return a / b if b > 0 else torch.zeros_like(a)


def _honest_records(records: Records) -> Records:
    return records


def _honest_rows(sight: Sight) -> Tensor:
    return sight.own_FM


@dataclass(frozen=True)
class Attack:
    """One attack: where its lie is told, and the paper that it is from. A row may follow from
    changed records.
    """

    name: str
    paper: str
    stage: Stage
    on_data: Callable[[Records], Records] = _honest_records
    on_rows: Callable[[Sight], Tensor] = _honest_rows

    def records(self, records: Records) -> Records:
        """Return the records that the liar trains on."""
        return self.on_data(records)

    def rows(self, sight: Sight, stage: Stage = "row") -> Tensor:
        """Return the rows [F, M] that liars send, in the dtype of their own; an attack of another
        stage changes none.

        Whole steps are rounded to nearest and end at the largest word; a number that is none
        becomes that word too.
        """
        own_FM = sight.own_FM
        # a model that has run away needs no lie
        if stage != self.stage or not own_FM.isfinite().all():
            return own_FM
        if stage == "wire":
            return self.on_rows(sight)
        return _cast(self.on_rows(_widen(sight)), own_FM.dtype)


def _widen(sight: Sight) -> Sight:
    """Return the sight with float64 rows."""
    honest = sight.honest_HM
    before = sight.before_FM
    return replace(
        sight,
        own_FM=sight.own_FM.double(),
        honest_HM=None if honest is None else honest.double(),
        before_FM=None if before is None else before.double(),
    )


def _cast(lie_FM: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return lie_FM.to(dtype)
    most = torch.iinfo(dtype).max
    step_FM = torch.nan_to_num(lie_FM, nan=math.inf, posinf=math.inf, neginf=-math.inf).round()
    inside_FM = step_FM.abs() < float(most)  # a float of 2^63, which the largest word is below
    whole_FM = torch.where(inside_FM, step_FM, 0.0).to(dtype)
    return torch.where(inside_FM, whole_FM, torch.where(step_FM > 0, most, -most).to(dtype))


ATTACKS: dict[str, Attack] = {}
"""The attacks by name; a module of this package, or of another, adds its own by `add`."""


def add(attack: Attack) -> None:
    """Add an attack to ATTACKS; raise PlanError for a name that another has."""
    if attack.name in ATTACKS:
        raise PlanError(
            f"attack={attack.name!r} is there already ({ATTACKS[attack.name].paper}); expected a "
            "name that no other attack has. Give the new one another."
        )
    ATTACKS[attack.name] = attack


def find(name: str) -> Attack:
    """Return an attack; raise StudyError, with what is known, for a name that none has."""
    if name not in ATTACKS:
        raise StudyError(f"robustness.attack={name!r} is not an attack; {nearest(name, ATTACKS)}")
    return ATTACKS[name]


def liars(names: Sequence[str], fraction: float, seed: int) -> tuple[str, ...]:
    """Return who lies: floor(fraction n) of the names, in their order, drawn from the study's seed.

    A larger fraction adds liars and frees none. Raises StudyError for a fraction outside [0, .5).
    """
    if not 0 <= fraction < 0.5:
        raise StudyError(
            f"robustness.malicious={fraction:g}; expected a share from 0 to below .5 of the clients"
        )
    count = math.floor(fraction * len(names) + 1e-9)  # .3 x 10 is below 3 in floats of some shares
    key = Streams(seed).key
    drawn = set(sorted(names, key=lambda name: (key("liars", name), name))[:count])
    return tuple(name for name in names if name in drawn)
