"""One DP-SGD step of one hospital: layer rules against Opacus (hooks and ghost clipping), on one
thread.

    python benchmarks/dp_step.py [--repeats 7] [--shape mlp|195k|195k-layer-norm|conv1d]

Same network, weights, batch and order of magnitude of noise for all: forward, backward, clip each
patient, sum, noise, SGD. `mlp` is 30-64-32-1, batch 128; `195k` the brief's network
32-512-256-128-64-32-1, batch 115, no dropout; `conv1d` two strided convolutions with GroupNorm on
series of 200, batch 64. Every contestant has one thread. Opacus runs in a process and a pinned
environment of its own (benchmarks/.venvs/opacus, made on first use) between our repetitions.

Float noise is torch's normal, as Opacus' is. Release-grade noise is the discrete Gaussian from
AES-CTR on the grid. The step without privacy is ours (fused SGD); plain PyTorch's (autograd,
torch.optim) stands beside it. Sums are float32 up to NARROW slots of a network without positions,
as in training; a row shows them in float64.
"""

import json
import subprocess
import sys
import venv
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import common
import torch
from common import absent, table, write_result
from peers.opacus_step import CLIP, NOISE, RATE, SHAPES, make_batch, make_model, timed
from torch import Tensor, nn

from medfed.core.entropy import Entropy
from medfed.core.flat import Layout, vector
from medfed.learn import dpsgd
from medfed.learn.dpsgd import Step, clip_factor
from medfed.learn.layers import RuledModel
from medfed.learn.local import loss_gradient
from medfed.learn.zoo import Series
from medfed.privacy.guarantee import GRID, discrete_gaussian

HERE = Path(__file__).parent
OPACUS = ("torch==2.13.0", "opacus==1.6.0")
HOOKS = "Opacus 1.6, hooks"
GHOST = "Opacus 1.6, ghost clipping"
BASE = "medfed, without privacy"
TORCH = "plain PyTorch, without privacy"
DP = "medfed, float noise"
RELEASE = "medfed, release-grade noise"
FUNC = "medfed, float noise, vmap(grad)"
WIDE = "medfed, float noise, float64 sums"
# shape -> (times faster than hooks, than ghost, at most times the step without privacy)
TARGETS = {
    "mlp": (6, 6, 1.3),
    "195k": (20, 2, 1.8),
    "195k-layer-norm": (20, 2, 1.8),
    "conv1d": (2, 2, None),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shapes = args.shape or list(SHAPES)
    repeats = args.repeats
    peers = {HOOKS: "hooks", GHOST: "ghost"}

    if args.tiny:
        shapes = ["mlp"]
        repeats = 1
        peers = {}
        absent("Opacus", "a tiny run installs nothing")

    result = {}
    for name in shapes:
        jobs = {
            who: (step, 1 if args.tiny else _steps(step)) for who, step in contestants(name).items()
        }
        seconds: dict[str, list[float]] = {who: [] for who in [*jobs, *peers]}
        for _ in range(repeats):
            for who, (step, steps) in jobs.items():
                seconds[who].append(timed(step, steps))
            for who, mode in peers.items():
                seconds[who].append(run_peer(name, mode))
        report(name, seconds)
        result[name] = seconds

    if not args.tiny:
        write_result(
            "dp-step", {"threads": 1, "opacus": OPACUS, "shapes": SHAPES, "seconds": result}
        )


def contestants(name: str) -> dict[str, Callable[[], object]]:
    """Return our steps by name; each has weights of its own."""
    x, y = make_batch(name)
    own = [Series(x.shape[1])] if x.dim() == 3 else []
    make = partial(_model, name, own)
    row = x.reshape(1, len(x), -1)
    y_1B = y.view(1, -1)
    return {
        TORCH: plain_torch(make_model(name), x, y),
        BASE: without_privacy(make(), row, y_1B),
        DP: private(make(), dpsgd._ByRules(make()), row, y_1B, float_noise),
        WIDE: private(make(), ByRulesInFloat64(make()), row, y_1B, float_noise),
        RELEASE: private(make(), dpsgd._ByRules(make()), row, y_1B, release_noise()),
        FUNC: private(make(), dpsgd._ByFunc(make()), row, y_1B, float_noise),
    }


def _model(name: str, own: list[nn.Module]) -> nn.Sequential:
    return nn.Sequential(*own, *make_model(name)).train()


def plain_torch(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """The step without privacy as a textbook writes it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss = nn.BCEWithLogitsLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()

    return step


def without_privacy(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    """Our step without privacy: every layer's gradient goes straight into its weights."""
    ruled = RuledModel(model)
    key = torch.zeros(1, dtype=torch.int64)
    weights = [p.detach()[None].clone() for p in model.parameters()]

    def step() -> None:
        dz = loss_gradient("binary", ruled.forward(x, weights, key), y).div_(x.shape[1])
        ruled.backward(dz, weights, weights, 1.0, -RATE)

    return step


class ByRulesInFloat64(dpsgd._ByRules):
    """Sums in float64 whatever the batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.ruled.one_slot = False


def private(
    model: nn.Module,
    summed: dpsgd._Summed,
    x: Tensor,
    y: Tensor,
    noised: Callable[[Tensor], Tensor],
) -> Callable[[], object]:
    """Our DP step, of the parts that `medfed.learn.dpsgd.train` takes its steps with; sums are in
    units of the clip.
    """
    w_1P = vector(model)[None].clone()
    weights = [piece for _, piece in Layout.of(model).pieces(w_1P)]
    slots = x.shape[:2]
    everyone = Step(
        torch.zeros(slots).long(), torch.ones(slots).bool(), torch.zeros(slots).long(), 1
    )
    factor = clip_factor("automatic", CLIP)
    scale = RATE * CLIP / x.shape[1]

    def step() -> None:
        total_1P, _ = summed(weights, x, y, everyone, "binary", factor)
        w_1P.sub_(noised(total_1P).to(w_1P.dtype), alpha=scale)

    return step


def float_noise(total: Tensor) -> Tensor:
    return total.add_(torch.randn(total.shape), alpha=NOISE)


def release_noise() -> Callable[[Tensor], Tensor]:
    noise = discrete_gaussian(NOISE / GRID)
    entropy = Entropy()

    def noised(total: Tensor) -> Tensor:
        released = torch.empty(total.shape, dtype=torch.float64)
        dpsgd._release(total.view(-1), noise, entropy, out=released.view(-1))
        return released

    return noised


def _steps(step: Callable[[], object]) -> int:
    """Warm up; return as many steps as take about a fifth of a second."""
    return max(2, int(0.2 / min(timed(step, 3) for _ in range(4))))


def run_peer(name: str, mode: str) -> float:
    """Return the seconds of a step of Opacus."""
    steps = 4 if (name.startswith("195k") and mode == "hooks") else 40
    script = HERE / "peers/opacus_step.py"
    command = [
        str(opacus_python()),
        "-W",
        "ignore",
        str(script),
        f"--shape={name}",
        f"--mode={mode}",
    ]
    done = subprocess.run(
        [*command, f"--steps={steps}", "--repeats=1"],
        check=True,
        capture_output=True,
        text=True,
        timeout=600,
    )

    return float(json.loads(done.stdout.strip().splitlines()[-1])["seconds"][0])


def opacus_python() -> Path:
    """Return the python of Opacus' own environment, made on first use."""
    folder = HERE / ".venvs/opacus"
    python = folder / "bin/python"
    if not python.exists():
        print(f"installing {', '.join(OPACUS)} into {folder.name} ...", file=sys.stderr, flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *OPACUS], check=True)
    return python


def report(name: str, seconds: dict[str, list[float]]) -> None:
    """Print the table, slowest first, and which figures are reached."""
    middle = {who: median(times) for who, times in seconds.items()}
    lines = []
    for who, times in sorted(seconds.items(), key=lambda item: -median(item[1])):
        spread = f"{min(times) * 1e3:.3f} - {max(times) * 1e3:.3f}"
        m = middle[who]
        ratios = [f"{middle[peer] / m:.1f}" if peer in middle else "-" for peer in (HOOKS, GHOST)]
        ratios += [f"{m / middle[b]:.2f}" for b in (BASE, TORCH)]
        lines.append([who, f"{m * 1e3:.3f}", spread, str(len(times)), *ratios])

    batch, shape = SHAPES[name]
    print(f"\n{name}: batch {batch} of {'x'.join(map(str, shape))}, one thread")
    head = [
        "who",
        "median ms",
        "min - max",
        "n",
        "faster than hooks",
        "than ghost",
        "of ours w/o",
        "of PyTorch w/o",
    ]
    print(table(head, lines))
    hooks, ghost, most = TARGETS[name]
    checks = []

    for peer, words, least in ((HOOKS, "hooks", hooks), (GHOST, "ghost", ghost)):
        if peer in middle:
            times = middle[peer] / middle[DP]
            checks.append(
                (f"{times:.1f} times faster than {words} (at least {least})", times >= least)
            )

    if most:
        for base in (BASE, TORCH):
            checks.append(
                (
                    f"{middle[DP] / middle[base]:.2f} of {base} (at most {most})",
                    middle[DP] / middle[base] <= most,
                )
            )

    for words, reached in checks:
        print(f"  {'reached' if reached else 'MISSED '}  {words}")
    print(f"  release-grade noise adds {(middle[RELEASE] - middle[DP]) * 1e3:.3f} ms a step")


if __name__ == "__main__":
    main()
