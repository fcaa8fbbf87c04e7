"""Mechanisms as data: an event says what was released of a patient's records.

Events are what guarantees are planned with, what ledgers keep, as JSON, and what `accounting`
prices. Add/remove adjacency throughout: neighbours differ in one patient, with all records.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, TypeAlias, cast, get_args

from medfed.core.checks import PlanError, nearest
from medfed.core.types import JSON

_POSITIVE: tuple[Callable[[float], bool], str] = (
    lambda x: 0 < x < math.inf,
    "a finite number above 0",
)
_BOUNDS: dict[str, tuple[Callable[[float], bool], str]] = {
    "noise_multiplier": _POSITIVE,
    "scale_over_sensitivity": _POSITIVE,
    "epsilon": _POSITIVE,
    "probability": (lambda x: 0 < x <= 1, "a number above 0, at most 1"),
    "count": (lambda x: x >= 1, "an integer of at least 1"),
    "population": (lambda x: x >= 1, "an integer of at least 1"),
    "cap": (lambda x: x >= 1, "an integer of at least 1"),
    "categories": (lambda x: x >= 2, "an integer of at least 2"),
}


class _Checked:
    """Refuses, by PlanError, a field that is no number, not finite or out of bounds."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(cast(Any, self)):
            value = getattr(self, field.name)
            (inside, expected) = _BOUNDS[field.name]
            numbers = (int, float) if field.type is float else (int,)
            if isinstance(value, bool) or not isinstance(value, numbers) or not inside(value):
                raise PlanError(
                    f"{self.kind}: {field.name}={value!r}; expected {expected}. Correct the event."
                )


@dataclass(frozen=True)
class Gaussian(_Checked):
    """`count` sums over all patients,
    each with noise of standard deviation noise_multiplier times sensitivity.
    """

    kind = "gaussian"
    noise_multiplier: float
    count: int = 1


@dataclass(frozen=True)
class PoissonGaussian(_Checked):
    """`count` noised sums, each over patients who each took part by a coin of their own,
    unseen by the adversary.
    """

    kind = "poisson_gaussian"
    probability: float
    noise_multiplier: float
    count: int = 1


@dataclass(frozen=True)
class TruncatedPoissonGaussian(_Checked):
    """Poisson sampling from `population` patients where,
    above `cap`, a uniformly random subset of `cap` stays.

    Ledgers of before hold it; nothing charges it any more. Ganesh 2025, arXiv:2508.15089, prices it
    by `population`, which nobody can vouch for: with more patients than that it costs more. So it
    is counted as `capped` counts it, for any population and any cap.
    """

    kind = "truncated_poisson_gaussian"
    population: int
    probability: float
    cap: int
    noise_multiplier: float
    count: int = 1


@dataclass(frozen=True)
class Laplace(_Checked):
    """`count` numbers with Laplace noise of the given scale over their L1 sensitivity:
    epsilon = 1 / scale each.
    """

    kind = "laplace"
    scale_over_sensitivity: float
    count: int = 1


@dataclass(frozen=True)
class RandomisedResponse(_Checked):
    """`count` answers, each true with probability e^epsilon / (e^epsilon + categories - 1), else
    any other alike.

    Accounted between any two true answers, so it also covers a patient's absence where absence has
    an answer. With two categories it costs at least as much as any other epsilon-DP release
    (Kairouz, Oh and Viswanath 2015).
    """

    kind = "randomised_response"
    categories: int
    epsilon: float
    count: int = 1


def capped(probability: float, noise_multiplier: float, count: int = 1) -> PoissonGaussian:
    """Return the event of Poisson sampling with a cap,
    whatever the cap and however many patients there are.

    Each patient is drawn by a coin below `probability`; of those drawn the `cap` lowest coins stay.
    Not Poisson: in a full batch one patient's presence puts another out. Yet it costs no more than
    Poisson sampling with half the noise. Proof, for neighbours with and without patient x, in units
    of the sensitivity:

    1. Fix the other patients' coins. Without x the sum is some s, and the release N(s, z^2).
    2. With x: unless x's coin is below q, the release is the same. If it is, then for each value of
       the coin x joins (the sum moves by 1 at most), takes another's place (by 2), or stays out (by
       0): N(s + d, z^2) with |d| <= 2.
    3. The others' coins, and x's own where it is below q, have the same law on both sides, and
       hockey-stick and Rényi divergences are quasi-convex: no mixture is further apart than its
       worst pair, N(0, z^2) and (1 - q) N(0, z^2) + q N(d, z^2). A smaller |d| is that pair for |d|
       = 2, shrunk and with noise added.
    4. That pair is Poisson sampling with sensitivity 2, so with noise multiplier z / 2. Both orders
       are covered.

    Neither the cap nor the number of patients occurs in it. Where a cap never binds, plain Poisson
    sampling would do; but that it never binds is a statement about the true number of patients,
    which no accountant may trust.
    """
    return PoissonGaussian(probability, noise_multiplier / 2, count)


Leaf: TypeAlias = (
    Gaussian | PoissonGaussian | TruncatedPoissonGaussian | Laplace | RandomisedResponse
)


@dataclass(frozen=True)
class Composed:
    """Several events about the same patient, in any order; nested ones are flattened."""

    kind: ClassVar[str] = "composed"
    events: tuple["Event", ...]

    def __post_init__(self) -> None:
        leaves = tuple(leaf for event in self.events for leaf in leaves_of(event))
        if not leaves:
            raise PlanError(
                "composed: events=(); expected at least one event. Leave out what releases nothing."
            )
        object.__setattr__(self, "events", leaves)


Event: TypeAlias = Leaf | Composed

_KINDS: dict[str, type[Leaf]] = {leaf.kind: leaf for leaf in get_args(Leaf)}
_REFUSED = dict.fromkeys(
    ("shuffled", "fixed_size"),
    "no amplification by sampling is proved for the batches of this law under add/remove "
    "adjacency; accounted as Poisson, one epoch at q=0.001, sigma=0.8 would read epsilon=0.468 "
    "where only 6.31 is safe (arXiv:2403.17673, 2411.04205). Draw Poisson batches, or account "
    "each step as gaussian",
)


def to_json(event: Event) -> JSON:
    """Return an event as {"kind": ..., its fields}; `from_json` reads it back."""
    if isinstance(event, Composed):
        return {"kind": event.kind, "events": [to_json(leaf) for leaf in event.events]}
    return {"kind": event.kind, **asdict(event)}


def from_json(data: Mapping[str, object]) -> Event:
    """Return the event that `data` describes; raise PlanError for an unknown kind, a field too many
    or out of bounds.

    Shuffled and fixed-size batches are refused with the reason: they have no event here.
    """
    match data:
        case {"kind": Composed.kind, "events": [*parts], **rest} if not rest:
            return Composed(tuple(_leaf_from_json(part) for part in parts))
        case {"kind": Composed.kind}:
            raise PlanError(
                f"composed: fields {sorted(data)}; expected events, a list. Correct the event."
            )
    return _leaf_from_json(data)


def _leaf_from_json(data: object) -> Leaf:
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(kind, str) or kind == Composed.kind:
        raise PlanError(
            f"event={data!r}; expected a table with a kind, none nested. Read it from where it "
            "was written."
        )
    if kind in _REFUSED:
        raise PlanError(f"kind={kind!r}: {_REFUSED[kind]}.")
    if kind not in _KINDS:
        raise PlanError(f"kind={kind!r} is no event that can be accounted; {nearest(kind, _KINDS)}")
    values = {k: v for k, v in data.items() if k != "kind"}
    wanted = [field.name for field in fields(_KINDS[kind])]
    if set(values) != set(wanted):
        raise PlanError(
            f"{kind}: fields {sorted(map(str, values))}; expected {wanted}. Correct the event."
        )
    return _KINDS[kind](**values)


def leaves_of(event: Event) -> tuple[Leaf, ...]:
    if isinstance(event, Composed):
        return cast(tuple[Leaf, ...], event.events)
    if not isinstance(event, get_args(Leaf)):
        raise PlanError(
            f"event={event!r} is unknown; expected one of {', '.join(_KINDS)}. Describe it by "
            "these."
        )
    return (event,)
