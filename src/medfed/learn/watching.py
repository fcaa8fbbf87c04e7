"""A module watched while it is called: which part runs, draws and fails, and what each is given."""

import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class ModuleWatch:
    """What happens while a module is called:
    which part runs, which draw, what goes in and comes out of each.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(part): name for name, part in model.named_modules()}
        self.model = model
        self.running: list[nn.Module] = []
        self.calls: Counter[str] = Counter()
        self.drew: str = ""  # the innermost part that moved a generator
        self.drew_of_torch = True  # and no other one
        # (part, its first input, its output)
        self.seen: list[tuple[str, Tensor | None, Tensor]] = []
        self._states: list[tuple[object, ...]] = []

    @contextmanager
    def watch(self) -> Iterator["ModuleWatch"]:
        """Watch every part of the module."""
        handles = []
        for part in self.model.modules():
            handles += [
                part.register_forward_pre_hook(self._enter),
                part.register_forward_hook(self._leave),
            ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def name_of(self, part: nn.Module) -> str:
        """Return a part's kind and name, for people."""
        name = self.names.get(id(part), "")
        if name:
            return f"{type(part).__name__} {name!r}"
        return type(part).__name__

    @property
    def innermost(self) -> str:
        """The part that was running when an error came."""
        return self.name_of(self.running[-1] if self.running else self.model)

    def _enter(self, part: nn.Module, args: tuple[Any, ...]) -> None:
        self.running.append(part)
        self.calls[self.names[id(part)]] += 1
        self._states.append(_read_generators())

    def _leave(self, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.running.pop()
        before = self._states.pop()
        after = _read_generators()
        if before != after and not self.drew:
            self.drew = self.name_of(part)
            self.drew_of_torch = before[1:] == after[1:]

        first = None
        if args and isinstance(args[0], Tensor):
            first = args[0].detach().clone()
        if isinstance(output, tuple) and output:
            output = output[0]
        if isinstance(output, Tensor):
            self.seen.append((self.name_of(part), first, output.detach()))


def _read_generators() -> tuple[object, ...]:
    """Return the states of torch's, numpy's and Python's generators."""
    of_numpy: Any = np.random.get_state()
    return (
        torch.get_rng_state().numpy().tobytes(),
        of_numpy[1].tobytes(),
        of_numpy[2],
        random.getstate(),
    )


def find_failing_part(model: nn.Module, x_BF: Tensor) -> str:
    """Return kind and name of the innermost part of `model` whose gradient on `x_BF` cannot be
    taken; empty where each can.

    A backward pass leaves no trace of the part it fails in, so every part is tried alone, on what
    it was given.
    """
    calls: list[tuple[nn.Module, tuple[Any, ...]]] = []
    handles = [
        part.register_forward_hook(lambda m, given, _: calls.append((m, given)))
        for part in model.modules()
    ]
    try:
        with torch.no_grad():
            model(x_BF.clone())
    except Exception:
        return ""
    finally:
        for handle in handles:
            handle.remove()

    for part, given in calls:  # those inside come first, as they end first
        if not _goes_back(part, given):
            return ModuleWatch(model).name_of(part)
    return ""


def _goes_back(part: nn.Module, given: tuple[Any, ...]) -> bool:
    """Say whether a part's backward pass runs on these inputs;
    a part without a gradient of its own passes.
    """
    inputs = []
    for value in given:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.detach().clone().requires_grad_()
        inputs.append(value)

    try:
        with torch.enable_grad():
            found = part(*inputs)
            outputs = found if isinstance(found, tuple) else (found,)
            total = sum(
                one.sum() for one in outputs if isinstance(one, Tensor) and one.requires_grad
            )
            if isinstance(total, Tensor):
                total.backward()  # type: ignore[no-untyped-call]
    except Exception:
        return False

    return True
