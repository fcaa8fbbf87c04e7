"""What sites have paid for and the coordinator has not counted: answers that came late, got lost or
were never made. Whatever of it happens, no ledger holds more than the claim says.
"""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import medfed
from medfed.core import codec
from medfed.core.checks import BudgetError, LedgerError, SiteError
from medfed.engine.port import Reply, gather
from medfed.node.site import OPS
from medfed.privacy.ledger import Ledger
from medfed.privacy.site_ledger import SiteLedger
from medfed.runs import Simulation, claims
from medfed.study import Study
from tests import test_votes
from tests.tables import PRIVATE, SITES, invented, write_study
from tests.test_votes import short

__all__ = ["short"]

pytestmark = pytest.mark.usefixtures("one_thread")

Late = Callable[[str, str, int], bool]
"""(operation, site, how often it was asked that, from 1) -> whether its answer comes too late."""


class Delayed:
    """Parties whose sites do all that they are asked, and of which some answers come too late."""

    def __init__(self, simulation: Simulation, late: Late) -> None:
        self.inner = simulation.fleet
        self.late = late
        self.asked = dict[int, str]()
        self.times = dict[tuple[str, str], int]()
        self.aggregators = simulation.aggregators
        self.baselines = None
        self.resolve = simulation.resolve
        self.fleet = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def submit(self, site: str, op: str, payload: bytes, deadline: float) -> int:
        return self.submit_many([site], op, payload, deadline)[0]

    def submit_many(self, sites: Any, op: str, payload: bytes, deadline: float) -> list[int]:
        tickets = self.inner.submit_many(sites, op, payload, deadline)
        whole = op != "statement" or codec.decode(payload)[0].get("whole")
        self.asked |= dict.fromkeys(tickets, op if whole else "head")
        return tickets

    def poll(self, wait: float) -> list[Reply]:
        return [self._delay(reply) for reply in self.inner.poll(wait)]

    def _delay(self, reply: Reply) -> Reply:
        key = self.asked[reply.ticket], reply.site
        self.times[key] = self.times.get(key, 0) + 1
        if not self.late(*key, self.times[key]):
            return reply
        return dataclasses.replace(reply, payload=b"", error="no answer within 60 s")


def never(op: str, site: str, times: int) -> bool:
    return False


def row(number: int) -> Late:
    """The row that one site sends when it is asked for so many times comes too late."""
    return lambda op, site, times: (op, site, times) == ("work", "east", number)


def play(study: Study, folder: Path, late: Late) -> medfed.Result:
    """Run a study whose ledger lies in folder / "sites"."""
    parties = Delayed(Simulation.open(study, folder=folder / "ledgers"), late)
    return medfed.run(study, folder / "run", parties=parties)


def go_on(study: Study, folder: Path, late: Late = never) -> medfed.Result:
    """Resume it."""
    parties = Delayed(Simulation.open(study, folder=folder / "ledgers"), late)
    return medfed.resume(folder / "run", parties=parties)


def claimed(folder: Path, study: Study) -> dict[str, Any]:
    """Return a run's claim, of which holds: no patient has paid more by any ledger, in the run or in
    all.
    """
    claim = claims.read(folder / "run")
    delta = claim["delta"] - claim["accountant"]["delta_taken_by_the_noise_sampler"]
    paths = sorted((folder / "ledgers").rglob("ledger.sqlite"))
    assert paths
    for path in paths:
        with Ledger.open(path, read_only=True) as book:
            spent = book.worst(delta, study.study.name)
        assert spent <= claim["epsilon"] * (1 + 1e-9)
        assert spent <= claim["composition"]["ledger"]["epsilon_all_runs"] * (1 + 1e-9)
    return claim


def study_of(folder: Path, **changes: Any) -> Study:
    study = medfed.load_study(write_study(folder, PRIVATE))
    return study._with({key.replace("__", "."): value for key, value in changes.items()})


def stuck(op: str, *sites: str) -> Late:
    """All answers of these sites to an operation are late; by default of all sites."""
    return lambda asked, site, times: asked == op and site in (sites or SITES)


def silent(since: int, *sites: str) -> Late:
    """Sites tell nothing of their ledgers from a number of times on; by default none of them does."""
    return lambda op, site, times: op == "statement" and times >= since and site in (sites or SITES)


def both(*late: Late) -> Late:
    return lambda op, site, times: any([one(op, site, times) for one in late])


# answers to queries -------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_a_threshold_that_all_answered_late_is_counted(tmp_path: Path, noise: str) -> None:
    study = study_of(tmp_path, data__threshold="youden", privacy__noise=noise)
    result = play(study, tmp_path, stuck("count"))
    claim = claimed(tmp_path, study)
    assert claim["threshold"]["released"] == 1 and result.summary["decision"]["threshold"] == 0.5
    assert 0.99 < claim["epsilon"] <= 1


@pytest.mark.usefixtures("short")
def test_a_vote_that_all_answered_late_is_counted(tmp_path: Path) -> None:
    study = test_votes.load(tmp_path)
    result = play(study, tmp_path, lambda op, site, times: op == "vote")
    claim = claimed(tmp_path, study)
    assert claim["vote"]["released"] == 1 and result.summary["vote"] is None
    assert 0.999 * 8 < claim["epsilon"] <= 8


@pytest.mark.parametrize("payers", [SITES, ("east",)], ids=["all", "one"])
def test_a_late_threshold_is_counted_though_who_paid_is_silent_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, payers: tuple[str, ...]
) -> None:
    """It was in a ledger and in no claim: whoever had paid told nobody any more."""
    pay = SiteLedger.pay_query

    def refuse_others(account: SiteLedger, label: str, sites: Any) -> dict[str, BudgetError]:
        refused = {name: BudgetError("not today") for name in sites if name not in payers}
        return refused | pay(account, label, [name for name in sites if name in payers])

    monkeypatch.setattr(SiteLedger, "pay_query", refuse_others)
    study = study_of(tmp_path, data__threshold="youden")
    play(study, tmp_path, both(stuck("count"), silent(3, *payers)))
    assert claimed(tmp_path, study)["threshold"]["released"] == 1


def test_what_was_never_asked_is_not_assumed_of_a_silent_site(tmp_path: Path) -> None:
    """The run ends before a threshold is asked for: silence costs nothing more."""
    study = study_of(tmp_path, data__threshold="youden")
    result = play(study, tmp_path, both(row(3), silent(3)))
    claim = claimed(tmp_path, study)
    assert not result.complete and claim["threshold"]["released"] == 0
    assert claim["rounds"]["paid"] == 3


def test_a_query_that_all_refuse_is_not_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they say of their ledgers that nobody has paid."""

    def refuse(*_: Any) -> Any:
        raise SiteError("not today")

    monkeypatch.setitem(OPS, "count", refuse)
    study = study_of(tmp_path, data__threshold="youden")
    play(study, tmp_path, never)
    claim = claimed(tmp_path, study)
    assert claim["threshold"]["released"] == 0 and claim["epsilon"] < 0.99


# rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_a_row_that_came_late_is_counted(tmp_path: Path, noise: str) -> None:
    study = study_of(tmp_path, training__quorum=0.6, privacy__noise=noise)
    result = play(study, tmp_path, row(2))
    claim = claimed(tmp_path, study)
    assert result.summary["rounds"] == 4 and claim["rounds"]["paid"] == 4
    assert 0.999 < claim["epsilon"] <= 1


@pytest.mark.parametrize(
    "mute",
    [never, silent(3), silent(3, "east")],
    ids=["nobody is silent", "all are", "one is"],
)
@pytest.mark.parametrize("way", ["plain", "masked", "three-party"])
def test_a_round_that_late_rows_ended_is_counted_and_so_is_what_follows(
    tmp_path: Path, way: str, mute: Late
) -> None:
    """All have paid for it; on resume they come back, and pay anew or answer with what they paid for."""
    study = study_of(tmp_path, privacy__spare_rounds=1, security__aggregation=way)
    assert not play(study, tmp_path, both(row(3), mute)).complete
    assert claimed(tmp_path, study)["rounds"]["paid"] == 3
    assert go_on(study, tmp_path, mute).summary["rounds"] == 4
    claim = claimed(tmp_path, study)
    assert claim["rounds"]["paid"] == 5 if way == "plain" else claim["rounds"]["paid"] in (4, 5)
    assert claim["epsilon"] <= 1


def test_a_run_does_not_go_on_while_a_site_tells_nothing_of_what_it_has_paid(
    tmp_path: Path,
) -> None:
    """A round that a crash had lost was paid by it, and told by nobody: neither then nor at the end."""
    study = study_of(tmp_path, privacy__spare_rounds=1)
    play(study, tmp_path, row(3))
    with pytest.raises(LedgerError, match="site 'east': no answer within"):
        go_on(study, tmp_path, silent(2, "east"))  # that its ledger is the same it says
    assert go_on(study, tmp_path).summary["rounds"] == 4
    assert claimed(tmp_path, study)["rounds"]["paid"] == 5


# any mixture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_no_ledger_holds_more_than_the_claim_whatever_comes_late(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    study = study_of(
        tmp_path,
        data__threshold=rng.choice(["youden", "0.5"]),
        privacy__noise=rng.choice(["shared", "site"]),
        privacy__spare_rounds=rng.choice([0, 1]),
        training__quorum=rng.choice([0.6, 1.0]),
        training__batch_size=rng.choice([0, 12]),
        security__aggregation=rng.choice(["plain", "plain", "masked", "three-party"]),
    )
    fate = random.Random(seed + 1000)
    odds = {"work": 0.15, "count": 0.6, "head": 0.3, "statement": 0.4}

    def late(op: str, site: str, times: int) -> bool:
        if op == "statement" and times < 3:  # else there is no run
            return False
        return fate.random() < odds.get(op, 0.0)

    play(study, tmp_path, late)
    claimed(tmp_path, study)
    for _ in range(2):
        try:
            if go_on(study, tmp_path, late).complete:
                break
        except LedgerError:  # a silent site
            continue
        claimed(tmp_path, study)
    go_on(study, tmp_path)
    claimed(tmp_path, study)


# patients of two sites ----------------------------------------------------------------------------


def unlike(folder: Path, shared: int, **changes: Any) -> Study:
    """Return a study of a large site, whose patients are sampled, and of a small one, whose are not;
    so many of its patients are at both. A quarter of the plan is played.
    """
    rows = 600
    frame = invented(rows)
    frame["hospital"] = np.where(np.arange(rows) < 15, "small", "large")
    twice = frame[frame["hospital"] == "small"].head(shared).assign(hospital="large")
    folder.mkdir(exist_ok=True)
    path = write_study(folder, PRIVATE.split("[privacy.sizes]")[0], pd.concat([frame, twice]))
    study = medfed.load_study(path)
    settings: dict[str, Any] = {
        "privacy.sizes": {"small": 10, "large": 480},
        "privacy.noise": "site",
        "privacy.max_sites_per_patient": 2,
        "privacy.spare_rounds": 3,
        "training.rounds": 1,
        "training.batch_size": 10,
        "training.local_steps": 5,
    }
    return study._with(settings | {key.replace("__", "."): v for key, v in changes.items()})


@pytest.mark.parametrize("shared", [0, 5])
def test_who_is_at_two_unlike_sites_has_not_paid_more_than_the_claim(
    tmp_path: Path, shared: int
) -> None:
    """By RDP half of one site's rounds and half of the other's cost a tenth more than all of either."""
    study = unlike(tmp_path, shared)
    play(study, tmp_path, never)
    assert claimed(tmp_path, study)["rounds"]["paid"] == 1


def told_of(study: Study, folder: Path) -> list[dict[str, Any]]:
    """Return what each site tells of its ledger after a run."""
    simulation = Simulation.open(study, folder=folder / "ledgers")
    medfed.run(study, folder / "run", parties=simulation)
    asked = gather(
        simulation.fleet, simulation.fleet.sites(), "statement", codec.encode({"whole": True}), 60
    )
    return [codec.decode(reply.payload)[0]["statement"] for reply in asked.values()]


@pytest.mark.parametrize("changes", [{}, {"training__batch_size": 0}], ids=["sampled", "all"])
def test_a_statement_does_not_tell_whether_somebody_is_at_two_sites(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The ledger's own figure was told: twice as much where somebody was at both."""
    spent = []
    told = []
    for shared in (0, 5):
        folder = tmp_path / str(shared)
        study = unlike(folder, shared, **changes)
        told.append(told_of(study, folder))
        claim = claimed(folder, study)
        delta = claim["delta"] - claim["accountant"]["delta_taken_by_the_noise_sampler"]
        with Ledger.open(folder / "ledgers" / "ledger.sqlite", read_only=True) as book:
            spent.append(book.worst(delta, study.study.name))
    for one, other in zip(*told, strict=True):
        assert one.pop("head") != other.pop("head") and one == other
        assert spent[0] < spent[1] <= one["epsilon"]


def test_a_statement_is_never_below_the_ledger(tmp_path: Path) -> None:
    """An earlier run of the study has asked these patients too: this run's public facts are less."""
    study = study_of(tmp_path, privacy__spare_rounds=4)
    ledgers = tmp_path / "ledgers"
    for name in ("first", "second"):
        simulation = Simulation.open(study, folder=ledgers)
        try:
            medfed.run(study, tmp_path / name, parties=simulation)
        except medfed.MedfedError as error:
            assert name == "second" and "all of which a whole one takes" in str(error)
    told = [
        codec.decode(reply.payload)[0]["statement"]
        for reply in gather(
            simulation.fleet, SITES, "statement", codec.encode({"whole": True}), 60
        ).values()
    ]
    with Ledger.open(ledgers / "ledger.sqlite", read_only=True) as book:
        spent = book.worst(1e-4, study.study.name)
    assert {one["uses"] for one in told} == {0}  # of the second run, which was refused
    assert all(one["epsilon"] >= spent > 0.5 for one in told)
