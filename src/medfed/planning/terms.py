"""What the parties of a secure round agree on, each by itself:
bounds, thresholds, noise, weights, the rule.

All of it follows from what is resolved. A site makes its `Party` of a run here, an aggregator its
side of the protocol.
"""

import json
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from medfed.core.checks import PlanError, some
from medfed.core.entropy import Entropy, Integers
from medfed.links.wire import noise_share
from medfed.planning.cohorts import cohort
from medfed.planning.resolved import (
    GRAM_SHARE,
    Resolved,
    colluding,
    fewest_opened,
    graph_of,
    least_rows,
)
from medfed.planning.row_limits import row_limits
from medfed.privacy.guarantee import GRID, SLACK, Guarantee, discrete_gaussian
from medfed.secure import masking, three_party
from medfed.secure.chain import Follower
from medfed.secure.identity import Post
from medfed.secure.party import Masker, Party, Sharer
from medfed.secure.record import Record


def party_of(facts: Resolved, follower: Follower) -> Party:
    """Return a site's side of its study's secure rounds."""
    if facts.study.security.aggregation == "masked":
        weight = 1 if facts.joint else int(facts.weight(follower.post.me.name))
        return Masker(follower, masking_terms(facts, follower.run), weight)
    return Sharer(follower, terms_of(facts))


def aggregator_of(
    facts: Resolved, post: Post, run: str, record: Record
) -> three_party.SharingAggregator:
    """Return an aggregator's side of a run: its noise and weights are the study's, never a
    message's, and what it has opened stands in its `record`.
    """
    guarantee = facts.guarantee
    terms = terms_of(facts)
    noise = None
    if guarantee is not None and facts.joint and not guarantee.simulation_only:
        noise = noise_share(guarantee, 2)
    weights = (
        None if facts.joint else {name: int(facts.weight(name)) for name in facts.participants}
    )
    return three_party.SharingAggregator(
        post=post,
        terms=terms,
        study=facts.study.digest(),
        run=run,
        noise=noise,
        weights=weights,
        selection=selection(facts, terms),
        record=record,
    )


def masking_terms(
    facts: Resolved, run: str
) -> Callable[[Sequence[str], int], masking.MaskingTerms]:
    """Return what a masked round of these clients agrees on, by its number.

    Raises PlanError for clients that the study does not draw for the round: whoever names them
    could leave a site alone among its own people, or with too little noise. All of the draw is
    public, so that each party does it again.
    """

    def choose(clients: Sequence[str], round: int) -> masking.MaskingTerms:
        drawn = facts.expect(round)
        if sorted(clients) != sorted(drawn):
            odd = sorted(set(clients) ^ set(drawn)) or sorted(clients)
            raise PlanError(
                f"round {round}: told to add rows of {len(clients)} clients; the study draws "
                f"{len(drawn)}, and {some(odd)} differ. Draw as the study says."
            )
        n = len(drawn)
        stay = least_rows(facts.study, n)
        return masking.MaskingTerms.choose(
            drawn,
            facts.message,
            (n - stay) / n,
            colluding(facts.study, n),
            json.dumps([run, round, facts.digest]).encode(),
            sparse=graph_of(facts.study, n) is not None,
        )

    return choose


def gram_split(
    guarantee: Guarantee, terms: three_party.SharingTerms
) -> tuple[Callable[[int], float], float]:
    """Return the noise of both openings: on an entry of K rows' Gram matrix (K -> sigma), and on a
    sum of weight 1.

    The two Gaussian releases cost together what the round's one would have: 1 / z^2 = 1 / z_G^2 + 1
    / z_A^2. One patient moves a row by s, and with it the upper triangle by s sqrt(sum B_j^2 + 3
    max B^2) at most, over the K longest rows that are let pass.
    """
    s_z = guarantee.sigma_units()  # z times what one patient moves a row by

    def on_products(K: int) -> float:
        longest = sorted(terms.bounds.values(), reverse=True)[:K]
        longest += [terms.bound] * (K - len(longest))
        squares = sum(bound**2 for bound in longest) + 3 * longest[0] ** 2
        return s_z * math.sqrt(squares / GRAM_SHARE)

    return on_products, s_z / math.sqrt(1 - GRAM_SHARE)


def scales(facts: Resolved) -> dict[str, float]:
    """Return what makes each site's row a mean where it is a sum over its declared patients;
    else nothing.
    """
    guarantee = facts.guarantee
    if guarantee is None or not facts.joint:
        return {}
    return {name: 1 / release.expected for name, release in guarantee.releases.items()}


def selection(facts: Resolved, terms: three_party.SharingTerms) -> three_party.Selection | None:
    """Return how three aggregators weigh rows under the study's rule, with their noise; None
    without a rule.
    """
    guarantee = facts.guarantee
    if facts.rule is None:
        return None

    def weigh(gram_KK: NDArray[np.float64]) -> NDArray[np.float64]:
        found: NDArray[np.float64] = facts.weigh(torch.from_numpy(gram_KK)).numpy()
        return found

    if guarantee is None or not facts.joint:
        return three_party.Selection(weigh)
    gram, total = gram_split(guarantee, terms)

    def on_gram(K: int, entropy: Entropy) -> Integers:
        return discrete_gaussian(gram(K) / math.sqrt(2)).sample(K * (K + 1) // 2, entropy)

    def on_sum(length: int, most: int, entropy: Entropy) -> Integers:
        return discrete_gaussian(total * most / math.sqrt(2)).sample(length, entropy)

    return three_party.Selection(
        weigh, scales(facts), on_gram, lambda K: gram(K) / math.sqrt(2), on_sum
    )


def terms_of(facts: Resolved) -> three_party.SharingTerms:
    """Return what three aggregators hold rows to: under joint noise each to its own limit.

    Every site holds its own sum to it (`node.work.sum_gradients`), so no honest row is beyond,
    whoever is in it.
    """
    guarantee = facts.guarantee
    security = facts.study.security
    bounds: dict[str, float] = {}
    if guarantee is not None and facts.joint:
        for name, limit in row_limits(facts.study, guarantee).items():
            count = 0.5 * guarantee.releases[name].size if guarantee.clipping == "adaptive" else 0.0
            steps = math.hypot(limit * (1 + SLACK), count) / GRID
            bounds[name] = steps + math.sqrt(facts.message)
        bound = max(bounds.values())
    else:  # under a rule the bound is on the norm, else on each number
        norm = facts.study.robustness.bound
        numbers = 1 if facts.rule or norm else facts.message
        steps = (norm * (1 + 1e-6) or security.bound) * 2.0**security.fraction_bits
        bound = steps * math.sqrt(numbers) + math.sqrt(facts.message)

    first, second, third = security.aggregators
    drawn = cohort(facts.study, facts.participants)
    kept = fewest_opened(facts.study, drawn)
    return three_party.SharingTerms(
        facts.message,
        bound,
        (first, second, third),
        max(kept, facts.quorum(drawn)),
        kept,
        facts.expect,
        bytes.fromhex(facts.digest),
        bounds,
    )
