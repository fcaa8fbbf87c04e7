"""The algorithms' laws, through the real local training and the real wire, on problems whose
answers are known.

Most problems here are least squares with full batches: a client's local training is then an affine
map of the weights it starts from, so every algorithm's fixed point can be computed and compared
with the optimum.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medfed.core.checks import PlanError, StudyError
from medfed.core.flat import fill, vector
from medfed.core.types import Task
from medfed.data.encoding import Column, Encoding, Target
from medfed.data.federated import Rows, Stack
from medfed.learn import zoo
from medfed.learn.algorithms import ALGORITHMS, Memory, Server, control_average, local_work
from medfed.learn.local import train
from medfed.links.wire import PLAIN, Link, Remembered
from medfed.planning.objections import check
from medfed.planning.plan import Plan, make
from medfed.rounds.reference import SiteState, play
from medfed.study import Model, Study, Training

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Recorder(Link):
    """A link that changes nothing and keeps what passes: each client's row, and what they
    came to.
    """

    rows: list[Tensor] = field(default_factory=list)
    combined_M: Tensor = field(default_factory=lambda: torch.empty(0))

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        self.rows.append(message_KM[0])
        return message_KM, memory

    def server(self, mean_M: Tensor, round: int) -> Tensor:
        self.combined_M = mean_M
        return mean_M


@dataclass
class Federation:
    """Clients, a model, and what the server and the clients remember; `step` is the reference's
    round.
    """

    h: Training
    model: nn.Module
    data: Stack
    weights: Sequence[float]
    task: Task = "regression"

    def __post_init__(self) -> None:
        self.algorithm = ALGORITHMS[self.h.algorithm]
        self.server = self.algorithm.begin(vector(self.model), self.h)
        names = tuple(f"client {k}" for k in range(len(self.data)))
        rows = [self._rows(k) for k in range(len(self.data))]
        self.sites = {
            n: SiteState(one, self.algorithm.blank(self.server.w_P))
            for n, one in zip(names, rows, strict=True)
        }
        self.recorder = Recorder()
        parameters = len(self.server.w_P)

        self.plan = Plan(
            study=Study(training=self.h),
            encoding=Encoding((), Target("y", self.task)),
            sizes={
                name: {"train": weight} for name, weight in zip(names, self.weights, strict=True)
            },  # type: ignore[dict-item]
            participants=names,
            testers=(),
            parameters=parameters,
            message=self.algorithm.length(parameters),
            label_counts={},
            surveyed="",
            links=(*PLAIN, self.recorder),
            path=self.h.path,
        )

    def _rows(self, k: int) -> Rows:
        own = slice(int(self.data.offset_K[k]), int(self.data.offset_K[k] + self.data.size_K[k]))
        return Rows(self.data.x_NF[own], self.data.y_N[own], torch.arange(int(self.data.size_K[k])))

    @property
    def w(self) -> np.ndarray:
        return self.server.w_P.numpy()

    @property
    def row_KM(self) -> Tensor:
        return torch.stack(self.recorder.rows)

    @property
    def mean_M(self) -> Tensor:
        return self.recorder.combined_M.to(self.server.w_P.dtype)

    @property
    def memories(self) -> list[dict[str, Tensor]]:
        return [site.memory for site in self.sites.values()]

    def step(self, drawn: Sequence[int] | None = None) -> "Federation":
        """Run one round with the clients `drawn`, all if None."""
        self.recorder.rows.clear()
        names = [f"client {k}" for k in (range(len(self.data)) if drawn is None else drawn)]
        self.server = play(self.server, self.plan, self.model, self.sites, names)
        return self

    def run(self, rounds: int) -> "Federation":
        for _ in range(rounds):
            self.step()
        return self

    def messages(self, members: Sequence[int]) -> tuple[Tensor, Memory]:
        """Return what some clients would send and remember if they trained as one stack."""
        task = self.algorithm.task(self.server)
        memory = {
            name: torch.stack([self.memories[k][name] for k in members])
            for name in self.algorithm.kept
        }
        local = train(
            self.model,
            self.algorithm.starts_KP(task, memory, len(members)),
            Stack.of([self._rows(k) for k in members]),
            self.plan.local,
            self.plan.streams.key_K(
                "batches", self.server.round + 1, [f"client {k}" for k in members]
            ),
            self.algorithm.correct(task, memory, self.h),
            self.h.path,
        )
        return self.algorithm.message(task, memory, local, self.h)


def _of(
    tables: Sequence[tuple[np.ndarray, np.ndarray]], dtype: torch.dtype = torch.float64
) -> Stack:
    size_K = torch.tensor([len(y) for _, y in tables])
    x = np.concatenate([x for x, _ in tables])
    y = np.concatenate([y for _, y in tables])
    return Stack(
        torch.tensor(x, dtype=dtype),
        torch.tensor(y, dtype=dtype),
        size_K.cumsum(0) - size_K,
        size_K,
    )


def _linear(features: int) -> nn.Module:
    return zoo.logistic(features).double()


# Least squares in closed form. The weights are [coefficients, intercept]; the loss is the mean
# squared error.

Affine = tuple[np.ndarray, np.ndarray]


def _quadratic(x: np.ndarray, y: np.ndarray) -> Affine:
    """Return H, b of the gradient H w - b."""
    ones = np.concatenate([x, np.ones((len(x), 1))], 1)
    return 2 * ones.T @ ones / len(x), 2 * ones.T @ y / len(x)


def _descended(quadratic: Affine, h: Training, steps: int) -> Affine:
    """Return A, a such that `steps` of gradient descent with momentum take w to A w + a."""
    H, b = quadratic
    A = np.eye(len(b))
    a = np.zeros(len(b))
    V = np.zeros((len(b), len(b)))
    v = np.zeros(len(b))
    for _ in range(steps):
        V = h.momentum * V + H @ A
        v = h.momentum * v + H @ a - b
        A = A - h.learning_rate * V
        a = a - h.learning_rate * v
    return A, a


def _fixed_point(maps: Sequence[Affine], factors: Sequence[float]) -> np.ndarray:
    """Return the w at which the sum of factor (A w + a - w) is zero."""
    pairs = list(zip(maps, factors, strict=True))
    system = sum(f * (np.eye(len(a)) - A) for (A, a), f in pairs)
    return np.linalg.solve(system, sum(f * a for (_, a), f in pairs))  # type: ignore[no-any-return]


def _optimum(quadratics: Sequence[Affine], shares: Sequence[float]) -> np.ndarray:
    H = sum(p * H for (H, _), p in zip(quadratics, shares, strict=True))
    return np.linalg.solve(H, sum(p * b for (_, b), p in zip(quadratics, shares, strict=True)))  # type: ignore[no-any-return]


SIZES = (4, 9, 20)
SHARES = tuple(size / sum(SIZES) for size in SIZES)


def _heterogeneous() -> list[tuple[np.ndarray, np.ndarray]]:
    """Three clients whose features differ in scale and whose own optima differ."""
    random = np.random.default_rng(0)
    tables = []
    for size, scale, truth in zip(
        SIZES, (0.5, 1.0, 1.6), ([2.0, -1, 1], [-1.0, 2, 0], [0.5, 0, -2]), strict=True
    ):
        x = scale * random.normal(size=(size, 2))
        tables.append((x, x @ truth[:2] + truth[2] + 0.1 * random.normal(size=size)))
    return tables


TABLES = _heterogeneous()
QUADRATICS = [_quadratic(x, y) for x, y in TABLES]
OPTIMUM = _optimum(QUADRATICS, SHARES)
FULL_BATCH = Training(local_steps=20, batch_size=0, learning_rate=0.05)


def _federation(algorithm: str, h: Training = FULL_BATCH, **changes: float) -> Federation:
    return Federation(replace(h, algorithm=algorithm, **changes), _linear(2), _of(TABLES), SIZES)


def _distance(one: np.ndarray, two: np.ndarray) -> float:
    return float(np.linalg.norm(one - two))


# FedAvg


def test_a_round_of_fedavg_is_the_weighted_mean_of_local_descents() -> None:
    fed = _federation("fedavg").step()
    expected = sum(
        p * _descended(q, FULL_BATCH, 20)[1] for q, p in zip(QUADRATICS, SHARES, strict=True)
    )
    np.testing.assert_allclose(fed.w, expected, rtol=1e-6, atol=1e-7)


def test_fedavg_with_one_full_step_is_gradient_descent_on_the_pooled_rows() -> None:
    fed = _federation("fedavg", local_steps=1).run(30)
    pooled = _quadratic(
        np.concatenate([x for x, _ in TABLES]), np.concatenate([y for _, y in TABLES])
    )
    np.testing.assert_allclose(fed.w, _descended(pooled, FULL_BATCH, 30)[1], rtol=1e-5, atol=1e-6)


def test_the_servers_step_scales_the_mean() -> None:
    full = _federation("fedavg").step()
    half = _federation("fedavg", server_learning_rate=0.5).step()
    np.testing.assert_allclose(half.w, full.w / 2, rtol=1e-12)


def test_fedavg_with_many_local_steps_goes_to_its_fixed_point_and_not_to_the_optimum() -> None:
    fixed = _fixed_point([_descended(q, FULL_BATCH, 20) for q in QUADRATICS], SHARES)
    assert _distance(fixed, OPTIMUM) > 0.1
    assert _distance(_federation("fedavg").run(150).w, fixed) < 1e-5


def test_pooled_is_fedavg_of_one_client() -> None:
    x, y = (np.concatenate(parts) for parts in zip(*TABLES, strict=True))
    one, two = (
        Federation(replace(FULL_BATCH, algorithm=name), _linear(2), _of([(x, y)]), [1]).run(3)
        for name in ("pooled", "fedavg")
    )
    assert torch.equal(one.server.w_P, two.server.w_P)


# FedProx


def _bits(algorithm: str, h: Training, rounds: int = 4, **changes: float) -> Tensor:
    return _federation(algorithm, h, **changes).run(rounds).server.w_P


MINI_BATCH = Training(local_epochs=2, batch_size=4, learning_rate=0.05)


@pytest.mark.parametrize(
    "h",
    [FULL_BATCH, MINI_BATCH, replace(MINI_BATCH, optimizer="adam")],
    ids=["full batch", "mini-batches", "adam"],
)
@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_fedprox_without_pull_is_fedavg_bit_for_bit(h: Training, path: str) -> None:
    h = replace(h, path=path)
    assert torch.equal(_bits("fedprox", h, mu=0.0), _bits("fedavg", h))
    assert not torch.allclose(_bits("fedprox", h, mu=0.5), _bits("fedavg", h), atol=1e-4)


def test_fedproxs_pull_is_the_papers() -> None:
    """Local descent on f_k + mu/2 |w - w_server|^2, by adding mu to the Hessian."""
    fed = _federation("fedprox", mu=0.7).run(2)
    w = np.zeros(3)
    for _ in range(2):
        proximal = [(H + 0.7 * np.eye(3), b + 0.7 * w) for H, b in QUADRATICS]
        maps = [_descended(q, FULL_BATCH, 20) for q in proximal]
        w = sum(p * (A @ w + a) for (A, a), p in zip(maps, SHARES, strict=True))
    np.testing.assert_allclose(fed.w, w, rtol=1e-5, atol=1e-6)


def test_a_strong_pull_holds_clients_near_the_server() -> None:
    moved = [float(_federation("fedprox", mu=mu).step().row_KM.norm()) for mu in (0.0, 1.0, 10.0)]
    assert moved[0] > 1.2 * moved[1] > 2 * moved[2]


# FedAvgM and the adaptive servers


@pytest.mark.parametrize("h", [FULL_BATCH, MINI_BATCH], ids=["full batch", "mini-batches"])
@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_fedavgm_without_momentum_is_fedavg_bit_for_bit(h: Training, path: str) -> None:
    h = replace(h, path=path)
    assert torch.equal(
        _bits("fedavgm", h, server_momentum=0.0, server_learning_rate=1.0), _bits("fedavg", h)
    )
    assert not torch.allclose(
        _bits("fedavgm", h, server_momentum=0.5), _bits("fedavg", h), atol=1e-4
    )


def test_fedavgm_is_heavy_ball_on_the_mean_update() -> None:
    fed = _federation("fedavgm", server_momentum=0.6, server_learning_rate=0.4)
    w = np.zeros(3)
    velocity = np.zeros(3)
    for _ in range(6):
        fed.step()
        velocity = 0.6 * velocity + fed.mean_M.numpy()
        w = w + 0.4 * velocity
        np.testing.assert_allclose(fed.w, w, rtol=1e-10)


def _reddi(name: str, updates: Sequence[np.ndarray], h: Training) -> list[np.ndarray]:
    """Algorithm 2 of Reddi et al. 2021, line by line; FedAdagrad with beta1 = 0, as in the paper's
    experiments.
    """
    tau = h.server_epsilon
    beta2 = h.server_beta2
    beta1 = 0.0 if name == "fedadagrad" else h.server_momentum
    x = np.zeros(3)
    m = np.zeros(3)
    v = np.full(3, tau**2)
    path = []

    for delta in updates:
        m = beta1 * m + (1 - beta1) * delta
        if name == "fedadagrad":
            v = v + delta**2
        elif name == "fedyogi":
            v = v - (1 - beta2) * delta**2 * np.sign(v - delta**2)
        else:
            v = beta2 * v + (1 - beta2) * delta**2
        x = x + h.server_learning_rate * m / (np.sqrt(v) + tau)
        path.append(x)

    return path


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi", "fedadam"])
@pytest.mark.parametrize("tau", [1e-3, 0.5])
def test_adaptive_servers_are_reddis_algorithm_2(name: str, tau: float) -> None:
    h = replace(
        FULL_BATCH,
        server_learning_rate=0.2,
        server_momentum=0.8,
        server_beta2=0.9,
        server_epsilon=tau,
    )
    fed = _federation(name, h)
    updates = []
    seen = []
    for _ in range(8):
        fed.step()
        updates.append(fed.mean_M.numpy())
        seen.append(fed.w)
    np.testing.assert_allclose(seen, _reddi(name, updates, fed.h), rtol=1e-10)
    others = {"fedadagrad", "fedyogi", "fedadam"} - {name}
    assert all(_distance(_reddi(other, updates, fed.h)[-1], seen[-1]) > 1e-3 for other in others)


@pytest.mark.parametrize("name", ["fedadagrad", "fedyogi", "fedadam"])
def test_an_adaptive_servers_own_step_is_a_tenth(name: str) -> None:
    assert torch.equal(_bits(name, FULL_BATCH), _bits(name, FULL_BATCH, server_learning_rate=0.1))


# FedNova: unequal local work. Every client repeats one row, so each of its batches has its full
# gradient, and with batches of one it takes as many steps as it has rows.

WORK = (1, 2, 4, 10)
ROWS = (([0.0], 1.0), ([1.0], -1.0), ([2.0], 2.0), ([-1.0], 0.5))
REPEATED = [(np.array([x] * n), np.array([y] * n)) for (x, y), n in zip(ROWS, WORK, strict=True)]
UNEQUAL = Training(local_epochs=1, batch_size=1, learning_rate=0.005)
EQUAL_SHARES = (0.25,) * 4


def _work_by_hand(steps: int, momentum: float) -> float:
    """|a|_1: gradient i is in the velocity of every later step, shrunk by the momentum at each."""
    return sum(momentum**lag for i in range(steps) for lag in range(steps - i))


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_local_work_is_the_weight_that_sgd_gives_its_gradients(momentum: float) -> None:
    work_K = local_work(torch.tensor([0, *WORK]), replace(UNEQUAL, momentum=momentum))
    assert work_K.tolist() == pytest.approx(
        [_work_by_hand(steps, momentum) for steps in (0, *WORK)]
    )


@pytest.mark.parametrize(
    ("momentum", "rounds"), [(0.0, 250), pytest.param(0.8, 400, marks=pytest.mark.long)]
)
def test_fednova_takes_away_the_bias_of_unequal_work(momentum: float, rounds: int) -> None:
    h = replace(UNEQUAL, momentum=momentum, learning_rate=UNEQUAL.learning_rate * (1 - momentum))
    quadratics = [_quadratic(x, y) for x, y in REPEATED]
    maps = [_descended(q, h, steps) for q, steps in zip(quadratics, WORK, strict=True)]
    optimum = _optimum(quadratics, EQUAL_SHARES)
    average = _fixed_point(maps, EQUAL_SHARES)
    nova = _fixed_point(maps, [1 / _work_by_hand(steps, momentum) for steps in WORK])
    assert _distance(average, optimum) > 0.15  # in theory
    assert _distance(nova, optimum) < _distance(average, optimum) / 8

    def trained(name: str) -> np.ndarray:
        at_the_optimum = fill(_linear(1), torch.tensor(optimum))
        return (
            Federation(replace(h, algorithm=name), at_the_optimum, _of(REPEATED), EQUAL_SHARES)
            .run(rounds)
            .w
        )

    assert _distance(trained("fedavg"), average) < 1e-3  # and in fact
    assert _distance(trained("fednova"), nova) < 1e-3


def test_fednovas_clients_really_take_unequal_steps() -> None:
    fed = Federation(
        replace(UNEQUAL, algorithm="fednova"), _linear(1), _of(REPEATED), EQUAL_SHARES
    ).step()
    assert fed.plan.local.steps_K(fed.data.size_K).tolist() == list(WORK)
    assert fed.row_KM[:, -1].tolist() == list(WORK)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_fednova_is_fedavg_at_equal_steps(momentum: float, path: str) -> None:
    h = replace(FULL_BATCH, momentum=momentum, learning_rate=0.01, path=path)
    np.testing.assert_allclose(_bits("fednova", h), _bits("fedavg", h), rtol=1e-6, atol=1e-6)
    h = replace(h, local_steps=0, batch_size=4)  # 1, 3 and 5 steps
    assert not np.allclose(_bits("fednova", h), _bits("fedavg", h), rtol=1e-3, atol=1e-3)


# SCAFFOLD


def test_scaffold_reaches_the_optimum_where_fedavg_provably_does_not() -> None:
    fixed = _fixed_point([_descended(q, FULL_BATCH, 20) for q in QUADRATICS], SHARES)
    fed = _federation("scaffold").run(300)
    assert _distance(fixed, OPTIMUM) > 0.1
    assert _distance(fed.w, OPTIMUM) < 1e-5
    # c_k is the client's gradient at the optimum
    for (H, b), memory in zip(QUADRATICS, fed.memories, strict=True):
        np.testing.assert_allclose(memory["control"].numpy(), H @ OPTIMUM - b, atol=1e-4)


@pytest.mark.slow
def test_scaffold_reaches_the_optimum_with_few_clients_a_round() -> None:
    fed = _federation("scaffold", local_steps=10)
    lottery = np.random.default_rng(0)
    for _ in range(600):
        fed.step(sorted(lottery.choice(3, 2, replace=False)))
    assert _distance(fed.w, OPTIMUM) < 1e-3


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_scaffolds_first_round_is_fedavgs(path: str) -> None:
    for steps in (1, 20):
        h = replace(FULL_BATCH, local_steps=steps, path=path)
        assert torch.equal(_bits("scaffold", h, 1), _bits("fedavg", h, 1))
    assert not torch.allclose(_bits("scaffold", h, 3), _bits("fedavg", h, 3), atol=1e-3)


def test_scaffold_with_one_full_step_is_fedavg_in_every_round() -> None:
    """Its corrections cancel in the mean."""
    h = replace(FULL_BATCH, local_steps=1)
    np.testing.assert_allclose(
        _bits("scaffold", h, 10), _bits("fedavg", h, 10), rtol=1e-5, atol=1e-6
    )


def test_a_control_variate_is_the_mean_of_the_clients_gradients() -> None:
    fed = _federation("scaffold", local_steps=2).step()
    for (H, b), memory in zip(QUADRATICS, fed.memories, strict=True):
        second = FULL_BATCH.learning_rate * b  # w after one step from 0
        np.testing.assert_allclose(memory["control"].numpy(), (-b + H @ second - b) / 2, rtol=1e-6)


def _off_balance(fed: Federation) -> float:
    """Return how far the server's control variate is from the weighted mean of the clients' own."""
    mean = sum(p * memory["control"] for p, memory in zip(SHARES, fed.memories, strict=True))
    return float((fed.server.slots["control"] - mean).norm())


@pytest.mark.parametrize(
    "h",
    [FULL_BATCH, MINI_BATCH, replace(MINI_BATCH, weight_decay=0.1)],
    ids=["full batch", "mini-batches", "with decay"],
)
def test_scaffolds_control_stays_the_weighted_mean_of_its_clients(h: Training) -> None:
    """Over all clients, whoever is drawn."""
    fed = _federation("scaffold", h)
    lottery = np.random.default_rng(1)
    for _ in range(25):
        absent = int(lottery.integers(3))
        kept = fed.memories[absent]["control"].clone()
        fed.step([k for k in range(3) if k != absent])
        assert _off_balance(fed) < 1e-5
        assert torch.equal(fed.memories[absent]["control"], kept)


def test_a_control_that_ignores_who_was_absent_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    fed = _federation("scaffold")
    wrong = replace(
        fed.algorithm, apply=lambda server, row, share, h: control_average(server, row, 1.0, h)
    )
    monkeypatch.setitem(ALGORITHMS, "scaffold", wrong)
    assert _off_balance(fed.step([0, 1])) > 0.1


def test_a_scaffold_client_without_rows_changes_nothing() -> None:
    empty = (np.zeros((0, 2)), np.zeros(0))
    with_it = Federation(
        replace(FULL_BATCH, algorithm="scaffold"), _linear(2), _of([*TABLES, empty]), [*SIZES, 0]
    )
    np.testing.assert_allclose(with_it.run(5).w, _federation("scaffold").run(5).w, rtol=1e-6)
    assert not with_it.memories[3]["control"].any()
    assert not with_it.row_KM[3].any()


# The baseline of each site alone


def test_local_sends_nothing_and_moves_nothing() -> None:
    fed = _federation("local").run(3)
    assert fed.row_KM.shape == (3, 0)
    assert torch.equal(fed.server.w_P, vector(_linear(2)))
    assert fed.server.round == 3


def test_local_goes_on_with_its_own_model_each_round() -> None:
    fed = _federation("local").run(3)
    for (H, b), memory in zip(QUADRATICS, fed.memories, strict=True):
        alone = _descended((H, b), FULL_BATCH, 60)[1]
        np.testing.assert_allclose(fed.w + memory["offset"].numpy(), alone, rtol=1e-9)


# Conformance: every algorithm on every path


def _clients(task: Task, sizes: Sequence[int] = (7, 1, 0, 12)) -> Stack:
    random = np.random.default_rng(3)
    data = _of(
        [(random.normal(size=(n, 4)), random.integers(0, 2, n).astype(float)) for n in sizes]
    )
    if task != "multiclass":
        return data
    return replace(data, y_N=data.y_N.long())


def _member(name: str, task: Task, path: str) -> Federation:
    torch.manual_seed(0)
    model = zoo.mlp(4, 3 if task == "multiclass" else 1, (5,), 0.2, "layer").double()
    h = Training(algorithm=name, local_epochs=2, batch_size=4, learning_rate=0.1, path=path)
    return Federation(h, model, _clients(task), (7, 1, 0, 12), task)


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_row_is_as_long_as_the_plan_says(name: str, path: str) -> None:
    fed = _member(name, "binary", path).step()
    assert fed.row_KM.shape == (4, ALGORITHMS[name].length(fed.server.w_P.numel()))
    assert fed.row_KM.dtype == torch.float32


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_state_keeps_its_names_sizes_and_type(name: str, path: str) -> None:
    fed = _member(name, "binary", path)
    first = fed.server
    P = fed.server.w_P.numel()
    before = {
        "w": first.w_P.clone(),
        **{slot: value.clone() for slot, value in first.slots.items()},
    }
    fed.run(3)
    assert fed.server.round == 3
    assert fed.server.slots.keys() == first.slots.keys() >= set(fed.algorithm.sent)
    for value in [
        fed.server.w_P,
        *fed.server.slots.values(),
        *(v for m in fed.memories for v in m.values()),
    ]:
        assert (value.shape, value.dtype) == ((P,), torch.float64)
        assert torch.isfinite(value).all()
    assert all(memory.keys() == set(fed.algorithm.kept) for memory in fed.memories)
    now = {"w": first.w_P, **first.slots}
    # a step returns the next state
    assert all(torch.equal(now[key], before[key]) for key in before)


@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_paths_run_an_algorithm_alike(name: str, task: Task) -> None:
    rules, func, loop = (_member(name, task, path).run(2) for path in ("rules", "func", "loop"))
    for fed in (rules, func):
        assert torch.allclose(fed.server.w_P, loop.server.w_P, rtol=1e-5, atol=1e-6)
        for one, two in zip(fed.memories, loop.memories, strict=True):
            assert all(torch.allclose(one[key], two[key], rtol=1e-5, atol=1e-6) for key in two)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_stack_sends_what_its_clients_send_alone(name: str) -> None:
    fed = _member(name, "binary", "rules").step()  # so that there is something to remember
    together_KM, remembered = fed.messages(range(len(fed.data)))
    for k in range(len(fed.data)):
        alone_1M, kept = fed.messages([k])
        assert torch.allclose(alone_1M[0], together_KM[k], rtol=1e-6, atol=1e-7)
        assert all(
            torch.allclose(kept[key][0], remembered[key][k], rtol=1e-9) for key in remembered
        )


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "local"])
def test_every_algorithm_learns(name: str) -> None:
    """Down to the loss of a least-squares fit that is at most half that of the start."""
    h = replace(FULL_BATCH, local_steps=5, server_epsilon=0.1)
    fed = _federation(name, h).run(60)

    def loss(w: np.ndarray) -> float:
        errors = [(np.c_[x, np.ones(len(x))] @ w - y) ** 2 for x, y in TABLES]
        return float(np.concatenate(errors).mean())

    assert loss(fed.w) - loss(OPTIMUM) < (loss(np.zeros(3)) - loss(OPTIMUM)) / 2


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_a_client_receives_is_what_the_algorithm_names(name: str) -> None:
    fed = _federation(name)
    task = fed.algorithm.task(fed.server)
    assert task.slots.keys() == set(fed.algorithm.sent)
    assert torch.equal(task.w_P, fed.server.w_P)


def test_a_server_is_a_value() -> None:
    server = Server(0, torch.zeros(2), {})
    with pytest.raises(AttributeError):
        server.round = 1  # type: ignore[misc]


# What does not compose is refused, with the way out


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("scaffold", {"momentum": 0.9}),
        ("scaffold", {"optimizer": "adam"}),
        ("fednova", {"optimizer": "adam"}),
        ("fednova", {"optimizer": "adam", "beta1": 0.0}),
    ],
)
def test_a_local_optimiser_that_breaks_the_algorithm_is_refused(
    name: str, changes: dict[str, object]
) -> None:
    training = replace(Training(algorithm=name), **changes)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=rf"'{name}'.*Set training.optimizer='sgd'"):
        check(Study(training=training))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_plain_sgd_composes_with_every_algorithm(name: str) -> None:
    check(Study(training=Training(algorithm=name)))


def test_fednova_takes_momentum() -> None:
    check(Study(training=Training(algorithm="fednova", momentum=0.9)))


def test_an_unknown_algorithm_gives_the_nearest() -> None:
    with pytest.raises(StudyError, match="did you mean 'fedavg'"):
        check(Study(training=Training(algorithm="fedavgg")))


def test_momentum_beside_adam_is_refused() -> None:
    with pytest.raises(PlanError, match=r"momentum=0.9 is for sgd.*training.beta1"):
        check(Study(training=Training(optimizer="adam", momentum=0.9)))


def test_rules_for_a_model_without_them_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("a_users_models")
    module.soft = lambda f, o: nn.Sequential(nn.Linear(f, 3), nn.Softplus(), nn.Linear(3, o))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_users_models", module)
    survey = {"train": 5, "test": 2, "labels": {}, "train_labels": {}, "missing": {}}
    encoding = Encoding((Column("age", "number"),), Target("y", "regression"))
    study = Study(model=Model("a_users_models:soft"), training=Training(path="rules"))
    planned = partial(make, surveys={"a": survey}, encoding=encoding)
    with pytest.raises(
        PlanError, match=r"'a_users_models:soft'.*training.path='rules' .* Softplus '1'.*'auto'"
    ):
        planned(study)
    assert planned(replace(study, training=Training())).path == "func"
