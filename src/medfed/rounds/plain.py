"""Rows in plain sight: the coordinator reads, checks, weighs and sums them.

K clients, M numbers in a row.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medfed.core import codec
from medfed.core.checks import CodecError, SiteError, naming
from medfed.engine.port import Fleet, Reply
from medfed.links.wire import combine, decode, decodes, finite, sent_as
from medfed.planning.plan import Plan
from medfed.robust import rules
from medfed.rounds.way import Asked, Questions, Reports, RoundRows, enough


class Plain:
    """The coordinator reads every row."""

    trail = None

    def open(
        self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes
    ) -> "PlainExchange":
        """Ask the clients for their rows."""
        return PlainExchange(
            plan, number, Questions.ask(fleet, clients, payload, plan.study.training.deadline)
        )


PLAIN = Plain()
"""The one instance: it keeps nothing."""


class PlainExchange(Asked):
    """One round in plain sight."""

    def close(self) -> RoundRows:
        """Read, decode, check and combine."""
        plan = self.plan
        replies = self.questions.replies()

        # Read, and undo at once what the links can only undo row by row.
        reports, names, row_KM, excluded = read_rows(replies, plan)
        if decodes(plan.links):
            names, row_KM, strange = _decode_each(names, row_KM, plan)
            excluded |= strange

        # Check: no number of a row may be none, no row longer than the study's bound.
        excluded |= _strange(names, row_KM, plan.study.robustness.bound)
        counted = [k for k, name in enumerate(names) if name not in excluded]
        if len(counted) < len(names):
            names = [names[k] for k in counted]
            row_KM = row_KM[counted]
        enough(plan, self.number, names, self.questions.clients, excluded)

        # Combine.
        with naming(excluded):  # a rule may have too few rows where the quorum has enough
            combined_M, read = self._combine(names, row_KM)
        return RoundRows(names, reports, replies, combined_M, excluded, **read)

    def _combine(self, names: Sequence[str], row_KM: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Return the combined row, and what a rule has read and given."""
        plan = self.plan
        number = self.number
        if plan.rule is None:
            weight_K = torch.tensor([plan.weight(name) for name in names], dtype=torch.float64)
            share_K = None if plan.joint else weight_K / weight_K.sum()
            return combine(row_KM, share_K, plan.links, number), {}

        gram_KK = rules.gram(rules.blocks_of(row_KM))
        if plan.rule.needs == "rows":  # no weights to tell
            one_M = plan.fitting(len(names)).combine(row_KM)
            weights = dict.fromkeys(names, 1 / len(names))
            return combine(one_M[None], torch.ones(1), plan.links, number), {
                "weights": weights,
                "gram_KK": gram_KK,
            }

        w_K = plan.weigh(gram_KK)
        weights = dict(zip(names, w_K.tolist(), strict=True))
        return combine(row_KM, w_K, plan.links, number), {"weights": weights, "gram_KK": gram_KK}


def _strange(names: Sequence[str], row_KM: Tensor, bound: float) -> dict[str, str]:
    """Return whose rows are not finite, or longer than a bound above 0."""
    found: dict[str, str] = {}
    for k, good in enumerate(finite(row_KM).tolist()):
        if not good:
            found[names[k]] = "its row is not finite"
        elif bound and float(row_KM[k].double().norm()) > bound * (1 + 1e-6):
            found[names[k]] = f"its row is out of bound: robustness.bound={bound:g}"
    return found


def _decode_each(
    names: Sequence[str], row_KM: Tensor, plan: Plan
) -> tuple[list[str], Tensor, dict[str, str]]:
    """Return whose rows could be decoded, these rows [K, M], and the others' reasons."""
    decoded: dict[str, Tensor] = {}
    strange: dict[str, str] = {}
    for name, row_M in zip(names, row_KM, strict=True):
        try:
            decoded[name] = _check(decode(row_M[None], plan.links, plan.message)[0], plan.message)
        except SiteError as error:
            strange[name] = str(error)
    rows = list(decoded.values())
    return list(decoded), torch.stack(rows) if rows else torch.empty(0, plan.message), strange


def _check(row_M: Tensor, numbers: int) -> Tensor:
    if row_M.shape != (numbers,):
        raise SiteError(
            f"its row decodes to shape {tuple(row_M.shape)}; expected {numbers} numbers"
        )
    return row_M


def read_rows(
    replies: Mapping[str, Reply], plan: Plan
) -> tuple[Reports, list[str], Tensor, dict[str, str]]:
    """Return reports, whose rows can be read, these rows as sent, and the others' reasons.

    Args:
        replies: what came, by site.
        plan: the run's; its links say how a row is sent.
    """
    length, kind = sent_as(plan.message, plan.links)
    row_KM = torch.empty(len(replies), length, dtype=kind)
    expected = codec.RowFormat("row", torch.empty(length, dtype=kind))
    reports = Reports()
    names = list[str]()
    reasons = dict[str, str]()

    for name, reply in replies.items():
        try:
            reports[name] = _read_row(reply, expected, row_KM[len(names)])
            names.append(name)
        except SiteError as error:
            reasons[name] = str(error)
        except (CodecError, KeyError) as error:
            reasons[name] = f"its reply cannot be read: {error}"

    return reports, names, row_KM[: len(names)], reasons


def _read_row(reply: Reply, expected: codec.RowFormat, place_M: Tensor) -> dict[str, Any]:
    """Write a reply's row into its place and return the report beside it.

    It must have the place's length and kind of number; one of another width is converted.
    """
    if reply.error:
        raise SiteError(reply.error)
    report = expected.decode(reply.payload, place_M)
    if report is None:
        report, found = codec.decode(reply.payload)
        _check_row(found["row"], place_M)
        place_M.copy_(found["row"])
    return report


def _check_row(row: Tensor, place_M: Tensor) -> None:
    if row.shape != place_M.shape or row.is_floating_point() != place_M.is_floating_point():
        kind = "numbers" if place_M.is_floating_point() else "whole grid steps"
        raise SiteError(f"its row has shape {tuple(row.shape)}; expected {len(place_M)} {kind}")
