"""Tables as hospitals have them: which reader takes a file, and one frame of whatever there is.

Text tables (`texts`, under a claim `line_reader`), workbooks and the files of statistics packages
(`workbooks`), parquet (`columnar`), folders of files, tables that are joined. Cells of text tables
and workbooks stay texts, in one Unicode form and with decimal points. Row numbers are those of the
file, its header being row 1; in a folder the file stands before them. How a file is written is
guessed alike for all files of a study (`layout`, `numerals`), or asked for.
"""

import glob
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import normalize

import pandas as pd
import pyarrow as pa

from medfed.core.checks import DataError, MedfedError, nearest, plain, some
from medfed.core.refusals import Refusal, refuse
from medfed.data import columnar, line_reader, numerals, texts, workbooks
from medfed.data.layout import COMPRESSED, TextLayout, lines_to_choose, of_header
from medfed.data.texts import Text
from medfed.study import Data

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows

TEXTS = (".csv", ".tsv", ".txt")
KINDS = (*TEXTS, ".parquet", *workbooks.SHEETS, *workbooks.STATISTICS)
SITE = "its file's name"
"""The column that names the site where `data.site_is_file` is set."""


@dataclass(frozen=True)
class Reading:
    """A table as read: its rows; how its text files are written, by file; rows that a joined table
    lacks, by table.

    Which these are tells of patients: under a claim it stays at the site.
    """

    frame: pd.DataFrame
    layouts: Mapping[str, TextLayout] = field(default_factory=dict)
    unfound: Mapping[str, pd.Index] = field(default_factory=dict)

    @property
    def unmatched(self) -> dict[str, int]:
        """How many rows each joined table lacks."""
        return {table: len(rows) for table, rows in self.unfound.items()}


def read(path: Path, data: Data, private: bool) -> Reading:
    """Read a file, a folder or a pattern of files; see the module. Joined tables are not looked at.

    Raises DataError for what cannot be read; `private`: quoting no cell, and following from no row.
    """
    files = files_of(path, data)
    frames, layouts = _frames(files, data, private, f"data.table={str(path)!r}")
    alike = [
        (frame, file)
        for frame, file in zip(frames, files, strict=True)
        if not _is_mapped(file, data)
    ]

    if alike:
        first, whose = alike[0]
        refuse(
            _other_columns(
                {file: list(frame.columns) for frame, file in alike}, list(first.columns), whose
            )
        )

    if len(files) > 1 or data.site_is_file:
        frames = [_name_rows(frame, file, data) for frame, file in zip(frames, files, strict=True)]
    frame = frames[0] if len(frames) == 1 else pd.concat(frames)
    if frame.empty and not private:
        raise DataError(
            f"data.table={str(path)!r} has no row beside its header; give a table with records"
        )

    return Reading(frame, layouts)


def _frames(
    files: Sequence[Path], data: Data, private: bool, where: str
) -> tuple[list[pd.DataFrame], dict[str, TextLayout]]:
    """Return each file's rows, and how text files are written: judged together without a claim."""
    if private:
        headers = {file: _read_layout(file, data) for file in files if kind_of(file) in TEXTS}
        frames = [_read(file, data, private, headers.get(file)) for file in files]
        return frames, {file.name: layout for file, (layout, _) in headers.items()}

    written: dict[Path, Text] = {}
    for file in files:
        if kind_of(file) in TEXTS:
            with reading(f"data.table={str(file)!r}", private):
                written[file] = texts.read(file, data.format, f"data.table={str(file)!r}")

    spelling = _spelling(written, data, where) if written else TextLayout()
    layouts = {
        file.name: replace(
            text.layout,
            decimal=spelling.decimal,
            thousands=spelling.thousands,
            guessed={**text.layout.guessed, **spelling.guessed},
        )
        for file, text in written.items()
    }
    frames = []
    for file in files:
        if file in written:
            frames.append(_respell(written.pop(file), spelling, data))
        else:
            frames.append(_read(file, data, private))

    return frames, layouts


def header(path: Path, data: Data, private: bool) -> list[str]:
    """Return the columns of a table, of which no row is read. Raises DataError as `read` does."""
    files = files_of(path, data)
    names = {file: _header(file, data, private) for file in files}
    alike = {file: found for file, found in names.items() if not _is_mapped(file, data)}
    if alike:
        whose, first = next(iter(alike.items()))
        refuse(_other_columns(alike, first, whose))
    every = dict.fromkeys(name for found in names.values() for name in found)
    return [*every, *([SITE] if data.site_is_file else [])]


# which files --------------------------------------------------------------------------------------


def kind_of(path: Path) -> str:
    """Return the suffix that says what a file is,
    in lower case and without that of its packing; "" for none.
    """
    name = path.name.lower()
    packed = next((suffix for suffix in COMPRESSED if name.endswith(suffix)), "")
    kind = Path(name.removesuffix(packed)).suffix
    if packed == ".zip" and kind not in KINDS:
        return ".csv"
    if kind in (TEXTS if packed else KINDS):
        return kind
    return ""


def files_of(path: Path, data: Data) -> list[Path]:
    """Return the files of a table in the order of their names:
    one, or those of a folder or a pattern.
    """
    where = f"data.table={str(path)!r}"
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _is_table(file))
        if not files:
            raise DataError(
                f"{where} cannot be read: the folder holds no table; expected {_list_kinds()}"
            )
    elif path.exists():
        files = [path]
    elif glob.has_magic(str(path)):
        files = sorted(Path(found) for found in glob.glob(str(path)) if Path(found).is_file())
        if not files:
            raise DataError(
                f"{where} does not exist: no file is named so; the pattern is relative to its "
                "study file"
            )
    else:
        raise DataError(f"{where} does not exist; a table's path is relative to its study file")

    for file in files:
        if not kind_of(file):
            raise DataError(
                f"data.table={file.name!r}; expected a name that ends in {_list_kinds()}"
            )

    _refuse_twins(files, data)
    return files


def _list_kinds() -> str:
    return (
        ".csv, .csv.gz or .parquet (or .tsv, .txt, .zst, .zip, .xlsx, .xls, .ods, .sav, .dta, "
        ".sas7bdat, .xpt)"
    )


def _is_table(file: Path) -> bool:
    return bool(kind_of(file)) and not file.name.startswith((".", "~$"))


def _refuse_twins(files: Sequence[Path], data: Data) -> None:
    """Refuse two files that would be one site."""
    sites: dict[str, Path] = {}
    for file in files if data.site_is_file else ():
        if (other := sites.setdefault(site_of(file), file)) != file:
            raise DataError(
                f"data.site_is_file: {other.name} and {file.name} are both site "
                f"{site_of(file)!r}; rename or remove one"
            )


def site_of(file: Path) -> str:
    """Return the site that a file's name says: the name without its suffixes."""
    name = file.name
    for suffix in (*COMPRESSED, *KINDS):
        if name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return normalize("NFC", name)


def _name_rows(frame: pd.DataFrame, file: Path, data: Data) -> pd.DataFrame:
    """Put the file's name before the numbers of its rows,
    and into the site's column where it says the site.
    """
    rows = [f"{file.name}:{row}" for row in frame.index]
    named = frame.set_axis(pd.Index(rows, dtype=object), axis=0)
    if data.site_is_file:
        return named.assign(**{SITE: site_of(file)})
    return named


def _is_mapped(file: Path, data: Data) -> bool:
    """Say whether a file is of a site whose own map says how its columns are called."""
    return data.site_is_file and site_of(file) in data.site_maps


def _other_columns(
    names: Mapping[Path, Sequence[str]], known: Sequence[str], first: Path
) -> Iterator[Refusal]:
    """Yield where files differ from the first in their columns, all at once."""
    way = (
        "Name all alike, give the site a map (data.site_maps), or join another table to this "
        "one ([[data.join]])."
    )
    for file, found in names.items():
        for name in [n for n in found if n not in known]:
            text = (
                f"{file.name}: column {name!r} is not in {first.name}; {nearest(name, known)} {way}"
            )
            yield Refusal(DataError(text))
        for name in [n for n in known if n not in found]:
            text = (
                f"{file.name}: no column {name!r}, which {first.name} has; "
                f"{nearest(name, found)} {way}"
            )
            yield Refusal(DataError(text))


# one file -----------------------------------------------------------------------------------------


def _read_layout(file: Path, data: Data) -> line_reader.Header:
    """Return how a text table is written, and its header, as under a claim."""
    where = f"data.table={str(file)!r}"
    with reading(where, private=True):
        return of_header(file, data.format, where)


def _read(
    file: Path, data: Data, private: bool, header: line_reader.Header | None = None
) -> pd.DataFrame:
    """Return the rows of a file; of a text table, whose `header` is read, as under a claim."""
    kind = kind_of(file)
    where = f"data.table={str(file)!r}"
    format = data.format

    with reading(where, private):
        if kind == ".parquet":
            return columnar.read(file, data, where)
        if kind in workbooks.SHEETS:
            return workbooks.sheet(file, format, where, private, data.patient)
        if kind in workbooks.STATISTICS:
            return workbooks.statistics(file, format, where)
        layout, _ = header = header or of_header(file, format, where)
        frame, broken = line_reader.read(file, format, header)

        if broken:
            logger.warning(
                "%s: no record, for its quotes or its fields: row %s", file, some(broken, 50)
            )

        return numerals.respell(
            frame,
            lambda column: numerals.with_points(column, layout.decimal, layout.thousands),
            _columns_to_keep(data),
        )


def _header(file: Path, data: Data, private: bool) -> list[str]:
    kind = kind_of(file)
    where = f"data.table={str(file)!r}"
    with reading(where, private):
        if kind == ".parquet":
            return columnar.names(file, data)
        if kind in workbooks.SHEETS:
            return [
                str(name) for name in workbooks.sheet(file, data.format, where, private, "").columns
            ]
        if kind in workbooks.STATISTICS:
            return workbooks.names(file, data.format)
        if private:
            return line_reader.header(file, data.format)
        return texts.names(file, data.format, where)


@contextmanager
def reading(where: str, private: bool) -> Iterator[None]:
    """Have whatever keeps a table from being read leave the block as a DataError; a private one
    quotes nothing.
    """
    try:
        yield
    except MedfedError:
        raise
    except Exception as error:  # readers of others raise whatever they like
        logger.warning("%s cannot be read: %s", where, error)
        if private:
            why = f" ({type(error).__name__}); what it says is in the site's own log"
        else:
            why = f": {plain(error)}"
        raise DataError(f"{where} cannot be read{why}") from (None if private else error)


# how numbers are spelt ----------------------------------------------------------------------------


def _columns_to_keep(data: Data) -> set[str]:
    """Return the columns whose cells are names, or numbers in a spelling of their own."""
    own = {name for name, feature in data.dictionary.items() if feature.numbers}
    return {data.patient, data.site, data.test, *own} - {""}


def _spelling(written: Mapping[Path, Text], data: Data, where: str) -> TextLayout:
    """Return how numbers are spelt in all text files of a study, as a layout.

    Raises DataError where files differ in what is guessed, and where cells do not say, or
    contradict each other.
    """
    first = next(iter(written))
    for file in written:
        _refuse_other_layout(written, file, first)
    separator = written[first].layout.separator
    found = _evidence(written, data, points=separator != ",")
    if separator == "," and any("," in (e.decimal, e.either, e.thousands) for e in found):
        found = _evidence(written, data, points=True)
    decimal, thousands, guessed = numerals.decide(found, data.format, separator, where)
    return TextLayout(decimal=decimal, thousands=thousands, guessed=guessed)


def _evidence(
    written: Mapping[Path, Text], data: Data, points: bool
) -> list[numerals.CellEvidence]:
    if "auto" not in (data.format.decimal, data.format.thousands):
        return []
    words = {
        name for name, feature in data.dictionary.items() if feature.categories
    } | _columns_to_keep(data)
    found: list[numerals.CellEvidence] = []
    for file, text in written.items():
        used = {*data.features, data.target} if data.features else {*text.names}
        chosen = [name for name in text.names if name in used - words]
        found += numerals.evidence(text.table.select(chosen), chosen, text.row_N, file.name, points)
    return found


def _refuse_other_layout(written: Mapping[Path, Text], file: Path, first: Path) -> None:
    """Refuse two files of which different things are guessed."""
    layout = written[file].layout
    known = written[first].layout
    differ = [("separator", known.separator, layout.separator)]
    if (
        "encoding" in {**layout.guessed, **known.guessed}
        and _beyond_ascii(written[file])
        and _beyond_ascii(written[first])
    ):
        differ.append(("encoding", known.encoding, layout.encoding))
    for key, one, other in differ:
        if one != other:
            raise DataError(
                f"data.format.{key}: {first.name} seems to have {one!r}, {file.name} {other!r}; "
                "expected one for all files of a study. Write them alike, or say it: "
                f"{lines_to_choose(key, [one, other])}"
            )


def _beyond_ascii(text: Text) -> bool:
    columns = text.table.columns
    return not "".join(text.names).isascii() or any(
        bool((numerals.characters(chunk) >= 0x80).any())
        for column in columns
        for chunk in column.chunks
    )


def _respell(text: Text, layout: TextLayout, data: Data) -> pd.DataFrame:
    """Return a text table's cells, numbers with decimal points."""
    kept = _columns_to_keep(data)
    columns = []
    for name, column in zip(text.names, text.table.columns, strict=True):
        if name not in kept:
            column = numerals.with_points(column, layout.decimal, layout.thousands)
        columns.append(column)

    frame: pd.DataFrame = pa.table(columns, names=text.names).to_pandas(
        split_blocks=True, self_destruct=True
    )
    return frame.set_axis(text.row_N, axis=0)
