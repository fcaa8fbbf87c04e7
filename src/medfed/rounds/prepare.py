"""Before the first round: every site is surveyed,
all agree how records become numbers, and the plan is made.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from medfed.core import codec
from medfed.core.checks import (
    BudgetError,
    DataError,
    MedfedError,
    PlanError,
    reasons,
    sharing,
    some,
    those,
)
from medfed.core.flat import fingerprint
from medfed.data import preprocess, survey_doubts
from medfed.data.encoding import Encoding
from medfed.data.features import open_columns
from medfed.engine.port import Counted, Fleet, gather
from medfed.learn.zoo import select_fixed
from medfed.planning import rates
from medfed.planning.building import build_model, safe_rate
from medfed.planning.objections import check
from medfed.planning.plan import Plan, make
from medfed.planning.rates import Chosen
from medfed.privacy.guarantee import asked
from medfed.study import Study

_PATIENCE = 600.0  # seconds; nothing is trained yet

NOBODY: Mapping[str, Mapping[str, Any]] = {}


def prepare(
    study: Study,
    fleet: Fleet,
    sites: Sequence[str],
    encoding: Encoding | None = None,
    away: Mapping[str, Mapping[str, Any]] = NOBODY,
) -> Plan:
    """Return the plan, every site having encoded its rows.

    Ranges that patients pay for are not known yet: `medfed.rounds.ranges` finds them once all are
    enrolled. Raises StudyError, DataError or PlanError; nothing has been trained then.

    Args:
        study: as its sites have it.
        fleet: the sites, by which it asks.
        sites: their names.
        encoding: a resumed run's, which is not agreed anew.
        away: of the sites that it goes on without, what they told before: records and labels.
    """
    check(study)
    counted = Counted(fleet)
    there = [name for name in sites if name not in away]
    surveys = ask_surveys(counted, there)
    if not asked(study):
        survey_doubts.check(surveys, study.data)

    def ask(question: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> Tensor:
        payload = codec.encode({"question": question, **header}, tensors)
        answers = _replies(counted, sites, "answer", payload)
        if alike := codec.decode_alike(list(answers.values())):
            return alike[1]["answer"].sum(0)
        return torch.stack([codec.decode(answer)[1]["answer"] for answer in answers.values()]).sum(
            0
        )

    if encoding is None:
        later = dict.fromkeys(open_columns(study), preprocess.UNKNOWN) if asked(study) else {}
        encoding = preprocess.agree(surveys, study.data, ask, public=asked(study), found=later)
    plan = make(study, {n: surveys.get(n) or away[n] for n in sites}, encoding, tuple(away))
    answers = send_encoding(plan, counted, there)
    if rates.left_open(study) and not away:  # else it is what it was when the run began
        plan = replace(
            plan,
            chosen=_chosen(
                plan, {name: float(told["bend"]) for name, (told, _) in answers.items()}
            ),
        )
    return replace(plan, bytes_up=counted.bytes_up, bytes_down=counted.bytes_down)


def send_encoding(
    plan: Plan, fleet: Fleet, sites: Sequence[str]
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Have `sites` of a `fleet` encode their rows by the plan's encoding; return their answers."""
    sizes = {name: {"train": plan.sizes[name]["train"]} for name in plan.participants}
    header = {
        "encoding": plan.encoding.to_json(),
        "sizes": sizes,
        "clients": list(plan.participants),
        "fixed": fingerprint(select_fixed(build_model(plan.study, plan.encoding))),
    }
    return _ask_all(fleet, sites, "prepare", codec.encode(header))


def _chosen(plan: Plan, bends: Mapping[str, float]) -> Chosen:
    """Return the learning rate that every site's rows bear.

    Of malicious sites a study bears some: as many of the largest are left out, so that none can
    stop all learning.
    """
    if strange := [name for name, bend in bends.items() if not math.isfinite(bend)]:
        raise DataError(
            f"{some(strange)}: encoded rows too large for a learning rate; set "
            "data.preprocess='robust'"
        )
    trained = {name: bend for name, bend in bends.items() if plan.sizes[name]["train"]}
    for name in sorted(trained, key=trained.__getitem__, reverse=True)[: plan.malicious]:
        del trained[name]
    sizes = {name: plan.sizes[name]["train"] for name in trained}
    return safe_rate(plan.study, plan.encoding, trained, sizes)


def ask_surveys(fleet: Fleet, sites: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return what `sites` of a `fleet` tell of tables: sizes, columns, categories, labels, gaps."""
    return {
        name: header["survey"]
        for name, (header, _) in _ask_all(fleet, sites, "survey", codec.encode({})).items()
    }


def rehearse(plan: Plan, fleet: Fleet) -> None:
    """Have every site play its part once on made-up rows, before any patient is charged.

    Without a claim nobody pays, and the first round shows the same. Raises PlanError with each
    site's reason: stage, module, what is wrong and the way out; nothing has been charged then.
    """
    if plan.guarantee is None or plan.guarantee.simulation_only:
        return
    replies = gather(fleet, plan.present, "rehearse", codec.encode({}), _PATIENCE)
    if failed := {name: reply.error for name, reply in replies.items() if reply.error}:
        raise PlanError(reasons(failed))


def enrol(plan: Plan, fleet: Fleet, run: str, fresh: bool = True) -> None:
    """Have every site enrol its patients in its ledger and see that the plan fits their budget.

    Raises BudgetError with the sites' reasons; nothing has been charged then.

    Args:
        plan: the run's.
        fleet: the sites, by which it asks.
        run: the run's name in ledgers.
        fresh: the run begins; else it is resumed.
    """
    if plan.guarantee and not plan.guarantee.simulation_only:
        _ask_all(
            fleet,
            plan.present,
            "enrol",
            codec.encode({"run": run, "fresh": fresh}),
            BudgetError,
        )


def _ask_all(
    fleet: Fleet,
    sites: Sequence[str],
    op: str,
    payload: bytes,
    refusal: type[MedfedError] = DataError,
) -> dict[str, tuple[dict[str, Any], dict[str, Tensor]]]:
    """Ask every site and decode its answer; see `_replies`."""
    answers = _replies(fleet, sites, op, payload, refusal)
    # thousands may say the same
    known = {answer: codec.decode(answer) for answer in set(answers.values())}
    return {name: known[answer] for name, answer in answers.items()}


def _replies(
    fleet: Fleet,
    sites: Sequence[str],
    op: str,
    payload: bytes,
    refusal: type[MedfedError] = DataError,
) -> dict[str, bytes]:
    """Ask every site; raise `refusal` where some cannot answer, a reason that they share once."""
    replies = gather(fleet, sites, op, payload, _PATIENCE)
    if failed := {name: reply.error for name, reply in replies.items() if reply.error}:
        raise refusal(explain_failures(failed))
    return {name: reply.payload for name, reply in replies.items()}


def explain_failures(failed: Mapping[str, str]) -> str:
    """Say which sites cannot, and why, from the reasons `failed` by site.

    One by its own words, several that share a reason together.
    """
    parts = []
    for reason, names in sharing(failed).items():
        alone = f"site {names[0]!r}: {failed[names[0]]}"
        parts.append(alone if len(names) == 1 else f"{those(names)}: {reason}")
    return some(parts, 5) if len(parts) > 5 else "; ".join(parts)
