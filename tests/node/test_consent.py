"""Consent at a site: who is not named is not enrolled, not charged, not trained on and not tested
on.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import medfed
from medfed.core import codec
from medfed.engine.port import gather
from medfed.node.site import OPS
from medfed.rounds.prepare import enrol, prepare
from medfed.runs import Simulation
from tests.tables import PRIVATE, STUDY, invented, write_study

pytestmark = pytest.mark.usefixtures("one_thread")


class Register:
    """A register of consent that withholds some patients, from a moment on."""

    def __init__(self, *withheld: str) -> None:
        self.withheld = set(withheld)
        self.asked: list[tuple[str, datetime]] = []

    def __call__(self, ids: Sequence[str], purpose: str, time: datetime) -> np.ndarray:
        self.asked.append((purpose, time))
        return np.array([name not in self.withheld for name in ids], dtype=bool)


@pytest.mark.parametrize(
    "text", [STUDY, PRIVATE.replace("[privacy]", "[privacy]\nsimulation_only = true")]
)
def test_who_is_withheld_is_neither_trained_nor_tested_on(tmp_path: Path, text: str) -> None:
    """The model, and every figure, has the bits of the table without that patient's rows."""
    frame = invented()
    results = []
    whole = medfed.load_study(write_study(tmp_path, text, frame))
    everybody = medfed.simulate(whole)
    tables = Simulation.open(whole).sites
    trained = str(
        next(table.ids[table.patient[~table.test][0]] for one in tables if (table := one.table))
    )
    tested = str(
        next(table.ids[table.patient[table.test][0]] for one in tables if (table := one.table))
    )

    register = Register(trained, tested)
    withheld = Simulation.open(whole, folder=tmp_path / "nodes", consent=register)
    results.append(medfed.run(whole, tmp_path / "withheld", parties=withheld))
    (tmp_path / "less").mkdir()
    less = medfed.load_study(
        write_study(tmp_path / "less", text, frame[~frame["subject"].isin([trained, tested])])
    )
    results.append(medfed.simulate(less))

    assert torch.equal(results[0].w_P, results[1].w_P) and not torch.equal(
        results[0].w_P, everybody.w_P
    )
    assert results[0].summary["test"] == results[1].summary["test"]
    assert {purpose for purpose, _ in register.asked} == {whole.study.purpose}
    assert all(time.tzinfo is not None for _, time in register.asked)


def test_who_is_withheld_is_neither_enrolled_nor_charged(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, PRIVATE))
    site = Simulation.open(study).sites[0]
    assert site.table
    one = str(site.table.ids[site.table.patient[~site.table.test][0]])
    withheld = Simulation.open(study, folder=tmp_path / "nodes", consent=Register(one))
    plan = prepare(withheld.study, withheld.fleet, withheld.fleet.sites())
    enrol(plan, withheld.fleet, "run")
    account = withheld.sites[0].account
    assert account and not account.ledger.knows([one])
    medfed.run(
        study,
        tmp_path / "run",
        parties=Simulation.open(study, folder=tmp_path / "other", consent=Register(one)),
    )
    for path in (tmp_path / "other", tmp_path / "run"):
        assert all(
            one.encode() not in file.read_bytes() for file in path.rglob("*") if file.is_file()
        )


def test_who_withdraws_during_a_run_is_read_no_more(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY))
    register = Register()
    simulation = Simulation.open(study, consent=register)
    plan = prepare(simulation.study, simulation.fleet, simulation.fleet.sites())
    site = simulation.sites[0]
    before = len(site.train)
    table = site.table
    assert table
    register.withheld = {str(table.ids[table.patient[~table.test][0]])}
    payload = codec.encode({"round": 1}, {"w": plan.first_weights()})
    assert not gather(simulation.fleet, [site.name], "work", payload, 60)[site.name].error
    assert len(site.train) == before - 1 and len(site.table or ()) == len(table) - 1
    register.withheld = set()
    assert not gather(simulation.fleet, [site.name], "work", payload, 60)[site.name].error
    assert len(site.train) == before - 1  # a late consent counts from the next run on


def test_a_register_that_fails_lets_nobody_be_read(tmp_path: Path) -> None:
    def fail(*_: Any) -> np.ndarray:
        raise OSError("patient 0007 is not in the register")

    study = medfed.load_study(write_study(tmp_path, STUDY))
    for register in (
        fail,
        lambda ids, *_: np.ones(len(ids)),
        lambda ids, *_: np.ones(1, dtype=bool),
    ):
        with pytest.raises(medfed.MedfedError, match="in its own log") as refused:
            medfed.run(study, tmp_path / "run", parties=Simulation.open(study, consent=register))
        assert "0007" not in str(refused.value)


def test_an_operation_that_says_nothing_of_records_asks_consent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever adds an operation and forgets consent has it asked all the same."""
    study = medfed.load_study(write_study(tmp_path, STUDY))
    site = Simulation.open(study).sites[0]
    assert site.table
    one = str(site.table.ids[0])
    (withheld, *_) = Simulation.open(study, consent=Register(one)).sites

    def list_ids(sites: Sequence[Any], header: Any, tensors: Any) -> list[bytes]:
        return [codec.encode({"ids": [str(name) for name in site.table.ids]}) for site in sites]

    monkeypatch.setitem(OPS, "list ids", list_ids)
    ids = codec.decode(withheld.handle("list ids", codec.encode({})))[0]["ids"]
    assert one not in ids and len(ids) == len(site.table.ids) - 1
