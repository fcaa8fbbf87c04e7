"""Global models that a coordinator signs and chains, and sites that take no others.

Each round's message to the sites is one signed envelope for everybody. Its body is the hash of the
message before and the message itself: a site that saw the round before finds out where the two do
not follow each other.
"""

from dataclasses import dataclass
from hashlib import sha256

from medfed.core.checks import EnvelopeError
from medfed.secure.identity import ANYBODY, Post, Scope

FIRST = bytes(32)
"""What the first message of a run, or of a resumed one, says of the message before."""


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


@dataclass
class Follower:
    """A site's side: the study that it agreed to, and the last message that it took."""

    post: Post
    study: str
    run: str
    coordinator: str
    round: int = 0
    model: bytes = FIRST
    _previous: bytes = FIRST
    _envelope: bytes = b""

    def agree(self) -> bytes:
        """Return the site's signature under the study as it has it, before the first round."""
        return self.post.wrap(Scope(self.study, self.run, 0), "study", ANYBODY, b"")

    def accept(self, round: int, envelope: bytes) -> bytes:
        """Return the message of a round's envelope; the same one may come again.

        Raises EnvelopeError where it is of another study, run or round, of a round before, a second
        one of this round, or does not follow the message before; SignatureError where the
        coordinator did not sign it.

        Guarantee: this site takes one model a round, and of two rounds in a row none that does not
        follow the other. So a coordinator that shows sites different models has signed both, and
        they can show it.

        Edge cases:
        - the same envelope again gives the same message, as a repeated question needs;
        - a site that missed rounds takes the next that it sees, as it cannot tell what lay between;
        - the first message, of a run or of a resumed one, follows nothing that this site knows;
        - two sites that are shown different models do not see it by themselves: under masks they
          compare.
        """
        digest = sha256(envelope).digest()
        if digest != self._envelope:
            scope = Scope(self.study, self.run, round)
            body = self.post.unwrap(envelope, scope, "model", self.coordinator, ANYBODY)
            self._check(round, body)
            self.round = round
            self._previous = body[:32]
            self.model = sha256(body[32:]).digest()
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
