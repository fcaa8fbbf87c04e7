"""What cannot run is found before a patient is charged: on rows of nobody, and with the module that
is to blame.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import medfed
from medfed import runs
from medfed.core import codec
from medfed.core.checks import PlanError, QuorumError
from medfed.data.encoding import Column, Encoding, Target
from medfed.learn import dpsgd, layers
from medfed.learn.probe import Probed
from medfed.learn.watching import find_failing_part
from medfed.node import rehearse as rehearse_
from medfed.node import site, work
from medfed.node.inprocess import InProcess
from medfed.planning import rehearsal
from medfed.privacy.ledger import Ledger
from medfed.rounds.prepare import prepare, rehearse
from medfed.runs import execute, simulation
from medfed.study import Feature, Study
from tests.engine.pipes import Pipes
from tests.tables import PRIVATE, SITES, invented, plain, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

HERE = "tests.planning.test_rehearsal"


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Three hospitals under a claim whose budget all runs of the study share."""
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))
    return medfed.load_study(write_study(tmp_path, PRIVATE)).set("privacy.scope", "study")


def charges(folder: Path) -> int:
    path = folder / "home" / "ledger.sqlite"
    if not path.exists():
        return 0
    with Ledger.open(path, read_only=True) as book:
        return len(book.rows())


# models that users write --------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent layer, of which torch.func takes no gradient of each record."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.memory = nn.GRU(1, 8, batch_first=True)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.memory(x.unsqueeze(-1))[0][:, -1])  # type: ignore[no-any-return]


class _NoWayBack(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 1

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:  # type: ignore[override]
        raise RuntimeError("this layer has no derivative")


class When(nn.Module):
    """Passes its input on, but for a case in which it does something else."""

    def __init__(
        self, case: Callable[[nn.Module, Tensor], bool], act: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.case = case
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) if self.case(self, x) else x


def _fail(x: Tensor) -> Tensor:
    raise ValueError("a case that its author did not think of")


def _ahead(
    case: Callable[[nn.Module, Tensor], bool], act: Callable[[Tensor], Tensor]
) -> Callable[[int, int], nn.Module]:
    return lambda features, outputs: nn.Sequential(
        nn.Linear(features, 4), When(case, act), nn.Linear(4, outputs)
    )


def _behind(
    case: Callable[[nn.Module, Tensor], bool], act: Callable[[Tensor], Tensor]
) -> Callable[[int, int], nn.Module]:
    return lambda features, outputs: nn.Sequential(nn.Linear(features, outputs), When(case, act))


def recurrent(features: int, outputs: int) -> nn.Module:
    return Recurrent(outputs)


no_way_back = _ahead(lambda layer, x: True, _NoWayBack.apply)
training_only = _ahead(lambda layer, x: layer.training, _fail)
evaluation_only = _ahead(lambda layer, x: not layer.training, _fail)
evaluation_of_one = _ahead(lambda layer, x: not layer.training and len(x) == 1, _fail)
training_of_one = _ahead(lambda layer, x: layer.training and len(x) == 1, _fail)
wrong_in_training = _behind(lambda layer, x: layer.training, lambda x: torch.cat([x, x], 1))
flat_in_training = _behind(lambda layer, x: layer.training, lambda x: x.squeeze(-1))
lie_of_shape = _behind(lambda layer, x: len(x) != 2, lambda x: x.repeat(2, 1))
whole_numbers = _behind(lambda layer, x: layer.training, lambda x: x.long())
nowhere_finite = _ahead(lambda layer, x: True, lambda x: (x * 0).abs().sqrt())
not_a_number = _behind(lambda layer, x: layer.training, lambda x: x / 0 * 0)

MODELS: dict[str, str] = {
    # the factory -> what the refusal must say
    "no_way_back": r"stage gradient, module When '1': RuntimeError: this layer has no derivative\.",
    "training_only": r"module '1' \(When\): ValueError: a case that its author did not think of\.",
    "evaluation_only": "a case that its author did not think of",
    "evaluation_of_one": r"stage evaluation, module '1' \(When\): ValueError: a case",
    "training_of_one": r"module '1' \(When\): ValueError: a case",
    "wrong_in_training": r"in training mode the model gives .*\(1, 2\) for 1 records; expected numbers \(1, 1\)",
    "flat_in_training": r"in training mode the model gives .*\(1,\) for 1 records; expected numbers \(1, 1\)",
    "lie_of_shape": r"the model gives .*\(2, 1\) for 1 records; expected numbers \(1, 1\)",
    "whole_numbers": r"the model gives torch\.int64",
    "nowhere_finite": "stage gradient.*no gradient of 1 patients is finite",
    "not_a_number": "stage loss: the loss of 12 records .*expected one finite number each",
}


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No probe at planning: the rehearsal is a second look, at what sites run."""
    monkeypatch.setattr("medfed.planning.plan.find_path", lambda *_: Probed("func"))
    monkeypatch.setattr("medfed.node.setup.find_path", lambda *_: Probed("func"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_run_is_refused_by_the_plan(
    tmp_path: Path, study: Study, name: str
) -> None:
    broken = study._with({"model.name": f"{HERE}:{name}", "training.rounds": 1})
    with pytest.raises(PlanError, match=f"model.name='{HERE}:{name}'|rehearsal on made-up rows"):
        medfed.run(broken, tmp_path / "run")
    assert charges(tmp_path) == 0 and not (tmp_path / "run").exists()


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("noise", ["shared", "site"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_that_cannot_run_is_refused_before_anybody_is_charged(
    tmp_path: Path, study: Study, name: str, noise: str
) -> None:
    broken = study._with({"model.name": f"{HERE}:{name}", "privacy.noise": noise})
    with pytest.raises(PlanError, match=MODELS[name]):
        medfed.run(broken, tmp_path / "run")
    assert charges(tmp_path) == 0 and not (tmp_path / "run").exists()
    # and nothing was spent
    assert medfed.run(study.set("training.rounds", 1), tmp_path / "next").complete


def test_a_recurrent_model_trains_under_a_claim(tmp_path: Path, study: Study) -> None:
    """It once cost every patient its budget, and then failed at its first step."""
    assert medfed.run(study.set("model.name", f"{HERE}:recurrent"), tmp_path / "run").complete


@pytest.mark.usefixtures("unprobed")
def test_the_refusal_names_all_sites_once_and_says_what_to_do(study: Study) -> None:
    with pytest.raises(PlanError) as refused:
        medfed.simulate(study.set("model.name", f"{HERE}:no_way_back"))
    told = str(refused.value)
    assert (
        told.startswith("north, south, east: rehearsal on made-up rows, ")
        and told.count("rehearsal") == 1
    )
    assert "backward pass" in told and "conv1d, logistic, medical-mlp, mlp" in told
    assert told.endswith("Nobody was charged.")


@pytest.mark.parametrize("way", ["masked", "three-party"])
def test_rows_that_no_link_takes_are_refused_before_anybody_is_charged(
    tmp_path: Path, study: Study, way: str
) -> None:
    tight = study._with(
        {"privacy.noise": "site", "security.aggregation": way, "security.bound": 1e-6}
    )
    with pytest.raises(PlanError, match=r"stage link: .*security\.bound=1e-06.*raise the bound"):
        medfed.simulate(tight)
    assert charges(tmp_path) == 0


def test_one_site_that_cannot_is_enough(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not all hospitals have the same machine; each is asked by itself, as engines between machines
    do.
    """

    class OneByOne(InProcess):
        def submit_many(self, sites: Any, op: str, payload: bytes, deadline: float) -> list[int]:
            return [
                super(OneByOne, self).submit_many([name], op, payload, deadline)[0]
                for name in sites
            ]

    real = dpsgd.sums

    def sums(
        model: Any,
        w_P: Any,
        patients: Any,
        task: Any,
        guarantee: Any,
        clip: Any,
        names: Any,
        *rest: Any,
    ) -> Any:
        if names == ["south"]:
            raise NotImplementedError("this processor has no such instruction")
        return real(model, w_P, patients, task, guarantee, clip, names, *rest)

    monkeypatch.setattr(simulation, "InProcess", OneByOne)
    monkeypatch.setattr(dpsgd, "sums", sums)
    with pytest.raises(
        PlanError, match=r"^south: rehearsal .*stage gradient: NotImplementedError: this processor"
    ):
        medfed.simulate(study)
    assert charges(tmp_path) == 0


SETTINGS: dict[str, dict[str, Any]] = {
    "shared": {},
    "adaptive": {"privacy.clipping": "adaptive"},
    "sampled": {"training.batch_size": 8, "privacy.batch_cap": 9},
    "one patient a batch": {"training.batch_size": 1},
    "at sites": {"privacy.noise": "site", "training.local_steps": 3, "training.batch_size": 8},
    "scaffold": {"privacy.noise": "site", "training.algorithm": "scaffold"},
    "fednova": {
        "privacy.noise": "site",
        "training.algorithm": "fednova",
        "security.aggregation": "masked",
    },
    "adam": {
        "privacy.noise": "site",
        "training.optimizer": "adam",
        "security.aggregation": "three-party",
    },
    "masked": {"security.aggregation": "masked"},
    "three-party": {"security.aggregation": "three-party", "robustness.rule": "multi-krum"},
    "in turns": {"fleet.schedule": "cyclic", "fleet.groups": 2, "privacy.correlated": True},
    "deep": {"model.name": "mlp", "model.options.hidden": [16, 8], "model.options.dropout": 0.3},
    "convolution": {"model.name": "conv1d", "model.options.widths": [4]},
    "no preprocessing": {"data.preprocess": "none"},
    "noised test": {"data.test_is_public": False, "privacy.evaluation_epsilon": 0.5},
    "chosen threshold": {"data.threshold": "youden"},
    "lying": {"robustness.attack": "sign-flip", "robustness.malicious": 0.3},
}


def _prepared(study: Study, folder: Path | None = None) -> tuple[list[site.Site], Any]:
    sites = runs.open_sites(study, None, folder)
    return sites, prepare(sites[0].study, InProcess(sites), [node.name for node in sites])


@pytest.mark.parametrize("name", SETTINGS)
def test_what_can_run_is_not_refused_and_nothing_is_read_or_kept(
    tmp_path: Path, study: Study, name: str
) -> None:
    """Also at a site whose records are out of reach; whatever the round does, the site is as it was
    before.
    """
    sites, plan = _prepared(study._with(SETTINGS[name]), tmp_path / "sites")
    for node in sites:
        train = node.train
        test = node.test
        table = node.table
        del node.train, node.test
        node.table = None
        w = [p.clone() for p in node.model.parameters()]
        mode = node.model.training
        before = {key: value for key, value in vars(node).items() if key != "memory"}
        memory = {key: value.clone() for key, value in node.memory.items()}
        drawn = torch.random.get_rng_state()
        codec.decode(node.handle("rehearse", codec.encode({})))
        assert torch.equal(torch.random.get_rng_state(), drawn)
        assert {key: value for key, value in vars(node).items() if key != "memory"} == before
        assert node.memory.keys() == memory.keys()
        assert all(torch.equal(node.memory[key], value) for key, value in memory.items())
        assert node.model.training == mode and node.pending == {} and node.party is None
        assert all(torch.equal(p, old) for p, old in zip(node.model.parameters(), w, strict=True))
        assert node.account is not None and node.account.cohorts == {} and not node.account._paid
        node.train = train
        node.test = test
        node.table = table

    assert charges(tmp_path) == 0 and not (tmp_path / "sites").exists()
    rehearse(plan, InProcess(sites))


def test_the_answer_is_the_same_whoever_is_at_the_site(study: Study) -> None:
    sites, _ = _prepared(study)
    answers = {sites[0].handle("rehearse", codec.encode({}))}
    sites[0].train = sites[0].train.at(torch.zeros(len(sites[0].train), dtype=torch.bool))
    answers.add(sites[0].handle("rehearse", codec.encode({})))
    assert answers == {codec.encode({})}


def test_a_rehearsal_before_the_plan_is_refused(study: Study) -> None:
    (north, *_) = runs.open_sites(study, None)
    with pytest.raises(medfed.SiteError, match="must prepare the site first"):
        north.handle("rehearse", codec.encode({}))


@pytest.mark.parametrize(
    "change", [plain, lambda study: study.set("privacy.simulation_only", True)]
)
def test_where_nobody_pays_nothing_is_rehearsed(
    study: Study, change: Callable[[Study], Study], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(site.OPS, "rehearse", lambda *_: pytest.fail("rehearsed"))
    assert medfed.simulate(change(study)).complete


def test_a_resumed_run_is_rehearsed_before_it_pays_again(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the two the machine may have got another torch."""
    monkeypatch.setattr(work, "sum_gradients", lambda *_: [medfed.SiteError("its disk is full")])
    monkeypatch.setattr(execute, "rehearse", lambda *_: None)
    assert not medfed.run(study.set("privacy.spare_rounds", 2), tmp_path / "run").complete
    before = charges(tmp_path)
    monkeypatch.setattr(execute, "rehearse", rehearse)
    with pytest.raises(PlanError, match="stage training: its disk is full"):
        medfed.resume(tmp_path / "run")
    assert before and charges(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic", f"{HERE}:recurrent"])
def test_sites_in_processes_of_their_own_rehearse_too(
    tmp_path: Path, study: Study, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [Path(__file__).parents[2], Path(medfed.__file__).parent.parent]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, places)))
    study = study._with({"model.name": name})
    (tmp_path / "resolved.toml").write_text(study.toml())
    tables = {}
    for place in SITES:
        tables[place] = tmp_path / f"{place}.csv"
        frame = invented()
        frame[frame["hospital"] == place].to_csv(tables[place], index=False)
    fleet = Pipes(tmp_path / "resolved.toml", tables)
    try:
        plan = prepare(study, fleet, list(SITES))
        rehearse(plan, fleet)
    finally:
        fleet.close()


# what fails on real records all the same ----------------------------------------------------------


def _fails_on_records(patch: pytest.MonkeyPatch) -> None:
    """Have a layer fail on values that no made-up row holds, with words that quote one."""
    real = layers.LinearRule.forward

    def forward(self: Any, x: Tensor, *rest: Any) -> Tensor:
        between = x[(x.abs() > 0) & (x.abs() < 1)]
        if len(between):
            raise ArithmeticError(f"cannot take {between[0]:.6f} of patient p0001")
        return real(self, x, *rest)

    patch.setattr(layers.LinearRule, "forward", forward)


def test_a_failure_on_real_records_tells_stage_module_and_kind_and_quotes_nothing(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    _fails_on_records(monkeypatch)
    with caplog.at_level(logging.ERROR):
        summary = medfed.run(study, tmp_path / "run").summary
    told = summary["reason"]
    assert "north, south, east: op 'work' failed: ArithmeticError (test_rehearsal.py, line" in told
    assert "at stage gradient, in module '0' (Linear); what it says is in its own log" in told
    files = [
        path
        for path in (tmp_path / "run").rglob("*")
        if path.is_file() and path.name != runs.OWN_LOG
    ]
    written = b"".join(path.read_bytes() for path in files)
    assert b"p0001" not in written and b"cannot take" not in written and "p0001" not in told
    # the site's own log does say it
    assert any("p0001" in str(record.exc_info) for record in caplog.records)
    assert [one["site"] for one in summary["excluded"]] == list(SITES)


def test_a_round_that_failed_after_it_was_paid_is_not_paid_again(
    tmp_path: Path, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """North fails once, after its patients paid: what they paid for was never released, and covers
    the next round.
    """
    real = dpsgd.sums
    failed = []

    def sums(
        model: Any,
        w_P: Any,
        patients: Any,
        task: Any,
        guarantee: Any,
        clip: Any,
        names: Any,
        *rest: Any,
    ) -> Any:
        # the stack, then alone
        if guarantee.releases.keys() == set(SITES) and "north" in names and len(failed) < 2:
            failed.append(names)
            raise RuntimeError("out of memory")
        return real(model, w_P, patients, task, guarantee, clip, names, *rest)

    monkeypatch.setattr(execute, "rehearse", lambda *_: None)
    monkeypatch.setattr(dpsgd, "sums", sums)
    result = medfed.run(study.set("training.quorum", 0.6), tmp_path / "run")
    assert len(failed) == 2 and result.summary["participation"] == {
        "north": 3,
        "south": 4,
        "east": 4,
    }
    with Ledger.open(tmp_path / "home" / "ledger.sqlite", read_only=True) as book:
        paid = [str(row["site"]) for row in book.rows()]
    assert {name: paid.count(name) for name in SITES} == {"north": 3, "south": 4, "east": 4}


# the parts ----------------------------------------------------------------------------------------


def test_stage_and_module_are_read_off_an_exception() -> None:
    model = nn.Sequential(nn.Linear(3, 4), When(lambda layer, x: True, _fail))
    with pytest.raises(ValueError) as stopped:
        model(torch.zeros(2, 3))
    assert rehearsal.module_of(stopped.value, model) == "'1' (When)"
    assert (
        rehearsal.module_of(stopped.value, nn.Linear(2, 2))
        == rehearsal.module_of(stopped.value, None)
        == ""
    )
    assert rehearsal.stage_of(stopped.value) == ""
    with pytest.raises(RuntimeError) as stopped_again:
        medfed.learn.local.sample_loss(
            "multiclass", torch.zeros(2, 3), torch.zeros(5, dtype=torch.int64)
        )
    assert rehearsal.stage_of(stopped_again.value) == "loss"
    with pytest.raises(QuorumError) as unplaced:
        raise QuorumError("2 came")
    assert rehearsal.place_of(unplaced.value, model) == ""


def test_the_innermost_module_without_a_gradient_is_found() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), When(lambda layer, x: True, _NoWayBack.apply))
    assert (
        find_failing_part(nn.Sequential(nn.Linear(3, 4), inner, nn.ReLU()), torch.ones(2, 3))
        == "When '1.1'"
    )
    assert find_failing_part(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.ones(2, 3)) == ""
    assert find_failing_part(nn.Linear(9, 4), torch.ones(2, 3)) == ""  # it cannot even compute them


def test_made_up_rows_lie_at_the_ends_of_what_the_encoding_allows() -> None:
    columns = (
        Column("capped", "number", cap=2.0, indicator=True),
        Column("ranged", "number", centre=1.0, scale=2.0),
        Column("free", "number"),
        Column("two", "category", categories=("a", "b")),
        Column("three", "category", categories=("a", "b", "c")),
    )
    encoding = Encoding(columns, Target("y", "multiclass", ("p", "q", "r")), public=True)
    rows = rehearsal.make_up(encoding, {"ranged": Feature(range=(3.0, 9.0))}, 12)
    assert rows.x.shape == (12, len(encoding.names())) and rows.x.dtype == torch.float32
    seen = [sorted(set(column.tolist())) for column in rows.x.T]
    assert seen == [[-2, 0, 2], [0, 1], [0, 1, 4], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1]]
    assert torch.equal(rows.x[:, 5:].sum(1), torch.ones(12)) and set(rows.y.tolist()) == {0, 1, 2}
    shared = rehearsal.share_out(rows, (3, 1, 2))
    assert shared.patient.tolist() == [0, 0, 0, 1, 2, 2] and torch.equal(shared.x, rows.x[:6])


def test_coordinator_and_rehearsal_agree_on_the_length_of_a_row(study: Study) -> None:
    """What a rehearsal lets pass the coordinator reads."""
    for settings in SETTINGS.values():
        sites, plan = _prepared(study._with(settings))
        assert sites[0].guarantee is not None
        assert rehearse_._length(sites[0], sites[0].guarantee) == plan.message
