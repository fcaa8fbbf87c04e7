"""The threat model in numbers: what f sites with the coordinator can do, by way of aggregation.

Each figure comes from the functions that plans and rounds use, so that the table says what the code
does. f is what `security.colluding` allows for; of more sites than that nothing is promised.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from medfed.planning.resolved import (
    colluding,
    fewest_opened,
    graph_of,
    holders,
    least_rows,
    of_clients,
)
from medfed.secure import graph
from medfed.study import Study

WAYS = ("plain", "masked", "three-party")
"""Values of security.aggregation, in the order of the table."""

MEMBERS = (10, 49, 200, 1000, 5000)
"""Clients of a round, as the table has them."""

SHARES = (0.1, 0.3)
"""`security.colluding`, as the table has it: the default last."""


@dataclass(frozen=True)
class Coalition:
    """What f sites with the coordinator come to in a round of n clients.

    `breaks` says who reads rows, or with how many sites nothing is promised any more. `rows` are
    the honest rows in an opened sum at least, `parts` the parts of the noise that such a coalition
    does not know, of all that honest sites or aggregators add, at least; 0 where the coordinator
    knows it all. `failure` is the logarithm (base 2) of the probability that this is not kept, None
    where nothing is left to chance; `dropouts` how many clients may fall silent.
    """

    way: str
    members: int
    liars: int
    neighbours: int
    breaks: str
    rows: int
    parts: float
    failure: float | None
    dropouts: int


def count(study: Study, n: int) -> Coalition:
    """Return what f sites can do to a round of n clients of a study, beside its coordinator."""
    f = colluding(study, n)
    clients = [str(number) for number in range(n)]
    way = study.security.aggregation
    if way == "plain":
        return Coalition(way, n, f, 0, "the coordinator alone", 1, 0.0, None, n - 1)
    if way == "three-party":
        asked = math.ceil(study.training.quorum * n - 1e-9)
        bad = of_clients(study.robustness.max_malicious, n)
        stay = max(fewest_opened(study, n), asked - bad)
        return Coalition(way, n, f, 0, "two aggregators", stay - f, 2 / 3, None, n - stay)

    stay = least_rows(study, n)
    law = graph_of(study, n)
    parts = holders(study, clients)
    if law is None:
        breaks = f"{2 * stay - n} sites"  # two lists can then be confirmed
        return Coalition("masked", n, f, n - 1, breaks, stay - f, parts / n, None, n - stay)
    degree = round(law.edge / graph.WORD * (n - 1))
    more = next(x for x in range(f, n) if fail(law, n, n - stay, x) > -20)
    return Coalition(
        "masked, sparse",
        n,
        f,
        degree,
        f"{more} sites at 2^-20",
        stay - f - law.lost,
        parts / n,
        fail(law, n, n - stay, f),
        n - stay,
    )


def fail(law: graph.Sparse, n: int, gone: int, liars: int) -> float:
    """Return log2 of the probability, at most, that a graph does not keep its promise against so
    many sites: the three events of `secure.graph`.
    """
    if 2 * (n - gone) <= n + liars:
        return 0.0
    events = (
        graph.fail_to_join(n, liars, law.lost, law.edge),
        graph.fail_small(n, liars, law.lost, law.edge, law.share),
        graph.fail_to_check(n, liars, n - gone, law.checks),
    )
    return min(0.0, graph.add_logs(events))


def table() -> Iterator[Coalition]:
    """Yield the rows of the threat model's table, for studies with all else as by default."""
    for way in WAYS:
        for n in MEMBERS if way != "plain" else MEMBERS[:1]:
            for share in SHARES:
                study = Study().set("security.aggregation", way).set("security.colluding", share)
                yield count(study, n)
