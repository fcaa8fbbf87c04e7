"""Fed-Heart-Disease exactly as FLamby prepares it: 4 hospitals, 13 features, 486 training and 254
test patients.

Source: owkin/FLamby at commit f1e05644c94ee26bdd1d2b9fc3431f4a5e6b2a34,
flamby/datasets/fed_heart_disease/dataset.py (split, features, normalisation) and common.py (batch
of 4, 50 pooled epochs); flamby/config_heart_disease.json at commit 88fbe60c (learning rates).
Paper: du Terrail et al., NeurIPS 2022, arXiv:2210.04620. The code here is our own.

The steps: drop slope, ca and thal (columns 10 to 12), then drop every patient with a missing value;
disease is num > 0; split each hospital 66/34 with `random_state=43`, stratified on the label if
each class has more than 2 patients; chest pain (column 2) and resting ECG (column 6) become dummies
without their first level; subtract the mean and divide by the sample standard deviation of training
rows, either those of the hospital ("site", FLamby's federated default) or those of all hospitals
("pooled", FLamby's for its pooled training).

FLamby's "Pooled Training" is trained on "pooled" features but tested per hospital on "site"
features: that mismatch scores .735, and "pooled" throughout scores .806. Swiss training rows are
all positive (30 of 30), so an answer of each hospital's majority scores .721, above FLamby's
FedAvg. Legend: S patients, F features.
"""

from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from torch import nn

Site = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]
Normalise = Literal["site", "pooled", "none"]

# Hospital -> patients in (train, test), as in FLamby's README.
COUNTS = {"cleveland": (199, 104), "hungarian": (172, 89), "switzerland": (30, 16), "va": (85, 45)}

# Accuracy, mean over the hospitals' test sets and over the seeds 42 to 46, computed from the
# per-seed tables in flamby/results/results_benchmark_fed_heart_disease (commits a422b61c and
# f553c7ac).
PUBLISHED_ACCURACY = {
    "FedAvg": 0.685,
    "FedProx": 0.685,
    "Scaffold": 0.684,
    "Cyclic": 0.718,
    "FedAdam": 0.726,
    "FedYogi": 0.731,
    "FedAdagrad": 0.731,
    "Pooled": 0.735,
}
SEEDS = (42, 43, 44, 45, 46)
# rounds = (486 // 4 hospitals // batch) * 50 epochs // local steps
BATCH_SIZE = 4
LOCAL_STEPS = 100
ROUNDS = 15

_DROPPED = [10, 11, 12]  # slope, ca, thal
_CONTINUOUS = [0, 1, 3, 4, 5, 7, 8, 9]  # age, sex, trestbps, chol, fbs, thalach, exang, oldpeak
_LEVELS = {2: (2, 3, 4), 6: (1, 2)}  # chest pain 1..4 and resting ECG 0..2, first level dropped


def load(folder: Path, normalise: Normalise = "site") -> dict[str, Site]:
    """Hospital -> (x_train_SF, y_train_S, x_test_SF, y_test_S), from the files
    `processed.<hospital>.data`.

    "site" is FLamby's federated setting; "pooled" needs only the hospitals' summed counts, sums and
    squares; "none" leaves the UCI units.
    """
    raw = {name: _split(*_read(folder / f"processed.{name}.data")) for name in COUNTS}
    for name, (x_train, _, x_test, _) in raw.items():
        found = (len(x_train), len(x_test))
        assert found == COUNTS[name], (
            f"{name}: train/test={found}, expected {COUNTS[name]}; check {folder}"
        )
    everyone = np.concatenate([x_train for x_train, *_ in raw.values()])
    sites = {}
    for name, (x_train, y_train, x_test, y_test) in raw.items():
        reference = {"site": x_train, "pooled": everyone}.get(normalise)
        sites[name] = (_scale(x_train, reference), y_train, _scale(x_test, reference), y_test)
    return sites


def _read(path: Path) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The complete patients of one file, in file order: 13 features and disease 0/1."""
    table = np.delete(np.genfromtxt(path, delimiter=",", missing_values="?"), _DROPPED, axis=1)
    table = table[~np.isnan(table).any(axis=1)]
    dummies = [table[:, column] == level for column, levels in _LEVELS.items() for level in levels]
    x_SF = np.column_stack([table[:, _CONTINUOUS], *dummies]).astype(np.float32)
    return x_SF, (table[:, -1] > 0).astype(np.int64)


def _split(x_SF: NDArray[np.float32], y_S: NDArray[np.int64]) -> Site:
    """FLamby's split; both halves keep the order of the file."""
    classes = np.bincount(y_S, minlength=2)
    train, test = train_test_split(
        np.arange(len(y_S)),
        train_size=0.66,
        test_size=1.0 - 0.66,
        random_state=43,
        stratify=y_S if classes.min() > 2 else None,
    )
    train = np.sort(train)
    test = np.sort(test)
    return x_SF[train], y_S[train], x_SF[test], y_S[test]


def _scale(
    x_SF: NDArray[np.float32], reference_SF: NDArray[np.float32] | None
) -> NDArray[np.float32]:
    """Standardise by the reference rows; a constant column (cholesterol in Switzerland, all 0)
    becomes 0.
    """
    if reference_SF is None:
        return x_SF
    scaled_SF: NDArray[np.float32] = (x_SF - reference_SF.mean(axis=0)) / (
        reference_SF.std(axis=0, ddof=1) + 1e-9
    )
    return scaled_SF


def baseline(features: int, outputs: int) -> nn.Module:
    """FLamby's logistic model as it starts: torch's own random first weights, not zero as medfed's
    `logistic` does.
    """
    return nn.Sequential(nn.Linear(features, outputs))
