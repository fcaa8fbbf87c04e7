"""The small zoo: networks for tables of patients. Norms work within one patient, never across a
batch (no BatchNorm).

A model is any `torch.nn.Module` that maps features [B, F] to outputs [B, C]: C = 1 logit for a
binary target, C logits for C classes, 1 number for regression. A study names one of the zoo, or
`package.module:factory`, a function `factory(features, outputs, **options) -> nn.Module`.
"""

import importlib
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from medfed.core import streams
from medfed.core.checks import PlanError, StudyError, nearest, plain
from medfed.core.flat import fingerprint, select_trained, select_untrained

Norm = Literal["layer", "group", "none"]
Init = Literal["torch", "he"]
# at most so many groups of at least so many units: a group of one would be all zeros
_GROUPS = 8
_CHANNELS = 4


class Dropout(nn.Module):
    """Zero each unit with probability `p`, by a mask that is a function of (key, unit).

    The key is a buffer, set anew for each local step from the client's own stream. So a stack of
    clients, one client alone and the reference loop all drop the same units. Evaluation mode is the
    identity.
    """

    key: Tensor

    def __init__(self, p: float, salt: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise StudyError(f"dropout={p}; expected a share of units in [0, 1)")
        self.p = p
        self.salt = salt
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = (
            streams.uniform(streams.subkey(self.key, self.salt), x.numel()).reshape(x.shape)
            >= self.p
        )
        return torch.where(keep, x / (1 - self.p), torch.zeros((), dtype=x.dtype))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class Embedding(nn.Embedding):
    """A table of rows by index, where indices arrive as numbers among a row's features: they are
    cut to integers.
    """

    def forward(self, index: Tensor) -> Tensor:
        return super().forward(index.long())


class Series(nn.Module):
    """Cut the features [B, F] of a row into series [B, channels, F / channels]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.channels, -1)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"


def norm_layer(kind: Norm, width: int) -> nn.Module:
    """Return the norm layer of `kind` for `width` units."""
    match kind:
        case "layer":
            return nn.LayerNorm(width)
        case "group":
            groups = next(
                g for g in range(max(1, min(_GROUPS, width // _CHANNELS)), 0, -1) if width % g == 0
            )
            return nn.GroupNorm(groups, width)
        case "none":
            return nn.Identity()
        case _:
            raise StudyError(
                f"norm={kind!r}; expected one of {', '.join(map(repr, get_args(Norm)))}"
            )


def mlp(
    features: int,
    outputs: int = 1,
    hidden: Sequence[int] = (64, 32),
    dropout: float = 0.0,
    norm: Norm = "none",
    init: Init = "torch",
) -> nn.Sequential:
    """Return a multi-layer perceptron:
    for each hidden width Linear, norm, ReLU, dropout; then Linear.

    init: "torch" is torch's own; "he" keeps the signal's size through the layers (He et al. 2015),
    biases zero. Without a norm layer a deep network under privacy needs "he": else the last bias
    takes all of a clipped gradient.

    Args:
        features: inputs a row.
        outputs: a row's, C.
        hidden: widths, from the input on.
        dropout: the share of units that a step drops, 0 to 1.
        norm: the norm layer behind each Linear.
        init: how weights begin.
    """
    layers: list[nn.Module] = []
    width = features
    for units in hidden:
        layers += [nn.Linear(width, units), norm_layer(norm, units), nn.ReLU(), Dropout(dropout)]
        width = units

    layers.append(nn.Linear(width, outputs))
    kept = [
        m
        for m in layers
        if not isinstance(m, nn.Identity) and not (isinstance(m, Dropout) and m.p == 0)
    ]
    if init == "he":
        for layer in (m for m in kept if isinstance(m, nn.Linear)):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    elif init != "torch":
        raise StudyError(f"init={init!r}; expected one of {', '.join(map(repr, get_args(Init)))}")

    return nn.Sequential(*kept)


def logistic(features: int, outputs: int = 1) -> nn.Sequential:
    """Return one Linear layer from zero: logistic, softmax or linear regression.

    Args:
        features: inputs a row.
        outputs: a row's, C.
    """
    layer = nn.Linear(features, outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return nn.Sequential(layer)


def medical_mlp(
    features: int = 32,
    outputs: int = 1,
    hidden: Sequence[int] = (512, 256, 128, 64, 32),
    dropout: float = 0.3,
    norm: Norm = "layer",
    init: Init = "torch",
) -> nn.Sequential:
    """Return five hidden layers with dropout; their L2 penalty is `training.weight_decay`.

    The brief (docs/from-the-brief.md) normalises over the batch (BatchNorm). That mixes patients,
    so it cannot carry a patient-level guarantee, and its running statistics differ between
    hospitals: LayerNorm stands in its place. With 32 features it has 193,473 parameters; the brief
    says about 195,000.
    """
    return mlp(features, outputs, hidden, dropout, norm, init)


def conv1d(
    features: int,
    outputs: int = 1,
    channels: int = 1,
    widths: Sequence[int] = (16, 32),
    kernel: int = 5,
) -> nn.Sequential:
    """Return a small convolutional network on series: for each width Conv1d, GroupNorm, ReLU; then
    mean and Linear.

    Args:
        features: inputs a row: its `channels` series one after another, so a multiple of
            `channels`.
        outputs: a row's, C.
        channels: how many series a row has.
        widths: of the convolutions, from the input on; each halves the series' length.
        kernel: an odd number of neighbouring values that a convolution reads.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise StudyError(
            f"kernel={kernel}; expected an odd number, so that a step has as much on its left as "
            "right"
        )
    if channels < 1 or features % channels:
        raise StudyError(
            f"channels={channels}; expected a divisor of the {features} features, which are cut "
            "into series"
        )

    layers: list[nn.Module] = [Series(channels)]
    for before, width in pairwise([channels, *widths]):
        layers += [
            nn.Conv1d(before, width, kernel, stride=2, padding=kernel // 2),
            norm_layer("group", width),
            nn.ReLU(),
        ]

    last = widths[-1] if widths else channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(last, outputs))


ZOO: dict[str, Callable[..., nn.Module]] = {
    "logistic": logistic,
    "mlp": mlp,
    "conv1d": conv1d,
    "medical-mlp": medical_mlp,
}


def build(
    name: str, features: int, outputs: int, options: Mapping[str, Any], seed: int
) -> nn.Module:
    """Build the model `name` with weights drawn from `seed`;
    everybody's generators stay as they were.

    Args:
        name: of the zoo, or an importable factory as "module:function".
        features: inputs a row.
        outputs: a row's, C.
        options: what the factory takes beside them: model.options.
        seed: of the weights.

    Raises StudyError for an unknown name or options that the factory does not take, PlanError where
    nothing can be trained. What the module does is probe.py's to say.
    """
    factory = ZOO[name] if name in ZOO else _import_factory(name)
    with seeded(seed):
        try:
            inspect.signature(factory).bind(features, outputs, **options)
        except TypeError as error:
            raise StudyError(
                f"model.name={name!r} does not take model.options={dict(options)}: {error}"
            ) from error
        try:
            module = factory(features, outputs, **options)
        except Exception as error:
            raise StudyError(
                f"model.name={name!r} cannot be built: {type(error).__name__}: {plain(error)}"
            ) from error

    if not isinstance(module, nn.Module):
        raise StudyError(
            f"model.name={name!r} made a {type(module).__name__}; expected a torch.nn.Module"
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise PlanError(
            f"model.name={name!r} has no trainable parameter. Set requires_grad on what shall be "
            "trained."
        )

    return _key_dropouts(module)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Have torch, numpy and Python draw from `seed`; all three generators are put back after."""
    of_numpy = np.random.get_state()
    of_python = random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed % (1 << 63))
            np.random.seed(seed % (1 << 32))
            random.seed(seed)
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def select_fixed(module: nn.Module) -> dict[str, Tensor]:
    """Return what is part of the model and not trained: frozen parameters and buffers, but for
    dropout's streams.
    """
    keys = set(dropout_keys(module))
    return {name: value for name, value in select_untrained(module).items() if name not in keys}


def dropout_keys(module: nn.Module) -> list[str]:
    """Return the names of the buffers that hold the streams of the module's dropout layers."""
    return [
        f"{name}.key".lstrip(".")
        for name, part in module.named_modules()
        if isinstance(part, Dropout)
    ]


def check_repeats(name: str, make: Callable[[], nn.Module]) -> None:
    """Raise PlanError where two builds by `make` of one seed differ.

    Parties build the model `name` each for itself, and so does `load`. A factory of the zoo is
    trusted.
    """
    if name in ZOO:
        return
    one = make()
    other = make()
    if one is other or {*map(id, one.parameters())} & {*map(id, other.parameters())}:
        raise PlanError(
            f"model.name={name!r} returns the same module every time it is called. Make a new "
            "one each time."
        )

    ours, theirs = ({**select_trained(m), **select_fixed(m)} for m in (one, other))
    for part in sorted(ours.keys() | theirs.keys()):
        if (
            part not in ours
            or part not in theirs
            or fingerprint({"": ours[part]}) != fingerprint({"": theirs[part]})
        ):
            raise PlanError(
                f"model.name={name!r}: {part!r} is another at each build from one seed. Draw "
                "first weights from the global generator of torch, numpy or Python, which are "
                "seeded, or load them from a file."
            )


def count(module: nn.Module) -> int:
    """Return the number of trainable parameters of a `module`."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def _import_factory(name: str) -> Callable[..., nn.Module]:
    module_name, _, attribute = name.partition(":")
    if not attribute:
        raise StudyError(
            f"model.name={name!r} is not in the zoo; {nearest(name, ZOO)} Your own: "
            "'package.module:factory'."
        )
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise StudyError(
            f"model.name={name!r} cannot be imported ({error}); is its folder on PYTHONPATH?"
        ) from error
    return found  # type: ignore[no-any-return]


def _key_dropouts(module: nn.Module) -> nn.Module:
    """Give every dropout layer of the module a mask of its own from the client's stream."""
    salt = 0
    for parent in list(module.modules()):
        # named_children() passes over one that comes twice
        for name, child in list(parent._modules.items()):
            if isinstance(child, nn.Dropout):
                setattr(parent, name, Dropout(child.p))
    for layer in module.modules():
        if isinstance(layer, Dropout):
            layer.salt = salt
            salt = salt + 1
    return module
