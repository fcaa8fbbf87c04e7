"""SecAgg+: the sum is the plain sum under every drop-out pattern; nobody sees a row; a lying server
learns nothing.
"""

import contextlib
import itertools
import random
import struct
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from medfed.core.checks import (
    AbortError,
    CodecError,
    EnvelopeError,
    PlanError,
    RecordError,
    RevokedError,
    SignatureError,
)
from medfed.secure import masking
from medfed.secure.agreements import Agreements, derive
from medfed.secure.chain import Follower
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
from medfed.secure.party import Masker
from medfed.secure.record import Record

SCOPE = Scope("0" * 64, "run", 1)


def names(n):
    return tuple(f"site{i:02d}" if n <= 100 else f"site{i:03d}" for i in range(n))


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
@pytest.mark.parametrize("n", [4, 5, pytest.param(6, marks=pytest.mark.long)])
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
    ring = MaskingTerms.choose(names(120), 5, 0.1, 12, b"seed")
    assert ring.sparse and ring.degree < 60 and 2 * ring.threshold > ring.degree + 2
    for name in ring.members:
        assert name not in ring.neighbours(name) and set(ring.neighbours(name)) < set(ring.members)
        assert all(name in ring.neighbours(other) for other in ring.neighbours(name))
        assert ring.list_neighbours()[name] == ring.neighbours(name)
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
    for name, client in cast.clients.items():
        with pytest.raises(AbortError, match="another list of survivors or another model"):
            client.unmask(confirmed[name])


def test_rows_of_different_models_open_nothing(cast):
    """Too many of another model: no client unmasks. One: the quorum signs, and the sum is noise."""
    survivors = cast.server.rows(to_rows(cast, site01=b"x", site02=b"y"), b"model")
    confirmed = cast.server.confirm({n: c.confirm(survivors) for n, c in cast.clients.items()})
    for name, client in cast.clients.items():
        with pytest.raises(AbortError, match="another list of survivors or another model"):
            client.unmask(confirmed[name])

    wide = stage(MaskingTerms(tuple(names(5)), 4096, 3, 4, 4))
    survivors = wide.server.rows(to_rows(wide, site02=b"another"), b"model")
    said = {n: c.confirm(survivors) for n, c in wide.clients.items()}
    confirmed = wide.server.confirm(said)
    del wide.clients["site02"]  # it sees that it is alone, and unmasks nothing
    total_M, stayed = wide.server.unmask(
        {n: c.unmask(confirmed[n]) for n, c in wide.clients.items()}
    )
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
    body = cast.server.post.unwrap(client.unmask(confirmed["site00"]), SCOPE, "unmask", "site00")
    assert {len(part) for part in _unpack(body, cast.terms).values()} == {33}
    with pytest.raises(EnvelopeError, match="A phase comes once"):
        client.unmask(confirmed["site00"])
    with pytest.raises(EnvelopeError, match="A phase comes once"):
        client.confirm(tell(cast, "survivors", dict.fromkeys(("site00", "site01"), b"")))


class Open:
    """One round of clients who have records, as far as the confirmed list; `gone` say no more."""

    def __init__(self, cast, records, round, gone=()):
        scope = Scope("0" * 64, "run", round)
        stay = [n for n in cast.terms.members if n not in gone]
        post = {n: Post(cast.people[n], cast.roster) for n in [*cast.terms.members, "server"]}
        self.server = MaskingServer(post["server"], cast.terms, scope)
        self.clients = {
            n: Client(post[n], cast.terms, scope, "server", records[n]) for n in cast.terms.members
        }
        keys = self.server.keys({n: c.keys() for n, c in self.clients.items()})
        boxes = self.server.shares({n: c.share(keys) for n, c in self.clients.items()})
        sent = {n: self.clients[n].mask(boxes[n], cast.rows[n], b"model") for n in stay}
        survivors = self.server.rows(sent, b"model")
        self.confirmed = self.server.confirm({n: self.clients[n].confirm(survivors) for n in stay})

    def unmask(self):
        said = {n: self.clients[n].unmask(told) for n, told in self.confirmed.items()}
        return self.server.unmask(said)[0]


def test_a_round_is_not_opened_once_a_later_one_was_answered(tmp_path):
    """Given up, and opened when the next round is behind it, over one site less: the difference of
    the two sums was that site's row, where no noise hides it and both are of one model.
    """
    cast = stage(majority(5, 8))
    cast.rows = draw(cast.terms)
    records = {n: Record(tmp_path / f"{n}.record") for n in cast.terms.members}
    first = Open(cast, records, 1)
    later = Open(cast, records, 2, gone=("site02",))
    total_M = later.unmask()
    with pytest.raises(RecordError, match=r"round=1 .*round 2 was begun since"):
        difference_M = first.unmask() - total_M
        assert (difference_M == cast.rows["site02"]).all()
        pytest.fail("its row was read")
    restarted = {n: Record(tmp_path / f"{n}.record") for n in cast.terms.members}
    with pytest.raises(RecordError, match=r"round=1 .*round 2 was begun since"):
        Open(cast, restarted, 1)


def test_two_rounds_of_one_model_differ_by_a_row_with_nothing_given_up(tmp_path):
    """What giving up adds nothing to: a server that opens both rounds, and signs one model for
    both. Only noise hides it.
    """
    cast = stage(majority(5, 8))
    cast.rows = draw(cast.terms)
    records = {n: Record(tmp_path / f"{n}.record") for n in cast.terms.members}
    first_M = Open(cast, records, 1).unmask()
    later_M = Open(cast, records, 2, gone=("site02",)).unmask()
    assert (first_M - later_M == cast.rows["site02"]).all()


def test_no_phase_comes_again_once_a_later_one_was_played(cast):
    """Asked for its keys anew, a client would share both of its seeds for a second list."""
    client = cast.clients["site00"]

    def refuses(*phases):
        acts = {
            "keys": lambda: client.keys(),
            "reveal": lambda: client.reveal(b""),
            "share": lambda: client.share(b""),
            "mask": lambda: client.mask(b"", cast.rows["site00"], b"model"),
            "confirm": lambda: client.confirm(b""),
            "unmask": lambda: client.unmask(b""),
        }
        phase = client._phases
        for name in phases:
            with pytest.raises(EnvelopeError, match="A phase comes once"):
                acts[name]()
            assert client._phases == phase

    rows = to_rows(cast)
    refuses("keys", "reveal", "share", "mask", "unmask")
    survivors = cast.server.rows(rows, b"model")
    confirmed = cast.server.confirm({n: c.confirm(survivors) for n, c in cast.clients.items()})
    refuses("keys", "reveal", "share", "mask", "confirm")
    client.unmask(confirmed["site00"])
    refuses("keys", "reveal", "share", "mask", "confirm", "unmask")


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
        cast.server.unmask({n: c.unmask(confirmed[n]) for n, c in (("site00", a), ("site01", b))})


def test_one_false_share_is_found_and_named_where_there_are_others():
    """Five hold shares and three rebuild a seed: the sum is right, and the liar is known."""
    terms = MaskingTerms(tuple(names(5)), 16, 3, 4, 4)
    cast = stage(terms)
    cast.rows = {name: np.arange(16) * i for i, name in enumerate(terms.members)}
    survivors = cast.server.rows(to_rows(cast), b"model")
    confirmed = cast.server.confirm({n: c.confirm(survivors) for n, c in cast.clients.items()})
    cast.clients["site01"]._held["site03"] = bytes(66)
    total_M, stayed = cast.server.unmask(
        {n: c.unmask(confirmed[n]) for n, c in cast.clients.items()}
    )
    assert len(stayed) == 5 and (total_M == np.arange(16) * 10).all()
    assert "false" in str(cast.server.refused["site01"]) and len(cast.server.refused) == 1


def test_the_servers_phases_come_once_and_in_order(cast):
    with pytest.raises(AbortError, match="expected phase=keys"):
        cast.server.rows({}, b"model")
    rows = to_rows(cast)
    cast.server.rows(rows, b"model")
    with pytest.raises(AbortError, match="expected phase=confirm"):
        cast.server.rows(rows, b"model")


def sparse_terms(n=120):
    """A tenth may lie and a tenth drop out."""
    terms = MaskingTerms.choose(names(n), 5, 0.1, n // 10, b"seed")
    assert terms.sparse
    return terms


def test_a_sparse_graph_follows_from_everybodys_nonces():
    """Neither the server nor a member picks it: other nonces, another graph; one broadcast, one
    graph for all.
    """
    terms = sparse_terms()
    graphs = set()
    for _ in range(2):
        cast = stage(terms)
        keys = cast.server.keys({n: c.keys() for n, c in cast.clients.items()})
        nonces = cast.server.reveal({n: c.reveal(keys) for n, c in cast.clients.items()})
        for name in ("site000", "site001"):
            cast.clients[name].share(nonces)
        drawn = {cast.clients[name]._terms.neighbours("site000") for name in ("site000", "site001")}
        assert drawn == {cast.server.terms.neighbours("site000")}
        graphs |= drawn
    assert len(graphs) == 2 and terms.neighbours("site000") not in graphs


def test_who_advertises_last_foresees_no_graph():
    """The attack: try keys until the graph that follows has liars beside a victim. It succeeded
    while the graph followed from the keys: what was tried was what was drawn.
    """
    terms = sparse_terms()
    cast = stage(terms)
    liars = set(terms.members[-12:])
    last = terms.members[-1]
    said = {n: c.keys() for n, c in cast.clients.items()}
    own = {n: cast.clients[n]._nonce for n in liars}  # all the nonces that liars know

    def foresee(message):
        """The likeliest of what liars can compute before the others reveal theirs."""
        body = _pack({**said, last: message}, terms)
        guesses = [body, masking.sha256(body).digest() + _pack(own, terms)]
        return [terms.drawn(guess).neighbours("site000") for guess in guesses]

    tries = []
    for _ in range(40):
        client = Client(Post(cast.people[last], cast.roster), terms, SCOPE, "server")
        message = client.keys()
        own[last] = client._nonce
        tries += [(len(liars & set(near)), near, client, message) for near in foresee(message)]
    _, near, client, message = max(tries, key=lambda found: found[0])

    cast.clients[last] = client
    keys = cast.server.keys({**said, last: message})
    cast.server.reveal({n: c.reveal(keys) for n, c in cast.clients.items()})
    assert cast.server.terms.neighbours("site000") not in [found[1] for found in tries]
    assert near != cast.server.terms.neighbours("site000")


def test_a_nonce_that_is_withheld_or_changed_ends_the_round():
    """Who has seen the others' nonces cannot choose between two graphs, nor answer twice."""
    cast = stage(sparse_terms())
    keys = cast.server.keys({n: c.keys() for n, c in cast.clients.items()})
    said = {n: c.reveal(keys) for n, c in cast.clients.items()}
    nonces = {n: cast.server.post.unwrap(e, SCOPE, "reveal", n) for n, e in said.items()}
    gone = {n: nonce for n, nonce in nonces.items() if n != "site119"}
    for told in (gone, {**gone, "site119": bytes(32)}):
        with pytest.raises(AbortError, match=r"site119.*nobody knows the graph"):
            next(c for c in cast.clients.values() if c._phases[:1] == ("shares",)).share(
                tell(cast, "all-nonces", told)
            )
    with pytest.raises(EnvelopeError, match="A phase comes once"):
        cast.clients["site005"].reveal(keys)
    again = MaskingServer(Post(cast.people["server"], cast.roster), cast.terms, SCOPE)
    again.keys({n: c._advertised for n, c in cast.clients.items()})
    del said["site007"]
    with pytest.raises(AbortError, match=r"site007.*start the round again"):
        again.reveal(said)


def test_a_round_is_begun_a_bounded_number_of_times():
    cast = stage(majority(3))
    follower = Follower(Post(cast.people["site00"], cast.roster), SCOPE.study, SCOPE.run, "server")
    masker = Masker(follower, lambda told, round: cast.terms)
    for _ in range(masking.ATTEMPTS):
        masker.answer("keys", 1, cast.terms.members, b"")
    with pytest.raises(AbortError, match="began 65 times"):
        masker.answer("keys", 1, cast.terms.members, b"")
    assert masker.answer("keys", 2, cast.terms.members, b"")


@pytest.mark.parametrize("phase", [None, *masking.SPARSE_PHASES])
def test_a_sparse_round_is_the_plain_sum_or_is_aborted(phase):
    """Who drops out before the rows is not in it; between keys and nonces the round ends."""
    terms = sparse_terms()
    rows = draw(terms)
    gone = set(terms.members[3:120:17]) if phase else set()
    if phase == "reveal":
        with pytest.raises(AbortError, match="phase reveal"):
            run_protocol(rows, terms, {phase: gone})
        return
    total, included = run_protocol(rows, terms, {phase: gone} if phase else None)
    late = phase in ("confirm", "unmask", None)
    assert included == set(terms.members) - (set() if late else gone)
    np.testing.assert_array_equal(total, plain(rows, included))


def test_a_list_that_few_signed_passes_no_sample():
    """More than (n + f) / 2 must have signed: with fewer true signatures every client finds one
    that is false, whichever it draws.
    """
    cast = stage(sparse_terms())
    keys = cast.server.keys({n: c.keys() for n, c in cast.clients.items()})
    keys = cast.server.reveal({n: c.reveal(keys) for n, c in cast.clients.items()})
    boxes = cast.server.shares({n: c.share(keys) for n, c in cast.clients.items()})
    rows = {n: c.mask(boxes[n], cast.rows[n], b"model") for n, c in cast.clients.items()}
    whole = cast.server.rows(rows, b"model")
    fewer = tell(cast, "survivors", dict.fromkeys(cast.terms.members[:-1], b""))
    split = {
        n: c.confirm(whole if at % 2 else fewer)
        for at, (n, c) in enumerate(list(cast.clients.items())[:-1])
    }
    signed = {n: cast.server.post.unwrap(e, SCOPE, "confirm", n) for n, e in split.items()}
    body = _pack(signed, cast.terms)
    for name in list(cast.clients)[:-1]:
        told = cast.server.post.wrap(SCOPE, "confirmed", name, body)
        with pytest.raises(AbortError, match="another list of survivors or another model"):
            cast.clients[name].unmask(told)


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_client_counts_its_own_signature_once(lacking):
    """The server hands it back with the others', which may be one too few."""
    cast = stage(sparse_terms())
    quorum = cast.terms.quorum
    keys = cast.server.keys({n: c.keys() for n, c in cast.clients.items()})
    keys = cast.server.reveal({n: c.reveal(keys) for n, c in cast.clients.items()})
    boxes = cast.server.shares({n: c.share(keys) for n, c in cast.clients.items()})
    rows = {n: c.mask(boxes[n], cast.rows[n], b"model") for n, c in cast.clients.items()}
    survivors = cast.server.rows(rows, b"model")
    signers = cast.terms.members[: quorum - lacking]
    said = {n: cast.clients[n].confirm(survivors) for n in signers}
    signed = {n: cast.server.post.unwrap(e, SCOPE, "confirm", n) for n, e in said.items()}
    told = cast.server.post.wrap(SCOPE, "confirmed", signers[0], _pack(signed, cast.terms))
    if not lacking:
        assert cast.clients[signers[0]].unmask(told)
        return
    with pytest.raises(
        AbortError, match=f"phase unmask: {quorum - 1} of {len(cast.terms.members)}"
    ):
        cast.clients[signers[0]].unmask(told)


def test_seeds_are_shared_and_rows_sent_only_where_enough_neighbours_are_there():
    """Fewer than a threshold could never rebuild them."""
    cast = stage(majority(5))
    keys = {n: c.keys() for n, c in cast.clients.items()}
    few = ("site00", "site01")
    with pytest.raises(AbortError, match="phase shares: 1 neighbours of 'site00' answered"):
        cast.clients["site00"].share(tell(cast, "all-keys", {n: keys[n] for n in few}))

    everybody = cast.server.keys(keys)
    others = [name for name in cast.clients if name != "site00"]
    sent = {n: cast.clients[n].share(everybody) for n in others}
    box = _unpack(cast.server.post.unwrap(sent["site02"], SCOPE, "shares", "site02"), cast.terms)
    inbox = _pack({"site02": box["site01"]}, cast.terms)
    with pytest.raises(AbortError, match="phase rows: 1 neighbours of 'site01' answered"):
        cast.clients["site01"].mask(
            cast.server.post.wrap(SCOPE, "boxes", "site01", inbox), cast.rows["site01"], b"model"
        )


def test_boxes_that_do_not_come_whole_are_refused_and_their_senders_not_confirmed():
    """A pair mask that one side alone adds would stay in the sum."""
    cast = stage(majority(5))
    keys = cast.server.keys({n: c.keys() for n, c in cast.clients.items()})
    sent = {n: c.share(keys) for n, c in cast.clients.items()}

    def say(sender, kind, to, parts):
        post = cast.server.post if sender == "server" else Post(cast.people[sender], cast.roster)
        return post.wrap(SCOPE, kind, to, _pack(parts, cast.terms))

    # to the server: from all but one
    boxes = {
        n: _unpack(
            Post(cast.people["server"], cast.roster).unwrap(e, SCOPE, "shares", n), cast.terms
        )
        for n, e in sent.items()
    }
    few = {to: box for to, box in boxes["site04"].items() if to != "site01"}
    inboxes = cast.server.shares(sent | {"site04": say("site04", "shares", "server", few)})
    assert "shared with" in str(cast.server.refused["site04"]) and "site04" not in inboxes

    # to a client: a share of another length, and one that the server withheld
    liar = cast.clients["site02"]
    key = AESGCM(liar._line_key("box", "site02", "site00"))
    longer = {"site02": key.encrypt(bytes(12), bytes(67), None)}
    with pytest.raises(EnvelopeError, match="shares from 'site02' of 67 bytes; expected 66"):
        cast.clients["site00"].mask(
            say("server", "boxes", "site00", longer), cast.rows["site00"], b"model"
        )
    mine = {name: boxes[name]["site01"] for name in ("site00", "site02")}
    cast.clients["site01"].mask(
        say("server", "boxes", "site01", mine), cast.rows["site01"], b"model"
    )
    listed = dict.fromkeys(("site00", "site01", "site02", "site03"), b"")
    with pytest.raises(AbortError, match="given to 'site01' adds site03"):
        cast.clients["site01"].confirm(tell(cast, "survivors", listed))


def test_a_box_of_a_client_without_keys_is_refused():
    cast = stage(majority(4))
    keys = {n: c.keys() for n, c in cast.clients.items() if n != "site03"}
    everybody = cast.server.keys(keys)
    boxes = cast.server.shares({n: cast.clients[n].share(everybody) for n in keys})
    assert boxes
    body = _pack({"site03": bytes(82)}, cast.terms)
    with pytest.raises(EnvelopeError, match="shares from 'site03', no neighbour with keys"):
        cast.clients["site00"].mask(
            cast.server.post.wrap(SCOPE, "boxes", "site00", body), cast.rows["site00"], b"model"
        )


@pytest.mark.parametrize("change", ["cut", "longer", "again", "back", "nobody", "size"])
def test_parts_are_whole_in_order_and_of_the_size_that_is_asked_for(change):
    terms = majority(3)
    one, two = (_pack({name: b"four"}, terms) for name in ("site00", "site01"))
    assert _unpack(one + two, terms, 4) == {"site00": b"four", "site01": b"four"}
    wrong = {
        "cut": one + two[:-1],
        "longer": one + two + b"x",
        "again": one + one,
        "back": two + one,
        "nobody": struct.pack("<HI", 4, 4) + b"four",
        "size": one + two,
    }
    with pytest.raises(EnvelopeError, match="Ask its sender again"):
        _unpack(wrong[change], terms, 5 if change == "size" else None)


def test_a_key_that_the_server_changed_masks_nothing_where_lines_are_kept():
    """In a later round a neighbour's signature is not verified again: its box opens only where it
    saw its own keys in the same broadcast.
    """
    terms = majority(3)
    lines = {name: Agreements() for name in terms.members}
    for number in (1, 2):
        scope = Scope(SCOPE.study, SCOPE.run, number)
        cast = stage(terms)
        posts = {name: Post(cast.people[name], cast.roster) for name in cast.people}
        clients = {
            n: Client(posts[n], terms, scope, "server", lines=lines[n]) for n in terms.members
        }
        server = MaskingServer(posts["server"], terms, scope)
        said = {n: c.keys() for n, c in clients.items()}
        keys = server.keys(said)
        if number == 1:
            for client in clients.values():
                client.share(keys)
            continue
        forged = bytearray(said["site01"])
        own = X25519PrivateKey.generate().public_key().public_bytes_raw()
        forged[-64 - 64 : -64 - 32] = own  # the pairing key; the signature no longer fits
        body = _pack({**said, "site01": bytes(forged)}, terms)
        lie = posts["server"].wrap(scope, "all-keys", EVERYBODY, body)
        with pytest.raises(EnvelopeError, match="without its own, or with others"):
            clients["site01"].share(lie)
        sent = {"site00": clients["site00"].share(lie), "site02": clients["site02"].share(keys)}
        box = _unpack(posts["server"].unwrap(sent["site02"], scope, "shares", "site02"), terms)
        inbox = _pack({"site02": box["site00"]}, terms)
        with pytest.raises(EnvelopeError, match="do not open"):
            clients["site00"].mask(
                posts["server"].wrap(scope, "boxes", "site00", inbox), cast.rows["site00"], b"m"
            )


def test_keys_are_fresh_in_every_round_and_lines_are_not():
    """The key of a client that drops out is rebuilt: kept, it would open its earlier rows."""
    cast = stage(majority(3))
    lines = Agreements()
    post = Post(cast.people["site00"], cast.roster)
    one, two = (
        Post.body(Client(post, cast.terms, Scope("0" * 64, "run", n), "server", lines=lines).keys())
        for n in (1, 2)
    )
    assert one[:32] == two[:32] and one[32:64] != two[32:64] and one[64:] != two[64:]


def test_hkdf_in_two_calls_is_hkdf():
    for size in (0, 1, 100):
        shared, about = bytes(range(32)), bytes(range(size))
        assert derive(shared, about) == HKDF(SHA256(), 32, None, about).derive(shared)


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
        {"members": ("a", "b"), "quorum": 2, "threshold": 2, "degree": 1},
        {"members": ("*", "a", "b")},
        {"members": ("a", "b", "b")},
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


@pytest.mark.parametrize(
    ("members", "length", "dropout", "malicious", "found"),
    [
        (("a", "b"), 5, 0.0, 0, "expected 3 to 65535 distinct names"),
        (("a", "b", "b", "c"), 5, 0.0, 0, "expected 3 to 65535 distinct names"),
        (("a", "b", "c", "*"), 5, 0.0, 0, "expected 3 to 65535 distinct names"),
        (tuple(map(str, range(2**16))), 5, 0.0, 0, "expected 3 to 65535 distinct names"),
        (("a", "b", "c"), 0, 0.0, 0, "expected 1 or more"),
        (("a", "b", "c"), 5, -0.1, 0, "expected 1 or more, 0 to 1"),
        (("a", "b", "c"), 5, 1.0, 0, "expected 1 or more, 0 to 1"),
        (("a", "b", "c"), 5, 0.0, -1, "expected 1 or more, 0 to 1, >= 0"),
        (("a", "b", "c", "d"), 5, 0.25, 2, "expected more than 3"),
    ],
)
def test_what_cannot_be_masked_is_refused_when_terms_are_chosen(
    members, length, dropout, malicious, found
):
    with pytest.raises(PlanError, match=found):
        MaskingTerms.choose(members, length, dropout, malicious)


def test_all_that_is_agreed_is_in_the_digest():
    """Keys and what is confirmed are bound to it."""
    all_pairs = majority(5)
    sparse = MaskingTerms.choose(names(120), 5, 0.1, 12, b"seed")
    other = MaskingTerms.choose(names(120), 5, 0.05, 12, b"seed")
    assert sparse.sparse and other.sparse and sparse.sparse != other.sparse
    varied = [
        all_pairs,
        majority(5, 6),
        replace(all_pairs, members=tuple("abcde")),
        replace(all_pairs, quorum=4),
        replace(all_pairs, threshold=4),
        replace(all_pairs, seed=b"x"),
        sparse,
        replace(sparse, degree=sparse.degree + 1),
        replace(sparse, sparse=other.sparse),
    ]
    assert len({terms.digest for terms in varied}) == len(varied)


def test_those_who_dropped_out_do_not_count_against_the_survivors(cast):
    """A client that signed and is not on the list has no say: it may have been told anything."""
    rows = to_rows(cast)
    gone = rows.pop("site02")
    survivors = cast.server.rows(rows, b"model")
    assert gone
    a, b = (cast.clients[n] for n in ("site00", "site01"))
    signed = {"site00": a.confirm(survivors), "site01": b.confirm(survivors)}
    said = _unpack(
        cast.server.post.unwrap(signed["site01"], SCOPE, "confirm", "site01"), cast.terms
    )
    inbox = _pack({"site01": said["site00"], "site02": bytes(16)}, cast.terms)
    assert a.unmask(cast.server.post.wrap(SCOPE, "confirmed", "site00", inbox))


def test_bytes_of_an_upload(cast):
    assert len(to_rows(cast)["site00"]) < 8 * 4096 + 400


@settings(max_examples=200)
@given(st.binary(max_size=80))
def test_decoders_survive_anything(body):
    terms = majority(3)
    with contextlib.suppress(CodecError):
        assert _pack(_unpack(body, terms), terms) == body
