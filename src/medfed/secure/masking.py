"""SecAgg+: one server adds rows mod 2^64 and sees none of them (Bonawitz et al.
2017; Bell et al. 2020).

A client hides its row twice: under a self mask, and under one mask for each neighbour, which the
neighbour subtracts. Masks are streams of seeds, and the seeds are shared out among the neighbours.
Of a client that finishes, they give back the self seed; of one that drops out, the key of its pair
masks; never both.

    phase     a client sends                                   the server sends
    keys      two public keys, commitments                     everybody's keys, to all
    reveal    (sparse graphs) what its graph nonce was         everybody's nonces, to all
    shares    sealed shares of its two seeds                   the boxes for one client, to it
    rows      its masked row                                   who survived, to all
    confirm   that it takes this list and this model           what the others took, to each
    unmask    one share for each neighbour                     -

Why the server learns the sum of all honest survivors or nothing, f members being with it.

Confirmed lists: a client unmasks for a list that more than (n + f) / 2 members confirmed; honest
ones confirm one list a round, so there is one. Pair masks are bound to the model, so that rows of
two models never add up to anything.

Complete graph: 2 t > n + f, so t shares of both seeds of one client would need an honest member
that gave both, and any two honest survivors share a mask that nobody else knows.

Sparse graph: see `graph`. It is drawn from nonces that all members committed to beside their keys.
A client reveals its nonce once, after it was told everybody's keys, and takes no graph unless every
nonce of that broadcast is there. So while a broadcast could still be changed, the nonce of whoever
was to be told it was missing, and nobody could compute the graph that followed: to try keys is to
try blindly. A server that does not like a graph can withhold a nonce: the round is over, with its
keys, and all know it. What it gains is one more graph a try, so that after `ATTEMPTS` of them the
chance is that many times 2^-40, and a client plays no more.

What is kept over rounds, and what is not. Shares travel on lines between clients (`agreements`),
whose keys last for a run. Keys of pair masks are fresh in every attempt, as the key of a client
that drops out is rebuilt: one kept would open its earlier rows. A client verifies the signature of
a neighbour's keys when the neighbour's line is new to it. Later the box that comes over the line
says so: its key follows from the broadcast of all keys, in which each client looks for its own, so
that a box opens only between two that were told the same, and true, keys.

What clients confirm. In a complete graph each sends every other a code over their line, which costs
microseconds where a signature costs a tenth of a millisecond. In a sparse graph each signs, and
verifies a sample of all signatures, which it draws in secret when it has been told them all
(`graph.find_checks`).

Legend: K clients, M numbers of a row, n members, f liars, k neighbours, t shares that rebuild a
seed.
"""

import hmac
import json
import math
import os
import secrets
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import TypeVar

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medfed.core.checks import AbortError, CodecError, EnvelopeError, PlanError, QuorumError, some
from medfed.core.entropy import Integers, Words, expand
from medfed.secure import graph, shares
from medfed.secure.agreements import FORM, Agreements, agree, derive
from medfed.secure.identity import Identity, Post, Roster, Scope, holds
from medfed.secure.record import Record

PHASES = ("keys", "shares", "rows", "confirm", "unmask")
"""The phases of a round, in order."""

SPARSE_PHASES = ("keys", "reveal", "shares", "rows", "confirm", "unmask")
"""Those of a round on a sparse graph."""

ATTEMPTS = 64
"""How often a client begins one round, as each time is another graph to like or dislike."""

EVERYBODY = "*"
"""The recipient of a broadcast: signed once, verified by all."""

_P = 2**255 - 19
_SMALL_ORDER = frozenset({0, 1, _P - 1, _P, _P + 1}) | {
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
}  # Curve25519's points on which everybody agrees (Bernstein, cr.yp.to/ecdh.html#validate)

_T = TypeVar("_T")
_BOX = 2 * shares.SIZE + 16  # a share of either seed and the tag of AES-GCM
_CODE = 16  # bytes of what a client confirms to another
_NONCE = 32


@dataclass(frozen=True)
class MaskingTerms:
    """What all parties know of a masked sum:
    who takes part, the row's length, the graph and the thresholds.

    `quorum` members must answer in every phase, `threshold` (t) shares rebuild a seed, `degree` (k)
    neighbours hold them beside the client itself. In a sparse graph both are means, as `sparse`
    says what each member has; `seed` draws it: see `drawn`.
    """

    members: tuple[str, ...]
    length: int
    quorum: int
    threshold: int
    degree: int
    seed: bytes = b""
    sparse: graph.Sparse | None = None

    def __post_init__(self) -> None:
        n = len(self.members)
        holds = (
            3 <= n < 2**16
            and list(self.members) == sorted(set(self.members))
            and EVERYBODY not in self.members
            and self.length >= 1
            and n / 2 < self.quorum <= n
            and (self.degree == n - 1 if self.sparse is None else 2 <= self.degree < n - 1)
            and (n if self.sparse is None else 2) / 2 < self.threshold <= self.degree + 1
        )
        if not holds:
            raise PlanError(
                f"members={some(self.members)}, length={self.length}, quorum={self.quorum}, "
                f"threshold={self.threshold}, degree={self.degree} are no terms of a masked sum; "
                "take MaskingTerms.choose."
            )

    @classmethod
    def choose(
        cls,
        members: Collection[str],
        length: int,
        dropout: float,
        malicious: int = 0,
        seed: bytes = b"",
        sparse: bool = True,
    ) -> "MaskingTerms":
        """Return the terms under which a share `dropout` of the members may drop out and
        `malicious` may lie.

        The sparsest graph that meets the module's conditions, or all pairs; always all where it is
        not to be `sparse`. Raises PlanError where not even all are enough: 2 t > n + f with t = n -
        drop-outs.
        """
        n = len(members)
        gone = math.floor(round(dropout * n, 9))
        if n < 3 or len(set(members)) != n or EVERYBODY in members or n >= 2**16:
            raise PlanError(
                f"{n} members ({some(members)}); expected 3 to 65535 distinct names. Add a site."
            )
        if length < 1 or not 0 <= dropout < 1 or malicious < 0:
            raise PlanError(
                f"length={length}, dropout={dropout}, malicious={malicious}; expected 1 or more, "
                "0 to 1, >= 0."
            )

        quorum = n - gone
        if 2 * quorum <= n + malicious:
            raise PlanError(
                f"dropout={dropout} and malicious={malicious} with {n} members: {quorum} finish "
                f"for certain; expected more than {(n + malicious) / 2:g}. Allow fewer drop-outs "
                "or add sites."
            )

        names = tuple(sorted(members))
        law = graph.design(n, malicious, gone) if sparse else None
        if law is None:
            return cls(names, length, quorum, quorum, n - 1, seed)
        degree = round(law.edge / graph.WORD * (n - 1))
        return cls(names, length, quorum, law.threshold(degree), degree, seed, law)

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases of a round under these terms."""
        return SPARSE_PHASES if self.sparse else PHASES

    def drawn(self, told: bytes) -> "MaskingTerms":
        """Return the terms with the graph that follows from what all were told: the keys as the
        server broadcast them and, in a sparse graph, the nonces.

        A server that tells them differently has two sets of terms: boxes then do not open, and what
        is confirmed does not fit. Nobody foresees a sparse graph: see the module.
        """
        return replace(self, seed=sha256(self.seed + told).digest())

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Return the neighbours of a member, sorted."""
        if self.sparse is None:
            return tuple(other for other in self.members if other != name)
        near = self.sparse.draw_one(
            sha256(self.seed).digest(), len(self.members), self.number[name] - 1
        )
        return tuple(self.members[at] for at in near.tolist())

    def list_neighbours(self) -> dict[str, tuple[str, ...]]:
        """Return what `neighbours` does of every member."""
        if self.sparse is None:
            return {name: self.neighbours(name) for name in self.members}
        every = self.sparse.draw(sha256(self.seed).digest(), len(self.members))
        return {
            name: tuple(self.members[at] for at in near.tolist())
            for name, near in zip(self.members, every, strict=True)
        }

    def threshold_for(self, neighbours: int) -> int:
        """Return how many shares rebuild a seed of a member with so many neighbours."""
        return self.sparse.threshold(neighbours) if self.sparse else self.threshold

    @cached_property
    def number(self) -> dict[str, int]:
        """The number of each member, from 1: its name in messages and its point for shares."""
        return {name: number for number, name in enumerate(self.members, 1)}

    @cached_property
    def digest(self) -> bytes:
        """The sha256 of all of this: seeds and signatures are bound to it."""
        fields = [
            self.members,
            self.length,
            self.quorum,
            self.threshold,
            self.degree,
            self.seed.hex(),
            self.sparse and astuple(self.sparse),
        ]
        return sha256(json.dumps(fields).encode()).digest()

    def enough(self, phase: str, answered: int, why: object = "") -> None:
        """Raise AbortError unless a quorum answered."""
        if answered < self.quorum:
            raise AbortError(
                (
                    f"masked round, phase {phase}: {answered} of {len(self.members)} answered; "
                    f"expected {self.quorum} or more. Nothing was opened; start the round again. "
                    f"{why}"
                ).rstrip()
            )


class Client:
    """One client in one round. Each phase happens once and in order; one that fails ends the round
    for this client.

    Every phase takes and gives bytes. Raises EnvelopeError and its kinds for bytes that do not
    count, AbortError where too few took part.
    """

    def __init__(
        self,
        post: Post,
        terms: MaskingTerms,
        scope: Scope,
        server: str,
        record: Record | None = None,
        lines: Agreements | None = None,
    ) -> None:
        """Begin the round.

        Args:
            post: its own, whose roster says who the others are.
            terms: what it has worked out for itself.
            scope: study, run and round.
            server: the name of the coordinator.
            record: of what the client has signed before; None: nothing outlasts this object.
            lines: to the others, in this run; None: new ones.
        """
        self._post = post
        self._record = record or Record()
        self._terms = terms
        self._scope = scope
        self._server = server
        self._ear = _ear(post)
        self._name = post.me.name
        # those to come; empty while one is under way, and after one that failed
        self._phases: tuple[str, ...] = terms.phases
        self._lines = lines or Agreements()
        self._pairing = X25519PrivateKey.generate()
        self._seed = os.urandom(32)
        self._nonce = os.urandom(_NONCE)  # for a sparse graph
        self._advertised = b""  # what this client said in phase keys
        self._told = b""  # the broadcast of keys, before the graph is known
        self._near: tuple[str, ...] = ()  # its neighbours, once the graph is known
        self._keys: dict[str, bytes] = {}  # by neighbour: what it advertised
        # by client: my shares of its self seed and of its key, one after the other
        self._held: dict[str, bytes] = {}
        self._survivors: tuple[str, ...] = ()
        self._model = b""
        self._statement = b""

    def keys(self) -> bytes:
        """Advertise the key of its lines, a key to agree on masks with, a commitment to the self
        seed and, for a sparse graph, one to a nonce.
        """
        self._enter("keys")
        body = self._lines.public + self._pairing.public_key().public_bytes_raw()
        body += sha256(self._seed).digest()
        if self._terms.sparse:
            body += sha256(self._nonce).digest()
        self._advertised = self._say("keys", EVERYBODY, body)
        return self._advertised

    def reveal(self, broadcast: bytes) -> bytes:
        """Take the keys of all; tell the nonce that this client committed to.

        Guarantee: what the graph follows from was fixed for this client before anybody knew its
        nonce, which it tells once.
        """
        self._enter("reveal")
        self._told = self._hear_keys(broadcast)
        return self._say("reveal", self._server, self._nonce)

    def share(self, broadcast: bytes) -> bytes:
        """Take the keys of all, in a sparse graph their nonces; return the shares of both seeds,
        sealed to each neighbour that advertised.

        Raises AbortError where a nonce of those with keys is missing: the graph is then unknown.
        """
        self._enter("shares")

        # Whose keys came, and the graph that all of it decides.
        body = self._told or self._hear_keys(broadcast)
        envelopes = _unpack(body, self._terms)
        if self._terms.sparse:
            nonces = self._hear(broadcast, "all-nonces")
            commitments = {name: sent[-64 - _NONCE : -64] for name, sent in envelopes.items()}
            _check_nonces(_unpack(nonces, self._terms, _NONCE), commitments)
            body = sha256(body).digest() + nonces
        self._terms = self._terms.drawn(body)
        self._context = _context(self._scope, self._terms)
        self._near = self._terms.neighbours(self._name)
        for name in self._near:
            if name in envelopes:  # a neighbour that advertised nothing has no part
                self._keys[name] = self._read_keys(name, envelopes[name])
        self._enough("shares", self._keys)

        # Share both seeds among the neighbours and this client.
        holders = sorted([*self._keys, self._name])
        points = [self._terms.number[name] for name in holders]
        halves = shares.split_all(
            [self._seed, self._pairing.private_bytes_raw()], self._threshold, points
        )
        parts = {name: own + pair for name, own, pair in zip(holders, *halves, strict=True)}
        self._held[self._name] = parts.pop(self._name)

        # Seal each part for its holder.
        boxes = {
            name: AESGCM(self._line_key("box", self._name, name)).encrypt(bytes(12), part, None)
            for name, part in parts.items()
        }
        return self._say("shares", self._server, _pack(boxes, self._terms))

    def _hear_keys(self, broadcast: bytes) -> bytes:
        """Return the keys of all as they were broadcast; refuse them unless this client's own are
        among them as it sent them.
        """
        body = self._hear(broadcast, "all-keys")
        if _unpack(body, self._terms).get(self._name) != self._advertised:
            raise EnvelopeError(
                f"the keys told to {self._name!r} are without its own, or with others in their "
                "place. The server or the network is at fault; nothing was shared."
            )
        return body

    def _read_keys(self, name: str, envelope: bytes) -> bytes:
        """Return what a neighbour advertised. Its signature is verified where its line is new; else
        its box will say whether these are its keys.
        """
        size = _size_of_keys(self._terms)
        body = envelope[-64 - size : -64]
        _ = self._post.roster[name]  # refuses who was revoked
        if self._lines.knows(name, body[:32]):
            return _keys(body, size)
        body = _keys(self._ear.unwrap(envelope, self._scope, "keys", name), size)
        self._lines.meet(self._scope.study, self._scope.run, self._name, name, body[:32])
        return body

    def mask(self, payload: bytes, row_M: Integers, model: bytes) -> bytes:
        """Take the boxes for this client;
        return its row (int64 [M]) under the self mask and the pair masks.

        Pair masks follow from the hash of the global `model` that the row was made from: rows made
        from two models leave their masks in the sum, which is then uniform to everybody.
        """
        self._enter("rows")

        # Keep what the others have shared.
        boxes = _unpack(self._post.unwrap(payload, self._scope, "boxes", self._server), self._terms)
        for name, box in boxes.items():
            self._held[name] = self._open_box(name, box)
        self._enough("rows", self._held.keys() - {self._name})
        if row_M.dtype != np.int64 or row_M.shape != (self._terms.length,):
            raise PlanError(
                f"a row {row_M.dtype} {list(row_M.shape)}; expected int64 "
                f"[{self._terms.length}]. Encode it first."
            )

        # Hide the row: under the self mask, and under one mask for each neighbour.
        self._model = model
        masked_M = expand(self._seed, self._terms.length)
        masked_M += row_M.view(np.uint64)
        stream_M = np.empty_like(masked_M)
        me = self._terms.number[self._name]
        for name in sorted(boxes):
            other = self._keys[name][32:64]
            seed = _pair_seed(
                self._pairing, other, me, self._terms.number[name], self._context, model
            )
            _add(masked_M, expand(seed, len(stream_M), out=stream_M), plus=self._name < name)
        return self._say("rows", self._server, masked_M.tobytes())

    def confirm(self, broadcast: bytes) -> bytes:
        """Take the list of survivors; confirm it together with the hash of the global model that
        this client received: to each neighbour by a code over their line, or by a signature.

        Refused where the list leaves this client out, is below the quorum, or names a neighbour
        whose shares never came: that neighbour's mask would be missing from this client's row.

        Guarantee: one list a round, for ever: a round that is played again is confirmed for the
        same survivors or not at all, so that no two sums of it differ by a row; and none once a
        later round was answered.
        """
        self._enter("confirm")
        self._record.refuse_behind(self._scope)

        # Look at the list.
        body = self._hear(broadcast, "survivors")
        self._survivors = tuple(_unpack(body, self._terms))
        self._terms.enough("confirm", len(self._survivors))
        odd = {*self._near, self._name}.intersection(self._survivors) - set(self._held)
        if self._name not in self._survivors or odd:
            raise AbortError(
                f"the list of survivors given to {self._name!r} "
                + (f"adds {some(sorted(odd))}" if odd else "leaves it out")
                + (
                    "; expected this client and those whose shares came. The server or the "
                    "network is at fault; nothing was opened."
                )
            )

        # Confirm it, with the model.
        self._record.commit(
            "list", self._scope, sha256(json.dumps(self._survivors).encode()).digest()
        )
        self._statement = _state(self._terms, body, self._model)
        if self._terms.sparse:
            return self._say("confirm", self._server, self._post.me.sign(_signed(self._statement)))
        codes = {name: self._code(self._name, name) for name in self._keys}
        return self._say("confirm", self._server, _pack(codes, self._terms))

    def _code(self, sender: str, to: str) -> bytes:
        """Return what `sender` tells `to` where it confirms what this client confirms."""
        key = self._line_key("confirm", sender, to)
        return hmac.digest(key, self._statement, "sha256")[:_CODE]

    def unmask(self, payload: bytes) -> bytes:
        """Take what the others confirmed to this client; where a quorum, itself included, took the
        list that it took, return its shares.

        Guarantee: of each client that shared, a share of one seed alone: of its self seed where it
        survived, of its key where it dropped out. Which one follows from the list that was signed,
        and this happens once, so that a server learns the sum of all honest survivors or nothing;
        there is nothing that it could ask for.

        Edge cases:
        - another list of survivors, or another model, at any that is needed for the quorum:
          AbortError, no share; in a sparse graph at any of the sample;
        - asked twice, or out of turn: EnvelopeError, and the round is over for this client;
        - a later round was answered since, by whatever process: RecordError, no share;
        - a client that dropped out before it shared has no seed to give back.
        """
        self._enter("unmask")
        self._record.refuse_behind(self._scope)

        # See that a quorum took the same.
        said = _unpack(
            self._post.unwrap(payload, self._scope, "confirmed", self._server),
            self._terms,
            64 if self._terms.sparse else _CODE,
        )
        told = [name for name in self._survivors if name in said and name != self._name]
        if self._terms.sparse:
            checked = min(self._terms.sparse.checks, len(told))
            others = [
                name
                for name in secrets.SystemRandom().sample(told, checked)
                if not holds(self._post.roster[name].signing, said[name], _signed(self._statement))
            ]
            agreed = 0 if others else len(told) + 1
        else:
            others = [
                name
                for name in told
                if not hmac.compare_digest(said[name], self._code(name, self._name))
            ]
            agreed = len(told) + 1 - len(others)
        why = f"{some(others)} signed another list of survivors or another model." if others else ""
        self._terms.enough("unmask", agreed, why)

        # Give a share of one seed of each.
        size = shares.SIZE
        parts = {
            name: held[:size] if name in self._survivors else held[size:]
            for name, held in sorted(self._held.items())
        }
        self._held.clear()
        return self._say("unmask", self._server, _pack(parts, self._terms))

    def _enter(self, phase: str) -> None:
        if not self._phases or self._phases[0] != phase:
            expected = self._phases[0] if self._phases else "nothing more"
            raise EnvelopeError(
                f"phase={phase} asked of {self._name!r}; expected {expected}. A phase comes "
                "once; start a new round."
            )
        self._phases = ()

    def _say(self, phase: str, to: str, body: bytes) -> bytes:
        phases = self._terms.phases
        self._phases = phases[phases.index(phase) + 1 :]
        return self._post.wrap(self._scope, phase, to, body)

    def _hear(self, broadcast: bytes, kind: str) -> bytes:
        return self._ear.unwrap(broadcast, self._scope, kind, self._server)

    def _enough(self, phase: str, others: Collection[str]) -> None:
        if len(others) + 1 < self._threshold:
            raise AbortError(
                f"masked round, phase {phase}: {len(others)} neighbours of {self._name!r} "
                f"answered; expected {self._threshold - 1} or more. Start the round again."
            )

    @property
    def _threshold(self) -> int:
        return self._terms.threshold_for(len(self._near))

    def _line_key(self, purpose: str, sender: str, to: str) -> bytes:
        """Return the key of one message in this attempt; one of its ends is this client."""
        number = self._terms.number
        about = _about(purpose, self._context, number[sender], number[to])
        return self._lines.key(to if sender == self._name else sender, about)

    def _open_box(self, sender: str, box: bytes) -> bytes:
        if sender not in self._keys:
            raise EnvelopeError(
                f"shares from {sender!r}, no neighbour with keys; expected "
                f"{some(sorted(self._keys))}."
            )
        try:
            key = self._line_key("box", sender, self._name)
            part = AESGCM(key).decrypt(bytes(12), box, None)
        except (InvalidTag, ValueError) as error:
            raise EnvelopeError(
                f"shares from {sender!r} do not open for {self._name!r}; start a new round"
            ) from error
        if len(part) != 2 * shares.SIZE:
            raise EnvelopeError(
                f"shares from {sender!r} of {len(part)} bytes; expected {2 * shares.SIZE}. "
                "Refuse it."
            )
        return part


@dataclass
class MaskingServer:
    """The server's side of one round:
    it takes each phase's envelopes by name and returns what it sends next.

    Phases come once and in order. A message that cannot be read counts as a drop-out, and one false
    share of a seed is found and left out; `refused` says whose and why. Raises AbortError below the
    quorum, and where a seed cannot be rebuilt.
    """

    post: Post
    terms: MaskingTerms
    scope: Scope
    refused: dict[str, CodecError] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._ear = _ear(self.post)
        self._keys: dict[str, bytes] = {}
        self._sharers: set[str] = set()
        self._survivors: set[str] = set()
        self._model = b""
        self._total_M: Words = np.zeros(self.terms.length, np.uint64)
        self._phases: tuple[str, ...] = self.terms.phases

    def keys(self, envelopes: Mapping[str, bytes]) -> bytes:
        """Take the clients' keys; return them all, for all."""
        size = _size_of_keys(self.terms)
        self._keys = self._read(
            "keys", envelopes, self.terms.members, lambda _, body: _keys(body, size)
        )
        self._told = _pack({name: envelopes[name] for name in self._keys}, self.terms)
        if self.terms.sparse is None:
            self._draw(self._told)
        return self.post.wrap(self.scope, "all-keys", EVERYBODY, self._told)

    def reveal(self, envelopes: Mapping[str, bytes]) -> bytes:
        """Take the clients' nonces; return them all, for all.

        Raises AbortError where one is missing, or is not what its client committed to: another
        attempt, with other keys, can do without that client.
        """
        nonces = self._read("reveal", envelopes, self._keys, lambda _, body: body)
        try:
            _check_nonces(nonces, {name: keys[96:] for name, keys in self._keys.items()})
        except AbortError as error:
            raise AbortError(f"{error} Refused: {some(self.refused)}.") from error
        body = _pack(nonces, self.terms)
        self._draw(sha256(self._told).digest() + body)
        return self.post.wrap(self.scope, "all-nonces", EVERYBODY, body)

    def _draw(self, told: bytes) -> None:
        self.terms = self.terms.drawn(told)
        self._near = self.terms.list_neighbours()
        self._context = _context(self.scope, self.terms)

    def shares(self, envelopes: Mapping[str, bytes]) -> dict[str, bytes]:
        """Take the clients' sealed shares; return for each sharer the boxes others sent it."""
        boxes = self._read("shares", envelopes, self._keys, self._boxes)
        self._sharers = set(boxes)
        inboxes = {to: {name: box[to] for name, box in boxes.items() if to in box} for to in boxes}
        return {
            to: self.post.wrap(self.scope, "boxes", to, _pack(inbox, self.terms))
            for to, inbox in inboxes.items()
        }

    def rows(self, envelopes: Mapping[str, bytes], model: bytes) -> bytes:
        """Take the masked rows, made from the global `model` of this hash; return the list of those
        who survived, for all.
        """
        self._model = model
        rows_KM = self._read("rows", envelopes, self._sharers, self._row)
        for row_M in rows_KM.values():
            self._total_M += row_M
        self._survivors = set(rows_KM)
        body = _pack(dict.fromkeys(rows_KM, b""), self.terms)
        self._statement = _state(self.terms, body, model)
        return self.post.wrap(self.scope, "survivors", EVERYBODY, body)

    def confirm(self, envelopes: Mapping[str, bytes]) -> dict[str, bytes]:
        """Take what the clients confirm; return for each of them what the others told it."""
        if self.terms.sparse:
            signatures = self._read("confirm", envelopes, self._survivors, self._signature)
            body = _pack(signatures, self.terms)
            inboxes = dict.fromkeys(signatures, body)
        else:
            codes = self._read(
                "confirm",
                envelopes,
                self._survivors,
                lambda _, body: _unpack(body, self.terms, _CODE),
            )
            inboxes = {
                to: _pack(
                    {name: said[to] for name, said in codes.items() if to in said}, self.terms
                )
                for to in codes
            }
        return {
            to: self.post.wrap(self.scope, "confirmed", to, body) for to, body in inboxes.items()
        }

    def _signature(self, name: str, body: bytes) -> bytes:
        if len(body) != 64 or not holds(
            self.post.roster[name].signing, body, _signed(self._statement)
        ):
            raise EnvelopeError(
                f"{name!r} signed another list of survivors or another model; expected the "
                "round's. Do not count it."
            )
        return body

    def unmask(self, envelopes: Mapping[str, bytes]) -> tuple[Integers, frozenset[str]]:
        """Take the shares; return the sum (int64 [M],
        mod 2^64) of the survivors' rows, and who they are.
        """
        parts = self._read(
            "unmask",
            envelopes,
            self._survivors,
            lambda _, body: _unpack(body, self.terms, shares.SIZE),
        )
        held: dict[str, dict[int, bytes]] = {name: {} for name in self._sharers}
        for holder, part in parts.items():
            for name in part.keys() & held.keys():
                held[name][self.terms.number[holder]] = part[name]
        stream_M = np.empty_like(self._total_M)

        for name in sorted(self._sharers):
            if name in self._survivors:
                seed = self._rebuild(
                    name, held[name], lambda seed: sha256(seed).digest(), slice(64, 96)
                )
                _add(self._total_M, expand(seed, self.terms.length, out=stream_M), plus=False)
            elif linked := self._find_linked(name):
                self._lift(
                    name, linked, self._rebuild(name, held[name], _public, slice(32, 64)), stream_M
                )

        return self._total_M.view(np.int64), frozenset(self._survivors)

    def _find_linked(self, gone: str) -> list[str]:
        """Return the survivors whose rows hold a mask shared
        with a client that dropped out after it shared.
        """
        return [name for name in self._near[gone] if name in self._survivors]

    def _lift(self, gone: str, linked: list[str], secret: bytes, stream_M: Words) -> None:
        key = X25519PrivateKey.from_private_bytes(secret)
        for name in linked:
            other = self._keys[name][32:64]
            number = self.terms.number
            seed = _pair_seed(key, other, number[gone], number[name], self._context, self._model)
            _add(self._total_M, expand(seed, self.terms.length, out=stream_M), plus=gone < name)

    def _rebuild(
        self, name: str, held: Mapping[int, bytes], commit: Callable[[bytes], bytes], where: slice
    ) -> bytes:
        """Return a seed of `name` from its shares, checked against what it advertised;
        one of them may be false.
        """
        advertised = self._keys[name][where]
        t = self.terms.threshold_for(len(self._near[name]))
        for liar in (0, *(sorted(held)[:t] if len(held) > t else ())):  # 0 is nobody
            try:
                used = {point: share for point, share in held.items() if point != liar}
                secret = shares.rebuild(used, t)
            except QuorumError as error:
                raise AbortError(
                    f"masked round, phase unmask, a seed of {name!r}: {error}"
                ) from error
            except CodecError:
                continue

            if hmac.compare_digest(commit(secret), advertised):
                if liar:
                    self.refused[self.terms.members[liar - 1]] = CodecError(
                        f"its share of a seed of {name!r} is false"
                    )
                return secret

        raise AbortError(
            f"masked round, phase unmask: shares of a seed of {name!r} do not fit its "
            "commitment; clients lied, or it did. Nothing was opened; start the round again."
        )

    def _boxes(self, name: str, body: bytes) -> dict[str, bytes]:
        boxes = _unpack(body, self.terms, _BOX)
        expected = self._keys.keys() & set(self._near[name])
        if boxes.keys() != expected:  # a pair mask that only one side adds would never cancel
            raise EnvelopeError(
                f"{name!r} shared with {some(boxes)}; expected {some(sorted(expected))}. Do not "
                "count it."
            )
        return boxes

    def _row(self, _: str, body: bytes) -> Words:
        if len(body) != 8 * self.terms.length:
            raise CodecError(
                f"a masked row of {len(body)} bytes; expected {8 * self.terms.length}. Send all "
                "of it."
            )
        return np.frombuffer(body, "<u8")

    def _read(
        self,
        phase: str,
        envelopes: Mapping[str, bytes],
        allowed: Collection[str],
        decode: Callable[[str, bytes], _T],
    ) -> dict[str, _T]:
        """Return the decoded bodies by sender, of those allowed in this phase; raise AbortError
        below the quorum.
        """
        if self._phases[:1] != (phase,):
            expected = f"phase={self._phases[0]}" if self._phases else "none: the round is over"
            raise AbortError(
                f"phase={phase} of a masked round came to its server; expected {expected}. Begin "
                "it anew."
            )

        self._phases = self._phases[1:]
        post = self._ear if phase == "keys" else self.post
        bodies: dict[str, _T] = {}

        for name in sorted(envelopes.keys() & set(allowed)):
            try:
                bodies[name] = decode(name, post.unwrap(envelopes[name], self.scope, phase, name))
            except CodecError as error:
                self.refused[name] = error

        why = f"Refused: {some(self.refused)}." if self.refused else ""
        self.terms.enough(phase, len(bodies), why)
        return bodies


def run_protocol(
    rows: Mapping[str, Integers],
    terms: MaskingTerms,
    drops: Mapping[str, Collection[str]] | None = None,
) -> tuple[Integers, frozenset[str]]:
    """Play every party of a masked sum in order;
    return the sum (int64 [M]) and the clients that are in it.

    `drops` says who falls silent before which of the terms' phases. Raises AbortError where too few
    are left.
    """
    people = {name: Identity.new(name, "site") for name in terms.members} | {
        "server": Identity.new("server", "coordinator")
    }
    roster = Roster.of(*(person.public for person in people.values()))
    scope = Scope("0" * 64, "run", 1)
    model = b"the global model"
    server = MaskingServer(Post(people["server"], roster), terms, scope)
    clients = {name: Client(Post(people[name], roster), terms, scope, "server") for name in rows}

    def alive(phase: str) -> dict[str, Client]:
        for name in (drops or {}).get(phase, ()):
            clients.pop(name, None)
        return clients

    keys = server.keys({name: client.keys() for name, client in alive("keys").items()})
    if terms.sparse:
        keys = server.reveal({name: one.reveal(keys) for name, one in alive("reveal").items()})
    boxes = server.shares({name: client.share(keys) for name, client in alive("shares").items()})
    survivors = server.rows(
        {
            name: client.mask(boxes[name], rows[name], model)
            for name, client in alive("rows").items()
        },
        model,
    )
    confirmed = server.confirm(
        {name: client.confirm(survivors) for name, client in alive("confirm").items()}
    )
    return server.unmask(
        {name: client.unmask(confirmed[name]) for name, client in alive("unmask").items()}
    )


def _ear(post: Post) -> Post:
    """Return a post that hears broadcasts: what everybody may read, under the same roster."""
    return Post(replace(post.me, name=EVERYBODY), post.roster)


def _size_of_keys(terms: MaskingTerms) -> int:
    """Return the bytes that a client advertises: two keys, a commitment; in a sparse graph two."""
    return 128 if terms.sparse else 96


def _keys(body: bytes, size: int = 96) -> bytes:
    if len(body) != size:
        raise EnvelopeError(
            f"keys of {len(body)} bytes; expected {size}: two keys and commitments. Ask their "
            "sender again."
        )
    for public in (body[:32], body[32:64]):
        if int.from_bytes(public, "little") % 2**255 in _SMALL_ORDER:
            raise EnvelopeError(
                "a public key that is no key; expected a fresh one. Ask its sender again."
            )
    return body


def _check_nonces(nonces: Mapping[str, bytes], commitments: Mapping[str, bytes]) -> None:
    """Raise AbortError unless everybody with keys has told the nonce that was committed to."""
    odd = sorted(
        name
        for name in nonces.keys() | commitments.keys()
        if name not in nonces
        or name not in commitments
        or not hmac.compare_digest(sha256(nonces[name]).digest(), commitments[name])
    )
    if odd:
        raise AbortError(
            f"masked round, phase reveal: nonces of {some(odd)} are missing, or not what was "
            "committed to, so nobody knows the graph. Nothing was shared; start the round again."
        )


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def _context(scope: Scope, terms: MaskingTerms) -> bytes:
    """Return the hash of where a key counts: the round, and all that was agreed on and told."""
    fields = [scope.study, scope.run, scope.round, terms.digest.hex()]
    return sha256(json.dumps(fields).encode()).digest()


def _about(purpose: str, context: bytes, one: int, other: int) -> bytes:
    return purpose.encode() + b" " + context + struct.pack("<HH", one, other)


def _state(terms: MaskingTerms, survivors: bytes, model: bytes) -> bytes:
    """Return what is confirmed: the terms, the list as it was broadcast, and the model."""
    return terms.digest + sha256(survivors).digest() + sha256(model).digest()


def _signed(statement: bytes) -> bytes:
    return FORM + b"confirm " + statement


def _pair_seed(
    key: X25519PrivateKey, public: bytes, one: int, other: int, context: bytes, model: bytes
) -> bytes:
    """Return the seed of the mask that two clients, by number, share in rows of one model, from
    either one's private key.
    """
    about = _about("pair", context, *sorted((one, other)))
    return derive(agree(key, public), FORM + about + sha256(model).digest())


def _add(total_M: Words, stream_M: Words, plus: bool) -> None:
    (np.add if plus else np.subtract)(total_M, stream_M, out=total_M)


def _pack(parts: Mapping[str, bytes], terms: MaskingTerms) -> bytes:
    """Return parts by member as bytes: its number (2 bytes), the length (4) and the part, in the
    members' order.
    """
    records = ((terms.number[name], parts[name]) for name in sorted(parts))
    return b"".join(struct.pack("<HI", number, len(part)) + part for number, part in records)


def _unpack(body: bytes, terms: MaskingTerms, size: int | None = None) -> dict[str, bytes]:
    """Return the parts by member;
    raise EnvelopeError where they are not ordered, whole and of `size` bytes.
    """
    parts: dict[str, bytes] = {}
    at = 0
    last = 0

    while at < len(body):
        if at + 6 > len(body):
            raise EnvelopeError(
                f"a part begins {len(body) - at} bytes before the end; expected 6. Ask its "
                "sender again."
            )
        number, length = struct.unpack_from("<HI", body, at)
        at += 6 + length
        if not last < number <= len(terms.members) or at > len(body) or size not in (None, length):
            raise EnvelopeError(
                f"a part with member={number}, length={length} does not belong here. Ask its "
                "sender again."
            )
        parts[terms.members[number - 1]] = body[at - length : at]
        last = number

    return parts
