"""Who belongs where: test or train, and which site. Keyed hashes decide, patient by patient."""

import logging
import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Literal

import numpy as np
import pandas as pd

from medfed.core import patient_ids
from medfed.core.checks import DataError, some
from medfed.core.patient_ids import Rule
from medfed.core.streams import Streams, patient_fraction
from medfed.data import dates

logger = logging.getLogger(__name__)

OWN = "\x1d"  # begins the name of a row that names no patient and counts as one of its own


def is_test(
    patient: pd.Series,
    label: pd.Series | None,
    fraction: float,
    streams: Streams,
    exact: bool,
    site: np.ndarray | None = None,
) -> pd.Series:
    """Say for each row whether its patient is held out for testing.

    Plain: a patient is held out where its keyed hash lies below `fraction`, whatever anybody else
    does. Every class has the same chance, so class shares agree in expectation. `exact`: within
    each class (of a patient's first record) the patients of lowest hash are held out, as many as
    `fraction` of them rounded up, at least one kept; of several sites (`site` [rows]), within each
    class of each.
    """
    key = streams.key("split")
    who_N, names = pd.factorize(patient)
    fraction_I = np.array([patient_fraction(key, name) for name in names], dtype=np.float64)
    if not exact:
        return pd.Series((fraction_I < fraction)[who_N], index=patient.index)

    place_N = np.zeros(len(patient), dtype=np.int64) if site is None else site
    one_N, ones = pd.factorize(place_N * max(1, len(names)) + who_N)  # one patient of one site
    first = np.flatnonzero(~pd.Series(one_N).duplicated())
    if label is None:
        kind = np.zeros(len(patient), dtype=np.int64)
    else:
        kind = pd.factorize(label.astype(str))[0]
    class_I = pd.factorize(place_N[first] * (int(kind.max(initial=0)) + 1) + kind[first])[0]
    fraction_I = fraction_I[who_N[first]]

    order = np.lexsort((fraction_I, class_I))
    size = np.bincount(class_I)
    rank_I = np.empty(len(ones), dtype=np.int64)
    rank_I[order] = np.arange(len(ones)) - (np.cumsum(size) - size)[class_I[order]] + 1
    held = np.minimum(np.ceil(size * fraction - 1e-9), size - 1)
    return pd.Series((rank_I <= held[class_I])[one_N], index=patient.index)


def site_of(
    patient: pd.Series, names: Sequence[str], shares: Sequence[float], streams: Streams
) -> pd.Series:
    """Give each patient a site by its keyed hash; sites expect `shares` of the patients."""
    key = streams.key("partition")
    ids = patient.unique()
    ends = np.cumsum(shares)
    ends[-1] = 1.0
    places = np.searchsorted(ends, [patient_fraction(key, name) for name in ids], side="right")
    return patient.map({name: names[place] for name, place in zip(ids, places, strict=True)})


def patients(
    frame: pd.DataFrame,
    column: str,
    identity: Rule = "canonical",
    missing_values: Sequence[str] = (),
    missing_patient: Literal["refuse", "own"] = "refuse",
    claimed: bool = False,
    site: np.ndarray | None = None,
) -> pd.Series:
    """Name the patient of each row:
    by a column, under the identity rule, or by the row's content without one.

    A row that names nobody is refused, or with missing_patient = "own" a patient by itself. Raises
    DataError; where a guarantee is `claimed`, it does not say which rows: `medfed data show`, at
    the site, does. Of several sites (`site` [rows]) each counts its rows of equal content by
    itself.
    """
    if not column:
        return row_patients(frame, site)
    text = id_texts(frame[column], f"column {column!r}")
    _refuse_rounded(text, f"column {column!r}", claimed)
    names = {one: patient_ids.identify(one, identity) for one in text.unique()}
    absent = patient_ids.nobodies(missing_values)
    named = text.map(names)
    if identity == "canonical":
        nobody = named.isin(absent).to_numpy(dtype=bool)  # named as `is_nobody` would name them
    else:
        nobody = text.map({one: patient_ids.is_nobody(one, absent) for one in names}).to_numpy(
            dtype=bool
        )

    if nobody.any() and missing_patient == "refuse":
        where = f"column {column!r}: no patient named in"
        rows = f"row {some(frame.index[nobody])}"
        action = "Name each patient, leave the rows out (data.drop = ['rows without patient'])"
        if claimed:
            logger.warning("%s %s", where, rows)
            raise DataError(
                f"{where} some rows; at the site `medfed data show` says which. {action}."
            )
        raise DataError(
            f"{where} {rows}. {action}, or set data.missing_patient='own': each row is its own "
            "patient."
        )
    if nobody.any():
        named[nobody] = (
            OWN + row_patients(frame[nobody], None if site is None else site[nobody])
        ).to_numpy()
    return named


_ROUNDED = re.compile(r"[+-]?\d[.,]\d+e\+?(1[5-9]|[2-9]\d)|[+-]?\d{16,}[.,]0*", re.IGNORECASE)
"""An id that some spreadsheet or float has rounded: 1.23457E+17, 9007199254740992.0."""


def _refuse_rounded(text: pd.Series, where: str, claimed: bool) -> None:
    """Raise DataError for ids that were rounded when they were written:
    several patients may have become one.

    Under a claim it goes into the site's own log alone: as one they are bounded together, and pay
    together.
    """
    every = "\n".join(text)
    if "." not in every and "," not in every:  # of a million ids hardly any table has one
        return
    rounded = text.str.fullmatch(_ROUNDED).to_numpy(dtype=bool)
    if not rounded.any():
        return
    rows = some(text.index[rounded], 50 if claimed else 5)

    if claimed:
        logger.warning(
            "%s: ids that were rounded, so that several patients may be one, in row %s", where, rows
        )
        return

    raise DataError(
        f"{where}: ids that were rounded when they were written, in row {rows}, so that several "
        "patients may have become one. Export them as whole numbers or as text."
    )


def id_texts(column: pd.Series, where: str) -> pd.Series:
    """Return ids as texts, the same for every type that a column of whole numbers can have; ""
    where there is none.

    Raises DataError for ids that floats have rounded already, and for bytes that are no text.
    """
    gap = column.isna().to_numpy(dtype=bool)
    largest = _LARGEST.get(str(column.dtype).lower(), 2.0**53)
    values = zip(column.astype(object), gap.tolist(), strict=True)
    text = ["" if missing else _id_text(value, where, largest) for value, missing in values]
    return pd.Series(text, index=column.index, dtype=object)


_LARGEST = {"float16": 2.0**11, "float32": 2.0**24, "float[pyarrow]": 2.0**24}
"""Up to where floats of a type, and of all others 2^53, tell whole numbers apart."""


def _id_text(value: object, where: str, largest: float) -> str:
    """Return one id as text: a whole number without its point."""
    if type(value) is str:  # most of all, so first
        return value.strip()
    if isinstance(value, bytes):
        try:
            return value.decode().strip()
        except UnicodeDecodeError:
            raise DataError(f"{where}: an id is bytes and no text; write ids as text") from None
    if isinstance(value, (float, np.floating)) and abs(float(value)) >= largest:
        raise DataError(
            f"{where}: ids of {largest:.0f} and more in a column of floats are rounded, so that "
            "two patients may have become one. Write ids as whole numbers or as text."
        )
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return str(int(value))
    return str(value).strip()


def spellings(column: pd.Series) -> int:
    """Return how many patients are written in more than one way: texts that differ and are one in
    canonical form.
    """
    return int(count_respelt(column, np.zeros(len(column), dtype=np.int64), 1)[0])


def count_respelt(column: pd.Series, site_N: np.ndarray, sites: int) -> np.ndarray:
    """Return how many patients of each site are written in more than one way, int64 [K]."""
    code_N, texts = pd.factorize(id_texts(column, ""))
    name = pd.Series([patient_ids.identify(one, "canonical") for one in texts], dtype=object)
    absent = name.isin(patient_ids.nobodies(())).to_numpy(dtype=bool)
    name_I, names = pd.factorize(name)
    pairs = np.unique(site_N * max(1, len(texts)) + code_N)  # one text of one site
    place = pairs // max(1, len(texts))
    text = pairs % max(1, len(texts))
    place = place[~absent[text]]
    text = text[~absent[text]]
    people, written = np.unique(place * max(1, len(names)) + name_I[text], return_counts=True)
    return np.bincount(people[written > 1] // max(1, len(names)), minlength=sites)


def row_patients(frame: pd.DataFrame, site: np.ndarray | None = None) -> pd.Series:
    """Name the patient of each row where no column does:
    by the row's content, so that row order means nothing.

    Rows of equal content are told apart by their order among themselves; of several sites (`site`
    [rows]), in each.
    """
    told = frame.assign(**{name: dates.texts(frame[name]) for name in frame.columns})
    text = told.astype(str).mask(frame.isna(), "").to_numpy()
    content = pd.Series(["\x1f".join(row) for row in text], index=frame.index, dtype=object)
    alike = content.groupby(content if site is None else [site, content.to_numpy()])
    return content + "\x1e" + alike.cumcount().astype(str)
