"""A client's side of secure aggregation:
its keys, the run it has agreed to, and what leaves it for a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from medfed.core.checks import AbortError, PlanError
from medfed.core.entropy import Integers
from medfed.secure import masking, three_party
from medfed.secure.chain import Follower
from medfed.secure.identity import Scope
from medfed.secure.three_party import SharingTerms


class Party(Protocol):
    """What a site holds for secure rounds of one run."""

    @property
    def follower(self) -> Follower:
        """The study and the models that the site agreed to."""
        ...

    def upload(self, round: int, row_M: Integers, model: bytes) -> bytes:
        """Return what leaves the site for its row;
        `model` is the hash of the global model that it was given.
        """
        ...

    def answer(self, phase: str, round: int, told: Sequence[str], message: bytes) -> bytes:
        """Play a phase of the round but the row's: what the site is told, and what it answers."""
        ...


@dataclass(frozen=True)
class Sharer:
    """A site that shares its rows among three aggregators."""

    follower: Follower
    terms: SharingTerms

    def upload(self, round: int, row_M: Integers, model: bytes) -> bytes:
        """Return the row's shares, sealed to each aggregator: see `three_party.share`."""
        mine = self.follower
        return three_party.share(mine.post, Scope(mine.study, mine.run, round), row_M, self.terms)

    def answer(self, phase: str, round: int, told: Sequence[str], message: bytes) -> bytes:
        """Refuse: shares travel with the row."""
        raise AbortError(
            f"phase {phase!r} belongs to masked rounds; this study shares rows among three parties"
        )


@dataclass
class Masker:
    """A site that masks its rows. Without joint noise its row counts `weight` times."""

    follower: Follower
    choose: Callable[[Sequence[str], int], masking.MaskingTerms]
    weight: int = 1
    _client: masking.Client | None = None
    _round: int = 0
    _boxes: bytes = b""
    _model: bytes = b""

    def upload(self, round: int, row_M: Integers, model: bytes) -> bytes:
        """Return the row under its masks: see `masking.Client.mask`."""
        self._model = model
        return self._of(round).mask(self._boxes, row_M * self.weight)

    def answer(self, phase: str, round: int, told: Sequence[str], message: bytes) -> bytes:
        """Play a phase: see `masking`.
        For "keys" the members of the round are told, else one message.
        """
        if phase == "keys":
            mine = self.follower
            scope = Scope(mine.study, mine.run, round)
            terms = self.choose(told, round)
            self._client = masking.Client(mine.post, terms, scope, mine.coordinator)
            self._round = round
            return self._client.keys()

        client = self._of(round)
        match phase:
            case "shares":
                return client.share(message)
            case "boxes":
                self._boxes = message
                return b""
            case "confirm":
                return client.confirm(message, self._model)
            case "unmask":
                return client.unmask(message)

        raise AbortError(f"phase={phase!r} is not known; run the same medfed everywhere")

    def _of(self, round: int) -> masking.Client:
        if self._client is None or self._round != round:
            raise AbortError(
                f"{self.follower.post.me.name!r} has made no keys for round {round}; the round "
                "must begin anew"
            )
        return self._client


@dataclass(frozen=True)
class Rehearser:
    """Stands in for a party in a rehearsal:
    takes a row as it would leave the site, and lets none of it out.
    """

    length: int

    @property
    def follower(self) -> Follower:
        """Refuse: a rehearsal agrees to nothing."""
        raise AbortError("a rehearsal agrees to no study and follows no model")

    def upload(self, round: int, row_M: Integers, model: bytes) -> bytes:
        """Return nothing;
        raise PlanError for a row that is not whole numbers of the length agreed on.
        """
        if row_M.shape != (self.length,) or row_M.dtype != np.int64:
            raise PlanError(
                f"a row of {row_M.dtype} {row_M.shape}; expected int64 ({self.length},)"
            )
        return b""

    def answer(self, phase: str, round: int, told: Sequence[str], message: bytes) -> bytes:
        """Refuse: nobody else is there."""
        raise AbortError(f"phase={phase!r} is not played in a rehearsal")
