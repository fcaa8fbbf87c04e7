"""A site's table, cleaned: which columns are numbers, which are text, what is missing, who is held out for testing.

All that can be wrong with a table is found here, before training, and named by row. Row numbers are those of the file,
its header being row 1.

Under a privacy claim (`private`) an error that one patient's row can cause would tell of that patient, and so would a
column that is text or number by how its cells were counted. There the data dictionary alone decides what a column is
and what may stand in it: a bad cell counts as missing, a record without a declared label takes no part, and what was
met is in the site's own log. Only the header can stop a run.
"""

import logging
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from medfed.core import quotes, toml
from medfed.core.checks import DataError, MedfedError, PlanError, closest, nearest, some
from medfed.core.patient_ids import Rule
from medfed.core.refusals import LEAVE_OUT, Refusal, refuse
from medfed.core.streams import Streams
from medfed.data import cells, dates, doubts, numerals, readers, units
from medfed.data.doubts import Doubt
from medfed.data.partition import is_test, patients, spelled
from medfed.features import features_of, matching, no_features
from medfed.study import KINDS, Data, Feature, describe, described, is_pattern

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows

_MOST_CATEGORIES = 64  # a text column with more is taken for free text or an identifier
_MOST_LABELS = 64
_MOST_MISNAMED = 10  # columns that are looked up one by one for a name that they may mean
_LIMIT_LIKE = r"(?:[<>]=?|=[<>]|[≤≥⩽⩾])\s*[+-]?[\d.,]+"


@dataclass(frozen=True)
class SiteTable:
    """One site's records. Numbers are float64 with NaN for missing; texts are str with None for missing."""

    numbers: dict[str, np.ndarray]
    texts: dict[str, np.ndarray]
    label: np.ndarray  # str for a class, float64 for regression
    patient: np.ndarray  # int64 [rows], 0 .. patients-1
    test: np.ndarray  # bool [rows]
    ids: np.ndarray  # str [patients], who they are; never leaves the site
    left_out: np.ndarray | None = None  # bool [rows]: records that take no part, under a claim; None: all do
    found: "Found" = field(default_factory=lambda: Found())
    spellings: int = 0  # patients who are written in more than one way; never leaves the site

    def taking_part(self) -> np.ndarray:
        """Return which records take part, bool [rows]."""
        return np.ones(len(self), dtype=bool) if self.left_out is None else ~self.left_out

    def known(self) -> "SiteTable":
        """Return the records that take part alone."""
        rows = self.taking_part()
        numbers = {name: values[rows] for name, values in self.numbers.items()}
        texts = {name: values[rows] for name, values in self.texts.items()}
        return SiteTable(numbers, texts, self.label[rows], self.patient[rows], self.test[rows], self.ids)

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def sorted_words(self) -> dict[tuple[str, float | None], np.ndarray]:
        """Training values in order, by column and floor of its logarithm, while questions are asked of them."""
        return {}

    def features(self) -> list[str]:
        """Return the feature names, sorted."""
        return sorted([*self.numbers, *self.texts])

    def ordered(self) -> "SiteTable":
        """Return the records by patient, and of one patient by what they say: so that a file's order means nothing."""
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
        texts = [pd.Series(self.texts[name][rows], dtype=object).fillna("") for name in sorted(self.texts)]
        label = pd.Series(self.label[rows])
        codes = [pd.factorize(column, sort=True)[0] for column in (*texts, label)]
        return [*codes, self.taking_part()[rows], *(self.numbers[name][rows] for name in sorted(self.numbers))]

    def by_patient(self) -> "Iterator[SiteTable]":
        """Yield a table for each patient, in the order of `ids`."""
        order = np.argsort(self.patient, kind="stable")
        ends = np.searchsorted(self.patient[order], np.arange(len(self.ids) + 1))
        columns = {name: values[order] for name, values in self.numbers.items()}
        words = {name: values[order] for name, values in self.texts.items()}
        label, test, taking_part = self.label[order], self.test[order], self.taking_part()[order]
        for code, (start, end) in enumerate(pairwise(ends.tolist())):
            rows = slice(start, end)
            numbers = {name: values[rows] for name, values in columns.items()}
            texts = {name: values[rows] for name, values in words.items()}
            one = np.zeros(end - start, dtype=np.int64)
            left_out = None if self.left_out is None else ~taking_part[rows]
            yield SiteTable(numbers, texts, label[rows], one, test[rows], self.ids[code : code + 1], left_out)

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
            ~np.concatenate([t.taking_part() for t in tables]),
        )


@dataclass(frozen=True)
class Found:
    """Numbers that a run goes on with though they may be wrong: rows of the file, by column. Under a claim it stays."""

    outside: Mapping[str, list[int]] = field(default_factory=dict)  # beyond the declared range
    far: Mapping[str, list[int]] = field(default_factory=dict)  # no range is declared: see `cells.far`
    doubts: Sequence[Doubt] = ()
    dropped: Mapping[str, int] = field(default_factory=dict)  # how many rows data.drop has left out, by what they lack


def _end_to_end(columns: Sequence[dict[str, np.ndarray]], sizes: list[int], missing: object) -> dict[str, np.ndarray]:
    names = dict.fromkeys(name for table in columns for name in table)
    parts = list(zip(columns, sizes, strict=True))
    return {n: np.concatenate([c[n] if n in c else np.full(size, missing) for c, size in parts]) for n in names}


def read(path: Path, private: bool = False, data: Data = Data()) -> pd.DataFrame:  # noqa: B008
    """Read a table of any kind that `readers` knows; the index holds each row's number in its file.

    `private`: a text table is read line by line (`data.lines`), and no error quotes a cell.
    """
    return readers.read(path, data, private).frame


def header(path: Path, private: bool = False, data: Data = Data()) -> list[str]:  # noqa: B008
    """Return the columns of a table, of which no row is read. Raises DataError as `read` does."""
    return readers.header(path, data, private)


def numbered(frame: pd.DataFrame) -> pd.DataFrame:
    """Number the rows as a person sees them in the file: the header is row 1."""
    return frame.set_axis(pd.RangeIndex(2, len(frame) + 2), axis=0)


@dataclass(frozen=True)
class Frames(Mapping[str, pd.DataFrame]):
    """Several sites' rows as one frame, end to end: site k owns rows ends[k] .. ends[k+1] - 1."""

    frame: pd.DataFrame
    names: tuple[str, ...]
    ends: np.ndarray  # int64 [K + 1]
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # by site: rows left out, by what they lack
    doubts: Mapping[str, Sequence[Doubt]] = field(default_factory=dict)  # by site: met before its cells are looked at

    @classmethod
    def split(cls, frame: pd.DataFrame, site: np.ndarray, names: Sequence[str]) -> "Frames":
        """Give each row to the site that it names [rows], in the order of rows; one of no such site is left out."""
        code_N = pd.Index(names).get_indexer(pd.Index(site))
        order = np.argsort(code_N, kind="stable")
        ends = np.searchsorted(code_N[order], np.arange(len(names) + 1))
        kept = order[ends[0] :]
        return cls(frame.take(kept), tuple(names), ends - ends[0])

    @classmethod
    def one(cls, site: str, frame: pd.DataFrame) -> "Frames":
        """Return a site alone."""
        return cls(frame, (site,), np.array([0, len(frame)]))

    @classmethod
    def of(cls, frames: Mapping[str, pd.DataFrame]) -> "Frames":
        """Lay frames of the same columns end to end."""
        sizes = [len(frame) for frame in frames.values()]
        return cls(pd.concat(list(frames.values())), tuple(frames), np.cumsum([0, *sizes]))

    def __getitem__(self, name: str) -> pd.DataFrame:
        k = self._places[name]
        return self.frame.iloc[self.ends[k] : self.ends[k + 1]]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: k for k, name in enumerate(self.names)}

    @cached_property
    def site_N(self) -> np.ndarray:
        """Which site owns each row, int64 [rows]."""
        return np.repeat(np.arange(len(self)), np.diff(self.ends))

    def part(self, first: int, last: int) -> "Frames":
        """Return sites first .. last - 1."""
        start, end = self.ends[first], self.ends[last]
        own = self.frame.iloc[start:end]
        return replace(self, frame=own, names=self.names[first:last], ends=self.ends[first : last + 1] - start)

    def count(self, which_N: np.ndarray) -> np.ndarray:
        """Return how many marked rows each site has, int64 [K]."""
        return np.bincount(self.site_N[which_N], minlength=len(self))

    def rows(self, which_N: np.ndarray) -> Iterator[tuple[int, list[int]]]:
        """Yield each site that has marked rows, and their numbers in the file."""
        at = np.flatnonzero(which_N)
        cuts = np.flatnonzero(np.diff(self.site_N[at])) + 1
        for part in np.split(at, cuts) if len(at) else ():
            yield int(self.site_N[part[0]]), self.frame.index[part].tolist()


def clean(site: str, frame: pd.DataFrame, data: Data, streams: Streams, private: bool = False) -> SiteTable:
    """Clean the rows of one site; numbers are held to the ranges that the dictionary declares.

    Raises DataError for a missing column, text in a numeric column, an infinite value, a target that is missing, and
    (with on_missing = "refuse") any missing feature; each names site, column and rows, and columns are told together.
    `private`: only for a missing column, and PlanError for those that the dictionary does not describe.
    """
    return clean_all(Frames.one(site, frame), data, streams, private)[0]


def clean_all(
    frames: Frames, data: Data, streams: Streams, private: bool = False, open_: Collection[str] = ()
) -> list[SiteTable]:
    """Clean the rows of several sites in one go: to each the table, or the error, that `clean` gives for it alone.

    `open_`: numbers, under a claim, though the dictionary does not describe them (`features.open_columns`).
    Where something is wrong the sites are halved until it is one site's, named in its error; all of them are told.
    """
    notes: list[tuple[object, ...]] = []
    names = feature_names(frames.frame, data)
    if private:
        _check_described([name for name in names if name not in open_], data)
    try:
        tables = _cleaned(frames, data, streams, private, notes)
    except MedfedError:
        if (half := len(frames) // 2) == 0:
            _log(notes)
            raise
        tables, unclean = [], []
        for part in (frames.part(0, half), frames.part(half, len(frames))):
            try:
                tables += clean_all(part, data, streams, private, open_)
            except MedfedError as error:
                unclean += list(error.refusals) or [Refusal(error)]
        refuse(unclean)
        return tables
    _log(notes)
    return tables


def _log(notes: Sequence[tuple[object, ...]]) -> None:
    for text, *words in notes:
        logger.warning(text, *words)


Notes = list[tuple[object, ...]]
"""What goes into the sites' own log once they are cleaned: a text and its words."""


def _cleaned(frames: Frames, data: Data, streams: Streams, private: bool, notes: Notes) -> list[SiteTable]:
    frame, site_N = frames.frame, frames.site_N
    names = feature_names(frame, data)
    empty = [name for name, size in zip(frames, np.diff(frames.ends), strict=True) if size == 0]
    if empty and not private:
        raise DataError(
            f"site {empty[0]!r} has no row; give it patients (a larger share in sites.shares) or leave it out"
        )
    numbers: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # values of all rows, and for which sites they count [K]
    texts: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    outside: list[dict[str, list[int]]] = [{} for _ in frames]
    far: list[dict[str, list[int]]] = [{} for _ in frames]

    unclean: list[Refusal] = []
    for name in names:
        feature = data.dictionary.get(name, Feature())
        try:
            column = _Column(frames, name, feature, data.missing_values, notes, private)
            if data.on_missing == "refuse" and column.missing.any() and not private:
                raise DataError(
                    f"{column.where}: missing in row {column.rows(column.missing)}; fill them in or set "
                    "data.on_missing='impute'"
                )
            text_K = column.is_declared_text() if private else column.is_text()
            if text_K.any():
                texts[name] = column.text(text_K[site_N]), text_K
            if text_K.all():
                continue
            held, beyond = cells.hold(column.number(~text_K[site_N]), feature.range)
            if data.on_outside == "refuse" and beyond.any() and not private:
                low, high = feature.range
                raise DataError(
                    f"{column.where}: outside the declared range [{low:g}, {high:g}] in row {column.rows(beyond)}; "
                    "correct them, or set data.on_outside='hold'"
                )
        except DataError as error:
            unclean.append(Refusal(error))
            continue
        numbers[name] = held, ~text_K
        for k, rows in frames.rows(beyond & ~text_K[site_N]):
            outside[k][name] = rows
        if not feature.range and not private:
            for k, rows in frames.rows(cells.far_all(held, frames.ends) & ~text_K[site_N]):
                far[k][name] = rows
    refuse(unclean)

    left_out: np.ndarray | None = None
    if private:
        label, left_out = _declared_label(frames, data, notes)
    else:
        label = _label(frames, data)
    if data.task == "regression":
        held, beyond = cells.hold(label, data.dictionary.get(data.target, Feature()).range)
        for k, rows in frames.rows(beyond):
            outside[k][data.target] = rows
        label = held if private else label  # without a claim a target is told of, never changed

    patient = named_patients(frame, data, private, site_N)
    written_K = spelled(frame[data.patient], site_N, len(frames)) if data.patient else np.zeros(len(frames), np.int64)
    taken = "taken as several people each" if data.identity == "exact" else "taken as one person each"
    for k in np.flatnonzero(written_K).tolist():
        many = "site %r: %d patients are written in more than one way, %s"
        notes.append((many, frames.names[k], written_K[k], taken))
    strata = None if data.task == "regression" else pd.Series(label, index=frame.index)
    codes, ids, starts = _numbered_patients(patient, frames)
    if data.test:
        held_out = _marked(frames, data, codes + starts[site_N], private, notes)
    else:
        exact = data.split == "stratified"
        held_out = is_test(patient, strata, data.test_fraction, streams, exact, site_N).to_numpy()
    if private:
        for k, found in enumerate(outside):
            for name, rows in found.items():
                held_to = "site %r, column %r: held to its declared range in row %s"
                notes.append((held_to, frames.names[k], name, some(rows, 50)))

    tables = []
    for k, (start, end) in enumerate(pairwise(frames.ends.tolist())):
        own = slice(start, end)
        table = SiteTable(
            numbers={name: values[own] for name, (values, of_K) in numbers.items() if of_K[k]},
            texts={name: values[own] for name, (values, of_K) in texts.items() if of_K[k]},
            label=label[own],
            patient=codes[own],
            test=held_out[own],
            ids=ids[starts[k] : starts[k + 1]],
            left_out=None if left_out is None else left_out[own],
            found=Found(outside[k], far[k], dropped=frames.dropped.get(frames.names[k], {})),
            spellings=int(written_K[k]),
        )
        if not private:
            met = frames.doubts.get(frames.names[k], ())
            doubted = (*met, *doubts.of_site(table, frame.iloc[start:end], data))
            table = replace(table, found=replace(table.found, doubts=doubted))
        tables.append(table)
    return tables


def _numbered_patients(patient: pd.Series, frames: Frames) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each row's patient, numbered within its site; all sites' ids end to end; where each site's begin [K + 1].

    Numbers are by name: the order of rows means nothing.
    """
    code_N, names = pd.factorize(patient, sort=True)
    many = max(1, len(names))
    pairs, place_N = np.unique(frames.site_N * many + code_N, return_inverse=True)
    starts = np.searchsorted(pairs, np.arange(len(frames) + 1) * many)
    return place_N - starts[frames.site_N], np.asarray(names, dtype=object)[pairs % many], starts


def named_patients(frame: pd.DataFrame, data: Data, private: bool, site_N: np.ndarray | None = None) -> pd.Series:
    """Name the patient of each row as the study says; see `partition.patients`."""
    rule: Rule = "exact" if data.identity == "exact" else "canonical"
    return patients(frame, data.patient, rule, data.missing_values, data.missing_patient, private, site_N)


def declared_labels(data: Data) -> tuple[str, ...]:
    """Return the labels that the dictionary declares; raise PlanError where a claim needs them and it does not."""
    refuse(unlabelled(data))
    return data.dictionary[data.target].categories


def unlabelled(data: Data) -> Iterator[Refusal]:
    """Yield that a claim needs declared labels, where they are not."""
    if data.dictionary.get(data.target, Feature()).categories:
        return
    text = (
        f"a privacy claim and the labels of data.target={data.target!r} taken from patients do not compose; "
        f"declare {toml.key('data', 'dictionary', data.target, 'categories')} = [...], the labels that may occur"
    )
    yield Refusal(PlanError(text), {("data", "dictionary", data.target, "categories"): LABELS})


LABELS = toml.Ask([], "the labels that may occur, publicly known")


def declared_range(data: Data) -> tuple[float, ...]:
    """Return the range of a number that is predicted; raise PlanError where a claim needs one and there is none."""
    ends = data.dictionary.get(data.target, Feature()).range
    if not ends:
        where = toml.key("data", "dictionary", data.target, "range")
        raise PlanError(
            f"a privacy claim and data.task='regression' without {where} do not compose: "
            f"nothing bounds what one patient's target says. Declare {where} = [low, high]."
        )
    return ends


def _check_described(names: Sequence[str], data: Data) -> None:
    """Refuse columns whose kind would have to be guessed from their cells."""
    refuse(undescribed(names, data))


def undescribed(names: Sequence[str], data: Data, otherwise: str = "") -> Iterator[Refusal]:
    """Yield, as one, the features that a claim needs described and the dictionary does not describe.

    `otherwise` says, in a sentence, what else there is for numbers.
    """
    absent = [name for name in names if not described(data.dictionary.get(name, Feature()))]
    if not absent:
        return
    first, several = absent[0], len(absent) > 1
    which = f"{len(absent)} features ({some(map(repr, absent))})" if several else f"the feature {first!r}"
    what = "what their" if several else "what its"
    one, other = (toml.key("data", "dictionary", first, name) for name in ("range", "categories"))
    more = ", and so on: a range for a number, categories for a text; or leave them" if several else ", or leave it"
    text = (
        f"a privacy claim and {which} without a public range or categories do not compose: {what} "
        f"cells are would be counted from patients. Declare {one} or {other}{more} out of data.features."
        f"{otherwise}"
    )
    yield Refusal(PlanError(text), describe(absent, data.dictionary))


def feature_names(frame: pd.DataFrame, data: Data) -> list[str]:
    """Return the feature columns; raise DataError for the columns that the study names and the table lacks."""
    columns = [str(name) for name in frame.columns]
    refuse(misnamed(columns, data))
    return features_of(columns, data)


def with_kinds(frame: pd.DataFrame, data: Data) -> Data:
    """Return a data table whose features name the columns that "numbers" or "texts" take, by what their cells hold."""
    columns = [str(name) for name in frame.columns]
    asked = [kind for kind in data.features if kind in KINDS and kind not in columns]
    if not asked:
        return data
    named = features_of(columns, replace(data, features=tuple(f for f in data.features if f not in asked) or ("",)))
    found = [name for name in features_of(columns, replace(data, features=())) if name not in named]
    texts = {name for name in found if _is_text(frame[name], name, data)}
    taken = [name for name in found if ("texts" if name in texts else "numbers") in asked]
    return replace(data, features=tuple(name for name in columns if name in {*named, *taken}))


def _is_text(values: pd.Series, name: str, data: Data) -> bool:
    feature = data.dictionary.get(name, Feature())
    column = _Column(Frames.one("", values.to_frame()), name, feature, data.missing_values, notes=[], private=True)
    return bool(column.is_text()[0])


def misnamed(columns: Sequence[str], data: Data) -> Iterator[Refusal]:
    """Yield what a study says of a table's columns that its header does not bear out."""
    roles = {"target": data.target, "site": data.site, "patient": data.patient, "test": data.test}
    if not data.target:
        left = [name for name in columns if name not in (data.site, data.patient, data.test)]
        text = f"data.target is not set; expected the column to predict, one of: {some(left, 20)}"
        yield Refusal(DataError(text), {("data", "target"): toml.Ask("", "the column to predict")})
    for key, name in roles.items():
        if name and name not in columns:
            text = f"data.{key}={name!r} is no column of the table; {nearest(name, columns)}"
            close = closest(name, columns)
            yield Refusal(DataError(text), {("data", key): close} if close else {})
    known = set(columns)
    yield from _misnamed_features(columns, data)
    for key, name in roles.items():
        if name and name in data.features:
            left = [feature for feature in data.features if feature not in roles.values()]
            text = f"data.features holds {name!r}, which is data.{key}; take it out"
            yield Refusal(DataError(text), {("data", "features"): left})
    strange = [name for name in data.dictionary if name not in known]
    if len(strange) > _MOST_MISNAMED:
        text = f"data.dictionary describes {len(strange)} columns that the table lacks: {some(map(repr, strange))}"
        yield Refusal(DataError(text))
    for name in strange[:_MOST_MISNAMED]:
        if name not in columns:
            where, close = toml.key("data", "dictionary", name), _meant(name, columns)
            mend: dict[toml.Path, object] = {}
            if close and close not in data.dictionary:
                mend = {("data", "dictionary", close): asdict(data.dictionary[name])}
            if mend or data.dictionary[name] == Feature():
                mend[("data", "dictionary", name)] = LEAVE_OUT
            yield Refusal(DataError(f"{where}: no such column; {_nearest(name, columns)}"), mend)
    if not features_of(columns, data):
        yield Refusal(DataError("the table has no feature column; it needs one beside target, site and patient"))


def _meant(name: str, columns: Sequence[str]) -> str | None:
    """Return the column that a misspelt name means: none that names another unit, which a range would be wrong for."""
    close = closest(name, columns)
    return None if close and units.differ(name, close) else close


def _nearest(name: str, columns: Sequence[str]) -> str:
    close = closest(name, columns)
    other = " It is in another unit: set range and factor anew." if close and close != _meant(name, columns) else ""
    return f"{nearest(name, columns)}{other}"


def _misnamed_features(columns: Sequence[str], data: Data) -> Iterator[Refusal]:
    """Yield the names and patterns of data.features and data.exclude that take no column."""
    known = set(columns)
    strange = [
        name for name in data.features if name not in known and not (is_pattern(name) and matching(name, columns))
    ]
    close = {name: _meant(name, columns) for name in strange[:_MOST_MISNAMED]}
    features = [close.get(name) or name for name in data.features]
    for number, name in enumerate(data.features):
        if name in close:
            what = "matches no column of the table" if is_pattern(name) else "is no column of the table"
            text = f"data.features[{number}]={name!r} {what}; {_nearest(name, columns)}"
            yield Refusal(DataError(text), {("data", "features"): features} if close[name] else {})
    if len(strange) > _MOST_MISNAMED:
        text = f"data.features names {len(strange)} columns that the table lacks: {some(map(repr, strange))}"
        yield Refusal(DataError(text))

    left = [name for name in columns if name not in no_features(data)]
    for number, name in enumerate(data.exclude):
        if name in known or (is_pattern(name) and name not in KINDS and matching(name, left)):
            continue
        yield Refusal(
            DataError(f"data.exclude[{number}]={name!r} matches no column of the table; {nearest(name, left)}")
        )
    for name in data.exclude:
        if name in data.features:
            text = f"data.features holds {name!r}, and data.exclude takes it out; keep one of the two"
            yield Refusal(DataError(text))
        if name and name in (data.target, data.site, data.patient, data.test, data.time):
            yield Refusal(DataError(f"data.exclude holds {name!r}, which the study needs; take it out"))
    for name in data.features:
        entry = data.dictionary.get(name, Feature())
        if entry.date and not entry.becomes:
            where = toml.key("data", "dictionary", name, "becomes")
            text = f"data.features holds {name!r}, a date; set {where} = 'age' (or days since, year, month, weekday)"
            yield Refusal(DataError(text))


def canonical(values: pd.Series) -> pd.Series:
    """Return texts without outer blanks, whole numbers without '.0': so that '1.0', ' 1' and 1 are one category."""
    values = dates.texts(values)
    if pd.api.types.is_float_dtype(values.dtype):
        values = values + 0.0  # -0.0 is 0
    text = values.astype(str).str.strip()
    whole = text.str.fullmatch(r"[+-]?\d+\.0*")
    return text.where(~whole, text.str.replace(r"\.0*$", "", regex=True))


def _plain_numbers(values: pd.Series, absent: set[str]) -> tuple[pd.Series, np.ndarray] | None:
    """Return texts that are all plain numbers, or missing, as numbers, and which are missing [rows]; None where not.

    As `canonical` and `pandas.to_numeric` read them, in a tenth of the time.
    """
    if not isinstance(values.dtype, pd.StringDtype):
        return None
    text_N = pc.utf8_trim_whitespace(pa.array(values.array))
    gone_N = pc.or_(pc.is_null(text_N), pc.is_in(text_N, value_set=pa.array(sorted(absent), text_N.type)))
    try:
        number_N = pc.if_else(gone_N, pa.scalar(None, text_N.type), text_N).cast(pa.float64())
    except pa.ArrowInvalid:
        return None
    number, missing = number_N.to_numpy(zero_copy_only=False), gone_N.to_numpy(zero_copy_only=False).copy()
    codes = [float(code) for code in absent if re.fullmatch(r"[+-]?\d+", code)]
    like = np.flatnonzero(np.isin(number, codes)) if codes else np.array([], dtype=np.int64)
    if len(like):  # "-9.0" is the code "-9"
        missing[like] = canonical(values.iloc[like]).isin(absent)
    return pd.Series(np.where(missing, np.nan, number), values.index), missing


class _Column:
    """One feature column of several sites while it is being understood; an error is worded for the first of them."""

    def __init__(
        self,
        frames: Frames,
        name: str,
        feature: Feature,
        missing_values: Sequence[str],
        notes: Notes,
        private: bool = False,
    ) -> None:
        values = frames.frame[name]
        self.where = f"site {frames.names[0]!r}, column {name!r}"
        self.frames, self.name, self.feature, self.notes, self.private = frames, name, feature, notes, private
        if pd.api.types.is_datetime64_any_dtype(values) and not private:
            raise DataError(f"{self.where}: {self._no_dates(['iso'])}")
        self.values, absent = values, {*missing_values, *feature.missing}
        plain = None if feature.categories else _plain_numbers(values, absent)
        self.numeric, self.missing = plain or self._read(absent)
        self.not_number = ~self.missing & self.numeric.isna().to_numpy()

    def _read(self, absent: set[str]) -> tuple[pd.Series, np.ndarray]:
        """Return what `_plain_numbers` does, of any column: what is no number is NaN."""
        missing: np.ndarray = (self.values.isna() | self.texts.isin(absent)).to_numpy(dtype=bool)
        if self.feature.categories:
            strange = ~missing & ~self.texts.isin(self.feature.categories).to_numpy(dtype=bool)
            if self.private:
                self._tell("no declared category", strange)
            missing = missing | strange
        return pd.to_numeric(self.texts.where(~missing), errors="coerce").astype(float), missing

    @cached_property
    def texts(self) -> pd.Series:
        """The cells as `canonical` has them."""
        return canonical(self.values)

    def rows(self, which: np.ndarray) -> str:
        return some(self.values.index[which])

    def _no_dates(self, forms: Sequence[str]) -> str:
        """Say that a column of dates is no feature, and the lines that make it one; `forms` would read all of it."""
        way = f"{self.key('date')} = '{forms[0] if forms else 'dd.mm.yyyy'}', {self.key('becomes')} = 'age' and "
        way += f"{self.key('reference')} = '2024-12-31' (a date, or a date column)"
        leave = f"or leave it out: data.exclude = [{toml.literal(self.name)}]"
        if forms == [dates.SHORT]:
            return f"dates are not features, and these have years of two digits: write out the century, {leave}"
        which = f" ({' or '.join(forms)})" if forms else ", of several forms"
        say = "Which of the forms it is only you know; say" if len(forms) > 1 else "Say"
        return f"dates are not features{which}. {say} what they become: {way}; {leave}"

    def _all_dates(self) -> bool:
        """Say whether all cells of a column without a range are numbers of eight digits that are days."""
        if self.private or self.feature.range or self.feature.categories:
            return False
        number_N = self.numeric.to_numpy(dtype=np.float64)[~self.missing]
        glance = number_N[:64]  # hardly any column of numbers begins so
        return len(number_N) > 1 and bool(dates.digits(glance).all() and dates.digits(number_N).all())

    def is_declared_text(self) -> np.ndarray:
        """Return the same of every site [K], whatever its cells are."""
        return np.full(len(self.frames), bool(self.feature.categories))

    def is_text(self) -> np.ndarray:
        """Return at which sites it is text [K]: where the dictionary says so, or most cells are no numbers."""
        if self.feature.categories or self.feature.range:
            return self.is_declared_text()
        if self._all_dates():
            raise DataError(f"{self.where}: {self._no_dates(['yyyymmdd'])}")
        worded_N = self.not_number
        if worded_N.any() and not self.private:
            worded_N = worded_N & ~self._limit_like  # a number in all but its sign
        most_K: np.ndarray = self.frames.count(worded_N) * 2 > self.frames.count(~self.missing)
        return most_K

    @cached_property
    def _limit_like(self) -> np.ndarray:
        """Which cells are results beyond a detection limit [rows]."""
        found = np.zeros(len(self.values), dtype=bool)
        code_N, texts = pd.factorize(self.texts[self.not_number].astype(object))
        found[self.not_number] = np.array([bool(re.fullmatch(_LIMIT_LIKE, str(t))) for t in texts], dtype=bool)[code_N]
        return found

    def number(self, asked: np.ndarray) -> np.ndarray:
        """Return the column as numbers [rows]; only rows that are `asked` for must be."""
        not_number, infinite = self.not_number & asked, np.isinf(self.numeric.to_numpy()) & asked
        if self.private:
            self._tell("no finite number where one is declared", not_number | infinite)
            return self.numeric.mask(infinite).to_numpy(dtype=np.float64)
        if not_number.any():
            raise DataError(f"{self.where}: {self._no_numbers(not_number)}")
        if infinite.any():
            raise DataError(f"{self.where}: infinite value in row {self.rows(infinite)}; correct or empty the cell")
        return self.numeric.to_numpy(dtype=np.float64)

    def _no_numbers(self, which: np.ndarray) -> str:
        """Say what stands against a column of numbers that holds text, and the way out: most of it, or some cells."""
        declared, rows = self.key("categories"), self.rows(which)
        if not (which & ~self._limit_like).any():
            (example,) = quotes.examples(self.texts[which][:1]) or ("<0.3",)
            return (
                f"results beyond a detection limit ({example}), row {rows}. Say what they become: "
                f"{self.key('limits')} = 'limit', 'half' or 'indicator'"
            )
        there = quotes.there(self.values[which]) if doubts.quotable(self.name) else ""
        if self.feature.range and which.sum() * 2 > (~self.missing).sum():
            if form := numerals.form_of(self.texts[which].unique()):
                return f"numbers spelt as texts, row {rows}: set {self.key('numbers')} = {toml.literal(form)}.{there}"
            return (
                f"text in a numeric column, row {rows}: it is declared a number by {self.key('range')}, and most of it "
                f"is text. Declare {declared} in place of the range.{there}"
            )
        return (
            f"text in a numeric column, row {rows}. Correct the rows, add the "
            f"text to data.missing_values, or declare {declared}.{there}"
        )

    def key(self, name: str) -> str:
        """Return the key of this column's entry in the dictionary."""
        return toml.key("data", "dictionary", self.name, name)

    def _tell(self, what: str, which: np.ndarray) -> None:
        """Write into the site's own log what counts as missing."""
        for k, rows in self.frames.rows(which):
            text = "site %r, column %r: %s, so it counts as missing, in row %s"
            self.notes.append((text, self.frames.names[k], self.name, what, some(rows, 50)))

    def text(self, asked: np.ndarray) -> np.ndarray:
        """Return the column as texts [rows]; only rows that are `asked` for must be."""
        known = asked & ~self.missing
        if not self.feature.categories and known.any():
            self._refuse_gap_words(known)
            code_N, found = pd.factorize(self.texts.to_numpy(dtype=object))
            dated_U = dates.dated([str(text) for text in found])
            of_K = self.frames.count(known)
            all_K = (self.frames.count(known & dated_U[code_N]) == of_K) & (of_K > 0)
            if all_K.any():
                here_U = np.unique(code_N[known & all_K[self.frames.site_N]])
                raise DataError(f"{self.where}: {self._no_dates(dates.forms([str(found[u]) for u in here_U]))}")
            most = int(_distinct(self.frames, code_N, known).max())
            if most > _MOST_CATEGORIES:
                raise DataError(
                    f"{self.where}: {most} different texts look like free text or an identifier. Leave the column out "
                    f"of data.features, or declare {self.key('categories')}."
                )
        texts: np.ndarray = self.texts.to_numpy(dtype=object, copy=True)
        texts[self.missing] = None
        return texts

    def _refuse_gap_words(self, known: np.ndarray) -> None:
        """Raise DataError where numbers stand among nothing but words for what was not measured."""
        numbers = known & ~self.not_number
        words = self.texts[known & self.not_number].unique()
        gaps = doubts.gap_words(words)
        if numbers.any() and len(gaps) == len(words):
            raise DataError(
                f"{self.where}: numbers, and more often {some(map(repr, gaps))}, row "
                f"{self.rows(known & self.not_number)}. If that means 'not measured', set {self.key('missing')} = "
                f"{toml.literal(gaps)}."
            )


def _distinct(frames: Frames, code_N: np.ndarray, which_N: np.ndarray) -> np.ndarray:
    """Return how many different codes each site's marked rows hold, [K]."""
    many = int(code_N.max(initial=0)) + 1
    pairs = np.unique(frames.site_N[which_N] * many + code_N[which_N])
    distinct_K: np.ndarray = np.bincount(pairs // many, minlength=len(frames))
    return distinct_K


def _label(frames: Frames, data: Data) -> np.ndarray:
    frame, values = frames.frame, frames.frame[data.target]
    where, text = f"site {frames.names[0]!r}, target {data.target!r}", canonical(values)
    missing = (values.isna() | text.isin(data.missing_values)).to_numpy(dtype=bool)
    way = "a target cannot be imputed; leave these rows out: data.drop = ['rows without target']"
    _refuse(where, "no value", missing, frame, way)
    if data.task != "regression":
        codes = pd.factorize(text)[0]
        most = int(_distinct(frames, codes, ~missing).max(initial=0))
        if most > _MOST_LABELS:
            raise DataError(f"{where}: {most} different values; for a number set data.task='regression'")
        return text.to_numpy(dtype=object)
    number = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    wrong = ~np.isfinite(number)
    there = quotes.there(values[wrong])
    _refuse(where, "not a finite number", wrong, frame, f"data.task='regression' needs numbers{there}")
    return number


def _declared_label(frames: Frames, data: Data, notes: Notes) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels, and which records take no part as theirs is missing or not declared [rows].

    Such a record has some label all the same, which nobody reads.
    """
    values = frames.frame[data.target]
    text, missing = canonical(values), values.isna().to_numpy(dtype=bool)
    label: np.ndarray
    if data.task == "regression":
        low, _ = declared_range(data)
        number = pd.to_numeric(text.mask(text.isin(data.missing_values)), errors="coerce").to_numpy(dtype=np.float64)
        left_out = missing | ~np.isfinite(number)
        label = np.where(left_out, low, number)
    else:
        labels = declared_labels(data)
        left_out = missing | ~text.isin(labels).to_numpy(dtype=bool)
        label = text.mask(left_out, labels[0]).to_numpy(dtype=object)
    for k, rows in frames.rows(left_out):
        what = "no declared label, so these records take no part"
        notes.append(("site %r, target %r: %s: row %s", frames.names[k], data.target, what, some(rows, 50)))
    return label, left_out


def _marked(frames: Frames, data: Data, patient: np.ndarray, private: bool, notes: Notes) -> np.ndarray:
    """Return which rows the table itself marks as held out; a patient [rows] must be wholly on one side.

    `private`: who is not wholly held out is trained on, under the noise. With data.test_from, claim or none, a patient
    with one row of the day or later is held out.
    """
    frame, text = frames.frame, canonical(frames.frame[data.test]).str.lower()
    if data.test_values:
        held = text.isin([value.strip().lower() for value in data.test_values]).to_numpy(dtype=bool)
        gone = frame[data.test].isna() | text.isin([value.lower() for value in data.missing_values])
        known = held | ~gone.to_numpy(dtype=bool)
    else:
        held = text.isin(("test", "1", "true", "yes")).to_numpy(dtype=bool)
        known = held | text.isin(("train", "0", "false", "no")).to_numpy(dtype=bool)
    many = int(patient.max(initial=0)) + 1
    sides = [np.bincount(patient[side], minlength=many) > 0 for side in (held, ~held)]
    both: np.ndarray = (sides[0] & sides[1])[patient]
    if data.test_from:  # who comes back later is tested on, and never trained on: with every row
        either: np.ndarray = held | both
        return either
    if private:
        for k, rows in frames.rows(~known | (both & held)):
            text_ = "site %r, column %r: trained on, as not held out by a clear mark: row %s"
            notes.append((text_, frames.names[k], data.test, some(rows, 50)))
        alone: np.ndarray = held & ~both
        return alone
    where = f"site {frames.names[0]!r}, column {data.test!r}"
    say = "mark each row test or train (or 1/0, yes/no), or say by data.test_values which texts mean held out"
    what = "no mark" if data.test_values else "neither test nor train"
    _refuse(where, what, ~known, frame, f"{say}{quotes.there(frame[data.test][~known])}")
    _refuse(where, "a patient with rows on both sides", both, frame, "put all rows of a patient on one side")
    return held


def _refuse(where: str, what: str, which: np.ndarray, frame: pd.DataFrame, action: str) -> None:
    if which.any():
        raise DataError(f"{where}: {what} in row {some(frame.index[which])}; {action}")


def suggested(values: pd.Series, data: Data) -> dict[str, list[Any]]:
    """Return what a public column may be declared as, read off its cells: {"range": ends} or {"categories": texts}.

    A range is rounded outwards to two digits of its width. Nothing for a date, a free text or a column without a value.
    """
    frames = Frames.one("", values.to_frame())
    column = _Column(frames, str(values.name), Feature(), data.missing_values, notes=[], private=True)
    if not column.is_text().any():
        known = column.number(np.ones(len(values), dtype=bool))
        known = known[np.isfinite(known)]
        return {"range": _outwards(float(known.min()), float(known.max()))} if len(known) else {}
    texts = sorted(column.texts[~column.missing].unique())
    return {"categories": texts} if len(texts) <= _MOST_CATEGORIES else {}


def _outwards(low: float, high: float) -> list[float]:
    if low == high:
        return [low - 1, high + 1]
    step = 10.0 ** (math.floor(math.log10(high - low)) - 1)
    digits = max(0, 1 - math.floor(math.log10(step)))
    return [round(math.floor(low / step) * step, digits), round(math.ceil(high / step) * step, digits)]
