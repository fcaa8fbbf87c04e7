"""What privacy costs in accuracy: the breast-cancer study under epsilon, and the brief's network.

    python benchmarks/privacy_curves.py             20 seeds, epsilon .1 to 8, noise shared and site
    python benchmarks/privacy_curves.py --choose    how rounds and learning rates were chosen, on another data set

Settings were chosen on the original Wisconsin set (1992: nine cytological grades, 699 records),
whose patients and measurements are others; no test patient of the diagnostic set was looked at. One
draw of patients, sites, first weights and noise each seed; noise is release-grade.
"""

import csv
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import common
import numpy as np
import torch
from common import table, write_result

import medfed
from medfed import Study, runs
from medfed.study import from_tables

EPSILONS = (0.1, 0.3, 1.0, 3.0, 8.0)
GRADES = [
    "clump thickness", "size uniformity", "shape uniformity", "adhesion", "epithelial size", "bare nuclei",
    "bland chromatin", "normal nucleoli", "mitoses",
]  # fmt: skip
GRID = {  # rounds, local steps, learning rate
    "logistic": [(rounds, 1, lr) for rounds in (20, 30, 50) for lr in (2.0, 3.0, 5.0, 10.0)],
    "network": [(30, 1, lr) for lr in (0.1, 0.2, 0.3)],
    "brief": [(3, steps, lr) for steps in (3, 5, 10) for lr in (0.025, 0.04, 0.05, 0.075)],
}
TINY: dict[str, Any] = {"training.rounds": 1, "training.local_steps": 1}
# the learning rate chosen for the logistic model where each site adds its own noise
SITE_RATE = 2.0


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--choose", action="store_true", help="choose settings on the original Wisconsin set"
    )
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--only", default="", help="logistic, network or brief")
    args = parser.parse_args(argv)
    torch.set_num_threads(2)
    if args.tiny:
        measure(range(2), args.only, (1.0,), TINY, keep=False)
    elif args.choose:
        choose(range(100, 100 + args.seeds), args.only)
    else:
        measure(range(args.seeds), args.only)


def studies() -> dict[str, Study]:
    """The three studies of the table, at epsilon 1."""
    logistic = quiet(medfed.load_study("breast-cancer"))
    brief = quiet(medfed.load_study("brief"))
    network = logistic._with(
        {
            "model.name": brief.model.name,
            "model.options": brief.model.options,
            "training.learning_rate": 0.2,
        }
    )
    return {"logistic": logistic, "network": network, "brief": brief}


def quiet(study: Study) -> Study:
    return study._with({"monitor.baselines": False, "monitor.evaluate_every": 10**6})


def accuracy(study: Study, seeds: Sequence[int]) -> np.ndarray:
    """Return accuracy and AUROC over all test patients [seeds, 2]."""
    tests = [runs.simulate(study.set("study.seed", seed)).summary["test"] for seed in seeds]
    return np.array([[t["accuracy"], t["auroc"]] for t in tests])


def choose(seeds: Sequence[int], only: str) -> None:
    """Print the mean accuracy of each setting on the other data set."""
    with tempfile.TemporaryDirectory() as folder:
        rows: list[list[str]] = []
        for name, study in chosen(studies(), only):
            other = elsewhere(study, Path(folder))
            modes = ("site",) if name == "brief" else ("shared", "site")
            for noise in modes:
                for rounds, steps, lr in GRID[name]:
                    values = {
                        "privacy.noise": noise,
                        "training.rounds": rounds,
                        "training.local_steps": steps,
                        "training.learning_rate": lr,
                    }
                    found = accuracy(other._with(values), seeds).mean(0)
                    rows.append(
                        [
                            name,
                            noise,
                            str(rounds),
                            str(steps),
                            f"{lr:g}",
                            *(f"{v:.4f}" for v in found),
                        ]
                    )
                    print(" ".join(rows[-1]), flush=True)

        print(table(["study", "noise", "rounds", "steps", "lr", "accuracy", "auroc"], rows))


def elsewhere(study: Study, folder: Path) -> Study:
    """Return the study on the original Wisconsin set: grades 1 to 10, one record a patient."""
    source = Path(os.environ["MEDFED_DATA"]) / "breast_wisconsin" / "breast-cancer-wisconsin.data"
    path = folder / "original.csv"
    with path.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow([*GRADES, "class"])
        seen = set()
        for row in csv.reader(source.open()):
            if row[0] not in seen:
                seen.add(row[0])
                writer.writerow([*row[1:10], {"2": "benign", "4": "malignant"}[row[10]]])

    known: dict[str, Any] = {grade: {"range": [1.0, 10.0]} for grade in GRADES}
    known["class"] = {"categories": ["benign", "malignant"]}
    data = {
        "table": "original.csv",
        "target": "class",
        "dictionary": known,
        "preprocess": "dictionary",
        "test_is_public": True,
    }
    tables = study.tables() | {"data": data}

    return dataclasses.replace(from_tables(tables), folder=folder)


def measure(
    seeds: Sequence[int],
    only: str,
    epsilons: Sequence[float] = EPSILONS,
    less: Mapping[str, Any] = MappingProxyType({}),
    keep: bool = True,
) -> None:
    """Print and, to `keep` them, write accuracy and AUROC over epsilon; `less`: settings of a
    smaller run.
    """
    rows = []
    results = []
    for name, study in chosen(studies(), only):
        modes = ("site",) if name == "brief" else ("shared", "site")
        for noise in modes:
            for epsilon in epsilons if name == "logistic" else (1.0,):
                asked = study._with({"privacy.noise": noise, "privacy.epsilon": epsilon})
                if (name, noise) == ("logistic", "site"):
                    asked = asked.set("training.learning_rate", SITE_RATE)
                rows.append(
                    _row(
                        name, noise, f"{epsilon:g}", accuracy(_smaller(asked, less), seeds), results
                    )
                )

        if name == "logistic":
            rows.append(
                _row(
                    name, "none", "inf", accuracy(study._with({**NO_NOISE, **less}), seeds), results
                )
            )

    print(table(["study", "noise", "epsilon", "accuracy", "sd", "auroc", "sd"], rows))
    if keep and not only:
        write_result("privacy-curves", {"seeds": len(seeds), "delta": 1e-6, "rows": results})


NO_NOISE = {
    "privacy.epsilon": float("inf"),
    "privacy.delta": 1.0,
    "privacy.noise": "none",
    "training.average": 0.0,
    "training.rounds": 300,
    "training.learning_rate": 0.3,
}


def _smaller(study: Study, less: Mapping[str, Any]) -> Study:
    """Return the study with settings of a smaller run, and then with a small network."""
    small = {"model.options.hidden": [8, 4]} if less and study.model.options else {}
    return study._with({**less, **small})


def chosen(found: dict[str, Study], only: str) -> Iterator[tuple[str, Study]]:
    return ((name, study) for name, study in found.items() if only in ("", name))


def _row(
    name: str, noise: str, epsilon: str, found: np.ndarray, results: list[dict[str, Any]]
) -> list[str]:
    mean = found.mean(0)
    sd = found.std(0, ddof=1)
    results.append(
        {
            "study": name, "noise": noise, "epsilon": float(epsilon),
            "accuracy": round(float(mean[0]), 4), "accuracy_sd": round(float(sd[0]), 4),
            "auroc": round(float(mean[1]), 4), "auroc_sd": round(float(sd[1]), 4),
        }
    )  # fmt: skip
    row = [name, noise, epsilon, f"{mean[0]:.4f}", f"{sd[0]:.4f}", f"{mean[1]:.4f}", f"{sd[1]:.4f}"]
    print(" ".join(row), flush=True)
    return row


if __name__ == "__main__":
    main()
