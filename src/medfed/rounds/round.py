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

from medfed.core import codec
from medfed.core.checks import QuorumError, reasons
from medfed.core.decision import CELLS, CHOOSING_CELLS, EXACT_EDGES
from medfed.core.entropy import Entropy
from medfed.engine.port import Fleet, Reply, gather, heard, numbers
from medfed.learn import dpsgd
from medfed.learn.algorithms import Server
from medfed.learn.local import outputs
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
from medfed.planning.building import build_model
from medfed.planning.plan import Plan
from medfed.privacy import guarantee as guarantees
from medfed.privacy.mechanisms import geometric_noise
from medfed.privacy.run_meter import RunMeter
from medfed.robust import detection
from medfed.rounds.plain import PLAIN
from medfed.rounds.way import RoundRows, Way, collect
from medfed.secure.three_party import DISPUTED


def run_round(
    server: Server,
    plan: Plan,
    fleet: Fleet,
    budget: RunMeter,
    log: Log,
    way: Way = PLAIN,
    out: Collection[str] = (),
) -> Server:
    """Run one round and return the server's next state.

    Raises QuorumError where fewer drawn sites answer than training.quorum asks for; the state is
    then unchanged.

    Args:
        server: the state before it.
        plan: the run's.
        fleet: the sites, by which it asks.
        budget: what the run has spent; the round is counted in it.
        log: takes the round's events.
        way: how rows come together.
        out: those who are not drawn, by name.
    """
    began = time.perf_counter()
    number = server.round + 1

    # Draw: who takes part, by the study's selector.
    clients = plan.draw(number, out)
    log.emit(RoundStarted(number, clients))

    # Charge: the coordinator counts;
    # each site pays from its own ledger, before its data is touched.
    budget.charge(number, clients)

    # Work and combine: one row a client, which the study's way makes one.
    question = ask_of(server, plan)
    try:
        answer = collect(way, plan, fleet, clients, number, question)
    except QuorumError as error:
        _tell_excluded(log, number, error.excluded)
        raise
    _tell_excluded(log, number, answer.excluded)
    if answer.gram_KK is not None:
        _inspect(answer, plan, number, log)

    # Apply: a noised sum of gradients is a step of descent; the algorithm's server does the rest.
    mean_M = answer.combined_M
    if plan.joint:
        server, mean_M = _descend(server, mean_M, plan, answer.names)
    weight = sum(plan.weight(name) for name in answer.names)
    share = weight / sum(plan.weight(name) for name in plan.participants)
    following = plan.algorithm.step(server, mean_M.to(server.w_P.dtype), share, plan.study.training)

    # Remember: only now do sites keep what the round left them, those whose row has counted.
    if plan.keeps:
        for name, reply in gather(
            fleet, answer.names, "keep", codec.encode({}), plan.study.training.deadline
        ).items():
            if reply.error:
                log.emit(
                    Warned(f"round {number}: site {name!r} could not keep its state: {reply.error}")
                )

    # Tell.
    seconds = time.perf_counter() - began
    log.emit(_make_finished(answer, plan, number, seconds, len(question) * len(clients), budget))
    return following


def ask_of(server: Server, plan: Plan) -> bytes:
    """Return what the clients of the round after `server` are asked.

    The weights, and the slots that the algorithm of `plan` sends.
    """
    task = plan.algorithm.task(server)
    header = {"round": server.round + 1}
    chosen = {name: float(server.slots[name]) for name in ("clip", "rate") if name in server.slots}
    return codec.encode(
        header | chosen, {"w": task.w_P, **{f"slot.{name}": v for name, v in task.slots.items()}}
    )


def _tell_excluded(log: Log, number: int, excluded: Mapping[str, str]) -> None:
    for name, reason in excluded.items():
        log.emit(SiteExcluded(number, name, reason))


def _make_finished(
    answer: RoundRows, plan: Plan, number: int, seconds: float, asked: int, budget: RunMeter
) -> RoundFinished:
    """Return the event of a round that took so many `seconds`; its question was `asked` bytes."""
    reports = answer.reports
    replies = answer.replies
    losses = [_read_number(reports[name].get("loss")) for name in answer.names]
    known = [
        (plan.weight(n), loss)
        for n, loss in zip(answer.names, losses, strict=True)
        if loss is not None
    ]
    mean = None
    if known:
        mean = sum(w * loss for w, loss in known) / sum(w for w, _ in known)

    return RoundFinished(
        round=number,
        clients=answer.names,
        loss=mean,
        losses=losses,
        site_seconds=[round(replies[name].seconds, 6) for name in answer.names],
        steps=[int(reports[name].get("steps", 0)) for name in answer.names],
        seconds=round(seconds, 6),
        bytes_up=sum(len(reply.payload) for reply in replies.values()) + answer.more_up,
        bytes_down=asked + answer.more_down,
        privacy=budget.claim(),
        phases=answer.phases,
    )


def _descend(
    server: Server, total_M: torch.Tensor, plan: Plan, clients: Sequence[str]
) -> tuple[Server, torch.Tensor]:
    """Turn a noised sum of clipped gradients into the mean update of one local step;
    adapt the clipping norm.

    The sum is divided by the declared patients of those whose rows count: who took part is known.
    """
    guarantee = plan.guarantee
    training = plan.study.training
    assert guarantee is not None
    clip = float(server.slots["clip"]) if "clip" in server.slots else guarantee.clip
    expected = sum(guarantee.releases[name].expected for name in clients)
    gradient_P = (
        total_M[: guarantee.parameters] * (clip / expected) + training.weight_decay * server.w_P
    )

    if "clip" in server.slots:
        following = dpsgd.next_clip(
            clip, float(total_M[-1]), round(expected), plan.study.privacy.quantile
        )
        server = replace(server, slots={**server.slots, "clip": torch.tensor([following])})

    return server, -training.learning_rate * gradient_P


def _inspect(answer: RoundRows, plan: Plan, number: int, log: Log) -> None:
    """Tell what the Gram matrix of a round's rows says against whom; a row that was refused for
    what it holds, too.
    """
    assert answer.gram_KK is not None and plan.rule is not None
    caught = {
        name: why
        for name, why in answer.excluded.items()
        if any(sign in why for sign in MALICE) and not why.startswith(DISPUTED)
    }
    f = min(plan.rule.f, (len(answer.names) - 1) // 2)
    findings = detection.inspect(answer.names, answer.gram_KK, f, answer.gram_noise, caught)
    told = [
        {"client": o.client, "score": round(o.score, 3), "kind": o.kind, "evidence": o.evidence}
        for o in findings
    ]
    log.emit(
        Inspected(
            number,
            {name: round(w, 6) for name, w in answer.weights.items()},
            told,
            plan.rule.f,
            plan.may_sit_out,
        )
    )


MALICE = ("not finite", "out of bound")
"""Reasons for which no honest site's row is left out."""


@dataclass(frozen=True)
class Threshold:
    """From which probability the positive label is called, and from what that follows."""

    threshold: float = 0.5
    decided: str = "until it is chosen"


def decide(server: Server, plan: Plan, fleet: Fleet, budget: RunMeter, log: Log) -> Threshold:
    """Return the threshold that the study declares, or that its rule chooses on training rows.

    Under a claim the training patients pay, and what the rule reads is noised. Where it says too
    little, the threshold is 0.5, and the log warns.

    Args:
        server: the state whose model is decided by.
        plan: the run's.
        fleet: the sites, by which it asks.
        budget: what the run has spent; the query is counted in it.
        log: takes what is warned of.
    """
    study = plan.study
    rule = plan.study.rule()
    guarantee = plan.guarantee
    if not rule.chosen:
        return Threshold(rule.level, "declared")
    if plan.encoding.target.task != "binary":
        return Threshold(0.5, "declared")

    # Ask: what the rule needs of training rows, by cells of scores.
    edges = EXACT_EDGES
    if guarantee:
        edges = _edges(server, plan, CHOOSING_CELLS)
    payload = codec.encode(
        {"round": server.round}, {"w": server.released_P, "edges": torch.from_numpy(edges)}
    )
    budget.put("threshold")
    replies = gather(fleet, plan.participants, "count", payload, study.training.deadline)
    _count(budget, "threshold", replies)
    length = len(rule.vector(np.zeros((len(edges) + 1, 2))))
    told, untold = heard(replies, lambda answer: numbers(answer["counts"], length))
    _left_out(log, server.round, "not counted for data.threshold", untold)

    # Sum, with the noise that is paid for.
    counts = np.sum([*told.values()], 0) if told else np.zeros(length)
    sd = 0.0
    if guarantee:
        sd = guarantees.summed_sd(
            study, guarantee.query_sd("threshold", rule.sensitivity()), len(told)
        )
    if guarantee and guarantees.counted_together(study):
        counts = counts + _noise(plan, "threshold", rule.sensitivity(), len(counts))

    # Choose.
    found = rule.choose(edges, counts, sd) if told else None
    if found is None:
        hidden = "the noise hides it" if guarantee and told else "training rows do not tell"
        log.emit(
            Warned(
                f"data.threshold={study.data.threshold!r} chose nothing, as {hidden}; 0.5 is taken"
            )
        )
        return Threshold(0.5, f"{study.data.threshold} chose nothing")
    of = f"noised counts of training patients (sd {sd:.3g})" if guarantee else "training rows"
    return Threshold(
        found, f"{study.data.threshold}, chosen on {of} of {len(told)} site{'s' * (len(told) > 1)}"
    )


def _noise(plan: Plan, label: str, sensitivity: float, numbers: int) -> np.ndarray:
    """Draw the noise on the sum of all sites' answers to a query."""
    assert plan.guarantee is not None
    return guarantees.query_noise(
        plan.guarantee, label, sensitivity, numbers, plan.streams.key(label)
    )


def _edges(server: Server, plan: Plan, cells: int, threshold: float = 0.5) -> np.ndarray:
    """Return edges between cells of scores by public facts: the released model on made-up rows."""
    model = build_model(plan.study, plan.encoding).eval()
    z_NC = outputs(model, server.released_P, plan.encoding.invent_rows(MADE_UP))
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
    """Test the current model at every site; emit and return the figures.

    Under a claim, where test patients are not public, figures come from noised counts.

    Args:
        server: the state whose model is tested.
        plan: the run's.
        fleet: the sites, by which it asks.
        log: takes the figures.
        model: what the figures call it.
        intervals: figures get 95 % intervals.
        decision: the threshold; None: as declared, or 0.5.
    """
    began = time.perf_counter()
    study = plan.study
    task = plan.encoding.target.task
    rule = plan.study.rule()
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
        scores, untold = heard(
            replies, lambda answer: Scores.from_tensors(task, answer, plan.encoding.target.outputs)
        )
    _left_out(log, server.round, "not tested", untold)
    if len(untold) == len(replies):
        raise QuorumError(
            f"round {server.round}: no site could test the model. {reasons(untold)}", untold
        )

    if private:
        union, per_site = _noised_scores(counts, edges, plan)
    else:
        union = Scores.all([*scores.values()])
        per_site = scores
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
    """Hold each site's own model against the federated one; tell the outcome.

    Both are tested on the same held-out records.

    Args:
        own: the state of the baseline of own models.
        federated: the federated one.
        plan: the run's.
        fleet: the sites, by which it asks.
        log: takes the outcome.
    """
    payload = codec.encode({"round": own.round}, {"w": own.w_P, "other": federated.released_P})
    replies = gather(fleet, plan.testers, "compare", payload, plan.study.training.deadline)
    told, untold = heard(replies, lambda answer: numbers(answer["paired"], 3))
    for name, why in untold.items():
        log.emit(Warned(f"the federated model was not compared with that of site {name!r}: {why}"))
    sums = {name: paired.tolist() for name, paired in told.items()}
    if not sums:
        return
    paired = {name: metrics.mean_difference(*told) for name, told in sums.items()}
    n, total, square = (sum(told[i] for told in sums.values()) for i in range(3))
    sites = {name: [int(sums[name][0]), f.value, f.low, f.high] for name, f in paired.items()}
    log.emit(Compared(federated.round, int(n), metrics.mean_difference(n, total, square), sites))


def _count(budget: RunMeter, label: str, replies: Mapping[str, Reply]) -> None:
    """Count a query of patients once some site has answered: where all refuse nothing is released.

    What was paid for and got lost on its way the ledgers tell, and of sites that tell nothing it is
    assumed (`Drive.finish`).
    """
    if any(not reply.error for reply in replies.values()):
        budget.ask(label)


def _left_out(log: Log, round: int, what: str, untold: Mapping[str, str]) -> None:
    for name, why in untold.items():
        log.emit(SiteExcluded(round, name, f"{what}: {why}"))


def _noised_scores(
    counts: Mapping[str, np.ndarray], edges: np.ndarray, plan: Plan
) -> tuple[Scored, Mapping[str, Scored]]:
    """Return the test of all sites together, and of each.
    Where counts are noised together, the sum alone is told.

    A patient of several sites moves the sum by one at each: the noise of the sum covers all of
    them.
    """
    privacy = plan.study.privacy
    total = np.sum(list(counts.values()), 0)
    if not guarantees.counted_together(plan.study):
        each = noised.variance(privacy.evaluation_epsilon)
        per_site: dict[str, Scored] = {
            name: Noised(edges, count, each) for name, count in counts.items()
        }
        return Noised(edges, total, each * len(counts)), per_site

    epsilon = privacy.evaluation_epsilon / privacy.max_sites_per_patient
    noise = geometric_noise(total.shape, epsilon, Entropy())
    return Noised(edges, total + noise, noised.variance(epsilon)), {}


def vote(server: Server, plan: Plan, fleet: Fleet, budget: RunMeter, log: Log) -> None:
    """Have sites vote on whether their own models do better; tell the outcome.

    The votes are noised, and paid for.

    Args:
        server: the federated state.
        plan: the run's.
        fleet: the sites, by which it asks.
        budget: what the run has spent; the vote is counted in it.
        log: takes the outcome.
    """
    guarantee = plan.guarantee
    if guarantee is None or "vote" not in guarantee.queries:
        return
    payload = codec.encode({"round": server.round}, {"w": server.released_P})
    # a site trains a whole model
    patience = plan.study.training.deadline * plan.study.training.rounds
    budget.put("vote")
    replies = gather(fleet, plan.participants, "vote", payload, patience)
    _count(budget, "vote", replies)
    told, untold = heard(replies, lambda answer: numbers(answer["vote"], 1))
    _left_out(log, server.round, "did not vote on own models", untold)
    if not told:
        log.emit(
            Warned(
                "privacy.vote_epsilon was paid, and no site has voted on own models: nothing is "
                "known of them"
            )
        )
        return

    # Sum: no site counts for more than one, and for what its noise may add.
    together = guarantees.counted_together(plan.study)
    each = guarantee.query_sd("vote", guarantees.VOTE_SENSITIVITY)
    reach = 0.0 if together else _FAR * each
    votes = float(np.clip([vote[0] for vote in told.values()], -reach, 1 + reach).sum())
    if together:
        votes += float(_noise(plan, "vote", guarantees.VOTE_SENSITIVITY, 1)[0])
    sd = guarantees.summed_sd(plan.study, each, len(told))
    half = guarantees.vote_interval(len(told), sd)
    log.emit(Voted(server.round, len(told), metrics.Figure(votes, votes - half, votes + half), sd))


_FAR = 6.0
"""Standard deviations of a site's own noise beyond which its vote is cut."""


def _read_number(value: Any) -> float | None:
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None
