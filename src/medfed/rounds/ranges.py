"""Ranges that nobody could declare:
found from noised counts of training patients, before the first round.

Training patients pay for it. Counts are asked for as often as the plan pays for, and each time all
of the study's open columns are counted; what follows from them is public, and becomes part of the
run's encoding like a declared range.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import compress

import numpy as np
import torch

from medfed.core import codec, toml
from medfed.core.checks import BudgetError, PlanError, reasons, some
from medfed.data import preprocess
from medfed.data.encoding import Encoding
from medfed.data.features import open_columns
from medfed.engine.port import Counted, Fleet, gather, heard, numbers
from medfed.monitor.events import Event, RangesFound, SiteExcluded, Warned
from medfed.planning.plan import Plan
from medfed.privacy import guarantee as guarantees
from medfed.privacy import quantiles
from medfed.privacy.guarantee import ranges_sensitivity
from medfed.privacy.quantiles import Range, Search
from medfed.rounds.prepare import send_encoding
from medfed.study import Study


def tell_paid(study: Study) -> str:
    """Say what becomes of what training patients have paid for ranges, where no run comes of it,
    and what works.
    """
    spent = "Nothing was trained. What training patients have paid for ranges stays spent"
    if study.privacy.scope == "run":
        return f"{spent}: a run that asks anew charges anew."
    return (
        f"{spent} of this study's epsilon, so that no other run of it fits. Under another "
        "study.name a run charges anew, where the lifetime budget has room for both."
    )


def find(plan: Plan, fleet: Fleet) -> tuple[Plan, list[Event]]:
    """Return the plan with the ranges of its open columns, and what is told; the sites do not know
    them yet: `encode`.

    A plan whose ranges are all declared comes back as it is. Raises BudgetError where no site's
    patients can pay, PlanError where the noise hides every feature; nothing has been trained then.
    """
    columns = open_columns(plan.study)
    guarantee = plan.guarantee
    if guarantee is None or "ranges" not in guarantee.queries:
        return plan, []
    counted = Counted(fleet)
    told = list[Event]()
    each = guarantee.query_sd("ranges", ranges_sensitivity(len(columns)))
    search = Search(len(columns), guarantees.summed_sd(plan.study, each, len(plan.participants)))
    for turn in range(quantiles.TIMES):
        counts_FC, excluded = _counts(plan, counted, turn, search.edges())
        told += [event for event in excluded if event not in told]
        search.take(counts_FC)

    encoding = _encoding(plan, dict(zip(columns, search.found, strict=True)))
    plan = replace(plan, encoding=encoding, encoded=encoding.digest())
    if all(one.known == 0 for one in search.found) and len(columns) == len(plan.encoding.columns):
        raise PlanError(
            f"privacy.ranges_epsilon={plan.study.privacy.ranges_epsilon:g}: of no column are "
            "values seen above the noise, so that there is nothing to learn from. "
            f"{tell_paid(plan.study)}"
        )
    found = {name: list(one.ends) for name, one in zip(columns, search.found, strict=True)}
    out = {event.site for event in told if isinstance(event, SiteExcluded)}
    told.append(RangesFound(len(plan.participants) - len(out), found, search.sd))
    told += _doubtful(columns, search.found)
    return _after(plan, counted), told


def encode(plan: Plan, fleet: Fleet) -> Plan:
    """Have every site encode its rows anew, where ranges were found."""
    if not plan.encoding.found_ranges():
        return plan
    counted = Counted(fleet)
    send_encoding(plan, counted, fleet.sites())
    return _after(plan, counted)


def _after(plan: Plan, fleet: Counted) -> Plan:
    """Return the plan with the bytes that have passed."""
    return replace(
        plan, bytes_up=plan.bytes_up + fleet.bytes_up, bytes_down=plan.bytes_down + fleet.bytes_down
    )


def refuse_unfound(plan: Plan) -> None:
    """Raise PlanError where a plan's ranges are still to be found, and nobody will look."""
    if found := plan.encoding.found_ranges():
        raise PlanError(
            f"the ranges of {some(found)} are found in a run alone, which training patients pay "
            "for; declare them in [data.dictionary], or read the records without a claim"
        )


def _counts(
    plan: Plan, fleet: Fleet, turn: int, edges: np.ndarray
) -> tuple[np.ndarray, list[SiteExcluded]]:
    """Return the noised counts [F, C] of all sites together, and the sites that do not answer."""
    guarantee = plan.guarantee
    shape = (len(edges), quantiles.CELLS[turn])
    assert guarantee is not None
    key = plan.streams.key("ranges", turn)
    most = ranges_sensitivity(len(edges))
    payload = codec.encode({"turn": turn}, {"edges": torch.from_numpy(edges)})
    replies = gather(fleet, plan.participants, "ranges", payload, plan.study.training.deadline)
    told, untold = heard(replies, lambda answer: numbers(answer["counts"], *shape))

    together = guarantees.counted_together(plan.study)
    noise = 0.0 if together else _FAR * guarantee.query_sd("ranges", most)
    for name, counts in list(told.items()):
        bound = guarantee.releases[name].size
        if counts.min() < -noise or counts.max() > bound + noise:
            untold[name] = (
                f"it counts fewer than none or more than its {bound} declared patients in a cell"
            )
            del told[name]
    if not told:
        then = "What a site had charged by then stays charged: `medfed privacy ledger` tells."
        if turn:
            then = tell_paid(plan.study)
        raise BudgetError(f"no site counts for ranges. {reasons(untold)}. {then}")

    total = np.sum([*told.values()], 0)
    if together:
        noise_C = guarantees.query_noise(guarantee, "ranges", most, total.size, key)
        total = total + noise_C.reshape(shape)
    return total, [
        SiteExcluded(0, name, f"not counted for ranges: {reason}")
        for name, reason in untold.items()
    ]


_FAR = 8.0
"""Standard deviations of a site's own noise, which none of any run's counts exceeds by chance."""


def _encoding(plan: Plan, found: dict[str, Range]) -> Encoding:
    """Return the plan's encoding with the ranges that were found."""
    columns = tuple(
        preprocess.with_range(column, found[column.name].ends) if column.name in found else column
        for column in plan.encoding.columns
    )
    return replace(plan.encoding, columns=columns)


def _doubtful(columns: Sequence[str], found: Sequence[Range]) -> list[Event]:
    """Warn of columns of which too little was seen, or not what the model needs."""
    unseen = list(compress(columns, [one.known == 0 for one in found]))
    few = list(compress(columns, [one.known > 0 and not one.told for one in found]))
    told: list[Event] = []

    if unseen:
        low, high = quantiles.WIDEST
        told.append(
            Warned(
                f"no value of {some(map(repr, unseen))} is seen above the noise, so the range is "
                f"taken as [{low:g}, {high:g}], in which the model sees next to nothing of it. "
                "It may hold text, be empty or be rare: declare its categories or its range, or "
                "leave it out"
            )
        )

    if few:
        told.append(
            Warned(
                f"of {some(map(repr, few))} too few values are seen above the noise for "
                "quantiles: the range is that of whole decades. Declare it, or leave the column "
                "out"
            )
        )

    apart = {
        name: one.apart
        for name, one in zip(columns, found, strict=True)
        if one.apart and _reaches(one, one.apart)
    }
    if apart:
        first, (low, high) = next(iter(apart.items()))
        entry = toml.key("data", "dictionary", first, "missing")
        told.append(
            Warned(
                f"of {some(map(repr, apart))} some values stand apart from all others "
                f"(of {first!r} in [{low:g}, {high:g}]), and the range reaches there. If a code "
                "such as -999 stands for what is missing, name it: "
                f'{entry} = ["-999"]'
            )
        )

    if narrow := [
        name for name, one in zip(columns, found, strict=True) if one.told and not one.resolved
    ]:
        low, high = found[list(columns).index(narrow[0])].ends
        told.append(
            Warned(
                f"nearly all values of {some(map(repr, narrow))} lie in one cell, which is "
                f"counted no finer (that of {narrow[0]!r} is about [{low:.10g}, {high:.10g}]), "
                "so the model may see next to nothing of how they differ. Declare the range; "
                "where values lie far from 0 subtract an offset, or take another unit; or leave "
                "the column out"
            )
        )

    return told


def _reaches(one: Range, apart: tuple[float, float]) -> bool:
    """Say whether a range that quantiles told reaches a decade."""
    return one.told and one.low < apart[1] and one.high > apart[0]
