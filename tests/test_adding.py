"""What CONTRIBUTING says about adding a part is done here, each in one place and without touching
another.
"""

import importlib
import math
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import medfed
from medfed import robust, runs
from medfed.core import codec, extensions
from medfed.core.checks import MedfedError, PlanError, SiteError
from medfed.data.federated import Rows
from medfed.engine.port import Fleet, Reply, gather
from medfed.fleet.selection import SELECTORS, Profile, Selector
from medfed.learn.algorithms import ALGORITHMS, Algorithm, Memory, Server, Task
from medfed.learn.learners import LEARNERS, Learner, Shape, Work
from medfed.learn.local import Correction, LocalResult
from medfed.links.wire import (
    LINKS,
    PLAIN,
    Link,
    Remembered,
    combine,
    decode,
    send_remembering,
    sent_as,
)
from medfed.monitor.events import Log, Planned, RoundFinished, RoundStarted, SiteExcluded, read
from medfed.node.inprocess import InProcess
from medfed.node.site import OPS, Site
from medfed.planning.plan import Plan
from medfed.privacy import guarantee
from medfed.robust import attacks
from medfed.robust.attacks import ATTACKS, Attack, Records, Sight, add
from medfed.robust.rules import ALONE, GramRule, rule_of
from medfed.rounds.plain import Plain, read_rows
from medfed.rounds.round import run_round
from medfed.rounds.way import RoundRows
from medfed.runs import Result, drive
from medfed.study import Study, Training
from tests.learn.test_algorithms import (
    FULL_BATCH,
    SIZES,
    TABLES,
    Federation,
    _linear,
    _of,
    _optimum,
    _quadratic,
)
from tests.rounds.test_reference import agree, refused, study_of
from tests.runs.test_once import interrupted
from tests.tables import PRIVATE, STUDY, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

# An algorithm: FedDyn (Acar et al. 2021, arXiv:2111.04263, algorithm 1). Client k descends on
# f_k(w) - <lag_k, w> + mu/2 |w - w_server|^2; lag_k moves by -mu (w_k - w_server), and the server's
# own by the mean.


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
    """FedDyn's law: where local steps run to their own end, its fixed point is the
    common optimum.
    """
    h = replace(FULL_BATCH, algorithm="feddyn", mu=0.5, local_steps=200, learning_rate=0.05)
    equal = [1.0] * len(SIZES)
    best = _optimum([_quadratic(x, y) for x, y in TABLES], [1 / 3] * 3)
    dyn = Federation(h, _linear(2), _of(TABLES), equal).run(80)
    average = Federation(replace(h, algorithm="fedavg"), _linear(2), _of(TABLES), equal).run(20)
    np.testing.assert_allclose(dyn.w, best, atol=1e-6)
    assert np.abs(average.w - best).max() > 1e-2


@pytest.mark.usefixtures("feddyn")
def test_an_added_algorithm_runs_as_the_reference_does_and_resumes(tmp_path: Path) -> None:
    for way in ("plain", "masked", "three-party"):
        agree(study_of(tmp_path, "feddyn", "none", way, "mean"), 3)
    agree(study_of(tmp_path, "feddyn", "site", "plain", "mean"), 3)
    study = medfed.load_study(
        write_study(tmp_path, STUDY.replace("batch_size", 'algorithm = "feddyn"\nbatch_size'))
    )
    whole = medfed.run(study, tmp_path / "whole")
    interrupted(study, tmp_path / "cut")
    assert torch.equal(medfed.resume(tmp_path / "cut").w_P, whole.w_P)


@pytest.mark.usefixtures("feddyn")
@pytest.mark.parametrize("noise", ["shared", "central"])
def test_an_added_algorithm_is_refused_where_a_round_is_one_joint_step(
    tmp_path: Path, noise: str
) -> None:
    """The attack: `apply` ran, `correct` and `message` never did, and nobody was told."""
    study = medfed.load_study(write_study(tmp_path, PRIVATE)).set("privacy.noise", noise)
    with pytest.raises(
        PlanError, match=r"training.algorithm=.feddyn. and privacy.noise=.* do not compose"
    ):
        medfed.run(study.set("training.algorithm", "feddyn"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_algorithm_says_what_a_joint_step_makes_of_it() -> None:
    """By a default that refuses: those whose clients do more than FedAvg's must coincide with it,
    or not be allowed.
    """
    plain = ALGORITHMS["fedavg"]
    for name, algorithm in ALGORITHMS.items():
        same = (algorithm.correct, algorithm.message, algorithm.kept) == (
            plain.correct,
            plain.message,
            plain.kept,
        )
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
        assert "opens single rows" in refused(
            study_of(tmp_path, "fedavg", "none", "three-party", name)
        )


# A link: the largest tenth of a row's numbers, each in its place; what stays behind is sent later
# (error feedback, Stich et al. 2018, arXiv:1809.07599).


class Largest(Link):
    """Sends places and values of a row's largest numbers, [2 S], and remembers the rest."""

    kept = ("unsent",)

    def length(self, numbers: int) -> int:
        return 2 * math.ceil(numbers / 10)

    def client(self, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        whole_KM = message_KM + memory["unsent"]
        place_KS = whole_KM.abs().topk(math.ceil(whole_KM.shape[1] / 10)).indices
        value_KS = whole_KM.gather(1, place_KS)
        return torch.cat([place_KS.float(), value_KS], 1), {
            "unsent": whole_KM.scatter(1, place_KS, 0.0)
        }

    def decode(self, row_KM: Tensor, numbers: int) -> Tensor:
        place_KS, value_KS = row_KM.chunk(2, 1)
        if not ((place_KS >= 0) & (place_KS < numbers) & (place_KS == place_KS.round())).all():
            raise SiteError("its row names a place that is none")
        return torch.zeros(len(row_KM), numbers).scatter(1, place_KS.long(), value_KS)


@pytest.fixture
def largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LINKS, "largest", Largest())


def run_twice(folder: Path, study: Study) -> Result:
    """Run a study whole, and once more cut short after its second round and resumed: the bits must
    be the same.
    """
    whole = medfed.run(study, folder / "whole")
    assert whole.complete
    with pytest.MonkeyPatch.context() as patch:
        real = drive.run_round

        def cut(server: Server, *rest: Any) -> Server:
            if server.round == 2:
                raise KeyboardInterrupt
            return real(server, *rest)

        patch.setattr(drive, "run_round", cut)
        with pytest.raises(KeyboardInterrupt):
            medfed.run(study, folder / "cut")
    assert torch.equal(medfed.resume(folder / "cut").w_P, whole.w_P)
    return whole


@pytest.mark.usefixtures("largest")
def test_an_added_link_is_row_wise_remembers_and_runs_a_whole_study(tmp_path: Path) -> None:
    message_KM = torch.randn(3, 25, generator=torch.Generator().manual_seed(1))
    memory = {"unsent": torch.randn(3, 25, generator=torch.Generator().manual_seed(2))}
    links = (*PLAIN, LINKS["largest"])
    assert sent_as(25, links) == (6, torch.float32)
    row_KM, later = send_remembering(message_KM, links, memory)
    for k in range(3):
        one, left = send_remembering(
            message_KM[k : k + 1], links, {"unsent": memory["unsent"][k : k + 1]}
        )
        assert torch.equal(one[0], row_KM[k]) and torch.equal(left["unsent"][0], later["unsent"][k])
    torch.testing.assert_close(
        decode(row_KM, links, 25) + later["unsent"], message_KM + memory["unsent"]
    )

    agree(study_of(tmp_path, "fedavg", "none", "plain", "mean", training__links=("largest",)), 3)
    agree(study_of(tmp_path, "scaffold", "none", "plain", "mean", training__links=("largest",)), 2)
    study = medfed.load_study(write_study(tmp_path, STUDY)).set("training.links", "largest")
    whole = run_twice(tmp_path, study)
    assert whole.summary["test"]["auroc"] > 0.6


@pytest.mark.usefixtures("largest")
def test_an_added_link_is_refused_where_nobody_sees_a_row_or_sums_must_be_exact(
    tmp_path: Path,
) -> None:
    for noise, way in (
        ("none", "masked"),
        ("none", "three-party"),
        ("shared", "plain"),
        ("central", "plain"),
    ):
        study = study_of(tmp_path, "fedavg", noise, way, "mean", training__links=("largest",))
        assert "training.links=['largest'] and " in refused(study) and "do not compose" in refused(
            study
        )
    with pytest.raises(MedfedError, match=r"training.links='larges' is no link; .*largest"):
        medfed.run(
            study.set("privacy.noise", "site").set("training.links", "larges"), tmp_path / "run"
        )


@pytest.mark.usefixtures("largest")
def test_a_row_that_no_client_can_have_sent_is_left_out(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY)).set("training.links", "largest")
    real = Largest.client

    def lying(self: Largest, message_KM: Tensor, memory: Remembered) -> tuple[Tensor, Remembered]:
        row_KM, later = real(self, message_KM, memory)
        row_KM[0, 0] = 1e6
        return row_KM, later

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Largest, "client", lying)
        told = list[Any]()
        medfed.simulate(study.set("training.quorum", 0.5), listeners=[told.append])
    left_out = [event for event in told if isinstance(event, SiteExcluded)]
    assert left_out and all("names a place that is none" in event.reason for event in left_out)


# An attack: each liar's row backwards. And one on records: their labels backwards.


def reverse_row(sight: Sight) -> Tensor:
    return sight.own_FM.flip(1)


REVERSED = Attack("reversed", "this test", "row", on_rows=reverse_row)


def reverse_labels(records: Records) -> Records:
    return replace(records, y_N=records.y_N.flip(0))


LABELS = Attack("reversed-labels", "this test", "data", on_data=reverse_labels)


@pytest.fixture
def backwards() -> Iterator[None]:
    add(REVERSED)
    add(LABELS)
    yield
    del ATTACKS["reversed"]
    del ATTACKS["reversed-labels"]


@pytest.mark.usefixtures("backwards")
def test_an_added_attack_lies_in_a_whole_study(tmp_path: Path) -> None:
    honest = medfed.load_study(write_study(tmp_path, STUDY))
    usual = medfed.simulate(honest)
    for name in ("reversed", "reversed-labels"):
        study = honest._with({"robustness.attack": name, "robustness.malicious": 0.4})
        folder = tmp_path / name
        folder.mkdir()
        whole = run_twice(folder, study)
        assert not torch.equal(whole.w_P, usual.w_P)
        assert any(f"robustness.attack={name!r}" in text for text in whole.summary["warnings"])
    with pytest.raises(MedfedError, match=r"'revers' is not an attack; did you mean 'reversed'"):
        medfed.simulate(study.set("robustness.attack", "revers"))


def test_a_file_beside_the_others_adds_an_attack_and_touches_none(tmp_path: Path) -> None:
    here = Path(attacks.__file__).parent
    shutil.copytree(here, tmp_path / "attacks", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "attacks" / "lone.py").write_text(
        "from medfed.robust.attacks.attack import Attack, add\n"
        "add(Attack('lone', 'this test', 'row', on_rows=lambda sight: -sight.own_FM))\n",
        "utf-8",
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith(attacks.__name__)]:
            patch.delitem(sys.modules, name)
        patch.setattr(robust, "attacks", attacks)  # so that it is this one again
        patch.setattr(robust, "__path__", [str(tmp_path)])
        copied = importlib.import_module(attacks.__name__)
        assert set(copied.ATTACKS) - set(ATTACKS) == {"lone"}
        assert copied.find("lone").stage == "row"
    del sys.modules[f"{attacks.__name__}.lone"]


# A selector: the sites with the most training rows.


def draw_largest(
    profiles: Mapping[str, Profile], count: int, rng: np.random.Generator
) -> list[str]:
    largest = sorted(profiles, key=lambda name: (-profiles[name].rows, name))
    return largest[: count or len(largest)]


def test_an_added_selector_draws_a_whole_study_and_promises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SELECTORS, "largest first", Selector(draw_largest))
    study = medfed.load_study(write_study(tmp_path, STUDY))._with(
        {"fleet.schedule": "largest first", "fleet.clients_per_round": 2}
    )
    whole = run_twice(tmp_path, study)
    started = [e for e in read(tmp_path / "whole" / "events.jsonl") if isinstance(e, RoundStarted)]
    sizes = next(
        e for e in read(tmp_path / "whole" / "events.jsonl") if isinstance(e, Planned)
    ).sizes
    most = sorted(sizes, key=lambda name: (-sizes[name]["train"], name))[:2]
    assert len(started) == whole.study.training.rounds and all(
        event.clients == most for event in started
    )

    agree(study_of(tmp_path, "fedavg", "none", "plain", "mean", fleet__schedule="largest first"))
    assert SELECTORS["largest first"].law == "unknown"  # so a claim counts each site in every round
    private = medfed.load_study(write_study(tmp_path, PRIVATE)).set(
        "fleet.schedule", "largest first"
    )
    usual = medfed.load_study(write_study(tmp_path, PRIVATE))
    assert planned(private).guarantee == planned(usual).guarantee
    with pytest.raises(
        MedfedError, match=r"privacy.correlated=true and fleet.schedule='largest first'"
    ):
        planned(private.set("privacy.correlated", True))


def planned(study: Study) -> Plan:
    sites = runs.open_sites(study, None)
    return runs.prepare_sites(sites[0].study, sites)[1]


def test_a_selector_that_is_none_is_refused_by_the_registry(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY)).set("fleet.schedule", "cyclical")
    with pytest.raises(
        MedfedError, match=r"fleet.schedule='cyclical'; expected one of 'random', 'cyclic'"
    ):
        medfed.run(study, tmp_path / "run")


# A learner that is no torch module: Gaussian naive Bayes. Its first phase finds each label's mean
# of each input, its second how far values lie from that mean, squared.


class NaiveBayes(Learner):
    """State: log odds, means, variances [1 + 4 F]. A row: shares and sums [2 + 2 F]."""

    paper = "Maron 1961"
    start: ClassVar = {"phase": 0.0}
    sent = ("phase",)

    def begin(self, shape: Shape) -> Tensor:
        if shape.task != "binary":
            raise PlanError(
                f"model.name='naive-bayes' and data.task={shape.task!r} do not compose: it tells "
                "two apart."
            )
        return torch.cat([torch.zeros(1 + 2 * shape.inputs), torch.ones(2 * shape.inputs)])

    def length(self, parameters: int) -> int:
        return 2 + (parameters - 1) // 2

    def work(self, task: Task, memory: Memory, clients: Sequence[Rows]) -> Work:
        mean_2F = task.w_P[1:].reshape(2, 2, -1)[0]
        rows = []
        for site in clients:
            member_N2 = torch.stack([site.y == 0, site.y == 1], 1).double() / len(site)
            known_N2F = site.x.double()[:, None]
            if task.slots["phase"].max() > 0:
                known_N2F = (known_N2F - mean_2F).square()
            rows.append(
                torch.cat([member_N2.sum(0), (member_N2[..., None] * known_N2F).sum(0).flatten()])
            )
        K = len(clients)
        return Work(
            torch.stack(rows), {}, torch.full((K,), math.nan), torch.ones(K, dtype=torch.int64)
        )

    def apply(self, server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
        share_2 = mean_M[:2].clamp(min=1e-9)
        sum_2F = mean_M[2:].reshape(2, -1)
        w_P = server.w_P.clone()
        F = sum_2F.shape[1]
        found = (sum_2F / share_2[:, None]).flatten()
        w_P[0] = (share_2[1] / share_2[0]).log()
        if server.slots["phase"].max() > 0:
            w_P[1 + 2 * F :] = found.clamp(min=1e-3)
        else:
            w_P[1 : 1 + 2 * F] = found
        return Server(server.round + 1, w_P, {"phase": torch.ones(1)})

    def predict(self, w_P: Tensor, x_NF: Tensor) -> Tensor:
        mean_2F, variance_2F = w_P[1:].reshape(2, 2, -1)
        fit_N2 = -((x_NF[:, None] - mean_2F).square() / variance_2F + variance_2F.log()).sum(2) / 2
        return (w_P[0] + fit_N2[:, 1] - fit_N2[:, 0])[:, None]


@pytest.fixture
def naive_bayes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEARNERS, "naive-bayes", NaiveBayes())


@pytest.mark.usefixtures("naive_bayes")
def test_an_added_learner_is_the_one_on_pooled_rows_and_runs_a_whole_study(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY))._with(
        {"model.name": "naive-bayes", "training.rounds": 3}
    )
    whole = run_twice(tmp_path, study)
    sites = runs.open_sites(study, None)
    runs.prepare_sites(sites[0].study, sites)
    x_NF = torch.cat([site.train.x for site in sites]).double()
    y_N = torch.cat([site.train.y for site in sites])
    state = [(y_N == 1).double().mean() / (y_N == 0).double().mean()]
    means = [x_NF[y_N == k].mean(0) for k in (0, 1)]
    variances = [x_NF[y_N == k].var(0, correction=0).clamp(min=1e-3) for k in (0, 1)]
    exact_P = torch.cat([torch.stack(state).log(), *means, *variances])
    torch.testing.assert_close(whole.w_P.double(), exact_P, rtol=1e-4, atol=1e-4)

    assert whole.summary["test"]["auroc"] > 0.6
    loaded = medfed.load(tmp_path / "whole")
    table = tmp_path / "cohort.csv"
    assert loaded.predict(table).equals(whole.predict(table)) and len(loaded.predict(table)) > 50


@pytest.mark.usefixtures("naive_bayes")
def test_an_added_learner_runs_in_every_way_and_as_the_reference_does(tmp_path: Path) -> None:
    for way, rule in (
        ("plain", "mean"),
        ("masked", "mean"),
        ("three-party", "mean"),
        ("plain", "krum"),
    ):
        agree(study_of(tmp_path, "fedavg", "none", way, rule, model__name="naive-bayes"), 3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LINKS, "largest", Largest())
        agree(
            study_of(
                tmp_path,
                "fedavg",
                "none",
                "plain",
                "mean",
                model__name="naive-bayes",
                training__links=("largest",),
            )
        )


@pytest.mark.usefixtures("naive_bayes")
def test_an_added_learner_is_refused_a_claim_and_other_algorithms(tmp_path: Path) -> None:
    claimed = study_of(tmp_path, "fedavg", "shared", "plain", "mean", model__name="naive-bayes")
    assert "and a privacy claim do not compose: how far a patient moves" in refused(claimed)
    other = study_of(tmp_path, "scaffold", "none", "plain", "mean", model__name="naive-bayes")
    assert "no gradient trains this learner" in refused(other)


# An operation: how many training rows have a gap-free record, asked of every site after the last
# round.


def count_rows(
    sites: Sequence[Site], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> list[bytes | SiteError]:
    if guarantee.asked(sites[0].study):
        raise SiteError("rows are not counted under a privacy claim: nobody has paid for it")
    least = header["least"]
    return [codec.encode({"enough": len(site.train) >= least}) for site in sites]


def test_an_added_operation_is_asked_in_a_whole_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(OPS, "count rows", count_rows)
    told: dict[str, bool] = {}

    class Asking(Plain):
        """A way that asks it before each round."""

        def open(
            self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes
        ) -> Any:
            replies = gather(fleet, clients, "count rows", codec.encode({"least": 1}), 10)
            told.update(
                {name: codec.decode(reply.payload)[0]["enough"] for name, reply in replies.items()}
            )
            return super().open(plan, fleet, clients, number, payload)

    study = medfed.load_study(write_study(tmp_path, STUDY)).set("monitor.baselines", False)
    monkeypatch.setattr("medfed.rounds.aggregation.PLAIN", Asking())
    asked = medfed.simulate(study)
    assert asked.complete and len(told) >= 3 and all(told.values())
    monkeypatch.undo()
    assert torch.equal(asked.w_P, medfed.simulate(study).w_P)  # asking changes nothing

    monkeypatch.setitem(OPS, "count rows", count_rows)
    sites = runs.open_sites(medfed.load_study(write_study(tmp_path, PRIVATE)), None)
    with pytest.raises(SiteError, match="nobody has paid"):
        sites[0].handle("count rows", codec.encode({"least": 1}))


# A way: a buffer that waits for the first rows alone, and takes a late one into the next round.


@dataclass
class Buffer:
    """An asynchronous buffer (Nguyen et al. 2022, arXiv:2106.06639): a round is what has come when
    `size` rows have.
    """

    size: int
    late: dict[int, str] = field(default_factory=dict)  # tickets of earlier rounds
    trail = None

    def open(
        self, plan: Plan, fleet: Fleet, clients: Sequence[str], number: int, payload: bytes
    ) -> "BufferRound":
        busy = set(self.late.values())
        free = [name for name in clients if name not in busy]
        tickets = fleet.submit_many(free, "work", payload, plan.study.training.deadline)
        self.late |= dict(zip(tickets, free, strict=True))
        return BufferRound(self, plan, number)


@dataclass
class BufferRound:
    buffer: Buffer
    plan: Plan
    number: int
    came: dict[str, Reply] = field(default_factory=dict)

    @property
    def waits(self) -> bool:
        return len(self.came) < self.buffer.size and bool(self.buffer.late)

    def add(self, reply: Reply) -> None:
        name = self.buffer.late.pop(reply.ticket, None)
        if name is not None:
            self.came[name] = reply

    def close(self) -> RoundRows:
        reports, names, row_KM, excluded = read_rows(self.came, self.plan)
        weight_K = torch.tensor([self.plan.weight(name) for name in names], dtype=torch.float64)
        combined_M = combine(row_KM, weight_K / weight_K.sum(), self.plan.links, self.number)
        return RoundRows(names, reports, self.came, combined_M, excluded)


class Slow(InProcess):
    """A fleet of which one site's answers come a round late."""

    def __init__(self, sites: Sequence[Site], slow: str) -> None:
        super().__init__(sites)
        self.slow = slow
        self.held = list[Reply]()

    def poll(self, wait: float) -> list[Reply]:
        replies = super().poll(wait)
        before = self.held
        self.held = [reply for reply in replies if reply.site == self.slow]
        return before + [reply for reply in replies if reply.site != self.slow]


def test_an_added_way_takes_late_rows_into_the_next_round(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY))
    sites = runs.open_sites(study, None)
    _, plan = runs.prepare_sites(sites[0].study, sites)
    fleet = Slow(sites, plan.participants[0])
    way = Buffer(len(plan.participants) - 1)
    server = plan.begin()
    with Log() as log:
        for _ in range(4):
            server = run_round(server, plan, fleet, plan.budget(), log, way)
    finished = [event for event in log.events() if isinstance(event, RoundFinished)]
    assert (
        plan.participants[0] not in finished[0].clients
        and plan.participants[0] in finished[1].clients
    )
    assert server.round == 4 and bool(torch.isfinite(server.w_P).all())


# A package that adds something, for studies that are run by command.


def test_an_installed_package_adds_what_its_entry_point_imports(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # so that what is imported here goes away again
    monkeypatch.setitem(LINKS, "there before", Largest())
    (tmp_path / "added_link.py").write_text(
        "from medfed.links.wire import LINKS, Link\nLINKS['nothing'] = Link()\n", "utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("mine", "added_link", extensions.GROUP)
    monkeypatch.setattr(extensions, "entry_points", lambda group: [entry])
    extensions.load.cache_clear()

    try:
        study = medfed.load_study(write_study(tmp_path, STUDY))._with(
            {"training.links": "nothing", "training.rounds": 1, "monitor.baselines": False}
        )
        assert medfed.simulate(study).complete
        monkeypatch.setattr(
            extensions, "entry_points", lambda group: [EntryPoint("bad", "no_such_module", group)]
        )
        extensions.load.cache_clear()
        with pytest.raises(
            PlanError, match=r"the extension 'bad' \(no_such_module\) cannot be imported"
        ):
            medfed.simulate(study)
    finally:
        LINKS.pop("nothing", None)
        extensions.load.cache_clear()
