"""Peer: DP-SGD steps with the real package Opacus, on the CPU: per-sample gradients by hooks, or
ghost clipping.

Measures the wall-clock seconds of a step (forward, backward, clip each sample, sum, noise, SGD) on
one fixed batch, and prints one JSON line. Needs Opacus 1.6 and torch.

Chosen in Opacus' favour: the modules and optimisers that `PrivacyEngine.make_private` would wrap
are made directly, so no data loader and no accountant run in the timed part, and noise comes from
torch's generator (`secure_mode=False`).
"""

import argparse
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise

import torch
from torch import Tensor, nn

CLIP = 1.0
NOISE = 1.0
RATE = 0.1
SHAPES = {
    "mlp": (128, (30,)),
    "195k": (115, (32,)),
    "195k-layer-norm": (115, (32,)),
    "conv1d": (64, (1, 200)),
}
"""Name -> (batch, shape of a sample)."""


def make_model(name: str) -> nn.Sequential:
    """Return the network of a shape, from the same weights every time."""
    torch.manual_seed(0)
    if name == "conv1d":
        layers: list[nn.Module] = []
        for before, width in pairwise((1, 16, 32)):
            layers += [
                nn.Conv1d(before, width, 5, stride=2, padding=2),
                nn.GroupNorm(width // 4, width),
                nn.ReLU(),
            ]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, 1))

    widths = (30, 64, 32) if name == "mlp" else (32, 512, 256, 128, 64, 32)
    layers = []
    for before, width in pairwise(widths):
        layers += [
            nn.Linear(before, width),
            *([nn.LayerNorm(width)] if "norm" in name else []),
            nn.ReLU(),
        ]

    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


def make_batch(name: str) -> tuple[Tensor, Tensor]:
    """Return x [B, *] and y [B, 1] of 0 and 1."""
    batch, shape = SHAPES[name]
    random = torch.Generator().manual_seed(1)
    return torch.randn(batch, *shape, generator=random), torch.randint(
        0, 2, (batch, 1), generator=random
    ).float()


def timed(step: Callable[[], object], steps: int) -> float:
    """Return the seconds of one step, over so many."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - began) / steps


def hooks(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Per-sample gradients by hooks."""
    from opacus import GradSampleModule
    from opacus.optimizers import DPOptimizer

    wrapped = GradSampleModule(model)
    loss = nn.BCEWithLogitsLoss()
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=RATE),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=len(x),
    )

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped(x), y).backward()
        optimizer.step()

    return step


def ghost(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    """Ghost clipping: norms in a first backward pass, the clipped sum in a second."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping
    from opacus.optimizers.optimizer_fast_gradient_clipping import DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        model, max_grad_norm=CLIP, use_ghost_clipping=True
    )
    optimizer = DPOptimizerFastGradientClipping(
        torch.optim.SGD(wrapped.parameters(), lr=RATE),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=len(x),
    )
    loss = DPLossFastGradientClipping(wrapped, optimizer, nn.BCEWithLogitsLoss())

    def step() -> None:
        optimizer.zero_grad()
        loss(wrapped(x), y).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--mode", choices=("hooks", "ghost"), required=True)
    parser.add_argument("--steps", type=int, default=20, help="a measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    step = {"hooks": hooks, "ghost": ghost}[args.mode](
        make_model(args.shape), *make_batch(args.shape)
    )
    timed(step, max(3, args.steps // 4))  # warm
    seconds = [timed(step, args.steps) for _ in range(args.repeats)]
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opacus": version("opacus"),
    }

    print(
        json.dumps(
            {
                "who": f"opacus {args.mode}",
                "seconds": seconds,
                "threads": args.threads,
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()
