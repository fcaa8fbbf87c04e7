"""A csv read line by line: what one line says can neither change another nor stop the reading.

In a csv read as a whole, one open quote swallows the rows behind it, and one comma too many ends the run: both tell of
one patient. Here a line is a record or none. Its quotes must be even in number and its fields as many as the header's;
so a cell with a line break in it is no record, in none of its lines.
"""

import csv
import gzip
import io
from pathlib import Path
from typing import IO

import pandas as pd

from medfed.core.checks import DataError


def read(path: Path) -> tuple[pd.DataFrame, list[int]]:
    """Return the records as texts, the index holding each one's line (the header is 1), and the lines that are none.

    A byte that is no UTF-8 becomes a mark of its own cell. Raises DataError for a header that names no column.
    """
    with _opened(path) as file:
        columns = _columns(path, file.readline())
        rows, numbers, broken = list[list[str]](), list[int](), list[int]()

        for number, line in enumerate(file, 2):
            cells = _cells(line)
            if not any(cells):  # a blank line is a row of the file, but no record
                continue
            if len(cells) != len(columns) or line.count('"') % 2:
                broken.append(number)
                continue
            rows.append(cells)
            numbers.append(number)

    frame = pd.DataFrame(rows, index=pd.Index(numbers, dtype="int64"), columns=columns, dtype=object)
    return frame, broken


def header(path: Path) -> pd.Index:
    """Return the names of the columns; no record is read."""
    with _opened(path) as file:
        return _columns(path, file.readline())


def _opened(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig", errors="replace")
    return path.open(encoding="utf-8-sig", errors="replace")


def _columns(path: Path, header: str) -> pd.Index:
    if not header.strip():
        raise DataError(f"data.table={str(path)!r} has no header; name its columns in the first line")
    return pd.read_csv(io.StringIO(header), nrows=0, dtype=str).columns  # doubled names as everywhere


def _cells(line: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\n")]), [])
    except csv.Error:  # a field beyond the reader's limit
        return [line]
