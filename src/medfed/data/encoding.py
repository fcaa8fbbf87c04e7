"""How cleaned records become numbers: an `Encoding`, which all sites of a study share.

It is plain numbers and names that go to every site and into the model file; `preprocess.agree`
makes it.

C categories or outputs, K sites, M columns after encoding, N rows.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medfed.core import toml
from medfed.core.checks import DataError, some
from medfed.core.types import Task
from medfed.data.federated import Rows
from medfed.data.site_table import SiteTable


@dataclass(frozen=True)
class Column:
    """How one feature becomes numbers."""

    name: str
    kind: Literal["number", "category"]
    centre: float = 0.0
    scale: float = 1.0
    log: bool = False
    floor: float = 0.0  # values are raised to it before the logarithm
    cap: float = 0.0  # above 0: encoded values are held in [-cap, cap]
    categories: tuple[str, ...] = ()
    indicator: bool = False  # one more column: 1 where the value is missing
    fill: float = 0.0  # what a public encoding puts into a gap, encoded
    # the range, where none is declared: from noised counts of training patients
    found: tuple[float, ...] = ()

    def names(self) -> list[str]:
        """Return the names of the encoded columns."""
        if self.kind == "number":
            values = [self.name]
        elif len(self.categories) == 2:
            values = [f"{self.name}={self.categories[1]}"]
        else:
            values = [f"{self.name}={category}" for category in self.categories]
        if self.indicator:
            return [*values, f"{self.name} missing"]
        return values


@dataclass(frozen=True)
class Target:
    """What is predicted:
    the labels in order (the last of two is positive), or a number's centre and scale.
    """

    name: str
    task: Task
    labels: tuple[str, ...] = ()
    centre: float = 0.0
    scale: float = 1.0

    @property
    def outputs(self) -> int:
        """C, the model's outputs."""
        if self.task == "multiclass":
            return len(self.labels)
        return 1


@dataclass(frozen=True)
class Encoding:
    """The agreement between sites on how records become numbers."""

    columns: tuple[Column, ...]
    target: Target
    # nothing in it was computed from patients, and a gap becomes the middle of the public range
    public: bool = False

    def names(self) -> list[str]:
        """Return the names of the encoded columns, M of them."""
        return [name for column in self.columns for name in column.names()]

    def found_ranges(self) -> dict[str, tuple[float, ...]]:
        """Return the ranges that were found for columns which declare none."""
        return {column.name: column.found for column in self.columns if column.found}

    def invent_rows(self, rows: int) -> Tensor:
        """Return made-up rows [rows, M], float32, all different and the same for everybody:
        nobody's records.
        """
        rng = np.random.default_rng(0)
        blocks = [np.zeros((rows, 0))]
        for column in self.columns:
            if column.kind == "number":
                blocks.append(np.clip(rng.standard_normal((rows, 1)), -2, 2))
            else:
                hot = np.eye(len(column.categories))[
                    rng.integers(len(column.categories), size=rows)
                ]
                blocks.append(_drop_first_of_two(hot))
            if column.indicator:
                blocks.append(rng.integers(2, size=(rows, 1)).astype(np.float64))
        return torch.from_numpy(np.concatenate(blocks, 1).astype(np.float32))

    def to_json(self) -> dict[str, Any]:
        """Return the encoding as plain JSON."""
        return dataclasses.asdict(self)

    def digest(self) -> str:
        """Return the sha256 of the encoding."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Encoding":
        """Read what `to_json` wrote."""
        listed = ("categories", "found")
        columns = tuple(
            Column(**{**c, **{key: tuple(c.get(key, ())) for key in listed}})
            for c in value["columns"]
        )
        target = Target(**{**value["target"], "labels": tuple(value["target"]["labels"])})
        return cls(columns, target, value["public"])

    def encode(
        self,
        table: SiteTable,
        rows: np.ndarray,
        fit_rows: np.ndarray,
        site: np.ndarray | None = None,
    ) -> Rows:
        """Encode the rows marked in `rows`;
        what is missing is filled from those marked in `fit_rows`.

        A number is filled with the median of the site's own encoded training values, a category
        with the share of each category among them; a feature that the whole site lacks with zero,
        the centre of all sites. A public encoding fills every gap with a constant, so that no
        patient moves another's row.

        Args:
            table: cleaned records, of one site or of several end to end.
            rows: bool [N], which are wanted.
            fit_rows: bool [N], training rows.
            site: int64 [N], ascending: which site owns each row; None where it is one site's.

        Returns:
            x float32 [n, M], labels and patients of the rows that are wanted.

        Raises:
            DataError: a label that is not declared, or a value beyond float32 after encoding.
        """
        if site is None:
            site = np.zeros(len(table), dtype=np.int64)
        blocks = [np.zeros((int(rows.sum()), 0))]
        blocks += [self._block(column, table, rows, fit_rows, site) for column in self.columns]
        x = np.concatenate(blocks, 1)

        large = np.flatnonzero((np.abs(x) > np.finfo(np.float32).max).any(0))
        if len(large):
            names = [self.names()[column] for column in large]
            raise DataError(
                f"{some(names)}: values beyond 3e38 after encoding; give another unit or "
                "preprocess='robust'"
            )
        return Rows(
            torch.from_numpy(x.astype(np.float32)),
            self._labels(table, rows),
            torch.from_numpy(table.patient[rows]),
        )

    def _block(
        self,
        column: Column,
        table: SiteTable,
        rows: np.ndarray,
        fit_rows: np.ndarray,
        site_N: np.ndarray,
    ) -> np.ndarray:
        """Return one feature's encoded columns, of the rows marked in `rows`; see `encode`."""
        if column.kind == "number":
            values = _encode_number(
                column, table.numbers.get(column.name, np.full(len(table), np.nan))
            )[:, None]
        else:
            values = _encode_category(
                column, table.texts.get(column.name, np.full(len(table), None))
            )

        # What stands in a gap: the constant of the column,
        # or what the site's own training values say.
        missing = np.isnan(values[:, 0])
        known = fit_rows & ~missing
        sites = int(site_N.max(initial=0)) + 1
        fill_K = np.full((sites, values.shape[1]), column.fill)
        if known.any() and missing.any() and not self.public:
            centre = _site_medians if column.kind == "number" else _site_means
            of, centres = centre(values[known], site_N[known])
            fill_K[of] = centres

        filled: np.ndarray = np.where(missing[:, None], fill_K[site_N], values)
        if column.indicator:
            filled = np.concatenate([filled, missing[:, None]], 1)
        chosen: np.ndarray = filled[rows]
        return chosen

    def _labels(self, table: SiteTable, rows: np.ndarray) -> Tensor:
        label = table.label[rows]
        if self.target.task == "regression":
            return torch.from_numpy(
                ((label - self.target.centre) / self.target.scale).astype(np.float32)
            )
        code = {name: number for number, name in enumerate(self.target.labels)}
        if unknown := sorted({str(name) for name in label} - code.keys()):
            which = "" if self.public else f": {some(unknown)}"
            raise DataError(
                f"target {self.target.name!r} has a label that is not declared{which}. Declare "
                f"it in {toml.key('data', 'dictionary', self.target.name, 'categories')}, or "
                "correct the rows."
            )
        codes = torch.tensor([code[name] for name in label], dtype=torch.int64)
        if self.target.task == "binary":
            return codes.float()
        return codes


def _site_medians(values: np.ndarray, site_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sites that have values [n, 1], and the median of each [K, 1]."""
    of, size_K = np.unique(site_N, return_counts=True)
    if len(of) == 1:
        return of, np.median(values, 0)[None]
    ordered = values[np.lexsort((values[:, 0], site_N))]
    start_K = np.cumsum(size_K) - size_K
    return of, (ordered[start_K + (size_K - 1) // 2] + ordered[start_K + size_K // 2]) / 2


def _site_means(values: np.ndarray, site_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sites that have values [n, C], zeros and ones, and the mean of each [K, C]."""
    of, first, size_K = np.unique(site_N, return_index=True, return_counts=True)
    return of, np.add.reduceat(values, first, 0) / size_K[:, None]


def _encode_number(column: Column, values: np.ndarray) -> np.ndarray:
    if column.log:
        values = np.log(np.maximum(values, column.floor))
    with np.errstate(over="ignore"):  # a cap holds what is too large
        encoded = (values - column.centre) / column.scale
    if column.cap:
        return np.clip(encoded, -column.cap, column.cap)
    return encoded


def _encode_category(column: Column, values: np.ndarray) -> np.ndarray:
    """One column a category, or one for the second of two; a missing or unknown category is NaN."""
    hot = np.stack([values == category for category in column.categories], 1).astype(np.float64)
    hot[~hot.any(1)] = np.nan
    return _drop_first_of_two(hot)


def _drop_first_of_two(hot: np.ndarray) -> np.ndarray:
    """Return one column a category [N, C]; of two categories the second alone, as it says all."""
    if hot.shape[1] == 2:
        return hot[:, 1:]
    return hot
