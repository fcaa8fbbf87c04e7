"""Training under differential privacy: nobody moves a sum by more than the clip, and the noise is
what is paid for.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from medfed.core.flat import fill, select_trained, vector
from medfed.core.types import Task
from medfed.data.federated import Patients, Rows, Stack
from medfed.learn import dpsgd, local, zoo
from medfed.learn.dpsgd import Sums, next_clip, sums, train
from medfed.learn.local import Correction, LocalPlan, Path, sample_loss
from medfed.learn.zoo import _key_dropouts
from medfed.links.wire import combine, joint_links
from medfed.privacy.guarantee import COUNT_NOISE, GRID, SLACK, Guarantee, Mode, Release

pytestmark = pytest.mark.usefixtures("one_thread")

FEATURES = 16
SIZES = (7, 1, 0, 12, 3)
NAMES = tuple("abcde")
QUIET = 1e-12  # a noise multiplier that nobody sees
RARE = 1e-9  # how often a statistical test may refuse what is right

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "logistic": zoo.logistic,
    "mlp": lambda f, o: zoo.mlp(f, o, (6, 5)),
    "medical-mlp": lambda f, o: zoo.medical_mlp(f, o, (6, 5)),  # with layer norm and dropout
    "group norm": lambda f, o: zoo.mlp(f, o, (8, 8), 0.2, "group"),
    "conv1d": lambda f, o: zoo.conv1d(f, o, 2, (4, 8), 3),
}
CLIPPINGS = ("automatic", "fixed", "adaptive")


def _model(name: str, task: Task = "binary", dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return _key_dropouts(MODELS[name](FEATURES, 3 if task == "multiclass" else 1)).to(dtype)


def _weights(model: nn.Module, scale: float = 0.5) -> Tensor:
    torch.manual_seed(1)
    return vector(model) + scale * torch.randn(len(vector(model))).to(vector(model).dtype)


def _rows(
    patients: int,
    seed: int,
    task: Task = "binary",
    records: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Rows:
    """Return invented patients with 1 to `records` records each, every one with a stream of its
    own.
    """
    random = np.random.default_rng([seed, patients, records])
    patient = torch.arange(patients).repeat_interleave(
        torch.from_numpy(random.integers(1, records + 1, patients))
    )
    N = len(patient)
    x = torch.from_numpy(random.normal(size=(N, FEATURES))).to(dtype)
    labels = {
        "binary": torch.from_numpy(random.integers(0, 2, N)).to(dtype),
        "multiclass": torch.from_numpy(random.integers(0, 3, N)),
        "regression": torch.from_numpy(random.normal(size=N)).to(dtype),
    }

    return Rows(x, labels[task], patient, patient * 7919 + 104729 * seed + 1)


def _joined(one: Rows, other: Rows) -> Rows:
    """Return one client's rows with another's patients added."""
    after = int(one.patient.max()) + 1 if len(one) else 0
    assert one.key is not None and other.key is not None
    return Rows(
        torch.cat([one.x, other.x]),
        torch.cat([one.y, other.y]),
        torch.cat([one.patient, other.patient + after]),
        torch.cat([one.key, other.key]),
    )


def _cohort(
    task: Task = "binary", records: int = 1, dtype: torch.dtype = torch.float64
) -> list[Rows]:
    return [_rows(size, k, task, records, dtype) for k, size in enumerate(SIZES)]


def _guarantee(
    parameters: int,
    sizes: Sequence[int] = SIZES,
    mode: Mode = "shared",
    clipping: str = "automatic",
    clip: float = 1.0,
    noise: float = 1.0,
    steps: int = 1,
    probability: float | Sequence[float] = 1.0,
    cap: int | Sequence[int] = 0,
    max_sites: int = 1,
    simulation_only: bool = True,
) -> Guarantee:
    """Return a guarantee whose noise is given, where `resolve` would ask an accountant for it."""
    shares = [probability] * len(sizes) if isinstance(probability, float) else probability
    caps = [cap] * len(sizes) if isinstance(cap, int) else cap
    parts = zip(NAMES, sizes, shares, caps, strict=False)
    releases = {
        name: Release(max(1, size), steps, share, noise, most) for name, size, share, most in parts
    }

    return Guarantee(
        mode, 1.0, 1e-6, 0.0, "rdp", releases, 1, 1, parameters, clip, clipping, max_sites, simulation_only
    )  # fmt: skip


def _keys(count: int, seed: int = 0) -> Tensor:
    return torch.arange(count) * 1_000_003 + seed


def _sums(
    model: nn.Module,
    clients: list[Rows],
    guarantee: Guarantee,
    task: Task = "binary",
    path: Path = "auto",
    seed: int = 0,
) -> Sums:
    names = NAMES[: len(clients)]
    patients = Patients.of(clients)
    keys = _keys(len(clients), seed)
    return sums(
        model, _weights(model), patients, task, guarantee, guarantee.clip, names, keys, path
    )


# two paths and a plain twin -----------------------------------------------------------------------


def _agree(one: Tensor, other: Tensor, bound: float = 1e-9) -> bool:
    return bool(((one - other).abs() <= bound * (1 + other.abs())).all())


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_sums_by_rules_are_those_of_torch_func(name: str, records: int) -> None:
    for task, clipping in zip(("binary", "multiclass", "regression"), CLIPPINGS, strict=True):
        model = _model(name, task)
        clients = _cohort(task, records)
        guarantee = _guarantee(len(vector(model)), clipping=clipping, clip=0.7)
        one, other = (_sums(model, clients, guarantee, task, path) for path in ("rules", "func"))
        assert _agree(one.total_KP, other.total_KP)
        assert torch.equal(one.below_K, other.below_K)
        assert one.total_KP[[0, 1, 3, 4]].norm(dim=1).min() > 0.1 and not one.total_KP[2].any()


OPTIMISERS = {
    "sgd": LocalPlan("binary", learning_rate=0.3),
    "momentum and decay": LocalPlan("binary", learning_rate=0.1, momentum=0.9, weight_decay=0.1),
    "adam": LocalPlan("binary", optimizer="adam", learning_rate=0.05, epsilon=1e-3),
}


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.parametrize("name", MODELS)
def test_training_by_rules_is_that_by_torch_func(name: str, optimiser: str) -> None:
    """With sampling, several records, a pull, a shift, averaged iterates and seeded noise."""
    model = _model(name)
    clients = _cohort(records=3)
    plan = OPTIMISERS[optimiser]
    start_KP = torch.stack([_weights(model, k / 10) for k in range(len(SIZES))])
    guarantee = _guarantee(start_KP.shape[1], mode="site", steps=4, probability=0.6, noise=0.1)
    correction = Correction(0.1, 0.05 * torch.randn(start_KP.shape, dtype=torch.float64))
    arguments = (Patients.of(clients), plan, guarantee, NAMES, _keys(5), correction, 0.5)
    one, other = (train(model, start_KP, *arguments, path) for path in ("rules", "func"))
    assert _agree(one.theta_KP, other.theta_KP)
    assert one.steps_K.tolist() == [4] * 5 and one.loss_K.isnan().all()  # losses are not told
    assert (one.theta_KP - start_KP).norm(dim=1).min() > 0.01


def _by_hand(model: nn.Module, rows: Rows, guarantee: Guarantee, task: Task) -> Tensor:
    """Return a client's clipped sum by autograd, patient by patient: the plain twin."""
    total = torch.zeros(guarantee.parameters, dtype=torch.float64)
    for patient in rows.patient.unique():
        own = rows.patient == patient
        loss = sample_loss(task, model(rows.x[own]), rows.y[own]).sum()
        g = torch.cat(
            [p.reshape(-1) for p in torch.autograd.grad(loss, list(select_trained(model).values()))]
        )
        norm = float(g.norm())
        total += (
            g / (norm + 0.01)
            if guarantee.clipping == "automatic"
            else g / max(norm, guarantee.clip)
        )
    return total


@pytest.mark.parametrize("path", ["rules", "func"])
@pytest.mark.parametrize("task", ["binary", "multiclass", "regression"])
def test_a_sum_is_that_of_gradients_clipped_one_patient_at_a_time(task: Task, path: Path) -> None:
    for clipping in CLIPPINGS:
        model = _model("mlp", task)
        clients = _cohort(task, records=3)
        guarantee = _guarantee(len(vector(model)), clipping=clipping, clip=1.5)
        found = _sums(model, clients, guarantee, task, path)
        fill(model, _weights(model))
        expected = torch.stack([_by_hand(model, rows, guarantee, task) for rows in clients])
        assert _agree(found.total_KP, expected)


def test_without_clipping_and_noise_a_step_is_a_plain_one() -> None:
    """Full batches, one record a patient, nobody above the norm: the mean gradient, as
    in local.py.
    """
    model = _model("mlp")
    clients = _cohort()
    start_KP = torch.stack([_weights(model)] * len(SIZES))
    plan = LocalPlan("binary", steps=5, batch_size=0, learning_rate=0.3, momentum=0.5)
    guarantee = _guarantee(
        start_KP.shape[1], mode="site", clipping="fixed", clip=1e3, steps=5, noise=QUIET
    )
    private = train(model, start_KP, Patients.of(clients), plan, guarantee, NAMES, _keys(5))
    plain = local.train(model, start_KP, Stack.of(clients), plan, _keys(5))
    assert _agree(private.theta_KP[[0, 1, 3, 4]], plain.theta_KP[[0, 1, 3, 4]], 1e-6)
    assert _agree(private.theta_KP[2], start_KP[2], 1e-6)  # nobody is there: noise alone


@pytest.mark.parametrize("records", [1, 3])
@pytest.mark.parametrize("name", MODELS)
def test_sums_by_torch_func_are_those_of_one_record_at_a_time(name: str, records: int) -> None:
    for task, clipping in zip(("binary", "multiclass", "regression"), CLIPPINGS, strict=True):
        model = _model(name, task)
        clients = _cohort(task, records)
        guarantee = _guarantee(len(vector(model)), clipping=clipping, clip=0.7)
        one, other = (_sums(model, clients, guarantee, task, path) for path in ("func", "loop"))
        assert _agree(one.total_KP, other.total_KP)
        assert torch.equal(one.below_K, other.below_K)


# clients and chunks -------------------------------------------------------------------------------


@pytest.mark.parametrize("probability", [1.0, 0.5])
@pytest.mark.parametrize("name", ["logistic", "medical-mlp"])
def test_a_stack_is_its_clients_one_by_one(name: str, probability: float) -> None:
    model = _model(name)
    clients = _cohort(records=2)
    start_KP = torch.stack([_weights(model, k / 10) for k in range(len(SIZES))])
    joint = _guarantee(start_KP.shape[1], probability=probability, cap=4 if probability < 1 else 0)
    alone = replace(
        joint, mode="site", releases={n: replace(r, steps=3) for n, r in joint.releases.items()}
    )
    plan = LocalPlan("binary", learning_rate=0.2)
    keys = _keys(5)
    summed = _sums(model, clients, joint)
    stacked = train(model, start_KP, Patients.of(clients), plan, alone, NAMES, keys)

    for k, rows in enumerate(clients):
        one = Patients.of([rows])
        own = (NAMES[k : k + 1], keys[k : k + 1])
        found = sums(model, _weights(model), one, "binary", joint, joint.clip, *own)
        assert (
            _agree(found.total_KP[0], summed.total_KP[k], 1e-12)
            and found.below_K[0] == summed.below_K[k]
        )
        trained_alone = train(model, start_KP[k : k + 1], one, plan, alone, *own)
        assert _agree(trained_alone.theta_KP[0], stacked.theta_KP[k], 1e-12)


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model("medical-mlp")
    clients = _cohort(records=2)
    guarantee = _guarantee(
        len(vector(model)), probability=(1.0, 0.5, 0.5, 0.5, 1.0), cap=(0, 3, 3, 3, 0)
    )
    whole = _sums(model, clients, guarantee)
    monkeypatch.setattr(dpsgd, "_CHUNK_BYTES", 1)
    pieces = _sums(model, clients, guarantee)
    assert _agree(pieces.total_KP, whole.total_KP, 1e-12) and torch.equal(
        pieces.below_K, whole.below_K
    )


def test_chunks_on_several_threads_give_the_bits_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "_CHUNK_BYTES", 1)
    model = _model("medical-mlp")
    patients = Patients.of(_cohort(records=2))
    start_KP = torch.stack([_weights(model)] * 5)
    plan = LocalPlan("binary", learning_rate=0.2, momentum=0.5)
    guarantee = _guarantee(start_KP.shape[1], mode="site", probability=0.5, steps=3)
    arguments = (model, start_KP, patients, plan, guarantee, NAMES, _keys(5))
    one = train(*arguments)
    torch.set_num_threads(2)
    two = train(*arguments)
    assert torch.get_num_threads() == 2 and torch.equal(one.theta_KP, two.theta_KP)


# sensitivity --------------------------------------------------------------------------------------

EXTREME = (0.0, -0.0, 1.0, -1.0, 1e6, -1e6, 1e30, 3e38, 1e-40, math.nan, math.inf)
CELL = st.sampled_from(EXTREME) | st.floats(-3, 3, width=32)


@dataclass(frozen=True)
class Case:
    """A site's patients (their numbers of records), one more patient, and where everything is
    asked.
    """

    others: list[int]
    cells: list[list[float]]  # of the one more: a row for each record, repeated over the features
    label: float
    name: str
    clipping: str
    clip: float
    task: Task
    path: Path
    scale: float


CASES = st.builds(
    Case,
    others=st.lists(st.integers(1, 3), max_size=4),
    cells=st.lists(st.lists(CELL, min_size=1, max_size=3), min_size=1, max_size=3),
    label=st.sampled_from([0.0, 1.0, 1e6]),
    name=st.sampled_from(["logistic", "mlp", "medical-mlp", "conv1d"]),
    clipping=st.sampled_from(CLIPPINGS),
    clip=st.sampled_from([1e-3, 1.0, 50.0]),
    task=st.sampled_from(["binary", "regression"]),
    path=st.sampled_from(["rules", "rules", "func"]),
    scale=st.sampled_from([0.5, 30.0]),
)  # fmt: skip


def _of(records: Sequence[int], seed: int) -> Rows:
    """Return patients with these numbers of records."""
    patient = torch.arange(len(records)).repeat_interleave(torch.tensor(records, dtype=torch.int64))
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(size=(len(patient), FEATURES)).astype(np.float32))
    y = torch.from_numpy(random.integers(0, 2, len(patient)).astype(np.float32))
    return Rows(x, y, patient, patient * 7919 + seed)


def _moved(case: Case) -> tuple[float, float, float]:
    """Return by how much the one more patient moves the sum and the count, and how many are dropped
    more.
    """
    model = _model(case.name, dtype=torch.float32)
    torch.manual_seed(2)
    w_P = vector(model) + case.scale * torch.randn(len(vector(model)))
    x = torch.tensor([(cells * FEATURES)[:FEATURES] for cells in case.cells])
    label = min(case.label, 1.0) if case.task == "binary" else case.label
    y = torch.full((len(x),), label)
    patient = torch.zeros(len(x), dtype=torch.int64)
    without = _of(case.others, 5)
    one = Rows(x, y, patient, patient + 99)
    guarantee = _guarantee(len(w_P), [len(case.others) + 1], clipping=case.clipping, clip=case.clip)

    def asked(rows: Rows) -> Sums:
        arguments = (Patients.of([rows]), case.task, guarantee, case.clip, ["a"], _keys(1))
        return sums(model, w_P, *arguments, case.path)

    before = asked(without)
    after = asked(_joined(without, one))
    assert after.total_KP.isfinite().all() and after.below_K.isfinite().all()
    difference = (after.total_KP - before.total_KP).norm()
    return (
        float(difference),
        float((after.below_K - before.below_K).abs()),
        after.dropped - before.dropped,
    )


@given(CASES)
@settings(max_examples=150)
# others had one
@example(Case([1, 1], [[1.0], [2.0]], 0.0, "medical-mlp", "automatic", 1.0, "binary", "rules", 0.5))
def test_one_more_patient_moves_a_sum_by_at_most_the_clip(case: Case) -> None:
    moved, counted, dropped = _moved(case)
    assert moved <= 1 + SLACK  # in units of the clip
    assert counted in (0, 0.5) and dropped in (0, 1)
    if dropped:
        assert moved <= SLACK and counted == 0  # and is as good as absent


@pytest.mark.parametrize(
    ("records", "name"), [(1, "mlp"), (3, "mlp"), (3, "medical-mlp"), (3, "logistic")]
)
def test_a_patient_of_a_large_site_moves_nobody_else(name: str, records: int) -> None:
    """What others add hardly depends on the shape of the batch: rounding alone, far below the slack
    that is counted.
    """
    model = _model(name, dtype=torch.float32)
    guarantee = _guarantee(len(vector(model)), [401], clipping="fixed", clip=1e-3)
    others = _rows(400, 1, dtype=torch.float32)
    one = _of([records], 8)
    alone, before, after = (
        _sums(model, [r], guarantee).total_KP for r in (one, others, _joined(others, one))
    )
    assert float(alone.norm()) == pytest.approx(1, abs=1e-5)
    assert float((after - before - alone).norm()) < SLACK / 10


def test_units_are_dropped_by_who_a_patient_is_whoever_else_is_there() -> None:
    """A planted bug, a stream by the slot, moves the sum by more than the clip."""
    model = _model("medical-mlp")
    guarantee = _guarantee(len(vector(model)), [20], clipping="fixed", clip=1e-3)
    others = _rows(19, 1)
    one = _of([3], 8)
    one = replace(one, x=one.x.double(), y=one.y.double())
    first, last = (
        _sums(model, [rows], guarantee).total_KP
        for rows in (_joined(one, others), _joined(others, one))
    )
    assert _agree(first, last, 1e-9)
    by_slot = (
        replace(_joined(one, others), key=torch.arange(22)),
        replace(others, key=torch.arange(19)),
    )
    after, before = (_sums(model, [rows], guarantee).total_KP for rows in by_slot)
    assert float((after - before).norm()) > 1.5


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("path", ["rules", "func"])
@pytest.mark.parametrize("name", ["logistic", "medical-mlp", "conv1d"])
def test_a_patient_that_is_not_finite_is_as_good_as_absent(
    name: str, path: Path, poison: float
) -> None:
    model = _model(name, "regression")
    healthy = _rows(6, 1, "regression", 3)
    sick = _rows(2, 2, "regression", 3)
    sick = replace(sick, x=torch.full_like(sick.x, poison))
    guarantee = _guarantee(len(vector(model)), [8], clipping="adaptive")
    absent = _sums(model, [healthy], guarantee, "regression", path)

    for rows in (_joined(healthy, sick), _joined(sick, healthy)):
        found = _sums(model, [rows], guarantee, "regression", path)
        assert _agree(found.total_KP, absent.total_KP, 1e-14) and torch.equal(
            found.below_K, absent.below_K
        )
        assert (found.dropped, absent.dropped) == (2, 0)

    poisoned = [
        _joined(healthy, replace(sick, x=torch.full_like(sick.x, p))) for p in (math.nan, math.inf)
    ]
    one, other = (_sums(model, [rows], guarantee, "regression", path).total_KP for rows in poisoned)
    assert torch.equal(one, other)  # whatever it holds, to the last bit


def test_automatic_clipping_gives_sure_and_unsure_patients_one_weight() -> None:
    norm_AI = torch.tensor([[0.2, 1.0, 50.0]])
    automatic_AI, fixed_AI = (
        norm_AI * dpsgd.clip_factor(kind, 1.0)(norm_AI) for kind in ("automatic", "fixed")
    )
    assert (automatic_AI > 0.95).all() and (automatic_AI <= 1).all()
    assert _agree(fixed_AI, torch.tensor([[0.2, 1.0, 1.0]]))


def test_the_count_is_of_those_below_the_norm_less_half_of_all() -> None:
    model = _model("mlp")
    clients = _cohort()
    for clip in (1e-6, 1.0, 1e6):
        below_K = _sums(
            model, clients, _guarantee(len(vector(model)), clipping="adaptive", clip=clip)
        ).below_K
        if clip != 1.0:
            assert below_K.tolist() == [size * (0.5 if clip > 1 else -0.5) for size in SIZES]
        assert (below_K.abs() <= torch.tensor(SIZES) / 2).all()


# who takes part -----------------------------------------------------------------------------------


def _visible(size: int) -> tuple[nn.Module, Rows]:
    """Return a model and patients whose presence is read off the sum: patient i moves
    coordinate i.
    """
    patient = torch.arange(size)
    return zoo.logistic(size).double(), Rows(
        torch.eye(size).double(), torch.ones(size).double(), patient, patient
    )


def _attendance(
    draws: int, size: int, probability: float, cap: int = 0, simulation_only: bool = False
) -> Tensor:
    """Return who took part [draws, size] in the first steps of as many rounds."""
    model, rows = _visible(size)
    guarantee = _guarantee(
        size + 1,
        [size],
        "shared",
        "fixed",
        1e-6,
        1.0,
        1,
        probability,
        cap,
        simulation_only=simulation_only,
    )
    patients = Patients.of([rows])
    w_P = vector(model)
    keys = _keys(draws)
    asked = (
        sums(model, w_P, patients, "binary", guarantee, 1e-6, ["a"], keys[n : n + 1])
        for n in range(draws)
    )

    return torch.cat([found.total_KP[:, :size] for found in asked]) != 0


def _is_poisson(taken_NI: Tensor, probability: float) -> bool:
    """Test that every patient tosses a coin of its own: each one's frequency, and the spread of how
    many come.
    """
    N, size = taken_NI.shape
    each = taken_NI.double().sum(0) - N * probability
    frequency = float(each.square().sum()) / (N * probability * (1 - probability))
    count = taken_NI.double().sum(1) - size * probability
    spread = float(count.square().sum()) / (size * probability * (1 - probability))
    inside = [stats.chi2.ppf([RARE, 1 - RARE], n) for n in (size, N)]
    return all(
        low < found < high for found, (low, high) in zip((frequency, spread), inside, strict=True)
    )


@pytest.mark.parametrize("simulation_only", [False, True])
def test_every_patient_tosses_a_coin_of_its_own(simulation_only: bool) -> None:
    taken_NI = _attendance(600, 40, 0.25, simulation_only=simulation_only)
    assert _is_poisson(taken_NI, 0.25)
    assert not _is_poisson(taken_NI, 0.2) and not _is_poisson(taken_NI, 0.3)
    fixed_size = torch.rand(600, 40).argsort(1) < 10  # a planted bug: exactly a quarter
    assert not _is_poisson(fixed_size, 0.25)
    # and another: the same patients in every round
    assert not _is_poisson(taken_NI[:1].expand(600, -1), 0.25)


def _is_uniform(taken_NI: Tensor) -> bool:
    """Test that of those drawn, whose number is given, every patient is as likely to be kept as any
    other.
    """
    N, size = taken_NI.shape
    share = float(taken_NI.double().mean())
    each = taken_NI.double().sum(0) - N * share
    found = float(each.square().sum()) / (N * share * (1 - share)) * (size - 1) / size
    return bool(found < stats.chi2.ppf(1 - RARE, size - 1))


def test_above_the_cap_a_random_subset_of_its_size_stays() -> None:
    taken_NI = _attendance(500, 30, 0.5, 8)
    uncapped_NI = _attendance(500, 30, 0.5)
    assert taken_NI.sum(1).max() == 8 and (taken_NI.sum(1) == 8).double().mean() > 0.95
    assert _is_uniform(taken_NI)
    first = uncapped_NI & (uncapped_NI.cumsum(1) <= 8)  # a planted bug: those who come first stay
    assert not _is_uniform(first)


def test_a_cap_holds_for_the_clients_it_is_of() -> None:
    """A client that takes all its patients has no cap, whichever clients share its chunk."""
    model, rows = _visible(12)
    guarantee = _guarantee(
        13, (12, 12), clipping="fixed", clip=1e-6, probability=(1.0, 0.99), cap=(0, 4)
    )
    for order in ((0, 1), (1, 0)):
        names = [NAMES[k] for k in order]
        found = sums(
            model,
            vector(model),
            Patients.of([rows, rows]),
            "binary",
            guarantee,
            1e-6,
            names,
            _keys(2),
        )
        came = (found.total_KP[:, :12] != 0).sum(1).tolist()
        assert [came[order.index(0)], came[order.index(1)]] == [12, 4]


def test_sums_are_divided_by_declared_sizes_and_not_by_who_came() -> None:
    model, rows = _visible(12)
    start_KP = vector(model)[None]
    plan = LocalPlan("binary", learning_rate=0.5)
    drawn = set()
    for seed in range(20):
        site = _guarantee(13, [50], "site", "fixed", 2.0, QUIET, 1, 0.4)  # 50 declared, 12 there
        keys = _keys(1, seed)
        moved_P = (
            train(model, start_KP, Patients.of([rows]), plan, site, ["a"], keys).theta_KP - start_KP
        )[0]
        total = sums(
            model, start_KP[0], Patients.of([rows]), "binary", site, 2.0, ["a"], keys
        ).total_KP[0]
        assert _agree(moved_P, -0.5 * 2.0 * total / (50 * 0.4))
        drawn.add(int((total[:12] != 0).sum()))
    assert len(drawn) > 3


def test_the_mean_of_the_last_iterates_is_released() -> None:
    model = _model("mlp")
    rows = _rows(9, 1)
    steps = 6
    start_KP = _weights(model)[None]
    plan = LocalPlan("binary", learning_rate=0.4)

    def after(steps: int, average: float) -> Tensor:
        guarantee = _guarantee(
            start_KP.shape[1], [9], "site", steps=steps, noise=0.05, probability=0.5
        )
        return train(
            model, start_KP, Patients.of([rows]), plan, guarantee, ["a"], _keys(1), average=average
        ).theta_KP[0]

    iterates = torch.stack([after(t, 0) for t in range(1, steps + 1)])
    for average, kept in ((0.0, 1), (0.1, 1), (0.5, 3), (0.99, 6)):
        assert _agree(after(steps, average), iterates[-kept:].mean(0))


# noise --------------------------------------------------------------------------------------------

ZERO = 4000  # features of patients without any gradient: what is released is noise


def _nobody(patients: int) -> tuple[nn.Module, Rows]:
    """Return a linear model at zero and patients whose targets it meets: their gradients
    are zero.
    """
    patient = torch.arange(patients)
    return zoo.logistic(ZERO).double(), Rows(
        torch.ones(patients, ZERO).double(), 0.0 * patient, patient, patient
    )


def _has_variance(noise: Tensor, sigma: float) -> bool:
    """Test that numbers are N(0, sigma^2), by their sum of squares and their mean."""
    n = noise.numel()
    low, high = stats.chi2.ppf([RARE, 1 - RARE], n)
    centred = abs(float(noise.mean())) < stats.norm.isf(RARE / 2) * sigma / math.sqrt(n)
    return bool(low < float(noise.double().square().sum()) / sigma**2 < high) and centred


def _is_exactly(noise: Tensor, sigma: float) -> bool:
    """Test that the noise has sigma and none of what a bug would leave: half of it, a third more or
    less, none.
    """
    wrong = (1 / 2, 2 / 3, 3 / 2, 2)
    return _has_variance(noise, sigma) and not any(
        _has_variance(noise, sigma * factor) for factor in wrong
    )


def _noise_at_sites(steps: int = 1, noise: float = 1.5, clip: float = 1.0, **kinds: bool) -> Tensor:
    """Return the noise [K, P] that training of 3 sites without gradients adds up to, of `noise`,
    twice and thrice it.

    It is in units of the clip, and of one, two and three.
    """
    model, rows = _nobody(2)
    sizes = (2, 10, 40)
    plan = LocalPlan("regression", learning_rate=0.5)
    guarantee = _guarantee(ZERO + 1, sizes, "site", "automatic", clip, noise, steps, **kinds)  # type: ignore[arg-type]
    more = enumerate(guarantee.releases.items(), 1)
    guarantee = replace(
        guarantee, releases={n: replace(r, noise_multiplier=i * noise) for i, (n, r) in more}
    )
    start_KP = torch.zeros(3, ZERO + 1, dtype=torch.float64)
    names = NAMES[:3]
    patients = Patients.of([rows] * 3)
    moved_KP = train(model, start_KP, patients, plan, guarantee, names, _keys(3)).theta_KP

    return (
        -moved_KP / (0.5 * clip) * (torch.tensor(sizes) / torch.tensor([1, 2, 3]).double())[:, None]
    )


@pytest.mark.parametrize("simulation_only", [False, True])
def test_sites_add_the_noise_that_is_paid_for(simulation_only: bool) -> None:
    noise_KP = _noise_at_sites(simulation_only=simulation_only, clip=7.0)
    # clipped, rounded in float32, rounded to the grid
    sensitivity = 1 + SLACK + GRID * math.sqrt(ZERO + 1)
    for noise_P in noise_KP:
        assert _is_exactly(noise_P, 1.5 * sensitivity)
    assert _independent(noise_KP)


def test_noise_at_sites_lies_on_the_grid() -> None:
    steps = _noise_at_sites(simulation_only=False)[0] / GRID
    assert (steps - steps.round()).abs().max() < 1e-3 and len(steps.round().unique()) > 1000
    seeded = _noise_at_sites(simulation_only=True)[0] / GRID
    assert (seeded - seeded.round()).abs().max() > 0.1


@pytest.mark.parametrize("simulation_only", [False, True])
def test_every_step_has_noise_of_its_own(simulation_only: bool) -> None:
    noise_KP = _noise_at_sites(steps=4, simulation_only=simulation_only)
    assert _is_exactly(noise_KP, 1.5 * math.sqrt(4))  # the same noise four times would be 1.5 * 4


def _independent(rows: Tensor) -> bool:
    """Test that rows of noise [n, N] are not correlated."""
    correlation = np.corrcoef(rows.numpy())
    return bool(np.abs(correlation - np.eye(len(rows))).max() < 7 / math.sqrt(rows.shape[1]))


def test_threads_share_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpsgd, "_CHUNK_BYTES", 1)
    torch.set_num_threads(2)
    noise_KP = _noise_at_sites(steps=3, simulation_only=False)
    assert _independent(noise_KP) and _is_exactly(noise_KP, 1.5 * math.sqrt(3))


def test_noise_at_sites_is_fresh_in_every_run_unless_seeded() -> None:
    one, two = (_noise_at_sites(simulation_only=False) for _ in range(2))
    assert _independent(torch.cat([one, two]))
    assert torch.equal(_noise_at_sites(simulation_only=True), _noise_at_sites(simulation_only=True))


def _joint_noise(guarantee: Guarantee, round: int = 1, key: int = 3, clients: int = 4) -> Tensor:
    """Return the joint noise of a round, in units of the clip: what comes of sums that are zero."""
    zeros = torch.zeros(clients, guarantee.numbers(), dtype=torch.int64)
    return combine(zeros, None, joint_links(guarantee, key), round)


@pytest.mark.parametrize("max_sites", [1, 3])
@pytest.mark.parametrize("simulation_only", [False, True])
def test_one_noise_is_added_to_the_sum_of_all_sites(simulation_only: bool, max_sites: int) -> None:
    P = 12_000
    guarantee = _guarantee(P, noise=2.5, max_sites=max_sites, simulation_only=simulation_only)
    sigma = 2.5 * max_sites * (1 + SLACK + GRID * math.sqrt(P))
    assert _is_exactly(_joint_noise(guarantee, clients=1), sigma)
    # once, however many sites there are
    assert _is_exactly(_joint_noise(guarantee, clients=50), sigma)
    steps = _joint_noise(guarantee) / GRID
    assert torch.equal(steps, steps.round())


@pytest.mark.parametrize("simulation_only", [False, True])
def test_joint_noise_differs_between_rounds_and_runs(simulation_only: bool) -> None:
    guarantee = _guarantee(5000, simulation_only=simulation_only)
    links = joint_links(guarantee, 3)
    zeros = torch.zeros(2, 5000, dtype=torch.int64)
    rounds = [combine(zeros, None, links, number) for number in (1, 2, 3)]
    assert _independent(torch.stack([*rounds, _joint_noise(guarantee, 1, key=4)]))
    again = _joint_noise(guarantee, 1, key=3)
    assert torch.equal(rounds[0], again) == simulation_only


@pytest.mark.parametrize("simulation_only", [False, True])
def test_the_count_of_adaptive_clipping_has_noise_of_its_own(simulation_only: bool) -> None:
    guarantee = _guarantee(
        1, noise=2.0, clipping="adaptive", max_sites=2, simulation_only=simulation_only
    )
    links = joint_links(guarantee, 3)
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    drawn = torch.stack([combine(zeros, None, links, number) for number in range(1, 2001)])
    assert _is_exactly(drawn[:, 1], COUNT_NOISE * 2.0 * 2)
    assert _is_exactly(drawn[:, 0], guarantee.sigma_units() * GRID)
    assert _independent(drawn.T)


@given(st.floats(0.05, 1e4), st.integers(1, 10), st.integers(1, 10**6))
def test_gradient_and_count_together_cost_what_the_gradient_alone_would(
    z: float, max_sites: int, P: int
) -> None:
    guarantee = _guarantee(P, noise=z, clipping="adaptive", max_sites=max_sites)
    z_gradient = guarantee.sigma_units() / guarantee.sensitivity_units()
    # one patient moves each site's count by 1/2
    twice_s_b = 2 * guarantee.count_sigma() / max_sites
    assert 1 / z_gradient**2 + 1 / twice_s_b**2 == pytest.approx(1 / z**2, rel=1e-9)
    plain = replace(guarantee, clipping="automatic")
    assert 1 < guarantee.sigma_units() / plain.sigma_units() < 1.06


# adaptive clipping --------------------------------------------------------------------------------


@pytest.mark.parametrize("quantile", [0.2, 0.5, 0.9])
@pytest.mark.parametrize("begin", [1e-3, 30.0])
def test_the_norm_goes_to_the_quantile_of_the_gradients(begin: float, quantile: float) -> None:
    """A linear model at zero on x = 0: patient i has a gradient of norm 2 |y_i|, as one likes."""
    norms = np.random.default_rng(0).lognormal(0, 1, 301)
    patient = torch.arange(301)
    y = torch.from_numpy(norms / 2) * (-1.0) ** patient
    patients = Patients.of([Rows(torch.zeros(301, 2).double(), y, patient, patient)])
    model = zoo.logistic(2).double()
    clip = begin
    for _ in range(300):
        guarantee = _guarantee(3, [301], clipping="adaptive", clip=clip)
        below = sums(
            model, vector(model), patients, "regression", guarantee, clip, ["a"], _keys(1)
        ).below_K
        clip = next_clip(clip, float(below.sum()), 301, quantile)
    assert clip == pytest.approx(np.quantile(norms, quantile), rel=0.05)


@given(st.floats(1e-6, 1e6), st.floats(-1e9, 1e9), st.integers(1, 10**6), st.floats(0.01, 0.99))
def test_noise_moves_the_norm_by_a_fifth_at_most(
    clip: float, noised: float, patients: int, quantile: float
) -> None:
    following = next_clip(clip, noised, patients, quantile)
    assert math.exp(-0.2) * clip <= following * (1 + 1e-12) and following <= math.exp(
        0.2
    ) * clip * (1 + 1e-12)
    assert next_clip(clip, patients * (quantile - 0.5), patients, quantile) == pytest.approx(clip)


def test_a_round_of_hardly_anybody_keeps_its_clip_finite() -> None:
    """One site of four patients, drawn alone with batches of one: fewer than half a patient is
    expected.
    """
    assert 0 < next_clip(1.0, 0.4, 0, 0.5) < 2
