"""A site's own model: what its records alone teach, without noise, at the site.

Two ask for it: the site itself (`medfed alone`), and a vote, in which each site tells one noised
number.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from medfed.core.checks import PlanError
from medfed.core.flat import vector
from medfed.core.streams import Streams
from medfed.data.encoding import Encoding, Target
from medfed.data.federated import Rows, Stack
from medfed.learn.learners import LEARNERS
from medfed.learn.local import LocalPlan, outputs, train
from medfed.monitor.metrics import squared_error
from medfed.planning.building import build_model, find_path, local_plan, safe_rate
from medfed.planning.rates import Pace, at, bend, left_open
from medfed.privacy.guarantee import asked
from medfed.study import Privacy, Robustness, Security, Study

LENGTHS = (10, 30, 100, 300)
"""Steps after which a site's own training may stop, under a claim."""

STEPS_OF_FEW = 30
"""Steps where a site has too few patients to set some aside."""

_ASIDE = 5  # one patient in five says when to stop


def without_protection(study: Study, algorithm: str) -> Study:
    """Return the study as a baseline has it, trained by `algorithm`.

    No noise, no secrecy, no liars; what a claim chose is as it is without.
    """
    other = study.as_written() if study.chosen else study
    other = other.set("training.algorithm", algorithm)
    other = other.set("fleet.clients_per_round", 0).set("fleet.schedule", "random")
    return replace(other, privacy=Privacy(), security=Security(), robustness=Robustness())


def train_own(name: str, rows: Rows, encoding: Encoding, study: Study) -> Tensor:
    """Train the study's model on the training rows of site `name` alone and return its weights [P].

    Without a claim it is the baseline `local` of a federation of this one site: rounds, batches and
    rate are the study's own. Under a claim those are chosen for sums that are noised, and say
    nothing of a site's own training: it descends by full batches, at the largest step that is safe
    on these rows, for as long as helps patients set aside.
    """
    if study.model.name in LEARNERS:
        raise PlanError(
            f"model.name={study.model.name!r} has no training of a site alone; compare models of "
            "gradients"
        )
    if asked(study):
        return _train_until_it_helps_no_more(
            name, rows, encoding, without_protection(study, "local")
        )

    study = without_protection(study, "local")
    model = build_model(study, encoding)
    chosen = left_open(study)
    path = find_path(study, encoding, model).path
    if chosen:
        bends = {name: bend(rows.x, study.training.batch_size)}
        study = at(study, safe_rate(study, encoding, bends, {name: len(rows)}).rate)

    streams = Streams(study.study.seed)
    pace = Pace()
    w_KP = vector(model)[None]

    for number in range(1, study.training.rounds + 1):
        key_K = streams.key_K("batches", number, [name])
        local = train(model, w_KP, Stack.of([rows]), local_plan(study, encoding), key_K, path=path)
        w_KP = local.theta_KP
        if not torch.isfinite(w_KP).all():
            break
        loss = float(local.loss_K[0])
        pace, grew = pace.step(loss if loss == loss else None, everybody=True)
        if chosen and grew:
            study = replace(
                study,
                training=replace(study.training, learning_rate=study.training.learning_rate / 2),
            )

    return w_KP[0]


def _train_until_it_helps_no_more(
    name: str, rows: Rows, encoding: Encoding, study: Study
) -> Tensor:
    """Train on all rows for as many steps as serve every
    fifth patient best when trained on the others.
    """
    model = build_model(study, encoding)
    path = find_path(study, encoding, model).path
    key_K = Streams(study.study.seed).key_K("own", 0, [name])

    def descend(on: Rows, lengths: Sequence[int]) -> Iterator[Tensor]:
        """Yield the weights after each of these many steps of one descent."""
        w_KP = vector(model)[None]
        done = 0
        rate = 1 / safe_rate(study, encoding, {name: bend(on.x, 0)}, {name: len(on)}).curvature
        for length in lengths:
            plan = LocalPlan(
                encoding.target.task, steps=length - done, batch_size=0, learning_rate=rate
            )
            w_KP = train(model, w_KP, Stack.of([on]), plan, key_K, path=path).theta_KP
            done = length
            yield w_KP[0]

    aside = rows.patient % _ASIDE == 0
    kept = rows.at(~aside)
    judges = rows.at(aside)
    best = STEPS_OF_FEW
    if len(kept) and len(judges):
        errors = [
            _mean_error(model, w_P, judges, encoding.target) for w_P in descend(kept, LENGTHS)
        ]
        best = LENGTHS[min(range(len(LENGTHS)), key=errors.__getitem__)]
    return next(descend(rows, [best]))


def _mean_error(model: nn.Module, w_P: Tensor, rows: Rows, target: Target) -> float:
    error = float(
        squared_error(target.task, outputs(model, w_P, rows.x), rows.y, target.scale).mean()
    )
    return error if error == error else float("inf")


def errs_less(
    model: nn.Module, own_P: Tensor, other_P: Tensor, rows: Rows, target: Target
) -> Tensor:
    """Return by how much less each record [N] errs, squared, with own weights than with others.

    Args:
        model: whose architecture both have.
        own_P: the own weights.
        other_P: the others.
        rows: the records.
        target: how they are scaled.
    """
    own_N, other_N = (
        squared_error(target.task, outputs(model, w_P, rows.x), rows.y, target.scale)
        for w_P in (own_P, other_P)
    )
    return other_N - own_N
