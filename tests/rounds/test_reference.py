"""The engine's round is the reference's, for every algorithm, noise, aggregation and rule that is
registered.

Whoever adds one is covered by its being there: combinations come from the registries, and from the
study's own types.
"""

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch

import medfed
from medfed import runs
from medfed.core.checks import MedfedError, PlanError
from medfed.fleet.selection import SELECTORS
from medfed.learn.algorithms import ALGORITHMS, Server
from medfed.learn.learners import LEARNERS
from medfed.links.wire import LINKS, send, send_remembering
from medfed.monitor.events import Log
from medfed.node.inprocess import InProcess
from medfed.planning.plan import Plan
from medfed.robust.rules import ALONE, MIXINGS
from medfed.rounds import aggregation as ways
from medfed.rounds import reference
from medfed.rounds.reference import SiteState
from medfed.rounds.round import run_round
from medfed.rounds.way import Way
from medfed.study import Privacy, Security, Study
from tests.tables import PRIVATE, invented, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

NOISES = [noise for noise in get_args(get_type_hints(Privacy)["noise"]) if noise != "auto"]
WAYS = get_args(get_type_hints(Security)["aggregation"])
RULES = [*ALONE, *(f"{mixing}+{rule}" for mixing in MIXINGS for rule in ALONE)]
FEW, MANY = 4, 13  # bulyan after bucketing takes thirteen

USUAL = ("mean", "krum", "nnm+geometric-median", "bucketing+centred-clipping", "coordinate-median")

TRAINED = list(itertools.product(ALGORITHMS, NOISES, WAYS))
COMBINED = list(itertools.product(NOISES, WAYS, RULES))


def study_of(
    folder: Path, algorithm: str, noise: str, way: str, rule: str, **changes: Any
) -> Study:
    """Return a study of clinics whose noise is seeded, so that the reference can draw the same."""
    sites = FEW if rule == "mean" else MANY
    frame = invented(32 * sites)
    frame["hospital"] = [f"clinic {k % sites}" for k in range(len(frame))]
    study = medfed.load_study(write_study(folder, PRIVATE, frame))
    settings: dict[str, Any] = {
        "training.algorithm": algorithm,
        "training.learning_rate": 0.2,
        "training.local_epochs": 1,
        "security.aggregation": way,
        "robustness.rule": rule,
        "robustness.max_malicious": 0.1 if rule != "mean" else 0.0,
        "privacy.sizes": {f"clinic {k}": 26 for k in range(sites)},
        "privacy.simulation_only": True,
    }
    if rule != "mean" and way == "three-party" and noise in ("none", "site"):
        settings["robustness.bound"] = 3.0

    if noise == "none":
        settings |= {
            "privacy.epsilon": float("inf"),
            "privacy.delta": 1.0,
            "privacy.simulation_only": False,
        }
        settings |= {"training.batch_size": 8, "training.local_epochs": 2}

    if noise == "site":
        settings |= {"training.local_steps": 2, "training.batch_size": 12}
    settings["privacy.noise"] = noise
    return study._with(settings | {key.replace("__", "."): value for key, value in changes.items()})


def by_loop(plan: Plan) -> Plan:
    """Return the plan with local training as its plain twin does it: client by client, record by
    record.
    """
    return replace(plan, path="loop")


@dataclass
class Played:
    """A run's parties in the engine, and the same in the reference; `step` plays a round
    in each.
    """

    plan: Plan
    fleet: InProcess
    aggregation: Way
    held: dict[str, SiteState]
    engine: Server
    reference: Server

    @classmethod
    def of(cls, study: Study) -> "Played":
        sites = runs.open_sites(study, None)
        fleet, plan = runs.prepare_sites(sites[0].study, sites)
        nodes = {name: fleet.site(name) for name in plan.participants}
        held = {name: SiteState(node.train, dict(node.memory)) for name, node in nodes.items()}
        return cls(
            plan, fleet, ways.introduce(plan, fleet, "run"), held, plan.begin(), plan.begin()
        )

    def step(self, same_rows: bool = False) -> None:
        """With `same_rows` the reference's sites send what the engine's have computed."""
        messages: list[torch.Tensor] = []

        def recorded(message_KM: torch.Tensor, links: Any) -> torch.Tensor:
            messages.extend(message_KM.clone())
            return send(message_KM, links)

        def recorded_too(message_KM: torch.Tensor, links: Any, memory: Any) -> Any:
            messages.extend(message_KM.clone())
            return send_remembering(message_KM, links, memory)

        with pytest.MonkeyPatch.context() as patch, Log() as log:
            patch.setattr("medfed.node.work.send", recorded)
            patch.setattr("medfed.node.work.send_remembering", recorded_too)
            self.engine = run_round(
                self.engine, self.plan, self.fleet, self.plan.budget(), log, self.aggregation
            )
            if same_rows:
                computed = dict(zip(self.plan.participants, messages, strict=True))
                patch.setattr(
                    reference, "work", lambda _s, _p, _m, name, site: (computed[name], site.memory)
                )
            model = self.fleet.site(self.plan.participants[0]).model
            self.reference = reference.play(self.reference, by_loop(self.plan), model, self.held)

    def agree(self, rtol: float, atol: float) -> None:
        engine = self.engine
        played = self.reference
        close = torch.testing.assert_close
        assert engine.round == played.round and engine.slots.keys() == played.slots.keys()
        close(played.w_P, engine.w_P, rtol=rtol, atol=atol)
        for slot, value in engine.slots.items():
            close(played.slots[slot], value, rtol=10 * rtol, atol=atol)
        assert self.plan.algorithm.personal or not torch.equal(engine.w_P, self.plan.begin().w_P)

    def remember_alike(self) -> None:
        for name, site in self.held.items():
            known = self.fleet.site(name).memory
            of_links = {kept for link in self.plan.links for kept in link.kept}
            assert site.memory.keys() == known.keys() == {*self.plan.algorithm.kept, *of_links}
            for kept, value in known.items():
                torch.testing.assert_close(site.memory[kept], value, rtol=2e-3, atol=2e-4)


def agree(study: Study, rounds: int = 2) -> None:
    """Whole rounds, training included: within the rounding of other orders of sums."""
    played = Played.of(study)
    for _ in range(rounds):
        played.step()
        played.agree(2e-4, 2e-5)
        played.remember_alike()


def refused(study: Study) -> str:
    """Return why a study does not compose; empty where it does."""
    try:
        sites = runs.open_sites(study, None)
        runs.prepare_sites(sites[0].study, sites)
    except MedfedError as error:
        assert isinstance(error, PlanError)
        return str(error)
    return ""


def compose(study: Study) -> bool:
    """Say whether a study composes; if not, the refusal must say what to do."""
    why = refused(study)
    assert not why or "do not compose" in why or "needs a reference row" in why, why
    return not why


@pytest.mark.parametrize("combination", TRAINED, ids=" ".join)
def test_every_algorithm_trains_as_the_reference_does(
    tmp_path: Path, combination: tuple[str, str, str]
) -> None:
    study = study_of(tmp_path, *combination, "mean")
    if compose(study):
        agree(study)


@pytest.mark.parametrize("combination", [one for one in COMBINED if one[2] in USUAL], ids=" ".join)
def test_usual_rules_combine_the_same_rows_to_the_same_model(
    tmp_path: Path, combination: tuple[str, str, str]
) -> None:
    _combine(tmp_path, combination)


@pytest.mark.long
@pytest.mark.parametrize(
    "combination", [one for one in COMBINED if one[2] not in USUAL], ids=" ".join
)
def test_every_rule_combines_the_same_rows_to_the_same_model(
    tmp_path: Path, combination: tuple[str, str, str]
) -> None:
    _combine(tmp_path, combination)


def _combine(folder: Path, combination: tuple[str, str, str]) -> None:
    """Links, rule, opening and the server's step, given the engine's own rows: to the last bits of
    a float32.
    """
    study = study_of(folder, "fedavg", *combination)
    if compose(study):
        played = Played.of(study)
        for _ in range(2):
            played.step(same_rows=True)
            played.agree(2e-6, 2e-6)  # weights travel among three parties in steps of 2^-20


ADDED = [
    *(("fleet.schedule", name) for name in SELECTORS),
    *(("training.links", name) for name in LINKS),
    *(("model.name", name) for name in LEARNERS),
]


@pytest.mark.parametrize("added", ADDED, ids="=".join)
def test_every_selector_link_and_learner_is_played_as_the_reference_does(
    tmp_path: Path, added: tuple[str, str]
) -> None:
    key, name = added
    study = study_of(tmp_path, "fedavg", "none", "plain", "mean")._with(
        {key: name, "fleet.groups": 2}
    )
    if key == "fleet.schedule" and SELECTORS[name].law != "turns":
        study = study.set("fleet.clients_per_round", 3)
    agree(study, 4)


def test_most_of_the_registry_is_played_and_not_refused(tmp_path: Path) -> None:
    """A test that refuses everything cannot fail."""
    trained = [one for one in TRAINED if compose(study_of(tmp_path, *one, "mean"))]
    algorithms, noises, seen = (set(column) for column in zip(*trained, strict=True))
    assert algorithms == set(ALGORITHMS) and noises == set(NOISES) and seen == set(WAYS)
    bare = [rule for noise, way, rule in COMBINED if (noise, way) == ("none", "plain")]
    assert {rule for rule in bare if refused(study_of(tmp_path, "fedavg", "none", "plain", rule))} == {
        rule for rule in RULES if rule.endswith("fltrust")  # which needs a row that no study gives
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"privacy__noise": "shared", "privacy__clipping": "adaptive"},
        {"privacy__noise": "shared", "training__batch_size": 20},
        {"privacy__noise": "shared", "fleet__clients_per_round": 3, "training__average": 0.5},
        {"privacy__noise": "shared", "fleet__schedule": "cyclic", "fleet__groups": 2},
        {"privacy__noise": "site", "training__average": 0.5, "training__momentum": 0.9},
    ],
)
@pytest.mark.parametrize("algorithm", ["fedavg", "fedavgm"])
def test_what_else_a_claim_may_ask(tmp_path: Path, algorithm: str, changes: dict[str, Any]) -> None:
    others = {key: value for key, value in changes.items() if key != "privacy__noise"}
    agree(study_of(tmp_path, algorithm, changes["privacy__noise"], "plain", "mean", **others), 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"training__learning_rate": 0.0},
        {"training__optimizer": "adam", "training__learning_rate": 0.01},
        {"model__name": "mlp"},
        {
            "training__weighting": "uniform",
            "training__weight_decay": 0.1,
            "fleet__clients_per_round": 3,
        },
    ],
)
def test_what_else_a_study_may_ask(tmp_path: Path, changes: dict[str, Any]) -> None:
    agree(study_of(tmp_path, "fedavg", "none", "plain", "mean", **changes), 4)


@pytest.mark.parametrize("fault", ["server", "weights", "client", "noise"])
def test_a_planted_fault_is_seen(
    tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One part of the engine's round a hundredth off."""
    played = Played.of(
        study_of(tmp_path, "fedavgm", "site" if fault == "noise" else "none", "plain", "mean")
    )
    real = played.plan.algorithm
    weight = Plan.weight

    with monkeypatch.context() as patch:
        if fault == "server":
            wrong = replace(real, apply=lambda s, m, share, h: real.apply(s, 1.01 * m, share, h))
            patch.setitem(ALGORITHMS, "fedavgm", wrong)

        if fault == "client":
            wrong = replace(
                real, message=lambda t, m, local, h: (1.01 * (local.theta_KP - t.w_P), m)
            )
            patch.setitem(ALGORITHMS, "fedavgm", wrong)

        if fault == "weights":
            patch.setattr(
                Plan, "weight", lambda plan, name: weight(plan, name) + 5 * name.endswith("1")
            )

        if fault == "noise":
            patch.setattr(
                "medfed.learn.dpsgd._make_noise", lambda *_: lambda total_AP, members, t: total_AP
            )

        played.step()
        engine = played.engine

    model = played.fleet.site(played.plan.participants[0]).model
    right = reference.play(played.plan.begin(), by_loop(played.plan), model, played.held)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(right.w_P, engine.w_P, rtol=2e-4, atol=2e-5)
