"""Every party of a run in a process of its own, behind a pipe: nothing is shared, and the model's bits are the same."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import medfed
from medfed import aggregation, runs
from medfed.algorithms import Server
from medfed.core import codec
from medfed.core.checks import PlanError, SignatureError
from medfed.engine.port import gather
from medfed.monitor.events import Log
from medfed.node import Parties
from medfed.plan import Plan
from medfed.prepare import enrol, prepare, rehearse
from medfed.privacy.ledger import Ledger
from medfed.round import decide, run_round, vote
from medfed.round import test as evaluate
from medfed.study import Study
from tests.tables import PRIVATE, invented, write_study

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]

SITES = tuple(f"clinic {k}" for k in range(4))


def written(folder: Path, **changes: Any) -> Path:
    """Return the file of a study of four clinics that every party reads for itself."""
    frame = invented(240)
    frame["hospital"] = [SITES[k % 4] for k in range(len(frame))]
    study = medfed.load_study(write_study(folder, PRIVATE, frame))
    sizes = dict.fromkeys(SITES, 48)
    settled = {
        "privacy.sizes": sizes,
        "data.identity": "canonical",
    }  # else each site's own ledger says who is one patient
    study = study._with(settled | {key.replace("__", "."): v for key, v in changes.items()})
    path = folder / "agreed.toml"
    path.write_text(study.toml())
    return path


CLAIM = {"privacy__simulation_only": True}
NONE = {
    "privacy__epsilon": float("inf"),
    "privacy__delta": 1.0,
    "privacy__noise": "none",
    "data__preprocess": "robust",
    "training__batch_size": 16,
    "training__learning_rate": 0.1,
}


def coordinate(study: Study, parties: Parties, folder: Path | None = None) -> tuple[Plan, Server, Log]:
    """Run a study as a coordinator that has nothing but its own study, its keys, and messages."""
    study = runs.planned(study)
    fleet = parties.fleet
    plan = prepare(study, fleet, fleet.sites())
    rehearse(plan, fleet)
    enrol(plan, fleet, "run")
    together = aggregation.introduce(plan, fleet, "run", folder, aggregators=parties.aggregators or None)
    server, budget, log = plan.begin(), plan.budget(), Log()
    while server.round < study.training.rounds:
        server = run_round(server, plan, fleet, budget, log, together)
    evaluate(server, plan, fleet, log, intervals=True, decision=decide(server, plan, fleet, budget, log))
    vote(server, plan, fleet, budget, log)
    return plan, server, log


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    running: list[Parties] = []

    def start(path: Path) -> Parties:
        running.append(Parties.start(path, SITES, tmp_path / "nodes"))
        return running[-1]

    yield start
    for parties in running:
        parties.__exit__(None, None, None)


EVERY = [(way, claim) for way in ("plain", "masked", "three-party") for claim in (True, False)]


@pytest.mark.parametrize(
    ("way", "claim"),
    [pytest.param(*one, marks=[] if one == ("three-party", True) else pytest.mark.long) for one in EVERY],
)
def test_parties_apart_come_to_the_bits_of_the_embedded_engine(
    tmp_path: Path, started: Any, way: str, claim: bool
) -> None:
    path = written(tmp_path, security__aggregation=way, **(CLAIM if claim else NONE))
    study = medfed.load_study(path)
    together = medfed.simulate(study)
    parties = started(path)
    _, server, log = coordinate(study, parties, tmp_path / "coordinator")
    assert torch.equal(server.released_P, together.w_P)
    told = runs.summarise(log.events())
    assert told["test"] == together.summary["test"] and told["per_site"] == together.summary["per_site"]
    pids = {process.pid for process in parties.processes}
    assert len(pids) == 4 + 3 * (way == "three-party") and os.getpid() not in pids
    assert {one.name for one in (tmp_path / "nodes").glob("*")} <= set(SITES)


@pytest.mark.long
def test_each_site_keeps_a_ledger_of_its_own(tmp_path: Path, started: Any) -> None:
    """Under a real claim, with noise from the system: paid at each site, by each site, to the plan's epsilon."""
    path = written(tmp_path, security__aggregation="three-party")
    plan, _, _ = coordinate(medfed.load_study(path), started(path))
    assert plan.guarantee
    for name in SITES:
        with Ledger.open(tmp_path / "nodes" / name / "ledger.sqlite", read_only=True) as book:
            rows = list(book.rows())
            assert {row["site"] for row in rows} == {name} and len(rows) == 4
            assert 0.999 < book.worst(1e-4 - plan.guarantee.delta_sampler) <= 1


def test_a_site_holds_no_record_of_another(tmp_path: Path) -> None:
    study = medfed.load_study(written(tmp_path, **CLAIM))
    one = runs.open_site(study, SITES[2])
    together = {site.name: site for site in runs.open_sites(study, None)}
    assert one.table is not None and together[SITES[2]].table is not None
    assert list(one.table.ids) == list(together[SITES[2]].table.ids) and len(one.table) == 60
    with pytest.raises(medfed.RunError, match="site 'clinic 9' has no record in this table; did you mean"):
        runs.open_site(study, "clinic 9")


@pytest.mark.long
def test_a_killed_site_is_left_out_by_name(tmp_path: Path, started: Any) -> None:
    path = written(tmp_path, training__quorum=0.5, security__aggregation="plain", **NONE)
    study = medfed.load_study(path)
    parties = started(path)
    plan = prepare(runs.planned(study), parties.fleet, parties.fleet.sites())
    victim = parties.processes[1]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    with Log() as log:
        server = run_round(plan.begin(), plan, parties.fleet, plan.budget(), log)
    assert server.round == 1
    left = runs.summarise(log.events())["excluded"]
    assert [one["site"] for one in left] == [SITES[1]] and "process has ended" in left[0]["reason"]


@pytest.mark.long
def test_a_site_with_another_study_signs_nothing_for_this_one(tmp_path: Path, started: Any) -> None:
    path = written(tmp_path, security__aggregation="masked", **CLAIM)
    parties = started(path)
    other = medfed.load_study(path).set("training.learning_rate", 0.5)
    with pytest.raises(PlanError, match="has not signed this study"):
        coordinate(other, parties)


@pytest.mark.long
def test_a_party_that_tells_anothers_keys_is_refused(tmp_path: Path, started: Any) -> None:
    path = written(tmp_path, security__aggregation="masked", **CLAIM)
    parties = started(path)
    study = runs.planned(medfed.load_study(path))
    plan = prepare(study, parties.fleet, parties.fleet.sites())

    class Swapped:
        """A relay that answers for one site with another's keys."""

        def __getattr__(self, name: str) -> Any:
            return getattr(parties.fleet, name)

        def submit_many(self, sites: Any, op: str, payload: bytes, deadline: float) -> list[int]:
            asked = [SITES[0] if op == "identify" else name for name in sites]
            return parties.fleet.submit_many(asked, op, payload, deadline)

    with pytest.raises(SignatureError, match=r"'clinic 1' tells keys of 'clinic 0', site; expected its own"):
        aggregation.introduce(plan, Swapped(), "run")  # type: ignore[arg-type]


def test_a_lying_coordinator_is_told_no(tmp_path: Path, started: Any) -> None:
    """Sizes that are not the site's, a coordinator that is none, work before joining: each party looks for itself."""
    path = written(tmp_path, security__aggregation="three-party", **NONE)
    parties = started(path)
    study = runs.planned(medfed.load_study(path))
    plan = prepare(study, parties.fleet, parties.fleet.sites())
    work = codec.encode({"round": 1}, {"w": plan.first_weights(), "signed": codec.as_tensor(b"x")})
    for reply in gather(parties.fleet, SITES, "work", work, 60).values():
        assert "has agreed to no run" in reply.error
    handle = next(iter(parties.aggregators.values()))
    with pytest.raises(medfed.MedfedError, match="has joined no run"):
        handle("begin", codec.encode({}))
    roster = [
        codec.decode(r.payload)[0]["public"]
        for r in gather(parties.fleet, SITES, "identify", codec.encode({}), 60).values()
    ]
    joining = codec.encode({"run": "run", "coordinator": SITES[1], "roster": roster})
    for reply in gather(parties.fleet, SITES, "join", joining, 60).values():
        assert "is no coordinator" in reply.error
