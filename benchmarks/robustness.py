"""Thirty liars in a hundred: attacks x federations x ways, beside the plain mean and the run without
liars.

    python benchmarks/robustness.py [--federations network-50,network-10,breast-10]
    [--ways plain,three-party,private] [--attacks sign-flip,min-max] [--seeds 1]

Ways: plain (rows in sight, no noise), three-party (the same in secret), private (three-party at
epsilon 3, delta 1e-6). network-N: made-up hospitals of 50 to 500 patients (of 100 where N is 10)
that differ in case mix and prevalence, trained as the recipe says; no default was tuned on the seeds
used here (101 and on; those below 20 were). breast-10: the bundled study.

Liars see every honest row and keep within what is let pass. Per cell: AUROC of the protected run and
of the plain mean, and of the sites that a run ended by warning of, how many lied and how many did
not. A cell that is refused before it starts says so. Finished cells are kept.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
from common import RESULTS, table, write_result
from foreign import network

import medfed
from medfed.core.checks import MedfedError
from medfed.robust.attacks import liars
from medfed.study import Study, from_tables

ATTACKS = (
    "none",
    "sign-flip",
    "ipm",
    "ipm-large",
    "min-max",
    "min-sum",
    "alie",
    "mimic",
    "label-flip",
    "free-rider",
    "adaptive",
    "opposed",
    "on-off",
    "min-sum-unit",
    "fang",
)
WAYS = ("plain", "three-party", "private")
FEDERATIONS = ("network-50", "network-10", "breast-10")
SHARE = 0.3
CELLS = RESULTS / "robustness.jsonl"

Key = tuple[str, str, str, str, int]


def federation(name: str, way: str, seed: int, folder: Path) -> Study:
    """Return a federation's study in a way, without liars and without a rule."""
    kind, _, sites = name.partition("-")
    private = {"epsilon": 3.0, "delta": 1e-6, "scope": "run"} if way == "private" else {}
    if kind == "network":
        low, high = (50, 500) if int(sites) >= 20 else (99, 101)
        made = network(int(sites), low, high, seed=seed)
        tables = made.tables(folder / f"{name}-{seed}.csv")
        if private:
            tables["privacy"] = {**private, "sizes": made.sizes()}
    else:
        study = medfed.load_study("breast-cancer-ten")
        tables = study.tables()
        tables = {key: tables[key] for key in ("data", "sites", "model")}
        if private:
            shares = zip(study.sites.names, study.sites.shares, strict=True)
            sizes = {site: round(569 * 0.8 * share) for site, share in shares}
            tables["privacy"] = {**private, "sizes": sizes}
    tables["study"] = {"name": name, "seed": seed}
    tables["monitor"] = {"baselines": False, "evaluate_every": 1000}
    secret = "plain" if way == "plain" else "three-party"
    return from_tables(tables).set("security.aggregation", secret)


def play(study: Study, attack: str) -> dict[str, Any]:
    """Run a study under an attack; return its AUROC, and whom it ended by warning of."""
    if attack != "none":
        study = study._with(
            {
                "robustness.attack": attack,
                "robustness.malicious": SHARE,
                "robustness.sight": "all",
            }
        )
    try:
        result = medfed.simulate(study)
    except MedfedError as error:
        return {"refused": str(error)}
    summary = result.summary
    names = list(summary["sites"])
    lying = liars(names, SHARE, study.study.seed) if attack != "none" else ()
    named = [one["site"] for one in summary["suspects"]]
    return {
        "auroc": (summary["test"] or {"auroc": 0.5})["auroc"],
        "named": sum(name in lying for name in named),
        "accused": sum(name not in lying for name in named),
    }


def cell(name: str, way: str, rule: str, attack: str, seed: int, rounds: int = 0) -> dict[str, Any]:
    """Play one cell: under rule "auto", which is to bear SHARE of the sites, or the mean."""
    with tempfile.TemporaryDirectory() as folder:
        study = federation(name, way, seed, Path(folder))
        if rounds:
            study = study.set("training.rounds", rounds)
        if rule != "mean":
            study = study._with({"robustness.rule": rule, "robustness.max_malicious": SHARE})
        return play(study, attack)


def kept() -> dict[Key, dict[str, Any]]:
    """Return the finished cells."""
    if not CELLS.exists():
        return {}
    lines = [json.loads(line) for line in CELLS.read_text().splitlines()]
    return {tuple(line["key"]): line["found"] for line in lines}


def fill(keys: Sequence[Key]) -> dict[Key, dict[str, Any]]:
    """Play what is not there yet, writing each cell down as it ends."""
    found = kept()
    RESULTS.mkdir(exist_ok=True)
    for key in keys:
        if key in found:
            continue
        name, way, rule, attack, seed = key
        found[key] = cell(name, way, rule, attack, seed)
        with CELLS.open("a") as file:
            file.write(json.dumps({"key": key, "found": found[key]}) + "\n")
        print(*key, found[key], flush=True)
    return {key: found[key] for key in keys}


def told(found: dict[Key, dict[str, Any]], seeds: Sequence[int]) -> str:
    """Return the cells as a table, means over seeds."""
    rows = []
    for name, way, rule, attack, seed in found:
        if rule != "auto" or seed != seeds[0]:
            continue

        def mean(rule: str, attack: str, what: str, name: str = name, way: str = way) -> float:
            cells = [found.get((name, way, rule, attack, one), {}) for one in seeds]
            values = [one[what] for one in cells if what in one]
            return sum(values) / len(values) if values else math.nan

        if math.isnan(mean("auto", attack, "auroc")):
            rows.append([name, way, attack, "refused", "", f"{mean('mean', attack, 'auroc'):.3f}"])
            rows[-1] += ["", ""]
            continue
        auroc = mean("auto", attack, "auroc")
        lost = mean("auto", "none", "auroc") - auroc
        rows.append([name, way, attack, f"{auroc:.3f}", f"{lost:+.3f}"])
        rows[-1] += [f"{mean('mean', attack, 'auroc'):.3f}"]
        rows[-1] += [f"{mean('auto', attack, what):g}" for what in ("named", "accused")]

    head = ["federation", "way", "attack", "AUROC", "lost", "plain mean", "liars named", "honest"]
    return table(head, rows)


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--federations", default=",".join(FEDERATIONS))
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--attacks", default=",".join(ATTACKS))
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args(argv)
    if arguments.tiny:
        print(cell("network-4", "plain", "auto", "sign-flip", 1, rounds=2))
        print(cell("network-4", "private", "mean", "none", 1, rounds=1))
        return

    seeds = [101 + k for k in range(arguments.seeds)]
    keys: list[Key] = [
        (name, way, rule, attack, seed)
        for name in arguments.federations.split(",")
        for way in arguments.ways.split(",")
        for attack in arguments.attacks.split(",")
        for rule in ("auto", "mean")
        for seed in seeds
    ]
    found = fill(keys)
    text = told(found, seeds)
    print(text)
    write_result("robustness", {"cells": [[*key, value] for key, value in found.items()]})


if __name__ == "__main__":
    main()
