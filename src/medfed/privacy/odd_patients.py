"""Patients made to break a clip: records that repeat, nearly repeat, cancel, overflow, vanish.

Differential privacy is a promise for every patient, not for likely ones. These are drawn by tests,
by the audit and by `benchmarks/odd_patients.py`, each at the code that claims to bound what one
patient moves.

R records of one patient, F features.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from medfed.core.types import Task

Records = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Features [R, F] and targets [R]; a target is a class number, 0 or 1, or any number."""

Drawn = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The same before targets are made those of a task."""

MOST_RECORDS = 64
_SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-38, 1e30, -1e30, 3e38, -3e38, np.nan, np.inf, -np.inf],
    np.float32,
)


def draw(
    rng: np.random.Generator,
    features: int,
    task: Task,
    classes: int = 2,
    finite: bool = True,
    most: int = MOST_RECORDS,
) -> Records:
    """Return one odd patient of at most `most` records, 2 or more;
    `finite` leaves out NaN and infinity.

    Kinds, one at random: records that are one another's neighbours in float32 or exact copies, with
    targets that cancel (the norm of what they sum to is far below that of each); many records of
    one magnitude between 1e-30 and 1e30; magnitudes mixed within a record and between records;
    numbers at the edge of float32.
    """
    kinds = list(_KINDS.values())
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        x_RF, y_R = kinds[rng.integers(len(kinds))](rng, features, most)
        narrow_RF: NDArray[np.float32] = x_RF.astype(np.float32)
        if finite:
            narrow_RF = np.nan_to_num(narrow_RF, nan=0.0, posinf=3e38, neginf=-3e38)
        return narrow_RF, _targets(rng, y_R, task, classes)


def _targets(
    rng: np.random.Generator, y_R: NDArray[np.float64], task: Task, classes: int
) -> NDArray[np.float32]:
    """Return targets of the task; for classes the sign of what was drawn decides."""
    if task == "regression":
        wide: NDArray[np.float32] = np.nan_to_num(y_R.astype(np.float32), nan=0.0)
        return wide
    if task == "binary":
        return np.asarray(y_R > 0, np.float32)
    ends = rng.permutation(classes)[:2]
    chosen: NDArray[np.float32] = np.where(y_R > 0, ends[0], ends[-1]).astype(np.float32)
    return chosen


def _magnitude(rng: np.random.Generator, shape: tuple[int, ...] = ()) -> NDArray[np.float64]:
    found: NDArray[np.float64] = np.asarray(10.0 ** rng.uniform(-30, 30, shape))
    return found


def _size(rng: np.random.Generator) -> float:
    """Return 1, or any magnitude."""
    if rng.random() < 0.5:
        return 1.0
    return float(_magnitude(rng))


def _several(rng: np.random.Generator, most: int) -> int:
    """Return a number of records: often 1, 2 or 3, at times up to `most`."""
    return min(most, int(rng.choice(np.array([1, 2, 3, rng.integers(1, most + 1)]))))


def _neighbours(rng: np.random.Generator, features: int, most: int) -> Drawn:
    """Two records that differ by a few units in the last place,
    or by little, in one feature or in all.
    """
    x_F = rng.standard_normal(features) * _size(rng)
    gap = x_F * 10.0 ** rng.uniform(-8.5, -2)
    if rng.random() < 0.5:
        gap = gap * (np.arange(features) == rng.integers(features))
    x_F = np.where(rng.random(features) < 0.2, 0.0, x_F)
    return np.stack([x_F, x_F + gap]), _oppose_targets(rng, 2)


def _oppose_targets(rng: np.random.Generator, records: int) -> NDArray[np.float64]:
    """Targets that cancel: plus and minus one size."""
    size = _size(rng)
    signs: NDArray[np.float64] = np.where(np.arange(records) % 2, -size, size)
    return signs


def _copies(rng: np.random.Generator, features: int, most: int) -> Drawn:
    """An even number of copies of one record, half with the opposite target."""
    records = 2 * int(rng.integers(1, most // 2 + 1))
    x_F = rng.standard_normal(features) * _size(rng)
    return np.repeat(x_F[None], records, 0), _oppose_targets(rng, records)


def _one_size(rng: np.random.Generator, features: int, most: int) -> Drawn:
    """Records of one magnitude."""
    records = _several(rng, most)
    return rng.standard_normal((records, features)) * _magnitude(rng), rng.standard_normal(
        records
    ) * _magnitude(rng)


def _mix_magnitudes(rng: np.random.Generator, features: int, most: int) -> Drawn:
    """A magnitude of its own for every cell, or for every record."""
    records = _several(rng, most)
    shape = (records, features) if rng.random() < 0.5 else (records, 1)
    x_RF = rng.standard_normal((records, features)) * _magnitude(rng, shape)
    return x_RF, rng.standard_normal(records) * _magnitude(rng, (records,))


def _edges(rng: np.random.Generator, features: int, most: int) -> Drawn:
    """Zeros, subnormal numbers, the largest ones, and what is no number."""
    records = _several(rng, most)
    x_RF = rng.choice(_SPECIAL, (records, features)).astype(np.float64)
    kept = rng.random((records, features)) < rng.choice([0.0, 0.5, 0.95])
    return np.where(kept, rng.standard_normal((records, features)), x_RF), rng.standard_normal(
        records
    )


_KINDS: dict[str, Callable[[np.random.Generator, int, int], Drawn]] = {
    "neighbours": _neighbours,
    "copies": _copies,
    "one size": _one_size,
    "mixed": _mix_magnitudes,
    "edges": _edges,
}
