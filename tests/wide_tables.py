"""Made-up tables whose columns are what robust scaling is bad at: rare events, mostly zero counts,
heavy tails.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from medfed.study import Study, from_tables

HOSPITALS = ("north", "south", "east", "west")


def write(folder: Path, frame: pd.DataFrame, **settings: object) -> Study:
    """Write a table with columns `y`, `hospital` and perhaps `patient`, and return a study of it
    with nothing set but `settings`.
    """
    frame.to_csv(folder / "table.csv", index=False)
    data = {"table": str(folder / "table.csv"), "target": "y", "site": "hospital"}
    if "patient" in frame:
        data["patient"] = "patient"
    study = (
        from_tables({"data": data})
        .set("monitor.baselines", False)
        .set("monitor.evaluate_every", 10)
    )
    for key, value in settings.items():
        study = study.set(key.replace("__", "."), value)
    return study


def labelled(
    x_NF: np.ndarray, score_N: np.ndarray, share: float, rng: np.random.Generator
) -> pd.DataFrame:
    """Return a table of columns c000 and so on, a hospital, a label that follows a score, with
    noise, and a patient for each row.

    It is the same on every processor: numbers have six digits, as the last bits of `np.exp` differ,
    and patients have names, as rows without one are named by their cells, and that decides who is
    held out.
    """
    noisy_N = score_N / score_N.std() + rng.logistic(size=len(score_N)) * 0.5
    x_NF = np.array([float(f"{value:.6g}") for value in x_NF.flat]).reshape(x_NF.shape)
    frame = pd.DataFrame(x_NF, columns=[f"c{i:03d}" for i in range(x_NF.shape[1])])
    frame["y"] = (noisy_N > np.quantile(noisy_N, 1 - share)).astype(int)
    frame["hospital"] = rng.choice(HOSPITALS, len(frame), p=[0.4, 0.3, 0.2, 0.1])
    frame["patient"] = [f"p{i:05d}" for i in range(len(frame))]
    return frame


def intensive_care(rows: int = 4000, seed: int = 0) -> pd.DataFrame:
    """Return 189 columns like those of intensive care: near-constant counts, lognormal laboratory
    values, flags.
    """
    rng = np.random.default_rng(seed)
    ill_N = rng.standard_normal(rows)
    columns = []
    score_N = np.zeros(rows)

    for i in range(189):
        driven_N = ill_N * rng.uniform(0, 0.7) + rng.standard_normal(rows)
        match i % 5:
            case 0:  # counts, zero but for one patient of ten or fewer
                value_N = (
                    rng.poisson(np.exp(driven_N))
                    * (driven_N > rng.uniform(1.2, 2.2))
                    * 10.0 ** rng.integers(0, 3)
                )
            case 1:
                value_N = np.exp(driven_N * rng.uniform(0.3, 2.5) + rng.uniform(-2, 5))
            case 2:  # one value, but for one patient of a hundred or so
                value_N = 98.6 + (driven_N > 2.4) * rng.normal(0, 300, rows)
            case 3:
                value_N = (driven_N > rng.uniform(0.3, 2.3)).astype(float)
            case 4:
                value_N = driven_N * rng.uniform(1, 20) + rng.uniform(-50, 100)

        columns.append(value_N)
        score_N += driven_N * (rng.random() < 0.4) * rng.normal()

    return labelled(np.stack(columns, 1), 3 * ill_N + score_N / 4, 0.15, rng)


def narrow_counts(rows: int = 1500, seed: int = 1) -> pd.DataFrame:
    """Return 17 columns of rare events whose sizes differ by powers of ten."""
    rng = np.random.default_rng(seed)
    chance_F = rng.uniform(0.005, 0.2, 17)
    hit_NF = rng.random((rows, 17)) < chance_F
    x_NF = hit_NF * rng.gamma(2, 10.0 ** rng.integers(-3, 5, 17), (rows, 17))
    x_NF[:, 0] = rng.normal(70, 10, rows)
    score_N = (hit_NF[:, 1:] * rng.choice([-2, 2, 3], 16)).sum(1) + (x_NF[:, 0] - 70) / 10
    return labelled(x_NF, score_N, 0.4, rng)


def laboratory(rows: int = 2500, seed: int = 2) -> pd.DataFrame:
    """Return 40 skewed laboratory values, some of them wrong by a factor of a thousand."""
    rng = np.random.default_rng(seed)
    latent_NF = rng.standard_normal((rows, 6)) @ rng.standard_normal(
        (6, 40)
    ) / 2 + rng.standard_normal((rows, 40))
    x_NF = np.exp(latent_NF * rng.uniform(0.2, 2.2, 40) + rng.uniform(-3, 6, 40))
    wrong = rng.integers(rows, size=8), rng.integers(40, size=8)
    x_NF[wrong] *= 1000
    return labelled(x_NF, latent_NF @ (rng.normal(size=40) * (rng.random(40) < 0.3)), 0.3, rng)
