"""Tables that no setting was tuned for: MEDFED_DATA as a hospital would hand it in, and made-up
ones.

Each comes with what its own data dictionary or a text book says of its columns (never what its rows
say), the site column it has, and how many training patients each site declares: what a consortium
knows before it starts.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from medfed.study import Feature

TEST = 0.2


@dataclass(frozen=True)
class Foreign:
    """A table with a `site` and an outcome column `y`, and what is publicly known of
    its columns.
    """

    frame: pd.DataFrame
    dictionary: dict[str, Feature]
    task: str = "binary"

    def tables(self, path: Path) -> dict[str, Any]:
        """Write the rows to `path` and return the study that names them, and not one
        setting more.
        """
        self.frame.to_csv(path, index=False)
        entries = {
            name: {"range": list(f.range), "log": f.log}
            if f.range
            else {"categories": list(f.categories)}
            for name, f in self.dictionary.items()
        }
        data: dict[str, Any] = {
            "table": str(path),
            "target": "y",
            "site": "site",
            "dictionary": entries,
        }
        if self.task == "regression":
            data["task"] = "regression"

        return {"study": {"name": path.stem}, "data": {**data, "test_is_public": True}}

    def sizes(self) -> dict[str, int]:
        """Return the declared training patients of each site: its rows, less those held out."""
        counts = self.frame["site"].value_counts().sort_index()
        return {str(name): max(1, round(n * (1 - TEST))) for name, n in counts.items()}


def named(data: Path | None) -> dict[str, Callable[[], Foreign]]:
    """Return the tables by name: those that are made up, and with `data` those of its folders."""
    made: dict[str, Callable[[], Foreign]] = {
        "stay-189": lambda: made_up(8000, 189, sites=4, prevalence=0.12, seed=1),
        "trial-49": lambda: made_up(8149, 22, sites=49, prevalence=0.62, seed=2),
        "rare-2": lambda: made_up(20000, 40, sites=12, prevalence=0.02, seed=3),
        "days-60": lambda: made_up(5000, 60, sites=6, prevalence=None, seed=4),
        "clinic-12": lambda: made_up(1200, 12, sites=3, prevalence=0.3, seed=6),
    }
    if data is None:
        return made
    real: dict[str, Callable[[], Foreign]] = {
        "wisconsin-1992": lambda: wisconsin(data / "breast_wisconsin"),
        "tcga-brca": lambda: tcga(data / "tcga_brca"),
        "mitbih-beats": lambda: mitbih(data / "mitbih_pvc12"),
        "parkinson-recordings": lambda: parkinson(data / "parkinsons_telemonitoring"),
        "glucose-windows": lambda: glucose(data / "cgm_hall2018"),
    }
    return real | made


def made_up(n: int, width: int, sites: int, prevalence: float | None, seed: int) -> Foreign:
    """Return a table of correlated numbers, skewed laboratory values, counts that are mostly zero,
    and flags.

    Sites are of very unequal size, the smallest of 3 rows where there are many. Ranges are wide, as
    text books give them. Without a prevalence the outcome is a number.
    """
    rng = np.random.default_rng(seed)
    numbers = round(width * 0.7)
    loadings = rng.normal(size=(5, numbers)) * 0.45
    latent = rng.normal(size=(n, 5)) @ loadings + rng.normal(size=(n, numbers)) * 0.8
    kinds = rng.integers(4, size=numbers)
    shown = latent.copy()
    ranges = np.empty((numbers, 2))

    for j, kind in enumerate(kinds):
        low = -4.0 - 2 * rng.uniform()
        high = 4.0 + 2 * rng.uniform()
        if kind == 1:
            shown[:, j] = np.exp(latent[:, j])
            low = 0.02
            high = 60.0
        elif kind == 2:
            shown[:, j] = np.where(latent[:, j] > 1.5, np.round(latent[:, j] * 3), 0)
            low = 0.0
            high = 20.0
        ranges[j] = low, high

    flags = rng.uniform(size=(n, width - numbers)) < rng.uniform(0.02, 0.5, size=width - numbers)
    weights = rng.normal(size=width) * (rng.uniform(size=width) < max(0.3, 5 / width))
    signal = np.concatenate([latent, flags], 1) @ weights
    signal *= 1.3 / signal.std()
    frame = pd.DataFrame(np.round(shown, 3), columns=[f"lab {j}" for j in range(numbers)])
    entries = {
        f"lab {j}": Feature(range=(low, high), log=bool(kinds[j] == 1))
        for j, (low, high) in enumerate(ranges)
    }
    for j in range(width - numbers):
        frame[f"flag {j}"] = np.where(flags[:, j], "yes", "no")
        entries[f"flag {j}"] = Feature(categories=("no", "yes"))

    shares = np.sort(rng.pareto(1.2, size=sites) + 0.02)[::-1]
    frame["site"] = rng.choice([f"H{k:02d}" for k in range(sites)], size=n, p=shares / shares.sum())
    if prevalence is None:
        frame["y"] = np.round(6 + 2 * (signal + rng.normal(size=n) * 1.5), 2)
        return Foreign(frame, entries | {"y": Feature(range=(-10, 30))}, "regression")

    chance = 1 / (1 + np.exp(-(signal + _intercept(signal, prevalence))))
    frame["y"] = np.where(rng.uniform(size=n) < chance, "yes", "no")
    return Foreign(frame, entries | {"y": Feature(categories=("no", "yes"))})


def network(
    sites: int,
    low: int,
    high: int,
    width: int = 16,
    prevalence: float = 0.2,
    seed: int = 0,
) -> Foreign:
    """Return a table of hospitals that differ as real ones do: in size (evenly on a logarithmic
    scale, from `low` to `high` training patients), in case mix, and in how often the outcome comes
    at the same case mix.
    """
    rng = np.random.default_rng(seed)
    sizes = np.exp(rng.uniform(math.log(low), math.log(high), sites)) / (1 - TEST)
    who = np.repeat(np.arange(sites), np.rint(sizes).astype(int))
    n = len(who)
    numbers = width * 2 // 3

    loadings = rng.normal(size=(4, numbers)) * 0.5
    mix = (rng.normal(size=(sites, 4)) * 0.5)[who]
    habit = (rng.normal(size=(sites, numbers)) * 0.2)[who]
    latent = rng.normal(size=(n, 4)) + mix
    x = latent @ loadings + rng.normal(size=(n, numbers)) * 0.8 + habit
    odds = np.exp(rng.normal(size=(sites, width - numbers)) * 0.4)
    rate = np.clip(rng.uniform(0.05, 0.5, width - numbers) * odds, 0.01, 0.9)[who]
    flags = rng.uniform(size=(n, width - numbers)) < rate

    signal = np.concatenate([x, flags - 0.25], 1) @ rng.normal(size=width)
    signal *= 1.5 / signal.std()
    level = _intercept(signal, prevalence) + (rng.normal(size=sites) * 0.6)[who]
    chance = 1 / (1 + np.exp(-(signal + level)))

    frame = pd.DataFrame(x.round(3), columns=[f"lab {j}" for j in range(numbers)])
    entries = {f"lab {j}": Feature(range=(-5.0, 5.0)) for j in range(numbers)}
    for j in range(width - numbers):
        frame[f"flag {j}"] = np.where(flags[:, j], "yes", "no")
        entries[f"flag {j}"] = Feature(categories=("no", "yes"))
    frame["site"] = [f"H{k:02d}" for k in who]
    frame["y"] = np.where(rng.uniform(size=n) < chance, "yes", "no")
    return Foreign(frame, entries | {"y": Feature(categories=("no", "yes"))})


def _intercept(signal: np.ndarray, prevalence: float) -> float:
    low = -20.0
    high = 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if (1 / (1 + np.exp(-signal - middle))).mean() < prevalence
            else (low, middle)
        )
    return low


def _shared_out(frame: pd.DataFrame, shares: tuple[float, ...], seed: int = 0) -> pd.DataFrame:
    names = [f"site {k + 1}" for k in range(len(shares))]
    return frame.assign(site=np.random.default_rng(seed).choice(names, size=len(frame), p=shares))


def wisconsin(folder: Path) -> Foreign:
    """Original Wisconsin set of 1992: nine grades from 1 to 10; patients of several rows count
    once.
    """
    names = ["id", *(f"grade {j}" for j in range(1, 10)), "class"]
    frame = pd.read_csv(
        folder / "breast-cancer-wisconsin.data", header=None, names=names, na_values="?"
    )
    frame = frame.drop_duplicates("id").drop(columns="id")
    frame["y"] = np.where(frame.pop("class") == 4, "malignant", "benign")
    entries = {f"grade {j}": Feature(range=(1, 10)) for j in range(1, 10)}
    labels = {"y": Feature(categories=("benign", "malignant"))}
    return Foreign(_shared_out(frame, (0.35, 0.25, 0.22, 0.18)), entries | labels)


def tcga(folder: Path) -> Foreign:
    """TCGA breast cancer: whether death was seen, from 39 clinical features; six regions."""
    frame = pd.read_csv(folder / "brca.csv").drop(columns=["T"])
    fold = pd.read_csv(folder / "train_test_split.csv")
    region = dict(
        zip(fold["pid"], fold["fold2"].astype(str).str.extract(r"(\d+)$")[0], strict=True)
    )
    frame["site"] = "region " + frame["pid"].map(region).fillna("0")
    frame["y"] = np.where(frame.pop("E") == 1, "dead", "alive")
    frame = frame.drop(columns=[c for c in frame if c == "pid" or c.startswith("Unnamed")])
    entries: dict[str, Feature] = {}
    for name in frame.columns.drop(["site", "y"]):
        high = 100 if frame[name].max() > 10 else max(1, int(frame[name].max()))
        entries[name] = Feature(range=(0, high))
    return Foreign(frame, entries | {"y": Feature(categories=("alive", "dead"))})


def mitbih(folder: Path) -> Foreign:
    """Beats of 12 Holter records as rows: is it a ventricular premature beat? Every beat stands for
    a patient here.
    """
    stored = np.load(folder / "mitbih_pvc12.npz")
    frame = pd.DataFrame(stored["X_uV"][:, ::2].astype(int), columns=[f"uV {j}" for j in range(50)])
    frame["rr before"], frame["rr after"] = stored["rr"].T.round(3)
    frame["site"] = [f"record {r}" for r in stored["record"]]
    frame["y"] = np.where(stored["y"] == 1, "premature", "other")
    entries = {f"uV {j}": Feature(range=(-3000, 3000)) for j in range(50)}
    entries |= {name: Feature(range=(0.2, 2.5)) for name in ("rr before", "rr after")}
    return Foreign(frame, entries | {"y": Feature(categories=("other", "premature"))})


def parkinson(folder: Path) -> Foreign:
    """Voice recordings as rows: total UPDRS, a number. Recordings stand for patients; whose they
    are is not used.
    """
    frame = pd.read_csv(folder / "parkinsons_updrs.data")
    frame = frame.rename(columns={"total_UPDRS": "y"}).drop(columns=["motor_UPDRS", "subject#"])
    frame = _shared_out(frame, (0.4, 0.3, 0.2, 0.1))
    entries = {
        "age": (30, 90),
        "sex": (0, 1),
        "test_time": (-5, 220),
        "HNR": (1, 40),
        "RPDE": (0.1, 1),
    }
    entries |= {"DFA": (0.5, 0.9), "PPE": (0.02, 0.8), "y": (0, 108)}
    found = {name: Feature(range=ends) for name, ends in entries.items()}
    # jitter, shimmer, NHR: shares that are mostly small
    for name in frame.columns.drop([*entries, "site"]):
        found[name] = Feature(
            range=(1e-6 if "Abs" in name else 1e-3, 1e-3 if "Abs" in name else 1.0), log=True
        )
    return Foreign(frame, found, "regression")


def glucose(folder: Path) -> Foreign:
    """Glucose in 30 minutes from the last hour, mg/dl: windows as rows, 19 sensors as sites."""
    readings = pd.read_csv(folder / "cgm_hall_19subjects.csv.gz")
    parts = []
    for sensor, part in readings.groupby("id"):
        v = part["gl"].to_numpy(float)
        n = len(v) - 17
        window = pd.DataFrame(
            np.stack([v[j : j + n] for j in range(12)], 1)[::3],
            columns=[f"t{j}" for j in range(12)],
        )
        parts.append(window.assign(y=v[17 : 17 + n][::3], site=str(sensor)))
    frame = pd.concat(parts, ignore_index=True)
    return Foreign(
        frame,
        {name: Feature(range=(40, 400)) for name in [*frame.columns.drop("site")]},
        "regression",
    )
