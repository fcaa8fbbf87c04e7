"""Attacks against rules at 30 % malicious clients: how much worse the model gets. Resumable:
finished cells are kept.

    python benchmarks/byzantine.py [--federations breast-10,breast-20,heart-12,thyroid-20]
    [--private] [--only-fill]

A cell is a whole run; its figure is the AUROC over all test records. Loss: the AUROC of the mean
without liars, less that of the cell, in points (hundredths). 3 seeds, 10 for the default rule.
Backdoors by the share of marked records of other classes that the model takes for the backdoor's.
Suspicion: AUROC of each client's mean score over the first 10 rounds, liars against the honest.
`--private` runs 20 clients of 2,000 made-up patients each at epsilon 1 under three parties, where
the rule reads a noised Gram matrix. `--only-fill` lets several processes fill cells side by side.

breast: equal shares of the patients. heart: each hospital cut into pieces of about 77 patients;
thyroid: each referral source cut into pieces, the small ones whole; both keep how sites differ.
"""

import dataclasses
import itertools
import json
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import torch
from common import RESULTS, table, write_result
from scipy import stats
from sklearn.metrics import roc_auc_score

import medfed
from medfed.data import sources
from medfed.learn.local import outputs
from medfed.monitor.events import Event, Inspected, RoundStarted
from medfed.planning.building import build_model
from medfed.robust.attacks import TRIGGER, liars
from medfed.runs import PreparedData
from medfed.study import Privacy, Robustness, Study

ATTACKS = (
    "sign-flip",
    "scaled",
    "gaussian",
    "label-flip",
    "feature-poison",
    "alie",
    "ipm-large",
    "min-max",
    "min-sum",
    "mimic",
    "free-rider",
    "colluding",
    "nan",
    "adaptive",
)
LOUD = ("sign-flip", "scaled", "gaussian", "label-flip", "nan")
"""Attacks whose liars detection is to find; wrap-around rows are refused under three parties, each
by name.
"""

RULES = ("mean", "nnm+geometric-median", "multi-krum", "trimmed-mean", "nnm+caf")
DEFAULT = "nnm+geometric-median"
FEDERATIONS = ("breast-10", "breast-20", "heart-12", "thyroid-20")
CELLS = RESULTS / "byzantine.jsonl"
LETTERS = "ABCDEFGHIJKLMNOPQRST"
PIECES = {"heart": 77, "thyroid": 560}  # patients of a piece, about

Key = tuple[str, str, str, int]
Cells = dict[Key, dict[str, Any]]


@cache
def federation(name: str) -> Study:
    """Return a federation without liars, without noise, in plain mode."""
    kind, _, clients = name.partition("-")
    if kind == "breast":
        study = medfed.load_study("breast-cancer-ten")
        names = tuple(f"site {LETTERS[i]}" for i in range(int(clients)))
        sites = dataclasses.replace(study.sites, names=names, shares=(1 / len(names),) * len(names))
        study = dataclasses.replace(study, sites=sites)
    elif kind in PIECES:
        study = in_pieces(
            medfed.load_study({"heart": "heart", "thyroid": "thyroid-devices"}[kind]), int(clients)
        )
    else:
        raise SystemExit(f"--federations {name!r}; known: {', '.join(FEDERATIONS)}")
    study = dataclasses.replace(study, privacy=Privacy(), robustness=Robustness())
    study = study.set("monitor.baselines", False).set(
        "monitor.evaluate_every", study.training.rounds
    )
    return study.set("security.aggregation", "plain")


def in_pieces(study: Study, clients: int) -> Study:
    """Return the study on a table in which each of the source's sites is cut into hospitals of
    about one size.
    """
    frames, known = sources.frames(study)
    sizes = {site: len(frame) for site, frame in frames.items()}
    counts = dict.fromkeys(sizes, 1)
    while sum(counts.values()) < clients:
        counts[max(sizes, key=lambda site: sizes[site] / counts[site])] += 1
    pieces = []
    for site, frame in frames.items():
        order = np.random.default_rng(0).permutation(len(frame)) % counts[site]
        pieces.append(frame.assign(client=[f"{site} {LETTERS[i]}" for i in order]))
    folder = Path(tempfile.mkdtemp(prefix="byzantine-"))
    pd.concat(pieces).to_csv(folder / "table.csv", index=False)
    data = dataclasses.replace(known, source="", table="table.csv", site="client")
    training = study.training
    # settings of hospitals: a device's study has one record a client
    if study.sites.kind == "device":
        training = dataclasses.replace(
            training,
            algorithm="fedavg",
            rounds=20,
            local_epochs=2,
            batch_size=32,
            learning_rate=0.5,
            average=0.0,
        )
    training = dataclasses.replace(training, quorum=0.5)
    sites = dataclasses.replace(study.sites, kind="hospital")
    fleet = medfed.load_study("heart").fleet
    return dataclasses.replace(
        study, data=data, sites=sites, fleet=fleet, training=training, folder=folder
    )


def cell(name: str, rule: str, attack: str, seed: int, rounds: int = 0) -> dict[str, Any]:
    """Run one cell; return its AUROC, how well suspicion tells liars, and how many client-rounds
    were sat out.
    """
    study = federation(name).set("study.seed", seed).set("robustness.rule", rule)
    study = study.set("training.rounds", rounds) if rounds else study
    if rule != "mean":
        study = study.set("robustness.max_malicious", 0.3)
    if attack:
        study = study._with({"robustness.attack": attack, "robustness.malicious": 0.3})
    told: list[Event] = []
    result = medfed.simulate(study, listeners=[told.append])
    summary = result.summary
    found: dict[str, Any] = {"auroc": (summary["test"] or {"auroc": 0.5})["auroc"]}
    found["suspects"] = [one["site"] for one in summary["suspects"]]

    if rule == DEFAULT:
        names = summary["sites"]
        found["out"] = 1 - statistics.mean(
            len(e.clients) for e in told if isinstance(e, RoundStarted)
        ) / len(names)
        if attack and attack != "backdoor":
            found["suspicion"] = suspicion(told, names, liars(names, 0.3, seed))

    if attack == "backdoor":
        model = build_model(study, result.encoding)
        held = prepared(name, seed)
        x, y = (
            torch.from_numpy(np.concatenate([pair[i] for pair in held.test.values()]))
            for i in (0, 1)
        )
        marked, plain = TRIGGER.success(
            lambda rows: (outputs(model, result.w_P, rows)[:, 0] > 0).long(), x, y
        )
        found |= {"marked": marked, "plain": plain}

    return found


@cache
def prepared(name: str, seed: int) -> PreparedData:
    """Return a federation's encoded records."""
    return medfed.load_and_prepare_medical_data(federation(name).set("study.seed", seed))


def suspicion(told: list[Event], names: list[str], lying: tuple[str, ...]) -> float:
    """Return the AUROC of the mean score over the first ten rounds that a client took part in."""
    scores: dict[str, list[float]] = defaultdict(list)
    for event in told:
        if isinstance(event, Inspected) and event.round <= 10:
            worst = {client: 0.0 for client in event.weights}
            for one in event.findings:
                worst[str(one["client"])] = max(
                    worst.get(str(one["client"]), 0.0), float(str(one["score"]))
                )
            for client, score in worst.items():
                scores[client].append(score)
    return float(
        roc_auc_score(
            [n in lying for n in names], [statistics.mean(scores[n] or [0.0]) for n in names]
        )
    )


@dataclasses.dataclass(frozen=True)
class Grid:
    """Which cells are filled, how long each run is, and where cells are kept."""

    rules: Sequence[str] = RULES
    attacks: Sequence[str] = ATTACKS
    most: int = 10  # seeds of the default rule; 3 at most of others
    rounds: int = 0  # 0: the study's own
    cells: Path | None = CELLS

    def seeds(self, rule: str) -> int:
        """Return how many seeds a rule is run with."""
        return self.most if rule == DEFAULT else min(3, self.most)


TINY = Grid(("mean", DEFAULT), ("sign-flip",), 2, 2, None)


def main(argv: Sequence[str] | None = None) -> None:
    """Fill the cells that are missing, print the tables and keep them."""
    parser = common.parser(__doc__)
    parser.add_argument("--federations", default=",".join(FEDERATIONS))
    parser.add_argument("--private", action="store_true")
    parser.add_argument("--only-fill", action="store_true")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    grid, names = (
        (TINY, ["breast-10"]) if options.tiny else (Grid(), options.federations.split(","))
    )
    lines = grid.cells.read_text().splitlines() if grid.cells and grid.cells.exists() else []
    kept = [json.loads(line) for line in lines]
    known: Cells = {(c["federation"], c["rule"], c["attack"], c["seed"]): c for c in kept}
    result: dict[str, Any] = {}

    for name in names:
        fill(name, known, grid)
        if not options.only_fill:
            result[name] = report(name, known, grid)

    if options.private:
        result["private"] = private()
    if options.tiny:
        private(
            clients=10, patients=20, features=2, rounds=1, rules=(DEFAULT,), attacked=("sign-flip",)
        )
    elif not options.only_fill:
        write_result("byzantine", result)


def fill(name: str, known: Cells, grid: Grid) -> None:
    """Run what is missing, seed by seed."""
    for seed, rule, attack in itertools.product(
        range(grid.most), grid.rules, ("", *grid.attacks, "backdoor")
    ):
        wanted = seed < grid.seeds(rule) or (rule == "mean" and not attack)
        if wanted and (name, rule, attack, seed) not in known:
            found = cell(name, rule, attack, seed, grid.rounds)
            made = {"federation": name, "rule": rule, "attack": attack, "seed": seed, **found}
            known[name, rule, attack, seed] = made
            if grid.cells:
                with grid.cells.open("a") as file:
                    file.write(json.dumps(made) + "\n")


def report(name: str, known: Cells, grid: Grid) -> dict[str, Any]:
    """Print losses in points of AUROC, attacks down, rules across; return them with medians and
    worst ones.
    """

    def over(
        rule: str, attack: str, figure: Callable[[dict[str, Any], dict[str, Any]], float]
    ) -> list[float]:
        return [
            figure(known[name, rule, attack, seed], known[name, "mean", "", seed])
            for seed in range(grid.seeds(rule))
        ]

    loss = {
        (rule, attack): over(
            rule, attack, lambda here, clean: 100 * (clean["auroc"] - here["auroc"])
        )
        for rule in grid.rules
        for attack in ("", *grid.attacks)
    }
    mean = {key: statistics.mean(values) for key, values in loss.items()}
    lines = [
        [attack or "none", *(_told(loss[rule, attack]) for rule in grid.rules)]
        for attack in ("", *grid.attacks)
    ]
    worst = {rule: max(mean[rule, attack] for attack in grid.attacks) for rule in grid.rules}
    median = {
        rule: statistics.median(mean[rule, attack] for attack in grid.attacks)
        for rule in grid.rules
    }
    lines += [
        ["median", *(f"{median[r]:.1f}" for r in grid.rules)],
        ["worst", *(f"{worst[r]:.1f}" for r in grid.rules)],
    ]
    print(
        f"\n{name}: loss in points of AUROC, 30 % malicious, mean and half width of its 95 % "
        "interval over seeds"
    )
    print(table(["attack", *grid.rules], lines))
    broken = [attack for attack in grid.attacks if mean["mean", attack] >= 10]
    print(
        f"the mean loses 10 points or more under {len(broken)} of {len(grid.attacks)} attacks: "
        f"{', '.join(broken)}"
    )
    lost = {attack: mean["mean", attack] for attack in grid.attacks if mean["mean", attack] > 1}
    recovered = 1 - sum(max(0.0, mean[DEFAULT, a]) for a in lost) / (sum(lost.values()) or math.inf)
    print(
        f"{DEFAULT}: median {median[DEFAULT]:.1f}, worst {worst[DEFAULT]:.1f}; of what the mean "
        f"loses, {recovered:.0%}"
    )
    door = {
        rule: tuple(
            statistics.mean(over(rule, "backdoor", lambda c, _, w=which: c[w]))
            for which in ("marked", "plain")
        )
        for rule in grid.rules
    }
    print(
        "backdoor, marked (unmarked):",
        ", ".join(f"{r} {m:.0%} ({p:.0%})" for r, (m, p) in door.items()),
    )
    told = {a: statistics.mean(over(DEFAULT, a, lambda c, _: c["suspicion"])) for a in grid.attacks}
    print("suspicion after 10 rounds, AUROC:", ", ".join(f"{a} {v:.3f}" for a, v in told.items()))
    out = statistics.mean(over(DEFAULT, "", lambda c, _: c["out"]))
    print(f"honest federation: {out:.2%} of client-rounds sat out")
    return {
        "loss": {f"{rule} | {attack or 'none'}": values for (rule, attack), values in loss.items()},
        "median": median,
        "worst": worst,
        "recovered": recovered,
        "mean broken by": broken,
        "backdoor": door,
        "suspicion": told,
        "honest client-rounds sat out": out,
    }


def _told(values: list[float]) -> str:
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return f"{statistics.mean(values):.1f} +- {half:.1f}"


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


def private(
    clients: int = 20,
    patients: int = 2000,
    features: int = 8,
    rounds: int = 10,
    rules: Sequence[str] = ("mean", DEFAULT),
    attacked: Sequence[str] = ("", "sign-flip", "scaled", "label-flip", "alie"),
) -> Mapping[str, object]:
    """Return AUROC and suspects at epsilon 1 under three parties, by rule and attack."""
    random = np.random.default_rng(0)
    n = clients * patients * 5 // 4
    x = random.uniform(-1, 1, (n, features))
    y = random.random(n) < 1 / (1 + np.exp(-4 * x @ random.normal(size=features)))
    frame = pd.DataFrame(x, columns=[f"x{i}" for i in range(features)])
    names = [f"site {LETTERS[i]}" for i in range(clients)]
    frame = frame.assign(
        y=np.where(y, "yes", "no"), site=np.repeat(names, n // clients), id=np.arange(n)
    )
    found: dict[str, object] = {}

    with tempfile.TemporaryDirectory() as folder:
        frame.to_csv(Path(folder) / "twenty.csv", index=False)
        bounds = "\n".join(f"[data.dictionary.x{i}]\nrange = [-1.0, 1.0]" for i in range(features))
        sizes = "\n".join(f'"{name}" = {patients}' for name in names)
        (Path(folder) / "twenty.toml").write_text(PRIVATE.format(bounds=bounds, sizes=sizes))
        study = medfed.load_study(Path(folder) / "twenty.toml").set("monitor.baselines", False)
        study = study.set("training.rounds", rounds)
        lying = liars(names, 0.3, study.study.seed)

        for rule, attack in itertools.product(rules, attacked):
            one = study.set("robustness.rule", rule)
            one = one.set("robustness.max_malicious", 0.3) if rule != "mean" else one
            if attack:
                one = one._with({"robustness.attack": attack, "robustness.malicious": 0.3})
            else:
                one = one

            summary = medfed.simulate(one).summary
            auroc = summary["test"] and summary["test"]["auroc"]
            suspects = [entry["site"] for entry in summary["suspects"]]
            spent = summary["privacy"]["epsilon"]
            right = len(set(suspects) & set(lying))
            named = (
                f"{right} of {len(lying)} liars and {len(set(suspects) - set(lying))} others named"
            )

            if auroc:
                told = f"AUROC {auroc:.4f}"
            else:
                told = "no model: rows out of bound, and no quorum without them"

            print(f"private, {rule}, {attack or 'none'}: {told}, epsilon {spent:.3f}, {named}")
            found[f"{rule} | {attack or 'none'}"] = {
                "auroc": auroc,
                "suspects": suspects,
                "epsilon": spent,
            }

    return found


if __name__ == "__main__":
    main()
