"""Any torch module a hospital brings: trained rightly, on the fastest path that does, or refused by
name.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import medfed
from medfed import study as studies
from medfed.core.checks import PlanError, StudyError
from medfed.core.flat import select_trained
from medfed.core.types import Task
from medfed.learn import probe, zoo
from medfed.learn.probe import ROWS, Probed
from medfed.monitor.metrics import Scores, measure
from medfed.study import Study
from tests import modules, tables

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = 6

TAKEN: dict[str, tuple[str, str]] = {  # factory -> path without and with a claim
    "plain": ("rules", "rules"),
    "dropout": ("rules", "rules"),
    "own_container": ("func", "func"),
    "Tied": ("func", "func"),
    "Twice": ("func", "func"),
    "twice_in_sequence": ("loop", "loop"),
    "frozen": ("func", "func"),
    "frozen_at_random": ("func", "func"),
    "Buffered": ("func", "func"),
    "hooked": ("func", "func"),
    "hooked_backward": ("loop", "loop"),
    "hooked_parameter": ("loop", "loop"),
    "weight_norm": ("loop", "loop"),
    "Float64": ("func", "func"),
    "all_float64": ("func", "func"),
    "Bfloat16": ("loop", "loop"),
    "all_bfloat16": ("loop", "loop"),
    "Gru": ("func", "func"),
    "Lstm": ("loop", "loop"),
    "GruDropout": ("loop", "loop"),
    "LstmDropout": ("loop", "loop"),
    "Attention": ("func", "func"),
    "AttentionDropout": ("loop", "loop"),
    "Encoder": ("loop", "loop"),
    "EncoderDropout": ("loop", "loop"),
    "FunctionalDropout": ("loop", "loop"),
    "feature_alpha_dropout": ("loop", "loop"),
    "Branching": ("loop", "loop"),
    "Checkpointed": ("loop", "loop"),
    "InPlace": ("func", "func"),
    "OwnFunction": ("loop", "loop"),
}

REFUSED: dict[str, str] = {
    "Centred": "Centred mixes the rows of a batch",
    "CentredQuietly": "CentredQuietly mixes the rows of a batch",
    "ScaledInside": "Inner 'scale' mixes the rows of a batch",
    "BySize": "BySize mixes the rows of a batch",
    "MixingInTraining": "MixingInTraining mixes the rows of a batch",
    "Running": "Running changes its buffer 'mean'",
    "spectral_norm": r"_SpectralNorm '0\.parametrizations\.weight\.0' changes its buffer",
    "batch_norm": r"BatchNorm1d '1' changes its buffer '1\.(running|num)_\w+'.*nn\.LayerNorm",
    "DropoutTwice": "Dropout 'drop' is used 2 times in one pass",
    "AlwaysDropping": "AlwaysDropping draws at random in evaluation",
    "NumpyNoise": "NumpyNoise draws from the generator of numpy or of Python",
    "PythonNoise": "PythonNoise draws from the generator of numpy or of Python",
    "OwnGenerator": "OwnGenerator changes its attribute 'generator'",
    "Counting": "Counting changes its attribute 'calls'",
    "FirstBatch": "FirstBatch changes its attribute 'shift'",
    "LaterMeans": "LaterMeans changes its attribute 'seen'",
    "lazy": r"parameter '0\.weight' has no size yet",
    "WrongShape": r"outputs \(6,\) for 6 made-up rows; expected real numbers of shape \(6, 1\)",
    "Detached": "the gradient of Detached cannot be taken",
    "FailsInTraining": "Failing 'part' fails on 6 made-up rows in training: RuntimeError: no such operator",
    "FailsAlone": "FailsAlone fails on 1 made-up row in evaluation: AssertionError: too few rows",
    "FailsBackward": (
        "the gradient of FailsBackward cannot be taken: NotImplementedError: no derivative of this"
    ),
    "none_finite": "its outputs for 6 made-up rows are not finite",
}

UNREPEATED = {
    "another_each_time": r"'0\.weight' is another at each build from one seed",
    "one_for_all": "returns the same module every time",
}


def _probe(
    name: str, private: bool, task: Task = "binary", outputs: int = 1, asked: Any = "auto"
) -> Probed:
    x_BF = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    model = zoo.build(f"tests.modules:{name}", FEATURES, outputs, {}, 5)
    return probe.probe(model, f"model.name={name!r}", x_BF, task, outputs, private, asked)


def test_every_module_of_the_collection_is_judged() -> None:
    mine = {
        name
        for name, made in vars(modules).items()
        if getattr(made, "__module__", "") == modules.__name__
    }
    judged = TAKEN.keys() | REFUSED.keys() | UNREPEATED.keys()
    assert {name for name in mine if not name.startswith("_")} - {"Inner", "Failing"} == judged


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", TAKEN)
def test_the_fastest_right_path_is_taken(name: str, private: bool) -> None:
    found = _probe(name, private)
    assert found.path == TAKEN[name][private], found.reasons
    assert len(found.reasons) == probe.PATHS.index(found.path)  # one for each faster path


@pytest.mark.parametrize("name", ["plain", "Gru", "AttentionDropout", "hooked"])
def test_for_every_task(name: str) -> None:
    for task, outputs in (("multiclass", 3), ("regression", 1)):
        assert _probe(name, True, task, outputs).path == TAKEN[name][1]  # type: ignore[arg-type]


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_right_is_refused_by_name(name: str, private: bool) -> None:
    with pytest.raises(PlanError, match=REFUSED[name]) as refusal:
        _probe(name, private)
    told = str(refusal.value)
    # who, what, and what to do
    assert told.startswith(f"model.name={name!r}: ") and told.endswith(".")


@pytest.mark.parametrize("name", UNREPEATED)
def test_a_model_that_no_seed_repeats_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match=UNREPEATED[name]):
        zoo.check_repeats(
            f"tests.modules:{name}", lambda: zoo.build(f"tests.modules:{name}", FEATURES, 1, {}, 5)
        )


@pytest.mark.parametrize("name", [*TAKEN, "Running", "spectral_norm", "FailsBackward"])
def test_a_probe_leaves_everything_as_it_was(name: str) -> None:
    model = zoo.build(f"tests.modules:{name}", FEATURES, 1, {}, 5)
    before = {n: v.detach().clone() for n, v in [*model.named_parameters(), *model.named_buffers()]}
    generator, of_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    hooks = sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules())
    x_BF = torch.randn(ROWS, FEATURES, generator=torch.Generator().manual_seed(0))

    for private in (False, True):
        try:
            probe.probe(model, "model", x_BF, "binary", 1, private)
        except PlanError:
            assert name not in TAKEN

    after = {n: v for n, v in [*model.named_parameters(), *model.named_buffers()]}
    keys = {n for n in before if n.endswith("key")}  # of dropout: set before every use
    assert (
        all(torch.equal(before[n], after[n]) for n in before.keys() - keys)
        and before.keys() == after.keys()
    )
    assert torch.equal(generator, torch.get_rng_state())
    assert (of_numpy == np.random.get_state()[1]).all()  # type: ignore[index]
    assert hooks == sum(
        len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()
    )
    assert all(p.grad is None for p in select_trained(model).values())


def test_a_path_that_the_study_names_must_be_right() -> None:
    with pytest.raises(
        PlanError, match=r"training\.path='rules' does not serve it: no layer rule for Gru"
    ):
        _probe("Gru", True, asked="rules")
    with pytest.raises(
        PlanError, match=r"training\.path='func' does not serve it: GRU 'enc' draws"
    ):
        _probe("GruDropout", True, asked="func")
    assert _probe("Gru", True, asked="loop") == Probed("loop")


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo_takes_rules_at_every_width(name: str) -> None:
    """Also where a product has few rows or columns: a norm's bits must not hang on the company."""
    for features in (4, 12, 31, 189):
        for outputs, task in ((1, "binary"), (3, "multiclass"), (5, "multiclass")):
            model = zoo.build(name, features, outputs, {}, 5)
            x_BF = torch.randn(ROWS, features, generator=torch.Generator().manual_seed(0)).clamp(
                -2, 2
            )
            found = probe.probe(model, name, x_BF, task, outputs, private=True)  # type: ignore[arg-type]
            assert found.path == "rules", found.reasons


# Whole runs ---------------------------------------------------------------------------------------


def _study(folder: Path, name: str, private: bool) -> Study:
    path = tables.write_study(folder, tables.PRIVATE if private else tables.STUDY)
    study = studies.load(path).set("model.name", f"tests.modules:{name}")
    return study.set("training.rounds", 2).set("monitor.baselines", False)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "plain",
        "frozen_at_random",
        "Buffered",
        "Twice",
        "all_bfloat16",
        "all_float64",
        "Gru",
        "AttentionDropout",
    ],
)
def test_the_saved_model_is_the_reported_one(tmp_path: Path, name: str, private: bool) -> None:
    """Predictions of the loaded model are those of the run's own, and its figures are the
    summary's.
    """
    study = _study(tmp_path, name, private)
    result = medfed.run(study, tmp_path / "run")
    loaded = medfed.load(tmp_path / "run")
    frame = tables.invented()
    predicted = result.predict(frame)
    again = loaded.predict(frame)
    assert np.array_equal(predicted.to_numpy(), again.to_numpy()) and predicted.to_numpy().std() > 0

    sites = [site for site in _sites(study)]
    encoding = loaded.encoding
    scores = []
    for table in sites:
        rows = encoding.encode(table, table.test, ~table.test)
        with torch.no_grad():
            z_NC = loaded.model(rows.x)
        scores.append(Scores.of(encoding.target.task, z_NC.float(), rows.y, encoding.target.scale))
    figures = measure(Scores.all(scores), intervals=True)
    assert figures["auroc"].value == result.summary["test"]["auroc"]


def _sites(study: Study) -> list[Any]:
    from medfed.runs import open_sites

    return [site.table for site in open_sites(study, None)]


DRAWING = ["LstmDropout", "EncoderDropout", "FunctionalDropout"]


@pytest.mark.parametrize(
    "name",
    [
        "GruDropout",
        "AttentionDropout",
        *(pytest.param(name, marks=pytest.mark.long) for name in DRAWING),
    ],
)
def test_two_runs_of_one_seed_give_the_same_bits(tmp_path: Path, name: str) -> None:
    """Also where a module draws from torch's generator, which others may have moved."""
    for private in (False, True):
        study = _study(tmp_path, name, private)
        study = study.set("training.rounds", 1).set("privacy.simulation_only", private)
        one = medfed.simulate(study)
        torch.rand(17)
        two = medfed.simulate(study)
        other = medfed.simulate(study.set("study.seed", 4))
        assert torch.equal(one.w_P, two.w_P) and not torch.equal(one.w_P, other.w_P)


def test_a_slower_path_is_said_with_its_reason(tmp_path: Path) -> None:
    study = _study(tmp_path, "GruDropout", private=True)
    warned = medfed.run(study, tmp_path / "run").summary["warnings"]
    told = [text for text in warned if "slower" in text]
    assert (
        len(told) == 1
        and "record by record" in told[0]
        and "GRU 'enc' draws from torch's generator" in told[0]
    )


def test_a_refused_module_costs_no_patient_anything(tmp_path: Path) -> None:
    study = _study(tmp_path, "FailsBackward", private=True)
    with pytest.raises(PlanError, match="no derivative of this operator"):
        medfed.run(study, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_site_whose_frozen_part_is_another_refuses(tmp_path: Path) -> None:
    from medfed.core import codec
    from medfed.runs import open_sites

    study = _study(tmp_path, "frozen", private=False)
    site = open_sites(study, None)[0]
    encoding = medfed.simulate(study).encoding
    header = {"encoding": encoding.to_json(), "sizes": {}, "clients": [], "fixed": "0" * 64}
    with pytest.raises(Exception, match="frozen parts or buffers are not the coordinator's"):
        site.handle("prepare", codec.encode(header))


def test_a_model_that_is_no_factory_is_still_refused() -> None:
    with pytest.raises(StudyError, match="cannot be imported"):
        zoo.build("tests.modules:absent", 4, 1, {}, 5)


def test_weights_are_means_of_float32_where_a_module_holds_halves() -> None:
    from medfed.core.flat import vector

    model = modules.all_bfloat16(4)
    assert vector(model).dtype == torch.float32 and next(model.parameters()).dtype == torch.bfloat16
    assert vector(nn.Linear(2, 1).double()).dtype == torch.float64


@pytest.mark.long
def test_the_table_of_modules_in_the_docs_is_the_probes() -> None:
    root = Path(__file__).resolve().parents[2]
    sys.path.insert(0, str(root / "scripts"))
    from make_docs import modules_table

    assert modules_table() in (root / "docs" / "privacy.md").read_text(), (
        "run scripts/make_docs.py --modules"
    )
