"""Random programs of lies, one machine for each way to add rows: hypothesis picks the acts.

A round is played with up to two lies, in the order of a program that also restarts parties and has
them join again. After every act `World.check` must hold. A machine's `bug` is planted before its
world is made.
"""

import gc
from collections.abc import Callable, Sequence
from random import Random
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.adversaries.world import (
    AGGREGATORS,
    COORDINATOR,
    Three,
    World,
    names_of,
    sizes_of,
    study_of,
)

SITES = names_of(5)
Bug = Callable[[pytest.MonkeyPatch], None]
Sizes = dict[str, dict[str, int]]
Lie = tuple[Any, ...]
"""What is done otherwise in a round: its name, and what with."""


def drawn(draw: Callable[[Random], Any]) -> st.SearchStrategy[Any]:
    """Return what is drawn evenly: left to itself hypothesis tries simple values far more often."""
    return st.integers(0, 2**48).map(lambda seed: draw(Random(seed)))


def draw_sites(rng: Random) -> tuple[str, ...]:
    """Return one site, or any number."""
    if rng.random() < 0.4:
        return (rng.choice(SITES),)
    return tuple(sorted(rng.sample(SITES, rng.randint(1, 5))))


def draw_round(rng: Random) -> int:
    return rng.choice((1, 1, 1, 2, 2, 3))


def draw_masked(rng: Random) -> Lie:
    """Return a lie of a server of masked rounds."""
    match rng.randrange(7):
        case 0:
            return "restart", rng.choice(SITES)
        case 1:
            return "members", rng.choice((("s0", "s1", "s4"), ("s0", "s1", COORDINATOR)))
        case 2:
            return "another model", rng.choice((SITES, draw_sites(rng)))
        case 3:
            return "no row of", draw_sites(rng)
        case 4:
            return "survivors without", draw_sites(rng)
        case 5:
            return "two lists", draw_sites(rng), draw_sites(rng), draw_sites(rng)
    phase = rng.choice(("shares", "boxes", "confirm", "unmask"))
    return rng.choice(("alter", "repeat", "swap")), phase, rng.choice(SITES), rng.randrange(500)


def draw_shared(rng: Random) -> Lie:
    """Return a lie of a relay of shares."""
    match rng.randrange(13):
        case 0:
            return "another model", draw_sites(rng)
        case 1:
            return ("inner round",)
        case 2 | 3:
            return "without", draw_sites(rng)
        case 4:
            return "uneven", draw_sites(rng)
        case 5:
            return ("old greeting",)
        case 6:
            return "stop at", rng.randrange(25)
        case 7:
            return "uploads of before", draw_sites(rng)
        case 8:
            return ("rows of liars",)
        case 9:
            return rng.choice((("swapped uploads",), ("in another study",)))
        case 10:
            return "restart", rng.choice(SITES)
        case 11:
            name = rng.choice(AGGREGATORS)
            return rng.choice(
                (("restart and join", name, draw_told(rng)), ("join again", draw_told(rng)))
            )
    return (
        rng.choice(("alter", "drop")),
        rng.randrange(20),
        rng.choice(AGGREGATORS),
        rng.randrange(300),
    )


def draw_told(rng: Random) -> str:
    return rng.choice(("", "one size", "fewer", "all small but one"))


def draw_act(lie: Callable[[Random], Lie]) -> Callable[[Random], tuple[int, list[Lie]]]:
    """Return what draws a round and up to two lies in it."""
    return lambda rng: (draw_round(rng), [lie(rng) for _ in range(rng.choice((0, 1, 1, 2)))])


def told_of(kind: str) -> Sizes:
    """Return participants and sizes as a lying coordinator tells them."""
    sizes = sizes_of(SITES)
    match kind:
        case "one size":
            sizes["s1"] = {"train": 1000}
        case "all small but one":
            sizes = {name: {"train": 1000 if name == "s0" else 0} for name in SITES}
        case "fewer":
            sizes = {name: sizes[name] for name in SITES[:3]}
        case "others":
            sizes = {name: sizes[name] for name in SITES[:2]}
            sizes |= {name: {"train": 10} for name in (COORDINATOR, AGGREGATORS[2])}
    return sizes


class Liar(RuleBasedStateMachine):
    """What both machines share: a world, which holds after every act."""

    bug: ClassVar[Bug | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.world: World
        if bug := type(self).bug:
            bug(self.patch)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        self.patch.undo()
        # A world is in cycles, and its few objects hold 5 MB: left to itself Python would let
        # thousands of them stand before it looks.
        gc.collect()

    def restart(self, site: str) -> None:
        """Start a site anew, where it is honest."""
        if site in self.world.sites:
            self.world.restart(site)


def alter(message: bytes, at: int) -> bytes:
    """Return a message with one bit of one byte flipped; an empty one as it is."""
    if not message:
        return message
    at %= len(message)
    return message[:at] + bytes([message[at] ^ 1]) + message[at + 1 :]


class MaskedLies(Liar):
    """A server of masked rounds that lies, alone or with others."""

    @initialize(
        claim=drawn(lambda rng: rng.random() < 0.5),
        liars=drawn(lambda rng: rng.choice(((), ("s4",)))),
        told=drawn(lambda rng: rng.choice(("all",) * 5 + ("others",))),
        told_s0=drawn(lambda rng: rng.choice(("all",) * 5 + ("one size",))),
    )
    def begin(self, claim: bool, liars: tuple[str, ...], told: str, told_s0: str) -> None:
        if told == "others":
            claim = False  # no study with a claim declares patients of the coordinator
            liars = AGGREGATORS[2:]
        odd = {"s0": told_of(told_s0)} if told == "all" and not claim and told_s0 != "all" else {}
        self.world = World(
            self.patch, "masked", claim=claim, liars=liars, told=told_of(told), told_to=odd
        )
        self.seen: dict[tuple[str, str], list[bytes]] = {}

    @rule(act=drawn(draw_act(draw_masked)))
    def play(self, act: tuple[int, list[Lie]]) -> None:
        round, lies = act
        how: dict[str, Any] = {}
        for lie in lies:
            match lie:
                case "restart", name:
                    self.restart(name)
                case "members", told:
                    how["told"] = told
                case "another model", names:
                    how["models"] = dict.fromkeys(names, 1)
                case "no row of", names:
                    how["silent"] = names
                case "survivors without", names:
                    how["lists"] = (names,)
                case "two lists", first, other, second:
                    how |= {"lists": (first, other), "second": second}
                case kind, phase, site, at:
                    how["meddle"] = self.meddling(kind, (phase, site), at)
        how.setdefault("told", list(self.world.told))
        how.setdefault("meddle", self.meddling("", ("", ""), 0))
        self.world.play_masked(round, **how)

    def meddling(
        self, how: str, where: tuple[str, str], at: int
    ) -> Callable[[str, str, bytes], bytes]:
        """Return what alters one message, repeats an older one or swaps it for another site's."""

        def meddle(phase: str, site: str, message: bytes) -> bytes:
            before = self.seen.setdefault((phase, site), [])
            before.append(message)
            if (phase, site) != where:
                return message
            if how == "alter":
                return alter(message, at)
            if how == "repeat":
                return before[0]
            others = [
                said[-1] for (of, name), said in self.seen.items() if of == phase and name != site
            ]
            return (others or [message])[-1]

        return meddle


class SharedLies(Liar):
    """A relay of shares that lies, alone or with a site or with one aggregator."""

    @initialize(
        claim=drawn(lambda rng: rng.random() < 0.5),
        liars=drawn(lambda rng: rng.choice(((), ("s4",), AGGREGATORS[2:]))),
        told=drawn(lambda rng: rng.choice(("all",) * 5 + ("others",))),
        told_to=drawn(
            lambda rng: rng.choice(("all",) * 9 + ("one size", "all small but one", "fewer"))
        ),
    )
    def begin(self, claim: bool, liars: tuple[str, ...], told: str, told_to: str) -> None:
        if told == "others":
            claim = False
            told_to = "all"
            liars = AGGREGATORS[2:]
        self.world = World(self.patch, "three-party", claim=claim, liars=liars, told=told_of(told))
        if told_to != "all":
            self.world.told_to = dict.fromkeys(AGGREGATORS, told_of(told_to))
        self.three = self.world.open_aggregators()
        self.uploads: dict[tuple[str, int], bytes] = {}
        self.elsewhere: Three | None = None

    def ask(
        self, round: int, odd: Sequence[str] = (), inner: int | None = None
    ) -> dict[str, bytes]:
        """Ask all for their rows; return the newest that each has sent for the round."""
        for name in self.world.sites:
            upload = self.world.work(name, round, 1 if name in odd else 0, inner)
            if upload is not None:
                self.uploads[name, round] = upload
        return {name: upload for (name, of), upload in self.uploads.items() if of == round}

    @rule(act=drawn(draw_act(draw_shared)))
    def play(self, act: tuple[int, list[Lie]]) -> None:
        round, lies = act
        said = {lie[0]: lie[1:] for lie in lies}
        for lie in lies:
            match lie:
                case "restart", name:
                    self.restart(name)
                case "restart and join", name, kind:
                    self.three.restart(name, told_of(kind) if kind else None)
                case "join again", kind:
                    for name in AGGREGATORS:
                        self.three.join(name, told_of(kind) if kind else None)
        inner = round + 1 if "inner round" in said else None
        came = self.ask(round, *said.get("another model", ((),)), inner)
        how: dict[str, Any] = {"old_greeting": "old greeting" in said}
        out: Sequence[str] = ()
        odd: Sequence[str] = ()
        for lie in lies:
            match lie:
                case "without", names:
                    out = names
                case "uneven", names:
                    odd = names
                case "stop at", step:
                    how["stop_at"] = step
                case "uploads of before", names:
                    came |= {
                        name: one
                        for (name, of), one in self.uploads.items()
                        if name in names and of != round
                    }
                case ("rows of liars",):
                    came |= self.world.rows_of_liars(round)
                case ("swapped uploads",) if {"s0", "s1"} <= came.keys():
                    came |= {"s0": came["s1"], "s1": came["s0"]}
                case "alter" | "drop" as kind, step, sender, at:
                    how["meddle"] = self.meddling(kind, (step, sender), at)
        mine = {name: upload for name, upload in came.items() if name not in out}
        others = {name: upload for name, upload in mine.items() if name not in odd}
        three = self.in_another_study() if "in another study" in said else self.three
        three.play(round, others, instead={AGGREGATORS[1]: mine}, **how)

    def in_another_study(self) -> Three:
        """Return the same three in a study without noise, made when it is first asked for."""
        if self.elsewhere is None:
            self.elsewhere = self.world.open_aggregators(study_of("three-party", False))
        return self.elsewhere

    @staticmethod
    def meddling(
        how: str, where: tuple[int, str], at: int
    ) -> Callable[[int, str, str, bytes], bytes | None]:
        """Return what alters or drops the messages of one aggregator in one step."""

        def meddle(step: int, sender: str, to: str, message: bytes) -> bytes | None:
            if (step, sender) != where:
                return message
            return alter(message, at) if how == "alter" else None

        return meddle
