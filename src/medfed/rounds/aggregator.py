"""What runs at an aggregator:
its own keys, the study as it has it, and its side of the three-party protocol.

It is reached through `handle(op, payload)`, bytes in and bytes out, as a site is. "identify" tells
its public keys, "join" makes it a party of one run; the rest is `secure.three_party`.
"""

from typing import Any

from medfed.compliance import consortium
from medfed.core import codec
from medfed.core.checks import AbortError
from medfed.planning.resolved import resolve
from medfed.planning.terms import aggregator_of
from medfed.secure import three_party
from medfed.secure.identity import Identity, Post, Roster
from medfed.study import Study


class Aggregator:
    """One aggregator's node. Bounds, weights and noise are its own study's, never a message's."""

    def __init__(self, name: str, study: Study) -> None:
        """Set up the node; its keys are loaded, or made, when it is first asked who it is."""
        self.name = name
        self.study = study
        self._identity: Identity | None = None
        self._side: three_party.SharingAggregator | None = None

    def handle(self, op: str, payload: bytes) -> bytes:
        """Do what is asked; raises AbortError or another MedfedError with the reason."""
        match op:
            case "identify":
                return codec.encode({"public": consortium.to_json(self.identity.public)})
            case "join":
                self._join(codec.decode(payload)[0])
                return codec.encode({})
        if self._side is None:
            raise AbortError(
                f"aggregator {self.name!r} has joined no run; the coordinator must ask it to first"
            )
        return self._side.handle(op, payload)

    @property
    def identity(self) -> Identity:
        """Its own keys."""
        if self._identity is None:
            self._identity = consortium.own_keys(self.study, self.name, "aggregator")
        return self._identity

    def _join(self, told: dict[str, Any]) -> None:
        members = consortium.members_of(self.study, [self.name])
        if members:
            roster = members.roster
        else:
            roster = Roster.of(*map(consortium.from_json, told["roster"]))
        facts = resolve(self.study, told["sizes"], told["participants"], told["parameters"])
        self._side = aggregator_of(facts, Post(self.identity, roster))
