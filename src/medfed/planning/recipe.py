"""The recipe:
what a claim's own settings are where a study leaves them open, from public facts alone.

A federation under a claim descends by noised full-batch steps. With n declared patients, z the
noise multiplier of the whole run spent on one sum, and D directions that rows can tell apart (the
parameters of a linear model on the encoded inputs: a network has more parameters, but noise across
directions that no row has moves no output), the signal-to-noise of that sum is at best

    rho = n / (z sqrt(D))

and how far a model may be trained follows from it. Let h be the loss's largest curvature in its
output and R the root mean square norm of the output's gradient in the weights, taken on made-up
rows at the first weights (for a linear model: of the encoded inputs). Then

    clip  C = R min(1, max(1/4, sqrt(rho / 400)))
    rate  eta <= 1 / (h R^2)
    path  a = eta h R^2 T / (1 - beta) = 4 rho R / C

The clip is fixed: a first gradient is about half of R, a wrong one all of it. The rate is the
largest step that no direction of such rows overshoots. The path is the training time, in steps of
the largest rate, at most 2,000.

Longer training fits directions of less curvature, in which the noise is as large: gradient descent
stopped after the time t is ridge regression of strength 1/t, and its best strength falls with rho.
The factor 4, the 400 and the two ends were chosen on made-up tables of ten kinds and are the same
for everybody; on real ones they cost .003 against the best of a grid (docs/log.md). T rounds cost
nothing but time, as their noise averages: T = 100, momentum beta reaches the path where plain steps
do not.

Nothing here reads a patient: sizes are declared, inputs are the dictionary's, rows are made up.
"""

import dataclasses
import math
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from medfed.core.checks import MedfedError, PlanError
from medfed.core.refusals import Refusal
from medfed.data import preprocess, sources, surveys
from medfed.data.encoding import Encoding
from medfed.data.features import features_of, list_open, open_columns
from medfed.learn import zoo
from medfed.learn.local import CURVATURE
from medfed.planning.building import build_model
from medfed.planning.cohorts import cohort
from medfed.planning.objections import find_with_header
from medfed.planning.plan import check_groups
from medfed.planning.rates import output_gradients
from medfed.planning.resolved import excess
from medfed.privacy import guarantee as guarantees
from medfed.privacy.claim_refusals import affordable, bears, is_binary, vote_tells
from medfed.study import Study, out_of_range

ROUNDS = 100
"""Rounds, where the study leaves them open: more only cost time."""

MOST_ROUNDS = 400
"""Rounds that make up for momentum where an algorithm without it was asked for."""

LONGEST = 2000.0
"""The longest path, in steps of the largest rate."""

SHORTEST = 12.0
"""The shortest path."""

MOST_MOMENTUM = 0.95

WORTH_A_MODEL = 20
"""Training patients of the mean site,
below which a vote on models of their own is not taken unasked.
"""

_ROWS, _OUTPUTS = 64, 8  # made-up rows on which R is taken, and outputs of each


@dataclass(frozen=True)
class Facts:
    """The public facts that decide: a round's patients, clients, D, R, h, and the run's rho."""

    patients: int
    clients: int
    directions: int  # D
    reach: float  # R
    curvature: float  # h
    rho: float


def settle(study: Study, devices: Collection[str] = ()) -> Study:
    """Return the study with every key that it leaves open chosen, and why in `study.chosen`;
    without a claim, itself.

    `devices`: those that train, where every patient is a client. A study whose facts are not all
    declared comes back with what can be said of it: the plan then refuses it, with the reason.
    """
    if study.given is None or not math.isfinite(study.privacy.epsilon):
        return study

    sizes = _sizes(study, devices)
    study = _choose(study, _basics(study, sum(sizes.values())))
    try:
        if not guarantees.asked(study):
            return study
        study = _choose(study, _schedule(study))
        if not sizes:
            return _choose(study, _tests(study))
        encoding = declared_encoding(study)
        study = _choose(study, _steps(study, facts(study, encoding, sizes)))
        return _choose(study, _tests(study))
    except MedfedError:
        return _choose(study, _tests(study))


SOME_DEVICES = tuple(f"device {k}" for k in range(1000))
"""Devices that there may be, before any record is read: to see whether the study composes."""


def examine(study: Study) -> tuple[Study, list[Refusal]]:
    """Return a study, its data completed and what it leaves open chosen,
    and what stands against it all the same.
    """
    with suppress(MedfedError):  # `standing` tells it
        study = dataclasses.replace(study, data=sources.complete(study))
        # delta may be open
        if study.privacy.ranges_epsilon and math.isfinite(study.privacy.epsilon):
            study = list_open(sources.columns_of(study, private=True), study)
    try:
        study = settle(study, SOME_DEVICES)
    except Exception:  # of values that are refused below anyway, nothing follows
        if not out_of_range(study):
            raise
    return study, find_with_header(study)


def declared_encoding(study: Study) -> Encoding:
    """Return the encoding that the dictionary declares.
    Raises PlanError where it declares too little.
    """
    data = study.data
    names = features_of(sorted(data.dictionary), data)
    survey = surveys.declared_survey(names, data, 0, 0)
    later = dict.fromkeys(open_columns(study), preprocess.UNKNOWN)
    return preprocess.agree(
        {"the dictionary": survey}, data, _refuse_to_ask, public=True, found=later
    )


def _refuse_to_ask(*_: object) -> Tensor:
    raise PlanError("a public encoding asks nothing of patients; set data.preprocess='dictionary'")


def facts(study: Study, encoding: Encoding, sizes: dict[str, int]) -> Facts:
    """Return the public facts of a study of these declared sizes, its schedule being chosen."""
    model = build_model(study, encoding)
    parameters = zoo.count(model)
    clients = list(sizes)
    check_groups(study, clients)

    # the noise of the whole run, spent on one sum
    guarantee = guarantees.resolve(study, sizes, parameters)
    multiplier = max(release.noise_multiplier for release in guarantee.releases.values())
    each = multiplier / math.sqrt(guarantee.uses) * excess(study, clients)
    if guarantee.joint:
        each *= guarantee.max_sites

    # against what the sum can say
    patients = sum(sizes.values()) * cohort(study, clients) / len(clients)
    directions = min(parameters, encoding.target.outputs * (len(encoding.names()) + 1))
    rho = patients / (each * math.sqrt(directions))
    try:
        R = reach(model, encoding)
    except Exception:  # a module of the user's own that cannot run: the plan's probe names the part
        R = reach(nn.Linear(len(encoding.names()), 1), encoding)
    return Facts(round(patients), len(clients), directions, R, CURVATURE[encoding.target.task], rho)


def reach(model: nn.Module, encoding: Encoding) -> float:
    """Return R: the root mean square norm of an output's gradient in weights, on made-up rows."""
    rows = encoding.invent_rows(_ROWS)
    squares = [
        float(g.square().sum())
        for row in rows
        for g in output_gradients(model, row[None], _OUTPUTS)
    ]
    mean = sum(squares) / len(squares)
    return math.sqrt(mean) if math.isfinite(mean) and mean > 0 else 1.0


def _sizes(study: Study, devices: Collection[str]) -> dict[str, int]:
    """Return the declared sizes; of a fleet of devices, one each."""
    if study.sites.kind == "device":
        return dict.fromkeys(devices, 1)
    return dict(study.privacy.sizes)


Choices = dict[str, tuple[Any, str]]
"""key -> value and why."""


def _basics(study: Study, patients: int) -> Choices:
    """Choose what a claim needs before there is any noise:
    delta, encoding, and who pays for test figures.
    """
    choices = Choices()
    choices["privacy.delta"] = (
        _delta(patients),
        "below one in ten of 1 / patients, and at most 1e-6",
    )
    choices["data.preprocess"] = "dictionary", "public ranges: nothing is fitted on patients"

    # what the rest costs follows from delta
    priced = study
    if study.privacy.delta >= 1:
        priced = dataclasses.replace(
            study, privacy=dataclasses.replace(study.privacy, delta=_delta(patients))
        )
    if study.left_open("privacy.vote_epsilon") and (vote := _vote(priced)):
        choices["privacy.vote_epsilon"] = vote
        priced = priced.set("privacy.vote_epsilon", vote[0])
    if not study.data.test_is_public and is_binary(study.data) and study.monitor.evaluate_every:
        choices["privacy.evaluation_epsilon"] = (
            affordable(priced),
            "what a held-out patient's own budget bears",
        )
    return choices


def _vote(study: Study) -> tuple[float, str] | None:
    """Choose a vote on sites' own models where its answer is known to a quarter of the sites;
    else none.
    """
    p = study.privacy
    sites = len(p.sizes)
    compared = p.scope == "run" and study.data.test_is_public and study.monitor.baselines
    if (
        compared
        or study.sites.kind == "device"
        or not sites
        or any(guarantees.refuse_unresolved(study))
    ):
        return None
    if sum(p.sizes.values()) < WORTH_A_MODEL * sites:
        return None
    if max(p.threshold_epsilon, p.ranges_epsilon) > p.epsilon / 2 or not vote_tells(
        study, p.epsilon / 4, sites, 4
    ):
        return None

    voting = dataclasses.replace(study, privacy=dataclasses.replace(p, vote_epsilon=p.epsilon / 4))
    test = p.evaluation_epsilon or affordable(study)
    if not study.data.test_is_public and not bears(voting, test):
        return None  # held-out patients pay for both, and the test comes first

    half = guarantees.vote_interval(sites, guarantees.vote_noise(study, p.epsilon / 4, sites))
    return (
        p.epsilon / 4,
        f"{sites} sites say whether their own models do better, known to +- {half:.0f} of "
        f"{sites} votes",
    )


def _delta(patients: int) -> float:
    return min(1e-6, 10.0 ** math.floor(math.log10(0.1 / max(patients, 1))))


def _schedule(study: Study) -> Choices:
    """Choose how many noised sums there are, and of whom."""
    choices = Choices()
    mode = guarantees.mode(study)
    choices["privacy.noise"] = (
        mode,
        "one noise for all sites together: sqrt(sites) less than one for each",
    )
    whole = (
        "every patient in every step: the accountant is exact, and no site's size sets the "
        "noise of another"
    )
    choices["training.batch_size"] = 0, whole

    alone = all(study.left_open(f"training.{key}") for key in ("local_epochs", "batch_size"))
    if mode == "site" and alone:
        choices["training.local_steps"] = (
            1,
            "each local step is noised by itself: one a round, averaged over sites",
        )

    if study.left_open("training.algorithm") and study.left_open("training.learning_rate"):
        choices["training.algorithm"] = (
            "fedavgm",
            "fedavg with momentum, which is free: it only adds up noised sums",
        )
    choices["training.rounds"] = (
        ROUNDS,
        "the noise of many small steps averages; more rounds would only cost time",
    )
    choices["training.average"] = (
        0.5,
        "the mean of the last half of the models, which costs no privacy",
    )
    return choices


def _steps(study: Study, facts: Facts) -> Choices:
    """Choose clip, rate and momentum for rho; see the module."""
    t = study.training
    p = study.privacy
    R = facts.reach
    choices = Choices()
    if not study.left_open("training.learning_rate"):
        # rate and clip are one: who sets the rate has the plain clip, or sets that too
        return choices

    # the clip
    share = min(1.0, max(0.25, math.sqrt(facts.rho / 400)))
    clip = p.clip
    kind = p.clipping
    if study.left_open("privacy.clip"):
        clip = share * R
    if study.left_open("privacy.clip") and study.left_open("privacy.clipping"):
        kind = "fixed"
        choices["privacy.clipping"] = kind, "the sum keeps who is sure and who is not"
    choices["privacy.clip"] = (
        float(f"{clip:.3g}"),
        f"{share:.2g} of a made-up row's gradient, {R:.3g}",
    )

    # the path, and how momentum and rounds reach it
    path = min(LONGEST, max(SHORTEST, 4 * facts.rho * R / clip))
    momentum = t.algorithm == "fedavgm"
    if not momentum and study.left_open("training.rounds"):
        rounds = min(MOST_ROUNDS, max(ROUNDS, math.ceil(path)))
        choices["training.rounds"] = rounds, "without momentum, more steps"
        t = dataclasses.replace(t, rounds=rounds)
    most = max(0.0, min(MOST_MOMENTUM, 1 - 5 / t.rounds))
    beta = 0.0
    if momentum and study.left_open("training.server_momentum"):
        beta = min(most, max(0.0, 1 - t.rounds / path))
    elif momentum:
        beta = t.server_momentum

    # the rate
    steps = min(1.0, path * (1 - beta) / t.rounds)
    rate = steps / (facts.curvature * R**2)
    if kind == "automatic":
        rate *= R / (2 * clip)  # every gradient has norm C, where a first one has about R / 2
    why = (
        f"signal to noise {facts.rho:.3g} of {facts.patients} patients in {facts.directions} "
        "directions"
    )
    if momentum:
        choices["training.server_momentum"] = (
            float(f"{beta:.3g}"),
            f"{why}: a path of {path:.3g} steps",
        )
    choices["training.learning_rate"] = (
        float(f"{rate:.3g}"),
        f"{why}: {steps:.2g} of the largest safe step",
    )
    return choices


def _tests(study: Study) -> Choices:
    """Choose how often the model is tested: once where that is paid for."""
    rounds = study.training.rounds
    if not study.data.test_is_public:
        return {"monitor.evaluate_every": (rounds, "one paid test, at the end")}
    return {"monitor.evaluate_every": (max(1, rounds // 10), "ten tests in all")}


def _choose(study: Study, choices: Choices) -> Study:
    """Return the study with those choices whose keys it leaves open."""
    open_ = {key: choice for key, choice in choices.items() if study.left_open(key)}
    if not open_:
        return study

    values = {key: value for key, (value, _) in open_.items()}
    reasons = {key: why for key, (_, why) in open_.items()}
    with_values = study._with(values)
    return dataclasses.replace(with_values, chosen={**study.chosen, **reasons}, given=study.given)
