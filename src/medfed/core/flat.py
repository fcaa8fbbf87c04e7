"""A module's trained parameters as one vector, a stack of clients' vectors as one of modules.

K clients, P parameters.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn


def select_trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the module's parameters by name, without those that are frozen."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Layout:
    """Where each parameter of a module lies in the vector: the order of `select_trained`."""

    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, module: nn.Module) -> "Layout":
        return cls({name: tuple(p.shape) for name, p in select_trained(module).items()})

    @property
    def size(self) -> int:
        """P, the number of parameters."""
        return sum(prod(shape) for shape in self.shapes.values())

    def pieces(self, theta_KP: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter's name with its view [K, *shape] of the stack."""
        offset = 0
        for name, shape in self.shapes.items():
            width = prod(shape)
            yield (
                name,
                theta_KP[..., offset : offset + width].reshape((*theta_KP.shape[:-1], *shape)),
            )
            offset += width


def vector(module: nn.Module) -> Tensor:
    """Return a copy [P] of the module's parameters, in float32 or wider:
    means of halves lose what they are for.
    """
    parameters = list(select_trained(module).values())
    wide = any(p.dtype == torch.float64 for p in parameters)
    dtype = torch.float64 if wide else torch.float32
    with torch.no_grad():
        return torch.cat([p.reshape(-1).to(dtype) for p in parameters])


def fill(module: nn.Module, theta_P: Tensor) -> nn.Module:
    """Write the vector [P] into the module's parameters, in place; return the module."""
    pieces = dict(Layout.of(module).pieces(theta_P))
    with torch.no_grad():
        for name, parameter in select_trained(module).items():
            parameter.copy_(pieces[name])
    return module


def select_untrained(module: nn.Module) -> dict[str, Tensor]:
    """Return what else a module's outputs depend on: frozen parameters; buffers, kept or not."""
    frozen = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return {**frozen, **dict(module.named_buffers())}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the sha256 of named tensors: names, types, shapes and bits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
