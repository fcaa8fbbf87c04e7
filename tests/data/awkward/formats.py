"""Awkward files: formats, layouts, faults of an export. Each is read as the clean table, or refused
by row and column."""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unicodedata import normalize

import openpyxl
import pandas as pd
import pyreadstat
from tests.data.awkward.forms import HEADER, NUMBERS, Cells, clean, packed, spelt, text

AS_CLEAN = ""


@dataclass(frozen=True)
class Awkward:
    """A table as found: `make` writes it into a folder and returns `data.table`; `right` is a
    pattern of the error.

    `declared`: keys of [data], of [data.format] under "format". `private`: the right answer under a
    claim, where every layout is declared (`claimed` keys of [data.format] beside `declared`); None:
    the same.
    """

    name: str
    make: Callable[[Path], str]
    right: str = AS_CLEAN
    declared: Mapping[str, Any] = field(default_factory=dict)
    private: str | None = None
    claimed: Mapping[str, Any] = field(default_factory=dict)


def _file(name: str, content: str | bytes, encoding: str = "utf-8") -> Callable[[Path], str]:
    raw = content if isinstance(content, bytes) else content.encode(encoding)

    def make(folder: Path) -> str:
        return packed(folder / name, raw).name

    return make


def _csv(
    rows: Cells, name: str = "t.csv", separator: str = ",", encoding: str = "utf-8"
) -> Callable[[Path], str]:
    return _file(name, text(rows, separator), encoding)


def _changed(row: int, column: int, cell: str) -> Cells:
    """Return the clean table with another cell; `row` as a person counts, the header being 1."""
    rows = clean()
    rows[row - 1][column] = cell
    return rows


def _open_quote(lines: list[str]) -> list[str]:
    """Return the lines with a quote that opens in row 3 and closes in row 6."""
    lines[2] = lines[2].replace("Frauen", '"Frauen')
    lines[5] = lines[5].replace("Frauen", 'Frauen"')
    return lines


COMMA = spelt(clean(), ",")
EUROPE = spelt(clean(), ",", ".")
FORMAT = "format"
UNDER_CLAIM = "under a claim"
POINT = {"decimal": "."}
DECIMAL_COMMA = {"decimal": ","}
EUROPEAN = {"decimal": ",", "thousands": "."}
FRENCH = {"decimal": ",", "thousands": " "}


# workbooks and statistics packages ----------------------------------------------------------------


def _typed() -> pd.DataFrame:
    frame = pd.DataFrame(clean()[1:], columns=HEADER)
    for name in NUMBERS:
        frame[name] = pd.to_numeric(frame[name])
    return frame


def _workbook(
    above: int = 0, left: int = 0, below: str = "", other: str = "", ids: type = str
) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        book = openpyxl.Workbook()
        sheet = book.active
        assert sheet is not None
        sheet.title = "Data"
        for number in range(above):
            sheet.cell(number + 1, 1, f"Export {number}")
        for r, cells in enumerate(clean()):
            for c, cell in enumerate(cells):
                number = r and (HEADER[c] in NUMBERS or (c == 0 and ids is not str))
                value: Any = cell if not number else (float(cell) if cell else None)
                sheet.cell(r + 1 + above, c + 1 + left, value)
        if below:
            sheet.cell(len(clean()) + 2 + above, 1 + left, below)
        if other:
            book.create_sheet(other)["A1"] = "x"
        book.save(folder / "t.xlsx")
        return "t.xlsx"

    return make


def _cell(row: int, column: int, value: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        name = _workbook()(folder)
        book = openpyxl.load_workbook(folder / name)
        book["Data"].cell(row, column, value)
        book.save(folder / name)
        return name

    return make


def _ods(folder: Path) -> str:
    """Write an OpenDocument sheet by hand: no library of ours does."""
    rows = "".join(
        "<table:table-row>"
        + "".join(
            (
                "<table:table-cell "
                f'office:value-type="string"><text:p>{cell}</text:p></table:table-cell>'
            )
            for cell in cells
        )
        + "</table:table-row>"
        for cells in clean()
    )
    spaces = " ".join(
        f'xmlns:{name}="urn:oasis:names:tc:opendocument:xmlns:{name}:1.0"'
        for name in ("office", "table", "text")
    )
    sheet = f'<table:table table:name="Data">{rows}</table:table>'
    body = f"<office:body><office:spreadsheet>{sheet}</office:spreadsheet></office:body>"

    with zipfile.ZipFile(folder / "t.ods", "w") as archive:
        archive.writestr("mimetype", "application/vnd.oasis.opendocument.spreadsheet")
        archive.writestr(
            "content.xml",
            "<?xml version='1.0'?><office:document-content "
            f"{spaces}>{body}</office:document-content>",
        )
        archive.writestr("META-INF/manifest.xml", "<?xml version='1.0'?><manifest/>")

    return "t.ods"


NAMES = {"größe": "groesse"}
"""SAS and SPSS names as their files allow them."""


def _statistics(name: str, **options: Any) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        writers = {
            "sav": pyreadstat.write_sav,
            "dta": pyreadstat.write_dta,
            "xpt": pyreadstat.write_xport,
        }
        writers[name.rpartition(".")[2]](_typed(), str(folder / name), **options)
        return name

    return make


def _codes(folder: Path) -> str:
    """Write an SPSS file whose wards are codes with labels, and whose lactate has a code for
    missing.
    """
    frame = _typed()
    labels = dict(enumerate(sorted(frame["ward"].unique()), 1))
    frame["ward"] = frame["ward"].map({text: code for code, text in labels.items()})
    frame["lactate"] = frame["lactate"].fillna(-9)
    pyreadstat.write_sav(
        frame,
        str(folder / "t.sav"),
        variable_value_labels={"ward": labels},
        missing_ranges={"lactate": [-9]},
    )
    return "t.sav"


def _parquet(
    change: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame,
) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        change(_typed()).to_parquet(folder / "t.parquet")
        return "t.parquet"

    return make


# several files ------------------------------------------------------------------------------------


def _parts() -> dict[str, Cells]:
    """Return the clean table as one table a hospital, without its column."""
    return {
        site: [[*row[:1], *row[2:]] for row in clean() if row[1] in (site, "hospital")]
        for site in ("Nord", "Süd")
    }


def _folder(
    *changes: Callable[[dict[str, str]], None], sep: str = ",", decimal: str = "."
) -> Callable[[Path], str]:
    def make(folder: Path) -> str:
        files = {}
        for site, rows in _parts().items():
            files[f"{site}.csv"] = text(spelt(rows, decimal), sep)
        for change in changes:
            change(files)
        (folder / "exports").mkdir()
        for name, content in files.items():
            (folder / "exports" / name).write_text(content, encoding="utf-8")
        return "exports"

    return make


def _without(column: str) -> Callable[[dict[str, str]], None]:
    def change(files: dict[str, str]) -> None:
        files["Süd.csv"] = files["Süd.csv"].replace(column, f"{column}2", 1)

    return change


def _semicolons(files: dict[str, str]) -> None:
    files["Süd.csv"] = files["Süd.csv"].replace(",", ";")


def _zip_of_two(folder: Path) -> str:
    with zipfile.ZipFile(folder / "t.zip", "w") as archive:
        archive.writestr("notes.txt", "nothing")
        archive.writestr("inner/t.csv", text(clean()))
    return "t.zip"


def _glob(folder: Path) -> str:
    _folder()(folder)
    (folder / "exports" / "readme.md").write_text("not a table")
    return "exports/*.csv"


TITLES = "Export of the laboratory\nFrom 2024-01-01\n\n"
SITE_IS_FILE = {"site": "", "site_is_file": True}
EITHER = spelt(
    [[row[0], row[1], row[4].replace(".", ""), row[5], row[6]] for row in clean()],
    ".",
    ",",
    ["cost"],
)


TABLES: list[Awkward] = [
    # separators, decimals, encodings
    Awkward("semicolons", _csv(clean(), separator=";"), claimed=POINT),
    Awkward("tabs", _csv(clean(), "t.tsv", "\t"), claimed=POINT),
    Awkward("tabs in a txt", _csv(clean(), "t.txt", "\t"), claimed=POINT),
    Awkward("pipes", _csv(clean(), separator="|"), claimed=POINT),
    Awkward("upper-case suffix", _csv(clean(), "T.CSV")),
    Awkward("upper-case packed suffix", _csv(clean(), "T.Csv.GZ")),
    Awkward("semicolons and decimal commas", _csv(COMMA, separator=";"), claimed=DECIMAL_COMMA),
    Awkward(
        "the usual European export",
        _csv(EUROPE, separator=";", encoding="cp1252"),
        claimed=EUROPEAN,
    ),
    Awkward("decimal commas in quotes", _csv(COMMA), claimed=DECIMAL_COMMA),
    Awkward(
        "Swiss thousands",
        _csv(spelt(clean(), ".", "'"), separator=";"),
        claimed={"decimal": ".", "thousands": "'"},
    ),
    Awkward("French thousands", _csv(spelt(clean(), ",", "\u202f"), separator=";"), claimed=FRENCH),
    Awkward(
        "blanks between thousands", _csv(spelt(clean(), ",", " "), separator="\t"), claimed=FRENCH
    ),
    Awkward(
        "English thousands in quotes", _csv(spelt(clean(), ".", ",")), claimed={"thousands": ","}
    ),
    Awkward("byte order mark", _csv(clean(), encoding="utf-8-sig")),
    Awkward("UTF-16", _csv(EUROPE, "t.txt", "\t", "utf-16"), claimed=EUROPEAN),
    Awkward(
        "UTF-16 without a mark",
        _csv(clean(), encoding="utf-16-le"),
        r't\.csv.* bytes of zero: it is UTF-16 without a mark.*encoding = "utf-16"',
    ),
    Awkward(
        "UTF-16 without a mark, said",
        _csv(clean(), encoding="utf-16-le"),
        declared={FORMAT: {"encoding": "utf-16"}},
    ),
    Awkward("latin-1", _csv(clean(), encoding="latin-1")),
    Awkward(
        "DOS",
        _csv(clean(), encoding="cp850"),
        r't\.csv.*fit several encodings.*encoding = "cp1252" or .*"cp850"',
    ),
    Awkward("DOS, said", _csv(clean(), encoding="cp850"), declared={FORMAT: {"encoding": "cp850"}}),
    Awkward(
        "Macintosh", _csv(clean(), encoding="mac-roman"), r"fit several encodings.*\"mac-roman\""
    ),
    Awkward("carriage returns", _file("t.csv", text(clean(), end="\r"))),
    Awkward("Windows line ends", _file("t.csv", text(clean(), end="\r\n"))),
    Awkward(
        "decomposed umlauts",
        _file("t.csv", normalize("NFD", text(clean()))),
        declared={"features": tuple(HEADER[2:6])},
    ),
    Awkward(
        "commas that may be either",
        _csv(EITHER, separator=";"),
        r"column 'cost', row \d+ may be a decimal or thousands.*decimal = \",\" or decimal = \"\.\"",
        private=UNDER_CLAIM,
    ),
    Awkward(
        "commas and points",
        _csv(
            spelt(spelt(clean(), ",", numbers=["lactate"]), ".", numbers=["größe"]), separator=";"
        ),
        r"decimal commas and decimal points: '\d+,\d+' in t\.csv, column 'lactate', row 2; .*'(größe|cost)', row 2",
        private=UNDER_CLAIM,
    ),
    Awkward(
        "two separators",
        _file("t.csv", "a,b;c,died\n1,2;3,yes\n2,3;4,no\n"),
        r"t\.csv.*can be parted in several ways.*separator = \",\" or separator = \";\"",
        private=r"its header can be parted in several ways",
    ),
    # lines that are no records
    Awkward("title lines", _file("t.csv", TITLES + text(clean())), claimed={"skip": 3}),
    Awkward(
        "title lines and a footer, said",
        _file("t.csv", TITLES + text(clean()) + "Total,,,,,,36\n"),
        declared={FORMAT: {"skip": 3, "footer": 1}},
    ),
    Awkward("a footer", _file("t.csv", text(clean()) + "\n36 records\n"), claimed={"footer": 1}),
    Awkward(
        "blank lines",
        _file("t.csv", text([*clean()[:20], [], *clean()[20:], [], []])),
        private=UNDER_CLAIM,
    ),
    Awkward(
        "a cut last line",
        _file("t.csv", text(clean())[:-20]),
        r"t\.csv.*in row 37 stand other fields \(row 37: \d\)\. A cut last line: .*footer = 1",
        private=UNDER_CLAIM,
    ),
    Awkward(
        "a separator too many",
        _file("t.csv", text(clean()).replace("Frauen", "Frauen,x", 1)),
        r"in row 3 stand other fields \(row 3: 8\)",
        private=UNDER_CLAIM,
    ),
    Awkward(
        "rows longer than the header",
        _file("t.csv", text(clean()).replace("\n", ",x\n").replace(",x", "", 1)),
        r"rows have more fields than the header; name every column",
        private=UNDER_CLAIM,
    ),
    Awkward(
        "two exports pasted together",
        _csv([*clean(), *clean()]),
        r"t\.csv.*row 38 repeats the header: two exports pasted together\?",
        private=UNDER_CLAIM,
    ),
    Awkward(
        "an open quote",
        _file("t.csv", "\n".join(_open_quote(text(clean()).split("\n")))),
        r"a quote in row 3, column 'ward', is not closed",
        private=UNDER_CLAIM,
    ),
    # headers
    Awkward(
        "an index of pandas",
        _csv([["", *HEADER], *([str(i), *r] for i, r in enumerate(clean()[1:]))]),
        r"t\.csv.*the first header is empty: an index written by pandas\?",
    ),
    Awkward(
        "a separator at the end of each line", _file("t.csv", text(clean()).replace("\n", ",\n"))
    ),
    Awkward(
        "a cell below no name",
        _csv([[*row, "x" if number == 6 else ""] for number, row in enumerate(clean(), 1)]),
        r"column 8 has no name, and a cell in row 6",
        private=UNDER_CLAIM,
    ),
    Awkward(
        "a name missing",
        _csv([["subject", "hospital", "", *HEADER[3:]], *clean()[1:]]),
        r"no name in the header of column 3",
    ),
    Awkward(
        "a name twice",
        _csv([[*HEADER[:3], "größe", *HEADER[4:]], *clean()[1:]]),
        r"'größe' in columns 3 and 4",
    ),
    Awkward(
        "one name in two Unicode forms",
        _csv([[*HEADER[:3], normalize("NFD", "größe"), *HEADER[4:]], *clean()[1:]]),
        r"'größe' in columns 3 and 4",
    ),
    Awkward("nothing", _file("t.csv", ""), r"t\.csv.*it has no header"),
    # archives
    Awkward("zip", _csv(clean(), "t.csv.zip")),
    Awkward(
        "zip of two",
        _zip_of_two,
        r"holds 2 files; expected one.*member = \"notes.txt\" or member = \"inner/t.csv\"",
    ),
    Awkward("zip of two, said", _zip_of_two, declared={FORMAT: {"member": "inner/t.csv"}}),
    # workbooks
    Awkward("a workbook", _workbook()),
    Awkward(
        "a workbook with a title, a margin and a footer",
        _workbook(2, 1, "36 records"),
        private=UNDER_CLAIM,
    ),
    Awkward(
        "a workbook of two sheets",
        _workbook(other="Notes"),
        r"has 2 sheets; expected one.*sheet = \"Data\" or sheet = \"Notes\"",
    ),
    Awkward(
        "a workbook of two sheets, said",
        _workbook(other="Notes"),
        declared={FORMAT: {"sheet": "Data"}},
    ),
    Awkward(
        "no such sheet",
        _workbook(),
        r"sheet='Dta' is no sheet; did you mean 'Data'\?",
        {FORMAT: {"sheet": "Dta"}},
    ),
    Awkward(
        "a time in a workbook",
        _cell(4, 4, pd.Timestamp("2024-01-01 03:04").time()),
        r"column 'lactate', row 4 holds a time of day",
        private=UNDER_CLAIM,
    ),
    Awkward(
        "a rounded id in a workbook",
        _cell(4, 1, 1e17),
        r"column 'subject' holds numbers of 2\^53",
        private="in some rows",
    ),
    Awkward("OpenDocument", _ods),
    # statistics packages
    Awkward("SPSS", _statistics("t.sav")),
    Awkward("SPSS with labels", _codes, declared={FORMAT: {"labels": "labels"}}),
    Awkward("no SAS file", _file("t.sas7bdat", b"no"), r"t\.sas7bdat.*cannot be read"),
    # parquet
    Awkward(
        "parquet with ids as its index",
        _parquet(lambda frame: frame.set_index("subject", append=True)),
    ),
    Awkward(
        "times in parquet",
        _parquet(lambda f: f.assign(seen=pd.Timestamp("2024-01-01 03:04").time())),
        r"column 'seen' \(times of day\)",
    ),
    Awkward(
        "durations in parquet",
        _parquet(lambda f: f.assign(stay=pd.Timedelta("3h"))),
        r"column 'stay' \(durations\)",
    ),
    Awkward(
        "lists in parquet",
        _parquet(lambda f: f.assign(codes=[["a"]] * len(f))),
        r"column 'codes' \(lists\)",
    ),
    Awkward(
        "bytes and structs in parquet",
        _parquet(lambda f: f.assign(raw=b"a", one=[{"a": 1}] * len(f))),
        r"'raw' \(bytes\), 'one' \(structs\)",
    ),
    Awkward(
        "lists that nobody asked for",
        _parquet(lambda f: f.assign(codes=[["a"]] * len(f))),
        declared={"features": tuple(HEADER[2:6])},
    ),
    # several files
    Awkward("a file a hospital", _folder(), declared=SITE_IS_FILE),
    Awkward("a pattern of files", _glob, declared=SITE_IS_FILE),
    Awkward(
        "a folder of European files",
        _folder(sep=";", decimal=","),
        declared=SITE_IS_FILE,
        claimed=DECIMAL_COMMA,
    ),
    Awkward(
        "headers that differ",
        _folder(_without("lactate")),
        r"Süd\.csv: column 'lactate2' is not in Nord\.csv; did you mean 'lactate'",
        SITE_IS_FILE,
    ),
    Awkward(
        "separators that differ",
        _folder(_semicolons),
        r"separator: Nord\.csv seems to have ',', Süd\.csv ';'",
        SITE_IS_FILE,
        UNDER_CLAIM,
    ),
    Awkward(
        "an empty folder",
        lambda folder: (folder / "none").mkdir() or "none",
        r"the folder holds no table",
        SITE_IS_FILE,
    ),
]
