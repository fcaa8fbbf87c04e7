"""The kinds of modules whose path docs/privacy.md tells, each probed as a plan would: see
make_docs.py.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from medfed.core.checks import PlanError
from medfed.learn.probe import ROWS, probe
from medfed.learn.zoo import Embedding, Series, _key_dropouts, seeded

FEATURES = 16


def _between(*layers: nn.Module, width: int = 16) -> Callable[[], nn.Module]:
    """Return a maker of Linear, the layers, Linear."""
    return lambda: nn.Sequential(nn.Linear(FEATURES, 16), *layers, nn.Linear(width, 1))


class Own(nn.Module):
    """A container of one's own around what `between` does to hidden units."""

    def __init__(self, between: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.first = nn.Linear(FEATURES, 16)
        self.last = nn.Linear(16, 1)
        self.between = between
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self, self.first(x)))  # type: ignore[no-any-return]


def _series(kind: type[nn.RNNBase], **options: float) -> Callable[[], nn.Module]:
    def step(module: Own, h: Tensor) -> Tensor:
        return module.enc(h[:, :, None])[0][:, -1]  # type: ignore[no-any-return, operator]

    return lambda: Own(step, enc=kind(1, 16, num_layers=2, batch_first=True, **options))


def _attention(**options: float) -> Callable[[], nn.Module]:
    def step(module: Own, h: Tensor) -> Tensor:
        tokens = module.embed(h[:, :, None])  # type: ignore[operator]
        return module.attention(tokens, tokens, tokens)[0].mean(1)  # type: ignore[no-any-return, operator]

    def make() -> nn.Module:
        return Own(
            step,
            embed=nn.Linear(1, 16),
            attention=nn.MultiheadAttention(16, 2, batch_first=True, **options),
        )

    return make


def _encoder(dropout: float) -> Callable[[], nn.Module]:
    def step(module: Own, h: Tensor) -> Tensor:
        return module.layer(module.embed(h[:, :, None])).mean(1)  # type: ignore[no-any-return, operator]

    layer = partial_layer(dropout)
    return lambda: Own(step, embed=nn.Linear(1, 16), layer=layer())


def partial_layer(dropout: float) -> Callable[[], nn.Module]:
    return lambda: nn.TransformerEncoderLayer(16, 2, 32, dropout=dropout, batch_first=True)


def _changed(change: Callable[[nn.Sequential], object]) -> Callable[[], nn.Module]:
    """Return a maker of Linear, ReLU, Linear, changed."""

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(FEATURES, 16), nn.ReLU(), nn.Linear(16, 1))
        change(model)
        return model

    return make


def _tied() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(FEATURES, 16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 1)
    )
    model[3].weight = model[1].weight
    return model


def _used_twice() -> nn.Module:
    part = nn.Linear(16, 16)
    return nn.Sequential(nn.Linear(FEATURES, 16), part, nn.ReLU(), part, nn.Linear(16, 1))


def _signal(*layers: nn.Module, width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(Series(2), *layers, nn.Flatten(), nn.Linear(width, 1))


def _picture(*layers: nn.Module, width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), *layers, nn.Flatten(), nn.Linear(width, 1)
    )


def _half() -> nn.Module:
    def step(module: Own, h: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module.inner(h).float()  # type: ignore[no-any-return, operator]

    return Own(step, inner=nn.Linear(16, 16))


KINDS: dict[str, Callable[[], nn.Module]] = {
    "Linear, ReLU, Tanh, Sigmoid, SiLU, GELU, LeakyReLU, ELU": _between(
        nn.ReLU(), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.GELU(), nn.LeakyReLU(), nn.ELU()
    ),
    "LayerNorm, GroupNorm": _between(nn.LayerNorm(16), nn.GroupNorm(4, 16)),
    "nn.Dropout": _between(nn.Dropout(0.3)),
    "Conv1d, pooling, Flatten": _signal(
        nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.AvgPool1d(1), width=12
    ),
    "Unflatten, Conv2d, AdaptiveAvgPool2d(1)": _picture(
        nn.Conv2d(1, 4, 2), nn.AdaptiveAvgPool2d(1), width=4
    ),
    "medfed.learn.zoo.Embedding": lambda: nn.Sequential(
        Embedding(5, 2), nn.Flatten(), nn.Linear(32, 1)
    ),
    "other activations (Softplus, PReLU, Softmax ...)": _between(
        nn.Softplus(), nn.PReLU(), nn.Softmax(-1)
    ),
    "InstanceNorm1d without running statistics": _signal(
        nn.Conv1d(2, 4, 3), nn.InstanceNorm1d(4), width=24
    ),
    "grouped, dilated or transposed convolutions": _signal(nn.Conv1d(2, 4, 3, groups=2), width=24),
    "a container of one's own (residual, branches)": lambda: Own(
        lambda module, h: h + torch.tanh(h)
    ),
    "tied parameters": _tied,
    "one module used twice": _used_twice,
    "frozen parameters": _changed(lambda model: model[0].requires_grad_(False)),
    "constant buffers": lambda: Own(lambda module, h: h * module.scale, scale=_constant()),
    "weight_norm": _changed(lambda model: nn.utils.parametrizations.weight_norm(model[0])),
    "a forward hook": _changed(
        lambda model: model[0].register_forward_hook(lambda layer, args, y: 2 * y)
    ),
    "a hook on gradients": _changed(lambda model: model[0].weight.register_hook(lambda g: g / 2)),
    "bfloat16 inside": _half,
    "float64 throughout": lambda: nn.Sequential(_Cast(), nn.Linear(FEATURES, 1).double()),
    "GRU": _series(nn.GRU),
    "GRU with dropout": _series(nn.GRU, dropout=0.3),
    "LSTM": _series(nn.LSTM),
    "LSTM with dropout": _series(nn.LSTM, dropout=0.3),
    "MultiheadAttention": _attention(),
    "MultiheadAttention with dropout": _attention(dropout=0.3),
    "TransformerEncoderLayer": _encoder(0.0),
    "TransformerEncoderLayer with dropout": _encoder(0.3),
    "F.dropout(training=self.training)": lambda: Own(
        lambda module, h: F.dropout(h, 0.3, module.training)
    ),
    "AlphaDropout, Dropout1d": _between(nn.AlphaDropout(0.3), nn.Dropout1d(0.3)),
    "a way that follows from the row (`if x.sum() > 0`)": lambda: Own(
        lambda module, h: torch.stack(
            [2 * row if float(row.detach().sum()) > 0 else row for row in h]
        )
    ),
    "BatchNorm, running means": _between(nn.BatchNorm1d(16)),
    "spectral_norm": _changed(lambda model: nn.utils.parametrizations.spectral_norm(model[0])),
    "`x - x.mean(0)`": lambda: Own(lambda module, h: h - h.mean(0)),
    "F.dropout(x), also in evaluation": lambda: Own(lambda module, h: F.dropout(h, 0.3)),
}


class _Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


def _constant() -> nn.Module:
    """A part that holds a buffer, and is a factor of what it is multiplied with."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("value", torch.rand(16))

        def __rmul__(self, h: Tensor) -> Tensor:
            return h * self.value

    return Constant()


def table() -> Iterator[tuple[str, str, str, str]]:
    """Yield each kind with its path without and with a claim, and why it takes no faster one."""
    x_BF = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    for kind, make in KINDS.items():
        found: list[str] = []
        why = ""
        for private in (False, True):
            with seeded(0):
                model = _key_dropouts(make())
            try:
                probed = probe(model, "", x_BF, "binary", 1, private)
                found.append(f"`{probed.path}`")
                why = probed.reasons[-1] if probed.reasons else ""
            except PlanError as refusal:
                found.append("refused")
                why = str(refusal).removeprefix(": ").partition(". ")[0]
        yield kind, found[0], found[1], why
