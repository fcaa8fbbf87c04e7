"""Workbooks (Excel, OpenDocument) and the files of SPSS, Stata and SAS.

A workbook's cells become the texts that a csv of them would hold: whole numbers without a point, however large; dates
as ISO 8601; an error such as #N/A is an empty cell. Numbers of a statistics package stay numbers; what its user has
declared missing is missing.
"""

import datetime
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyreadstat
from python_calamine import CalamineWorkbook

from medfed.core.checks import DataError, nearest, some
from medfed.data import numerals
from medfed.data.layout import lines_to_choose, names_of
from medfed.study import Format

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


# workbooks ----------------------------------------------------------------------------------------------------------


def sheet(path: Path, format: Format, where: str, private: bool, patient: str) -> pd.DataFrame:
    """Return a sheet's records as texts, the index holding each one's row.

    `private`: nothing is guessed, and what a cell holds stops nothing but an id that was rounded. Raises DataError for
    a sheet that is not named, or no table.
    """
    book = CalamineWorkbook.from_path(str(path))
    name = _sheet_name(book, format, where, private)
    rows = list(enumerate(book.get_sheet_by_name(name).to_python(skip_empty_area=False), 1))
    rows = rows[_above(rows, format, private) :]
    if not rows or not _filled(rows[0][1]):
        raise DataError(f"{where}, sheet {name!r} has no header; name its columns in the first row")
    if not private:
        rows = _without_empty_columns(rows)
    (_, header), *records = rows
    names = names_of([_text(cell) for cell in header], where)
    records = _without_footer([row for row in records if _filled(row[1])], format, private, len(names))
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
    return numerals.respelt(frame, numerals.one_form)


def _sheet_name(book: CalamineWorkbook, format: Format, where: str, private: bool) -> str:
    names = book.sheet_names
    if format.sheet:
        if format.sheet not in names:
            raise DataError(f"data.format.sheet={format.sheet!r} is no sheet; {nearest(format.sheet, names)}")
        return format.sheet
    filled = names if private else [name for name in names if book.get_sheet_by_name(name).height]
    if len(filled) != 1:
        held = f"{len(filled)} sheets" if filled else "no sheet that holds anything"
        raise DataError(f"{where} has {held}; expected one. {lines_to_choose('sheet', filled[:8])}")
    return filled[0]


def _filled(cells: Sequence[Any]) -> int:
    return sum(cell != "" for cell in cells)


def _above(rows: Sequence[Row], format: Format, private: bool) -> int:
    """Return how many rows stand above the header: declared, or until one holds more than a title."""
    if format.skip >= 0 or private:
        return max(0, format.skip)
    most = max((_filled(cells) for _, cells in rows), default=0)
    least = 2 if most > 2 else 1
    return next((place for place, (_, cells) in enumerate(rows) if _filled(cells) >= least), 0)


def _without_empty_columns(rows: Sequence[Row]) -> list[Row]:
    """Return rows without the columns before and behind the table that hold nothing."""
    used = [place for place in range(len(rows[0][1])) if any(cells[place] != "" for _, cells in rows)]
    return [(number, cells[used[0] : used[-1] + 1]) for number, cells in rows]


def _without_footer(records: list[Row], format: Format, private: bool, width: int) -> list[Row]:
    """Return records without the declared footer, or without lone cells that stand below a blank row."""
    if format.footer >= 0 or private:
        return records[: len(records) - max(0, format.footer)]
    last = next((p for p in range(len(records) - 1, 0, -1) if records[p][0] > records[p - 1][0] + 1), 0)
    footer = last and width > 2 and all(_filled(cells) == 1 for _, cells in records[last:])
    return records[:last] if footer else records


def _check(records: Sequence[Row], names: Sequence[str], texts: Sequence[Sequence[str]], where: str) -> None:
    """Refuse cells without a name above them, times and durations, and a header among the records."""
    again = [number for (number, _), cells in zip(records, texts, strict=True) if list(cells[: len(names)]) == names]
    if again:
        raise DataError(f"{where}: row {some(again)} repeats the header: two exports pasted together? Delete the row.")
    for number, cells in records:
        if any(cell != "" for cell in cells[len(names) :]):
            place = next(p for p in range(len(names), len(cells)) if cells[p] != "")
            raise DataError(
                f"{where}: column {place + 1} has no name, and a cell in row {number}; name it, or empty it"
            )
        for name, cell in zip(names, cells, strict=False):
            if isinstance(cell, (datetime.time, datetime.timedelta)):
                what = "a time of day" if isinstance(cell, datetime.time) else "a duration"
                raise DataError(
                    f"{where}: column {name!r}, row {number} holds {what}, which is no feature; write it as a number "
                    "(hours, minutes), or take the column out"
                )


def _refuse_rounded(records: Sequence[Row], place: int, patient: str, where: str, private: bool) -> None:
    rounded = [number for number, cells in records if isinstance(cells[place], float) and abs(cells[place]) >= _EXACT]
    if rounded:
        rows = "some rows" if private else f"row {some(rounded)}"
        raise DataError(
            f"{where}: column {patient!r} holds numbers of 2^53 and more in {rows}, which a workbook has rounded, so "
            "that two patients may have become one. Write ids as text."
        )


def _text(cell: Any) -> str:
    """Return what a csv of the sheet would hold."""
    if isinstance(cell, float):
        return str(int(cell)) if cell.is_integer() and abs(cell) < _EXACT else repr(cell)
    if isinstance(cell, datetime.datetime):
        midnight = cell.time() == datetime.time()
        return cell.date().isoformat() if midnight else cell.isoformat(sep=" ")
    if isinstance(cell, datetime.date):
        return cell.isoformat()
    return str(cell)


# statistics packages ------------------------------------------------------------------------------------------------


def statistics(path: Path, format: Format, where: str) -> pd.DataFrame:
    """Return the records of an SPSS, Stata or SAS file, rows numbered from 2.

    Raises DataError for a column of times or durations.
    """
    frame, _ = _read(path, format, apply_value_formats=format.labels == "labels", formats_as_category=False)
    frame = frame.set_axis(pd.RangeIndex(2, len(frame) + 2), axis=0)
    frame.columns = pd.Index(names_of([str(name) for name in frame.columns], where))
    if times := list(_times(frame)):
        raise DataError(
            f"{where}: times or durations in column {', '.join(map(repr, times))}; write numbers, or take them out"
        )
    texts = [name for name in frame.columns if pd.api.types.infer_dtype(frame[name], skipna=True) == "string"]
    return frame.assign(**{name: _one_form(frame[name]) for name in texts})


def names(path: Path, format: Format) -> list[str]:
    """Return the columns of an SPSS, Stata or SAS file, of which no row is read."""
    _, known = _read(path, format, metadataonly=True)
    return names_of(known.column_names, f"data.table={str(path)!r}")


def _read(path: Path, format: Format, **options: Any) -> tuple[pd.DataFrame, Any]:
    kind = path.suffix.lower()
    if kind == ".sas7bdat":
        options.pop("apply_value_formats", None)  # a SAS file's labels lie in another
        options.pop("formats_as_category", None)
    if kind == ".xpt":
        options = {"metadataonly": True} if "metadataonly" in options else {}
    encoding = None if format.encoding == "auto" or kind == ".xpt" else format.encoding
    found: tuple[pd.DataFrame, Any] = _READERS[kind](
        str(path), **options, **({"encoding": encoding} if encoding else {})
    )
    return found


def _times(frame: pd.DataFrame) -> Iterator[str]:
    for name in frame.columns:
        kind = pd.api.types.infer_dtype(frame[name], skipna=True)
        if kind in ("time", "timedelta", "timedelta64", "period"):
            yield name


def _one_form(values: pd.Series) -> pd.Series:
    texts = pa.chunked_array([pa.array(values, pa.string(), from_pandas=True)])
    return pd.Series(numerals.one_form(texts).to_pylist(), values.index, dtype=object)
