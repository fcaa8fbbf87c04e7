"""A rehearsal at a site: a round and a test on made-up rows, before anybody pays."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medfed.core import codec, decision
from medfed.core.checks import PlanError, SiteError
from medfed.core.flat import vector
from medfed.data.federated import Patients
from medfed.learn import dpsgd
from medfed.node import work
from medfed.node.evaluation import evaluate
from medfed.node.own_model import errs_less, train_own
from medfed.node.queries import count_scores
from medfed.node.site import Answer, Header, Site, operation, tell_nothing
from medfed.planning import rehearsal
from medfed.planning.building import build_model
from medfed.planning.resolved import algorithm_of
from medfed.privacy.guarantee import SLACK, Guarantee
from medfed.secure.party import Rehearser


@operation("rehearse", blind=True)
def _rehearse(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Play a round and a test once on made-up rows, before anybody pays;
    refuse with stage, module and way out.

    The sites of a process run the same code, so one stands for all. No record of a site is read and
    nothing is kept: a node of its own plays, whose model, memory, keys and rows are thrown away.
    """
    first = sites[0]
    guarantee = first.guarantee
    if guarantee is None:
        raise SiteError(
            "a rehearsal was asked for before the plan; the coordinator must prepare the site first"
        )
    with torch.random.fork_rng(devices=[]):  # a module that draws must not move what comes later
        _play(_double(first, guarantee), guarantee)
    return tell_nothing(sites)


def _double(site: Site, guarantee: Guarantee) -> Site:
    """Return a node without records in a site's place."""
    double = Site(site.name, None, site.study)
    double.encoding = site.encoding
    double.model = build_model(site.study, site.encoding)
    double.path = site.path
    double.guarantee = guarantee
    double.links = site.links
    double.party = Rehearser(_length(site, guarantee))
    double.forget()
    return double


def _length(site: Site, guarantee: Guarantee) -> int:
    length = algorithm_of(site.study).length
    if guarantee.joint:
        return guarantee.numbers()
    return length(guarantee.parameters)


def _play(double: Site, guarantee: Guarantee) -> None:
    """Play stage by stage, in the order in which a run would come to them."""
    model = double.model
    target = double.encoding.target
    study = double.study
    drawn = rehearsal.make_up(double.encoding, study.data.dictionary, 12)
    w_P = vector(model)

    with rehearsal.stage("model", model, drawn.x):
        model.train()
        z_NC = torch.cat([rehearsal.check_outputs(model, x[None], target.outputs) for x in drawn.x])
    with rehearsal.stage("loss", model, drawn.x):
        drawn = drawn.at(rehearsal.check_loss(target.task, z_NC, drawn.y))

    alone = replace(guarantee.releases[double.name], probability=1.0, steps=1, cap=0)
    whole = replace(guarantee, releases={double.name: alone})
    key_K = torch.zeros(1, dtype=torch.int64)
    for records in rehearsal.TABLES:
        rows = rehearsal.share_out(drawn, records)
        with rehearsal.stage("gradient", model, drawn.x):
            patients = Patients.of([rows])
            found = dpsgd.sums(
                model,
                w_P,
                patients,
                target.task,
                whole,
                guarantee.clip,
                [double.name],
                key_K,
                double.path,
            )
            if found.dropped == len(records):
                raise PlanError(f"no gradient of {len(records)} patients is finite.")
        with rehearsal.stage("clipping", model, drawn.x):
            longest = len(records) * (1 + SLACK)
            if not float(found.total_KP.norm()) <= longest:
                raise PlanError(
                    f"{len(records)} clipped gradients sum to more than {longest:g} times "
                    "privacy.clip."
                )

    double.train = double.test = rehearsal.share_out(drawn, rehearsal.TABLES[-1])
    algorithm = algorithm_of(study)
    server = algorithm.begin(w_P, study.training)
    task = algorithm.task(server)
    sent = {"w": task.w_P, **{f"slot.{name}": value for name, value in task.slots.items()}}
    header = {"round": 0} | ({"clip": guarantee.clip} if guarantee.clipping == "adaptive" else {})
    with rehearsal.stage("training", model, drawn.x):
        if guarantee.joint:
            answered = work.sum_gradients([double], header, sent, guarantee)
        else:
            answered = work.train_locally([double], header, sent)
        _check_answer(answered[0], _length(double, guarantee))
    made_up_edges = torch.linspace(-4, 4, decision.CHOOSING_CELLS - 1, dtype=torch.float64)
    for records in rehearsal.TABLES:
        double.test = rehearsal.share_out(drawn, records)
        with rehearsal.stage("evaluation", model, drawn.x):
            rehearsal.check_outputs(model.eval(), double.test.x, target.outputs)
            _check_answer(evaluate([double], {}, {"w": w_P, "edges": made_up_edges})[0])
    if study.rule().chosen and target.task == "binary":
        double.train = rehearsal.share_out(drawn, rehearsal.TABLES[-1])
        with rehearsal.stage("evaluation", model, drawn.x):
            _check_answer(count_scores([double], {}, {"w": w_P, "edges": made_up_edges})[0])
    if "vote" in guarantee.queries:
        with rehearsal.stage("own model", model, drawn.x):
            own_P = train_own(double.name, drawn, double.encoding, study)
            errs_less(model, own_P, w_P, drawn, target)


def _check_answer(answer: Answer, length: int = 0) -> None:
    """Raise where a site's answer is an error, or its row is not `length` numbers."""
    if isinstance(answer, SiteError):
        raise answer
    _, tensors = codec.decode(answer)
    if "row" in tensors and tensors["row"].shape != (length,):
        raise PlanError(
            f"a row has shape {tuple(tensors['row'].shape)}; expected {length} numbers."
        )
