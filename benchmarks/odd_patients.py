"""A million odd patients: how far does each move a clipped sum, beside others as odd?

    python benchmarks/odd_patients.py [--patients 1000000] [--seed 0]

Every model of tests/test_odd_patients.py, every task, clipping and path in turn, clipping norms
drawn at random: K sums of one to five odd patients each, once more with one odd patient more. The
bound is 1 + SLACK clipping norms.
"""

import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path

import common
import numpy as np
import torch
from common import table, write_result

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.test_odd_patients import CLIPPINGS, MODELS, TASKS, _case, moved

from medfed.learn.local import Path as LocalPath
from medfed.privacy.guarantee import SLACK

SHARES: dict[LocalPath, int] = {"rules": 240, "func": 12, "loop": 4}
"""Sums a call by each path: the slower, the fewer."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--patients", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args(argv)

    if args.tiny:
        asked, furthest = ask(3 * SHARES["rules"], args.seed)
        report(asked, furthest)
        return

    began = time.perf_counter()
    seeds = range(args.seed, args.seed + args.processes)
    with ProcessPoolExecutor(args.processes) as pool:
        found = list(pool.map(ask, [args.patients // args.processes] * args.processes, seeds))
    seconds = time.perf_counter() - began
    asked = sum((counts for counts, _ in found), Counter[LocalPath]())
    furthest = {path: max(far.get(path, 0.0) for _, far in found) for path in asked}
    report(asked, furthest)
    print(f"allowed: {1 + SLACK:.6f}; {seconds:.0f} s, {args.processes} processes of one thread")
    write_result(
        "odd-patients",
        {"asked": asked, "furthest": furthest, "allowed": 1 + SLACK, "seconds": seconds},
    )


def report(asked: Counter[LocalPath], furthest: dict[LocalPath, float]) -> None:
    rows = [[path, f"{asked[path]:,}", f"{furthest[path]:.9f}"] for path in asked]
    print(table(["path", "odd patients", "furthest, in clipping norms"], rows))


def ask(patients: int, seed: int) -> tuple[Counter[LocalPath], dict[LocalPath, float]]:
    """Return by path how many odd patients were tried, and how far the furthest moved a sum."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    furthest: dict[LocalPath, float] = {}
    asked = Counter[LocalPath]()
    cases = list(product(MODELS, TASKS, CLIPPINGS))
    call = 0

    while asked.total() < patients:
        name, task, clipping = cases[call % len(cases)]
        path: LocalPath = "rules" if call % 100 < 97 else "func" if call % 100 < 99 else "loop"
        model, w_P = _case(name, task, 1_000_000 * seed + call)
        clip = float(10.0 ** rng.uniform(-3, 2))
        found = moved(model, w_P, task, clipping, clip, path, rng, SHARES[path])
        furthest[path] = max(furthest.get(path, 0.0), float(found.max()))
        asked[path] += len(found)
        call += 1
        if found.max() > 1 + SLACK:
            print(
                f"BROKEN: {name}, {task}, {clipping}, clip {clip:g}, {path}, call {call}: "
                f"{float(found.max()):.6g}"
            )

    return asked, furthest


if __name__ == "__main__":
    main()
