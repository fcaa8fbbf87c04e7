"""Large tables: how long a whole run takes beyond reading its file, and how much memory, in a
process of its own.

    python benchmarks/large_tables.py [--tiny] [--folder FOLDER]

One million rows by 20 columns and 100,000 rows by 500 columns, four sites, a patient a row, the
logistic model, five rounds with a test after each, no baselines. `reading` is the file alone, by
the same reader in the same process; `beyond` is all the rest: cleaning, agreeing on the encoding,
training, tests, intervals; `processor` is what both took of all cores, which other processes do not
lengthen. `intervals` is how long those of the last test take, all sites and each, and what the
bootstrap of the records took before.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common
import numpy as np
import pandas as pd
from common import table, write_result

SHAPES = {"1,000,000 x 20": (1_000_000, 20), "100,000 x 500": (100_000, 500)}
TINY = {"300 x 60": (300, 60)}
STUDY = """
[data]
table = "table.{kind}"
target = "y"
site = "site"
patient = "patient"
[training]
rounds = 5
batch_size = {batch}
[monitor]
baselines = false
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--folder", type=Path, help="where tables are written; default: the system's temporary one"
    )
    parser.add_argument("--kind", choices=["csv", "parquet"], default="csv")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measured(args.child)))
        return

    rows = []
    for name, (n, width) in (TINY if args.tiny else SHAPES).items():
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            write(Path(folder), n, width, args.kind)
            command = [sys.executable, __file__, "--child", folder]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows.append({"table": name, "kind": args.kind, **json.loads(told.splitlines()[-1])})

    timed = ("reading", "beyond", "processor", "rounds", "intervals", "bootstrap")
    head = ["table", "file", *(f"{name} s" for name in timed), "peak GiB", "AUROC"]
    shown = []

    for r in rows:
        figures = [
            *(f"{r[name]:.2f}" for name in timed),
            f"{r['memory'] / 2**30:.2f}",
            f"{r['auroc']:.3f}",
        ]
        shown.append([r["table"], r["kind"], *figures])

    print(table(head, shown))
    if not args.tiny:
        write_result("large_tables", {"rows": rows})


def write(folder: Path, n: int, width: int, kind: str) -> None:
    """Write a study and its made-up table."""
    random = np.random.default_rng(0)
    x = random.normal(size=(n, width)).round(3)
    weights = random.normal(size=width) / np.sqrt(width)
    frame = pd.DataFrame(x, columns=[f"x{i}" for i in range(width)])
    frame["y"] = (random.random(n) < 1 / (1 + np.exp(-2 * x @ weights))).astype(int)
    frame["site"] = random.choice(["north", "south", "east", "west"], n)
    frame["patient"] = np.arange(n)
    frame.to_csv(folder / "table.csv", index=False) if kind == "csv" else frame.to_parquet(
        folder / "table.parquet"
    )
    (folder / "study.toml").write_text(STUDY.format(kind=kind, batch=min(1024, n // 8)))


def measured(folder: Path) -> dict[str, float]:
    """Run the study in this process; return seconds, the peak of memory in bytes, and AUROC."""
    import torch

    from medfed import runs
    from medfed import study as studies
    from medfed.data import tables
    from medfed.monitor.metrics import Scores, measure

    study = studies.load(folder / "study.toml")
    began = time.perf_counter()
    busy = time.process_time()
    result = runs.simulate(study)
    whole = time.perf_counter() - began
    busy = time.process_time() - busy
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )

    began = time.perf_counter()
    tables.read(folder / study.data.table)
    reading = time.perf_counter() - began
    n = result.summary["test"]["n"]
    random = torch.Generator().manual_seed(0)
    y = (torch.rand(n, generator=random) < 0.4).float()
    scores = Scores.of("binary", y[:, None] + torch.randn(n, 1, generator=random), y)
    began = time.perf_counter()
    measure(scores)
    closed = time.perf_counter() - began
    return {
        "reading": reading,
        "beyond": whole - reading,
        "processor": busy,
        "rounds": float(result.summary["seconds"]["total"]),
        "intervals": closed,
        "bootstrap": slow(scores.label.numpy(), scores.probability()[:, 0]),
        "memory": memory,
        "auroc": result.summary["test"]["auroc"],
    }


def slow(y: np.ndarray, p: np.ndarray, resamples: int = 20) -> float:
    """Return how long 1,000 resamples of AUROC's records take, from a few of them."""
    from scipy import stats

    random = np.random.default_rng(0)
    began = time.perf_counter()
    for _ in range(resamples):
        at = random.integers(len(y), size=len(y))
        stats.rankdata(p[at])[y[at] == 1].sum()
    return (time.perf_counter() - began) * 1000 / resamples


if __name__ == "__main__":
    main()
