"""Recorded messages come to the same results in every later version; tampered ones are refused by
their own errors.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medfed.core import checks
from medfed.core.checks import AbortError, CodecError, EnvelopeError, PlanError
from medfed.secure import field, masking, shares
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.three_party import (
    Opened,
    Selection,
    SharingAggregator,
    SharingTerms,
    in_turn,
    relay,
)

SCOPE = Scope("5" * 64, "run", 3)


def vector(name: str) -> Any:
    return json.loads((Path(__file__).parent / "vectors" / f"{name}.json").read_text())


def parties(found: Any, revoked: frozenset[str] = frozenset()) -> dict[str, Post]:
    keys = [
        Identity.of(one["name"], one["role"], bytes.fromhex(one["secret"]))
        for one in found["parties"]
    ]
    roster = Roster({key.name: key.public for key in keys}, revoked)
    return {key.name: Post(key, roster) for key in keys}


# envelopes ----------------------------------------------------------------------------------------

SIGNED = vector("identity")


def test_an_envelope_and_a_box_are_read() -> None:
    ben = parties(SIGNED)["ben"]
    message = bytes.fromhex(SIGNED["envelope"]["message"])
    assert ben.unwrap(message, SCOPE, "row", "ann").hex() == SIGNED["envelope"]["body"]
    with pytest.raises(EnvelopeError, match="came twice"):  # the replayed nonce
        ben.unwrap(message, SCOPE, "row", "ann")
    box = SIGNED["box"]
    assert (
        ben.me.unseal(bytes.fromhex(box["message"]), bytes.fromhex(box["purpose"])).hex()
        == box["plain"]
    )
    with pytest.raises(EnvelopeError, match="does not open"):
        ben.me.unseal(bytes.fromhex(box["message"]), b"another purpose")


@pytest.mark.parametrize("case", SIGNED["tampered"], ids=lambda case: case["case"])
def test_a_tampered_envelope_is_refused_by_its_own_error(case: Any) -> None:
    ben = parties(SIGNED, frozenset({"eve"}))["ben"]
    sender = "eve" if case["case"] == "revoked key" else "ann"
    with pytest.raises(CodecError) as caught:
        ben.unwrap(bytes.fromhex(case["message"]), SCOPE, "row", sender)
    assert type(caught.value) is getattr(checks, case["error"])


# three parties ------------------------------------------------------------------------------------

SHARED = vector("three_party")


def opened(
    uploads: dict[str, bytes], scope: Scope = SCOPE, selection: Selection | None = None
) -> Opened:
    posts = parties(SHARED)
    terms = SharingTerms(len(SHARED["sum"]), SHARED["bound"], ("p", "q", "r"))
    three = {
        name: SharingAggregator(posts[name], terms, scope.study, scope.run, selection=selection)
        for name in terms.aggregators
    }
    return relay(in_turn(three), scope, uploads, terms)


def uploads() -> dict[str, bytes]:
    return {name: bytes.fromhex(upload) for name, upload in SHARED["uploads"].items()}


def test_uploads_are_summed() -> None:
    assert opened(uploads()).total_M.tolist() == SHARED["sum"]
    found = opened(uploads(), selection=Selection(lambda gram: np.full(len(gram), 1 / len(gram))))
    assert found.gram_KK is not None and found.gram_KK.tolist() == SHARED["gram"]


def test_every_byte_of_an_upload_matters() -> None:
    """Flipped anywhere, its row is left out, and the others' sum is opened."""
    whole = uploads()
    rest = (np.array(SHARED["sum"]) - SHARED["rows"]["b"]).tolist()
    for at in range(0, len(whole["b"]), 23):
        changed = bytearray(whole["b"])
        changed[at] ^= 1 << (at % 8)
        found = opened({**whole, "b": bytes(changed)})
        assert found.total_M.tolist() == rest and set(found.excluded) == {"b"}


TAMPERED = {
    "truncated": lambda sent: {**sent, "b": sent["b"][:-1]},
    "longer": lambda sent: {**sent, "b": sent["b"] + b"x"},
    "swapped": lambda sent: {**sent, "b": sent["c"], "c": sent["b"]},
    "another's": lambda sent: {**sent, "b": sent["a"]},
    "oversize length field": lambda sent: {
        **sent,
        "b": sent["b"][:6] + b"\xff" * 12 + sent["b"][18:],
    },
    "empty": lambda sent: {**sent, "b": b""},
    "swapped shares": lambda sent: {**sent, "b": sent["b"][:-32] + sent["c"][-32:]},
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_tampered_upload_is_left_out_with_a_reason(case: str) -> None:
    if case == "swapped":
        with pytest.raises(AbortError, match="1 rows are left"):
            opened(TAMPERED[case](uploads()))
        return
    found = opened(TAMPERED[case](uploads()))
    assert "b" not in found.accepted and "shares" in found.excluded["b"]


def test_uploads_of_another_round_open_nothing() -> None:
    with pytest.raises(AbortError, match=r"0 rows are left.*round=3; expected 4"):
        opened(uploads(), Scope(SCOPE.study, SCOPE.run, 4))


# masks --------------------------------------------------------------------------------------------

MASKED = vector("masking")


def server() -> masking.MaskingServer:
    posts = parties(MASKED)
    names = [name for name in posts if name != "server"]
    terms = masking.MaskingTerms.choose(names, MASKED["length"], MASKED["dropout"])
    return masking.MaskingServer(posts["server"], terms, SCOPE)


def played(changed: dict[str, dict[str, bytes]] | None = None) -> tuple[masking.MaskingServer, Any]:
    it = server()
    found = None
    for phase, said in MASKED["phases"].items():
        messages = {name: bytes.fromhex(message) for name, message in said.items()}
        of = (b"model",) if phase == "rows" else ()
        found = getattr(it, phase)(messages | (changed or {}).get(phase, {}), *of)
    return it, found


def test_a_recorded_round_comes_to_its_sum() -> None:
    _, (total_M, survivors) = played()
    assert total_M.tolist() == MASKED["sum"] and sorted(survivors) == MASKED["survivors"]


@pytest.mark.parametrize(("phase", "at"), list(itertools.product(MASKED["phases"], [0, 3, 40, -1])))
def test_a_flipped_bit_in_any_phase_is_noticed(phase: str, at: int) -> None:
    """The sender drops out; with one gone already, the round ends below its quorum, and nothing is
    opened.
    """
    message = bytearray(bytes.fromhex(MASKED["phases"][phase]["a"]))
    message[at] ^= 1
    with pytest.raises(AbortError, match=r"Refused: a|do not fit"):
        played({phase: {"a": bytes(message)}})


@pytest.mark.parametrize("phase", MASKED["phases"])
def test_another_phases_and_anothers_messages_are_refused(phase: str) -> None:
    for other, sender in (("keys" if phase != "keys" else "shares", "a"), (phase, "b")):
        with pytest.raises(AbortError, match="Refused: a"):
            played({phase: {"a": bytes.fromhex(MASKED["phases"][other][sender])}})


# numbers ------------------------------------------------------------------------------------------

NUMBERS = vector("numbers")


def test_fixed_point_products_and_shares() -> None:
    fixed = NUMBERS["fixed point"]
    product = NUMBERS["product"]
    shamir = NUMBERS["shamir"]
    assert (
        field.encode(np.array(fixed["x"]), fixed["bits"], fixed["bound"]).tolist() == fixed["steps"]
    )
    assert fixed["steps"] == [round(x * 2**20) for x in fixed["x"]]
    for bad in (np.nan, np.inf, 64.1, -65.0):
        with pytest.raises(PlanError, match="not finite or above"):
            field.encode(np.array([bad]), fixed["bits"], fixed["bound"])
    a = np.array([[int(v) for v in row] for row in product["a"]], np.uint64)
    exact = [
        [sum(int(x) * int(y) for x, y in zip(r, s, strict=True)) % 2**64 for s in a] for r in a
    ]
    assert (
        [[int(v) for v in row] for row in product["aat"]]
        == exact
        == field.matmul(a, a.T.copy()).tolist()
    )
    held = {int(point): bytes.fromhex(share) for point, share in shamir["shares"].items()}
    for chosen in itertools.combinations(held, 3):
        assert shares.rebuild({p: held[p] for p in chosen}, 3).hex() == shamir["secret"]
    # swapped
    assert shares.rebuild({1: held[2], 2: held[1], 3: held[3]}, 3).hex() != shamir["secret"]
