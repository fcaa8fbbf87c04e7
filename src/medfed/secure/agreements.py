"""Agreements between sites of a masked run: what every two of them agree on once for all rounds.

Each site makes one X25519 key for the run. Keys of single messages are derived from an agreement
and from what the round is about, so that a message opens in its own place alone. A line's key is
never given away, unlike that of pair masks: what a line carries are shares, and codes that say what
its two ends have seen.

What is kept for a run can be taken from a site while the run lasts: who takes a site's key from its
memory, and has recorded what passed, reads that site's rows of the run. It ends with the process.
"""

import hmac
import json
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from medfed.core.checks import EnvelopeError

FORM = b"medfed masking 3 "
"""What every derivation of a masked round begins with: the format's version."""


class Agreements:
    """A site's lines in one run."""

    def __init__(self) -> None:
        self._key = X25519PrivateKey.generate()
        self.public = self._key.public_key().public_bytes_raw()
        self._met: dict[str, tuple[bytes, bytes]] = {}

    def knows(self, name: str, public: bytes) -> bool:
        """Say whether there is a line to this site by this key of it."""
        return name in self._met and self._met[name][0] == public

    def meet(self, study: str, run: str, me: str, name: str, public: bytes) -> None:
        """Agree with another site on a line.

        Raises EnvelopeError where `public` is no key.

        Args:
            study: the study's sha256.
            run: the run's name.
            me: this site.
            name: the other one.
            public: its key, which it has signed.
        """
        ends = sorted([(me, self.public.hex()), (name, public.hex())])
        about = json.dumps([study, run, *ends]).encode()
        secret = derive(agree(self._key, public), FORM + b"line " + about)
        self._met[name] = public, secret

    def key(self, name: str, about: bytes) -> bytes:
        """Return the 32 bytes of one purpose that both ends of a line know, and nobody else."""
        return hmac.digest(self._met[name][1], FORM + about, "sha256")


def agree(key: X25519PrivateKey, public: bytes) -> bytes:
    """Return what two keys agree on; raise EnvelopeError for a point on which everybody does."""
    try:
        return key.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise EnvelopeError(
            "a public key that is no key; expected a fresh one. Ask its sender again."
        ) from error


def derive(shared: bytes, about: bytes) -> bytes:
    """Return 32 bytes by HKDF with SHA-256 and no salt (RFC 5869): one block, in two calls."""
    extracted = hmac.digest(bytes(sha256().digest_size), shared, "sha256")
    return hmac.digest(extracted, about + b"\x01", "sha256")
