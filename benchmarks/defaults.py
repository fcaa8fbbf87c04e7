"""What a study reaches whose only setting under a claim is privacy.epsilon, on tables that nobody
tuned for.

    MEDFED_DATA=... python benchmarks/defaults.py [--tables heart,rare-2] [--seeds 5] [--tiny]

Every data set of MEDFED_DATA, the bundled studies and made-up tables (foreign.py), each at epsilon
8, 3, 1 and without privacy, all else left open: what the recipe (medfed.planning.recipe) and the
defaults without a claim choose. A seed changes split, sites' shares, batches and noise. Beside it,
at epsilon 1, the best of nine hand-set steps (rate and clip a quarter to four times the recipe's),
which may look at the test figures: what tuning could gain at most.

AUROC, or R2 for numbers, over all test records. Public data, budget of the run alone.
"""

import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from common import table, write_result
from foreign import TEST, named

import medfed
from medfed import runs
from medfed.data import bundled, sources
from medfed.planning import recipe
from medfed.study import Study, from_tables

EPSILONS = (math.inf, 8.0, 3.0, 1.0)
_ONCE = {"baselines": False, "evaluate_every": 10_000}  # tested at the end alone

HAND = [(rate, clip) for rate in (0.25, 1.0, 4.0) for clip in (0.5, 1.0, 2.0)]
"""What the hand-set steps multiply the recipe's rate and clip with."""


def studies(
    folder: Path, data: Path | None
) -> dict[str, Callable[[], tuple[dict[str, Any], dict[str, int]]]]:
    """Return by name what makes a study's tables, without a claim, and the sizes its
    sites declare.
    """
    found: dict[str, Callable[[], tuple[dict[str, Any], dict[str, int]]]] = {}
    for name in ("breast-cancer", "breast-cancer-ten", "brief"):
        found[name] = partial(_bundled, name)
    if data:
        for name in ("heart", "thyroid"):
            found[name] = partial(_source, name, data)
        found["thyroid-devices"] = partial(_bundled, "thyroid-devices")
    for name, make in named(data).items():

        def tables(name: str = name, make: Any = make) -> tuple[dict[str, Any], dict[str, int]]:
            made = make()
            return made.tables(folder / f"{name}.csv"), made.sizes()

        found[name] = tables
    return found


def _bundled(name: str) -> tuple[dict[str, Any], dict[str, int]]:
    """Return a bundled study's source, sites and model, without a setting of its own."""
    study = medfed.load_study(name)
    tables = study.tables()
    people = tables["sites"]
    options = tables["model"]
    shares = dict(zip(study.sites.names, study.sites.shares, strict=True))
    sizes = {site: round(569 * (1 - TEST) * share) for site, share in shares.items()}
    data = {"source": study.data.source, "test_is_public": True}
    return {"data": data, "sites": people, "model": options}, sizes


def _source(name: str, data: Path) -> tuple[dict[str, Any], dict[str, int]]:
    known = bundled.SOURCES[name]
    counts = known.load(data, False)[known.data.site].value_counts().sort_index()
    sizes = {str(site): max(1, round(n * (1 - TEST))) for site, n in counts.items()}
    return {"data": {"source": name, "test_is_public": True}}, sizes


def asked(tables: dict[str, Any], sizes: dict[str, int], epsilon: float, seed: int) -> Study:
    """Return the study with privacy.epsilon and nothing else that bears on training."""
    privacy = {"epsilon": epsilon, "scope": "run", "sizes": sizes} if math.isfinite(epsilon) else {}
    about = {"name": "defaults", **tables.get("study", {}), "seed": seed}
    return from_tables({**tables, "study": about, "privacy": privacy, "monitor": _ONCE})


def score(study: Study) -> float:
    """Run the study in memory; return AUROC, or R2 of numbers."""
    test = medfed.simulate(study).summary["test"]
    if test is None:
        return math.nan  # the run could not go on
    name = "auroc" if "auroc" in test else "r2"
    return float(test[name]) if test[name] is not None else math.nan


def rows(
    name: str,
    tables: dict[str, Any],
    sizes: dict[str, int],
    epsilons: Sequence[float],
    seeds: int,
    hand: int,
) -> dict[str, Any]:
    """Measure one table."""
    found = {e: [score(asked(tables, sizes, e, seed)) for seed in range(seeds)] for e in epsilons}
    row: dict[str, Any] = {"table": name, "patients": sum(sizes.values()), "sites": len(sizes)}
    for epsilon, values in found.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        row[f"{epsilon:g}"] = {"mean": round(statistics.mean(values), 4), "sd": round(spread, 4)}

    row["foretold"] = foretold(tables, sizes, [e for e in epsilons if math.isfinite(e)])
    if hand and sizes:  # devices declare no sizes
        base = recipe.settle(_completed(asked(tables, sizes, 1.0, 0)))
        rate = base.training.learning_rate
        clip = base.privacy.clip
        chosen = {key: base.value(key) for key in base.chosen}
        best = []
        for by_rate, by_clip in HAND:
            changed = chosen | {
                "training.learning_rate": rate * by_rate,
                "privacy.clip": clip * by_clip,
            }
            tried = [asked(tables, sizes, 1.0, seed)._with(changed) for seed in range(hand)]
            best.append((statistics.mean(score(study) for study in tried), by_rate, by_clip))
        row["hand"] = dict(zip(("mean", "rate", "clip"), max(best), strict=True))

    return row


def foretold(
    tables: dict[str, Any], sizes: dict[str, int], epsilons: Sequence[float]
) -> dict[str, list[float]]:
    """Return what `medfed privacy plan` foretells: epsilon -> expected loss, least and most."""
    study = asked(tables, sizes, min(epsilons), 0)
    found = runs.privacy_outlook(study)["foretold"]
    return {f"{one['epsilon']:g}": [one["loss"], one["low"], one["high"]] for one in found}


def compared(results: Sequence[dict[str, Any]], epsilons: Sequence[float]) -> str:
    """Return, as a table, what was foretold beside what was lost, and how far off the foretelling
    was.
    """
    lines = []
    for row in results:
        for epsilon in (f"{e:g}" for e in epsilons if math.isfinite(e)):
            lost = row["inf"]["mean"] - row[epsilon]["mean"]
            loss, low, high = row["foretold"][epsilon]
            off = max(0.0, low - lost, lost - high)
            lines.append(
                [
                    row["table"],
                    epsilon,
                    f"{lost:.3f}",
                    f"{loss:.3f}",
                    f"{low:.3f} to {high:.3f}",
                    f"{off:.3f}",
                ]
            )

    return table(["table", "epsilon", "lost", "foretold", "range", "outside by"], lines)


def _completed(study: Study) -> Study:
    return dataclasses.replace(study, data=sources.complete(study))


def main(argv: Sequence[str] | None = None) -> None:
    ask = common.parser(__doc__)
    ask.add_argument("--tables", default="", help="comma-separated names; default: all")
    ask.add_argument("--seeds", type=int, default=5)
    ask.add_argument(
        "--hand-seeds", type=int, default=2, help="seeds of the hand-set steps; 0 leaves them out"
    )
    ask.add_argument("--json", type=Path, help="write what was measured here, too")
    said = ask.parse_args(argv)
    torch.set_num_threads(1)
    place = Path(os.environ["MEDFED_DATA"]) if os.environ.get("MEDFED_DATA") else None
    epsilons = EPSILONS
    seeds = said.seeds
    hand = said.hand_seeds
    wanted = [name for name in said.tables.split(",") if name]

    if said.tiny:
        place = None
        epsilons = (math.inf, 1.0)
        seeds = 1
        hand = 0
        wanted = ["clinic-12"]

    with tempfile.TemporaryDirectory() as folder:
        lines = []
        results = []
        for name, make in studies(Path(folder), place).items():
            if wanted and name not in wanted:
                continue
            tables, sizes = make()
            row = rows(name, tables, sizes, epsilons, seeds, hand)
            results.append(row)
            lines.append([name, str(row["patients"]), str(row["sites"]), *_cells(row, epsilons)])
            print(" ".join(lines[-1]), flush=True)

    head = [
        "table",
        "patients",
        "sites",
        *("none" if math.isinf(e) else f"epsilon {e:g}" for e in epsilons),
    ]
    print(table([*head, "best by hand at 1"], lines))
    print(compared(results, epsilons))
    if said.json:
        said.json.write_text(json.dumps(results, indent=1))
    if not said.tiny and not wanted:
        write_result("defaults", {"seeds": seeds, "rows": results})


def _cells(row: dict[str, Any], epsilons: Sequence[float]) -> list[str]:
    cells = [f"{row[f'{e:g}']['mean']:.3f} +- {row[f'{e:g}']['sd']:.3f}" for e in epsilons]
    hand = row.get("hand")
    return [
        *cells,
        f"{hand['mean']:.3f} (rate x {hand['rate']:g}, clip x {hand['clip']:g})" if hand else "-",
    ]


if __name__ == "__main__":
    main()
