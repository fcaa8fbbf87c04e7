"""The plan: a study checked as a whole, before any training. What must agree does agree, or both sides are named."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medfed import models, rates
from medfed.algorithms import ALGORITHMS, Server
from medfed.core import extensions, toml
from medfed.core.checks import (
    DataError,
    MedfedError,
    PlanError,
    StudyError,
    closest,
    nearest,
    rows_of,
    some,
    those,
)
from medfed.core.flat import vector
from medfed.core.refusals import Refusal, gathered, mends, refuse
from medfed.core.streams import Streams
from medfed.data import doubts, preprocess, sources, tables
from medfed.data.preprocess import Encoding
from medfed.features import features_of, listed
from medfed.fleet import selection
from medfed.learners import LEARNERS, Held, Shape
from medfed.local import LocalPlan, Path
from medfed.privacy import guarantee as guarantees
from medfed.privacy import refusals
from medfed.probe import ROWS, Probed, probe
from medfed.rates import Chosen
from medfed.resolved import (
    DEFAULT_RULE,
    MOST_ROWS,
    Resolved,
    algorithm_name,
    bounded,
    cohort,
    resolve,
    robust_rule,
)
from medfed.robust import attacks
from medfed.robust.rules import RobustRule
from medfed.secure.field import check_headroom
from medfed.study import EPSILON, Data, Feature, Robustness, Security, Study, is_pattern, out_of_range, parse, put
from medfed.wire import LINKS

POOLED = "pooled rows"
"""Name of the site that holds every row, in the simulation that the baseline `pooled` is."""


@dataclass(frozen=True, kw_only=True)
class Plan(Resolved):
    """Everything a round needs: what is resolved, how records become numbers, and what sites told of their tables."""

    encoding: Encoding
    testers: tuple[str, ...]  # who holds test patients
    label_counts: Mapping[str, Mapping[str, int]]  # labels at each site
    surveyed: str  # sha256 of what the sites told of their tables
    bytes_up: int = 0  # what it took to survey the sites and to agree
    bytes_down: int = 0
    warnings: tuple[str, ...] = ()
    path: Path = "auto"  # which local training serves the model
    chosen: Chosen | None = None  # the learning rate, where the study leaves it open

    @property
    def local(self) -> LocalPlan:
        return local_plan(self.study, self.encoding)

    def begin(self) -> Server:
        """Return the state before the first round."""
        server = self.algorithm.begin(self.first_weights(), self.study.training)
        if self.guarantee and self.guarantee.clipping == "adaptive":
            server = replace(server, slots={**server.slots, "clip": torch.tensor([self.guarantee.clip])})
        if self.chosen:
            rate = torch.tensor([self.chosen.rate], dtype=torch.float64)
            server = replace(server, slots={**server.slots, "rate": rate})
        return server

    def first_weights(self) -> Tensor:
        """Return the model's weights [P] before the first round: a function of the seed."""
        return vector(build_model(self.study, self.encoding))


def make(study: Study, surveys: Mapping[str, Mapping[str, Any]], encoding: Encoding) -> Plan:
    """Check a study against what its sites told; return the plan.

    Raises StudyError, DataError or PlanError where something cannot work, with the way out.
    """
    check(study)
    names = tuple(surveys)
    sizes = {name: {"train": int(s["train"]), "test": int(s["test"])} for name, s in surveys.items()}
    trainers = tuple(name for name in names if sizes[name]["train"])
    if not trainers:
        raise DataError("no site has a training row; lower data.test_fraction, or mark fewer rows as held out")
    if study.fleet.clients_per_round > len(trainers):
        few = f"{len(trainers)} sites" + (" with training rows" if len(trainers) < len(names) else "")
        raise PlanError(f"fleet.clients_per_round={study.fleet.clients_per_round}, but there are {few}; lower it")
    if not guarantees.asked(study):
        refuse(_renamed(surveys, study))
    if not study.monitor.evaluate_every and study.rule().chosen:
        raise PlanError(
            f"data.threshold={study.data.threshold!r} and monitor.evaluate_every=0 do not compose: a threshold is "
            "chosen for a test. Declare a number, or test at the end."
        )
    if encoding.target.task != "binary" and study.data.threshold != "0.5":
        raise PlanError(
            f"data.threshold={study.data.threshold!r} and data.task={encoding.target.task!r} do not compose: a "
            "threshold is one of two labels. Leave data.threshold out."
        )
    told = study.data.test_is_public or not guarantees.asked(study)  # else nobody says how many are held out
    if told and study.monitor.evaluate_every and not any(size["test"] for size in sizes.values()):
        raise DataError(f"no site has a test patient at data.test_fraction={study.data.test_fraction}; raise it")
    model = build_model(study, encoding)
    models.check_repeats(study.model.name, partial(build_model, study, encoding))
    taken = probed(study, encoding, model)
    parameters = models.count(model)
    pooled = study.training.algorithm == "pooled"
    if pooled:
        sizes[POOLED] = {"train": sum(s["train"] for s in sizes.values()), "test": 0}
    check_groups(study, (POOLED,) if pooled else trainers)
    if guarantees.asked(study):
        refuse(refusals.hidden_ranges(study, {name: sizes[name]["train"] for name in trainers}))
    facts = resolve(study, sizes, (POOLED,) if pooled else trainers, parameters)
    _check_security(study, trainers, sizes)
    _check_robustness(study, trainers)
    return Plan(
        **vars(facts),
        encoding=encoding,
        testers=_testers(study, sizes),
        surveyed=hashlib.sha256(json.dumps(surveys, sort_keys=True).encode()).hexdigest(),
        label_counts={name: s["labels"] for name, s in surveys.items()},
        warnings=tuple([*_slowly(study, taken), *_warnings(surveys, encoding, study)]),
        path=taken.path,
    )


def _testers(study: Study, sizes: Mapping[str, Mapping[str, int]]) -> tuple[str, ...]:
    """Return who tests: of devices those that hold a test patient; of models of the sites' own, those that train."""
    needed = "test" if study.sites.kind == "device" else ""
    personal = ALGORITHMS[study.training.algorithm].personal
    names = (name for name in sizes if name != POOLED and (not needed or sizes[name][needed]))
    return tuple(name for name in names if not personal or sizes[name]["train"])


def _renamed(surveys: Mapping[str, Mapping[str, Any]], study: Study) -> Iterator[Refusal]:
    """Yield what a site lacks for another name's sake: it alone has a column of that kind that nobody else has.

    A site with a map has said how its columns differ, so whatever it lacks then is to be declared absent.
    """
    if study.sites.kind == "device" or not study.data.site or len(surveys) < 2:
        return
    known = {name: _share_known(survey) for name, survey in surveys.items()}
    for name, survey in surveys.items():
        own, others = known[name], [known[other] for other in surveys if other != name]
        lacks = [column for column in survey["missing"] if not own[column]]
        lacks = [column for column in lacks if column not in study.data.absent.get(name, ())]
        usual = [column for column in lacks if any(other.get(column, 0) >= _USUAL for other in others)]
        alone = [n for n, share in own.items() if share >= _USUAL and not any(other.get(n) for other in others)]
        for column in usual:
            kind = (
                "text" if any(column in one["texts"] and one["texts"][column] for one in surveys.values()) else "number"
            )
            alike = [n for n in alone if ("text" if survey["texts"].get(n) else "number") == kind]
            if name not in study.data.site_maps and (not alike or survey["train"] + survey["test"] < _ENOUGH):
                continue
            yield Refusal(DataError(_lacks(name, column, kind, alike)))


_USUAL, _ENOUGH = 0.5, 5  # share of a column's cells, and rows of a site, from which a missing column is no chance


def _share_known(survey: Mapping[str, Any]) -> dict[str, float]:
    rows = max(1, survey["train"] + survey["test"])
    return {name: 1 - count / rows for name, count in survey["missing"].items()}


def _lacks(site: str, column: str, kind: str, alike: Sequence[str]) -> str:
    """Say that a site lacks a column that others have, and what it may be called there."""
    found = f"; {some(map(repr, alike))} of the same kind is there alone" if alike else ""
    meant = closest(column, alike) or (alike[0] if len(alike) == 1 else "")
    name = toml.key(meant) if meant else "ITS_NAME"
    return (
        f"site {site!r}, column {column!r}: expected a {kind}, as at other sites, found no value{found}. Where it has "
        f"another name, say so in the site's map: [rename] {name} = {toml.literal(column)}. Where it is not measured, "
        f"declare it: {toml.key('data', 'absent', site)} = [{toml.literal(column)}]"
    )


def check_groups(study: Study, clients: Sequence[str]) -> None:
    """Refuse groups of which one is empty: in its turn a round would have no client."""
    fleet, streams = study.fleet, Streams(study.study.seed)
    if fleet.schedule != "cyclic" or not clients:
        return
    if nobody := selection.empty_groups(clients, fleet.groups, streams):
        fits = selection.most_groups(clients, fleet.groups, streams)
        raise PlanError(
            f"fleet.groups={fleet.groups} and {len(clients)} sites do not compose: nobody falls into group "
            f"{some(nobody)}, so in its turn a round has no client; a site's group follows from its name. Set "
            f"fleet.groups={fits}, or schedule='random'."
        )


def _check_security(study: Study, clients: Sequence[str], sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Refuse sums that would be of too few rows, or that could wrap."""
    security = study.security
    if security.aggregation == "plain":
        return
    n, way = cohort(study, clients), f"security.aggregation={security.aggregation!r}"
    if n < security.min_group:
        raise PlanError(
            f"{way} and a round of {n} clients do not compose: security.min_group={security.min_group}, and a sum of "
            "fewer rows says too much of each. Draw more clients, or set aggregation='plain'."
        )
    if not (guarantees.asked(study) and guarantees.mode(study) != "site"):
        uniform = study.training.weighting == "uniform"
        weights = len(clients) if uniform else sum(sizes[name]["train"] for name in clients)
        check_headroom(weights, security.bound, security.fraction_bits)


def _secure_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what secure aggregation does not compose with, from the study alone."""
    security, way = study.security, f"security.aggregation={study.security.aggregation!r}"
    if security.aggregation == "plain":
        return
    names = security.aggregators
    if study.rule().chosen and not guarantees.asked(study):
        text = (
            f"{way} and data.threshold={study.data.threshold!r} do not compose without a privacy claim: each site's "
            "counts of training scores would be read, where its row may not be. Set data.threshold to a number, or set "
            "privacy.epsilon and privacy.delta."
        )
        yield _refusal(PlanError(text), data__threshold=Data().threshold)
    if security.aggregation == "three-party" and not len(names) == len(set(names)) == 3:
        yield _refusal(
            StudyError(f"security.aggregators={list(names)}; expected three different names"),
            security__aggregators=Security().aggregators,
        )
    if guarantees.mode(study) == "central":
        text = (
            f"{way} and privacy.noise='central' do not compose: a coordinator that adds the noise reads the sum "
            "without it. Set privacy.noise='shared'."
        )
        yield _refusal(PlanError(text), privacy__noise="shared")
    if study.privacy.correlated:
        text = (
            f"{way} and privacy.correlated=true do not compose: correlated noise is rounded by one holder, and here "
            "several hold it. Set security.aggregation='plain', or correlated=false."
        )
        yield _refusal(PlanError(text), privacy__correlated=False)
    if _baseline(study):
        text = f"{way} and training.algorithm={study.training.algorithm!r} do not compose: nothing is summed."
        yield _refusal(PlanError(text), training__algorithm="fedavg")


def _refusal(error: MedfedError, **mend: object) -> Refusal:
    """Return a refusal; `mend` holds settings, as table__key=value."""
    return Refusal(error, {tuple(key.split("__")): value for key, value in mend.items()})


def _check_robustness(study: Study, clients: Sequence[str]) -> None:
    """Refuse a rule with fewer clients than it needs."""
    n = cohort(study, clients)
    if (rule := robust_rule(study, n)) is None:
        if study.robustness.max_malicious and not bounded(study):
            raise PlanError(
                f"robustness.rule='auto' and {n:,} clients a round do not compose without a bound: more than "
                f"{MOST_ROWS:,} are not compared. Set robustness.bound, or fleet.clients_per_round."
            )
        return
    rule.check(n)
    if n > MOST_ROWS:
        raise PlanError(
            f"robustness.rule={rule.name!r} compares every two of {n:,} clients; {MOST_ROWS:,} at most. Set "
            "fleet.clients_per_round, or rule='mean'."
        )


def _robust_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what a rule, or an attack, does not compose with, from the study alone."""
    robust, way = study.robustness, f"security.aggregation={study.security.aggregation!r}"
    for name, share in (("max_malicious", robust.max_malicious), ("malicious", robust.malicious)):
        if not 0 <= share < 0.5:
            text = f"robustness.{name}={share}; expected a share in [0, 0.5): no rule bears a half"
            yield _refusal(StudyError(text))
            return
    yield from _bound_refusals(study)
    if bool(robust.attack) != bool(robust.malicious):
        text = (
            f"robustness.attack={robust.attack!r} with robustness.malicious={robust.malicious:g}; expected both or "
            "neither"
        )
        yield _refusal(StudyError(text))
    elif robust.attack:
        yield from _attack_refusals(study)
    unknown = gathered(partial(robust_rule, study, 1))
    yield from unknown
    rule = None if unknown else robust_rule(study, 1)
    if rule is not None:
        yield from _rule_refusals(study, rule, way)
    elif not unknown and robust.max_malicious and not bounded(study):
        text = (
            f"robustness.max_malicious={robust.max_malicious:g} and robustness.rule='mean' do not compose: the mean "
            "bears nobody. Set rule='nnm+geometric-median', or robustness.bound for a fleet too large for it."
        )
        yield _refusal(PlanError(text), robustness__rule=DEFAULT_RULE)


def _attack_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what a simulated attack asks for."""
    name = study.robustness.attack
    unknown = gathered(partial(attacks.named, name))
    yield from unknown
    if not unknown and attacks.named(name).stage == "wire" and study.security.aggregation != "three-party":
        text = f"robustness.attack={name!r} acts on shared words; set aggregation='three-party'."
        yield _refusal(PlanError(text), security__aggregation="three-party")


def _rule_refusals(study: Study, rule: RobustRule, way: str) -> Iterator[Refusal]:
    """Yield what a study's rule does not compose with; `way` tells the aggregation."""
    where, aggregation = f"robustness.rule={study.robustness.rule!r}", study.security.aggregation
    if aggregation == "masked":
        text = (
            f"{where} and {way} do not compose: the server sees no row, nor how two compare. Set "
            "aggregation='three-party', where their noised Gram matrix is opened, or 'plain' with noise='site'."
        )
        yield _refusal(PlanError(text), security__aggregation="three-party")
    if _baseline(study):
        text = f"{where} and training.algorithm={study.training.algorithm!r} do not compose: nothing is summed."
        yield _refusal(PlanError(text), training__algorithm="fedavg")
    if rule.name.endswith("fltrust"):
        text = f"{where} needs a reference row, which no study gives yet; take 'nnm+geometric-median'"
        yield _refusal(PlanError(text), robustness__rule=DEFAULT_RULE)
    if rule.weighs_few_rows and aggregation == "three-party":
        text = f"{where} and {way} do not compose: it opens single rows, or two. Take 'multi-krum' or the default."
        yield _refusal(PlanError(text), robustness__rule="multi-krum")
    if rule.needs == "rows" and aggregation == "three-party":
        text = (
            f"{where} and {way} do not compose: it works coordinate by coordinate and needs every row in plain sight. "
            "Take 'nnm+geometric-median', which reads how rows compare."
        )
        yield _refusal(PlanError(text), robustness__rule=DEFAULT_RULE)
    if not guarantees.asked(study) or guarantees.mode(study) == "site":
        return
    if aggregation == "plain":
        text = (
            f"{where} and privacy.noise={guarantees.mode(study)!r} with {way} do not compose: weights that follow from "
            "rows without noise tell of patients. Set aggregation='three-party', or noise='site'."
        )
        yield _refusal(PlanError(text), security__aggregation="three-party")
    privacy = study.privacy
    if privacy.clipping == "adaptive" or privacy.max_sites_per_patient > 1 or privacy.simulation_only:
        text = (
            f"{where} and privacy.clipping={privacy.clipping!r}, simulation_only={privacy.simulation_only}, "
            f"max_sites_per_patient={privacy.max_sites_per_patient} do not compose: the noise of the Gram matrix is "
            "for fixed norms, for patients of one site, and real. Change those, or set noise='site'."
        )
        yield _refusal(PlanError(text))


def _bound_refusals(study: Study) -> Iterator[Refusal]:
    """Yield a bound on rows, or a reference, where it cannot do what it is for."""
    robust = study.robustness
    if not (math.isfinite(robust.bound) and robust.bound >= 0):
        yield _refusal(StudyError(f"robustness.bound={robust.bound}; expected a norm of 0 or more"))
    if not (math.isfinite(robust.tolerance) and robust.tolerance >= 0):
        text = f"robustness.tolerance={robust.tolerance}; expected a share of the loss, 0 or more"
        yield _refusal(StudyError(text), robustness__tolerance=Robustness().tolerance)
    where = f"robustness.bound={robust.bound:g}"
    if robust.bound and study.security.aggregation == "masked":
        text = (
            f"{where} and security.aggregation='masked' do not compose: nobody can check a masked row's norm. Set "
            "aggregation='three-party', where it is checked in secret, or 'plain'."
        )
        yield _refusal(PlanError(text), security__aggregation="three-party")
    if robust.bound and guarantees.asked(study):
        text = (
            f"{where} and a privacy claim do not compose: privacy.clip bounds each patient already, and noise comes "
            "after it. Leave robustness.bound at 0."
        )
        yield _refusal(PlanError(text), robustness__bound=0.0)
    known = study.training.algorithm in ALGORITHMS
    if robust.reference and known and ALGORITHMS[algorithm_name(study)].kept:
        text = (
            f"robustness.reference={robust.reference!r} and training.algorithm={study.training.algorithm!r} do not "
            "compose: sites keep what a round taken back has taught them. Set algorithm='fedavg'."
        )
        yield _refusal(PlanError(text), training__algorithm="fedavg")


def check(study: Study) -> None:
    """Refuse what does not compose, from the study alone: all of it at once."""
    refuse(objections(study))


def objections(study: Study) -> list[Refusal]:
    """Return all that stands against a study, from the study alone.

    Where a value cannot be used, or epsilon, delta and noise do not go together, the rest is looked at as if that were
    mended.
    """
    extensions.load()
    study, found = _resolved(study)
    return [
        *found,
        *refusals.found(study),
        *_secure_refusals(study),
        *_robust_refusals(study),
        *_algorithm_refusals(study),
        *_added_refusals(study),
    ]


def standing(study: Study) -> list[Refusal]:
    """Return all that stands against a study before a record is read: from itself, and from its table's header."""
    sourceless = gathered(partial(sources.completed, study))
    if not sourceless:
        study = replace(study, data=sources.completed(study))
    found = [*objections(study), *sourceless]
    resolved = replace(_resolved(study)[0], data=study.data)
    private = guarantees.asked(resolved)
    try:
        columns = sources.columns_of(study, private)
    except MedfedError as error:
        return [*found, Refusal(error)]
    return [*found, *_header_refusals(resolved, columns, private)]


def _resolved(study: Study) -> tuple[Study, list[Refusal]]:
    """Return a study whose values can be used and whose target is whole, and what had to be mended for that."""
    found = out_of_range(study)
    study = mended(study, found)
    while target := list(guarantees.unresolved(study)):  # each is mended once
        study = mended(study, target)
        found += target
    return study, found


def _header_refusals(study: Study, columns: Sequence[str], private: bool) -> Iterator[Refusal]:
    """Yield what stands against a study beside a table's header; `private`: also what a claim needs declared."""
    data, sizes = study.data, study.privacy.sizes
    yield from tables.misnamed(columns, data)
    yield from sources.misplaced(columns, study, data, private)
    yield from sources.misread(study, private)
    if not private:
        return
    if study.sites.kind == "hospital" and not data.site:
        yield from guarantees.unknown_sizes(study)  # a misspelt site's size counts before a blank for it
        yield from guarantees.unsized(study.sites.names, study)
    if study.sites.kind == "hospital" and sizes and min(sizes.values()) > 0:
        yield from guarantees.large_delta(sum(sizes.values()), study)
    if data.target and data.task != "regression":
        yield from tables.unlabelled(data)
        if labels := data.dictionary.get(data.target, Feature()).categories:
            yield from gathered(partial(preprocess.classes, sorted(labels), data))
    if study.privacy.ranges_epsilon:
        if study.sites.kind == "hospital" and study.privacy.delta < 1:
            yield from refusals.hidden_ranges(listed(columns, study), sizes)
    elif not data.features or any(map(is_pattern, data.features)):
        yield from tables.undescribed(features_of(columns, data), data, refusals.unless_paid(study))


def mended(study: Study, found: Sequence[Refusal]) -> Study:
    """Return a study with the settings that mend what was found; a blank epsilon is taken for 1."""
    if not found:
        return study
    settings = study.tables()
    for path, value in mends(found).items():
        put(settings, path, 1.0 if value is EPSILON else value)
    return replace(parse(settings)[0], folder=study.folder, given=study.given, chosen=study.chosen)


def _algorithm_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what an algorithm and the local optimiser do not bear."""
    training = study.training
    if training.optimizer == "adam" and training.momentum > 0:
        text = f"training.momentum={training.momentum:g} is for sgd; with optimizer='adam' set training.beta1"
        yield _refusal(PlanError(text), training__momentum=0.0)
    if training.algorithm not in ALGORITHMS:
        text = f"training.algorithm={training.algorithm!r} is unknown; {nearest(training.algorithm, ALGORITHMS)}"
        close = closest(training.algorithm, ALGORITHMS)
        yield _refusal(StudyError(text), **({"training__algorithm": close} if close else {}))
        return
    algorithm = ALGORITHMS[training.algorithm]
    where = f"training.algorithm={training.algorithm!r}"
    if algorithm.joint == "refused" and not algorithm.baseline and _asked_jointly(study):
        text = (
            f"{where} and privacy.noise={guarantees.mode(study)!r} do not compose: a round is then one step, noised on "
            "the sum of all sites, which leaves out what this algorithm does at its clients. Set privacy.noise='site', "
            "or take fedavg."
        )
        yield _refusal(PlanError(text), privacy__noise="site")
    if algorithm.plain_sgd and (training.optimizer != "sgd" or training.momentum > 0):
        text = (
            f"{where} and training.optimizer={training.optimizer!r} with momentum={training.momentum:g} do not "
            f"compose: {algorithm.plain_sgd}. Set training.optimizer='sgd' and training.momentum=0, or take fedavg."
        )
        yield _refusal(PlanError(text), training__optimizer="sgd", training__momentum=0.0)
    if algorithm.any_sgd and training.optimizer != "sgd":
        text = (
            f"{where} and training.optimizer={training.optimizer!r} do not compose: {algorithm.any_sgd}. "
            "Set training.optimizer='sgd', or take fedavg."
        )
        yield _refusal(PlanError(text), training__optimizer="sgd")


def _added_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what a selector, links or a learner do not compose with; names come from their registries."""
    schedule, links, model = study.fleet.schedule, study.training.links, study.model.name
    if schedule not in selection.SELECTORS:
        known = selection.SELECTORS
        text = f"fleet.schedule={schedule!r}; expected one of {', '.join(map(repr, known))}"
        close = closest(schedule, known)
        yield _refusal(StudyError(text), **({"fleet__schedule": close} if close else {}))
    for name in links:
        if name not in LINKS:
            yield _refusal(StudyError(f"training.links={name!r} is no link; {nearest(name, LINKS)}"))
    where = f"training.links={list(links)}"
    if links and study.security.aggregation != "plain":
        text = (
            f"{where} and security.aggregation={study.security.aggregation!r} do not compose: what such a link sends "
            "is decoded row by row, and nobody sees a row there. Leave training.links out, or set aggregation='plain'."
        )
        yield _refusal(PlanError(text), training__links=())
    elif links and _asked_jointly(study):
        text = (
            f"{where} and privacy.noise={guarantees.mode(study)!r} do not compose: rows are whole steps of the noise's "
            "grid, whose sum must be exact. Leave training.links out, or set privacy.noise='site'."
        )
        yield _refusal(PlanError(text), training__links=())
    if model not in LEARNERS:
        return
    if study.training.algorithm not in ("fedavg", "pooled"):
        text = (
            f"model.name={model!r} and training.algorithm={study.training.algorithm!r} do not compose: no gradient "
            "trains this learner, which says itself how its state follows. Leave training.algorithm out."
        )
        yield _refusal(PlanError(text), training__algorithm="fedavg")
    if study.privacy.meant:
        text = (
            f"model.name={model!r} and a privacy claim do not compose: how far a patient moves what this learner sends "
            "is not known. Take a model that gradients train, such as 'logistic', or claim nothing."
        )
        yield _refusal(PlanError(text), model__name="logistic")


def _asked_jointly(study: Study) -> bool:
    """Say whether one noise is asked for the sum of all sites, of a study whose privacy keys may not go together."""
    return not any(guarantees.unresolved(study)) and guarantees.mode(study) in ("shared", "central")


def probed(study: Study, encoding: Encoding, model: nn.Module) -> Probed:
    """Return which path trains the study's model; every party asks for itself.

    Raises PlanError for a module that cannot be trained or tested rightly, naming the part.
    """
    if study.model.name in LEARNERS:
        return Probed("auto")  # nothing of it is trained by gradients
    target, private = encoding.target, guarantees.asked(study)
    options = json.dumps(study.model.options, sort_keys=True, default=str)
    inputs, asked = len(encoding.names()), study.training.path
    key = (models.ZOO.get(study.model.name), options, inputs, target.task, target.outputs, private, asked)
    known = _PROBED.get(key) if study.model.name in models.ZOO else None
    if known is None:
        where, x_BF = f"model.name={study.model.name!r}", encoding.invented(ROWS)
        known = probe(model, where, x_BF, target.task, target.outputs, private, asked)
        _PROBED[key] = known
    return known


_PROBED: dict[tuple[object, ...], Probed] = {}
"""What was found of the zoo's models in this process; others may change behind their name."""


def _slowly(study: Study, taken: Probed) -> list[str]:
    """Say why a model is not trained on the fastest path."""
    if study.training.path != "auto" or taken.path in ("auto", "rules"):
        return []
    how = {"func": "by torch.func", "loop": "record by record" if guarantees.asked(study) else "client by client"}
    return [f"model.name={study.model.name!r} trains {how[taken.path]}, slower: {'; '.join(taken.reasons)}"]


def build_model(study: Study, encoding: Encoding) -> nn.Module:
    """Build the study's model for the encoded columns."""
    inputs, outputs = len(encoding.names()), encoding.target.outputs
    if study.model.name in LEARNERS:
        return Held(LEARNERS[study.model.name], Shape(inputs, outputs, encoding.target.task))
    seed = Streams(study.study.seed).key("weights")
    return models.build(study.model.name, inputs, outputs, study.model.options, seed)


def _baseline(study: Study) -> bool:
    """Say whether the study's algorithm is known, and federates nothing."""
    known = ALGORITHMS.get(study.training.algorithm)
    return known is not None and known.baseline


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


def safe_rate(study: Study, encoding: Encoding, bends: Mapping[str, float], sizes: Mapping[str, int]) -> Chosen:
    """Return the learning rate that every site's rows bear, from what `rates.bend` says of each."""
    stretch = partial(rates.stretch, build_model(study, encoding), encoding.invented(rates.ROWS))
    return rates.choose(encoding.target.task, bends, sizes, local_plan(study, encoding), study.training, stretch)


def _warnings(surveys: Mapping[str, Mapping[str, Any]], encoding: Encoding, study: Study) -> list[str]:
    found = []
    robust = study.robustness
    if robust.attack:
        liars = attacks.liars(list(surveys), robust.malicious, study.study.seed)
        found.append(
            f"robustness.attack={robust.attack!r}: a simulation in which {some(liars)} lie; its model is for no use"
        )
    if robust.malicious > robust.max_malicious:
        found.append(
            f"robustness.malicious={robust.malicious:g} is more than the rule is set to bear "
            f"(max_malicious={robust.max_malicious:g})"
        )
    if algorithm_name(study) != study.training.algorithm:
        found.append(
            f"training.algorithm={study.training.algorithm!r} is FedAvg here: privacy.noise="
            f"{guarantees.mode(study)!r} takes one step a round, where both are the same"
        )
    if encoding.target.task == "binary" and _guessed(encoding.target.labels, study):
        other, positive = encoding.target.labels
        found.append(
            f"data.positive is left open: {positive!r} counts as positive, as it follows {other!r} in the alphabet, "
            "and precision, recall and F1 are of it. Write down which one is meant."
        )
    if guarantees.asked(study) and study.privacy.simulation_only:
        found.append("privacy.simulation_only=true: noise is seeded, so nothing is claimed")
    if guarantees.asked(study):
        return found  # the rest would tell of training patients
    doubtful = doubts.warnings(surveys, study.data)
    return [
        *found,
        *_dropped(surveys),
        *doubtful,
        *_strange_values(surveys, study),
        *_lacking(surveys, encoding, study.data),
    ]


def _dropped(surveys: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tell how many rows data.drop has left out; those that name no site once, as they are nobody's."""
    found = []
    for name, survey in surveys.items():
        for what, count in survey.get("dropped", {}).items():
            where = "" if what == "rows without site" else f"site {name!r}: "
            found.append(f"{where}{count} {what} left out, as data.drop says")
    return list(dict.fromkeys(found))


NEGATIVE = ("nein", "non", "0", "no", "n", "false", "f", "negative", "neg", "alive", "benign", "control", "healthy")
"""Texts that name the absence of what is looked for, whatever their case."""


def _guessed(labels: Sequence[str], study: Study) -> bool:
    """Say whether nobody has written down which label is positive, and the labels do not say it either."""
    return study.left_open("data.positive") and not study.data.positive and labels[0].lower() not in NEGATIVE


def _lacking(surveys: Mapping[str, Mapping[str, Any]], encoding: Encoding, data: Data) -> list[str]:
    """Tell what sites lack; what many lack alike is told once."""
    said: dict[str, list[str]] = {}
    for name, survey in surveys.items():
        if survey["train"] == 0:
            said.setdefault("has no training row: it validates from outside, tested and never trained on", []).append(
                name
            )
        if survey["test"] == 0:
            said.setdefault("has no test patient; its own figures are null", []).append(name)
        if encoding.target.task != "regression" and len(survey["train_labels"]) == 1:
            label = next(iter(survey["train_labels"]))
            what = f"trains on one class only ({label!r}); its own model cannot tell classes apart"
            said.setdefault(what, []).append(name)
        absent = [
            c.name for c in encoding.columns if survey["missing"].get(c.name, 0) == survey["train"] + survey["test"]
        ]
        absent = [column for column in absent if column not in data.absent.get(name, ())]
        if absent:
            what = f"has no value at all of {some(absent, 8)}; they are set to the other sites' centre"
            said.setdefault(what, []).append(name)
    found = []
    for what, names in said.items():
        few = len(names) <= _FEW
        found += [f"site {name!r} {what}" for name in names] if few else [f"each of {those(names)} {what}"]
    return found


_FEW = 5
"""Sites that are told of one by one."""


def _strange_values(surveys: Mapping[str, Mapping[str, Any]], study: Study) -> list[str]:
    """Tell which numbers lie beyond their declared range, or absurdly far from the others where none is declared."""
    found = []
    for whose, column, rows in _rows_told(surveys, "outside", study.sites.kind == "device"):
        low, high = study.data.dictionary[column].range
        done = "they were set to its ends" if column != study.data.target else "they are taken as they are"
        found.append(
            f"{whose}, column {column!r}: {rows} outside the declared range [{low:g}, {high:g}]; {done}. Correct "
            f"them, or {toml.key('data', 'dictionary', column, 'range')}"
        )
    for whose, column, rows in _rows_told(surveys, "far", study.sites.kind == "device"):
        found.append(
            f"{whose}, column {column!r}: {rows} at least 1,000 times as far from the median as any other. "
            "Correct them, name the text in data.missing_values, or declare "
            f"{toml.key('data', 'dictionary', column, 'range')} = [low, high], which values are then held to"
        )
    return found


def _rows_told(surveys: Mapping[str, Mapping[str, Any]], kind: str, devices: bool) -> Iterator[tuple[str, str, str]]:
    """Yield whose, column and the rows of what a survey found; all devices as one, and many sites."""
    columns: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for name, survey in surveys.items():
        for column, told in survey.get(kind, {}).items():
            columns.setdefault(column, {}).setdefault("all devices" if devices else name, []).append(told)
    for column, sites in columns.items():
        if len(sites) > _FEW:
            counts = {name: sum(told["rows"] for told in parts) for name, parts in sites.items()}
            most = max(counts, key=counts.__getitem__)
            yield f"{len(sites)} sites (most at {most!r})", column, f"{sum(counts.values())} values"
            continue
        for name, parts in sites.items():
            count, first = sum(told["rows"] for told in parts), [row for told in parts for row in told["first"]][:5]
            yield f"site {name!r}", column, f"row{'s' if count > 1 else ''} {rows_of(first, count)}"
