"""The zoo, the models of others, and what is refused before any patient is looked at."""

import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from medfed.core import streams
from medfed.core.checks import PlanError, StudyError
from medfed.core.flat import vector
from medfed.learn import zoo
from medfed.learn.zoo import Dropout, build, count, medical_mlp


def _plant(monkeypatch: pytest.MonkeyPatch, factory: Callable[..., object]) -> str:
    """Put a factory into a module that can be imported; return its name for a study."""
    module = ModuleType("a_users_models")
    module.factory = factory  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_users_models", module)
    return "a_users_models:factory"


# Sizes


def test_the_briefs_network_has_193473_parameters() -> None:
    assert count(medical_mlp(32)) == count(build("medical-mlp", 32, 1, {}, 0)) == 193_473


def test_the_briefs_network_is_the_briefs() -> None:
    kinds = [type(layer) for layer in medical_mlp(32)]
    assert kinds == [nn.Linear, nn.LayerNorm, nn.ReLU, Dropout] * 5 + [nn.Linear]
    widths = [layer.out_features for layer in medical_mlp(32) if isinstance(layer, nn.Linear)]
    assert widths == [512, 256, 128, 64, 32, 1]
    assert {layer.p for layer in medical_mlp(32) if isinstance(layer, Dropout)} == {0.3}


@pytest.mark.parametrize("features", [1, 7, 32])
@pytest.mark.parametrize("outputs", [1, 3])
def test_parameters_are_counted_by_hand(features: int, outputs: int) -> None:
    assert count(build("logistic", features, outputs, {}, 0)) == (features + 1) * outputs
    plain = (features + 1) * 5 + 6 * 4 + 5 * outputs
    for norm, extra in {"none": 0, "layer": 2 * (5 + 4), "group": 2 * (5 + 4)}.items():
        assert (
            count(build("mlp", features, outputs, {"hidden": [5, 4], "norm": norm}, 0))
            == plain + extra
        )


def test_frozen_parameters_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    def factory(features: int, outputs: int) -> nn.Module:
        model = nn.Sequential(nn.Linear(features, 4), nn.Linear(4, outputs))
        model[0].requires_grad_(False)
        return model

    model = build(_plant(monkeypatch, factory), 3, 1, {}, 0)
    assert count(model) == len(vector(model)) == 5


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("outputs", [1, 4])
def test_every_model_of_the_zoo_maps_rows_one_by_one(name: str, outputs: int) -> None:
    """No row's output depends on another row."""
    model = build(name, 6, outputs, {}, 1).eval()
    x = torch.randn(9, 6)
    z = model(x)
    assert z.shape == (9, outputs)
    assert torch.allclose(torch.cat([model(row[None]) for row in x]), z, atol=1e-6)


def test_a_mlp_has_no_layer_that_does_nothing() -> None:
    assert [type(layer) for layer in zoo.mlp(3, hidden=(4,))] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in zoo.mlp(3, hidden=())] == [nn.Linear]


def test_he_keeps_a_deep_networks_last_bias_from_taking_all_of_a_gradient() -> None:
    share = {}
    for init in ("torch", "he"):
        model = build(
            "mlp", 20, 1, {"hidden": [64] * 6, "norm": "none", "dropout": 0.0, "init": init}, 3
        )
        model(torch.randn(1, 20, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients = [
            parameter.grad for parameter in model.parameters() if parameter.grad is not None
        ]
        share[init] = float(
            gradients[-1].norm() / torch.cat([g.flatten() for g in gradients]).norm()
        )
    assert 2 * share["he"] < share["torch"] and share["torch"] > 0.8


def test_logistic_starts_at_zero() -> None:
    assert not vector(build("logistic", 5, 2, {}, 3)).any()


@pytest.mark.parametrize(
    ("width", "groups"), [(64, 8), (32, 8), (20, 5), (12, 3), (8, 2), (7, 1), (26, 2), (1, 1)]
)
def test_group_norm_takes_most_groups_of_four_units_or_more(width: int, groups: int) -> None:
    layer = zoo.norm_layer("group", width)
    assert isinstance(layer, nn.GroupNorm)
    assert layer.num_groups == groups


@pytest.mark.parametrize("norm", ["none", "layer", "group"])
@pytest.mark.parametrize("width", [3, 4, 7, 8, 16])
def test_a_narrow_network_still_sees_its_input(norm: str, width: int) -> None:
    """Groups of one unit would normalise everything away."""
    model = build("mlp", 6, 1, {"hidden": [width], "norm": norm}, 2)
    assert len(model(torch.randn(50, 6)).unique()) > 10


# Building: weights are a function of the seed


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = (
        vector(build("mlp", 6, 2, {"norm": "layer"}, seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_stream_key_is_a_seed(seed: int) -> None:
    assert torch.isfinite(vector(build("mlp", 3, 1, {}, seed))).all()


def test_building_neither_reads_nor_moves_torchs_generator() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = vector(build("mlp", 6, 1, {}, 5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(vector(build("mlp", 6, 1, {}, 5)), first)


def test_torchs_generator_is_put_back_after_a_refusal() -> None:
    before = torch.get_rng_state()
    with pytest.raises(StudyError):
        build("mlp", 6, 1, {"hiden": [3]}, 5)
    assert torch.equal(torch.get_rng_state(), before)


# The models of others


def test_a_factory_is_imported_and_gets_sizes_and_options(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int, int]] = []

    def factory(features: int, outputs: int, width: int = 1) -> nn.Module:
        seen.append((features, outputs, width))
        return nn.Linear(features, outputs)

    assert isinstance(build(_plant(monkeypatch, factory), 3, 2, {"width": 9}, 0), nn.Linear)
    assert seen == [(3, 2, 9)]


def test_a_factory_may_lie_in_a_package() -> None:
    assert count(build("medfed.learn.zoo:mlp", 4, 1, {"hidden": [3]}, 0)) == 19


def test_an_unknown_name_gives_the_nearest() -> None:
    with pytest.raises(StudyError, match=r"'logistc' is not in the zoo; did you mean 'logistic'"):
        build("logistc", 3, 1, {}, 0)


def test_a_name_like_no_other_gives_all() -> None:
    with pytest.raises(StudyError, match=r"known: conv1d, logistic, medical-mlp, mlp"):
        build("resnet", 3, 1, {}, 0)


@pytest.mark.parametrize("name", ["no.such.module:factory", "medfed.learn.zoo:no_such_factory"])
def test_what_cannot_be_imported_is_told(name: str) -> None:
    with pytest.raises(StudyError, match=r"cannot be imported.*PYTHONPATH"):
        build(name, 3, 1, {}, 0)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"hiden": [3]}, "hiden"),
        ({"dropout": 1.5}, r"dropout=1.5; expected .* \[0, 1\)"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"dropout": -0.1}, "dropout=-0.1"),
        ({"dropout": float("nan")}, "dropout=nan"),
        ({"norm": "batch"}, "norm='batch'; expected one of 'layer', 'group', 'none'"),
        ({"hidden": 3}, "'mlp' cannot be built: TypeError"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], told: str) -> None:
    with pytest.raises(StudyError, match=told):
        build("mlp", 3, 1, options, 0)


def test_what_is_no_module_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StudyError, match=r"made a function; expected a torch.nn.Module"):
        build(_plant(monkeypatch, lambda features, outputs: lambda x: x), 3, 1, {}, 0)


def test_a_model_without_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="no trainable parameter"):
        build(_plant(monkeypatch, lambda features, outputs: nn.Sequential(nn.ReLU())), 3, 1, {}, 0)


# Dropout: a mask that is a function of (key, unit)


def _dropout(p: float, key: int = 0, salt: int = 0) -> Dropout:
    layer = Dropout(p, salt)
    layer.key.fill_(key)
    return layer


def test_the_same_key_gives_the_same_mask_and_another_key_or_layer_another() -> None:
    ones = torch.ones(4, 50)
    mask = _dropout(0.5, key=3)(ones)
    assert torch.equal(_dropout(0.5, key=3)(ones), mask)
    assert not torch.equal(_dropout(0.5, key=4)(ones), mask)
    assert not torch.equal(_dropout(0.5, key=3, salt=1)(ones), mask)


def test_a_rows_mask_does_not_depend_on_the_rows_after_it() -> None:
    layer = _dropout(0.5, key=3)
    ones = torch.ones(9, 20)
    assert torch.equal(layer(ones)[:4], layer(ones[:4]))


def test_evaluation_and_p_0_are_the_identity() -> None:
    x = torch.randn(4, 5)
    assert _dropout(0.5).eval()(x) is x
    assert _dropout(0.0)(x) is x


def test_kept_units_are_scaled_and_dropped_ones_are_zero_even_where_infinite() -> None:
    x = torch.full((100, 10), 3.0)
    y = _dropout(0.25, key=1)(x)
    assert set(y.unique().tolist()) == {0.0, 4.0}
    dropped = y == 0
    z = _dropout(0.25, key=1)(torch.where(dropped, float("inf"), x))
    assert torch.equal(z, y)


def test_gradients_pass_kept_units_only() -> None:
    x = torch.randn(30, 10, requires_grad=True)
    y = _dropout(0.4, key=1)(x)
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    assert torch.equal(x.grad != 0, y != 0)
    assert torch.allclose(x.grad[x.grad != 0], torch.tensor(1 / 0.6))


def _keeps(y: Tensor, p: float) -> bool:
    """Whether the share of kept units is 1 - p (exact binomial test)."""
    return bool(stats.binomtest(int((y != 0).sum()), y.numel(), 1 - p).pvalue > 1e-3)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_the_share_of_kept_units_is_right_and_a_wrong_one_is_caught(p: float) -> None:
    y = torch.stack([_dropout(p, key=key)(torch.ones(20, 50)) for key in range(200)])
    assert _keeps(y, p)
    assert not _keeps(y, p + 0.01)
    assert not _keeps(y, p - 0.01)


def test_units_steps_and_clients_drop_independently() -> None:
    keys = streams.subkey(torch.arange(1, 201)[:, None], 0).flatten()
    y = torch.stack([_dropout(0.5, key=int(key))(torch.ones(20, 50)) for key in keys]) != 0
    for one, two in [(y[:, :, :-1], y[:, :, 1:]), (y[:, :-1], y[:, 1:]), (y[:-1], y[1:])]:
        same = int((one == two).sum())
        assert stats.binomtest(same, one.numel()).pvalue > 1e-3
        planted = torch.where(
            torch.rand(one.shape, generator=torch.Generator().manual_seed(0)) < 0.02, one, two
        )
        assert stats.binomtest(int((one == planted).sum()), one.numel()).pvalue < 1e-3


def test_every_dropout_of_a_users_model_is_keyed_with_a_mask_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Block(nn.Module):
        def __init__(self, width: int, drop: nn.Module) -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)
            self.drop = drop

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop(self.linear(x))

    def factory(features: int, outputs: int) -> nn.Module:
        shared = nn.Dropout(0.4)
        return nn.Sequential(
            Block(features, nn.Dropout(0.2)),
            shared,
            nn.ModuleList([nn.Dropout(0.1)])[0],
            shared,
            Dropout(0.3),
        )

    model = build(_plant(monkeypatch, factory), 6, 6, {}, 0)
    keyed = [layer for layer in model.modules() if isinstance(layer, Dropout)]
    assert not any(isinstance(layer, nn.Dropout) for layer in model.modules())
    assert [layer.p for layer in keyed] == [0.2, 0.4, 0.1, 0.4, 0.3]
    assert len({layer.salt for layer in keyed}) == 5


def test_a_users_dropout_no_longer_asks_torchs_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = nn.Dropout(0.4)
    name = _plant(
        monkeypatch, lambda f, o: nn.Sequential(shared, nn.Linear(f, 8), shared, nn.Linear(8, o))
    )
    model = build(name, 6, 1, {}, 0).train()
    x = torch.randn(20, 6)
    state = torch.get_rng_state()
    assert torch.equal(model(x), model(x))
    assert torch.equal(torch.get_rng_state(), state)
