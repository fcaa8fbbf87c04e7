"""What a look at a model costs before training: each model of the zoo as the bundled studies have
it, with a claim and without.

    python benchmarks/probe.py [--repeats 5]

The time is that of one party's probe of a model it sees for the first time; the figure asked for is
below 2 s.
"""

import time
from collections.abc import Sequence
from statistics import median

import common
import torch
from common import table, write_result

from medfed.learn import zoo
from medfed.learn.probe import ROWS, probe

ASKED = 2.0
SHAPES: dict[str, tuple[str, int, dict[str, object]]] = {
    "logistic, 32 inputs": ("logistic", 32, {}),
    "mlp 64-32, 32 inputs": ("mlp", 32, {}),
    "medical-mlp, the brief's": ("medical-mlp", 32, {}),
    "medical-mlp of the study brief": (
        "medical-mlp",
        32,
        {"dropout": 0.0, "norm": "none", "init": "he"},
    ),
    "conv1d, series of 200": ("conv1d", 200, {}),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    shapes, repeats = (list(SHAPES)[:2], 1) if args.tiny else (list(SHAPES), args.repeats)
    rows = []
    result = {}

    for shape in shapes:
        name, features, options = SHAPES[shape]
        x_BF = torch.randn(ROWS, features, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
        for private in (False, True):
            model = zoo.build(name, features, 1, options, 0)
            seconds = []
            for _ in range(repeats):
                began = time.perf_counter()
                found = probe(model, name, x_BF, "binary", 1, private)
                seconds.append(time.perf_counter() - began)
            claim = "with a claim" if private else "without"
            rows.append([shape, claim, found.path, f"{median(seconds):.3f}", f"{max(seconds):.3f}"])
            result[f"{shape}, {claim}"] = seconds

    print(table(["model", "claim", "path", "median s", "max s"], rows))
    slowest = max(median(times) for times in result.values())
    print(
        f"  {'reached' if slowest < ASKED else 'MISSED '}  slowest median {slowest:.2f} s (below "
        f"{ASKED:g})"
    )
    if not args.tiny:
        write_result("probe", {"seconds": result})


if __name__ == "__main__":
    main()
