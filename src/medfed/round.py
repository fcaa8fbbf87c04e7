"""THE round: draw, charge, work, combine, apply, tell. One for every algorithm, engine and noise.

K clients drawn, M numbers in a row.
"""

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from medfed import dpsgd
from medfed.aggregation import PLAIN, Aggregation, RoundRows
from medfed.algorithms import Server
from medfed.core import codec
from medfed.core.checks import QuorumError, reasons
from medfed.core.decision import CELLS, CHOOSING_CELLS, EXACT_EDGES
from medfed.core.entropy import Entropy
from medfed.engine.port import Fleet, gather, heard, numbers
from medfed.fleet import selection
from medfed.local import outputs
from medfed.monitor import metrics, noised
from medfed.monitor.events import (
    Compared,
    Inspected,
    Log,
    RoundFinished,
    RoundStarted,
    SiteExcluded,
    Tested,
    Voted,
    Warned,
)
from medfed.monitor.metrics import Scored, Scores
from medfed.monitor.noised import Noised
from medfed.monitor.per_site import measure_each
from medfed.plan import Plan, build_model
from medfed.privacy import guarantee
from medfed.privacy.budget import Budget
from medfed.privacy.mechanisms import geometric_noise
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
    header = {"round": number} | {n: float(server.slots[n]) for n in ("clip", "rate") if n in server.slots}
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
    expected = sum(g.releases[name].expected for name in clients)
    gradient_P = total_M[: g.parameters] * (clip / expected) + training.weight_decay * server.w_P
    if "clip" in server.slots:
        following = dpsgd.next_clip(clip, float(total_M[-1]), round(expected), plan.study.privacy.quantile)
        server = replace(server, slots={**server.slots, "clip": torch.tensor([following])})
    return server, -training.learning_rate * gradient_P


def _inspect(answer: RoundRows, plan: Plan, number: int, log: Log) -> None:
    """Tell what the Gram matrix of a round's rows says against whom; a row that was refused for what it holds, too."""
    assert answer.gram_KK is not None and plan.rule is not None
    caught = {name: why for name, why in answer.excluded.items() if any(sign in why for sign in MALICE)}
    f = min(plan.rule.f, (len(answer.names) - 1) // 2)
    findings = detection.inspect(answer.names, answer.gram_KK, f, answer.gram_noise, caught)
    told = [{"client": o.client, "score": round(o.score, 3), "kind": o.kind, "evidence": o.evidence} for o in findings]
    log.emit(Inspected(number, {name: round(w, 6) for name, w in answer.weights.items()}, told, plan.rule.f))


MALICE = ("not finite", "out of bound", "different shares")
"""Reasons for which no honest site's row is left out."""


@dataclass(frozen=True)
class Threshold:
    """From which probability the positive label is called, and from what that follows."""

    threshold: float = 0.5
    decided: str = "until it is chosen"


def decide(server: Server, plan: Plan, fleet: Fleet, budget: Budget, log: Log) -> Threshold:
    """Return the threshold that the study declares, or have its rule choose one on the training rows of all sites.

    Under a claim the training patients pay, and what the rule reads is noised. Where it says too little, the threshold
    is 0.5, and the log warns.
    """
    study, rule = plan.study, plan.study.rule()
    if not rule.chosen or plan.encoding.target.task != "binary":
        return Threshold(rule.level if not rule.chosen else 0.5, "declared")
    g = plan.guarantee
    if g:
        budget.ask("threshold")
    edges = _edges(server, plan, CHOOSING_CELLS) if g else EXACT_EDGES
    payload = codec.encode({"round": server.round}, {"w": server.released_P, "edges": torch.from_numpy(edges)})
    replies = gather(fleet, plan.participants, "count", payload, study.training.deadline)
    length = len(rule.vector(np.zeros((len(edges) + 1, 2))))
    told, untold = heard(replies, lambda answer: numbers(answer["counts"], length))
    _left_out(log, server.round, "not counted for data.threshold", untold)
    counts, noises = np.sum([*told.values()], 0) if told else np.zeros(length), len(told)
    if g and guarantee.counted_together(study):
        counts, noises = counts + _noise(plan, "threshold", rule.sensitivity(), len(counts)), 1
    sd = g.query_sd("threshold", rule.sensitivity()) * math.sqrt(noises) if g else 0.0
    found = rule.choose(edges, counts, sd) if told else None
    if found is None:
        hidden = "the noise hides it" if g and told else "training rows do not tell"
        log.emit(Warned(f"data.threshold={study.data.threshold!r} chose nothing, as {hidden}; 0.5 is taken"))
        return Threshold(0.5, f"{study.data.threshold} chose nothing")
    of = f"noised counts of training patients (sd {sd:.3g})" if g else "training rows"
    return Threshold(found, f"{study.data.threshold}, chosen on {of} of {len(told)} site{'s' * (len(told) > 1)}")


def _noise(plan: Plan, label: str, sensitivity: float, numbers: int) -> np.ndarray:
    """Draw the noise on the sum of all sites' answers to a query."""
    assert plan.guarantee is not None
    return guarantee.query_noise(plan.guarantee, label, sensitivity, numbers, plan.streams.key(label))


def _edges(server: Server, plan: Plan, cells: int, threshold: float = 0.5) -> np.ndarray:
    """Return edges between cells of scores from public facts: the released model, on made-up rows."""
    model = build_model(plan.study, plan.encoding).eval()
    z_NC = outputs(model, server.released_P, plan.encoding.invented(MADE_UP))
    return noised.edges_for(z_NC[:, 0].double().numpy(), cells, threshold)


MADE_UP = 512
"""Made-up rows that say about where a model's scores lie."""


def test(
    server: Server,
    plan: Plan,
    fleet: Fleet,
    log: Log,
    model: str = "federated",
    intervals: bool = False,
    decision: Threshold | None = None,
) -> Tested:
    """Test the current model at every site; emit and return the figures. Without a `decision` as declared, or at 0.5.

    Under a claim, where test patients are not public, figures come from noised counts.
    """
    began = time.perf_counter()
    study, task, rule = plan.study, plan.encoding.target.task, plan.study.rule()
    decision = decision or (Threshold() if rule.chosen else Threshold(rule.level, "declared"))
    private = plan.guarantee is not None and not study.data.test_is_public
    asked = {"w": server.released_P}
    if private:
        asked["edges"] = torch.from_numpy(_edges(server, plan, CELLS, decision.threshold))
    payload = codec.encode({"round": server.round}, asked)
    replies = gather(fleet, plan.testers, "evaluate", payload, study.training.deadline)
    union: Scored
    per_site: Mapping[str, Scored]
    if private:
        edges = asked["edges"].numpy()
        counts, untold = heard(replies, lambda answer: numbers(answer["counts"], len(edges) + 1, 2))
    else:
        scores, untold = heard(replies, lambda answer: Scores.told(task, answer, plan.encoding.target.outputs))
    _left_out(log, server.round, "not tested", untold)
    if len(untold) == len(replies):
        raise QuorumError(f"round {server.round}: no site could test the model. {reasons(untold)}", untold)

    if private:
        union, per_site = _noised_scores(counts, edges, plan)
    else:
        union, per_site = Scores.all([*scores.values()]), scores
    if study.sites.kind == "device":  # one record each: only the union means something
        per_site = {}
    figures = measure_each(per_site, decision.threshold, intervals)
    tested = Tested(
        round=server.round,
        model=model,
        n=union.n,
        loss=union.log_loss(),
        all_sites=union.measure(decision.threshold, intervals),
        macro=metrics.macro(figures),
        per_site=figures,
        site_n={name: one.n for name, one in per_site.items()},
        seconds=round(time.perf_counter() - began, 6),
        bytes_up=sum(len(reply.payload) for reply in replies.values()),
        bytes_down=len(payload) * len(replies),
        labels=[str(label) for label in plan.encoding.target.labels],
        confusion=union.confusion(decision.threshold),
        calibration=union.calibration(),
        threshold=decision.threshold if task == "binary" else None,
        decided=decision.decided if task == "binary" else "",
        noised=private,
    )
    log.emit(tested)
    return tested


def compare_own(own: Server, federated: Server, plan: Plan, fleet: Fleet, log: Log) -> None:
    """Hold each site's own model against the federated one on the same held-out records, and tell the outcome."""
    payload = codec.encode({"round": own.round}, {"w": own.w_P, "other": federated.released_P})
    replies = gather(fleet, plan.testers, "compare", payload, plan.study.training.deadline)
    told, untold = heard(replies, lambda answer: numbers(answer["paired"], 3))
    for name, why in untold.items():
        log.emit(Warned(f"the federated model was not compared with that of site {name!r}: {why}"))
    sums = {name: paired.tolist() for name, paired in told.items()}
    if not sums:
        return
    paired = {name: metrics.paired(*told) for name, told in sums.items()}
    n, total, square = (sum(told[i] for told in sums.values()) for i in range(3))
    sites = {name: [int(sums[name][0]), f.value, f.low, f.high] for name, f in paired.items()}
    log.emit(Compared(federated.round, int(n), metrics.paired(n, total, square), sites))


def _left_out(log: Log, round: int, what: str, untold: Mapping[str, str]) -> None:
    for name, why in untold.items():
        log.emit(SiteExcluded(round, name, f"{what}: {why}"))


def _noised_scores(
    counts: Mapping[str, np.ndarray], edges: np.ndarray, plan: Plan
) -> tuple[Scored, Mapping[str, Scored]]:
    """Return the test of all sites together, and of each. Where counts are noised together, the sum alone is told.

    A patient of several sites moves the sum by one at each: the noise of the sum covers all of them.
    """
    privacy = plan.study.privacy
    total = np.sum(list(counts.values()), 0)
    if not guarantee.counted_together(plan.study):
        each = noised.variance(privacy.evaluation_epsilon)
        per_site: dict[str, Scored] = {name: Noised(edges, count, each) for name, count in counts.items()}
        return Noised(edges, total, each * len(counts)), per_site
    epsilon = privacy.evaluation_epsilon / privacy.max_sites_per_patient
    return Noised(edges, total + geometric_noise(total.shape, epsilon, Entropy()), noised.variance(epsilon)), {}


def vote(server: Server, plan: Plan, fleet: Fleet, budget: Budget, log: Log) -> None:
    """Have sites vote, at a noise that is paid for, on whether their own models do better; tell the outcome."""
    g = plan.guarantee
    if g is None or "vote" not in g.queries:
        return
    budget.ask("vote")
    payload = codec.encode({"round": server.round}, {"w": server.released_P})
    patience = plan.study.training.deadline * plan.study.training.rounds  # a site trains a whole model
    replies = gather(fleet, plan.participants, "vote", payload, patience)
    told, untold = heard(replies, lambda answer: numbers(answer["vote"], 1))
    _left_out(log, server.round, "did not vote on own models", untold)
    if not told:
        log.emit(Warned("privacy.vote_epsilon was paid, and no site has voted on own models: nothing is known of them"))
        return
    together = guarantee.counted_together(plan.study)
    each = g.query_sd("vote", guarantee.VOTE_SENSITIVITY)
    reach = 0.0 if together else _FAR * each  # no site counts for more than one, and for what its noise may add
    votes = float(np.clip([vote[0] for vote in told.values()], -reach, 1 + reach).sum())
    if together:
        votes, sd = votes + float(_noise(plan, "vote", guarantee.VOTE_SENSITIVITY, 1)[0]), each
    else:
        sd = each * math.sqrt(len(told))
    half = guarantee.vote_interval(len(told), sd)
    log.emit(Voted(server.round, len(told), metrics.Figure(votes, votes - half, votes + half), sd))


_FAR = 6.0
"""Standard deviations of a site's own noise beyond which its vote is cut."""


def _known(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
