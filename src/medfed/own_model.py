"""A site's own model: what its records alone teach, without noise, at the site.

Two ask for it: the site itself (`medfed alone`), and a vote, in which each site tells one noised bit.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from medfed.core.flat import vector
from medfed.core.streams import Streams
from medfed.data.federated import Rows, Stack
from medfed.data.preprocess import Encoding, Target
from medfed.local import outputs, train
from medfed.monitor.metrics import squared_error
from medfed.plan import build_model, local_plan, probed, safe_rate
from medfed.rates import Pace, at, bend, left_open
from medfed.study import Privacy, Robustness, Security, Study


def without_protection(study: Study, algorithm: str) -> Study:
    """Return the study as a baseline has it: no noise, no secrecy, no liars; what a claim chose is as it is without."""
    other = study.as_written() if study.chosen else study
    other = other.set("training.algorithm", algorithm)
    other = other.set("fleet.clients_per_round", 0).set("fleet.schedule", "random")
    return replace(other, privacy=Privacy(), security=Security(), robustness=Robustness())


def train_own(name: str, rows: Rows, encoding: Encoding, study: Study) -> Tensor:
    """Train the study's model on the training rows of site `name` alone and return its weights [P].

    It is the baseline `local` of a federation of this one site: rounds, batches and rate are the study's own, a rate
    that is left open being one that these rows bear, and halved where their loss grows. Training that does not stay
    finite ends there.
    """
    study = without_protection(study, "local")
    model = build_model(study, encoding)
    path, chosen = probed(study, encoding, model).path, left_open(study)
    if chosen:
        bends = {name: bend(rows.x, study.training.batch_size)}
        study = at(study, safe_rate(study, encoding, bends, {name: len(rows)}).rate)
    streams, pace = Streams(study.study.seed), Pace()
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
            study = replace(study, training=replace(study.training, learning_rate=study.training.learning_rate / 2))
    return w_KP[0]


def errs_less(model: nn.Module, own_P: Tensor, other_P: Tensor, rows: Rows, target: Target) -> Tensor:
    """Return by how much the squared error of each record [N] is less with the own weights than with the others."""
    own_N, other_N = (
        squared_error(target.task, outputs(model, w_P, rows.x), rows.y, target.scale) for w_P in (own_P, other_P)
    )
    return other_N - own_N
