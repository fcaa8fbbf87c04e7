"""An engine of processes on one machine: every party in one of its own, reached through a pipe.

What a party is given is bytes, and what it is started with: nothing in its memory is anybody
else's.

A question is one message, `op`, a line end, the payload; an answer `+` and the payload, or `-` and
the reason.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait

from medfed.core.checks import AbortError, MedfedError, describe
from medfed.engine.port import Reply

logger = logging.getLogger(__name__)

Handle = Callable[[str, bytes], bytes]
"""A party as others reach it: (op, payload) -> answer."""


def serve(handle: Handle, pipe: Connection) -> None:
    """Answer questions from a `pipe` by `handle` until the other end is closed; none ends it."""
    while True:
        try:
            op, _, payload = pipe.recv_bytes().partition(b"\n")
        except (EOFError, OSError):
            return
        answer = _answer(handle, op.decode(errors="replace"), payload)
        with suppress(OSError):  # its end is closed, which the next question will say
            pipe.send_bytes(answer)


def _answer(handle: Handle, op: str, payload: bytes) -> bytes:
    try:
        return b"+" + handle(op, payload)
    except MedfedError as error:
        return b"-" + str(error).encode()
    except Exception as error:
        logger.error("op %r failed", op, exc_info=error)
        return b"-" + describe(error).encode()


class Pipes:
    """Sites behind pipes, as the coordinator sees them. A site has one question at a time; others
    wait their turn.
    """

    def __init__(self, pipes: Mapping[str, Connection]) -> None:
        self._pipes = dict(pipes)
        self._waiting: dict[str, list[tuple[int, str, bytes]]] = {name: [] for name in pipes}
        self._asked: dict[str, tuple[int, float]] = {}
        self._tickets = 0

    def sites(self) -> list[str]:
        """Return the names of all sites."""
        return list(self._pipes)

    def submit(self, site: str, op: str, payload: bytes, deadline: float) -> int:
        """Ask one site."""
        self._tickets += 1
        self._waiting[site].append((self._tickets, op, payload))
        self._next(site)
        return self._tickets

    def submit_many(
        self, sites: Sequence[str], op: str, payload: bytes, deadline: float
    ) -> list[int]:
        """Ask several sites the same; they work side by side."""
        return [self.submit(site, op, payload, deadline) for site in sites]

    def poll(self, wait_seconds: float) -> list[Reply]:
        """Return the answers that have come, waiting for the first."""
        waiting = {self._pipes[name]: name for name in self._asked}
        replies: list[Reply] = []
        for pipe in wait(list(waiting), wait_seconds):
            assert isinstance(pipe, Connection)
            name = waiting[pipe]
            ticket, began = self._asked.pop(name)
            try:
                answer = pipe.recv_bytes()
            except (EOFError, OSError):
                answer = b"-the site's process has ended"
            seconds = time.monotonic() - began
            good = answer[:1] == b"+"
            error = "" if good else answer[1:].decode()
            replies.append(Reply(ticket, name, answer[1:] if good else b"", seconds, error))
            self._next(name)
        return replies

    def _next(self, site: str) -> None:
        if site in self._asked or not self._waiting[site]:
            return
        ticket, op, payload = self._waiting[site].pop(0)
        self._asked[site] = ticket, time.monotonic()
        with suppress(OSError):  # its end is closed: the answer will say so
            self._pipes[site].send_bytes(op.encode() + b"\n" + payload)


def handler(name: str, pipe: Connection) -> Handle:
    """Return the `handle` of a party that is asked one thing at a time: an aggregator."""

    def handle(op: str, payload: bytes) -> bytes:
        try:
            pipe.send_bytes(op.encode() + b"\n" + payload)
            answer = pipe.recv_bytes()
        except (OSError, EOFError) as error:
            raise AbortError(
                f"{name!r} has stopped; the round ends. Resume the run when it is back."
            ) from error
        if answer[:1] != b"+":
            raise AbortError(answer[1:].decode())
        return answer[1:]

    return handle
