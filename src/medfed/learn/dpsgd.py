"""Training under differential privacy:
sums of clipped per-patient gradients, for a whole cohort as one stack.

A patient's gradient is the sum over its records. It is held to norm C, patients are summed, and the
sum goes onto an integer grid, where noise is added: at the site after every step (`train`), or
jointly on the sum of all sites (`sums`, one step a round). Nobody divides by what was drawn:
declared sizes are public constants.

Three paths, one meaning: `rules` takes norms and one weighted product a layer (layers.py); `func`
maps torch.func's gradient over the records; `loop` is autograd on one record at a time, serves any
module, and is what probe.py and tests hold the others to.

A patient's gradient has the same bits whoever else is in the batch: else one more patient would
move what others add, without bound where their own records cancel. So slots come in whole eights,
many enough for one kind of product, and `func` works in blocks of one size.

K clients, A of them in a chunk, I patients of a step (padded), R records a patient (padded), P
parameters.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812

from medfed.core import streams
from medfed.core.entropy import Entropy
from medfed.core.flat import Layout, select_trained
from medfed.core.types import Task
from medfed.data.federated import Patients
from medfed.learn.layers import CANCELLATION, LARGEST, RuledModel, has_rules
from medfed.learn.local import (
    Correction,
    Descent,
    LocalPlan,
    LocalResult,
    Path,
    drawing,
    loss_gradient,
    on_threads,
    sample_loss,
)
from medfed.learn.zoo import Dropout, dropout_keys, select_fixed
from medfed.privacy.guarantee import GRID, NARROW, Guarantee, Release, discrete_gaussian
from medfed.privacy.mechanisms import DiscreteGaussian, round_to_grid

_AUTOMATIC = 0.01  # gamma of Bu et al. 2022: keeps the direction of small gradients finite
_CHUNK_BYTES = 8 << 20
# slots of a client: a product of 5, or of an odd number, adds up in another order
_FEWEST = 32
_MULTIPLE = 8
_RELEASED = 1 << 16  # numbers that are noised at once
_BLOCK = 32  # records of which torch.func takes gradients at once

Factor = Callable[[Tensor], Tensor]
"""Norms [A, I] -> what each patient's gradient is multiplied by,
so that it comes to at most 1 (the unit is C).
"""


@dataclass(frozen=True)
class Step:
    """The patients of one step: rows row_AB with B = I * R slots, which of them are filled, and
    each slot's stream.
    """

    row_AB: Tensor
    valid_AB: Tensor
    key_AB: Tensor
    records: int


@dataclass(frozen=True)
class Sums:
    """Clipped sums [K, P] float64 in C, and how many patients are below C, less half of all [K]."""

    total_KP: Tensor
    below_K: Tensor
    # patients whose gradient was not finite: they count as zero, and the number stays at the site
    dropped: int


def clip_factor(kind: str, clip: float) -> Factor:
    """Return the clipping factor: automatic 1 / (|g| + 0.01) (Bu et al. 2022, 2206.07136), else
    min(1/|g|, 1/C).

    Guarantee: a gradient times the factor of its norm is at most 1 long, so that one patient more
    or less moves a sum of them by at most 1, in units of C. Rounding comes on top
    (`guarantee.SLACK`).

    Edge cases:
    - a norm of 0: the factor is finite, and 0 times it is 0;
    - a norm that is not finite has no product; whoever sums leaves that patient out (`sums`);
    - "automatic" has no C: every gradient well above 0.01 comes to about 1, a sure patient's like
      an unsure one's.

    Args:
        kind: privacy.clipping.
        clip: C, in the gradient's units; "automatic" does not read it.
    """
    if kind == "automatic":
        return lambda norm_AI: 1 / (norm_AI + _AUTOMATIC)
    return lambda norm_AI: 1 / norm_AI.clamp(min=clip)


def next_clip(
    clip: float, noised_below: float, patients: int, quantile: float, rate: float = 0.2
) -> float:
    """Return the next clipping norm: C exp(-0.2 (b - quantile)),
    b the noised share below C (Andrew et al. 2021).

    Args:
        clip: C, the norm of this round.
        noised_below: the noised sum over patients of (1 if below C else 0) - 1/2.
        patients: how many are declared.
        quantile: the share of patients whose gradient shall lie below C, 0 to 1.
        rate: how fast C follows.
    """
    share = min(1.0, max(0.0, noised_below / max(1, patients) + 0.5))
    return float(clip * np.exp(-rate * (share - quantile)))


def sums(
    model: nn.Module,
    w_P: Tensor,
    patients: Patients,
    task: Task,
    guarantee: Guarantee,
    clip: float,
    names: Sequence[str],
    key_K: Tensor,
    path: Path = "auto",
) -> Sums:
    """Return each client's clipped sum at the common weights w_P: what it sends under joint noise.

    Args:
        model: any module; its own weights may be overwritten.
        w_P: the weights of the round.
        patients: the clients' patients and their records, end to end.
        task: what is predicted, which says the loss.
        guarantee: how patients are drawn and clipped, by client.
        clip: C, in the gradient's own unit; adaptive clipping moves it from round to round.
        names: the clients', as `guarantee.releases` has them.
        key_K: the clients' streams for this round, int64: what is dropped; who is drawn only in a
        simulation.
        path: how gradients are taken; "auto" takes `rules` where every layer has one, else `func`.

    Guarantee: one patient more or less, with however many records, moves its client's sum by at
    most 1 + SLACK in units of C and the count below C by half, moves no other client's, and changes
    nobody else's part by a bit: no mask, coin or order of additions hangs on who is there.

    Edge cases:
    - a gradient that is not finite, of any of a patient's records: the patient counts as absent,
      and is in `dropped`;
    - several records: they are summed before the norm is taken;
    - more patients drawn than the cap: a random subset stays, so that one patient puts another out
      and moves the sum by twice as much; `accounting.capped` counts it so;
    - nobody there, or nobody drawn: a sum of zeros.
    """
    factor = clip_factor(guarantee.clipping, clip)
    chosen = _resolve_path(model, path)
    total_KP = torch.empty(len(patients), len(w_P), dtype=torch.float64)
    below_K = torch.empty(len(patients), dtype=torch.float64)
    dropped = 0
    model.train()
    summed = _choose_summer(model, chosen)
    layout = Layout.of(model)
    random = _needs_streams(model, chosen)
    draw = _make_draw(guarantee, key_K)

    for members in _chunks(patients, len(w_P), guarantee, names):
        releases = [guarantee.releases[names[k]] for k in members.tolist()]
        part = patients.of_clients(members)
        step = _lay_out_step(part, releases, draw, members, key_K[members], 0, random)
        weights = [p.expand(len(members), *p.shape) for _, p in layout.pieces(w_P)]
        total_AP, norm_AI = _sum_clipped(summed, weights, part, step, task, factor)
        total_KP[members] = total_AP.double()
        there_AI = step.valid_AB.view(len(members), -1, step.records).any(2)
        counted_AI = there_AI & norm_AI.isfinite()
        below_K[members] = torch.where(counted_AI, (norm_AI <= clip).double() - 0.5, 0).sum(1)
        dropped += int((there_AI & ~counted_AI).sum())

    return Sums(total_KP, below_K, dropped)


def gradients(
    model: nn.Module, w_P: Tensor, patients: Patients, task: Task, path: Path
) -> tuple[Tensor, Tensor]:
    """Return each client's sum [K, P] of its patients' gradients, not clipped, and their norms [K,
    I]; for probe.py.

    Args:
        model: any module; its own weights may be overwritten.
        w_P: the weights at which gradients are taken.
        patients: the clients' patients and their records, end to end.
        task: what the outputs are.
        path: how gradients are taken.
    """
    model.train()
    members = torch.arange(len(patients))
    releases = [Release(max(2, size), 1, 1.0, 1.0) for size in patients.size_K.tolist()]
    step = _lay_out_step(
        patients,
        releases,
        lambda of, t, width: torch.empty(0),
        members,
        torch.zeros_like(members),
        0,
    )
    weights = [
        piece.expand(len(members), *piece.shape) for _, piece in Layout.of(model).pieces(w_P)
    ]
    total_KP, norm_KI = _sum_clipped(
        _choose_summer(model, path), weights, patients, step, task, torch.ones_like
    )

    return total_KP.double(), norm_KI


def train(
    model: nn.Module,
    start_KP: Tensor,
    patients: Patients,
    plan: LocalPlan,
    guarantee: Guarantee,
    names: Sequence[str],
    key_K: Tensor,
    correction: Correction = Correction(),  # noqa: B008 (frozen)
    average: float = 0.0,
    path: Path = "auto",
) -> LocalResult:
    """Train each client by DP-SGD: every step's sum is noised on the grid before it moves a weight.

    Whatever is done with noised sums costs nothing more: corrections, momentum, averaging the last
    share `average` of the iterates. Losses are not told. Guarantee: that of `guarantee`, for each
    client by itself (Abadi et al. 2016).

    Args:
        model: any module; its own weights may be overwritten.
        start_KP: where each client starts.
        patients: the clients' patients and their records, end to end.
        plan: optimiser and rate; the steps are those of `guarantee`.
        guarantee: steps, draws, clip and noise, by client.
        names: the clients', as `guarantee.releases` has them.
        key_K: the clients' streams for this round, int64: what is dropped; coins and noise only in
        a simulation.
        correction: what the algorithm adds to every noised gradient.
        average: the share of the last iterates whose mean is returned, 0 to 1; 0: the last one.
        path: how gradients are taken; "auto" takes `rules` where every layer has one, else `func`.
    """
    chosen = _resolve_path(model, path)
    layout = Layout.of(model)
    random = _needs_streams(model, chosen)
    steps_K = torch.tensor([guarantee.releases[name].steps for name in names])
    factor = clip_factor(guarantee.clipping, guarantee.clip)

    def worker() -> Callable[[Tensor], Tensor]:
        summed = _choose_summer(model, chosen)
        # a cipher for each thread
        draw = _make_draw(guarantee, key_K)
        noise = _make_noise(guarantee, names, key_K)

        def run(members: Tensor) -> Tensor:
            part = patients.of_clients(members)
            steps = int(steps_K[members[0]])
            releases = [guarantee.releases[names[k]] for k in members.tolist()]
            scale_A = [guarantee.clip / r.expected for r in releases]
            scale_A1 = torch.tensor(scale_A, dtype=torch.float64)[:, None]
            # params are views of it
            theta_AP = start_KP[members].clone(memory_format=torch.contiguous_format)
            params = [piece for _, piece in layout.pieces(theta_AP)]
            shift = None if correction.shift_KP is None else correction.shift_KP[members]
            whole = Layout({"all": (theta_AP.shape[1],)})
            descent = Descent([theta_AP], plan, Correction(correction.mu, shift), whole)
            tail = torch.zeros_like(theta_AP)
            kept = max(1, round(average * steps))
            for t in range(steps):
                step = _lay_out_step(part, releases, draw, members, key_K[members], t, random)
                total_AP, _ = _sum_clipped(summed, params, part, step, plan.task, factor)
                noised_AP = noise(total_AP, members, t)
                descent.step([noised_AP.mul_(scale_A1.to(noised_AP.dtype)).to(start_KP.dtype)])
                if kept > 1 and t >= steps - kept:
                    tail.add_(theta_AP, alpha=1 / kept)
            return tail if kept > 1 else theta_AP

        return run

    model.train()
    chunks = _chunks(patients, start_KP.shape[1], guarantee, names)
    theta_KP = torch.empty_like(start_KP, memory_format=torch.contiguous_format)
    for members, theta_AP in zip(
        chunks, on_threads(chunks, worker, alone=chosen != "rules"), strict=True
    ):
        theta_KP[members] = theta_AP
    return LocalResult(
        theta_KP, torch.full((len(patients),), float("nan"), dtype=torch.float64), steps_K
    )


def _needs_streams(model: nn.Module, path: Path) -> bool:
    """Say whether records need streams: for dropout layers, and for whatever else a module called
    by the loop draws.
    """
    return path == "loop" or any(isinstance(layer, Dropout) for layer in model.modules())


def _resolve_path(model: nn.Module, path: Path) -> Path:
    if path != "auto":
        return path
    return "rules" if has_rules(model) else "func"


# Who takes part in a step -------------------------------------------------------------------------

_Draw = Callable[[Tensor, int, int], Tensor]
"""(members, step, width) -> uniform numbers [A, width]: each patient's secret coin."""


def _make_draw(guarantee: Guarantee, key_K: Tensor) -> _Draw:
    """Sampling that amplifies must be secret: the coins come from the operating system, not from
    the study's seed.
    """
    if guarantee.simulation_only:
        return lambda members, t, width: streams.uniform(
            streams.subkey(streams.subkey(key_K[members], t), 1), width
        )
    entropy = Entropy()
    return lambda members, t, width: torch.from_numpy(
        entropy.uniform(len(members) * width).reshape(len(members), width)
    )


def _lay_out_step(
    patients: Patients,
    releases: Sequence[Release],
    draw: _Draw,
    members: Tensor,
    key_A: Tensor,
    t: int,
    random: bool = True,
) -> Step:
    """Lay out a step: all patients, or a Poisson draw, in I slots of R records; a slot left over
    repeats the last.

    Which units are dropped for a patient is a function of the patient and the step, not of the slot
    it lies in; where nothing is dropped (not `random`), no streams are made.
    """
    R = patients.records
    size_A1 = patients.size_K[:, None]
    wide = max(1, int(patients.size_K.max()))
    place_AI = torch.arange(wide).expand(len(members), -1)
    there_AI = place_AI < size_A1
    probability_A1 = torch.tensor([r.probability for r in releases], dtype=torch.float64)[:, None]
    if bool((probability_A1 < 1).any()):
        coin_AI = torch.where(there_AI, draw(members, t, wide), 2)
        rank_AI = torch.where(coin_AI < probability_A1, coin_AI, 2)
        taken_A1 = (rank_AI < 2).sum(1, keepdim=True)
        cap_A1 = torch.tensor([r.cap or wide for r in releases])[:, None]
        taken_A1 = torch.minimum(taken_A1, cap_A1)  # the lowest coins stay: a random subset
        width = max(1, int(taken_A1.max()))
        place_AI = rank_AI.argsort(1)[:, :width]
        there_AI = torch.arange(width) < taken_A1
    empty = _width(place_AI.shape[1], R, releases) - place_AI.shape[1]
    place_AI = F.pad(place_AI, (0, empty), value=wide)
    there_AI = F.pad(there_AI, (0, empty))
    patient_AI = patients.offset_K[:, None] + torch.minimum(place_AI, (size_A1 - 1).clamp(min=0))
    patient_AI = patient_AI.clamp(max=len(patients.first_I) - 1)
    first_AI = patients.first_I[patient_AI]
    key_AI = streams.subkey(patients.key_I[patient_AI] ^ key_A[:, None], t) if random else first_AI
    # as record 0 of several: one patient with more records must not change the others' streams
    if R == 1:
        return Step(first_AI, there_AI, streams.subkey(key_AI, 0) if random else key_AI, 1)
    count_AI1 = patients.count_I[patient_AI][..., None]
    r = torch.arange(R)
    row_AIR = first_AI[..., None] + torch.minimum(r, count_AI1 - 1)
    valid_AIR = there_AI[..., None] & (r < count_AI1)
    key_AIR = torch.stack([streams.subkey(key_AI, n) for n in range(R)], 2)
    return Step(row_AIR.flatten(1), valid_AIR.flatten(1), key_AIR.flatten(1), R)


def _width(patients: int, records: int, releases: Sequence[Release]) -> int:
    """Return for how many patients there are slots:
    at least _FEWEST slots, in multiples, but for lone devices.
    """
    if patients * records == 1 and all(release.size == 1 for release in releases):
        return 1
    slots = max(_FEWEST, patients * records)
    step = _MULTIPLE // math.gcd(_MULTIPLE, records)
    return -(-slots // (records * step)) * step


def _chunks(
    patients: Patients, parameters: int, guarantee: Guarantee, names: Sequence[str]
) -> list[Tensor]:
    """Cut the clients into chunks that fit the cache,
    clients of one number of steps and like sizes together.

    Clients that declare one patient and have one record stay among themselves: see `_width`.
    """
    steps = [guarantee.releases[name].steps for name in names]
    sizes = patients.size_K.tolist()
    slots = (patients.size_K * patients.records_K).tolist()
    lone = [guarantee.releases[name].size == 1 and slots[k] <= 1 for k, name in enumerate(names)]
    kinds = list(zip(steps, lone, strict=True))
    order = sorted(range(len(names)), key=lambda k: (kinds[k], -sizes[k]))
    row = int(np.prod(patients.x_NF.shape[1:])) * patients.records
    chunks: list[list[int]] = []

    for k in order:
        widest = max(1, sizes[chunks[-1][0]]) if chunks else 0
        each = 4 * (3 * parameters + 4 * row * widest)
        full = (
            not chunks
            or kinds[chunks[-1][0]] != kinds[k]
            or (len(chunks[-1]) + 1) * each > _CHUNK_BYTES
        )
        if full:
            chunks.append([])
        chunks[-1].append(k)

    return [torch.tensor(chunk) for chunk in chunks]


# Clipped sums -------------------------------------------------------------------------------------

_Summed = Callable[[list[Tensor], Tensor, Tensor, Step, Task, Factor], tuple[Tensor, Tensor]]
"""(weights, x [A, B, ...], y [A, B], step, task, factor) -> sums [A, P] and norms [A, I]."""


def _choose_summer(model: nn.Module, path: Path) -> _Summed:
    match path:
        case "rules":
            return _ByRules(model)
        case "func":
            return _ByFunc(model)
    return _ByLoop(model)


def _sum_clipped(
    summed: _Summed,
    weights: list[Tensor],
    patients: Patients,
    step: Step,
    task: Task,
    factor: Factor,
) -> tuple[Tensor, Tensor]:
    """Return the clipped sums, and each slot's norm; a patient whose gradient is not finite adds
    nothing to them.
    """
    rows = step.row_AB.reshape(-1)
    x = patients.x_NF.index_select(0, rows).view(*step.row_AB.shape, *patients.x_NF.shape[1:])
    y = patients.y_N.index_select(0, rows).view(step.row_AB.shape)
    return summed(weights, x, y, step, task, factor)


class _ByRules:
    """Norms and one weighted product a layer."""

    def __init__(self, model: nn.Module) -> None:
        self.ruled = RuledModel(model)
        self.layout = Layout.of(model)
        self.total_AP = torch.empty(0)
        self.targets = list[Tensor]()

    def __call__(
        self, weights: list[Tensor], x: Tensor, y: Tensor, step: Step, task: Task, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        z = self.ruled.forward(x, weights, step.key_AB)
        dz = torch.where(step.valid_AB[..., None], loss_gradient(task, z, y), 0)
        narrow = x.shape[1] <= NARROW and step.records == 1 and self.ruled.one_slot and x.dim() == 3
        exact = x.dtype if narrow else torch.float64  # what float32 rounds away is counted: SLACK
        if len(self.total_AP) != len(x) or self.total_AP.dtype != exact:
            self.total_AP = torch.empty(len(x), self.layout.size, dtype=exact)
            self.targets = [piece for _, piece in self.layout.pieces(self.total_AP)]
        norm_AI = self.ruled.clipped_backward(dz, weights, self.targets, step.records, factor)
        return self.total_AP, norm_AI


class _ByFunc:
    """torch.func's gradient of each record, in blocks of one size, one client after another."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = list(Layout.of(model).shapes)
        self.dropouts = dropout_keys(model)
        self.fixed = select_fixed(model)

    def __call__(
        self, weights: list[Tensor], x: Tensor, y: Tensor, step: Step, task: Task, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        Named = dict[str, Tensor]

        def loss(named: Named, fixed: Named, row: Tensor, target: Tensor, key: Tensor) -> Tensor:
            state = {**named, **fixed, **dict.fromkeys(self.dropouts, key)}
            return sample_loss(task, functional_call(self.model, state, (row[None],))[0], target)

        gradient = vmap(grad(loss), randomness="error")
        block = 1 if x.shape[1] == 1 else _BLOCK

        def for_each_record(named: Named) -> Named:
            """Repeat weights: products of one row,
            whose bits do not depend on its place in the block.
            """
            return {name: w.expand(block, *w.shape) for name, w in named.items()}

        def records(a: int, slots: Tensor) -> Tensor:
            named = for_each_record(
                {name: w[a] for name, w in zip(self.names, weights, strict=True)}
            )
            fixed = for_each_record(self.fixed)
            filled = F.pad(slots, (0, -len(slots) % block), value=int(slots[0]))
            found = []
            for own in torch.split(filled, block):
                parts = gradient(named, fixed, x[a, own], y[a, own], step.key_AB[a, own])
                found.append(torch.cat([g.flatten(1) for g in parts.values()], 1))
            return torch.cat(found)[: len(slots)]

        return _sum_patients(records, weights, step, factor, max(1, block // step.records))


class _ByLoop:
    """Autograd on one record at a time, the module being called as it is:
    hooks, random numbers and all.

    What the module draws comes from the record's stream.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(
        self, weights: list[Tensor], x: Tensor, y: Tensor, step: Step, task: Task, factor: Factor
    ) -> tuple[Tensor, Tensor]:
        parameters = list(select_trained(self.model).values())

        def gradient(a: int, slot: int) -> Tensor:
            with drawing(self.model, step.key_AB[a, slot]):
                z_1C = self.model(x[a, slot : slot + 1].clone())
            for parameter in parameters:
                parameter.grad = None
            torch.autograd.backward(sample_loss(task, z_1C, y[a, slot : slot + 1]).sum())
            return torch.cat(
                [
                    (torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
                    for p in parameters
                ]
            )

        def records(a: int, slots: Tensor) -> Tensor:
            with torch.no_grad():
                for parameter, w in zip(parameters, weights, strict=True):
                    parameter.copy_(w[a])
            return torch.stack([gradient(a, slot) for slot in slots.tolist()])

        return _sum_patients(records, weights, step, factor, 1)


def _sum_patients(
    records: Callable[[int, Tensor], Tensor],
    weights: list[Tensor],
    step: Step,
    factor: Factor,
    together: int,
) -> tuple[Tensor, Tensor]:
    """Sum records' gradients to patients', hold these to the norm, sum them: in float64, so many
    patients `together`.

    `records` returns the gradients [S, P] of some filled slots of client a.
    """
    (A, B) = step.row_AB.shape
    R = step.records
    total_AP = torch.zeros(A, sum(w[0].numel() for w in weights), dtype=torch.float64)
    norm_AI = torch.zeros(A, B // R, dtype=torch.float64)

    for a in range(A):
        for first in range(0, B, together * R):
            slots = step.valid_AB[a, first : first + together * R].nonzero()[:, 0] + first
            if len(slots):
                g_SP = records(a, slots).double()
                own_S = slots // R
                total_AP[a] += _clip_each(g_SP, own_S, factor, norm_AI[a])

    return total_AP, norm_AI


def _clip_each(g_SP: Tensor, own_S: Tensor, factor: Factor, norm_I: Tensor) -> Tensor:
    """Return the sum [P] of some patients' clipped gradients; write their norms into `norm_I`."""
    mine, place_S = torch.unique(own_S, return_inverse=True)
    g_JP = torch.zeros(len(mine), g_SP.shape[1], dtype=torch.float64).index_add_(0, place_S, g_SP)
    mass_J = torch.zeros(len(mine), dtype=torch.float64).index_add_(0, place_S, g_SP.norm(dim=1))
    norm_J = torch.maximum(g_JP.norm(dim=1), CANCELLATION * mass_J)

    gone_J = ~(norm_J <= LARGEST)
    norm_J = torch.where(gone_J, torch.inf, norm_J)
    norm_I[mine] = norm_J
    return torch.where(gone_J, 0, factor(norm_J)) @ torch.where(gone_J[:, None], 0, g_JP)


# Noise at the site --------------------------------------------------------------------------------


def _make_noise(
    guarantee: Guarantee, names: Sequence[str], key_K: Tensor
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return what adds noise to clipped sums [A, P] in units of C: on the grid, or as seeded floats
    in a simulation.
    """
    sigma_K = [guarantee.sigma_units(name) for name in names]
    if guarantee.simulation_only:

        def add_seeded(total_AP: Tensor, members: Tensor, t: int) -> Tensor:
            key_A = streams.subkey(streams.subkey(key_K[members], t), 2)
            sigma_A1 = torch.tensor([sigma_K[k] for k in members.tolist()], dtype=torch.float64)[
                :, None
            ]
            return total_AP + GRID * sigma_A1 * streams.normal(key_A, total_AP.shape[1])

        return add_seeded
    entropy = Entropy()

    def add_drawn(total_AP: Tensor, members: Tensor, t: int) -> Tensor:
        noised_AP = torch.empty(total_AP.shape, dtype=torch.float64)
        first = 0
        for sigma, alike in groupby(sigma_K[k] for k in members.tolist()):
            rows = slice(first, first := first + len(list(alike)))
            _release(
                total_AP[rows].reshape(-1),
                discrete_gaussian(sigma),
                entropy,
                out=noised_AP[rows].view(-1),
            )
        return noised_AP

    return add_drawn


def _release(total_N: Tensor, noise: DiscreteGaussian, entropy: Entropy, out: Tensor) -> None:
    """Write sums into `out` [N] (float64), rounded to the grid and noised;
    so many at a time as the cache holds.
    """
    pieces = zip(torch.split(total_N, _RELEASED), torch.split(out, _RELEASED), strict=True)
    for total, released in pieces:
        steps = round_to_grid(total, GRID) + torch.from_numpy(noise.sample(len(total), entropy))
        torch.mul(steps.double(), GRID, out=released)
