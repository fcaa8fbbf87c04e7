"""What a privacy claim does not compose with: each refusal names both sides and the way out.

Every entry is a way in which a guarantee was printed somewhere and did not hold (docs/sharp-edges.md tells each). They
are checked from the study alone, before any record is read.
"""

from collections.abc import Iterator

import numpy as np

from medfed.core.checks import PlanError
from medfed.privacy import accounting
from medfed.privacy.guarantee import mode
from medfed.study import Data, Feature, Privacy, Study


def check(study: Study) -> None:
    """Raise PlanError for the first thing in the study that breaks the guarantee it asks for."""
    where = mode(study)
    for side, other, reason, action in [*_schedule(study, where), *(_claim(study, where) if where != "none" else ())]:
        raise PlanError(f"{side} and {other} do not compose: {reason}. {action}")


Refusal = tuple[str, str, str, str]
"""One side, the other side, why not, and what to do."""


def _claim(study: Study, where: str) -> Iterator[Refusal]:
    data, t, p = study.data, study.training, study.privacy
    claim = f"privacy.epsilon={p.epsilon:g}"
    if data.preprocess in ("robust", "standard"):
        yield (
            claim,
            f"data.preprocess={data.preprocess!r}",
            "centres and scales fitted on patients are released without noise",
            "Set data.preprocess='dictionary' and declare public ranges in [data.dictionary].",
        )
    if data.split == "stratified" and not data.test:
        yield (
            claim,
            "data.split='stratified'",
            "one patient's presence moves another between training and test",
            "Set data.split='patient', or mark held-out rows in a column (data.test).",
        )
    if data.on_missing == "refuse":
        yield (
            claim,
            "data.on_missing='refuse'",
            "an error about a gap tells that some patient has one",
            "Set data.on_missing='impute'.",
        )
    yield from _undeclared(study, claim)
    if not data.test_is_public and not p.evaluation_epsilon:
        yield (
            claim,
            "test figures without noise",
            "held-out patients are patients too, and each round's figures are released",
            "Set data.test_is_public=true if they are declared public test data, or privacy.evaluation_epsilon="
            f"{affordable(p):g} to pay for a noised histogram.",
        )
    if t.algorithm in ("local", "pooled"):
        yield (
            claim,
            f"training.algorithm={t.algorithm!r}",
            "it is a baseline, not a federation",
            "Take fedavg, or leave the claim out.",
        )
    if p.accountant == "pld" and p.scope == "study":
        yield (
            "privacy.accountant='pld'",
            "privacy.scope='study'",
            "the lifetime ledger composes runs that are not fixed in advance, for which PLD is no filter",
            "Set privacy.accountant='rdp', or scope='run' for public data.",
        )
    if p.scope == "study" and not p.simulation_only:
        yield from _lifetime(data)
    if p.clipping == "adaptive" and where == "site":
        yield (
            "privacy.clipping='adaptive'",
            "privacy.noise='site'",
            "the noised count of one site says nothing at its size (sd 1.0 of a share, at 115 patients)",
            "Set privacy.clipping='automatic', or noise='shared', where all sites are counted together.",
        )
    if where != "site":
        yield from _places(study)
        yield from _one_step(study, where)
    if p.evaluation_epsilon and not data.test_is_public:
        yield from _noised_test(study)


def _undeclared(study: Study, claim: str) -> Iterator[Refusal]:
    """Refuse inputs and targets that nothing public bounds, as far as the study alone names them.

    Columns that it does not name are refused when the table's header is read (`data.tables.clean`).
    """
    data = study.data
    for name in data.features:
        feature = data.dictionary.get(name, Feature())
        if not feature.range and not feature.categories:
            yield (
                claim,
                f"data.features={name!r} without a public range or categories",
                "what its cells are, and how far they reach, would be taken from patients",
                f"Set data.dictionary.{name}.range or data.dictionary.{name}.categories, or leave it out.",
            )
    if data.task == "regression" and not data.dictionary.get(data.target, Feature()).range:
        yield (
            claim,
            f"data.task='regression' without data.dictionary.{data.target}.range",
            "nothing bounds what one patient's target says",
            f"Set data.dictionary.{data.target}.range = [low, high].",
        )


def _lifetime(data: Data) -> Iterator[Refusal]:
    """Refuse patients whom the lifetime ledger would not know again."""
    if not data.patient:
        yield (
            "privacy.scope='study'",
            "data.patient=''",
            "without a name a patient is the content of a row, which one more column or a corrected cell makes new, "
            "with nothing spent",
            "Set data.patient='column', the table's column that names the patient, or privacy.scope='run' for public "
            "data.",
        )
    if data.missing_patient == "own":
        yield (
            "data.missing_patient='own'",
            "privacy.scope='study'",
            "a row that names nobody is nobody whom the lifetime ledger would know again",
            "Set data.missing_patient='refuse' and name each patient.",
        )


def _noised_test(study: Study) -> Iterator[Refusal]:
    data, p, m = study.data, study.privacy, study.monitor
    noised = f"privacy.evaluation_epsilon={p.evaluation_epsilon:g}"
    labels = data.dictionary[data.target].categories if data.target in data.dictionary else ()
    if data.task in ("multiclass", "regression") or len(labels) > 2:
        yield (
            noised,
            f"data.task={data.task!r} of {len(labels)} labels" if labels else f"data.task={data.task!r}",
            "the noised histogram is one of a binary test",
            "Hold out public test data and set data.test_is_public=true.",
        )
    if m.evaluate_every < study.training.rounds:
        yield (
            noised,
            f"monitor.evaluate_every={m.evaluate_every}",
            "every test is paid for, and the plan pays for one",
            f"Set monitor.evaluate_every={study.training.rounds}.",
        )
    if not _bears(p, p.evaluation_epsilon):
        yield (
            noised,
            f"privacy.epsilon={p.epsilon:g}",
            "no test patient's budget bears it, so that the run would end untested",
            f"Set privacy.evaluation_epsilon={affordable(p):g}.",
        )


def _bears(p: Privacy, evaluation_epsilon: float) -> bool:
    """Say whether the ledger's filter lets one noised histogram pass, for a patient who has not paid before."""
    event = accounting.RandomisedResponse(2, evaluation_epsilon)
    return accounting.fits(np.zeros(len(accounting.ORDERS)), accounting.rdp(event), p.epsilon, p.delta)


def affordable(p: Privacy) -> float:
    """Return the largest of a half, a quarter, ... of epsilon that buys a noised histogram."""
    return next(e for e in (p.epsilon * 0.5**n for n in range(1, 100)) if _bears(p, e))


def _one_step(study: Study, where: str) -> Iterator[Refusal]:
    t, noise = study.training, f"privacy.noise={where!r}"
    if (t.local_steps or t.local_epochs) > 1:
        side = f"training.local_steps={t.local_steps}" if t.local_steps else f"training.local_epochs={t.local_epochs}"
        yield (
            noise,
            side,
            "noise is added to sums of clipped gradients at the common model, so a round is one step",
            "Set training.local_epochs=1 and local_steps=0 and raise training.rounds, or take noise='site'.",
        )
    if t.optimizer != "sgd" or t.momentum:
        yield (
            noise,
            f"training.optimizer={t.optimizer!r} with momentum={t.momentum:g}",
            "sites take one step and keep nothing",
            "Set optimizer='sgd' and momentum=0; take algorithm='fedadam' or 'fedavgm', whose server keeps moments.",
        )
    if t.weighting == "uniform":
        yield (
            noise,
            "training.weighting='uniform'",
            "each patient counts alike in the noised sum",
            "Set training.weighting='samples', or take noise='site'.",
        )


def _schedule(study: Study, where: str) -> Iterator[Refusal]:
    p, fleet = study.privacy, study.fleet
    if fleet.schedule == "cyclic" and fleet.clients_per_round:
        yield (
            "fleet.schedule='cyclic'",
            f"fleet.clients_per_round={fleet.clients_per_round}",
            "the group whose turn it is takes part as a whole",
            "Set fleet.clients_per_round=0 and choose fleet.groups.",
        )
    if not p.correlated:
        return
    if where not in ("shared", "central"):
        yield (
            "privacy.correlated=true",
            f"privacy.noise={where!r}",
            "correlated noise is one stream on the sum of all sites",
            "Set privacy.noise='shared', or correlated=false.",
        )
    if fleet.schedule != "cyclic" or fleet.groups < 2:
        yield (
            "privacy.correlated=true",
            f"fleet.schedule={fleet.schedule!r} with groups={fleet.groups}",
            "where everybody takes part in every round it gains at most 1.06 x; it pays only where a patient's uses "
            "are kept apart",
            "Set fleet.schedule='cyclic' and fleet.groups=10, or correlated=false.",
        )
    if study.training.rounds < 2:
        yield (
            "privacy.correlated=true",
            f"training.rounds={study.training.rounds}",
            "no later round takes noise back",
            "Raise training.rounds, or set correlated=false.",
        )
    for side, is_set in (
        ("training.batch_size above 0", study.training.batch_size > 0),
        ("privacy.clipping='adaptive'", p.clipping == "adaptive"),
        ("privacy.simulation_only=true", p.simulation_only),
        ("privacy.max_sites_per_patient above 1", p.max_sites_per_patient > 1),
    ):
        if is_set:
            yield (
                "privacy.correlated=true",
                side,
                "its sensitivity is counted for whole groups, one norm, real noise and one client a patient",
                "Leave one of them out.",
            )


def _places(study: Study) -> Iterator[Refusal]:
    """Refuse, under joint noise, patients of several sites that do not always take part together."""
    fleet, training, most = study.fleet, study.training, study.privacy.max_sites_per_patient
    for side, is_set in (
        (f"fleet.clients_per_round={fleet.clients_per_round}", fleet.clients_per_round > 0),
        (f"fleet.schedule={fleet.schedule!r}", fleet.schedule == "cyclic"),
        (f"training.quorum={training.quorum:g}", training.quorum < 1),
        (f"training.batch_size={training.batch_size}", training.batch_size > 0),
    ):
        if is_set and most > 1:
            yield (
                f"privacy.max_sites_per_patient={most}",
                side,
                "under joint noise a patient of several sites pays at one of them, so all must take part, and alike",
                "Set fleet.clients_per_round=0, fleet.schedule='random', training.quorum=1 and training.batch_size=0, "
                "or take privacy.noise='site'.",
            )
