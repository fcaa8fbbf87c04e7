"""Every party of a run in a process of its own, behind a pipe: nothing is shared, and the model's
bits are the same.
"""

import dataclasses
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import LedgerError, PlanError, SignatureError, SiteError
from medfed.engine.port import Reply, gather
from medfed.monitor.events import Log, RoundStarted
from medfed.monitor.summary import summarise
from medfed.privacy.ledger import Ledger
from medfed.privacy.statement import Statement
from medfed.rounds import aggregation, checkpoints
from medfed.rounds.prepare import prepare
from medfed.rounds.round import run_round
from medfed.runs import Simulation, claims
from medfed.runs.parties import Processes
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


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    running: list[Processes] = []

    def start(path: Path) -> Processes:
        running.append(Processes.start(path, SITES, tmp_path / "nodes"))
        return running[-1]

    yield start
    for parties in running:
        parties.__exit__(None, None, None)


EVERY = [(way, claim) for way in ("plain", "masked", "three-party") for claim in (True, False)]


@pytest.mark.parametrize(
    ("way", "claim"),
    [
        pytest.param(*one, marks=[] if one == ("three-party", True) else pytest.mark.long)
        for one in EVERY
    ],
)
def test_parties_apart_come_to_the_bits_of_the_embedded_engine(
    tmp_path: Path, started: Any, way: str, claim: bool
) -> None:
    path = written(tmp_path, security__aggregation=way, **(CLAIM if claim else NONE))
    study = medfed.load_study(path)
    together = medfed.simulate(study)
    parties = started(path)
    apart = medfed.run(study, tmp_path / "coordinator", parties=parties)
    assert apart.complete and torch.equal(apart.w_P, together.w_P)
    told = apart.summary

    assert (
        told["test"] == together.summary["test"]
        and told["per_site"] == together.summary["per_site"]
    )
    assert torch.equal(medfed.load(tmp_path / "coordinator").w_P, together.w_P)
    if way == "three-party":
        assert runs.verify_model(tmp_path / "coordinator")["sites"] == list(SITES)
    pids = {process.pid for process in parties.processes}
    assert len(pids) == 4 + 3 * (way == "three-party") and os.getpid() not in pids
    assert {one.name for one in (tmp_path / "nodes").glob("*")} <= set(SITES)


@pytest.mark.long
def test_each_site_keeps_a_ledger_of_its_own(tmp_path: Path, started: Any) -> None:
    """Under a real claim, with noise from the system: paid at each site, by each site, to the
    plan's epsilon.
    """
    path = written(tmp_path, security__aggregation="three-party")
    medfed.run(medfed.load_study(path), tmp_path / "coordinator", parties=started(path))
    claim = claims.read(tmp_path / "coordinator")
    heads = claim["composition"]["ledger"]["head"]
    kept = checkpoints.read_last(tmp_path / "coordinator" / "checkpoints")[1]["ledger"]
    assert set(heads) == set(SITES) and len(set(heads.values())) == 4 and kept == heads
    assert (
        0.999 < claim["epsilon"] <= 1
        and claim["composition"]["ledger"]["epsilon_all_runs"] >= claim["epsilon"]
    )

    for name in SITES:
        with Ledger.open(tmp_path / "nodes" / name / "ledger.sqlite", read_only=True) as book:
            rows = list(book.rows())
            assert {row["site"] for row in rows} == {name} and len(rows) == 4
            assert (
                0.999
                < book.worst(1e-4 - claim["accountant"]["delta_taken_by_the_noise_sampler"])
                <= 1
            )
            assert book.head() == heads[name]


class Killer:
    """Ends a site's process by SIGKILL once a round is whole and kept."""

    def __init__(self, parties: Processes, round: int) -> None:
        self.parties = parties
        self.round = round

    def __call__(self, event: Any) -> None:
        victim = self.parties.processes[1]
        if (
            isinstance(event, RoundStarted)
            and event.round == self.round + 1
            and victim.pid is not None
        ):
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()


@pytest.mark.parametrize(
    ("way", "claim"),
    [
        pytest.param("plain", False),
        *(pytest.param(w, True, marks=pytest.mark.long) for w in ("masked", "three-party")),
    ],
)
def test_a_run_whose_site_was_killed_resumes_to_the_same_bits(
    tmp_path: Path, started: Any, way: str, claim: bool
) -> None:
    settings = CLAIM if claim else {**NONE, "training__algorithm": "scaffold"}
    path = written(tmp_path, security__aggregation=way, **settings)
    study = medfed.load_study(path)
    out = tmp_path / "coordinator"
    parties = started(path)
    cut = medfed.run(study, out, listeners=[Killer(parties, 2)], parties=parties)
    assert (
        not cut.complete
        and cut.summary["rounds"] == 2
        and "process has ended" in cut.summary["reason"]
    )
    parties.__exit__(None, None, None)
    whole = medfed.resume(out, parties=started(path))
    assert whole.summary["rounds"] == 4 and torch.equal(whole.w_P, medfed.simulate(study).w_P)


@pytest.mark.long
def test_a_site_whose_ledger_lacks_the_head_it_told_refuses_to_go_on(
    tmp_path: Path, started: Any
) -> None:
    path = written(tmp_path, security__aggregation="plain", privacy__spare_rounds=1)
    out = tmp_path / "coordinator"
    parties = started(path)
    medfed.run(medfed.load_study(path), out, listeners=[Killer(parties, 2)], parties=parties)
    parties.__exit__(None, None, None)
    for file in (tmp_path / "nodes" / SITES[2]).glob("ledger*"):
        file.unlink()
    with pytest.raises(
        LedgerError, match=f"site '{SITES[2]}': .*missing, though this run was charged there"
    ):
        medfed.resume(out, parties=started(path))


class Lying:
    """Parties of which one site answers one operation as it likes."""

    def __init__(
        self, simulation: Simulation, lie: Callable[[bytes], bytes], op: str = "statement"
    ) -> None:
        self.inner = simulation
        self.lie = lie
        self.op = op
        self.asked = dict[int, str]()
        self.aggregators = simulation.aggregators
        self.baselines = None
        self.resolve = simulation.resolve
        self.fleet = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner.fleet, name)

    def submit_many(self, sites: Any, op: str, payload: bytes, deadline: float) -> list[int]:
        tickets = self.inner.fleet.submit_many(sites, op, payload, deadline)
        self.asked |= dict.fromkeys(tickets, op)
        return tickets

    def poll(self, wait: float) -> list[Reply]:
        return [self._changed(reply) for reply in self.inner.fleet.poll(wait)]

    def _changed(self, reply: Reply) -> Reply:
        if self.asked[reply.ticket] != self.op or reply.site != SITES[0]:
            return reply
        try:
            return dataclasses.replace(reply, payload=self.lie(reply.payload))
        except TimeoutError as silent:
            return dataclasses.replace(reply, payload=b"", error=str(silent))


def stating(lie: dict[str, Any]) -> Callable[[bytes], bytes]:
    """Return what tells these of a ledger in place of what is so."""

    def state(payload: bytes) -> bytes:
        told = codec.decode(payload)[0]["statement"]
        return codec.encode({"statement": {**told, **lie}})

    return state


LESS: dict[str, Any] = {"uses": 0, "queries": {}, "epsilon": 0.0}
UNREADABLE: list[dict[str, Any]] = [
    {"uses": -4},
    {"uses": 1.5},
    {"uses": "4"},
    {"uses": 10**7},
    {"queries": {"vote": "1"}},
    {"queries": ["vote"]},
    {"epsilon": -1.0},
    {"epsilon": "1"},
    {"lifetime": "wide"},
    {"founded": {"epsilon": 1.0}},
    {"head": 3},
]


@pytest.mark.parametrize("lie", UNREADABLE, ids=str)
def test_a_statement_that_is_none_ends_the_run_before_its_first_round(
    tmp_path: Path, lie: dict[str, Any]
) -> None:
    study = medfed.load_study(written(tmp_path, security__aggregation="plain"))
    lying = Lying(Simulation.open(study, folder=tmp_path / "nodes"), stating(lie))
    with pytest.raises(
        LedgerError, match="site 'clinic 0': its statement of its ledger cannot be read"
    ):
        medfed.run(study, tmp_path / "lied", parties=lying)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_statement_of_no_number_is_none(value: float) -> None:
    told = Statement("0" * 64, 1, {}, 0.5).to_json()
    assert Statement.read(told).epsilon == 0.5
    with pytest.raises(SiteError, match="cannot be read"):
        Statement.read({**told, "epsilon": value})


def silent_at_the_end() -> Callable[[bytes], bytes]:
    """Return what tells of a ledger before the first round, and never again."""
    asked = 0

    def state(payload: bytes) -> bytes:
        nonlocal asked
        asked += 1
        if asked > 2:
            raise TimeoutError("no answer within 600 s")
        return payload

    return state


@pytest.mark.parametrize(
    "lie",
    [
        stating(LESS),
        stating({**LESS, "head": "0" * 64}),  # of another study's ledger, where nobody has paid
        silent_at_the_end(),
    ],
    ids=["less", "another study's", "silent at the end"],
)
def test_no_statement_of_a_site_lowers_what_the_coordinator_counts(
    tmp_path: Path, lie: Callable[[bytes], bytes]
) -> None:
    study = medfed.load_study(written(tmp_path, security__aggregation="plain"))
    honest = medfed.run(study, tmp_path / "honest")
    lying = Lying(Simulation.open(study, folder=tmp_path / "nodes"), lie)
    medfed.run(study, tmp_path / "lied", parties=lying)  # type: ignore[arg-type]
    told = claims.read(tmp_path / "lied")
    true = claims.read(tmp_path / "honest")
    assert told["epsilon"] == true["epsilon"] == honest.summary["privacy"]["epsilon"]
    assert told["rounds"] == true["rounds"]
    assert told["composition"]["ledger"]["epsilon_all_runs"] >= told["epsilon"]


def test_a_statement_of_more_is_counted(tmp_path: Path) -> None:
    """Rounds that a crash lost look so: what a site says above the coordinator's count stands, so
    that a lie ends the run, by the site's name.
    """
    study = medfed.load_study(written(tmp_path, security__aggregation="plain"))
    honest = medfed.run(study, tmp_path / "honest")
    more = stating({"uses": 9, "epsilon": 50.0})
    lying = Lying(Simulation.open(study, folder=tmp_path / "nodes"), more)
    lied = medfed.run(study, tmp_path / "lied", parties=lying)  # type: ignore[arg-type]
    assert not lied.complete and "site 'clinic 0' has paid for 4 rounds" in lied.summary["reason"]
    told = claims.read(tmp_path / "lied")
    assert told["epsilon"] > honest.summary["privacy"]["epsilon"]
    assert told["composition"]["ledger"]["epsilon_all_runs"] == 50.0


@pytest.mark.parametrize(
    "lie", [{"queries": {"vote": 1}}, {"queries": {"patient 7": 3}}, {"uses": 20_000}]
)
def test_a_statement_of_what_no_plan_holds_is_its_sites_fault(
    tmp_path: Path, lie: dict[str, Any]
) -> None:
    """It ended the coordinator by an error of its own, or had it count for hours."""
    study = medfed.load_study(written(tmp_path, security__aggregation="plain"))
    lying = Lying(Simulation.open(study, folder=tmp_path / "nodes"), stating(lie))
    with pytest.raises(LedgerError, match="site 'clinic 0': its statement tells of uses="):
        medfed.run(study, tmp_path / "lied", parties=lying)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("op", "refusal", "text"),
    [
        ("identify", SignatureError, "'clinic 0' tells keys of 'clinic 2', site; expected its own"),
        ("join", PlanError, "site 'clinic 0' has not signed this study"),
    ],
)
def test_a_site_that_answers_for_another_is_refused(
    tmp_path: Path, op: str, refusal: type[Exception], text: str
) -> None:
    """It tells the keys, or hands on the signature, of a site that is honest."""
    study = medfed.load_study(written(tmp_path, security__aggregation="masked", **CLAIM))
    simulation = Simulation.open(study, folder=tmp_path / "nodes")
    other = simulation.fleet.site(SITES[2])
    asked: list[bytes] = []
    handle = simulation.fleet.submit_many

    def overhear(sites: Any, name: str, payload: bytes, deadline: float) -> list[int]:
        if name == op:
            asked.append(payload)
        return handle(sites, name, payload, deadline)

    object.__setattr__(simulation.fleet, "submit_many", overhear)
    lying = Lying(simulation, lambda _: other.handle(op, asked[-1]), op)
    with pytest.raises(refusal, match=text):
        medfed.run(study, tmp_path / "run", parties=lying)  # type: ignore[arg-type]


def test_a_site_whose_ledger_was_taken_back_refuses_to_go_on(tmp_path: Path) -> None:
    """A copy of the ledger from before the run's last rounds lacks the head that the site told."""
    study = medfed.load_study(written(tmp_path, security__aggregation="plain"))
    nodes = tmp_path / "nodes"
    kept = tmp_path / "kept"

    class Stop(BaseException):
        pass

    def stop(event: Any) -> None:
        if isinstance(event, RoundStarted) and event.round == 2:
            shutil.copytree(nodes, kept)
        if isinstance(event, RoundStarted) and event.round == 4:
            raise Stop

    parties = Simulation.open(study, folder=nodes)
    with pytest.raises(Stop):
        medfed.run(study, tmp_path / "run", listeners=[stop], parties=parties)
    shutil.rmtree(nodes)
    kept.rename(nodes)
    with pytest.raises(LedgerError, match=r"head \w+\.\.\. of an earlier claim is not in it"):
        medfed.resume(tmp_path / "run", parties=Simulation.open(study, folder=nodes))


def test_a_statement_names_no_patient_and_is_the_same_without_one(tmp_path: Path) -> None:
    """All that a site tells of its ledger, but for the chain's hash, follows from public facts."""
    told: list[list[dict[str, Any]]] = []
    for number, gone in enumerate(([], ["p0001"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        study = medfed.load_study(written(folder, security__aggregation="plain"))
        frame = pd.read_csv(folder / "cohort.csv")
        frame[~frame["subject"].isin(gone)].to_csv(folder / "cohort.csv", index=False)
        simulation = Simulation.open(study, folder=folder / "nodes")
        medfed.run(study, folder / "run", parties=simulation)
        asked = gather(
            simulation.fleet, SITES, "statement", codec.encode({"whole": True}), 60
        ).values()
        told.append([codec.decode(reply.payload)[0]["statement"] for reply in asked])

    for one, other in zip(*told, strict=True):
        assert one.pop("head") != other.pop("head") and one == other
        assert (
            set(one) == {"uses", "queries", "epsilon", "lifetime", "founded"} and one["uses"] == 4
        )


def test_a_site_holds_no_record_of_another(tmp_path: Path) -> None:
    study = medfed.load_study(written(tmp_path, **CLAIM))
    one = runs.open_site(study, SITES[2])
    together = {site.name: site for site in runs.open_sites(study, None)}
    assert one.table is not None and together[SITES[2]].table is not None
    assert list(one.table.ids) == list(together[SITES[2]].table.ids) and len(one.table) == 60
    with pytest.raises(
        medfed.RunError, match="site 'clinic 9' has no record in this table; did you mean"
    ):
        runs.open_site(study, "clinic 9")


@pytest.mark.long
def test_a_killed_site_is_left_out_by_name(tmp_path: Path, started: Any) -> None:
    path = written(tmp_path, training__quorum=0.5, security__aggregation="plain", **NONE)
    study = medfed.load_study(path)
    parties = started(path)
    plan = prepare(runs.complete(study), parties.fleet, parties.fleet.sites())
    victim = parties.processes[1]
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)
    with Log() as log:
        server = run_round(plan.begin(), plan, parties.fleet, plan.budget(), log)
    assert server.round == 1
    left = summarise(log.events())["excluded"]
    assert [one["site"] for one in left] == [SITES[1]] and "process has ended" in left[0]["reason"]


@pytest.mark.long
def test_a_site_with_another_study_signs_nothing_for_this_one(tmp_path: Path, started: Any) -> None:
    path = written(tmp_path, security__aggregation="masked", **CLAIM)
    parties = started(path)
    other = medfed.load_study(path).set("training.learning_rate", 0.5)
    with pytest.raises(PlanError, match="has not signed this study"):
        medfed.run(other, tmp_path / "coordinator", parties=parties)


@pytest.mark.long
def test_a_party_that_tells_anothers_keys_is_refused(tmp_path: Path, started: Any) -> None:
    path = written(tmp_path, security__aggregation="masked", **CLAIM)
    parties = started(path)
    study = runs.complete(medfed.load_study(path))
    plan = prepare(study, parties.fleet, parties.fleet.sites())

    class Swapped:
        """A relay that answers for one site with another's keys."""

        def __getattr__(self, name: str) -> Any:
            return getattr(parties.fleet, name)

        def submit_many(self, sites: Any, op: str, payload: bytes, deadline: float) -> list[int]:
            asked = [SITES[0] if op == "identify" else name for name in sites]
            return parties.fleet.submit_many(asked, op, payload, deadline)

    with pytest.raises(
        SignatureError, match=r"'clinic 1' tells keys of 'clinic 0', site; expected its own"
    ):
        aggregation.introduce(plan, Swapped(), "run")  # type: ignore[arg-type]


def test_a_lying_coordinator_is_told_no(tmp_path: Path, started: Any) -> None:
    """Sizes that are not the site's, a coordinator that is none, work before joining: each party
    looks for itself.
    """
    path = written(tmp_path, security__aggregation="three-party", **NONE)
    parties = started(path)
    study = runs.complete(medfed.load_study(path))
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
