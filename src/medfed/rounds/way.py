"""A way for rows to come together:
open a round, add each reply as it arrives, close with what they came to.

A round asks its way and knows no more of it. Whatever arrives is handed on, also what was asked for
earlier: a way may take it or leave it, so one that does not wait for all of a round's clients is
one more file beside these.

K clients, M numbers in a row.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from medfed.compliance.trail import Trail
from medfed.core import codec, files
from medfed.core.checks import CodecError, QuorumError, SiteError, reasons
from medfed.core.entropy import Integers
from medfed.engine.port import Fleet, Reply
from medfed.planning.plan import Plan
from medfed.planning.terms import scales
from medfed.secure import three_party
from medfed.secure.chain import Publisher


@dataclass(frozen=True)
class RoundRows:
    """What a cohort's work came to."""

    names: list[str]  # whose rows count
    reports: Mapping[str, Mapping[str, Any]]
    replies: Mapping[str, Reply]
    combined_M: Tensor  # through the servers' halves of the links
    excluded: Mapping[str, str]  # why the others' rows do not
    more_up: int = 0  # bytes beyond the question and the replies
    more_down: int = 0
    phases: Mapping[str, int] = field(default_factory=dict)  # bytes of each phase
    weights: Mapping[str, float] = field(default_factory=dict)  # that a rule gave, by name
    gram_KK: Tensor | None = None  # that it read, in the order of `names`
    gram_noise: float = 0.0  # standard deviation of the noise on each entry


class Exchange(Protocol):
    """One round of a way, while it is open."""

    @property
    def waits(self) -> bool:
        """Whether replies are still waited for."""
        ...

    def add(self, reply: Reply) -> None:
        """Take in a reply; one that this round did not ask for is left."""
        ...

    def close(self) -> RoundRows:
        """Combine the rows that count; who has not replied has sent none.

        Raises QuorumError where they are fewer than training.quorum asks for, AbortError where a
        protocol ends.
        """
        ...


class Way(Protocol):
    """One way for rows to come together; it may remember what it likes from round to round."""

    @property
    def trail(self) -> Trail | None:
        """Where it records what it opens; None where nothing is."""
        ...

    def open(
        self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes
    ) -> Exchange:
        """Begin a round: have the clients work on its question.

        Args:
            plan: the run's.
            fleet: the sites, by which it asks.
            clients: those drawn, by name.
            number: the round's, from 1.
            payload: the question of the round, as `round.ask_of` lays it out.
        """
        ...


def collect(
    way: Way, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes
) -> RoundRows:
    """Play a whole round of a way: add what arrives within training.deadline, then close.

    Raises what opening and closing raise.

    Args:
        way: how rows come together.
        plan: the run's.
        fleet: the sites, by which it asks.
        clients: those drawn, by name.
        number: the round's, from 1.
        payload: the question of the round, as `round.ask_of` lays it out.
    """
    exchange = way.open(plan, fleet, clients, number, payload)
    end = time.monotonic() + plan.study.training.deadline
    while exchange.waits and (left := end - time.monotonic()) > 0:
        for reply in fleet.poll(left):
            exchange.add(reply)
    return exchange.close()


@dataclass
class Questions:
    """A question to several clients, and the replies that have come."""

    clients: Sequence[str]
    deadline: float
    tickets: dict[int, str]
    came: dict[str, Reply] = field(default_factory=dict)

    @classmethod
    def ask(
        cls, fleet: Fleet, clients: Sequence[str], payload: bytes, deadline: float
    ) -> "Questions":
        """Ask all `clients` of a `fleet` for their work on `payload`, within `deadline` seconds."""
        tickets = fleet.submit_many(clients, "work", payload, deadline)
        return cls(clients, deadline, dict(zip(tickets, clients, strict=True)))

    def add(self, reply: Reply) -> None:
        """Take in a reply to this question."""
        name = self.tickets.pop(reply.ticket, None)
        if name is not None:
            self.came[name] = reply

    def replies(self) -> dict[str, Reply]:
        """Return all replies in the order of the clients; an error for who is late."""
        late = f"no answer within {self.deadline:g} s"
        missing = {
            name: Reply(ticket, name, b"", self.deadline, late)
            for ticket, name in self.tickets.items()
        }
        return {
            name: self.came[name] if name in self.came else missing[name] for name in self.clients
        }


@dataclass
class Asked:
    """What every exchange is that waits for all whom it has asked."""

    plan: Plan
    number: int
    questions: Questions

    @property
    def waits(self) -> bool:
        """Whether a client that was asked has not replied."""
        return bool(self.questions.tickets)

    def add(self, reply: Reply) -> None:
        """Keep a reply; what it holds is read when the exchange closes."""
        self.questions.add(reply)


Reports = dict[str, dict[str, Any]]
"""What each site tells beside its row."""


def read(
    replies: Mapping[str, Reply], tensor: str
) -> tuple[Reports, dict[str, Tensor], dict[str, str]]:
    """Return reports, the tensor of each reply, and the reasons of those without one; all by site.

    Args:
        replies: what came, by site.
        tensor: the name of the tensor that is read.
    """
    reports: Reports = {}
    tensors: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}

    for name, reply in replies.items():
        try:
            if reply.error:
                raise SiteError(reply.error)
            reports[name], found = codec.decode(reply.payload)
            tensors[name] = found[tensor]
        except SiteError as error:
            reasons[name] = str(error)
        except (CodecError, KeyError) as error:
            reasons[name] = f"its reply cannot be read: {error}"

    return reports, tensors, reasons


def enough(
    plan: Plan,
    number: int,
    rows: Sequence[str] | Mapping[str, object],
    clients: Sequence[str],
    why: Mapping[str, str],
) -> None:
    """Raise QuorumError unless rows of enough of the drawn clients count.

    Args:
        plan: the run's; its quorum decides.
        number: the round's, from 1.
        rows: the names of those whose rows count.
        clients: those drawn.
        why: the reasons of those whose rows do not, by name.
    """
    if len(rows) < plan.quorum(len(clients)):
        quorum = plan.study.training.quorum
        answered = (
            f"round {number}: {len(rows)} of {len(clients)} sites answered, "
            f"training.quorum={quorum:g}."
        )
        raise QuorumError(f"{answered} {reasons(why)}", why)


def sign(publisher: Publisher, number: int, payload: bytes) -> bytes:
    """Return a round's question as the coordinator signs it:
    `payload` in round `number` by `publisher`.
    """
    return codec.encode(
        {"round": number}, {"signed": codec.as_tensor(publisher.sign(number, payload))}
    )


def combine_opened(total_M: Integers, plan: Plan, names: Sequence[str], number: int) -> Tensor:
    """Return the servers' halves of an opened sum; without joint noise, of its mean.

    Args:
        total_M: the sum of rows as sent, in steps of the grid or of fixed point.
        plan: the run's.
        names: those whose rows are in the sum.
        number: the round's, from 1.
    """
    combined_M = torch.from_numpy(total_M)
    if plan.rule and plan.joint:  # a mean of means, as the sum that `round` expects
        size = scales(plan)
        largest = max(size[name] for name in names)
        combined_M = combined_M.double() * (
            largest / three_party.WEIGHT * sum(1 / size[name] for name in names)
        )
    elif plan.rule:
        combined_M = combined_M.double() / three_party.WEIGHT
    elif not plan.joint:
        combined_M = combined_M.double() / sum(plan.weight(name) for name in names)

    for link in reversed(plan.links):
        combined_M = link.server(combined_M, number)
    return combined_M


OPENED = "opened sum"
GIVEN_UP = "given up"
"""What a trail's line says of a round."""


def record(
    trail: Trail | None,
    publisher: Publisher,
    number: int,
    sent: Mapping[str, bytes],
    total_M: Integers,
    names: Sequence[str],
    excluded: Mapping[str, str],
) -> None:
    """Write into the trail what was opened.

    Hashes of the model that was sent and the one before it, of all uploads and of the sum; who is
    in it, who is not and why.

    Args:
        trail: the run's; None: nothing is written.
        publisher: who signs for the coordinator.
        number: the round's, from 1.
        sent: each upload, by site.
        total_M: the opened sum.
        names: those whose rows are in it.
        excluded: the reasons of the others, by name.
    """
    if not trail:
        return
    uploads = {name: sha256(upload).hexdigest() for name, upload in sent.items()}

    facts = {
        "round": number,
        "accepted": list(names),
        "excluded": dict(excluded),
        "uploads": uploads,
    }
    facts |= {"model": publisher.model.hex(), "previous": publisher.previous.hex()}
    trail.append(OPENED, {**facts, "sum": sha256(total_M.tobytes()).hexdigest()})


def record_given_up(
    trail: Trail | None, publisher: Publisher, number: int, payload: bytes, facts: Mapping[str, Any]
) -> None:
    """Go on after a round that was given up: the next model follows its question, which sites may
    have taken. Write into the trail that it was given up, where it does not say so yet.

    Args:
        trail: the run's; None: nothing is written.
        publisher: who signs for the coordinator.
        number: the round's, from 1.
        payload: its question.
        facts: who decided it, and why.
    """
    publisher.sign(number, payload)
    if not trail or (number, GIVEN_UP) in read_rounds(trail.path):
        return
    chain = {"model": publisher.model.hex(), "previous": publisher.previous.hex()}
    trail.append(GIVEN_UP, {"round": number, **facts, **chain})


def read_rounds(path: Path) -> dict[tuple[int, str], Mapping[str, Any]]:
    """Return what the whole lines of a coordinator's own trail tell of rounds, unverified: the last
    facts by round and kind.
    """
    if not path.exists():
        return {}
    with files.explained(path):
        lines = path.read_bytes().split(b"\n")[:-1]
    marks = [f'"kind": "{kind}"'.encode() for kind in (OPENED, GIVEN_UP)]
    return tell_rounds(json.loads(line) for line in lines if any(mark in line for mark in marks))


def tell_rounds(entries: Iterable[Mapping[str, Any]]) -> dict[tuple[int, str], Mapping[str, Any]]:
    """Return what lines of a trail tell of rounds: the last facts by round and kind."""
    return {
        (one["facts"]["round"], one["kind"]): one["facts"]
        for one in entries
        if one["kind"] in (OPENED, GIVEN_UP)
    }
