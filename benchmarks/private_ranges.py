"""What it costs that nobody can say the ranges of columns: found from noised counts, beside
declared ones.

    MEDFED_DATA=... python benchmarks/private_ranges.py [--tables heart,thyroid] [--seeds 5]
    [--tiny]

The tables of defaults.py, at epsilon 3 and 1, with privacy.epsilon and what is said here alone: all
ranges declared; a third of the numbers without, or all of them, with an eighth, a quarter and a
half of epsilon for ranges. A column without a range has no logarithm either. `none`: the noise
hides quantiles of so many columns, and the run is refused.

AUROC, or R2 for numbers, over all test records. Public data, budget of the run alone.
"""

import copy
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import torch
from common import table, write_result
from defaults import asked, score, studies

from medfed.core.checks import PlanError
from medfed.data.bundled import SOURCES

EPSILONS = (3.0, 1.0)
SHARES = (0.125, 0.25, 0.5)
OPEN = {"a third": 3, "all": 1}
"""Of every so many numbers the first is without a range."""


def opened(tables: dict[str, Any], every: int) -> dict[str, Any]:
    """Return a study's tables whose dictionary says nothing of every so manieth number."""
    tables = copy.deepcopy(tables)
    data = tables["data"]
    known = SOURCES[tables["data"]["source"]].data if "source" in tables["data"] else None
    entries = data.setdefault("dictionary", {})
    if known:
        numbers = [
            name for name, entry in known.dictionary.items() if entry.range and name != known.target
        ]
    else:
        numbers = [
            name for name, entry in entries.items() if entry.get("range") and name != data["target"]
        ]
    for name in numbers[::every]:
        entries[name] = {}
    return tables


def measured(
    tables: dict[str, Any], sizes: dict[str, int], epsilon: float, share: float, seeds: int
) -> list[float] | None:
    """Return the figure of each seed; None where the run is refused, as noise would hide the
    ranges.
    """
    found = []
    for seed in range(seeds):
        study = asked(tables, sizes, epsilon, seed)
        try:
            found.append(
                score(study.set("privacy.ranges_epsilon", share * epsilon) if share else study)
            )
        except PlanError as error:
            if "which hides quantiles" not in str(error):
                raise
            return None
    return found


def rows(
    name: str, tables: dict[str, Any], sizes: dict[str, int], epsilons: Sequence[float], seeds: int
) -> list[dict[str, Any]]:
    """Measure one table: a row for each epsilon."""
    found = []
    for epsilon in epsilons:
        row: dict[str, Any] = {"table": name, "patients": sum(sizes.values()), "epsilon": epsilon}
        ways = {"declared": (tables, 0.0)}
        ways |= {
            f"{kind}, {s:g}": (opened(tables, n), s) for kind, n in OPEN.items() for s in SHARES
        }
        for way, (asked_for, share) in ways.items():
            values = measured(asked_for, sizes, epsilon, share, seeds)
            if values is not None:
                spread = statistics.stdev(values) if len(values) > 1 else 0.0
                row[way] = {"mean": round(statistics.mean(values), 4), "sd": round(spread, 4)}
        found.append(row)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    ask = common.parser(__doc__)
    ask.add_argument(
        "--tables", default="", help="comma-separated names; default: all of hospitals"
    )
    ask.add_argument("--seeds", type=int, default=5)
    said = ask.parse_args(argv)
    torch.set_num_threads(1)
    place = Path(os.environ["MEDFED_DATA"]) if os.environ.get("MEDFED_DATA") else None
    epsilons = EPSILONS
    seeds = said.seeds
    wanted = [name for name in said.tables.split(",") if name]

    if said.tiny:
        place = None
        epsilons = (3.0,)
        seeds = 1
        wanted = ["clinic-12"]

    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, make in studies(Path(folder), place).items():
            if (wanted and name not in wanted) or name in ("brief", "thyroid-devices"):
                continue
            for row in rows(name, *make(), epsilons, seeds):
                results.append(row)
                print(row, flush=True)

    ways = ["declared", *(f"{kind}, {share:g}" for kind in OPEN for share in SHARES)]
    lines = [
        [r["table"], str(r["patients"]), f"{r['epsilon']:g}", *(_cell(r.get(way)) for way in ways)]
        for r in results
    ]
    print(table(["table", "patients", "epsilon", *ways], lines))
    if not said.tiny and not wanted:
        write_result("private-ranges", {"seeds": seeds, "rows": results})


def _cell(found: dict[str, float] | None) -> str:
    return f"{found['mean']:.3f} +- {found['sd']:.3f}" if found else "none"


if __name__ == "__main__":
    main()
