"""The round as a specification: every party in turn,
in plain sight, without bytes, engine, keys or stacks.

Read this first. Whatever else the house does in a round (replies that are late, masks and shares,
whole cohorts as one stack, signatures, a ledger on disk) leaves the numbers as they are here:
`tests/rounds/test_reference.py` holds the engine against this page for every algorithm, noise,
aggregation and rule that is registered.

K rows that came, P parameters, M numbers in a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medfed.data.federated import Patients, Rows, Stack
from medfed.learn import dpsgd
from medfed.learn.algorithms import Server
from medfed.learn.learners import LEARNERS, work_of
from medfed.learn.local import train
from medfed.links.wire import decode, finite, into_ball, send_remembering
from medfed.planning import rates
from medfed.planning.building import local_plan
from medfed.planning.plan import Plan
from medfed.planning.row_limits import row_limits
from medfed.robust import rules


@dataclass
class SiteState:
    """What a site holds: its training rows, and what its algorithm remembers of earlier rounds."""

    rows: Rows
    memory: dict[str, Tensor]


def play(
    server: Server,
    plan: Plan,
    model: nn.Module,
    sites: Mapping[str, SiteState],
    drawn: Sequence[str] | None = None,
) -> Server:
    """Return the server's state after one round;
    sites whose row counts remember it. `drawn` stands for the draw.
    """
    number = server.round + 1
    guarantee = plan.guarantee
    training = plan.study.training

    # Draw. The study's selector says who takes part, from public facts and a public stream; they
    # receive the model.
    if drawn is None:
        drawn = plan.draw(number)

    # Pay, work and send. Each site charges its patients (`privacy.site_ledger`), computes its row
    # by itself, and passes it through the client's halves of the links: cut, rounded, noised. The
    # coordinator undoes what it can row by row. A row that is not finite does not count.
    sent: dict[str, Tensor] = {}
    remembered: dict[str, dict[str, Tensor]] = {}
    for name in drawn:
        message_M, later = work(server, plan, model, name, sites[name])
        if finite(message_M[None]).all():
            memory = {kept: value[None] for kept, value in sites[name].memory.items()}
            row_KM, kept = send_remembering(message_M[None], plan.links, memory)
            sent[name] = decode(row_KM, plan.links, plan.message)[0]
            remembered[name] = {**later, **{one: value[0] for one, value in kept.items()}}

    # Combine. In plain sight, under masks that cancel or in shares that add up, what is opened is
    # one weighted sum: a rule's weights where some may lie, else the sum that a noise is for, else
    # the mean by public weights.
    row_KM = torch.stack(list(sent.values()))
    weight_K = torch.tensor([plan.weight(name) for name in sent], dtype=torch.float64)
    patients_K = torch.tensor([_patients(plan, name) for name in sent], dtype=torch.float64)
    if plan.rule and plan.rule.needs == "rows":
        combined_M = plan.fitting(len(sent)).combine(row_KM).double()
    elif plan.rule and plan.joint:
        # rows are sums: weighed as means, and opened as the sum over as many patients
        combined_M = _weigh(plan, row_KM.double() / patients_K[:, None]) * patients_K.sum()
    elif plan.rule:
        combined_M = _weigh(plan, row_KM)
    elif plan.joint:
        combined_M = row_KM.sum(0)
    else:
        combined_M = weight_K / weight_K.sum() @ row_KM.double()

    # Open. The other halves of the links, on what was combined: the joint noise, the grid's unit.
    for link in reversed(plan.links):
        combined_M = link.server(combined_M, number)

    # Apply. A noised sum of gradients is a step of gradient descent;
    # the algorithm's server does the rest.
    if plan.joint:
        assert guarantee is not None
        clip = _clip(server, plan)
        patients = float(patients_K.sum())
        gradient_P = combined_M[: guarantee.parameters] * (clip / patients)
        gradient_P = gradient_P + training.weight_decay * server.w_P
        if guarantee.clipping == "adaptive":
            following = dpsgd.next_clip(
                clip, float(combined_M[-1]), round(patients), plan.study.privacy.quantile
            )
            server = replace(server, slots={**server.slots, "clip": torch.tensor([following])})
        combined_M = -training.learning_rate * gradient_P
    share = float(weight_K.sum()) / sum(plan.weight(name) for name in plan.participants)
    after = plan.algorithm.step(server, combined_M.to(server.w_P.dtype), share, training)

    # Remember. Only sites whose row has counted do.
    for name in sent:
        sites[name].memory = remembered[name]
    return after


def work(
    server: Server, plan: Plan, model: nn.Module, name: str, site: SiteState
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the row [M] that a site's records come to, and what it remembers if the row counts.

    A row is what local training came to or, where one noise serves the sum of all sites, the sum of
    the site's clipped gradients, a patient each.

    Args:
        server: the state before the round.
        plan: the run's.
        model: its architecture; its own weights may be overwritten.
        name: the site's.
        site: its rows and memory.
    """
    guarantee = plan.guarantee
    algorithm = plan.algorithm
    task = plan.algorithm.task(server)
    memory = {kept: site.memory[kept][None] for kept in algorithm.kept}
    if plan.study.model.name in LEARNERS:
        done = work_of(LEARNERS[plan.study.model.name], task, memory, [site.rows])
        return done.message_KM[0], {kept: value[0] for kept, value in done.memory.items()}

    key_K = plan.streams.key_K("batches", server.round + 1, [name])
    if guarantee and guarantee.joint:
        patients = Patients.of([site.rows])
        size = guarantee.releases[name].size
        target = plan.encoding.target.task
        clip = _clip(server, plan)
        summed = dpsgd.sums(
            model, task.w_P, patients, target, guarantee, clip, [name], key_K, plan.path
        )
        message_KM = into_ball(summed.total_KP, [row_limits(plan.study, guarantee)[name]])
        if guarantee.clipping == "adaptive":
            message_KM = torch.cat(
                [message_KM, summed.below_K.clamp(-size / 2, size / 2)[:, None]], 1
            )
        return message_KM[0], {}

    if "rate" in server.slots:
        study = rates.at(plan.study, float(server.slots["rate"]))
    else:
        study = plan.study
    start_KP = algorithm.starts_KP(task, memory, 1)
    correction = algorithm.correct(task, memory, study.training)
    steps = local_plan(study, plan.encoding)
    if guarantee:
        average = 0.0 if algorithm.plain_sgd or algorithm.any_sgd else study.training.average
        patients = Patients.of([site.rows])
        local = dpsgd.train(
            model,
            start_KP,
            patients,
            steps,
            guarantee,
            [name],
            key_K,
            correction,
            average,
            plan.path,
        )
    else:
        local = train(model, start_KP, Stack.of([site.rows]), steps, key_K, correction, plan.path)
    message_KM, later = algorithm.message(task, memory, local, study.training)
    return message_KM[0], {kept: value[0] for kept, value in later.items()}


def _clip(server: Server, plan: Plan) -> float:
    """Return the norm that a patient's gradient is held to in this round."""
    assert plan.guarantee is not None
    if "clip" in server.slots:
        return float(server.slots["clip"])
    return plan.guarantee.clip


def _weigh(plan: Plan, row_KM: Tensor) -> Tensor:
    """Return the rows [M] as the study's rule weighs them: a function of how they compare, their
    Gram matrix, alone.
    """
    return plan.weigh(rules.gram(rules.blocks_of(row_KM))).double() @ row_KM.double()


def _patients(plan: Plan, name: str) -> float:
    """Return how many declared patients a site's row sums over;
    where rows are means nothing hangs on it.
    """
    if plan.guarantee is None or not plan.joint:
        return 1.0
    return plan.guarantee.releases[name].expected
