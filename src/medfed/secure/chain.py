"""Global models that a coordinator signs and chains, and sites that take no others.

Each round's message to the sites is one signed envelope for everybody. Its body is the hash of the
message before and the message itself: a site that saw the round before finds out where the two do
not follow each other.
"""

from dataclasses import dataclass, field
from hashlib import sha256

from medfed.core.checks import EnvelopeError
from medfed.secure.identity import ANYBODY, Post, Scope
from medfed.secure.record import Record

FIRST = bytes(32)
"""What the first message of a run says of the message before."""


@dataclass
class Publisher:
    """The coordinator's side: it signs what it sends, each with the hash of what it sent before."""

    post: Post
    study: str
    run: str
    previous: bytes = FIRST
    model: bytes = FIRST

    def sign(self, round: int, message: bytes) -> bytes:
        """Return the envelope of a round's message."""
        self.previous = self.model
        self.model = sha256(message).digest()
        return self.post.wrap(
            Scope(self.study, self.run, round), "model", ANYBODY, self.previous + message
        )


def agree(post: Post, study: str, run: str, facts: bytes) -> bytes:
    """Return a party's signature, before the first round of a run, under the study as it has it and
    the hash of what it takes for agreed.
    """
    return post.wrap(Scope(study, run, 0), "study", ANYBODY, facts)


@dataclass
class Follower:
    """A site's side: the study that it agreed to, and the last message that it took.

    `record` is what the site has done, in this run and others; it outlasts a restart where the
    site's keys do.
    """

    post: Post
    study: str
    run: str
    coordinator: str
    record: Record = field(default_factory=Record)
    facts: bytes = b""  # a hash of what the site takes for agreed
    round: int = field(init=False)
    model: bytes = field(init=False)
    _envelope: bytes = b""

    def __post_init__(self) -> None:
        self.round, model = self.record.last("model", self.study, self.run)
        self.model = model or FIRST

    @property
    def scope(self) -> Scope:
        """Where messages of the round count whose model this site has taken."""
        return Scope(self.study, self.run, self.round)

    def agree(self) -> bytes:
        """Return the site's signature under the study as it has it, and under what it takes for
        agreed, before the first round.
        """
        return agree(self.post, self.study, self.run, self.facts)

    def accept(self, round: int, envelope: bytes) -> bytes:
        """Return the message of a round's envelope; the same one may come again.

        Raises EnvelopeError where it is of another study, run or round, of a round before, a second
        one of this round, or does not follow the message before; SignatureError where the
        coordinator did not sign it.

        Guarantee: this site takes one model a round, never a round before the last, and of two
        rounds in a row none that does not follow the other; so after a restart too, as far as its
        record reaches. So a coordinator that shows sites different models has signed both, and
        they can show it.

        Edge cases:
        - the same message again is accepted, as a repeated question needs;
        - a site that missed rounds takes the next that it sees, as it cannot tell what lay between;
        - two sites that are shown different models do not see it by themselves: their rows do not
          add up, as masks and shares are bound to the model.
        """
        digest = sha256(envelope).digest()
        if digest != self._envelope:
            scope = Scope(self.study, self.run, round)
            body = self.post.unwrap(envelope, scope, "model", self.coordinator, ANYBODY)
            self._check(round, body)
            model = sha256(body[32:]).digest()
            self.record.commit("model", scope, model)
            self.round = round
            self.model = model
            self._envelope = digest
            return body[32:]

        return self.post.body(envelope)[32:]

    def _check(self, round: int, body: bytes) -> None:
        if len(body) < 32:
            raise EnvelopeError(
                f"round {round}: a model of {len(body)} bytes; expected 32 and more. Ask again."
            )
        if round < self.round or (round == self.round and sha256(body[32:]).digest() != self.model):
            raise EnvelopeError(
                f"round={round}: {self.post.me.name!r} has taken another model of round "
                f"{self.round}; the coordinator may not send two"
            )
        if round == self.round + 1 and self.round and body[:32] != self.model:
            raise EnvelopeError(
                f"round={round}: its model says that it follows {body[:32].hex()[:16]}..., but "
                f"round {self.round} had {self.model.hex()[:16]}...; the coordinator shows sites "
                "different models, or lost its place"
            )
