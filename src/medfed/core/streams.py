"""Named randomness: one stream for each purpose,
round and client, so that no draw ever moves another.

A stream is a 64-bit key made from the study's seed and a name. Numbers come from SplitMix64
(Steele, Lea and Flood, OOPSLA 2014) as a counter generator: number i of a stream is a function of
(key, i) alone. So a thousand clients draw as one tensor, and each gets the bits that it would have
drawn alone at its hospital.

These streams order batches and drop units; they are reproducible on purpose and must never make
noise, masks or keys that anybody's privacy rests on.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # 2^64 / phi, odd, as a signed word
_MIX_1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX_2 = 0x94D049BB133111EB - (1 << 64)


@dataclass(frozen=True)
class Streams:
    """The study's seed, from which every stream's key is derived by BLAKE2b."""

    seed: int

    def key(self, name: str, *context: object) -> int:
        """Return the signed 64-bit key of stream `name` in `context` (a round, a client, ...)."""
        # no two lists are written alike
        return _hash(json.dumps([self.seed, name, *map(str, context)]))

    def key_K(self, name: str, round: int, clients: Sequence[str]) -> Tensor:
        """Return the keys [K] (int64) of one stream for each client of a cohort."""
        # as `key` has it, the part that all share written once
        begun = json.dumps([self.seed, name, str(round)])[:-1]
        return torch.tensor(
            [_hash(f"{begun}, {json.dumps(client)}]") for client in clients], dtype=torch.int64
        )

    def generator(self, name: str, *context: object) -> np.random.Generator:
        """Return a numpy generator for a draw that belongs to no client."""
        return np.random.Generator(np.random.Philox(key=self.key(name, *context) % (1 << 64)))


def _hash(text: str) -> int:
    return int.from_bytes(
        hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True
    )


def patient_fraction(key: int, patient: str) -> float:
    """Map a patient to [0, 1) by a keyed hash:
    a function of this patient alone, so that no patient moves another.
    """
    digest = hashlib.blake2b(
        patient.encode(), digest_size=8, key=(key % (1 << 64)).to_bytes(8, "little")
    ).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def words(key_K: Tensor, count: int, start: int = 0) -> Tensor:
    """Return words [K, count] (int64) number start .. start + count - 1 of each client's stream."""
    counter = (
        torch.arange(start + 1, start + count + 1, dtype=torch.int64, device=key_K.device) * _GOLDEN
    )
    return _finalise(key_K[..., None] + counter)


def subkey(key_K: Tensor, number: int) -> Tensor:
    """Return the keys [K] of the streams that branch off `key_K` under `number`."""
    return _finalise(_finalise(key_K) + _to_signed((number + 1) * _GOLDEN))


def subkeys(key_K: Tensor, count: int) -> Tensor:
    """Return the keys [K, count] of the streams that branch off `key_K` under 0 .. count - 1: as
    `subkey` one by one.
    """
    numbers = torch.arange(1, count + 1, dtype=torch.int64, device=key_K.device)
    return _finalise(_finalise(key_K)[..., None] + numbers * _GOLDEN)


def uniform(key_K: Tensor, count: int, start: int = 0) -> Tensor:
    """Return numbers [K, count] (float32) uniform on the 2^24 steps of [0, 1)."""
    return _shift(words(key_K, count, start), 40).to(torch.float32) * 2.0**-24


def normal(key_K: Tensor, count: int) -> Tensor:
    """Return standard normal numbers [K, count] (float64) by Box and Muller; for simulations, never
    for protection.
    """
    half = -(-count // 2)
    word_KN = words(key_K, 2 * half)
    u_KN = (_shift(word_KN, 11).double() + 0.5) * 2.0**-53
    radius = torch.sqrt(-2 * torch.log(u_KN[:, :half]))
    angle = 2 * torch.pi * u_KN[:, half:]
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], 1)[:, :count]


def shuffles(key_K: Tensor, size_K: Tensor) -> Tensor:
    """Return a random order [K, S] of 0 ..
    size-1 for each client, S = max size; entries from size on are filler.
    """
    longest = int(size_K.max())
    rank_KS = _shift(words(key_K, longest), 2)
    beyond_KS = torch.arange(longest) >= size_K[:, None]
    return torch.from_numpy(np.argsort(torch.where(beyond_KS, 1 << 62, rank_KS).numpy(), axis=1))


def _to_signed(word: int) -> int:
    """Wrap a Python integer to a signed 64-bit word."""
    return (word + (1 << 63)) % (1 << 64) - (1 << 63)


def _shift(word: Tensor, bits: int) -> Tensor:
    """Shift right without sign: torch has no unsigned words."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _finalise(word: Tensor) -> Tensor:
    word = (word ^ _shift(word, 30)) * _MIX_1
    word = (word ^ _shift(word, 27)) * _MIX_2
    return word ^ _shift(word, 31)
