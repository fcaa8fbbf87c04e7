"""What a site tells of its ledger: what a coordinator's claim needs, and nothing of a patient."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from medfed.core.checks import SiteError
from medfed.core.types import JSON
from medfed.privacy.ledger_entries import Lifetime


@dataclass(frozen=True)
class Statement:
    """A site's own words on its ledger.

    Guarantee: within one run, functions of public facts alone: how often its patients were asked,
    the bound that its operator set, and the head of a chain of keyed hashes.

    Edge cases:
    - `epsilon` is of the patient who has paid most over all runs of the study: beside an earlier
      run with other patients it says whether anybody was in both.
    """

    head: str
    uses: int = 0  # rounds of this run that its patients have paid for, those that a crash lost too
    queries: Mapping[str, int] = field(default_factory=dict)  # the same of queries, by label
    # of the worst patient, over all runs of the study; None before any was enrolled
    epsilon: float | None = None
    # the bound over all studies, and the rule of identity
    lifetime: Mapping[str, Any] | None = None
    founded: Lifetime | None = None  # the bound of a ledger that this run has founded

    def to_json(self) -> JSON:
        """Return everything as plain values."""
        told: JSON = {
            "head": self.head,
            "uses": self.uses,
            "queries": dict(self.queries),
            "epsilon": self.epsilon,
        }
        told["lifetime"] = dict(self.lifetime) if self.lifetime else None
        told["founded"] = None
        if self.founded:
            told["founded"] = {"epsilon": self.founded.epsilon, "delta": self.founded.delta}
        return told

    @classmethod
    def read(cls, told: Any) -> "Statement":
        """Return what a site tells; raise SiteError where it is no statement."""
        if not isinstance(told, dict):
            raise SiteError(
                "it tells nothing of a ledger; the study has a claim, so run the same medfed "
                "everywhere"
            )

        head, uses, queries, epsilon = (
            told.get(name) for name in ("head", "uses", "queries", "epsilon")
        )
        lifetime = told.get("lifetime")
        founded = told.get("founded")
        sound = isinstance(head, str) and len(head) <= 64 and _count(uses)
        sound = sound and isinstance(queries, dict) and all(map(_count, queries.values()))
        sound = sound and (epsilon is None or _cost(epsilon))
        sound = sound and all(one is None or _bound(one) for one in (lifetime, founded))
        if not sound:
            raise SiteError(
                "its statement of its ledger cannot be read; run the same medfed everywhere"
            )

        assert isinstance(head, str) and isinstance(uses, int) and isinstance(queries, dict)
        if lifetime is not None:  # these fields, and no others
            fields = ("epsilon", "delta", "identity")
            lifetime = {name: lifetime[name] for name in fields if name in lifetime}
        new = Lifetime(founded["epsilon"], founded["delta"]) if founded else None
        return cls(head, uses, queries, epsilon, lifetime, new)


def _count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MOST


_MOST = 1_000_000
"""Payments of a run; more are none that a ledger holds."""


def _cost(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def _bound(one: object) -> bool:
    sound = isinstance(one, dict) and _cost(one.get("epsilon")) and _cost(one.get("delta"))
    return sound and isinstance(one, dict) and len(str(one.get("identity"))) <= 64


Heads = Mapping[str, str]
"""The head of each site's ledger, by site."""


def compact(heads: Heads) -> str | dict[str, str] | None:
    """Return heads as they are kept:
    one where all sites have one ledger, else by site; None where none has any.
    """
    if not heads:
        return None
    first = next(iter(heads.values()))
    return first if set(heads.values()) == {first} else dict(heads)


def every(kept: str | Mapping[str, str] | None) -> list[str]:
    """Return all heads of what `compact` returned."""
    if not kept:
        return []
    if isinstance(kept, str):
        return [kept]
    return list(dict.fromkeys(kept.values()))


def combine_charged(told: Mapping[str, Statement], counted: float) -> JSON | None:
    """Return what all ledgers hold together, for the claim:
    of each figure the worst; None where there is none.

    No statement lowers what the coordinator has `counted` for this run itself. The bound of a
    lifetime is the widest: it is what some patient may have spent.
    """
    if not told:
        return None
    spent = [counted, *(one.epsilon for one in told.values() if one.epsilon is not None)]
    bounds = [one.lifetime for one in told.values() if one.lifetime]
    widest = max(bounds, key=lambda bound: (bound["epsilon"], bound["delta"])) if bounds else None
    return {
        "epsilon_all_runs": max(spent),
        "head": compact({name: one.head for name, one in told.items()}),
        "lifetime": dict(widest) if widest else None,
    }
