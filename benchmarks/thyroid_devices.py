"""What correlated noise buys a fleet of devices: the thyroid-devices study under four kinds of
noise.

    python benchmarks/thyroid_devices.py             5 seeds, 100 rounds, epsilon 1, delta 1e-6, 10 groups
    python benchmarks/thyroid_devices.py --choose    how server step, learning rate and averaging were chosen

A quarter of the records (by a keyed hash of their number) is set aside as public development
devices: settings are chosen on them alone, by AUROC and for each kind of noise by itself; they
neither train nor test in what is measured. They are fewer, so there the noise is scaled down until
its ratio to the signal is that of the measured runs. Each seed draws test devices, first weights
and groups anew; noise is release-grade. MEDFED_DATA names the data folder.
"""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import torch
from common import table, write_result

import medfed
from medfed import Study, runs
from medfed.core.streams import patient_fraction
from medfed.data.bundled import SOURCES
from medfed.links.wire import JointNoise
from medfed.privacy import accounting, factorisation
from medfed.privacy.guarantee import Guarantee, resolve
from medfed.privacy.privacy_events import Gaussian
from medfed.study import from_tables

NEEDS = ("data",)
DEVELOPMENT = 0.25
KEY = 20261123
Settings = tuple[str, float, float]
"""Algorithm, learning rate, share of the rounds whose models are averaged."""

NO_NOISE = {
    "privacy.epsilon": math.inf,
    "privacy.delta": 1.0,
    "privacy.noise": "none",
    "privacy.correlated": False,
}
LOGISTIC = {"model.name": "logistic", "model.options": {}}
KINDS: dict[str, dict[str, Any]] = {
    "none": NO_NOISE,
    "correlated": {},
    "independent": {"privacy.correlated": False},
    "local": {"privacy.correlated": False, "privacy.noise": "site"},
    "local, logistic": {"privacy.correlated": False, "privacy.noise": "site", **LOGISTIC},
}
JOINT = [
    *product(("fedavg",), (3.0, 10.0), (0.0, 0.5)),
    *product(("fedavgm",), (0.3, 1.0, 3.0), (0.0, 0.5)),
]
LOCAL = list(product(("fedavg",), (0.01, 0.1, 1.0, 3.0), (0.0, 0.5)))
GRID: dict[str, list[Settings]] = {
    "none": [
        *product(("fedavg",), (0.3, 1.0, 3.0), (0.0,)),
        *product(("fedavgm",), (0.1, 0.3, 1.0, 3.0), (0.0,)),
    ],
    "correlated": JOINT,
    "independent": JOINT,
    "local": LOCAL,
    "local, logistic": LOCAL,
}
CHOSEN: dict[str, Settings] = {
    "none": ("fedavgm", 0.3, 0.0),
    "correlated": ("fedavgm", 1.0, 0.5),
    "independent": ("fedavg", 10.0, 0.5),
    "local": ("fedavg", 3.0, 0.5),
    "local, logistic": ("fedavg", 3.0, 0.0),
}
"""What --choose found best by AUROC, with 3 seeds."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--choose", action="store_true", help="choose settings on the development devices"
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", default="", help="one kind of noise")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        development, measured, ratio = fleets(Path(folder), 30 if args.tiny else 1)
        if args.tiny:
            measure(
                measured.set("training.rounds", 3), ["none", "correlated"], range(2), keep=False
            )
            return
        kinds = [kind for kind in KINDS if args.only in ("", kind)]
        if args.choose:
            choose(development, ratio, kinds, range(100, 100 + args.seeds))
        else:
            measure(measured, kinds, range(args.seeds))


# The two fleets -----------------------------------------------------------------------------------


def fleets(folder: Path, every: int = 1) -> tuple[Study, Study, float]:
    """Return the study on the development devices, on all others, and how many there are for each
    other.

    `every`: only each so manieth record.
    """
    source = SOURCES["thyroid"]
    study = medfed.load_study("thyroid-devices")
    frame = source.load(None, False)[::every]
    aside = frame["record"].map(lambda record: patient_fraction(KEY, record) < DEVELOPMENT)
    known = {**dataclasses.asdict(source.data), "preprocess": "dictionary", "test_is_public": True}

    def on(rows: pd.Series, name: str) -> Study:
        frame[rows].to_csv(folder / f"{name}.csv", index=False)
        tables = study.tables() | {"data": {**known, "source": "", "table": f"{name}.csv"}}
        return dataclasses.replace(from_tables(tables), folder=folder).set(
            "monitor.evaluate_every", 10**6
        )

    return on(aside, "development"), on(~aside, "measured"), float(aside.sum() / (~aside).sum())


def asked(study: Study, kind: str, settings: Settings) -> Study:
    algorithm, learning_rate, average = settings
    training = {"algorithm": algorithm, "learning_rate": learning_rate, "average": average}
    return study._with(
        {**KINDS[kind], **{f"training.{key}": value for key, value in training.items()}}
    )


def figures(study: Study, seeds: Sequence[int]) -> np.ndarray:
    """Return accuracy and AUROC over all test devices [seeds, 2]."""
    tests = [runs.simulate(study.set("study.seed", seed)).summary["test"] for seed in seeds]
    return np.array([[t["accuracy"], t["auroc"]] for t in tests])


# Choosing -----------------------------------------------------------------------------------------


def choose(study: Study, ratio: float, kinds: Sequence[str], seeds: Sequence[int]) -> None:
    """Print the mean accuracy and AUROC of each setting on the development devices."""
    z = accounting.calibrate(Gaussian, study.privacy.epsilon, study.privacy.delta, "gdp")
    rows = []
    for kind in kinds:
        # noise over devices; noise over the sum
        weaker = math.sqrt(ratio) if kind.startswith("local") else ratio
        epsilon = accounting.gaussian_epsilon(z * weaker, study.privacy.delta)
        for settings in GRID[kind]:
            other = asked(study, kind, settings)
            other = other if kind == "none" else other.set("privacy.epsilon", epsilon)
            accuracy, auroc = figures(other, seeds).mean(0)
            rows.append(
                [
                    kind,
                    settings[0],
                    f"{settings[1]:g}",
                    f"{settings[2]:g}",
                    f"{accuracy:.3f}",
                    f"{auroc:.3f}",
                ]
            )
            print(" ".join(rows[-1]), flush=True)
    print(table(["noise", "algorithm", "lr", "average", "accuracy", "auroc"], rows))


# Measuring ----------------------------------------------------------------------------------------


def measure(study: Study, kinds: Sequence[str], seeds: Sequence[int], keep: bool = True) -> None:
    """Print and write accuracy and AUROC of each kind of noise, and how far sums of
    noise wander.
    """
    found = {kind: figures(asked(study, kind, CHOSEN[kind]), seeds) for kind in kinds}
    wander = prefix_sums(study)
    if not kinds[1:]:
        print(kinds[0], found[kinds[0]].mean(0))
        return

    equal = asked(study, "independent", CHOSEN["correlated"]).set(
        "privacy.epsilon", round(wander["equal_epsilon"], 2)
    )
    found[f"independent at epsilon {equal.privacy.epsilon:g}"] = figures(equal, seeds)
    rows = []
    results = []

    for name, values in found.items():
        algorithm, learning_rate, average = CHOSEN.get(name, CHOSEN["correlated"])
        mean = values.mean(0)
        sd = values.std(0, ddof=1)
        rows.append(
            [
                name,
                algorithm,
                f"{learning_rate:g}",
                *(f"{v:.3f}" for v in (mean[0], sd[0], mean[1], sd[1])),
            ]
        )
        results.append(
            {
                "noise": name, "algorithm": algorithm, "learning_rate": learning_rate, "average": average,
                "accuracy": values[:, 0].round(4).tolist(), "auroc": values[:, 1].round(4).tolist(),
            }
        )  # fmt: skip

    print(table(["noise", "algorithm", "lr", "accuracy", "sd", "auroc", "sd"], rows))
    print(", ".join(f"{name} {value:.3f}" for name, value in wander.items()))
    if keep:
        write_result(
            "thyroid-devices",
            {"epsilon": 1.0, "delta": 1e-6, "seeds": len(seeds), "rows": results} | wander,
        )


def prefix_sums(study: Study, draws: int = 5) -> dict[str, float]:
    """Return how many times smaller correlated noise keeps the sum of all noise so far, as drawn
    and as expected.

    Root mean square over rounds, parameters and draws; both at the study's guarantee for one fleet.
    Beside it, the epsilon at which independent noise would be as small.
    """
    rms = {}
    rounds = study.training.rounds
    for kind in ("correlated", "independent"):
        promised = resolve(asked(study, kind, CHOSEN[kind]), {"a": 2500, "b": 2500}, 993)
        rms[kind] = math.sqrt(np.mean([_square_sums(promised, rounds) for _ in range(draws)]))

    groups = study.fleet.groups
    expected = factorisation.gain(factorisation.coefficients(rounds, groups), rounds, groups)
    z = accounting.calibrate(Gaussian, study.privacy.epsilon, study.privacy.delta, "gdp")
    gain = rms["independent"] / rms["correlated"]

    return {
        "prefix_gain_measured": gain,
        "prefix_gain_expected": expected,
        "equal_epsilon": accounting.gaussian_epsilon(z / gain, study.privacy.delta),
    }


def _square_sums(promised: Guarantee, rounds: int) -> float:
    noise = JointNoise(promised, 0)
    nothing = torch.zeros(promised.numbers(), dtype=torch.int64)
    each_TP = torch.stack([noise.server(nothing, number) for number in range(1, rounds + 1)])
    return float(each_TP.double().cumsum(0).square().mean())


if __name__ == "__main__":
    main()
