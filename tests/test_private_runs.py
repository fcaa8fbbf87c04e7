"""Runs under a guarantee: paid before they train, stopped when the budget is spent, and silent
about patients.
"""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from rich.console import Console
from scipy import stats

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import BudgetError, MedfedError, PlanError, SiteError
from medfed.core.flat import fingerprint
from medfed.learn import dpsgd, zoo
from medfed.monitor import events
from medfed.monitor.events import Event, RoundFinished
from medfed.node import site, work
from medfed.node.inprocess import InProcess
from medfed.planning.plan import Plan
from medfed.privacy.guarantee import GRID, SLACK
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Lifetime
from medfed.privacy.site_ledger import SiteLedger
from medfed.rounds import checkpoints
from medfed.rounds.prepare import prepare
from medfed.runs import drive, execute
from medfed.screens import console
from medfed.screens.dashboards import write_dashboards
from medfed.study import Study
from tests.tables import PRIVATE, SITES, invented, plain, write_study

FIXED = fingerprint({})
"""What a coordinator says of a model without frozen parts and buffers."""

pytestmark = pytest.mark.usefixtures("one_thread")


class Crash(BaseException):
    """What a kill looks like from inside: nothing after it runs."""


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three hospitals, four rounds of joint noise, a ledger for this run alone."""
    return medfed.load_study(write_study(tmp_path, PRIVATE))


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the lifetime ledger."""
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "ledger.sqlite"


@pytest.fixture
def lasting(study: Study, home: Path) -> Study:
    """The same study, whose runs share one budget."""
    return study.set("privacy.scope", "study")


def charges(ledger: Path, label: str = "round") -> dict[str, int]:
    """Return how many charges each site's patients have in a ledger."""
    found: dict[str, int] = {}
    with Ledger.open(ledger, read_only=True) as book:
        for row in book.rows():
            if row["label"] == label:
                found[str(row["site"])] = found.get(str(row["site"]), 0) + 1
    return found


def own_ledger(folder: Path) -> Path:
    return folder / "sites" / "ledger.sqlite"


def claim_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "privacy.json").read_text())
    return found


# what is promised and paid ------------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["shared", "site", "central"])
def test_a_run_spends_what_was_asked_and_no_more(tmp_path: Path, study: Study, noise: str) -> None:
    result = medfed.run(study.set("privacy.noise", noise), tmp_path / "run")
    privacy = result.summary["privacy"]
    assert result.complete and 0.999 < privacy["epsilon"] <= 1
    assert (privacy["delta"], privacy["noise"], privacy["unit"], privacy["scope"]) == (
        1e-4,
        noise,
        "patient",
        "run",
    )
    assert charges(own_ledger(tmp_path / "run")) == dict.fromkeys(SITES, 4)
    assert claim_of(tmp_path / "run")["epsilon"] == privacy["epsilon"]
    assert all(math.isfinite(value) for value in result.w_P.tolist())


def test_what_is_spent_is_told_after_every_round(study: Study) -> None:
    told: list[Event] = []
    medfed.simulate(study, listeners=[told.append])
    spent = [
        float(str(event.privacy["epsilon"])) for event in told if isinstance(event, RoundFinished)
    ]
    assert (
        len(spent) == 4 and spent == sorted(set(spent)) and spent[0] > 0 and 0.999 < spent[-1] <= 1
    )


def test_losses_and_label_counts_are_not_told(study: Study) -> None:
    for noise in ("shared", "site"):
        told: list[Event] = []
        medfed.simulate(study.set("privacy.noise", noise), listeners=[told.append])
        rounds = [event for event in told if isinstance(event, RoundFinished)]
        assert all(event.loss is None and set(event.losses) == {None} for event in rounds)
        (planned,) = (event for event in told if isinstance(event, events.Planned))
        assert {count for labels in planned.labels.values() for count in labels.values()} == {None}
        assert {name: size["train"] for name, size in planned.sizes.items()} == {
            "north": 96,
            "south": 58,
            "east": 38,
        }


def test_seeded_noise_gives_the_same_bits_and_claims_nothing(tmp_path: Path, study: Study) -> None:
    seeded = study.set("privacy.simulation_only", True)
    for noise in ("shared", "site"):
        settings = [
            seeded.set("privacy.noise", noise).set("study.seed", seed) for seed in (3, 3, 4)
        ]
        one, two, other = map(medfed.simulate, settings)
        assert torch.equal(one.w_P, two.w_P) and not torch.equal(one.w_P, other.w_P)
        assert one.summary["privacy"]["epsilon"] is None
    medfed.run(seeded, tmp_path / "run")
    assert not own_ledger(tmp_path / "run").exists()  # nothing is claimed, so nothing is charged
    one, two = (medfed.simulate(study) for _ in range(2))
    assert not torch.equal(one.w_P, two.w_P)


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_algorithms_compose_with_noise(study: Study, noise: str) -> None:
    """With joint noise a round is one step, where three of them are FedAvg, and the plan
    says so.
    """
    seeded = (
        study.set("privacy.simulation_only", True)
        .set("privacy.noise", noise)
        .set("training.rounds", 2)
    )
    if noise == "site":  # unequal work for the sites
        seeded = seeded.set("training.batch_size", 30).set("training.local_epochs", 2)
    average = medfed.simulate(seeded)
    for algorithm in ("fedprox", "scaffold", "fednova", "fedavgm", "fedadam"):
        result = medfed.simulate(seeded.set("training.algorithm", algorithm))
        coincide = noise == "shared" and algorithm in ("fedprox", "scaffold", "fednova")
        assert result.complete and torch.equal(result.w_P, average.w_P) == coincide, algorithm
        assert (
            any("is FedAvg here" in warning for warning in result.summary["warnings"]) == coincide
        ), algorithm


def test_without_its_guarantee_the_study_has_the_same_bits_twice(study: Study) -> None:
    one, two = (medfed.simulate(plain(study)) for _ in range(2))
    assert torch.equal(one.w_P, two.w_P) and one.summary["privacy"]["epsilon"] is None


# the noise of a whole run -------------------------------------------------------------------------


def _has_variance(noise: torch.Tensor, sigma: float) -> bool:
    low, high = stats.chi2.ppf([1e-7, 1 - 1e-7], noise.numel())
    return bool(low < float(noise.double().square().sum()) / sigma**2 < high)


@pytest.mark.parametrize("noise", ["shared", "central", "site"])
def test_the_model_carries_the_noise_that_was_paid_for(
    study: Study, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of patients who count for nothing one round releases noise, divided by the declared sizes:
    nothing between accountant and model may scale it."""
    monkeypatch.setattr(dpsgd, "clip_factor", lambda kind, clip: torch.zeros_like)
    wide = (
        study.set("model.name", "mlp").set("model.options.hidden", [400]).set("training.rounds", 1)
    )
    wide = (
        wide.set("privacy.noise", noise).set("privacy.clip", 5.0).set("training.learning_rate", 0.5)
    )
    plans: list[Plan] = []
    real = execute.enrol
    monkeypatch.setattr(
        execute, "enrol", lambda plan, *rest: (plans.append(plan), real(plan, *rest))
    )
    moved_P = medfed.simulate(wide).w_P - plans[0].first_weights()
    sizes = {"north": 96, "south": 58, "east": 38}
    guarantee = plans[0].guarantee
    assert guarantee is not None and len(moved_P) > 2000
    z = guarantee.releases["north"].noise_multiplier
    assert 3.1 < z < 3.3  # what one Gaussian of epsilon 1 at delta 1e-4 needs
    # n sigma_k / m_k of each site, weighted with m_k / n
    sites = 1 if noise != "site" else len(sizes)
    sigma = (
        0.5
        * 5.0
        * z
        * (1 + SLACK + GRID * math.sqrt(len(moved_P)))
        * math.sqrt(sites)
        / sum(sizes.values())
    )
    assert _has_variance(moved_P, sigma)
    assert not any(_has_variance(moved_P, sigma * factor) for factor in (1 / 2, 2 / 3, 3 / 2, 2))


# the budget over several runs ---------------------------------------------------------------------


def test_a_second_run_on_the_same_patients_is_refused_before_it_trains(
    tmp_path: Path, lasting: Study, home: Path
) -> None:
    assert medfed.run(lasting, tmp_path / "one").complete
    assert not own_ledger(tmp_path / "one").exists()
    head = claim_of(tmp_path / "one")["composition"]["ledger"]["head"]
    with pytest.raises(
        BudgetError, match=r"spent up to epsilon=1 of 1 .*left for one release: 0\.00"
    ):
        medfed.run(lasting, tmp_path / "two")
    assert not (tmp_path / "two").exists()
    with Ledger.open(home, read_only=True) as book:
        assert book.head() == head and charges(home) == dict.fromkeys(SITES, 4)
    claim = claim_of(tmp_path / "one")["composition"]
    assert claim["scope"] == "study" and claim["ledger"]["epsilon_all_runs"] == pytest.approx(
        1, abs=1e-3
    )


def test_a_run_of_scope_run_starts_with_a_fresh_ledger(
    tmp_path: Path, study: Study, home: Path
) -> None:
    for name in ("one", "two"):
        assert medfed.run(study, tmp_path / name).complete
        assert charges(own_ledger(tmp_path / name)) == dict.fromkeys(SITES, 4)
        assert "this run alone" in claim_of(tmp_path / name)["composition"]["meaning"]
    assert not home.exists()


def test_the_lifetime_budget_is_over_all_studies(
    tmp_path: Path, lasting: Study, home: Path
) -> None:
    Ledger.open(home, founding=Lifetime(1.6, 1e-4, operator="Ada")).close()
    assert medfed.run(lasting, tmp_path / "one").complete
    other = lasting.set("study.name", "another").set("privacy.lifetime_epsilon", 1.3)
    with pytest.raises(
        BudgetError, match=r"In all studies .* of 1\.3 .*privacy\.lifetime_epsilon raised"
    ):
        medfed.run(other, tmp_path / "two")
    assert medfed.run(other.set("privacy.lifetime_epsilon", math.inf), tmp_path / "two").complete


def test_a_simulation_in_memory_pays_too(lasting: Study, home: Path) -> None:
    medfed.simulate(lasting)
    with pytest.raises(BudgetError, match="left for one release"):
        medfed.simulate(lasting)
    assert charges(home) == dict.fromkeys(SITES, 4)


def test_baselines_without_noise_are_for_public_data_only(study: Study, home: Path) -> None:
    measured = study.set("monitor.baselines", True)
    assert set(medfed.simulate(measured).summary["baselines"]) == {"local", "pooled"}
    noised = measured.set("data.test_is_public", False).set("monitor.evaluate_every", 4)
    assert medfed.simulate(noised.set("privacy.evaluation_epsilon", 0.5)).summary["baselines"] == {}
    assert medfed.simulate(measured.set("privacy.scope", "study")).summary["baselines"] == {}


# crashes ------------------------------------------------------------------------------------------


def test_a_crash_between_charge_and_training_leaves_the_charge(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(work, "_train_or_sum", crash)
        with pytest.raises(Crash):
            medfed.run(study, tmp_path / "run")
    assert charges(own_ledger(tmp_path / "run")) == dict.fromkeys(SITES, 1)


KILL = """
import os, signal, sys
import medfed
from medfed.node import site, work
work._train_or_sum = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
medfed.run(medfed.load_study(sys.argv[1]), sys.argv[2])
"""


@pytest.mark.slow
def test_a_kill_between_charge_and_training_leaves_the_charge(tmp_path: Path, study: Study) -> None:
    command = [sys.executable, "-c", KILL, str(study.folder / "study.toml"), str(tmp_path / "run")]
    killed = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert killed.returncode == -signal.SIGKILL
    assert charges(own_ledger(tmp_path / "run")) == dict.fromkeys(SITES, 1)


def interrupted(
    folder: Path, study: Study, patch: pytest.MonkeyPatch, rounds: int, saved: bool
) -> None:
    """Leave a run that was killed in a round, right before or after its checkpoint was written."""
    real = checkpoints.write

    def write(place: Path, server: Any, header: dict[str, Any], keep: int) -> None:
        if server.round == rounds and not saved:
            raise Crash
        real(place, server, header, keep)
        if server.round == rounds:
            raise Crash

    with patch.context() as inside:
        inside.setattr(checkpoints, "write", write)
        with pytest.raises(Crash):
            medfed.run(study, folder)


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_a_run_that_lost_nothing_resumes_within_its_plan(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, noise: str
) -> None:
    study = study.set("privacy.noise", noise)
    interrupted(tmp_path / "run", study, monkeypatch, 2, saved=True)
    result = medfed.resume(tmp_path / "run")
    assert result.complete and result.summary["rounds"] == 4
    assert charges(own_ledger(tmp_path / "run")) == dict.fromkeys(SITES, 4)
    assert 0.999 < result.summary["privacy"]["epsilon"] <= 1


def test_a_round_that_a_crash_lost_is_paid_again_if_the_plan_has_one_to_spare(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path / "run", study.set("privacy.spare_rounds", 1), monkeypatch, 3, saved=False)
    result = medfed.resume(tmp_path / "run")
    assert result.complete and charges(own_ledger(tmp_path / "run")) == dict.fromkeys(SITES, 5)
    claim = claim_of(tmp_path / "run")
    assert claim["rounds"] == {"planned": 4, "spare": 1, "paid": 5}
    assert 0.999 < claim["epsilon"] <= 1  # all five, not only the four that the model is made of
    assert claim["epsilon"] == pytest.approx(
        claim["composition"]["ledger"]["epsilon_all_runs"], abs=1e-9
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"privacy.noise": "site"},
        pytest.param(
            # no filter by itself
            {"privacy.accountant": "pld", "training.batch_size": 30, "privacy.epsilon": 0.3},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["shared", "site", "pld"],
)
def test_without_one_to_spare_a_run_that_lost_a_round_ends_early(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    for key, value in settings.items():
        study = study.set(key, value)
    interrupted(tmp_path / "run", study, monkeypatch, 3, saved=False)
    result = medfed.resume(tmp_path / "run")
    assert result.summary["status"] == "incomplete" and result.summary["rounds"] == 3
    assert charges(own_ledger(tmp_path / "run")) == dict.fromkeys(SITES, 4)
    claim = claim_of(tmp_path / "run")
    assert claim["epsilon"] <= study.privacy.epsilon and claim["rounds"]["paid"] == 4
    finished = next(
        e
        for e in events.read(tmp_path / "run" / "events.jsonl")
        if isinstance(e, events.RunFinished)
    )
    assert "has paid for 4 rounds" in finished.reason and "spare_rounds" in finished.reason


def test_a_correlated_run_is_not_resumed(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = (
        study.set("fleet.schedule", "cyclic").set("fleet.groups", 2).set("privacy.correlated", True)
    )
    turns = turns.set("training.rounds", 3)
    interrupted(tmp_path / "run", turns, monkeypatch, 2, saved=True)
    with pytest.raises(medfed.RunError, match="correlated noise cannot be resumed"):
        medfed.resume(tmp_path / "run")


def test_a_stack_that_fails_is_tried_site_by_site_and_charged_once(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dpsgd.sums
    failed = []

    def sums(model: Any, w_P: Any, patients: Any, *rest: Any) -> Any:
        if len(patients) > 1 and not failed:
            failed.append(len(patients))
            raise RuntimeError("out of memory")
        return real(model, w_P, patients, *rest)

    monkeypatch.setattr(dpsgd, "sums", sums)
    result = medfed.run(study, tmp_path / "run")
    assert failed == [3] and result.complete
    assert charges(own_ledger(tmp_path / "run")) == dict.fromkeys(SITES, 4)


# patients of several sites ------------------------------------------------------------------------


def _two_places(frame: pd.DataFrame, patients: int) -> pd.DataFrame:
    """Return the table with some of north's patients at south too."""
    moved = frame[frame["hospital"] == "north"].head(patients).assign(hospital="south")
    return pd.concat([frame, moved], ignore_index=True)


def test_patients_at_more_sites_than_is_attested_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    study = medfed.load_study(write_study(tmp_path, PRIVATE, _two_places(invented(), 5)))
    with pytest.raises(
        PlanError, match=r"max_sites_per_patient=1, but there are patients .*'subject'"
    ) as caught:
        medfed.run(study, tmp_path / "run")
    # neither how many they are nor at how many sites
    assert not re.search(r"[25]", str(caught.value))
    # in the sites' own log
    assert "5 patients have records at more than 1 sites, up to 2" in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_patients_of_two_sites_are_covered_and_it_is_said(tmp_path: Path, noise: str) -> None:
    study = medfed.load_study(write_study(tmp_path, PRIVATE, _two_places(invented(), 5)))
    study = study.set("privacy.max_sites_per_patient", 2).set("privacy.noise", noise)
    result = medfed.run(study, tmp_path / "run")
    claim = claim_of(tmp_path / "run")
    assert result.complete and 0.999 < claim["epsilon"] <= 1 and claim["max_sites_per_patient"] == 2
    assert any(
        "no patient has records at more than 2 sites (checked" in text
        for text in claim["assumptions"]
    )
    assert claim["composition"]["ledger"]["epsilon_all_runs"] == pytest.approx(
        claim["epsilon"], abs=1e-6
    )


def test_where_nobody_names_patients_the_assumption_is_attested(tmp_path: Path) -> None:
    frame = invented().drop(columns="subject")
    study = medfed.load_study(
        write_study(tmp_path, PRIVATE.replace('patient = "subject"\n', ""), frame)
    )
    medfed.run(study, tmp_path / "run")
    told = claim_of(tmp_path / "run")["assumptions"]
    assert any("(attested, not measured)" in text for text in told)
    assert any("one row is one patient" in text for text in told)


# ledgers that cannot be used ----------------------------------------------------------------------


def _refused(study: Study, folder: Path, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """See a run refused before it trains."""
    monkeypatch.setattr(work, "_train_or_sum", lambda *_: pytest.fail("a record was read"))
    with pytest.raises(MedfedError, match=words):
        medfed.run(study, folder)
    assert not folder.exists()


def test_a_corrupted_ledger_is_refused_before_training(
    tmp_path: Path, lasting: Study, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger.open(home).close()
    content = bytearray(home.read_bytes())
    place = content.index(b'"created"')  # in its first row
    content[place + 3] ^= 1
    home.write_bytes(content)
    _refused(lasting, tmp_path / "run", "is damaged: row 0.*run is refused.*Restore", monkeypatch)


def test_a_ledger_that_is_none_is_refused_before_training(
    tmp_path: Path, lasting: Study, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.parent.mkdir()
    home.write_bytes(b"not a ledger at all" * 100)
    _refused(lasting, tmp_path / "run", "is no ledger", monkeypatch)


def test_a_place_that_cannot_be_written_is_refused_before_training(
    tmp_path: Path, lasting: Study, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.parent.write_text("a file where the folder should be")
    _refused(
        lasting, tmp_path / "run", r"cannot be opened or written: .*set MEDFED_HOME", monkeypatch
    )


def test_a_ledger_without_its_key_is_refused_before_training(
    tmp_path: Path, lasting: Study, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ledger.open(home).close()
    home.with_name("pseudonym.key").unlink()
    _refused(
        lasting, tmp_path / "run", "pseudonym.key cannot be read.*Restore the key", monkeypatch
    )


# tests that patients pay for ----------------------------------------------------------------------


@pytest.fixture
def noised(study: Study) -> Study:
    """Held-out patients are patients too."""
    settings = {
        "data.test_is_public": False,
        "privacy.evaluation_epsilon": 0.5,
        "monitor.evaluate_every": 4,
    }
    for key, value in settings.items():
        study = study.set(key, value)
    return study


def test_held_out_patients_pay_for_their_figures(tmp_path: Path, noised: Study) -> None:
    # at .5 noise may hide a figure
    dear = noised._with({"privacy.epsilon": 8.0, "privacy.evaluation_epsilon": 3.0})
    result = medfed.run(dear, tmp_path / "run")
    assert result.complete and 0 <= result.summary["test"]["accuracy"] <= 1
    ledger = own_ledger(tmp_path / "run")
    assert charges(ledger) == dict.fromkeys(SITES, 4)
    assert charges(ledger, "test") == {f"{name} (test)": 1 for name in SITES}
    assert not any("public test data" in text for text in claim_of(tmp_path / "run")["unprotected"])


def test_a_sites_only_held_out_patient_is_who_pays(
    tmp_path: Path, noised: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid: dict[str, list[str]] = {}

    def pay(self: SiteLedger, asked: dict[str, list[str]]) -> dict[str, BudgetError]:
        paid.update({name: list(ids) for name, ids in asked.items()})
        return {}

    monkeypatch.setattr(SiteLedger, "pay_tests", pay)
    frame = pd.read_csv(noised.folder / "cohort.csv")
    east = frame.index[frame["hospital"] == "east"]
    frame["part"] = np.where(frame.index % 5, "train", "test")
    frame.loc[east, "part"] = "train"
    frame.loc[east[0], "part"] = "test"
    frame.to_csv(noised.folder / "cohort.csv", index=False)
    medfed.simulate(noised.set("data.test", "part"))
    assert paid["east"] == [frame["subject"][east[0]]]  # a patient, not the characters of an id
    assert set(paid["north"]) == set(
        frame["subject"][(frame["part"] == "test") & (frame["hospital"] == "north")]
    )


def _asked_for_counts(sites: list[site.Site], op: str = "evaluate", cells: int = 32) -> list[Any]:
    """What a site answers five times to a model that tells nothing, without paying."""
    width = sum(p.numel() for p in sites[0].model.parameters())
    edges = torch.linspace(-4, 4, cells - 1, dtype=torch.float64)
    payload = codec.encode({"round": 4}, {"w": torch.zeros(width), "edges": edges})
    for node in sites:
        node.account = None
    return [codec.decode(sites[0].handle(op, payload))[1]["counts"].tolist() for _ in range(5)]


@pytest.mark.parametrize("own", [{"privacy.noise": "site"}, {"security.aggregation": "masked"}])
def test_counts_of_a_site_that_trusts_nobody_are_noised_there_anew(
    noised: Study, own: dict[str, Any]
) -> None:
    told = _asked_for_counts(_prepared(noised._with(own)))
    assert any(one != told[0] for one in told)
    told = _asked_for_counts(
        _prepared(noised._with({**own, "data.threshold": "youden"})), "count", 16
    )
    assert any(one != told[0] for one in told)


def test_counts_that_are_noised_together_go_the_way_of_rows(noised: Study) -> None:
    """To whoever combines rows, and no further: figures of the sum are noised anew, and no site has
    figures.
    """
    sites = _prepared(noised)
    told = _asked_for_counts(sites)
    assert all(one == told[0] for one in told)
    table = sites[0].table
    # a record each
    assert table is not None and int(np.sum(told[0])) == len(np.unique(table.patient[table.test]))
    dear = {
        "privacy.epsilon": 8.0,
        "privacy.evaluation_epsilon": 3.0,
        "privacy.simulation_only": True,
    }
    one, two = (medfed.simulate(noised._with(dear)).summary for _ in range(2))
    assert one["test"] != two["test"] and one["per_site"] == two["per_site"] == {}
    low, high = one["intervals"]["accuracy"]
    assert low <= one["test"]["accuracy"] <= high


def test_raw_scores_of_public_patients_are_told_as_they_are(noised: Study) -> None:
    public = _prepared(noised.set("data.test_is_public", True))
    weights = codec.encode(
        {"round": 4}, {"w": torch.zeros(sum(p.numel() for p in public[0].model.parameters()))}
    )
    raw = [codec.decode(public[0].handle("evaluate", weights))[1]["bins"] for _ in range(2)]
    assert torch.equal(raw[0], raw[1]) and len(raw[0]) == int(public[0].table.test.sum())  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "edges", [None, [1.0, 0.0], [0.0, float("nan")], [float(i) for i in range(5000)]]
)
def test_a_site_counts_by_sound_edges_alone(noised: Study, edges: list[float] | None) -> None:
    sites = _prepared(noised)
    tensors = {"w": torch.zeros(sum(p.numel() for p in sites[0].model.parameters()))}
    if edges is not None:
        tensors["edges"] = torch.tensor(edges, dtype=torch.float64)
    with pytest.raises(medfed.SiteError, match="no edges between cells"):
        sites[0].handle("evaluate", codec.encode({"round": 4}, tensors))


# a threshold that training patients pay for -------------------------------------------------------


@pytest.mark.parametrize("way", [{}, {"privacy.noise": "site"}, {"security.aggregation": "masked"}])
def test_a_chosen_threshold_is_paid_within_the_run(
    tmp_path: Path, study: Study, way: dict[str, Any]
) -> None:
    result = medfed.run(study._with({"data.threshold": "youden", **way}), tmp_path / "run")
    assert result.complete
    ledger = own_ledger(tmp_path / "run")
    assert charges(ledger) == dict.fromkeys(SITES, 4)
    assert charges(ledger, "threshold") == dict.fromkeys(SITES, 1)
    claim = claim_of(tmp_path / "run")
    plain = medfed.run(study._with(way), tmp_path / "plain").summary["privacy"]
    assert claim["threshold"]["released"] == 1
    assert 0.99 * study.privacy.epsilon < claim["epsilon"] <= study.privacy.epsilon
    assert claim["composition"]["ledger"]["epsilon_all_runs"] == pytest.approx(
        claim["epsilon"], rel=1e-3
    )
    # it leaves room for the choice
    assert result.summary["privacy"]["noise_multiplier"] > plain["noise_multiplier"]
    assert claim_of(tmp_path / "plain")["threshold"] is None


def test_a_threshold_that_a_crash_lost_is_not_bought_beyond_the_budget(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was paid for and nobody knows what had left: the resumed run has no room for another, and
    says so.
    """
    with monkeypatch.context() as patch:
        patch.setattr(drive, "test", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            medfed.run(study.set("data.threshold", "youden"), tmp_path / "run")
    result = medfed.resume(tmp_path / "run")
    assert charges(own_ledger(tmp_path / "run"), "threshold") == dict.fromkeys(SITES, 1)
    assert result.summary["decision"]["threshold"] == 0.5 and not result.complete
    claim = claim_of(tmp_path / "run")
    assert claim["threshold"]["released"] == 1 and claim["epsilon"] <= study.privacy.epsilon


def test_a_threshold_that_noise_hides_is_not_chosen(study: Study) -> None:
    summary = medfed.simulate(
        study._with({"data.threshold": "youden", "privacy.threshold_epsilon": 0.001})
    ).summary
    assert summary["decision"]["threshold"] == 0.5
    assert any("chose nothing, as the noise hides it" in text for text in summary["warnings"])


def test_only_the_cells_that_are_paid_for_are_counted(study: Study) -> None:
    sites = _prepared(study.set("data.threshold", "youden"))
    with pytest.raises(medfed.SiteError, match="16 cells are paid for"):
        _asked_for_counts(sites, "count", 17)
    with pytest.raises(medfed.SiteError, match="needs no training row"):
        _asked_for_counts(_prepared(study), "count", 16)


def test_a_simulation_tests_without_paying(tmp_path: Path, noised: Study) -> None:
    assert medfed.run(noised.set("privacy.simulation_only", True), tmp_path / "run").complete
    assert not own_ledger(tmp_path / "run").exists()


def test_patients_who_paid_for_tests_elsewhere_are_asked_again(
    tmp_path: Path, noised: Study, home: Path
) -> None:
    Ledger.open(home, founding=Lifetime(4.0, 1e-4, operator="Ada")).close()
    lasting = noised.set("privacy.scope", "study").set("privacy.evaluation_epsilon", 0.3)
    assert medfed.run(lasting, tmp_path / "one").complete
    assert charges(home, "test") == {f"{name} (test)": 1 for name in SITES}
    other = lasting.set("study.name", "another").set("privacy.lifetime_epsilon", 20.0)
    assert medfed.run(other, tmp_path / "two").complete
    assert charges(home, "test") == {f"{name} (test)": 2 for name in SITES}


@pytest.mark.parametrize("ending", ["incomplete", "killed"])
def test_what_held_out_patients_paid_for_is_kept_when_a_run_goes_on(
    tmp_path: Path, noised: Study, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: a tested run is resumed; its figures were cut from the log, and patients asked to
    pay again.
    """
    real = SiteLedger.pay

    def refuse_once(self: SiteLedger, round: int, asked: list[str]) -> dict[str, BudgetError]:
        if round != 2 or ending == "killed":
            return real(self, round, asked)
        return real(self, round, [name for name in asked if name != "east"]) | {
            "east": BudgetError("for once")
        }

    def kill(*_: object) -> None:
        raise Crash

    study = noised.set("training.quorum", 0.5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SiteLedger, "pay", refuse_once)
        if ending == "killed":
            patch.setattr(drive, "write_model", kill)
            with pytest.raises(Crash):
                medfed.run(study, tmp_path / "run")
        else:
            assert medfed.run(study, tmp_path / "run").summary["status"] == "incomplete"

    before = [
        e for e in events.read(tmp_path / "run" / "events.jsonl") if isinstance(e, events.Tested)
    ]
    again = medfed.resume(tmp_path / "run")
    after = [
        e for e in events.read(tmp_path / "run" / "events.jsonl") if isinstance(e, events.Tested)
    ]
    assert before == after and len(after) == 1
    assert again.summary["test"]["accuracy"] == after[0].all_sites["accuracy"].value
    assert set(charges(own_ledger(tmp_path / "run"), "test").values()) == {1}


@pytest.mark.parametrize("task", ["binary", "regression"])
def test_a_run_may_test_nothing_and_says_so(tmp_path: Path, study: Study, task: str) -> None:
    """The newcomer's: a regression on one's own patients asked for a declaration that nobody could
    make.
    """
    silent = study._with(
        {"data.test_is_public": False, "monitor.evaluate_every": 0, "monitor.baselines": True}
    )
    if task == "regression":
        silent = silent._with(
            {"data.target": "age", "data.task": "regression", "data.features": ["lactate", "ward"]}
        )

    result = medfed.run(silent, tmp_path / "run")
    assert result.complete and result.summary["test"] is None and not result.summary["baselines"]
    assert [one["code"] for one in result.summary["findings"]][-1] == "untested"
    assert charges(own_ledger(tmp_path / "run"), "test") == {}
    assert len(result.predict(invented().head(3))) == 3
    assert all(path.stat().st_size for path in write_dashboards(tmp_path / "run").values())

    with pytest.raises(PlanError, match=r"monitor.evaluate_every=0 do not compose"):
        medfed.run(
            study._with({"monitor.evaluate_every": 0, "data.threshold": "youden"}),
            tmp_path / "other",
        )


def test_a_test_that_will_tell_nothing_is_warned_of_before_anybody_pays(
    tmp_path: Path, noised: Study
) -> None:
    """The newcomer's: `privacy plan` knew, `run` spent the lifetime budget, and the figures were
    dashes.
    """
    result = medfed.run(noised.set("privacy.evaluation_epsilon", 0.05), tmp_path / "run")
    told = [
        e
        for e in events.read(tmp_path / "run" / "events.jsonl")
        if isinstance(e, events.Warned | RoundFinished)
    ]
    first = next(
        e for e in told if isinstance(e, events.Warned) and "will hardly tell anything" in e.text
    )
    assert told.index(first) < next(i for i, e in enumerate(told) if isinstance(e, RoundFinished))
    assert result.summary["warnings"]


def test_the_plan_says_what_a_paid_test_can_tell_and_where_a_run_is_charged(
    noised: Study, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The newcomer's: a first trial founded the lifetime ledger, spent it, and its test told
    nothing.
    """
    lasting = noised.set("privacy.scope", "study")
    found = runs.privacy_outlook(lasting)
    assert found["ledger"] == {"path": str(home), "founded": False} and not home.exists()
    test = found["paid_test"]
    # 192 declared, a fifth held out
    assert test["held_out"] == 48 and test["intervals"]["0.05"] is None
    large = lasting._with(
        {"privacy.delta": 1e-5} | {f"privacy.sizes.{name}": 4000 for name in SITES}
    )
    low, high = runs.privacy_outlook(large)["paid_test"]["intervals"]["0.5"]
    assert 0.7 < low < 0.8 < high < 0.9

    for part in console.outlook(found):
        Console(width=200).print(part)
    told = capsys.readouterr().out
    assert "the first run founds this site's" in told and "hardly ever with 5%" in told
    medfed.simulate(lasting)
    assert runs.privacy_outlook(lasting)["ledger"]["founded"]


# what leaves a site -------------------------------------------------------------------------------


def _prepared(study: Study, frames: dict[str, pd.DataFrame] | None = None) -> list[site.Site]:
    """Return the study's sites, prepared; `frames` instead of the table's."""
    sites = runs.open_sites(study, None)
    if frames is not None:
        sites = [site.Site.open(name, frame, sites[0].study) for name, frame in frames.items()]
    prepare(sites[0].study, InProcess(sites), [node.name for node in sites])
    return sites


def _frames(
    change: Callable[[pd.DataFrame], pd.DataFrame] = lambda frame: frame,
) -> dict[str, pd.DataFrame]:
    frame = change(invented())
    return {name: frame[frame["hospital"] == name] for name in SITES}


@pytest.mark.parametrize("clip", [0.0, -1.0, 1e-300, None])
def test_the_coordinator_does_not_choose_the_clip(study: Study, clip: float | None) -> None:
    """At zero a padding slot was no number, so that the answer told whether a site had
    64 patients.
    """

    def answer(kind: str, header: dict[str, Any]) -> dict[str, torch.Tensor]:
        node = _prepared(study.set("privacy.clipping", kind))[0]
        node.account = None
        w_P = {"w": torch.zeros(zoo.count(node.model))}
        return codec.decode(node.handle("work", codec.encode({"round": 1, **header}, w_P)))[1]

    for kind in ("fixed", "automatic"):
        assert torch.equal(answer(kind, {"clip": clip})["row"], answer(kind, {})["row"])
    with pytest.raises(SiteError, match="sends no clipping norm; expected a number from 1e-06 on"):
        answer("adaptive", {"clip": clip})
    assert answer("adaptive", {"clip": 0.5})["row"].any()


def _somebody(study: Study) -> str:
    """Return a training patient of north's."""
    table = runs.open_sites(study, None)[0].table
    assert table is not None
    return str(table.ids[table.patient[~table.test][0]])


CHANGES: dict[str, Callable[[pd.DataFrame, pd.Series], pd.DataFrame]] = {
    "absent": lambda frame, one: frame[~one],
    "three times": lambda frame, one: pd.concat([frame, frame[one], frame[one]], ignore_index=True),
    "other values": lambda frame, one: frame.assign(
        age=frame["age"].mask(one, 19.5),
        lactate=frame["lactate"].mask(one),
        ward=frame["ward"].mask(one, "hospice"),
        died=frame["died"].mask(one, np.where(frame["died"] == "yes", "no", "yes")),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_site_tells_before_training_is_the_same_without_a_patient(
    study: Study, change: str
) -> None:
    """Survey, preparation and enrolment, byte for byte."""
    name = _somebody(study)
    with_all, changed = (
        [site.Site.open(n, f, study) for n, f in _frames(how).items()]
        for how in (
            lambda frame: frame,
            lambda frame: CHANGES[change](frame, frame["subject"] == name),
        )
    )
    for sites in (with_all, changed):
        account = SiteLedger(None, study)
        for node in sites:
            node.account = account

    encoding = _prepared(study)[0].encoding.to_json()
    prepared = codec.encode(
        {"encoding": encoding, **_public(north=96, south=58, east=38), "fixed": FIXED}
    )
    enrolled = codec.encode({"run": "r", "fresh": True})

    for op, payload in (("survey", codec.encode({})), ("prepare", prepared), ("enrol", enrolled)):
        assert [n.handle(op, payload) for n in with_all] == [
            n.handle(op, payload) for n in changed
        ], op

    assert len(with_all[0].train) != len(changed[0].train) or change == "other values"
    assert with_all[0].account and with_all[0].account.cohorts["north"].patients > 80


def test_without_a_claim_the_survey_does_tell_of_a_patient(study: Study) -> None:
    """So that the test above does test something."""
    name = _somebody(study)
    for how in CHANGES.values():
        one, other = (
            site.Site.open("north", frames["north"], plain(study)).handle(
                "survey", codec.encode({})
            )
            for frames in (
                _frames(),
                _frames(lambda frame, how=how: how(frame, frame["subject"] == name)),
            )  # type: ignore[misc]
        )
        assert one != other


def test_a_question_about_records_has_no_answer(study: Study) -> None:
    (north, *_) = _prepared(study)
    asked = codec.encode({"question": "known", "names": ["age"], "logs": {}})
    with pytest.raises(
        SiteError, match=r"no answer under a privacy claim.*data\.preprocess='dictionary'"
    ):
        north.handle("answer", asked)
    (open_north, *_) = _prepared(plain(study))
    assert codec.decode(open_north.handle("answer", asked))[1]["answer"].tolist() != [0]


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_a_row_comes_with_nothing_but_public_numbers(study: Study, noise: str) -> None:
    sites = _prepared(study.set("privacy.noise", noise))
    parameters = sum(p.numel() for p in sites[0].model.parameters())
    for node in sites:
        node.account = None
        header, tensors = codec.decode(
            node.handle("work", codec.encode({"round": 1}, {"w": torch.zeros(parameters)}))
        )
        assert header.pop("loss", None) is None
        assert header == {"medfed": codec.VERSION, "steps": 1} and set(tensors) == {"row"}
        assert tensors["row"].shape == (parameters,)


def test_sizes_other_than_the_declared_ones_are_refused_by_the_site(study: Study) -> None:
    """Noise and divisor follow from them, so a coordinator that says more patients would buy less
    noise.
    """
    (north, *_) = _prepared(study)
    public = _public(north=9600, south=58, east=38)
    told = codec.encode({"encoding": north.encoding.to_json(), **public, "fixed": FIXED})
    with pytest.raises(SiteError, match="9600 patients for site 'north'"):
        north.handle("prepare", told)


def _public(**sizes: int) -> dict[str, Any]:
    """Return what a coordinator says of who takes part."""
    return {
        "sizes": {name: {"train": size} for name, size in sizes.items()},
        "clients": list(sizes),
    }


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a label less": lambda told: told["target"].update(labels=["no", "never"]),
    "a narrower range": lambda told: told["columns"][0].update(scale=1e-30),
    "no cap": lambda told: told["columns"][0].update(cap=0.0),
    "an indicator more": lambda told: told["columns"][0].update(indicator=True),
    "gaps filled from patients": lambda told: told.update(public=False),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_encoding_that_is_not_the_dictionarys_is_refused_whoever_is_in_the_table(
    study: Study, lie: str
) -> None:
    """Else a coordinator asks for a label less, and learns from the error that somebody has it."""
    (north, *_) = _prepared(study)
    told = north.encoding.to_json()
    LIES[lie](told)
    payload = codec.encode(
        {"encoding": told, **_public(north=96, south=58, east=38), "fixed": FIXED}
    )
    tables = [frame for how in (lambda f: f, lambda f: f[:0]) for frame in [_frames(how)["north"]]]
    for frame in tables:
        with pytest.raises(SiteError, match="is not that of the study's data dictionary"):
            site.Site.open("north", frame, study).handle("prepare", payload)


def test_a_record_whose_label_is_not_declared_takes_no_part(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """To refuse it would tell that there is one: the run goes on, and the site's own log names the
    row.
    """
    frame = invented()
    frame.loc[3, "died"] = "perhaps"
    study = medfed.load_study(write_study(tmp_path, PRIVATE, frame))
    sites, whole = (
        {node.name: node for node in _prepared(s)}
        for s in (study, _study_without(tmp_path, frame, 3))
    )
    for name in SITES:
        for part in ("train", "test"):
            assert torch.equal(getattr(sites[name], part).x, getattr(whole[name], part).x)
            assert torch.equal(getattr(sites[name], part).y, getattr(whole[name], part).y)
    assert "target 'died': no declared label, so these records take no part: row 5" in caplog.text
    assert medfed.simulate(study).complete


def _study_without(folder: Path, frame: pd.DataFrame, row: int) -> Study:
    (folder / "without").mkdir()
    return medfed.load_study(write_study(folder / "without", PRIVATE, frame.drop(index=row)))


def test_patients_are_named_nowhere_on_disk(tmp_path: Path, lasting: Study, home: Path) -> None:
    """Neither in the run's folder nor in the ledger, as text, hexadecimal or in another case."""
    frame = invented()
    frame["subject"] = [f"Muster-{i:04d}-Erika" for i in range(len(frame))]
    study = medfed.load_study(write_study(tmp_path, PRIVATE, frame))
    study = replace(study, privacy=lasting.privacy).set("training.algorithm", "fedavgm")
    medfed.run(study, tmp_path / "run")
    paths = [
        p for folder in (tmp_path / "run", home.parent) for p in folder.rglob("*") if p.is_file()
    ]
    assert len(paths) > 8
    for path in paths:
        content = path.read_bytes().lower()
        for needle in (b"erika", b"erika".hex().encode(), b"muster"):
            assert needle not in content, path


def test_a_quorum_that_fails_releases_no_sum(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """One site of three cannot work: nobody sees the sum of the other two, and what was paid stays
    paid.
    """
    real = work.sum_gradients

    def summed(sites: Any, *rest: Any) -> Any:
        answers = real(sites, *rest)
        return [
            SiteError("its disk is full") if node.name == "east" else a
            for node, a in zip(sites, answers, strict=True)
        ]

    monkeypatch.setattr(work, "sum_gradients", summed)
    told: list[Event] = []
    result = medfed.simulate(study, listeners=[told.append])
    assert result.summary["rounds"] == 0 and result.summary["test"] is None
    assert "2 of 3 sites answered" in next(
        e.reason for e in told if isinstance(e, events.RunFinished)
    )
    lenient = medfed.simulate(study.set("training.quorum", 0.6))
    assert lenient.summary["rounds"] == 4 and lenient.summary["participation"]["east"] == 0
    assert {item["reason"] for item in lenient.summary["excluded"]} == {"its disk is full"}
