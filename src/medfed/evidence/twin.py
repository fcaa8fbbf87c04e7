"""The twin of a study: the same plan through the same code, for an attacker who knows everything
but some coins.

The attacker sees every server state and, where noise = "site", each site's row, and knows all
records. What a round would release without noise is worked out here once more, by torch.func (or
plain autograd) and clipping formulas of its own, so that a bug in dpsgd.py cannot hide itself.

A twin pays from no ledger: its patients are public, or invented where the study's are private.

N records, I patients, R records of one patient, M canaries, P parameters, F features, C outputs, A
= 1 + M: no canary, and each of them alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from medfed import runs
from medfed.core import codec, streams
from medfed.core.checks import PlanError
from medfed.core.flat import Layout
from medfed.data.encoding import Encoding
from medfed.data.federated import Rows
from medfed.engine.port import Counted, Fleet, Reply
from medfed.learn.algorithms import Server, Task
from medfed.learn.local import Correction, Descent, sample_loss
from medfed.learn.zoo import dropout_keys
from medfed.links.wire import joint_links
from medfed.monitor.events import Log
from medfed.node.inprocess import InProcess
from medfed.node.site import Site
from medfed.planning.building import build_model
from medfed.planning.plan import Plan
from medfed.privacy.guarantee import Guarantee, asked
from medfed.rounds import aggregation as ways
from medfed.rounds.plain import PLAIN
from medfed.rounds.prepare import prepare
from medfed.rounds.round import run_round
from medfed.rounds.way import RoundRows, Way
from medfed.study import Robustness, Study

_BLOCK = 1 << 23  # numbers of per-patient gradients held at once


@dataclass(frozen=True)
class Twin:
    """A study's plan and its sites, prepared as for a run, with the rows of the patients that
    training starts from.
    """

    plan: Plan
    guarantee: Guarantee
    sites: Mapping[str, Site]
    rows: Mapping[str, Rows]
    model: nn.Module  # the attacker's own copy
    aggregation: Way = PLAIN

    @classmethod
    def of(
        cls,
        study: Study,
        data: Path | None,
        rng: np.random.Generator,
        encoding: Encoding | None = None,
        secure: bool = False,
    ) -> "Twin":
        """Prepare a twin of a study. Raises PlanError where it claims nothing.

        Nobody lies in a twin, and no rule weighs its rows.

        Args:
            study: the study.
            data: where downloaded data is looked for first.
            rng: draws the twin's patients.
            encoding: a run's; None: the twin agrees on its own.
            secure: rows come together as the study says, under keys made for it; else in the open.
        """
        if not asked(study) or study.privacy.simulation_only:
            raise PlanError(
                "the study claims nothing, so there is nothing to audit. Set privacy.epsilon=1.0 "
                "and privacy.delta=1e-6, and leave privacy.simulation_only out."
            )
        study = replace(study, robustness=Robustness()).set("security.federation", "")
        if not secure:
            # what is opened has no less noise than the twin's sum
            study = study.set("security.aggregation", "plain")
        simulation = runs.Simulation.open(study, data, pays=False)
        fleet = simulation.fleet
        plan = prepare(simulation.study, fleet, fleet.sites(), encoding)
        assert plan.guarantee is not None
        sites = {name: fleet.site(name) for name in plan.participants}
        if study.privacy.scope == "run":  # declared public
            rows = {name: site.train for name, site in sites.items()}
        else:
            rule_FC = rng.standard_normal(
                (len(plan.encoding.names()), plan.encoding.target.outputs)
            )
            rows = {
                name: _invent(plan.guarantee.releases[name].size, rule_FC, plan, rng)
                for name in sites
            }
        together = ways.introduce(plan, fleet, "audit") if secure else PLAIN
        return cls(
            plan,
            plan.guarantee,
            sites,
            rows,
            build_model(plan.study, plan.encoding).train(),
            together,
        )


def _invent(size: int, rule_FC: np.ndarray, plan: Plan, rng: np.random.Generator) -> Rows:
    """Return patients whose label follows a linear rule, with noise: something to learn."""
    x_NF = rng.standard_normal((size, len(rule_FC)))
    target = plan.encoding.target
    z_NC = torch.from_numpy(
        x_NF @ rule_FC / np.sqrt(len(rule_FC)) + rng.logistic(size=(size, rule_FC.shape[1]))
    )
    match target.task:
        case "binary":
            y_N = (z_NC[:, 0] > 0).float()
        case "multiclass":
            y_N = z_NC.argmax(1)
        case "regression":
            y_N = z_NC[:, 0].float()
    return Rows(torch.from_numpy(x_NF).float(), y_N, torch.arange(size), keys(size, rng))


def keys(size: int, rng: np.random.Generator) -> Tensor:
    """Return streams [size] for made-up patients, drawn by `rng`."""
    return torch.from_numpy(rng.integers(-(2**63), 2**63, size))


@dataclass(frozen=True)
class Seen:
    """One round as an attacker sees it: the states around it, each site's reply, and what sites
    remembered before.
    """

    before: Server
    after: Server
    reply: Mapping[str, bytes]
    memory: Mapping[str, Mapping[str, Tensor]]


class TwinTraining:
    """One training of a twin, round by round, through `run_round` and with noise of its own."""

    def __init__(self, twin: Twin) -> None:
        plan = twin.plan
        fresh = joint_links(twin.guarantee, plan.streams.key("noise"))
        # else sites or aggregators hold the noise
        alone = plan.joint and plan.study.security.aggregation == "plain"
        self.twin = twin
        self.plan = replace(plan, links=fresh) if alone else plan
        self.heard = _Heard(twin.aggregation)
        self.tap = _Tap(InProcess(list(twin.sites.values())))
        self.server = plan.begin()
        self.budget = plan.budget()
        self.runs = 1
        for site in twin.sites.values():
            site.forget()

    def round(self, held: Mapping[str, Rows]) -> Seen:
        """Run one round in which the sites hold these training rows."""
        rounds = self.plan.study.training.rounds
        if self.plan.study.security.aggregation != "plain" and self.server.round >= rounds:
            # no party plays a round that the study does not have: the twin goes on in another run
            if self.server.round % rounds == 0:
                self._begin_anew()
            self.server = replace(self.server, round=self.server.round % rounds)
        for name, site in self.twin.sites.items():
            site.hold(held[name])
        before = self.server
        memory = {name: site.memory for name, site in self.twin.sites.items()}
        self.server = run_round(before, self.plan, self.tap, self.budget, Log(), self.heard)
        return Seen(before, self.server, self.tap.reply, memory)

    def _begin_anew(self) -> None:
        """Have the parties join another run."""
        self.runs += 1
        fleet = InProcess(list(self.twin.sites.values()))
        self.heard = _Heard(ways.introduce(self.twin.plan, fleet, f"audit {self.runs}"))


class _Heard:
    """A way, and each of its rounds, that keeps what it opened last, in the links' own units."""

    trail = None

    def __init__(self, inner: Way) -> None:
        self.inner = inner
        self.opened_M = torch.empty(0)

    def open(
        self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes
    ) -> "_Heard":
        """Open a round of the way itself."""
        self.exchange = self.inner.open(plan, fleet, clients, number, payload)
        return self

    @property
    def waits(self) -> bool:
        """Whether the round waits for replies."""
        return self.exchange.waits

    def add(self, reply: Reply) -> None:
        """Hand a reply on."""
        self.exchange.add(reply)

    def close(self) -> RoundRows:
        """Close the round, and keep the combined row."""
        rows = self.exchange.close()
        self.opened_M = rows.combined_M
        return rows


class _Tap(Counted):
    """A fleet that keeps what the sites answered to the last call to work."""

    def submit_many(
        self, sites: Sequence[str], op: str, payload: bytes, deadline: float
    ) -> list[int]:
        self.listening = op == "work"
        if self.listening:
            self.reply: dict[str, bytes] = {}
        return super().submit_many(sites, op, payload, deadline)

    def poll(self, wait: float) -> list[Reply]:
        replies = super().poll(wait)
        if self.listening:
            self.reply |= {reply.site: reply.payload for reply in replies if not reply.error}
        return replies


# What is released ---------------------------------------------------------------------------------


def updates(seen: Seen, plan: Plan) -> Iterator[tuple[list[str], Tensor]]:
    """Yield each noised release of a round as (its sites, mean change of the weights [P]).

    Joint noise: one, from the server's states alone. Noise at the sites: each site's row.
    """
    if plan.joint:
        yield list(seen.reply), _mean_update(seen.before, seen.after, plan)
        return
    for name, payload in seen.reply.items():
        row_M = codec.decode(payload)[1]["row"]
        yield [name], plan.algorithm.update(row_M, plan.parameters)


def _mean_update(before: Server, after: Server, plan: Plan) -> Tensor:
    """Undo the server's step: what it applied is in its weights, or in the moments it keeps."""
    h = plan.study.training
    if "momentum" in after.slots:
        return after.slots["momentum"] - h.server_momentum * before.slots["momentum"]
    if "m" in after.slots:
        beta1 = 0.0 if h.algorithm == "fedadagrad" else h.server_momentum
        return (after.slots["m"] - beta1 * before.slots["m"]) / (1 - beta1)
    return (after.w_P - before.w_P) / (h.server_learning_rate or 1.0)


# What the attacker works out ----------------------------------------------------------------------


@dataclass(frozen=True)
class People:
    """Patients of several sites:
    their records, each record's stream, and each patient's weight in the mean.
    """

    x_NF: Tensor
    y_N: Tensor
    patient_N: Tensor  # 0 .. I-1
    record_N: Tensor  # 0 .. of its patient
    key_N: Tensor
    weight_I: Tensor

    @classmethod
    def of(
        cls, held: Mapping[str, Rows], weight: Mapping[str, float], key: Mapping[str, int]
    ) -> "People":
        """Lay the sites' rows end to end; `weight` and `key` are those of a site's patients."""
        number = []
        weights = []
        count = 0

        for name, rows in held.items():
            codes, place_N = torch.unique(rows.patient, return_inverse=True)
            number.append(place_N + count)
            weights.append(torch.full((len(codes),), weight[name], dtype=torch.float64))
            count += len(codes)

        patient_N = torch.cat(number)
        record_N = torch.zeros(sum(map(len, held.values())), dtype=torch.int64)
        sorted_N, order_N = torch.sort(patient_N, stable=True)
        record_N[order_N] = torch.arange(len(order_N)) - torch.searchsorted(sorted_N, sorted_N)
        own = [
            (rows.patient if rows.key is None else rows.key) ^ key[name]
            for name, rows in held.items()
        ]
        x_NF, y_N = (
            torch.cat([getattr(rows, name) for rows in held.values()]) for name in ("x", "y")
        )

        return cls(x_NF, y_N, patient_N, record_N, torch.cat(own), torch.cat(weights))

    def blocks(self, parameters: int) -> "Iterator[People]":
        """Cut the patients into blocks whose gradients fit the memory."""
        size = max(1, _BLOCK // parameters)
        for first in range(0, len(self.weight_I), size):
            mine = (self.patient_N >= first) & (self.patient_N < first + size)
            yield People(
                self.x_NF[mine],
                self.y_N[mine],
                self.patient_N[mine] - first,
                self.record_N[mine],
                self.key_N[mine],
                self.weight_I[first : first + size],
            )


def clip_gradients(twin: Twin, w_P: Tensor, people: People, step: int, clip: float) -> Tensor:
    """Return each patient's clipped gradient [I,
    P] (float64), in C, times its weight: the definition.

    Args:
        twin: the study's.
        w_P: the weights at which gradients are taken.
        people: the patients.
        step: whose dropout draws are taken.
        clip: C.
    """
    model = twin.model
    layout = Layout.of(twin.model)
    task = twin.plan.encoding.target.task
    dropouts = dropout_keys(model)

    def loss(weights: dict[str, Tensor], x_F: Tensor, y: Tensor, key: Tensor) -> Tensor:
        z_1C = functional_call(model, {**weights, **dict.fromkeys(dropouts, key)}, (x_F[None],))
        return sample_loss(task, z_1C[0], y)

    step_N = streams.subkey(people.key_N, step)
    key_RN = torch.stack([streams.subkey(step_N, n) for n in range(int(people.record_N.max()) + 1)])
    key_N = key_RN.gather(0, people.record_N[None])[0]
    g_NP = _gradients(loss, dict(layout.pieces(w_P)), people.x_NF, people.y_N, key_N)
    g_IP = torch.zeros(len(people.weight_I), len(w_P), dtype=torch.float64)
    g_IP.index_add_(0, people.patient_N, g_NP.double())
    norm_I1 = g_IP.norm(dim=1, keepdim=True)
    bound_I1 = norm_I1.clamp(min=clip)
    if twin.guarantee.clipping == "automatic":
        bound_I1 = norm_I1 + 0.01
    held_IP: Tensor = g_IP / bound_I1 * people.weight_I[:, None]
    return held_IP


_Loss = Callable[[dict[str, Tensor], Tensor, Tensor, Tensor], Tensor]
"""(weights, x [F], y, key) -> the loss of one record."""


def _gradients(
    loss: _Loss, weights: dict[str, Tensor], x_NF: Tensor, y_N: Tensor, key_N: Tensor
) -> Tensor:
    """Return each record's gradient [N, P]:
    by torch.func, or where it cannot by autograd, record by record.
    """
    try:
        parts = vmap(grad(loss), in_dims=(None, 0, 0, 0))(weights, x_NF, y_N, key_N).values()
        return torch.cat([part.flatten(1) for part in parts], 1)
    except (
        RuntimeError,
        NotImplementedError,
    ):  # branches on values, operators without a batching rule
        return torch.stack(
            [_gradient(loss, weights, *one) for one in zip(x_NF, y_N, key_N, strict=True)]
        )


def _gradient(
    loss: _Loss, weights: dict[str, Tensor], x_F: Tensor, y: Tensor, key: Tensor
) -> Tensor:
    """Return one record's gradient [P] by autograd alone; a weight that is not used has none."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    found = torch.autograd.grad(loss(leaves, x_F, y, key), list(leaves.values()), allow_unused=True)
    parts = [
        torch.zeros_like(w) if g is None else g for g, w in zip(found, leaves.values(), strict=True)
    ]
    return torch.cat([part.flatten() for part in parts])


def explain(
    twin: Twin, seen: Seen, names: Sequence[str], canary: Mapping[str, Rows], update_P: Tensor
) -> tuple[Tensor, Tensor]:
    """Return how far a release is from one without canaries [P], and what each would add [M, P].

    In units of the clipped sum (exactly, for one step of SGD), expected over the sampling's coins,
    and linear around half of the canaries being in. A local path of several steps stays inside the
    site: it is taken to be straight, from the round's weights to those released.

    Args:
        twin: the study's.
        seen: the round.
        names: the sites of the release.
        canary: the canaries at each site.
        update_P: the released mean change of the weights.
    """
    guarantee = twin.guarantee
    plan = twin.plan
    h = twin.plan.study.training
    w_P = seen.before.w_P
    clip = float(seen.before.slots.get("clip", guarantee.clip))
    share = clip / sum(guarantee.releases[name].expected for name in names)
    weight = {name: share * guarantee.releases[name].probability for name in names}
    key = {name: plan.streams.key("batches", seen.after.round, name) for name in names}
    base = People.of({name: twin.rows[name] for name in names}, weight, key)
    canaries = People.of(canary, weight, key)

    algorithm = plan.algorithm
    steps = guarantee.releases[names[0]].steps
    average = h.average
    if plan.joint or algorithm.plain_sgd or algorithm.any_sgd:
        average = 0.0
    kept = max(1, round(average * steps))
    layout = Layout.of(twin.model)
    params = [
        p.double().repeat(1 + len(canaries.weight_I), *[1] * p.ndim) for _, p in layout.pieces(w_P)
    ]
    descent = Descent(params, plan.local, _correction(seen, names, plan), layout)
    mean_AP = torch.zeros(())
    for t in range(steps):
        at_P = w_P + update_P.to(w_P.dtype) * (t / (steps - (kept - 1) / 2))
        add_MP = torch.cat(
            [clip_gradients(twin, at_P, some, t, clip) for some in canaries.blocks(plan.parameters)]
        )
        half_P = sum(
            (clip_gradients(twin, at_P, p, t, clip).sum(0) for p in base.blocks(plan.parameters)),
            add_MP.sum(0) / 2,
        )
        descent.step(
            [piece for _, piece in layout.pieces(torch.cat([half_P[None], half_P + add_MP]))]
        )
        if t >= steps - kept:
            mean_AP = mean_AP + torch.cat([p.flatten(1) for p in params], 1) / kept
    add_MP = mean_AP[1:] - mean_AP[0]
    unit = -h.learning_rate * share
    return (w_P + update_P - mean_AP[0] + add_MP.sum(0) / 2) / unit, add_MP / unit


def _correction(seen: Seen, names: Sequence[str], plan: Plan) -> Correction:
    """Return what the algorithm adds to a site's gradients: known to who saw all rows so far."""
    if plan.joint:
        return Correction()
    task = Task(seen.before.w_P, {name: seen.before.slots[name] for name in plan.algorithm.sent})
    memory = {name: seen.memory[names[0]][name][None] for name in plan.algorithm.kept}
    return plan.algorithm.correct(task, memory, plan.study.training)
