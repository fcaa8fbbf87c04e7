"""Fleets of devices: every patient a client of its own, groups that take turns, and what each
device pays.
"""

import json
import math
import sqlite3
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import BudgetError, PlanError, RunError, SiteError
from medfed.data.site_table import SiteTable
from medfed.links import wire
from medfed.monitor import events
from medfed.node.inprocess import InProcess
from medfed.node.site import Site, handle_many
from medfed.planning.plan import Plan
from medfed.privacy.accounting import calibrate
from medfed.privacy.guarantee import GRID
from medfed.privacy.ledger import Ledger
from medfed.privacy.privacy_events import Gaussian
from medfed.rounds.prepare import enrol, prepare
from medfed.study import Study
from tests.tables import PRIVATE, invented, plain, write_study

ROUNDS = 7
GROUPS = 3
DEVICES = {
    "sites.kind": "device",
    "privacy.sizes": {},
    "fleet.schedule": "cyclic",
    "fleet.groups": GROUPS,
    "training.rounds": ROUNDS,
    "monitor.evaluate_every": ROUNDS,
}
CORRELATED = {**DEVICES, "privacy.correlated": True}


def records(seed: int = 0) -> pd.DataFrame:
    """Return 100 patients, every fifth with a second record."""
    once = invented(100, seed)
    again = once[::5].assign(age=once["age"] + 1)
    return pd.concat([once, again], ignore_index=True)


@pytest.fixture
def hospitals(tmp_path: Path, one_thread: None) -> Study:
    return medfed.load_study(write_study(tmp_path, PRIVATE, records()))


def fleet_of(study: Study) -> tuple[Plan, dict[str, Site]]:
    """Return the plan, and the sites prepared for it."""
    sites = runs.open_sites(study, None)
    fleet = InProcess(sites)
    return prepare(sites[0].study, fleet, fleet.sites()), {site.name: site for site in sites}


def ids(site: Site) -> list[str]:
    assert site.table is not None
    return list(site.table.ids)


def rows_of(sites: list[Site], w_P: torch.Tensor, round: int = 1) -> torch.Tensor:
    """Return what the sites send in a round, [K, M]."""
    answers = handle_many(sites, "work", codec.encode({"round": round}, {"w": w_P}))
    return torch.stack(
        [codec.decode(answer)[1]["row"] for answer in answers if not isinstance(answer, SiteError)]
    )


# A device is a patient ----------------------------------------------------------------------------


def test_every_patient_is_a_device_with_all_records(hospitals: Study) -> None:
    sites = runs.open_sites(hospitals._with(DEVICES), None)
    frame = records()
    assert Counter(name for site in sites for name in ids(site)) == Counter(set(frame["subject"]))
    held = {ids(site)[0]: len(site.table) for site in sites if site.table}
    assert held == frame["subject"].value_counts().to_dict()
    assert not any(ids(site)[0] in site.name for site in sites)


def test_who_joins_renames_nobody_and_moves_nobody_to_another_group(
    hospitals: Study, tmp_path: Path
) -> None:
    study = hospitals._with(DEVICES)
    plan, sites = fleet_of(study)
    (tmp_path / "fewer").mkdir()
    frame = records().iloc[::-1]
    left = frame[~frame["subject"].isin(["p0003", "p0050"])]
    fewer, others = fleet_of(
        replace(study, folder=write_study(tmp_path / "fewer", PRIVATE, left).parent)
    )
    names = {ids(site)[0]: name for name, site in sites.items()}
    assert {ids(site)[0]: name for name, site in others.items()} == {
        who: name for who, name in names.items() if who not in ("p0003", "p0050")
    }
    for number in range(1, GROUPS + 1):
        assert set(fewer.on_turn(number)) == set(plan.on_turn(number)) & set(others)


@pytest.mark.parametrize("kind", ["hospitals", "devices"])
def test_a_group_that_nobody_falls_into_is_refused_before_anything_starts(
    hospitals: Study, kind: str
) -> None:
    few = plain(hospitals)._with({"fleet.schedule": "cyclic", "fleet.groups": 40})
    study = few if kind == "hospitals" else hospitals._with(DEVICES | {"fleet.groups": 2000})
    with pytest.raises(
        PlanError, match=r"nobody falls into group .*Set fleet.groups=\d+, or schedule='random'"
    ) as told:
        medfed.simulate(study)
    fits = int(str(told.value).split("Set fleet.groups=")[1].split(",")[0])
    assert 1 <= fits <= 1000
    plan, _ = fleet_of(study.set("fleet.groups", fits))
    assert all(plan.on_turn(number) for number in range(1, fits + 1))


def test_devices_are_encoded_as_one_as_each_by_itself(hospitals: Study) -> None:
    plan, sites = fleet_of(hospitals._with(DEVICES))
    assert plan.encoding.public
    for site in sites.values():
        table = site.table
        assert table is not None
        for rows, which in ((site.train, ~table.test), (site.test, table.test)):
            alone = plan.encoding.encode(table, which, ~table.test)
            assert torch.equal(rows.x, alone.x)
            assert torch.equal(rows.y, alone.y)
            assert torch.equal(rows.patient, alone.patient)
        assert len(set(site.train.key.tolist() if site.train.key is not None else [])) <= 1


def test_tables_end_to_end_keep_gaps_and_patients_apart() -> None:
    one = np.zeros(1, dtype=np.int64)
    first = SiteTable(
        {"a": np.array([1.0])}, {}, np.array(["x"]), one, np.array([True]), np.array(["p"])
    )
    second = SiteTable(
        {}, {"b": np.array(["u"])}, np.array(["y"]), one, np.array([False]), np.array(["q"])
    )
    both = SiteTable.join([first, second])
    assert both.numbers["a"][0] == 1 and math.isnan(both.numbers["a"][1])
    assert both.texts["b"].tolist() == [None, "u"]
    assert [both.ids[code] for code in both.patient] == ["p", "q"]
    assert both.test.tolist() == [True, False] and both.label.tolist() == ["x", "y"]


def test_test_devices_never_train(hospitals: Study, tmp_path: Path) -> None:
    study = hospitals._with(CORRELATED)
    plan, sites = fleet_of(study)
    assert set(plan.participants) | set(plan.testers) == set(sites)
    assert not set(plan.participants) & set(plan.testers)
    assert all(len(sites[name].test) == 0 for name in plan.participants)
    assert all(len(sites[name].train) == 0 for name in plan.testers)
    result = runs.run(study, tmp_path / "run")
    log = events.read(tmp_path / "run" / "events.jsonl")
    trained = {
        name for event in log if isinstance(event, events.RoundFinished) for name in event.clients
    }
    assert trained == set(plan.participants)
    assert result.summary["test"]["n"] == sum(len(sites[name].test) for name in plan.testers)


# Turns and charges --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("correlated", "noise"), [(True, "shared"), (False, "shared"), (False, "site")]
)
def test_each_device_pays_for_itself(
    hospitals: Study, tmp_path: Path, correlated: bool, noise: str
) -> None:
    study = hospitals._with({**DEVICES, "privacy.correlated": correlated, "privacy.noise": noise})
    runs.run(study, tmp_path / "run")
    log = events.read(tmp_path / "run" / "events.jsonl")
    took_part = [event.clients for event in log if isinstance(event, events.RoundFinished)]

    for first, group in enumerate(took_part):
        for near in took_part[first + 1 : first + GROUPS]:
            assert not set(group) & set(near)  # nobody twice within GROUPS rounds
        if first >= GROUPS:
            assert group == took_part[first - GROUPS]

    turns = Counter(name for group in took_part for name in group)
    with Ledger.open(tmp_path / "run" / "sites" / "ledger.sqlite", read_only=True) as ledger:
        charged = Counter(row["site"] for row in ledger.rows())
        worst = ledger.worst(study.privacy.delta)

    assert charged == (Counter(turns.keys()) if correlated else turns)
    assert max(turns.values()) == math.ceil(ROUNDS / GROUPS)
    assert 0.99 < worst <= 1.0
    claim = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert claim["epsilon"] == pytest.approx(worst, abs=1e-9)
    assert (claim["noise"]["strategy"] is not None) is correlated
    assert any("have a device" in item for item in claim["unprotected"])


def test_a_group_that_cannot_pay_is_refused_before_training_and_nobody_is_charged(
    hospitals: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))
    study = hospitals._with(
        {**CORRELATED, "privacy.scope": "study", "privacy.ledger": str(tmp_path / "home")}
    )
    runs.run(study, tmp_path / "first")
    with Ledger.open(tmp_path / "home" / "ledger.sqlite", read_only=True) as ledger:
        before = len(ledger.rows())
    with pytest.raises(BudgetError, match="left for one release"):
        runs.run(study, tmp_path / "second")
    with Ledger.open(tmp_path / "home" / "ledger.sqlite", read_only=True) as ledger:
        assert len(ledger.rows()) == before
    assert not (tmp_path / "second").exists()


def test_a_fleet_enrols_in_one_transaction(
    hospitals: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, sites = fleet_of(hospitals._with(CORRELATED))
    account = next(iter(sites.values())).account
    assert account is not None
    statements: list[str] = []
    sql = account.ledger._sql
    assert isinstance(sql, sqlite3.Connection)
    sql.set_trace_callback(statements.append)
    handle_many(
        [sites[name] for name in plan.participants],
        "enrol",
        codec.encode({"run": "r", "fresh": True}),
    )
    assert sum(text.startswith("BEGIN") for text in statements) == 2  # enrol all, check all
    assert len(account.cohorts) == len(plan.participants)


def test_a_correlated_run_is_not_resumed(hospitals: Study, tmp_path: Path) -> None:
    runs.run(hospitals._with(CORRELATED), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(RunError, match="correlated noise cannot be resumed"):
        runs.resume(tmp_path / "run")


# The sum is the hospital's ------------------------------------------------------------------------


ALL_TURNS = {"fleet.schedule": "random", "fleet.groups": 1, "privacy.simulation_only": True}


def counted(hospitals: Study) -> Study:
    """Return the study with its true sizes declared, so that both fleets divide by the
    same number.
    """
    sites = runs.open_sites(hospitals, None)
    sizes = {s.name: len({*s.table.patient[~s.table.test]}) for s in sites if s.table}
    return hospitals._with({"privacy.sizes": sizes, **ALL_TURNS})


def test_rows_of_devices_sum_to_their_hospitals_row(hospitals: Study) -> None:
    study = counted(hospitals)
    plan, sites = fleet_of(study)
    _, devices = fleet_of(study._with({"sites.kind": "device", "privacy.sizes": {}}))
    w_P = torch.linspace(-1, 1, plan.parameters)
    for name, site in sites.items():
        mine = [d for d in devices.values() if d.name.startswith(name) and len(d.train)]
        one_K = rows_of([site], w_P)
        many_KM = rows_of(mine, w_P)
        assert many_KM.dtype == torch.int64
        # each row is held to the clipping norm
        assert many_KM.double().norm(dim=1).max() * GRID < 1.001
        rounding = (len(mine) + 1) / 2 + len(mine) * 2**-20 / GRID  # of each row, and of float32
        assert (many_KM.sum(0) - one_K[0]).abs().max() <= rounding


def test_all_devices_learn_what_their_hospitals_learn(hospitals: Study) -> None:
    study = counted(hospitals)
    together = runs.simulate(study).w_P
    apart = runs.simulate(study._with({"sites.kind": "device", "privacy.sizes": {}})).w_P
    assert torch.allclose(apart, together, atol=1e-4)
    other = runs.simulate(
        study._with({"sites.kind": "device", "privacy.sizes": {}, "training.rounds": 3})
    ).w_P
    # a law with power: one round less is far off
    assert not torch.allclose(other, together, atol=1e-2)


def test_correlation_changes_the_noise_and_nothing_else(
    hospitals: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = hospitals._with(CORRELATED)
    noised = runs.simulate(study).w_P
    silent = type(
        "Silent", (), {"sample": lambda self, count, entropy: np.zeros(count, np.int64)}
    )()
    monkeypatch.setattr(wire, "discrete_gaussian", lambda sigma: silent)
    plain = runs.simulate(study).w_P
    assert torch.equal(plain, runs.simulate(study.set("privacy.correlated", False)).w_P)
    assert not torch.allclose(plain, noised, atol=1e-3)


# Noise on the device ------------------------------------------------------------------------------


def test_a_device_noises_its_own_row(hospitals: Study) -> None:
    study = hospitals._with({**DEVICES, "privacy.noise": "site", "privacy.scope": "run"})
    plan, sites = fleet_of(study)
    enrol(plan, InProcess(list(sites.values())), "r")
    group = [sites[name] for name in plan.participants]
    w_P = torch.zeros(plan.parameters)
    twice = [rows_of(group, w_P, number) for number in (1, 2)]
    noise_KP = (twice[0] - twice[1]).double() / math.sqrt(2)  # records cancel
    z = calibrate(
        lambda noise: Gaussian(noise, math.ceil(ROUNDS / GROUPS)), 1.0, study.privacy.delta, "gdp"
    )
    square = float(noise_KP.square().sum()) / (z * study.training.learning_rate) ** 2
    for factor, holds in ((1, True), (2 / 3, False), (3 / 2, False)):
        low, high = stats.chi2.ppf([1e-4, 1 - 1e-4], noise_KP.numel()) * factor**2
        assert bool(low < square < high) is holds


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fleet.schedule": "random"}, r"privacy\.correlated=true and fleet\.schedule='random'"),
        ({"fleet.groups": 1}, r"groups=1 do not compose.*1\.06 x"),
        ({"training.rounds": 1}, r"privacy\.correlated=true and training\.rounds=1"),
        ({"privacy.noise": "site"}, r"privacy\.correlated=true and privacy\.noise='site'"),
        ({"privacy.clipping": "adaptive"}, r"privacy\.clipping='adaptive'"),
        ({"privacy.simulation_only": True}, r"privacy\.simulation_only=true"),
        ({"training.batch_size": 8}, r"training\.batch_size above 0"),
        (
            {"fleet.clients_per_round": 4},
            r"fleet\.schedule='cyclic' and fleet\.clients_per_round=4",
        ),
        ({"data.preprocess": "robust"}, r"data\.preprocess='robust'"),
    ],
)
def test_what_does_not_compose_is_refused_by_both_names(
    hospitals: Study, values: dict[str, Any], words: str
) -> None:
    with pytest.raises(PlanError, match=words):
        runs.simulate(hospitals._with({**CORRELATED, **values}))


def test_delta_is_held_against_the_number_of_devices(hospitals: Study) -> None:
    devices = len(fleet_of(hospitals._with(CORRELATED))[0].participants)
    with pytest.raises(PlanError, match=f"with {devices} patients"):
        runs.simulate(hospitals._with({**CORRELATED, "privacy.delta": 1 / devices}))


def test_a_patient_with_two_devices_is_refused(tmp_path: Path) -> None:
    frame = records()
    frame.loc[frame.index[-1], "hospital"] = (
        "south" if frame["hospital"].iloc[-1] != "south" else "north"
    )
    study = medfed.load_study(write_study(tmp_path, PRIVATE, frame))
    with pytest.raises(PlanError, match="max_sites_per_patient=1, but there are patients"):
        runs.simulate(study._with(CORRELATED))


# The bundled study --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.needs("data")
def test_the_bundled_fleet_runs(data_dir: Path) -> None:
    study = medfed.load_study("thyroid-devices")
    result = runs.simulate(
        study._with({"training.rounds": 2, "monitor.evaluate_every": 2}), data_dir
    )
    assert result.complete
    assert result.summary["test"]["n"] + len(result.summary["sites"]) > 10_000
    assert result.summary["privacy"]["epsilon"] == pytest.approx(1.0, abs=1e-4)
