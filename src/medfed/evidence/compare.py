"""Algorithms side by side: really trained, on the same splits and first weights, with tests that
say what is chance.

For each seed every algorithm gets the study with that seed: patients, splits, first weights and
batches follow from it, so that two algorithms differ in nothing else and are compared seed by seed.

A algorithms, S seeds, T rounds.
"""

import dataclasses
import itertools
import multiprocessing
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from medfed import runs
from medfed.core.checks import PlanError, nearest
from medfed.learn.algorithms import ALGORITHMS
from medfed.monitor import events
from medfed.privacy.guarantee import mode
from medfed.study import Privacy, Security, Study

NOISES = ("study", "none", "site")
"""Which noise: the study's own, none, or each site's. Under a joint one (shared, central)
algorithms coincide.
"""

TARGET = 0.99
"""Rounds to target: to this part of the best algorithm's mean final score."""

_SCORES = ("auroc", "accuracy", "r2")  # of the first that a run has, the curve is told


@dataclass(frozen=True)
class Trained:
    """One run: its score after each round, its last figures, and what it cost."""

    algorithm: str
    seed: int
    score: str
    curve_T: tuple[float, ...]
    figures: Mapping[str, float | None]
    epsilon: float | None
    seconds: float  # of all rounds, tests left out
    bytes_up: int


@dataclass(frozen=True)
class Difference:
    """Two algorithms on one figure: the mean of first minus second over seeds, and Holm's p of
    Wilcoxon's test.
    """

    figure: str
    first: str
    second: str
    mean: float
    p: float

    @property
    def significant(self) -> bool:
        """Whether chance gives such a difference in fewer than one of twenty such comparisons."""
        return self.p < 0.05


@dataclass(frozen=True)
class Comparison:
    """All runs of a comparison, and what follows from them."""

    study: str
    noise: str
    runs: tuple[Trained, ...]

    @property
    def algorithms(self) -> list[str]:
        """The algorithms, in the order asked for."""
        return list(dict.fromkeys(run.algorithm for run in self.runs))

    def of(self, algorithm: str) -> list[Trained]:
        """Return an algorithm's runs, by seed."""
        return sorted(
            (run for run in self.runs if run.algorithm == algorithm), key=lambda run: run.seed
        )

    @cached_property
    def target(self) -> float:
        """The score that rounds are counted to: 99 % of the best algorithm's mean final one."""
        return TARGET * max(
            statistics.mean(run.curve_T[-1] for run in self.of(a)) for a in self.algorithms
        )

    def rounds_to_target(self, run: Trained) -> int:
        """Return the first round whose score reaches the target;
        one more than there are where none does.
        """
        return next(
            (t for t, score in enumerate(run.curve_T, 1) if score >= self.target),
            len(run.curve_T) + 1,
        )

    def figures(self) -> dict[str, Callable[[Trained], float]]:
        """Return what algorithms are compared on."""
        return {
            "final score": lambda run: run.curve_T[-1],
            "rounds to target": self.rounds_to_target,
            "area under the curve": lambda run: statistics.mean(run.curve_T),
            "round to round": lambda run: statistics.mean(
                [abs(b - a) for a, b in itertools.pairwise(run.curve_T)] or [0.0]
            ),
        }

    def table(self) -> list[dict[str, Any]]:
        """Return a line for each algorithm: means and standard deviations over seeds."""
        lines = []
        for algorithm in self.algorithms:
            mine = self.of(algorithm)
            line: dict[str, Any] = {
                "algorithm": algorithm,
                "seeds": len(mine),
                "score": mine[0].score,
            }
            for name, figure in self.figures().items():
                values = [figure(run) for run in mine]
                line[name] = {"mean": statistics.mean(values), "sd": statistics.stdev(values)}

            accuracy = [
                run.figures["accuracy"] for run in mine if run.figures.get("accuracy") is not None
            ]
            line["accuracy"] = statistics.mean(accuracy) if accuracy else None  # type: ignore[type-var]
            line["reached"] = sum(self.rounds_to_target(run) <= len(run.curve_T) for run in mine)
            line["epsilon"] = max(
                (run.epsilon for run in mine if run.epsilon is not None), default=None
            )
            line["seconds"] = statistics.median(run.seconds for run in mine)
            line["bytes_up"] = mine[0].bytes_up
            lines.append(line)

        return lines

    def differences(self) -> list[Difference]:
        """Return all pairs on all figures: paired by seed, Wilcoxon's signed ranks, Holm's
        correction in a figure.
        """
        found: list[Difference] = []
        for name, figure in self.figures().items():
            pairs = list(itertools.combinations(self.algorithms, 2))
            raw = []
            for first, second in pairs:
                apart = [
                    figure(a) - figure(b)
                    for a, b in zip(self.of(first), self.of(second), strict=True)
                ]
                raw.append((statistics.mean(apart), wilcoxon(apart)))
            adjusted = holm([p for _, p in raw])
            found += [
                Difference(name, a, b, mean, p)
                for (a, b), (mean, _), p in zip(pairs, raw, adjusted, strict=True)
            ]

        return found

    def spread(self) -> float:
        """Return the p of Brown and Forsythe's test that final scores scatter alike over seeds."""
        values = [[run.curve_T[-1] for run in self.of(a)] for a in self.algorithms]
        if len(values[0]) < 3 or all(statistics.pstdev(v) == 0 for v in values):
            return 1.0  # two seeds say nothing of scatter
        return float(stats.levene(*values, center="median").pvalue)

    def verdicts(self) -> list[str]:
        """Say in plain words what the runs show."""
        told = []
        differences = self.differences()
        lines = self.table()

        for name in self.figures():
            real = [one for one in differences if one.figure == name and one.significant]
            if not real:
                told.append(f"{name}: no significant difference")
                continue

            means = {line["algorithm"]: line[name]["mean"] for line in lines}
            best = max if name in ("final score", "area under the curve") else min
            leader = best(means, key=means.__getitem__)
            beaten = [
                o.second if o.first == leader else o.first
                for o in real
                if leader in (o.first, o.second)
            ]

            if beaten:
                others = f"significantly better than {', '.join(beaten)}"
            else:
                others = "from none significantly"

            told.append(f"{name}: {leader} leads, {others}")

        p = self.spread()
        least = min(lines, key=lambda line: line["final score"]["sd"])["algorithm"]
        said = f"{least} scatters least" if p < 0.05 else "no significant difference"
        told.append(f"scatter over seeds: {said} (p = {p:.2g})")

        return told

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "study": self.study,
            "noise": self.noise,
            "target": self.target,
            "table": self.table(),
            "differences": [dataclasses.asdict(one) for one in self.differences()],
            "verdicts": self.verdicts(),
            "runs": [dataclasses.asdict(run) for run in self.runs],
        }


def compare(
    study: Study,
    algorithms: Sequence[str],
    seeds: int = 10,
    noise: str = "study",
    data: Path | None = None,
    workers: int = 1,
) -> Comparison:
    """Train each algorithm with each of the study's seed and the `seeds` - 1 after it; `workers`
    processes at once.

    Raises PlanError for fewer than two seeds or algorithms, one that is not known, twice the same,
    or a noise under which they coincide; StudyError, DataError or PlanError as a run of the study
    does.
    """
    _check(study, algorithms, seeds, noise)
    asked = [
        (variant(study, noise, a, study.study.seed + s), data)
        for s in range(seeds)
        for a in algorithms
    ]
    if workers == 1:
        found = [train(*one) for one in asked]
    else:
        with ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), _one_thread
        ) as pool:
            found = list(pool.map(train, *zip(*asked, strict=True)))

    named = {a: i for i, a in enumerate(algorithms)}
    return Comparison(
        study.study.name,
        noise,
        tuple(sorted(found, key=lambda run: (named[run.algorithm], run.seed))),
    )


def _check(study: Study, algorithms: Sequence[str], seeds: int, noise: str) -> None:
    for name in algorithms:
        if name not in ALGORITHMS:
            raise PlanError(f"--algorithms {name!r} is no algorithm; {nearest(name, ALGORITHMS)}")
    if len(set(algorithms)) != len(algorithms) or len(algorithms) < 2:
        raise PlanError(f"--algorithms {','.join(algorithms)}; expected two or more, each once")
    if seeds < 2:
        raise PlanError(
            f"--seeds {seeds}; expected 2 or more: one run says nothing of chance. Take 10."
        )
    if noise not in NOISES:
        raise PlanError(f"--noise {noise!r}; expected one of {', '.join(NOISES)}")
    if noise == "study" and mode(study) in ("shared", "central"):
        raise PlanError(
            f"privacy.noise={mode(study)!r} takes one step a round, where FedAvg, FedProx, "
            "SCAFFOLD and FedNova coincide: there is nothing to compare. Take --noise site or "
            "--noise none."
        )


def variant(study: Study, noise: str, algorithm: str, seed: int) -> Study:
    """Return the study that one run trains:
    tested after each round, without secrecy, which changes no algorithm.

    Without noise nobody pays for ranges: those that a claim would find from noised counts are
    fitted.
    """
    changed = dataclasses.replace(study, security=Security())
    if noise == "none":
        if study.privacy.ranges_epsilon and study.data.preprocess == "dictionary":
            changed = changed.set("data.preprocess", "robust")
        changed = dataclasses.replace(changed, privacy=Privacy())
    elif noise != "study":
        changed = changed.set("privacy.noise", noise)

    return changed._with(
        {
            "training.algorithm": algorithm,
            "study.seed": seed,
            "monitor.evaluate_every": 1,
            "monitor.baselines": False,
            "privacy.vote_epsilon": 0.0,  # runs are compared with one another, and no site votes
        }
    )


def train(study: Study, data: Path | None = None) -> Trained:
    """Run one study in memory and return what is compared."""
    told: list[events.Event] = []
    result = runs.simulate(study, data, [told.append])
    curve = {event.round: event.all_sites for event in told if isinstance(event, events.Tested)}
    last = curve[max(curve)]
    score = next(name for name in _SCORES if name in last and last[name].value is not None)
    finished = [event for event in told if isinstance(event, events.RoundFinished)]
    return Trained(
        algorithm=study.training.algorithm,
        seed=study.study.seed,
        score=score,
        curve_T=tuple(float(curve[t][score].value or 0.0) for t in sorted(curve)),
        figures={name: figure.value for name, figure in last.items()},
        epsilon=(result.summary["privacy"] or {}).get("epsilon"),
        seconds=sum(event.seconds for event in finished),
        bytes_up=sum(event.bytes_up for event in finished),
    )


def wilcoxon(apart: Sequence[float]) -> float:
    """Return the two-sided p of Wilcoxon's signed ranks; 1 where nothing differs."""
    real = [x for x in apart if x != 0]
    return float(stats.wilcoxon(real).pvalue) if real else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """Return Holm's adjusted p values (Holm 1979)."""
    order = sorted(range(len(p)), key=lambda i: p[i])
    adjusted = [0.0] * len(p)
    most = 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = most
    return adjusted


def _one_thread() -> None:
    torch.set_num_threads(1)
