"""Heart disease under FLamby's protocol: every algorithm beside FLamby's own figures.

    MEDFED_DATA=... python benchmarks/heart_flamby.py

Four hospitals, train/test 199/104, 172/89, 30/16, 85/45; logistic model on 13 features; mean of the
hospitals' test accuracies; 5 seeds (42 to 46). Three settings:

    FLamby's      its normalisation (each hospital by itself), weights by size, random first weights, batch 4, 100 steps
                  a round, 15 rounds, its learning rates
    chosen        its normalisation, equal weights, zero first weights, batch 16, 10 steps a round, 15 rounds; learning
                  rates by cross-validation on training rows
    federated     the same but one normalisation for all hospitals, as medfed's `standard` makes it; weights by size

The learning rates of the last two were picked by 5-fold cross-validation, three times repeated, on
training rows alone (see docs/log.md). The test metric's own standard error is about .036: ranks
within .02 mean nothing.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import bare_federation, table, write_result
from flamby_protocol import PUBLISHED_ACCURACY, SEEDS, load

import medfed
from medfed.data.federated import Rows
from medfed.monitor.events import Log
from medfed.node.inprocess import InProcess
from medfed.node.site import Site
from medfed.planning.plan import POOLED
from medfed.rounds.round import run_round, test

NEEDS = ("data",)
Settings = dict[str, Any]
TINY: Settings = {"rounds": 1, "local_epochs": 1, "local_steps": 2}
ALGORITHMS = (
    "fedavg", "fedprox", "scaffold", "fednova", "fedavgm", "fedadam", "fedyogi", "fedadagrad", "local", "pooled",
)  # fmt: skip
ADAM_ALONE: Settings = {
    "rounds": 1,
    "local_epochs": 50,
    "local_steps": 0,
    "batch_size": 4,
    "optimizer": "adam",
    "learning_rate": 1e-3,
}


def rates(lr: float, server: float = 0.0, mu: float = 0.01, tau: float = 1e-3) -> Settings:
    return {"learning_rate": lr, "server_learning_rate": server, "mu": mu, "server_epsilon": tau}


FLAMBY: dict[str, Settings] = {
    **dict.fromkeys(("fedavg", "fedprox", "scaffold", "fednova", "fedavgm"), rates(0.001)),
    "fedadam": {**rates(0.01, 0.01, tau=1e-8), "server_beta2": 0.999},
    "fedyogi": {**rates(0.003162, 0.01, tau=1e-8), "server_beta2": 0.999},
    "fedadagrad": rates(0.003162, 0.316228, tau=1e-8),
    "local": ADAM_ALONE,
    "pooled": ADAM_ALONE,
}
CHOSEN: dict[str, Settings] = {
    **dict.fromkeys(("fedavg", "scaffold", "fednova", "fedavgm", "local"), rates(0.01)),
    "fedprox": rates(0.01, mu=0.1),
    "fedadam": rates(0.01, 0.01),
    "fedyogi": rates(0.01, 0.01),
    "fedadagrad": rates(0.001, 0.03),
    "pooled": ADAM_ALONE,
}
FEDERATED: dict[str, Settings] = {
    **dict.fromkeys(("fedavg", "fedprox", "scaffold", "fednova", "fedavgm", "local"), rates(0.03)),
    "fedadam": rates(0.1, 0.003),
    "fedyogi": rates(0.1, 0.003),
    "fedadagrad": rates(0.001, 0.1),
    "pooled": ADAM_ALONE,
}
MEDFED_BUDGET: Settings = {"batch_size": 16, "local_steps": 10, "rounds": 15}
COLUMNS: dict[str, tuple[str, str, Settings, dict[str, Settings]]] = {
    # title: normalisation, model, common settings, settings of each algorithm
    "FLamby's settings": (
        "site",
        "flamby_protocol:baseline",
        {"batch_size": 4, "local_steps": 100, "rounds": 15},
        FLAMBY,
    ),
    "chosen": ("site", "logistic", {**MEDFED_BUDGET, "weighting": "uniform"}, CHOSEN),
    "federated scaling": ("pooled", "logistic", MEDFED_BUDGET, FEDERATED),
}


def accuracy(
    algorithm: str, column: str, seed: int, rows: dict[str, tuple[Rows, Rows]], less: Settings
) -> float:
    """Train one federation and return the mean of its hospitals' test accuracies."""
    _, model, shared, settings = COLUMNS[column]
    study = medfed.load_study("heart").set("study.seed", seed).set("model.name", model)
    for key, value in {
        "algorithm": algorithm,
        "weight_decay": 0.0,
        **shared,
        **settings[algorithm],
        **less,
    }.items():
        study = study.set(f"training.{key}", value)

    plan, fleet = bare_federation(study, rows)
    if algorithm == "pooled":
        sites = [fleet.site(name) for name in plan.testers]
        fleet = InProcess([*sites, Site.pooled(sites)])
        assert plan.participants == (POOLED,)

    server = plan.algorithm.begin(plan.first_weights(), study.training)
    for _ in range(study.training.rounds):
        server = run_round(server, plan, fleet, plan.budget(), Log())
    value = test(server, plan, fleet, Log()).macro["accuracy"].value
    assert value is not None

    return value


def as_rows(x: np.ndarray, y: np.ndarray) -> Rows:
    return Rows(torch.from_numpy(x), torch.from_numpy(y).float(), torch.arange(len(y)))


def main(argv: Sequence[str] | None = None) -> None:
    args = common.parser(__doc__).parse_args(argv)
    algorithms, seeds, less = (
        (("scaffold", "pooled"), SEEDS[:2], TINY) if args.tiny else (ALGORITHMS, SEEDS, {})
    )
    folder = Path(os.environ["MEDFED_DATA"]) / "fed_heart_disease"
    rows = {
        kind: {
            name: (as_rows(a, b), as_rows(c, d))
            for name, (a, b, c, d) in load(folder, kind).items()
        }
        for kind in ("site", "pooled")
    }
    found: dict[str, dict[str, list[float]]] = {}

    for algorithm in algorithms:
        found[algorithm] = {
            column: [
                accuracy(algorithm, column, seed, rows[COLUMNS[column][0]], less) for seed in seeds
            ]
            for column in COLUMNS
        }

    lines = []
    for algorithm, columns in found.items():
        published = {k.lower(): v for k, v in PUBLISHED_ACCURACY.items()}.get(algorithm)
        cells = [f"{np.mean(v):.3f} +- {np.std(v, ddof=1):.3f}" for v in columns.values()]
        lines.append([algorithm, "-" if published is None else f"{published:.3f}", *cells])

    print(
        f"heart, FLamby's protocol: mean of 4 hospitals' test accuracies, {len(seeds)} seeds, "
        "mean +- sd over seeds"
    )
    print(table(["algorithm", "FLamby published", *COLUMNS], lines))
    if not args.tiny:
        write_result("heart-flamby", {"seeds": list(seeds), "accuracy": found})


if __name__ == "__main__":
    main()
