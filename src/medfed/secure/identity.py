"""Who says what: keys made by their owner,
a roster that the consortium approves, signed and sealed messages.

A party has an Ed25519 key to sign with and an X25519 key to be sealed to. A message between parties
is an envelope: its sender's signature covers the study, the run, the round, the kind, sender,
recipient, a nonce and the body. So it counts nowhere else, and once only.
"""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medfed.core.checks import EnvelopeError, RevokedError, SignatureError

MAGIC = b"mfe1"
"""First bytes of an envelope: its format and version."""

ANYBODY = "*"
"""Recipient of what is for everybody."""


@dataclass(frozen=True)
class Public:
    """A party's public keys, 32 bytes each, and its role: site, aggregator or coordinator."""

    name: str
    role: str
    signing: bytes
    sealing: bytes

    @property
    def fingerprint(self) -> str:
        """Return what people compare over the telephone: 128 bits of the sha256 of both keys, in
        groups of four.
        """
        text = sha256(self.signing + self.sealing).hexdigest()[:32]
        return " ".join(text[i : i + 4] for i in range(0, 32, 4))


@dataclass(frozen=True)
class Identity:
    """A party's own keys. They are never printed and never put into a run folder."""

    name: str
    role: str
    _signing: Ed25519PrivateKey = field(repr=False)
    _sealing: X25519PrivateKey = field(repr=False)

    @classmethod
    def new(cls, name: str, role: str) -> "Identity":
        """Make new keys from the operating system's randomness."""
        return cls(name, role, Ed25519PrivateKey.generate(), X25519PrivateKey.generate())

    @classmethod
    def of(cls, name: str, role: str, secret: bytes) -> "Identity":
        """Return the identity whose `secret` this is; raise ValueError unless it has 64 bytes."""
        if len(secret) != 64:
            raise ValueError(f"{len(secret)} bytes of keys; expected 64")
        signing = Ed25519PrivateKey.from_private_bytes(secret[:32])
        return cls(name, role, signing, X25519PrivateKey.from_private_bytes(secret[32:]))

    def secret(self) -> bytes:
        """Return both private keys, 64 bytes, for a key file (`key_files.save`), nowhere else."""
        return self._signing.private_bytes_raw() + self._sealing.private_bytes_raw()

    @property
    def public(self) -> Public:
        """Return what others may know."""
        signing = self._signing.public_key().public_bytes_raw()
        return Public(self.name, self.role, signing, self._sealing.public_key().public_bytes_raw())

    def sign(self, data: bytes) -> bytes:
        """Return the Ed25519 signature, 64 bytes."""
        return self._signing.sign(data)

    def agree(self, sealing: bytes, purpose: bytes) -> bytes:
        """Return the 32 bytes that only this party and the
        owner of the public key `sealing` can compute.
        """
        return _derive(_exchange(self._sealing, sealing), purpose)

    def derive(self, purpose: bytes) -> bytes:
        """Return 32 bytes that only this party can compute, the same whenever it is asked."""
        return _derive(self.secret(), b"own " + purpose)

    def unseal(self, box: bytes, purpose: bytes) -> bytes:
        """Open what `seal` closed for this party and purpose;
        raise EnvelopeError where it does not open.
        """
        if len(box) < 48:
            raise EnvelopeError(
                f"a sealed box of {len(box)} bytes; expected 48 or more. Ask its sender again."
            )
        try:
            key = _derive(
                _exchange(self._sealing, box[:32]), purpose + box[:32] + self.public.sealing
            )
            return AESGCM(key).decrypt(bytes(12), box[32:], purpose)
        except InvalidTag as error:
            raise EnvelopeError(
                f"a sealed box does not open for {self.name!r}; ask its sender again"
            ) from error


def seal(to: Public, plain: bytes, purpose: bytes) -> bytes:
    """Close bytes so that only `to` opens them, for one purpose: 48 bytes longer. Each box has a
    key of its own.
    """
    once = X25519PrivateKey.generate()
    front = once.public_key().public_bytes_raw()
    key = _derive(_exchange(once, to.sealing), purpose + front + to.sealing)
    return front + AESGCM(key).encrypt(bytes(12), plain, purpose)


def verify(public: Public, signature: bytes, data: bytes) -> None:
    """Raise SignatureError unless `public` signed the data."""
    try:
        Ed25519PublicKey.from_public_bytes(public.signing).verify(signature, data)
    except InvalidSignature as error:
        raise SignatureError(
            f"{public.name!r} did not sign this; ask the sender again, or check its keys"
        ) from error


def holds(signing: bytes, signature: bytes, data: bytes) -> bool:
    """Say whether the owner of the Ed25519 key `signing` signed the data."""
    try:
        Ed25519PublicKey.from_public_bytes(signing).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True


class Roster(Mapping[str, Public]):
    """The parties that the consortium approved, by name; a revoked one is refused by name."""

    def __init__(
        self, members: Mapping[str, Public], revoked: frozenset[str] = frozenset()
    ) -> None:
        self._members = dict(members)
        self.revoked = revoked

    @classmethod
    def of(cls, *members: Public) -> "Roster":
        """Return a roster of these parties."""
        return cls({member.name: member for member in members})

    def __getitem__(self, name: str) -> Public:
        if name in self.revoked:
            raise RevokedError(
                f"{name!r} is revoked; its messages no longer count. Enrol it again with new keys."
            )
        if name not in self._members:
            raise SignatureError(
                f"{name!r} is not enrolled; the consortium must approve its keys first"
            )
        return self._members[name]

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._members if name not in self.revoked)

    def __len__(self) -> int:
        return sum(1 for _ in self)


@dataclass(frozen=True)
class Scope:
    """Where a message counts: the study's sha256, the run and the round, a whole number."""

    study: str
    run: str
    round: int

    def __post_init__(self) -> None:
        if type(self.round) is not int or self.round < 0:
            raise EnvelopeError(
                f"round={self.round!r}; expected a whole number. It does not count."
            )


@dataclass
class Post:
    """A party's way to send and receive envelopes. It remembers nonces: none counts twice."""

    me: Identity
    roster: Roster
    _seen: set[bytes] = field(default_factory=set)
    _scope: Scope | None = None

    @staticmethod
    def body(envelope: bytes) -> bytes:
        """Return the body of an envelope that was unwrapped before."""
        return _open(envelope)[1]

    def wrap(self, scope: Scope, kind: str, to: str, body: bytes) -> bytes:
        """Return the signed envelope of a message."""
        head = _head(scope, kind, self.me.name, to, os.urandom(16).hex())
        signed = MAGIC + struct.pack("<IQ", len(head), len(body)) + head + body
        return signed + self.me.sign(MAGIC + sha256(signed).digest())

    def unwrap(self, envelope: bytes, scope: Scope, kind: str, sender: str, to: str = "") -> bytes:
        """Return the body of a message of this kind and
        scope from `sender` to this party, or to ANYBODY.

        Raises EnvelopeError where the bytes are no envelope or one of another scope, kind, sender
        or recipient, or came before; SignatureError where the signature is wrong or the sender
        unknown; RevokedError.
        """
        fields, body = _check(envelope, self.roster[sender], scope, kind, to or self.me.name)
        nonce = str(fields.get("nonce")).encode()
        if scope != self._scope:  # another round's nonces cannot come again: their scope is refused
            self._scope = scope
            self._seen = set()

        if nonce in self._seen:
            raise EnvelopeError(
                f"a message from {sender!r} came twice (nonce {nonce.decode()}); the second is "
                "refused"
            )

        self._seen.add(nonce)
        return body


def check(envelope: bytes, sender: Public, scope: Scope, kind: str, to: str) -> None:
    """Raise as `Post.unwrap` does unless this is such a message;
    a later reader's check, who keeps no nonces.
    """
    _check(envelope, sender, scope, kind, to)


def _check(
    envelope: bytes, sender: Public, scope: Scope, kind: str, to: str
) -> tuple[dict[str, object], bytes]:
    fields, body = _open(envelope)
    expected = {
        "study": scope.study,
        "run": scope.run,
        "round": scope.round,
        "kind": kind,
        "sender": sender.name,
    }
    for name, value in {**expected, "to": to}.items():
        if fields.get(name) != value:
            raise EnvelopeError(
                f"a message has {name}={fields.get(name)!r}; expected {value!r}. It does not count."
            )
    verify(sender, envelope[-64:], MAGIC + sha256(envelope[:-64]).digest())
    return fields, body


def _head(scope: Scope, kind: str, sender: str, to: str, nonce: str) -> bytes:
    fields = {"study": scope.study, "run": scope.run, "round": scope.round}
    return json.dumps({**fields, "kind": kind, "sender": sender, "to": to, "nonce": nonce}).encode()


def _open(envelope: bytes) -> tuple[dict[str, object], bytes]:
    try:
        if envelope[:4] != MAGIC:
            raise ValueError("it does not begin with mfe1")
        head, body = struct.unpack_from("<IQ", envelope, 4)
        if len(envelope) != 16 + head + body + 64:
            raise ValueError(f"it says {16 + head + body + 64} bytes")
        fields = json.loads(envelope[16 : 16 + head])
        if not isinstance(fields, dict):
            raise ValueError("its head is no object")
    except (ValueError, struct.error, RecursionError) as error:
        raise EnvelopeError(
            f"{len(envelope)} bytes are no message: {error}. Ask the sender again."
        ) from error
    return fields, envelope[16 + head : -64]


def _exchange(mine: X25519PrivateKey, theirs: bytes) -> bytes:
    """Agree on 32 bytes; a public key of low order, for which everybody could compute them, is
    refused (RFC 7748).
    """
    try:
        return mine.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError as error:
        raise EnvelopeError(
            f"{theirs.hex()[:16]}... is no key to seal to; ask its owner for new keys"
        ) from error


def _derive(shared: bytes, purpose: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, b"medfed 1 " + purpose).derive(shared)
