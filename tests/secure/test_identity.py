"""Signed envelopes and sealed boxes: each way to tamper is refused, by its own reason."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medfed.core.checks import CodecError, EnvelopeError, RevokedError, SignatureError
from medfed.secure.identity import ANYBODY, Identity, Post, Public, Roster, Scope, seal, verify

ANN, BEN, EVE = (Identity.new(name, "site") for name in ("ann", "ben", "eve"))
ROSTER = Roster.of(ANN.public, BEN.public)
SCOPE = Scope("study", "run", 3)


def sent(to: str = "ben", scope: Scope = SCOPE, sender: Identity = ANN) -> bytes:
    return Post(sender, ROSTER).wrap(scope, "row", to, b"the body")


def read(
    envelope: bytes, scope: Scope = SCOPE, kind: str = "row", sender: str = "ann", to: str = ""
) -> bytes:
    return Post(BEN, ROSTER).unwrap(envelope, scope, kind, sender, to)


def test_what_was_wrapped_is_read_once_by_whom_it_is_for() -> None:
    post = Post(BEN, ROSTER)
    envelope = sent()
    assert post.unwrap(envelope, SCOPE, "row", "ann") == b"the body"
    with pytest.raises(EnvelopeError, match="came twice"):
        post.unwrap(envelope, SCOPE, "row", "ann")
    assert read(sent(ANYBODY), to=ANYBODY) == b"the body"


@pytest.mark.parametrize("at", range(len(sent())))
def test_every_flipped_bit_is_refused(at: int) -> None:
    envelope = bytearray(sent())
    envelope[at % len(envelope)] ^= 1 << (at % 8)
    with pytest.raises(EnvelopeError):
        read(bytes(envelope))


WRONG: dict[str, tuple[Callable[[], bytes], type[EnvelopeError], str]] = {
    "round": (lambda: read(sent(), Scope("study", "run", 4)), EnvelopeError, "round=3; expected 4"),
    "run": (lambda: read(sent(), Scope("study", "other", 3)), EnvelopeError, "run='run'"),
    "study": (lambda: read(sent(), Scope("changed", "run", 3)), EnvelopeError, "study='study'"),
    "kind": (lambda: read(sent(), kind="model"), EnvelopeError, "kind='row'"),
    "sender": (lambda: read(sent(), sender="ben"), EnvelopeError, "sender='ann'"),
    "recipient": (lambda: read(sent("cat")), EnvelopeError, "to='cat'"),
    "cut": (lambda: read(sent()[:-1]), EnvelopeError, "no message"),
    "longer": (lambda: read(sent() + b"x"), EnvelopeError, "no message"),
    "length": (lambda: read(sent()[:8] + b"\xff" * 8 + sent()[16:]), EnvelopeError, "no message"),
    "unsigned": (lambda: read(sent()[:-64] + bytes(64)), SignatureError, "did not sign"),
    "unknown": (lambda: read(sent(sender=EVE), sender="eve"), SignatureError, "not enrolled"),
    "another's": (
        lambda: read(Post(Identity.new("ann", "site"), ROSTER).wrap(SCOPE, "row", "ben", b"")),
        SignatureError,
        "did not sign",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_belongs_elsewhere_is_refused_by_its_reason(name: str) -> None:
    attempt, kind, reason = WRONG[name]
    with pytest.raises(kind, match=reason):
        attempt()


def test_a_revoked_party_no_longer_counts() -> None:
    revoked = Roster({"ann": ANN.public, "ben": BEN.public}, frozenset({"ann"}))
    with pytest.raises(RevokedError, match="Enrol it again"):
        Post(BEN, revoked).unwrap(sent(), SCOPE, "row", "ann")
    assert list(revoked) == ["ben"] and len(revoked) == 1


def test_a_box_opens_for_one_party_and_purpose() -> None:
    box = seal(BEN.public, b"secret", b"purpose")
    assert BEN.unseal(box, b"purpose") == b"secret" and len(box) == 48 + 6
    assert seal(BEN.public, b"secret", b"purpose") != box
    for who, what, why in (
        (ANN, box, b"purpose"),
        (BEN, box, b"other"),
        (BEN, box[:-1], b"purpose"),
        (BEN, b"", b""),
    ):
        with pytest.raises(EnvelopeError):
            who.unseal(what, why)


def test_both_ends_agree_and_nobody_else() -> None:
    ours = ANN.agree(BEN.public.sealing, b"line")
    assert ours == BEN.agree(ANN.public.sealing, b"line")
    assert ours != ANN.agree(BEN.public.sealing, b"other") and ours != EVE.agree(
        BEN.public.sealing, b"line"
    )


def test_keys_are_never_shown() -> None:
    assert repr(ANN) == "Identity(name='ann', role='site')"
    verify(ANN.public, ANN.sign(b"x"), b"x")


@given(st.binary(max_size=200), st.booleans())
def test_no_bytes_crash_the_reader(data: bytes, prefixed: bool) -> None:
    data = b"mfe1" + data if prefixed else data
    with pytest.raises(CodecError):
        read(data)
    with pytest.raises(CodecError):
        BEN.unseal(data, b"purpose")


@pytest.mark.parametrize(
    "weak", [bytes(32), b"\x01" + bytes(31), bytes.fromhex("ecffffff" + "ff" * 27 + "7f")]
)
def test_keys_of_low_order_are_refused(weak: bytes) -> None:
    """For these every shared secret is zero: whoever gives one makes everybody able to read (RFC
    7748, section 6).
    """
    with pytest.raises(EnvelopeError, match="no key to seal to"):
        ANN.agree(weak, b"purpose")
    with pytest.raises(EnvelopeError, match="no key to seal to"):
        seal(Public("eve", "site", ANN.public.signing, weak), b"plain", b"purpose")
    with pytest.raises(EnvelopeError, match="no key to seal to"):
        ANN.unseal(weak + bytes(32), b"purpose")
