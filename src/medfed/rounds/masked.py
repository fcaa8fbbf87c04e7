"""Rows under masks that cancel:
the coordinator is the server of `secure.masking`, and plays its phases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from medfed.compliance.trail import Trail
from medfed.core import codec
from medfed.core.checks import CodecError, SiteError, naming
from medfed.engine.port import Fleet, Reply, gather, gather_each
from medfed.planning.plan import Plan
from medfed.rounds.way import (
    Asked,
    Questions,
    RoundRows,
    combine_opened,
    enough,
    read,
    record,
    sign,
)
from medfed.secure import masking
from medfed.secure.chain import Publisher
from medfed.secure.identity import Scope


@dataclass(frozen=True)
class Masked:
    """Rows travel under masks; the coordinator learns the sum of those who stay, or nothing."""

    publisher: Publisher
    choose: Callable[[Sequence[str], int], masking.MaskingTerms]
    trail: Trail | None = None

    def open(
        self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes
    ) -> "MaskedExchange":
        """Play the phases before the rows, and ask for those."""
        mine = self.publisher
        server = masking.MaskingServer(
            mine.post, self.choose(clients, number), Scope(mine.study, mine.run, number)
        )
        talk = _Talk(plan, fleet, number)
        with naming(talk.lost), naming(server.refused):
            # Keys: everybody's public keys go to all.
            keys = server.keys(talk.ask("keys", clients, told=clients))

            # Reveal: nonces that a sparse graph follows from, once nobody can change a key.
            if server.terms.sparse:
                keys = server.reveal(talk.ask("reveal", clients, keys))

            # Shares: each client's seeds, in boxes for its neighbours.
            boxes = server.shares(talk.ask("shares", clients, keys))
            talk.ask_each("boxes", boxes)

            # Rows: asked of those who have their boxes.
            ready = [name for name in boxes if name not in talk.lost]
            questions = Questions.ask(fleet, ready, sign(mine, number, payload), talk.deadline)
        return MaskedExchange(plan, number, questions, self, clients, talk, server)


@dataclass
class MaskedExchange(Asked):
    """One masked round, from the rows on."""

    way: Masked
    clients: Sequence[str]  # those drawn; asked for rows are those who have their boxes
    talk: "_Talk"
    server: masking.MaskingServer

    def close(self) -> RoundRows:
        """Sum the masked rows, and have those who stayed lift the masks from the sum."""
        with naming(self.talk.lost), naming(self.server.refused):
            return self._unmask()

    def _unmask(self) -> RoundRows:
        talk = self.talk
        server = self.server
        number = self.number

        # Rows: who survived goes to all.
        replies = self.questions.replies()
        reports, uploads, refused = read(replies, "upload")
        talk.lost |= refused
        sent = {name: codec.as_bytes(upload) for name, upload in uploads.items()}
        survivors = server.rows(sent, self.way.publisher.model)
        came = [name for name in sent if name not in server.refused]
        enough(self.plan, number, came, self.clients, talk.lost | _reasons(server.refused))

        # Confirm: each says which list it was given, and hands its shares out for no other.
        confirmed = server.confirm(talk.ask("confirm", list(uploads), survivors))

        # Unmask: shares of each client's one seed.
        total_M, stayed = server.unmask(talk.ask_each("unmask", confirmed))

        names = [name for name in self.clients if name in stayed]
        why = talk.lost | _reasons(server.refused)
        record(self.way.trail, self.way.publisher, number, sent, total_M, names, why)
        return RoundRows(
            names=names,
            reports=reports,
            replies=replies,
            combined_M=combine_opened(total_M, self.plan, names, number),
            excluded={name: reason for name, reason in why.items() if name not in stayed},
            more_up=sum(talk.up.values()),
            more_down=talk.down,
            phases={**talk.up, "rows": sum(len(reply.payload) for reply in replies.values())},
        )


def _reasons(refused: Mapping[str, CodecError]) -> dict[str, str]:
    return {name: str(error) for name, error in refused.items()}


class _Talk:
    """The coordinator's words with the clients in a masked round: who was lost, and bytes."""

    def __init__(self, plan: Plan, fleet: Fleet, number: int) -> None:
        self.fleet = fleet
        self.number = number
        self.deadline = plan.study.training.deadline
        self.lost: dict[str, str] = {}
        self.up: dict[str, int] = {}
        self.down = 0

    def ask(
        self, phase: str, clients: Sequence[str], message: bytes = b"", told: Sequence[str] = ()
    ) -> dict[str, bytes]:
        """Tell all clients the same; return the answers of those that gave one."""
        payload = self._payload(phase, message, told)
        replies = gather(self.fleet, clients, "phase", payload, self.deadline)
        self.down += len(payload) * len(clients)
        return self._read(phase, replies)

    def ask_each(self, phase: str, messages: Mapping[str, bytes]) -> dict[str, bytes]:
        """Tell each client its own message, all at once; return the answers of those that gave
        one.
        """
        payloads = {name: self._payload(phase, message) for name, message in messages.items()}
        replies = gather_each(self.fleet, "phase", payloads, self.deadline)
        self.down += sum(map(len, payloads.values()))
        return self._read(phase, replies)

    def _payload(self, phase: str, message: bytes, told: Sequence[str] = ()) -> bytes:
        header = {"phase": phase, "round": self.number, "told": list(told)}
        return codec.encode(header, {"message": codec.as_tensor(message)})

    def _read(self, phase: str, replies: Mapping[str, Reply]) -> dict[str, bytes]:
        self.up[phase] = self.up.get(phase, 0) + sum(
            len(reply.payload) for reply in replies.values()
        )

        found: dict[str, bytes] = {}
        for name, reply in replies.items():
            try:
                if reply.error:
                    raise SiteError(reply.error)
                found[name] = codec.as_bytes(codec.decode(reply.payload)[1]["message"])
            except (SiteError, CodecError, KeyError) as error:
                self.lost[name] = str(error)
        return found
