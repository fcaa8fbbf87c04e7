"""Neighbouring tables: two that differ in one patient leave the same bytes, but for the noised sum.

No clipped gradient counts for anything here and the noise is fixed, so that whatever still differs
between the runs on two tables was told by something else than the noised sum: an order, a size, a
warning, an error. The sum itself has a test of its own.
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
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medfed
from medfed import cli, runs
from medfed.compliance import trail
from medfed.core import codec, entropy
from medfed.core.checks import MedfedError
from medfed.data import raw_columns, sources, surveys, tables
from medfed.data.frames import Frames
from medfed.learn import dpsgd
from medfed.monitor import events
from medfed.node import evaluation
from medfed.node.inprocess import InProcess
from medfed.privacy import ledger_file
from medfed.rounds.prepare import prepare
from medfed.runs import simulation

pytestmark = pytest.mark.usefixtures("one_thread")

HEADER = "subject,hospital,age,lactate,ward,died,part"

PUBLIC = [f"t{i},{place},{50 + i},{1 + i / 4},{ward},{died},test" for i, (place, ward, died) in enumerate(
    (place, ward, died) for place in ("north", "south", "east") for ward, died in (("icu", "no"), ("ward", "yes"))
)]  # fmt: skip
"""Held-out patients, declared public."""

PRIVATE_ROWS = {
    "first of the file": ["a1,south,61,1.5,ward,no,train"],
    "several records": [
        "a2,north,48,1.25,icu,no,train",
        "a2,north,49,2.5,ward,no,train",
        "a2,north,50,,icu,no,train",
    ],
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

SIZES = ("north", "south", "east")

WAYS: dict[str, dict[str, Any]] = {
    "shared": {},
    "site": {"privacy.noise": "site", "training.batch_size": 4},
    "central": {"privacy.noise": "central"},
    "masked": {"security.aggregation": "masked"},
    "three-party": {"security.aggregation": "three-party"},
    "numbers as they are": {"data.preprocess": "none", "privacy.clipping": "fixed"},
    "seeded": {"privacy.simulation_only": True},
    "a test that is paid for": {
        "data.test_is_public": False,
        "privacy.evaluation_epsilon": 0.25,
        "monitor.evaluate_every": 2,
    },
    "sites by name": {
        "data.site": "",
        "data.features": ["age", "lactate", "ward"],
        "sites.names": ["south", "north", "east"],
        "sites.shares": [0.5, 0.48, 0.02],
    },
}


def lines(without: str = "") -> list[str]:
    """Return the table's rows, those of one kind of patient left out; the first of the file is
    private.
    """
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
        # an aggregator's stream follows from its keys, which are the system's
        real(self, hashlib.sha256(str(next(made)).encode()).digest())

    def restart() -> None:
        nonlocal made
        made = iter(range(10**9))

    monkeypatch.setattr(entropy.Entropy, "__init__", seeded)
    monkeypatch.setattr(dpsgd, "clip_factor", lambda kind, clip: torch.zeros_like)
    monkeypatch.setattr(secrets, "token_hex", lambda count=8: "5a" * count)
    monkeypatch.setattr(time, "perf_counter", lambda: 0.0)
    for module in (runs, events, ledger_file, trail):
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
        Tap.heard.extend(
            (f"{op} from {r.site}", op, r.payload or r.error.encode()) for r in replies
        )
        return replies


def released(
    folder: Path,
    rows: list[str],
    settings: Mapping[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    pages: bool = False,
) -> dict[str, bytes]:
    """Run a study over a table by the command line; return all that was said, passed on or written,
    by its place.

    `sites/` is what a site keeps for itself. What is random by design (keys, signatures, shares,
    hashes over them) is blanked out, its length kept. `pages`: also what is made of the run's files
    afterwards.
    """
    shutil.rmtree(folder, ignore_errors=True)
    path = write(folder, rows)
    out = folder / "run"
    monkeypatch.setattr(simulation, "InProcess", Tap)
    Tap.heard = []
    RESTART()

    words = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    options = [part for word in words for part in ("--set", word)]
    commands = {
        "run": ["run", str(path), *options, "--out", str(out)],
        "plan": ["privacy", "plan", str(path), *options],
    }
    if pages:
        commands |= {
            "show": ["show", str(out), "--json"],
            "claim": ["privacy", "claim", str(out), "--json"],
        }
        commands |= {"report": ["report", str(out)]}
    said = {f"$ {name}": _blank(_told(command), name) for name, command in commands.items()}

    secret = settings.get("security.aggregation", "plain") != "plain"
    for number, (place, op, payload) in enumerate(Tap.heard):
        random = secret and op in ("work", "phase", "identify", "join")
        if random:
            payload = _blank(_blank(payload, "wire"), "keys")
        elif op == "statement":  # it tells the ledger's head, a hash under the ledger's key
            payload = _blank(payload, "head")
        said[f"message {number}: {place}"] = payload
    for file in sorted(out.rglob("*")):
        name = str(file.relative_to(out))
        if file.is_file() and not name.startswith("sites/"):
            # they tell the ledger's head
            keyed = secret or name == "privacy.json" or name.endswith(".html")
            if name.startswith("checkpoints/"):
                content = _headless(file.read_bytes())
            else:
                content = file.read_bytes()
            said[name] = _blank(content, name) if keyed else content
    return {
        name: content.replace(str(folder).encode(), b"FOLDER") for name, content in said.items()
    }


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
    handlers = logging.root.handlers
    logging.root.handlers = []
    try:
        yield
    finally:
        logging.root.handlers = handlers


def _blank(content: bytes, name: str) -> bytes:
    """Return bytes without what is random by design: hexadecimal words, and what is shared or
    sealed.
    """
    if name == "wire":
        try:
            header, tensors = codec.decode(content)
        except MedfedError:
            return content
        return repr(
            (sorted(header.items()), sorted((n, t.dtype, t.shape) for n, t in tensors.items()))
        ).encode()
    return re.sub(
        rb"(?<![.\w])(?=[0-9]*[a-f])[0-9a-f]{16,}\b",
        lambda found: b"x" * len(found.group()),
        content,
    )


def _headless(checkpoint: bytes) -> bytes:
    """Return a checkpoint without its checksum and the ledger's head, a hash under the ledger's
    key.
    """
    header, tensors = codec.decode(checkpoint[hashlib.sha256().digest_size :])
    assert len(header.pop("ledger", "x" * 64)) == 64
    return codec.encode(header, tensors)


def differences(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    """Return the places where two releases differ."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def test_the_run_is_a_run(tmp_path: Path, fixed: pytest.MonkeyPatch) -> None:
    """It ends complete, tells, passes on and writes what the laws below compare."""
    found = released(tmp_path / "s", lines(), {}, fixed, pages=True)
    assert b"run folder" in found["$ run"] and found["$ run"].endswith(b"\n0"), found[
        "$ run"
    ].decode()
    assert json.loads(found["summary.json"])["status"] == "complete"
    assert all(found[f"$ {name}"].endswith(b"\n0") for name in ("plan", "show", "claim", "report"))
    written = {
        "events.jsonl",
        "summary.json",
        "study.toml",
        "plan.json",
        "privacy.json",
        "model.safetensors",
    }
    assert written < set(found) and any(name.startswith("checkpoints/") for name in found)
    assert any(name.endswith(".html") for name in found)
    heard = {name.split(": ")[1] for name in found if name.startswith("message")}
    assert heard >= {
        f"{op} from {name}" for op in ("survey", "prepare", "work", "evaluate") for name in SIZES
    }

    pages = released(tmp_path / "s", lines("alone at its site"), {}, fixed, pages=True)
    assert differences(found, pages) == []


def test_each_patient_removed_in_turn_changes_no_byte(
    tmp_path: Path, fixed: pytest.MonkeyPatch
) -> None:
    whole = released(tmp_path / "s", lines(), {}, fixed)
    found = {
        name: differences(whole, released(tmp_path / "s", lines(name), {}, fixed)) for name in NAMES
    }
    assert {name: places for name, places in found.items() if places} == {}


OTHER_WAYS = [
    ("site", ["first of the file", "alone at its site", "an undeclared label"]),
    ("central", ["alone at its site", "several records"]),
    ("masked", ["first of the file", "alone at its site"]),
    ("three-party", ["first of the file", "alone at its site"]),
    (
        "numbers as they are",
        ["text in a number", "beyond every range", "alone with a gap in a column"],
    ),
    ("seeded", ["first of the file", "alone at its site"]),
    ("a test that is paid for", ["on both sides", "an undeclared mark"]),
    ("sites by name", ["first of the file", "alone at its site"]),
]


@pytest.mark.parametrize(("way", "names"), OTHER_WAYS, ids=[way for way, _ in OTHER_WAYS])
def test_no_way_of_noise_and_sums_tells_of_a_patient(
    tmp_path: Path, fixed: pytest.MonkeyPatch, way: str, names: list[str]
) -> None:
    whole = released(tmp_path / "s", lines(), WAYS[way], fixed)
    assert json.loads(whole["summary.json"])["status"] == "complete"
    found = {
        name: differences(whole, released(tmp_path / "s", lines(name), WAYS[way], fixed))
        for name in names
    }
    assert {name: places for name, places in found.items() if places} == {}


def test_a_held_out_patient_who_is_not_public_is_not_counted_either(
    tmp_path: Path, fixed: pytest.MonkeyPatch
) -> None:
    """Its figures are a noised histogram; whose scores it counts, and how many, is told nowhere
    else.
    """
    real = evaluation.tally
    fixed.setattr(evaluation, "tally", lambda *asked: np.ones_like(real(*asked)))
    way = WAYS["a test that is paid for"]
    whole = released(tmp_path / "s", lines(), way, fixed)
    for gone in (PUBLIC[2:3], PUBLIC[4:]):  # one of two, and all of east's
        fewer = released(tmp_path / "s", [row for row in lines() if row not in gone], way, fixed)
        assert differences(whole, fewer) == []


def test_a_site_without_anybody_to_test_is_tested_all_the_same(tmp_path: Path) -> None:
    way = WAYS["a test that is paid for"] | {"privacy.epsilon": 2.0}
    study = medfed.load_study(write(tmp_path, [row for row in lines() if row not in PUBLIC[4:]]))
    result = medfed.simulate(study._with(way))
    # one noise on the sum of all
    assert result.complete and set(result.summary["per_site"]) == set()
    apart = medfed.simulate(study._with(way | {"security.aggregation": "masked"}))
    assert apart.complete and set(apart.summary["per_site"]) == set(SIZES)


# The power of the laws above ----------------------------------------------------------------------


def _first_appearance(study: Any, *rest: Any) -> Any:
    found, data = REAL_FRAMES(study, *rest)
    return Frames.of(
        dict(sorted(found.items(), key=lambda item: min(item[1].index, default=0)))
    ), data


def _sites_that_have_rows(study: Any, *rest: Any) -> Any:
    found, data = REAL_FRAMES(study, *rest)
    return Frames.of(
        {name: frame for name, frame in found.items() if (frame["part"] == "train").any()}
    ), data


def _counted(table: Any, data: Any, declared: int, test: int) -> Any:
    return REAL_SURVEY(table, data, declared, test) | {"patients": len(table.ids)}


def _logged(where: str, *_: Any) -> None:
    logging.getLogger("other").warning("%s", where)


REAL_FRAMES = sources.frames
REAL_SURVEY = surveys.public_survey
LEAKS: dict[str, tuple[object, str, Any, str]] = {
    "the order of rows": (sources, "frames", _first_appearance, "first of the file"),
    "a site that is gone": (sources, "frames", _sites_that_have_rows, "alone at its site"),
    "a count in the survey": (surveys, "public_survey", _counted, "plain"),
    "an own log that is printed": (tables.logger, "warning", _logged, "an undeclared label"),
    "columns by their cells": (tables, "_check_described", lambda *_: None, "text in a number"),
}


@pytest.mark.parametrize("leak", LEAKS)
def test_a_planted_leak_is_seen(tmp_path: Path, fixed: pytest.MonkeyPatch, leak: str) -> None:
    place, name, planted, patient = LEAKS[leak]
    fixed.setattr(place, name, planted)
    if leak == "columns by their cells":
        fixed.setattr(
            raw_columns.RawColumn,
            "is_declared_text",
            lambda self: self.frames.count(self.not_number) > 0,
        )
    whole = released(tmp_path / "s", lines(), {}, fixed)
    assert differences(whole, released(tmp_path / "s", lines(patient), {}, fixed))


# The sum ------------------------------------------------------------------------------------------


def _sums(folder: Path, rows: list[str], weight: float) -> tuple[torch.Tensor, Any]:
    """Return the sum of all sites' rows before noise, in grid units, where all weights are one
    number.
    """
    study = medfed.load_study(write(folder, rows))
    nodes = runs.open_sites(study, None)
    plan = prepare(nodes[0].study, InProcess(nodes), [node.name for node in nodes])
    w_P = torch.full((plan.parameters,), weight)
    total = torch.zeros(plan.message, dtype=torch.int64)
    for node in nodes:
        node.account = None
        total += codec.decode(node.handle("work", codec.encode({"round": 1}, {"w": w_P})))[1]["row"]
    return total, plan.guarantee


def test_a_patient_moves_the_sum_by_no_more_than_is_paid_for(tmp_path: Path) -> None:
    for weight in (0.0, 3.0):
        whole, guarantee = _sums(tmp_path / "whole", lines(), weight)
        most = guarantee.sensitivity_units()
        moved = {
            name: float((whole - _sums(tmp_path / "s", lines(name), weight)[0]).double().norm())
            for name in NAMES
        }
        assert max(moved.values()) <= most
        assert max(moved.values()) > 0.5 * most  # else the bound would say nothing
        for name in (
            "an undeclared label",
            "no label",
            "a field too many",
            "a field too few",
            "an open quote",
        ):
            assert moved[name] == 0
