"""One study, two engines: sites as a stack in this process, and each in a process of its own that
shares nothing.
"""

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import medfed
from medfed.core import codec
from medfed.core.checks import QuorumError
from medfed.engine.port import Fleet, Reply
from medfed.learn.algorithms import Server
from medfed.monitor.events import Log, RoundFinished, SiteExcluded
from medfed.node.inprocess import InProcess
from medfed.node.site import Site, handle_many
from medfed.planning.plan import Plan
from medfed.rounds.prepare import prepare
from medfed.rounds.round import run_round
from medfed.rounds.round import test as run_test
from medfed.runs import open_sites
from medfed.study import Study
from tests.engine.pipes import Pipes
from tests.tables import SITES, invented, write_study


def pipes(folder: Path, study: Study) -> Pipes:
    (folder / "resolved.toml").write_text(study.toml())
    tables = {}
    for name in SITES:
        tables[name] = folder / f"{name}.csv"
        frame = invented()
        frame[frame["hospital"] == name].to_csv(tables[name], index=False)
    return Pipes(folder / "resolved.toml", tables)


def train(plan: Plan, fleet: Fleet, log: Log, rounds: int) -> Server:
    server = plan.algorithm.begin(plan.first_weights(), plan.study.training)
    for _ in range(rounds):
        server = run_round(server, plan, fleet, plan.budget(), log)
    return server


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path))


@pytest.fixture
def far(tmp_path: Path, study: Study) -> Iterator[Pipes]:
    fleet = pipes(tmp_path, study)
    yield fleet
    fleet.close()


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["scaffold", pytest.param("local", marks=pytest.mark.long)])
def test_sites_that_share_nothing_but_bytes_train_the_same_model(
    tmp_path: Path, study: Study, algorithm: str
) -> None:
    study = study.set("training.algorithm", algorithm)
    near_log = Log()
    far_log = Log()
    near = InProcess(open_sites(study, None))
    near_plan = prepare(study, near, list(SITES))
    near_server = train(near_plan, near, near_log, 3)
    fleet = pipes(tmp_path, study)

    try:
        far_plan = prepare(study, fleet, list(SITES))
        far_server = train(far_plan, fleet, far_log, 3)
        near_figures = run_test(near_server, near_plan, near, near_log).all_sites
        far_figures = run_test(far_server, far_plan, fleet, far_log).all_sites
    finally:
        fleet.close()

    assert near_plan.encoding == far_plan.encoding
    torch.testing.assert_close(near_server.w_P, far_server.w_P, rtol=1e-5, atol=1e-6)
    assert near_figures["accuracy"].value == pytest.approx(far_figures["accuracy"].value, abs=0.03)
    told = [
        [loss for e in log.events() if isinstance(e, RoundFinished) for loss in e.losses]
        for log in (near_log, far_log)
    ]
    assert told[0] == pytest.approx(told[1], rel=1e-4)


@pytest.mark.slow
def test_a_killed_site_is_told_and_stops_the_run_unless_the_quorum_allows_it(
    study: Study, far: Pipes
) -> None:
    plan = prepare(study, far, list(SITES))
    log = Log()
    server = train(plan, far, log, 1)
    os.kill(far.children["east"].pid, signal.SIGKILL)
    with pytest.raises(
        QuorumError, match=r"2 of 3 sites answered.*east: the site's process has ended"
    ):
        run_round(server, plan, far, plan.budget(), log)
    lenient = study.set("training.quorum", 0.5)
    plan = type(plan)(**{**plan.__dict__, "study": lenient})
    server = run_round(server, plan, far, plan.budget(), log)
    assert server.round == 2
    told = [event for event in log.events() if isinstance(event, SiteExcluded)]
    assert {event.site for event in told} == {"east"}
    assert all("process has ended" in event.reason for event in told)


def test_a_reply_shares_no_memory_with_the_site_or_the_coordinator(study: Study) -> None:
    study = study.set("training.algorithm", "scaffold")
    sites = open_sites(study, None)
    fleet = InProcess(sites)
    plan = prepare(study, fleet, list(SITES))
    server = train(plan, fleet, Log(), 1)
    remembered = [site.memory["control"].clone() for site in sites]
    kept = server.w_P.clone()
    server.w_P.fill_(7.0)
    for value in server.slots.values():
        value.fill_(7.0)
    for site, before in zip(sites, remembered, strict=True):
        assert torch.equal(site.memory["control"], before)
    for site in sites:
        site.memory["control"].fill_(9.0)
    again = train(plan, InProcess(open_prepared(study)), Log(), 1)
    assert torch.equal(again.w_P, kept)


def open_prepared(study: Study) -> list[Site]:
    sites = open_sites(study, None)
    prepare(study, InProcess(sites), list(SITES))
    return sites


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "local"])
def test_a_cohort_answers_with_the_bytes_of_its_sites_asked_one_by_one(
    study: Study, algorithm: str
) -> None:
    study = study.set("training.algorithm", algorithm)
    together = open_prepared(study)
    alone = open_prepared(study)
    plan = prepare(study, InProcess(open_sites(study, None)), list(SITES))
    task = plan.algorithm.task(plan.algorithm.begin(plan.first_weights(), study.training))
    payload = codec.encode(
        {"round": 1}, {"w": task.w_P, **{f"slot.{n}": v for n, v in task.slots.items()}}
    )
    answers = handle_many(together, "work", payload)
    assert answers == [site.handle("work", payload) for site in alone]
    assert len(set(answers)) == len(SITES)


def test_one_failing_site_does_not_take_the_stack_down(study: Study) -> None:
    sites = open_sites(study.set("training.quorum", 0.5), None)
    fleet = InProcess(sites)
    plan = prepare(sites[0].study, fleet, list(SITES))
    fleet.site("south").train.x.fill_(float("nan"))
    log = Log()
    server = train(plan, fleet, log, 1)
    assert torch.isfinite(server.w_P).all()
    assert [(e.site, e.reason) for e in log.events() if isinstance(e, SiteExcluded)] == [
        ("south", "training did not stay finite; lower training.learning_rate")
    ]


def test_an_exception_at_one_site_names_the_site_and_spares_the_others(study: Study) -> None:
    sites = open_sites(study.set("training.quorum", 0.5), None)
    fleet = InProcess(sites)
    plan = prepare(sites[0].study, fleet, list(SITES))
    del fleet.site("east").train
    log = Log()
    train(plan, fleet, log, 1)
    (told,) = [e for e in log.events() if isinstance(e, SiteExcluded)]
    assert (
        told.site == "east"
        and "op 'work' failed at site 'east': AttributeError (work.py, line" in told.reason
    )


def test_the_words_of_an_unforeseen_error_stay_at_the_site(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("patient Jane Doe, born 1950")

    monkeypatch.setattr("medfed.node.work.train", fail)
    sites = open_sites(study, None)
    fleet = InProcess(sites)
    plan = prepare(sites[0].study, fleet, list(SITES))
    with pytest.raises(QuorumError) as stopped:
        train(plan, fleet, Log(), 1)
    assert "Jane" not in str(stopped.value) and "ValueError" in str(stopped.value)


def test_a_row_that_does_not_count_is_not_remembered(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = open_sites(
        study.set("training.algorithm", "scaffold").set("training.quorum", 0.5), None
    )
    fleet = InProcess(sites)
    plan = prepare(sites[0].study, fleet, list(SITES))
    poll = fleet.poll

    def late(wait: float) -> list[Reply]:
        return [
            replace(r, error="too late") if r.site == "south" and len(r.payload) > 200 else r
            for r in poll(wait)
        ]

    monkeypatch.setattr(fleet, "poll", late)
    server = train(plan, fleet, Log(), 1)
    weight = torch.tensor([plan.weight(name) for name in SITES])
    remembered = torch.stack([fleet.site(name).memory["control"] for name in SITES])
    assert not remembered[1].any() and remembered[0].any()
    torch.testing.assert_close(
        server.slots["control"], weight @ remembered / weight.sum(), rtol=1e-4, atol=1e-6
    )


def test_an_unknown_op_is_an_error_reply(study: Study) -> None:
    site = open_sites(study, None)[0]
    with pytest.raises(medfed.SiteError, match="op='dance' is not known"):
        site.handle("dance", codec.encode({}))
