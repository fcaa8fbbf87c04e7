"""One aggregator of three that lies, with a site that works with it: it may end a round, and gets
nothing else. Each attack succeeded before what is multiplied was verified.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from medfed.core import codec
from medfed.core.checks import AbortError, RecordError
from medfed.core.entropy import Entropy, Integers
from medfed.secure import field, three_party
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.secure.line import Line
from medfed.secure.record import Record
from medfed.secure.three_party import Opened, Selection, SharingTerms, run_protocol

PARTIES = ("p", "q", "r")
SITES = tuple("abcd")
B = 2.0**20
M = 12
_KEYS = [Identity.new(name, "aggregator") for name in PARTIES] + [
    Identity.new(name, "site") for name in SITES
]
_ROSTER = Roster.of(*(key.public for key in _KEYS))
TERMS = SharingTerms(M, B, PARTIES)
ROWS = {
    name: row
    for name, row in zip(
        SITES, np.random.default_rng(0).integers(-150_000, 150_000, (4, M)), strict=True
    )
}


def opened(rows: Mapping[str, Integers] = ROWS, selection: Selection | None = None) -> Opened:
    posts = {key.name: Post(key, _ROSTER) for key in _KEYS}
    return run_protocol(posts, Scope("study", "run", 1), rows, TERMS, selection=selection)


def uniform(gram_KK: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.full(len(gram_KK), 1 / len(gram_KK))


STEPS = 26  # messages of a round under a rule, after the greetings


def test_as_many_steps_as_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    swap = Line.swap

    def counting(self: Line, left: bytes, right: bytes) -> Any:
        taken.append(self._step + 1)
        return (yield from swap(self, left, right))

    monkeypatch.setattr(Line, "swap", counting)
    opened(selection=Selection(uniform))
    assert max(taken) == STEPS


@pytest.mark.parametrize("liar", PARTIES)
@pytest.mark.parametrize("to", ["left", "right"])
@pytest.mark.parametrize("step", range(1, STEPS + 1))
def test_any_altered_message_ends_the_round_or_changes_nothing(
    step: int, to: str, liar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bit of one message, here of a round in which one row is out of bound."""
    rows = {**ROWS, "d": ROWS["d"] * 40}
    swap = Line.swap

    def lying(self: Line, left: bytes, right: bytes) -> Any:
        if self.me == liar and self._step == step - 1:
            messages = {"left": left, "right": right}
            if whole := messages[to]:
                at = 8 * (len(whole) // 16)
                messages[to] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
            left, right = messages["left"], messages["right"]
        return (yield from swap(self, left, right))

    monkeypatch.setattr(Line, "swap", lying)
    try:
        found = opened(rows, Selection(uniform))
    except AbortError as error:
        assert "out of bound" not in str(error)  # no site is blamed
        return
    assert found.accepted == ["a", "b", "c"]
    honest = np.stack([rows[name] for name in "abc"])
    assert found.gram_KK is not None and (found.gram_KK == honest @ honest.T).all()


def test_a_row_beyond_the_bound_is_not_let_in_by_a_flipped_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It flipped what the last AND said of its site's row, of which the Gram matrix then told the
    other rows' numbers.
    """
    rows = {**ROWS, "d": np.eye(1, M, 5, dtype=np.int64)[0] * 2**45}
    assert opened(rows, Selection(uniform)).excluded == {"d": "its row is out of bound"}
    both = Line.both
    calls = [0]

    def flipping(self: Line, x: Any, y: Any) -> Any:
        z = yield from both(self, x, y)
        if self.me == "p" and x.first.ndim == 1 and len(x.first) == len(rows):
            calls[0] += 1
            if calls[0] == 6:
                z.first[3] ^= np.uint64(1)
        return z

    monkeypatch.setattr(Line, "both", flipping)
    with pytest.raises(AbortError):
        opened(rows, Selection(uniform))


@pytest.mark.parametrize("liar", PARTIES)
def test_the_check_answers_no_question_about_an_honest_row(
    liar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shifted its share of a projection by the bound: the opened bit said the projection's sign,
    right 200 times of 200, and the honest site was blamed.
    """
    project = field.project
    check = three_party.SharingAggregator._check

    def asking(self: Any, line: Line, held: Any, toss: Any) -> Any:
        def shifted(ternary_Jm: Any, digits: Any) -> Any:
            found = project(ternary_Jm, digits)
            found[:, 0] -= np.uint64(self.terms.reach)
            return found

        steps = check(self, line, held, toss)
        arrived = None
        while True:
            with pytest.MonkeyPatch.context() as patch:
                if self.post.me.name == liar:
                    patch.setattr(field, "project", shifted)
                try:
                    sent = steps.send(arrived)
                except StopIteration as end:
                    return end.value
            arrived = yield sent

    monkeypatch.setattr(three_party.SharingAggregator, "_check", asking)
    for _ in range(5):
        with pytest.raises(AbortError) as error:
            opened()
        assert "out of bound" not in str(error.value)


def noise(scale: float) -> Selection:
    """Return a rule whose Gram matrix has noise of one step from each party, times `scale`."""

    def draw(K: int, entropy: Entropy) -> Integers:
        return np.full(K * (K + 1) // 2, round(scale), np.int64)

    return Selection(uniform, gram_noise=draw, gram_spread=lambda K: 1.0)


@pytest.mark.parametrize("entry", [9, -9, 2**40, 2**63 - 1, -(2**63)])
def test_weights_are_not_steered_by_a_number_added_to_the_gram_matrix(
    entry: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its part of the noise could be anything; now no more than such noise comes to."""
    assert opened(selection=noise(8)).gram_KK is not None
    put = Line.put

    def steering(self: Line, own: Any) -> Any:
        if self.me == "q":
            own = own.copy()
            own[2] = np.int64(entry).view(np.uint64)
        return (yield from put(self, own))

    monkeypatch.setattr(Line, "put", steering)
    with pytest.raises(AbortError, match="within their range do not hold"):
        opened(selection=noise(1))


def test_a_part_of_the_noise_is_not_let_through_by_a_flipped_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last AND of the comparison says of its part, of 2^40 steps, that it is within 8."""
    put = Line.put
    send = Line.from_right
    entry, upper = 2, 10
    calls = [0]

    def steering(self: Line, own: Any) -> Any:
        if self.me == "q":
            own = own.copy()
            own[entry] = np.uint64(2**40)
        return (yield from put(self, own))

    def flipping(self: Line, own: Any) -> Any:
        if self.me == "q" and own.shape == (2, 3 * 2 * upper):
            calls[0] += 1
            if (
                calls[0] == 6
            ):  # its own part is the second of three, its upper end the second of two
                own[0, (1 * 2 + 1) * upper + entry] ^= np.uint64(1 << 62)
        return (yield from send(self, own))

    monkeypatch.setattr(Line, "put", steering)
    monkeypatch.setattr(Line, "from_right", flipping)
    with pytest.raises(AbortError, match="products of shared bits do not hold"):
        opened(selection=noise(1))
    assert calls[0] == 6


def test_who_weighs_otherwise_ends_the_round_before_any_part_of_the_sum_leaves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weigh = Selection.weigh
    add = three_party.SharingAggregator._sum
    calls = [0]

    def lying(self: Selection, names: Any, gram_KK: Any) -> Any:
        calls[0] += 1
        weights = weigh(self, names, gram_KK)
        return {**weights, "a": 0} if calls[0] == 2 else weights

    def never(*said: Any) -> Any:
        raise AssertionError("a part of the sum was made")

    monkeypatch.setattr(Selection, "weigh", lying)
    monkeypatch.setattr(three_party.SharingAggregator, "_sum", never)
    with pytest.raises(AbortError, match="has another Gram matrix or other weights"):
        opened(selection=Selection(uniform))
    monkeypatch.setattr(three_party.SharingAggregator, "_sum", add)
    assert opened(selection=Selection(uniform)).accepted == list(SITES)


@pytest.mark.parametrize("liar", PARTIES)
def test_another_part_of_a_sum_without_noise_is_not_used(
    liar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = three_party.SharingAggregator._sum

    def adding(self: Any, held: Any, weights: Any, which: int) -> Any:
        return total(self, held, weights, which) + np.uint64(
            self.post.me.name == liar and which == 0
        )

    monkeypatch.setattr(three_party.SharingAggregator, "_sum", adding)
    with pytest.raises(AbortError, match="disagree on the shares of the sum"):
        opened()


def test_a_round_played_again_opens_the_same_number_noise_and_all() -> None:
    """Also where the three were restarted between, with what they had written down."""
    posts = {key.name: Post(key, _ROSTER) for key in _KEYS}
    scope = Scope("study", "run", 1)
    uploads = {n: three_party.share(posts[n], scope, row, TERMS) for n, row in ROWS.items()}
    drawn: list[int] = []

    def draw(length: int, entropy: Entropy) -> Integers:
        found = entropy.words(length).view(np.int64) >> 40
        drawn.append(int(found[0]))
        return found

    def again(sent: Mapping[str, bytes]) -> NDArray[np.int64]:
        three = {
            name: three_party.SharingAggregator(posts[name], TERMS, "study", "run", noise=draw)
            for name in PARTIES
        }
        return three_party.relay(
            three_party.in_turn(three), scope, sent, TERMS, spread=2.0**40
        ).total_M

    first = again(uploads)
    assert (first == again(uploads)).all() and len(set(drawn)) == 3
    assert (first != again({n: uploads[n] for n in "abc"}) + ROWS["d"]).all()


@pytest.mark.parametrize("step", [3, 10**6])
def test_a_round_that_stopped_goes_on_with_who_is_there(step: int) -> None:
    """Before its rows were written down with whoever came; after that with those rows or not."""
    posts = {key.name: Post(key, _ROSTER) for key in _KEYS}
    scope = Scope("study", "run", 1)
    uploads = {n: three_party.share(posts[n], scope, row, TERMS) for n, row in ROWS.items()}
    three = three_party.in_turn(
        {n: three_party.SharingAggregator(posts[n], TERMS, "study", "run") for n in PARTIES}
    )
    steps = [0]

    def stopping(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        steps[0] += op == "step"
        answers = three(op, payloads)
        if steps[0] == step or any(codec.decode(a)[0].get("done") for a in answers.values() if a):
            raise AbortError("a cable was pulled")
        return answers

    with pytest.raises(AbortError, match="cable"):
        three_party.relay(stopping, scope, {n: uploads[n] for n in "abc"}, TERMS)
    found = three_party.relay(three, scope, uploads, TERMS)
    if step == 3:
        assert found.accepted == ["a", "b", "c", "d"]
        return
    assert found.accepted == ["a", "b", "c"] and set(found.excluded) == {"d"}
    with pytest.raises(AbortError, match="done for something else"):
        three_party.relay(three, scope, {n: uploads[n] for n in "abd"}, TERMS)


@pytest.mark.parametrize("step", [1, STEPS // 2, STEPS, STEPS + 1])
def test_a_round_goes_no_further_once_a_later_one_was_begun(step: int) -> None:
    """Given up, and carried on afterwards in the processes that had begun it: also where the later
    one came no further than its Gram matrix.
    """
    posts = {key.name: Post(key, _ROSTER) for key in _KEYS}
    records = {name: Record() for name in PARTIES}

    def ask() -> three_party.Ask:
        return three_party.in_turn(
            {
                n: three_party.SharingAggregator(
                    posts[n], TERMS, "study", "run", selection=Selection(uniform), record=records[n]
                )
                for n in PARTIES
            }
        )

    scopes = {1: Scope("study", "run", 1), 2: Scope("study", "run", 2)}
    sent = {
        round: {n: three_party.share(posts[n], scopes[round], ROWS[n], TERMS) for n in names}
        for round, names in ((1, "abcd"), (2, "abc"))
    }

    def play(round: int, ask: three_party.Ask) -> Opened:
        return three_party.relay(ask, scopes[round], sent[round], TERMS)

    first = ask()
    later = ask()
    steps = [0, 0]

    def stopping(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        steps[1] += op == "step"
        if steps[1] == STEPS + 1:
            raise AbortError("a cable was pulled")
        return later(op, payloads)

    def waiting(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        steps[0] += op == "step"
        if steps[0] == step and op == "step":
            with pytest.raises(AbortError, match="cable"):
                play(2, stopping)
        return first(op, payloads)

    with pytest.raises(RecordError, match="round 2"):
        play(1, waiting)
    assert all(record.last("rows", "study", "run")[0] == 2 for record in records.values())
    assert play(2, ask()).accepted == ["a", "b", "c"]


def test_a_noised_gram_matrix_is_not_opened_once_a_later_round_was_begun() -> None:
    """Between the rows being written down and the opening are the steps of the noise: in them the
    first matrix was opened beside the later one, of other rows.
    """
    posts = {key.name: Post(key, _ROSTER) for key in _KEYS}
    records = {name: Record() for name in PARTIES}
    scopes = {1: Scope("study", "run", 1), 2: Scope("study", "run", 2)}
    seen: list[int] = []  # of how many rows a matrix was opened
    selection = noise(1.0)

    def weigh(gram_KK: NDArray[np.float64]) -> NDArray[np.float64]:
        seen.append(len(gram_KK))
        return uniform(gram_KK)

    def ask() -> three_party.Ask:
        return three_party.in_turn(
            {
                n: three_party.SharingAggregator(
                    posts[n],
                    TERMS,
                    "study",
                    "run",
                    selection=replace(selection, rule=weigh),
                    record=records[n],
                )
                for n in PARTIES
            }
        )

    def play(round: int, ask: three_party.Ask) -> Opened:
        names = {1: "abcd", 2: "abc"}[round]
        sent = {n: three_party.share(posts[n], scopes[round], ROWS[n], TERMS) for n in names}
        return three_party.relay(ask, scopes[round], sent, TERMS)

    first = ask()
    later = ask()
    begun = [False]

    def waiting(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        written = all(one.last("rows", "study", "run")[0] == 1 for one in records.values())
        if op == "step" and written and not begun[0]:
            begun[0] = True
            assert play(2, later).accepted == ["a", "b", "c"]
        return first(op, payloads)

    with pytest.raises(RecordError, match="round 2"):
        play(1, waiting)
    assert begun[0] and set(seen) == {3}


@pytest.mark.parametrize("liar", PARTIES)
@pytest.mark.parametrize("lie", ["tag", "refusal"])
def test_an_aggregator_may_not_say_of_a_site_what_it_likes(
    lie: str, liar: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can leave a site out, as which of the two lies nobody can tell; that is what is said."""
    open_all = three_party.SharingAggregator._open_all

    def lying(self: Any, scope: Scope, uploads: Any) -> Any:
        held, refused = open_all(self, scope, uploads)
        if self.post.me.name == liar and lie == "tag":
            held["a"] = replace(held["a"], digest=bytes(32))
        elif self.post.me.name == liar:
            del held["a"]
            refused["a"] = "its row is out of bound"
        return held, refused

    monkeypatch.setattr(three_party.SharingAggregator, "_open_all", lying)
    found = opened()
    assert found.accepted == ["b", "c", "d"]
    said = found.excluded["a"]
    assert "aggregator" in said
    assert said.startswith(three_party.DISPUTED) or "out of bound" not in said


def test_a_reason_of_one_aggregator_is_told_as_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = codec.encode

    def lying(header: Any, *rest: Any) -> bytes:
        if header.get("place") == 2:
            header = {**header, "excluded": {"x": "its row is out of bound"}}
        return encode(header, *rest)

    monkeypatch.setattr(codec, "encode", lying)
    assert opened().excluded["x"].startswith(three_party.DISPUTED)
    monkeypatch.setattr(
        codec, "encode", lambda h, *r: encode({**h, "excluded": 5} if "place" in h else h, *r)
    )
    with pytest.raises(AbortError, match="handed in no part"):
        opened()


def test_a_message_that_is_none_is_named() -> None:
    posts = {key.name: Post(key, _ROSTER) for key in _KEYS}
    party = three_party.SharingAggregator(posts["p"], TERMS, "study", "run")
    for round in (0, -1, 2.0, "1", None, True):
        with pytest.raises(AbortError, match="round="):
            party.handle("begin", codec.encode({"round": round}))


def test_a_round_that_is_over_is_begun_anew_and_not_carried_on() -> None:
    """Opened, stopped by a message that cannot be read, or refused: none goes on with its uploads."""
    posts = {key.name: Post(key, _ROSTER) for key in _KEYS}
    three = {n: three_party.SharingAggregator(posts[n], TERMS, "study", "run") for n in PARTIES}
    ask = three_party.in_turn(three)
    scope = Scope("study", "run", 1)
    uploads = {n: three_party.share(posts[n], scope, row, TERMS) for n, row in ROWS.items()}

    def carried_on() -> None:
        for party in three.values():
            for op in ("step", "start"):
                with pytest.raises(AbortError, match="with no round begun"):
                    party.handle(op, codec.encode({}))

    assert three_party.relay(ask, scope, uploads, TERMS).accepted == list(SITES)
    carried_on()
    for party in three.values():  # each by itself, as the first refusal ends the others' turn
        party.handle("begin", codec.encode({"round": 1}))
        party.handle("start", b"")
        with pytest.raises(AbortError, match="cannot read"):
            party.handle("step", b"?")
    carried_on()
    for party in three.values():
        party.handle("begin", codec.encode({"round": 1}))
        party.handle("start", b"")
        with pytest.raises(AbortError, match="was asked to 'sing'"):
            party.handle("sing", codec.encode({}))
    carried_on()
    for party in three.values():
        party.handle("begin", codec.encode({"round": 1}))
        party.handle("start", b"")
        with pytest.raises(AbortError, match="no greeting"):
            party.handle("step", codec.encode({}))
    carried_on()


def test_uploads_of_an_attempt_before_are_not_in_the_next_one() -> None:
    posts = {key.name: Post(key, _ROSTER) for key in _KEYS}
    ask = three_party.in_turn(
        {n: three_party.SharingAggregator(posts[n], TERMS, "study", "run") for n in PARTIES}
    )
    scope = Scope("study", "run", 1)
    uploads = {n: three_party.share(posts[n], scope, row, TERMS) for n, row in ROWS.items()}

    def stopping(op: str, payloads: Mapping[str, bytes]) -> Mapping[str, bytes]:
        if op == "start":
            raise AbortError("a cable was pulled")
        return ask(op, payloads)

    with pytest.raises(AbortError, match="cable"):
        three_party.relay(stopping, scope, uploads, TERMS)
    found = three_party.relay(ask, scope, {n: uploads[n] for n in "abc"}, TERMS)
    assert found.accepted == ["a", "b", "c"] and not found.excluded
