"""What a bench sees of keys: which key, nonce or stream a party encrypts under, and what with it.

Primitives are patched where the product looks them up; what they compute stays the same.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from medfed.secure import identity, line, masking, three_party


class Watcher:
    """Every key and nonce of AES-GCM, and every stream that hides a row; `faults` says which came twice."""

    def __init__(self) -> None:
        self.faults: list[str] = []
        self._boxes: dict[tuple[bytes, bytes], bytes] = {}
        self._streams: dict[tuple[str, bytes], int] = {}
        self._hiding: tuple[str, int] | None = None
        self._calls = 0
        self._quiet = False

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Do not look at what is encrypted meanwhile: a liar's keys are its own affair."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def note_box(self, key: bytes, nonce: bytes, plain: bytes) -> None:
        """Note that `plain` is encrypted; a fault where other bytes were, under the same."""
        if self._quiet:
            return
        before = self._boxes.setdefault((key, nonce), bytes(plain))
        if before != plain:
            self.faults.append(
                f"AES-GCM: one key and nonce for {len(before)} bytes and {len(plain)} others"
            )

    def note_stream(self, seed: bytes) -> None:
        """Note that a stream hides a part of the row that is being hidden; a fault where it hid another."""
        if self._hiding is None or self._quiet:
            return
        party, call = self._hiding
        if self._streams.setdefault((party, bytes(seed)), call) != call:
            self.faults.append(f"{party}: one stream hides two rows")

    @contextmanager
    def hiding(self, party: str) -> Iterator[None]:
        """A party hides one row meanwhile."""
        self._calls += 1
        self._hiding = party, self._calls
        try:
            yield
        finally:
            self._hiding = None


def watch(patch: pytest.MonkeyPatch) -> Watcher:
    """Return a watcher of all that is encrypted from now on."""
    watcher = Watcher()

    class Watched:
        def __init__(self, key: bytes) -> None:
            self._key = bytes(key)
            self._cipher = AESGCM(key)

        def encrypt(self, nonce: bytes, data: bytes, extra: bytes | None) -> bytes:
            watcher.note_box(self._key, nonce, data)
            return self._cipher.encrypt(nonce, data, extra)

        def decrypt(self, nonce: bytes, data: bytes, extra: bytes | None) -> bytes:
            return self._cipher.decrypt(nonce, data, extra)

    for module in (identity, masking, line):
        patch.setattr(module, "AESGCM", Watched)

    def noting(stream: Callable[..., Any]) -> Callable[..., Any]:
        def drawn(seed: bytes, *rest: Any, **named: Any) -> Any:
            watcher.note_stream(seed)
            return stream(seed, *rest, **named)

        return drawn

    for module in (masking, three_party):
        patch.setattr(module, "expand", noting(module.expand))
    patch.setattr(three_party, "_crypt", noting(three_party._crypt))
    mask = masking.Client.mask
    share = three_party.share

    def hide(self: masking.Client, *said: Any) -> bytes:
        with watcher.hiding(self._name):
            return mask(self, *said)

    def hide_in_shares(post: identity.Post, *said: Any) -> bytes:
        with watcher.hiding(post.me.name):
            return share(post, *said)

    patch.setattr(masking.Client, "mask", hide)
    patch.setattr(three_party, "share", hide_in_shares)
    return watcher
