"""Under a claim sites vote on whether their own models do better: a noised bit a site, which its
patients pay for.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import BudgetError, PlanError, SiteError, StudyError
from medfed.core.flat import vector
from medfed.monitor import events, verdict
from medfed.monitor.metrics import Figure
from medfed.node import own_model, queries, rehearse
from medfed.node import site as sites_
from medfed.node.site import Site, handle_many
from medfed.planning import recipe
from medfed.planning.building import build_model
from medfed.privacy import guarantee
from medfed.privacy.claim_refusals import vote_tells
from medfed.privacy.ledger import Ledger
from medfed.privacy.site_ledger import SiteLedger
from medfed.rounds.prepare import enrol
from medfed.runs import drive, simulation
from medfed.study import Study
from tests.tables import STUDY, write_study
from tests.test_private_runs import Crash, charges, claim_of, own_ledger

pytestmark = pytest.mark.usefixtures("one_thread")

MANY = 40
"""Sites: as many as epsilon 8 lets a vote be told by."""

VOTING = """
[study]
name = "voting"
seed = 3
[data]
table = "cohort.csv"
target = "died"
site = "hospital"
patient = "subject"
preprocess = "dictionary"
test_is_public = true
[data.dictionary.a]
range = [-3, 3]
[data.dictionary.b]
range = [-3, 3]
[data.dictionary.c]
range = [-3, 3]
[data.dictionary.d]
range = [-3, 3]
[data.dictionary.e]
range = [-3, 3]
[data.dictionary.died]
categories = ["no", "yes"]
[training]
rounds = 4
batch_size = 0
learning_rate = 1.0
[privacy]
epsilon = 8.0
delta = 1e-6
vote_epsilon = 2.0
scope = "run"
[monitor]
evaluate_every = 4
baselines = false
"""


def table(opposed: bool, sites: int = MANY, patients: int = 30) -> pd.DataFrame:
    """Five measurements, of which two mean the same at all sites or, `opposed`, the opposite at
    every other one.
    """
    rng = np.random.default_rng(5)
    site = np.arange(sites * patients) % sites
    x = rng.uniform(-3, 3, (len(site), 5)).round(3)
    sign = np.where(opposed & (site % 2 == 1), -1, 1)
    dies = rng.random(len(site)) < 1 / (1 + np.exp(-2 * sign * x[:, :2].sum(1)))
    return pd.DataFrame(
        {
            **dict(zip("abcde", x.T, strict=True)),
            "hospital": [f"clinic {k:03d}" for k in site],
            "subject": [f"p{i}" for i in range(len(site))],
            "died": np.where(dies, "yes", "no"),
        }
    )


def load(folder: Path, opposed: bool = False, patients: int = 30, **changes: Any) -> Study:
    frame = table(opposed, patients=patients)
    study = medfed.load_study(write_study(folder, VOTING, frame))
    study = study.set(
        "privacy.sizes", dict.fromkeys(sorted(set(frame["hospital"])), round(0.8 * patients))
    )
    return study._with({key.replace("__", "."): value for key, value in changes.items()})


def opened(study: Study) -> tuple[list[Site], Any]:
    """Return the sites of a study, their patients enrolled, and a model to vote on."""
    sites = runs.open_sites(study, None)
    fleet, plan = runs.prepare_sites(sites[0].study, sites)
    enrol(plan, fleet, "run")
    return sites, vector(sites[0].model)


def ask(sites: Iterable[Site], w_P: torch.Tensor) -> list[float | str]:
    """Return each site's vote, or the words of its refusal."""
    answers = handle_many(list(sites), "vote", codec.encode({"round": 4}, {"w": w_P}))
    return [
        str(answer) if isinstance(answer, SiteError) else float(codec.decode(answer)[1]["vote"])
        for answer in answers
    ]


@pytest.fixture(scope="module")
def own_once() -> Callable[..., torch.Tensor]:
    """`train_own` that trains on the same rows once a module: where it matters who lies, and all else
    is the same.
    """
    found = dict[bytes, torch.Tensor]()

    def train(name: str, rows: Any, encoding: Any, study: Study) -> torch.Tensor:
        key = rows.x.numpy().tobytes() + rows.y.numpy().tobytes() + study.digest().encode()
        if key not in found:
            found[key] = own_model.train_own(name, rows, encoding, study)
        return found[key]

    return train


@pytest.fixture(scope="module")
def voted(
    tmp_path_factory: pytest.TempPathFactory, own_once: Callable[..., torch.Tensor]
) -> tuple[Path, dict[str, Any]]:
    """The folder of a run that votes, and its summary."""
    folder = tmp_path_factory.mktemp("voted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queries, "train_own", own_once)
        return folder / "run", medfed.run(load(folder), folder / "run").summary


@pytest.fixture(scope="module")
def honest(
    tmp_path_factory: pytest.TempPathFactory, own_once: Callable[..., torch.Tensor]
) -> float:
    """Votes for own models where nobody lies, and nothing is noised."""
    folder = tmp_path_factory.mktemp("honest")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guarantee, "query_noise", lambda *_: np.zeros(1))
        patch.setattr(queries, "train_own", own_once)
        summary = medfed.run(load(folder), folder / "run").summary
    own_better: float = summary["vote"]["own_better"]
    return own_better


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Own models that are trained at once: where it matters who pays, and not what is voted."""
    monkeypatch.setattr(
        queries,
        "train_own",
        lambda _name, _rows, encoding, study: vector(build_model(study, encoding)),
    )


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[float | str]:
    """The votes of opposed sites that are asked together."""
    sites, w_P = opened(load(tmp_path_factory.mktemp("opposed"), opposed=True))
    return ask(sites, w_P)


# what is told -------------------------------------------------------------------------------------


def test_the_vote_says_when_own_models_are_better_and_is_silent_when_they_are_not(
    tmp_path: Path,
) -> None:
    """The intervals lie five deviations of the noise from a half, so that none in a million fails."""
    opposed = load(tmp_path, opposed=True, patients=60, privacy__vote_epsilon=6.0)
    summary = medfed.run(opposed, tmp_path / "opposed").summary
    found = next(one for one in summary["findings"] if one["code"] == "own-better-by-vote")
    assert found["level"] == "warning" and f"of {MANY} votes" in found["text"]
    assert summary["vote"]["sites"] == MANY and summary["vote"]["own_better"] > MANY / 2

    alike = load(tmp_path, training__rounds=60, data__test_fraction=0.6, privacy__vote_epsilon=6.0)
    alike = alike.set("privacy.sizes", dict.fromkeys(alike.privacy.sizes, 12))
    summary = medfed.run(alike, tmp_path / "alike").summary
    assert summary["vote"]["interval"][1] < MANY / 2
    told = {one["code"] for one in summary["findings"]}
    assert "federated-better-by-vote" in told and not told & {
        "own-better-by-vote",
        "vote-open",
        "not-compared",
    }


@pytest.mark.parametrize(
    ("interval", "code"),
    [
        ([60, 90], "own-better-by-vote"),
        ([40, 70], "vote-open"),
        ([10, 49], "federated-better-by-vote"),
    ],
)
def test_a_vote_is_told_by_its_interval(
    voted: tuple[Path, dict[str, Any]], interval: list[float], code: str
) -> None:
    summary = dict(voted[1])
    summary["vote"] = {"sites": 100, "own_better": sum(interval) / 2, "interval": interval}
    told = {one["code"] for one in verdict.findings(summary)}
    assert told & {
        "own-better-by-vote",
        "federated-better-by-vote",
        "vote-open",
        "not-compared",
    } == {code}


def test_the_noise_of_a_vote_has_the_spread_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = load(tmp_path)
    sites, _ = opened(study)
    found = sites[0].guarantee
    assert found
    draws = guarantee.query_noise(found, "vote", 1.0, 4000, 0)
    sd = found.query_sd("vote", 1.0)
    assert sd == pytest.approx(guarantee.vote_noise(study, 2.0, MANY), rel=1e-3)
    assert abs(draws.mean()) < 4 * sd / math.sqrt(4000)
    assert abs(draws.std() / sd - 1) < 4 / math.sqrt(2 * 4000)


def test_where_nobody_sees_a_sites_counts_each_site_noises_its_own_vote(
    tmp_path: Path, together: list[float | str]
) -> None:
    """Plain, whoever adds up sees bits and noises their sum; else a bit alone must say nothing."""
    bare = together
    assert all(0 <= vote <= 1 for vote in bare) and len(set(bare)) < MANY  # type: ignore[operator]
    alone = load(tmp_path, privacy__noise="site", privacy__vote_epsilon=4.0)
    sites, w_P = opened(alone)
    told = ask(sites, w_P)
    assert len(set(told)) == MANY and not set(told) & set(bare)


# what a site's own model is -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training.learning_rate": 0.0},
        {"training.optimizer": "adam", "training.learning_rate": 0.01},
        {"model.name": "mlp", "training.local_epochs": 3},
        {"training.learning_rate": 0.0, "data.preprocess": "standard", "training.rounds": 12},
        {"data.task": "regression", "data.target": "age"},
    ],
)
def test_a_sites_own_model_is_the_baseline_of_a_federation_of_that_site_alone(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    """The plain twin: rounds of the algorithm `local` through the engine."""
    study = medfed.load_study(write_study(tmp_path, STUDY))._with({"training.rounds": 5, **changes})
    sites = runs.open_sites(study, None)
    _, plan = runs.prepare_sites(study, sites)
    for one in sites:
        fleet, alone = runs.baseline_plan("local", study, [one], plan.encoding)
        server = simulation._train_in_silence(alone, fleet)
        node = fleet.site(one.name)
        own_P = own_model.train_own(one.name, node.train, node.encoding, study)
        torch.testing.assert_close(own_P, server.w_P + node.memory["offset"], rtol=1e-5, atol=1e-6)


def test_under_a_claim_a_sites_own_model_is_trained_until_that_helps_no_more(
    tmp_path: Path,
) -> None:
    """The recipe's rounds are for noised sums, and the defaults are too few: both made own models
    look bad.
    """
    rng = np.random.default_rng(1)
    frame = table(False, sites=1, patients=400)
    rare = frame.assign(
        died=np.where(rng.random(400) < 1 / (1 + np.exp(4 - frame["a"] - frame["b"])), "yes", "no")
    )
    study = medfed.load_study(write_study(tmp_path, VOTING, rare))
    study = study._with({"privacy.sizes": {"clinic 000": 320}, "privacy.vote_epsilon": 0.0})
    (one,), _ = opened(study)
    own_P = own_model.train_own(one.name, one.train, one.encoding, one.study)
    best = LogisticRegression().fit(one.train.x, one.train.y).predict_proba(one.test.x)[:, 1]
    least = float(np.square(best - one.test.y.numpy()).mean())
    target = one.encoding.target

    own = float(
        own_model.squared_error(
            target.task, own_model.outputs(one.model, own_P, one.test.x), one.test.y
        ).mean()
    )
    assert own < 1.1 * least
    few = one.train.at(torch.arange(2))
    assert torch.isfinite(own_model.train_own(one.name, few, one.encoding, one.study)).all()


def test_many_small_gains_do_not_outvote_few_large_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The attack: 3 in a hundred die, most sites hold out no death, and who says less
    wins there.
    """
    sites, w_P = opened(load(tmp_path))
    less = dict.fromkeys([one.name for one in sites], 0.002) | dict.fromkeys(
        [one.name for one in sites[::5]], -0.1
    )
    ballots = {}
    for one in sites:
        monkeypatch.setattr(queries, "train_own", lambda *_: w_P)
        monkeypatch.setattr(
            queries, "errs_less", lambda *_, name=one.name: torch.full((3,), less[name])
        )
        ballots[one.name] = ask([one], w_P)[0]
    assert sum(vote > 0.5 for vote in ballots.values()) == 32  # type: ignore[operator,misc]
    assert sum(ballots.values()) < MANY / 2  # type: ignore[arg-type]


@pytest.mark.parametrize("answer", [1e6, -1e6, math.nan, [1.0, 1.0], None])
def test_a_liar_counts_for_one_vote_at_most_and_breaks_no_run(
    tmp_path: Path,
    answer: Any,
    monkeypatch: pytest.MonkeyPatch,
    honest: float,
    own_once: Callable[..., torch.Tensor],
) -> None:
    """The attack: a million votes, no number, two, none; the run ended without its claim, though
    all had paid.
    """
    real = queries.vote

    def lie(sites: Any, header: Any, tensors: Any) -> list[Any]:
        answers = real(sites, header, tensors)
        if answer is None:
            told = {}
        else:
            told = {"vote": torch.tensor(answer, dtype=torch.float64).reshape(-1)}
        return [codec.encode({}, told), *answers[1:]]

    monkeypatch.setitem(sites_.OPS, "vote", lie)
    monkeypatch.setattr(queries, "train_own", own_once)
    monkeypatch.setattr(guarantee, "query_noise", lambda *_: np.zeros(1))
    result = medfed.run(load(tmp_path), tmp_path / "run")
    assert claim_of(tmp_path / "run")["vote"]["released"] == 1
    if isinstance(answer, float) and math.isfinite(answer):
        assert result.complete and 0 <= result.summary["vote"]["own_better"] <= MANY
        assert abs(honest - result.summary["vote"]["own_better"]) < MANY / 4
    else:
        assert result.summary["vote"]["sites"] == MANY - 1 and not result.complete
        assert "did not vote on own models" in result.summary["excluded"][0]["reason"]


def test_a_vote_follows_from_the_sites_own_records_alone(
    tmp_path: Path, together: list[float | str]
) -> None:
    """A neighbour at one site must not move another site's bit, not by rounding either: each trains
    by itself.
    """
    sites, w_P = opened(load(tmp_path, opposed=True, study__name="again"))
    assert together == [ask([one], w_P)[0] for one in sites]
    assert 0 < sum(together) < MANY + 1  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["raises", "diverges", "no test", "strange model"])
def test_a_site_that_cannot_tell_votes_neither_way_and_says_nothing(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error would tell of the patient who causes it."""
    sites, w_P = opened(load(tmp_path))
    if fault == "raises":
        monkeypatch.setattr(
            queries, "train_own", lambda *_: (_ for _ in ()).throw(ValueError("patient p7"))
        )
    if fault == "diverges":
        monkeypatch.setattr(queries, "train_own", lambda *_: torch.full_like(w_P, math.nan))
    if fault == "no test":
        for one in sites:
            one.test = one.test.at(torch.zeros(0, dtype=torch.int64))
    if fault == "strange model":
        w_P = torch.full_like(w_P, math.inf)
    assert set(ask(sites[:8], w_P)) == {0.5}


def test_a_module_that_trains_only_with_noise_is_found_before_anybody_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sites would vote no, and their patients would have paid for it."""
    monkeypatch.setattr(
        rehearse, "train_own", lambda *_: (_ for _ in ()).throw(RuntimeError("no backward pass"))
    )
    with pytest.raises(
        PlanError, match=r"(?s)stage own model.*no backward pass.*leave privacy.vote_epsilon out"
    ):
        medfed.run(load(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# who pays -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("short")
def test_the_vote_is_paid_within_the_run(
    tmp_path: Path, voted: tuple[Path, dict[str, Any]]
) -> None:
    folder, summary = voted
    assert charges(own_ledger(folder), "vote") == dict.fromkeys(summary["sites"], 1)
    claim = claim_of(folder)
    assert claim["vote"]["released"] == 1 and claim["vote"]["paid_by"] == "training patients"
    assert 0.999 * 8 < claim["epsilon"] <= 8
    assert claim["composition"]["ledger"]["epsilon_all_runs"] == pytest.approx(
        claim["epsilon"], rel=1e-3
    )
    assert claim["second_accountant"]["epsilon"] == pytest.approx(claim["epsilon"], rel=1e-2)
    plain = medfed.run(load(tmp_path, privacy__vote_epsilon=0.0), tmp_path / "plain")
    assert claim_of(tmp_path / "plain")["vote"] is None
    before, with_vote = (one["privacy"]["noise_multiplier"] for one in (plain.summary, summary))
    assert 1.02 < with_vote / before < 1.06  # what training pays for it


@pytest.mark.usefixtures("short")
def test_held_out_patients_pay_too_unless_they_are_public(tmp_path: Path) -> None:
    study = load(tmp_path, data__test_is_public=False, privacy__evaluation_epsilon=2.0)
    result = medfed.run(study, tmp_path / "run")
    names = result.summary["sites"]
    held_out = {f"{name} (test)": 1 for name in names}
    assert charges(own_ledger(tmp_path / "run"), "vote") == dict.fromkeys(names, 1) | held_out
    assert charges(own_ledger(tmp_path / "run"), "test") == held_out
    assert result.summary["vote"]["sites"] == MANY
    assert "held-out" in claim_of(tmp_path / "run")["vote"]["paid_by"]
    with Ledger.open(own_ledger(tmp_path / "run"), read_only=True) as book:
        assert book.worst(1e-6) <= 8


@pytest.mark.usefixtures("short")
def test_held_out_patients_who_cannot_pay_keep_their_site_from_voting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites, w_P = opened(load(tmp_path, data__test_is_public=False, privacy__evaluation_epsilon=2.0))
    account = sites[0].account
    assert isinstance(account, SiteLedger)
    real = account.pay_query_held_out
    account.pay_query_held_out = lambda label, asked: (
        real(  # type: ignore[method-assign]
            label, {site: ids for site, ids in asked.items() if site != sites[0].name}
        )
        | {sites[0].name: BudgetError("for once")}
    )
    told = ask(sites, w_P)
    assert told[0] == "for once" and all(isinstance(vote, float) for vote in told[1:])


@pytest.mark.usefixtures("short")
def test_a_coordinator_that_asks_again_is_refused(tmp_path: Path) -> None:
    """Each answer is a release, and each kind is planned once: the room of the rounds to come is
    not for more.
    """
    sites, w_P = opened(load(tmp_path))
    account = sites[0].account
    assert isinstance(account, SiteLedger)
    assert all(isinstance(vote, float) for vote in ask(sites, w_P))
    again = ask(sites, w_P)
    assert all("The run pays for a plan of 1 (vote), and 1 are paid" in str(told) for told in again)
    assert account.queries() == {"vote": 1}


@pytest.mark.usefixtures("short")
def test_a_coordinator_may_not_ask_for_what_nobody_pays_for(tmp_path: Path) -> None:
    sites, w_P = opened(load(tmp_path, privacy__vote_epsilon=0.0))
    assert set(ask(sites, w_P)) == {"privacy.vote_epsilon=0: nobody has paid for a vote"}
    sites, w_P = opened(load(tmp_path))
    assert set(ask(sites, w_P[1:])) == {
        "the coordinator sends no model to vote on; run the same medfed everywhere"
    }
    assert sites[0].account and sites[0].account.queries() == {}


def test_a_simulation_votes_without_paying_and_alike(tmp_path: Path) -> None:
    study = load(tmp_path, opposed=True, privacy__simulation_only=True)
    first, second = (medfed.run(study, tmp_path / name).summary["vote"] for name in ("one", "two"))
    assert first == second and not own_ledger(tmp_path / "one").exists()


@pytest.mark.usefixtures("short")
def test_a_run_that_goes_on_does_not_vote_twice(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drive, "write_model", lambda *_: (_ for _ in ()).throw(Crash))
        with pytest.raises(Crash):
            medfed.run(load(tmp_path), tmp_path / "run")
    told = [
        e for e in events.read(tmp_path / "run" / "events.jsonl") if isinstance(e, events.Voted)
    ]
    summary = medfed.resume(tmp_path / "run").summary
    assert [summary["vote"]["own_better"]] == [e.own_better.value for e in told]
    assert set(charges(own_ledger(tmp_path / "run"), "vote").values()) == {1}


@pytest.mark.usefixtures("short")
def test_a_vote_that_a_crash_lost_is_counted_and_not_bought_again(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events.Log, "emit", _crashing(events.Log.emit))
        with pytest.raises(Crash):
            medfed.run(load(tmp_path), tmp_path / "run")
    result = medfed.resume(tmp_path / "run")
    assert result.summary["vote"] is None and not result.complete
    assert set(charges(own_ledger(tmp_path / "run"), "vote").values()) == {1}
    claim = claim_of(tmp_path / "run")
    assert claim["vote"]["released"] == 1 and 0.999 * 8 < claim["epsilon"] <= 8


def _crashing(emit: Any) -> Any:
    def crash(log: Any, event: events.Event) -> None:
        if isinstance(event, events.Voted):
            raise Crash
        emit(log, event)

    return crash


# what does not compose ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        (
            {"privacy.vote_epsilon": 0.2},
            PlanError,
            r"its noise \(sd .*\) hides even a vote in which all agree",
        ),
        ({"privacy.vote_epsilon": 9.0}, StudyError, "privacy.vote_epsilon=9.0; expected 0"),
        ({"sites.kind": "device", "privacy.sizes": {}}, PlanError, "a device holds one patient"),
        ({"security.aggregation": "masked"}, PlanError, "hides even a vote"),
        (
            {
                "privacy.vote_epsilon": 6.5,
                "privacy.threshold_epsilon": 6.5,
                "data.threshold": "youden",
            },
            PlanError,
            "privacy.threshold_epsilon=6.5 and privacy.vote_epsilon=6.5 and privacy.epsilon=8 do "
            "not compose: together they leave nothing to train with",
        ),
        (
            {
                "data.test_is_public": False,
                "privacy.evaluation_epsilon": 7.9,
                "privacy.vote_epsilon": 7.9,
            },
            PlanError,
            "no held-out patient's budget bears it beside a test",
        ),
        (
            {
                "data.test_is_public": False,
                "privacy.evaluation_epsilon": 6.5,
                "privacy.vote_epsilon": 2.0,
            },
            PlanError,
            "no test patient's budget bears it beside privacy.vote_epsilon=2",
        ),
        (
            {"privacy.vote_epsilon": 7.999, "training.batch_size": 8},
            PlanError,
            "leaves too little to train with",
        ),
    ],
)
def test_what_does_not_compose_is_refused_before_anybody_pays(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        medfed.run(load(tmp_path)._with(changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "privacy", [{}, {"privacy.noise": "site"}, {"privacy.max_sites_per_patient": 2}]
)
def test_the_recipe_takes_a_vote_where_it_tells(tmp_path: Path, privacy: dict[str, Any]) -> None:
    """By public facts alone, and never where a baseline is measured anyway."""
    for sites in (20, 60, 200, 4000):
        study = load(tmp_path)._with(privacy)
        study = replace(
            study, given=frozenset({"privacy.epsilon", "privacy.sizes", *privacy}), chosen={}
        )
        study = study.set("privacy.sizes", {f"s{k}": 40 for k in range(sites)})
        found = recipe._vote(study)
        assert (found is not None) == vote_tells(study, 2.0, sites, 4)
    assert recipe._vote(study._with({"monitor.baselines": True, "privacy.scope": "run"})) is None
    assert recipe._vote(study._with({"privacy.sizes": {}})) is None
    # wards of four
    assert recipe._vote(study._with({"privacy.sizes": {f"s{k}": 4 for k in range(5000)}})) is None
    assert recipe._vote(study._with({"sites.kind": "device"})) is None


def test_the_recipe_takes_no_vote_that_would_cost_a_test_its_room(tmp_path: Path) -> None:
    """A study that ran must not be refused, and a test not be blurred, for a vote that nobody asked
    for.
    """
    study = load(tmp_path, data__test_is_public=False)
    open_ = replace(study, given=frozenset({"privacy.epsilon", "privacy.sizes"}), chosen={})
    assert recipe._vote(open_._with({"privacy.evaluation_epsilon": 4.0}))
    assert recipe._vote(open_._with({"privacy.evaluation_epsilon": 4.6})) is None


def test_a_plan_foretells_a_study_that_votes(tmp_path: Path) -> None:
    found = runs.privacy_outlook(
        load(tmp_path, privacy__threshold_epsilon=3.0, data__threshold="youden")
    )
    assert found["epsilon"] == 8 and found["foretold"]


@pytest.mark.usefixtures("short")
def test_who_only_votes_has_paid_too(tmp_path: Path) -> None:
    result = medfed.run(
        load(tmp_path, fleet__clients_per_round=10, training__rounds=2), tmp_path / "run"
    )
    told: list[Any] = [
        e
        for e in events.read(tmp_path / "run" / "events.jsonl")
        if isinstance(e, events.RunFinished)
    ]
    least = told[0].spread[0][0]
    most = told[0].spread[-1][0]
    assert least == pytest.approx(2.0, rel=1e-3) and most <= 8 and result.complete


@pytest.mark.usefixtures("short")
def test_a_threshold_that_was_told_is_kept_though_the_vote_was_lost(tmp_path: Path) -> None:
    study = load(tmp_path, data__threshold="prevalence")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(events.Log, "emit", _crashing(events.Log.emit))
        with pytest.raises(Crash):
            medfed.run(study, tmp_path / "run")
    told = [
        e for e in events.read(tmp_path / "run" / "events.jsonl") if isinstance(e, events.Tested)
    ]
    summary = medfed.resume(tmp_path / "run").summary
    assert summary["decision"]["threshold"] == told[-1].threshold != 0.5
    paid = charges(own_ledger(tmp_path / "run"), "threshold")
    assert set(paid.values()) == {1} and set(
        charges(own_ledger(tmp_path / "run"), "vote").values()
    ) == {1}


def test_half_a_votes_interval_holds_noise_and_chance() -> None:
    assert guarantee.vote_interval(100, 0) == pytest.approx(1.96 * 5, rel=1e-3)
    assert guarantee.vote_interval(0, 3) == pytest.approx(1.96 * 3, rel=1e-3)
    assert (
        json.loads(events.line(events.Voted(3, 4, Figure(1.0, 0.0, 2.0), 1.0)))["event"] == "voted"
    )
