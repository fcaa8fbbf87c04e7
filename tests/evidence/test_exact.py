"""Exact tests find every planted bug of noise and of sensitivity at epsilon 1 and 8, and let the
honest code stand.
"""

import math
import subprocess
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import medfed
from medfed.evidence import exact
from medfed.evidence.twin import People, Twin, clip_gradients
from medfed.privacy import factorisation, guarantee, mechanisms, noise_tests
from tests import planted
from tests.planted import Bug, Patch
from tests.tables import PRIVATE, write_study

REGRESSION = PRIVATE.replace('target = "died"', 'target = "age"\ntask = "regression"')

pytestmark = pytest.mark.usefixtures("one_thread", "_fewer")


@pytest.fixture
def _fewer(monkeypatch: Patch) -> None:
    """Draw a quarter of the numbers: half the noise is 50 standard deviations off even so."""
    monkeypatch.setattr(exact, "NUMBERS", 5000)


@lru_cache
def twin(*settings: str, secure: bool = False) -> Twin:
    way = () if secure else ("security.aggregation='plain'",)
    study = medfed.load_study("breast-cancer", ("training.rounds=10", *way, *settings))
    return Twin.of(study, None, rng(0), secure=secure)


def fresh(*settings: str, secure: bool = False) -> Twin:
    """A twin whose plan is made now, under whatever is planted."""
    return twin.__wrapped__(*settings, secure=secure)


def invented(folder: Path, text: str = PRIVATE, **settings: object) -> Twin:
    study = medfed.load_study(write_study(folder, text))
    for key, value in settings.items():
        study = study.set(key.replace("__", "."), value)
    return Twin.of(study, None, rng(0))


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# Honest code stands


@pytest.mark.parametrize(
    "settings",
    [
        ("privacy.epsilon=1.0",),
        ("privacy.epsilon=8.0",),
        ("privacy.epsilon=0.1", "privacy.noise='central'"),
        ("privacy.noise='site'",),
        (
            "privacy.noise='site'",
            "privacy.epsilon=8.0",
            "training.local_steps=5",
            "training.algorithm='scaffold'",
        ),
        ("privacy.noise='site'", "training.local_steps=3", "training.optimizer='adam'"),
        ("privacy.noise='site'", "training.batch_size=40"),
        ("training.batch_size=40",),
        ("privacy.clipping='adaptive'",),
        (
            "privacy.clipping='fixed'",
            "privacy.clip=0.5",
            "model.name='mlp'",
            "model.options.hidden=[16]",
        ),
        ("fleet.schedule='cyclic'", "fleet.groups=2", "privacy.correlated=true"),
        ("privacy.max_sites_per_patient=2",),
        ("privacy.max_sites_per_patient=2", "privacy.noise='site'"),
    ],
)
def test_honest_noise_and_sensitivity_stand(settings: tuple[str, ...]) -> None:
    target = twin(*settings)
    part = exact.noise(target)
    assert part.passed, part.told
    assert 1 <= part.figures["told_to_needed"] < 1.4  # type: ignore[operator]
    assert part.figures["on_grid"] == 1
    moved = exact.sensitivity(target, rng(0))
    assert moved.passed, moved.told
    assert 0.99 < moved.figures["moved"] <= 1.011  # type: ignore[operator]


@pytest.mark.parametrize("way", ["masked", "three-party"])
def test_noise_of_several_holders_is_opened_and_has_all_its_parts(
    way: str, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(exact, "NUMBERS", 1200)
    aggregation = f"security.aggregation={way!r}"
    part = exact.noise(fresh(aggregation, secure=True))
    assert part.passed, part.told
    assert part.figures["finds_below"] > 0.85  # type: ignore[operator]
    planted.one_holder_of_many(monkeypatch)
    lazy = exact.noise(fresh(aggregation, secure=True))
    assert lazy.passed is False and "less than needed" in lazy.told


def test_patients_who_are_invented_serve_as_well(tmp_path: Path) -> None:
    target = invented(tmp_path, privacy__scope="study")
    # a right noise fails 5 times in 10,000
    assert any(exact.noise(target).passed for _ in range(2))
    assert exact.sensitivity(target, rng(0)).passed


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_odd_patients_of_a_regression_are_clipped(noise: str, tmp_path: Path) -> None:
    part = exact.sensitivity(
        invented(tmp_path, REGRESSION, model__name="mlp", privacy__noise=noise), rng(0)
    )
    assert part.passed, part.told


def test_the_reference_path_clips_the_odd_patients_of_a_regression(tmp_path: Path) -> None:
    target = invented(
        tmp_path,
        REGRESSION,
        model__name="mlp",
        model__options={"hidden": [8]},
        training__path="func",
    )
    part = exact.sensitivity(target, rng(0))
    assert part.passed, part.told


# Planted bugs are found


@pytest.mark.parametrize("mode", ["shared", "site"])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
@pytest.mark.parametrize("bug", planted.NOISE)
def test_what_is_wrong_with_the_noise_is_found(
    bug: Bug, epsilon: float, mode: str, monkeypatch: Patch
) -> None:
    bug(monkeypatch)
    part = exact.noise(fresh(f"privacy.epsilon={epsilon}", f"privacy.noise={mode!r}"))
    assert part.passed is False, part.told


@pytest.mark.parametrize("mode", ["shared", "site"])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
@pytest.mark.parametrize("bug", planted.SENSITIVITY)
def test_what_lets_one_patient_move_more_is_found(
    bug: Bug, epsilon: float, mode: str, monkeypatch: Patch
) -> None:
    target = twin(f"privacy.epsilon={epsilon}", f"privacy.noise={mode!r}")
    bug(monkeypatch)
    part = exact.sensitivity(target, rng(0))
    assert part.passed is False and part.figures["moved"] > 2, part.told  # type: ignore[operator]
    if bug is planted.norm_by_cancellation:
        assert all(which.startswith("two records") for which in part.figures["beyond"])  # type: ignore[union-attr]


def test_sites_that_share_one_noise_are_found(monkeypatch: Patch) -> None:
    planted.one_noise_for_all_sites(monkeypatch)
    part = exact.noise(twin("privacy.noise='site'"))
    assert part.passed is False and "reuse" in part.told


@pytest.mark.parametrize("factor", [2 / 3, 3 / 2])
def test_two_thirds_and_three_halves_of_the_noise_are_refused(
    factor: float, monkeypatch: Patch
) -> None:
    def scaled(sigma: float) -> mechanisms.DiscreteGaussian:
        return mechanisms.DiscreteGaussian(sigma * factor)

    planted._sampler(
        monkeypatch,
        lambda self, count, entropy: planted._sample(scaled(self.sigma), count, entropy),
    )
    assert exact.noise(twin()).passed is False


def test_correlated_noise_of_another_strategy_is_found(monkeypatch: Patch) -> None:
    target = twin("fleet.schedule='cyclic'", "fleet.groups=2", "privacy.correlated=true")
    independent = lambda self, round=None: self._sample(self._parameters)  # noqa: E731
    monkeypatch.setattr(factorisation.Correlated, "next", independent)
    part = exact.noise(target)
    assert part.passed is False and "lags" in part.told


def test_the_count_of_adaptive_clipping_is_held_to_its_noise(monkeypatch: Patch) -> None:
    whole = guarantee.Guarantee.count_sigma
    monkeypatch.setattr(guarantee.Guarantee, "count_sigma", lambda self: whole(self) / 1.4)
    part = exact.noise(twin("privacy.clipping='adaptive'"))
    assert part.passed is False and "what is told of it" in part.told


def test_needed_noise_is_worked_out_without_the_guarantee(monkeypatch: Patch) -> None:
    """Whatever the guarantee says, what is needed stays; and it is what an honest guarantee says,
    within rounding.
    """
    target = twin("privacy.noise='site'", "training.local_steps=5")
    name = next(iter(target.sites))
    honest = target.guarantee.sigma_units(name)
    planted.half_the_noise_in_sigma_units(monkeypatch)
    need = exact.needed_deviation(target.plan.study, name, target.plan.parameters, target.guarantee)
    assert need < honest < 1.01 * need and math.isclose(
        target.guarantee.sigma_units(name), honest / 2
    )


# Alarms, and the attacker's own gradients


def test_an_honest_audit_is_refused_less_often_than_once_in_a_thousand() -> None:
    """Bonferroni bounds it by ALPHA; p-values are no smaller than they say, also where the tests
    depend.
    """
    draw = rng(0)
    least = []
    for _ in range(300):
        law = noise_tests.against_law(draw.standard_normal((40, 25)) * 7.0, np.full(40, 7.0))
        least.append(min(law.p.values()) * len(law.p))
    assert min(least) > exact.ALPHA
    assert np.mean(np.array(least) < 0.1) < 0.15


class Branching(nn.Module):
    """A model that torch.func cannot map: it looks at a value."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 1)
        self.unused = nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x)
        return z if z.sum().item() > 0 else 2 * z


def test_where_torch_func_cannot_the_attacker_goes_record_by_record() -> None:
    target = twin()
    rows = next(iter(target.rows.values()))
    rows = rows.at(torch.arange(len(rows)) < 12)
    rows = replace(rows, patient=torch.arange(12) // 2)
    model = Branching(rows.x.shape[1])
    w_P = torch.cat([p.detach().flatten() for p in model.parameters()])
    found = clip_gradients(
        replace(target, model=model), w_P, People.of({"a": rows}, {"a": 1.0}, {"a": 0}), 0, 1.0
    )
    for patient in range(6):
        model.zero_grad()
        for n in (2 * patient, 2 * patient + 1):
            F.binary_cross_entropy_with_logits(model(rows.x[n : n + 1])[0, 0], rows.y[n]).backward()
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        g_P = torch.cat([part.flatten() for part in parts]).double()
        torch.testing.assert_close(found[patient], g_P / (g_P.norm() + 0.01), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_the_benchmark_of_power_runs() -> None:
    root = Path(__file__).parents[2]
    words = [sys.executable, str(root / "benchmarks" / "audit_power.py"), "--tiny"]
    told = subprocess.run(words, capture_output=True, text=True, cwd=root, check=True)
    found = [line.split() for line in told.stdout.splitlines()[2:]]
    assert [(words[0], words[3]) for words in found] == [
        *[("nothing", "no")] * 2,
        *[("half_the_noise_in_resolve", "yes")] * 2,
        *[("clipping_skipped", "yes")] * 2,
    ]
