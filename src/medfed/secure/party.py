"""A client's side of secure aggregation:
its keys, the run it has agreed to, and what leaves it for a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from torch import Tensor

from medfed.core.checks import AbortError, PlanError, some
from medfed.core.entropy import Integers
from medfed.secure import masking, three_party
from medfed.secure.agreements import Agreements
from medfed.secure.chain import Follower
from medfed.secure.identity import Scope
from medfed.secure.three_party import SharingTerms


class Party(Protocol):
    """What a site holds for secure rounds of one run."""

    @property
    def follower(self) -> Follower:
        """The study and the models that the site agreed to."""
        ...

    def upload(self, round: int, row_M: Integers) -> bytes:
        """Return what leaves the site for its row, which it made from the last model it took."""
        ...

    def recall(self) -> tuple[bytes, dict[str, Tensor]] | None:
        """Return what this site answered to the model that it took last, and what it remembers if
        the row counts; None where it has not answered, or may answer anew.
        """
        ...

    def keep(self, answer: bytes, memory: Mapping[str, Tensor]) -> None:
        """Keep what is answered to the model that was taken last: see `recall`."""
        ...

    def answer(self, phase: str, round: int, told: Sequence[str], message: bytes) -> bytes:
        """Play a phase of the round but the row's: what the site is told, and what it answers."""
        ...


@dataclass(frozen=True)
class Sharer:
    """A site that shares its rows among three aggregators."""

    follower: Follower
    terms: SharingTerms

    def upload(self, round: int, row_M: Integers) -> bytes:
        """Return the row's shares, sealed to each aggregator: see `three_party.share`."""
        mine = self.follower
        return three_party.share(mine.post, mine.scope, row_M, self.terms, mine.model)

    def recall(self) -> tuple[bytes, dict[str, Tensor]] | None:
        """Return the same shares again: others of the same row would be opened beside them."""
        mine = self.follower
        return mine.record.recall(mine.scope, mine.model)

    def keep(self, answer: bytes, memory: Mapping[str, Tensor]) -> None:
        """Keep the answer until the next round's, on disk where the record is."""
        mine = self.follower
        mine.record.keep(mine.scope, mine.model, answer, memory)

    def answer(self, phase: str, round: int, told: Sequence[str], message: bytes) -> bytes:
        """Refuse: shares travel with the row."""
        raise AbortError(
            f"phase {phase!r} belongs to masked rounds; this study shares rows among three parties"
        )


@dataclass
class Masker:
    """A site that masks its rows. Without joint noise its row counts `weight` times.

    `choose` works out what a round agrees on from who is told to take part, and refuses whom its
    own study would not draw.
    """

    follower: Follower
    choose: Callable[[Sequence[str], int], masking.MaskingTerms]
    weight: int = 1
    lines: Agreements = field(default_factory=Agreements)
    _client: masking.Client | None = None
    _round: int = 0
    _attempts: int = 0  # at this round
    _boxes: bytes = b""

    def upload(self, round: int, row_M: Integers) -> bytes:
        """Return the row under its masks: see `masking.Client.mask`."""
        return self._of(round).mask(self._boxes, row_M * self.weight, self.follower.model)

    def recall(self) -> tuple[bytes, dict[str, Tensor]] | None:
        """Return None: masks are fresh whenever a round is played, and it is paid for each time.
        What it can come to is one sum: see `masking.Client.confirm`.
        """
        return None

    def keep(self, answer: bytes, memory: Mapping[str, Tensor]) -> None:
        """Keep nothing."""

    def answer(self, phase: str, round: int, told: Sequence[str], message: bytes) -> bytes:
        """Play a phase: see `masking`.
        For "keys" the members of the round are told, else one message.
        """
        if phase == "keys":
            mine = self.follower
            scope = Scope(mine.study, mine.run, round)
            terms = self.choose(told, round)
            self._refuse_strangers(terms)
            self._count(round)
            self._client = masking.Client(
                mine.post, terms, scope, mine.coordinator, mine.record, self.lines
            )
            return self._client.keys()

        client = self._of(round)
        match phase:
            case "reveal":
                return client.reveal(message)
            case "shares":
                return client.share(message)
            case "boxes":
                self._boxes = message
                return b""
            case "confirm":
                return client.confirm(message)
            case "unmask":
                return client.unmask(message)

        raise AbortError(f"phase={phase!r} is not known; run the same medfed everywhere")

    def _count(self, round: int) -> None:
        """Count an attempt at a round; raise AbortError after `masking.ATTEMPTS` of them."""
        self._attempts = self._attempts + 1 if round == self._round else 1
        self._round = round
        if self._attempts > masking.ATTEMPTS:
            raise AbortError(
                f"round {round} began {self._attempts} times; expected {masking.ATTEMPTS} at most, "
                "as each is another graph for a server that picks one. Start a new run, and ask "
                "why rounds end."
            )

    def _refuse_strangers(self, terms: masking.MaskingTerms) -> None:
        """Raise AbortError unless all members are sites on this site's own list, itself among
        them.
        """
        post = self.follower.post
        odd = [name for name in terms.members if post.roster[name].role != "site"]
        if odd or post.me.name not in terms.members:
            raise AbortError(
                f"members={some(terms.members)}: "
                + (f"{some(odd)} are no sites" if odd else f"{post.me.name!r} is none of them")
                + "; expected the study's sites. The coordinator may not choose others."
            )

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

    def upload(self, round: int, row_M: Integers) -> bytes:
        """Return nothing;
        raise PlanError for a row that is not whole numbers of the length agreed on.
        """
        if row_M.shape != (self.length,) or row_M.dtype != np.int64:
            raise PlanError(
                f"a row of {row_M.dtype} {row_M.shape}; expected int64 ({self.length},)"
            )
        return b""

    def recall(self) -> tuple[bytes, dict[str, Tensor]] | None:
        """Return None: nothing was answered."""
        return None

    def keep(self, answer: bytes, memory: Mapping[str, Tensor]) -> None:
        """Keep nothing."""

    def answer(self, phase: str, round: int, told: Sequence[str], message: bytes) -> bytes:
        """Refuse: nobody else is there."""
        raise AbortError(f"phase={phase!r} is not played in a rehearsal")
