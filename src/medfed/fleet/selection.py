"""Who is drawn for a round."""

from collections.abc import Sequence

import numpy as np


def draw(sites: Sequence[str], count: int, generator: np.random.Generator) -> list[str]:
    """Draw `count` of the sites uniformly without replacement, or take all where count is 0; order is kept."""
    if count == 0 or count >= len(sites):
        return list(sites)
    chosen = generator.choice(len(sites), size=count, replace=False)
    return [sites[index] for index in sorted(chosen)]
