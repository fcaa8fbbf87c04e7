"""Attacks against rules at 30 % malicious clients: how much worse the model gets. Resumable: finished cells are kept.

    python benchmarks/byzantine.py [--federations breast-10,breast-20,heart-12,thyroid-20] [--seeds 3] [--private]

A cell is a whole run; its figure is the AUROC over all test records. Loss: the AUROC of the mean without liars, less
that of the cell, in points (hundredths). Backdoors also by their success rate. `--private` runs 20 clients of 2,000
made-up patients each at epsilon 1 under three parties, where the rule reads a noised Gram matrix.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from common import RESULTS, table, write_result

import medfed
from medfed.study import Privacy, Robustness, Study

ATTACKS = (
    "sign-flip",
    "scaled",
    "gaussian",
    "label-flip",
    "feature-poison",
    "alie",
    "ipm",
    "ipm-large",
    "min-max",
    "min-sum",
    "mimic",
    "free-rider",
    "colluding",
    "nan",
)
RULES = ("mean", "nnm+geometric-median", "multi-krum", "trimmed-mean", "nnm+caf")
DEFAULT = "nnm+geometric-median"
CELLS = RESULTS / "byzantine.jsonl"
LETTERS = "ABCDEFGHIJKLMNOPQRST"


def federation(name: str) -> Study:
    """Return a federation without liars, without noise, in plain mode."""
    kind, _, clients = name.partition("-")
    if kind == "breast":
        study = medfed.load_study("breast-cancer-ten")
        names = tuple(f"site {LETTERS[i]}" for i in range(int(clients)))
        sites = dataclasses.replace(study.sites, names=names, shares=(1 / len(names),) * len(names))
        study = dataclasses.replace(study, sites=sites)
    else:
        raise SystemExit(f"--federations {name!r}; known: breast-10, breast-20")
    study = dataclasses.replace(study, privacy=Privacy(), robustness=Robustness())
    return study.set("security.aggregation", "plain").set("monitor.baselines", False)


def cell(study: Study, rule: str, attack: str, seed: int) -> dict[str, object]:
    """Run one cell; return its AUROC, who lied and who was suspected."""
    study = (
        study.set("study.seed", seed).set("robustness.rule", rule).set("monitor.evaluate_every", study.training.rounds)
    )
    if rule != "mean":
        study = study.set("robustness.max_malicious", 0.3)
    if attack:
        study = study.set("robustness.attack", attack).set("robustness.malicious", 0.3)
    summary = medfed.simulate(study).summary
    found = summary["test"] or {"auroc": 0.5}
    return {"auroc": found["auroc"], "suspects": [one["site"] for one in summary["suspects"]]}


def main() -> None:
    """Fill the cells that are missing, print the table and keep it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--federations", default="breast-10,breast-20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--private", action="store_true")
    options = parser.parse_args()
    kept = [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []
    known = {(c["federation"], c["rule"], c["attack"], c["seed"]): c for c in kept}
    result: dict[str, object] = {}
    for name in options.federations.split(","):
        study = federation(name)
        for rule, attack, seed in itertools.product(RULES, ("", *ATTACKS), range(options.seeds)):
            if (name, rule, attack, seed) not in known:
                made = {
                    "federation": name,
                    "rule": rule,
                    "attack": attack,
                    "seed": seed,
                    **cell(study, rule, attack, seed),
                }
                known[name, rule, attack, seed] = made
                with CELLS.open("a") as file:
                    file.write(json.dumps(made) + "\n")
        result[name] = report(name, known, options.seeds)
    if options.private:
        result["private"] = private()
    write_result("byzantine", result)


def report(name: str, known: dict[tuple[str, str, str, int], dict[str, float]], seeds: int) -> dict[str, object]:
    """Print losses in points of AUROC, attacks down, rules across; return them with medians and worst ones."""
    loss = {
        (rule, attack): [
            100 * (known[name, "mean", "", seed]["auroc"] - known[name, rule, attack, seed]["auroc"])
            for seed in range(seeds)
        ]
        for rule in RULES
        for attack in ("", *ATTACKS)
    }
    middle = {key: statistics.mean(values) for key, values in loss.items()}
    lines = [[attack or "none", *(f"{middle[rule, attack]:.1f}" for rule in RULES)] for attack in ("", *ATTACKS)]
    worst = {rule: max(middle[rule, attack] for attack in ATTACKS) for rule in RULES}
    median = {rule: statistics.median(middle[rule, attack] for attack in ATTACKS) for rule in RULES}
    lines += [["median", *(f"{median[r]:.1f}" for r in RULES)], ["worst", *(f"{worst[r]:.1f}" for r in RULES)]]
    print(f"\n{name}: loss in points of AUROC, mean of {seeds} seeds, 30 % malicious")
    print(table(["attack", *RULES], lines))
    broken = sum(middle["mean", attack] >= 10 for attack in ATTACKS)
    print(f"the mean loses 10 points or more under {broken} of {len(ATTACKS)} attacks")
    print(f"{DEFAULT}: median {median[DEFAULT]:.1f} (aim 2), worst {worst[DEFAULT]:.1f} (aim 5)")
    return {
        "loss": {f"{rule} | {attack or 'none'}": values for (rule, attack), values in loss.items()},
        "median": median,
        "worst": worst,
    }


PRIVATE = """
[study]
name = "twenty"
[data]
table = "twenty.csv"
site = "site"
patient = "id"
target = "y"
preprocess = "dictionary"
test_is_public = true
[data.dictionary.y]
categories = ["no", "yes"]
{bounds}
[model]
name = "logistic"
[training]
rounds = 10
batch_size = 0
learning_rate = 3.0
[privacy]
epsilon = 1.0
delta = 1e-6
noise = "shared"
scope = "run"
clipping = "fixed"
clip = 1.0
[privacy.sizes]
{sizes}
[security]
aggregation = "three-party"
"""


def private(clients: int = 20, patients: int = 2000, features: int = 8) -> dict[str, object]:
    """Return AUROC and suspects at epsilon 1 under three parties, by rule and attack."""
    random = np.random.default_rng(0)
    n = clients * patients * 5 // 4
    x = random.uniform(-1, 1, (n, features))
    y = random.random(n) < 1 / (1 + np.exp(-4 * x @ random.normal(size=features)))
    frame = pd.DataFrame(x, columns=[f"x{i}" for i in range(features)])
    names = [f"site {LETTERS[i]}" for i in range(clients)]
    frame = frame.assign(y=np.where(y, "yes", "no"), site=np.repeat(names, n // clients), id=np.arange(n))
    found: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as folder:
        frame.to_csv(Path(folder) / "twenty.csv", index=False)
        bounds = "\n".join(f"[data.dictionary.x{i}]\nrange = [-1.0, 1.0]" for i in range(features))
        sizes = "\n".join(f'"{name}" = {patients}' for name in names)
        (Path(folder) / "twenty.toml").write_text(PRIVATE.format(bounds=bounds, sizes=sizes))
        study = medfed.load_study(Path(folder) / "twenty.toml").set("monitor.baselines", False)
        for rule, attack in itertools.product(("mean", DEFAULT), ("", "sign-flip", "alie")):
            one = study.set("robustness.rule", rule)
            one = one.set("robustness.max_malicious", 0.3) if rule != "mean" else one
            one = one._with({"robustness.attack": attack, "robustness.malicious": 0.3}) if attack else one
            summary = medfed.simulate(one).summary
            auroc = summary["test"] and summary["test"]["auroc"]
            suspects = [entry["site"] for entry in summary["suspects"]]
            spent = summary["privacy"]["epsilon"]
            print(f"private, {rule}, {attack or 'none'}: AUROC {auroc}, epsilon {spent:.3f}, suspects {suspects}")
            found[f"{rule} | {attack or 'none'}"] = {"auroc": auroc, "suspects": suspects, "epsilon": spent}
    return found


if __name__ == "__main__":
    main()
