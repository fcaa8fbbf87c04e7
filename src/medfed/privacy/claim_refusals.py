"""What a privacy claim does not compose with: each refusal names both sides and the way out.

Every entry is a way in which a guarantee was printed somewhere and did not hold
(docs/sharp-edges.md tells each). They are checked from the study alone, before any record is read.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from medfed.core import toml
from medfed.core.checks import PlanError, some
from medfed.core.refusals import Refusal, refuse
from medfed.core.toml import Ask
from medfed.data.features import open_columns
from medfed.privacy import accounting, privacy_events
from medfed.privacy.guarantee import (
    counted_together,
    mode,
    queries_of,
    ranges_noise,
    vote_interval,
    vote_multiplier,
    vote_noise,
)
from medfed.privacy.quantiles import LEAST
from medfed.study import RANGE, Data, Feature, Study, describe, described, is_pattern


def check(study: Study) -> None:
    """Raise PlanError for all in the study that breaks the guarantee it asks for."""
    refuse(find(study))


def find(study: Study) -> Iterator[Refusal]:
    """Yield what in the study breaks the guarantee it asks for."""
    where = mode(study)
    yield from _schedule(study, where)
    if where != "none":
        yield from _claim(study, where)


def _refusal(side: str, other: str, reason: str, action: str, **mend: object) -> Refusal:
    """Say of two sides why they do not compose and what to do; `mend` holds settings, as
    table__key=value.
    """
    settings = {tuple(key.split("__")): value for key, value in mend.items()}
    return Refusal(PlanError(f"{side} and {other} do not compose: {reason}. {action}"), settings)


PUBLIC_TEST = Ask(
    False,
    "true if held-out patients are declared public test data: their figures are told as they are",
)


def _claim(study: Study, where: str) -> Iterator[Refusal]:
    """Yield what does not compose with the study's epsilon; on some `where` noise is decides."""
    data = study.data
    privacy = study.privacy
    claim = f"privacy.epsilon={privacy.epsilon:g}"

    # What is read of patients, and what it may follow from.
    yield from _reading(study, claim)
    yield from _refuse_undeclared(study, claim)

    # What is released of them besides training.
    yield from _releases(study, claim)
    if privacy.scope == "study" and not privacy.simulation_only:
        yield from _lifetime(data)

    # Where noise is added, and whom it covers.
    if privacy.clipping == "adaptive" and where == "site":
        yield _refusal(
            "privacy.clipping='adaptive'",
            "privacy.noise='site'",
            "the noised count of one site says nothing at its size (sd 1.0 of a share, at 115 "
            "patients)",
            "Set privacy.clipping='automatic', or noise='shared', where all sites are counted "
            "together.",
            privacy__clipping="automatic",
        )
    if where != "site":
        yield from _places(study)
        yield from _one_step(study, where)

    # What held-out and training patients are asked beside it.
    if privacy.evaluation_epsilon and not data.test_is_public:
        yield from _noised_test(study)
    if privacy.vote_epsilon:
        yield from _vote(study)
    yield from _queries(study)


def _reading(study: Study, claim: str) -> Iterator[Refusal]:
    """Yield ways of reading a table that let one patient's rows show in others', or in an error."""
    data = study.data
    p = study.privacy
    if data.preprocess in ("robust", "standard"):
        yield _refusal(
            claim,
            f"data.preprocess={data.preprocess!r}",
            "centres and scales fitted on patients are released without noise",
            "Set data.preprocess='dictionary' and declare public ranges in [data.dictionary].",
            data__preprocess="dictionary",
        )

    if data.split == "stratified" and not data.test:
        yield _refusal(
            claim,
            "data.split='stratified'",
            "one patient's presence moves another between training and test",
            "Set data.split='patient', or mark held-out rows in a column (data.test).",
            data__split="patient",
        )

    if data.on_missing == "refuse":
        yield _refusal(
            claim,
            "data.on_missing='refuse'",
            "an error about a gap tells that some patient has one",
            "Set data.on_missing='impute'.",
            data__on_missing="impute",
        )

    if p.max_sites_per_patient > 1 and (data.test or data.test_from):
        yield _refusal(
            f"privacy.max_sites_per_patient={p.max_sites_per_patient}",
            f"data.test={data.test!r}" if data.test else f"data.test_from={data.test_from!r}",
            "a patient may be trained on at one site and tested at another, outside what either "
            "pays for",
            "Leave data.test and data.test_from out: by the hash a patient is on one side "
            "everywhere. Or attest privacy.max_sites_per_patient=1.",
            data__test="",
            data__test_from="",
        )

    for number, join in enumerate(data.join):
        if join.on and (not data.patient or data.patient not in join.on):
            yield _refusal(
                claim,
                f"data.join[{number}].on={list(join.on)!r}",
                "a row of one patient could be found by, or hide, another's",
                f"Join by the patient: data.join[{number}].on = [{data.patient or 'PATIENT'!r}], "
                "and more beside.",
            )

    if data.on_outside == "refuse":
        yield _refusal(
            claim,
            "data.on_outside='refuse'",
            "an error about a value tells that some patient has it",
            "Set data.on_outside='hold'.",
            data__on_outside="hold",
        )


def _releases(study: Study, claim: str) -> Iterator[Refusal]:
    """Yield what would be released without noise,
    or be composed by an accountant that does not hold for it.
    """
    data = study.data
    t = study.training
    p = study.privacy
    if p.ranges_epsilon and data.preprocess == "none":
        yield _refusal(
            f"privacy.ranges_epsilon={p.ranges_epsilon:g}",
            "data.preprocess='none'",
            "numbers are taken as they are, so that a range that is found would serve nothing",
            "Set data.preprocess='dictionary'.",
            data__preprocess="dictionary",
        )

    if not data.test_is_public and not p.evaluation_epsilon and study.monitor.evaluate_every:
        yield _unpaid_test(study, claim)

    if t.algorithm in ("local", "pooled"):
        yield _refusal(
            claim,
            f"training.algorithm={t.algorithm!r}",
            "it is a baseline, not a federation",
            "Take fedavg, or leave the claim out.",
            training__algorithm="fedavg",
        )

    if p.accountant == "pld" and p.scope == "study":
        yield _refusal(
            "privacy.accountant='pld'",
            "privacy.scope='study'",
            "the lifetime ledger composes runs that are not fixed in advance, for which PLD is "
            "no filter",
            "Set privacy.accountant='rdp', or scope='run' for public data.",
            privacy__accountant="rdp",
        )

    if p.accountant == "pld" and p.noise == "site" and p.max_sites_per_patient > 1:
        yield _refusal(
            "privacy.accountant='pld'",
            f"privacy.max_sites_per_patient={p.max_sites_per_patient} with privacy.noise='site'",
            "a patient of two unlike sites pays half of what each plans, and by PLD that may be "
            "more than either whole",
            "Set privacy.accountant='rdp'.",
            privacy__accountant="rdp",
        )

    if data.read_from_records and p.scope == "study":
        yield _refusal(
            claim,
            "data.read_from_records=true with privacy.scope='study'",
            "ranges, categories and sizes that were read off patients tell of them",
            "Fill them in from what is publicly known and leave read_from_records out, or set "
            "privacy.scope='run' for public data.",
        )


def _unpaid_test(study: Study, claim: str) -> Refusal:
    """Refuse raw figures of test patients;
    a binary test can be paid for, whatever else is declared public.
    """
    rounds = study.training.rounds
    price = ""
    mend = dict[str, object](data__test_is_public=PUBLIC_TEST)

    if is_binary(study.data):
        price = (
            f", or privacy.evaluation_epsilon={affordable(study):g} to pay for a noised histogram"
        )
        mend = {"privacy__evaluation_epsilon": affordable(study)}
        if study.monitor.evaluate_every < rounds:
            price += f", with monitor.evaluate_every={rounds}"
            mend["monitor__evaluate_every"] = rounds

    return _refusal(
        claim,
        "test figures without noise",
        "held-out patients are patients too, and each round's figures are released",
        f"Set data.test_is_public=true if they are declared public test data{price}, or "
        "monitor.evaluate_every=0 to test nothing.",
        **mend,
    )


def is_binary(data: Data) -> bool:
    """Say whether the target may be of two labels, as far as the study tells."""
    labels = data.dictionary.get(data.target, Feature()).categories
    return data.task in ("auto", "binary") and len(labels) <= 2


def _refuse_undeclared(study: Study, claim: str) -> Iterator[Refusal]:
    """Refuse inputs and targets that nothing public bounds, as far as the study alone names them.

    Columns that it does not name are refused when the table's header is read
    (`data.tables.refuse_undescribed`).
    """
    data = study.data
    named = [name for name in data.features if not is_pattern(name)]

    names = [name for name in named if not described(data.dictionary.get(name, Feature()))]
    if names and not study.privacy.ranges_epsilon:
        first = names[0]
        more = len(names) > 1
        whose = "their" if more else "its"

        if more:
            side = f"{len(names)} of data.features ({some(map(repr, names))})"
        else:
            side = f"data.features={first!r}"

        one, other = (
            toml.key("data", "dictionary", first, name) for name in ("range", "categories")
        )
        action = f"Set {one} or {other}" + (
            ", and so on, or leave them out." if more else ", or leave it out."
        )
        error = PlanError(
            f"{claim} and {side} without a public range or categories do not compose: what "
            f"{whose} cells are, and how far they reach, would be taken from patients. "
            f"{action}{unless_paid(study)}"
        )
        yield Refusal(error, describe(names, data.dictionary))

    if data.task == "regression" and not data.dictionary.get(data.target, Feature()).range:
        where = toml.key("data", "dictionary", data.target, "range")
        error = PlanError(
            f"{claim} and data.task='regression' without {where} do not compose: nothing bounds "
            f"what one patient's target says. Set {where} = [low, high]."
        )
        yield Refusal(error, {("data", "dictionary", data.target, "range"): RANGE})


def unless_paid(study: Study) -> str:
    """Say, in a sentence after others, how ranges nobody knows are found, at which price."""
    quarter = study.privacy.epsilon / 4
    return (
        " Ranges of numbers that nobody can say are found from noised counts of training "
        f"patients by privacy.ranges_epsilon={quarter:g}: a quarter of epsilon costs training "
        "about 4 % more noise."
    )


def hidden_ranges(study: Study, sizes: Mapping[str, int]) -> Iterator[Refusal]:
    """Yield why the noise would hide the ranges that are to be found, from declared sizes alone."""
    columns = len(open_columns(study))
    patients = sum(sizes.values())
    p = study.privacy
    if not columns or not patients:
        return
    sd = ranges_noise(study, len(sizes))
    if patients >= LEAST * sd:
        return
    most = int(columns * (patients / (LEAST * sd)) ** 2)
    ways = [f"declare the ranges of all but {most} of them" if most else "declare the ranges"]
    dearer = [p.ranges_epsilon * n for n in (2, 3) if p.ranges_epsilon * n <= p.epsilon / 2]
    if enough := [e for e in dearer if patients >= LEAST * ranges_noise(study, len(sizes), e)]:
        ways.append(f"set privacy.ranges_epsilon={enough[0]:g}")
    if not counted_together(study) and mode(study) == "site":
        ways.append("take privacy.noise='shared', one noise for all sites")

    yield _refusal(
        f"privacy.ranges_epsilon={p.ranges_epsilon:g} for {columns} column{'s' * (columns > 1)} "
        "without a range",
        f"{patients} declared patients",
        f"on each count lies a noise of sd {sd:.3g} patients, which hides quantiles of fewer "
        f"than {LEAST * sd:.0f}",
        "Nothing was charged. "
        f"{'Either ' + ', or '.join(ways) if len(ways) > 1 else ways[0].capitalize()}.",
    )


def _lifetime(data: Data) -> Iterator[Refusal]:
    """Refuse patients whom the lifetime ledger would not know again."""
    if not data.patient:
        yield _refusal(
            "privacy.scope='study'",
            "data.patient=''",
            "without a name a patient is the content of a row, which one more column or a "
            "corrected cell makes new, with nothing spent",
            "Set data.patient='column', the table's column that names the patient, or "
            "privacy.scope='run' for public data.",
            data__patient=Ask(
                "",
                "the table's column that names the patient; its line in [data.dictionary], if "
                "any, goes then",
            ),
        )

    if data.missing_patient == "own":
        yield _refusal(
            "data.missing_patient='own'",
            "privacy.scope='study'",
            "a row that names nobody is nobody whom the lifetime ledger would know again",
            "Set data.missing_patient='refuse' and name each patient.",
            data__missing_patient="refuse",
        )


_LEAST = 1e-3
"""An epsilon that hardly buys a test."""


def _noised_test(study: Study) -> Iterator[Refusal]:
    data = study.data
    p = study.privacy
    m = study.monitor
    noised = f"privacy.evaluation_epsilon={p.evaluation_epsilon:g}"
    labels = data.dictionary[data.target].categories if data.target in data.dictionary else ()

    if not is_binary(data):
        yield _refusal(
            noised,
            f"data.task={data.task!r} of {len(labels)} labels"
            if labels
            else f"data.task={data.task!r}",
            "the noised histogram is one of a binary test",
            "Hold out public test data and set data.test_is_public=true.",
            data__test_is_public=PUBLIC_TEST,
            privacy__evaluation_epsilon=0.0,
        )

    if m.evaluate_every < study.training.rounds:
        yield _refusal(
            noised,
            f"monitor.evaluate_every={m.evaluate_every}",
            "every test is paid for, and the plan pays for one",
            f"Set monitor.evaluate_every={study.training.rounds}.",
            monitor__evaluate_every=study.training.rounds,
        )

    if p.vote_epsilon and not bears(study, _LEAST):
        yield _refusal(
            f"privacy.vote_epsilon={p.vote_epsilon:g}",
            f"privacy.epsilon={p.epsilon:g}",
            "no held-out patient's budget bears it beside a test",
            f"Set privacy.vote_epsilon={p.epsilon / 4:g}, a quarter.",
            privacy__vote_epsilon=p.epsilon / 4,
        )
    elif not bears(study, p.evaluation_epsilon):
        beside = f" beside privacy.vote_epsilon={p.vote_epsilon:g}" if p.vote_epsilon else ""
        yield _refusal(
            noised,
            f"privacy.epsilon={p.epsilon:g}",
            f"no test patient's budget bears it{beside}, so that the run would end untested",
            f"Set privacy.evaluation_epsilon={affordable(study):g}.",
            privacy__evaluation_epsilon=affordable(study),
        )


def _vote(study: Study) -> Iterator[Refusal]:
    """Refuse a vote that could not tell anything, whatever the sites say."""
    p = study.privacy
    sites = len(study.privacy.sizes)
    vote = f"privacy.vote_epsilon={p.vote_epsilon:g}"

    if study.sites.kind == "device":
        yield _refusal(
            vote,
            "sites.kind='device'",
            "a device holds one patient, from whom no own model can be tested",
            "Leave privacy.vote_epsilon out.",
            privacy__vote_epsilon=0.0,
        )
    elif sites and not vote_tells(study, p.vote_epsilon, sites, 2):
        sd = vote_noise(study, p.vote_epsilon, sites)
        yield _refusal(
            vote,
            f"a vote of {sites} sites",
            f"its noise (sd {sd:.3g}) hides even a vote in which all agree",
            "Leave privacy.vote_epsilon out: each site can see for itself by `medfed alone`.",
            privacy__vote_epsilon=0.0,
        )


def vote_tells(study: Study, epsilon: float, sites: int, part: int) -> bool:
    """Say whether a vote's 95 % interval is at most 1 / `part` of the sites to either side."""
    return vote_interval(sites, vote_noise(study, epsilon, sites)) * part <= sites


_MOST_ASKED = 0.75
"""The part of a budget that queries may take, as squares of mu: training then has twice the noise
that it had alone.
"""


def _queries(study: Study) -> Iterator[Refusal]:
    """Refuse queries of training patients that leave next to nothing of epsilon to train with."""
    p = study.privacy
    asked = queries_of(study)
    spent = sum(accounting.budget_mu(one.epsilon, p.delta) ** 2 for one in asked.values())

    part = spent / accounting.budget_mu(p.epsilon, p.delta) ** 2
    if asked and part > _MOST_ASKED:
        told = " and ".join(
            f"privacy.{name}_epsilon={one.epsilon:g}" for name, one in asked.items()
        )
        quarter = p.epsilon / 4
        many = len(asked) > 1
        left = "nothing to train with"
        if part < 1:
            left = f"too little to train with, {(1 - part) ** -0.5:.3g} times the noise"
        yield _refusal(
            told,
            f"privacy.epsilon={p.epsilon:g}",
            f"{'together they leave' if many else 'it leaves'} {left}",
            f"Set {'each' if many else 'it'} to {quarter:g}, a quarter.",
            **{f"privacy__{name}_epsilon": quarter for name in asked},
        )


def bears(study: Study, evaluation_epsilon: float) -> bool:
    """Say whether a held-out patient who has not paid can pay, at each of its sites, by the
    ledger's filter.

    For a noised histogram, and for the vote that follows from held-out records too.
    """
    p = study.privacy
    times = 1 if counted_together(study) else p.max_sites_per_patient
    cost = accounting.rdp(privacy_events.RandomisedResponse(2, evaluation_epsilon, times))
    if p.vote_epsilon:
        noise = vote_multiplier(study, p.vote_epsilon)
        cost = cost + accounting.rdp(privacy_events.Gaussian(noise, p.max_sites_per_patient))
    return accounting.fits(np.zeros(len(accounting.ORDERS)), cost, p.epsilon, p.delta)


def affordable(study: Study) -> float:
    """Return the largest of a half, a quarter, ...
    of epsilon that buys a noised histogram beside a vote.

    Where nothing does, a quarter: the vote is refused then.
    """
    epsilon = study.privacy.epsilon
    return next(
        (e for e in (epsilon * 0.5**n for n in range(1, 100)) if bears(study, e)), epsilon / 4
    )


def _one_step(study: Study, where: str) -> Iterator[Refusal]:
    t = study.training
    noise = f"privacy.noise={where!r}"
    if (t.local_steps or t.local_epochs) > 1:
        if t.local_steps:
            side = f"training.local_steps={t.local_steps}"
        else:
            side = f"training.local_epochs={t.local_epochs}"
        yield _refusal(
            noise,
            side,
            "noise is added to sums of clipped gradients at the common model, so a round is one "
            "step",
            "Set training.local_epochs=1 and local_steps=0 and raise training.rounds, or take "
            "noise='site'.",
            training__local_epochs=1,
            training__local_steps=0,
        )

    if t.optimizer != "sgd" or t.momentum:
        yield _refusal(
            noise,
            f"training.optimizer={t.optimizer!r} with momentum={t.momentum:g}",
            "sites take one step and keep nothing",
            "Set optimizer='sgd' and momentum=0; take algorithm='fedadam' or 'fedavgm', whose "
            "server keeps moments.",
            training__optimizer="sgd",
            training__momentum=0.0,
        )

    if t.weighting == "uniform":
        yield _refusal(
            noise,
            "training.weighting='uniform'",
            "each patient counts alike in the noised sum",
            "Set training.weighting='samples', or take noise='site'.",
            training__weighting="samples",
        )


def _schedule(study: Study, where: str) -> Iterator[Refusal]:
    p = study.privacy
    fleet = study.fleet
    if fleet.schedule == "cyclic" and fleet.clients_per_round:
        yield _refusal(
            "fleet.schedule='cyclic'",
            f"fleet.clients_per_round={fleet.clients_per_round}",
            "the group whose turn it is takes part as a whole",
            "Set fleet.clients_per_round=0 and choose fleet.groups.",
            fleet__clients_per_round=0,
        )

    if not p.correlated:
        return
    if where not in ("shared", "central"):
        yield _refusal(
            "privacy.correlated=true",
            f"privacy.noise={where!r}",
            "correlated noise is one stream on the sum of all sites",
            "Set privacy.noise='shared', or correlated=false.",
            privacy__correlated=False,
        )

    if fleet.schedule != "cyclic" or fleet.groups < 2:
        yield _refusal(
            "privacy.correlated=true",
            f"fleet.schedule={fleet.schedule!r} with groups={fleet.groups}",
            "where everybody takes part in every round it gains at most 1.06 x; it pays only "
            "where a patient's uses are kept apart",
            "Set fleet.schedule='cyclic' and fleet.groups=10, or correlated=false.",
            privacy__correlated=False,
        )

    if study.training.rounds < 2:
        yield _refusal(
            "privacy.correlated=true",
            f"training.rounds={study.training.rounds}",
            "no later round takes noise back",
            "Raise training.rounds, or set correlated=false.",
            privacy__correlated=False,
        )

    for side, is_set in (
        ("training.batch_size above 0", study.training.batch_size > 0),
        ("privacy.clipping='adaptive'", p.clipping == "adaptive"),
        ("privacy.simulation_only=true", p.simulation_only),
        ("privacy.max_sites_per_patient above 1", p.max_sites_per_patient > 1),
    ):
        if is_set:
            yield _refusal(
                "privacy.correlated=true",
                side,
                "its sensitivity is counted for whole groups, one norm, real noise and one "
                "client a patient",
                "Leave one of them out.",
                privacy__correlated=False,
            )


def _places(study: Study) -> Iterator[Refusal]:
    """Refuse, under joint noise, patients of several sites that do not always join together."""
    fleet = study.fleet
    training = study.training
    most = study.privacy.max_sites_per_patient

    for side, is_set in (
        (f"fleet.clients_per_round={fleet.clients_per_round}", fleet.clients_per_round > 0),
        (f"fleet.schedule={fleet.schedule!r}", fleet.schedule == "cyclic"),
        (f"training.quorum={training.quorum:g}", training.quorum < 1),
        (f"training.batch_size={training.batch_size}", training.batch_size > 0),
    ):
        if is_set and most > 1:
            yield _refusal(
                f"privacy.max_sites_per_patient={most}",
                side,
                "under joint noise a patient of several sites pays at one of them, so all must "
                "take part, and alike",
                "Set fleet.clients_per_round=0, fleet.schedule='random', training.quorum=1 and "
                "training.batch_size=0, or take privacy.noise='site'.",
                fleet__clients_per_round=0,
                fleet__schedule="random",
                training__quorum=1.0,
                training__batch_size=0,
            )
