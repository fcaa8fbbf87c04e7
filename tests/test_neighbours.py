"""Neighbouring tables: two that differ in one patient leave the same bytes, but for the noised sum.

No clipped gradient counts for anything here and the noise is fixed, so that whatever still differs between the runs on
two tables was told by something else than the noised sum: an order, a size, a warning, an error. The sum itself has a
test of its own.
"""

import hashlib
import io
import json
import logging
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import medfed
from medfed import cli, dpsgd, runs
from medfed import site as sites
from medfed.core import codec, entropy
from medfed.core.checks import MedfedError
from medfed.data import sources, tables
from medfed.engine.inprocess import InProcess
from medfed.monitor import events
from medfed.prepare import prepare
from medfed.privacy import ledger

pytestmark = pytest.mark.usefixtures("one_thread")

HEADER = "subject,hospital,age,lactate,ward,died,part"

PUBLIC = [f"t{i},{place},{50 + i},{1 + i / 4},{ward},{died},test" for i, (place, ward, died) in enumerate(
    (place, ward, died) for place in ("north", "south", "east") for ward, died in (("icu", "no"), ("ward", "yes"))
)]  # fmt: skip
"""Held-out patients, declared public."""

PRIVATE_ROWS = {
    "first of the file": ["a1,south,61,1.5,ward,no,train"],
    "several records": ["a2,north,48,1.25,icu,no,train", "a2,north,49,2.5,ward,no,train", "a2,north,50,,icu,no,train"],
    "alone at its site": ["a3,east,70,3.5,icu,no,train"],
    "alone with a category": ["a4,north,39,2.0,er,no,train"],
    "alone with a label": ["a5,south,82,7.5,icu,yes,train"],
    "alone with a gap in a column": ["a6,north,,2.0,ward,no,train"],
    "text in a number": ["a7,north,CANARY,2.0,ward,no,train"],
    "a date in a number": ["a8,south,1961-05-17,2.0,ward,no,train"],
    "beyond every range": ["a9,north,1e30,-1e30,ward,no,train"],
    "no number at all": ["b1,north,inf,nan,ward,no,train"],
    "an undeclared category": ["b2,south,55,2.0,CANARY,no,train"],
    "an undeclared label": ["b3,north,55,2.0,ward,CANARY,train"],
    "no label": ["b4,south,55,2.0,ward,,train"],
    "an undeclared mark": ["b5,south,55,2.0,ward,no,CANARY"],
    "on both sides": ["b6,north,55,2.0,ward,no,train", "b6,north,56,2.0,ward,no,test"],
    "a field too many": ["b7,north,55,2.0,ward,no,train,CANARY"],
    "a field too few": ["b8,north,55"],
    "an open quote": ['b9,north,55,2.0,"ward,no,train'],
    "plain": ["c1,north,66,4.0,ward,no,train"],
}
NAMES = list(PRIVATE_ROWS)

STUDY = """
[study]
name = "neighbours"
seed = 3
[data]
table = "cohort.csv"
target = "died"
site = "hospital"
patient = "subject"
test = "part"
preprocess = "dictionary"
test_is_public = true
[data.dictionary.age]
range = [20, 100]
indicator = true
[data.dictionary.lactate]
range = [0.1, 15]
log = true
[data.dictionary.ward]
categories = ["icu", "ward", "er"]
[data.dictionary.died]
categories = ["no", "yes"]
[training]
rounds = 2
batch_size = 0
learning_rate = 1.0
[privacy]
epsilon = 1.0
delta = 1e-4
scope = "run"
[privacy.sizes]
north = 12
south = 8
east = 4
[monitor]
baselines = false
"""

WAYS: dict[str, dict[str, Any]] = {
    "shared": {},
    "site": {"privacy.noise": "site", "training.batch_size": 4},
    "central": {"privacy.noise": "central", "privacy.clipping": "adaptive"},
    "masked": {"security.aggregation": "masked"},
    "three-party": {"security.aggregation": "three-party"},
    "numbers as they are": {"data.preprocess": "none"},
    "seeded": {"privacy.simulation_only": True},
}


def lines(without: str = "") -> list[str]:
    """Return the table's rows, those of one kind of patient left out; the first of the file is private."""
    first, *others = [row for name, rows in PRIVATE_ROWS.items() for row in rows if name != without]
    return [first, *PUBLIC, *others]


def write(folder: Path, rows: list[str], text: str = STUDY) -> Path:
    """Write the table and the study into a folder; return the study's path."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cohort.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (folder / "study.toml").write_text(text)
    return folder / "study.toml"


class Clock(datetime):
    """Time stands still."""

    @classmethod
    def now(cls, tz: Any = None) -> "Clock":
        return cls(2026, 1, 1, tzinfo=tz)


@pytest.fixture
def fixed(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Fix noise, coins, names of runs and clocks; let every clipped gradient count for nothing."""
    made = iter(range(10**9))
    real = entropy.Entropy.__init__

    def seeded(self: entropy.Entropy, key: bytes | None = None) -> None:
        real(self, hashlib.sha256(str(next(made)).encode()).digest() if key is None else key)

    def restart() -> None:
        nonlocal made
        made = iter(range(10**9))

    monkeypatch.setattr(entropy.Entropy, "__init__", seeded)
    monkeypatch.setattr(dpsgd, "clip_factor", lambda kind, clip: torch.zeros_like)
    monkeypatch.setattr(secrets, "token_hex", lambda count=8: "5a" * count)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    for module in (runs, events, ledger):
        monkeypatch.setattr(module, "datetime", Clock, raising=False)
    monkeypatch.setattr("tests.test_neighbours.RESTART", restart)
    yield monkeypatch


RESTART: Callable[[], None] = lambda: None  # noqa: E731 (set by the fixture)


class Tap(InProcess):
    """The engine, which keeps every byte that passes."""

    heard: list[tuple[str, str, bytes]] = []  # noqa: RUF012 (one run at a time)

    def submit_many(self, names: Any, op: str, payload: bytes, deadline: float) -> list[int]:
        Tap.heard.extend((f"{op} to {name}", op, payload) for name in names)
        return super().submit_many(names, op, payload, deadline)

    def poll(self, wait: float) -> Any:
        op = self._waiting[0][2] if self._waiting else ""
        replies = super().poll(wait)
        Tap.heard.extend((f"{op} from {r.site}", op, r.payload or r.error.encode()) for r in replies)
        return replies


def released(
    folder: Path, rows: list[str], settings: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> dict[str, bytes]:
    """Run a study over a table by the command line; return all that was said, passed on or written, by its place.

    `sites/` is what a site keeps for itself. What is random by design (keys, signatures, shares, hashes over them) is
    blanked out, its length kept.
    """
    shutil.rmtree(folder, ignore_errors=True)
    path, out = write(folder, rows), folder / "run"
    monkeypatch.setattr(runs, "InProcess", Tap)
    Tap.heard = []
    RESTART()
    secret = settings.get("security.aggregation", "plain") != "plain"
    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    options = [part for word in words for part in ("--set", word)]
    said: dict[str, bytes] = {}
    for name, command in {
        "run": ["run", str(path), *options, "--out", str(out)],
        "plan": ["privacy", "plan", str(path), *options],
        "show": ["show", str(out), "--json"],
        "claim": ["privacy", "claim", str(out), "--json"],
        "report": ["report", str(out)],
    }.items():
        if "simulation_only" in str(settings) and name == "claim":
            continue
        said[f"$ {name}"] = _blank(_told(command), name)
    for place, op, payload in Tap.heard:
        key = f"{place}, number {sum(one.startswith(place) for one in said)}"
        said[key] = _blank(payload, "wire") if secret and op in ("work", "phase") else payload
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.is_file() and not name.startswith("sites/"):
            keyed = secret or name == "privacy.json" or name.endswith(".html")  # they tell the ledger's head
            said[name] = _blank(file.read_bytes(), name) if keyed else file.read_bytes()
    return {name: content.replace(str(folder).encode(), b"FOLDER") for name, content in said.items()}


def _told(command: list[str]) -> bytes:
    """Return what a command prints, and its exit code."""
    stream = io.StringIO()
    code: object = 0
    with redirect_stdout(stream), redirect_stderr(stream), _without_test_handlers():
        try:
            cli.app(command, standalone_mode=False)
        except MedfedError as error:
            code = f"{type(error).__name__}: {error}"
        except SystemExit as error:
            code = error.code
        except Exception as error:
            code = f"{type(error).__name__}"
    return f"{stream.getvalue()}\n{code}".encode()


@contextmanager
def _without_test_handlers() -> Iterator[None]:
    """Leave logging as a user has it: where nobody handles a warning, Python prints it."""
    handlers, logging.root.handlers = logging.root.handlers, []
    try:
        yield
    finally:
        logging.root.handlers = handlers


def _blank(content: bytes, name: str) -> bytes:
    """Return bytes without what is random by design: hexadecimal words, and what is shared or sealed."""
    if name == "wire":
        try:
            header, tensors = codec.decode(content)
        except MedfedError:
            return content
        return repr((sorted(header.items()), sorted((n, t.dtype, t.shape) for n, t in tensors.items()))).encode()
    return re.sub(rb"\b[0-9a-f]{16,}\b", lambda found: b"x" * len(found.group()), content)


def differences(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Return the places where two releases differ."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def test_the_run_is_a_run(tmp_path: Path, fixed: pytest.MonkeyPatch) -> None:
    """It ends complete, tells, passes on and writes what the laws below compare."""
    found = released(tmp_path / "s", lines(), {}, fixed)
    assert b"run folder" in found["$ run"] and found["$ run"].endswith(b"\n0"), found["$ run"].decode()
    assert json.loads(found["summary.json"])["status"] == "complete"
    assert all(found[f"$ {name}"].endswith(b"\n0") for name in ("plan", "show", "claim", "report"))
    written = {"events.jsonl", "summary.json", "study.toml", "plan.json", "privacy.json", "model.safetensors"}
    assert written < set(found) and any(name.startswith("checkpoints/") for name in found)
    assert any(name.endswith(".html") for name in found)
    assert {name.split(",")[0] for name in found if " from " in name} >= {
        f"{op} from {site}" for op in ("survey", "prepare", "enrol", "work", "evaluate") for site in ("north", "east")
    }


@pytest.fixture
def whole(tmp_path: Path, fixed: pytest.MonkeyPatch) -> dict[str, bytes]:
    return released(tmp_path / "s", lines(), {}, fixed)


def test_each_patient_removed_in_turn_changes_no_byte(
    tmp_path: Path, fixed: pytest.MonkeyPatch, whole: dict[str, bytes]
) -> None:
    found = {name: differences(whole, released(tmp_path / "s", lines(name), {}, fixed)) for name in NAMES}
    assert {name: places for name, places in found.items() if places} == {}
