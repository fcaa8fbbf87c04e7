"""Who belongs where: test or train, and which site. Keyed hashes decide, patient by patient."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from medfed.core.checks import DataError, some
from medfed.core.streams import Streams, patient_fraction


def is_test(patient: pd.Series, label: pd.Series | None, fraction: float, streams: Streams, exact: bool) -> pd.Series:
    """Say for each row whether its patient is held out for testing.

    Plain: a patient is held out where its keyed hash lies below `fraction`, whatever anybody else does. Every class
    has the same chance, so class shares agree in expectation. `exact`: within each class (of a patient's first
    record) the patients of lowest hash are held out, as many as `fraction` of them rounded up, at least one kept.
    """
    key = streams.key("split")
    ids = pd.Index(patient.unique())
    fractions = pd.Series([patient_fraction(key, name) for name in ids], index=ids)
    if exact:
        first = pd.Series(0, index=ids) if label is None else label.groupby(patient.to_numpy(), sort=False).first()
        rank = fractions.groupby(first.reindex(ids).astype(str)).rank(method="first")
        size = first.reindex(ids).astype(str).map(first.astype(str).value_counts())
        held = np.minimum(np.ceil(size * fraction - 1e-9), size - 1)
        chosen = rank <= held
    else:
        chosen = fractions < fraction
    return pd.Series(patient.map(chosen).to_numpy(dtype=bool), index=patient.index)


def site_of(patient: pd.Series, names: Sequence[str], shares: Sequence[float], streams: Streams) -> pd.Series:
    """Give each patient a site by its keyed hash; sites get `shares` of the patients in expectation."""
    key = streams.key("partition")
    ids = patient.unique()
    ends = np.cumsum(shares)
    ends[-1] = 1.0
    places = np.searchsorted(ends, [patient_fraction(key, name) for name in ids], side="right")
    return patient.map({name: names[place] for name, place in zip(ids, places, strict=True)})


def patients(frame: pd.DataFrame, column: str) -> pd.Series:
    """Name the patient of each row: by a column, or by the row's content where `column` is empty."""
    if not column:
        return row_patients(frame)
    named = frame[column].astype(str).str.strip()
    unnamed = (frame[column].isna() | (named == "")).to_numpy(dtype=bool)
    if unnamed.any():
        raise DataError(f"column {column!r}: no patient named in row {some(frame.index[unnamed])}; name each patient")
    return named


def row_patients(frame: pd.DataFrame) -> pd.Series:
    """Name the patient of each row where no column does: by the row's content, so that row order means nothing.

    Rows of equal content are told apart by their order among themselves.
    """
    text = frame.astype(str).mask(frame.isna(), "").to_numpy()
    content = pd.Series(["\x1f".join(row) for row in text], index=frame.index, dtype=object)
    return content + "\x1e" + content.groupby(content).cumcount().astype(str)
