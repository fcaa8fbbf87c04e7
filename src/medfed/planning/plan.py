"""The plan: a study checked as a whole, before any training. What must agree does agree, or both
sides are named.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from medfed.core.checks import DataError, PlanError, some
from medfed.core.flat import vector
from medfed.core.refusals import refuse
from medfed.core.streams import Streams
from medfed.data.encoding import Encoding
from medfed.fleet import selection
from medfed.learn import zoo
from medfed.learn.algorithms import ALGORITHMS, Server
from medfed.learn.local import LocalPlan, Path
from medfed.learn.probe import Probed
from medfed.planning import row_limits
from medfed.planning.building import build_model, find_path, local_plan
from medfed.planning.cohorts import cohort
from medfed.planning.objections import check
from medfed.planning.rates import Chosen
from medfed.planning.resolved import (
    MOST_ROWS,
    Resolved,
    bounded,
    colluding,
    fewest_opened,
    resolve,
    robust_rule,
)
from medfed.planning.survey_warnings import find_renamed, warn
from medfed.planning.terms import terms_of
from medfed.privacy import claim_refusals
from medfed.privacy import guarantee as guarantees
from medfed.secure.field import check_headroom
from medfed.study import Study

POOLED = "pooled rows"
"""Name of the site that holds every row, in the simulation that the baseline `pooled` is."""


@dataclass(frozen=True, kw_only=True)
class Plan(Resolved):
    """Everything a round needs: what is resolved, how records become numbers, and what sites told
    of their tables.
    """

    encoding: Encoding
    testers: tuple[str, ...]  # who holds test patients
    label_counts: Mapping[str, Mapping[str, int]]  # labels at each site
    surveyed: str  # sha256 of what the sites told of their tables
    tables: Mapping[str, str] = field(default_factory=dict)  # the same of each site
    away: tuple[str, ...] = ()  # sites that a resumed run goes on without
    bytes_up: int = 0  # what it took to survey the sites and to agree
    bytes_down: int = 0
    warnings: tuple[str, ...] = ()
    path: Path = "auto"  # which local training serves the model
    chosen: Chosen | None = None  # the learning rate, where the study leaves it open

    @property
    def present(self) -> tuple[str, ...]:
        """Those who train and are not away."""
        return tuple(name for name in self.participants if name not in self.away)

    @property
    def local(self) -> LocalPlan:
        return local_plan(self.study, self.encoding)

    def begin(self) -> Server:
        """Return the state before the first round."""
        server = self.algorithm.begin(self.first_weights(), self.study.training)
        if self.guarantee and self.guarantee.clipping == "adaptive":
            server = replace(
                server, slots={**server.slots, "clip": torch.tensor([self.guarantee.clip])}
            )
        if self.chosen:
            rate = torch.tensor([self.chosen.rate], dtype=torch.float64)
            server = replace(server, slots={**server.slots, "rate": rate})
        return server

    def first_weights(self) -> Tensor:
        """Return the model's weights [P] before the first round: a function of the seed."""
        return vector(build_model(self.study, self.encoding))


def make(
    study: Study,
    surveys: Mapping[str, Mapping[str, Any]],
    encoding: Encoding,
    away: Collection[str] = (),
) -> Plan:
    """Check a study against what its sites told; return the plan.

    Args:
        study: as its sites have it.
        surveys: by site, what it told of its table (operation `survey`); of one that is away its
            records and labels alone.
        encoding: how records become numbers.
        away: the sites that a resumed run goes on without.

    Raises:
        StudyError, DataError, PlanError: where something cannot work, with the way out.
    """
    # what the study alone says
    check(study)
    private = guarantees.asked(study)
    _check_tests(study, encoding)

    # who trains, and who tests
    sizes = {
        name: {"train": int(told["train"]), "test": int(told["test"])}
        for name, told in surveys.items()
    }
    trainers = _list_trainers(study, sizes)
    heard = {name: told for name, told in surveys.items() if name not in away}
    if not private:
        refuse(find_renamed(heard, study))
    told = study.data.test_is_public or not private  # else nobody says how many are held out
    if told and study.monitor.evaluate_every and not any(size["test"] for size in sizes.values()):
        raise DataError(
            f"no site has a test patient at data.test_fraction={study.data.test_fraction}; raise it"
        )

    # the model, and the path that trains it
    model = build_model(study, encoding)
    zoo.check_repeats(study.model.name, partial(build_model, study, encoding))
    probed = find_path(study, encoding, model)

    # what follows from all of it
    participants = trainers
    if study.training.algorithm == "pooled":
        sizes[POOLED] = {"train": sum(size["train"] for size in sizes.values()), "test": 0}
        participants = (POOLED,)
    check_groups(study, participants)
    if private:
        refuse(
            claim_refusals.hidden_ranges(study, {name: sizes[name]["train"] for name in trainers})
        )
    facts = resolve(study, sizes, participants, zoo.count(model), encoding.digest())
    _check_security(study, trainers, sizes)
    _check_robustness(study, trainers)
    if facts.joint and facts.guarantee and facts.rule is None:
        row_limits.check(study, facts.guarantee, facts.malicious)
        if row_limits.cap(study, facts.guarantee) < 1:
            terms_of(replace(facts)).check(apart=True)

    return Plan(
        **vars(facts),
        encoding=encoding,
        testers=_list_testers(study, sizes),
        surveyed=_digest(heard),
        tables={name: _digest(told) for name, told in heard.items()},
        away=tuple(away),
        label_counts={name: told["labels"] for name, told in surveys.items()},
        warnings=(*_warn_of_path(study, probed), *warn(heard, encoding, study)),
        path=probed.path,
    )


def _digest(told: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _check_tests(study: Study, encoding: Encoding) -> None:
    """Refuse a threshold that no test asks for, or that its target does not have."""
    threshold = study.data.threshold
    if not study.monitor.evaluate_every and study.rule().chosen:
        raise PlanError(
            f"data.threshold={threshold!r} and monitor.evaluate_every=0 do not compose: a "
            "threshold is chosen for a test. Declare a number, or test at the end."
        )
    if encoding.target.task != "binary" and threshold != "0.5":
        raise PlanError(
            f"data.threshold={threshold!r} and data.task={encoding.target.task!r} do not "
            "compose: a threshold is one of two labels. Leave data.threshold out."
        )


def _list_trainers(study: Study, sizes: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """Return the sites with a training row. Raises DataError or PlanError where too few."""
    trainers = tuple(name for name in sizes if sizes[name]["train"])
    if not trainers:
        raise DataError(
            "no site has a training row; lower data.test_fraction, or mark fewer rows as held out"
        )

    drawn = study.fleet.clients_per_round
    if drawn > len(trainers):
        few = f"{len(trainers)} sites" + (
            " with training rows" if len(trainers) < len(sizes) else ""
        )
        raise PlanError(f"fleet.clients_per_round={drawn}, but there are {few}; lower it")
    return trainers


def _list_testers(study: Study, sizes: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """Return who tests: of devices those that hold a test patient; of models of the sites' own,
    those that train.
    """
    names = [name for name in sizes if name != POOLED]
    if study.sites.kind == "device":
        names = [name for name in names if sizes[name]["test"]]
    if ALGORITHMS[study.training.algorithm].personal:
        names = [name for name in names if sizes[name]["train"]]
    return tuple(names)


def check_groups(study: Study, clients: Sequence[str]) -> None:
    """Refuse groups of which one is empty: in its turn a round would have no client."""
    fleet = study.fleet
    if fleet.schedule != "cyclic" or not clients:
        return

    streams = Streams(study.study.seed)
    if nobody := selection.empty_groups(clients, fleet.groups, streams):
        fits = selection.most_groups(clients, fleet.groups, streams)
        raise PlanError(
            f"fleet.groups={fleet.groups} and {len(clients)} sites do not compose: nobody falls "
            f"into group {some(nobody)}, so in its turn a round has no client; a site's group "
            f"follows from its name. Set fleet.groups={fits}, or schedule='random'."
        )


def _check_security(
    study: Study, clients: Sequence[str], sizes: Mapping[str, Mapping[str, int]]
) -> None:
    """Refuse sums that would be of too few rows, or that could wrap."""
    security = study.security
    if security.aggregation == "plain":
        return

    n = cohort(study, clients)
    if n < security.min_group:
        raise PlanError(
            f"security.aggregation={security.aggregation!r} and a round of {n} clients do not "
            f"compose: security.min_group={security.min_group}, and a sum of fewer rows says too "
            "much of each. Draw more clients, or set aggregation='plain'."
        )
    if n < fewest_opened(study, n):
        raise PlanError(
            f"security.aggregation={security.aggregation!r} and a round of {n} clients do not "
            f"compose: security.colluding={security.colluding:g} lets {colluding(study, n)} of "
            f"them know their rows, and security.min_group={security.min_group} rows of others "
            "must be in a sum. Draw more clients, or lower one of the two."
        )
    if not (guarantees.asked(study) and guarantees.mode(study) != "site"):
        weights = sum(sizes[name]["train"] for name in clients)
        if study.training.weighting == "uniform":
            weights = len(clients)
        check_headroom(weights, security.bound, security.fraction_bits)


def _check_robustness(study: Study, clients: Sequence[str]) -> None:
    """Refuse a rule with fewer clients than it needs."""
    n = cohort(study, clients)
    rule = robust_rule(study, n)
    if rule is None:
        if study.robustness.max_malicious and not bounded(study):
            raise PlanError(
                f"robustness.rule='auto' and {n:,} clients a round do not compose without a "
                f"bound: more than {MOST_ROWS:,} are not compared. Set robustness.bound, or "
                "fleet.clients_per_round."
            )
        return

    rule.check(n)
    if n > MOST_ROWS:
        raise PlanError(
            f"robustness.rule={rule.name!r} compares every two of {n:,} clients; {MOST_ROWS:,} "
            "at most. Set fleet.clients_per_round, or rule='mean'."
        )


def _warn_of_path(study: Study, taken: Probed) -> list[str]:
    """Say why a model is not trained on the fastest path."""
    if study.training.path != "auto" or taken.path in ("auto", "rules"):
        return []

    unit = "record" if guarantees.asked(study) else "client"
    how = {"func": "by torch.func", "loop": f"{unit} by {unit}"}
    return [
        f"model.name={study.model.name!r} trains {how[taken.path]}, slower: "
        f"{'; '.join(taken.reasons)}"
    ]
