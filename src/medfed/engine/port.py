"""The port: all that round logic knows of an engine. Payloads are bytes.

Errors and missed deadlines are replies too, and so is what cannot be read.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from medfed.core import codec
from medfed.core.checks import CodecError, SiteError


@dataclass(frozen=True)
class Reply:
    """A site's answer to a ticket: a payload, or the reason why there is none."""

    ticket: int
    site: str
    payload: bytes
    seconds: float
    error: str = ""


class Node(Protocol):
    """The one entry at the client."""

    name: str

    def handle(self, op: str, payload: bytes) -> bytes:
        """Do what is asked and return the answer;
        raise SiteError with a reason that names no patient.
        """
        ...


class Fleet(Protocol):
    """The engine as the coordinator sees it."""

    def sites(self) -> list[str]:
        """Return the names of the sites that can be asked now."""
        ...

    def submit(self, site: str, op: str, payload: bytes, deadline: float) -> int:
        """Ask one site; never blocks. Returns the ticket that its reply will carry."""
        ...

    def submit_many(
        self, sites: Sequence[str], op: str, payload: bytes, deadline: float
    ) -> list[int]:
        """Ask several sites the same; an engine may serve them as one stack."""
        ...

    def poll(self, wait: float) -> list[Reply]:
        """Return replies in the order in which they arrived,
        waiting at most `wait` seconds for the first.
        """
        ...


class Counted:
    """A fleet that counts the bytes that pass."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.bytes_up = 0
        self.bytes_down = 0

    def sites(self) -> list[str]:
        """Return the fleet's sites."""
        return self.fleet.sites()

    def submit(self, site: str, op: str, payload: bytes, deadline: float) -> int:
        """Count and ask."""
        return self.submit_many([site], op, payload, deadline)[0]

    def submit_many(
        self, sites: Sequence[str], op: str, payload: bytes, deadline: float
    ) -> list[int]:
        """Count and ask."""
        self.bytes_down += len(payload) * len(sites)
        return self.fleet.submit_many(sites, op, payload, deadline)

    def poll(self, wait: float) -> list[Reply]:
        """Count what has arrived."""
        replies = self.fleet.poll(wait)
        self.bytes_up += sum(len(reply.payload) for reply in replies)
        return replies


class Without:
    """A fleet as it is without some of its sites: what those are asked is answered at once, by why
    they are away.
    """

    def __init__(self, fleet: Fleet, away: Mapping[str, str]) -> None:
        """Set up the fleet without those that are `away`, by name and reason."""
        self.fleet = fleet
        self.away = dict(away)
        self._replies: list[Reply] = []
        self._tickets = 0

    def sites(self) -> list[str]:
        """Return the fleet's sites that are not away."""
        return [name for name in self.fleet.sites() if name not in self.away]

    def submit(self, site: str, op: str, payload: bytes, deadline: float) -> int:
        """Ask one site."""
        return self.submit_many([site], op, payload, deadline)[0]

    def submit_many(
        self, sites: Sequence[str], op: str, payload: bytes, deadline: float
    ) -> list[int]:
        """Ask those who are there; tickets of the others are below zero."""
        there = [name for name in sites if name not in self.away]
        asked = iter(self.fleet.submit_many(there, op, payload, deadline) if there else ())
        return [self._refuse(name) if name in self.away else next(asked) for name in sites]

    def _refuse(self, site: str) -> int:
        self._tickets -= 1
        self._replies.append(Reply(self._tickets, site, b"", 0.0, self.away[site]))
        return self._tickets

    def poll(self, wait: float) -> list[Reply]:
        """Return what has been answered for those who are away, else what arrives."""
        if self._replies:
            replies = self._replies
            self._replies = []
            return replies
        return self.fleet.poll(wait)


def gather(
    fleet: Fleet, sites: Sequence[str], op: str, payload: bytes, deadline: float
) -> dict[str, Reply]:
    """Ask the sites and wait for all of them, or until the deadline;
    a site that is late gets an error reply.

    The answers are in the order of `sites`.
    """
    began = time.monotonic()
    tickets = fleet.submit_many(sites, op, payload, deadline)
    return _wait(fleet, dict(zip(tickets, sites, strict=True)), began, deadline)


def gather_each(
    fleet: Fleet, op: str, payloads: Mapping[str, bytes], deadline: float
) -> dict[str, Reply]:
    """Ask each site its own question, all at once, and wait as `gather` does."""
    began = time.monotonic()
    tickets = {
        fleet.submit(site, op, payload, deadline): site for site, payload in payloads.items()
    }
    return _wait(fleet, tickets, began, deadline)


def _wait(
    fleet: Fleet, tickets: Mapping[int, str], began: float, deadline: float
) -> dict[str, Reply]:
    """Return the reply to each ticket, by site in the order of the tickets."""
    open_tickets = dict(tickets)
    replies: dict[str, Reply] = {}
    while open_tickets and (left := deadline - (time.monotonic() - began)) > 0:
        for reply in fleet.poll(left):
            site = open_tickets.pop(reply.ticket, None)
            if site is not None:
                replies[site] = reply
    for ticket, site in open_tickets.items():
        replies[site] = Reply(ticket, site, b"", deadline, f"no answer within {deadline:g} s")
    return {site: replies[site] for site in tickets.values()}


T = TypeVar("T")


def heard(
    replies: Mapping[str, Reply], read: Callable[[Mapping[str, Tensor]], T]
) -> tuple[dict[str, T], dict[str, str]]:
    """Return what each site told, as `read` takes it, and of the others why it cannot be taken."""
    told: dict[str, T] = {}
    untold: dict[str, str] = {}
    for name, reply in replies.items():
        try:
            if reply.error:
                raise SiteError(reply.error)
            told[name] = read(codec.decode(reply.payload)[1])
        except (SiteError, CodecError) as error:
            untold[name] = str(error)
        except KeyError as error:
            untold[name] = f"its answer lacks {error}"
    return told, untold


def numbers(told: Tensor, *shape: int) -> np.ndarray:
    """Return a site's numbers as float64; raise SiteError unless finite and of this shape."""
    if tuple(told.shape) != shape or not torch.isfinite(told.double()).all():
        raise SiteError(
            f"its answer is of shape {tuple(told.shape)}, or not finite; expected {shape} finite "
            "numbers"
        )
    return told.double().numpy()
