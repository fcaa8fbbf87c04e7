"""Every rule against autograd: the same outputs and gradients for a stack of clients with
parameters of their own, and against torch.func: the same norms of each patient's gradient and the
same weighted sums."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import prune

from medfed.core import streams
from medfed.core.checks import StudyError
from medfed.core.flat import Layout
from medfed.learn.layers import RULES, LinearRule, RuledModel, has_rules
from medfed.learn.zoo import Dropout, Embedding, Series, build, conv1d, mlp

pytestmark = pytest.mark.usefixtures("one_thread")

K = 3
B = 5
KEY_K = torch.tensor([11, -12, 13])

# name -> (layer, shape of one sample)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 4), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "linear to one": (lambda: nn.Linear(6, 1), (6,)),
    "linear over an axis": (lambda: nn.Linear(6, 4), (3, 6)),
    "linear over two axes": (lambda: nn.Linear(6, 4, bias=False), (2, 3, 6)),
    "a wide linear over an axis": (lambda: nn.Linear(40, 30), (2, 40)),
    "convolution": (lambda: nn.Conv1d(2, 3, 3), (2, 8)),
    "convolution without bias": (lambda: nn.Conv1d(2, 3, 3, bias=False), (2, 8)),
    "convolution of one step": (lambda: nn.Conv1d(2, 3, 1), (2, 5)),
    "convolution with stride": (lambda: nn.Conv1d(2, 3, 3, stride=2), (2, 8)),
    "convolution with a stride above its kernel": (lambda: nn.Conv1d(2, 3, 2, stride=3), (2, 9)),
    "convolution with padding": (lambda: nn.Conv1d(2, 3, 4, padding=3), (2, 5)),
    "convolution with dilation": (lambda: nn.Conv1d(2, 3, 3, dilation=2), (2, 8)),
    "convolution with all": (lambda: nn.Conv1d(2, 3, 4, stride=3, padding=4, dilation=3), (2, 10)),
    "convolution mostly of padding": (lambda: nn.Conv1d(1, 2, 3, padding=5), (1, 1)),
    "convolution of many channels": (lambda: nn.Conv1d(12, 16, 3), (12, 4)),
    "convolution of an image": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 4)),
    "convolution of an image, without bias": (lambda: nn.Conv2d(2, 3, 2, bias=False), (2, 3, 3)),
    "convolution of an image, with all": (
        lambda: nn.Conv2d(2, 3, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        (2, 4, 5),
    ),
    "embedding": (lambda: Embedding(4, 3), (5,)),
    "embedding of pairs": (lambda: Embedding(9, 2), (3, 2)),
    "series": (lambda: Series(3), (6,)),
    "average of pairs": (lambda: nn.AvgPool1d(2), (3, 7)),
    "average with padding": (
        lambda: nn.AvgPool1d(3, stride=1, padding=1, count_include_pad=False),
        (3, 5),
    ),
    "average of squares": (lambda: nn.AvgPool2d(2), (3, 4, 6)),
    "greatest of pairs": (lambda: nn.MaxPool1d(2), (3, 7)),
    "greatest with all": (
        lambda: nn.MaxPool1d(3, stride=1, padding=1, dilation=2, ceil_mode=True),
        (3, 7),
    ),
    "greatest of squares": (lambda: nn.MaxPool2d(2), (3, 4, 6)),
    "mean of a series": (lambda: nn.AdaptiveAvgPool1d(1), (3, 5)),
    "mean of an image": (lambda: nn.AdaptiveAvgPool2d(1), (3, 4, 2)),
    "mean of an image, sizes by axis": (lambda: nn.AdaptiveAvgPool2d((1, 1)), (3, 4, 2)),
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
    "unflatten": (lambda: nn.Unflatten(1, (2, 3)), (6,)),
    "unflatten the first of two axes": (lambda: nn.Unflatten(1, (2, 3)), (6, 4)),
    "identity": (nn.Identity, (2, 3)),
}

# name -> (model, shape of one sample): layers that stand next to layers that reuse or overwrite
# memory
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "the zoo's, layer norm": (lambda: mlp(6, 2, (8, 5), 0.3, "layer"), (6,)),
    "the zoo's, group norm": (lambda: mlp(6, 2, (8, 5), 0.3, "group"), (6,)),
    "the zoo's, plain": (lambda: mlp(6, 2, (8, 5)), (6,)),
    "norm first": (lambda: nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2)), (6,)),
    "norm last": (lambda: nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4)), (6,)),
    "relu first": (lambda: nn.Sequential(nn.ReLU(), nn.Linear(6, 2)), (6,)),
    "relu last": (lambda: nn.Sequential(nn.Linear(6, 2), nn.ReLU()), (6,)),
    "relu twice": (
        lambda: nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 2)),
        (6,),
    ),
    "relu after each activation": (
        lambda: nn.Sequential(
            *(
                nn.Linear(6, 6),
                nn.Tanh(),
                nn.ReLU(),
                nn.Linear(6, 6),
                nn.SiLU(),
                nn.ReLU(),
                nn.Linear(6, 6),
            ),
            *(
                nn.GELU(),
                nn.ReLU(),
                nn.Linear(6, 6),
                nn.ELU(),
                nn.ReLU(),
                nn.Linear(6, 6),
                nn.LeakyReLU(),
                nn.ReLU(),
            ),
            *(nn.Linear(6, 6), nn.Sigmoid(), nn.ReLU(), nn.Linear(6, 2)),
        ),
        (6,),
    ),
    "relu after a norm without affine": (
        lambda: nn.Sequential(
            nn.Linear(6, 4), nn.LayerNorm(4, elementwise_affine=False), nn.ReLU(), nn.Linear(4, 2)
        ),
        (6,),
    ),
    "relu after identity after tanh": (
        lambda: nn.Sequential(
            nn.Linear(6, 4), nn.Tanh(), nn.Identity(), nn.ReLU(), nn.Linear(4, 2)
        ),
        (6,),
    ),
    "dropouts in a row": (
        lambda: _salted(Dropout(0.2), nn.Linear(6, 6), Dropout(0.3), Dropout(0.5)),
        (6,),
    ),
    "an activation used twice": (lambda: _twice(nn.Tanh()), (6,)),
    "from signals to a vector": (
        lambda: nn.Sequential(
            nn.Linear(6, 4),
            nn.GroupNorm(3, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.LayerNorm(12),
            nn.Linear(12, 2),
        ),
        (3, 6),
    ),
    "the zoo's, convolutional": (lambda: conv1d(16, 2, 2, (4, 8), 3), (16,)),
    "from words to a vector": (
        lambda: nn.Sequential(
            Embedding(4, 3), nn.Linear(3, 6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 2)
        ),
        (5,),
    ),
    "an embedding of a part": (
        lambda: nn.Sequential(nn.Identity(), Series(2), Embedding(4, 3), nn.Flatten()),
        (6,),
    ),
    "a convolution twice": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.ReLU(), nn.Conv1d(3, 2, 2, stride=2), nn.ReLU(), nn.Flatten()
        ),
        (2, 6),
    ),
    "relu after a mean": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.ReLU(), nn.Flatten()
        ),
        (2, 6),
    ),
    "relu before each pool": (
        lambda: nn.Sequential(
            *(
                nn.Conv2d(1, 3, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.ReLU(),
                nn.Conv2d(3, 2, 2),
                nn.ReLU(),
            ),
            *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2, 2)),
        ),
        (1, 6, 6),
    ),
    "dropout of a signal": (
        lambda: _salted(
            nn.Conv1d(2, 3, 2), Dropout(0.4), nn.Conv1d(3, 2, 2), Dropout(0.4), nn.Flatten()
        ),
        (2, 6),
    ),
    "nested": (
        lambda: nn.Sequential(
            nn.Sequential(nn.Linear(6, 4), nn.Sequential(nn.SiLU())), nn.Sequential(nn.Linear(4, 2))
        ),
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
    """Return inputs [K, B, *shape] and parameters [K, *] that differ between clients and from their
    usual start.
    """
    torch.manual_seed(0)
    params = [torch.randn(K, *p.shape, dtype=torch.float64) for p in module.parameters()]
    if _takes_indices(module):
        return torch.randint(0, 4, (K, B, *shape)).double(), params
    return torch.randn(K, B, *shape, dtype=torch.float64), params


def _takes_indices(module: nn.Module) -> bool:
    return any(isinstance(layer, Embedding) for layer in module.modules())


def _by_autograd(
    module: nn.Module, x: Tensor, params: list[Tensor], weight: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return y, dL/dx and the parameters' gradients for L = sum(weight * y), one client after
    another.
    """
    module = module.double().train()
    ys = []
    dxs = []
    gradients = []

    for k in range(len(x)):
        for layer in module.modules():
            if isinstance(layer, Dropout):
                layer.key.copy_(KEY_K[k])

        x_k = x[k].clone().requires_grad_()
        own = {
            name: p[k].clone().requires_grad_()
            for name, p in zip(dict(module.named_parameters()), params, strict=True)
        }
        y = functional_call(module, own, (x_k * 1,))  # * 1: a layer may work in place
        loss = y.sum() if weight is None else (weight[k] * y).sum()
        found = torch.autograd.grad(
            loss, [x_k, *own.values()], allow_unused=True, materialize_grads=True
        )
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


def test_a_layer_goes_forward_and_back_like_autograd(
    case: tuple[nn.Module, tuple[int, ...]],
) -> None:
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


@pytest.mark.parametrize(
    ("beta", "alpha"), [(1.0, 1.0), (1.0, -0.1), (0.9, -0.1), (0.0, 2.0), (2.0, 0.0)]
)
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


def test_a_step_may_be_written_straight_into_the_weights(
    any_case: tuple[nn.Module, tuple[int, ...]],
) -> None:
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
        x = whole[:clients, :width]
        own = [p[:clients] for p in params]
        y = ruled.forward(x.clone(), own, KEY_K[:clients]).clone()
        true_y, _, true_gradients = _by_autograd(model, x, own, None)
        targets = [torch.empty_like(p) for p in own]
        ruled.backward(torch.ones_like(y), own, targets, beta=0, alpha=1)
        assert _close(y, true_y)
        assert all(_close(t, g) for t, g in zip(targets, true_gradients, strict=True))


def test_another_type_of_number_gets_buffers_of_its_own(
    any_case: tuple[nn.Module, tuple[int, ...]],
) -> None:
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
        ruled = RuledModel(model)
        targets = [torch.empty_like(p) for p in params]
        y = ruled.forward(x.clone(), params, KEY_K).clone()
        ruled.backward(torch.ones_like(y), params, targets, beta=0, alpha=1)
        return [y, *targets]

    clean = run(x)
    (params[0] if _takes_indices(model) else x)[1] = float("nan")
    for before, after in zip(clean, run(x), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])


def test_dropouts_mask_is_the_clients_own_in_a_stack() -> None:
    ruled = RuledModel(nn.Sequential(Dropout(0.5, salt=4)))
    ones = torch.ones(K, B, 50)
    together = ruled.forward(ones, [], KEY_K)
    for k in range(K):
        alone = RuledModel(nn.Sequential(Dropout(0.5, salt=4))).forward(
            ones[:1], [], KEY_K[k : k + 1]
        )
        assert torch.equal(together[k], alone[0])
        keep = streams.uniform(streams.subkey(KEY_K[k], 4), B * 50).view(B, 50) >= 0.5
        assert torch.equal(together[k] != 0, keep)


# Per-patient norms and weighted sums

N = 4  # patients of a client
WITH_PARAMETERS = [
    name
    for name, (make, _) in {**LAYERS, **MODELS}.items()
    if any(True for _ in make().parameters())
]


@pytest.fixture(params=WITH_PARAMETERS)
def trained_case(request: pytest.FixtureRequest) -> tuple[nn.Module, tuple[int, ...]]:
    make, shape = {**LAYERS, **MODELS}[request.param]
    return make().double(), shape


def _patients(
    model: nn.Module, shape: tuple[int, ...], records: int, clients: int = K
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Return x [A, N * R, *shape], parameters [A, *], streams of the slots [A, N * R] and weights
    [A, N], some zero.
    """
    torch.manual_seed(records)
    params = [torch.randn(clients, *p.shape, dtype=torch.float64) for p in model.parameters()]
    size = (clients, N * records, *shape)
    if _takes_indices(model):
        x = torch.randint(0, 4, size).double()
    else:
        x = torch.randn(size, dtype=torch.float64)
    weight = torch.rand(clients, N, dtype=torch.float64) * (torch.arange(N) != 2)
    return x, params, streams.words(torch.arange(clients), N * records), weight


def _by_func(
    model: nn.Module, x: Tensor, params: list[Tensor], key_AB: Tensor, dz: Tensor, records: int
) -> list[Tensor]:
    """Return the gradients [A, N, *shape] of sum(dz * y) over each patient's slots,
    by vmap(grad).
    """
    names = list(dict(model.named_parameters()))
    dropouts = [
        f"{name}.key".lstrip(".")
        for name, layer in model.named_modules()
        if isinstance(layer, Dropout)
    ]
    model.train()

    def loss(own: list[Tensor], x_R: Tensor, key_R: Tensor, dz_R: Tensor) -> Tensor:
        def output(row: Tensor, key: Tensor) -> Tensor:
            state = {**dict(zip(names, own, strict=True)), **dict.fromkeys(dropouts, key)}
            return functional_call(model, state, (row[None] * 1,))[0]  # type: ignore[no-any-return]

        return (
            dz_R * torch.stack([output(r, key) for r, key in zip(x_R, key_R, strict=True)])
        ).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0))
    found = []
    for a in range(len(x)):
        parts = [t[a].reshape(N, records, *t.shape[2:]) for t in (x, key_AB, dz)]
        found.append(each([p[a] for p in params], *parts))
    return [torch.stack(g) for g in zip(*found, strict=True)]


def _clipped(
    model: nn.Module,
    x: Tensor,
    params: list[Tensor],
    key_AB: Tensor,
    dz: Tensor,
    records: int,
    weight: Tensor,
) -> tuple[Tensor, list[Tensor]]:
    """Return norms and weighted sums by the rules."""
    ruled = RuledModel(model)
    targets = [torch.full_like(p, float("nan"), dtype=torch.float64) for p in params]
    ruled.forward(x.clone(), params, key_AB)
    return ruled.clipped_backward(dz.clone(), params, targets, records, lambda _: weight), targets


@pytest.mark.parametrize("records", [1, 3])
def test_norms_and_weighted_sums_are_those_of_vmap(
    trained_case: tuple[nn.Module, tuple[int, ...]], records: int
) -> None:
    model, shape = trained_case
    x, params, key_AB, weight = _patients(model, shape, records)
    ruled = RuledModel(model)
    dz = torch.randn_like(ruled.forward(x.clone(), params, key_AB))
    each = _by_func(model, x, params, key_AB, dz, records)
    targets = [torch.full_like(p, float("nan")) for p in params]
    norm = ruled.clipped_backward(dz.clone(), params, targets, records, lambda _: weight)
    assert norm.dtype == torch.float64
    assert torch.allclose(
        norm, torch.cat([g.flatten(2) for g in each], 2).norm(dim=2), rtol=1e-9, atol=1e-9
    )
    for target, g in zip(targets, each, strict=True):
        assert torch.allclose(
            target, torch.einsum("an,an...->a...", weight, g), rtol=1e-9, atol=1e-9
        )


def test_the_factor_is_asked_with_the_norms(
    trained_case: tuple[nn.Module, tuple[int, ...]],
) -> None:
    model, shape = trained_case
    x, params, key_AB, _ = _patients(model, shape, 1)
    ruled = RuledModel(model)
    seen = []
    y = ruled.forward(x.clone(), params, key_AB)

    def factor(norm: Tensor) -> Tensor:
        seen.append(norm.clone())
        return 1 / (norm + 0.01)

    targets = [torch.empty_like(p) for p in params]
    norm = ruled.clipped_backward(torch.ones_like(y), params, targets, 1, factor)
    assert len(seen) == 1
    assert torch.equal(seen[0], norm)
    _, expected = _clipped(model, x, params, key_AB, torch.ones_like(y), 1, factor(norm))
    assert all(torch.equal(t, e) for t, e in zip(targets, expected, strict=True))


def test_private_and_plain_steps_reuse_buffers_rightly(
    trained_case: tuple[nn.Module, tuple[int, ...]],
) -> None:
    """A plain step after a private one, fewer clients, other batches: nothing remembered may be
    stale.
    """
    model, shape = trained_case
    ruled = RuledModel(model)
    for clients, records, private in [
        (K, 3, True),
        (K, 3, False),
        (2, 1, True),
        (1, 2, True),
        (2, 2, False),
        (K, 1, True),
    ]:
        x, params, key_AB, weight = _patients(model, shape, records, clients)
        y = ruled.forward(x.clone(), params, key_AB)
        dz = torch.randn_like(y)
        targets = [torch.empty_like(p) for p in params]

        if private:
            ruled.clipped_backward(
                dz.clone(), params, targets, records, lambda _, weight=weight: weight
            )
        else:
            ruled.backward(dz.clone(), params, targets, beta=0, alpha=1)
            weight = torch.ones_like(weight)

        _, fresh = _clipped(model, x, params, key_AB, dz, records, weight)
        assert all(_close(t, f) for t, f in zip(targets, fresh, strict=True))


@pytest.mark.parametrize(("records", "poison"), [(1, float("inf")), (3, float("nan"))])
def test_a_patient_that_is_not_finite_is_left_out_exactly(
    trained_case: tuple[nn.Module, tuple[int, ...]], poison: float, records: int
) -> None:
    model, shape = trained_case
    x, params, key_AB, weight = _patients(model, shape, records)
    dz = torch.randn_like(RuledModel(model).forward(x.clone(), params, key_AB))
    without = weight.clone()
    without[1, 3] = 0
    norm, expected = _clipped(model, x, params, key_AB, dz, records, without)
    # one number of its last record
    (dz if _takes_indices(model) else x)[1, 4 * records - 1].view(-1)[0] = poison
    spoilt, targets = _clipped(model, x, params, key_AB, dz, records, weight)
    if not spoilt[1, 3].isfinite():
        assert all(torch.equal(t, e) for t, e in zip(targets, expected, strict=True))
    else:
        assert all(t.isfinite().all() for t in targets)  # a layer let through nothing of it
    spoilt[1, 3] = norm[1, 3]
    assert torch.equal(spoilt, norm)


def test_a_patients_nan_is_noticed_where_a_weight_of_zero_would_spread_it() -> None:
    model = mlp(6, 1, (8, 5), norm="layer").double()
    x, params, key_AB, weight = _patients(model, (6,), 1)
    x[0, 1, 2] = float("nan")
    norm, targets = _clipped(
        model, x, params, key_AB, torch.ones(K, N, 1, dtype=torch.float64), 1, weight
    )
    assert norm.isinf().nonzero().tolist() == [[0, 1]]
    assert all(t.isfinite().all() for t in targets)
    ruled = RuledModel(model)
    ruled.forward(x, params, key_AB)
    ruled.backward(torch.ones(K, N, 1, dtype=torch.float64), params, targets, beta=0, alpha=1)
    assert targets[0][0].isnan().any()


@pytest.mark.parametrize("shape", [(1, 40, 30), (5, 40, 30), (9, 40, 30), (3, 4, 6), (7, 4, 6)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_basis_has_the_gradients_norm_and_sum(shape: tuple[int, int, int], bias: bool) -> None:
    S, inputs, outputs = shape
    torch.manual_seed(0)
    rule = LinearRule(nn.Linear(inputs, outputs, bias=bias))
    rule.slots = torch.Size((K, S * N))
    rule.x = torch.randn(K, S * N, inputs, dtype=torch.float64)
    rule.dy = torch.randn(K, S * N, outputs, dtype=torch.float64)
    rule.x[0, :S] = rule.x[0, :1]  # copies: a basis of one
    gradients = [rule._product(rule.dy, rule.x, K * N), rule._total(rule.dy, K * N)][: 1 + bias]
    square = torch.as_tensor(sum(g.flatten(1).square().sum(1) for g in gradients))
    weight = torch.rand(K, N, dtype=torch.float64)
    assert torch.allclose(rule._square_norms_in_basis(K, N).view(-1), square, rtol=1e-12)
    targets = [torch.empty(K, *g.shape[1:], dtype=torch.float64) for g in gradients]
    rule.accumulate(targets, 0, 1, weight.repeat_interleave(S, 1))
    for target, g in zip(targets, gradients, strict=True):
        assert torch.allclose(
            target, torch.einsum("an,an...->a...", weight, g.view(K, N, *g.shape[1:])), rtol=1e-11
        )


def test_records_that_undo_one_another_leave_everybody_elses_part_in_place() -> None:
    """The norm of their sum is zero, that of each is huge: summed part by part they would swallow
    the others.
    """
    torch.manual_seed(0)
    model = nn.Linear(40, 30)
    x = torch.randn(1, N, 1, 40).expand(-1, -1, 2, -1).clone()
    dz = torch.randn(1, N, 1, 30) * torch.tensor([1.0, -1.0])[:, None]
    dz[:, 0] *= 1e25
    dz[:, 1:, 1] = 0
    params = [torch.randn(1, *p.shape) for p in model.parameters()]
    key = torch.zeros(1, 2 * N, dtype=torch.int64)

    def total(dz: Tensor) -> tuple[Tensor, Tensor]:
        ruled = RuledModel(model)
        ruled.forward(x.reshape(1, 2 * N, 40), params, key)
        targets = [torch.empty_like(p, dtype=torch.float64) for p in params]
        norm = ruled.clipped_backward(
            dz.reshape(1, 2 * N, 30), params, targets, 2, lambda n: 1 / (n + 0.01)
        )
        return norm, torch.cat([t.flatten() for t in targets])

    absent = dz.clone()
    absent[:, 0] = 0
    (norm, found) = total(dz)
    (_, expected) = total(absent)
    assert not norm.isnan().any() and float((found - expected).norm()) < 1e-9


def test_rows_that_a_patient_reads_twice_add_before_they_are_squared() -> None:
    model = Embedding(3, 1).double()
    ones = torch.ones(1, 2, 2, 1, dtype=torch.float64)
    x = torch.tensor([[[1.0, 1.0], [0.0, 2.0]]], dtype=torch.float64)
    params = [torch.zeros(1, 3, 1, dtype=torch.float64)]
    norm, (total,) = _clipped(
        model, x, params, torch.zeros(1, 2, dtype=torch.int64), ones, 1, torch.ones(1, 2)
    )
    assert torch.allclose(norm, torch.tensor([[2.0, 2.0**0.5]], dtype=torch.float64))
    assert total.view(-1).tolist() == [1, 2, 1]
    norm, _ = _clipped(
        model, x, params, torch.zeros(1, 2, dtype=torch.int64), ones, 2, torch.ones(1, 1)
    )
    assert float(norm) == pytest.approx(6**0.5)


FLOAT32_MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "one record": (lambda: mlp(20, 1, (64, 32)), (20,), 1),
    "one record, layer norm": (lambda: mlp(20, 1, (64, 32), norm="layer"), (20,), 1),
    "three records, pairs": (lambda: mlp(20, 1, (64, 32)), (20,), 3),
    "tokens, gradients": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Flatten(), nn.Linear(180, 1)),
        (30, 4),
        1,
    ),
    "convolution": (lambda: conv1d(40, 1, 1, (8, 16)), (40,), 1),
    "convolution, two records": (lambda: conv1d(40, 1, 1, (8, 16)), (40,), 2),
    "words": (lambda: nn.Sequential(Embedding(9, 4), nn.Flatten(), nn.Linear(40, 1)), (10,), 1),
}


@pytest.mark.parametrize("name", FLOAT32_MODELS)
def test_one_patient_never_moves_a_float64_sum_by_more_than_its_clip(name: str) -> None:
    """With float32 weights and features; and it moves it by no less, so the bound is met, not
    avoided.
    """
    make, shape, records = FLOAT32_MODELS[name]
    torch.manual_seed(4)
    model = make()
    patients = 60
    x = torch.randn(1, patients * records, *shape) * 10 ** torch.linspace(
        -2, 3, patients
    ).repeat_interleave(records).view(1, -1, *(1 for _ in shape))
    if _takes_indices(model):
        x = torch.randint(0, 9, x.shape).float()
    params = [p.detach()[None].clone() for p in model.parameters()]
    key = torch.zeros(1, patients * records, dtype=torch.int64)
    dz = torch.randn(1, patients * records, 1)
    C = 0.7

    def total(dz: Tensor) -> Tensor:
        ruled = RuledModel(model)
        targets = [torch.empty_like(p, dtype=torch.float64) for p in params]
        ruled.forward(x.clone(), params, key)
        ruled.clipped_backward(
            dz.clone(), params, targets, records, lambda norm: C / norm.clamp(min=1e-9)
        )
        return torch.cat([t.flatten() for t in targets])

    everyone = total(dz)
    for patient in range(0, patients, 7):
        absent = dz.clone()
        absent[:, patient * records : (patient + 1) * records] = 0
        moved = float((everyone - total(absent)).norm())
        assert C * (1 - 1e-5) <= moved <= C * (1 + 1e-6)


def test_float32_targets_take_float32_sums() -> None:
    model = mlp(20, 1, (64, 32), norm="group")
    torch.manual_seed(0)
    params = [p.detach()[None].clone() for p in model.parameters()]
    x = torch.randn(1, 50, 20)
    found = []
    for dtype in (torch.float32, torch.float64):
        ruled = RuledModel(model)
        targets = [torch.empty_like(p, dtype=dtype) for p in params]
        z = ruled.forward(x.clone(), params, torch.zeros(1, dtype=torch.int64))
        ruled.clipped_backward(torch.ones_like(z), params, targets, 1, lambda norm: 1 / norm)
        assert all(t.dtype == dtype for t in targets)
        found.append(torch.cat([t.flatten() for t in targets]))
    assert torch.allclose(found[0].double(), found[1], atol=1e-5)
    assert not torch.equal(found[0].double(), found[1])


def test_units_are_dropped_by_each_slots_own_stream() -> None:
    ruled = RuledModel(nn.Sequential(Dropout(0.5, salt=4)))
    ones = torch.ones(K, B, 50)
    key_AB = streams.words(KEY_K, B)
    kept = ruled.forward(ones, [], key_AB) != 0
    keep = streams.uniform(streams.subkey(key_AB, 4), 50) >= 0.5
    assert torch.equal(kept, keep)


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
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
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
    yield "a convolution in groups", nn.Sequential(nn.Conv1d(4, 4, 1, groups=2))
    yield "a convolution of each channel", nn.Sequential(nn.Conv2d(4, 4, 1, groups=4))
    yield "a convolution padded by a name", nn.Sequential(nn.Conv1d(4, 4, 3, padding="same"))

    yield (
        "a convolution round a circle",
        nn.Sequential(nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular")),
    )
    yield "a transposed convolution", nn.Sequential(nn.ConvTranspose1d(4, 4, 3))
    yield "a convolution of volumes", nn.Sequential(nn.Conv3d(4, 4, 3))
    yield "torch's own embedding, which takes integers only", nn.Sequential(nn.Embedding(4, 4))
    yield "an embedding with a fixed row", nn.Sequential(Embedding(4, 4, padding_idx=0))
    yield "an embedding with a greatest norm", nn.Sequential(Embedding(4, 4, max_norm=1.0))
    yield (
        "an embedding scaled by frequency",
        nn.Sequential(Embedding(4, 4, scale_grad_by_freq=True)),
    )
    yield "a sparse embedding", nn.Sequential(Embedding(4, 4, sparse=True))
    yield "means of parts", nn.Sequential(nn.Conv1d(4, 4, 3), nn.AdaptiveAvgPool1d(2))
    yield (
        "means of parts of an axis",
        nn.Sequential(nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d((None, 1))),
    )
    yield (
        "a pool that returns indices",
        nn.Sequential(nn.Conv1d(4, 4, 3), nn.MaxPool1d(2, return_indices=True)),
    )
    yield "a container of one's own", nn.Sequential(Residual(), nn.Linear(4, 1))
    yield "a bare container", Residual()
    yield "a layer that inherits", nn.Sequential(Doubled(4, 4))
    yield "a list", nn.ModuleList([nn.Linear(4, 4)])
    yield "flatten of other axes", nn.Sequential(nn.Flatten(2), nn.Linear(4, 4))
    yield "unflatten of another axis", nn.Sequential(nn.Unflatten(2, (2, 2)), nn.Linear(2, 4))
    yield "flatten of some axes", nn.Sequential(nn.Flatten(1, 2), nn.Linear(4, 4))
    yield "a layer used twice", nn.Sequential(shared, nn.ReLU(), shared)
    yield "a norm used twice", nn.Sequential(norm, nn.Linear(4, 4), norm)
    yield "tied weights", _tied()
    yield "a frozen layer", nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 1))
    yield "a frozen bias", _frozen(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), "0.bias")
    yield "a frozen norm", _frozen(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 1)), "0.weight")
    yield (
        "a parametrised weight",
        nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
    )
    yield "a parameter beside the layers", _with_a_scale()


WITHOUT = dict(_without_rules())


@pytest.mark.parametrize("name", WITHOUT)
def test_what_the_rules_would_compute_wrongly_has_none(name: str) -> None:
    assert not has_rules(WITHOUT[name])


def test_a_pruned_weight_has_no_rules() -> None:
    """Pruning replaces the weight by a masked one before each forward pass: it is no parameter
    then.
    """
    layer = nn.Linear(4, 4)
    prune.l1_unstructured(layer, "weight", amount=0.5)
    assert not has_rules(nn.Sequential(layer))


def test_a_layer_alone_has_rules() -> None:
    assert has_rules(nn.Linear(3, 1))


@pytest.mark.parametrize("name", ["logistic", "mlp", "medical-mlp"])
@pytest.mark.parametrize("norm", ["layer", "group", "none"])
def test_the_whole_zoo_has_rules(name: str, norm: str) -> None:
    assert has_rules(
        build(name, 5, 3, {} if name == "logistic" else {"norm": norm, "dropout": 0.2}, 0)
    )


@pytest.mark.parametrize(
    "options", [{}, {"channels": 3}, {"widths": [7, 20, 8], "kernel": 3}, {"widths": []}]
)
def test_the_zoos_convolutional_network_has_rules(options: dict[str, object]) -> None:
    model = build("conv1d", 36, 3, options, 0)
    assert has_rules(model)
    assert model(torch.zeros(2, 36)).shape == (2, 3)


@pytest.mark.parametrize(
    "options", [{"kernel": 4}, {"kernel": 0}, {"channels": 5}, {"channels": 0}]
)
def test_series_that_cannot_be_cut_are_refused(options: dict[str, int]) -> None:
    (name, value), *_ = options.items()
    with pytest.raises(StudyError, match=f"{name}={value}"):
        build("conv1d", 36, 1, {"widths": [8, 8], **options}, 0)


def test_ruled_parameters_are_in_the_layouts_order() -> None:
    model = mlp(6, 2, (8, 5), 0.3, "layer")
    names = [name for rule in RuledModel(model).rules for name in rule.names]
    assert names == [name.rpartition(".")[2] for name in Layout.of(model).shapes]
