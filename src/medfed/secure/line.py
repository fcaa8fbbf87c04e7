"""What three parties do with shared words over their line: send, multiply, compare, open.

Words are shared three ways, and party i holds shares i and i + 1 (replicated). Each message is
encrypted under the pair's key of the round. What is multiplied here is correct only if all follow
the protocol; `triples` and `products` verify it afterwards, before anything is opened.
"""

import json
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from medfed.core.checks import AbortError
from medfed.core.entropy import Words, expand

Sends = Mapping[str, bytes]
"""What goes to each of the other two, by name."""

_ONE = np.uint64(1)


@dataclass(frozen=True)
class Pair:
    """A party's two shares of words: additive, or of bits by exclusive or."""

    first: Words
    second: Words

    def times(self, factor: Words | np.uint64) -> "Pair":
        """Multiply by public words."""
        return Pair(self.first * factor, self.second * factor)

    def plus(self, constant: Words | np.uint64, place: int) -> "Pair":
        """Add public words: share 0 carries them."""
        return Pair(self.first + constant * (place == 0), self.second + constant * (place == 2))

    def flip(self, constant: Words, place: int) -> "Pair":
        """Add public bits by exclusive or: share 0 carries them."""
        zero = np.zeros_like(constant)
        return Pair(
            self.first ^ (constant if place == 0 else zero),
            self.second ^ (constant if place == 2 else zero),
        )

    def at(self, index: Any) -> "Pair":
        """Return the words at an index, a slice or an array of such."""
        return Pair(self.first[index], self.second[index])

    def add(self, other: "Pair") -> "Pair":
        """Add shared words."""
        return Pair(self.first + other.first, self.second + other.second)

    def xor(self, other: "Pair") -> "Pair":
        """Add shared bits by exclusive or."""
        return Pair(self.first ^ other.first, self.second ^ other.second)

    def mask(self, mask: Words | np.uint64) -> "Pair":
        """Keep the bits of a public mask."""
        return Pair(self.first & mask, self.second & mask)

    def shift(self, left: int) -> "Pair":
        """Shift bits to the left, or where `left` is negative to the right."""
        if left < 0:
            return Pair(self.first >> np.uint64(-left), self.second >> np.uint64(-left))
        return Pair(self.first << np.uint64(left), self.second << np.uint64(left))

    def flat(self) -> "Pair":
        """Return the words in a row."""
        return Pair(self.first.ravel(), self.second.ravel())

    @staticmethod
    def join(pairs: "list[Pair]") -> "Pair":
        """Return words one after the other."""
        return Pair(
            np.concatenate([one.first for one in pairs]),
            np.concatenate([one.second for one in pairs]),
        )

    @staticmethod
    def beside(pairs: "list[Pair]") -> "Pair":
        """Return matrices [K, any] of words beside each other."""
        return Pair(
            np.concatenate([one.first for one in pairs], 1),
            np.concatenate([one.second for one in pairs], 1),
        )


class Line:
    """The line between the three for one round: every message encrypted under the pair's key of the
    round, in order.

    Both ends make a key for this round alone, so that an old greeting gives no old key; and all
    that the greetings say goes into the pair's key, so that two who were told different things
    cannot read each other.
    """

    def __init__(self, me: str, order: tuple[str, str, str], purpose: bytes) -> None:
        """Make this end's key.

        Args:
            me: this party's name.
            order: the names of all three.
            purpose: what the line is for: study, run and round.
        """
        self.me = me
        self.order = order
        self.place = order.index(me)
        self.left, self.right = (order[(self.place + d) % 3] for d in (2, 1))
        self.multiplied: list[tuple[Pair, Pair, Pair]] = []  # bits, not yet verified
        self._purpose = purpose
        self._secret = X25519PrivateKey.generate()
        self._keys: dict[str, AESGCM] = {}
        self._seeds = bytes(32), bytes(32)
        self._drawn = 0
        self._step = 0

    @property
    def public(self) -> bytes:
        """This end's key, for the greetings."""
        return self._secret.public_key().public_bytes_raw()

    def connect(self, publics: Mapping[str, bytes], said: object) -> None:
        """Agree on keys with both others.

        Raises AbortError naming who sent a key that is none.

        Args:
            publics: the others' keys, by name.
            said: all that the three have told each other so far, as each of them has it.
        """
        transcript = sha256(json.dumps(said, sort_keys=True).encode()).digest()
        seeds: dict[str, bytes] = {}
        for name in (self.left, self.right):
            try:
                shared = self._secret.exchange(X25519PublicKey.from_public_bytes(publics[name]))
            except ValueError as error:
                raise AbortError(f"{name!r} sent a key that is none; the round ends") from error
            both = HKDF(SHA256(), 64, transcript, b"medfed line 1 " + self._purpose).derive(shared)
            self._keys[name] = AESGCM(both[:32])
            seeds[name] = both[32:]
        self._seeds = seeds[self.left], seeds[self.right]

    # messages ----------------------------------------------------------------------------------

    def swap(self, to_left: bytes, to_right: bytes) -> Generator[Sends, Sends, tuple[bytes, bytes]]:
        """Send to both neighbours; return what the left and the right one sent. Raises AbortError
        for what is missing, late or changed.
        """
        self._step += 1
        front = self._step.to_bytes(11, "big")
        sent = {self.left: to_left, self.right: to_right}
        arrived = yield {
            name: self._keys[name].encrypt(bytes([self.place]) + front, data, None)
            for name, data in sent.items()
        }

        found = []
        for name in (self.left, self.right):
            place = self.order.index(name)
            try:
                found.append(self._keys[name].decrypt(bytes([place]) + front, arrived[name], None))
            except Exception as error:
                raise AbortError(
                    f"{name!r} sent nothing that can be read in step {self._step}, or the "
                    "coordinator did not carry it; the round ends"
                ) from error
        return found[0], found[1]

    def from_right(self, own: Words) -> Generator[Sends, Sends, Words]:
        """Send a first share to the left, whose second it is; return the right one's first."""
        _, found = yield from self.swap(own.tobytes(), b"")
        return self.read(self.right, found, own.shape)

    def from_left(self, own: bytes) -> Generator[Sends, Sends, bytes]:
        """Send bytes to the right; return what the left one sent to here."""
        found, _ = yield from self.swap(b"", own)
        return found

    def read(self, sender: str, data: bytes, shape: tuple[int, ...]) -> Words:
        """Return words that somebody sent; raise AbortError where they are not as many."""
        count = int(np.prod(shape))
        if len(data) != 8 * count:
            raise AbortError(
                f"{sender!r} sent {len(data)} bytes; expected {8 * count}. The round ends."
            )
        return np.frombuffer(data, np.uint64).reshape(shape)

    # randomness --------------------------------------------------------------------------------

    def streams(self, count: int) -> tuple[Words, Words]:
        """Return fresh words [count] that the left one has too, and such that the right one has."""
        left, right = (expand(seed, count, self._drawn) for seed in self._seeds)
        self._drawn += count
        return left, right

    def zero(self, count: int) -> Words:
        """Return this party's words of a fresh sharing of zero: three sum to 0, two are uniform."""
        left, right = self.streams(count)
        return right - left

    def random(self, count: int) -> Pair:
        """Return shares of words that nobody knows."""
        return Pair(*self.streams(count))

    def put(self, own: Words) -> Generator[Sends, Sends, list[Pair]]:
        """Share own words with the others; return those of all three, in the order of places.

        Share i of party i's words is a stream that it has with its left one, share i + 1 what is
        left of them, and the third is 0.
        """
        count = own.size
        mine, theirs = self.streams(count)
        rest = own - mine
        found = self.read(self.left, (yield from self.from_left(rest.tobytes())), own.shape)
        nothing = np.zeros(count, np.uint64)
        shared = {
            self.place: Pair(mine, rest),
            (self.place + 2) % 3: Pair(found, nothing),
            (self.place + 1) % 3: Pair(nothing, theirs),
        }
        return [shared[place] for place in range(3)]

    # products ----------------------------------------------------------------------------------

    def both(self, x: Pair, y: Pair) -> Generator[Sends, Sends, Pair]:
        """Return the bitwise AND of shared bits: local products, a sharing of zero, one message.

        It is kept for `triples.verify`: who sends another word than it should is found there.
        """
        left, right = self.streams(x.first.size)
        part = (
            (x.first & y.first)
            ^ (x.first & y.second)
            ^ (x.second & y.first)
            ^ (left ^ right).reshape(x.first.shape)
        )
        z = Pair(part, (yield from self.from_right(part)))
        self.multiplied.append((x.flat(), y.flat(), z.flat()))
        return z

    def to_bits(self, x: Pair) -> Generator[Sends, Sends, Pair]:
        """Return shared words as shared bits:
        three words are added, carries saved, then by Kogge and Stone.
        """
        word = [
            Pair(x.first * (self.place == j), x.second * ((self.place + 1) % 3 == j))
            for j in range(3)
        ]
        some = yield from self.both(word[0].xor(word[2]), word[1].xor(word[2]))
        carry = some.xor(word[2]).shift(1)
        half = Pair(x.first, x.second)
        made = yield from self.both(half, carry)
        total = passed = half.xor(carry)

        for d in (1, 2, 4, 8, 16, 32):
            stacked = Pair(np.stack([passed.first] * 2), np.stack([passed.second] * 2))
            moved = Pair(
                np.stack([made.shift(d).first, passed.shift(d).first]),
                np.stack([made.shift(d).second, passed.shift(d).second]),
            )
            found = yield from self.both(stacked, moved)
            made = made.xor(found.at(0))
            passed = found.at(1)

        return total.xor(made.shift(1))

    def any_bit(self, x: Pair) -> Generator[Sends, Sends, Pair]:
        """Return for each word a bit: 1 where any of its bits is set."""
        for d in (32, 16, 8, 4, 2, 1):
            lower = x.shift(-d)
            both = yield from self.both(x, lower)
            x = x.xor(lower).xor(both)
        return x.mask(_ONE)

    # opening -----------------------------------------------------------------------------------

    def reveal(self, x: Pair, additive: bool = False) -> Generator[Sends, Sends, Words]:
        """Return shared words themselves, to all three.

        Each gets the share that it lacks from one holder, and a hash of it from the other: raises
        AbortError where they differ, so that one party alone opens nothing else.

        Args:
            x: the words.
            additive: whether they are shared by addition; else by exclusive or.
        """
        digest = sha256(x.second.tobytes()).digest()
        found, hashed = yield from self.swap(digest, x.first.tobytes())
        missing = self.read(self.left, found, x.first.shape)
        if sha256(found).digest() != hashed:
            raise AbortError(
                f"{self.left!r} and {self.right!r} tell different shares of what is opened; one "
                "of them did not follow the protocol. Nothing more is opened."
            )
        if additive:
            return x.first + x.second + missing
        return x.first ^ x.second ^ missing

    def see_zero(self, x: Pair, what: str) -> Generator[Sends, Sends, None]:
        """See that shared bits are all 0, and learn nothing else.

        Raises AbortError where they are not.

        Args:
            x: the bits, shared by exclusive or.
            what: what they would show, for the error.
        """
        hashes = [sha256(words.tobytes()).digest() for words in (x.first, x.second)]
        expected = sha256((x.first ^ x.second).tobytes()).digest()
        found = yield from self.swap(hashes[1], hashes[0])
        if found != (expected, expected):
            raise AbortError(
                f"{what} do not hold: one of the three did not follow the protocol. Nothing is "
                "opened; run the round again."
            )
