"""What stands against a study:
parts that are fine alone and do not compose, both sides named, with the way out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from medfed.core import extensions
from medfed.core.checks import MedfedError, PlanError, StudyError, closest, nearest
from medfed.core.refusals import Refusal, gather, mends, refuse
from medfed.data import declared, headers, preprocess, sources
from medfed.data.features import features_of, list_open
from medfed.fleet import selection
from medfed.learn.algorithms import ALGORITHMS
from medfed.learn.learners import LEARNERS
from medfed.links.wire import LINKS
from medfed.planning.resolved import DEFAULT_RULE, algorithm_name, bounded, robust_rule
from medfed.planning.row_limits import holds_rows
from medfed.privacy import claim_refusals
from medfed.privacy import guarantee as guarantees
from medfed.robust import attacks
from medfed.robust.rules import RobustRule
from medfed.study import (
    EPSILON,
    Data,
    Feature,
    Security,
    Study,
    beyond,
    is_pattern,
    out_of_range,
    parse,
    put,
)


def check(study: Study) -> None:
    """Refuse what does not compose, from the study alone: all of it at once."""
    refuse(find(study))


def find(study: Study) -> list[Refusal]:
    """Return all that stands against a study, from the study alone.

    Where a value cannot be used, or epsilon, delta and noise do not go together, the rest is looked
    at as if that were mended.
    """
    extensions.load()
    study, found = _repair(study)
    return [
        *found,
        *claim_refusals.find(study),
        *_secure_refusals(study),
        *_robust_refusals(study),
        *_algorithm_refusals(study),
        *_added_refusals(study),
    ]


def find_with_header(study: Study) -> list[Refusal]:
    """Return all that stands against a study before a record is read: from itself, and from its
    table's header.
    """
    sourceless = gather(partial(sources.complete, study))
    if not sourceless:
        study = replace(study, data=sources.complete(study))
    found = [*find(study), *sourceless]
    resolved = replace(_repair(study)[0], data=study.data)
    private = guarantees.asked(resolved)
    try:
        columns = sources.columns_of(study, private)
    except MedfedError as error:
        return [*found, Refusal(error)]
    return [*found, *_header_refusals(resolved, columns, private)]


def _repair(study: Study) -> tuple[Study, list[Refusal]]:
    """Return a study whose values can be used and whose target is whole,
    and what had to be mended for that.
    """
    found = out_of_range(study)
    study = mend(study, found)
    while target := list(guarantees.refuse_unresolved(study)):  # each is mended once
        study = mend(study, target)
        found += target
    return study, found


def mend(study: Study, found: Sequence[Refusal]) -> Study:
    """Return a study with the settings that mend what was found; a blank epsilon is taken for 1."""
    if not found:
        return study
    settings = study.tables()
    for path, value in mends(found).items():
        put(settings, path, 1.0 if value is EPSILON else value)
    return replace(parse(settings)[0], folder=study.folder, given=study.given, chosen=study.chosen)


def _header_refusals(study: Study, columns: Sequence[str], private: bool) -> Iterator[Refusal]:
    """Yield what stands against a study beside a table's header;
    `private`: also what a claim needs declared.
    """
    data = study.data
    sizes = study.privacy.sizes
    yield from headers.refuse_misnamed(columns, data)
    yield from sources.refuse_misplaced(columns, study, data, private)
    yield from sources.misread(study, private)
    if not private:
        return

    # what a claim needs declared: sizes, labels, features
    if study.sites.kind == "hospital" and not data.site:
        # a misspelt site's size counts before a blank for it
        yield from guarantees.unknown_sizes(study)
        yield from guarantees.refuse_unsized(study.sites.names, study)
    if study.sites.kind == "hospital" and sizes and min(sizes.values()) > 0:
        yield from guarantees.large_delta(sum(sizes.values()), study)

    if data.target and data.task != "regression":
        yield from declared.refuse_unlabelled(data)
        if labels := data.dictionary.get(data.target, Feature()).categories:
            yield from gather(partial(preprocess.classes, sorted(labels), data))

    if study.privacy.ranges_epsilon:
        if study.sites.kind == "hospital" and study.privacy.delta < 1:
            yield from claim_refusals.hidden_ranges(list_open(columns, study), sizes)
    elif not data.features or any(map(is_pattern, data.features)):
        yield from declared.refuse_undescribed(
            features_of(columns, data), data, claim_refusals.unless_paid(study)
        )


def _secure_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what secure aggregation does not compose with, from the study alone."""
    security = study.security
    way = f"security.aggregation={security.aggregation!r}"
    if security.aggregation == "plain":
        return
    names = security.aggregators
    if study.rule().chosen and not guarantees.asked(study):
        text = (
            f"{way} and data.threshold={study.data.threshold!r} do not compose without a privacy "
            "claim: each site's counts of training scores would be read, where its row may not "
            "be. Set data.threshold to a number, or set privacy.epsilon and privacy.delta."
        )
        yield _refusal(PlanError(text), data__threshold=Data().threshold)

    if security.aggregation == "three-party" and not len(names) == len(set(names)) == 3:
        yield _refusal(
            StudyError(f"security.aggregators={list(names)}; expected three different names"),
            security__aggregators=Security().aggregators,
        )
    if guarantees.mode(study) == "central":
        text = (
            f"{way} and privacy.noise='central' do not compose: a coordinator that adds the "
            "noise reads the sum without it. Set privacy.noise='shared'."
        )
        yield _refusal(PlanError(text), privacy__noise="shared")

    if study.privacy.correlated:
        text = (
            f"{way} and privacy.correlated=true do not compose: correlated noise is rounded by "
            "one holder, and here several hold it. Set security.aggregation='plain', or "
            "correlated=false."
        )
        yield _refusal(PlanError(text), privacy__correlated=False)

    if _is_baseline(study):
        text = (
            f"{way} and training.algorithm={study.training.algorithm!r} do not compose: nothing "
            "is summed."
        )
        yield _refusal(PlanError(text), training__algorithm="fedavg")


def _refusal(error: MedfedError, **mend: object) -> Refusal:
    """Return a refusal; `mend` holds settings, as table__key=value."""
    return Refusal(error, {tuple(key.split("__")): value for key, value in mend.items()})


def _robust_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what a rule, or an attack, does not compose with, from the study alone."""
    robust = study.robustness
    way = f"security.aggregation={study.security.aggregation!r}"
    if any(beyond(robust, ("robustness",))):
        return  # from a value out of its range nothing follows
    yield from _bound_refusals(study)

    if bool(robust.attack) != bool(robust.malicious):
        text = (
            f"robustness.attack={robust.attack!r} with "
            f"robustness.malicious={robust.malicious:g}; expected both or neither"
        )
        yield _refusal(StudyError(text))
    elif robust.attack:
        yield from _attack_refusals(study)

    unknown = gather(partial(robust_rule, study, 1))
    yield from unknown
    rule = None if unknown else robust_rule(study, 1)
    if rule is not None:
        yield from _rule_refusals(study, rule, way)
    elif not unknown and robust.max_malicious and not bounded(study):
        text = (
            f"robustness.max_malicious={robust.max_malicious:g} and robustness.rule='mean' do "
            "not compose: the mean bears nobody. Set rule='nnm+geometric-median', or "
            "robustness.bound for a fleet too large for it."
        )
        yield _refusal(PlanError(text), robustness__rule=DEFAULT_RULE)


def _attack_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what a simulated attack asks for."""
    name = study.robustness.attack
    unknown = gather(partial(attacks.find, name))
    yield from unknown
    if (
        not unknown
        and attacks.find(name).stage == "wire"
        and study.security.aggregation != "three-party"
    ):
        text = f"robustness.attack={name!r} acts on shared words; set aggregation='three-party'."
        yield _refusal(PlanError(text), security__aggregation="three-party")


def _rule_refusals(study: Study, rule: RobustRule, way: str) -> Iterator[Refusal]:
    """Yield what a study's rule does not compose with; `way` tells the aggregation."""
    where = f"robustness.rule={study.robustness.rule!r}"
    aggregation = study.security.aggregation
    if aggregation == "masked":
        text = (
            f"{where} and {way} do not compose: the server sees no row, nor how two compare. Set "
            "aggregation='three-party', where their noised Gram matrix is opened, or 'plain' "
            "with noise='site'."
        )
        yield _refusal(PlanError(text), security__aggregation="three-party")

    if _is_baseline(study):
        text = (
            f"{where} and training.algorithm={study.training.algorithm!r} do not compose: "
            "nothing is summed."
        )
        yield _refusal(PlanError(text), training__algorithm="fedavg")

    if rule.name.endswith("fltrust"):
        text = (
            f"{where} needs a reference row, which no study gives yet; take 'nnm+geometric-median'"
        )
        yield _refusal(PlanError(text), robustness__rule=DEFAULT_RULE)

    if rule.weighs_few_rows and aggregation == "three-party":
        text = (
            f"{where} and {way} do not compose: it opens single rows, or two. Take 'multi-krum' "
            "or the default."
        )
        yield _refusal(PlanError(text), robustness__rule="multi-krum")

    if rule.needs == "rows" and aggregation == "three-party":
        text = (
            f"{where} and {way} do not compose: it works coordinate by coordinate and needs "
            "every row in plain sight. Take 'nnm+geometric-median', which reads how rows "
            "compare."
        )
        yield _refusal(PlanError(text), robustness__rule=DEFAULT_RULE)

    if not guarantees.asked(study) or guarantees.mode(study) == "site":
        return
    if aggregation == "plain":
        text = (
            f"{where} and privacy.noise={guarantees.mode(study)!r} with {way} do not compose: "
            "weights that follow from rows without noise tell of patients. Set "
            "aggregation='three-party', or noise='site'."
        )
        yield _refusal(PlanError(text), security__aggregation="three-party")

    privacy = study.privacy
    if (
        privacy.clipping == "adaptive"
        or privacy.max_sites_per_patient > 1
        or privacy.simulation_only
    ):
        text = (
            f"{where} and privacy.clipping={privacy.clipping!r}, "
            f"simulation_only={privacy.simulation_only}, "
            f"max_sites_per_patient={privacy.max_sites_per_patient} do not compose: the noise of "
            "the Gram matrix is for fixed norms, for patients of one site, and real. Change "
            "those, or set noise='site'."
        )
        yield _refusal(PlanError(text))


def _bound_refusals(study: Study) -> Iterator[Refusal]:
    """Yield a bound on rows, or a reference, where it cannot do what it is for."""
    robust = study.robustness
    where = f"robustness.bound={robust.bound:g}"
    if robust.bound and study.security.aggregation == "masked":
        text = (
            f"{where} and security.aggregation='masked' do not compose: nobody can check a "
            "masked row's norm. Set aggregation='three-party', where it is checked in secret, "
            "or 'plain'."
        )
        yield _refusal(PlanError(text), security__aggregation="three-party")

    if robust.bound and guarantees.asked(study):
        text = (
            f"{where} and a privacy claim do not compose: privacy.clip bounds each patient "
            "already, and noise comes after it. Leave robustness.bound at 0."
        )
        yield _refusal(PlanError(text), robustness__bound=0.0)

    if robust.cap and not holds_rows(study):
        text = (
            f"robustness.cap={robust.cap:g} is held by three aggregators under one joint noise "
            "(privacy.epsilon, noise='shared'); here nobody would check it. Set "
            "aggregation='three-party', or robustness.cap=0."
        )
        yield _refusal(PlanError(text), robustness__cap=0.0)

    known = study.training.algorithm in ALGORITHMS
    if robust.reference and known and ALGORITHMS[algorithm_name(study)].kept:
        text = (
            f"robustness.reference={robust.reference!r} and "
            f"training.algorithm={study.training.algorithm!r} do not compose: sites keep what a "
            "round taken back has taught them. Set algorithm='fedavg'."
        )
        yield _refusal(PlanError(text), training__algorithm="fedavg")


def _algorithm_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what an algorithm and the local optimiser do not bear."""
    training = study.training
    if training.optimizer == "adam" and training.momentum > 0:
        text = (
            f"training.momentum={training.momentum:g} is for sgd; with optimizer='adam' set "
            "training.beta1"
        )
        yield _refusal(PlanError(text), training__momentum=0.0)

    if training.algorithm not in ALGORITHMS:
        text = (
            f"training.algorithm={training.algorithm!r} is unknown; "
            f"{nearest(training.algorithm, ALGORITHMS)}"
        )
        close = closest(training.algorithm, ALGORITHMS)
        mend = {"training__algorithm": close} if close else {}
        yield _refusal(StudyError(text), **mend)
        return

    algorithm = ALGORITHMS[training.algorithm]
    where = f"training.algorithm={training.algorithm!r}"
    if algorithm.joint == "refused" and not algorithm.baseline and _asked_jointly(study):
        text = (
            f"{where} and privacy.noise={guarantees.mode(study)!r} do not compose: a round is "
            "then one step, noised on the sum of all sites, which leaves out what this "
            "algorithm does at its clients. Set privacy.noise='site', or take fedavg."
        )
        yield _refusal(PlanError(text), privacy__noise="site")

    if algorithm.plain_sgd and (training.optimizer != "sgd" or training.momentum > 0):
        text = (
            f"{where} and training.optimizer={training.optimizer!r} with "
            f"momentum={training.momentum:g} do not compose: {algorithm.plain_sgd}. Set "
            "training.optimizer='sgd' and training.momentum=0, or take fedavg."
        )
        yield _refusal(PlanError(text), training__optimizer="sgd", training__momentum=0.0)

    if algorithm.any_sgd and training.optimizer != "sgd":
        text = (
            f"{where} and training.optimizer={training.optimizer!r} do not compose: "
            f"{algorithm.any_sgd}. Set training.optimizer='sgd', or take fedavg."
        )
        yield _refusal(PlanError(text), training__optimizer="sgd")


def _added_refusals(study: Study) -> Iterator[Refusal]:
    """Yield what a selector, links or a learner do not compose with; registries give the names."""
    schedule = study.fleet.schedule
    links = study.training.links
    model = study.model.name

    if schedule not in selection.SELECTORS:
        known = selection.SELECTORS
        text = f"fleet.schedule={schedule!r}; expected one of {', '.join(map(repr, known))}"
        close = closest(schedule, known)
        yield _refusal(StudyError(text), **({"fleet__schedule": close} if close else {}))

    for name in links:
        if name not in LINKS:
            yield _refusal(
                StudyError(f"training.links={name!r} is no link; {nearest(name, LINKS)}")
            )

    where = f"training.links={list(links)}"
    if links and study.security.aggregation != "plain":
        text = (
            f"{where} and security.aggregation={study.security.aggregation!r} do not compose: "
            "what such a link sends is decoded row by row, and nobody sees a row there. Leave "
            "training.links out, or set aggregation='plain'."
        )
        yield _refusal(PlanError(text), training__links=())
    elif links and _asked_jointly(study):
        text = (
            f"{where} and privacy.noise={guarantees.mode(study)!r} do not compose: rows are "
            "whole steps of the noise's grid, whose sum must be exact. Leave training.links "
            "out, or set privacy.noise='site'."
        )
        yield _refusal(PlanError(text), training__links=())

    if model not in LEARNERS:
        return
    if study.training.algorithm not in ("fedavg", "pooled"):
        text = (
            f"model.name={model!r} and training.algorithm={study.training.algorithm!r} do not "
            "compose: no gradient trains this learner, which says itself how its state follows. "
            "Leave training.algorithm out."
        )
        yield _refusal(PlanError(text), training__algorithm="fedavg")

    if study.privacy.meant:
        text = (
            f"model.name={model!r} and a privacy claim do not compose: how far a patient moves "
            "what this learner sends is not known. Take a model that gradients train, such as "
            "'logistic', or claim nothing."
        )
        yield _refusal(PlanError(text), model__name="logistic")


def _asked_jointly(study: Study) -> bool:
    """Say whether one noise is asked for the sum of all sites, of a study whose privacy keys may
    not go together.
    """
    return not any(guarantees.refuse_unresolved(study)) and guarantees.mode(study) in (
        "shared",
        "central",
    )


def _is_baseline(study: Study) -> bool:
    """Say whether the study's algorithm is known, and federates nothing."""
    known = ALGORITHMS.get(study.training.algorithm)
    return known is not None and known.baseline
