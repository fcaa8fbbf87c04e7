"""A site's table, cleaned: which columns are numbers, which are text, what is missing, who is held
out for testing.

All that can be wrong with a table is found here, before training, and named by row. Row numbers are
those of the file, its header being row 1.

Under a privacy claim (`private`) an error that one patient's row can cause would tell of that
patient, and so would a column that is text or number by how its cells were counted. There the data
dictionary alone decides what a column is and what may stand in it: a bad cell counts as missing, a
record without a declared label takes no part, and what was met is in the site's own log. Only the
header can stop a run.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd

from medfed.core import quotes
from medfed.core.checks import DataError, MedfedError, some
from medfed.core.patient_ids import Rule
from medfed.core.refusals import Refusal, refuse
from medfed.core.streams import Streams
from medfed.data import cells, readers, site_doubts
from medfed.data.declared import declared_labels, declared_range, refuse_undescribed
from medfed.data.frames import Frames
from medfed.data.headers import feature_names
from medfed.data.partition import count_respelt, is_test, patients
from medfed.data.raw_columns import Notes, RawColumn, canonical, count_distinct
from medfed.data.site_table import Findings, SiteTable
from medfed.study import Data, Feature

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows
_MOST_LABELS = 64


def read(path: Path, private: bool = False, data: Data = Data()) -> pd.DataFrame:  # noqa: B008
    """Read a table of any kind that `readers` knows; the index holds each row's number in its file.

    `private`: a text table is read line by line (`data.line_reader`), and no error quotes a cell.
    """
    return readers.read(path, data, private).frame


def header(path: Path, private: bool = False, data: Data = Data()) -> list[str]:  # noqa: B008
    """Return the columns of a table, of which no row is read. Raises DataError as `read` does."""
    return readers.header(path, data, private)


def clean(
    site: str, frame: pd.DataFrame, data: Data, streams: Streams, private: bool = False
) -> SiteTable:
    """Clean the rows of one site; numbers are held to the ranges that the dictionary declares.

    Args:
        site: its name, for errors.
        frame: its rows as read, numbered as in the file.
        data: the study's data table, completed.
        streams: where the draw of held-out patients comes from.
        private: under a claim, where the dictionary alone decides what a cell is.

    Raises:
        DataError: a missing column, text in a numeric column, an infinite value, a target that is
            missing, and (with on_missing = "refuse") any missing feature; each names site, column
            and rows, and columns are told together. `private`: only for a missing column.
        PlanError: `private`, columns that the dictionary does not describe.
    """
    return clean_all(Frames.one(site, frame), data, streams, private)[0]


def clean_all(
    frames: Frames, data: Data, streams: Streams, private: bool = False, open_: Collection[str] = ()
) -> list[SiteTable]:
    """Clean the rows of several sites in one go: to each the table, or the error, that `clean`
    gives for it alone.

    `open_`: numbers, under a claim, though the dictionary does not describe them
    (`features.open_columns`). Where something is wrong the sites are halved until it is one site's,
    named in its error; all of them are told.
    """
    notes: list[tuple[object, ...]] = []
    names = feature_names(frames.frame, data)
    if private:
        _check_described([name for name in names if name not in open_], data)

    try:
        tables = _clean_sites(frames, data, streams, private, notes)
    except MedfedError:
        if (half := len(frames) // 2) == 0:
            _write_log(notes)
            raise
        tables = []
        unclean = []
        for part in (frames.part(0, half), frames.part(half, len(frames))):
            try:
                tables += clean_all(part, data, streams, private, open_)
            except MedfedError as error:
                unclean += list(error.refusals) or [Refusal(error)]
        refuse(unclean)
        return tables

    _write_log(notes)
    return tables


def _write_log(notes: Sequence[tuple[object, ...]]) -> None:
    for text, *words in notes:
        logger.warning(text, *words)


@dataclass(frozen=True)
class _Features:
    """The feature columns of all sites, cleaned:
    values of all rows, and for which sites [K] they count.
    """

    numbers: dict[str, tuple[np.ndarray, np.ndarray]]
    texts: dict[str, tuple[np.ndarray, np.ndarray]]
    outside: list[dict[str, list[int]]]  # by site: rows beyond the declared range, by column
    far: list[dict[str, list[int]]]  # by site: rows far from all others where no range is declared


def _clean_sites(
    frames: Frames, data: Data, streams: Streams, private: bool, notes: Notes
) -> list[SiteTable]:
    """Return each site's table; raise what stands against any of them.
    `notes` gets what goes into their own log.
    """
    empty = [name for name, size in zip(frames, np.diff(frames.ends), strict=True) if size == 0]
    if empty and not private:
        raise DataError(
            f"site {empty[0]!r} has no row; give it patients (a larger share in sites.shares) or "
            "leave it out"
        )

    # What is known of each record, and what is to be predicted.
    features = _clean_features(frames, data, private, notes)
    left_out: np.ndarray | None = None
    if private:
        label, left_out = _read_declared_label(frames, data, notes)
    else:
        label = _read_label(frames, data)
    if data.task == "regression":
        held, beyond = cells.hold(label, data.dictionary.get(data.target, Feature()).range)
        for k, rows in frames.rows(beyond):
            features.outside[k][data.target] = rows
        if private:  # without a claim a target is told of, never changed
            label = held

    # Who is who, and who is held out.
    site_N = frames.site_N
    patient = name_patients(frames.frame, data, private, site_N)
    respelt_K = _note_respelt(frames, data, notes)
    codes, ids, starts = _number_patients(patient, frames)
    if data.test:
        held_out = _read_marks(frames, data, codes + starts[site_N], private, notes)
    else:
        strata = None if data.task == "regression" else pd.Series(label, index=frames.frame.index)
        exact = data.split == "stratified"
        held_out = is_test(patient, strata, data.test_fraction, streams, exact, site_N).to_numpy()

    if private:
        for k, outside in enumerate(features.outside):
            for name, rows in outside.items():
                held_to = "site %r, column %r: held to its declared range in row %s"
                notes.append((held_to, frames.names[k], name, some(rows, 50)))

    # Each site's part.
    tables = []
    for k, (start, end) in enumerate(pairwise(frames.ends.tolist())):
        own = slice(start, end)
        site = frames.names[k]
        table = SiteTable(
            numbers={
                name: values[own] for name, (values, of_K) in features.numbers.items() if of_K[k]
            },
            texts={name: values[own] for name, (values, of_K) in features.texts.items() if of_K[k]},
            label=label[own],
            patient=codes[own],
            test=held_out[own],
            ids=ids[starts[k] : starts[k + 1]],
            left_out=None if left_out is None else left_out[own],
            findings=Findings(
                features.outside[k], features.far[k], dropped=frames.dropped.get(site, {})
            ),
            spellings=int(respelt_K[k]),
        )
        if not private:
            met = frames.doubts.get(site, ())
            doubted = (*met, *site_doubts.find(table, frames.frame.iloc[start:end], data))
            table = replace(table, findings=replace(table.findings, doubts=doubted))
        tables.append(table)
    return tables


def _clean_features(frames: Frames, data: Data, private: bool, notes: Notes) -> _Features:
    """Return all feature columns;
    raise DataError for all that stands against any of them, told together.
    """
    site_N = frames.site_N
    features = _Features({}, {}, [{} for _ in frames], [{} for _ in frames])

    unclean: list[Refusal] = []
    for name in feature_names(frames.frame, data):
        feature = data.dictionary.get(name, Feature())
        try:
            column = RawColumn(frames, name, feature, data.missing_values, notes, private)
            if data.on_missing == "refuse" and column.missing.any() and not private:
                raise DataError(
                    f"{column.where}: missing in row {column.rows(column.missing)}; fill them in "
                    "or set data.on_missing='impute'"
                )

            # A column may be text at some sites and a number at others.
            text_K = column.is_declared_text() if private else column.is_text()
            if text_K.any():
                features.texts[name] = column.text(text_K[site_N]), text_K
            if text_K.all():
                continue

            held, beyond = cells.hold(column.number(~text_K[site_N]), feature.range)
            if data.on_outside == "refuse" and beyond.any() and not private:
                low, high = feature.range
                raise DataError(
                    f"{column.where}: outside the declared range [{low:g}, {high:g}] in row "
                    f"{column.rows(beyond)}; correct them, or set data.on_outside='hold'"
                )
        except DataError as error:
            unclean.append(Refusal(error))
            continue

        features.numbers[name] = held, ~text_K
        for k, rows in frames.rows(beyond & ~text_K[site_N]):
            features.outside[k][name] = rows
        if not feature.range and not private:
            for k, rows in frames.rows(cells.far_all(held, frames.ends) & ~text_K[site_N]):
                features.far[k][name] = rows

    refuse(unclean)
    return features


def _note_respelt(frames: Frames, data: Data, notes: Notes) -> np.ndarray:
    """Return how many patients of each site are written in several ways, int64 [K]; note it for the
    site's own log.
    """
    if not data.patient:
        return np.zeros(len(frames), dtype=np.int64)

    respelt_K = count_respelt(frames.frame[data.patient], frames.site_N, len(frames))
    if data.identity == "exact":
        taken = "taken as several people each"
    else:
        taken = "taken as one person each"
    for k in np.flatnonzero(respelt_K).tolist():
        text = "site %r: %d patients are written in more than one way, %s"
        notes.append((text, frames.names[k], respelt_K[k], taken))
    return respelt_K


def _number_patients(
    patient: pd.Series, frames: Frames
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each row's patient, numbered within its site; all sites' ids end to end; where each
    site's begin [K + 1].

    Numbers are by name: the order of rows means nothing.
    """
    code_N, names = pd.factorize(patient, sort=True)
    many = max(1, len(names))
    pairs, place_N = np.unique(frames.site_N * many + code_N, return_inverse=True)
    starts = np.searchsorted(pairs, np.arange(len(frames) + 1) * many)
    return place_N - starts[frames.site_N], np.asarray(names, dtype=object)[pairs % many], starts


def name_patients(
    frame: pd.DataFrame, data: Data, private: bool, site_N: np.ndarray | None = None
) -> pd.Series:
    """Name the patient of each row of `frame`, as `data` says; see `partition.patients`.

    `private`: nobody's id is quoted. `site_N`: whose row it is, where several sites lie end to end.
    """
    rule: Rule = "exact" if data.identity == "exact" else "canonical"
    return patients(
        frame, data.patient, rule, data.missing_values, data.missing_patient, private, site_N
    )


def _check_described(names: Sequence[str], data: Data) -> None:
    """Refuse columns whose kind would have to be guessed from their cells."""
    refuse(refuse_undescribed(names, data))


def _read_label(frames: Frames, data: Data) -> np.ndarray:
    frame = frames.frame
    values = frames.frame[data.target]
    where = f"site {frames.names[0]!r}, target {data.target!r}"
    text = canonical(values)
    missing = (values.isna() | text.isin(data.missing_values)).to_numpy(dtype=bool)
    way = "a target cannot be imputed; leave these rows out: data.drop = ['rows without target']"
    _refuse_rows(where, "no value", missing, frame, way)

    if data.task != "regression":
        codes = pd.factorize(text)[0]
        most = int(count_distinct(frames, codes, ~missing).max(initial=0))
        if most > _MOST_LABELS:
            raise DataError(
                f"{where}: {most} different values; for a number set data.task='regression'"
            )
        return text.to_numpy(dtype=object)

    number = pd.to_numeric(text, errors="coerce").to_numpy(dtype=np.float64)
    wrong = ~np.isfinite(number)
    there = quotes.there(values[wrong])
    _refuse_rows(
        where, "not a finite number", wrong, frame, f"data.task='regression' needs numbers{there}"
    )

    return number


def _read_declared_label(frames: Frames, data: Data, notes: Notes) -> tuple[np.ndarray, np.ndarray]:
    """Return the labels, and which records take no part [rows]: theirs is missing or undeclared.

    Such a record has some label all the same, which nobody reads.
    """
    values = frames.frame[data.target]
    text = canonical(values)
    missing = values.isna().to_numpy(dtype=bool)
    label: np.ndarray

    if data.task == "regression":
        low, _ = declared_range(data)
        number = pd.to_numeric(text.mask(text.isin(data.missing_values)), errors="coerce").to_numpy(
            dtype=np.float64
        )
        left_out = missing | ~np.isfinite(number)
        label = np.where(left_out, low, number)
    else:
        labels = declared_labels(data)
        left_out = missing | ~text.isin(labels).to_numpy(dtype=bool)
        label = text.mask(left_out, labels[0]).to_numpy(dtype=object)

    for k, rows in frames.rows(left_out):
        what = "no declared label, so these records take no part"
        notes.append(
            ("site %r, target %r: %s: row %s", frames.names[k], data.target, what, some(rows, 50))
        )

    return label, left_out


def _read_marks(
    frames: Frames, data: Data, patient: np.ndarray, private: bool, notes: Notes
) -> np.ndarray:
    """Return which rows the table itself marks as held out;
    a patient [rows] must be wholly on one side.

    `private`: who is not wholly held out is trained on, under the noise. With data.test_from, claim
    or none, a patient with one row of the day or later is held out.
    """
    frame = frames.frame
    text = canonical(frames.frame[data.test]).str.lower()
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
    say = (
        "mark each row test or train (or 1/0, yes/no), or say by data.test_values which texts "
        "mean held out"
    )
    what = "no mark" if data.test_values else "neither test nor train"
    _refuse_rows(where, what, ~known, frame, f"{say}{quotes.there(frame[data.test][~known])}")
    _refuse_rows(
        where,
        "a patient with rows on both sides",
        both,
        frame,
        "put all rows of a patient on one side",
    )

    return held


def _refuse_rows(
    where: str, what: str, which: np.ndarray, frame: pd.DataFrame, action: str
) -> None:
    if which.any():
        raise DataError(f"{where}: {what} in row {some(frame.index[which])}; {action}")
