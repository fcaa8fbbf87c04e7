"""Who is drawn for a round: selectors by name, each with the law that an accountant may use.

A study names one by `fleet.schedule`. One more is an entry in `SELECTORS`, wherever it is written.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medfed.core.streams import Streams, patient_fraction

Law = Literal["uniform", "turns", "unknown"]
"""What is proven of who takes part. uniform: drawn without replacement, each as likely as another;
turns: nobody twice within `fleet.groups` rounds; unknown: nothing, so an accountant counts each
client in every round.
"""


@dataclass(frozen=True)
class Profile:
    """What is publicly known of a client when a round is drawn."""

    rows: int  # training rows, the declared number under a claim


@dataclass(frozen=True)
class Selector:
    """How a round's clients are found: who may take part, then who of them does.

    Guarantee: only `law` is promised to accountants, and "unknown" unless a selector says more. No
    choice may follow from records: it sees names, public profiles and a stream of random numbers.
    """

    pick: Callable[[Mapping[str, Profile], int, np.random.Generator], Sequence[str]]  # count 0: all
    eligible: Callable[[Sequence[str], int, int, Streams], Sequence[str]] = (
        lambda names, round, groups, streams: names
    )
    law: Law = "unknown"


def draw(sites: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    """Draw `count` of the sites uniformly without replacement,
    or take all where count is 0; order is kept.
    """
    if count == 0 or count >= len(sites):
        return list(sites)
    chosen = rng.choice(len(sites), size=count, replace=False)
    return [sites[index] for index in sorted(chosen)]


def turn(sites: Sequence[str], round: int, groups: int, streams: Streams) -> list[str]:
    """Return the group whose turn it is:
    a site's keyed hash decides its group, so nobody joining moves another.

    Rounds count from 1. Guarantee: no site takes part twice within `groups` rounds.
    """
    place_K = (_fractions(sites, streams) * groups).astype(np.int64)
    return [sites[k] for k in np.flatnonzero(place_K == (round - 1) % groups).tolist()]


def empty_groups(sites: Sequence[str], groups: int, streams: Streams) -> list[int]:
    """Return the groups, by the first round in which it is their turn, that no site falls into."""
    return _empty(_fractions(sites, streams), groups)


def most_groups(sites: Sequence[str], groups: int, streams: Streams) -> int:
    """Return the most groups, at most `groups`, of which none is empty."""
    fraction_K = _fractions(sites, streams)
    return next(
        fewer for fewer in range(min(groups, len(sites)), 0, -1) if not _empty(fraction_K, fewer)
    )


def _fractions(sites: Sequence[str], streams: Streams) -> np.ndarray:
    key = streams.key("groups")
    return np.array([patient_fraction(key, site) for site in sites], dtype=np.float64)


def _empty(fraction_K: np.ndarray, groups: int) -> list[int]:
    sizes = np.bincount((fraction_K * groups).astype(np.int64), minlength=groups)
    return (np.flatnonzero(sizes == 0) + 1).tolist()


def draw_uniform(
    profiles: Mapping[str, Profile], count: int, rng: np.random.Generator
) -> list[str]:
    """Draw `count` of the clients, each as likely as another; see `draw`."""
    return draw(list(profiles), count, rng)


SELECTORS: dict[str, Selector] = {
    "random": Selector(draw_uniform, law="uniform"),
    "cyclic": Selector(draw_uniform, turn, law="turns"),
}
"""Selectors by the name that `fleet.schedule` has."""
