"""Flower's SecAgg+ primitives, and CKKS by TenSEAL, on rows as large as ours; prints one JSON line.

    python secure_peers.py --clients=50 --numbers=200000 --neighbours=44 --gone=5 --repeats=3

Flower: what its SecAgg+ client does for one row (quantise, key agreement and shares for each
neighbour, its own mask and a mask for each neighbour), and what its server does to take the masks
away: the self masks of those who stayed, and the pair masks of those who are gone.
"""

import argparse
import json
import os
import time

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import (
    decrypt,
    encrypt,
    generate_shared_key,
)
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

TARGET, CLIP, MODULUS = 1 << 22, 8.0, 1 << 32  # Flower's defaults


def flower(numbers: int, neighbours: int, clients: int, gone: int) -> tuple[float, float]:
    """Return seconds of a client's work and of the server's unmasking."""
    row = [np.random.default_rng(0).standard_normal(numbers).astype(np.float32)]
    others = [ec.generate_private_key(ec.SECP384R1()).public_key() for _ in range(neighbours)]
    threshold = neighbours // 2 + 1

    began = time.perf_counter()
    steps = quantize(row, CLIP, TARGET)[0].astype(np.int64)
    seed = os.urandom(32)
    mine = ec.generate_private_key(ec.SECP384R1())
    sealing = ec.generate_private_key(ec.SECP384R1())
    halves = [
        create_shares(secret, threshold, neighbours + 1)
        for secret in (seed, mine.private_numbers().private_value.to_bytes(48, "big"))
    ]
    keys = [generate_shared_key(sealing, other) for other in others]
    boxes = [encrypt(key, own + pair) for key, own, pair in zip(keys, *halves, strict=False)]
    for key, box in zip(keys, boxes, strict=True):
        decrypt(key, box)
    masked = steps + pseudo_rand_gen(seed, MODULUS, [(numbers,)])[0]
    for number, other in enumerate(others):
        mask = pseudo_rand_gen(generate_shared_key(mine, other), MODULUS, [(numbers,)])[0]
        masked = masked + mask if number % 2 else masked - mask
    masked %= MODULUS
    client = time.perf_counter() - began

    total = masked.copy()
    began = time.perf_counter()
    for number in range(clients):
        share = halves[0] if number >= gone else halves[1]
        secret = combine_shares(share[:threshold])
        if number >= gone:
            total = total - pseudo_rand_gen(secret, MODULUS, [(numbers,)])[0]
        else:
            for other in others[: neighbours - gone * neighbours // clients]:
                total = (
                    total
                    - pseudo_rand_gen(generate_shared_key(mine, other), MODULUS, [(numbers,)])[0]
                )
    total %= MODULUS
    return client, time.perf_counter() - began


def ckks(numbers: int, clients: int) -> dict[str, float]:
    """Return seconds to encrypt a row, to add all rows, to decrypt the sum, and bytes of an
    encrypted row.
    """
    import tenseal

    context = tenseal.context(tenseal.SCHEME_TYPE.CKKS, 8192, coeff_mod_bit_sizes=[60, 40, 60])
    context.global_scale = 2.0**40
    row = np.random.default_rng(0).standard_normal(numbers)
    chunks = [row[at : at + 4096] for at in range(0, numbers, 4096)]
    began = time.perf_counter()
    sealed = [tenseal.ckks_vector(context, chunk) for chunk in chunks]
    encrypted = time.perf_counter() - began
    size = sum(len(one.serialize()) for one in sealed)
    began = time.perf_counter()
    total = [one.copy() for one in sealed]
    for _ in range(clients - 1):
        for one, other in zip(total, sealed, strict=True):
            one += other
    added = time.perf_counter() - began
    began = time.perf_counter()
    opened = np.concatenate([one.decrypt() for one in total])
    decrypted = time.perf_counter() - began
    return {
        "encrypt": encrypted,
        "add": added,
        "decrypt": decrypted,
        "bytes": size,
        "error": float(abs(opened / clients - row).max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, value in (
        ("clients", 50),
        ("numbers", 200_000),
        ("neighbours", 44),
        ("gone", 5),
        ("repeats", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    o = parser.parse_args()
    client, unmask = zip(
        *(flower(o.numbers, o.neighbours, o.clients, o.gone) for _ in range(o.repeats)), strict=True
    )
    print(json.dumps({"client": client, "unmask": unmask, "ckks": ckks(o.numbers, o.clients)}))
