"""A site's work in a round: it trains, or sums clipped gradients, and sends one row."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medfed.core import codec
from medfed.core.checks import CodecError, MedfedError, SiteError
from medfed.core.streams import Streams
from medfed.data.federated import Patients, Stack
from medfed.learn import dpsgd
from medfed.learn.algorithms import Task
from medfed.learn.learners import LEARNERS, Work, work_of
from medfed.learn.local import train
from medfed.links.wire import finite, into_ball, send, send_remembering
from medfed.node.paying import charge
from medfed.node.site import OWN_ROW, Answer, Header, Site, operation
from medfed.planning import rates
from medfed.planning.building import local_plan
from medfed.planning.resolved import algorithm_of
from medfed.planning.row_limits import row_limits
from medfed.privacy.guarantee import Guarantee
from medfed.secure.party import Party
from medfed.study import LEAST_CLIP, Study

MOST_ROUNDS = 2**31
"""What no round's number reaches."""

logger = logging.getLogger(__name__)


@operation("work")
def _work(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Train, and answer with one row a site; under a claim each site's patients pay first.

    Where rows are secret, the coordinator signs what it sends, and each site checks that before
    anything else.
    """
    _read_round(header)
    refused: dict[str, SiteError] = {}
    if sites[0].study.security.aggregation != "plain":
        header, tensors, refused = _accept_signed(sites, header, tensors)
    answers: dict[str, Answer] = {**refused}
    able = [site for site in sites if site.name not in answers]
    recalled = _recall(able)
    account = sites[0].account
    # where sites share patients all pay together, though some need not
    alone = recalled.keys() if not (account and account.shares_patients) else ()
    paying = [site for site in able if site.name not in alone]
    if len(recalled) < len(able):
        answers |= charge(paying, header["round"])
    answers |= recalled
    willing = [site for site in sites if site.name not in answers]
    made = iter(_train_or_sum(willing, header, tensors)) if willing else iter(())
    if account:
        account.note_answered(site.name for site in paying)
    return [answers[site.name] if site.name in answers else next(made) for site in sites]


def _recall(sites: Sequence[Site]) -> dict[str, Answer]:
    """Return the answers of those who have answered this very model: the same bytes, unpaid."""
    found: dict[str, Answer] = {}
    for site in sites:
        if site.party is not None and (kept := site.party.recall()):
            found[site.name], site.pending = kept
    return found


def _accept_signed(
    sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]
) -> tuple[Header, Mapping[str, Tensor], dict[str, SiteError]]:
    """Return what the coordinator signed for this round,
    and which sites do not take it, with the reasons.
    """
    if "signed" not in tensors:
        raise SiteError("the coordinator has not signed its model; run the same medfed everywhere")
    envelope = codec.as_bytes(tensors["signed"])
    refused = dict[str, SiteError]()
    message = b""
    drawn: dict[int, list[str]] = {}  # by facts, which the sites of a process share
    for site in sites:
        try:
            if id(site.facts) not in drawn:
                drawn[id(site.facts)] = site.facts.expect(header["round"])
            if site.name not in drawn[id(site.facts)]:
                raise SiteError(
                    f"site {site.name!r} is asked in round {header['round']}, for which the study "
                    "does not draw it; the coordinator may not choose others."
                )
            message = _party(site).follower.accept(header["round"], envelope)
        except MedfedError as error:
            refused[site.name] = SiteError(str(error))
    if not message:
        return header, {}, refused
    asked, found = codec.decode(message)
    if _read_round(asked) != header["round"]:
        raise SiteError(
            f"round={asked['round']!r} stands in the model that was signed for round "
            f"{header['round']!r}; expected the same. The coordinator may not choose."
        )
    return asked, found, refused


def _train_or_sum(
    sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]
) -> list[Answer]:
    guarantee = sites[0].guarantee
    if guarantee is None:
        return train_locally(sites, header, tensors)
    if guarantee.joint:
        return sum_gradients(sites, header, tensors, guarantee)
    return train_locally(sites, header, tensors)


def sum_gradients(
    sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor], guarantee: Guarantee
) -> list[Answer]:
    """Answer with each site's sum of clipped per-patient gradients, on the grid.

    However many patients a site has, its sum is held to what the declared number can make, or to
    the cap's share of it: else one patient more would decide whether the row is within the bound
    that others check.

    Args:
        sites: those asked, of one process.
        header: the question's: `round`, and `clip` where it adapts.
        tensors: the question's: the weights `w` [P], and what the algorithm sends.
        guarantee: of the run: clip, draws and sizes.
    """
    first = sites[0]
    names = [site.name for site in sites]
    clip = _clip(header, guarantee)
    key_K = Streams(first.study.study.seed).key_K("batches", header["round"], names)
    path = first.path
    task = first.encoding.target.task
    patients = Patients.of([site.train for site in sites])
    found = dpsgd.sums(
        first.model, tensors["w"], patients, task, guarantee, clip, names, key_K, path
    )
    if found.dropped:
        logger.warning("%d patients' gradients were not finite and count as zero", found.dropped)
    size_K = [guarantee.releases[name].size for name in names]
    limits = row_limits(first.study, guarantee)
    message_KM = into_ball(found.total_KP, [limits[name] for name in names])
    if guarantee.clipping == "adaptive":
        half_K = torch.tensor(size_K, dtype=torch.float64) / 2
        message_KM = torch.cat([message_KM, found.below_K.clamp(-half_K, half_K)[:, None]], 1)

    # a liar that is to count keeps within what is let pass, too
    held = None if guarantee.clipping == "adaptive" else [limits[name] for name in names]
    return _send_rows(sites, header, message_KM, [{"steps": 1} for _ in sites], held)


def _clip(header: Header, guarantee: Guarantee) -> float:
    """Return the clipping norm: the study's own; only adaptive clipping takes it from the
    coordinator, within reason.

    A sum is in units of it, so that any norm keeps the guarantee; one that is no number would tell
    of single patients.
    """
    if guarantee.clipping != "adaptive":
        return guarantee.clip
    clip = header.get("clip")
    if not isinstance(clip, float) or not LEAST_CLIP <= clip < math.inf:
        raise SiteError(
            f"the coordinator sends no clipping norm; expected a number from {LEAST_CLIP:g} on"
        )
    return clip


def train_locally(
    sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]
) -> list[Answer]:
    """Answer with what each site's local training came to.

    Args:
        sites: those asked, of one process.
        header: the question's: `round`, and `rate` where it adapts.
        tensors: the question's: the weights `w` [P], and what the algorithm sends.
    """
    first = sites[0]
    guarantee = sites[0].guarantee
    study = _at_rate(first.study, header)
    algorithm = algorithm_of(study)
    hyper = study.training
    slots = {name: tensors[f"slot.{name}"] for name in algorithm.sent}
    task = Task(tensors["w"], slots)
    memory = {name: torch.stack([site.memory[name] for site in sites]) for name in algorithm.kept}
    names = [site.name for site in sites]
    rows = [site.train for site in sites]
    if learner := LEARNERS.get(study.model.name):
        work = work_of(learner, task, memory, rows)
        return _report(sites, header, work, finite(work.message_KM))

    start_KP = algorithm.starts_KP(task, memory, len(sites))
    plan = local_plan(study, first.encoding)
    key_K = Streams(first.study.study.seed).key_K("batches", header["round"], names)
    correction = algorithm.correct(task, memory, hyper)
    if guarantee is None:
        local = train(first.model, start_KP, Stack.of(rows), plan, key_K, correction, first.path)
    else:
        average = 0.0 if algorithm.plain_sgd or algorithm.any_sgd else hyper.average
        patients = Patients.of(rows)
        local = dpsgd.train(
            first.model,
            start_KP,
            patients,
            plan,
            guarantee,
            names,
            key_K,
            correction,
            average,
            first.path,
        )
    message_KM, later = algorithm.message(task, memory, local, hyper)
    work = Work(message_KM, later, local.loss_K, local.steps_K)
    return _report(sites, header, work, finite(local.theta_KP))


def _report(sites: Sequence[Site], header: Header, work: Work, good_K: Tensor) -> list[Answer]:
    """Answer with the rows of those whose training stayed finite,
    and hold ready what each will remember.
    """
    losses = work.loss_K.tolist()
    steps = work.steps_K.tolist()
    open_losses = sites[0].study.security.aggregation == "plain"  # else nothing of one site is told
    reports: list[Report] = []
    for k, (site, good) in enumerate(zip(sites, good_K.tolist(), strict=True)):
        if not good:
            reports.append(SiteError("training did not stay finite; lower training.learning_rate"))
            continue
        site.pending = {name: value[k].clone() for name, value in work.memory.items()}
        loss = losses[k] if open_losses and math.isfinite(losses[k]) else None
        reports.append({"loss": loss, "steps": steps[k]})
    return _send_rows(sites, header, work.message_KM, reports)


def _at_rate(study: Study, header: Header) -> Study:
    """Return the study with this round's learning rate, which the coordinator says where the study
    leaves it open.
    """
    if not rates.left_open(study):
        return study
    rate = header.get("rate")
    if not isinstance(rate, float) or not 0 < rate < math.inf:
        raise SiteError(
            "training.learning_rate is open and the coordinator sends none; run the same medfed "
            "everywhere"
        )
    return rates.at(study, rate)


Report = dict[str, Any] | SiteError
"""What is told beside a row, or why there is none."""


def _send_rows(
    sites: Sequence[Site],
    header: Header,
    message_KM: Tensor,
    reports: Sequence[Report],
    limit_K: Sequence[float] | None = None,
) -> list[Answer]:
    """Pass the rows through the clients' halves of the links and answer with them,
    in the study's aggregation; lies are cut to `limit_K`, in which honest rows are already.
    """
    first = sites[0]
    honest_KM = message_KM
    message_KM = first.liars.replace_rows(sites, header["round"], message_KM, limit_K=limit_K)
    if limit_K is not None:
        message_KM = into_ball(message_KM, limit_K)
    if first.liars.attack:
        for site, row_M in zip(sites, honest_KM, strict=True):
            site.pending[OWN_ROW] = row_M.double()
    if first.study.security.aggregation == "plain":
        kept = [name for link in first.links for name in link.kept]
        memory = {name: torch.stack([site.memory[name] for site in sites]) for name in kept}
        row_KM, later = send_remembering(message_KM, first.links, memory)
        for k, site in enumerate(sites):
            site.pending |= {name: value[k].clone() for name, value in later.items()}
        told = [{} if isinstance(report, SiteError) else report for report in reports]
        messages = codec.RowFormat("row", row_KM[0]).encode(told, row_KM)
        pairs = zip(reports, messages, strict=True)
        return [report if isinstance(report, SiteError) else message for report, message in pairs]

    round = header["round"]
    answers: list[Answer] = []

    for site, report, message_M in zip(sites, reports, message_KM, strict=True):
        if isinstance(report, SiteError):
            answers.append(report)
            continue

        try:  # one by one: a row that is out of bound is its own site's fault
            (row_M,) = site.liars.replace_rows(
                [site], header["round"], send(message_M[None], site.links), "wire"
            )
            upload = codec.as_tensor(_party(site).upload(round, row_M.numpy()))
            answer = codec.encode(report, {"upload": upload})
            _party(site).keep(answer, site.pending)
            answers.append(answer)
        except MedfedError as error:
            refused = SiteError(str(error))
            refused.__cause__ = error  # by which a rehearsal knows the stage
            answers.append(refused)

    return answers


@operation("phase", blind=True)
def _phase(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Play a phase of a masked round, other than the row's."""
    round = _read_round(header)
    phase = header.get("phase")
    told = header.get("told")
    if (
        not isinstance(phase, str)
        or not isinstance(told, list)
        or not all(isinstance(name, str) for name in told)
        or "message" not in tensors
    ):
        raise CodecError(
            f"phase={phase!r} of a masked round without who takes part, or without a message; the "
            "coordinator must run the same medfed"
        )
    message = codec.as_bytes(tensors["message"])
    answers = list[Answer]()
    for site in sites:
        try:
            found = _party(site).answer(phase, round, told, message)
            answers.append(codec.encode({}, {"message": codec.as_tensor(found)}))
        except MedfedError as error:
            answers.append(SiteError(str(error)))
    return answers


def _read_round(header: Header) -> int:
    """Return the round that is asked for: a whole number, in one spelling, as all that is drawn or
    written down of a round goes by it. Raises CodecError.
    """
    round = header.get("round")
    if type(round) is not int or not 1 <= round < MOST_ROUNDS:
        raise CodecError(
            f"round={round!r} is none; expected a whole number from 1. The coordinator must run "
            "the same medfed."
        )
    return round


def _party(site: Site) -> Party:
    if site.party is None:
        raise SiteError(
            f"site {site.name!r} has agreed to no run; the coordinator must ask it to first"
        )
    return site.party
