"""One site's cleaned records, and what was found while they were cleaned."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import pandas as pd

from medfed.data.doubts import Doubt


@dataclass(frozen=True)
class Findings:
    """Numbers that a run goes on with though they may be wrong: rows of the file, by column. Under
    a claim it stays.
    """

    outside: Mapping[str, list[int]] = field(default_factory=dict)  # beyond the declared range
    # no range is declared: see `cells.far`
    far: Mapping[str, list[int]] = field(default_factory=dict)
    doubts: Sequence[Doubt] = ()
    # how many rows data.drop has left out, by what they lack
    dropped: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteTable:
    """One site's records: numbers float64 with NaN for missing, texts str with None for missing."""

    numbers: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]
    label: np.ndarray  # str for a class, float64 for regression
    patient: np.ndarray  # int64 [rows], 0 .. patients-1
    test: np.ndarray  # bool [rows]
    ids: np.ndarray  # str [patients], who they are; never leaves the site
    # bool [rows]: records that take no part, under a claim; None: all do
    left_out: np.ndarray | None = None
    findings: Findings = field(default_factory=Findings)
    spellings: int = 0  # patients who are written in more than one way; never leaves the site

    def taking_part(self) -> np.ndarray:
        """Return which records take part, bool [rows]."""
        if self.left_out is None:
            return np.ones(len(self), dtype=bool)
        return ~self.left_out

    def keep_taking_part(self) -> "SiteTable":
        """Return the records that take part alone."""
        rows = self.taking_part()
        numbers = {name: values[rows] for name, values in self.numbers.items()}
        texts = {name: values[rows] for name, values in self.texts.items()}
        return SiteTable(
            numbers, texts, self.label[rows], self.patient[rows], self.test[rows], self.ids
        )

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def sorted_words(self) -> dict[tuple[str, float | None], np.ndarray]:
        """Training values in order, by column and floor of its logarithm,
        while questions are asked of them.
        """
        return {}

    def features(self) -> list[str]:
        """Return the feature names, sorted."""
        return sorted([*self.numbers, *self.texts])

    def sort_by_patient(self) -> "SiteTable":
        """Return the records by patient, and of one patient by what they say: so that a file's
        order means nothing.
        """
        order = np.argsort(self.patient, kind="stable")
        patient = self.patient[order]
        again = np.append(False, patient[1:] == patient[:-1])
        several = again | np.append(again[1:], False)  # records of a patient who has several
        if several.any():
            rows = order[several]
            order[several] = rows[np.lexsort((*self._contents(rows), self.patient[rows]))]

        if (order == np.arange(len(self))).all():
            return self
        return replace(
            self,
            numbers={name: values[order] for name, values in self.numbers.items()},
            texts={name: values[order] for name, values in self.texts.items()},
            label=self.label[order],
            patient=self.patient[order],
            test=self.test[order],
            left_out=None if self.left_out is None else self.left_out[order],
        )

    def _contents(self, rows: np.ndarray) -> list[np.ndarray]:
        """Return columns [rows] by which records that differ in anything are sorted."""
        texts = [
            pd.Series(self.texts[name][rows], dtype=object).fillna("")
            for name in sorted(self.texts)
        ]
        label = pd.Series(self.label[rows])
        codes = [pd.factorize(column, sort=True)[0] for column in (*texts, label)]
        return [
            *codes,
            self.taking_part()[rows],
            *(self.numbers[name][rows] for name in sorted(self.numbers)),
        ]

    def by_patient(self) -> "Iterator[SiteTable]":
        """Yield a table for each patient, in the order of `ids`."""
        order = np.argsort(self.patient, kind="stable")
        ends = np.searchsorted(self.patient[order], np.arange(len(self.ids) + 1))
        columns = {name: values[order] for name, values in self.numbers.items()}
        words = {name: values[order] for name, values in self.texts.items()}
        label = self.label[order]
        test = self.test[order]
        taking_part = self.taking_part()[order]
        for code, (start, end) in enumerate(pairwise(ends.tolist())):
            rows = slice(start, end)
            numbers = {name: values[rows] for name, values in columns.items()}
            texts = {name: values[rows] for name, values in words.items()}
            one = np.zeros(end - start, dtype=np.int64)
            left_out = None if self.left_out is None else ~taking_part[rows]
            yield SiteTable(
                numbers, texts, label[rows], one, test[rows], self.ids[code : code + 1], left_out
            )

    @classmethod
    def join(cls, tables: "Sequence[SiteTable]") -> "SiteTable":
        """Return several sites' records end to end; a column that a site lacks is missing there."""
        starts = np.cumsum([0, *(len(t.ids) for t in tables)])
        return cls(
            _lay_end_to_end([t.numbers for t in tables], [len(t) for t in tables], np.nan),
            _lay_end_to_end([t.texts for t in tables], [len(t) for t in tables], None),
            np.concatenate([t.label for t in tables]),
            np.concatenate([t.patient + start for t, start in zip(tables, starts, strict=False)]),
            np.concatenate([t.test for t in tables]),
            np.concatenate([t.ids for t in tables]),
            ~np.concatenate([t.taking_part() for t in tables]),
        )


def _lay_end_to_end(
    columns: Sequence[dict[str, np.ndarray]], sizes: list[int], missing: object
) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for table in columns for name in table)
    parts = list(zip(columns, sizes, strict=True))
    return {
        n: np.concatenate([c[n] if n in c else np.full(size, missing) for c, size in parts])
        for n in names
    }
