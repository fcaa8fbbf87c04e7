"""Local training of a whole cohort as one stack. A hospital trains as a stack of one.

Three paths, one meaning. `rules` multiplies the stack layer by layer (layers.py); `func` maps
torch.func's gradient over the clients; `loop` is one client after another by autograd and
torch.optim, serves any module, and is the reference that probe.py and tests hold the others to.

A step of client k on its batch:  g = mean gradient + decay w + mu (w - w_server) + shift_k, then
SGD or Adam.

K clients, A of them still active in a step, T steps, B batch, P parameters.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F  # noqa: N812

from medfed.core import streams
from medfed.core.flat import Layout, fill, select_trained, vector
from medfed.core.types import Task
from medfed.data.federated import Stack
from medfed.learn.layers import RuledModel, has_rules
from medfed.learn.zoo import Dropout, dropout_keys

Path = Literal["auto", "rules", "func", "loop"]
_Piece = TypeVar("_Piece")
_Done = TypeVar("_Done")

# what a chunk of clients touches in a step: about what the caches hold
_RULES_CHUNK_BYTES = 8 << 20
_FUNC_CHUNK_BYTES = 32 << 20  # torch.func pays per call, so it wants longer stacks


@dataclass(frozen=True)
class LocalPlan:
    """How a client trains; the same for all clients of a round."""

    task: Task
    epochs: int = 1
    steps: int = 0  # > 0: that many steps instead of epochs
    batch_size: int = 32  # 0: all rows of the client
    optimizer: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = 0.1
    momentum: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    def steps_K(self, size_K: Tensor) -> Tensor:
        """Return how many steps clients of `size_K` rows take [K]; one without rows takes none."""
        steps = self.per_epoch_K(size_K) * self.epochs
        if self.steps:
            steps = torch.full_like(size_K, self.steps)
        return torch.where(size_K > 0, steps, 0)

    def per_epoch_K(self, size_K: Tensor) -> Tensor:
        """Return how many batches an epoch of `size_K` rows has [K]; the last one may be short."""
        return torch.ceil(size_K / self.width(size_K)).long().clamp(min=1)

    def width(self, size_K: Tensor) -> int:
        """Return B, the padded batch, of clients of `size_K` rows."""
        longest = max(1, int(size_K.max()))
        if self.batch_size:
            return min(self.batch_size, longest)
        return longest


@dataclass(frozen=True)
class Correction:
    """What an algorithm adds to every local gradient: mu (w - anchor) + shift; the anchor is the
    start of the round.
    """

    mu: float = 0.0
    shift_KP: Tensor | None = None


@dataclass(frozen=True)
class LocalResult:
    """What local training leaves: weights [K, P],
    mean loss over all samples seen [K], steps taken [K].
    """

    theta_KP: Tensor
    loss_K: Tensor
    steps_K: Tensor


@dataclass(frozen=True)
class _Chunk:
    """Some clients of a cohort, trained together because what they touch fits the cache."""

    layout: Layout
    start_KP: Tensor
    data: Stack
    plan: LocalPlan
    key_K: Tensor
    correction: Correction


@dataclass(frozen=True)
class Batches:
    """Which rows each client takes in each step; clients are sorted, the active ones first."""

    row_TKB: Tensor
    valid_TKB: Tensor | None  # None: no batch is short
    size_TK: Tensor
    active_T: list[int]


def train(
    model: nn.Module,
    start_KP: Tensor,
    data: Stack,
    plan: LocalPlan,
    key_K: Tensor,
    correction: Correction = Correction(),
    path: Path = "auto",
) -> LocalResult:
    """Train each client from its row of `start_KP` on its own rows of `data`.

    A client's result does not depend on who else is in the stack. Paths agree within rounding (1e-4
    relative in float32).

    Args:
        model: any module; its own weights may be overwritten.
        start_KP: where each client starts.
        data: the clients' rows, end to end.
        plan: steps, batches, optimiser and rate, the same for all clients.
        key_K: the clients' streams for this round, int64: they order the batches and drop units.
        correction: what the algorithm adds to every gradient.
        path: how gradients are taken; "auto" takes `rules` where every layer has one, else `func`.
    """
    if path == "auto":
        path = "rules" if has_rules(model) else "func"
    theta_KP = start_KP.clone(memory_format=torch.contiguous_format)
    layout = Layout.of(model)
    loss_K = torch.full((len(data),), float("nan"), dtype=torch.float64)
    steps_K = plan.steps_K(data.size_K)
    model.train()
    places = list(_chunks(steps_K, start_KP, data, plan, path))
    chunks = []

    for members in places:
        rows = Stack(data.x_NF, data.y_N, data.offset_K[members], data.size_K[members])
        shift_KP = None if correction.shift_KP is None else correction.shift_KP[members]
        piece = Correction(correction.mu, shift_KP)
        chunks.append(_Chunk(layout, start_KP[members], rows, plan, key_K[members], piece))

    for members, (theta, loss) in zip(places, _run(model, path, chunks), strict=True):
        theta_KP[members] = theta
        loss_K[members] = loss

    return LocalResult(theta_KP, loss_K, steps_K)


def outputs(model: nn.Module, theta_P: Tensor, x_NF: Tensor, block: int = 8192) -> Tensor:
    """Return the model's outputs [N, C] on rows x_NF in evaluation mode, with weights theta_P;
    `block` rows at once.
    """
    fill(model, theta_P).eval()
    with torch.no_grad():  # clones: a module may write into its input
        return torch.cat([_wide(model(x.clone())) for x in torch.split(x_NF, block)])


def batches(data: Stack, plan: LocalPlan, key_K: Tensor) -> Batches:
    """Lay out a chunk's steps: every epoch a fresh shuffle of the client's rows, in batches of B.

    A slot without a row (a short last batch) repeats the client's own last row and is marked not
    valid: what another client or padding holds can never reach it.

    Args:
        data: the clients' rows, end to end.
        plan: batch, epochs and steps.
        key_K: the clients' streams for this round, int64: they shuffle.
    """
    size_K = data.size_K
    steps_K = plan.steps_K(size_K)
    per_epoch_K = plan.per_epoch_K(size_K)
    width = plan.width(size_K)

    # In each epoch every client's rows in an order of its own
    T = int(steps_K.max())
    epochs = -(-T // int(per_epoch_K.min()))
    key_E = streams.subkeys(key_K, epochs).flatten()  # a client's epochs after one another
    order_KES = streams.shuffles(key_E, size_K.repeat_interleave(epochs))
    order_KES = order_KES.view(len(size_K), epochs, -1)

    # The rows of each step: a batch of the epoch's order
    t_T1 = torch.arange(T)[:, None]
    epoch_TK = t_T1 // per_epoch_K
    batch_TK = t_T1 % per_epoch_K
    place_TKB = (batch_TK * width)[..., None] + torch.arange(width)
    clamped_TKB = torch.minimum(place_TKB, (size_K - 1)[:, None])
    flat_TKB = epoch_TK[..., None] * order_KES.shape[2] + clamped_TKB
    row_TKB = (
        order_KES.flatten(1)
        .gather(1, flat_TKB.transpose(0, 1).flatten(1))
        .view(len(size_K), T, width)
    )
    return Batches(
        row_TKB=(row_TKB + data.offset_K[:, None, None]).transpose(0, 1).contiguous(),
        valid_TKB=None if bool((size_K % width == 0).all()) else place_TKB < size_K[:, None],
        size_TK=(size_K - batch_TK * width).clamp(max=width),
        active_T=[int(n) for n in (steps_K[None, :] > t_T1).sum(1)],
    )


CURVATURE: Mapping[Task, float] = {"binary": 0.25, "multiclass": 0.5, "regression": 2.0}
"""The largest second derivative of a sample's loss in the model's output."""


def sample_loss(task: Task, z: Tensor, y: Tensor) -> Tensor:
    """Return the loss of each sample of a `task`: outputs z [..., C] against targets y [...]."""
    z = _wide(z)
    match task:
        case "binary":
            return F.binary_cross_entropy_with_logits(z.squeeze(-1), y, reduction="none")
        case "multiclass":
            return -z.log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
        case "regression":
            return (z.squeeze(-1) - y).square()


def _wide(z: Tensor) -> Tensor:
    """Return outputs as float32 where a module computes in half precision."""
    return z.float() if z.dtype in (torch.bfloat16, torch.float16) else z


@contextmanager
def drawing(model: nn.Module, key: Tensor) -> Iterator[None]:
    """Have what the model draws, by its dropout layers or by torch's generator,
    follow from the stream `key`.
    """
    for layer in model.modules():
        if isinstance(layer, Dropout):
            layer.key.copy_(key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(key) % (1 << 63))
        yield


def loss_gradient(task: Task, z: Tensor, y: Tensor) -> Tensor:
    """Return d(sample loss)/dz of a `task`, shaped like z [..., C], for targets y [...].

    z stays, as the last layer's rule may still need it.
    """
    match task:
        case "binary":
            return torch.sigmoid(z).sub_(y[..., None])
        case "multiclass":
            p = z.softmax(-1)
            return p.scatter_add_(-1, y[..., None], -torch.ones_like(y, dtype=p.dtype)[..., None])
        case "regression":
            return (z - y[..., None]).mul_(2)


def _runner(model: nn.Module, path: Path) -> Callable[[_Chunk], tuple[Tensor, Tensor]]:
    """Return what trains a chunk: weights [K, P] and mean losses [K]."""
    if path == "rules":
        return partial(_by_rules, RuledModel(model))
    return partial(_by_func if path == "func" else _by_loop, model)


def _run(model: nn.Module, path: Path, chunks: Sequence[_Chunk]) -> list[tuple[Tensor, Tensor]]:
    """Train every chunk: by rules each on one thread, as many at a time as torch has threads."""
    most = max((c.start_KP.numel() * c.plan.width(c.data.size_K) for c in chunks), default=0)
    return on_threads(chunks, partial(_runner, model, path), alone=path != "rules", products=most)


def on_threads(
    chunks: Sequence[_Piece],
    maker: Callable[[], Callable[[_Piece], _Done]],
    alone: bool = False,
    products: float = math.inf,
) -> list[_Done]:
    """Do every chunk's work on one thread each; return what came of them, in their order.

    Args:
        chunks: what is to be done.
        maker: makes a worker, once for each thread.
        alone: do all on this thread.
        products: products of two numbers that one step takes.

    Threads that each walk a chunk of their own do not wait for one another at every product, as
    threads inside a product do; on a busy machine that is the difference between slower and a
    hundred times slower. So one chunk whose steps have few `products` (of two numbers) has one
    thread, too.
    """
    threads = torch.get_num_threads()
    if alone or threads == 1 or len(chunks) < 2:
        torch.set_num_threads(1 if products < _FEW_PRODUCTS else threads)
        try:
            work = maker()
            return [work(chunk) for chunk in chunks]
        finally:
            torch.set_num_threads(threads)
    mine = threading.local()

    def enter() -> None:
        torch.set_num_threads(1)  # of this thread, and of threads to come
        mine.work = maker()

    try:
        with ThreadPoolExecutor(min(threads, len(chunks)), initializer=enter) as pool:
            return list(pool.map(lambda chunk: mine.work(chunk), chunks))
    finally:
        torch.set_num_threads(threads)


_FEW_PRODUCTS = 1 << 22
"""Products of a step that one thread does in less than a millisecond:
a second one gains less than it may lose.
"""


def _chunks(
    steps_K: Tensor, start_KP: Tensor, data: Stack, plan: LocalPlan, path: Path
) -> Iterator[Tensor | slice]:
    """Yield chunks of clients that still have steps to take,
    longest first, so that those active are a prefix.
    """
    order = torch.argsort(steps_K, descending=True, stable=True)
    order = order[: int((steps_K > 0).sum())]
    if len(order):
        row = plan.width(data.size_K) * prod(data.x_NF.shape[1:])
        bytes_each = start_KP.element_size() * (2 * start_KP.shape[1] + 4 * row)
        budget = _FUNC_CHUNK_BYTES if path == "func" else _RULES_CHUNK_BYTES
        width = max(1, budget // bytes_each)
        if torch.equal(order, torch.arange(len(order))):  # nothing to sort: views instead of copies
            yield from (
                slice(first, min(first + width, len(order)))
                for first in range(0, len(order), width)
            )
        else:
            yield from torch.split(order, width)


class Descent:
    """The optimiser over a stack of parameter tensors: SGD, SGD with momentum, or Adam (L2 decay,
    as torch.optim).
    """

    def __init__(
        self, params: list[Tensor], plan: LocalPlan, correction: Correction, layout: Layout
    ) -> None:
        self.params = params
        self.plan = plan
        self.pull = plan.weight_decay + correction.mu
        self.constants = self._constants(correction, layout)
        moments = 0
        if plan.optimizer == "adam":
            moments = 2
        elif plan.momentum:
            moments = 1
        self.moments = [[torch.zeros_like(p) for p in params] for _ in range(moments)]
        self.step_number = 0

    @property
    def fusable(self) -> bool:
        """Whether a step is linear in the gradient alone,
        so that a rule can write it straight into the weights.
        """
        return not self.moments

    @property
    def fused(self) -> tuple[float, float]:
        """The (beta, alpha) of w <- beta w + alpha g that a plain SGD step is."""
        return 1 - self.plan.learning_rate * self.pull, -self.plan.learning_rate

    def after_fused(self, active: int) -> None:
        """Add the part of a fused step that no gradient brings."""
        for w, constant in zip(self.params, self.constants or (), strict=False):
            w[:active].add_(constant[:active], alpha=-self.plan.learning_rate)

    def step(self, gradients: Sequence[Tensor]) -> None:
        """Take one step of the first A clients, by gradients [A, *shape]; overwrites these."""
        self.step_number += 1
        for index, g in enumerate(gradients):
            w = self.params[index][: len(g)]
            if self.pull or self.constants:
                g.add_(w, alpha=self.pull)
            if self.constants:
                g.add_(self.constants[index][: len(g)])
            self._apply(index, w, g)

    def _apply(self, index: int, w: Tensor, g: Tensor) -> None:
        plan = self.plan
        moments = [m[index][: len(g)] for m in self.moments]
        if plan.optimizer == "adam":
            first, second = moments
            first.lerp_(g, 1 - plan.beta1)
            second.mul_(plan.beta2).addcmul_(g, g, value=1 - plan.beta2)
            scale = (second / (1 - plan.beta2**self.step_number)).sqrt_().add_(plan.epsilon)
            w.addcdiv_(first, scale, value=-plan.learning_rate / (1 - plan.beta1**self.step_number))
        else:
            if moments:
                g = moments[0].mul_(plan.momentum).add_(g)
            w.sub_(g, alpha=plan.learning_rate)

    def _constants(self, correction: Correction, layout: Layout) -> list[Tensor] | None:
        """shift - mu anchor, per parameter; None where an algorithm adds nothing."""
        parts: list[list[Tensor]] = []
        if correction.mu:
            parts.append([p * -correction.mu for p in self.params])
        if correction.shift_KP is not None:
            parts.append([piece for _, piece in layout.pieces(correction.shift_KP)])
        if not parts:
            return None
        return [torch.stack(terms).sum(0) for terms in zip(*parts, strict=True)]


def _by_rules(ruled: RuledModel, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    data = chunk.data
    plan = chunk.plan
    key_K = chunk.key_K
    laid = batches(data, plan, key_K)
    params = [
        piece.clone(memory_format=torch.contiguous_format)
        for _, piece in chunk.layout.pieces(chunk.start_KP)
    ]
    descent = Descent(params, chunk.plan, chunk.correction, chunk.layout)
    gradients = [] if descent.fusable else [torch.empty_like(p) for p in params]
    tally = _Loss(plan.task, len(data))

    for t, active in enumerate(laid.active_T):
        x, y, valid, size = _take(data, laid, t, active)
        weights = [p[:active] for p in params]
        z = ruled.forward(x, weights, streams.subkey(key_K[:active], t) if ruled.random else key_K)
        tally.add(z, y, valid, size)
        dz = loss_gradient(plan.task, z, y).div_(size[:, None, None])
        if valid is not None:
            dz = torch.where(valid[..., None], dz, 0)
        if descent.fusable:
            ruled.backward(dz, weights, weights, *descent.fused)
            descent.after_fused(active)
        else:
            targets = [g[:active] for g in gradients]
            ruled.backward(dz, weights, targets, beta=0, alpha=1)
            descent.step(targets)

    return torch.cat([p.flatten(1) for p in params], 1), tally.mean()


def _by_func(model: nn.Module, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    data = chunk.data
    plan = chunk.plan
    key_K = chunk.key_K
    layout = chunk.layout
    laid = batches(data, plan, key_K)
    params = [
        piece.clone(memory_format=torch.contiguous_format)
        for _, piece in layout.pieces(chunk.start_KP)
    ]
    descent = Descent(params, chunk.plan, chunk.correction, chunk.layout)
    dropouts = dropout_keys(model)
    tally = _Loss(plan.task, len(data))

    def objective(
        weights: dict[str, Tensor], key: Tensor, x: Tensor, y: Tensor, valid: Tensor, size: Tensor
    ) -> tuple[Tensor, Tensor]:
        z = functional_call(model, {**weights, **dict.fromkeys(dropouts, key)}, (x,))
        loss = torch.where(valid, sample_loss(plan.task, z, y), 0).sum() / size
        return loss, z

    gradient = vmap(grad(objective, has_aux=True), randomness="error")
    for t, active in enumerate(laid.active_T):
        x, y, valid, size = _take(data, laid, t, active)
        seen = torch.ones(y.shape, dtype=torch.bool) if valid is None else valid
        weights = {name: p[:active] for name, p in zip(layout.shapes, params, strict=True)}
        gradients, z = gradient(weights, streams.subkey(key_K[:active], t), x, y, seen, size)
        tally.add(z, y, valid, size)
        descent.step(list(gradients.values()))
    return torch.cat([p.flatten(1) for p in params], 1), tally.mean()


def _by_loop(model: nn.Module, chunk: _Chunk) -> tuple[Tensor, Tensor]:
    data = chunk.data
    correction = chunk.correction
    thetas = []
    losses = []

    for k in range(len(data)):
        one = Stack(data.x_NF, data.y_N, data.offset_K[k : k + 1], data.size_K[k : k + 1])
        shift_P = None if correction.shift_KP is None else correction.shift_KP[k]
        theta_P, loss = _train_one(
            model,
            chunk.start_KP[k],
            one,
            chunk.plan,
            chunk.key_K[k : k + 1],
            correction.mu,
            shift_P,
        )
        thetas.append(theta_P)
        losses.append(loss)

    return torch.stack(thetas), torch.tensor(losses, dtype=torch.float64)


def _train_one(
    model: nn.Module,
    start_P: Tensor,
    data: Stack,
    plan: LocalPlan,
    key_1: Tensor,
    mu: float,
    shift_P: Tensor | None,
) -> tuple[Tensor, float]:
    """One client by autograd and torch.optim, the way a textbook writes it: the reference."""
    fill(model, start_P).train()
    optimizer = _torch_optimizer(model, plan)
    pieces = dict(Layout.of(model).pieces(shift_P)) if shift_P is not None else {}
    anchors = dict(Layout.of(model).pieces(start_P))
    total = 0.0
    seen = 0

    laid = batches(data, plan, key_1)
    for t in range(len(laid.active_T)):
        rows = laid.row_TKB[t, 0, : int(laid.size_TK[t, 0])]
        with drawing(model, streams.subkey(key_1, t)[0]):
            losses = sample_loss(plan.task, model(data.x_NF[rows]), data.y_N[rows])
        optimizer.zero_grad()
        torch.autograd.backward(losses.mean())
        for name, w in select_trained(model).items():
            if w.grad is None:  # the forward pass did not use it
                w.grad = torch.zeros_like(w)
            w.grad += mu * (w.detach() - anchors[name])
            if shift_P is not None:
                w.grad += pieces[name]
        optimizer.step()
        total = total + float(losses.detach().sum())
        seen = seen + len(rows)

    return vector(model), total / seen


def _torch_optimizer(model: nn.Module, plan: LocalPlan) -> torch.optim.Optimizer:
    lr = plan.learning_rate
    decay = plan.weight_decay
    if plan.optimizer == "adam":
        betas = (plan.beta1, plan.beta2)
        return torch.optim.Adam(
            model.parameters(), lr=lr, betas=betas, eps=plan.epsilon, weight_decay=decay
        )
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=plan.momentum, weight_decay=decay)


def _take(
    data: Stack, laid: Batches, t: int, active: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return step t's x [A, B, ...], y [A, B], valid slots [A, B] and batch sizes [A]."""
    row_AB = laid.row_TKB[t, :active]
    rows = row_AB.reshape(-1)
    x = data.x_NF.index_select(0, rows).view(*row_AB.shape, *data.x_NF.shape[1:])
    y = data.y_N.index_select(0, rows).view(row_AB.shape)
    valid = None if laid.valid_TKB is None else laid.valid_TKB[t, :active]
    return x, y, valid, laid.size_TK[t, :active]


class _Loss:
    """The mean training loss of each client over all samples it has seen."""

    def __init__(self, task: Task, clients: int) -> None:
        self.task = task
        self.total_K = torch.zeros(clients, dtype=torch.float64)
        self.seen_K = torch.zeros(clients, dtype=torch.int64)

    def add(self, z: Tensor, y: Tensor, valid: Tensor | None, size: Tensor) -> None:
        loss_AB = sample_loss(self.task, z, y)
        if valid is not None:
            loss_AB = torch.where(valid, loss_AB, 0)
        self.total_K[: len(y)] += loss_AB.sum(1)
        self.seen_K[: len(y)] += size

    def mean(self) -> Tensor:
        return self.total_K / self.seen_K
