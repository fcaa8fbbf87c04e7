"""Rows shared among three aggregators, who check them in secret and open the sum: the coordinator
carries ciphertext.

K clients, M numbers in a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medfed.compliance.trail import Trail
from medfed.core import codec
from medfed.core.checks import naming
from medfed.engine.port import Fleet
from medfed.planning.plan import Plan
from medfed.planning.terms import scales
from medfed.rounds.way import (
    Asked,
    Questions,
    RoundRows,
    combine_opened,
    enough,
    read,
    record,
    sign,
)
from medfed.secure import three_party
from medfed.secure.chain import Publisher
from medfed.secure.identity import Scope


@dataclass(frozen=True)
class Shared:
    """The coordinator relays shares that it cannot read;
    three aggregators check rows in secret and open the sum.
    """

    ask: three_party.Ask
    publisher: Publisher
    terms: three_party.SharingTerms
    trail: Trail | None = None
    spread: float = 0.0  # standard deviation of the noise on a sum, in steps
    # and on an entry of K rows' Gram matrix, in steps squared
    gram_spread: Callable[[int], float] = lambda K: 0.0

    def open(
        self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes
    ) -> "SharedExchange":
        """Ask the clients for the shares of their rows."""
        question = sign(self.publisher, number, payload)
        questions = Questions.ask(fleet, clients, question, plan.study.training.deadline)
        return SharedExchange(plan, number, questions, self)


@dataclass
class SharedExchange(Asked):
    """One round among three aggregators."""

    way: Shared

    def close(self) -> RoundRows:
        """Carry the shares to the aggregators, and combine what those open."""
        way = self.way
        plan = self.plan
        clients = self.questions.clients
        replies = self.questions.replies()
        reports, uploads, excluded = read(replies, "upload")
        enough(plan, self.number, uploads, clients, excluded)

        # Relay: the three check, weigh and open.
        scope = Scope(way.publisher.study, way.publisher.run, self.number)
        sent = {name: codec.as_bytes(upload) for name, upload in uploads.items()}
        with naming(excluded):
            opened = three_party.relay(way.ask, scope, sent, way.terms, way.spread)
        excluded |= opened.excluded
        record(
            way.trail, way.publisher, self.number, sent, opened.total_M, opened.accepted, excluded
        )

        accepted = set(opened.accepted)
        return RoundRows(
            names=[name for name in clients if name in accepted],
            reports=reports,
            replies=replies,
            combined_M=combine_opened(opened.total_M, plan, opened.accepted, self.number),
            excluded=excluded,
            **self._read_by_the_rule(opened),
            more_down=opened.phases["shares"] + opened.phases["check"],
            more_up=opened.phases["check"] + opened.phases["open"],
            phases=opened.phases,
        )

    def _read_by_the_rule(self, opened: three_party.Opened) -> dict[str, Any]:
        """Return what the rule read and gave, of rows as means where they are sums."""
        if opened.gram_KK is None:
            return {}
        size = scales(self.plan)
        scale_K = np.array([size.get(name, 1.0) for name in opened.accepted])
        return {
            "weights": {
                name: opened.weights[name] / three_party.WEIGHT for name in opened.accepted
            },
            "gram_KK": torch.from_numpy(opened.gram_KK * np.outer(scale_K, scale_K)),
            "gram_noise": self.way.gram_spread(len(scale_K)) * float(scale_K.max()) ** 2,
        }
