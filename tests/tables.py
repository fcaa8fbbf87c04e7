"""Small invented tables for tests: three hospitals, a column of every kind, gaps. STUDY is plain,
PRIVATE claims.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from medfed.study import Privacy, Study

SITES = ("north", "south", "east")

STUDY = """
[study]
name = "invented"
seed = 3
[data]
table = "cohort.csv"
target = "died"
site = "hospital"
patient = "subject"
[training]
rounds = 4
batch_size = 16
learning_rate = 0.1
[monitor]
baselines = false
"""

PRIVATE = """
[study]
name = "invented private"
seed = 3
[data]
table = "cohort.csv"
target = "died"
site = "hospital"
patient = "subject"
preprocess = "dictionary"
test_is_public = true
[data.dictionary.age]
range = [20, 100]
[data.dictionary.lactate]
range = [0.1, 15]
log = true
[data.dictionary.ward]
categories = ["icu", "ward", "er"]
[data.dictionary.died]
categories = ["no", "yes"]
[training]
rounds = 4
batch_size = 0
learning_rate = 1.0
[privacy]
epsilon = 1.0
delta = 1e-4
scope = "run"
[privacy.sizes]
north = 96
south = 58
east = 38
[monitor]
evaluate_every = 4
baselines = false
"""


def real_tables(folder: Path) -> dict[str, pd.DataFrame]:
    """Return the tables of a data folder by their file's name, as they are read without being told
    anything.
    """
    found = {}
    for path in sorted(
        path for end in ("*.data", "*.csv", "*.csv.gz") for path in folder.rglob(end)
    ):
        header = 0 if "csv" in path.name or "updrs" in path.name else None
        found[path.name] = pd.read_csv(path, header=header, low_memory=False)
    for path in sorted(folder.rglob("*.npz")):
        arrays = np.load(path)
        for name in arrays.files:
            if arrays[name].ndim in (1, 2) and arrays[name].dtype.kind in "if":
                found[f"{path.name} {name}"] = pd.DataFrame(
                    arrays[name].reshape(len(arrays[name]), -1)
                )
    return found


def invented(rows: int = 240, seed: int = 0) -> pd.DataFrame:
    """Return patients whose outcome depends on age and lactate; lactate is missing at times, and
    ward is text.
    """
    random = np.random.default_rng(seed)
    age = random.normal(60, 12, rows).round(1)
    lactate = random.gamma(2, 1, rows).round(2)
    risk = 1 / (1 + np.exp(-(0.08 * (age - 60) + 0.8 * (lactate - 2))))
    frame = pd.DataFrame(
        {
            "subject": [f"p{i:04d}" for i in range(rows)],
            "hospital": random.choice(SITES, rows, p=[0.5, 0.3, 0.2]),
            "age": age,
            "lactate": lactate,
            "ward": random.choice(["icu", "ward", "er"], rows),
            "died": np.where(random.random(rows) < risk, "yes", "no"),
        }
    )
    frame.loc[random.random(rows) < 0.1, "lactate"] = np.nan

    return frame


def plain(study: Study) -> Study:
    """Return a study without its guarantee: no noise, and robust scaling; bits then follow from the
    seed alone.
    """
    return replace(study, privacy=Privacy(), data=replace(study.data, preprocess="robust"))


def write_study(folder: Path, text: str = STUDY, frame: pd.DataFrame | None = None) -> Path:
    """Write cohort.csv and study.toml into a folder; return the study's path."""
    (invented() if frame is None else frame).to_csv(folder / "cohort.csv", index=False)
    path = folder / "study.toml"
    path.write_text(text)
    return path
