"""Under a claim nothing that is printed, passed on, written or raised quotes a private row: no
label, value or count.

A canary stands in private rows in every place where one can stand, and numbers that nothing public
has count them.
"""

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import medfed
from medfed.core.checks import MedfedError
from tests.tables import PRIVATE, SITES, invented, write_study
from tests.test_neighbours import _told

pytestmark = pytest.mark.usefixtures("one_thread")

CANARY = "CANARY-77031"
PRIVATE_TABLE = PRIVATE.replace(
    "test_is_public = true",
    'test_is_public = true\ntest = "part"\nfeatures = ["age", "lactate", "ward"]',
)
COUNTS = {"north": 137, "south": 83, "east": 61}
"""Training patients of each site: not what is declared."""


def _rows() -> pd.DataFrame:
    """Return a table whose private counts are told apart from all that is public."""
    frame = invented(600)
    private = [
        frame[frame["hospital"] == name].head(COUNTS[name]).assign(part="train") for name in SITES
    ]
    public = [frame[frame["hospital"] == name].tail(9).assign(part="test") for name in SITES]
    rows = pd.concat([*private, *public], ignore_index=True).astype(object)
    rows["note"] = "stable"
    rows["seen"] = "2024-02-01"
    return rows


def _planted(column: str, rows: pd.DataFrame) -> pd.DataFrame:
    """Return the table with the canary in one column of 7 private rows of north."""
    planted = rows.copy()
    planted.loc[planted.index[3:10], column] = [f"{CANARY} {i}" for i in range(7)]
    return planted


PLACES = ("died", "ward", "age", "lactate", "subject", "note", "seen", "part")
PRIVATE_NUMBERS = {
    *COUNTS.values(),
    *(n - 7 for n in COUNTS.values()),
    sum(COUNTS.values()),
    sum(COUNTS.values()) - 7,
}


def _exposed(content: bytes, numbers: bool = True) -> list[str]:
    """Return what a text says of private rows."""
    found = [CANARY] if CANARY.encode().lower() in content.lower() else []
    if numbers:
        untimed = re.sub(rb"\d\d:\d\d(:\d\d)?", b"", content)  # a minute of the clock is no count
        whole = re.findall(rb"(?<![\w.#-])\d{2,3}(?![\w.%]|\.\d)", untimed)
        found += sorted({n.decode() for n in whole if int(n) in PRIVATE_NUMBERS})
    return found


def _written(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what a run wrote, apart from what a site keeps for itself."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "sites" not in path.relative_to(folder).parts:
            yield str(path.relative_to(folder)), path.read_bytes()


TEXTS = (".json", ".jsonl", ".toml")


@pytest.mark.parametrize("place", PLACES)
def test_a_run_quotes_nothing_of_a_private_row(tmp_path: Path, place: str) -> None:
    path = write_study(tmp_path, PRIVATE_TABLE, _planted(place, _rows()))
    out = tmp_path / "run"
    for command in (["run", str(path), "--out", str(out)], ["privacy", "plan", str(path)]):
        said = _told(command)
        assert said.endswith(b"\n0"), said.decode()
        assert _exposed(said) == [], said.decode()
    for name, content in _written(out):
        assert _exposed(content, numbers=name.endswith(TEXTS)) == [], name


def test_pages_and_listings_quote_nothing_of_a_private_row(tmp_path: Path) -> None:
    rows = _rows()
    for place in PLACES[:5]:
        rows = _planted(place, rows)
    path = write_study(tmp_path, PRIVATE_TABLE, rows)
    out = tmp_path / "run"

    commands = [
        ["run", str(path), "--out", str(out), "--log", "json"],
        ["show", str(out)],
        ["report", str(out)],
    ]
    commands += [
        ["privacy", "claim", str(out)],
        ["export", str(out), "--help"],
        ["resume", str(out)],
    ]
    for command in commands:
        assert _exposed(_told(command)) == [], command
    for name, content in _written(out):
        assert _exposed(content, numbers=False) == [], name


def test_the_canaries_and_the_counts_would_be_seen(tmp_path: Path) -> None:
    """Without a claim they are: the laws above can fail."""
    rows = _planted("ward", _rows())
    text = PRIVATE_TABLE.replace("epsilon = 1.0\ndelta = 1e-4", "").replace(
        '["icu", "ward", "er"]', "[]"
    )
    path = write_study(tmp_path, text, rows)
    out = tmp_path / "run"
    told = _told(["run", str(path), "--out", str(out), "--set", "data.preprocess=robust"])
    assert "137" in _exposed(told), told.decode()
    assert CANARY in _exposed((out / "plan.json").read_bytes())
    assert CANARY in _exposed(
        _told(["data", "show", str(path), "--json"]) + (out / "plan.json").read_bytes()
    )


def _places_twice(rows: pd.DataFrame) -> pd.DataFrame:
    return pd.concat(
        [rows, rows.head(7).assign(hospital="south", subject=rows["subject"].head(7))],
        ignore_index=True,
    )


REFUSALS: dict[str, tuple[Any, list[str], str]] = {
    # what is done to the table, settings, what is said
    "a site that is not declared": (lambda rows: _planted("hospital", rows), [], "do not name one of privacy.sizes"),
    "no site": (
        lambda rows: rows.assign(hospital=rows["hospital"].mask(rows.index == 4, "")), [], "do not name one of",
    ),
    "patients of two sites": (_places_twice, [], "there are patients with records at more sites"),
    "a target without a range": (lambda rows: _planted("died", rows), ["data.task=regression"], "Set data.dictionary"),
    "an input without a range": (lambda rows: _planted("note", rows), ['data.features=["age", "note"]'], "'note'"),
    "every column": (lambda rows: _planted("note", rows), ["data.features=[]"], "'note'"),
    "labels that are not declared": (
        lambda rows: _planted("died", rows), ["data.dictionary.died.categories=[]"], "categories",
    ),
    "gaps refused": (lambda rows: _planted("ward", rows), ["data.on_missing=refuse"], "Set data.on_missing='impute'"),
    "one's own split": (lambda rows: _planted("part", rows), ["data.test=prt"], "did you mean 'part'?"),
    "no size for a site": (lambda rows: rows, ["privacy.sizes={}"], "Set privacy.sizes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_quotes_nothing_of_a_private_row(tmp_path: Path, kind: str) -> None:
    change, settings, words = REFUSALS[kind]
    path = write_study(tmp_path, PRIVATE_TABLE, change(_rows()))
    options = [part for text in settings for part in ("--set", text)]
    said = _told(["run", str(path), "--out", str(tmp_path / "run"), *options])
    assert words.encode() in said, said.decode()
    assert _exposed(said) == [], said.decode()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["parquet", "gz"])
def test_a_file_that_cannot_be_read_is_not_quoted(tmp_path: Path, kind: str) -> None:
    path = write_study(
        tmp_path, PRIVATE_TABLE.replace("cohort.csv", f"cohort.csv.{kind}".replace("csv.p", "p"))
    )
    name = "cohort.parquet" if kind == "parquet" else "cohort.csv.gz"
    (tmp_path / name).write_text(f"subject,hospital\n{CANARY},north\n")
    said = _told(["run", str(path), "--out", str(tmp_path / "run")])
    assert b"cannot be read (" in said and _exposed(said) == [], said.decode()


def test_numbers_in_a_regression_are_held_and_not_quoted(tmp_path: Path) -> None:
    """A target of 1e30 counts as the end of its range, in training and in tests; neither
    is told.
    """
    rows = _rows().assign(died=lambda frame: (np.arange(len(frame)) % 10).astype(object))
    text = PRIVATE_TABLE.replace('categories = ["no", "yes"]', "range = [0, 9]")
    text = text.replace('target = "died"', 'target = "died"\ntask = "regression"')
    heavy = rows.copy()
    heavy.loc[heavy.index[3], "died"] = 1e30
    heavy.loc[heavy.index[-1], "died"] = -1e30
    heavy.loc[heavy.index[4], "died"] = CANARY

    for preprocess in ("dictionary", "none"):
        path = write_study(tmp_path, text, heavy)
        out = tmp_path / preprocess
        said = _told(
            ["run", str(path), "--out", str(out), "--set", f"data.preprocess={preprocess}"]
        )
        assert said.endswith(b"\n0") and _exposed(said) == [] and b"e+30" not in said, said.decode()
        summary = json.loads((out / "summary.json").read_text())
        assert summary["test"]["mae"] < 1e3
        own = (out / "sites" / "own.log").read_text()
        assert "column 'died': held to its declared range in row 5" in own and CANARY not in own


def test_the_own_log_is_for_the_site_alone(tmp_path: Path) -> None:
    """It names rows, lies with what the site keeps, and nobody else may read it."""
    path = write_study(tmp_path, PRIVATE_TABLE, _planted("age", _rows()))
    medfed.run(medfed.load_study(path), tmp_path / "run")
    log = tmp_path / "run" / "sites" / "own.log"
    text = log.read_text()
    assert (
        "site 'north', column 'age': no finite number where one is declared" in text
        and "row 5, 6, 7, 8" in text
    )
    assert CANARY not in text and log.stat().st_mode & 0o077 == 0
    assert not any(
        isinstance(h, logging.handlers.MemoryHandler) for h in logging.getLogger("medfed").handlers
    )


@pytest.mark.slow
def test_a_process_of_its_own_prints_nothing_of_the_own_log(tmp_path: Path) -> None:
    path = write_study(tmp_path, PRIVATE_TABLE, _planted("died", _rows()))
    command = [sys.executable, "-m", "medfed", "run", str(path), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and _exposed(done.stdout + done.stderr) == []
    assert "take no part" in (tmp_path / "run" / "sites" / "own.log").read_text()


def test_without_a_claim_errors_name_rows_as_ever(tmp_path: Path) -> None:
    path = write_study(tmp_path, PRIVATE_TABLE, _planted("age", _rows()))
    study = medfed.load_study(path).set("privacy.epsilon", float("inf")).set("privacy.delta", 1.0)
    with pytest.raises(MedfedError, match="column 'age': text in a numeric column, row 5, 6, 7"):
        medfed.simulate(study)
