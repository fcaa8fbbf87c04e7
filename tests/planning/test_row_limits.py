"""How long a row may be under one joint noise: what aggregators and sites hold rows to, and what
that takes from liars.
"""

import dataclasses
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import medfed
from medfed import runs
from medfed.core.checks import MedfedError, PlanError
from medfed.node import work
from medfed.node.inprocess import InProcess
from medfed.planning import row_limits
from medfed.planning import terms as agreed
from medfed.planning.resolved import GRAM_SHARE
from medfed.planning.row_limits import ABOVE_NOISE, LEAST, TRAVEL, cap
from medfed.privacy.guarantee import GRID, resolve
from medfed.rounds.aggregation import bears
from medfed.rounds.prepare import prepare
from medfed.secure.three_party import SharingTerms
from medfed.study import Study
from tests.secure.test_gram import THREE
from tests.secure.test_gram import opened as open_rows
from tests.tables import PRIVATE, invented, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

WARY = {"robustness.rule": "auto", "robustness.max_malicious": 0.3}


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Three sites of 96, 58 and 38 patients at epsilon 8, among three aggregators."""
    return medfed.load_study(write_study(tmp_path, PRIVATE))._with(
        {"security.aggregation": "three-party", "privacy.epsilon": 8.0, "training.rounds": 40}
    )


def guarantee_of(study: Study, parameters: int = 8) -> Any:
    return resolve(study, dict(study.privacy.sizes), parameters)


# the cap ------------------------------------------------------------------------------------------


def test_rows_are_cut_only_where_some_may_lie(study: Study) -> None:
    assert cap(study, guarantee_of(study)) == 1
    assert cap(study.set("robustness.cap", 0.2), guarantee_of(study)) == 0.2
    fast = study.set("training.learning_rate", 100.0)
    for settings_ in (WARY, {"robustness.rule": "auto"}, {"robustness.max_malicious": 0.3}):
        assert cap(fast._with(settings_), guarantee_of(fast)) < 0.2
    masked = study._with({**WARY, "security.aggregation": "masked"})
    assert cap(masked, guarantee_of(masked)) == 1


@pytest.mark.parametrize(
    ("changes", "more"),
    [
        ({}, 1.0),
        ({"training.rounds": 40}, 2.0),
        ({"training.learning_rate": 200.0}, 5.0),
        ({"privacy.clip": 2.0}, 2.0),
        ({"training.server_learning_rate": 0.5}, 0.5),
        ({"training.algorithm": "fedavgm", "training.server_momentum": 0.75}, 4.0),
    ],
)
def test_a_capped_run_goes_as_far_as_is_said(
    study: Study, changes: dict[str, Any], more: float
) -> None:
    """By the server's own steps on rows of the cap's length that all point one way."""
    lenient = {**WARY, "privacy.clip": 1.0, "training.rounds": 20, "training.learning_rate": 40.0}
    wary = study._with(lenient | changes)
    guarantee = replace(guarantee_of(wary), releases={"a": quiet(wary)})
    share = cap(wary, guarantee)
    assert share < 1
    assert share * more == pytest.approx(TRAVEL / (20 * 40))

    training = wary.training
    algorithm = medfed.learn.algorithms.ALGORITHMS[training.algorithm]
    server = algorithm.begin(torch.zeros(1, dtype=torch.float64), training)
    step = torch.full((1,), training.learning_rate * wary.privacy.clip * share).double()
    for _ in range(training.rounds):
        server = algorithm.step(server, step, 1.0, training)
    # momentum needs rounds to get up to its speed
    assert 0.7 * TRAVEL <= float(server.w_P) <= TRAVEL * (1 + 1e-9)


def quiet(study: Study) -> Any:
    release = next(iter(guarantee_of(study).releases.values()))
    return replace(release, noise_multiplier=1e-9)


def test_no_cap_is_below_the_noise_on_a_mean_row(study: Study) -> None:
    wary = study._with({**WARY, "training.learning_rate": 1e5})
    guarantee = guarantee_of(wary, 8)
    z = next(iter(guarantee.releases.values())).noise_multiplier
    noise = z * math.sqrt(1.5) * math.sqrt(8) / 192
    assert cap(wary, guarantee) == pytest.approx(ABOVE_NOISE * noise, rel=0.01)
    twice = wary.set("privacy.max_sites_per_patient", 2)
    assert cap(twice, replace(guarantee, max_sites=2)) == pytest.approx(
        2 * cap(wary, guarantee), rel=1e-6
    )
    fewer = wary.set("fleet.clients_per_round", 2)
    assert cap(fewer, guarantee) == pytest.approx(1.5 * cap(wary, guarantee), rel=1e-6)
    adam = wary._with({"training.algorithm": "fedadam"})
    calm = replace(guarantee, releases={"a": quiet(adam)})
    assert cap(adam, calm) == LEAST


@pytest.mark.parametrize(
    "changes",
    [
        {"security.aggregation": "masked"},
        {"security.aggregation": "plain"},
        {"privacy.noise": "site"},
        {"privacy.epsilon": math.inf, "privacy.delta": 1.0},
    ],
)
def test_a_cap_that_nobody_would_check_is_refused(study: Study, changes: dict[str, Any]) -> None:
    with pytest.raises(MedfedError, match="nobody would check it"):
        medfed.simulate(study._with({"robustness.cap": 0.1, **changes}))


def test_what_no_cap_bears_is_refused_before_the_start(study: Study) -> None:
    """Few steps, or noise as long as rows: the reason is said, and one's own cap is let through."""
    with pytest.raises(
        MedfedError, match=r"max_malicious=0\.4 is not borne.*raise training.rounds"
    ):
        medfed.simulate(study._with({**WARY, "robustness.max_malicious": 0.4}))
    loud = {"training.learning_rate": 1e5, "privacy.epsilon": 0.1, "robustness.max_malicious": 0.4}
    with pytest.raises(MedfedError, match=r"is not borne.*noise on a mean row is as long"):
        medfed.simulate(study._with({**WARY, **loud}))
    assert medfed.simulate(study._with({**WARY, "robustness.cap": 0.5})).complete
    few = study._with({**WARY, "robustness.max_malicious": 0.4})
    chosen = dataclasses.replace(few, chosen={"training.rounds": "by the recipe"})
    with pytest.raises(PlanError, match=r"is not borne.*at this epsilon"):
        row_limits.check(chosen, guarantee_of(chosen), 1)


def test_liars_who_may_hold_half_of_a_rounds_length_are_refused(study: Study) -> None:
    """Three of 20,000 patients among seven of 60: a length that small sites cannot reach."""
    names = {f"site {k}": 20_000 if k < 3 else 60 for k in range(10)}
    wary = study._with(
        {**WARY, "robustness.cap": 0.05, "privacy.sizes": names, "privacy.delta": 1e-6}
    )
    guarantee = resolve(wary, names, 8)
    assert row_limits.hold_by_liars(wary, guarantee, 3) == pytest.approx(0.68, abs=0.01)
    with pytest.raises(PlanError, match="hold 68% of the length"):
        row_limits.check(wary, guarantee, 3)
    row_limits.check(wary.set("robustness.cap", 0.005), guarantee, 3)


def test_a_round_of_few_sites_is_judged_by_itself(study: Study) -> None:
    """Three liars of the ten that a round draws are three of ten, however many there are."""
    names = {f"site {k}": 200 for k in range(50)}
    slow = {**WARY, "privacy.sizes": names, "privacy.delta": 1e-6}
    slow |= {"training.learning_rate": 5.0, "training.rounds": 100}
    wary = study._with(slow)
    for settings_, liars in (({}, 15), ({"fleet.clients_per_round": 10}, 3)):
        drawn = wary._with(settings_)
        with pytest.raises(PlanError, match="is not borne"):
            row_limits.check(drawn, resolve(drawn, names, 8), liars)


def test_a_clipping_norm_that_adapts_leaves_liars_room_and_is_refused(study: Study) -> None:
    for held in ({"robustness.cap": 0.1}, {"robustness.rule": "auto"}):
        adapting = {**held, "privacy.clipping": "adaptive", "training.learning_rate": 100.0}
        with pytest.raises(MedfedError, match="do not compose: the count beside the gradient"):
            medfed.simulate(study._with(adapting))


def test_rows_that_are_not_compared_exactly_are_held_to_no_length_of_their_own() -> None:
    SharingTerms(10, 2900 / GRID, THREE).check(apart=True)
    with pytest.raises(PlanError, match="a smaller robustness"):
        SharingTerms(10, 3000 / GRID, THREE).check(apart=True)


def test_a_plan_says_how_far_liars_move_a_round(study: Study) -> None:
    sites = runs.open_sites(study.set("robustness.cap", 0.25), None)
    plan = prepare(sites[0].study, InProcess(sites), [site.name for site in sites])
    assert bears(plan) == (
        "1 of 3 hold at most 33% of the length that a round's rows may have (robustness.cap=0.25)"
    )


# who holds to it ----------------------------------------------------------------------------------


def test_a_small_site_may_not_send_what_a_large_one_may() -> None:
    """Before, every row was held to the largest site's length: a liar of 40 patients counted as
    one of 500.
    """
    x_KM = np.array([[400, 0], [0, 30], [300, 300]])
    terms = SharingTerms(2, 500.0, THREE, bounds={"a": 500.0, "b": 40.0, "c": 40.0})
    found = open_rows(x_KM, terms=terms)
    assert found.gram_KK is not None and found.accepted == ["a", "b"]
    assert "out of bound" in found.excluded["c"]
    assert np.array_equal(found.gram_KK, x_KM[:2] @ x_KM[:2].T)


def test_every_party_holds_a_site_to_the_same(study: Study) -> None:
    """The longest row that a site sends is the longest that aggregators let pass."""
    for share in (1.0, 0.05):
        capped = study.set("robustness.cap", share)
        sites = runs.open_sites(capped, None)
        plan = prepare(sites[0].study, InProcess(sites), [site.name for site in sites])
        terms = agreed.terms_of(plan)
        assert plan.guarantee is not None
        sizes = {name: release.size for name, release in plan.guarantee.releases.items()}
        for name, size in sizes.items():
            longest = size if share == 1 else share * 64
            assert terms.bound_of(name) * GRID == pytest.approx(longest, rel=0.003)
            assert terms.bound_of(name) * GRID > longest
        assert terms.bound == max(terms.bounds.values())


def test_a_small_site_is_let_no_longer_a_row_than_its_patients(study: Study) -> None:
    limits = row_limits.row_limits(study.set("robustness.cap", 0.9), guarantee_of(study))
    assert limits == {"north": pytest.approx(57.6), "south": pytest.approx(57.6), "east": 38}


def test_a_site_cuts_its_sum_whatever_its_patients_say(study: Study) -> None:
    """All clinics' rows are as long as is let pass, where patients agree; none is left out."""
    sent: list[torch.Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        send = work._send_rows

        def listen(sites: Any, header: Any, message_KM: Any, *more: Any) -> Any:
            if len(sites) == 3:  # no rehearsal
                sent.append(message_KM)
            return send(sites, header, message_KM, *more)

        patch.setattr(work, "_send_rows", listen)
        result = medfed.simulate(study._with({"robustness.cap": 0.01, "training.rounds": 2}))
    assert result.complete and not result.summary["excluded"]
    assert len(sent) == 2
    for row_KM in sent:
        assert row_KM.norm(dim=1).tolist() == pytest.approx([0.64] * 3, rel=1e-6)


# what it costs, and what it takes from liars ------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_one_patient_moves_the_products_of_unequal_rows_no_more_than_is_said(
    K: int, M: int, seed: int
) -> None:
    """s sqrt(sum B_j^2 + 3 max B_k^2), whichever row it is in."""
    rng = np.random.default_rng(seed)
    bound_K = rng.uniform(0.1, 2, K)
    x_KM = rng.normal(size=(K, M))
    x_KM *= (bound_K * rng.uniform(0.5, 1, K) / np.linalg.norm(x_KM, axis=1))[:, None]
    k = rng.integers(K)
    step_M = rng.normal(size=M)
    moved_KM = x_KM.copy()
    moved_KM[k] += 0.1 * step_M / np.linalg.norm(step_M)
    moved_KM[k] *= min(1, bound_K[k] / np.linalg.norm(moved_KM[k]))
    s = np.linalg.norm(moved_KM[k] - x_KM[k])
    upper = np.triu_indices(K)
    change = np.linalg.norm((moved_KM @ moved_KM.T - x_KM @ x_KM.T)[upper])
    said = s * math.sqrt(np.square(bound_K).sum() + 3 * np.square(bound_K).max())
    assert change <= said + 1e-12


def test_noise_on_products_is_for_the_longest_rows_that_may_come(study: Study) -> None:
    """Also where fewer rows are left, or one that no bound is known of."""
    guarantee = guarantee_of(study)
    terms = SharingTerms(8, 5.0, THREE, bounds={"a": 1.0, "b": 5.0, "c": 2.0})
    products, _ = agreed.gram_split(guarantee, terms)
    unit = guarantee.sigma_units() / math.sqrt(GRAM_SHARE)
    assert products(2) == pytest.approx(unit * math.sqrt(25 + 4 + 75))
    assert products(3) == pytest.approx(unit * math.sqrt(25 + 4 + 1 + 75))
    assert products(4) == pytest.approx(unit * math.sqrt(25 + 4 + 1 + 25 + 75))


SITES = 20


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Twenty clinics of 30 to 220 patients at epsilon 3, of which six lie."""
    rng = np.random.default_rng(5)
    frame = invented(2400)
    shares = np.exp(rng.uniform(math.log(30), math.log(220), SITES))
    frame["hospital"] = rng.choice(
        [f"clinic {k:02d}" for k in range(SITES)], len(frame), p=shares / shares.sum()
    )
    counts = frame.drop_duplicates("subject")["hospital"].value_counts()
    sizes = {name: round(0.8 * n) for name, n in sorted(counts.items())}
    written = write_study(tmp_path_factory.mktemp("network"), PRIVATE, frame)
    return medfed.load_study(written)._with(
        {
            "privacy.sizes": sizes,
            "privacy.epsilon": 3.0,
            "privacy.delta": 1e-6,
            "security.aggregation": "three-party",
            "training.rounds": 30,
            "training.algorithm": "fedavgm",
            "training.learning_rate": 3.0,
            "monitor.evaluate_every": 30,
            **WARY,
        }
    )


def auroc(study: Study, **changes: Any) -> float:
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    result = medfed.simulate(study._with(changes))
    assert result.complete
    return float(result.summary["test"]["auroc"])


@pytest.fixture(scope="module")
def honest(network: Study) -> float:
    return auroc(network)


@pytest.mark.slow
@pytest.mark.parametrize("attack", ["sign-flip", "ipm-large", "min-max"])
def test_a_capped_mean_bears_what_turns_the_mean(
    network: Study, honest: float, attack: str
) -> None:
    """Under epsilon and in secret, with liars that use all that is let pass."""
    lying = {"robustness__attack": attack, "robustness__malicious": 0.3}
    assert auroc(network, **lying) > honest - 0.05
    if attack == "sign-flip":
        bare = {"robustness__rule": "mean", "robustness__max_malicious": 0.0}
        assert auroc(network, **lying, **bare) < honest - 0.2
