"""Gathering answers: who answered, who did not, and in which order, whatever an engine does."""

from collections.abc import Sequence
from itertools import permutations

import pytest

from medfed.engine import port
from medfed.engine.port import Counted, Reply, Without, gather, gather_each


class Clock:
    """Time that passes only when somebody waits."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


class Scripted:
    """A fleet that hands out prepared replies: (arrives after seconds, site, error). Tickets count
    on from `first`.
    """

    def __init__(
        self, clock: Clock, script: Sequence[tuple[float, str, str]], first: int = 0
    ) -> None:
        self.clock = clock
        self.script = sorted(script, key=lambda entry: entry[0])
        self.first = first
        self.asked: list[tuple[tuple[str, ...], str, bytes, float]] = []
        self.waits: list[float] = []
        self.pending: list[tuple[float, Reply]] = []

    def sites(self) -> list[str]:
        return []

    def submit(self, site: str, op: str, payload: bytes, deadline: float) -> int:
        return self.submit_many([site], op, payload, deadline)[0]

    def submit_many(
        self, sites: Sequence[str], op: str, payload: bytes, deadline: float
    ) -> list[int]:
        self.asked.append((tuple(sites), op, payload, deadline))
        tickets = {site: self.first + i for i, site in enumerate(sites)}
        self.first += len(sites)
        for after, site, error in self.script:
            if site in tickets:
                reply = Reply(tickets[site], site, b"" if error else site.encode(), after, error)
                self.pending.append((self.clock.now + after, reply))
        return list(tickets.values())

    def poll(self, wait: float) -> list[Reply]:
        self.waits.append(wait)
        arrives = min((at for at, _ in self.pending), default=float("inf"))
        if arrives > self.clock.now + wait:
            self.clock.now += wait
            return []
        self.clock.now = max(self.clock.now, arrives)
        arrived = [reply for at, reply in self.pending if at <= self.clock.now]
        self.pending = [(at, reply) for at, reply in self.pending if at > self.clock.now]
        return arrived


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(port, "time", clock)
    return clock


@pytest.mark.parametrize("arrival", list(permutations("abc")))
def test_answers_come_in_the_order_of_the_question(clock: Clock, arrival: tuple[str, ...]) -> None:
    fleet = Scripted(clock, [(float(i), site, "") for i, site in enumerate(arrival)])
    replies = gather(fleet, ["c", "a", "b"], "work", b"ask", 60)
    assert list(replies) == ["c", "a", "b"]
    assert {site: reply.payload for site, reply in replies.items()} == {
        "a": b"a",
        "b": b"b",
        "c": b"c",
    }
    assert fleet.asked == [(("c", "a", "b"), "work", b"ask", 60)]


def test_answers_that_arrive_together_all_count(clock: Clock) -> None:
    fleet = Scripted(clock, [(2.0, site, "") for site in "abc"])
    assert all(not reply.error for reply in gather(fleet, "abc", "work", b"", 60).values())
    assert clock.now == 102  # and nobody waited any longer


def test_an_error_is_an_answer(clock: Clock) -> None:
    replies = gather(
        Scripted(clock, [(1, "a", "out of rows"), (2, "b", "")]), ["a", "b"], "work", b"", 60
    )
    assert (replies["a"].error, replies["a"].payload) == ("out of rows", b"")
    assert replies["b"].error == ""


def test_a_late_site_gets_an_error_and_the_others_their_answers(clock: Clock) -> None:
    replies = gather(Scripted(clock, [(1, "a", ""), (61, "b", "")]), ["b", "a"], "work", b"", 60)
    assert list(replies) == ["b", "a"]
    assert (replies["b"].error, replies["b"].payload, replies["b"].seconds) == (
        "no answer within 60 s",
        b"",
        60,
    )
    assert replies["a"].payload == b"a"
    assert clock.now == 160


def test_an_answer_just_before_the_deadline_counts(clock: Clock) -> None:
    assert not gather(Scripted(clock, [(59.5, "a", "")]), ["a"], "work", b"", 60)["a"].error


def test_each_wait_is_what_is_left(clock: Clock) -> None:
    fleet = Scripted(clock, [(10, "a", ""), (25, "b", "")])
    gather(fleet, ["a", "b", "silent"], "work", b"", 60)
    assert fleet.waits == [60, 50, 35]


def test_a_site_without_any_answer_is_not_waited_for_longer(clock: Clock) -> None:
    replies = gather(Scripted(clock, []), ["a"], "work", b"", 5)
    assert replies["a"].error == "no answer within 5 s"
    assert clock.now == 105


def test_a_late_answer_is_not_taken_for_the_next_rounds(clock: Clock) -> None:
    fleet = Scripted(clock, [(61, "a", ""), (1, "b", "")])
    assert gather(fleet, ["a", "b"], "work", b"", 60)["a"].error
    fleet.script = [(30, "a", "second")]
    assert gather(fleet, ["a"], "work", b"", 60)["a"].error == "second"


def test_a_second_answer_to_one_ticket_is_passed_over(clock: Clock) -> None:
    fleet = Scripted(clock, [(1, "a", ""), (1, "a", "second"), (2, "a", "third"), (3, "b", "")])
    replies = gather(fleet, ["a", "b"], "work", b"", 60)
    assert (replies["a"].payload, replies["a"].error) == (b"a", "")
    assert replies["b"].payload == b"b"


def test_an_answer_belongs_to_its_ticket_whatever_site_it_names(clock: Clock) -> None:
    """A reply that names another site must not take that site's place, nor end the run."""
    fleet = Scripted(clock, [])
    fleet.pending = [(101.0, Reply(0, "b", b"from a", 1.0)), (102.0, Reply(1, "b", b"from b", 1.0))]
    replies = gather(fleet, ["a", "b"], "work", b"", 60)
    assert {site: reply.payload for site, reply in replies.items()} == {
        "a": b"from a",
        "b": b"from b",
    }


def test_an_unknown_ticket_is_passed_over(clock: Clock) -> None:
    fleet = Scripted(clock, [(2, "a", "")])
    fleet.pending = [(101.0, Reply(77, "a", b"forged", 1.0))]
    assert gather(fleet, ["a"], "work", b"", 60)["a"].payload == b"a"


def test_a_counted_fleet_counts_what_passes_and_changes_nothing(clock: Clock) -> None:
    script = [(1.0, "a", ""), (2.0, "bcd", ""), (3.0, "silent", "out of rows")]
    fleet = Counted(Scripted(clock, script))
    replies = gather(fleet, ["a", "bcd", "silent"], "work", b"question", 60)
    again = gather(Scripted(clock, script), ["a", "bcd", "silent"], "work", b"question", 60)
    assert (fleet.bytes_down, fleet.bytes_up) == (3 * len(b"question"), len(b"a") + len(b"bcd"))
    assert replies == again


def test_asking_nobody_waits_for_nobody(clock: Clock) -> None:
    assert gather(Scripted(clock, []), [], "work", b"", 60) == {}
    assert clock.now == 100


def test_who_is_away_is_answered_for_and_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(port.time, "monotonic", clock.monotonic)
    fleet = Scripted(clock, [(1.0, "a", ""), (2.0, "c", "")], first=7)
    fleet.sites = lambda: ["a", "b", "c"]  # type: ignore[method-assign]
    without = Without(fleet, {"b": "is away"})
    assert without.sites() == ["a", "c"]
    for _ in range(2):
        replies = gather(without, ["a", "b", "c"], "op", b"x", 10.0)
        assert {n: (r.payload, r.error) for n, r in replies.items()} == {
            "a": (b"a", ""),
            "b": (b"", "is away"),
            "c": (b"c", ""),
        }
    before = clock.now
    assert gather(without, ["b"], "op", b"x", 10.0)["b"].error == "is away"
    assert clock.now == before  # nobody is waited for
    replies = gather_each(without, "op", {"b": b"1", "c": b"2"}, 10.0)
    assert [reply.error for reply in replies.values()] == ["is away", ""]
    assert {name for asked in fleet.asked for name in asked[0]} == {"a", "c"}
