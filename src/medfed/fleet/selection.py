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
    key = streams.key("groups")
    return [site for site in sites if int(patient_fraction(key, site) * groups) == (round - 1) % groups]
