"""What a database answers to one SELECT, read only:
DuckDB, SQLite, and whatever SQLAlchemy has a dialect for.

Nothing is written: another statement than SELECT is refused, files are opened read only, and a
transaction is rolled back. A password never stands in a study: `${NAME}` in the address is taken
from the environment.
"""

import datetime
import os
import re
import sqlite3
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any
from unicodedata import normalize
from urllib.parse import quote

import pandas as pd

from medfed.core.checks import DataError, StudyError
from medfed.data import columnar
from medfed.data.layout import names_of
from medfed.data.readers import reading
from medfed.study import Data

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_PASSWORD = re.compile(r"://[^/@]*:(?!\$\{\w+\}@)[^/@]+@")
_NO_CODE = re.compile(
    r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL
)
_WRITES = re.compile(
    r"\b(?:insert|update|delete|merge|drop|alter|create|truncate|grant|revoke|copy|call|exec|"
    r"execute|into|attach|detach|pragma|install|load|vacuum|export|import)\b"
)


def read(data: Data, folder: Path, private: bool) -> pd.DataFrame:
    """Return the rows that the database answers, numbered from 2;
    a relative file is looked for in `folder`.

    Raises StudyError for a query that may write and a password in the study, DataError where there
    is no answer; `private`: what the database says of it, which may quote a cell, stays in the
    site's own log.
    """
    frame = _answer(data, folder, private, data.query)
    if frame.empty and not private:
        raise DataError("data.query has no row for an answer; give a query that finds records")
    return frame


def names(data: Data, folder: Path, private: bool) -> list[str]:
    """Return the columns of the answer, of which no row is fetched."""
    query = data.query.strip().rstrip(";")
    return [
        str(name)
        for name in _answer(
            data, folder, private, f"SELECT * FROM ({query}\n) AS answer WHERE 1 = 0"
        )
    ]


def _answer(data: Data, folder: Path, private: bool, query: str) -> pd.DataFrame:
    check(data)
    where = f"data.database={data.database!r}"
    address = _filled_in(data.database)
    kind, _, place = address.partition("://")
    with reading(where, private):
        if kind == "duckdb":
            return _duckdb(_file(place, folder, where), query, data, where)
        if kind == "sqlite":
            return _sqlite(_file(place, folder, where), query, data, where, private)
        return _sqlalchemy(address, query, data, where, private)


def check(data: Data) -> None:
    """Raise StudyError for a query that is no single SELECT, and for a password in the study."""
    if _PASSWORD.search(data.database):
        raise StudyError(
            "data.database holds a password; a study is shown to others. Write ${NAME} in its "
            "place, and set NAME in the environment of the site."
        )

    code = _NO_CODE.sub(" ", data.query).strip().rstrip(";").strip().lower()
    if not re.match(r"(?:select|with|from)\b", code):
        raise StudyError(
            f"data.query={data.query[:60]!r}; expected one SELECT, as nothing is written"
        )
    if ";" in code:
        raise StudyError(
            f"data.query={data.query[:60]!r} holds several statements; expected one SELECT"
        )
    if found := _WRITES.search(code):
        raise StudyError(
            f"data.query says {found.group().upper()!r}; expected one SELECT, as nothing is "
            "written. A column of that name stands in quotes."
        )


def _filled_in(address: str) -> str:
    absent = [name for name in _VARIABLE.findall(address) if name not in os.environ]
    if absent:
        raise StudyError(
            f"data.database: the environment has no {absent[0]}; set it where this runs"
        )
    return _VARIABLE.sub(lambda found: quote(os.environ[found.group(1)], safe=""), address)


def _file(place: str, folder: Path, where: str) -> Path:
    """Return the file of an address: /lab.duckdb is relative to the study, //lab.duckdb is not."""
    path = folder / place.removeprefix("/")
    if not path.is_file():
        raise DataError(
            f"{where}: no such file; three slashes begin a path relative to the study file, four "
            "any other"
        )
    return path


def _duckdb(path: Path, query: str, data: Data, where: str) -> pd.DataFrame:
    duckdb = _import_driver("duckdb")
    with duckdb.connect(str(path), read_only=True) as connection:
        return columnar.to_frame(connection.sql(query).to_arrow_table(), data, where)


def _sqlite(path: Path, query: str, data: Data, where: str, private: bool) -> pd.DataFrame:
    connection = sqlite3.connect(f"file:{quote(str(path.resolve()))}?mode=ro", uri=True)
    connection.text_factory = lambda cell: cell.decode("utf-8", "replace")
    try:
        answer = connection.execute(query)
        return _to_frame(
            [column[0] for column in answer.description], answer.fetchall(), data, where, private
        )
    finally:
        connection.close()


def _sqlalchemy(address: str, query: str, data: Data, where: str, private: bool) -> pd.DataFrame:
    sqlalchemy = _import_driver("sqlalchemy")
    engine = sqlalchemy.create_engine(address)
    options = {"postgresql_readonly": True} if engine.dialect.name == "postgresql" else {}
    try:
        with engine.connect().execution_options(**options) as connection:
            answer = connection.execute(sqlalchemy.text(query.replace(":", r"\:")))
            frame = _to_frame(
                list(answer.keys()), [tuple(row) for row in answer], data, where, private
            )
            connection.rollback()
            return frame
    finally:
        engine.dispose()


def _import_driver(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise DataError(f"data.database needs the package {name}; install medfed[sql]") from None


def _to_frame(
    columns: Sequence[str], rows: Sequence[Sequence[Any]], data: Data, where: str, private: bool
) -> pd.DataFrame:
    """Return rows as pandas has them.
    A cell that is no number and no text is refused, under a claim missing.
    """
    known = names_of([str(name) for name in columns], where)
    cells = [[_cell(cell) for cell in row] for row in rows]
    if not private and (odd := next(_no_features(cells), None)):
        place, row = odd
        if known[place] in data.features or not data.features:
            kind = type(rows[row][place]).__name__
            raise DataError(
                f"{where}: column {known[place]!r}, row {row + 2} is no number and no text ({kind})"
            )
    plain = [[None if cell is _NO_FEATURE else cell for cell in row] for row in cells]
    return pd.DataFrame(
        plain, index=pd.RangeIndex(2, len(rows) + 2), columns=pd.Index(known), dtype=object
    )


_NO_FEATURE = object()


def _no_features(cells: Sequence[Sequence[object]]) -> Iterator[tuple[int, int]]:
    for number, row in enumerate(cells):
        yield from ((place, number) for place, cell in enumerate(row) if cell is _NO_FEATURE)


def _cell(cell: Any) -> Any:
    """Return a number or truth as it is, a text in one Unicode form, a date as ISO 8601."""
    if cell is None or isinstance(cell, (bool, int, float)):
        return cell
    if isinstance(cell, str):
        return normalize("NFC", cell)
    if isinstance(cell, Decimal):
        return str(cell)
    if isinstance(cell, datetime.datetime):
        return cell.isoformat(sep=" ")
    if isinstance(cell, datetime.date):
        return cell.isoformat()
    return _NO_FEATURE
