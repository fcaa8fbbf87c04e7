"""A million odd patients: how far does each move a clipped sum, beside others as odd?

    python benchmarks/odd_patients.py [--patients 1000000] [--seed 0]

Every model of tests/test_odd_patients.py, every task, clipping and path in turn, clipping norms drawn at random: K sums
of one to five odd patients each, once more with one odd patient more. The bound is 1 + SLACK clipping norms.
"""

import argparse
import sys
import time
from collections import defaultdict
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import table, write_result

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.test_odd_patients import CLIPPINGS, MODELS, TASKS, _case, moved

from medfed.local import Path as LocalPath
from medfed.privacy.guarantee import SLACK

SHARES: dict[LocalPath, int] = {"rules": 240, "func": 12, "loop": 4}
"""Sums a call by each path: the slower, the fewer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patients", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng, began = np.random.default_rng(args.seed), time.perf_counter()
    furthest: dict[LocalPath, float] = defaultdict(float)
    asked: dict[LocalPath, int] = defaultdict(int)
    cases = list(product(MODELS, TASKS, CLIPPINGS))
    call = 0
    while sum(asked.values()) < args.patients:
        name, task, clipping = cases[call % len(cases)]
        path: LocalPath = "rules" if call % 100 < 96 else "func" if call % 100 < 99 else "loop"
        model, w_P = _case(name, task, args.seed + call)
        clip = float(10.0 ** rng.uniform(-3, 2))
        found = moved(model, w_P, task, clipping, clip, path, rng, SHARES[path])
        furthest[path] = max(furthest[path], float(found.max()))
        asked[path] += len(found)
        call += 1
        if found.max() > 1 + SLACK:
            print(f"BROKEN: {name}, {task}, {clipping}, clip {clip:g}, {path}, call {call}: {float(found.max()):.6g}")
    seconds = time.perf_counter() - began
    rows = [[path, f"{asked[path]:,}", f"{furthest[path]:.9f}"] for path in asked]
    print(table(["path", "odd patients", "furthest, in clipping norms"], rows))
    print(f"allowed: {1 + SLACK:.6f}; {seconds:.0f} s, one thread")
    write_result("odd-patients", {"asked": asked, "furthest": furthest, "allowed": 1 + SLACK, "seconds": seconds})


if __name__ == "__main__":
    main()
