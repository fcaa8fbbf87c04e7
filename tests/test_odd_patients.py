"""One odd patient moves a released sum by at most what is paid for, whoever else is there, on every
path.

`benchmarks/odd_patients.py` asks the same of a million patients.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medfed.core.flat import vector
from medfed.core.types import Task
from medfed.data.federated import Patients, Rows
from medfed.learn import dpsgd, zoo
from medfed.learn.local import Path
from medfed.learn.zoo import Dropout, Embedding, Series
from medfed.privacy import odd_patients
from medfed.privacy.guarantee import SLACK, Guarantee, Release

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = 8
CLIPPINGS = ("automatic", "fixed", "adaptive")
TASKS: tuple[Task, ...] = ("binary", "multiclass", "regression")


def _wide(f: int, o: int) -> nn.Module:
    return zoo.mlp(f, o, (48, 40))


def _tokens(f: int, o: int) -> nn.Module:
    return nn.Sequential(Series(4), nn.Linear(f // 4, 6), nn.Tanh(), nn.Flatten(), nn.Linear(24, o))


def _images(f: int, o: int) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, f // 2)), nn.Conv2d(1, 3, 2), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(3, o),
    )  # fmt: skip


def _words(f: int, o: int) -> nn.Module:
    return nn.Sequential(Embedding(5, 3), nn.Flatten(), nn.Linear(3 * f, o))


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "logistic": zoo.logistic,
    "mlp": zoo.mlp,
    "wide": _wide,
    "no bias": lambda f, o: nn.Sequential(
        nn.Linear(f, 30, bias=False), nn.SiLU(), nn.Linear(30, o, bias=False)
    ),
    "layer norm": lambda f, o: zoo.medical_mlp(f, o, (24, 16)),
    "group norm": lambda f, o: zoo.mlp(f, o, (16, 16), 0.2, "group"),
    "conv1d": lambda f, o: zoo.conv1d(f, o, 2, (4, 8), 3),
    "tokens": _tokens,
    "images": _images,
    "words": _words,
    "dropout": lambda f, o: nn.Sequential(
        nn.Linear(f, 20), nn.LeakyReLU(), Dropout(0.4), nn.Linear(20, o)
    ),
}


def moved(
    model: nn.Module,
    w_P: Tensor,
    task: Task,
    clipping: str,
    clip: float,
    path: Path,
    rng: np.random.Generator,
    K: int,
) -> Tensor:
    """Return how far one odd patient moves each of K sums, in units of the clip; the others are
    odd, too.
    """
    classes = 3 if task == "multiclass" else 2
    most = int(rng.choice([2, 2, 3, 8, 64]))  # a cohort's largest decides how the norm is taken

    indices = any(isinstance(layer, Embedding) for layer in model.modules())

    def drawn() -> odd_patients.Records:
        x_RF, y_R = odd_patients.draw(
            rng, FEATURES, task, classes, bool(rng.random() < 0.9) or indices, most
        )
        return np.clip(x_RF, 0, 4) if indices else x_RF, y_R

    groups = [[drawn() for _ in range(int(rng.integers(1, 6)))] for _ in range(5)]
    others = [groups[k % len(groups)] for k in range(K)]
    return difference(model, w_P, task, clipping, clip, path, others, [drawn() for _ in range(K)])


def difference(
    model: nn.Module,
    w_P: Tensor,
    task: Task,
    clipping: str,
    clip: float,
    path: Path,
    others: list[list[odd_patients.Records]],
    ones: list[odd_patients.Records],
) -> Tensor:
    """Return how far each of K sums moves [K] when one more patient joins the others, in units of
    the clip.
    """
    K = len(ones)
    release = {str(k): Release(6, 1, 1.0, 1.0) for k in range(K)}
    guarantee = Guarantee(
        "shared", 1.0, 1e-6, 0.0, "gdp", release, 1, 1, len(w_P), clip, clipping, 1, False
    )

    def sums(people: list[list[odd_patients.Records]]) -> dpsgd.Sums:
        patients = Patients.of([_rows(mine, task, 31 * k) for k, mine in enumerate(people)])
        return dpsgd.sums(
            model, w_P, patients, task, guarantee, clip, list(release), torch.arange(K) * 101, path
        )

    before = sums(others)
    after = sums([[*mine, one] for mine, one in zip(others, ones, strict=True)])
    assert ((after.below_K - before.below_K).abs() <= 0.5).all()
    return (after.total_KP - before.total_KP).norm(dim=1)


def _rows(people: list[odd_patients.Records], task: Task, first: int) -> Rows:
    patient = torch.repeat_interleave(
        torch.arange(len(people)), torch.tensor([len(y) for _, y in people])
    )
    y_N = torch.from_numpy(np.concatenate([y for _, y in people]))
    y_N = y_N.long() if task == "multiclass" else y_N
    return Rows(
        torch.from_numpy(np.concatenate([x for x, _ in people])),
        y_N,
        patient,
        patient * 7919 + first,
    )


def _case(name: str, task: Task, seed: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model = zoo._key_dropouts(MODELS[name](FEATURES, 3 if task == "multiclass" else 1))
    w_P = vector(model)
    return model, w_P + float(torch.rand(()) * 2) * torch.randn(len(w_P))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MODELS)
def test_one_odd_patient_moves_a_sum_by_at_most_the_clip(name: str, task: Task) -> None:
    for seed, clipping in enumerate(CLIPPINGS):
        model, w_P = _case(name, task, seed)
        rng = np.random.default_rng([seed, len(name)])
        clip = float(rng.choice([1e-2, 1.0, 30.0]))
        furthest = moved(model, w_P, task, clipping, clip, "auto", rng, 60).max()
        assert float(furthest) <= 1 + SLACK, (clipping, clip)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", MODELS)
def test_on_the_slower_path_too(name: str, task: Task) -> None:
    model, w_P = _case(name, task, 3)
    rng = np.random.default_rng(len(name))
    assert float(moved(model, w_P, task, "automatic", 1.0, "func", rng, 12).max()) <= 1 + SLACK


def _frail(rng: np.random.Generator) -> odd_patients.Records:
    """Return a patient whose gradient is what rounding leaves of two huge ones: its direction hangs
    on the last bit.
    """
    x_F = rng.standard_normal(FEATURES).astype(np.float32)
    next_F = x_F.copy()
    next_F[0] = np.nextafter(x_F[0], np.float32(9))
    return np.stack([x_F, next_F]), np.array([1e12, -1e12], np.float32)


@pytest.mark.parametrize("path", ["rules", "func", "loop"])
@pytest.mark.parametrize(
    "name", ["logistic", "mlp", "wide", "layer norm", "conv1d", "tokens", "images"]
)
def test_one_more_patient_leaves_the_bits_of_the_others_alone(name: str, path: Path) -> None:
    """Products of other shapes round otherwise; where all others are frail, each would then move by
    up to the clip.
    """
    model, w_P = _case(name, "regression", 5)
    for n in (1, 2, 3, 8, 40):
        rng = np.random.default_rng(n)
        others = [_frail(rng) for _ in range(n)]
        for records in (1, 3, 9):
            one = (
                rng.standard_normal((records, FEATURES)).astype(np.float32),
                np.full(records, 0.5, np.float32),
            )
            moved = difference(model, w_P, "regression", "automatic", 1.0, path, [others], [one])
            assert float(moved) <= 1 + 1e-9, (n, records)
        if path == "loop":
            break


@pytest.mark.parametrize("path", ["rules", "func"])
def test_one_more_device_leaves_the_bits_of_the_others_alone(path: Path) -> None:
    """Devices of one record share a chunk and a shape; one of two records comes to another."""
    model, w_P = _case("mlp", "regression", 5)
    rng = np.random.default_rng(1)
    people = [(x[:1], y[:1]) for x, y in (_frail(rng) for _ in range(9))]
    names = [str(k) for k in range(10)]
    guarantee = Guarantee(
        "shared", 1.0, 1e-6, 0.0, "gdp", {n: Release(1, 1, 1.0, 1.0) for n in names}, 1, 1, len(w_P), 1.0, "fixed", 1,
        False,
    )  # fmt: skip

    def sums(devices: list[odd_patients.Records]) -> Tensor:
        patients = Patients.of(
            [_rows([one], "regression", 31 * k) for k, one in enumerate(devices)]
        )
        keys = torch.arange(len(devices))
        return dpsgd.sums(
            model, w_P, patients, "regression", guarantee, 1.0, names[: len(devices)], keys, path
        ).total_KP

    before = sums(people)
    after = sums([*people, _frail(rng)])
    assert torch.equal(before, after[:9])


@pytest.mark.parametrize("name", ["logistic", "mlp", "wide", "layer norm", "conv1d", "tokens"])
def test_a_site_has_the_same_bits_alone_and_in_a_stack(name: str) -> None:
    """Which sites share a chunk follows from true sizes, so it must not matter."""
    for features in (8, 30) if name != "tokens" else (8,):
        torch.manual_seed(1)
        model = zoo._key_dropouts(MODELS[name](features, 1))
        w_P = vector(model) + torch.randn(len(vector(model)))
        rng = np.random.default_rng(2)
        people = []
        for _ in range(9):
            x_F = rng.standard_normal(features).astype(np.float32)
            people.append((np.stack([x_F, x_F]), np.array([1e12, -1e12], np.float32)))
        sites = [
            _rows(mine, "regression", 31 * k)
            for k, mine in enumerate([people[:3], people[3:8], people[8:]])
        ]
        stacked = _by_rules(model, w_P, sites)
        alone = torch.cat([_by_rules(model, w_P, [rows]) for rows in sites])
        assert float((stacked - alone).norm()) < 1e-9


def _by_rules(model: nn.Module, w_P: Tensor, sites: list[Rows]) -> Tensor:
    names = [str(k) for k in range(len(sites))]
    release = {name: Release(6, 1, 1.0, 1.0) for name in names}
    guarantee = Guarantee(
        "shared", 1.0, 1e-6, 0.0, "gdp", release, 1, 1, len(w_P), 1.0, "fixed", 1, False
    )
    keys = torch.zeros(len(sites), dtype=torch.int64)
    return dpsgd.sums(
        model, w_P, Patients.of(sites), "regression", guarantee, 1.0, names, keys, "rules"
    ).total_KP


def test_what_a_module_draws_is_the_patients_own_whoever_comes_first() -> None:
    """Dropout that only torch's generator feeds: masks by the row moved everybody's when the first
    patient left.
    """

    class Drawing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(FEATURES, 16)
            self.last = nn.Linear(16, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(
                torch.nn.functional.dropout(torch.tanh(self.first(x)), 0.5, self.training)
            )

    torch.manual_seed(0)
    model = Drawing()
    w_P = vector(model)
    rng = np.random.default_rng(0)
    people = [
        (rng.standard_normal((1, FEATURES)).astype(np.float32), np.ones(1, np.float32))
        for _ in range(20)
    ]
    rows = _rows(people, "binary", 0)
    release = {"a": Release(20, 1, 1.0, 1.0)}
    guarantee = Guarantee(
        "shared", 1.0, 1e-6, 0.0, "gdp", release, 1, 1, len(w_P), 1e-3, "fixed", 1, False
    )

    def total(rows: Rows, round: int = 5) -> Tensor:
        key = torch.tensor([round])
        return dpsgd.sums(
            model, w_P, Patients.of([rows]), "binary", guarantee, 1e-3, ["a"], key, "loop"
        ).total_KP[0]

    every = torch.ones(20, dtype=torch.bool)
    for gone in (0, 7, 19):
        left = every.clone()
        left[gone] = False
        assert float((total(rows) - total(rows.at(left))).norm()) <= 1 + 1e-9
    assert not torch.equal(total(rows), total(rows, 6))  # and another mask in another round
