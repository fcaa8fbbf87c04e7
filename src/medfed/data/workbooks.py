"""Workbooks (Excel, OpenDocument) and the files of SPSS, Stata and SAS.

A workbook's cells become the texts that a csv of them would hold: whole numbers without a point,
however large; dates as ISO 8601; an error such as #N/A is an empty cell. Numbers of a statistics
package stay numbers; what its user has declared missing is missing.
"""

import datetime
import itertools
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyreadstat
from python_calamine import CalamineSheet, CalamineWorkbook

from medfed.core.checks import DataError, nearest, plain, some
from medfed.data import numerals
from medfed.data.layout import lines_to_choose, names_of
from medfed.study import Format

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows

SHEETS = (".xlsx", ".xlsm", ".xlsb", ".xls", ".ods")
STATISTICS = (".sav", ".zsav", ".dta", ".sas7bdat", ".xpt")
_EXACT = 2.0**53  # above, a workbook's number is rounded
_READERS: dict[str, Callable[..., tuple[pd.DataFrame, Any]]] = {
    ".sav": pyreadstat.read_sav,
    ".zsav": pyreadstat.read_sav,
    ".dta": pyreadstat.read_dta,
    ".sas7bdat": pyreadstat.read_sas7bdat,
    ".xpt": pyreadstat.read_xport,
}
Row = tuple[int, list[Any]]
"""A row's number in the sheet, and its cells."""


# workbooks ----------------------------------------------------------------------------------------


def sheet(path: Path, format: Format, where: str, private: bool, patient: str) -> pd.DataFrame:
    """Return a sheet's records as texts, the index holding each one's row.

    `private`: nothing is guessed, and what a cell holds stops nothing but an id that was rounded.
    Raises DataError for a sheet that is not named, or no table.
    """
    book = CalamineWorkbook.from_path(str(path))
    name = _sheet_name(book, format, where, private)
    rows = list(_rows(book.get_sheet_by_name(name), where, private))
    rows = rows[_above(rows, format, private) :]
    if not rows or not _count_filled(rows[0][1]):
        raise DataError(f"{where}, sheet {name!r} has no header; name its columns in the first row")
    if not private:
        rows = _without_empty_columns(rows)
    (_, header), *records = rows
    names = names_of([_text(cell) for cell in header], where)
    records = _without_footer(
        [row for row in records if _count_filled(row[1])], format, private, len(names)
    )
    texts = [[_text(cell) for cell in cells] for _, cells in records]
    numbers = [number for number, _ in records]
    if not private:
        _check(records, names, texts, where)

    sound = [place for place, cells in enumerate(texts) if cells[: len(names)] != names]
    frame = pd.DataFrame(
        [texts[place][: len(names)] for place in sound],
        index=pd.Index([numbers[place] for place in sound], dtype="int64"),
        columns=pd.Index(names),
        dtype=str,
    )
    if patient in names:
        _refuse_rounded(records, names.index(patient), patient, where, private)
    return numerals.respell(frame, numerals.one_form)


def has_labels(path: Path) -> bool:
    """Say whether a statistics package's file names its codes; no record is read."""
    reader = _READERS.get(path.suffix.lower())
    return reader is not None and bool(
        reader(str(path), metadataonly=True)[1].variable_value_labels
    )


def _sheet_name(book: CalamineWorkbook, format: Format, where: str, private: bool) -> str:
    names = book.sheet_names
    if format.sheet:
        if format.sheet not in names:
            raise DataError(
                f"data.format.sheet={format.sheet!r} is no sheet; {nearest(format.sheet, names)}"
            )
        return format.sheet
    filled = names if private else [name for name in names if book.get_sheet_by_name(name).height]
    if len(filled) != 1:
        held = f"{len(filled)} sheets" if filled else "no sheet that holds anything"
        raise DataError(f"{where} has {held}; expected one. {lines_to_choose('sheet', filled[:8])}")
    return filled[0]


def _rows(sheet: CalamineSheet, where: str, private: bool) -> Iterator[Row]:
    """Yield the rows of a sheet; `private`: but those with a cell that cannot be read, such as a
    date beyond all years.

    Without a claim such a row is refused.
    """
    cells = sheet.iter_rows()
    for number in itertools.count(1):
        try:
            yield number, next(cells)
        except StopIteration:
            return
        except Exception as error:
            logger.warning("%s: row %d cannot be read: %s", where, number, error)
            if not private:
                raise DataError(
                    f"{where}: a cell in row {number} cannot be read ({plain(error)}); correct it"
                ) from error


def _count_filled(cells: Sequence[Any]) -> int:
    return sum(cell != "" for cell in cells)


def _above(rows: Sequence[Row], format: Format, private: bool) -> int:
    """Return how many rows are above the header: declared, or until one is more than a title."""
    if format.skip >= 0 or private:
        return max(0, format.skip)
    most = max((_count_filled(cells) for _, cells in rows), default=0)
    least = 2 if most > 2 else 1
    return next(
        (place for place, (_, cells) in enumerate(rows) if _count_filled(cells) >= least), 0
    )


def _without_empty_columns(rows: Sequence[Row]) -> list[Row]:
    """Return rows without the columns before and behind the table that hold nothing."""
    used = [
        place for place in range(len(rows[0][1])) if any(cells[place] != "" for _, cells in rows)
    ]
    return [(number, cells[used[0] : used[-1] + 1]) for number, cells in rows]


def _without_footer(records: list[Row], format: Format, private: bool, width: int) -> list[Row]:
    """Return records without the declared footer, or without lone cells below a blank row."""
    if format.footer >= 0 or private:
        return records[: len(records) - max(0, format.footer)]
    last = next(
        (p for p in range(len(records) - 1, 0, -1) if records[p][0] > records[p - 1][0] + 1), 0
    )
    footer = last and width > 2 and all(_count_filled(cells) == 1 for _, cells in records[last:])
    if footer:
        return records[:last]
    return records


def _check(
    records: Sequence[Row], names: Sequence[str], texts: Sequence[Sequence[str]], where: str
) -> None:
    """Refuse cells without a name above, times and durations, and a header among records."""
    again = [
        number
        for (number, _), cells in zip(records, texts, strict=True)
        if list(cells[: len(names)]) == names
    ]
    if again:
        raise DataError(
            f"{where}: row {some(again)} repeats the header: two exports pasted together? Delete "
            "the row."
        )

    for number, cells in records:
        if any(cell != "" for cell in cells[len(names) :]):
            place = next(p for p in range(len(names), len(cells)) if cells[p] != "")
            raise DataError(
                f"{where}: column {place + 1} has no name, and a cell in row {number}; name it, "
                "or empty it"
            )
        for name, cell in zip(names, cells, strict=False):
            if isinstance(cell, (datetime.time, datetime.timedelta)):
                what = "a time of day" if isinstance(cell, datetime.time) else "a duration"
                raise DataError(
                    f"{where}: column {name!r}, row {number} holds {what}, which is no feature; "
                    "write it as a number (hours, minutes), or take the column out"
                )


def _refuse_rounded(
    records: Sequence[Row], place: int, patient: str, where: str, private: bool
) -> None:
    rounded = [
        number
        for number, cells in records
        if isinstance(cells[place], float) and abs(cells[place]) >= _EXACT
    ]
    if rounded:
        rows = "some rows" if private else f"row {some(rounded)}"
        raise DataError(
            f"{where}: column {patient!r} holds numbers of 2^53 and more in {rows}, which a "
            "workbook has rounded, so that two patients may have become one. Write ids as text."
        )


def _text(cell: Any) -> str:
    """Return what a csv of the sheet would hold."""
    if isinstance(cell, float):
        if cell.is_integer() and abs(cell) < _EXACT:
            return str(int(cell))
        return repr(cell)
    if isinstance(cell, datetime.datetime):
        midnight = cell.time() == datetime.time()
        if midnight:
            return cell.date().isoformat()
        return cell.isoformat(sep=" ")
    if isinstance(cell, datetime.date):
        return cell.isoformat()
    return str(cell)


# statistics packages ------------------------------------------------------------------------------

_FORMAT = re.compile(r"%?-?[A-Z]+")
_TIMES = {"TIME", "DTIME", "MTIME", "HHMM", "TOD", "MMSS", "HOUR"}
_DATES = {
    # formats: seconds in a unit, and the day from which it is counted
    (".sav", ".zsav"): (("DATE", "ADATE", "EDATE", "JDATE", "SDATE"), 1.0, "1582-10-14"),
    (".dta",): (("%TD", "%D"), 86_400.0, "1960-01-01"),
    (".sas7bdat", ".xpt"): (
        ("DATE", "DDMMYY", "MMDDYY", "YYMMDD", "JULIAN", "E"),
        86_400.0,
        "1960-01-01",
    ),
}
_MOMENTS = {
    (".sav", ".zsav"): (("DATETIME", "YMDHMS"), 1.0, "1582-10-14"),
    (".dta",): (("%TC",), 0.001, "1960-01-01"),
    (".sas7bdat", ".xpt"): (("DATETIME", "DATEAMPM"), 1.0, "1960-01-01"),
}


def statistics(path: Path, format: Format, where: str) -> pd.DataFrame:
    """Return the records of an SPSS, Stata or SAS file, rows numbered from 2; dates are ISO 8601.

    Raises DataError for columns that are declared, in the file, to hold times or durations.
    """
    frame, known = _read(
        path, format, apply_value_formats=format.labels == "labels", formats_as_category=False
    )
    kinds = {
        name: _FORMAT.match((kind or "").upper())
        for name, kind in known.original_variable_types.items()
    }
    times = [name for name, kind in kinds.items() if kind and kind.group() in _TIMES]
    if times:
        raise DataError(
            f"{where}: times or durations in column {', '.join(map(repr, times))}; write "
            "numbers, or take them out"
        )

    columns = {
        str(name): _plain(frame[name], kinds.get(name), path.suffix.lower())
        for name in frame.columns
    }
    plain = pd.DataFrame(columns).set_axis(pd.RangeIndex(2, len(frame) + 2), axis=0)
    return plain.set_axis(pd.Index(names_of(list(columns), where)), axis=1)


def names(path: Path, format: Format) -> list[str]:
    """Return the columns of an SPSS, Stata or SAS file, of which no row is read."""
    _, known = _read(path, format, metadataonly=True)
    return names_of(known.column_names, f"data.table={str(path)!r}")


def _read(path: Path, format: Format, **options: Any) -> tuple[pd.DataFrame, Any]:
    """Read a file; dates stay numbers, as one beyond all years would stop the reading."""
    kind = path.suffix.lower()
    if kind in (".sas7bdat", ".xpt"):  # a SAS file's labels lie in another
        options = {"metadataonly": True} if "metadataonly" in options else {}
    if format.encoding != "auto" and kind != ".xpt":
        options["encoding"] = format.encoding
    return _READERS[kind](str(path), disable_datetime_conversion=True, **options)


def _plain(values: pd.Series, kind: re.Match[str] | None, suffix: str) -> pd.Series:
    """Return a column whose dates are texts, and whose texts are in one Unicode form."""
    for table, day in ((_MOMENTS, False), (_DATES, True)):
        for suffixes, (formats, seconds, since) in table.items():
            found = kind.group() if kind else ""
            if suffix == ".dta":  # %tcHH:MM is a %tc
                found = found[:3]
            if suffix in suffixes and found in formats and pd.api.types.is_numeric_dtype(values):
                return _dates(values, seconds, since, day)
    if pd.api.types.is_numeric_dtype(values):
        return values
    texts = pd.Series(
        [cell if isinstance(cell, str) else None for cell in values], values.index, dtype=object
    )
    formed = numerals.one_form(
        pa.chunked_array([pa.array(texts, pa.string(), from_pandas=True)])
    ).to_pylist()
    cells = [cell if text is None else text for cell, text in zip(values, formed, strict=True)]
    return pd.Series(cells, values.index, dtype=object)


def _dates(values: pd.Series, seconds: float, since: str, day: bool) -> pd.Series:
    """Return dates as texts, where not a `day` alone with their time; a number beyond all years
    stays a number's.
    """
    number = values.to_numpy(dtype=np.float64) * seconds + np.datetime64(since, "s").astype(
        np.int64
    )
    first, last = (np.datetime64(day, "s").astype(np.int64) for day in ("0001-01-01", "9999-12-31"))
    known = (number >= first) & (number <= last)
    moment = np.where(known, number, 0).round().astype("datetime64[s]")
    whole = day | (moment == moment.astype("datetime64[D]"))
    days = moment.astype("datetime64[D]").astype(str)
    full = np.char.replace(moment.astype(str), "T", " ")
    texts = np.where(whole, days, full).astype(object)
    odd = ~known & ~np.isnan(number)
    texts[~known] = None
    texts[odd] = [str(value) for value in values.to_numpy()[odd]]
    return pd.Series(texts, values.index, dtype=object)
