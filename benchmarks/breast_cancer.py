"""Breast cancer without privacy over many seeds: is a federated model as good as one on pooled
rows?

    python benchmarks/breast_cancer.py [--seeds 20] [--set KEY=VALUE ...]

A seed decides split, partition, initial weights and batch order. Prints the mean over seeds of the
federated model, of each site's own, and of the pooled model, all tested on the same held-out
patients, and the paired differences.
"""

from collections.abc import Sequence

import common
import numpy as np
from common import table, without_privacy, write_result

import medfed
from medfed.study import parse_value

TRAINING = {
    "rounds": 30,
    "local_epochs": 5,
    "batch_size": 16,
    "learning_rate": 0.05,
    "weight_decay": 0.002,
}
METRICS = ("accuracy", "auroc", "f1", "brier")


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--study", default="breast-cancer")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    args = parser.parse_args(argv)
    seeds, settings = (2, [*args.set, "training.rounds=2"]) if args.tiny else (args.seeds, args.set)
    found: dict[str, list[list[float]]] = {"federated": [], "local": [], "pooled": []}
    seconds = []

    for seed in range(seeds):
        study = medfed.load_study(args.study, [f"study.seed={seed}", "monitor.evaluate_every=1000"])
        if args.study == "breast-cancer":
            study = without_privacy(study, **TRAINING)
        for setting in settings:
            key, _, value = setting.partition("=")
            study = study.set(key, parse_value(value))
        summary = medfed.simulate(study).summary
        seconds.append(summary["seconds"]["total"])
        for name, rows in found.items():
            test = summary["test"] if name == "federated" else summary["baselines"][name]["test"]
            rows.append([test[metric] for metric in METRICS])

    values = {name: np.array(rows) for name, rows in found.items()}
    lines = []
    for name, v in values.items():
        lines.append(
            [
                name,
                *(f"{m:.4f} +- {s:.4f}" for m, s in zip(v.mean(0), v.std(0, ddof=1), strict=True)),
            ]
        )

    gap = values["federated"] - values["pooled"]
    error = gap.std(0, ddof=1) / np.sqrt(seeds)
    lines.append(
        [
            "federated - pooled",
            *(f"{m:+.4f} (se {e:.4f})" for m, e in zip(gap.mean(0), error, strict=True)),
        ]
    )
    print(
        f"{args.study}, {seeds} seeds, mean +- sd over seeds; a study with baselines: "
        f"{np.median(seconds):.2f} s"
    )
    print(table(["model", *METRICS], lines))
    means = {
        name: dict(zip(METRICS, v.mean(0).tolist(), strict=True)) for name, v in values.items()
    }
    gaps = dict(zip(METRICS, gap.mean(0).tolist(), strict=True))

    if not args.tiny:
        write_result(
            f"{args.study}-seeds", {"seeds": seeds, "set": args.set, "mean": means, "gap": gaps}
        )


if __name__ == "__main__":
    main()
