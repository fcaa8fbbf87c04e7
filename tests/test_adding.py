"""What CONTRIBUTING says about adding a part is done here, each in one place and without touching another."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import medfed
from medfed.algorithms import ALGORITHMS, Algorithm, Memory, Server, Task
from medfed.core.checks import PlanError
from medfed.local import Correction, LocalResult
from medfed.robust.rules import ALONE, GramRule, rule_of
from medfed.study import Training
from tests.tables import PRIVATE, STUDY, write_study
from tests.test_algorithms import FULL_BATCH, SIZES, TABLES, Federation, _linear, _of, _optimum, _quadratic
from tests.test_reference import agree, refused, study_of

pytestmark = pytest.mark.usefixtures("one_thread")

# An algorithm: FedDyn (Acar et al. 2021, arXiv:2111.04263, algorithm 1). Client k descends on
# f_k(w) - <lag_k, w> + mu/2 |w - w_server|^2; lag_k moves by -mu (w_k - w_server), and the server's own by the mean.


def pulled(task: Task, memory: Memory, h: Training) -> Correction:
    return Correction(mu=h.mu, shift_KP=-memory["lag"])


def lagging(task: Task, memory: Memory, local: LocalResult, h: Training) -> tuple[Tensor, Memory]:
    delta_KP = local.theta_KP - task.w_P
    return delta_KP, {"lag": memory["lag"] - h.mu * delta_KP}


def dynamic(server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
    lag_P = server.slots["lag"] - h.mu * share * mean_M
    return Server(server.round + 1, server.w_P + mean_M - lag_P / h.mu, {"lag": lag_P})


FEDDYN = Algorithm(
    "Acar et al. 2021, arXiv:2111.04263",
    dynamic,
    correct=pulled,
    message=lagging,
    start=lambda h: {"lag": 0.0},
    kept=("lag",),
)


@pytest.fixture
def feddyn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALGORITHMS, "feddyn", FEDDYN)


@pytest.mark.usefixtures("feddyn")
def test_an_added_algorithm_finds_the_optimum_that_fedavg_misses() -> None:
    """FedDyn's law: where local steps run to their own end, its fixed point is the common optimum."""
    h = replace(FULL_BATCH, algorithm="feddyn", mu=0.5, local_steps=200, learning_rate=0.05)
    equal = [1.0] * len(SIZES)
    best = _optimum([_quadratic(x, y) for x, y in TABLES], [1 / 3] * 3)
    dyn = Federation(h, _linear(2), _of(TABLES), equal).run(80)
    average = Federation(replace(h, algorithm="fedavg"), _linear(2), _of(TABLES), equal).run(80)
    np.testing.assert_allclose(dyn.w, best, atol=1e-6)
    assert np.abs(average.w - best).max() > 1e-2


@pytest.mark.usefixtures("feddyn")
def test_an_added_algorithm_runs_as_the_reference_does_and_resumes(tmp_path: Path) -> None:
    for way in ("plain", "masked", "three-party"):
        agree(study_of(tmp_path, "feddyn", "none", way, "mean"), 3)
    agree(study_of(tmp_path, "feddyn", "site", "plain", "mean"), 3)
    study = medfed.load_study(write_study(tmp_path, STUDY.replace("batch_size", 'algorithm = "feddyn"\nbatch_size')))
    whole = medfed.run(study, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("medfed.runs.drive.test", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            medfed.run(study, tmp_path / "cut")
    assert torch.equal(medfed.resume(tmp_path / "cut").w_P, whole.w_P)


@pytest.mark.usefixtures("feddyn")
@pytest.mark.parametrize("noise", ["shared", "central"])
def test_an_added_algorithm_is_refused_where_a_round_is_one_joint_step(tmp_path: Path, noise: str) -> None:
    """The attack: `apply` ran, `correct` and `message` never did, and nobody was told."""
    study = medfed.load_study(write_study(tmp_path, PRIVATE)).set("privacy.noise", noise)
    with pytest.raises(PlanError, match=r"training.algorithm=.feddyn. and privacy.noise=.* do not compose"):
        medfed.run(study.set("training.algorithm", "feddyn"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_algorithm_says_what_a_joint_step_makes_of_it() -> None:
    """By a default that refuses: those whose clients do more than FedAvg's must coincide with it, or not be allowed."""
    plain = ALGORITHMS["fedavg"]
    for name, algorithm in ALGORITHMS.items():
        same = (algorithm.correct, algorithm.message, algorithm.kept) == (plain.correct, plain.message, plain.kept)
        assert same or algorithm.joint != "server step", name


# A rule: the row that is nearest to the others' mean.


def nearest_to_mean(gram_KK: Tensor, f: int, radius: float | None) -> Tensor:
    squares_K = gram_KK.diagonal() - 2 * gram_KK.mean(1) + gram_KK.mean()
    return torch.nn.functional.one_hot(squares_K.argmin(), len(gram_KK)).double()


def test_an_added_rule_runs_everywhere_and_is_not_let_open_single_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = GramRule(nearest_to_mean, lambda f: 2 * f + 1, 0.5, "none", one_row=True)
    monkeypatch.setitem(ALONE, "nearest", rule)
    agree(study_of(tmp_path, "fedavg", "none", "plain", "nearest"))
    agree(study_of(tmp_path, "fedavg", "none", "three-party", "nnm+nearest"))
    for name in ("nearest", "bucketing+nearest"):
        assert rule_of(name, 1).weighs_few_rows
        assert "opens single rows" in refused(study_of(tmp_path, "fedavg", "none", "three-party", name))
