"""Three parties in one process: their lines, shares of words, and how their messages are carried."""

from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from medfed.core.entropy import Words
from medfed.secure.line import Line, Pair

NAMES = ("p", "q", "r")

Steps = Generator[Mapping[str, bytes], Mapping[str, bytes], Any]


def lines() -> dict[str, Line]:
    """Return the three ends of a line, which have greeted each other."""
    made = {name: Line(name, NAMES, b"a test") for name in NAMES}
    publics = {name: one.public for name, one in made.items()}
    for one in made.values():
        one.connect(publics, "what was said")
    return made


def play(parties: Mapping[str, Steps]) -> dict[str, Any]:
    """Carry messages until all three have returned; return what they did."""
    done: dict[str, Any] = {}
    sent = {name: next(party) for name, party in parties.items()}
    while len(done) < len(parties):
        arrived: dict[str, dict[str, bytes]] = {name: {} for name in parties}
        for sender, messages in sent.items():
            for to, message in messages.items():
                arrived[to][sender] = message
        sent = {}
        for name, party in parties.items():
            try:
                sent[name] = party.send(arrived[name])
            except StopIteration as end:
                done[name] = end.value
    return done


def shared(words: Words, rng: np.random.Generator, bits: bool = False) -> dict[str, Pair]:
    """Return each party's shares of words: additive, or by exclusive or."""
    one, two = (rng.integers(0, 2**64, words.shape, np.uint64) for _ in range(2))
    three = words ^ one ^ two if bits else words - one - two
    parts = [one, two, three]
    return {name: Pair(parts[i], parts[(i + 1) % 3]) for i, name in enumerate(NAMES)}


def whole(held: Mapping[str, Pair], bits: bool = False) -> Words:
    """Return the words that are shared; fail where two holders of a share have it differently."""
    firsts = [held[name].first for name in NAMES]
    for i, name in enumerate(NAMES):
        assert (held[name].second == firsts[(i + 1) % 3]).all()
    if bits:
        return firsts[0] ^ firsts[1] ^ firsts[2]
    return firsts[0] + firsts[1] + firsts[2]
