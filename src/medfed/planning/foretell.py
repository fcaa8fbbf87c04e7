"""What a claim will cost in usefulness, foretold before training and from public facts alone.

A table is made up from what the study declares: inputs by the dictionary, as many patients as the
sites have declared, outcomes by a teacher. On it the study's own model, steps, clip and noise are
played, with and without the noise, and the difference is told. How strongly inputs hang together,
how well they tell the outcome and how rare it is are not public; so it is played for several
teachers, and the range over them is the answer's.

N made-up patients that train, F encoded inputs, P parameters.
"""

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.metrics import r2_score, roc_auc_score
from torch import Tensor

from medfed.core import decision
from medfed.core.checks import PlanError
from medfed.core.flat import vector
from medfed.data.encoding import Encoding
from medfed.data.federated import Patients, Rows
from medfed.learn import dpsgd
from medfed.learn.algorithms import ALGORITHMS
from medfed.learn.local import outputs
from medfed.monitor import noised
from medfed.planning import recipe
from medfed.planning.building import build_model
from medfed.planning.plan import Plan
from medfed.planning.resolved import algorithm_name, excess
from medfed.privacy import guarantee as guarantees
from medfed.privacy.guarantee import Guarantee, Release
from medfed.study import Study

EPSILONS = (8.0, 3.0, 1.0, 0.5)
"""What is foretold beside the study's own epsilon."""

MOST_NUMBERS = 2e8
"""Numbers that the gradients of one play may touch:
rows x parameters x steps; fewer rows are made up beyond it.
"""


@dataclass(frozen=True)
class Teacher:
    """A law of outcomes: how well inputs tell it (sd of the log-odds), its prevalence, how far
    inputs hang together.
    """

    strength: float
    prevalence: float
    together: float


TEACHERS = (
    Teacher(0.8, 0.4, 0.0),
    Teacher(1.2, 0.2, 0.5),
    Teacher(1.2, 0.08, 0.3),
    Teacher(2.0, 0.3, 0.5),
    Teacher(4.0, 0.4, 0.7),
)
"""AUROC .70 to .97 at best, rare and frequent outcomes, inputs apart and in groups."""


@dataclass(frozen=True)
class Foretold:
    """Loss of `figure` (AUROC,
    or R2 of numbers) at an epsilon against the same table without privacy.
    """

    epsilon: float
    figure: str
    loss: float  # the median over teachers
    low: float
    high: float
    without: float  # the median figure without privacy


def foretell(plan: Plan, epsilons: Sequence[float] = EPSILONS) -> list[Foretold]:
    """Return what the study's claim, and others at other epsilons, will cost. Raises PlanError
    without a claim.
    """
    study = plan.study
    if plan.guarantee is None:
        raise PlanError("the study asks for no guarantee, so there is nothing that it would cost")

    # without privacy: what there is to be learnt
    games = [_Game(plan, teacher, k) for k, teacher in enumerate(TEACHERS)]
    best = [max(game.play(study, None), game.play(_lengthen(study), None)) for game in games]

    # the same tables at each epsilon
    sizes = {name: release.size for name, release in plan.guarantee.releases.items()}
    name = "R2" if plan.encoding.target.task == "regression" else "AUROC"
    foretold = []
    for epsilon in sorted({*epsilons, study.privacy.epsilon}, reverse=True):
        other = study
        if epsilon != study.privacy.epsilon:
            other = _set_epsilon(study, epsilon, sizes)
        guarantee = guarantees.resolve(other, sizes, plan.parameters)
        lost = sorted(
            without - game.play(other, guarantee) for game, without in zip(games, best, strict=True)
        )
        foretold.append(
            Foretold(
                epsilon,
                name,
                loss=round(statistics.median(lost), 4),
                low=round(lost[0], 4),
                high=round(lost[-1], 4),
                without=round(statistics.median(best), 4),
            )
        )
    return foretold


def _set_epsilon(study: Study, epsilon: float, sizes: dict[str, int]) -> Study:
    """Return the study at another epsilon, its parts in proportion,
    what it leaves open chosen for that.
    """
    share = epsilon / study.privacy.epsilon
    written = study.as_written()
    values = {"privacy.epsilon": epsilon}
    for key in ("privacy.threshold_epsilon", "privacy.ranges_epsilon", "privacy.vote_epsilon"):
        if part := written.value(key):
            values[key] = part * share
    return recipe.settle(written._with(values), sizes)


def _lengthen(study: Study) -> Study:
    """Return the study on the longest path of the recipe: what there is to be learnt."""
    values = {"training.algorithm": "fedavgm", "training.server_momentum": recipe.MOST_MOMENTUM}
    return study._with(values)


class _Game:
    """One made-up table, on which a study is played with and without its noise."""

    def __init__(self, plan: Plan, teacher: Teacher, number: int) -> None:
        self.plan = plan
        self.number = number
        self.model = build_model(plan.study, plan.encoding)
        self.task = plan.encoding.target.task
        self.patients = sum(plan.sizes[name]["train"] for name in plan.participants)

        most = MOST_NUMBERS / (plan.parameters * plan.study.training.rounds)
        rows = int(min(self.patients, max(400, min(most, 4000))))
        self.rows = rows

        rng = np.random.default_rng(number)
        x_NF = make_up(plan.encoding, rows + 2000, teacher.together, rng)
        y_N = self._teach(x_NF, teacher, rng)
        self.x_test = x_NF[rows:]
        self.y_test = y_N[rows:]
        self.patients_of = Patients.of([Rows(x_NF[:rows], y_N[:rows], torch.arange(rows))])

    def _teach(self, x_NF: Tensor, teacher: Teacher, rng: np.random.Generator) -> Tensor:
        """Return outcomes [N]: labels, or numbers about the middle of their range."""
        classes = max(2, len(self.plan.encoding.target.labels))
        x = x_NF.double().numpy()
        x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-6)
        weights = rng.normal(size=(x.shape[1], classes if classes > 2 else 1))
        # few inputs tell much
        z = x @ rng.permutation(weights / np.sqrt(np.arange(1, x.shape[1] + 1))[:, None])
        z *= teacher.strength / np.maximum(z.std(0), 1e-9)

        if self.task == "regression":
            noise = rng.normal(size=len(z)) * 1.5
            return torch.tensor(
                (z[:, 0] + noise) / (2 * math.hypot(teacher.strength, 1.5)), dtype=torch.float32
            )
        if self.task == "multiclass":
            return torch.tensor((z + rng.gumbel(size=z.shape)).argmax(1))
        drawn = z[:, 0] + rng.logistic(size=len(z))
        return torch.tensor(drawn > np.quantile(drawn, 1 - teacher.prevalence), dtype=torch.float32)

    def play(self, study: Study, guarantee: Guarantee | None) -> float:
        """Return the figure on unseen made-up rows after a study's steps,
        noised and clipped as guaranteed.
        """
        t = study.training
        whole = {"rows": Release(self.rows, 1, 1.0, 1.0)}

        if guarantee is not None:
            clip = guarantee.clip
            noise = _noise(study, guarantee, self.plan.participants) * self.rows / self.patients
            played = dataclasses.replace(guarantee, mode="shared", releases=whole)
        else:
            assert self.plan.guarantee is not None
            clip = 1e6
            noise = 0.0
            played = dataclasses.replace(
                self.plan.guarantee, mode="shared", releases=whole, clipping="fixed"
            )

        algorithm = ALGORITHMS[algorithm_name(study)]
        server = algorithm.begin(vector(self.model), t)
        rng = torch.Generator().manual_seed(self.number)
        key = torch.zeros(1, dtype=torch.int64)
        for _ in range(t.rounds):
            summed = dpsgd.sums(
                self.model,
                server.w_P,
                self.patients_of,
                self.task,
                played,
                clip,
                ["rows"],
                key,
                self.plan.path,
            )
            total_P = summed.total_KP[0] + noise * torch.randn(
                len(server.w_P), generator=rng, dtype=torch.float64
            )
            gradient_P = (total_P * (clip / self.rows)).to(
                server.w_P.dtype
            ) + t.weight_decay * server.w_P
            server = algorithm.step(server, -t.learning_rate * gradient_P, 1.0, t)

        z_NC = outputs(self.model, server.released_P, self.x_test)
        return figure(self.task, z_NC, self.y_test)


def _noise(study: Study, guarantee: Guarantee, clients: Sequence[str]) -> float:
    """Return the standard deviation of a step's noise on the sum of all patients, in clips."""
    release = max(guarantee.releases.values(), key=lambda r: r.noise_multiplier)
    each = release.noise_multiplier * (guarantee.max_sites if guarantee.joint else 1)
    return each * excess(study, clients) / release.probability / math.sqrt(release.steps)


def make_up(encoding: Encoding, rows: int, together: float, rng: np.random.Generator) -> Tensor:
    """Return encoded rows [N, F]: the dictionary's inputs,
    numbers and categories moved by five common causes.
    """
    x_NF = encoding.invent_rows(rows).numpy().copy()
    shift = rng.normal(size=(rows, 5)) @ (rng.normal(size=(5, x_NF.shape[1])) / math.sqrt(5))
    number = np.array([len(np.unique(column[:50])) > 2 for column in x_NF.T], dtype=bool)
    order = rng.permuted(np.tile(np.arange(rows)[:, None], (1, x_NF.shape[1])), axis=0)
    x_NF = np.take_along_axis(x_NF, order, 0)
    mixed = 0.6 * (math.sqrt(1 - together**2) * x_NF + together * shift)
    x_NF[:, number] = np.clip(mixed[:, number], -2, 2)
    return torch.from_numpy(x_NF.astype(np.float32))


def figure(task: str, z_NC: Tensor, y_N: Tensor) -> float:
    """Return AUROC (of several classes: the mean of one against the rest), or R2 of numbers; 0.5 or
    0 if not finite.
    """
    z = z_NC.double().numpy()
    y = y_N.double().numpy()
    if not np.isfinite(z).all():
        return 0.0 if task == "regression" else 0.5
    if task == "regression":
        return float(r2_score(y, z[:, 0]))
    if task == "binary":
        return float(roc_auc_score(y > 0.5, z[:, 0]))
    there = [k for k in range(z.shape[1]) if 0 < (y == k).sum() < len(y)]
    return float(np.mean([roc_auc_score(y == k, z[:, k]) for k in there]))


# the test that held-out patients pay for

AUROC = 0.8
PREVALENCES = (0.5, 0.2, 0.05)
_DRAWS = 25


@dataclass(frozen=True)
class PaidTest:
    """What a noised test can tell: about how many are held out, and how an AUROC of .8 would be
    told, by prevalence.
    """

    held_out: int
    epsilon: float
    # prevalence -> median 95 % interval; None: mostly untold
    intervals: dict[str, tuple[float, float] | None]


def paid_test(plan: Plan) -> PaidTest | None:
    """Foretell what a paid test will be able to say, from declared sizes alone;
    None where nobody pays for one.

    Where marks or dates say who is held out, how many those are is not public: then None, too.
    """
    study = plan.study
    data = study.data
    privacy = study.privacy
    if not privacy.evaluation_epsilon or data.test_is_public or data.test or plan.guarantee is None:
        return None

    trained = sum(release.size for release in plan.guarantee.releases.values())
    held_out = round(trained * data.test_fraction / (1 - data.test_fraction))
    if guarantees.counted_together(study):
        noise = noised.variance(privacy.evaluation_epsilon / privacy.max_sites_per_patient)
    else:
        noise = noised.variance(privacy.evaluation_epsilon, len(plan.testers))
    told = {f"{share:g}": _interval(held_out, share, noise) for share in PREVALENCES}
    return PaidTest(held_out, privacy.evaluation_epsilon, told)


def _interval(held_out: int, prevalence: float, variance: float) -> tuple[float, float] | None:
    """Return the median interval in which an AUROC of .8 is told; None where more than half of the
    tests are void.
    """
    rng = np.random.default_rng(0)
    positives = round(held_out * prevalence)
    apart = math.sqrt(2) * statistics.NormalDist().inv_cdf(AUROC)

    told: list[tuple[float, float]] = []
    for _ in range(_DRAWS):
        logits = rng.normal(size=held_out)
        logits[:positives] += apart
        edges = noised.edges_for(logits)
        counts = decision.tally(logits, np.arange(held_out) < positives, edges)
        figure = noised.Noised(
            edges, counts + rng.normal(0, math.sqrt(variance), counts.shape), variance
        )._auroc()
        if figure.low is not None and figure.high is not None:
            told.append((figure.low, figure.high))

    if len(told) * 2 <= _DRAWS:
        return None
    return statistics.median(low for low, _ in told), statistics.median(high for _, high in told)
