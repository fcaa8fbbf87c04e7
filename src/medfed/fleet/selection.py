"""Who is drawn for a round."""

from collections.abc import Sequence

import numpy as np

from medfed.core.streams import Streams, patient_fraction


def draw(sites: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Draw `count` of the sites uniformly without replacement, or take all where count is 0; order is kept."""
    if count == 0 or count >= len(sites):
        return list(sites)
    chosen = generator.choice(len(sites), size=count, replace=False)
    return [sites[index] for index in sorted(chosen)]


def turn(sites: Sequence[str], round: int, groups: int, streams: Streams) -> list[str]:
    """Return the group whose turn it is: a site's keyed hash decides its group, so nobody joining moves another.

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
    return next(fewer for fewer in range(min(groups, len(sites)), 0, -1) if not _empty(fraction_K, fewer))


def _fractions(sites: Sequence[str], streams: Streams) -> np.ndarray:
    key = streams.key("groups")
    return np.array([patient_fraction(key, site) for site in sites], dtype=np.float64)


def _empty(fraction_K: np.ndarray, groups: int) -> list[int]:
    sizes = np.bincount((fraction_K * groups).astype(np.int64), minlength=groups)
    return (np.flatnonzero(sizes == 0) + 1).tolist()
