"""A learning rate left open: it bears the inputs it is given, and a rate that does not is told, or
halved.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import DataError, SiteError
from medfed.core.flat import vector
from medfed.learn import zoo
from medfed.learn.algorithms import Server
from medfed.learn.local import LocalPlan
from medfed.monitor import events
from medfed.node.inprocess import InProcess
from medfed.planning import rates, recipe
from medfed.planning.rates import Chosen, Pace, bend, choose, stretch
from medfed.rounds.prepare import _chosen, prepare
from medfed.runs import pacing
from medfed.study import Study, Training
from tests.tables import PRIVATE, STUDY, invented
from tests.wide_tables import write


def _rows(n: int, width: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(n).normal(size=(n, width)) * scale).float()


@pytest.mark.parametrize("n", [1, 3, 40])
def test_the_bend_of_all_rows_is_the_top_eigenvalue_of_their_products(n: int) -> None:
    x_nF = _rows(n, 5, 3.0)
    ones = np.concatenate([x_nF.double().numpy(), np.ones((n, 1))], 1)
    assert bend(x_nF, 0) == pytest.approx(np.linalg.eigvalsh(ones.T @ ones / n)[-1], rel=1e-9)


def test_small_batches_bend_more_than_all_rows() -> None:
    """What a step sees is a batch: of two rows, one of them is half of it."""
    x_nF = _rows(512, 60)
    assert bend(x_nF, 1) > bend(x_nF, 16) > bend(x_nF, 0) > 1
    assert bend(x_nF, 1) == pytest.approx(61, rel=0.15)
    assert bend(x_nF[:0], 32) == 0.0


def test_a_linear_model_is_the_measure() -> None:
    assert stretch(zoo.logistic(7, 1), _rows(16, 7), 40.0) == pytest.approx(1, rel=1e-6)
    assert stretch(zoo.logistic(7, 3), _rows(16, 7), 40.0) == pytest.approx(1, rel=1e-6)
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(7, 500), nn.ReLU(), nn.Linear(500, 1))
    for layer in (wide[0], wide[2]):
        nn.init.normal_(layer.weight)
    assert stretch(wide, _rows(16, 7), 40.0) > 100


def test_norm_layers_take_large_rows_back() -> None:
    """Rows that bend a linear model fifty times as much: a net that normalises hardly notices,
    another does.
    """
    grown = {}
    for norm in ("layer", "none"):
        torch.manual_seed(0)
        model = zoo.mlp(7, hidden=(128, 128), norm=norm, init="he")
        grown[norm] = 50 * stretch(model, _rows(16, 7), 100.0) / stretch(model, _rows(16, 7), 2.0)
    assert grown["layer"] < 5 < 40 < grown["none"]


PLAN = LocalPlan("binary")
FEDAVG = Training()


def _alike(bends: float) -> float:
    """The stretch of a linear model."""
    return 1.0


def test_large_inputs_take_small_steps_and_small_ones_no_longer_steps_than_before() -> None:
    bends = {"north": 400.0, "south": 2.0}
    sizes = {"north": 100, "south": 50}
    found = choose("binary", bends, sizes, PLAN, FEDAVG, _alike)
    assert (found.rate, found.curvature, found.site) == (0.01, 100.0, "north")
    assert "north" in found.why()
    assert choose("binary", {"north": 2.0}, {"north": 100}, PLAN, FEDAVG, _alike).rate == 0.1

    assert (
        choose("regression", bends, sizes, PLAN, replace(FEDAVG, batch_size=0), _alike).rate
        == 1 / 800
    )
    assert choose("regression", bends, sizes, PLAN, FEDAVG, _alike).rate == 1 / 3200
    assert choose("binary", bends, sizes, PLAN, FEDAVG, lambda _: 5.0).rate == 0.002
    assert (
        choose("binary", bends, sizes, PLAN, replace(FEDAVG, weight_decay=100.0), _alike).rate
        == 1 / 200
    )
    assert (
        choose("binary", bends, sizes, PLAN, replace(FEDAVG, optimizer="adam"), _alike).rate == 0.01
    )


def test_sites_of_one_step_count_by_their_mean() -> None:
    bends = {f"device {i}": 1.0 for i in range(99)} | {"device 99": 101.0}
    found = choose("regression", bends, dict.fromkeys(bends, 1), PLAN, FEDAVG, _alike)
    assert (found.curvature, found.site) == (4.0, "")


def test_growth_is_told_from_wavering() -> None:
    def grown(*losses: float | None, everybody: bool = True) -> list[bool]:
        pace = Pace()
        told = []
        for loss in losses:
            pace, grew = pace.step(loss, everybody)
            told.append(grew)
        return told

    assert grown(0.7, 0.5, 0.52, 0.4, 0.45) == [False] * 5
    assert grown(0.7, 0.78, 0.9) == [False, True, True]
    assert grown(0.7, 0.1, 0.2) == [False, False, True]
    assert grown(0.7, 0.001, 0.01) == [False, False, False]
    assert grown(0.7, None, 0.6) == [False, True, False]
    assert grown(0.7, 0.9, 1.3, 1.5, everybody=False) == [False, False, False, True]


def test_halving_keeps_the_rest_of_the_state() -> None:
    slots = {"rate": torch.tensor([0.1], dtype=torch.float64), "control": torch.ones(3)}
    after = rates.halve(Server(4, torch.ones(3), slots))
    assert (
        float(after.slots["rate"]) == 0.05
        and after.slots["control"] is slots["control"]
        and after.round == 4
    )


@pytest.fixture
def study(tmp_path: Path) -> Study:
    invented().to_csv(tmp_path / "cohort.csv", index=False)
    (tmp_path / "study.toml").write_text(STUDY.replace("learning_rate = 0.1\n", ""))
    return medfed.load_study(tmp_path / "study.toml")


def test_small_inputs_train_with_the_bits_of_the_rate_of_old(study: Study) -> None:
    told: list[events.Event] = []
    chosen = medfed.simulate(study, listeners=[told.append])
    planned = next(event for event in told if isinstance(event, events.Planned))
    assert planned.learning_rate == 0.1 and planned.rate_chosen
    assert torch.equal(chosen.w_P, medfed.simulate(study.set("training.learning_rate", 0.1)).w_P)


def test_a_set_rate_is_the_rate(study: Study) -> None:
    told: list[events.Event] = []
    medfed.simulate(
        study.set("training.learning_rate", 0.3).set("training.rounds", 1), listeners=[told.append]
    )
    planned = next(event for event in told if isinstance(event, events.Planned))
    assert (planned.learning_rate, planned.rate_chosen) == (0.3, "")


def test_under_a_claim_no_input_is_asked(tmp_path: Path) -> None:
    text = PRIVATE.replace("learning_rate = 1.0\n", "")
    invented().to_csv(tmp_path / "cohort.csv", index=False)
    (tmp_path / "study.toml").write_text(text)
    study = medfed.load_study(tmp_path / "study.toml")
    told = list[events.Event]()
    result = medfed.simulate(study.set("training.rounds", 1), listeners=[told.append])
    planned = next(event for event in told if isinstance(event, events.Planned))
    told_rate = result.study.training.learning_rate  # the recipe's, from the study alone
    assert (planned.learning_rate, planned.rate_chosen) == (told_rate, "")
    assert told_rate == recipe.settle(study.set("training.rounds", 1)).training.learning_rate


GRADED = ("fedavg", "fedprox", "scaffold", "fednova", "fedavgm")


@pytest.mark.parametrize("algorithm", GRADED)
def test_a_rate_that_proves_too_long_is_halved_until_it_is_not(
    algorithm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What sites and server remember bears another rate: every algorithm comes back below where it
    began.
    """
    rng = np.random.default_rng(0)
    x_NF = rng.normal(size=(400, 6))
    frame = pd.DataFrame(x_NF, columns=list("abcdef"))
    frame["y"] = x_NF @ rng.normal(size=6) + rng.normal(size=400) * 0.1
    frame["hospital"] = np.where(np.arange(400) % 3 > 0, "north", "south")
    monkeypatch.setattr(rates, "choose", lambda *_: Chosen(1.0, 1.0))

    study = write(tmp_path, frame, data__task="regression", training__algorithm=algorithm)._with(
        {
            "training.rounds": 25,
            "training.batch_size": 0,
            "training.local_epochs": 3,
            "training.server_momentum": 0.3,
            "monitor.evaluate_every": 25,
            "data.preprocess": "standard",
        }
    )
    told: list[events.Event] = []
    result = medfed.simulate(study, listeners=[told.append])
    losses = [event.loss for event in told if isinstance(event, events.RoundFinished)]
    halved = [
        text for text in result.summary["warnings"] if "the learning rate is halved to 0.5" in text
    ]
    assert len(halved) == 1 and losses[0] is not None and losses[-1] is not None
    assert losses[-1] < losses[0] / 2 < max(loss for loss in losses if loss is not None)
    assert result.summary["test"]["r2"] > 0.5


def test_a_rate_that_was_set_is_told_not_changed(study: Study) -> None:
    wild = study._with(
        {"training.learning_rate": 40.0, "training.rounds": 3, "data.preprocess": "standard"}
    )
    summary = medfed.simulate(wild).summary
    assert any(
        "Lower training.learning_rate=40, or leave it out" in text for text in summary["warnings"]
    )
    assert summary["findings"][0]["code"] in ("loss-grew", "loss-high")


def test_a_resumed_run_goes_on_at_its_rate(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        rates.Pace, "step", lambda self, loss, everybody: (Pace(1.0, 1.0), loss is not None)
    )
    whole = medfed.run(study, tmp_path / "whole")

    def crash(event: events.Event) -> None:
        if isinstance(event, events.RoundStarted) and event.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        medfed.run(study, tmp_path / "cut", listeners=[crash])
    assert torch.equal(medfed.resume(tmp_path / "cut").w_P, whole.w_P)
    told = [text for text in medfed.load(tmp_path / "cut").summary["warnings"] if "halved" in text]
    assert [text.rsplit(" ", 1)[1] for text in told] == ["0.05", "0.025", "0.0125", "0.00625"]


def test_no_liar_can_stop_all_learning(study: Study) -> None:
    """A study that bears one of three is led by what two say: of their rows, and of
    their losses.
    """
    bears = study._with({"robustness.max_malicious": 0.34, "robustness.rule": "geometric-median"})
    sites = runs.open_sites(bears, None)
    told = prepare(bears, InProcess(sites), [site.name for site in sites])
    assert told.malicious == 1 and told.chosen is not None
    lies = {"north": 1e12, "south": 3.0, "east": 2.0}
    assert _chosen(told, lies).rate == 0.1 and _chosen(told, lies).curvature < 1
    event = events.RoundFinished(
        2, ["north", "south", "east"], 9e9, [3e10, 0.5, 0.4], [], [], 0.0, 0, 0
    )
    assert pacing._common_loss(event, told) == 0.5


def test_rows_without_a_finite_bend_are_named(study: Study) -> None:
    sites = runs.open_sites(study, None)
    plan = prepare(study, InProcess(sites), [site.name for site in sites])
    with pytest.raises(DataError, match="east: encoded rows too large for a learning rate"):
        _chosen(plan, {"north": 1.0, "south": 2.0, "east": float("inf")})


def test_a_site_refuses_a_round_without_a_rate(study: Study) -> None:
    sites = runs.open_sites(study, None)
    prepare(study, InProcess(sites), [site.name for site in sites])
    payload = codec.encode({"round": 1}, {"w": torch.zeros(vector(sites[0].model).numel())})
    with pytest.raises(
        SiteError, match=r"training\.learning_rate is open and the coordinator sends none"
    ):
        sites[0].handle("work", payload)
