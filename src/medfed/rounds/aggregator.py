"""What runs at an aggregator:
its own keys, the study as it has it, and its side of the three-party protocol.

It is reached through `handle(op, payload)`, bytes in and bytes out, as a site is. "identify" tells
its public keys, "join" makes it a party of one run; the rest is `secure.three_party`.
"""

import logging
from typing import Any

from medfed.compliance import consortium
from medfed.core import codec
from medfed.core.checks import AbortError, CodecError, MedfedError, describe
from medfed.planning.joining import Joining
from medfed.planning.resolved import resolve
from medfed.planning.terms import aggregator_of
from medfed.secure import three_party
from medfed.secure.chain import agree
from medfed.secure.identity import Identity, Post
from medfed.study import Study

logger = logging.getLogger(__name__)


class Aggregator:
    """One aggregator's node. Bounds, weights and noise are its own study's, never a message's."""

    def __init__(self, name: str, study: Study) -> None:
        """Set up the node; its keys are loaded, or made, when it is first asked who it is."""
        self.name = name
        self.study = study
        self.record = consortium.record_of(study, name)
        self._identity: Identity | None = None
        self._side: three_party.SharingAggregator | None = None

    def handle(self, op: str, payload: bytes) -> bytes:
        """Do what is asked; raises AbortError, or another MedfedError, with its own name and the
        reason.
        """
        try:
            match op:
                case "identify":
                    return codec.encode({"public": consortium.to_json(self.identity.public)})
                case "join":
                    return self._join(codec.decode(payload)[0])
            if self._side is None:
                raise AbortError(
                    f"aggregator {self.name!r} has joined no run; the coordinator must ask it to "
                    "first"
                )
            return self._side.handle(op, payload)
        except MedfedError as error:
            if repr(self.name) in str(error):
                raise
            excluded = error.excluded if isinstance(error, AbortError) else None
            raise AbortError(f"{self.name!r} refuses {op!r}: {error}", excluded) from error
        except Exception as error:
            logger.error("op %r failed at aggregator %r", op, self.name, exc_info=error)
            raise AbortError(
                f"op {op!r} failed at aggregator {self.name!r}: {describe(error)}; what it says is "
                "in its own log"
            ) from error

    @property
    def identity(self) -> Identity:
        """Its own keys."""
        if self._identity is None:
            self._identity = consortium.own_keys(self.study, self.name, "aggregator")
        return self._identity

    def _join(self, told: dict[str, Any]) -> bytes:
        """Join a run: work out terms from the own study, and answer with a signature under it.

        Sizes without a claim are the sites' to know: each seals what it takes for agreed in with
        its shares, and rows of those who take something else do not count.
        """
        joining = Joining.read(told, consortium.members_of(self.study, [self.name]))
        sizes, participants, parameters = _read_facts(told)
        facts = resolve(self.study, sizes, participants, parameters, told.get("encoding", ""))
        joining.refuse_others(facts)
        joining.commit(self.record, facts)
        post = Post(self.identity, joining.roster)
        self._side = aggregator_of(facts, post, joining.run, self.record)
        agreed = bytes.fromhex(facts.digest)
        signed = agree(post, self.study.digest(), joining.run, agreed)
        return codec.encode({}, {"signed": codec.as_tensor(signed)})


def _read_facts(told: dict[str, Any]) -> tuple[dict[str, dict[str, int]], list[str], int]:
    """Return sizes, participants and the number of parameters, as told; raise CodecError for what
    is none.
    """
    sizes = told.get("sizes")
    names = told.get("participants")
    parameters = told.get("parameters")
    read = (
        isinstance(sizes, dict)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and sorted(sizes) == sorted(set(names))
        and len(names) == len(sizes)
        and all(
            isinstance(rows, dict) and type(rows.get("train")) is int and 0 <= rows["train"] < 2**53
            for rows in sizes.values()
        )
        and isinstance(told.get("encoding", ""), str)
        and type(parameters) is int
        and 1 <= parameters < 2**40
    )
    if not read:
        raise CodecError(
            "sizes, participants and parameters that are none; expected training rows of each "
            "participant, and a number. Run the same medfed everywhere."
        )
    assert isinstance(sizes, dict) and isinstance(names, list) and isinstance(parameters, int)
    return sizes, names, parameters
