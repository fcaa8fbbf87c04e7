"""Decoders against bytes that nobody meant: an error of ours or the right answer, no more memory
than was sent.
"""

import contextlib
import tracemalloc
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medfed.core import codec
from medfed.core.checks import MedfedError
from medfed.secure import masking, shares, three_party
from medfed.secure.identity import Scope
from tests.secure import test_vectors as recorded

SCOPE = Scope("5" * 64, "run", 3)
POSTS = recorded.parties(recorded.SIGNED)
TERMS = masking.MaskingTerms(("a", "b", "c"), 5, 2, 2, 2)


def phase(name: str) -> Callable[[bytes], object]:
    """The server's reading of one client's message in a phase, after the recorded phases before."""

    def read(data: bytes) -> object:
        server = recorded.server()
        for before, said in recorded.MASKED["phases"].items():
            messages = {who: bytes.fromhex(message) for who, message in said.items()}
            of = (b"model",) if before == "rows" else ()
            if before == name:
                return getattr(server, before)({**messages, "a": data}, *of)
            getattr(server, before)(messages, *of)
        return None

    return read


DECODERS: dict[str, tuple[Callable[[bytes], object], bytes]] = {
    "codec": (codec.decode, codec.encode({"a": 1}, {"x": codec.as_tensor(b"abc")})),
    "envelope": (
        lambda data: POSTS["ben"].unwrap(data, SCOPE, "row", "ann"),
        bytes.fromhex(recorded.SIGNED["envelope"]["message"]),
    ),
    "box": (
        lambda data: POSTS["ben"].me.unseal(data, b"purpose"),
        bytes.fromhex(recorded.SIGNED["box"]["message"]),
    ),
    "upload": (three_party._cut, recorded.uploads()["a"]),
    "parts": (
        lambda data: masking._unpack(data, TERMS),
        masking._pack({"a": b"x", "c": b"yz"}, TERMS),
    ),
    "share": (lambda data: shares.rebuild({1: data, 2: bytes(33)}, 2), bytes(33)),
    "keys": (phase("keys"), bytes.fromhex(recorded.MASKED["phases"]["keys"]["a"])),
    "shares": (phase("shares"), bytes.fromhex(recorded.MASKED["phases"]["shares"]["a"])),
    "rows": (phase("rows"), bytes.fromhex(recorded.MASKED["phases"]["rows"]["a"])),
}
FEW = {"keys", "shares", "rows"}  # these play a round each time


def changed(good: bytes) -> st.SearchStrategy[bytes]:
    """The message cut, lengthened, with bytes replaced, or anything at all."""
    at = st.integers(0, max(len(good) - 1, 0))
    piece = st.binary(max_size=12)
    replaced = st.builds(lambda i, p: good[:i] + p + good[i + len(p) :], at, piece)
    return st.one_of(
        replaced,
        st.builds(lambda i: good[:i], at),
        st.builds(lambda p: good + p, piece),
        st.binary(max_size=400),
    )


@pytest.mark.parametrize("name", DECODERS)
def test_nothing_but_our_own_errors(name: str) -> None:
    read, good = DECODERS[name]

    @settings(max_examples=15 if name in FEW else 150, deadline=None)
    @given(changed(good))
    def fuzz(data: bytes) -> None:
        with contextlib.suppress(MedfedError):
            read(data)

    fuzz()


@pytest.mark.parametrize("name", sorted(set(DECODERS) - FEW))
def test_a_length_field_makes_nobody_allocate(name: str) -> None:
    """Every run of eight bytes set to the largest number in turn: memory stays near what
    was sent.
    """
    read, good = DECODERS[name]
    tracemalloc.start()
    for at in range(0, min(len(good), 200), 2):
        with contextlib.suppress(MedfedError):
            read(good[:at] + b"\xff" * 7 + b"\x7f" + good[at + 8 :])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**20 + 20 * len(good)
