"""THE round: draw, charge, work, combine, apply, tell. One for every algorithm, engine and noise.

K clients drawn, M numbers in a row.
"""

import math
import time
from typing import Any

import torch

from medfed.algorithms import Server
from medfed.core import codec
from medfed.core.checks import CodecError, QuorumError, SiteError
from medfed.engine.port import Fleet, Reply, gather
from medfed.fleet import selection
from medfed.monitor import metrics
from medfed.monitor.events import Log, RoundFinished, RoundStarted, SiteExcluded, Tested, Warned
from medfed.monitor.metrics import Scores
from medfed.plan import Plan
from medfed.privacy.budget import Ledger
from medfed.wire import combine, finite


def run_round(server: Server, plan: Plan, fleet: Fleet, ledger: Ledger, log: Log) -> Server:
    """Run one round and return the server's next state.

    Raises QuorumError where fewer drawn sites answer than training.quorum asks for; the state is then unchanged.
    """
    began, number = time.perf_counter(), server.round + 1
    training = plan.study.training
    lottery = plan.streams.generator("selection", number)

    clients = selection.draw(plan.participants, plan.study.fleet.clients_per_round, lottery)
    log.emit(RoundStarted(number, clients))
    ledger.charge(number, clients)
    task = plan.algorithm.task(server)
    payload = codec.encode({"round": number}, {"w": task.w_P, **{f"slot.{n}": v for n, v in task.slots.items()}})
    replies = gather(fleet, clients, "work", payload, training.deadline)
    rows, reports = _accepted(replies, plan, number, log)
    if len(rows) < math.ceil(training.quorum * len(clients) - 1e-9):
        reasons = "; ".join(f"{reply.site}: {reply.error}" for reply in replies.values() if reply.error)
        raise QuorumError(
            f"round {number}: {len(rows)} of {len(clients)} sites answered, training.quorum={training.quorum:g}. "
            f"{reasons}"
        )
    weight_K = torch.tensor([plan.weight(name) for name in rows], dtype=torch.float64)
    share = float(weight_K.sum()) / sum(plan.weight(name) for name in plan.participants)
    mean_M = combine(codec.as_rows(list(rows.values())), weight_K / weight_K.sum(), plan.rule, plan.links)
    following = plan.algorithm.apply(server, mean_M.to(server.w_P.dtype), share, training)
    if plan.algorithm.kept:  # only now do those sites remember the round
        for name, reply in gather(fleet, list(rows), "keep", codec.encode({}), training.deadline).items():
            if reply.error:
                log.emit(Warned(f"round {number}: site {name!r} could not keep its state: {reply.error}"))

    losses = [_known(reports[name].get("loss")) for name in rows]
    known = [(w, loss) for w, loss in zip(weight_K.tolist(), losses, strict=True) if loss is not None]
    log.emit(
        RoundFinished(
            round=number,
            clients=list(rows),
            loss=sum(w * loss for w, loss in known) / sum(w for w, _ in known) if known else None,
            losses=losses,
            site_seconds=[round(replies[name].seconds, 6) for name in rows],
            steps=[int(reports[name].get("steps", 0)) for name in rows],
            seconds=round(time.perf_counter() - began, 6),
            bytes_up=sum(len(reply.payload) for reply in replies.values()),
            bytes_down=len(payload) * len(clients),
        )
    )
    return following


def test(
    server: Server, plan: Plan, fleet: Fleet, log: Log, model: str = "federated", intervals: bool = False
) -> Tested:
    """Test the current model at every site; emit and return the figures."""
    began = time.perf_counter()
    payload = codec.encode({"round": server.round}, {"w": server.w_P})
    replies = gather(fleet, plan.testers, "evaluate", payload, plan.study.training.deadline)
    task = plan.encoding.target.task
    scores: dict[str, Scores] = {}
    for name, reply in replies.items():
        if reply.error:
            log.emit(SiteExcluded(server.round, name, f"not tested: {reply.error}"))
        else:
            _, tensors = codec.decode(reply.payload)
            scores[name] = Scores(task, tensors["bins"], tensors["label"], tensors["sums"])
    if not scores:
        raise QuorumError(f"round {server.round}: no site could test the model")
    per_site = {name: metrics.measure(s, intervals) for name, s in scores.items()}
    union = Scores.all(list(scores.values()))
    tested = Tested(
        round=server.round,
        model=model,
        n=union.n,
        loss=metrics.log_loss(union),
        all_sites=metrics.measure(union, intervals),
        macro=metrics.macro(per_site),
        per_site={name: dict(figures) for name, figures in per_site.items()},
        site_n={name: s.n for name, s in scores.items()},
        seconds=round(time.perf_counter() - began, 6),
        bytes_up=sum(len(reply.payload) for reply in replies.values()),
        bytes_down=len(payload) * len(replies),
    )
    log.emit(tested)
    return tested


def _accepted(
    replies: dict[str, Reply], plan: Plan, number: int, log: Log
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, Any]]]:
    """Return the rows and reports that count, by site; tell of every site that does not."""
    rows: dict[str, torch.Tensor] = {}
    reports: dict[str, dict[str, Any]] = {}
    reasons: dict[str, str] = {}
    for name, reply in replies.items():
        try:
            if reply.error:
                raise SiteError(reply.error)
            reports[name], tensors = codec.decode(reply.payload)
            if tensors["row"].shape != (plan.message,) or not tensors["row"].is_floating_point():
                raise SiteError(f"its row has shape {tuple(tensors['row'].shape)}; expected {plan.message} numbers")
            rows[name] = tensors["row"]
        except SiteError as error:
            reasons[name] = str(error)
        except (CodecError, KeyError) as error:
            reasons[name] = f"its reply cannot be read: {error}"
    if rows:
        for name, good in zip(list(rows), finite(codec.as_rows(list(rows.values()))).tolist(), strict=True):
            if not good:
                del rows[name]
                reasons[name] = "its row is not finite"
    for name, reason in reasons.items():
        log.emit(SiteExcluded(number, name, reason))
    return rows, reports


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
