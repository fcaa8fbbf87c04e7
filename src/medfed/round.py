"""THE round: draw, charge, work, combine, apply, tell. One for every algorithm, engine and noise.

K clients drawn, M numbers in a row.
"""

import math
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from medfed import dpsgd
from medfed.aggregation import PLAIN, Aggregation, Answer
from medfed.algorithms import Server
from medfed.core import codec
from medfed.core.checks import QuorumError, reasons
from medfed.engine.port import Fleet, gather
from medfed.fleet import selection
from medfed.monitor import metrics
from medfed.monitor.events import Inspected, Log, RoundFinished, RoundStarted, SiteExcluded, Tested, Warned
from medfed.monitor.metrics import Scores
from medfed.monitor.per_site import measure_each
from medfed.plan import Plan
from medfed.privacy.budget import Budget
from medfed.robust import detection


def run_round(
    server: Server,
    plan: Plan,
    fleet: Fleet,
    budget: Budget,
    log: Log,
    aggregation: Aggregation = PLAIN,
    out: Collection[str] = (),
) -> Server:
    """Run one round, without those who are `out`, and return the server's next state.

    Raises QuorumError where fewer drawn sites answer than training.quorum asks for; the state is then unchanged.
    """
    began, number = time.perf_counter(), server.round + 1
    training = plan.study.training
    lottery = plan.streams.generator("selection", number)

    turn = [name for name in plan.on_turn(number) if name not in out]
    clients = selection.draw(turn, plan.study.fleet.clients_per_round, lottery)
    log.emit(RoundStarted(number, clients))
    budget.charge(number, clients)
    task = plan.algorithm.task(server)
    header = {"round": number} | ({"clip": float(server.slots["clip"])} if "clip" in server.slots else {})
    payload = codec.encode(header, {"w": task.w_P, **{f"slot.{n}": v for n, v in task.slots.items()}})
    try:
        answer = aggregation.collect(plan, fleet, clients, number, payload)
    except QuorumError as error:
        for name, reason in error.excluded.items():
            log.emit(SiteExcluded(number, name, reason))
        raise
    for name, reason in answer.excluded.items():
        log.emit(SiteExcluded(number, name, reason))
    if answer.gram_KK is not None:
        _inspect(answer, plan, number, log)
    rows, reports, replies, mean_M = answer.names, answer.reports, answer.replies, answer.combined_M
    weight_K = torch.tensor([plan.weight(name) for name in rows], dtype=torch.float64)
    share = float(weight_K.sum()) / sum(plan.weight(name) for name in plan.participants)
    if plan.joint:
        server, mean_M = _descended(server, mean_M, plan, rows)
    following = plan.algorithm.step(server, mean_M.to(server.w_P.dtype), share, training)
    if plan.algorithm.kept:  # only now do those sites remember the round
        for name, reply in gather(fleet, rows, "keep", codec.encode({}), training.deadline).items():
            if reply.error:
                log.emit(Warned(f"round {number}: site {name!r} could not keep its state: {reply.error}"))

    losses = [_known(reports[name].get("loss")) for name in rows]
    known = [(w, loss) for w, loss in zip(weight_K.tolist(), losses, strict=True) if loss is not None]
    log.emit(
        RoundFinished(
            round=number,
            clients=rows,
            loss=sum(w * loss for w, loss in known) / sum(w for w, _ in known) if known else None,
            losses=losses,
            site_seconds=[round(replies[name].seconds, 6) for name in rows],
            steps=[int(reports[name].get("steps", 0)) for name in rows],
            seconds=round(time.perf_counter() - began, 6),
            bytes_up=sum(len(reply.payload) for reply in replies.values()) + answer.more_up,
            bytes_down=len(payload) * len(clients) + answer.more_down,
            privacy=budget.claim(),
            phases=answer.phases,
        )
    )
    return following


def _descended(
    server: Server, total_M: torch.Tensor, plan: Plan, clients: Sequence[str]
) -> tuple[Server, torch.Tensor]:
    """Turn a noised sum of clipped gradients into the mean update of one local step; adapt the clipping norm.

    The sum is divided by the declared patients of those whose rows count: who took part is known.
    """
    g, training = plan.guarantee, plan.study.training
    assert g is not None
    clip = float(server.slots["clip"]) if "clip" in server.slots else g.clip
    expected = sum(g.releases[name].size * g.releases[name].probability for name in clients)
    gradient_P = total_M[: g.parameters] * (clip / expected) + training.weight_decay * server.w_P
    if "clip" in server.slots:
        following = dpsgd.next_clip(clip, float(total_M[-1]), round(expected), plan.study.privacy.quantile)
        server = replace(server, slots={**server.slots, "clip": torch.tensor([following])})
    return server, -training.learning_rate * gradient_P


def _inspect(answer: Answer, plan: Plan, number: int, log: Log) -> None:
    """Tell what the Gram matrix of a round's rows says against whom; a row that was refused for what it holds, too."""
    assert answer.gram_KK is not None and plan.rule is not None
    caught = {name: why for name, why in answer.excluded.items() if any(sign in why for sign in MALICE)}
    f = min(plan.rule.f, (len(answer.names) - 1) // 2)
    findings = detection.inspect(answer.names, answer.gram_KK, f, answer.gram_noise, caught)
    told = [{"client": o.client, "score": round(o.score, 3), "kind": o.kind, "evidence": o.evidence} for o in findings]
    log.emit(Inspected(number, {name: round(w, 6) for name, w in answer.weights.items()}, told, plan.rule.f))


MALICE = ("not finite", "out of bound", "different shares")
"""Reasons for which no honest site's row is left out."""


def test(
    server: Server, plan: Plan, fleet: Fleet, log: Log, model: str = "federated", intervals: bool = False
) -> Tested:
    """Test the current model at every site; emit and return the figures."""
    began = time.perf_counter()
    payload = codec.encode({"round": server.round}, {"w": server.released_P})
    replies = gather(fleet, plan.testers, "evaluate", payload, plan.study.training.deadline)
    task = plan.encoding.target.task
    scores: dict[str, Scores] = {}
    untested = {name: reply.error for name, reply in replies.items() if reply.error}
    for name, reply in replies.items():
        if reply.error:
            log.emit(SiteExcluded(server.round, name, f"not tested: {reply.error}"))
        else:
            _, tensors = codec.decode(reply.payload)
            scores[name] = Scores(task, tensors["bins"], tensors["label"], tensors["sums"])
    if not scores:
        raise QuorumError(f"round {server.round}: no site could test the model. {reasons(untested)}", untested)
    devices = plan.study.sites.kind == "device"  # one record each: only the union means something
    per_site = {} if devices else measure_each(scores, intervals)
    union = Scores.all(list(scores.values()))
    tested = Tested(
        round=server.round,
        model=model,
        n=union.n,
        loss=metrics.log_loss(union),
        all_sites=metrics.measure(union, intervals),
        macro=metrics.macro(per_site),
        per_site=per_site,
        site_n={name: scores[name].n for name in per_site},
        seconds=round(time.perf_counter() - began, 6),
        bytes_up=sum(len(reply.payload) for reply in replies.values()),
        bytes_down=len(payload) * len(replies),
        labels=[str(label) for label in plan.encoding.target.labels],
        confusion=metrics.confusion(union),
        calibration=metrics.calibration(union),
    )
    log.emit(tested)
    return tested


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
