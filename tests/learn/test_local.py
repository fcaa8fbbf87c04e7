"""Local training: three paths, one meaning, and clients that never touch each other."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from medfed.core import streams
from medfed.core.flat import Layout, vector
from medfed.core.streams import Streams
from medfed.core.types import Task
from medfed.data.federated import Stack
from medfed.learn import local, zoo
from medfed.learn.local import (
    Correction,
    LocalPlan,
    LocalResult,
    Path,
    batches,
    loss_gradient,
    outputs,
    sample_loss,
    train,
)
from medfed.learn.zoo import Dropout

pytestmark = pytest.mark.usefixtures("one_thread")

# none, one, fewer than a batch, a whole number of batches, and a short last batch
SIZES = (7, 1, 0, 12, 3)
FEATURES = 4
TASKS: tuple[Task, ...] = ("binary", "multiclass", "regression")


class Residual(nn.Module):
    """A network without rules: a skip, a softplus, and keyed dropout."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, features)
        self.norm = nn.LayerNorm(features)
        self.drop = Dropout(0.3, salt=1)
        self.out = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.drop(F.softplus(self.norm(self.inner(x)))))  # type: ignore[no-any-return]


class Tied(nn.Module):
    """One layer used twice."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.inner = nn.Linear(features, features)
        self.out = nn.Linear(features, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.inner(torch.tanh(self.inner(x)))))  # type: ignore[no-any-return]


def _half_frozen(features: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(features, 5).requires_grad_(False), nn.Tanh(), nn.Linear(5, outputs)
    )


def _with_an_idle_weight(features: int, outputs: int) -> nn.Module:
    model = nn.Sequential(nn.Linear(features, outputs))
    model.register_parameter("idle", nn.Parameter(torch.ones(3)))
    return model


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "logistic": zoo.logistic,
    "mlp": lambda f, o: zoo.mlp(f, o, (6, 5)),
    "mlp with layer norm and dropout": lambda f, o: zoo.mlp(f, o, (6, 5), 0.3, "layer"),
    "mlp with group norm": lambda f, o: zoo.mlp(f, o, (8, 8), 0.0, "group"),
    "an activation at the end": lambda f, o: nn.Sequential(
        nn.Linear(f, 5), nn.SiLU(), nn.Linear(5, o), nn.Tanh()
    ),
    "relu at the end": lambda f, o: nn.Sequential(
        nn.Linear(f, 5), nn.GELU(), nn.Linear(5, o), nn.ReLU()
    ),
    "no rules": Residual,
    "tied": Tied,
    "half frozen": _half_frozen,
    "an idle weight": _with_an_idle_weight,
}

OPTIMISERS = {
    "sgd": LocalPlan("binary"),
    "sgd with decay": LocalPlan("binary", weight_decay=0.05),
    "momentum": LocalPlan("binary", learning_rate=0.05, momentum=0.9),
    "momentum with decay": LocalPlan("binary", learning_rate=0.05, momentum=0.5, weight_decay=0.05),
    "adam": LocalPlan("binary", optimizer="adam", learning_rate=0.01, epsilon=1e-3),
    "adam with decay, beta1 = 0": LocalPlan(
        "binary",
        optimizer="adam",
        learning_rate=0.01,
        beta1=0.0,
        beta2=0.9,
        weight_decay=0.05,
        epsilon=1e-3,
    ),
}
NOTHING = Correction()
SCHEDULES: tuple[dict[str, int], ...] = (
    {"epochs": 2, "batch_size": 4},
    {"steps": 7, "batch_size": 5},
    {"epochs": 3, "batch_size": 0},
    {"epochs": 1, "batch_size": 32},
    {"steps": 2, "batch_size": 1},
)


def _model(name: str, task: Task, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name](FEATURES, 3 if task == "multiclass" else 1).to(dtype)


def _stack(
    task: Task, dtype: torch.dtype = torch.float64, sizes: tuple[int, ...] = SIZES, seed: int = 0
) -> Stack:
    torch.manual_seed(seed)
    N = sum(sizes)
    size_K = torch.tensor(sizes)
    y = {
        "binary": torch.randint(0, 2, (N,)).to(dtype),
        "multiclass": torch.randint(0, 3, (N,)),
        "regression": torch.randn(N, dtype=dtype),
    }[task]
    return Stack(torch.randn(N, FEATURES, dtype=dtype), y, size_K.cumsum(0) - size_K, size_K)


def _starts(model: nn.Module, clients: int = len(SIZES)) -> Tensor:
    """Weights that differ between clients."""
    P = vector(model)
    return P + 0.3 * torch.randn(clients, len(P), generator=torch.Generator().manual_seed(1)).to(
        P.dtype
    )


def _key_K(clients: int = len(SIZES)) -> Tensor:
    return Streams(3).key_K("batches", 1, [f"site {k}" for k in range(clients)])


def _trained(
    name: str,
    plan: LocalPlan,
    path: Path,
    data: Stack | None = None,
    correction: Correction = NOTHING,
    dtype: torch.dtype = torch.float64,
) -> LocalResult:
    model = _model(name, plan.task, dtype)
    data = data or _stack(plan.task, dtype)
    return train(model, _starts(model, len(data)), data, plan, _key_K(len(data)), correction, path)


def _paths(name: str) -> tuple[Path, ...]:
    if local.has_rules(_model(name, "binary")):
        return ("rules", "func")
    return ("func",)


def _agree(one: LocalResult, two: LocalResult, tolerance: float) -> bool:
    return (
        torch.allclose(one.theta_KP, two.theta_KP, rtol=tolerance, atol=tolerance)
        and torch.allclose(one.loss_K, two.loss_K, rtol=tolerance, atol=tolerance, equal_nan=True)
        and torch.equal(one.steps_K, two.steps_K)
    )


def _rows(data: Stack, clients: list[int]) -> Stack:
    """The same rows in the same place, owned by some of the clients only."""
    return Stack(data.x_NF, data.y_N, data.offset_K[clients], data.size_K[clients])


# Three paths, one meaning


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MODELS)
def test_all_paths_are_the_loop(name: str, task: Task, optimiser: str) -> None:
    plan = replace(OPTIMISERS[optimiser], task=task, **SCHEDULES[0])
    reference = _trained(name, plan, "loop")
    for path in _paths(name):
        assert _agree(_trained(name, plan, path), reference, 1e-9), path


@pytest.mark.parametrize("schedule", SCHEDULES[1:], ids=str)
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("name", ["mlp with layer norm and dropout", "no rules"])
def test_all_paths_are_the_loop_in_every_schedule(
    name: str, optimiser: str, schedule: dict[str, int]
) -> None:
    plan = replace(OPTIMISERS[optimiser], task="multiclass", **schedule)
    reference = _trained(name, plan, "loop")
    for path in _paths(name):
        assert _agree(_trained(name, plan, path), reference, 1e-9), path


@pytest.mark.parametrize(("mu", "shifted"), [(0.3, False), (0.0, True), (0.3, True)])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("name", ["mlp with layer norm and dropout", "no rules"])
def test_all_paths_correct_alike(name: str, optimiser: str, mu: float, shifted: bool) -> None:
    plan = replace(OPTIMISERS[optimiser], epochs=2, batch_size=4)
    starts = _starts(_model(name, "binary"))
    correction = Correction(mu, 0.1 * torch.randn_like(starts) if shifted else None)
    reference = _trained(name, plan, "loop", correction=correction)
    for path in _paths(name):
        assert _agree(_trained(name, plan, path, correction=correction), reference, 1e-9), path
    assert not _agree(_trained(name, plan, "loop"), reference, 1e-4)  # and it does something


@pytest.mark.parametrize("optimiser", ["sgd with decay", "momentum", "adam"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["logistic", "mlp with layer norm and dropout", "no rules"])
def test_all_paths_are_the_loop_in_float32(name: str, task: Task, optimiser: str) -> None:
    plan = replace(OPTIMISERS[optimiser], task=task, **SCHEDULES[0])
    reference = _trained(name, plan, "loop", dtype=torch.float32)
    assert reference.theta_KP.dtype == torch.float32
    for path in _paths(name):
        assert _agree(_trained(name, plan, path, dtype=torch.float32), reference, 1e-4), path


@pytest.mark.parametrize("name", MODELS)
def test_auto_takes_rules_where_there_are_any(name: str) -> None:
    plan = LocalPlan("binary", epochs=2, batch_size=4)
    auto = _trained(name, plan, "auto")
    chosen = _trained(name, plan, _paths(name)[0])
    assert torch.equal(auto.theta_KP, chosen.theta_KP)


def test_adams_moments_start_afresh_with_each_call() -> None:
    """Its first step is as long as the rate, whatever came before: of one step a round its moments
    never settle.
    """
    plan = replace(OPTIMISERS["adam"], steps=1, batch_size=0, epsilon=0.0)
    model = _model("logistic", "binary")
    data = _stack("binary")
    theta_KP = _starts(model, len(data))
    for _ in range(2):
        after_KP = train(model, theta_KP, data, plan, _key_K(len(data)), NOTHING, "rules").theta_KP
        moved_KP = (after_KP - theta_KP)[data.size_K > 0].abs()
        assert torch.allclose(moved_KP[moved_KP > 0], torch.tensor(0.01, dtype=moved_KP.dtype))
        theta_KP = after_KP


def test_what_is_frozen_stays() -> None:
    model = _model("half frozen", "binary")
    before = [p.clone() for p in model[0].parameters()]  # type: ignore[index]
    assert len(vector(model)) == 6
    for path in ("func", "loop"):
        result = train(
            model, _starts(model), _stack("binary"), LocalPlan("binary"), _key_K(), path=path
        )
        assert result.theta_KP.shape == (5, 6)
    assert all(torch.equal(p, b) for p, b in zip(model[0].parameters(), before, strict=True))  # type: ignore[index]


# The loop itself, against arithmetic written by hand


def _logistic_by_hand(
    x: np.ndarray,
    y: np.ndarray,
    start: np.ndarray,
    plan: LocalPlan,
    key: Tensor,
    mu: float,
    shift: np.ndarray,
) -> tuple[np.ndarray, float]:
    """Logistic regression in numpy; the weights are [F coefficients, 1 intercept]."""
    ones = np.concatenate([x, np.ones((len(x), 1))], 1)
    w = start.copy()
    first = np.zeros_like(start)
    second = np.zeros_like(start)
    losses = []
    t = 0
    width = plan.batch_size or len(x)

    for epoch in range(plan.epochs):
        order = streams.shuffles(streams.subkey(key, epoch), torch.tensor([len(x)]))[0].numpy()
        for begin in range(0, len(x), width):
            rows = order[begin : begin + width]
            p = 1 / (1 + np.exp(-ones[rows] @ w))
            losses += list(-np.log(np.where(y[rows] == 1, p, 1 - p)))
            g = (
                ones[rows].T @ (p - y[rows]) / len(rows)
                + plan.weight_decay * w
                + mu * (w - start)
                + shift
            )
            t += 1

            if plan.optimizer == "adam":
                first = plan.beta1 * first + (1 - plan.beta1) * g
                second = plan.beta2 * second + (1 - plan.beta2) * g**2
                unbiased = first / (1 - plan.beta1**t), second / (1 - plan.beta2**t)
                w = w - plan.learning_rate * unbiased[0] / (np.sqrt(unbiased[1]) + plan.epsilon)
            else:
                first = plan.momentum * first + g
                w = w - plan.learning_rate * first

    return w, float(np.mean(losses))


@pytest.mark.parametrize("path", ["loop", "func", "rules"])
@pytest.mark.parametrize("batch_size", [0, 4])
@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_logistic_regression_is_the_textbooks(optimiser: str, batch_size: int, path: Path) -> None:
    plan = replace(OPTIMISERS[optimiser], epochs=3, batch_size=batch_size)
    model = _model("logistic", "binary")
    data = _stack("binary")
    starts = _starts(model)
    shift = 0.1 * _starts(model)
    result = train(model, starts, data, plan, _key_K(), Correction(0.2, shift), path)
    for k, size in enumerate(SIZES):
        rows = slice(int(data.offset_K[k]), int(data.offset_K[k]) + size)
        x = data.x_NF[rows].numpy()
        y = data.y_N[rows].numpy()
        if size == 0:
            assert torch.equal(result.theta_KP[k], starts[k])
            continue
        key = _key_K()[k : k + 1]
        w, loss = _logistic_by_hand(x, y, starts[k].numpy(), plan, key, 0.2, shift[k].numpy())
        np.testing.assert_allclose(result.theta_KP[k].numpy(), w, rtol=1e-9, atol=1e-9)
        assert result.loss_K[k] == pytest.approx(loss, rel=1e-9)


# Losses


@pytest.mark.parametrize("task", TASKS)
def test_losses_are_torchs(task: Task) -> None:
    data = _stack(task, sizes=(20,))
    z = 3 * torch.randn(20, 3 if task == "multiclass" else 1, dtype=torch.float64)
    expected = {
        "binary": lambda: F.binary_cross_entropy(
            torch.sigmoid(z[:, 0]), data.y_N, reduction="none"
        ),
        "multiclass": lambda: F.cross_entropy(z, data.y_N, reduction="none"),
        "regression": lambda: F.mse_loss(z[:, 0], data.y_N, reduction="none"),
    }[task]()
    assert torch.allclose(sample_loss(task, z, data.y_N), expected)


@pytest.mark.parametrize("task", TASKS)
def test_the_losses_gradient_is_autograds_and_leaves_the_outputs(task: Task) -> None:
    data = _stack(task, sizes=(20,))
    z = (
        3 * torch.randn(20, 3 if task == "multiclass" else 1, dtype=torch.float64)
    ).requires_grad_()
    (expected,) = torch.autograd.grad(sample_loss(task, z, data.y_N).sum(), z)
    given_z = z.detach().clone()
    assert torch.allclose(loss_gradient(task, given_z, data.y_N), expected, rtol=1e-12)
    assert torch.equal(given_z, z.detach())


def test_extreme_outputs_have_finite_losses_and_gradients() -> None:
    z = torch.tensor([[-200.0], [200.0]])
    y = torch.tensor([1.0, 0.0])
    assert sample_loss("binary", z, y).tolist() == [200, 200]
    assert loss_gradient("binary", z, y).flatten().tolist() == [-1, 1]
    three = torch.tensor([[0.0, 500.0, -500.0]])
    assert sample_loss("multiclass", three, torch.tensor([2])).tolist() == [1000]
    assert loss_gradient("multiclass", three, torch.tensor([2])).tolist() == [[0, 1, -1]]


# Batches: every epoch each row once


def _sizes() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 23), min_size=1, max_size=5).map(
        lambda sizes: sorted(sizes, reverse=True)
    )


@given(_sizes(), st.integers(0, 9), st.integers(1, 3))
def test_every_epoch_takes_each_of_a_clients_rows_once(
    sizes: list[int], batch_size: int, epochs: int
) -> None:
    data = _stack("binary", sizes=tuple(sizes))
    plan = LocalPlan("binary", epochs=epochs, batch_size=batch_size)
    laid = batches(data, plan, _key_K(len(sizes)))
    steps_K = plan.steps_K(data.size_K)
    width = laid.row_TKB.shape[2]
    for k, size in enumerate(sizes):
        own = list(range(int(data.offset_K[k]), int(data.offset_K[k]) + size))
        per_epoch = -(-size // (batch_size or max(sizes)))
        assert steps_K[k] == per_epoch * epochs
        for epoch in range(epochs):
            taken: list[int] = []
            for t in range(epoch * per_epoch, (epoch + 1) * per_epoch):
                if laid.valid_TKB is None:
                    valid = torch.ones(width, dtype=torch.bool)
                else:
                    valid = laid.valid_TKB[t, k]
                assert int(valid.sum()) == laid.size_TK[t, k]
                taken += laid.row_TKB[t, k][valid].tolist()
            assert sorted(taken) == own
        # what pads is the client's own
        assert torch.isin(laid.row_TKB[: steps_K[k], k], torch.tensor(own)).all()


@given(_sizes(), st.integers(0, 9), st.integers(1, 12))
def test_steps_go_through_as_many_epochs_as_they_need(
    sizes: list[int], batch_size: int, steps: int
) -> None:
    data = _stack("binary", sizes=tuple(sizes))
    plan = LocalPlan("binary", steps=steps, batch_size=batch_size)
    laid = batches(data, plan, _key_K(len(sizes)))
    assert plan.steps_K(data.size_K).tolist() == [steps] * len(sizes)
    assert laid.active_T == [len(sizes)] * steps
    assert (laid.size_TK > 0).all()


def test_every_epoch_has_an_order_of_its_own() -> None:
    laid = batches(
        _stack("binary", sizes=(50,)), LocalPlan("binary", epochs=3, batch_size=0), _key_K(1)
    )
    one, two, three = laid.row_TKB[:, 0].tolist()
    assert sorted(one) == sorted(two) == sorted(three) == list(range(50))
    assert one != two != three != one


def test_active_clients_are_those_with_steps_left() -> None:
    data = _stack("binary", sizes=(12, 7, 3, 1))
    laid = batches(data, LocalPlan("binary", epochs=2, batch_size=4), _key_K(4))
    assert laid.active_T == [4, 4, 2, 2, 1, 1]


def test_steps_per_client() -> None:
    size_K = torch.tensor(SIZES)
    assert LocalPlan("binary", epochs=2, batch_size=4).steps_K(size_K).tolist() == [4, 2, 0, 6, 2]
    assert LocalPlan("binary", epochs=2, batch_size=0).steps_K(size_K).tolist() == [2, 2, 0, 2, 2]
    assert LocalPlan("binary", steps=5, batch_size=4).steps_K(size_K).tolist() == [5, 5, 0, 5, 5]
    assert LocalPlan("binary", batch_size=4).steps_K(torch.tensor([0])).tolist() == [0]


# Clients never touch each other


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
def test_a_clients_result_does_not_depend_on_who_else_is_there(optimiser: str, path: Path) -> None:
    plan = replace(OPTIMISERS[optimiser], epochs=2, batch_size=4)
    model = _model("mlp with layer norm and dropout", "binary")
    data = _stack("binary")
    starts = _starts(model)
    shift = 0.1 * _starts(model)
    whole = train(model, starts, data, plan, _key_K(), Correction(0.1, shift), path)
    for group in [[0], [1], [2], [3], [4], [4, 0], [3, 2, 1, 0]]:
        part = train(
            model,
            starts[group],
            _rows(data, group),
            plan,
            _key_K()[group],
            Correction(0.1, shift[group]),
            path,
        )
        chosen = LocalResult(whole.theta_KP[group], whole.loss_K[group], whole.steps_K[group])
        assert _agree(part, chosen, 1e-12), group


def test_a_full_batch_client_does_not_depend_on_larger_ones() -> None:
    """With batch_size = 0 a stack is padded to its largest client: dropout must not notice."""
    plan = LocalPlan("binary", epochs=3, batch_size=0)
    for path in ("rules", "func", "loop"):
        whole = _trained("mlp with layer norm and dropout", plan, path)
        model = _model("mlp with layer norm and dropout", "binary")
        data = _stack("binary")
        alone = train(model, _starts(model)[4:], _rows(data, [4]), plan, _key_K()[4:], path=path)
        assert torch.allclose(alone.theta_KP[0], whole.theta_KP[4], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 600, 2000, 10**9])
@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch, path: Path, budget: int) -> None:
    plan = LocalPlan("multiclass", epochs=2, batch_size=4, momentum=0.5)
    shift = Correction(0.1, 0.1 * _starts(_model("mlp with layer norm and dropout", "multiclass")))
    usual = _trained("mlp with layer norm and dropout", plan, path, correction=shift)
    monkeypatch.setattr(local, "_RULES_CHUNK_BYTES", budget)
    monkeypatch.setattr(local, "_FUNC_CHUNK_BYTES", budget)
    assert _agree(
        _trained("mlp with layer norm and dropout", plan, path, correction=shift), usual, 1e-12
    )


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_chunks_on_several_threads_give_the_bits_of_one(
    monkeypatch: pytest.MonkeyPatch, optimiser: str
) -> None:
    plan = replace(OPTIMISERS[optimiser], epochs=2, batch_size=4)
    sizes = (9, 1, 0, 12, 3, 7, 7, 2) * 4
    data = _stack("binary", sizes=sizes)
    monkeypatch.setattr(local, "_RULES_CHUNK_BYTES", 3000)
    one = _trained("mlp with layer norm and dropout", plan, "rules", data)
    torch.set_num_threads(2)
    two = _trained("mlp with layer norm and dropout", plan, "rules", data)
    assert torch.get_num_threads() == 2
    assert torch.equal(two.theta_KP, one.theta_KP)
    assert torch.equal(two.loss_K.nan_to_num(-1), one.loss_K.nan_to_num(-1))


@pytest.mark.parametrize(
    "sizes", [(12, 7, 3, 1, 0), (12, 0), (0, 3, 12), (4, 4, 4, 4), (5, 5, 0, 0)]
)
@pytest.mark.parametrize("budget", [1, 600, 10**9])
def test_chunks_hold_every_client_with_steps_once_longest_first(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], budget: int
) -> None:
    plan = LocalPlan("binary", batch_size=4)
    data = _stack("binary", sizes=sizes)
    starts = _starts(_model("logistic", "binary"), len(sizes))
    steps_K = plan.steps_K(data.size_K)
    monkeypatch.setattr(local, "_RULES_CHUNK_BYTES", budget)
    clients = torch.arange(len(sizes))
    members = torch.cat(
        [clients[chunk] for chunk in local._chunks(steps_K, starts, data, plan, "rules")]
    )
    assert sorted(members.tolist()) == [k for k, size in enumerate(sizes) if size]
    assert steps_K[members].tolist() == sorted(steps_K[members].tolist(), reverse=True)


def test_a_tiny_budget_makes_chunks_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above does test something."""
    plan = LocalPlan("binary", batch_size=4)
    data = _stack("binary")
    starts = _starts(_model("logistic", "binary"))
    monkeypatch.setattr(local, "_RULES_CHUNK_BYTES", 1)
    alone = local._chunks(plan.steps_K(data.size_K), starts, data, plan, "rules")
    assert [torch.arange(5)[members].tolist() for members in alone] == [[3], [0], [1], [4]]


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -1e300])
@pytest.mark.parametrize("path", ["rules", "func", "loop"])
@pytest.mark.parametrize("optimiser", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("name", ["mlp with layer norm and dropout", "mlp", "logistic"])
def test_one_clients_poison_stays_its_own_bit_for_bit(
    name: str, optimiser: str, path: Path, poison: float
) -> None:
    """Short batches are padded and the stack is ragged: multiplying by a mask would let NaN
    through.
    """
    plan = replace(OPTIMISERS[optimiser], epochs=2, batch_size=5)
    data = _stack("binary")
    clean = _trained(name, plan, path, data)
    x = data.x_NF.clone()
    x[data.offset_K[3] : data.offset_K[3] + SIZES[3]] = poison  # the client that trains longest
    x[int(data.offset_K[1])] = poison  # and the one beside it in the table
    y = data.y_N.clone()
    y[int(data.offset_K[1])] = poison
    sick = _trained(name, plan, path, replace(data, x_NF=x, y_N=y))
    healthy = [0, 2, 4]
    assert torch.equal(sick.theta_KP[healthy], clean.theta_KP[healthy])
    assert torch.isfinite(sick.theta_KP[healthy]).all()
    assert torch.equal(sick.loss_K[[0, 4]], clean.loss_K[[0, 4]])

    if poison != poison:
        assert torch.isnan(sick.theta_KP[[1, 3]]).any(1).all()  # it did arrive where it belongs


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_rows_that_nobody_owns_are_never_read(path: Path) -> None:
    plan = LocalPlan("binary", epochs=2, batch_size=5)
    data = _stack("binary")
    clean = _trained("mlp", plan, path, _rows(data, [0, 4]))
    owned = torch.cat([torch.arange(7), torch.arange(20, 23)])
    x = torch.full_like(data.x_NF, float("nan")).index_copy(0, owned, data.x_NF[owned])
    y = torch.full_like(data.y_N, float("nan")).index_copy(0, owned, data.y_N[owned])
    assert torch.equal(
        _trained("mlp", plan, path, _rows(replace(data, x_NF=x, y_N=y), [0, 4])).theta_KP,
        clean.theta_KP,
    )


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_a_client_without_rows_keeps_its_weights(path: Path) -> None:
    plan = LocalPlan("regression", steps=3, batch_size=4, weight_decay=0.1)
    starts = _starts(_model("mlp", "regression"))
    result = _trained("mlp", plan, path)
    assert torch.equal(result.theta_KP[2], starts[2])
    assert result.steps_K[2] == 0
    assert torch.isnan(result.loss_K[2])
    assert (result.theta_KP != starts).any(1).tolist() == [True, True, False, True, True]


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_nobody_with_rows_is_no_error(path: Path) -> None:
    model = _model("mlp", "binary")
    data = _stack("binary", sizes=(0, 0))
    result = train(model, _starts(model, 2), data, LocalPlan("binary"), _key_K(2), path=path)
    assert torch.equal(result.theta_KP, _starts(model, 2))


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
@pytest.mark.parametrize("name", ["logistic", "mlp with layer norm and dropout", "relu at the end"])
def test_training_changes_nothing_it_was_given(name: str, path: Path) -> None:
    model = _model(name, "regression")
    data = _stack("regression")
    starts = _starts(model)
    key_K = _key_K()
    shift = 0.1 * starts
    given = [data.x_NF, data.y_N, data.offset_K, data.size_K, starts, key_K, shift]
    before = [t.clone() for t in given]
    state = torch.get_rng_state()
    for plan in (
        LocalPlan("regression", epochs=2, batch_size=4),
        LocalPlan("regression", steps=1, momentum=0.5),
    ):
        train(model, starts, data, plan, key_K, Correction(0.1, shift), path)
        train(model, starts[:1], _rows(data, [0]), plan, key_K[:1], path=path)
    assert all(torch.equal(t, b) for t, b in zip(given, before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
def test_another_key_is_another_order_and_the_same_key_the_same_bits(path: Path) -> None:
    plan = LocalPlan("binary", batch_size=4)
    model = _model("mlp", "binary")
    data = _stack("binary")
    starts = _starts(model)
    first = train(model, starts, data, plan, _key_K(), path=path).theta_KP
    assert torch.equal(train(model, starts, data, plan, _key_K(), path=path).theta_KP, first)
    moved = (train(model, starts, data, plan, _key_K() + 1, path=path).theta_KP - first).abs().amax(
        1
    ) > 1e-6
    assert moved.tolist() == [True, False, False, True, False]  # who has two batches or more


# Evaluation


@pytest.mark.parametrize("name", ["mlp with layer norm and dropout", "no rules", "half frozen"])
def test_outputs_are_the_models_in_evaluation_whatever_the_block(name: str) -> None:
    model = _model(name, "multiclass")
    x = torch.randn(11, FEATURES, dtype=torch.float64)
    theta_P = _starts(model)[0]
    pieces = dict(Layout.of(model).pieces(theta_P))
    expected = torch.func.functional_call(model.eval(), pieces, (x,)).detach()
    model.train()
    for block in (1, 4, 11, 8192):
        assert torch.allclose(outputs(model, theta_P, x, block), expected, rtol=1e-12, atol=1e-12)


def test_outputs_of_no_rows_have_the_models_width() -> None:
    model = _model("mlp", "multiclass")
    assert outputs(model, vector(model), torch.zeros(0, FEATURES, dtype=torch.float64)).shape == (
        0,
        3,
    )
