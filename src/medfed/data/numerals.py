"""How numbers are spelt in a text table: decimal points or commas, and what parts thousands.

`1,5` is a decimal comma and `1,234,567` is not; `1,234` alone may be either. A whole file, and all
files of a study, are looked at, cell by cell; what no cell decides is asked for. Cells that are
numbers are then spelt with a point, so that `tables.clean` sees the same whatever the export; all
other cells stay as they are.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from unicodedata import normalize

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from medfed.core.checks import DataError
from medfed.data.layout import lines_to_choose
from medfed.study import Format

BLANKS = " \u00a0\u2009\u202f"
APOSTROPHES = "'\u2019"
_MARK = {" ": f"[{BLANKS}]", "'": f"[{APOSTROPHES}]", ".": r"\.", ",": ","}
_EXPONENT = r"(?:[eE][+-]?\d+)?"


@dataclass(frozen=True)
class Spelling:
    """A kind of cell, and what it says: the decimal sign,
    what parts thousands; "" where it says nothing of it.
    """

    pattern: str
    decimal: str = ""
    thousands: str = ""


def _spellings() -> Iterable[Spelling]:
    """Yield the kinds of cells that decide something; one cell is of one kind."""
    for sign, other in ((",", "."), (".", ",")):
        d = _MARK[sign]
        t = _MARK[other]
        # 1,5 and 0,123 and 1234,567: no group of three behind one to three digits
        no_group = (
            rf"(?:0\d*{d}\d+|[1-9]\d{{0,2}}{d}(?:\d{{1,2}}|\d{{4,}})|[1-9]\d{{3,}}{d}\d+|{d}\d+)"
        )
        yield Spelling(rf"^[+-]?{no_group}{_EXPONENT}$", sign)
        yield Spelling(rf"^[+-]?[1-9]\d{{0,2}}(?:{t}\d{{3}})+{d}\d+$", sign, other)  # 1.234,5
        yield Spelling(rf"^[+-]?[1-9]\d{{0,2}}(?:{t}\d{{3}}){{2,}}$", "", other)  # 1.234.567
        for mark in (" ", "'"):
            # 1 234,5
            yield Spelling(rf"^[+-]?[1-9]\d{{0,2}}(?:{_MARK[mark]}\d{{3}})+{d}\d+$", sign, mark)
    for mark in (" ", "'"):
        yield Spelling(rf"^[+-]?[1-9]\d{{0,2}}(?:{_MARK[mark]}\d{{3}})+$", "", mark)  # 1 234


SPELLINGS = tuple(_spellings())
_EITHER = {sign: rf"^[+-]?[1-9]\d{{0,2}}{_MARK[sign]}\d{{3}}$" for sign in ",."}  # 1,234
_PLAIN = rf"^[+-]?\d+{_EXPONENT}$"


@dataclass(frozen=True)
class CellEvidence:
    """Where a kind of cell was met: the file, the column, the row and the cell, of which none
    leaves under a claim.
    """

    decimal: str
    thousands: str
    place: str
    either: str = ""  # the sign of a cell that may be either


def evidence(
    table: pa.Table, names: Sequence[str], rows: pd.Index, file: str, points: bool
) -> list[CellEvidence]:
    """Return what the cells of a table say, the first of each kind in each column.

    A column counts where at least half of its cells that hold anything may be numbers. `points`:
    also look at columns in which nothing but a point is met.
    """
    found: list[CellEvidence] = []
    for place, name in enumerate(names):
        column = table.column(place)
        if _may_be_parted(column, points):
            found += _of_column(pc.utf8_trim_whitespace(column), name, rows, file)
    return found


def _of_column(text_N: pa.ChunkedArray, name: str, rows: pd.Index, file: str) -> list[CellEvidence]:
    found = list[CellEvidence]()
    numbers = _count(text_N, _PLAIN)
    kinds = [(s.pattern, s.decimal, s.thousands, "") for s in SPELLINGS]
    kinds += [(pattern, "", "", sign) for sign, pattern in _EITHER.items()]
    for pattern, decimal, thousands, either in kinds:
        which_N = pc.match_substring_regex(text_N, pattern)
        many = pc.sum(which_N).as_py() or 0
        if many:
            at = pc.index(which_N, True).as_py()
            place = f"{text_N[at].as_py()!r} in {file}, column {name!r}, row {rows[at]}"
            found.append(CellEvidence(decimal, thousands, place, either))
        numbers += many
    filled = len(text_N) - (pc.sum(pc.equal(text_N, "")).as_py() or 0) - text_N.null_count
    if 2 * numbers >= filled:
        return found
    return []


def _count(text_N: pa.ChunkedArray, pattern: str) -> int:
    return pc.sum(pc.match_substring_regex(text_N, pattern)).as_py() or 0


def _may_be_parted(column: pa.ChunkedArray, points: bool) -> bool:
    """Say whether a column's bytes hold a sign that may part a number, besides a point."""
    return any(_holds(chunk, points) for chunk in column.chunks)


def _holds(chunk: pa.Array, points: bool) -> bool:
    bytes_N = characters(chunk)
    signs = (ord(","), ord("'"), ord(" "), *((ord("."),) if points else ()))
    return any(bool((bytes_N == sign).any()) for sign in signs) or bool((bytes_N >= 0x80).any())


def characters(chunk: pa.Array) -> np.ndarray:
    """Return the bytes of a chunk of texts, uint8, end to end."""
    _, offsets, data = chunk.buffers()
    if data is None:
        return np.zeros(0, dtype=np.uint8)
    kind = np.int64 if pa.types.is_large_string(chunk.type) else np.int32
    ends = np.frombuffer(offsets, dtype=kind)[chunk.offset : chunk.offset + len(chunk) + 1]
    return np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[-1]]


def decide(
    found: Sequence[CellEvidence], format: Format, separator: str, where: str
) -> tuple[str, str, dict[str, str]]:
    """Return the decimal sign, what parts thousands, and why, by key, where the study does not say.

    Args:
        found: what cells say, of all files.
        format: what the study says; "auto" leaves it to the cells.
        separator: between cells; a comma there is hardly a decimal sign.
        where: the table, for errors.

    Raises:
        DataError: cells contradict each other, or may be read in two ways.
    """
    guessed: dict[str, str] = {}
    decimal = _decimal(found, format, separator, where, guessed)
    if format.thousands != "auto":
        return decimal, format.thousands, guessed

    parted = {e.thousands: e.place for e in reversed(found) if e.thousands}
    parted |= {e.either: e.place for e in reversed(found) if e.either and e.either != decimal}
    if format.decimal != "auto":
        parted.pop(decimal, None)
    if decimal in parted or len(parted) > 1:
        places = "; ".join(parted.values())
        raise DataError(
            f"{where}: thousands are parted in several ways, or as decimals are ({decimal!r}): "
            f"{places}. Correct the cells. "
            f"{lines_to_choose('thousands', [*(m for m in parted if m != decimal), 'none'])}"
        )
    if not parted:
        return decimal, "none", guessed
    ((thousands, place),) = parted.items()
    guessed["thousands"] = place
    return decimal, thousands, guessed


_OTHER = {",": ".", ".": ","}
"""Which of comma and point is the decimal sign where the other parts thousands."""


def _decimal(
    found: Sequence[CellEvidence],
    format: Format,
    separator: str,
    where: str,
    guessed: dict[str, str],
) -> str:
    """Return the decimal sign; why goes into `guessed` where it is a guess."""
    if format.decimal != "auto":
        return format.decimal

    # Cells that say it: one decimal sign, or one mark of thousands, which leaves the other sign.
    signs = {e.decimal: e.place for e in reversed(found) if e.decimal}
    if len(signs) > 1:
        raise DataError(
            f"{where}: decimal commas and decimal points: {signs[',']}; {signs['.']}. "
            f"{lines_to_choose('decimal', ',.')}; cells of the other kind are then read as they "
            "stand."
        )
    for sign, place in signs.items():
        if sign == ",":
            guessed["decimal"] = place
        return sign
    parted = {e.thousands: e.place for e in reversed(found) if e.thousands in (",", ".")}
    if len(parted) == 1:  # 1.234.567 leaves the comma
        ((mark, place),) = parted.items()
        guessed["decimal"] = place
        return _OTHER[mark]

    # Cells that may be read in two ways:
    # by what is declared of thousands, else a person has to say.
    either = {e.either: e.place for e in reversed(found) if e.either}
    if format.thousands in either:
        return _OTHER.get(format.thousands, ".")
    asked = either.get(",")
    if not asked and separator != ",":
        asked = either.get(".")
    if asked:
        raise DataError(
            f"{where}: {asked} may be a decimal or thousands, and no other cell says which. "
            f"{lines_to_choose('decimal', ',.')}"
        )
    return "."


def with_points(column: pa.ChunkedArray, decimal: str, thousands: str) -> pa.ChunkedArray:
    """Return a column of texts whose cells that are numbers in this spelling have a decimal point,
    and nothing else.
    """
    if decimal == "." and thousands == "none":
        return column
    groups = ""
    if thousands != "none":
        groups = rf"[1-9]\d{{0,2}}(?:{_MARK[thousands]}\d{{3}})+|"
    d = _MARK[decimal]
    number = rf"^[+-]?(?:(?:{groups}\d+)(?:{d}\d*)?|{d}\d+){_EXPONENT}$"
    marks = ""
    if decimal != ".":
        marks += decimal
    if thousands != "none":
        marks += thousands
    chunks = [
        _respell_chunk(chunk, number, decimal, thousands) if _any(chunk, marks) else chunk
        for chunk in column.chunks
    ]

    return pa.chunked_array(chunks, column.type)


FORMS = {
    f"1{'' if thousands == 'none' else thousands + '234'}{decimal}5": (decimal, thousands)
    for decimal, marks in ((",", ("none", ".", " ", "'")), (".", (",", " ", "'")))
    for thousands in marks
}
"""How an entry of the dictionary says that its column spells numbers:
decimal sign, and what parts thousands.
"""


def set_points(texts: Sequence[str | None], form: str) -> list[str | None]:
    """Return texts, of which those that are numbers in a form of FORMS have a decimal point."""
    column = pa.chunked_array([pa.array(texts, pa.string())])
    found: list[str | None] = with_points(column, *FORMS[form]).to_pylist()
    return found


def form_of(texts: Iterable[str]) -> str | None:
    """Return the form of FORMS in which most texts are numbers, though they are none as they stand.

    None where they are not; "" where they may be read in two ways.
    """
    given = list(texts)
    found = _of_column(
        pa.chunked_array([pa.array(given, pa.string())]), "", pd.RangeIndex(len(given)), ""
    )
    if not any(e.thousands or "," in (e.decimal, e.either) for e in found):
        return None
    decimals = {e.decimal for e in found} - {""}
    parted = {e.thousands for e in found} - {""}
    either = {e.either for e in found} - {""} - parted
    if len(decimals) == 1:
        either -= decimals
    if either:
        return ""  # beside 4,5 a workbook's cell of the number 1.234 is no thousand
    both = len(decimals) > 1 and not parted
    try:
        # a workbook's number cells have points
        signs = (",", "none") if both else decide(found, Format(), ";", "")[:2]
    except DataError:
        return ""
    form = next(form for form, known in FORMS.items() if known == signs)
    changed = sum(new != old for new, old in zip(set_points(given, form), given, strict=True))
    if changed * 2 > len(given):
        return form
    return None


def _any(chunk: pa.Array, marks: str) -> bool:
    """Say whether a chunk holds any of the marks; a blank or apostrophe may be several bytes."""
    bytes_N = characters(chunk)
    several = any(mark in " '" for mark in marks)
    return any(bool((bytes_N == ord(mark)).any()) for mark in marks) or (
        several and bool((bytes_N >= 0x80).any())
    )


def _respell_chunk(chunk: pa.Array, number: str, decimal: str, thousands: str) -> pa.Array:
    text_N = pc.utf8_trim_whitespace(chunk)
    which_N = pc.match_substring_regex(text_N, number)
    if thousands != "none":
        text_N = pc.replace_substring_regex(text_N, _MARK[thousands], "")
    if decimal != ".":
        text_N = pc.replace_substring(text_N, decimal, ".")
    return pc.if_else(which_N, text_N, chunk)


def one_form(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of texts in one Unicode form, NFC: a letter and its accent are one sign."""
    chunks = [
        _normal(chunk) if (characters(chunk) >= 0x80).any() else chunk for chunk in column.chunks
    ]
    return pa.chunked_array(chunks, column.type)


def _normal(chunk: pa.Array) -> pa.Array:
    try:
        return pc.utf8_normalize(chunk, "NFC")
    except pa.ArrowInvalid:  # bytes that are no UTF-8 become a mark of their own cell
        cells = chunk.view(
            pa.large_binary() if pa.types.is_large_string(chunk.type) else pa.binary()
        ).to_pylist()
        texts = [
            None if cell is None else normalize("NFC", cell.decode("utf-8", "replace"))
            for cell in cells
        ]
        return pa.array(texts, chunk.type)


def respell(
    frame: pd.DataFrame,
    spell: Callable[[pa.ChunkedArray], pa.ChunkedArray],
    keep: Collection[str] = (),
) -> pd.DataFrame:
    """Return a frame of texts whose columns but those to `keep` are spelt anew."""
    columns: dict[str, pd.Series] = {}
    for name in frame.columns:
        if name in keep or not len(frame):
            continue
        before = pa.chunked_array([pa.array(frame[name], pa.string())])
        after = spell(before)
        if not after.equals(before):
            columns[name] = pd.Series(after.to_pylist(), frame.index, frame[name].dtype)
    if columns:
        return frame.assign(**columns)
    return frame
