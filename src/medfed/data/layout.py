"""How a text table is written:
its encoding, the lines above its header, the sign between its columns.

What a study declares (`data.format`) counts. Without a claim the rest follows from the first 1,000
rows; where two ways fit, the study is asked. Under a claim it follows from the mark at the file's
beginning and the header line alone, so that no record decides anything. How numbers are spelt is
the matter of `numerals`.
"""

import codecs
import csv
import io
import itertools
import re
import zipfile
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from unicodedata import normalize

import pyarrow as pa

from medfed.core import toml
from medfed.core.checks import DataError, nearest, some
from medfed.study import Format

SEPARATORS = (",", ";", "\t", "|")
COMPRESSED = (".gz", ".zst", ".zip")
BEGINNING = 1 << 20
ROWS = 1000
"""So many bytes of a file, and of them rows, are looked at where its layout is guessed."""

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_CODECS = {"utf-8": "utf-8-sig"}  # a mark that is there is no part of the first name

# Bytes that are a sign in cp1252 and are met in western tables: the euro, quotes, dashes, degrees,
# powers, fractions
_SIGNS = bytes(
    [
        0x80,
        *range(0x91, 0x95),
        0x96,
        0x97,
        0xA0,
        0xA7,
        0xAA,
        0xAB,
        0xAE,
        *range(0xB0, 0xB6),
        0xB7,
        0xBA,
    ]
)
_SIGNS += bytes([0xBB, 0xBC, 0xBD, 0xBE])
_LETTERS = bytes(byte for byte in range(0xC0, 0x100) if byte not in (0xD7, 0xF7))
_FOREIGN = re.compile(
    rb"[^\x00-\x7f\x92%(letters)b%(signs)b]|[A-Za-z%(letters)b][%(signs)b][A-Za-z%(letters)b]"
    % {b"letters": re.escape(_LETTERS), b"signs": re.escape(_SIGNS)}
)
"""What no western text in cp1252 holds: another byte, or a sign within a word."""


@dataclass(frozen=True)
class TextLayout:
    """How one text table is written; `guessed` says why,
    key by key, where neither study nor file says it.
    """

    separator: str = ","
    decimal: str = "."
    thousands: str = "none"
    encoding: str = "utf-8"
    skip: int = 0
    footer: int = 0
    guessed: Mapping[str, str] = field(default_factory=dict)

    @property
    def codec(self) -> str:
        """Return what Python calls the encoding."""
        return _CODECS.get(self.encoding, self.encoding)


def lines_to_choose(what: str, values: Sequence[object]) -> str:
    """Return the lines of study file among which a person has to choose."""
    choices = " or ".join(f"{what} = {toml.literal(value)}" for value in values)
    return f"Put one line under [data.format]: {choices}"


# opening ------------------------------------------------------------------------------------------


def open_bytes(path: Path, format: Format) -> IO[bytes]:
    """Open a text table's bytes, whatever it is packed in.

    Raises DataError for a zip archive that does not say which file is meant.
    """
    suffix = path.suffix.lower()
    if suffix == ".zip":
        return _member(path, format.member)
    packing = {".gz": "gzip", ".zst": "zstd"}.get(suffix)
    stream: IO[bytes] = pa.input_stream(str(path), compression=packing)
    return stream


def _member(path: Path, name: str) -> IO[bytes]:
    archive = zipfile.ZipFile(path)
    names = [n for n in archive.namelist() if not n.endswith("/") and not n.startswith("__MACOSX")]
    if name and name not in names:
        raise DataError(
            f"data.format.member={name!r} is no file in {path.name!r}; {nearest(name, names)}"
        )
    if not name and len(names) != 1:
        held = f"{len(names)} files" if names else "no file"
        raise DataError(
            f"data.table={str(path)!r} holds {held}; expected one. "
            f"{lines_to_choose('member', names[:5])}"
        )
    return archive.open(name or names[0])


def text_of(
    path: Path, format: Format, layout: TextLayout, errors: str = "strict", newline: str | None = ""
) -> IO[str]:
    """Open a text table as text."""
    return io.TextIOWrapper(
        open_bytes(path, format), encoding=layout.codec, errors=errors, newline=newline
    )


def without_last(lines: Iterable[str], footer: int) -> Iterator[str]:
    """Yield lines but the last so many that are not blank, and what stands between them."""
    held = deque[str]()
    filled = 0
    for line in lines:
        held.append(line)
        filled += bool(line.strip())
        while filled > footer:
            filled -= bool(held[0].strip())
            yield held.popleft()


# encoding -----------------------------------------------------------------------------------------


def encoding_of(start: bytes, format: Format, where: str) -> tuple[str, str]:
    """Return the encoding of a file that begins with `start`, and why, where it is a guess.

    Raises DataError where several fit.
    """
    for mark, name in _MARKS:
        if start.startswith(mark):
            return name, ""
    if format.encoding != "auto":
        return _check_declared(format, start), ""
    if b"\0" in start[:4096]:
        raise DataError(
            f"{where} holds bytes of zero: it is UTF-16 without a mark, or no text. If it is text, "
            'put encoding = "utf-16" under [data.format]'
        )
    if is_utf8(start):
        return ("utf-8", "")
    return western(start.splitlines(), where)


def is_utf8(start: bytes) -> bool:
    """Say whether bytes, which may end within a character, are UTF-8."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(start)
    except UnicodeDecodeError:
        return False
    return True


def western(lines: Sequence[bytes], where: str) -> tuple[str, str]:
    """Return cp1252, and why, for lines that are not all UTF-8:
    where every byte is what a western text holds.

    Raises DataError where one is not, and where other lines are UTF-8 with more than ASCII.
    """
    strange = [line for line in lines if not line.isascii()]
    other = [line for line in strange if not is_utf8(line)]
    encodings = ["cp1252", "cp1250", "cp850", "mac-roman", "iso8859-15"]

    if len(other) < len(strange):
        raise DataError(
            f"{where} is UTF-8 in some lines and not in others: two exports in one file? Write "
            f"it anew in one encoding. {lines_to_choose('encoding', ['utf-8', *encodings[:1]])}"
        )
    if not any(_FOREIGN.search(line) for line in other):
        return "cp1252", "bytes that are not UTF-8, and western letters in cp1252"
    raise DataError(
        f"{where} is not UTF-8, and its letters fit several encodings. "
        f"{lines_to_choose('encoding', encodings)}"
    )


# the whole layout ---------------------------------------------------------------------------------


def guess(
    path: Path, format: Format, where: str, encoding: str = ""
) -> tuple[TextLayout, list[str]]:
    """Return how a file is written, from its first rows,
    and the cells of its header; `encoding`: what is known.

    Raises DataError for a file without a header, and where two ways fit.
    """
    with open_bytes(path, format) as file:
        start = file.read(BEGINNING)
    why = ""
    if not encoding:
        encoding, why = encoding_of(start, format, where)
    text = _decode(start, TextLayout(encoding=encoding).codec)
    if not text.strip():
        raise DataError(
            f"{where} cannot be read: it has no header; name its columns in the first line"
        )
    guessed = {}
    if why:
        guessed["encoding"] = why

    ways = {s: _Way.of(text, s, format.skip) for s in SEPARATORS if format.separator in ("auto", s)}
    if format.separator == "auto":
        separator, why = _choose(ways, where)
        if why:
            guessed["separator"] = why
    else:
        separator = format.separator
    way = ways[separator]
    if format.skip < 0 and way.skip:
        guessed["skip"] = f"line {way.skip + 1} is the first that names {len(way.header)} columns"
    return TextLayout(
        separator, ".", "none", encoding, way.skip, max(0, format.footer), guessed
    ), way.header


def of_header(path: Path, format: Format, where: str) -> tuple[TextLayout, list[str]]:
    """Return how a file is written, by its mark and header line alone, and that line's cells.

    What `format` leaves open: a decimal point, nothing between thousands, no title lines, no
    footer. Raises DataError as `guess` does.
    """
    skip = max(0, format.skip)
    with open_bytes(path, format) as file:
        encoding = _read_mark(file.read(4), format)
    first = encoding or "utf-8"
    with text_of(
        path,
        format,
        TextLayout(encoding=first),
        "surrogateescape" if not encoding else "replace",
        None,
    ) as text:
        for _ in range(skip):
            text.readline()
        line = text.readline()
    if not encoding:
        raw = line.encode("utf-8", "surrogateescape")
        encoding, _ = encoding_of(raw, format, where)
        line = raw.decode(encoding, "replace")
    if not line.strip():
        raise DataError(
            f"{where} cannot be read: it has no header; name its columns in line {skip + 1}"
        )

    widths = {s: len(next(csv.reader([line], delimiter=s), [])) for s in SEPARATORS}
    fits = [s for s, width in widths.items() if width > 1] or [","]
    if format.separator != "auto":
        fits = [format.separator]
    if len(fits) > 1:
        raise DataError(
            f"{where}: its header can be parted in several ways. "
            f"{lines_to_choose('separator', fits)}"
        )
    if fits[0] != "," and format.decimal == "auto":
        raise DataError(
            f"{where}: columns parted by {fits[0]!r} often go with decimal commas, and under a "
            f"claim no cell is looked at to see. {lines_to_choose('decimal', ',.')}"
        )
    decimal = "." if format.decimal == "auto" else format.decimal
    thousands = "none" if format.thousands == "auto" else format.thousands
    layout = TextLayout(fits[0], decimal, thousands, encoding, skip, max(0, format.footer))
    return layout, next(csv.reader([line.rstrip("\r\n")], delimiter=fits[0]), [])


def _read_mark(start: bytes, format: Format) -> str:
    """Return the encoding that a file's mark or the study says, or nothing."""
    found = next((name for mark, name in _MARKS if start.startswith(mark)), "")
    return found or ("" if format.encoding == "auto" else _check_declared(format, start))


def _check_declared(format: Format, start: bytes) -> str:
    """Return the declared encoding of a file without a mark; of UTF-16, with the order that its
    first sign has.
    """
    if format.encoding != "utf-16":
        return format.encoding
    if start[:1] == b"\0":
        return "utf-16-be"
    return "utf-16-le"


def _decode(start: bytes, codec: str) -> str:
    """Return the text of a file's beginning, without what its end has cut."""
    return codecs.getincrementaldecoder(codec)(errors="replace").decode(start)


@dataclass(frozen=True)
class _Way:
    """What one separator makes of a file's beginning."""

    skip: int  # lines above the header
    header: list[str]
    share: float  # of the rows that have as many fields as the header

    @classmethod
    def of(cls, text: str, separator: str, skip: int) -> "_Way":
        """Part a text; `skip` is the declared number of title lines, or -1."""
        rows = list(itertools.islice(_rows(text, separator), ROWS))
        filled = [(line, cells) for line, cells in rows if any(cells)]
        if skip >= 0:
            below = [(line, cells) for line, cells in rows if line >= skip]
            line, header = below[0] if below else (skip, [])
        elif filled:
            width = Counter(len(cells) for _, cells in filled).most_common(1)[0][0]
            line, header = _header(filled, width)
        else:
            line, header = 0, []
        records = [cells for n, cells in filled if n >= line]
        share = sum(len(cells) == len(header) for cells in records) / max(1, len(records))
        return cls(line, header, share)


def _rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows of a text, and before how many lines each begins;
    a last one that may be cut is left out.
    """
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    cut = len(text) >= BEGINNING // 4
    began = 0
    before = None
    try:
        for cells in reader:
            if before is not None:
                yield before
            before = (began, cells)
            began = reader.line_num
    except csv.Error:  # a field beyond the reader's limit: what comes before it is enough
        pass
    if before is not None and (not cut or before[0] == 0):
        yield before


def _header(filled: Sequence[tuple[int, list[str]]], width: int) -> tuple[int, list[str]]:
    """Return the header among rows: below lines of fewer than half its cells, and without a number;
    else the first.
    """
    for line, cells in filled:
        several = sum(map(bool, cells))
        if len(cells) == width and 2 * several > width:
            if line and any(map(_NUMBER.fullmatch, cells)):
                return filled[0]
            return (line, cells)
        if 2 * several >= width:
            break
    return filled[0]


_NUMBER = re.compile(r"\s*[+-]?[\d.,]*\d[\d.,]*\s*")


def _choose(ways: Mapping[str, _Way], where: str) -> tuple[str, str]:
    """Return the separator that leaves the fewest lines above the header,
    then the fewest odd rows, and why.
    """
    several = {separator: way for separator, way in ways.items() if len(way.header) > 1}
    if not several:
        return ",", ""
    order = sorted(several, key=lambda s: (several[s].skip, -several[s].share))
    first, *others = [
        s for s in order if (several[s].skip, several[s].share) == _rank(several[order[0]])
    ]

    if others:
        fits = some([f"{s!r} gives {len(several[s].header)} columns" for s in (first, *others)])
        raise DataError(
            f"{where} can be parted in several ways: {fits}. "
            f"{lines_to_choose('separator', [first, *others])}"
        )

    return (
        first,
        f"it parts the header and {several[first].share:.0%} of the first rows into "
        f"{len(several[first].header)}",
    )


def _rank(way: _Way) -> tuple[int, float]:
    return way.skip, way.share


# names --------------------------------------------------------------------------------------------


def names_of(cells: Sequence[str], where: str) -> list[str]:
    """Return the names of columns in one Unicode form, without the empty ones at the end.

    Raises DataError for a header that leaves a column unnamed or names two alike, by their places.
    """
    names = [normalize("NFC", cell) for cell in cells]
    while names and not names[-1].strip():
        names.pop()
    if not names:
        raise DataError(
            f"{where} cannot be read: it has no header; name its columns in the first line"
        )
    if not names[0].strip():
        raise DataError(
            f"{where}: the first header is empty: an index written by pandas? Write the table "
            "with index=False, or give the column a name."
        )

    unnamed = [str(place) for place, name in enumerate(names, 1) if not name.strip()]
    if unnamed:
        raise DataError(
            f"{where}: no name in the header of column {some(unnamed)}; name it, or take the "
            "column out"
        )

    places: dict[str, list[int]] = {}
    for place, name in enumerate(names, 1):
        places.setdefault(name, []).append(place)

    twice = {name: at for name, at in places.items() if len(at) > 1}
    if twice:
        told = "; ".join(
            f"{name!r} in columns {' and '.join(map(str, at))}" for name, at in twice.items()
        )
        raise DataError(
            f"{where}: one name for several columns: {told}. Rename or take out all but one."
        )

    return names
