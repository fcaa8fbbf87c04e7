"""SecAgg+: one server adds rows mod 2^64 and sees none of them (Bonawitz et al.
2017; Bell et al. 2020).

A client hides its row twice: under a self mask, and under one mask for each neighbour, which the
neighbour subtracts. Masks are streams of seeds, and the seeds are shared out among the neighbours.
Of a client that finishes, they give back the self seed; of one that drops out, the key of its pair
masks; never both.

    phase     a client sends                                   the server sends
    keys      two fresh public keys, a commitment              everybody's keys, to all
    shares    sealed shares of its two seeds                   the boxes for one client, to it
    rows      its masked row                                   who survived, to all
    confirm   its signature of that list and of the model      the signatures, to all
    unmask    one share for each neighbour                     -

Why the server learns the sum of all honest survivors or nothing. Confirmed lists: a client unmasks
for a list that more than (n + f) / 2 members signed; honest ones sign one list a round, so there is
one. Pair masks are bound to the model, so that rows of two models never add up to anything.
Complete graph: 2 t > n + f, so t shares of both seeds of one client would need an honest member
that gave both. Ring of k neighbours in random order, at most X of them liars: t > k / 2 + 1 + X. A
survivor can be unmasked only by t holders (itself included) on the list, so one on each side of it
is honest: each honest survivor shares a mask with the next, whoever the server says dropped. A
hypergeometric tail and a union bound over the clients give X, with probability 1 - 2^-40, where the
liars were there before the order was drawn; drop-outs that nobody chose are bounded in the same
way.

Legend: K clients, M numbers of a row, n members, f liars, k neighbours, t shares that rebuild a
seed.
"""

import hmac
import json
import math
import os
import struct
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from typing import TypeVar

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medfed.core.checks import AbortError, CodecError, EnvelopeError, PlanError, QuorumError, some
from medfed.core.entropy import Integers, Words, expand
from medfed.secure import shares
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.record import Record

PHASES = ("keys", "shares", "rows", "confirm", "unmask")
"""The phases of a round, in order."""

EVERYBODY = "*"
"""The recipient of a broadcast: signed once, verified by all."""

SMALL = 32
"""Up to so many members, everybody is everybody's neighbour."""

FAILURE = 2.0**-40
"""The probability that a drawn graph is allowed to fail with."""

_P = 2**255 - 19
_SMALL_ORDER = frozenset({0, 1, _P - 1, _P, _P + 1}) | {
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
}  # Curve25519's points on which everybody agrees (Bernstein, cr.yp.to/ecdh.html#validate)

_T = TypeVar("_T")
_BOX = 2 * shares.SIZE + 16  # a share of either seed and the tag of AES-GCM


@dataclass(frozen=True)
class MaskingTerms:
    """What all parties know of a masked sum:
    who takes part, the row's length, the graph and the thresholds.

    `quorum` members must answer in every phase, `threshold` (t) shares rebuild a seed, `degree` (k)
    neighbours hold them beside the client itself. `seed` orders the ring: see `drawn`.
    """

    members: tuple[str, ...]
    length: int
    quorum: int
    threshold: int
    degree: int
    seed: bytes = b""

    def __post_init__(self) -> None:
        n = len(self.members)
        holds = (
            3 <= n < 2**16
            and list(self.members) == sorted(set(self.members))
            and EVERYBODY not in self.members
            and self.length >= 1
            and n / 2 < self.quorum <= n
            and (self.degree == n - 1 or (self.degree < n - 1 and self.degree % 2 == 0))
            and (n if self.degree == n - 1 else self.degree + 2) / 2
            < self.threshold
            <= self.degree + 1
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
    ) -> "MaskingTerms":
        """Return the terms under which a share `dropout` of the members may drop out and
        `malicious` may lie.

        The least even number of neighbours that meets the module's conditions, or all of them.
        Raises PlanError where not even all are enough: 2 t > n + f with t = n - drop-outs.
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
        for degree in range(2, n - 1, 2) if n > SMALL else ():
            liars, lost = (_most(n - 1, count, degree, FAILURE / n) for count in (malicious, gone))
            threshold = degree // 2 + 2 + liars
            if degree - lost >= threshold:
                return cls(names, length, quorum, threshold, degree, seed)

        return cls(names, length, quorum, quorum, n - 1, seed)

    def drawn(self, keys: bytes) -> "MaskingTerms":
        """Return the terms with the ring in the order that the keys of all decide, as the server
        broadcast them.

        So nobody picks it: the server does not know the keys of honest members before, and one that
        tells them differently has two sets of terms, whose signatures do not fit. Who advertises
        last can try keys, an order each.
        """
        return replace(self, seed=sha256(self.seed + keys).digest())

    def neighbours(self, name: str) -> tuple[str, ...]:
        """Return the k neighbours of a member, sorted."""
        if self.degree == len(self.members) - 1:
            return tuple(other for other in self.members if other != name)
        at = self._ring.index(name)
        n = len(self.members)
        half = self.degree // 2
        return tuple(sorted(self._ring[(at + step) % n] for step in range(-half, half + 1) if step))

    def holders(self, name: str) -> tuple[str, ...]:
        """Return who holds shares of a member's seeds: its neighbours and itself, sorted."""
        return tuple(sorted((*self.neighbours(name), name)))

    @cached_property
    def _ring(self) -> tuple[str, ...]:
        return tuple(
            sorted(self.members, key=lambda name: sha256(self.seed + b"/" + name.encode()).digest())
        )

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


def _most(others: int, bad: int, drawn: int, failure: float) -> int:
    """Return the least x with P[more than x of `drawn` are among the `bad`] <= failure, drawn
    without replacement.
    """
    whole = math.comb(others, drawn)
    tail = 0
    for x in range(min(bad, drawn), 0, -1):
        tail += math.comb(bad, x) * math.comb(others - bad, drawn - x)
        if tail / whole > failure:
            return x
    return 0


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
    ) -> None:
        """Begin the round.

        Args:
            post: its own, whose roster says who the others are.
            terms: what it has worked out for itself.
            scope: study, run and round.
            server: the name of the coordinator.
            record: of what the client has signed before; None: nothing outlasts this object.
        """
        self._post = post
        self._record = record or Record()
        self._terms = terms
        self._scope = scope
        self._server = server
        self._ear = _ear(post)
        self._name = post.me.name
        # those to come; empty while one is under way, and after one that failed
        self._phases: tuple[str, ...] = PHASES
        self._sealing = X25519PrivateKey.generate()
        self._pairing = X25519PrivateKey.generate()
        self._seed = os.urandom(32)
        self._keys: dict[str, bytes] = {}  # by neighbour: what it advertised
        # by client: my shares of its self seed and of its key, one after the other
        self._held: dict[str, bytes] = {}
        self._survivors: tuple[str, ...] = ()
        self._model = b""
        self._statement = b""

    def keys(self) -> bytes:
        """Advertise a key to seal shares with,
        a key to agree on masks with, and a commitment to the self seed.
        """
        self._enter("keys")
        public = [key.public_key().public_bytes_raw() for key in (self._sealing, self._pairing)]
        return self._say("keys", EVERYBODY, b"".join(public) + sha256(self._seed).digest())

    def share(self, broadcast: bytes) -> bytes:
        """Take the keys of all; return the shares of both seeds,
        sealed to each neighbour that advertised.
        """
        self._enter("shares")

        # Whose keys came, in the order that they decide.
        body = self._hear(broadcast, "all-keys")
        envelopes = _unpack(body, self._terms)
        self._terms = self._terms.drawn(body)
        for name in self._terms.neighbours(self._name):
            if name in envelopes:  # a neighbour that signed nothing has no part
                self._keys[name] = _keys(
                    self._ear.unwrap(envelopes[name], self._scope, "keys", name)
                )
        self._enough("shares", self._keys)

        # Share both seeds among the neighbours and this client.
        holders = sorted([*self._keys, self._name])
        points = [self._terms.number[name] for name in holders]
        secrets = self._seed, self._pairing.private_bytes_raw()
        halves = (shares.split(secret, self._terms.threshold, points) for secret in secrets)
        parts = {name: own + pair for name, own, pair in zip(holders, *halves, strict=True)}
        self._held[self._name] = parts.pop(self._name)

        # Seal each part for its holder.
        boxes = {
            name: AESGCM(self._seal(self._name, name)).encrypt(bytes(12), part, None)
            for name, part in parts.items()
        }
        return self._say("shares", self._server, _pack(boxes, self._terms))

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
        for name in sorted(boxes):
            other = self._keys[name][32:64]
            seed = _pair_seed(
                self._pairing, self._name, name, other, self._scope, self._terms, model
            )
            _add(masked_M, expand(seed, len(stream_M), out=stream_M), plus=self._name < name)
        return self._say("rows", self._server, masked_M.tobytes())

    def confirm(self, broadcast: bytes) -> bytes:
        """Take the list of survivors; sign it together with the hash of the global model that this
        client received.

        Refused where the list leaves this client out, is below the quorum, or names a neighbour
        whose shares never came: that neighbour's mask would be missing from this client's row.

        Guarantee: one list a round, for ever: a round that is played again is confirmed for the
        same survivors or not at all, so that no two sums of it differ by a row.
        """
        self._enter("confirm")

        # Look at the list.
        body = self._hear(broadcast, "survivors")
        self._survivors = tuple(_unpack(body, self._terms))
        self._terms.enough("confirm", len(self._survivors))
        odd = set(self._terms.holders(self._name)).intersection(self._survivors) - set(self._held)
        if self._name not in self._survivors or odd:
            raise AbortError(
                f"the list of survivors given to {self._name!r} "
                + (f"adds {some(sorted(odd))}" if odd else "leaves it out")
                + (
                    "; expected this client and those whose shares came. The server or the "
                    "network is at fault; nothing was opened."
                )
            )

        # Sign it, with the model.
        self._record.commit(
            "list", self._scope, sha256(json.dumps(self._survivors).encode()).digest()
        )
        self._statement = self._terms.digest + sha256(body).digest() + sha256(self._model).digest()
        return self._say("confirm", EVERYBODY, self._statement)

    def unmask(self, broadcast: bytes) -> bytes:
        """Take the signatures of the others;
        where a quorum signed what this client signed, return its shares.

        Guarantee: of each client that shared, a share of one seed alone: of its self seed where it
        survived, of its key where it dropped out. Which one follows from the list that was signed,
        and this happens once, so that a server learns the sum of all honest survivors or nothing;
        there is nothing that it could ask for.

        Edge cases:
        - another list of survivors, or another model, at any that is needed for the quorum:
          AbortError, no share;
        - asked twice, or out of turn: EnvelopeError, and the round is over for this client;
        - a client that dropped out before it shared has no seed to give back.
        """
        self._enter("unmask")

        # See that a quorum signed the same.
        envelopes = _unpack(self._hear(broadcast, "confirmed"), self._terms)
        said = {
            name: self._ear.unwrap(envelopes[name], self._scope, "confirm", name)
            for name in envelopes
        }
        others = [
            name for name in self._survivors if said.get(name, self._statement) != self._statement
        ]
        why = f"{some(others)} signed another list of survivors or another model." if others else ""
        self._terms.enough("unmask", len(said.keys() & set(self._survivors)) - len(others), why)

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
        self._phases = PHASES[PHASES.index(phase) + 1 :]
        return self._post.wrap(self._scope, phase, to, body)

    def _hear(self, broadcast: bytes, kind: str) -> bytes:
        return self._ear.unwrap(broadcast, self._scope, kind, self._server)

    def _enough(self, phase: str, others: Collection[str]) -> None:
        if len(others) + 1 < self._terms.threshold:
            raise AbortError(
                f"masked round, phase {phase}: {len(others)} neighbours of {self._name!r} "
                f"answered; expected {self._terms.threshold - 1} or more. Start the round again."
            )

    def _seal(self, sender: str, to: str) -> bytes:
        """Return the key of the one box from `sender` to `to`; one of them is this client."""
        other = self._keys[to if sender == self._name else sender][:32]
        return _derive(_agree(self._sealing, other), self._scope, self._terms, "seal", sender, to)

    def _open_box(self, sender: str, box: bytes) -> bytes:
        if sender not in self._keys:
            raise EnvelopeError(
                f"shares from {sender!r}, no neighbour with keys; expected "
                f"{some(sorted(self._keys))}."
            )
        try:
            part = AESGCM(self._seal(sender, self._name)).decrypt(bytes(12), box, None)
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
        self._phases: tuple[str, ...] = PHASES

    def keys(self, envelopes: Mapping[str, bytes]) -> bytes:
        """Take the clients' keys; return them all, for all."""
        self._keys = self._read("keys", envelopes, self.terms.members, lambda _, body: _keys(body))
        body = _pack({name: envelopes[name] for name in self._keys}, self.terms)
        self.terms = self.terms.drawn(body)
        return self.post.wrap(self.scope, "all-keys", EVERYBODY, body)

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
        return self._tell("survivors", dict.fromkeys(rows_KM, b""))

    def confirm(self, envelopes: Mapping[str, bytes]) -> bytes:
        """Take the signed lists; return all signatures, for all."""
        said = self._read("confirm", envelopes, self._survivors, lambda _, body: body)
        return self._tell("confirmed", {name: envelopes[name] for name in said})

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
        held = {
            name: {
                self.terms.number[holder]: part[name]
                for holder, part in parts.items()
                if name in part
            }
            for name in self._sharers
        }
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
        return [name for name in self.terms.neighbours(gone) if name in self._survivors]

    def _lift(self, gone: str, linked: list[str], secret: bytes, stream_M: Words) -> None:
        key = X25519PrivateKey.from_private_bytes(secret)
        for name in linked:
            other = self._keys[name][32:64]
            seed = _pair_seed(key, gone, name, other, self.scope, self.terms, self._model)
            _add(self._total_M, expand(seed, self.terms.length, out=stream_M), plus=gone < name)

    def _rebuild(
        self, name: str, held: Mapping[int, bytes], commit: Callable[[bytes], bytes], where: slice
    ) -> bytes:
        """Return a seed of `name` from its shares, checked against what it advertised;
        one of them may be false.
        """
        advertised = self._keys[name][where]
        t = self.terms.threshold
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
        expected = self._keys.keys() & set(self.terms.neighbours(name))
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
        post = self._ear if phase in ("keys", "confirm") else self.post
        bodies: dict[str, _T] = {}

        for name in sorted(envelopes.keys() & set(allowed)):
            try:
                bodies[name] = decode(name, post.unwrap(envelopes[name], self.scope, phase, name))
            except CodecError as error:
                self.refused[name] = error

        why = f"Refused: {some(self.refused)}." if self.refused else ""
        self.terms.enough(phase, len(bodies), why)
        return bodies

    def _tell(self, kind: str, parts: Mapping[str, bytes]) -> bytes:
        return self.post.wrap(self.scope, kind, EVERYBODY, _pack(parts, self.terms))


def run_protocol(
    rows: Mapping[str, Integers],
    terms: MaskingTerms,
    drops: Mapping[str, Collection[str]] | None = None,
) -> tuple[Integers, frozenset[str]]:
    """Play every party of a masked sum in order;
    return the sum (int64 [M]) and the clients that are in it.

    `drops` says who falls silent before which of PHASES. Raises AbortError where too few are left.
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
        {name: client.unmask(confirmed) for name, client in alive("unmask").items()}
    )


def _ear(post: Post) -> Post:
    """Return a post that hears broadcasts: what everybody may read, under the same roster."""
    return Post(replace(post.me, name=EVERYBODY), post.roster)


def _keys(body: bytes) -> bytes:
    if len(body) != 96:
        raise EnvelopeError(
            f"keys of {len(body)} bytes; expected 96: two keys and a commitment. Ask their "
            "sender again."
        )
    for public in (body[:32], body[32:64]):
        if int.from_bytes(public, "little") % 2**255 in _SMALL_ORDER:
            raise EnvelopeError(
                "a public key that is no key; expected a fresh one. Ask its sender again."
            )
    return body


def _agree(key: X25519PrivateKey, public: bytes) -> bytes:
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # a point of small order, on which everybody agrees
        raise EnvelopeError(
            "a public key that is no key; expected a fresh one. Ask its sender again."
        ) from error


def _public(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def _derive(shared: bytes, scope: Scope, terms: MaskingTerms, *purpose: str) -> bytes:
    info = json.dumps([scope.study, scope.run, scope.round, terms.digest.hex(), *purpose]).encode()
    return HKDF(SHA256(), 32, None, b"medfed masking 2 " + info).derive(shared)


def _pair_seed(
    key: X25519PrivateKey,
    mine: str,
    other: str,
    public: bytes,
    scope: Scope,
    terms: MaskingTerms,
    model: bytes,
) -> bytes:
    """Return the seed of the mask that two clients share in rows of one model, from either one's
    private key.
    """
    shared = _agree(key, public)
    return _derive(shared, scope, terms, "pair", *sorted((mine, other)), model.hex())


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
