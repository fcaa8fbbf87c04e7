"""Whole runs whose rows nobody sees: the same model as in the open, bit for bit, and noise from several holders."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

import medfed
from medfed.core.checks import MedfedError, PlanError
from medfed.plan import holders, threshold
from medfed.privacy.guarantee import resolve
from medfed.study import Study
from medfed.wire import NoiseShare, noise_share
from tests.tables import PRIVATE, STUDY, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

WAYS = ("masked", "three-party")


@pytest.fixture
def open_study(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path, STUDY))


@pytest.fixture
def private(tmp_path: Path) -> Study:
    return medfed.load_study(write_study(tmp_path, PRIVATE))


# the same model ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold", "fednova", "fedadam"])
def test_masked_and_three_party_train_the_same_bits(open_study: Study, algorithm: str) -> None:
    """Both sum the same whole numbers, so masks and shares leave no trace; the open run differs by rounding alone."""
    study = open_study.set("training.algorithm", algorithm)
    masked, shared = (medfed.simulate(study.set("security.aggregation", way)).w_P for way in WAYS)
    assert torch.equal(masked, shared)
    torch.testing.assert_close(masked, medfed.simulate(study).w_P, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_seeded_joint_noise_gives_the_bits_of_the_open_run(private: Study, way: str) -> None:
    """Rows on the noise's grid are whole numbers already: a secure sum is the open sum, exactly."""
    study = private.set("privacy.simulation_only", True)
    secure = medfed.simulate(study.set("security.aggregation", way))
    assert torch.equal(secure.w_P, medfed.simulate(study).w_P)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("settings", [{}, {"privacy.clipping": "adaptive"}, {"privacy.noise": "site"}])
def test_a_private_run_keeps_its_promise_and_says_who_is_trusted(
    private: Study, way: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    study = private.set("security.aggregation", way)
    for key, value in settings.items():
        study = study.set(key, value)
    result = medfed.run(study, tmp_path / "run")
    claim = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert result.complete and claim["epsilon"] <= 1
    trusted = {"masked": "stay to the end", "three-party": "any two of the three"}[way]
    assert (trusted in claim["trust_model"]) == (study.privacy.noise != "site")
    excess = (
        {"masked": math.sqrt(3 / 2), "three-party": math.sqrt(3 / 2)}[way] if not settings.get("privacy.noise") else 1
    )
    assert claim["noise"]["standard_deviations_of_need"] == pytest.approx(excess)


def test_a_lost_loss_is_not_told(open_study: Study) -> None:
    """One site's loss is a number of that site alone."""
    told: list[Any] = []
    medfed.simulate(open_study.set("security.aggregation", "three-party"), listeners=[told.append])
    rounds = [event for event in told if type(event).__name__ == "RoundFinished"]
    assert rounds and all(event.loss is None and set(event.losses) == {None} for event in rounds)


# noise from several holders ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("holders", [1, 2, 4])
def test_any_holders_make_the_variance_that_is_asked(private: Study, holders: int) -> None:
    g = resolve(private, dict(private.privacy.sizes), 2000)
    parts = sum(noise_share(g, holders)(2000).astype(float) for _ in range(holders))
    said = stats.chi2(2000).cdf(float(((parts / g.sigma_units()) ** 2).sum()))
    assert 1e-4 < said < 1 - 1e-4
    wrong = stats.chi2(2000).cdf(float(((parts / (1.5 * g.sigma_units())) ** 2).sum()))
    assert wrong < 1e-6  # the test would see it


def test_each_client_adds_its_own_part(private: Study) -> None:
    g = resolve(private, dict(private.privacy.sizes), 500)
    rows = NoiseShare(g, 2).client(torch.zeros(4, 500, dtype=torch.int64)).double() / g.sigma_units()
    assert np.allclose(rows.square().mean(1), 0.5, atol=0.2)
    assert abs(np.corrcoef(rows.numpy()) - np.eye(4)).max() < 0.25


# plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "colluding", "expected"), [(4, 0.3, (3, 2)), (10, 0.3, (7, 4)), (3, 0.3, (2, 2)), (10, 0.0, (6, 6))]
)
def test_threshold_and_holders(open_study: Study, n: int, colluding: float, expected: tuple[int, int]) -> None:
    study = open_study.set("security.aggregation", "masked").set("security.colluding", colluding)
    assert (threshold(study, n), holders(study, [str(i) for i in range(n)])) == expected


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "central": ({"privacy.noise": "central"}, "privacy.noise='central'"),
    "correlated": ({"fleet.schedule": "cyclic", "fleet.groups": 2, "privacy.correlated": True}, "correlated"),
    "small": ({"fleet.clients_per_round": 2}, "min_group=3"),
    "names": ({"security.aggregators": ["a", "a", "b"]}, "three different names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_compose_is_refused_before_training(private: Study, name: str) -> None:
    settings, said = REFUSED[name]
    study = private.set("security.aggregation", "three-party")._with(settings)
    with pytest.raises(MedfedError, match=said):
        medfed.simulate(study)


def test_sums_that_could_wrap_are_refused(open_study: Study) -> None:
    study = (
        open_study.set("security.aggregation", "masked").set("security.bound", 1e8).set("security.fraction_bits", 40)
    )
    with pytest.raises(PlanError, match="bound"):
        medfed.simulate(study)


def test_a_row_out_of_bound_is_refused_at_its_site(open_study: Study) -> None:
    study = open_study.set("security.aggregation", "three-party").set("security.bound", 1e-6)
    told: list[Any] = []
    result = medfed.simulate(study, listeners=[told.append])
    assert not result.complete and "security.bound=1e-06" in told[-1].reason
