"""Every rule against autograd: the same outputs and gradients for a stack of clients with parameters of their own."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import prune

from medfed.core import streams
from medfed.core.flat import Layout
from medfed.layers import RULES, RuledModel, has_rules
from medfed.models import Dropout, build, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

K, B = 3, 5
KEY_K = torch.tensor([11, -12, 13])

# name -> (layer, shape of one sample)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "linear to one": (lambda: nn.Linear(6, 1), (6,)),
    "linear over an axis": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear over two axes": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "relu": (nn.ReLU, (6,)),
    "relu in place": (lambda: nn.ReLU(inplace=True), (6,)),
    "relu with axes": (nn.ReLU, (2, 6)),
    "tanh": (nn.Tanh, (6,)),
    "sigmoid": (nn.Sigmoid, (6,)),
    "silu": (nn.SiLU, (6,)),
    "gelu": (nn.GELU, (6,)),
    "gelu by tanh": (lambda: nn.GELU("tanh"), (6,)),
    "leaky relu": (lambda: nn.LeakyReLU(0.3), (6,)),
    "elu": (lambda: nn.ELU(1.7), (6,)),
    "layer norm": (lambda: nn.LayerNorm(6), (6,)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (6,)),
    "layer norm without affine": (lambda: nn.LayerNorm(6, elementwise_affine=False), (6,)),
    "layer norm with a large epsilon": (lambda: nn.LayerNorm(6, eps=0.5), (6,)),
    "layer norm over the last axis": (lambda: nn.LayerNorm(6), (4, 6)),
    "layer norm over two axes": (lambda: nn.LayerNorm((4, 6)), (4, 6)),
    "layer norm over two of three axes": (lambda: nn.LayerNorm((4, 6)), (2, 4, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), (6,)),
    "group norm of one group": (lambda: nn.GroupNorm(1, 6), (6,)),
    "group norm without affine": (lambda: nn.GroupNorm(2, 6, affine=False), (6,)),
    "group norm with a large epsilon": (lambda: nn.GroupNorm(2, 6, eps=0.5), (6,)),
    "group norm of a signal": (lambda: nn.GroupNorm(2, 6), (6, 5)),
    "group norm of an image": (lambda: nn.GroupNorm(3, 6), (6, 2, 4)),
    "group norm of an image without affine": (lambda: nn.GroupNorm(3, 6, affine=False), (6, 2, 4)),
    "dropout": (lambda: Dropout(0.4, salt=2), (6,)),
    "dropout with axes": (lambda: Dropout(0.4), (2, 6)),
    "dropout of nothing": (lambda: Dropout(0.0), (6,)),
    "flatten": (nn.Flatten, (2, 3)),
    "flatten of one axis": (nn.Flatten, (6,)),
    "identity": (nn.Identity, (2, 3)),
}

# name -> (model, shape of one sample): layers that stand next to layers that reuse or overwrite memory
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "the zoo's, layer norm": (lambda: mlp(6, 2, (8, 5), 0.3, "layer"), (6,)),
    "the zoo's, group norm": (lambda: mlp(6, 2, (8, 5), 0.3, "group"), (6,)),
    "the zoo's, plain": (lambda: mlp(6, 2, (8, 5)), (6,)),
    "norm first": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), (6,)),
    "norm last": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), (6,)),
    "relu first": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 2)), (6,)),
    "relu last": (lambda: nn.Sequential(nn.Linear(6, 2), nn.ReLU()), (6,)),
    "relu twice": (lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 2)), (6,)),
    "relu after each activation": (
        lambda: nn.Sequential(
            *(nn.Linear(6, 6), nn.Tanh(), nn.ReLU(), nn.Linear(6, 6), nn.SiLU(), nn.ReLU(), nn.Linear(6, 6)),
            *(nn.GELU(), nn.ReLU(), nn.Linear(6, 6), nn.ELU(), nn.ReLU(), nn.Linear(6, 6), nn.LeakyReLU(), nn.ReLU()),
            *(nn.Linear(6, 6), nn.Sigmoid(), nn.ReLU(), nn.Linear(6, 2)),
        ),
        (6,),
    ),
    "relu after a norm without affine": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4, elementwise_affine=False), nn.ReLU(), nn.Linear(4, 2)),
        (6,),
    ),
    "relu after identity after tanh": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Identity(), nn.ReLU(), nn.Linear(4, 2)),
        (6,),
    ),
    "dropouts in a row": (lambda: _salted(Dropout(0.2), nn.Linear(6, 6), Dropout(0.3), Dropout(0.5)), (6,)),
    "an activation used twice": (lambda: _twice(nn.Tanh()), (6,)),
    "from signals to a vector": (
        lambda: nn.Sequential(
            nn.Linear(6, 4), nn.GroupNorm(3, 3), nn.ReLU(), nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 2)
        ),
        (3, 6),
    ),
    "nested": (
        lambda: nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.SiLU())), nn.Sequential(nn.Linear(4, 2))),
        (6,),
    ),
}


def _salted(*layers: nn.Module) -> nn.Sequential:
    for salt, layer in enumerate(layers):
        if isinstance(layer, Dropout):
            layer.salt = salt
    return nn.Sequential(*layers)


def _twice(layer: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), layer, nn.Linear(4, 4), layer, nn.Linear(4, 2))


def _drawn(module: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    """Return inputs [K, B, *shape] and parameters [K, *] that differ between clients and from their usual start."""
    torch.manual_seed(0)
    params = [torch.randn(K, *p.shape, dtype=torch.float64) for p in module.parameters()]
    return torch.randn(K, B, *shape, dtype=torch.float64), params


def _by_autograd(
    module: nn.Module, x: Tensor, params: list[Tensor], weight: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y, dL/dx and the parameters' gradients for L = sum(weight * y), one client after another."""
    module = module.double().train()
    ys, dxs, gradients = [], [], []
    for k in range(len(x)):
        for layer in module.modules():
            if isinstance(layer, Dropout):
                layer.key.copy_(KEY_K[k])
        x_k = x[k].clone().requires_grad_()
        own = {
            name: p[k].clone().requires_grad_() for name, p in zip(dict(module.named_parameters()), params, strict=True)
        }
        y = functional_call(module, own, (x_k * 1,))  # * 1: a layer may work in place
        loss = y.sum() if weight is None else (weight[k] * y).sum()
        found = torch.autograd.grad(loss, [x_k, *own.values()])
        ys.append(y.detach())
        dxs.append(found[0])
        gradients.append(found[1:])
    return torch.stack(ys), torch.stack(dxs), [torch.stack(g) for g in zip(*gradients, strict=True)]


def _close(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and torch.allclose(one, two, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=LAYERS)
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = LAYERS[request.param]
    return make(), shape


@pytest.fixture(params=[*LAYERS, *MODELS])
def any_case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = {**LAYERS, **MODELS}[request.param]
    return make(), shape


def test_every_rule_is_tested() -> None:
    assert {type(make()) for make, _ in LAYERS.values()} == set(RULES)


def test_a_layer_goes_forward_and_back_like_autograd(case: tuple[nn.Module, tuple[int, ...]]) -> None:
    layer, shape = case
    x, params = _drawn(layer, shape)
    rule = RULES[type(layer)](layer)
    y = rule.forward(x.clone(), params, KEY_K).clone()
    weight = torch.randn(y.shape, dtype=y.dtype)
    true_y, true_dx, true_gradients = _by_autograd(layer, x, params, weight)
    assert _close(y, true_y)
    assert _close(rule.backward(weight.clone(), params, first=False), true_dx)
    targets = [torch.full_like(p, float("nan")) for p in params]
    rule.accumulate(targets, beta=0, alpha=1)
    assert all(_close(t, g) for t, g in zip(targets, true_gradients, strict=True))


def test_a_model_has_autograds_gradients(any_case: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = any_case
    assert has_rules(model)
    x, params = _drawn(model, shape)
    ruled = RuledModel(model)
    y = ruled.forward(x.clone(), params, KEY_K).clone()
    weight = torch.randn(y.shape, dtype=y.dtype)
    true_y, _, true_gradients = _by_autograd(model, x, params, weight)
    assert _close(y, true_y)
    targets = [torch.full_like(p, float("nan")) for p in params]
    ruled.backward(weight.clone(), params, targets, beta=0, alpha=1)
    assert all(_close(t, g) for t, g in zip(targets, true_gradients, strict=True))


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, 1.0), (1.0, -0.1), (0.9, -0.1), (0.0, 2.0), (2.0, 0.0)])
def test_a_gradient_is_blended_into_its_target(
    any_case: tuple[nn.Module, tuple[int, ...]], beta: float, alpha: float
) -> None:
    model, shape = any_case
    x, params = _drawn(model, shape)
    ruled = RuledModel(model)
    y = ruled.forward(x.clone(), params, KEY_K)
    weight = torch.randn(y.shape, dtype=y.dtype)
    _, _, gradients = _by_autograd(model, x, params, weight)
    before = [torch.randn_like(p) for p in params]
    targets = [t.clone() for t in before]
    ruled.backward(weight.clone(), params, targets, beta, alpha)
    for target, old, gradient in zip(targets, before, gradients, strict=True):
        assert _close(target, beta * old + alpha * gradient)


def test_a_step_may_be_written_straight_into_the_weights(any_case: tuple[nn.Module, tuple[int, ...]]) -> None:
    """Plain SGD does: no gradient below may see weights that have moved already."""
    model, shape = any_case
    x, params = _drawn(model, shape)
    ruled = RuledModel(model)
    y = ruled.forward(x.clone(), params, KEY_K)
    weight = torch.randn(y.shape, dtype=y.dtype)
    _, _, gradients = _by_autograd(model, x, params, weight)
    expected = [0.9 * p - 0.3 * g for p, g in zip(params, gradients, strict=True)]
    ruled.backward(weight.clone(), params, params, beta=0.9, alpha=-0.3)
    assert all(_close(p, e) for p, e in zip(params, expected, strict=True))


def test_steps_of_fewer_clients_and_other_widths_reuse_buffers_rightly(
    any_case: tuple[nn.Module, tuple[int, ...]],
) -> None:
    model, shape = any_case
    whole, params = _drawn(model, shape)
    ruled = RuledModel(model)
    for clients, width in [(K, B), (2, B), (1, B), (K, 2), (2, 4), (K, B)]:
        x, own = whole[:clients, :width], [p[:clients] for p in params]
        y = ruled.forward(x.clone(), own, KEY_K[:clients]).clone()
        true_y, _, true_gradients = _by_autograd(model, x, own, None)
        targets = [torch.empty_like(p) for p in own]
        ruled.backward(torch.ones_like(y), own, targets, beta=0, alpha=1)
        assert _close(y, true_y)
        assert all(_close(t, g) for t, g in zip(targets, true_gradients, strict=True))


def test_another_type_of_number_gets_buffers_of_its_own(any_case: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = any_case
    x, params = _drawn(model, shape)
    ruled = RuledModel(model)
    wide = ruled.forward(x.clone(), params, KEY_K).clone()
    narrow = ruled.forward(x.float(), [p.float() for p in params], KEY_K)
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow.double(), wide, rtol=1e-4, atol=1e-4)


def test_one_clients_nan_stays_its_own(any_case: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = any_case
    x, params = _drawn(model, shape)

    def run(x: Tensor) -> list[Tensor]:
        ruled, targets = RuledModel(model), [torch.empty_like(p) for p in params]
        y = ruled.forward(x.clone(), params, KEY_K).clone()
        ruled.backward(torch.ones_like(y), params, targets, beta=0, alpha=1)
        return [y, *targets]

    clean = run(x)
    x[1] = float("nan")
    for before, after in zip(clean, run(x), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_dropouts_mask_is_the_clients_own_in_a_stack() -> None:
    ruled, ones = RuledModel(nn.Sequential(Dropout(0.5, salt=4))), torch.ones(K, B, 50)
    together = ruled.forward(ones, [], KEY_K)
    for k in range(K):
        alone = RuledModel(nn.Sequential(Dropout(0.5, salt=4))).forward(ones[:1], [], KEY_K[k : k + 1])
        assert torch.equal(together[k], alone[0])
        keep = streams.uniform(streams.subkey(KEY_K[k], 4), B * 50).view(B, 50) >= 0.5
        assert torch.equal(together[k] != 0, keep)


# What has rules, and what must not


class Residual(nn.Module):
    """A container of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Doubled(nn.Linear):
    """A known layer that means something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _tied() -> nn.Module:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second)


def _frozen(model: nn.Module, name: str) -> nn.Module:
    dict(model.named_parameters())[name].requires_grad_(False)
    return model


def _with_a_scale() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_parameter("scale", nn.Parameter(torch.ones(4)))
    return model


def _without_rules() -> Iterator[tuple[str, nn.Module]]:
    shared = nn.Linear(4, 4)
    norm = nn.LayerNorm(4)
    yield "an unknown activation", nn.Sequential(nn.Linear(4, 4), nn.Softplus())
    yield "a convolution", nn.Sequential(nn.Conv1d(4, 4, 1))
    yield "a container of one's own", nn.Sequential(Residual(), nn.Linear(4, 1))
    yield "a bare container", Residual()
    yield "a layer that inherits", nn.Sequential(Doubled(4, 4))
    yield "a list", nn.ModuleList([nn.Linear(4, 4)])
    yield "flatten of other axes", nn.Sequential(nn.Flatten(2), nn.Linear(4, 4))
    yield "flatten of some axes", nn.Sequential(nn.Flatten(1, 2), nn.Linear(4, 4))
    yield "a layer used twice", nn.Sequential(shared, nn.ReLU(), shared)
    yield "a norm used twice", nn.Sequential(norm, nn.Linear(4, 4), norm)
    yield "tied weights", _tied()
    yield "a frozen layer", nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1))
    yield "a frozen bias", _frozen(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), "0.bias")
    yield "a frozen norm", _frozen(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1)), "0.weight")
    yield "a parametrised weight", nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    yield "a parameter beside the layers", _with_a_scale()


WITHOUT = dict(_without_rules())


@pytest.mark.parametrize("name", WITHOUT)
def test_what_the_rules_would_compute_wrongly_has_none(name: str) -> None:
    assert not has_rules(WITHOUT[name])


def test_a_pruned_weight_has_no_rules() -> None:
    """Pruning replaces the weight by a masked one before each forward pass: it is no parameter then."""
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert not has_rules(nn.Sequential(layer))


def test_a_layer_alone_has_rules() -> None:
    assert has_rules(nn.Linear(3, 1))


@pytest.mark.parametrize("name", ["logistic", "mlp", "medical-mlp"])
@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_the_whole_zoo_has_rules(name: str, norm: str) -> None:
    assert has_rules(build(name, 5, 3, {} if name == "logistic" else {"norm": norm, "dropout": 0.2}, 0))


def test_ruled_parameters_are_in_the_layouts_order() -> None:
    model = mlp(6, 2, (8, 5), 0.3, "layer")
    names = [name for rule in RuledModel(model).rules for name in rule.names]
    assert names == [name.rpartition(".")[2] for name in Layout.of(model).shapes]
