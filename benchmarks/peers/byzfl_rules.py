"""Seconds that ByzFL takes for a rule on random rows; prints one JSON line.

python byzfl_rules.py --clients=50 --numbers=1000000 --liars=15 --repeats=3
"""

import argparse
import json
import sys
import time
from unittest.mock import MagicMock

import numpy as np
import torch

# its own training loops want it
for unused in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
    sys.modules[unused] = MagicMock()

from byzfl import NNM, GeometricMedian, MultiKrum  # noqa: E402


def main() -> None:
    """Time nearest-neighbour mixing with the geometric median, and Multi-Krum, on
    float32 tensors.
    """
    parser = argparse.ArgumentParser()
    for name in ("clients", "numbers", "liars", "repeats", "threads"):
        parser.add_argument(f"--{name}", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = np.random.default_rng(0).standard_normal(
        (options.clients, options.numbers), dtype=np.float32
    )
    row_KM = torch.from_numpy(rows)
    f = options.liars
    nnm = NNM(f)
    median = GeometricMedian()
    krum = MultiKrum(f)
    found: dict[str, list[float]] = {"nnm+geometric-median": [], "multi-krum": []}

    for _ in range(options.repeats):
        began = time.perf_counter()
        median(nnm(row_KM))
        between = time.perf_counter()
        krum(row_KM)
        found["nnm+geometric-median"].append(between - began)
        found["multi-krum"].append(time.perf_counter() - between)

    print(json.dumps(found))


if __name__ == "__main__":
    main()
