"""A text table read as a whole, without a claim: every cell a text, and a line that does not fit is
an error by its row.

pyarrow reads; it refuses rows of another length, where other readers fill a cut line with gaps.
What it does not say (which rows) a second, slow pass finds.
"""

import csv
import io
import itertools
import logging
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from medfed.core.checks import DataError, some
from medfed.data import layout as layouts
from medfed.data import numerals
from medfed.data.layout import TextLayout, names_of
from medfed.study import Format

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows

_BLOCK = 4 << 20  # bytes; a longer row needs a larger one
_LARGEST_BLOCK = 1 << 30


@dataclass(frozen=True)
class Text:
    """A text table: columns of texts, and each row's number in the file.
    Decimal signs are as they stand.
    """

    table: pa.Table
    names: list[str]
    row_N: pd.Index
    layout: TextLayout


def names(path: Path, format: Format, where: str) -> list[str]:
    """Return the names of the columns, from the file's first rows."""
    return names_of(layouts.guess(path, format, where)[1], where)


def read(path: Path, format: Format, where: str) -> Text:
    """Read a text table; raise DataError, by row, for what is none."""
    layout, header = layouts.guess(path, format, where)
    try:
        table = _parse(path, format, layout, len(header))
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error):
            layout, header = _foreign(path, format, where)
        elif layout.footer:
            raise
        else:
            layout = _with_footer(path, format, layout, len(header), where)
            if not layout.footer:
                raise
        table = _parse(path, format, layout, len(header))
    return _check(table, header, layout, where)


def _parse(
    path: Path, format: Format, layout: TextLayout, width: int, block: int = _BLOCK
) -> pa.Table:
    """Return the columns below the header as texts; a blank line is a row of empty cells."""
    columns = [str(place) for place in range(width)]
    reading = pacsv.ReadOptions(
        block_size=block,
        skip_rows=0 if layout.footer else layout.skip,
        skip_rows_after_names=1,
        column_names=columns,
        encoding="utf8" if layout.encoding == "utf-8" or layout.footer else layout.codec,
    )
    parsing = pacsv.ParseOptions(
        delimiter=layout.separator, newlines_in_values=_may_quote(path), ignore_empty_lines=False
    )
    texts = pacsv.ConvertOptions(
        column_types=dict.fromkeys(columns, pa.large_string()), strings_can_be_null=False
    )

    if layout.footer:
        file = _without_footer(path, format, layout)
    else:
        file = layouts.open_bytes(path, format)

    with file:
        try:
            return pacsv.read_csv(file, reading, parsing, texts)
        except pa.ArrowInvalid as error:
            if "Empty CSV" in str(error):
                return pa.table({name: pa.array([], pa.large_string()) for name in columns})
            if "straddling" not in str(error) or block >= _LARGEST_BLOCK:
                raise

    return _parse(path, format, layout, width, block * 16)


def _may_quote(path: Path) -> bool:
    """Say whether a file may hold a quote,
    without which every line is a row, and it is read in half the time.
    """
    if path.suffix.lower() in layouts.COMPRESSED or not path.stat().st_size:
        return True
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(b'"') >= 0


def _without_footer(path: Path, format: Format, layout: TextLayout) -> IO[bytes]:
    """Return the lines from the header to the last record, in UTF-8."""
    with layouts.text_of(path, format, layout) as text:
        kept = layouts.without_last(itertools.islice(text, layout.skip, None), layout.footer)
        return io.BytesIO("".join(kept).encode())


def _foreign(path: Path, format: Format, where: str) -> tuple[TextLayout, list[str]]:
    """Return the layout of a file whose first megabyte alone is UTF-8."""
    with layouts.open_bytes(path, format) as file:
        strange = [line for line in _byte_lines(file) if not line.isascii()]
    encoding, why = layouts.western(strange, where)
    layout, header = layouts.guess(path, format, where, encoding)
    return replace(layout, guessed={**layout.guessed, "encoding": why}), header


def _byte_lines(file: IO[bytes]) -> Iterator[bytes]:
    """Yield lines of a file that may know no lines itself."""
    rest = b""
    while block := file.read(_BLOCK):
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
    yield rest


def _with_footer(
    path: Path, format: Format, layout: TextLayout, width: int, where: str
) -> TextLayout:
    """Return the layout with the lines that stand,
    after a blank one, below the last record: a footer.

    Raises DataError for other rows that have more or fewer fields than the header.
    """
    odd: dict[int, int] = {}  # row -> its fields
    fits = 0
    blank = 0
    row = 0

    for row, cells in _rows(path, format, layout):
        if not any(cells) and len(cells) < 2:
            blank = row
        elif len(cells) == width:
            fits = row
        else:
            odd[row] = len(cells)

    if not odd:
        return layout
    if format.footer < 0 and fits < blank < min(odd):
        why = f"row {some(odd)} stands after a blank line and has other fields than the header"
        return replace(layout, footer=len(odd), guessed={**layout.guessed, "footer": why})

    raise DataError(_misfits(odd, fits, width, where))


def _rows(path: Path, format: Format, layout: TextLayout) -> Iterator[tuple[int, list[str]]]:
    """Yield each row below the header with its number."""
    with layouts.text_of(path, format, layout, "replace") as text:
        reader = csv.reader(itertools.islice(text, layout.skip, None), delimiter=layout.separator)
        next(reader, None)
        try:
            yield from enumerate(reader, layout.skip + 2)
        except csv.Error as error:
            logger.warning("%s: %s", path, error)


def _misfits(odd: Mapping[int, int], fits: int, width: int, where: str) -> str:
    """Say which rows do not fit the header, and the way out."""
    first = next(iter(odd))
    cannot = (
        f"{where} cannot be read: {width} columns are named, and in row {some(odd)} stand other "
        "fields"
    )
    counts = f"{cannot} (row {first}: {odd[first]})"
    if len(odd) > 1 and not fits and odd[first] > width:
        return (
            f"{counts}: rows have more fields than the header; name every column, or where the "
            "first N lines are titles put skip = N under [data.format]"
        )
    if first > fits:
        return (
            f"{counts}. A cut last line: export the table again, or delete the row. A footer: "
            f"put footer = {len(odd)} under [data.format]"
        )

    return (
        f"{counts}. Put quotes around a cell that holds a separator or a line break, or "
        "complete the row"
    )


# what is no record --------------------------------------------------------------------------------


def _check(table: pa.Table, header: Sequence[str], layout: TextLayout, where: str) -> Text:
    """Return a table without blank lines and unnamed last columns, in one Unicode form.

    Raises DataError for a filled cell without a name above it, a header that stands among the
    records, and a cell that has swallowed records.
    """
    names = names_of(header, where)
    row_N: pd.Index = pd.RangeIndex(layout.skip + 2, layout.skip + 2 + len(table))
    if blank := _alike(table, [""] * len(header)):
        keep_N = np.ones(len(table), dtype=bool)
        keep_N[blank] = False
        table = table.filter(pa.array(keep_N))
        row_N = row_N[keep_N]

    for place in range(len(names), len(header)):
        filled = pc.index(pc.not_equal(table.column(place), ""), True).as_py()
        if filled >= 0:
            raise DataError(
                f"{where}: column {place + 1} has no name, and a cell in row {row_N[filled]}; "
                "name it, or take it out"
            )
    table = table.select(range(len(names)))
    if again := _alike(table, header[: len(names)]):
        raise DataError(
            f"{where}: row {some(row_N[again])} repeats the header: two exports pasted together? "
            "Delete the row."
        )
    for place, name in enumerate(names):
        _refuse_swallowed(table.column(place), name, row_N, len(header), layout.separator, where)
    columns = [numerals.one_form(column) for column in table.columns]
    return Text(pa.table(columns, names=names), names, row_N, layout)


def _alike(table: pa.Table, cells: Sequence[str]) -> list[int]:
    """Return the places of rows that hold just these cells."""
    at = np.arange(0)
    for place, cell in enumerate(cells):
        column = table.column(place)
        if place == 0:
            at = np.flatnonzero(pc.equal(column, cell).to_numpy(zero_copy_only=False))
        elif len(at):
            at = at[pc.equal(column.take(pa.array(at)), cell).to_numpy(zero_copy_only=False)]
    found: list[int] = at.tolist()
    return found


def _refuse_swallowed(
    column: pa.ChunkedArray, name: str, row_N: pd.Index, width: int, separator: str, where: str
) -> None:
    """Refuse a cell of several lines that may be records: an open quote makes one cell of all up to
    the next quote.
    """
    if width < 2 or not any(
        (numerals.characters(chunk) == ord("\n")).any() for chunk in column.chunks
    ):
        return
    several = np.flatnonzero(pc.match_substring(column, "\n").to_numpy(zero_copy_only=False))
    for at in several.tolist():
        lines = column[at].as_py().split("\n")
        if any(line.count(separator) >= width - 1 for line in lines[1:]):
            raise DataError(
                f"{where}: a quote in row {row_N[at]}, column {name!r}, is not closed, and the "
                "rows behind it stand in one cell. Close it, or take it out."
            )
