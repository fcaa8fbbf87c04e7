"""What a study asks for is resolved to noise that keeps it, and to no more noise than that."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import dp_accounting as dp
import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medfed.core.checks import PlanError, StudyError
from medfed.core.streams import Streams
from medfed.fleet.selection import turn
from medfed.privacy import accounting
from medfed.privacy.guarantee import (
    GRID,
    SLACK,
    Guarantee,
    Release,
    asked,
    declared_size,
    discrete_gaussian,
    mode,
    repeat,
    resolve,
)
from medfed.privacy.mechanisms import delta_cost
from medfed.privacy.privacy_events import PoissonGaussian
from medfed.study import Study, from_tables

SIZES = {"a": 300, "b": 120}
P = 33


def _study(**values: Any) -> Study:
    """Return a study under (1, 1e-5), 12 rounds, all patients in a step; keys are dotted
    with `__`.
    """
    study = from_tables(
        {"privacy": {"epsilon": 1.0, "delta": 1e-5}, "training": {"rounds": 12, "batch_size": 0}}
    )
    for key, value in values.items():
        study = study.set(key.replace("__", "."), value)
    return study


def _resolved(sizes: Mapping[str, int] = SIZES, parameters: int = P, **values: Any) -> Guarantee:
    return resolve(_study(**values), sizes, parameters)


def _multiplier(g: Guarantee, name: str = "a") -> float:
    """Return the noise that is added over how far one patient moves it, both worked out here."""
    each = (1 + SLACK) / GRID + math.sqrt(g.parameters)
    return g.sigma_units(name) / (each * (g.max_sites if g.mode != "site" else 1))


# the target ---------------------------------------------------------------------------------------


def _delta(sigma: float, epsilon: float) -> float:
    """Return the exact delta of one Gaussian (Balle and Wang 2018, theorem 8), in plain floats."""
    above, below = stats.norm.cdf([0.5 / sigma - epsilon * sigma, -0.5 / sigma - epsilon * sigma])
    return float(above - math.exp(epsilon) * below)


FULL: dict[str, tuple[dict[str, Any], int]] = {
    # settings -> how many Gaussian sums of all its patients one patient pays for
    "shared": ({}, 12),
    "central": ({"privacy__noise": "central"}, 12),
    "spare rounds": ({"privacy__spare_rounds": 3}, 15),
    "two places, one noise": ({"privacy__max_sites_per_patient": 2}, 12),
    "site": ({"privacy__noise": "site"}, 12),
    "site, epochs": ({"privacy__noise": "site", "training__local_epochs": 4}, 48),
    "site, steps": (
        {"privacy__noise": "site", "training__local_steps": 5, "privacy__spare_rounds": 1},
        65,
    ),
    "site, three places": ({"privacy__noise": "site", "privacy__max_sites_per_patient": 3}, 36),
    "groups take turns": ({"fleet__schedule": "cyclic", "fleet__groups": 5}, 3),
    "groups take turns at sites": (
        {
            "fleet__schedule": "cyclic",
            "fleet__groups": 6,
            "privacy__noise": "site",
            "training__local_steps": 2,
        },
        4,
    ),
    # no amplification: the coordinator sees who is drawn
    "drawn clients": ({"fleet__clients_per_round": 1}, 12),
    "a batch of all": ({"training__batch_size": 300}, 12),
}


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-5), (0.1, 1e-6), (8.0, 1e-3)])
@pytest.mark.parametrize("case", FULL)
def test_noise_on_all_patients_is_exactly_what_the_target_asks(
    case: str, epsilon: float, delta: float
) -> None:
    values, sums = FULL[case]
    study = replace(
        _study(**values), privacy=replace(_study(**values).privacy, epsilon=epsilon, delta=delta)
    )
    g = resolve(study, SIZES, P)
    sigma = _multiplier(g) / math.sqrt(sums)  # T sums of one noise are one sum of noise / sqrt(T)
    assert g.accountant == "gdp"
    assert _delta(sigma, epsilon) <= delta - g.delta_sampler
    assert _delta(0.99 * sigma, epsilon) > delta
    assert epsilon * 0.999 < g.cost(dict.fromkeys(SIZES, g.uses)) <= epsilon


SAMPLED: dict[str, tuple[dict[str, Any], int]] = {
    # settings -> how many sampled sums a patient of site a pays for, batch 30 of 300 expected
    "shared": ({}, 12),
    "central, spare rounds": ({"privacy__noise": "central", "privacy__spare_rounds": 2}, 14),
    "site": ({"privacy__noise": "site"}, 120),
    "site, epochs": ({"privacy__noise": "site", "training__local_epochs": 2}, 240),
    "site, steps, two places": (
        {"privacy__noise": "site", "training__local_steps": 3, "privacy__max_sites_per_patient": 2},
        72,
    ),
    "groups take turns": ({"fleet__schedule": "cyclic", "fleet__groups": 5}, 3),
}


@pytest.mark.parametrize("case", SAMPLED)
def test_noise_on_sampled_patients_meets_the_target(case: str) -> None:
    values, sums = SAMPLED[case]
    g = _resolved({"a": 300}, training__batch_size=30, **values)
    z = _multiplier(g)
    delta = 1e-5 - g.delta_sampler
    assert g.accountant == "rdp" and g.releases["a"].probability == 0.1
    event = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.1, dp.GaussianDpEvent(z)), sums)
    by_rdp = dp.rdp.RdpAccountant(accounting.ORDERS).compose(event).get_epsilon(delta)
    by_pld = (
        pld.from_gaussian_mechanism(z, sampling_prob=0.1)
        .self_compose(sums)
        .get_epsilon_for_delta(delta)
    )
    assert by_pld < by_rdp <= 1
    less = repeat(replace(g.releases["a"], noise_multiplier=0.99 * z).event(), g.uses * g.copies)
    assert not accounting.fits(np.zeros(len(accounting.ORDERS)), accounting.rdp(less), 1.0, delta)


@pytest.mark.slow
@pytest.mark.parametrize("values", [{}, {"privacy__noise": "site"}], ids=["shared", "site"])
def test_pld_needs_less_noise_and_meets_the_target_too(values: dict[str, Any]) -> None:
    values = {"training__batch_size": 30, "privacy__scope": "run", "training__rounds": 2, **values}
    by_pld, by_rdp = (
        _resolved({"a": 300}, privacy__accountant=name, **values) for name in ("pld", "rdp")
    )
    assert by_pld.accountant == "pld" and _multiplier(by_pld) < _multiplier(by_rdp)
    sums = 2 * by_pld.releases["a"].steps

    def epsilon(z: float) -> float:
        once = pld.from_gaussian_mechanism(z, sampling_prob=0.1)
        return float(once.self_compose(sums).get_epsilon_for_delta(1e-5 - by_pld.delta_sampler))

    assert epsilon(_multiplier(by_pld)) <= 1 < epsilon(0.99 * _multiplier(by_pld))


def test_a_cap_costs_twice_the_noise_however_wide_it_is_and_whatever_is_declared() -> None:
    """Where a batch is full, one patient's presence puts another out: the sum moves by twice the
    clip. That a cap is never reached is a statement about the true number of patients, which nobody
    can vouch for."""
    values = {"training__batch_size": 30}
    free, wide, tight = (
        _resolved({"a": 300}, privacy__batch_cap=cap, **values) for cap in (0, 300, 32)
    )
    assert _multiplier(wide) == _multiplier(tight) == pytest.approx(2 * _multiplier(free), rel=2e-4)
    event = tight.releases["a"].event()
    assert event == PoissonGaussian(0.1, _multiplier(tight) / 2, tight.releases["a"].steps)
    assert tight.cost({"a": 12}) <= 1


def test_what_a_release_costs_is_the_same_for_any_declared_size() -> None:
    for cap in (0, 5):
        costs = {Release(size, 3, 0.25, 2.0, cap).event() for size in (1, 100, 10**6)}
        assert len(costs) == 1, "steps and probability are public; a size is only declared"


def test_without_sampling_a_cap_means_nothing() -> None:
    assert _resolved(privacy__batch_cap=5).releases == _resolved().releases


def test_steps_and_shares_follow_from_declared_sizes() -> None:
    joint, site = (
        _resolved(training__batch_size=40, privacy__noise=noise) for noise in ("shared", "site")
    )
    assert {n: (r.size, r.steps, r.probability) for n, r in joint.releases.items()} == {
        "a": (300, 1, 40 / 210),  # all patients alike, 40 at a site of the mean size
        "b": (120, 1, 40 / 210),
    }
    assert {n: (r.steps, r.probability) for n, r in site.releases.items()} == {
        "a": (8, 40 / 300),
        "b": (3, 1 / 3),
    }


def test_joint_noise_does_not_follow_the_smallest_site() -> None:
    values = {"training__batch_size": 60}
    alone = {n: _resolved({n: m}, **values).releases[n].noise_multiplier for n, m in SIZES.items()}
    together = _resolved(**values)
    mean = _resolved({"mean": 210}, **values).releases["mean"].noise_multiplier
    assert {r.noise_multiplier for r in together.releases.values()} == {mean}
    assert min(alone.values()) < mean < 0.8 * max(alone.values())
    sites = _resolved(**values, privacy__noise="site", training__local_steps=1)
    assert {n: r.noise_multiplier for n, r in sites.releases.items()} == pytest.approx(alone)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_patient_of_several_sites_is_covered(k: int) -> None:
    one, several = (_resolved(privacy__max_sites_per_patient=n) for n in (1, k))
    # one noise, moved at k sites
    assert several.sigma_units() == pytest.approx(k * one.sigma_units())
    assert (several.copies, several.max_sites) == (1, k)
    one, several = (
        _resolved(privacy__max_sites_per_patient=n, privacy__noise="site") for n in (1, k)
    )
    # k noised sums
    assert several.sigma_units("a") == pytest.approx(math.sqrt(k) * one.sigma_units("a"), rel=1e-3)
    assert several.copies == k and several.sensitivity_units() == one.sensitivity_units()


# correlated noise ---------------------------------------------------------------------------------


def test_correlated_noise_is_one_gaussian_of_the_whole_runs_sensitivity() -> None:
    values: dict[str, Any] = {
        "fleet__schedule": "cyclic",
        "fleet__groups": 4,
        "training__rounds": 10,
    }
    g = _resolved(privacy__correlated=True, **values)
    assert (g.uses, len(g.strategy), g.separation, g.rounds) == (1, 4, 4, 10)

    C = np.array(
        [[g.strategy[i - j] if 0 <= i - j < 4 else 0 for j in range(10)] for i in range(10)]
    )
    patterns = [[t for t in range(first, 10, 4)] for first in range(4)]
    worst = max(float(np.linalg.norm(C[:, pattern].sum(1))) for pattern in patterns)
    rounding = math.sqrt(9 * P)  # of what is taken back in later rounds
    assert g.run_sensitivity_units() == pytest.approx(
        worst * g.sensitivity_units() + rounding, rel=1e-9
    )
    z = g.sigma_units() / (worst * g.sensitivity_units() + rounding)
    assert _delta(z, 1.0) <= 1e-5 - g.delta_sampler and _delta(0.99 * z, 1.0) > 1e-5
    assert 0.999 < g.cost({"a": 1}) <= 1
    assert _resolved(**values).run_sensitivity_units() == g.sensitivity_units()


def test_groups_that_take_turns_keep_uses_as_far_apart_as_is_counted() -> None:
    g = _resolved(fleet__schedule="cyclic", fleet__groups=5)
    clients = [f"device {i}" for i in range(60)]
    seen = {
        name: [t for t in range(1, 13) if name in turn(clients, t, 5, Streams(3))]
        for name in clients
    }
    assert max(map(len, seen.values())) == g.uses == 3
    assert all(b - a == 5 for rounds in seen.values() for a, b in pairwise(rounds))


# what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", [1 / 420, 0.01, 0.9])
def test_a_delta_that_lets_one_patient_be_published_is_refused(delta: float) -> None:
    with pytest.raises(
        PlanError, match=rf"privacy\.delta={delta:g} with 420 patients; expected below 1/420"
    ) as told:
        _resolved(privacy__delta=delta)
    suggested = float(str(told.value).split("Set privacy.delta=")[1].rstrip("."))
    assert _resolved(privacy__delta=suggested).delta == suggested < 1 / 420
    assert _resolved(privacy__delta=1 / 421).delta == 1 / 421


@given(st.integers(2, 10**7))
@settings(max_examples=30)
def test_the_delta_that_is_suggested_is_always_one_that_works(patients: int) -> None:
    with pytest.raises(PlanError) as told:
        _resolved({"a": patients}, privacy__delta=0.999999)
    assert float(str(told.value).split("Set privacy.delta=")[1].rstrip(".")) < 1 / patients


@pytest.mark.parametrize(
    ("key", "value"), [(k, v) for k in ("epsilon", "delta") for v in (0.0, -1.0, math.nan)]
)
def test_targets_that_are_no_target_are_refused(key: str, value: float) -> None:
    with pytest.raises(
        StudyError, match=rf"privacy\.{key}={value}; expected a number (above 0|in \(0, 1\])"
    ):
        _study(**{f"privacy__{key}": value})


@pytest.mark.parametrize(
    ("privacy", "words"),
    [
        ({"epsilon": 1.0}, r"privacy\.epsilon=1 and no privacy\.delta; .*Set privacy\.delta=1e-06"),
        (
            {"delta": 1e-6},
            r"privacy\.delta=1e-06 and no privacy\.epsilon; .*Set privacy\.epsilon=1",
        ),
        ({"epsilon": 1.0, "delta": 1.0}, r"no privacy\.delta"),
        ({"epsilon": math.inf, "delta": 1e-6}, r"no privacy\.epsilon"),
        (
            {"noise": "site"},
            r"privacy\.noise='site' and no privacy\.epsilon; .*Set privacy\.epsilon=1\.0 and",
        ),
        (
            {"noise": "none", "epsilon": 1.0, "delta": 1e-6},
            r"privacy\.noise='none' and privacy\.epsilon=1 .*'shared'",
        ),
    ],
)
def test_half_a_target_is_refused_with_the_other_half(privacy: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        mode(from_tables({"privacy": privacy}))


def test_noise_follows_the_target_where_the_study_leaves_it_open() -> None:
    assert mode(from_tables({})) == "none" and not asked(from_tables({}))
    assert mode(_study()) == "shared" and asked(_study())
    assert [mode(_study(privacy__noise=noise)) for noise in ("site", "shared", "central")] == [
        "site", "shared", "central",
    ]  # fmt: skip


def test_a_site_without_a_declared_size_is_refused() -> None:
    study = _study(privacy__sizes={"north": 12})
    assert declared_size(study, "north") == 12
    with pytest.raises(
        PlanError, match=r"'south' has no declared size, .* Set privacy\.sizes\.\"south\" = N"
    ):
        declared_size(study, "south")
    assert declared_size(_study(sites__kind="device"), "anyone") == 1


# the sampler --------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.001, 0.02, 1.0, 30.0])  # multipliers from 0.5 to 10,000
@pytest.mark.parametrize("clipping", ["automatic", "adaptive"])
def test_the_samplers_share_of_delta_covers_what_is_drawn(epsilon: float, clipping: str) -> None:
    values: dict[str, Any] = {
        "privacy__epsilon": epsilon,
        "privacy__clipping": clipping,
        "privacy__spare_rounds": 3,
    }
    g = _resolved(**values)
    drawn = [(g.sigma_units(), P)] + [(g.count_sigma() / GRID, 1)] * (clipping == "adaptive")
    cost = sum(
        delta_cost(discrete_gaussian(sigma).total_variation, 15 * count, epsilon)
        for sigma, count in drawn
    )
    assert 0 < cost <= g.delta_sampler < 1e-20 * (1 + math.exp(epsilon))
    sites = _resolved(**values | {"privacy__clipping": "automatic"}, privacy__noise="site", training__local_steps=7,
                      privacy__max_sites_per_patient=2)  # fmt: skip
    each = discrete_gaussian(sites.sigma_units("a")).total_variation
    assert delta_cost(each, 15 * 7 * 2 * P, epsilon) <= sites.delta_sampler


def test_seeded_noise_takes_no_share() -> None:
    assert _resolved(privacy__simulation_only=True).delta_sampler == 0


def test_more_samples_than_delta_bears_are_refused() -> None:
    with pytest.raises(
        PlanError, match=r"privacy\.delta=1e-13 with 12,000,000,000 noise samples.*at most half"
    ):
        _resolved(privacy__delta=1e-13, parameters=10**9)


# what it tells ------------------------------------------------------------------------------------


def test_the_cost_is_that_of_the_patients_who_paid_most() -> None:
    g = _resolved(privacy__spare_rounds=8)
    assert g.cost({}) == g.cost({"a": 0, "b": 0}) == 0
    assert g.cost({"a": 3, "b": 7}) == g.cost({"b": 7}) > g.cost({"a": 3}) > 0
    assert g.cost({"a": 20}) <= 1 < g.cost({"a": 21})


def test_the_cost_covers_who_is_at_two_unlike_sites() -> None:
    """Half of one site's rounds and half of the other's came to a tenth more than was told, and the
    whole plan stays within its target.
    """
    study = _study(
        privacy__noise="site",
        privacy__max_sites_per_patient=2,
        privacy__delta=1e-4,
        training__batch_size=10,
        training__local_steps=5,
    )
    g = resolve(study, {"a": 10, "b": 480}, P)
    delta = g.delta - g.delta_sampler
    more = []
    for uses in itertools.product((1, 3, 6, g.uses), repeat=2):
        a, b = (
            accounting.rdp(repeat(g.releases[name].event(), n))
            for name, n in zip("ab", uses, strict=True)
        )
        spent = [accounting.epsilon_from_rdp(one, delta) for one in (a + b, 2 * a, 2 * b)]
        assert max(spent) <= g.cost(dict(zip("ab", uses, strict=True))) * (1 + 1e-9)
        more.append(spent[0] / max(spent[1:]))
    assert max(more) > 1.05
    assert g.cost({"a": g.uses, "b": g.uses}) <= 1


def test_a_draw_of_sites_buys_no_noise() -> None:
    """Who is drawn is seen, so every patient is counted in every round, as if all sites
    took part.
    """
    everybody = _resolved()
    drawn = _resolved(fleet__clients_per_round=1)
    assert _multiplier(drawn) == _multiplier(everybody)
    assert drawn.cost({"a": 12}) == everybody.cost({"a": 12})


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_the_signal_is_all_patients_pulling_one_way(noise: str) -> None:
    g = _resolved(privacy__noise=noise, parameters=100)
    counted = 420 if noise == "shared" else 300
    assert g.signal_to_noise("a") == pytest.approx(
        counted / (g.releases["a"].noise_multiplier * 10)
    )
    smaller = resolve(_study(privacy__noise=noise), {"a": 30, "b": 12}, 100)
    assert smaller.signal_to_noise("a") == pytest.approx(g.signal_to_noise("a") / 10, rel=1e-3)
