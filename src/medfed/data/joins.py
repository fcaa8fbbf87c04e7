"""Tables joined by a column: a patient's laboratory beside the stay. Each row finds one row of the
other, or none.

A joined table holds at most one row for each value; rows of the first that it does not know lack
its columns. Under a claim a value that stands twice is as one that is not there, so that no row
stops a run, and what is counted stays.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from medfed.core import patient_ids
from medfed.core.checks import DataError, nearest, some
from medfed.data import readers
from medfed.data.doubts import Doubt
from medfed.data.partition import id_texts
from medfed.data.raw_columns import canonical
from medfed.study import Data, Join

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows


def header(names: Sequence[str], data: Data, folder: Path, private: bool) -> list[str]:
    """Return the columns of a table and of those joined to it, of which no row is read.

    Raises DataError for a table that lacks the column to join by, and for a column that two tables
    have.
    """
    known = list(names)
    for number, join in enumerate(data.join):
        more = readers.header(folder / join.table, _data_of_table(data), private)
        known += _new_columns(more, known, _on(join, data, number), number, join)
    return known


def join(
    frame: pd.DataFrame, data: Data, folder: Path, private: bool
) -> tuple[pd.DataFrame, dict[str, pd.Index]]:
    """Return rows with the columns of the joined tables,
    and the rows that each of these does not know.

    Raises DataError as `header` does, and without a claim for a value that stands twice in a joined
    table, by rows.
    """
    unfound: dict[str, pd.Index] = {}
    for number, join in enumerate(data.join):
        on = _on(join, data, number)
        other = readers.read(folder / join.table, _data_of_table(data), private).frame
        columns = _new_columns(list(other.columns), list(frame.columns), on, number, join)
        place_N = _places(
            frame, other, on, data, f"data.join[{number}].table={join.table!r}", private
        )
        frame = frame.assign(**dict(_beside(other[columns], place_N, frame.index)))
        if (place_N < 0).any():
            unfound[join.table] = frame.index[place_N < 0]
            logger.warning(
                "%s has no row for row %s",
                join.table,
                some(unfound[join.table], 50 if private else 5),
            )

    return frame, unfound


def doubt_unjoined(
    frame: pd.DataFrame, unfound: Mapping[str, pd.Index], data: Data
) -> Iterator[Doubt]:
    """Yield how many of a site's rows each joined table lacks, as a warning."""
    tables = [(join.table, _on(join, data, number)) for number, join in enumerate(data.join)]
    for table, on in tables:
        rows = frame.index[frame.index.isin(unfound.get(table, []))]
        if len(rows):
            yield Doubt(
                "unjoined", on[0], f"finds no row in {table}", tuple(rows[:5].tolist()), len(rows)
            )


def _data_of_table(data: Data) -> Data:
    """Return the data table as it holds for a joined table, which names no site by its file."""
    return Data(
        format=data.format, patient=data.patient, site=data.site, dictionary=data.dictionary
    )


def _on(join: Join, data: Data, number: int) -> tuple[str, ...]:
    if not join.table:
        raise DataError(f"data.join[{number}].table is empty; expected the table to join")
    if not join.on and not data.patient:
        raise DataError(
            f"data.join[{number}].on is empty; expected the columns to join by, such as "
            "data.patient"
        )
    return join.on or (data.patient,)


def _new_columns(
    other: Sequence[str], known: Sequence[str], on: Sequence[str], number: int, join: Join
) -> list[str]:
    """Return the columns that a joined table adds."""
    for where, names in (("the table", known), (join.table, other)):
        for name in on:
            if name not in names:
                raise DataError(
                    f"data.join[{number}].on={name!r} is no column of {where}; "
                    f"{nearest(name, names)}"
                )
    added = [name for name in other if name not in on]
    if both := [name for name in added if name in known]:
        raise DataError(
            f"data.join[{number}].table={join.table!r}: column {some(map(repr, both))} is in "
            "both tables; rename or take out one, or join by it too"
        )
    return added


def _places(
    frame: pd.DataFrame,
    other: pd.DataFrame,
    on: Sequence[str],
    data: Data,
    where: str,
    private: bool,
) -> np.ndarray:
    """Return for each row the place of its row in the other table, or -1."""
    key = _keys(other, on, data)
    known = _keys(frame, on, data)

    twice_N = (key.duplicated(keep=False) & (key != "")).to_numpy(dtype=bool)
    if twice_N.any():
        rows = other.index[twice_N]
        logger.warning("%s: a value of %s stands twice, row %s", where, on, some(rows, 50))
        if not private:
            raise DataError(
                f"{where}: {_name_key(on)} stands more than once in row {some(rows)}; a joined "
                "table has one row for each. Keep one (the first, the mean), or make its rows "
                "the records of data.table."
            )

    place = pd.Series(np.arange(len(other)), index=key.to_numpy())[
        ~twice_N & (key != "").to_numpy(dtype=bool)
    ]
    return known.map(place).fillna(-1).to_numpy(dtype=np.int64)


def _name_key(on: Sequence[str]) -> str:
    if len(on) == 1:
        return f"a value of {on[0]!r}"
    return f"a pair of {', '.join(map(repr, on))}"


def _keys(frame: pd.DataFrame, on: Sequence[str], data: Data) -> pd.Series:
    """Return what rows find each other by: patients under the study's rule of identity; "" where
    one is missing.
    """
    parts = []
    for name in on:
        if name != data.patient:
            parts.append(canonical(frame[name]).mask(frame[name].isna(), ""))
            continue
        rule: patient_ids.Rule = "exact" if data.identity == "exact" else "canonical"
        absent = patient_ids.nobodies(data.missing_values)
        text = id_texts(frame[name], f"column {name!r}")
        people = {
            one: "" if patient_ids.is_nobody(one, absent) else patient_ids.identify(one, rule)
            for one in set(text)
        }
        parts.append(text.map(people))

    key = parts[0]
    for part in parts[1:]:
        length = key.str.len().astype(str)  # so that no text can pass for two
        key = (length + ":" + key + part).mask((key == "") | (part == ""), "")

    return key


def _beside(
    other: pd.DataFrame, place_N: np.ndarray, rows: pd.Index
) -> Iterator[tuple[str, pd.Series]]:
    """Yield the other table's columns in the order of the first's rows;
    a row that it lacks holds nothing.
    """
    gone_N = place_N < 0
    for name in other.columns:
        values = other[name]
        if gone_N.any() and pd.api.types.is_integer_dtype(values.dtype):
            unsigned = pd.api.types.is_unsigned_integer_dtype(values.dtype)
            whole = pd.UInt64Dtype() if unsigned else pd.Int64Dtype()
            values = values.astype(whole)  # a whole number stays whole beside gaps
        if gone_N.any() and pd.api.types.is_bool_dtype(values.dtype):
            values = values.astype(object)
        if not len(values):
            yield str(name), pd.Series([None] * len(rows), rows, dtype=object)
            continue
        yield str(name), values.iloc[np.where(gone_N, 0, place_N)].set_axis(rows).mask(gone_N)
