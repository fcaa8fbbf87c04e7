"""What is left where rules end: bounded rows, a gate on public records, and an operator's word."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import medfed
from medfed import runs
from medfed.core.checks import DataError, MedfedError, PlanError, RunError, StudyError
from medfed.links.wire import Bounded
from medfed.monitor import events
from medfed.node.inprocess import InProcess
from medfed.robust.reputation import Watch
from medfed.rounds.aggregation import bears
from medfed.rounds.prepare import prepare
from medfed.rounds.rollback import Rollback
from medfed.study import Study
from tests.tables import PRIVATE, STUDY, invented, plain, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")

LYING = {"robustness.attack": "sign-flip", "robustness.malicious": 0.4}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path, STUDY))._with(
        {"monitor.baselines": False, "training.rounds": 4}
    )


def planned(study: Study) -> Any:
    sites = runs.open_sites(study, None)
    return prepare(sites[0].study, InProcess(sites), [site.name for site in sites])


# bounded rows -------------------------------------------------------------------------------------


def test_long_rows_are_cut_to_the_bound_one_by_one() -> None:
    row_KM = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    cut_KM, _ = Bounded(1.0).client(row_KM, {})
    torch.testing.assert_close(cut_KM, torch.tensor([[0.6, 0.8], [0.3, 0.4], [0, 0]]))
    for k, row in enumerate(row_KM):
        assert torch.equal(Bounded(1.0).client(row[None], {})[0][0], cut_KM[k])


@pytest.mark.parametrize("way", ["plain", "three-party"])
def test_a_liar_moves_a_rounds_mean_by_no_more_than_it_is_told(study: Study, way: str) -> None:
    """The model after one round with a liar, and without: at most what the plan says."""
    one = study._with(
        {"robustness.bound": 0.05, "robustness.max_malicious": 0.4, "training.rounds": 1}
    )
    one = one.set("security.aggregation", way)

    told = re.search(
        r"1 of 3 move .* at most ([0-9.]+) times robustness.bound=0.05", planned(one).bears()
    )
    assert told
    honest, lied = (
        medfed.simulate(s).w_P for s in (one, one._with({**LYING, "robustness.attack": "scaled"}))
    )
    moved = float((honest - lied).norm())
    assert 0 < moved <= float(told[1]) * 0.05 + 1e-5
    free = study._with({"training.rounds": 1})
    far = [
        medfed.simulate(s).w_P for s in (free, free._with({**LYING, "robustness.attack": "scaled"}))
    ]
    assert float((far[0] - far[1]).norm()) > 2 * moved


def test_a_row_beyond_the_bound_is_left_out_and_named(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    # sites that do not cut
    monkeypatch.setattr(Bounded, "client", lambda self, message_KM, memory: (message_KM, memory))
    bounded = study._with(
        {"robustness.bound": 1e-6, "robustness.max_malicious": 0.4, "training.quorum": 0.4}
    )
    summary = medfed.simulate(bounded).summary
    assert summary["status"] == "incomplete"
    assert (
        all("robustness.bound=1e-06" in one["reason"] for one in summary["excluded"])
        and summary["excluded"]
    )


def test_what_malicious_clients_can_do_is_told(study: Study, tmp_path: Path) -> None:
    assert planned(study).bears() == "one of 3 moves the model at will"
    assert medfed.simulate(study).summary["bears"] == "one of 3 moves the model at will"
    private = medfed.load_study(write_study(tmp_path, PRIVATE)).set(
        "security.aggregation", "three-party"
    )
    sizes = sorted(private.privacy.sizes.values())
    share = f"{2 * sizes[-1] / sum(sizes):.3g}"
    assert planned(private).bears() == (
        f"1 of 3 move a round's mean by at most {share} times the clipping norm of a patient's "
        "gradient"
    )


# the gate -----------------------------------------------------------------------------------------


def reference(study: Study, rows: int = 60) -> Study:
    invented().sample(rows, random_state=1).to_csv(study.folder / "public.csv", index=False)
    return study.set("robustness.reference", "public.csv")


def loss_of(result: medfed.Result) -> float:
    """The loss on the reference of a result's model."""
    gate = Rollback.of(planned(reference(result.study)))
    assert gate
    return gate.loss(result.w_P)


def test_a_round_that_makes_the_model_worse_is_taken_back(study: Study) -> None:
    gated = reference(study)._with(
        {**LYING, "robustness.tolerance": 0.0, "robustness.attack": "colluding"}
    )
    result = medfed.simulate(gated)
    back = result.summary["taken_back"]
    assert back and all(one["after"] is None or one["after"] > one["before"] for one in back)
    harmed = medfed.simulate(gated.set("robustness.reference", ""))
    assert loss_of(result) < loss_of(harmed)


def test_an_honest_run_passes_the_gate_untouched(study: Study) -> None:
    open_run = medfed.simulate(study)
    gated = medfed.simulate(reference(study))
    assert torch.equal(open_run.w_P, gated.w_P) and gated.summary["taken_back"] == []


def test_a_run_with_a_gate_resumes_to_the_same_bits(study: Study, tmp_path: Path) -> None:
    gated = reference(study)._with(
        {**LYING, "robustness.tolerance": 0.0, "robustness.attack": "colluding"}
    )
    whole = medfed.simulate(gated)

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        medfed.run(gated, tmp_path / "run", listeners=[stop])
    resumed = medfed.resume(tmp_path / "run")
    assert (
        torch.equal(resumed.w_P, whole.w_P)
        and resumed.summary["taken_back"] == whole.summary["taken_back"]
    )


def test_a_reference_without_rows_is_refused(study: Study) -> None:
    gated = reference(study, 0)
    with pytest.raises(DataError, match="public"):
        medfed.simulate(gated)


REFUSED: dict[str, tuple[dict[str, Any], type[MedfedError], str]] = {
    "negative": (
        {"robustness.bound": -1.0},
        StudyError,
        "robustness.bound=-1.0; expected 0 or more",
    ),
    "nan": ({"robustness.tolerance": float("nan")}, StudyError, "0 or more"),
    "masked": (
        {"robustness.bound": 1.0, "security.aggregation": "masked"},
        PlanError,
        "nobody can check",
    ),
    "kept": (
        {"robustness.reference": "p.csv", "training.algorithm": "scaffold"},
        PlanError,
        "taken back",
    ),
    "nobody": ({"robustness.max_malicious": 0.3}, PlanError, "bears nobody"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compose_is_refused(study: Study, name: str) -> None:
    settings, kind, said = REFUSED[name]
    with pytest.raises(kind, match=said):
        medfed.simulate(study._with(settings))


def test_a_bound_beside_a_claim_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"privacy\.clip bounds each patient"):
        medfed.simulate(
            medfed.load_study(write_study(tmp_path, PRIVATE)).set("robustness.bound", 1.0)
        )


# an operator's word -------------------------------------------------------------------------------


@pytest.fixture
def watched(tmp_path: Path) -> Path:
    """A run among ten hospitals that stopped after round 8, a liar quarantined."""
    study = medfed.load_study("breast-cancer-ten")._with({**LYING, "robustness.malicious": 0.1})
    study = study._with(
        {"security.aggregation": "plain", "monitor.baselines": False, "training.rounds": 12}
    )

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        medfed.run(study, tmp_path / "run", listeners=[stop])
    return tmp_path / "run"


def test_an_appeal_is_granted_and_stays_on_record(watched: Path) -> None:
    (first, *_) = runs.list_quarantined(watched)
    assert first["until"] > 8 and first["total"] > 0
    runs.lift_quarantine(watched, first["client"], "new scanner, checked on site", "Dr Ito")
    summary = medfed.resume(watched).summary
    recorded = list(events.read(watched / "events.jsonl"))
    (lift,) = [e for e in recorded if isinstance(e, events.SecurityAudit) and e.action == "lift"]
    assert lift.client == first["client"] and lift.evidence == [
        "operator Dr Ito: new scanner, checked on site"
    ]
    back = [
        e.round
        for e in recorded
        if isinstance(e, events.RoundStarted) and first["client"] in e.clients
    ]
    assert 8 in back and any(
        a["action"] == "lift" for s in summary["suspects"] for a in s["actions"]
    )


def test_overrides_are_replayed_by_a_resumed_run(watched: Path) -> None:
    (first, *_) = runs.list_quarantined(watched)
    runs.lift_quarantine(watched, first["client"], "appeal", "Dr Ito")

    def stop(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        medfed.resume(watched, listeners=[stop])
    medfed.resume(watched)
    recorded = list(events.read(watched / "events.jsonl"))
    assert sum(isinstance(e, events.SecurityAudit) and e.action == "lift" for e in recorded) == 1


def test_the_command_line_lists_and_lifts(
    watched: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert command("quarantine", "list", watched, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found[0]["until"] > 8
    client = found[0]["client"]
    assert (
        command("quarantine", "lift", watched, client, "--reason", "appeal", "--operator", "Ito")
        == 0
    )
    assert "Ito: appeal" in capsys.readouterr().out
    assert command("quarantine", "lift", watched, "nobody", "--reason", "x") == 2
    assert "takes no part" in capsys.readouterr().err
    assert command("quarantine", "lift", watched, client, "--reason", " ") == 2
    assert "stays on record" in capsys.readouterr().err


def test_a_complete_run_has_no_next_round(study: Study, tmp_path: Path) -> None:
    medfed.run(plain(study), tmp_path / "done")
    site = next(iter(medfed.load(tmp_path / "done").summary["sites"]))
    with pytest.raises(RunError, match="no next round"):
        runs.lift_quarantine(tmp_path / "done", site, "late", "Ito")


def test_nothing_is_held_against_who_was_forgiven() -> None:
    assert Watch(1).lift("a").standings["a"].reputation == 1


# what is chosen and said --------------------------------------------------------------------------


def test_auto_takes_the_default_rule_and_says_so(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    auto = study._with({"robustness.rule": "auto", "robustness.max_malicious": 0.34})
    assert planned(auto).bears() == "1 of 3 are borne by nnm+geometric-median"
    assert planned(auto.set("security.aggregation", "three-party")).bears() == (
        "1 of 3 are borne by nnm+geometric-median; a round that leaves out more than 0 opens nothing "
        "(security.min_group, security.colluding)"
    )
    for room in ("plan", "resolved"):
        monkeypatch.setattr(f"medfed.planning.{room}.MOST_ROWS", 2)
    with pytest.raises(PlanError, match="without a bound"):
        planned(auto)
    assert "times robustness.bound=2" in planned(auto.set("robustness.bound", 2.0)).bears()


def test_weak_selection_is_said_before_the_run(tmp_path: Path) -> None:
    """A tenth of epsilon is nearly ten times the noise: what could be selected cannot."""
    private = medfed.load_study(write_study(tmp_path, PRIVATE)).set(
        "security.aggregation", "three-party"
    )
    private = private._with(
        {"robustness.rule": "nnm+geometric-median", "robustness.max_malicious": 0.34}
    )
    found = {}
    for epsilon in (1.0, 0.1):
        told = bears(planned(private.set("privacy.epsilon", epsilon)))
        match = re.search(
            r"is ([0-9.e+]+) of the longest row's square, so selection is (\w+)", told
        )
        assert match
        found[epsilon] = (float(match[1]), match[2])
    assert 5 < found[0.1][0] / found[1.0][0] < 10
    assert found[0.1][1] == "weak" and found[1.0][1] == "possible"
