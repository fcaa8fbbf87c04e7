"""A study's model and its local training: built, probed, and given a rate that its rows bear."""

import json
from collections.abc import Mapping
from functools import partial

from torch import nn

from medfed.core.streams import Streams
from medfed.data.encoding import Encoding
from medfed.learn import zoo
from medfed.learn.learners import LEARNERS, Held, Shape
from medfed.learn.local import LocalPlan
from medfed.learn.probe import ROWS, Probed, probe
from medfed.planning import rates
from medfed.planning.rates import Chosen
from medfed.privacy import guarantee as guarantees
from medfed.study import Study


def build_model(study: Study, encoding: Encoding) -> nn.Module:
    """Build the study's model for the encoded columns."""
    inputs = len(encoding.names())
    outputs = encoding.target.outputs
    if study.model.name in LEARNERS:
        return Held(LEARNERS[study.model.name], Shape(inputs, outputs, encoding.target.task))
    seed = Streams(study.study.seed).key("weights")
    return zoo.build(study.model.name, inputs, outputs, study.model.options, seed)


def find_path(study: Study, encoding: Encoding, model: nn.Module) -> Probed:
    """Return which path trains the study's model; every party asks for itself.

    Raises PlanError for a module that cannot be trained or tested rightly, naming the part.
    """
    name = study.model.name
    if name in LEARNERS:
        return Probed("auto")  # nothing of it is trained by gradients
    target = encoding.target
    private = guarantees.asked(study)
    asked = study.training.path
    options = json.dumps(study.model.options, sort_keys=True, default=str)
    key = (
        zoo.ZOO.get(name),
        options,
        len(encoding.names()),
        target.task,
        target.outputs,
        private,
        asked,
    )
    if name in zoo.ZOO and key in _PROBED:
        return _PROBED[key]

    x_BF = encoding.invent_rows(ROWS)
    probed = probe(model, f"model.name={name!r}", x_BF, target.task, target.outputs, private, asked)
    if name in zoo.ZOO:
        _PROBED[key] = probed
    return probed


_PROBED: dict[tuple[object, ...], Probed] = {}
"""What was found of the zoo's models in this process; others may change behind their name."""


def local_plan(study: Study, encoding: Encoding) -> LocalPlan:
    """Return how a client of this study trains."""
    t = study.training
    return LocalPlan(
        task=encoding.target.task,
        epochs=t.local_epochs,
        steps=t.local_steps,
        batch_size=t.batch_size,
        optimizer=t.optimizer,
        learning_rate=t.learning_rate,
        momentum=t.momentum,
        beta1=t.beta1,
        beta2=t.beta2,
        weight_decay=t.weight_decay,
    )


def safe_rate(
    study: Study, encoding: Encoding, bends: Mapping[str, float], sizes: Mapping[str, int]
) -> Chosen:
    """Return the learning rate that every site's rows bear, from what `rates.bend` says of each."""
    stretch = partial(rates.stretch, build_model(study, encoding), encoding.invent_rows(rates.ROWS))
    return rates.choose(
        encoding.target.task, bends, sizes, local_plan(study, encoding), study.training, stretch
    )
