"""A site's table, cleaned: which columns are numbers, which are text, what is missing, who is held out for testing.

All that can be wrong with a table is found here, before training, and named by row. Row numbers are those of the file,
its header being row 1.
"""

import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from medfed.core.checks import DataError, nearest, some
from medfed.core.patient_ids import Rule
from medfed.core.streams import Streams
from medfed.data.partition import is_test, patients, spellings
from medfed.study import Data, Feature

logger = logging.getLogger(__name__)

_MOST_CATEGORIES = 64  # a text column with more is taken for free text or an identifier
_MOST_LABELS = 64
_DATE = r"\d{4}-\d\d-\d\d.*"  # ISO 8601, as pandas writes dates
_NO_DATES = "dates are not features; give an age or a number of days, or leave it out"


@dataclass(frozen=True)
class SiteTable:
    """One site's records. Numbers are float64 with NaN for missing; texts are str with None for missing."""

    numbers: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]
    label: np.ndarray  # str for a class, float64 for regression
    patient: np.ndarray  # int64 [rows], 0 .. patients-1
    test: np.ndarray  # bool [rows]
    ids: np.ndarray  # str [patients], who they are; never leaves the site
    spellings: int = 0  # patients who are written in more than one way; never leaves the site

    def __len__(self) -> int:
        return len(self.label)

    def features(self) -> list[str]:
        """Return the feature names, sorted."""
        return sorted([*self.numbers, *self.texts])

    def by_patient(self) -> "Iterator[SiteTable]":
        """Yield a table for each patient, in the order of `ids`."""
        order = np.argsort(self.patient, kind="stable")
        ends = np.searchsorted(self.patient[order], np.arange(len(self.ids) + 1))
        for code, (start, end) in enumerate(pairwise(ends.tolist())):
            rows = order[start:end]
            numbers = {name: values[rows] for name, values in self.numbers.items()}
            texts = {name: values[rows] for name, values in self.texts.items()}
            one = np.zeros(len(rows), dtype=np.int64)
            yield SiteTable(numbers, texts, self.label[rows], one, self.test[rows], self.ids[code : code + 1])

    @classmethod
    def joined(cls, tables: "Sequence[SiteTable]") -> "SiteTable":
        """Return several sites' records end to end; a column that a site lacks is missing there."""
        starts = np.cumsum([0, *(len(t.ids) for t in tables)])
        return cls(
            _end_to_end([t.numbers for t in tables], [len(t) for t in tables], np.nan),
            _end_to_end([t.texts for t in tables], [len(t) for t in tables], None),
            np.concatenate([t.label for t in tables]),
            np.concatenate([t.patient + start for t, start in zip(tables, starts, strict=False)]),
            np.concatenate([t.test for t in tables]),
            np.concatenate([t.ids for t in tables]),
        )


def _end_to_end(columns: Sequence[dict[str, np.ndarray]], sizes: list[int], missing: object) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for table in columns for name in table)
    parts = list(zip(columns, sizes, strict=True))
    return {n: np.concatenate([c[n] if n in c else np.full(size, missing) for c, size in parts]) for n in names}


def read(path: Path) -> pd.DataFrame:
    """Read a csv, csv.gz or parquet file; the index holds each row's number in the file."""
    if not path.exists():
        raise DataError(f"data.table={str(path)!r} does not exist; a table's path is relative to its study file")
    try:
        if path.name.endswith(".parquet"):
            frame = numbered(pd.read_parquet(path))
        elif path.name.endswith((".csv", ".csv.gz")):
            frame = _read_csv(path)
        else:
            raise DataError(f"data.table={path.name!r}; expected a name that ends in .csv, .csv.gz or .parquet")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"data.table={str(path)!r} cannot be read: {error}") from error
    if frame.empty:
        raise DataError(f"data.table={str(path)!r} has no row beside its header; give a table with records")
    return frame


def _read_csv(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, skip_blank_lines=False)
    if not isinstance(frame.index, pd.RangeIndex):
        raise DataError(f"data.table={str(path)!r}: rows have more fields than the header; name every column")
    only = str(frame.columns[0]) if len(frame.columns) == 1 else ""
    if mark := next((m for m in (";", "\t", "|") if m in only), ""):
        raise DataError(f"data.table={str(path)!r}: columns are separated by {mark!r}; write them with commas")
    frame = numbered(frame)
    return frame[(frame != "").any(axis=1)]  # a blank line is a row of the file, but no record


def numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """Number the rows as a person sees them in the file: the header is row 1."""
    return frame.set_axis(pd.RangeIndex(2, len(frame) + 2), axis=0)


def clean(site: str, frame: pd.DataFrame, data: Data, streams: Streams, claimed: bool = False) -> SiteTable:
    """Clean the rows of one site; where a guarantee is `claimed`, errors about ids do not say which rows.

    Raises DataError for a missing column, text in a numeric column, an infinite value, a target that is missing, and
    (with on_missing = "refuse") any missing feature; each names site, column and rows.
    """
    names = feature_names(frame, data)
    if frame.empty:
        raise DataError(f"site {site!r} has no row; give it patients (a larger share in sites.shares) or leave it out")
    numbers: dict[str, np.ndarray] = {}
    texts: dict[str, np.ndarray] = {}
    for name in names:
        where = f"site {site!r}, column {name!r}"
        column = _Column(where, frame[name], data.dictionary.get(name, Feature()), data.missing_values)
        if data.on_missing == "refuse" and column.missing.any():
            raise DataError(
                f"{where}: missing in row {column.rows(column.missing)}; fill them in or set data.on_missing='impute'"
            )
        if column.is_text():
            texts[name] = column.text()
        else:
            numbers[name] = column.number()
    label = _label(site, frame, data)
    patient = named_patients(frame, data, claimed)
    written = spellings(frame[data.patient]) if data.patient else 0
    if written:
        taken = "taken as several people each" if data.identity == "exact" else "taken as one person each"
        logger.warning("site %r: %d patients are written in more than one way, %s", site, written, taken)
    strata = None if data.task == "regression" else pd.Series(label, index=frame.index)
    codes, ids = pd.factorize(patient)
    codes = codes.astype(np.int64)
    if data.test:
        held = _marked(site, frame, data, codes)
    else:
        held = is_test(patient, strata, data.test_fraction, streams, exact=data.split == "stratified").to_numpy()
    return SiteTable(numbers, texts, label, codes, held, np.asarray(ids, dtype=object), written)


def named_patients(frame: pd.DataFrame, data: Data, claimed: bool) -> pd.Series:
    """Name the patient of each row as the study says; see `partition.patients`."""
    rule: Rule = "exact" if data.identity == "exact" else "canonical"
    return patients(frame, data.patient, rule, data.missing_values, data.missing_patient, claimed)


def feature_names(frame: pd.DataFrame, data: Data) -> list[str]:
    """Return the feature columns; raise DataError for a column that the study names and the table lacks."""
    roles = {"target": data.target, "site": data.site, "patient": data.patient, "test": data.test}
    if not data.target:
        raise DataError(f"data.target is not set; expected the column to predict, one of: {some(frame.columns, 20)}")
    for key, name in {**roles, **{f"features[{i}]": f for i, f in enumerate(data.features)}}.items():
        if name and name not in frame.columns:
            raise DataError(f"data.{key}={name!r} is no column of the table; {nearest(name, map(str, frame.columns))}")
    for key, name in roles.items():
        if name and name in data.features:
            raise DataError(f"data.features holds {name!r}, which is data.{key}; take it out")
    for name in data.dictionary:
        if name not in frame.columns:
            raise DataError(f"data.dictionary.{name}: no such column; {nearest(name, map(str, frame.columns))}")
    names = list(data.features) or [str(c) for c in frame.columns if c not in roles.values()]
    if not names:
        raise DataError("the table has no feature column; it needs one beside target, site and patient")
    return names


def canonical(values: pd.Series) -> pd.Series:
    """Return texts without outer blanks, whole numbers without '.0': so that '1.0', ' 1' and 1 are one category."""
    text = values.astype(str).str.strip()
    whole = text.str.fullmatch(r"[+-]?\d+\.0*")
    return text.where(~whole, text.str.replace(r"\.0*$", "", regex=True))


class _Column:
    """One feature column while it is being understood."""

    def __init__(self, where: str, values: pd.Series, feature: Feature, missing_values: Sequence[str]) -> None:
        self.where, self.feature = where, feature
        if pd.api.types.is_datetime64_any_dtype(values):
            raise DataError(f"{where}: {_NO_DATES}")
        self.texts = canonical(values)
        absent = {*missing_values, *feature.missing}
        self.missing = (values.isna() | self.texts.isin(absent)).to_numpy(dtype=bool)
        if feature.categories:
            self.missing = self.missing | ~self.texts.isin(feature.categories).to_numpy(dtype=bool)
        self.numeric = pd.to_numeric(self.texts.where(~self.missing), errors="coerce").astype(float)
        self.not_number = ~self.missing & self.numeric.isna().to_numpy()

    def rows(self, which: np.ndarray) -> str:
        return some(self.texts.index[which])

    def is_text(self) -> bool:
        if self.feature.categories or self.feature.range:
            return bool(self.feature.categories)
        return bool(self.not_number.sum() * 2 > (~self.missing).sum())

    def number(self) -> np.ndarray:
        infinite = np.isinf(self.numeric.to_numpy())
        if self.not_number.any():
            raise DataError(
                f"{self.where}: text in a numeric column, row {self.rows(self.not_number)}. Correct the rows, add the "
                "text to data.missing_values, or declare data.dictionary.<column>.categories."
            )
        if infinite.any():
            raise DataError(f"{self.where}: infinite value in row {self.rows(infinite)}; correct or empty the cell")
        return self.numeric.to_numpy(dtype=np.float64)

    def text(self) -> np.ndarray:
        known, declared = self.texts[~self.missing], bool(self.feature.categories)
        if not declared and known.str.fullmatch(_DATE).all():
            raise DataError(f"{self.where}: {_NO_DATES}")
        found = known.nunique()
        if not declared and found > _MOST_CATEGORIES:
            raise DataError(
                f"{self.where}: {found} different texts look like free text or an identifier. Leave the column out of "
                "data.features, or declare data.dictionary.<column>.categories."
            )
        texts: np.ndarray = self.texts.to_numpy(dtype=object, copy=True)
        texts[self.missing] = None
        return texts


def _label(site: str, frame: pd.DataFrame, data: Data) -> np.ndarray:
    where, values = f"site {site!r}, target {data.target!r}", frame[data.target]
    text = canonical(values)
    missing = (values.isna() | text.isin(data.missing_values)).to_numpy(dtype=bool)
    _refuse(where, "no value", missing, frame, "a target cannot be imputed; leave these rows out")
    if data.task != "regression":
        if text.nunique() > _MOST_LABELS:
            raise DataError(f"{where}: {text.nunique()} different values; for a number set data.task='regression'")
        return text.to_numpy(dtype=object)
    number = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    _refuse(where, "not a finite number", ~np.isfinite(number), frame, "data.task='regression' needs numbers")
    return number


def _marked(site: str, frame: pd.DataFrame, data: Data, patient: np.ndarray) -> np.ndarray:
    """Return which rows the table itself marks as held out; a patient must be wholly on one side."""
    where, text = f"site {site!r}, column {data.test!r}", canonical(frame[data.test]).str.lower()
    held = text.isin(("test", "1", "true", "yes")).to_numpy(dtype=bool)
    known = held | text.isin(("train", "0", "false", "no")).to_numpy(dtype=bool)
    _refuse(where, "neither test nor train", ~known, frame, "mark each row test or train (or 1/0, yes/no)")
    both = np.isin(patient, np.intersect1d(patient[held], patient[~held]))
    _refuse(where, "a patient with rows on both sides", both, frame, "put all rows of a patient on one side")
    return held


def _refuse(where: str, what: str, which: np.ndarray, frame: pd.DataFrame, action: str) -> None:
    if which.any():
        raise DataError(f"{where}: {what} in row {some(frame.index[which])}; {action}")
