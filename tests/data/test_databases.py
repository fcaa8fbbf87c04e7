"""A query as a table: one SELECT, read only, no password in the study, and no cell told under a
claim.
"""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from medfed.core.checks import DataError, MedfedError, StudyError
from medfed.data import sources
from medfed.study import Data, Study

ROWS = [(2**60 + 1, "Nörd", 1.5, "2024-01-31", 0), (2, "Süd", None, None, 1)]
KINDS = ["sqlite", "duckdb", "sqlalchemy"]


def _study(
    folder: Path, kind: str, query: str = "select * from stays order by id desc", **data: Any
) -> Study:
    if kind == "duckdb":
        duckdb = pytest.importorskip("duckdb")
        connection = duckdb.connect(str(folder / "t.db"))
        connection.execute(
            "create table stays (id bigint, site varchar, lactate double, day date, y integer)"
        )
    else:
        connection = sqlite3.connect(folder / "t.db")
        connection.execute(
            "create table stays (id integer, site text, lactate real, day text, y integer)"
        )

    connection.executemany("insert into stays values (?, ?, ?, ?, ?)", ROWS)
    connection.commit()
    connection.close()
    address = f"sqlite+pysqlite:///{folder / 't.db'}" if kind == "sqlalchemy" else f"{kind}:///t.db"

    return Study(
        data=Data(database=address, query=query, target="y", site="site", patient="id", **data),
        folder=folder,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("private", [False, True])
def test_an_answer_is_a_table(tmp_path: Path, kind: str, private: bool) -> None:
    study = _study(tmp_path, kind)
    frame = sources.read(study, private=private).frame
    assert (
        sources.columns_of(study, private) == list(frame) == ["id", "site", "lactate", "day", "y"]
    )
    assert frame["id"].tolist() == [2**60 + 1, 2] and frame["site"].tolist() == ["Nörd", "Süd"]
    assert frame["day"].tolist()[0] == "2024-01-31" and frame["lactate"].isna().tolist() == [
        False,
        True,
    ]
    assert frame.index.tolist() == [2, 3]


@pytest.mark.parametrize(
    "query",
    [
        "delete from stays",
        "select 1; delete from stays",
        "with gone as (delete from stays returning *) select * from gone",
        "select * into other from stays",
        "attach 'other.db'",
        "select 1 /* ; */; drop table stays --",
        "",
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_written(tmp_path: Path, kind: str, query: str) -> None:
    study = _study(tmp_path, kind, query)
    before = (tmp_path / "t.db").read_bytes()
    with pytest.raises(StudyError, match=r"data\.query"):
        sources.read(study)
    assert (tmp_path / "t.db").read_bytes() == before


def test_words_in_quotes_are_no_statements(tmp_path: Path) -> None:
    query = "select id as \"delete\", 'drop; create' as text, y from stays -- update\n"
    frame = sources.read(_study(tmp_path, "sqlite", query, features=("delete",))).frame
    assert list(frame) == ["delete", "text", "y"]


def test_a_file_is_opened_read_only(tmp_path: Path) -> None:
    """The guard behind the guard: what the words let through, the file does not."""
    from medfed.data import databases

    study = _study(tmp_path, "sqlite")
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        databases._sqlite(tmp_path / "t.db", "delete from stays", study.data, "t", False)
    duckdb = pytest.importorskip("duckdb")
    (tmp_path / "d").mkdir()
    study = _study(tmp_path / "d", "duckdb")
    with pytest.raises(duckdb.Error):
        databases._duckdb(tmp_path / "d" / "t.db", "delete from stays", study.data, "t")


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_of_the_database_is_an_error_of_data(
    tmp_path: Path, kind: str, private: bool
) -> None:
    study = _study(tmp_path, kind, "select absent from stays")
    with pytest.raises(DataError, match="cannot be read") as caught:
        sources.read(study, private=private)
    assert ("absent" in str(caught.value)) != private


def test_a_password_is_taken_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query = "select 1"
    for address in ("postgresql://me:secret@host/db", "mysql+pymysql://me:${A}b@host/db"):
        with pytest.raises(StudyError, match=r"holds a password.*\$\{NAME\}"):
            sources.complete(Study(data=Data(database=address, query=query)))
    study = Study(
        data=Data(database="postgresql://me:${MEDFED_TEST}@host/db", query=query), folder=tmp_path
    )
    monkeypatch.delenv("MEDFED_TEST", raising=False)
    with pytest.raises(StudyError, match="the environment has no MEDFED_TEST"):
        sources.read(study)
    monkeypatch.setenv("MEDFED_TEST", "p@ss/word")
    with pytest.raises(DataError) as caught:
        sources.read(study)
    assert "p@ss" not in str(caught.value) and "p%40ss" not in str(caught.value)


def test_bytes_are_refused_and_under_a_claim_missing(tmp_path: Path) -> None:
    study = _study(tmp_path, "sqlite", "select id, site, cast('x' as blob) as raw, y from stays")
    with pytest.raises(DataError, match=r"column 'raw', row 2 is no number and no text \(bytes\)"):
        sources.read(study)
    assert sources.read(study, private=True).frame["raw"].isna().all()


@pytest.mark.parametrize(
    "change",
    [{"table": "t.csv"}, {"source": "heart"}, {"query": ""}, {"site_is_file": True, "site": ""}],
)
def test_one_place_for_records(tmp_path: Path, change: dict[str, Any]) -> None:
    from dataclasses import replace

    study = _study(tmp_path, "sqlite")
    with pytest.raises(MedfedError, match=r"data\."):
        sources.complete(replace(study, data=replace(study.data, **change)))


def test_no_such_file(tmp_path: Path) -> None:
    study = Study(data=Data(database="duckdb:///none.duckdb", query="select 1"), folder=tmp_path)
    with pytest.raises(DataError, match="no such file; three slashes"):
        sources.read(study)
    assert not list(tmp_path.iterdir())
