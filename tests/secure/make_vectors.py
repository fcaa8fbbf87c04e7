"""Record the vectors of `test_vectors.py`: keys, messages and what they come to. For a new version
of the wire format.

    python -m tests.secure.make_vectors

Nothing is drawn from a seed: the files hold every secret that a reader needs. The keys are for
these tests alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from medfed.secure import field, masking, shares, three_party
from medfed.secure.identity import MAGIC, Identity, Post, Roster, Scope, seal

HERE = Path(__file__).parent / "vectors"
SCOPE = Scope("5" * 64, "run", 3)
EVE = "eve"  # enrolled, then revoked


def party(name: str, role: str = "site") -> tuple[Identity, dict[str, str]]:
    """Return an identity, and what a vector keeps of it."""
    made = Identity.new(name, role)
    return made, {"name": name, "role": role, "secret": made.secret().hex()}


def identity() -> dict[str, Any]:
    """Envelopes and boxes, whole and tampered with."""
    (ann, kept_ann) = party("ann")
    (ben, kept_ben) = party("ben")
    (eve, kept_eve) = party(EVE)
    roster = Roster.of(ann.public, ben.public, eve.public)
    good = Post(ann, roster).wrap(SCOPE, "row", "ben", b"the body")

    def other(
        scope: Scope = SCOPE, kind: str = "row", to: str = "ben", by: Identity = ann
    ) -> bytes:
        return Post(by, roster).wrap(scope, kind, to, b"the body")

    flipped = bytearray(good)
    flipped[len(good) - 70] ^= 4
    stranger = Identity.new("ann", "site")
    tampered = {
        "flipped bit": (bytes(flipped), "SignatureError"),
        "wrong round": (other(Scope(SCOPE.study, SCOPE.run, 4)), "EnvelopeError"),
        "wrong run": (other(Scope(SCOPE.study, "other", 3)), "EnvelopeError"),
        "wrong study": (other(Scope("6" * 64, "run", 3)), "EnvelopeError"),
        "wrong kind": (other(kind="model"), "EnvelopeError"),
        "wrong recipient": (other(to="cat"), "EnvelopeError"),
        "wrong sender": (other(by=ben), "EnvelopeError"),
        "another's keys": (other(by=stranger), "SignatureError"),
        "revoked key": (other(by=eve), "RevokedError"),
        "unsigned": (good[:-64] + bytes(64), "SignatureError"),
        "truncated": (good[:-1], "EnvelopeError"),
        "oversize length field": (good[:8] + b"\xff" * 7 + b"\x7f" + good[16:], "EnvelopeError"),
        "another format": (b"mfe2" + good[4:], "EnvelopeError"),
        "empty": (b"", "EnvelopeError"),
    }
    assert good.startswith(MAGIC)
    box = seal(ben.public, b"for ben", b"purpose")
    return {
        "parties": [kept_ann, kept_ben, kept_eve],
        "envelope": {"message": good.hex(), "body": b"the body".hex()},
        "tampered": [{"case": k, "message": m.hex(), "error": e} for k, (m, e) in tampered.items()],
        "box": {"message": box.hex(), "purpose": b"purpose".hex(), "plain": b"for ben".hex()},
    }


def three() -> dict[str, Any]:
    """Uploads to three aggregators, and what these open."""
    kept = []
    keys = []
    for name, role in [*((n, "aggregator") for n in "pqr"), *((n, "site") for n in "abc")]:
        made, one = party(name, role)
        keys.append(made)
        kept.append(one)

    roster = Roster.of(*(one.public for one in keys))
    rows = {name: np.array([i, -(10**i), 7, 0]) for i, name in enumerate("abc", 1)}
    terms = three_party.SharingTerms(4, 2000.0, ("p", "q", "r"))
    sent = {
        one.name: three_party.share(Post(one, roster), SCOPE, rows[one.name], terms)
        for one in keys[3:]
    }
    stacked = np.stack(list(rows.values()))

    return {
        "parties": kept,
        "bound": terms.bound,
        "rows": {name: row.tolist() for name, row in rows.items()},
        "uploads": {name: upload.hex() for name, upload in sent.items()},
        "sum": stacked.sum(0).tolist(),
        "gram": (stacked @ stacked.T).tolist(),
    }


def masks() -> dict[str, Any]:
    """All messages of a masked round in which one of four drops out after it shared."""
    names = ("a", "b", "c", "d")
    made = {name: party(name) for name in names} | {"server": party("server", "coordinator")}
    roster = Roster.of(*(one.public for one, _ in made.values()))
    terms = masking.MaskingTerms.choose(names, 3, 0.25)
    server = masking.MaskingServer(Post(made["server"][0], roster), terms, SCOPE)
    clients = {
        name: masking.Client(Post(made[name][0], roster), terms, SCOPE, "server") for name in names
    }
    rows = {name: np.array([i, -i, 2**40]) for i, name in enumerate(names)}
    phases: dict[str, dict[str, bytes]] = {
        "keys": {name: one.keys() for name, one in clients.items()}
    }
    told = server.keys(phases["keys"])
    phases["shares"] = {name: one.share(told) for name, one in clients.items()}
    boxes = server.shares(phases["shares"])
    del clients["c"]
    phases["rows"] = {
        name: one.mask(boxes[name], rows[name], b"model") for name, one in clients.items()
    }
    told = server.rows(phases["rows"], b"model")
    phases["confirm"] = {name: one.confirm(told) for name, one in clients.items()}
    told = server.confirm(phases["confirm"])
    phases["unmask"] = {name: one.unmask(told[name]) for name, one in clients.items()}
    total_M, _ = server.unmask(phases["unmask"])

    return {
        "parties": [kept for _, kept in made.values()],
        "length": 3,
        "dropout": 0.25,
        "phases": {phase: {n: m.hex() for n, m in said.items()} for phase, said in phases.items()},
        "sum": total_M.tolist(),
        "survivors": sorted(clients),
    }


def numbers() -> dict[str, Any]:
    """Fixed point, products mod 2^64, and Shamir's shares."""
    x = [0.0, 0.5, -0.5, 1.25e-6, -63.999, 64.0]
    a = np.array([[2**63, 3, 2**40], [2**64 - 1, 5, 7]], np.uint64)
    secret = bytes(range(32))

    return {
        "fixed point": {
            "bits": 20,
            "bound": 64.0,
            "x": x,
            "steps": field.encode(np.array(x), 20, 64.0).tolist(),
        },
        "product": {
            "a": [[str(v) for v in row] for row in a],
            "aat": [[str(v) for v in r] for r in field.matmul(a, a.T)],
        },
        "shamir": {
            "secret": secret.hex(),
            "threshold": 3,
            "shares": {
                str(p): s.hex()
                for p, s in zip(range(1, 6), shares.split(secret, 3, range(1, 6)), strict=True)
            },
        },
    }


if __name__ == "__main__":
    for name, made in (
        ("identity", identity()),
        ("three_party", three()),
        ("masking", masks()),
        ("numbers", numbers()),
    ):
        (HERE / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
