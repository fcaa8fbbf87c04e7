"""SecAgg+: the sum is the plain sum under every drop-out pattern; nobody sees a row; a lying server
learns nothing.
"""

import contextlib
import itertools
import random
import struct
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from medfed.core.checks import (
    AbortError,
    CodecError,
    EnvelopeError,
    PlanError,
    RevokedError,
    SignatureError,
)
from medfed.secure import masking
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.masking import (
    EVERYBODY,
    PHASES,
    Client,
    MaskingServer,
    MaskingTerms,
    _pack,
    _unpack,
    run_protocol,
)

SCOPE = Scope("0" * 64, "run", 1)


def names(n):
    return tuple(f"site{i:02d}" for i in range(n))


def majority(n, length=5):
    t = n // 2 + 1
    return MaskingTerms(names(n), length, t, t, n - 1)


def draw(terms, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(-(2**62), 2**62, terms.length) for name in terms.members}


def plain(rows, included):
    with np.errstate(over="ignore"):
        return np.sum([rows[name] for name in sorted(included)], axis=0, dtype=np.int64)


def check(terms, leaves):
    """Run with member i falling silent before phase leaves[i] (5: never) and compare with the plain
    sum.
    """
    rows = draw(terms)
    drops = {
        p: {m for m, left in zip(terms.members, leaves, strict=True) if left == i}
        for i, p in enumerate(PHASES)
    }
    if sum(left == 5 for left in leaves) < terms.quorum:
        with pytest.raises(AbortError, match="expected"):
            run_protocol(rows, terms, drops)
        return
    total, included = run_protocol(rows, terms, drops)
    assert included == {m for m, left in zip(terms.members, leaves, strict=True) if left > 2}
    np.testing.assert_array_equal(total, plain(rows, included))


def test_every_dropout_pattern_of_three():
    for leaves in itertools.product(range(6), repeat=3):
        check(majority(3), leaves)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 5, 6])
def test_every_dropout_pattern_of_four_to_six_but_for_the_order_of_names(n):
    shuffle = random.Random(n).shuffle
    for counts in itertools.combinations_with_replacement(range(6), n):
        leaves = list(counts)
        shuffle(leaves)
        check(majority(n), leaves)


@settings(max_examples=8)
@given(st.data())
def test_sampled_patterns_up_to_forty(data):
    n = data.draw(st.integers(7, 40))
    terms = MaskingTerms.choose(names(n), 9, 0.2, seed=b"public")
    gone = data.draw(
        st.dictionaries(st.integers(0, n - 1), st.integers(0, 4), max_size=n - terms.quorum)
    )
    check(terms, [gone.get(i, 5) for i in range(n)])


def test_terms():
    assert MaskingTerms.choose(names(10), 5, 0.3).quorum == 7
    ring = MaskingTerms.choose(names(60), 5, 0.1, 5, b"seed")
    assert ring.degree < 59 and 2 * ring.threshold > ring.degree + 2
    for name in ring.members:
        assert len(ring.neighbours(name)) == ring.degree and name not in ring.neighbours(name)
        assert all(name in ring.neighbours(other) for other in ring.neighbours(name))
    for n, dropout, malicious in ((2, 0, 0), (10, 0.5, 0), (10, 0.3, 4), (4, 0, -1), (4, 1.0, 0)):
        with pytest.raises(PlanError, match="expected"):
            MaskingTerms.choose(names(n), 5, dropout, malicious)


@pytest.fixture
def cast():
    """Three sites, a server, and a stranger, all with keys; the round as far as the shares."""
    return stage(majority(3, 4096))


def stage(terms):
    people = {n: Identity.new(n, "site") for n in terms.members} | {
        "server": Identity.new("server", "coordinator")
    }
    roster = Roster.of(*(p.public for p in people.values()))
    server = MaskingServer(Post(people["server"], roster), terms, SCOPE)
    clients = {
        name: Client(Post(people[name], roster), terms, SCOPE, "server") for name in terms.members
    }
    rows = {name: np.zeros(terms.length, np.int64) for name in terms.members}
    return SimpleNamespace(
        terms=terms, people=people, roster=roster, server=server, clients=clients, rows=rows
    )


def to_rows(cast, **models):
    keys = cast.server.keys({n: c.keys() for n, c in cast.clients.items()})
    boxes = cast.server.shares({n: c.share(keys) for n, c in cast.clients.items()})
    return {
        n: c.mask(boxes[n], cast.rows[n], models.get(n, b"model")) for n, c in cast.clients.items()
    }


def looks_uniform(words_M):
    octets = words_M.view(np.uint8).reshape(-1, 8)
    return all(chisquare(np.bincount(octets[:, i], minlength=256)).pvalue > 1e-6 for i in (0, 7))


@pytest.mark.parametrize("removed", ["nothing", "self", "pair"])
def test_the_servers_view_is_uniform_and_a_removed_mask_is_caught(cast, removed, monkeypatch):
    own = {c._seed for c in cast.clients.values()}
    expand = masking.expand

    def without(seed, count, start=0, out=None):
        words = expand(seed, count, start, out)
        if removed == ("self" if seed in own else "pair"):
            words[:] = 0
        return words

    monkeypatch.setattr(masking, "expand", without)
    said = to_rows(cast)
    row = {n: np.frombuffer(e[-64 - 8 * 4096 : -64], np.uint64) for n, e in said.items()}
    # what its self seed would reveal
    pairs = row["site00"] - without(cast.clients["site00"]._seed, 4096)
    selves = row["site00"] + row["site01"] + row["site02"]  # pair masks cancel
    assert looks_uniform(row["site00"])
    assert looks_uniform(pairs) == (removed != "pair")
    assert looks_uniform(selves) == (removed != "self")


def tell(cast, kind, parts):
    return cast.server.post.wrap(SCOPE, kind, EVERYBODY, _pack(parts, cast.terms))


def test_different_survivor_lists_open_nothing(cast):
    survivors = cast.server.rows(to_rows(cast), b"model")
    a, b, c = cast.clients.values()
    said = {
        "site00": a.confirm(survivors),
        "site01": b.confirm(tell(cast, "survivors", dict.fromkeys(("site00", "site01"), b""))),
        "site02": c.confirm(tell(cast, "survivors", dict.fromkeys(("site01", "site02"), b""))),
    }
    confirmed = cast.server.confirm(said)
    for client in (a, b, c):
        with pytest.raises(AbortError, match="another list of survivors or another model"):
            client.unmask(confirmed)


def test_rows_of_different_models_open_nothing(cast):
    """Too many of another model: no client unmasks. One: the quorum signs, and the sum is noise."""
    survivors = cast.server.rows(to_rows(cast, site01=b"x", site02=b"y"), b"model")
    confirmed = cast.server.confirm({n: c.confirm(survivors) for n, c in cast.clients.items()})
    for client in cast.clients.values():
        with pytest.raises(AbortError, match="another list of survivors or another model"):
            client.unmask(confirmed)

    wide = stage(MaskingTerms(tuple(names(5)), 4096, 3, 4, 4))
    survivors = wide.server.rows(to_rows(wide, site02=b"another"), b"model")
    said = {n: c.confirm(survivors) for n, c in wide.clients.items()}
    confirmed = wide.server.confirm(said)
    del wide.clients["site02"]  # it sees that it is alone, and unmasks nothing
    total_M, stayed = wide.server.unmask({n: c.unmask(confirmed) for n, c in wide.clients.items()})
    assert len(stayed) == 5 and looks_uniform(total_M)


def test_a_list_without_the_client_or_below_the_quorum_is_not_signed(cast):
    to_rows(cast)
    with pytest.raises(AbortError, match="leaves it out"):
        cast.clients["site02"].confirm(
            tell(cast, "survivors", dict.fromkeys(("site00", "site01"), b""))
        )
    with pytest.raises(AbortError, match="1 of 3"):
        cast.clients["site00"].confirm(tell(cast, "survivors", {"site00": b""}))


def test_both_seeds_of_one_client_are_never_given(cast):
    rows = to_rows(cast)
    survivors = cast.server.rows(rows, b"model")
    client = cast.clients["site00"]
    confirmed = cast.server.confirm({n: c.confirm(survivors) for n, c in cast.clients.items()})
    body = cast.server.post.unwrap(client.unmask(confirmed), SCOPE, "unmask", "site00")
    assert {len(part) for part in _unpack(body, cast.terms).values()} == {33}
    with pytest.raises(EnvelopeError, match="A phase comes once"):
        client.unmask(confirmed)
    with pytest.raises(EnvelopeError, match="A phase comes once"):
        client.confirm(tell(cast, "survivors", dict.fromkeys(("site00", "site01"), b"")))


def test_a_failed_phase_ends_the_round_for_the_client(cast):
    client = cast.clients["site00"]
    client.keys()
    with pytest.raises(EnvelopeError):
        client.share(b"garbage")
    with pytest.raises(EnvelopeError, match="expected nothing more"):
        client.share(b"garbage")


def flip(envelope, at):
    return envelope[:at] + bytes([envelope[at] ^ 1]) + envelope[at + 1 :]


def tampered(cast, envelope):
    stranger = Identity.new("site00", "site")
    body = bytes(96)
    here = Post(cast.people["site00"], cast.roster)

    return {
        "flipped": (flip(envelope, len(envelope) - 70), SignatureError, "did not sign"),
        "truncated": (envelope[:-1], EnvelopeError, "no message"),
        "oversize": (
            envelope[:4] + struct.pack("<IQ", 2**31, 2**62) + envelope[16:],
            EnvelopeError,
            "no message",
        ),
        "round": (
            here.wrap(Scope("0" * 64, "run", 2), "keys", "*", body),
            EnvelopeError,
            "round=2",
        ),
        "sender": (
            Post(cast.people["site01"], cast.roster).wrap(SCOPE, "keys", "*", body),
            EnvelopeError,
            "sender=",
        ),
        "unsigned": (envelope[:-64] + bytes(64), SignatureError, "did not sign"),
        "stranger": (
            Post(stranger, cast.roster).wrap(SCOPE, "keys", "*", body),
            SignatureError,
            "did not sign",
        ),
        "short": (here.wrap(SCOPE, "keys", "*", body[1:]), EnvelopeError, "expected 96"),
        "small order": (here.wrap(SCOPE, "keys", "*", body), EnvelopeError, "no key"),
    }


CASES = [
    "flipped",
    "truncated",
    "oversize",
    "round",
    "sender",
    "unsigned",
    "stranger",
    "short",
    "small order",
]


@pytest.mark.parametrize("case", CASES)
def test_tampered_keys_are_refused_by_client_and_server(cast, case):
    said = {n: c.keys() for n, c in cast.clients.items()}
    bad, error, match = tampered(cast, said["site00"])[case]
    with pytest.raises(error, match=match):
        cast.clients["site01"].share(tell(cast, "all-keys", {**said, "site00": bad}))
    cast.server.keys({**said, "site00": bad})  # the server goes on without it and says so
    assert isinstance(cast.server.refused["site00"], error) and set(cast.server.refused) == {
        "site00"
    }


def test_replayed_and_revoked_and_swapped(cast):
    said = {n: c.keys() for n, c in cast.clients.items()}
    keys = cast.server.keys(said)
    again = MaskingServer(cast.server.post, cast.terms, SCOPE)
    again._ear = cast.server._ear  # which remembers
    with pytest.raises(AbortError, match="0 of 3"):
        again.keys(said)
    assert "came twice" in str(again.refused["site00"])
    revoked = Roster({p.name: p.public for p in cast.people.values()}, frozenset({"site00"}))
    late = MaskingServer(Post(cast.people["server"], revoked), cast.terms, SCOPE)
    late.keys(said)
    assert isinstance(late.refused["site00"], RevokedError)
    sent = {n: c.share(keys) for n, c in cast.clients.items()}

    boxes = {
        n: _unpack(cast.server.post.unwrap(e, SCOPE, "shares", n), cast.terms)
        for n, e in sent.items()
    }
    inbox = {"site01": boxes["site02"]["site00"], "site02": boxes["site01"]["site00"]}
    swapped = cast.server.post.wrap(SCOPE, "boxes", "site00", _pack(inbox, cast.terms))
    with pytest.raises(EnvelopeError, match="do not open"):
        cast.clients["site00"].mask(swapped, cast.rows["site00"], b"model")


@pytest.mark.parametrize(
    "row", [np.zeros(4095, np.int64), np.zeros((1, 4096), np.int64), np.zeros(4096)]
)
def test_a_row_of_another_shape_or_type_is_refused(cast, row):
    cast.rows["site02"] = row
    with pytest.raises(PlanError, match="expected int64"):
        to_rows(cast)


def test_a_short_row_counts_as_a_dropout_and_a_false_share_aborts(cast):
    rows = to_rows(cast)
    rows["site02"] = Post(cast.people["site02"], cast.roster).wrap(
        SCOPE, "rows", "server", bytes(8)
    )
    survivors = cast.server.rows(rows, b"model")
    assert "masked row of 8 bytes" in str(cast.server.refused["site02"])
    a, b = (cast.clients[n] for n in ("site00", "site01"))
    confirmed = cast.server.confirm(
        {"site00": a.confirm(survivors), "site01": b.confirm(survivors)}
    )
    a._held["site01"] = bytes(66)
    with pytest.raises(AbortError, match="site01"):
        cast.server.unmask({"site00": a.unmask(confirmed), "site01": b.unmask(confirmed)})


def test_one_false_share_is_found_and_named_where_there_are_others():
    """Five hold shares and three rebuild a seed: the sum is right, and the liar is known."""
    terms = MaskingTerms(tuple(names(5)), 16, 3, 4, 4)
    cast = stage(terms)
    cast.rows = {name: np.arange(16) * i for i, name in enumerate(terms.members)}
    survivors = cast.server.rows(to_rows(cast), b"model")
    confirmed = cast.server.confirm({n: c.confirm(survivors) for n, c in cast.clients.items()})
    cast.clients["site01"]._held["site03"] = bytes(66)
    total_M, stayed = cast.server.unmask({n: c.unmask(confirmed) for n, c in cast.clients.items()})
    assert len(stayed) == 5 and (total_M == np.arange(16) * 10).all()
    assert "false" in str(cast.server.refused["site01"]) and len(cast.server.refused) == 1


def test_the_servers_phases_come_once_and_in_order(cast):
    with pytest.raises(AbortError, match="expected phase=keys"):
        cast.server.rows({}, b"model")
    rows = to_rows(cast)
    cast.server.rows(rows, b"model")
    with pytest.raises(AbortError, match="expected phase=confirm"):
        cast.server.rows(rows, b"model")


def test_the_ring_follows_from_everybodys_keys():
    """Neither the server nor a member picks it: other keys, another order; one broadcast, one order
    for all.
    """
    terms = MaskingTerms.choose(names(60), 5, 0.1, 5, b"seed")
    orders = set()
    for _ in range(2):
        cast = stage(terms)
        keys = cast.server.keys({n: c.keys() for n, c in cast.clients.items()})
        for name in ("site00", "site01"):
            cast.clients[name].share(keys)
        drawn = {cast.clients[name]._terms._ring for name in ("site00", "site01")}
        assert drawn == {cast.server.terms._ring}
        orders |= drawn
    assert len(orders) == 2 and terms._ring not in orders


@pytest.mark.parametrize("u", sorted(masking._SMALL_ORDER))
@pytest.mark.parametrize("top", [0, 1 << 255])
def test_the_points_of_small_order_are_those_that_nobody_can_agree_with(u, top):
    public = (u | top).to_bytes(32, "little")
    with pytest.raises(ValueError, match="shared key"):
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    with pytest.raises(EnvelopeError, match="no key"):
        masking._keys(bytes([9]) + bytes(31) + public + bytes(32))


@pytest.mark.parametrize(
    "wrong",
    [
        {"members": ("b", "a", "c")},
        {"members": ("a", "b")},
        {"members": ("a", "b", "*")},
        {"length": 0},
        {"quorum": 1},
        {"quorum": 4},
        {"threshold": 1},
        {"threshold": 4},
        {"degree": 1},
        {"degree": 3},
    ],
)
def test_terms_that_do_not_protect_are_refused(wrong):
    good = {"members": ("a", "b", "c"), "length": 5, "quorum": 3, "threshold": 3, "degree": 2}
    MaskingTerms(**good)
    with pytest.raises(PlanError, match="no terms of a masked sum"):
        MaskingTerms(**(good | wrong))


def test_those_who_dropped_out_do_not_count_against_the_survivors(cast):
    """A client that signed and is not on the list has no say: it may have been told anything."""
    rows = to_rows(cast)
    gone = rows.pop("site02")
    survivors = cast.server.rows(rows, b"model")
    assert gone
    a, b = (cast.clients[n] for n in ("site00", "site01"))
    signed = {"site00": a.confirm(survivors), "site01": b.confirm(survivors)}
    stranger = Post(cast.people["site02"], cast.roster).wrap(SCOPE, "confirm", "*", bytes(96))
    told = tell(cast, "confirmed", {**signed, "site02": stranger})
    assert a.unmask(told)


def test_bytes_of_an_upload(cast):
    assert len(to_rows(cast)["site00"]) < 8 * 4096 + 400


@settings(max_examples=200)
@given(st.binary(max_size=80))
def test_decoders_survive_anything(body):
    terms = majority(3)
    with contextlib.suppress(CodecError):
        assert _pack(_unpack(body, terms), terms) == body
