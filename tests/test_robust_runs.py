"""Whole runs with liars: rules bear them, in the open and where nobody sees a row; what does not
compose is refused.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import medfed
from medfed.core.checks import MedfedError, PlanError, StudyError
from medfed.core.entropy import Entropy
from medfed.monitor.events import Event, RoundStarted, SecurityAudit
from medfed.node.inprocess import InProcess
from medfed.planning import terms as agreed
from medfed.planning.row_limits import row_limits
from medfed.privacy.guarantee import resolve
from medfed.robust import attacks
from medfed.rounds.prepare import prepare
from medfed.runs import open_sites
from medfed.runs.parties import run_apart
from medfed.secure.three_party import SharingTerms
from medfed.study import Privacy, Study
from tests.runs.test_once import interrupted
from tests.tables import PRIVATE, STUDY, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

TEN = tuple(f"hospital {letter}" for letter in "abcdefghij")
ROBUST = {"robustness.rule": "nnm+geometric-median", "robustness.max_malicious": 0.3}
LYING = {"robustness.attack": "sign-flip", "robustness.malicious": 0.3}


@pytest.fixture(scope="module")
def ten() -> Study:
    """Ten hospitals on the public breast-cancer data, without noise."""
    study = medfed.load_study("breast-cancer")
    sites = dataclasses.replace(study.sites, names=TEN, shares=(0.1,) * 10)
    study = dataclasses.replace(study, privacy=Privacy(), sites=sites)
    return study._with(
        {
            "training.learning_rate": 1.0,
            "training.average": 0.0,
            "training.rounds": 10,
            "monitor.baselines": False,
        }
    )


def auroc(study: Study, **settings: Any) -> float:
    result = medfed.simulate(study._with(settings))
    return float(result.summary["test"]["auroc"])


@pytest.mark.parametrize("way", ["plain", "three-party"])
def test_the_mean_is_broken_and_the_rule_is_not(ten: Study, way: str) -> None:
    study = ten.set("security.aggregation", way)
    assert auroc(study, **LYING) < 0.6
    assert auroc(study, **LYING, **ROBUST) > 0.98


def test_nobody_is_put_aside_whose_row_the_rest_cannot_be_opened_without(ten: Study) -> None:
    """Three of ten sat out from the fourth round on, the rule kept four of seven, and a sum of four
    is not opened where three may be the coordinator's friends: no later round could end.
    """
    study = ten._with({**LYING, **ROBUST, "security.aggregation": "three-party"})
    study = study._with({"robustness.sight": "all", "training.learning_rate": 0.1})
    told: list[Event] = []
    result = medfed.simulate(study, listeners=[told.append])
    assert result.complete
    audits = [event for event in told if isinstance(event, SecurityAudit)]
    assert sum(event.action == "quarantine" for event in audits) >= 1
    assert min(len(event.clients) for event in told if isinstance(event, RoundStarted)) == 9


def test_a_rule_weighs_alike_in_the_open_and_in_secret(ten: Study) -> None:
    study = ten._with({**LYING, **ROBUST, "security.colluding": 0.0})  # as many sit out in both
    plain, secret = (
        medfed.simulate(study.set("security.aggregation", way)).w_P
        for way in ("plain", "three-party")
    )
    torch.testing.assert_close(secret, plain, atol=2e-3, rtol=2e-3)


def test_words_that_wrap_are_left_out_and_named(ten: Study) -> None:
    study = ten._with({**ROBUST, "robustness.attack": "wrap", "robustness.malicious": 0.3})
    result = medfed.simulate(study.set("security.aggregation", "three-party"))
    liars = {entry["site"] for entry in result.summary["excluded"]}
    assert len(liars) == 3 and all(
        "out of bound" in entry["reason"] for entry in result.summary["excluded"]
    )
    assert result.summary["test"]["auroc"] > 0.98


@pytest.mark.parametrize("attack", ["nan", "inf"])
def test_rows_that_are_not_finite_are_left_out(ten: Study, attack: str) -> None:
    result = medfed.simulate(
        ten._with({**ROBUST, "robustness.attack": attack, "robustness.malicious": 0.3})
    )
    assert len({entry["site"] for entry in result.summary["excluded"]}) == 3
    assert result.summary["test"]["auroc"] > 0.98


def test_liars_remember_their_rows_and_see_others_where_the_study_says_so(
    ten: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an attack was given: none ever had a row of the round before, or an honest one."""
    given: list[attacks.Sight] = []

    def listen(sight: attacks.Sight) -> torch.Tensor:
        given.append(sight)
        return -sight.own_FM

    heard = attacks.Attack("heard", "this test", "row", on_rows=listen)
    monkeypatch.setitem(attacks.ATTACKS, "heard", heard)
    settings = {"robustness.attack": "heard", "robustness.malicious": 0.3, "training.rounds": 3}
    own = medfed.simulate(ten._with(settings))
    blind, given[:] = list(given), []
    all_ = medfed.simulate(ten._with({**settings, "robustness.sight": "all"}))
    assert torch.equal(own.w_P, all_.w_P)
    for number, (less, more) in enumerate(zip(blind, given, strict=True), start=1):
        assert less.honest_HM is None and more.honest_HM is not None
        assert more.honest_HM.shape == (7, less.own_FM.shape[1])
        assert not (more.honest_HM[:, None] == more.own_FM).all(2).any()
        assert torch.equal(less.own_FM, more.own_FM)
        assert more.rounds == 3 and more.limit_F is None
        before = None if number == 1 else blind[number - 2].own_FM
        assert (less.before_FM is None) == (before is None)
        assert before is None or torch.equal(less.before_FM, before)


@pytest.mark.parametrize("way", ["plain", "three-party"])
def test_a_stale_row_is_of_the_round_before_also_after_a_stop(
    ten: Study, way: str, tmp_path: Path
) -> None:
    """It was a free-rider's, bit for bit."""
    settings = {"robustness.malicious": 0.3, "training.rounds": 3, "security.aggregation": way}
    study = ten._with({**settings, "robustness.attack": "stale"})
    whole = medfed.run(study, tmp_path / "whole")
    idle = medfed.simulate(study.set("robustness.attack", "free-rider"))
    assert not torch.allclose(whole.w_P, idle.w_P, atol=1e-3)
    first = study.set("training.rounds", 1)
    once = medfed.simulate(first)
    assert torch.equal(once.w_P, medfed.simulate(first.set("robustness.attack", "free-rider")).w_P)
    interrupted(study, tmp_path / "cut")
    assert torch.equal(medfed.resume(tmp_path / "cut").w_P, whole.w_P)


def test_liars_in_processes_of_their_own_see_nobody(ten: Study, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"robustness.sight='all' do not compose"):
        run_apart(ten._with({**LYING, "robustness.sight": "all"}), tmp_path / "run")


def test_a_simulated_attack_is_marked(ten: Study) -> None:
    told = medfed.simulate(ten._with({**LYING, **ROBUST})).summary["warnings"]
    assert any("a simulation in which" in text and "no use" in text for text in told)
    told = medfed.simulate(ten._with({**LYING, **ROBUST, "robustness.max_malicious": 0.2})).summary[
        "warnings"
    ]
    assert any("more than the rule is set to bear" in text for text in told)


# with a claim -------------------------------------------------------------------------------------


@pytest.fixture
def private(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path, PRIVATE)).set(
        "security.aggregation", "three-party"
    )


def test_the_budget_is_split_between_both_openings(private: Study) -> None:
    """Both noises together cost what the one of a plain sum does: 1/z^2 = 1/z_G^2 + 1/z_A^2."""
    g = resolve(private, dict(private.privacy.sizes), 50)
    terms = SharingTerms(50, 1e6, ("p", "q", "r"))
    gram, total = agreed.gram_split(g, terms)
    s = g.sensitivity_units()
    for K in (3, 10):
        z_G = gram(K) / (s * terms.bound * (K + 3) ** 0.5)
        z_A = total / s
        assert 1 / z_G**2 + 1 / z_A**2 == pytest.approx(1 / (g.sigma_units() / s) ** 2)


def test_noise_of_the_right_size_lies_on_both(private: Study, tmp_path: Path) -> None:
    study = private._with(
        {"robustness.rule": "nnm+geometric-median", "robustness.max_malicious": 0.0}
    )
    sites = open_sites(study, None)
    plan = prepare(sites[0].study, InProcess(sites), [site.name for site in sites])
    terms = agreed.terms_of(plan)
    chosen = agreed.selection(plan, terms)
    g = plan.guarantee
    assert chosen is not None and chosen.gram_noise and chosen.sum_noise and g is not None
    gram, total = agreed.gram_split(g, terms)
    for drawn, sigma in (
        (np.concatenate([chosen.gram_noise(9, Entropy()) for _ in range(40)]), gram(9)),
        (chosen.sum_noise(2000, 2**19, Entropy()), total * 2**19),
    ):
        unit = drawn.astype(float) / sigma * 2**0.5  # any two of the three parts make it
        assert stats.kstest(unit, "norm").pvalue > 1e-4
        for wrong in (2 / 3, 3 / 2):
            assert stats.kstest(unit / wrong, "norm").pvalue < 1e-4


def test_a_private_robust_run_keeps_its_promise(private: Study) -> None:
    study = private._with(
        {"robustness.rule": "nnm+geometric-median", "robustness.max_malicious": 0.0}
    )
    result = medfed.simulate(study)
    assert result.complete and result.summary["privacy"]["epsilon"] <= 1


def test_liars_know_to_what_length_their_rows_are_cut(
    private: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: "opposed" is as long as is let pass, also where that is more than honest rows
    are, and nothing of it is cut.
    """
    given: list[tuple[attacks.Sight, torch.Tensor]] = []

    def listen(sight: attacks.Sight) -> torch.Tensor:
        given.append((sight, attacks.find("opposed").on_rows(sight)))
        return given[-1][1]

    heard = attacks.Attack("heard", "this test", "row", on_rows=listen)
    monkeypatch.setitem(attacks.ATTACKS, "heard", heard)
    study = private._with(
        {"robustness.attack": "heard", "robustness.malicious": 0.4, "robustness.sight": "all"}
    )
    sites = open_sites(study, None)
    plan = prepare(sites[0].study, InProcess(sites), [site.name for site in sites])
    assert plan.guarantee is not None
    limits = row_limits(plan.study, plan.guarantee)
    medfed.simulate(study)
    assert len(given) == study.training.rounds
    for sight, lie_FM in given:
        assert sight.limit_F is not None and sight.honest_HM is not None
        assert sight.limit_F.tolist() == [limits[name] for name in sight.names]
        torch.testing.assert_close(lie_FM.norm(dim=1), sight.limit_F)
        honest_H = sight.honest_HM.norm(dim=1)
        assert float(sight.limit_F.max()) > float(honest_H.max()) > 0


# plans --------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "masked": ({**ROBUST, "security.aggregation": "masked"}, "the server sees no row"),
    "half": ({**ROBUST, "robustness.max_malicious": 0.5}, "no rule bears a half"),
    "mean": ({"robustness.max_malicious": 0.3}, "bears nobody"),
    "few": ({"robustness.rule": "krum", "robustness.max_malicious": 0.4}, "expected n >= 5"),
    "unknown": ({"robustness.rule": "median"}, "is no rule"),
    "rows": (
        {"robustness.rule": "trimmed-mean", "security.aggregation": "three-party"},
        "in plain sight",
    ),
    "reference": ({"robustness.rule": "fltrust"}, "reference row"),
    "gathers": (
        {"robustness.rule": "geometric-median", "security.aggregation": "three-party"},
        "single rows",
    ),
    "spread": (
        {"robustness.rule": "caf", "security.aggregation": "three-party"},
        "single rows",
    ),
    "pairs": (
        {"robustness.rule": "bucketing+geometric-median", "security.aggregation": "three-party"},
        "single rows",
    ),
    "one row": ({"robustness.rule": "krum", "security.aggregation": "three-party"}, "single rows"),
    "attack": ({"robustness.attack": "flip", "robustness.malicious": 0.3}, "not an attack"),
    "nobody": ({"robustness.attack": "sign-flip"}, "both or neither"),
    "wire": ({"robustness.attack": "wrap", "robustness.malicious": 0.3}, "three-party"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compose_is_refused(name: str, tmp_path: Path) -> None:
    settings, said = REFUSED[name]
    with pytest.raises(MedfedError, match=said):
        medfed.simulate(medfed.load_study(write_study(tmp_path, STUDY))._with(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"security.aggregation": "plain"},
        {"privacy.clipping": "adaptive"},
        {"privacy.max_sites_per_patient": 2},
    ],
)
def test_joint_noise_needs_what_the_matrix_noise_is_for(
    private: Study, settings: dict[str, Any]
) -> None:
    with pytest.raises((PlanError, StudyError), match="do not compose"):
        medfed.simulate(private._with({"robustness.rule": "nnm+geometric-median", **settings}))
