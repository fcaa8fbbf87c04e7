"""A text table read line by line: no line can change another, or stop the reading.

In a table read as a whole, one open quote swallows the rows behind it, and one separator too many
ends the run: both tell of one patient. Here a line is a record or none. Its quotes must be even in
number and its fields as many as the header's; so a cell with a line break in it is no record, in
none of its lines. How the file is written is read off its header alone (`layout.of_header`).
"""

import codecs
import csv
import io
import itertools
from pathlib import Path
from typing import IO

import pandas as pd

from medfed.data import layout as layouts
from medfed.data import numerals
from medfed.data.layout import TextLayout, names_of, of_header
from medfed.study import Format

Header = tuple[TextLayout, list[str]]
"""How a file is written, and the cells of its header, as `of_header` has them."""


def read(
    path: Path,
    format: Format = Format(),  # noqa: B008
    header: Header | None = None,
) -> tuple[pd.DataFrame, list[int]]:
    """Return the records as texts, the index holding each one's line (the header is 1), and the
    lines that are none.

    A byte that the encoding does not know becomes a mark of its own cell. `header`: where it is
    read already. Raises DataError for a header that names no column.
    """
    where = f"data.table={str(path)!r}"
    layout, cells = header or of_header(path, format, where)
    names = names_of(cells, where)
    with _open(path, format, layout) as file:
        rows, numbers, broken = _records(file, layout, cells)
    frame = pd.DataFrame(
        rows, index=pd.Index(numbers, dtype="int64"), columns=range(len(cells)), dtype=object
    )
    frame = frame.iloc[:, : len(names)].set_axis(pd.Index(names), axis=1)

    return numerals.respell(frame, numerals.one_form), broken


def header(path: Path, format: Format = Format()) -> list[str]:  # noqa: B008
    """Return the names of the columns; no record is read."""
    where = f"data.table={str(path)!r}"
    return names_of(of_header(path, format, where)[1], where)


def _open(path: Path, format: Format, layout: TextLayout) -> IO[str]:
    if layout.encoding == "utf-16":
        with layouts.open_bytes(path, format) as file:
            return io.StringIO(_lines_of_pairs(file.read()))
    return layouts.text_of(path, format, layout, errors="replace", newline=None)


def _lines_of_pairs(content: bytes) -> str:
    """Decode UTF-16 line by line, so that a stray byte shifts the pairs of its own line alone."""
    little = not content.startswith(codecs.BOM_UTF16_BE)
    marked = content[:2] in (codecs.BOM_UTF16_BE, codecs.BOM_UTF16_LE)
    codec, ending = ("utf-16-le", b"\n\0") if little else ("utf-16-be", b"\0\n")
    lines = content[2 * marked :].split(ending)
    return "\n".join(line.decode(codec, errors="replace").rstrip("\r") for line in lines)


def _records(
    file: IO[str], layout: TextLayout, header: list[str]
) -> tuple[list[list[str]], list[int], list[int]]:
    """Return the records below the header, their lines, and the lines that are none."""
    rows = list[list[str]]()
    numbers = list[int]()
    broken = list[int]()
    lines = layouts.without_last(itertools.islice(file, layout.skip + 1, None), layout.footer)

    for number, line in enumerate(lines, layout.skip + 2):
        cells = _cells(line, layout.separator)
        if not any(cells):  # a blank line is a row of the file, but no record
            continue
        if len(cells) != len(header) or line.count('"') % 2 or cells == header:
            broken.append(number)
            continue
        rows.append(cells)
        numbers.append(number)
    return rows, numbers, broken


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line.rstrip("\n")], delimiter=separator), [])
    except csv.Error:  # a field beyond the reader's limit
        return [line]
