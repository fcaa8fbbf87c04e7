"""Three aggregators: exact sums, rows checked in secret, views that say nothing, and parties that
misbehave.
"""

import math
from collections.abc import Callable, Mapping
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medfed.core import codec
from medfed.core.checks import AbortError, CodecError, MedfedError, PlanError
from medfed.core.entropy import Entropy, Integers, expand
from medfed.secure import three_party
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.line import Line
from medfed.secure.three_party import (
    SharingAggregator,
    SharingTerms,
    in_turn,
    relay,
    run_protocol,
    share,
)

PARTIES = ("left", "middle", "right")
B = 2.0**20
WIDEST = 1.5e8
"""A bound for which the squares of rows just do not wrap: more projections, and the widest range."""
rounds = count(1)


def posts_of(clients: int) -> dict[str, Post]:
    keys = [Identity.new(f"site {i}", "site") for i in range(clients)]
    keys += [Identity.new(name, "aggregator") for name in PARTIES]
    roster = Roster.of(*(key.public for key in keys))
    return {key.name: Post(key, roster) for key in keys}


POSTS = posts_of(8)


def fresh() -> Scope:
    return Scope("study", "run", next(rounds))


def rows_of(
    clients: int, length: int, seed: int = 0, norm: float = 0.999 * B
) -> dict[str, Integers]:
    x = np.random.default_rng(seed).standard_normal((clients, length))
    x *= norm / np.linalg.norm(x, axis=1, keepdims=True)
    return {f"site {i}": np.trunc(row).astype(np.int64) for i, row in enumerate(x)}


def aggregator(post: Post, terms: SharingTerms) -> SharingAggregator:
    return SharingAggregator(post, terms, "study", "run")


def terms_of(length: int, bound: float = B, least: int = 2) -> SharingTerms:
    return SharingTerms(length, bound, PARTIES, least)


# sums ---------------------------------------------------------------------------------------------


@given(st.integers(2, 8), st.integers(1, 90), st.integers(0, 2**32), st.booleans())
@settings(max_examples=12, deadline=None)
def test_the_opened_sum_is_the_sum(clients: int, length: int, seed: int, weighted: bool) -> None:
    rows = rows_of(clients, length, seed)
    weights = {name: i + 1 for i, name in enumerate(rows)} if weighted else None
    opened = run_protocol(POSTS, fresh(), rows, terms_of(length), weights=weights)
    expected = sum((weights[name] if weights else 1) * row for name, row in rows.items())
    assert (
        (opened.total_M == expected).all()
        and opened.accepted == sorted(rows)
        and not opened.excluded
    )


def test_long_rows_are_summed_by_threads_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(three_party, "_LONG", 10)
    rows = rows_of(3, 40_000)
    assert (
        run_protocol(POSTS, fresh(), rows, terms_of(40_000)).total_M == sum(rows.values())
    ).all()


def test_the_relay_carries_little_more_than_rows() -> None:
    rows = rows_of(4, 50_000)
    upload = share(POSTS["site 0"], fresh(), rows["site 0"], terms_of(50_000))
    assert len(upload) < 1.01 * 8 * 50_000
    opened = run_protocol(POSTS, fresh(), rows, terms_of(50_000))
    assert opened.phases["shares"] < 2.02 * 4 * 8 * 50_000  # to the two that hold it


def test_noise_of_three_where_two_are_enough() -> None:
    """Each adds sigma^2 / 2: the sum carries 3/2 sigma^2, and without one of them sigma^2."""
    random = np.random.default_rng(5)
    length = 3000
    sigma = 1000.0

    def noise(count: int, _: Entropy) -> Integers:
        return np.rint(random.normal(0, sigma / np.sqrt(2), count)).astype(np.int64)

    rows = rows_of(3, length)
    extra = run_protocol(POSTS, fresh(), rows, terms_of(length), noise).total_M - sum(rows.values())
    squares = float((extra / sigma).astype(float) @ (extra / sigma))
    assert 1e-4 < stats.chi2(length).cdf(squares / 1.5) < 1 - 1e-4
    assert (
        stats.chi2(length).cdf(squares / 3) < 1e-6 and stats.chi2(length).sf(squares / 0.75) < 1e-6
    )


# rows checked in secret ---------------------------------------------------------------------------


@pytest.mark.parametrize("bound", [B, WIDEST])
def test_honest_rows_pass_at_their_bound(bound: float) -> None:
    for seed in range(6):
        length = 5 + 80 * seed
        rows = rows_of(8, length, seed, 0.999 * bound)
        assert not run_protocol(POSTS, fresh(), rows, terms_of(length, bound)).excluded
    spike = {
        name: np.eye(1, 30, k, dtype=np.int64)[0] * int(bound)
        for k, name in enumerate(rows_of(4, 30))
    }
    assert not run_protocol(POSTS, fresh(), spike, terms_of(30, bound)).excluded


@pytest.mark.parametrize(("projections", "c"), [three_party._FEW, three_party._MANY])
def test_a_row_that_projections_pass_is_too_long_once_in_2_to_the_40(
    projections: int, c: float
) -> None:
    """Paley and Zygmund: P(p^2 > h E p^2) >= (1 - h)^2 (E p^2)^2 / E p^4, with h = 2 / c."""
    assert projections * math.log2(1 - (1 - 2 / c) ** 2 / 3) < -40
    for bound in (1.0, B, 4.8e7, 4.9e7, WIDEST, 1.96e8, 2.0**40):
        terms = terms_of(100, bound)
        assert terms.reach >= 5.5 * bound
        if terms.projections == projections and terms.exact:
            assert c * terms.reach**2 < 2**63 and terms.reach & (terms.reach - 1) == 0
            assert terms.proven == bound
        elif terms.projections == projections:
            assert terms.proven >= math.sqrt(c) * terms.reach and terms.proven < 16 * bound


ATTACKS: dict[str, Callable[[Integers], Integers]] = {
    "wraps one number": lambda row: row + np.eye(1, len(row), 3, dtype=np.int64)[0] * 2**32,
    "half the ring": lambda row: np.eye(1, len(row), 0, dtype=np.int64)[0] * -(2**63),
    "square wraps to 0": lambda row: np.full(len(row), 2**32),
    "square of many wraps to 0": lambda row: (np.arange(len(row)) < 64) * np.int64(2**29),
    "a little too long": lambda row: (row * 1.01).astype(np.int64),
    "ten times": lambda row: row * 10,
    "everything at random": lambda row: expand(bytes(32), len(row)).view(np.int64),
    # what the norm alone lets in, and projections at 4 T too
    "square past half the ring": lambda row: np.eye(1, len(row), 7, dtype=np.int64)[0] * 35 * 10**8,
}


@pytest.mark.parametrize("bound", [B, WIDEST])
@pytest.mark.parametrize("attack", ATTACKS)
def test_oversize_rows_are_left_out_before_anything_is_opened(attack: str, bound: float) -> None:
    rows = rows_of(5, 200, norm=0.999 * bound)
    bad = rows | {"site 2": ATTACKS[attack](rows["site 2"])}
    opened = run_protocol(POSTS, fresh(), bad, terms_of(200, bound))
    assert opened.excluded == {"site 2": "its row is out of bound"}
    assert (opened.total_M == sum(row for name, row in rows.items() if name != "site 2")).all()


@pytest.mark.parametrize("attack", ATTACKS)
def test_without_the_check_the_same_rows_do_harm(
    attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blind(self: SharingAggregator, line: Any, held: list[Any], toss: Any) -> Any:
        yield from line.swap(b"", b"")
        return np.ones(len(held), np.bool_), None

    monkeypatch.setattr(SharingAggregator, "_check", blind)
    rows = rows_of(5, 200)
    bad = rows | {"site 2": ATTACKS[attack](rows["site 2"])}
    opened = run_protocol(POSTS, fresh(), bad, terms_of(200))
    assert not opened.excluded and (opened.total_M == sum(bad.values())).all()


WIDE = 2.0**35
"""A bound at which squares wrap, and projections alone hold a row."""


def projects_to(number: int, j: int, length: int, wraps: bool) -> Integers:
    """Return a row with one number, and where squares count another, in the last place, by which
    they come to at most B^2 mod 2^64.
    """
    row = np.zeros(length, np.int64)
    row[j] = number
    if wraps:
        row[-1] = math.isqrt(2**64 + int(B) ** 2 - number**2)
        assert 0 <= int(row.astype(object) @ row.astype(object)) - 2**64 <= B**2
    return row


@pytest.mark.parametrize(
    ("bound", "T", "projections", "most"),
    [
        (B, 2**23, 80, 2**23 - 1),
        (WIDEST, 2**30, 136, 2**30 - 1),
        (WIDE, 11 * 2**34, 136, 11 * 2**34),
    ],
)
def test_a_row_is_left_out_where_any_projection_is_one_step_out_of_range_on_either_side(
    bound: float, T: int, projections: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The coins fall so that projection j is number j, and the last number is in none. All is well
    with each row but for one projection, as the same rows one step further in show.
    """

    def identity(draw: bytes, J: int, start: int, count: int) -> Any:
        assert projections == J
        return np.eye(J, count, -start)

    length = projections + 1
    wraps = bound != WIDE
    monkeypatch.setattr(three_party, "_ternary", identity)
    edges = {"above": (most + 1, most), "below": (-T - 1, -T)}
    rows = {}
    for j in range(projections):
        for side, (out, within) in edges.items():
            rows[f"{side} {j}"] = projects_to(out, j, length, wraps)
            if j in (0, projections - 1):
                rows[f"at the edge: {side} {j}"] = projects_to(within, j, length, wraps)
    keys = [Identity.new(name, "site") for name in rows]
    roster = Roster.of(*(key.public for key in keys), *(POSTS[name].me.public for name in PARTIES))
    posts = {key.name: Post(key, roster) for key in keys}
    posts |= {name: Post(POSTS[name].me, roster) for name in PARTIES}
    opened = run_protocol(posts, fresh(), rows, terms_of(length, bound))
    assert opened.accepted == sorted(name for name in rows if name.startswith("at the edge"))


def test_coins_as_they_fall_leave_out_each_of_many_rows_above_the_range() -> None:
    """Projections of rows of norm 6.5 B leave the range 0.23 times of 1: of these 200 rows any
    passes all 136 once in 2^44, and 24 would pass 8 of them, or all a range four times as wide.
    """
    rows = rows_of(200, 64, norm=6.5 * WIDE)
    mail = posts_of(200)
    with pytest.raises(AbortError, match="0 rows are left") as error:
        run_protocol(mail, fresh(), rows, terms_of(64, WIDE))
    assert error.value.excluded == dict.fromkeys(rows, "its row is out of bound")


@pytest.mark.parametrize(("more", "passes"), [(0, True), (1, False)])
def test_where_the_norm_is_compared_exactly_one_step_squared_decides(
    more: int, passes: bool
) -> None:
    rows = rows_of(3, 20)
    rows["site 1"] = np.eye(1, 20, 3, dtype=np.int64)[0] * int(B)
    rows["site 1"][5] = more
    opened = run_protocol(POSTS, fresh(), rows, terms_of(20))
    assert ("site 1" in opened.accepted) == passes


def test_where_squares_would_wrap_projections_still_bound_a_row() -> None:
    wide = terms_of(100, 2.0**35)
    assert not wide.exact and terms_of(100).exact and wide.reach >= 5.5 * 2**35
    rows = rows_of(4, 100, norm=2.0**35)
    bad = rows | {"site 1": rows["site 1"] * 40}
    assert run_protocol(POSTS, fresh(), bad, wide).excluded == {"site 1": "its row is out of bound"}
    assert not run_protocol(POSTS, fresh(), rows, wide).excluded


def test_terms_without_room_are_refused() -> None:
    with pytest.raises(PlanError, match="norm"):
        terms_of(2**20, 2.0**50).check()
    terms_of(2**20, WIDE).check()  # squares may wrap where no rule reads products
    terms_of(2**38 - 1).check()  # T = 2^23: projections stay below 2^61
    with pytest.raises(PlanError, match="norm"):
        terms_of(2**38).check()


def test_too_few_rows_are_not_opened() -> None:
    rows = rows_of(3, 20)
    with pytest.raises(AbortError, match=r"expected 3 or more .*nothing is opened.*out of bound"):
        run_protocol(POSTS, fresh(), rows | {"site 0": rows["site 0"] * 9}, terms_of(20, least=3))


# what a party sees --------------------------------------------------------------------------------


def looks_uniform(words: Any) -> bool:
    seen = np.bincount(
        np.frombuffer(np.ascontiguousarray(words).tobytes(), np.uint8), minlength=256
    )
    return bool(stats.chisquare(seen).pvalue > 1e-6)


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_aggregators_shares_are_uniform(place: int) -> None:
    row = np.arange(20_000, dtype=np.int64)
    terms = terms_of(20_000, 2.0**40)
    scope = fresh()
    party = aggregator(POSTS[PARTIES[place]], terms)
    parts = three_party._for_each("site 0", share(POSTS["site 0"], scope, row, terms), terms)
    assert parts is not None
    held = party._open(scope, "site 0", parts[PARTIES[place]])
    views = [held.words(place, which, 0, 20_000) for which in (0, 1)]
    assert all(looks_uniform(view) for view in views) and looks_uniform(views[0] + views[1])
    assert not looks_uniform(row)  # the test sees a bare row,
    # and one behind a mask that does not vary
    assert not looks_uniform(row.view(np.uint64) + np.uint64(12345))


def test_the_relay_sees_ciphertext() -> None:
    row = np.zeros(20_000, np.int64)
    assert looks_uniform(
        np.frombuffer(share(POSTS["site 0"], fresh(), row, terms_of(20_000))[-160_000:], np.uint8)
    )


def test_an_aggregators_part_of_the_opening_is_uniform() -> None:
    rows = rows_of(3, 20_000)
    terms = terms_of(20_000)
    scope = fresh()
    heard: dict[str, bytes] = {}
    parties = in_turn({name: aggregator(POSTS[name], terms) for name in PARTIES})

    def listening(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        answers = parties(op, payloads)
        heard.update(answers)
        return answers

    relay(
        listening, scope, {n: share(POSTS[n], scope, row, terms) for n, row in rows.items()}, terms
    )
    results = [
        codec.decode(codec.as_bytes(codec.decode(heard[name])[1]["result"]))[1]["part"]
        for name in PARTIES
    ]
    parts = [result.numpy() for result in results]
    assert all(looks_uniform(part) for part in parts) and looks_uniform(parts[0] + parts[1])
    assert not looks_uniform(sum(parts))


# parties that misbehave ---------------------------------------------------------------------------


def tampered(change: Callable[[bytes], bytes]) -> dict[str, str]:
    """Return who is excluded, and why, where one upload is changed on the way."""
    rows = rows_of(4, 50)
    terms = terms_of(50)
    scope = fresh()
    uploads = {name: share(POSTS[name], scope, row, terms) for name, row in rows.items()}
    uploads["site 1"] = change(uploads["site 1"])
    parties = {name: aggregator(POSTS[name], terms) for name in PARTIES}
    opened = relay(in_turn(parties), scope, uploads, terms)
    assert (
        opened.total_M == sum(row for name, row in rows.items() if name not in opened.excluded)
    ).all()
    return opened.excluded


CHANGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "hidden bit": (lambda u: u[:-5] + bytes([u[-5] ^ 1]) + u[-4:], "changed on the way"),
    "envelope bit": (lambda u: u[:400] + bytes([u[400] ^ 1]) + u[401:], "cannot be used"),
    "cut": (lambda u: u[:-8], "cannot be read"),
    "empty": (lambda u: b"", "cannot be read"),
    "longer": (lambda u: u + b"x", "cannot be read"),
    "garbage": (lambda u: b"mfs2" + bytes(100), "cannot be read"),
    "another version": (lambda u: b"mfs1" + u[4:], "cannot be read"),
    "claims more": (lambda u: u[:18] + b"\xff" * 8 + u[26:], "cannot be"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_upload_is_left_out_by_its_reason(name: str) -> None:
    change, reason = CHANGES[name]
    excluded = tampered(change)
    assert list(excluded) == ["site 1"] and reason in excluded["site 1"]


def test_another_round_sender_or_time_is_refused() -> None:
    rows = rows_of(5, 50)
    terms = terms_of(50, least=3)
    scope = fresh()
    uploads = {name: share(POSTS[name], scope, row, terms) for name, row in rows.items()}
    stale = share(POSTS["site 1"], Scope("study", "run", 10**6), rows["site 1"], terms)
    parties = in_turn({name: aggregator(POSTS[name], terms) for name in PARTIES})
    opened = relay(parties, scope, uploads | {"site 1": stale, "site 2": uploads["site 3"]}, terms)
    assert (
        set(opened.excluded) == {"site 1", "site 2"}
        and "round=1000000" in opened.excluded["site 1"]
    )
    # the same shares are opened again as they were, and never beside others
    again = relay(parties, scope, uploads, terms)
    assert (again.total_M == opened.total_M).all() and set(again.excluded) == {"site 1", "site 2"}
    fewer = {name: uploads[name] for name in ("site 0", "site 1", "site 3")}
    with pytest.raises(AbortError, match="this round was opened without it"):
        relay(parties, scope, fewer, terms)
    other = {**uploads, "site 0": share(POSTS["site 0"], scope, rows["site 0"], terms)}
    with pytest.raises(AbortError, match="rows was done for something else"):
        relay(parties, scope, other, terms)


def test_a_client_that_equivocates_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the left and the right party different seeds for the share that both hold."""
    rows = rows_of(4, 50)
    terms = terms_of(50)
    scope = fresh()
    uploads = {name: share(POSTS[name], scope, row, terms) for name, row in rows.items()}
    real = three_party.seal
    calls = count()

    def split(to: Any, plain: bytes, purpose: bytes) -> bytes:
        return real(to, bytes(32) + plain[32:] if next(calls) == 0 else plain, purpose)

    monkeypatch.setattr(three_party, "seal", split)
    uploads["site 0"] = share(POSTS["site 0"], scope, rows["site 0"], terms)
    monkeypatch.undo()
    opened = relay(
        in_turn({name: aggregator(POSTS[name], terms) for name in PARTIES}),
        scope,
        uploads,
        terms,
    )
    assert opened.excluded == {"site 0": "it, or an aggregator, tells different shares of its row"}


@pytest.mark.parametrize("change", [lambda s: s + b"x", lambda s: s[:-1], lambda s: s[:128]])
def test_sealed_secrets_of_another_length_are_refused(
    change: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three are sealed alike, so that tags and models agree."""
    rows = rows_of(3, 50)
    scope = fresh()
    uploads = {n: share(POSTS[n], scope, row, terms_of(50)) for n, row in rows.items()}
    real = three_party.seal
    monkeypatch.setattr(three_party, "seal", lambda to, s, purpose: real(to, change(s), purpose))
    liar = share(POSTS["site 3"], scope, rows["site 0"], terms_of(50))
    monkeypatch.undo()
    parties = in_turn({name: aggregator(POSTS[name], terms_of(50)) for name in PARTIES})
    opened = relay(parties, scope, uploads | {"site 3": liar}, terms_of(50))
    assert opened.accepted == sorted(rows) and "expected 160" in opened.excluded["site 3"]


def test_a_client_that_tells_of_another_model_to_one_aggregator_is_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else whoever is the first of the three would say alone from which model a row is."""
    rows = rows_of(4, 50)
    real = three_party.seal
    for liar_to in range(3):
        scope = fresh()
        uploads = {n: share(POSTS[n], scope, row, terms_of(50)) for n, row in rows.items()}
        calls = count()

        def split(
            to: Any, plain: bytes, purpose: bytes, at: int = liar_to, c: Any = calls
        ) -> bytes:
            return real(to, plain[:128] + bytes([next(c) == at]) * 32, purpose)

        with monkeypatch.context() as patch:
            patch.setattr(three_party, "seal", split)
            uploads["site 1"] = share(POSTS["site 1"], scope, rows["site 1"], terms_of(50))
        parties = in_turn({name: aggregator(POSTS[name], terms_of(50)) for name in PARTIES})
        opened = relay(parties, scope, uploads, terms_of(50))
        assert opened.accepted == ["site 0", "site 2", "site 3"]
        assert "tells different models of its row" in opened.excluded["site 1"]


@pytest.mark.parametrize("name", ["left", "the coordinator"])
def test_who_is_no_site_sends_no_row(name: str) -> None:
    """Also where terms leave open whom a round draws."""
    keys = [POSTS[party].me for party in PARTIES]
    keys += [Identity.new("the coordinator", "coordinator")]
    keys += [POSTS[f"site {i}"].me for i in range(3)]
    roster = Roster.of(*(key.public for key in keys))
    posts = {key.name: Post(key, roster) for key in keys}
    rows = rows_of(3, 50)
    opened = run_protocol(posts, fresh(), rows | {name: rows["site 0"]}, terms_of(50))
    assert opened.accepted == sorted(rows)
    assert "is no site that this round draws" in opened.excluded[name]


Tamper = Callable[[int, dict[str, bytes]], dict[str, bytes]]


def swap(payloads: dict[str, bytes]) -> dict[str, bytes]:
    one, two, three = PARTIES
    return {one: payloads[two], two: payloads[one], three: payloads[three]}


FAULTS: dict[str, Tamper] = {
    "dropped": lambda step, p: {
        n: codec.encode({}) if step == 4 and n == "left" else m for n, m in p.items()
    },
    "reordered": lambda step, p: swap(p) if step == 3 else p,
    "flipped": lambda step, p: {
        n: m[:-1] + bytes([m[-1] ^ 1]) if step == 5 else m for n, m in p.items()
    },
    "no greeting": lambda step, p: {n: codec.encode({}) if step == 0 else m for n, m in p.items()},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_relay_that_meddles_ends_the_round_and_the_next_one_runs(fault: str) -> None:
    rows = rows_of(3, 30)
    terms = terms_of(30)
    scope = fresh()
    steps = count()
    parties = in_turn({name: aggregator(POSTS[name], terms) for name in PARTIES})

    def meddling(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        return parties(op, FAULTS[fault](next(steps), dict(payloads)) if op == "step" else payloads)

    def uploads(scope: Scope) -> dict[str, bytes]:
        return {name: share(POSTS[name], scope, row, terms) for name, row in rows.items()}

    with pytest.raises(AbortError, match=r"left|middle|right"):
        relay(meddling, scope, uploads(scope), terms)
    again = fresh()
    assert (relay(parties, again, uploads(again), terms).total_M == sum(rows.values())).all()


def test_messages_of_an_earlier_attempt_do_not_count() -> None:
    rows = rows_of(3, 30)
    terms = terms_of(30)
    scope = fresh()
    kept = dict[int, Mapping[str, bytes]]()
    uploads = {n: share(POSTS[n], scope, row, terms) for n, row in rows.items()}
    parties = in_turn({name: aggregator(POSTS[name], terms) for name in PARTIES})

    def attempt(replay: bool) -> None:
        steps = count()

        def asked(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
            if op != "step":
                return parties(op, payloads)
            step = next(steps)
            return parties(
                op, kept[step] if replay and step == 2 else kept.setdefault(step, payloads)
            )

        relay(asked, scope, uploads, terms)

    attempt(replay=False)
    with pytest.raises(AbortError):
        attempt(replay=True)


def test_an_aggregator_that_lies_about_its_coin_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = rows_of(3, 30)
    terms = terms_of(30)
    scope = fresh()
    real = Line.swap

    def swap_coins(self: Any, *sent: bytes) -> Any:
        liar = self._step == 0 and self.place == 1
        return (yield from real(self, *([bytes(32)] * 2 if liar else sent)))

    monkeypatch.setattr(Line, "swap", swap_coins)
    with pytest.raises(AbortError, match="'middle' opened another coin"):
        run_protocol(POSTS, scope, rows, terms)


def test_a_stopped_or_babbling_aggregator_ends_the_round() -> None:
    rows = rows_of(3, 30)
    terms = terms_of(30)
    for noise in (b"", b"garbage", codec.encode({"done": True})):
        scope = fresh()
        parties = in_turn({name: aggregator(POSTS[name], terms) for name in PARTIES})

        def ill(
            op: str, payloads: Mapping[str, bytes], said: bytes = noise, ask: Any = parties
        ) -> Mapping[str, bytes]:
            return {**ask(op, payloads), **({"middle": said} if op == "step" else {})}

        with pytest.raises(AbortError, match=r"left|middle|right"):
            relay(
                ill,
                scope,
                {n: share(POSTS[n], scope, row, terms) for n, row in rows.items()},
                terms,
            )


def test_a_row_of_another_kind_is_refused_at_its_client() -> None:
    for row in (np.zeros(29, np.int64), np.zeros(30), np.zeros((1, 30), np.int64)):
        with pytest.raises(PlanError, match=r"int64 \(30,\)"):
            share(POSTS["site 0"], fresh(), row, terms_of(30))


@given(st.binary(max_size=300), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_bytes_crash_a_decoder(data: bytes, prefixed: bool) -> None:
    data = b"mfs2" + data if prefixed else data
    party = aggregator(POSTS["left"], terms_of(30))
    with pytest.raises(CodecError):
        party._open(Scope("study", "run", 1), "site 0", data)
    for op in ("begin", "upload", "step", "sing"):
        with pytest.raises(MedfedError):
            party.handle(op, data)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_never_passes(data: st.DataObject) -> None:
    terms = terms_of(20)
    scope = fresh()
    upload = bytearray(share(POSTS["site 0"], scope, rows_of(1, 20)["site 0"], terms))
    # an envelope's length is not always the same
    at = data.draw(st.integers(0, 1200)) % len(upload)
    upload[at] ^= data.draw(st.integers(1, 255))
    refusals = 0
    for name in PARTIES:
        try:
            aggregator(POSTS[name], terms)._open(scope, "site 0", bytes(upload))
        except CodecError:
            refusals += 1
    assert refusals >= 1
