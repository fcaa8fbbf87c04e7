"""Modules as users bring them: factories for `model.name = "tests.modules:NAME"`. Some are right,
some cannot be.
"""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

WIDTH = 8


class _Net(nn.Module):
    """Linear to WIDTH, something in between, Linear to the outputs."""

    def __init__(self, features: int, outputs: int = 1) -> None:
        super().__init__()
        self.first = nn.Linear(features, WIDTH)
        self.last = nn.Linear(WIDTH, outputs)

    def between(self, h: Tensor) -> Tensor:
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(torch.tanh(self.first(x))))


# Right on the fastest path


def plain(f: int, o: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(f, WIDTH), nn.ReLU(), nn.Linear(WIDTH, o))


def dropout(f: int, o: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(f, WIDTH), nn.ReLU(), nn.Dropout(0.3), nn.Linear(WIDTH, o))


# Right on a slower one


def own_container(f: int, o: int = 1) -> nn.Module:
    return _Net(f, o)


class Tied(_Net):
    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.inner = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outer = nn.Linear(WIDTH, WIDTH, bias=False)
        self.outer.weight = self.inner.weight

    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(self.outer(torch.tanh(self.inner(h))))


class Twice(_Net):
    """One module used twice."""

    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.inner = nn.Linear(WIDTH, WIDTH)

    def between(self, h: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.tanh(self.inner(h))))


def twice_in_sequence(f: int, o: int = 1) -> nn.Module:
    inner = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(nn.Linear(f, WIDTH), inner, nn.Tanh(), inner, nn.Linear(WIDTH, o))


def frozen(f: int, o: int = 1) -> nn.Module:
    model = plain(f, o)
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model


def frozen_at_random(f: int, o: int = 1) -> nn.Module:
    """The frozen part comes from numpy's generator."""
    model = frozen(f, o)
    with torch.no_grad():
        model[0].weight.copy_(
            torch.from_numpy(np.random.standard_normal(tuple(model[0].weight.shape)))
        )
    return model


class Buffered(_Net):
    """Constant buffers, one that is kept in the state and one that is not."""

    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.register_buffer("scale", 0.5 + torch.rand(WIDTH))
        self.register_buffer("shift", torch.rand(WIDTH), persistent=False)

    def between(self, h: Tensor) -> Tensor:
        return h * self.scale + self.shift


def hooked(f: int, o: int = 1) -> nn.Module:
    """A forward hook in a model that looks like one of the zoo."""
    model = plain(f, o)
    model[0].register_forward_hook(lambda layer, args, y: 2 * y)
    return model


def hooked_backward(f: int, o: int = 1) -> nn.Module:
    model = plain(f, o)
    model[2].register_full_backward_hook(lambda layer, dx, dy: (0.5 * dx[0],))
    return model


def hooked_parameter(f: int, o: int = 1) -> nn.Module:
    model = plain(f, o)
    model[0].weight.register_hook(lambda g: 0.25 * g)
    return model


def weight_norm(f: int, o: int = 1) -> nn.Module:
    model = plain(f, o)
    nn.utils.parametrizations.weight_norm(model[0])
    return model


class Float64(_Net):
    def between(self, h: Tensor) -> Tensor:
        return (h.double() ** 2).to(h.dtype)


def all_float64(f: int, o: int = 1) -> nn.Module:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    return nn.Sequential(Cast(), *plain(f, o).double())


class Bfloat16(_Net):
    """Half precision inside, and outputs of it."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return super().forward(x)


def all_bfloat16(f: int, o: int = 1) -> nn.Module:
    class Cast(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.bfloat16()

    return nn.Sequential(Cast(), *plain(f, o).bfloat16())


class Gru(nn.Module):
    """A series read step by step; dropout between two layers draws from torch's generator."""

    kind: type[nn.RNNBase] = nn.GRU
    dropout = 0.0

    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__()
        self.enc = self.kind(1, WIDTH, num_layers=2, batch_first=True, dropout=self.dropout)
        self.last = nn.Linear(WIDTH, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.enc(x[:, :, None])[0][:, -1])


class Lstm(Gru):
    kind = nn.LSTM


class GruDropout(Gru):
    dropout = 0.4


class LstmDropout(Lstm):
    dropout = 0.4


class Attention(nn.Module):
    dropout = 0.0

    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=self.dropout, batch_first=True)
        self.last = nn.Linear(WIDTH, o)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x[:, :, None])
        return self.last(self.attention(h, h, h)[0].mean(1))


class AttentionDropout(Attention):
    dropout = 0.4


class Encoder(nn.Module):
    dropout = 0.0

    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 16, dropout=self.dropout, batch_first=True
        )
        self.last = nn.Linear(WIDTH, o)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.embed(x[:, :, None])).mean(1))


class EncoderDropout(Encoder):
    dropout = 0.4


class FunctionalDropout(_Net):
    def between(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.4, training=self.training)


def feature_alpha_dropout(f: int, o: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(f, WIDTH), nn.AlphaDropout(0.3), nn.Linear(WIDTH, o))


class Branching(_Net):
    """Which way it goes follows from the row."""

    def between(self, h: Tensor) -> Tensor:
        return torch.stack([2 * row if float(row.detach().sum()) > 0 else row for row in h])


class Checkpointed(_Net):
    def between(self, h: Tensor) -> Tensor:
        return checkpoint(torch.tanh, h, use_reentrant=False)


class InPlace(_Net):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return super().forward(x)


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return 3 * x**2 * dy


class OwnFunction(_Net):
    def between(self, h: Tensor) -> Tensor:
        return _Cube.apply(h)  # type: ignore[no-any-return]


# Refused


class Centred(_Net):
    """Mixes patients."""

    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(0)


class CentredQuietly(_Net):
    """Mixes patients where no gradient tells."""

    def between(self, h: Tensor) -> Tensor:
        return h - h.detach().mean(0)


class Inner(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return h / h.abs().max()


class ScaledInside(_Net):
    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.scale = Inner()

    def between(self, h: Tensor) -> Tensor:
        return self.scale(h)


class BySize(_Net):
    def between(self, h: Tensor) -> Tensor:
        return h / len(h)


class MixingInTraining(_Net):
    def between(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if self.training else h


class Running(_Net):
    """Running means of its own."""

    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def between(self, h: Tensor) -> Tensor:
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return h - self.mean


def spectral_norm(f: int, o: int = 1) -> nn.Module:
    model = plain(f, o)
    nn.utils.parametrizations.spectral_norm(model[0])
    return model


def batch_norm(f: int, o: int = 1) -> nn.Module:
    return nn.Sequential(nn.Linear(f, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, o))


class DropoutTwice(_Net):
    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.drop = nn.Dropout(0.4)

    def between(self, h: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.drop(h)))


class AlwaysDropping(_Net):
    def between(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.4)


class NumpyNoise(_Net):
    def between(self, h: Tensor) -> Tensor:
        if self.training:
            return h + float(np.random.standard_normal())
        return h


class PythonNoise(_Net):
    def between(self, h: Tensor) -> Tensor:
        return h + random.random() if self.training else h


class OwnGenerator(_Net):
    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.generator = torch.Generator().manual_seed(1)

    def between(self, h: Tensor) -> Tensor:
        if self.training:
            return h + torch.rand(WIDTH, generator=self.generator)
        return h


class Counting(_Net):
    """Gives another answer each time."""

    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.calls = 0

    def between(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h + self.calls


class FirstBatch(_Net):
    """Sets itself up on the first rows it sees."""

    shift: Tensor | None = None

    def between(self, h: Tensor) -> Tensor:
        if self.shift is None:
            self.shift = h.detach().mean(0)
        return h - self.shift


class LaterMeans(_Net):
    """Centres on what it has seen, once it has seen enough."""

    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.seen: list[Tensor] = []

    def between(self, h: Tensor) -> Tensor:
        self.seen.append(h.detach().mean(0))
        if len(self.seen) > 500:
            return h - torch.stack(self.seen).mean(0)
        return h


def lazy(f: int, o: int = 1) -> nn.Module:
    return nn.Sequential(nn.LazyLinear(WIDTH), nn.Linear(WIDTH, o))


class WrongShape(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, 0]


class Detached(_Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no such operator on this machine")


class FailsInTraining(_Net):
    def __init__(self, f: int, o: int = 1) -> None:
        super().__init__(f, o)
        self.part = Failing()

    def between(self, h: Tensor) -> Tensor:
        return self.part(h) if self.training else h


class FailsAlone(_Net):
    def between(self, h: Tensor) -> Tensor:
        assert len(h) > 1, "too few rows"
        return h


class FailsBackward(_Net):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            return x.clone()

        @staticmethod
        def backward(ctx, dy: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
            raise NotImplementedError("no derivative of this operator")

    def between(self, h: Tensor) -> Tensor:
        return self.Function.apply(h)  # type: ignore[no-any-return]


def another_each_time(f: int, o: int = 1) -> nn.Module:
    """Weights that no seed repeats."""
    model = plain(f, o)
    with torch.no_grad():
        model[0].weight.copy_(
            torch.from_numpy(np.random.default_rng().standard_normal(tuple(model[0].weight.shape)))
        )
    return model


_KEPT: dict[tuple[int, int], nn.Module] = {}


def one_for_all(f: int, o: int = 1) -> nn.Module:
    """The same module every time it is asked for."""
    return _KEPT.setdefault((f, o), plain(f, o))


def none_finite(f: int, o: int = 1) -> nn.Module:
    model = plain(f, o)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    return model
