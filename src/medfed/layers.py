"""Rules of stacked layers: forward and backward of K clients at once by batched products into kept buffers.

No autograd. A rule knows one kind of layer and three things about it:

    forward      x -> y, each client with its own parameters
    backward     dL/dy -> dL/dx; what the parameters' gradient needs is remembered, not multiplied out
    accumulate   target <- beta * target + alpha * gradient, for each parameter, one product a layer

Because the last is separate, plain SGD writes its step straight into the weights (target = weights, alpha = -lr), and
a gradient is the same call with beta = 0. Weights per patient would enter it as a factor on dL/dy.

K clients, B batch (padded), I inputs, O outputs of a layer. Buffers are made once for K clients; a step that only the
first A clients still take uses their first A entries.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from medfed.core import streams
from medfed.models import Dropout

_aten: Any = torch.ops.aten


class Buffers:
    """Named tensors that are made once and handed out cut to the first A clients."""

    def __init__(self) -> None:
        self._kept: dict[tuple[str, torch.dtype], Tensor] = {}
        self._views: dict[tuple[object, ...], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return an uninitialised contiguous tensor [A, ...] of `like`'s type, kept under `name`."""
        wanted = (name, like.dtype, *shape)
        view = self._views.get(wanted)
        if view is None:
            size, kept = prod(shape), self._kept.get((name, like.dtype))
            if kept is None or len(kept) < size:
                kept = self._kept[name, like.dtype] = torch.empty(size, dtype=like.dtype)
                self._views.clear()
            view = self._views[wanted] = kept[:size].view(tuple(shape))
        return view


class Rule(ABC):
    """A layer without parameters of its own; the base of all rules."""

    names: tuple[str, ...] = ()  # the parameters, in the order of `named_parameters()`

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.buffers = layer, Buffers()

    @abstractmethod
    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        """Return y [A, B, ...] for x [A, B, ...]; `key_K` is each client's stream in this step."""

    @abstractmethod
    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        """Return dL/dx (unless this is the `first` layer, whose input needs none); may overwrite dy."""

    def accumulate(self, targets: Sequence[Tensor], beta: float, alpha: float) -> None:  # noqa: B027 (nothing to add)
        """Set each target [A, *shape] to beta * target + alpha * (gradient summed over the batch)."""


class LinearRule(Rule):
    """y = x W^T + b."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer)
        self.names = ("weight", "bias") if layer.bias is not None else ("weight",)

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        weight = params[0]  # [A, O, I]
        self.x = x.reshape(len(x), -1, x.shape[-1])
        y = self.buffers.take("y", (*self.x.shape[:2], weight.shape[1]), x)
        if len(params) == 2:
            torch.baddbmm(params[1][:, None, :], self.x, weight.mT, out=y)
        else:
            torch.bmm(self.x, weight.mT, out=y)
        return y.view(*x.shape[:-1], -1)

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        self.dy = dy.reshape(len(dy), -1, dy.shape[-1])
        if first:
            return dy
        dx = self.buffers.take("dx", self.x.shape, dy)
        torch.bmm(self.dy, params[0], out=dx)
        return dx.view(*dy.shape[:-1], -1)

    def accumulate(self, targets: Sequence[Tensor], beta: float, alpha: float) -> None:
        targets[0].baddbmm_(self.dy.mT, self.x, beta=beta, alpha=alpha)
        if len(targets) == 2:
            total = self.buffers.take("db", targets[1].shape, self.dy)
            torch.sum(self.dy, 1, out=total)
            _blend(targets[1], total, beta, alpha)


class NormRule(Rule):
    """y = (x - mean) / sd * g + b, with mean and sd of one patient's units: what LayerNorm and GroupNorm share."""

    def __init__(self, layer: nn.LayerNorm | nn.GroupNorm) -> None:
        super().__init__(layer)
        affine = layer.weight is not None
        self.names = () if not affine else ("weight", "bias") if layer.bias is not None else ("weight",)

    @abstractmethod
    def normalise(self, x: Tensor) -> Tensor:
        """Return x normalised, remembering mean and 1/sd."""

    @abstractmethod
    def denormalise(self, dn: Tensor) -> Tensor:
        """Return dL/dx for dL/d(normalised x)."""

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.x = x
        self.n = self.normalise(x)
        if not params:
            return self.n
        y = self.buffers.take("y", x.shape, x)
        torch.mul(self.n, self._spread(params[0], x), out=y)
        return y.add_(self._spread(params[1], x)) if len(params) == 2 else y

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        self.dy = dy
        if first:
            return dy
        if not params:
            return self.denormalise(dy)
        dn = self.buffers.take("dn", dy.shape, dy)
        return self.denormalise(torch.mul(dy, self._spread(params[0], dy), out=dn))

    def accumulate(self, targets: Sequence[Tensor], beta: float, alpha: float) -> None:
        if targets:
            product = self.buffers.take("product", self.dy.shape, self.dy)
            _blend(targets[0], self._gather(torch.mul(self.dy, self.n, out=product), targets[0]), beta, alpha)
        if len(targets) == 2:
            _blend(targets[1], self._gather(self.dy, targets[1]), beta, alpha)

    @abstractmethod
    def _spread(self, param: Tensor, x: Tensor) -> Tensor:
        """Shape a parameter [A, *units] so that it multiplies x [A, B, *]."""

    @abstractmethod
    def _gather(self, dy: Tensor, param: Tensor) -> Tensor:
        """Sum over the axes along which `_spread` repeated the parameter."""


class LayerNormRule(NormRule):
    """LayerNorm over the last axes."""

    layer: nn.LayerNorm

    def normalise(self, x: Tensor) -> Tensor:
        n, self.mean, self.rstd = torch.native_layer_norm(x, self.layer.normalized_shape, None, None, self.layer.eps)
        return n

    def denormalise(self, dn: Tensor) -> Tensor:
        shape = self.layer.normalized_shape
        dx, _, _ = _aten.native_layer_norm_backward(
            dn, self.x, shape, self.mean, self.rstd, None, None, [True, False, False]
        )
        return dx  # type: ignore[no-any-return]

    def _spread(self, param: Tensor, x: Tensor) -> Tensor:
        return param.reshape(len(param), *(1 for _ in range(x.dim() - param.dim())), *param.shape[1:])

    def _gather(self, dy: Tensor, param: Tensor) -> Tensor:
        return dy.reshape(len(dy), -1, *param.shape[1:]).sum(1)


class GroupNormRule(NormRule):
    """GroupNorm over groups of channels, channels on axis 1 of a sample [B, C, ...]."""

    layer: nn.GroupNorm

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        return x.shape[0] * x.shape[1], x.shape[2], prod(x.shape[3:]), self.layer.num_groups

    def normalise(self, x: Tensor) -> Tensor:
        flat = x.contiguous().view(-1, *x.shape[2:])
        n, self.mean, self.rstd = torch.native_group_norm(flat, None, None, *self._sizes(x), self.layer.eps)
        return n.view(x.shape)

    def denormalise(self, dn: Tensor) -> Tensor:
        flat = self.x.contiguous().view(-1, *self.x.shape[2:])
        dx, _, _ = _aten.native_group_norm_backward(
            dn.contiguous().view(flat.shape), flat, self.mean, self.rstd, None, *self._sizes(dn), [True, False, False]
        )
        return dx.view(dn.shape)  # type: ignore[no-any-return]

    def _spread(self, param: Tensor, x: Tensor) -> Tensor:
        return param.reshape(len(param), 1, -1, *(1 for _ in range(x.dim() - 3)))

    def _gather(self, dy: Tensor, param: Tensor) -> Tensor:
        return dy.flatten(3).sum((1, 3)) if dy.dim() > 3 else dy.sum(1)


class DropoutRule(Rule):
    """The keyed dropout of `medfed.models`: each client's mask comes from its own stream."""

    layer: Dropout

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        draw = streams.uniform(streams.subkey(key_K, self.layer.salt), x[0].numel()).view(x.shape)
        self.scale = (draw >= self.layer.p).to(x.dtype).div_(1 - self.layer.p)
        return torch.mul(x, self.scale, out=self.buffers.take("y", x.shape, x))

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        return dy.mul_(self.scale)


class FlattenRule(Rule):
    """Flatten from a sample's first axis on, or do nothing (Identity)."""

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.shape = x.shape
        return x.flatten(2) if isinstance(self.layer, nn.Flatten) else x

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        return dy.reshape(self.shape)


class ActivationRule(Rule):
    """An elementwise function, by torch's own forward and backward kernels."""

    # layer type -> (forward of (layer, x), backward of (layer, dy, x, y))
    KERNELS: ClassVar[dict[type[nn.Module], tuple[Callable[..., Tensor], Callable[..., Tensor]]]] = {
        nn.ReLU: (lambda _, x: torch.relu_(x), lambda _, dy, x, y: _aten.threshold_backward(dy, y, 0)),
        nn.Tanh: (lambda _, x: torch.tanh(x), lambda _, dy, x, y: _aten.tanh_backward(dy, y)),
        nn.Sigmoid: (lambda _, x: torch.sigmoid(x), lambda _, dy, x, y: _aten.sigmoid_backward(dy, y)),
        nn.SiLU: (lambda _, x: nn.functional.silu(x), lambda _, dy, x, y: _aten.silu_backward(dy, x)),
        nn.GELU: (
            lambda m, x: nn.functional.gelu(x, approximate=m.approximate),
            lambda m, dy, x, y: _aten.gelu_backward(dy, x, approximate=m.approximate),
        ),
        nn.LeakyReLU: (
            lambda m, x: nn.functional.leaky_relu(x, m.negative_slope),
            lambda m, dy, x, y: _aten.leaky_relu_backward(dy, x, m.negative_slope, False),
        ),
        nn.ELU: (
            lambda m, x: nn.functional.elu(x, m.alpha),
            lambda m, dy, x, y: _aten.elu_backward(dy, m.alpha, 1, 1, False, x),
        ),
    }

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        self.x, self.y = x, self.KERNELS[type(self.layer)][0](self.layer, x)
        return self.y

    def backward(self, dy: Tensor, params: Sequence[Tensor], first: bool) -> Tensor:
        if isinstance(self.layer, nn.ReLU):  # the hot one: in place
            return _aten.threshold_backward.grad_input(dy, self.y, 0, grad_input=dy)  # type: ignore[no-any-return]
        return self.KERNELS[type(self.layer)][1](self.layer, dy, self.x, self.y)


RULES: dict[type[nn.Module], type[Rule]] = {
    nn.Linear: LinearRule,
    nn.LayerNorm: LayerNormRule,
    nn.GroupNorm: GroupNormRule,
    Dropout: DropoutRule,
    nn.Flatten: FlattenRule,
    nn.Identity: FlattenRule,
    **dict.fromkeys(ActivationRule.KERNELS, ActivationRule),
}
"""Which rule serves which layer; a layer type not listed here sends its model to the torch.func fallback."""


class RuledModel:
    """A Sequential of known layers as a list of rules, with its parameters in the module's order."""

    def __init__(self, module: nn.Module) -> None:
        self.rules = [RULES[type(layer)](layer) for layer in _leaves(module)]
        self.random = any(isinstance(rule, DropoutRule) for rule in self.rules)
        ends = [0]
        for rule in self.rules:
            ends.append(ends[-1] + len(rule.names))
        self.spans = [slice(a, b) for a, b in pairwise(ends)]

    def forward(self, x: Tensor, params: Sequence[Tensor], key_K: Tensor) -> Tensor:
        """Return outputs [A, B, C] for x [A, B, ...]; `params` are [A, *shape] in `named_parameters()` order."""
        for rule, span in zip(self.rules, self.spans, strict=True):
            x = rule.forward(x, params[span], key_K)
        return x

    def backward(
        self, dz: Tensor, params: Sequence[Tensor], targets: Sequence[Tensor], beta: float, alpha: float
    ) -> None:
        """Go back from dL/dz [A, B, C]; blend every gradient into its target (which may be the parameter itself)."""
        for index in range(len(self.rules) - 1, -1, -1):
            rule, span = self.rules[index], self.spans[index]
            dz = rule.backward(dz, params[span], first=index == 0)
            rule.accumulate(targets[span], beta, alpha)


def has_rules(module: nn.Module) -> bool:
    """Say whether every layer of the module has a rule, so that no autograd is needed.

    The rules' parameters must be the module's, each of them once and trained: none shared, reparametrised or frozen.
    """
    try:
        layers = _leaves(module)
    except TypeError:
        return False
    if not all(type(layer) in RULES and _plain(layer) for layer in layers):
        return False
    ruled = [getattr(layer, name) for layer in layers for name in RULES[type(layer)](layer).names]
    return all(p.requires_grad for p in ruled) and [*map(id, ruled)] == [*map(id, module.parameters())]


def _leaves(module: nn.Module) -> list[nn.Module]:
    """Return the layers of nested Sequentials in order; TypeError for any other container."""
    if type(module) is nn.Sequential:
        return [leaf for child in module for leaf in _leaves(child)]
    if any(True for _ in module.children()):
        raise TypeError(f"{type(module).__name__} is not a Sequential")
    return [module]


def _plain(layer: nn.Module) -> bool:
    """Rules assume Flatten with its default axes."""
    return not isinstance(layer, nn.Flatten) or (layer.start_dim, layer.end_dim) == (1, -1)


def _blend(target: Tensor, value: Tensor, beta: float, alpha: float) -> None:
    """target <- beta * target + alpha * value; beta = 0 overwrites even what is not finite."""
    if beta == 0:
        torch.mul(value, alpha, out=target)
    elif beta == 1:
        target.add_(value, alpha=alpha)
    else:
        target.mul_(beta).add_(value, alpha=alpha)
