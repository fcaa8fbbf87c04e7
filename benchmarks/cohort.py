"""One round of many small clients: layer rules and torch.func against a plain PyTorch loop and
pfl-research.

    python benchmarks/cohort.py [--shape cohort|brief-4|brief-100] [--repeats 5]

All do the same work on the same data from the same weights: `cohort` is 1,000 clients x 100 samples
x 5 local epochs, batch 20, MLP 30-64-32-1. Ours is timed twice: local training alone, and the whole
round (bytes out, training, bytes back, combine, event). Peers run in processes of their own between
our repetitions, pfl in its own pinned environment (benchmarks/.venvs/pfl, made on first use), each
at its better thread setting; pfl also with two worker processes.
"""

import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from common import absent, bare_federation, table, without_privacy, write_result
from peers import torch_loop
from peers.torch_loop import make_data, make_mlp

import medfed
from medfed.core.flat import vector
from medfed.data.federated import Rows, Stack
from medfed.learn.algorithms import Server
from medfed.learn.local import train
from medfed.monitor.events import Log
from medfed.planning.building import build_model
from medfed.rounds.round import run_round

HERE = Path(__file__).parent
PFL = ("torch==2.13.0", "pfl==0.6.0")
BRIEF = {
    "samples": 115,
    "epochs": 5,
    "batch": 32,
    "hidden": [512, 256, 128, 64, 32],
    "features": 32,
}
SHAPES = {
    "cohort": {"clients": 1000, "samples": 100, "epochs": 5, "batch": 20, "hidden": [64, 32], "features": 30},
    "brief-4": {**BRIEF, "clients": 4},
    "brief-100": {**BRIEF, "clients": 100},
}  # fmt: skip
TINY = {"clients": 4, "samples": 12, "epochs": 1, "batch": 5, "hidden": [8, 4], "features": 6}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="cohort")
    parser.add_argument(
        "--repeats", type=int, default=5, help="of ours; peers run half as often, twice at least"
    )
    args = parser.parse_args(argv)
    shape, repeats = (TINY, 1) if args.tiny else (SHAPES[args.shape], args.repeats)
    ours = Ours(shape)
    seconds: dict[str, list[float]] = {}

    for repeat in range(repeats):
        if args.tiny:
            seconds["plain PyTorch loop"] = [loop_once(shape)]
            absent("pfl-research", "a tiny run installs nothing")
        elif repeat % 2 == 0:
            for name, command, env in peers(shape):
                seconds.setdefault(name, []).extend(run_peer(command, env))
        for name, once in ours.jobs().items():
            once()  # warm, as a run's later rounds are; peers warm up by themselves
            seconds.setdefault(name, []).append(once())

    rate = gemm_rate(64 if args.tiny else 1536)
    report(args.shape, shape, seconds, ours.flops(), rate)
    if not args.tiny:
        figures = {"gflops_two_threads": rate / 1e9, "gflop": ours.flops() / 1e9}
        write_result(f"cohort-{args.shape}", {"shape": shape, "seconds": seconds, **figures})


class Ours:
    """Our two paths, local training alone and as a whole round."""

    def __init__(self, shape: dict[str, Any]) -> None:
        torch.set_num_threads(2)
        self.shape = shape
        xs, ys = make_data(shape["clients"], shape["samples"], shape["features"], seed=0)
        patient = torch.arange(shape["samples"])
        rows = {
            f"c{k}": Rows(x, y[:, 0], patient) for k, (x, y) in enumerate(zip(xs, ys, strict=True))
        }
        self.federations = {}

        for path in ("rules", "func"):
            study = without_privacy(medfed.load_study("breast-cancer"))
            for key, value in {
                "model.name": "mlp",
                "model.options.hidden": shape["hidden"],
                "training.path": path,
                "training.local_epochs": shape["epochs"],
                "training.batch_size": shape["batch"],
                "training.weight_decay": 0.0,
                "training.learning_rate": 0.1,
            }.items():
                study = study.set(key, value)

            few = Rows(xs[0][:1], ys[0][:1, 0], patient[:1])
            self.federations[path] = bare_federation(
                study, {name: (r, few) for name, r in rows.items()}
            )

        self.stack = Stack.of(list(rows.values()))
        plan, _ = self.federations["rules"]
        self.model = build_model(plan.study, plan.encoding)
        self.w_P = vector(self.model)
        self.key_K = plan.streams.key_K("batches", 1, list(rows))

    def jobs(self) -> dict[str, Any]:
        """Return what is timed, by name; each returns its seconds."""
        found: dict[str, Any] = {}
        for path, title in (
            ("rules", "medfed, layer rules"),
            ("func", "medfed, torch.func fallback"),
        ):
            found[f"{title}: whole round"] = lambda path=path: self.round(path)
            found[f"{title}: local training"] = lambda path=path: self.local(path)
        return found

    def local(self, path: str) -> float:
        plan, _ = self.federations["rules"]
        start = self.w_P.expand(len(self.stack), -1)
        began = time.perf_counter()
        train(self.model, start, self.stack, plan.local, self.key_K, path=path)
        return time.perf_counter() - began

    def round(self, path: str) -> float:
        plan, fleet = self.federations[path]
        began = time.perf_counter()
        run_round(Server(0, self.w_P, {}), plan, fleet, plan.budget(), Log())
        return time.perf_counter() - began

    def flops(self) -> float:
        """Multiply-adds counted twice: forward, weight gradient, and input gradient but for the
        first layer.
        """
        widths = [self.shape["features"], *self.shape["hidden"], 1]
        products = [a * b for a, b in pairwise(widths)]
        samples = self.shape["clients"] * self.shape["samples"] * self.shape["epochs"]
        return 2.0 * samples * (3 * sum(products) - products[0])


def peers(shape: dict[str, Any]) -> list[tuple[str, list[str], dict[str, str]]]:
    """Return the peers: name, command, environment."""
    sizes = [
        f"--{key}={','.join(map(str, v)) if isinstance(v, list) else v}" for key, v in shape.items()
    ]
    common = [*sizes, "--repeats=1", "--threads=1"]
    pfl = [str(pfl_python()), str(HERE / "peers/pfl_cohort.py"), *common]
    workers = {"PFL_WORKER_ADDRESSES": "localhost:18765,localhost:18766"}
    return [
        ("plain PyTorch loop", [sys.executable, str(HERE / "peers/torch_loop.py"), *common], {}),
        ("pfl-research 0.6", pfl, {}),
        ("pfl-research 0.6, 2 processes", pfl, workers),
    ]


def loop_once(shape: dict[str, Any]) -> float:
    """Return the seconds of a round of the plain PyTorch loop, in this process."""
    xs, ys = make_data(shape["clients"], shape["samples"], shape["features"], seed=0)
    model = make_mlp(shape["features"], ",".join(map(str, shape["hidden"])), seed=0)
    began = time.perf_counter()
    torch_loop.run_round(xs, ys, model, epochs=shape["epochs"], batch=shape["batch"])
    return time.perf_counter() - began


def run_peer(command: list[str], env: dict[str, str]) -> list[float]:
    """Run a peer, with its second worker where the environment asks for two; return its seconds."""
    base = {**os.environ, **env}
    second = None
    if env:
        second = subprocess.Popen(
            command,
            env={**base, "PFL_WORKER_RANK": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        base["PFL_WORKER_RANK"] = "0"

    try:
        done = subprocess.run(
            command, env=base, check=True, capture_output=True, text=True, timeout=600
        )
    finally:
        if second:
            second.wait(timeout=120)

    return list(json.loads(done.stdout.strip().splitlines()[-1])["seconds"])


def pfl_python() -> Path:
    """Return the python of pfl's own environment, made on first use."""
    folder = HERE / ".venvs/pfl"
    python = folder / "bin/python"
    if not python.exists():
        print(f"installing {', '.join(PFL)} into {folder.name} ...", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PFL], check=True)
    return python


def gemm_rate(width: int) -> float:
    """Return the best float32 rate of a large product on two threads, in flop per second."""
    a, b = torch.randn(2, width, width)
    best = 0.0
    for _ in range(12):
        began = time.perf_counter()
        torch.mm(a, b)
        best = max(best, 2 * width**3 / (time.perf_counter() - began))
    return best


def report(
    name: str, shape: dict[str, Any], seconds: dict[str, list[float]], flops: float, rate: float
) -> None:
    """Print the table, slowest first; a peer that is not there is a dash."""
    middle = {who: median(times) for who, times in seconds.items()}
    bases = [
        middle.get(who)
        for who in ("plain PyTorch loop", "pfl-research 0.6", "pfl-research 0.6, 2 processes")
    ]
    lines = []

    for who, times in sorted(seconds.items(), key=lambda item: -median(item[1])):
        m = middle[who]
        spread = f"{min(times):.3f} - {max(times):.3f}"
        share = f"{flops / m / rate:.0%}"
        times_faster = [f"{base / m:.1f}" if base else "-" for base in bases]
        lines.append([who, f"{m:.3f}", spread, str(len(times)), *times_faster, share])

    print(f"{name}: {shape}")
    print(
        f"large float32 products on two threads: {rate / 1e9:.0f} GFLOP/s; the round needs "
        f"{flops / 1e9:.1f} GFLOP"
    )
    print(
        table(
            [
                "who",
                "median s",
                "min - max",
                "n",
                "x loop",
                "x pfl",
                "x pfl 2 proc",
                "of GEMM rate",
            ],
            lines,
        )
    )


if __name__ == "__main__":
    main()
