"""Ranges that training patients pay for: what a patient, a liar, a crash and a second run can do;
and the claim.
"""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from typer.testing import CliRunner

import medfed
from medfed import runs
from medfed.cli import app
from medfed.core import codec
from medfed.core.checks import BudgetError, LedgerError, MedfedError, PlanError, RunError, SiteError
from medfed.core.flat import fingerprint
from medfed.data import encoding, preprocess
from medfed.data.features import open_columns
from medfed.evidence import compare
from medfed.monitor import events
from medfed.monitor.events import Event
from medfed.node import queries, site
from medfed.node.inprocess import InProcess
from medfed.planning import fix, recipe
from medfed.privacy import guarantee, quantiles
from medfed.privacy.guarantee import ranges_noise
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Lifetime
from medfed.rounds import checkpoints, ranges
from medfed.rounds.prepare import enrol, prepare
from medfed.runs import execute
from medfed.study import Study
from tests.tables import PRIVATE, SITES, invented, write_study
from tests.test_private_runs import Crash, charges, claim_of, home, interrupted, own_ledger

__all__ = ["home"]
pytestmark = pytest.mark.usefixtures("one_thread")

OPEN = ("age", "lactate")
DECLARED = {f"data.dictionary.{name}.range": [0, 100] for name in OPEN}
SIZES = {"north": 960, "south": 580, "east": 380}


def text() -> str:
    """The private study, whose numbers have no range."""
    found = PRIVATE.replace("[data.dictionary.age]\nrange = [20, 100]\n", "")
    found = found.replace("[data.dictionary.lactate]\nrange = [0.1, 15]\nlog = true\n", "")
    for name, size in SIZES.items():
        found = found.replace(f"{name} = {size // 10}", f"{name} = {size}")
    return found.replace("delta = 1e-4", "delta = 1e-5\nranges_epsilon = 0.5").replace(
        "epsilon = 1.0", "epsilon = 2.0", 1
    )


def table(change: Any = lambda frame: frame) -> pd.DataFrame:
    return change(invented(2400))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path, text(), table()))


def found_in(folder: Path) -> dict[str, list[float]]:
    plan = json.loads((folder / "plan.json").read_text())
    return {
        column["name"]: column["found"] for column in plan["encoding"]["columns"] if column["found"]
    }


# what is found, paid and told ---------------------------------------------------------------------


@pytest.mark.parametrize("way", [{}, {"privacy.noise": "site"}, {"security.aggregation": "masked"}])
def test_ranges_are_found_paid_and_told(tmp_path: Path, study: Study, way: dict[str, Any]) -> None:
    result = medfed.run(study._with(way), tmp_path / "run")
    ledger = own_ledger(tmp_path / "run")
    claim = claim_of(tmp_path / "run")
    found = found_in(tmp_path / "run")
    assert result.complete and set(found) == set(OPEN)
    assert charges(ledger) == dict.fromkeys(SITES, 4)
    assert charges(ledger, "ranges") == dict.fromkeys(SITES, quantiles.TIMES)

    frame = table()
    for name in OPEN:
        low, high = frame[name].quantile([0.05, 0.95])
        assert found[name][0] < frame[name].median() < found[name][1]
        assert 0.3 < (found[name][1] - found[name][0]) / (high - low) < 3

    told = [
        e
        for e in events.read(tmp_path / "run" / "events.jsonl")
        if isinstance(e, events.RangesFound)
    ]
    assert [dict(e.ranges) for e in told] == [found]
    assert result.summary["ranges"]["found"] == claim["ranges"]["found"] == found
    assert claim["ranges"]["released"] == claim["ranges"]["times"] == quantiles.TIMES
    assert claim["ranges"]["columns"] == list(OPEN)
    assert 0.99 * 2 < claim["epsilon"] <= 2
    assert claim["composition"]["ledger"]["epsilon_all_runs"] == pytest.approx(
        claim["epsilon"], rel=1e-3
    )
    assert 0.99 * 2 < claim["second_accountant"]["epsilon"] < 2.05
    assert medfed.load(tmp_path / "run").predict(frame.head()).equals(result.predict(frame.head()))
    assert "ranges" in (medfed.generate_privacy_report(tmp_path / "run")).read_text(
        encoding="utf-8"
    )


def test_training_has_the_more_noise_that_leaves_room_for_ranges(study: Study) -> None:
    sizes = SIZES
    declared = study.set("privacy.ranges_epsilon", 0.0)
    with_them, without = (guarantee.resolve(one, sizes, 10) for one in (_listed(study), declared))
    assert (
        1.02
        < with_them.releases["north"].noise_multiplier / without.releases["north"].noise_multiplier
        < 1.06
    )
    query = with_them.queries["ranges"]
    alone = guarantee.repeat(with_them.query_event("ranges"), query.times)
    assert with_them.epsilon_of(alone) == pytest.approx(0.5, rel=1e-3)
    assert (
        with_them.epsilon_of(with_them.whole("north")) == pytest.approx(2, rel=1e-3)
        and not without.queries
    )


def test_nobody_pays_for_ranges_that_are_all_declared(tmp_path: Path) -> None:
    declared = PRIVATE.replace("delta = 1e-4", "delta = 1e-4\nranges_epsilon = 0.5")
    result = medfed.run(medfed.load_study(write_study(tmp_path, declared)), tmp_path / "run")
    assert result.complete and charges(own_ledger(tmp_path / "run"), "ranges") == {}
    assert claim_of(tmp_path / "run")["ranges"] is None and result.summary["ranges"] is None


def test_a_simulation_finds_the_same_ranges_twice_and_pays_nothing(
    tmp_path: Path, study: Study
) -> None:
    seeded = study.set("privacy.simulation_only", True)
    for noise in ("shared", "site"):
        one, two = (
            medfed.simulate(seeded.set("privacy.noise", noise)).summary["ranges"] for _ in range(2)
        )
        assert one == two
    medfed.run(seeded, tmp_path / "run")
    assert not own_ledger(tmp_path / "run").exists()
    assert claim_of(tmp_path / "run")["ranges"]["released"] == quantiles.TIMES
    one, two = (medfed.simulate(study).summary["ranges"] for _ in range(2))
    assert one != two


def test_without_noise_they_are_the_quantiles_of_one_cell_a_patient(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        guarantee, "query_noise", lambda g, label, most, numbers, key: np.zeros(numbers)
    )
    monkeypatch.setattr(guarantee.Guarantee, "query_sd", lambda *_: 0.0)
    asked: list[np.ndarray] = []
    real = ranges._counts
    monkeypatch.setattr(ranges, "_counts", lambda *rest: (asked.append(rest[-1]), real(*rest))[1])
    told: list[Event] = []
    medfed.simulate(study, listeners=[told.append])
    (event,) = (e for e in told if isinstance(e, events.RangesFound))
    tables = [node.table for node in runs.open_sites(study, None)]

    for place, name in enumerate(OPEN):
        values = np.concatenate([queries._one_cell_each(one, name) for one in tables if one])
        cell = asked[-1][place, 1] - asked[-1][place, 0]
        assert event.ranges[name] == pytest.approx(
            np.quantile(values, [0.05, 0.95]).tolist(), abs=cell
        )
        assert cell < 0.2 * (event.ranges[name][1] - event.ranges[name][0])


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_counts_carry_the_noise_that_is_paid_for(
    study: Study, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of patients without a value the sum is noise alone, of the variance that is claimed."""
    monkeypatch.setattr(queries, "_one_cell_each", lambda *_: np.empty(0))
    nodes, plan = _enrolled(study.set("privacy.noise", noise))
    for node in nodes.values():
        node.account = None  # nobody pays here
    fleet = InProcess(list(nodes.values()))
    drawn = list[np.ndarray]()

    for _ in range(6):
        for turn in range(quantiles.TIMES):
            edges = np.tile(np.arange(quantiles.CELLS[turn] - 1.0), (2, 1))
            drawn.append(ranges._counts(plan, fleet, turn, edges)[0].ravel())

    values = np.concatenate(drawn)
    sd = ranges_noise(plan.study, len(SIZES))
    found = float(np.square(values).sum())
    low, high = stats.chi2.ppf([1e-6, 1 - 1e-6], len(values))
    assert low < found / sd**2 < high
    for factor in (2 / 3, 3 / 2, 1 / math.sqrt(3), math.sqrt(3)):
        assert not low < found / (factor * sd) ** 2 < high


# patients -----------------------------------------------------------------------------------------


def _listed(study: Study) -> Study:
    """Return the study with its open columns in its dictionary."""
    return recipe.examine(study)[0]


def _enrolled(study: Study, frame: pd.DataFrame | None = None) -> tuple[dict[str, site.Site], Any]:
    """Return the study's sites, ready to be asked, and the plan."""
    if frame is not None:
        frame.to_csv(study.folder / "cohort.csv", index=False)
    nodes = runs.open_sites(study, None)
    fleet = InProcess(nodes)
    plan = prepare(nodes[0].study, fleet, fleet.sites())
    enrol(plan, fleet, "run")
    return {node.name: node for node in nodes}, plan


def _payload(turn: Any = 0, edges: np.ndarray | None = None) -> bytes:
    edges = quantiles.Search(2, 1.0).edges() if edges is None else edges
    return codec.encode({"turn": turn}, {"edges": torch.from_numpy(edges)})


def _told(node: site.Site, payload: bytes | None = None) -> np.ndarray:
    return codec.decode(node.handle("ranges", payload or _payload()))[1]["counts"].numpy()


def _replaced(frame: pd.DataFrame, name: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return the table with other rows for a patient."""
    place = frame.index[frame["subject"] == name]
    new = pd.DataFrame(
        [{**frame.loc[place[0]].to_dict(), **row} for row in rows], columns=frame.columns
    )
    return pd.concat(
        [frame.drop(index=place).astype({"age": object, "lactate": object}), new], ignore_index=True
    )


ODD: dict[str, list[dict[str, Any]]] = {
    "absent": [],
    "huge": [{"age": 1e300, "lactate": -1e300}],
    "infinite": [{"age": "inf", "lactate": "-inf"}],
    "no number": [{"age": "nan", "lactate": "see letter"}],
    "minus zero": [{"age": "-0.0", "lactate": "-0.0"}],
    "many records": [{"age": k, "lactate": -k} for k in range(200)],
    "a cell missing": [{"age": None}],
    "an undeclared label": [{"died": "perhaps"}],
}


@pytest.mark.parametrize("kind", ODD)
def test_a_patient_moves_one_count_of_each_column_by_one(study: Study, kind: str) -> None:
    frame = table()
    node = runs.open_sites(study, None)[0]
    assert node.table is not None
    training = (
        ~node.table.test
        & (np.bincount(node.table.patient, minlength=len(node.table.ids)) == 1)[node.table.patient]
    )
    name = str(node.table.ids[node.table.patient[training][0]])
    counts = []
    for rows in (frame[frame["subject"] == name].to_dict("records"), ODD[kind]):
        nodes, _ = _enrolled(study, _replaced(frame, name, rows))
        counts.append(_told(nodes["north"]))

    moved = counts[1] - counts[0]
    assert (np.abs(moved).sum(1) <= 2).all() and (
        np.abs(counts[1].sum(1) - counts[0].sum(1)) <= 1
    ).all()
    if kind in ("absent", "no number", "infinite", "an undeclared label"):
        known = np.array(
            [pd.notna(frame.loc[frame["subject"] == name, column].iloc[0]) for column in OPEN]
        )
        assert (moved.sum(1) == -known.astype(float)).all() and (
            np.abs(moved).sum(1) == known
        ).all()


def test_of_each_patient_its_own_records_alone_choose_the_cell(study: Study) -> None:
    """A patient with many records gives the same one whoever else is at the site."""
    frame = _replaced(
        table(), "p0000", [{"age": 20 + k, "lactate": None if k % 2 else k} for k in range(31)]
    )
    listed = runs.open_sites(study, None)[0].study
    for others in (frame, frame[(frame["subject"] <= "p0900")], frame[frame["subject"] == "p0000"]):
        own = site.Site.open("x", others.sample(frac=1, random_state=1), listed).table
        assert own is not None
        me = list(own.ids).index("p0000")
        held_out = replace(own, test=own.patient != me)
        assert [queries._one_cell_each(held_out, name).tolist() for name in OPEN] == [
            [50.0],
            [14.0],
        ]


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_patients_of_two_sites_are_covered(tmp_path: Path, study: Study, noise: str) -> None:
    frame = table()
    moved = frame[frame["hospital"] == "north"].head(5).assign(hospital="south")
    pd.concat([frame, moved]).to_csv(study.folder / "cohort.csv", index=False)
    twice = study._with(
        {"privacy.max_sites_per_patient": 2, "privacy.noise": noise, "privacy.epsilon": 4.0}
    )
    twice = twice.set("privacy.ranges_epsilon", 1.5)
    assert medfed.run(twice, tmp_path / "run").complete
    claim = claim_of(tmp_path / "run")
    assert 0.99 * 4 < claim["epsilon"] <= 4
    assert claim["composition"]["ledger"]["epsilon_all_runs"] == pytest.approx(
        claim["epsilon"], rel=1e-3
    )
    if noise == "shared":
        nodes, _ = _enrolled(twice)
        with pytest.raises(SiteError, match="not all sites were asked"):
            _told(nodes["north"])


@pytest.mark.parametrize(
    "ends", [(-3e38, 3e38), (0.0, 5e-324), (0.0, 1e-300), (1.0, 1.0000000000000002)]
)
def test_preparing_a_column_tells_nothing_of_what_is_in_it(
    study: Study, ends: tuple[float, float]
) -> None:
    """Whatever range a coordinator says, and whatever is in a cell."""
    wild = _replaced(
        table(), "p0000", [{"age": 1e308, "lactate": -1e308}, {"age": "abc", "lactate": "1e400"}]
    )
    answers = []
    for frame in (table(), wild):
        nodes, plan = _enrolled(study, frame)
        told = plan.encoding.to_json()
        for column in told["columns"][:2]:
            one = preprocess.with_range(encoding.Column(column["name"], "number"), ends)
            column.update(centre=one.centre, scale=one.scale, found=list(ends))
        answers.append([_answer(node, _prepared(told, plan)) for node in nodes.values()])
        assert all(torch.isfinite(node.train.x).all() for node in nodes.values())
    assert answers[0] == answers[1]


def _answer(node: site.Site, payload: bytes) -> bytes | str:
    try:
        return node.handle("prepare", payload)
    except SiteError as error:
        return str(error)


def _prepared(encoding: dict[str, Any], plan: Any) -> bytes:
    sizes = {name: {"train": plan.sizes[name]["train"]} for name in plan.participants}
    fixed = fingerprint({})
    return codec.encode(
        {"encoding": encoding, "sizes": sizes, "clients": list(sizes), "fixed": fixed}
    )


# the liar -----------------------------------------------------------------------------------------


DESCENDING = np.tile(np.arange(44.0)[::-1], (2, 1))
LIES: dict[str, tuple[bytes, str]] = {
    "no edges": (codec.encode({"turn": 0}), "edges of 0 numbers"),
    "no turn": (codec.encode({}, {"edges": torch.zeros(2, 44, dtype=torch.float64)}), "turn=None"),
    "a fifth turn": (_payload(quantiles.TIMES), "turn=4"),
    "a turn before": (_payload(-1), "turn=-1"),
    "a turn in words": (_payload("0"), "turn='0'"),
    "true": (_payload(True), "turn=True"),
    "too many cells": (_payload(0, np.tile(np.arange(45.0), (2, 1))), "45 cells of each"),
    "cells of another turn": (_payload(1), "10 cells of each"),
    "one column": (_payload(0, quantiles.Search(1, 1.0).edges()), "2 columns are open"),
    "a column more": (_payload(0, quantiles.Search(3, 1.0).edges()), "2 columns are open"),
    "descending": (_payload(0, DESCENDING), "no edges between cells"),
    "equal": (_payload(0, np.zeros((2, 44))), "no edges between cells"),
    "no number": (_payload(0, np.full((2, 44), np.nan)), "no edges between cells"),
    "infinite": (
        _payload(0, np.append(np.tile(np.arange(43.0), (2, 1)), [[np.inf]] * 2, 1)),
        "no edges between",
    ),
    "in one row": (_payload(0, np.arange(44.0)), "edges of 44 numbers"),
    "whole numbers": (_payload(0, np.tile(np.arange(44), (2, 1))), "no edges between cells"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_site_counts_by_sound_edges_of_what_is_paid_for_and_charges_nobody_else(
    study: Study, lie: str
) -> None:
    nodes, _ = _enrolled(study)
    payload, words = LIES[lie]
    with pytest.raises(SiteError, match=words):
        nodes["north"].handle("ranges", payload)
    assert nodes["north"].account is not None and not nodes["north"].account.ledger.rows()


def test_a_site_counts_as_often_as_is_paid_and_no_more(study: Study) -> None:
    nodes, _ = _enrolled(study)
    north = nodes["north"]
    for _ in range(quantiles.TIMES):
        _told(north)
    with pytest.raises(SiteError, match=r"pays for a plan of 4 \(ranges\), and 4 are paid"):
        _told(north)
    assert north.account is not None and len(north.account.ledger.rows()) == quantiles.TIMES


def test_nobody_counts_before_patients_are_enrolled_or_without_a_plan(study: Study) -> None:
    nodes = runs.open_sites(study, None)
    with pytest.raises(SiteError, match="nobody has paid for a range"):
        _told(nodes[0])
    prepare(nodes[0].study, InProcess(nodes), [node.name for node in nodes])
    with pytest.raises(SiteError, match="nobody is enrolled"):
        _told(nodes[0])


def test_nobody_counts_where_the_study_asks_for_no_range(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, PRIVATE))
    nodes, _ = _enrolled(study)
    with pytest.raises(SiteError, match="nobody has paid for a range"):
        _told(nodes["north"])


ENDS: dict[str, Any] = {
    "none": [],
    "one": [1.0],
    "three": [1.0, 2.0, 3.0],
    "equal": [1.0, 1.0],
    "turned": [2.0, 1.0],
    "too large": [0.0, 4e38],
    "in words": ["a", "b"],
    "whole": [0, 1],
}


@pytest.mark.parametrize("kind", ENDS)
def test_a_range_that_is_none_is_refused_whoever_is_in_the_table(study: Study, kind: str) -> None:
    nodes, plan = _enrolled(study)
    told = plan.encoding.to_json()
    told["columns"][0]["found"] = ENDS[kind]
    with pytest.raises(SiteError, match=r"is none|no range for some open columns"):
        nodes["north"].handle("prepare", _prepared(told, plan))


LIES_OF_COLUMNS: dict[str, Any] = {
    "a range of a declared column": lambda c: c[2].update(found=[0.0, 1.0]),
    "a scale that is not the range's": lambda c: c[0].update(scale=1e-30),
    "no cap": lambda c: c[0].update(cap=0.0),
    "an indicator more": lambda c: c[0].update(indicator=True),
    "a logarithm": lambda c: c[0].update(log=True, floor=1.0),
}


@pytest.mark.parametrize("lie", LIES_OF_COLUMNS)
def test_an_open_column_is_the_dictionarys_but_for_its_range(study: Study, lie: str) -> None:
    nodes, plan = _enrolled(study)
    told = plan.encoding.to_json()
    assert [column["name"] for column in told["columns"]] == ["age", "lactate", "ward"]
    LIES_OF_COLUMNS[lie](told["columns"])
    with pytest.raises(SiteError, match="is not that of the study's data dictionary"):
        nodes["north"].handle("prepare", _prepared(told, plan))


def _counts(change: Any) -> Any:
    """Return a lie: counts of which `change` makes others."""

    def lie(honest: bytes) -> bytes:
        counts = codec.decode(honest)[1]["counts"].clone()
        return codec.encode({}, {"counts": change(counts)})

    return lie


def _one_cell(value: float) -> Any:
    def change(counts: torch.Tensor) -> torch.Tensor:
        counts[0, -1] = value
        return counts

    return _counts(change)


LYING_COUNTS: dict[str, Any] = {
    "no numbers": _counts(lambda counts: torch.full_like(counts, math.nan)),
    "another shape": _counts(lambda counts: counts[:, :-1].clone()),
    "without counts": lambda honest: codec.encode({}, {}),
    "garbage": lambda honest: b"garbage",
    "nothing": lambda honest: b"",
    "1e308 in each cell": _counts(lambda counts: torch.full_like(counts, 1e308)),
    "a million beyond all": _one_cell(1e6),
    "fewer than none": _one_cell(-1e4),
    "an error": lambda honest: SiteError("the disk is full"),
}


@pytest.mark.parametrize("noise", ["shared", "site"])
@pytest.mark.parametrize("lie", LYING_COUNTS)
def test_a_site_whose_counts_are_no_counts_is_left_out_by_name_and_moves_nothing(
    study: Study, lie: str, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = site.OPS["ranges"]

    def lying(nodes: Any, *rest: Any) -> Any:
        answers = real(nodes, *rest)
        return [
            LYING_COUNTS[lie](a) if n.name == "east" else a
            for n, a in zip(nodes, answers, strict=True)
        ]

    monkeypatch.setitem(site.OPS, "ranges", lying)
    told: list[Event] = []
    tried = study._with({"training.quorum": 0.5, "training.rounds": 1, "monitor.evaluate_every": 1})
    summary = medfed.simulate(tried.set("privacy.noise", noise), listeners=[told.append]).summary
    assert summary["status"] == "incomplete" and {one["site"] for one in summary["excluded"]} == {
        "east"
    }
    assert [event.sites for event in told if isinstance(event, events.RangesFound)] == [2]
    for name in OPEN:
        low, high = summary["ranges"]["found"][name]
        assert low < table()[name].median() < high < 500


def test_no_patient_decides_whether_its_site_is_left_out(study: Study) -> None:
    """Of a site far larger than declared no cell holds more than the declared size, so that it is
    never left out.
    """
    frame = table().assign(age=60.0)
    small = study._with({"privacy.sizes.north": 900, "privacy.sizes.east": 130})
    nodes, plan = _enrolled(small, frame)
    counts = [_told(nodes["east"])]
    assert counts[0].max() == 130 and counts[0].min() == 0
    _, excluded = ranges._counts(
        plan, InProcess(list(nodes.values())), 0, quantiles.Search(2, 1.0).edges()
    )
    assert not excluded


# crashes and further runs -------------------------------------------------------------------------


def test_a_run_that_is_killed_between_its_counts_has_paid_and_only_another_study_runs(
    tmp_path: Path, study: Study, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the note says is what works, and nothing else does."""
    Ledger.open(home, founding=Lifetime(6.0, 1e-5, operator="Ada")).close()
    lasting = study.set("privacy.scope", "study")
    real = ranges._counts

    with monkeypatch.context() as patch:
        patch.setattr(
            ranges, "_counts", lambda *rest: (real(*rest), (_ for _ in ()).throw(Crash()))[0]
        )
        with pytest.raises(Crash) as crash:
            medfed.run(lasting, tmp_path / "run")

    (note,) = crash.value.__notes__
    assert "stays spent of this study's epsilon" in note and "Under another study.name" in note
    assert charges(home, "ranges") == dict.fromkeys(SITES, 1) and charges(home) == {}
    with pytest.raises(MedfedError, match="is not a run folder"):
        medfed.resume(tmp_path / "run")

    for kind in ({}, {"privacy.epsilon": 3.0}, {"privacy.ranges_epsilon": 0.0} | DECLARED):
        with pytest.raises(
            BudgetError, match=r"In this study .*left for one release.*another study\.name"
        ):
            medfed.run(lasting._with(kind), tmp_path / "again")

    assert medfed.run(lasting.set("study.name", "another"), tmp_path / "other").complete


@pytest.mark.parametrize("scope", ["run", "study"])
@pytest.mark.parametrize("at", ["the encoding", "the log", "the checkpoint"])
def test_a_run_that_is_killed_after_its_counts_is_resumed_and_asks_nobody_again(
    tmp_path: Path, study: Study, home: Path, scope: str, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = study.set("privacy.scope", scope)
    where = {"the encoding": (ranges, "send_encoding"), "the log": (execute, "tell_start")}
    with monkeypatch.context() as patch:
        patch.setattr(
            *where.get(at, (checkpoints, "write")), lambda *_: (_ for _ in ()).throw(Crash())
        )
        with pytest.raises(Crash) as crash:
            medfed.run(asked, tmp_path / "run")
    assert "resume" in " ".join(crash.value.__notes__)
    book = home if scope == "study" else own_ledger(tmp_path / "run")
    found = found_in(tmp_path / "run")
    assert charges(book, "ranges") == dict.fromkeys(SITES, quantiles.TIMES) and charges(book) == {}

    result = medfed.resume(tmp_path / "run")
    assert result.complete and result.summary["ranges"]["found"] == found == found_in(
        tmp_path / "run"
    )
    assert charges(book, "ranges") == dict.fromkeys(SITES, quantiles.TIMES)
    assert (
        charges(book) == dict.fromkeys(SITES, 4)
        and 0.99 * 2 < claim_of(tmp_path / "run")["epsilon"] <= 2
    )
    started = [
        e
        for e in events.read(tmp_path / "run" / "events.jsonl")
        if isinstance(e, events.RunStarted)
    ]
    assert len(started) == 1
    founded = [text for text in result.summary["warnings"] if "ledger was founded" in text]
    assert len(founded) == (scope == "study")


def test_a_run_that_is_not_charged_for_its_ranges_does_not_begin(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(execute, "tell_start", lambda *_: (_ for _ in ()).throw(Crash()))
        with pytest.raises(Crash):
            medfed.run(study, tmp_path / "run")
    shutil.rmtree(own_ledger(tmp_path / "run").parent)
    with pytest.raises(LedgerError, match="lacks what patients have paid for ranges"):
        medfed.resume(tmp_path / "run")


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", study, monkeypatch, 2, saved=True)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(RunError, match="patients have paid for rounds"):
        medfed.resume(tmp_path / "run")


def test_a_resumed_run_asks_for_no_range_again(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", study, monkeypatch, 2, saved=True)
    before = found_in(tmp_path / "run")
    result = medfed.resume(tmp_path / "run")
    assert result.complete and result.summary["ranges"]["found"] == before
    assert charges(own_ledger(tmp_path / "run"), "ranges") == dict.fromkeys(SITES, quantiles.TIMES)
    claim = claim_of(tmp_path / "run")
    assert claim["ranges"]["released"] == quantiles.TIMES and 0.99 * 2 < claim["epsilon"] <= 2


def test_a_second_run_on_the_same_patients_is_refused_before_it_counts(
    tmp_path: Path, study: Study, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lasting = study.set("privacy.scope", "study")
    assert medfed.run(lasting, tmp_path / "one").complete
    monkeypatch.setitem(site.OPS, "ranges", lambda *_: pytest.fail("a value was counted"))
    with pytest.raises(BudgetError, match="left for one release"):
        medfed.run(lasting, tmp_path / "two")
    assert charges(home, "ranges") == dict.fromkeys(SITES, quantiles.TIMES)


def test_patients_who_cannot_pay_are_not_counted(tmp_path: Path, study: Study, home: Path) -> None:
    """The lifetime budget has room for the plan as a whole or for nothing."""
    Ledger.open(home, founding=Lifetime(1.0, 1e-5, operator="Ada")).close()
    with pytest.raises(BudgetError):
        medfed.run(study.set("privacy.scope", "study"), tmp_path / "run")
    assert charges(home, "ranges") == {}


# what the study says ------------------------------------------------------------------------------


def test_without_a_price_an_undescribed_column_is_refused_and_the_price_is_named(
    tmp_path: Path, study: Study
) -> None:
    free = study.set("privacy.ranges_epsilon", 0.0)
    with pytest.raises(
        PlanError, match=r"range or categories.*privacy\.ranges_epsilon=0\.5.*about 4 % more noise"
    ):
        medfed.run(free, tmp_path / "run")
    with pytest.raises(PlanError, match=r"privacy\.ranges_epsilon=0\.5"):
        medfed.run(free.set("data.features", ["age", "lactate"]), tmp_path / "run")
    path = study.folder / "study.toml"
    path.write_text(path.read_text().replace("ranges_epsilon = 0.5\n", ""))
    assert "privacy.ranges_epsilon=0.5" in fix.fix(path).text


LEFT_OPEN = {
    "nothing": "",
    "delta": "delta = 1e-5\n",
    "the encoding": 'delta = 1e-5\n|preprocess = "dictionary"\n',
    "all": 'delta = 1e-5\n|preprocess = "dictionary"\n|rounds = 4\n|learning_rate = 1.0\n|batch_size = 0\n'
    "|evaluate_every = 4\n",
}


@pytest.mark.parametrize("kind", LEFT_OPEN)
def test_beside_the_recipe_a_study_needs_the_two_epsilons_alone(tmp_path: Path, kind: str) -> None:
    """As docs/privacy.md shows it: `check`, `plan` and `run` agree, whatever else is left to the
    recipe.
    """
    words = text()
    for line in LEFT_OPEN[kind].split("|"):
        assert line in words
        words = words.replace(line, "")
    open_study = medfed.load_study(write_study(tmp_path, words, table()))
    path = str(open_study.folder / "study.toml")
    folder = tmp_path / "run"
    assert open_columns(_listed(open_study)) == OPEN and not recipe.examine(open_study)[1]
    for command in (
        ["study", "check", path],
        ["privacy", "plan", path],
        ["run", path, "--out", str(folder)],
    ):
        assert CliRunner().invoke(app, command).exit_code == 0
    assert set(found_in(folder)) == set(OPEN)


def test_features_by_name_and_by_pattern_may_be_open(study: Study) -> None:
    for features in (["age", "ward"], ["a*", "ward"], []):
        named = runs.open_sites(study.set("data.features", features), None)[0].study
        assert open_columns(named) == (("age", "lactate") if not features else ("age",))
    excluded = runs.open_sites(study.set("data.exclude", ["lactate"]), None)[0].study
    assert open_columns(excluded) == ("age",)


def test_noise_that_hides_ranges_is_foretold_from_declared_sizes(
    tmp_path: Path, study: Study
) -> None:
    small = study._with({f"privacy.sizes.{name}": 40 for name in SITES})
    with pytest.raises(
        PlanError,
        match=r"120 declared patients.*noise of sd 19.*Nothing was charged",
    ):
        medfed.run(small, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(PlanError, match=r"privacy\.ranges_epsilon="):
        medfed.run(study._with({f"privacy.sizes.{name}": 75 for name in SITES}), tmp_path / "run")
    with pytest.raises(PlanError, match=r"data\.preprocess='none'"):
        medfed.run(study.set("data.preprocess", "none"), tmp_path / "run")


@pytest.mark.parametrize("setting", ["ranges_epsilon", "threshold_epsilon"])
def test_a_query_that_leaves_next_to_nothing_to_train_with_is_refused(
    study: Study, setting: str
) -> None:
    dear = study
    if setting == "threshold_epsilon":
        dear = study._with(DECLARED | {"data.threshold": "youden"})
    assert not recipe.examine(dear.set(f"privacy.{setting}", 1.5))[1]
    dear = dear.set(f"privacy.{setting}", 1.9999)
    words = (
        rf"privacy\.{setting}=1\.9999 .*it leaves too little to train with, "
        r"\d+ times the noise.* it to 0\.5, a quarter"
    )
    with pytest.raises(PlanError, match=words):
        runs.open_sites(dear, None)


def test_of_one_way_out_there_is_no_either(study: Study) -> None:
    small = study._with(
        {f"privacy.sizes.{name}": 40 for name in SITES} | {"privacy.ranges_epsilon": 0.9}
    )
    with pytest.raises(
        PlanError, match=r"Nothing was charged\. Declare the ranges of all but 1 of them\.$"
    ):
        runs.open_sites(small, None)


def test_algorithms_are_compared_without_noise_where_ranges_are_open(study: Study) -> None:
    short = study._with({"training.rounds": 2, "monitor.evaluate_every": 2})
    assert compare.compare(short, ["fedavg", "fedprox"], 2, "none").table()[0]["score"] == "auroc"


def test_the_plan_says_how_much_noise_lies_on_which_counts(study: Study) -> None:
    found = runs.privacy_outlook(study)
    told = found["ranges"]
    assert told["columns"] == list(OPEN) and told["epsilon"] == 0.5
    assert told["noise_sd"] == pytest.approx(ranges_noise(_listed(study), 3), rel=1e-3)
    each = runs.privacy_outlook(study.set("privacy.noise", "site"))["ranges"]["noise_sd"]
    assert each == pytest.approx(told["noise_sd"] * math.sqrt(3), rel=1e-3)
    assert [one["epsilon"] for one in found["foretold"]] == [8, 3, 2, 1, 0.5]


def test_a_column_of_texts_is_no_number_and_it_is_said(study: Study) -> None:
    frame = table().assign(age=np.where(np.arange(2400) % 2, "old", "young"))
    frame.to_csv(study.folder / "cohort.csv", index=False)
    told: list[Event] = []
    summary = medfed.simulate(study, listeners=[told.append]).summary
    assert summary["ranges"]["found"]["age"] == list(quantiles.WIDEST)
    assert any("no value of 'age' is seen above the noise" in text for text in summary["warnings"])


def test_a_code_and_values_far_from_0_are_warned_of(study: Study) -> None:
    frame = table()
    second = 1.7e9 + 100 * frame["age"]
    frame = frame.assign(age=np.where(np.arange(2400) % 8, frame["age"], -999), lactate=second)
    frame.to_csv(study.folder / "cohort.csv", index=False)
    code, cell = medfed.simulate(study).summary["warnings"]
    assert re.search(
        r"of 'age' some values stand apart.*\[-1000, -100\].*data\.dictionary\.age\.missing = ",
        code,
    )
    assert re.search(
        r"nearly all values of 'lactate' lie in one cell.*about \[\d+.*subtract an offset", cell
    )
    coded = study._with({"data.dictionary.age.missing": ["-999"], "data.exclude": ["lactate"]})
    assert not medfed.simulate(coded).summary["warnings"]


def test_a_run_with_nothing_to_learn_from_ends_before_it_trains(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    # once in fifty runs noise alone looks like a value; here once in 10^9
    monkeypatch.setattr(quantiles, "_CHANCE", 1e-9)
    frame = table().assign(age="unknown", lactate="")
    frame.to_csv(study.folder / "cohort.csv", index=False)
    with pytest.raises(PlanError, match=r"of no column are values seen.*stays spent"):
        medfed.run(study.set("data.features", ["age", "lactate"]), tmp_path / "run")


def test_data_that_are_prepared_outside_a_run_have_no_ranges(study: Study) -> None:
    with pytest.raises(PlanError, match="found in a run alone"):
        medfed.load_and_prepare_medical_data(study)
