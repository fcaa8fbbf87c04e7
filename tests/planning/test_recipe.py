"""The recipe: what a claim chooses where the study leaves it open, from public facts alone."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import medfed
from medfed import runs
from medfed.planning import recipe
from medfed.planning.foretell import foretell
from medfed.privacy import guarantee as guarantees
from medfed.study import Feature, Study, from_tables

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from foreign import made_up


def declared(
    inputs: int = 8, sizes: tuple[int, ...] = (300, 200), epsilon: float = 1.0, **tables: object
) -> Study:
    """Return a study of which only epsilon and public facts are written down; its table does not
    exist.
    """
    dictionary = {f"x{j}": {"range": [0, 1]} for j in range(inputs)} | {
        "y": {"categories": ["no", "yes"]}
    }
    data = {
        "table": "nowhere.csv",
        "target": "y",
        "site": "site",
        "test_is_public": True,
        "dictionary": dictionary,
    }
    privacy = {
        "epsilon": epsilon,
        "scope": "run",
        "sizes": {f"site {k}": n for k, n in enumerate(sizes)},
    }
    written = {"study": {"name": "open"}, "data": data, "privacy": privacy}
    for name, table in tables.items():
        written[name] = {**written.get(name, {}), **table}  # type: ignore[dict-item]

    return from_tables(written)


OPEN = {
    *("privacy.delta", "privacy.noise", "privacy.clip", "privacy.clipping"),
    *("training.algorithm", "training.rounds", "training.batch_size", "training.learning_rate"),
    *("training.server_momentum", "training.average", "data.preprocess", "monitor.evaluate_every"),
}


def test_epsilon_alone_chooses_every_key_and_says_why() -> None:
    """No record is at hand: the table does not exist."""
    study = recipe.settle(declared())
    assert set(study.chosen) == OPEN
    assert all(len(why) > 10 for why in study.chosen.values())
    assert study.privacy.delta == 1e-6 and study.data.preprocess == "dictionary"
    assert study.training.batch_size == 0 and study.training.rounds == recipe.ROUNDS
    guarantees.resolve(study, study.privacy.sizes, 9)  # and it is a plan that can be kept


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("privacy.delta", 1e-7),
        ("training.rounds", 12),
        ("training.batch_size", 64),
        ("training.algorithm", "fedavg"),
        ("training.learning_rate", 0.3),
        ("training.server_momentum", 0.5),
        ("training.average", 0.0),
        ("privacy.clip", 2.0),
        ("privacy.clipping", "automatic"),
        ("privacy.noise", "site"),
        ("monitor.evaluate_every", 3),
    ],
)
def test_what_is_written_down_stays(key: str, value: object) -> None:
    study = recipe.settle(declared().set(key, value))
    assert study.value(key) == value and key not in study.chosen


def test_a_test_that_nothing_can_pay_for_is_chosen_by_nobody() -> None:
    """Three labels: the refusal is of the test, not of an epsilon that the user never set."""
    labels = {"categories": ["a", "b", "c"]}
    dictionary = {"x0": {"range": [0, 1]}, "y": labels}
    study = declared(data={"test_is_public": False, "dictionary": dictionary})
    assert "privacy.evaluation_epsilon" not in recipe.settle(study).chosen
    two = declared(
        data={
            "test_is_public": False,
            "dictionary": {**dictionary, "y": {"categories": ["a", "b"]}},
        }
    )
    assert "privacy.evaluation_epsilon" in recipe.settle(two).chosen


def test_settling_is_idempotent_and_survives_the_frozen_file() -> None:
    once = recipe.settle(declared())
    assert recipe.settle(once) == once
    frozen = from_tables(once.tables())
    assert recipe.settle(frozen) == once and frozen.digest() == once.digest()
    assert once.as_written() == declared()
    assert recipe.settle(once.as_written().set("privacy.epsilon", 3.0)) == recipe.settle(
        declared(epsilon=3.0)
    )


def test_without_a_claim_nothing_is_chosen() -> None:
    study = from_tables({"data": {"table": "nowhere.csv", "target": "y"}})
    assert recipe.settle(study) is study
    assert recipe.settle(Study()) == Study()


def path(study: Study) -> float:
    """Return the training time in steps of the largest rate, worked out from what was chosen."""
    t = study.training
    inputs = len(recipe.declared_encoding(study).names())
    R = recipe.reach(nn.Linear(inputs, 1), recipe.declared_encoding(study))
    return t.learning_rate * 0.25 * R**2 * t.rounds / (1 - t.server_momentum)


def test_more_signal_trains_longer_and_more_noise_shorter() -> None:
    base = declared(sizes=(300, 200))
    more = declared(sizes=(3000, 2000))
    paths = [
        path(recipe.settle(study))
        for study in (declared(epsilon=0.1), base, declared(epsilon=3.0), more)
    ]
    assert paths == sorted(paths) and paths[0] < paths[-1] / 10
    assert path(recipe.settle(declared(inputs=80))) < path(recipe.settle(base))
    assert path(recipe.settle(declared(epsilon=0.001))) >= recipe.SHORTEST * 0.98
    assert path(recipe.settle(declared(sizes=(10**6, 10**6)))) <= recipe.LONGEST * 1.02


@pytest.mark.parametrize("inputs", [1, 8, 189])
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 8.0, 20.0])
@pytest.mark.parametrize("n", [30, 1000, 100_000])
def test_the_rate_is_never_above_what_the_curvature_bears(
    inputs: int, epsilon: float, n: int
) -> None:
    """Momentum's own bound, eta L < 2 (1 + beta), is not touched: L <= h R^2 on such rows."""
    study = recipe.settle(declared(inputs, (n, n), epsilon))
    R = recipe.reach(nn.Linear(inputs, 1), recipe.declared_encoding(study))
    assert 0 < study.training.learning_rate <= 1.01 / (0.25 * R**2)
    assert 0 <= study.training.server_momentum <= recipe.MOST_MOMENTUM
    assert R / 4 * 0.99 <= study.privacy.clip <= R * 1.01


def test_reach_of_a_linear_model_is_the_norm_of_its_input() -> None:
    encoding = recipe.declared_encoding(recipe.settle(declared()))
    rows = encoding.invent_rows(64)
    expected = math.sqrt(float((rows.square().sum(1) + 1).mean()))
    assert recipe.reach(nn.Linear(8, 1), encoding) == pytest.approx(expected, rel=1e-6)
    assert recipe.reach(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), encoding) > 0


def test_rho_is_the_signal_of_the_whole_runs_budget_in_one_sum() -> None:
    study = recipe.settle(declared())
    facts = recipe.facts(study, recipe.declared_encoding(study), dict(study.privacy.sizes))
    one = study.set("training.rounds", 1)
    g = guarantees.resolve(one, study.privacy.sizes, 9)
    assert facts.rho == pytest.approx(g.signal_to_noise("site 0"), rel=1e-3)
    three = study.set("security.aggregation", "three-party").set(
        "privacy.sizes", {"a": 200, "b": 200, "c": 100}
    )
    shared = recipe.facts(three, recipe.declared_encoding(study), dict(three.privacy.sizes))
    assert shared.rho == pytest.approx(facts.rho / math.sqrt(1.5), rel=1e-3)


def test_a_small_site_sets_no_other_sites_noise() -> None:
    """Under joint noise a batch is drawn with one probability everywhere: three patients more cost
    nothing.
    """
    study = (
        declared(sizes=(1000, 1000))
        .set("training.batch_size", 32)
        .set("training.learning_rate", 0.1)
    )
    study = recipe.settle(study)
    alone = guarantees.resolve(study, {"a": 1000, "b": 1000}, 9)
    beside = guarantees.resolve(study, {"a": 1000, "b": 1000, "tiny": 3}, 9)
    assert beside.signal_to_noise("a") >= alone.signal_to_noise("a")
    assert {release.probability for release in beside.releases.values()} == {32 / (2003 / 3)}
    site = guarantees.resolve(
        study.set("privacy.noise", "site"), {"a": 1000, "tiny": 3}, 9
    ).releases
    # each noises by itself
    assert site["a"].probability == 32 / 1000 and site["tiny"].probability == 1


@pytest.mark.parametrize("noise", ["shared", "site"])
@pytest.mark.parametrize("aggregation", ["plain", "masked"])
def test_a_group_without_sites_is_told_and_nothing_reckoned_for_it(
    noise: str, aggregation: str
) -> None:
    """Four sites in ten groups: a round of an empty one would have no noise to divide by."""
    fleet = {"schedule": "cyclic", "groups": 10}
    own = {"noise": noise}
    study = declared(
        sizes=(50, 60, 70, 80), fleet=fleet, privacy=own, security={"aggregation": aggregation}
    )
    study = recipe.settle(study)
    assert "training.learning_rate" not in study.chosen
    with pytest.raises(medfed.PlanError, match="nobody falls into group"):
        recipe.facts(study, recipe.declared_encoding(study), dict(study.privacy.sizes))


@pytest.mark.parametrize("noise", ["shared", "site"])
def test_a_foreign_table_learns_with_three_lines(noise: str, tmp_path: Path) -> None:
    foreign = made_up(2500, 14, sites=3, prevalence=0.35, seed=11)
    tables = foreign.tables(tmp_path / "own.csv")
    claim = {"epsilon": 3.0, "noise": noise, "scope": "run", "sizes": foreign.sizes()}
    plain = medfed.simulate(from_tables({**tables, "monitor": {"baselines": False}}))
    private = medfed.simulate(
        from_tables({**tables, "privacy": claim, "monitor": {"baselines": False}})
    )
    # nothing is left unspent
    assert private.summary["privacy"]["epsilon"] == pytest.approx(3.0, abs=0.01)
    assert private.summary["test"]["auroc"] > plain.summary["test"]["auroc"] - 0.05 > 0.65


def test_a_resumed_run_keeps_what_was_chosen(tmp_path: Path) -> None:
    foreign = made_up(300, 5, sites=2, prevalence=0.5, seed=12)
    tables = foreign.tables(tmp_path / "own.csv")
    claim = {"epsilon": 3.0, "scope": "run", "sizes": foreign.sizes()}
    study = from_tables(
        {**tables, "privacy": claim, "training": {"rounds": 3}, "monitor": {"baselines": False}}
    )
    run = medfed.run(study, tmp_path / "run")
    read, _ = runs.read_plan(tmp_path / "run")
    assert read.chosen == run.study.chosen and read.digest() == run.study.digest()
    assert (
        run.summary["chosen"]["training.learning_rate"]["value"] == run.study.training.learning_rate
    )


def test_foretold_losses_grow_as_epsilon_falls_and_hold_a_table_of_that_shape(
    tmp_path: Path,
) -> None:
    foreign = made_up(2500, 14, sites=3, prevalence=0.35, seed=13)
    claim = {"epsilon": 1.0, "scope": "run", "sizes": foreign.sizes()}
    study = from_tables(
        {**foreign.tables(tmp_path / "own.csv"), "privacy": claim, "monitor": {"baselines": False}}
    )
    sites = runs.open_sites(study, None)
    _, plan = runs.prepare_sites(sites[0].study, sites)
    told = foretell(plan, (8.0, 0.1))
    assert [one.epsilon for one in told] == [8.0, 1.0, 0.1]
    assert told[0].loss < told[1].loss < told[2].loss and all(
        one.low <= one.loss <= one.high for one in told
    )
    plain = dataclasses.replace(study, privacy=type(study.privacy)())

    lost = (
        medfed.simulate(plain).summary["test"]["auroc"]
        - medfed.simulate(study).summary["test"]["auroc"]
    )
    assert lost < told[1].high + 0.03  # three standard errors of 500 test patients, paired


def test_a_regression_and_a_small_table_get_a_plan_too() -> None:
    study = declared(data={"task": "regression"})
    entries = {**study.data.dictionary, "y": Feature(range=(0.0, 30.0))}
    study = dataclasses.replace(study, data=dataclasses.replace(study.data, dictionary=entries))
    settled = recipe.settle(study)
    # h is 8 times larger
    assert settled.training.learning_rate < recipe.settle(declared()).training.learning_rate / 4
    assert torch.isfinite(torch.tensor(settled.privacy.clip))
