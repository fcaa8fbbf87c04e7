"""Audits of a claim: exact tests and attacks on a study's twin, and what each of them rules out.

A finished run cannot be audited with canaries afterwards: their coins fall before training. So a
run's audit is that of a twin (twin.py), which finds what is wrong with code and settings, not what
went wrong on that day. The statistics, and what they can and cannot show, are in
privacy/attack_statistics.py.

M canaries or patients of a pool, I patients, R retrains, N records, P parameters.
"""

import json
import math
import secrets
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medfed import runs
from medfed.core import codec, files
from medfed.core.checks import PlanError, QuorumError
from medfed.core.flat import Layout
from medfed.core.types import JSON
from medfed.data.encoding import Encoding
from medfed.data.federated import Rows
from medfed.evidence import exact
from medfed.evidence.twin import People, Twin, TwinTraining, explain, keys, updates
from medfed.learn.local import outputs, sample_loss
from medfed.links.wire import combine, joint_links
from medfed.node.site import Site
from medfed.privacy import attack_statistics as attacks
from medfed.privacy import noise_tests
from medfed.privacy.attack_statistics import CoinEvidence, Part
from medfed.privacy.guarantee import GRID, Guarantee
from medfed.runs import claims, sealing
from medfed.study import Privacy, Study

CONFIDENCE = 0.95
EACH = 1 - (1 - CONFIDENCE) / 2
"""Confidence of each of two attackers, so that together they err as rarely as one."""

LARGE = 10.0
"""Standard deviation of a canary's features:
far from any patient's, so that a gradient that is not clipped shows.
"""

RESIDUAL = 1e-4
"""Chance that what canaries leave unexplained is refused as noise where it is."""

WIDE = 1.1
"""By how much an attacker's own reckoning may be off, as a factor of the noise's deviation."""

FEW = 100
"""Canaries where no number of them could refute the claim,
and only the rest of the release is tested.
"""

TWINS = 10
"""Each so many canaries, one is a patient of two nearly alike records whose gradients cancel."""

READ = 0.99
"""Cosine above which a record counts as read from a release."""

LIMITS = (
    "A measurement above the claim proves a bug; one below it proves no privacy. What each part "
    "would have found stands beside it; a bug smaller than that, or one that only patients "
    "unlike those tried would meet, escapes. The audit ran on a twin: a finished run cannot be "
    "audited with canaries, whose coins fall before training. No audit of noise that was drawn "
    "sees who could know its key."
)


def audit_study(
    study: Study,
    data: Path | None = None,
    canaries: int = 0,
    retrains: int = 64,
    fpr: float = 0.05,
    quick: bool = False,
    seed: int | None = None,
    encoding: Encoding | None = None,
) -> dict[str, Any]:
    """Test and attack a twin of a study; return the parts, and whether the claim stands.

    Parts: `exact.noise`, `exact.sensitivity`, `one_run`, `inversion`, `membership`. Coins come from
    the operating system, or from `seed`; noise always from the former. Raises PlanError where there
    is no claim to audit.

    Args:
        study: the study.
        data: where downloaded data is looked for first.
        canaries: how many made-up patients `one_run` hides; 0: as many as the claim needs.
        retrains: how often `membership` trains.
        fpr: the false positive rate at which members are told, 0 to 1.
        quick: the retrains are left out.
        seed: of the audit's coins.
        encoding: a run's; None: the twin agrees on its own.
    """
    rng = np.random.default_rng(secrets.randbits(256) if seed is None else seed)
    twin = Twin.of(study, data, rng, encoding)
    hidden = twin.plan.joint and study.security.aggregation != "plain"
    drawn = Twin.of(study, data, rng, twin.plan.encoding, secure=True) if hidden else twin

    parts = [
        exact.noise(drawn),
        exact.sensitivity(twin, rng),
        one_run(twin, rng, canaries),
        inversion(twin, rng),
    ]
    if not quick:
        parts.append(membership(twin, rng, retrains, fpr))

    patients = "invented"
    if study.privacy.scope == "run":
        patients = "the study's own, which are public"
    return {
        "schema": 1,
        "study": study.study.name,
        "digest": study.digest(),
        "patients": patients,
        "passed": all(part.passed is not False for part in parts),
        "parts": [part.to_json() for part in parts],
        "limits": " ".join([LIMITS, *_list_gaps(study)]),
    }


def _list_gaps(study: Study) -> Iterator[str]:
    """Yield the noised releases of a study that no part here looks at."""
    if study.security.aggregation == "three-party" and study.robustness.rule != "mean":
        yield (
            "Not audited: the noise on rows' Gram matrix, and on the sum that a rule weighs "
            "(robustness.rule); the twin's rows are added."
        )
    if study.privacy.evaluation_epsilon and not study.data.test_is_public:
        yield (
            "Not audited: the noise on the counts of held-out patients' scores "
            "(privacy.evaluation_epsilon)."
        )
    if study.privacy.ranges_epsilon:
        yield (
            "Not audited: the noise on the counts by which ranges are found "
            "(privacy.ranges_epsilon)."
        )
    if study.rule().chosen:
        yield f"Not audited: the noise on the counts for data.threshold={study.data.threshold!r}."
    if study.privacy.vote_epsilon:
        yield "Not audited: the noise on the vote on own models (privacy.vote_epsilon)."


def audit_run(folder: Path, data: Path | None = None, **options: Any) -> dict[str, Any]:
    """Attack a twin of a run's frozen study; write what came of it into the run's audit.json and
    into its claim.

    `options` are those of `audit_study`. A run with a trail has the audit signed into it, as pages
    show what it found. Raises RunError where the folder holds no claim, KeyFileError where the
    coordinator's keys, which sign, are not here.
    """
    claim = claims.read(folder)
    (study, encoding) = runs.read_plan(folder)
    with files.hold(folder):
        sign = sealing.open_auditor(folder, study)
        found = audit_study(study, data, encoding=encoding, **options)
        if sign:
            sign(found)
        files.write(folder / "audit.json", json.dumps(found, indent=2, allow_nan=False))
        files.write(
            folder / "privacy.json",
            json.dumps({**claim, "audit": found}, indent=2, allow_nan=False),
        )
    return found


# Canaries in one run ------------------------------------------------------------------------------


def one_run(twin: Twin, rng: np.random.Generator, canaries: int = 0) -> Part:
    """Hide made-up patients in one training, each by a coin, and let two attackers guess the coins.

    Canaries are more training rows at the sites; declared sizes stay. Their features are drawn anew
    in every round, so that noise used twice cancels and is found.

    Args:
        twin: the study's.
        rng: draws canaries and coins.
        canaries: how many; 0: as many as the claim needs.
    """
    guarantee = twin.guarantee
    plan = twin.plan
    claimed = f"epsilon {twin.guarantee.epsilon:g}"
    room = (
        max(1, plan.study.training.rounds - 1)
        * plan.parameters
        * (1 if plan.joint else len(twin.sites))
    )
    count = canaries or min(_choose_count(guarantee), room)
    in_M = rng.random(count) < 0.5
    if _guesses_to_refute(guarantee, count) is None:
        in_M = in_M[: min(count, FEW)]
    seen = _score_canaries(twin, in_M, rng)
    residual = seen.residual(guarantee)
    wrong = residual is not None and residual.p < RESIDUAL
    beside = ""
    if residual:
        beside = (
            f"; all that is known taken away, the noise of {residual.numbers:,} numbers is left "
            f"with sd {residual.ratio:.3f} of what is told"
        )
        if wrong:
            beside += " and that is refused"
    figures: JSON = {"residual": residual._asdict() if residual else None}
    strength = "finds noise that is off or in every round the same, and no clipping"
    if residual:
        low, high = noise_tests.power(residual.numbers, RESIDUAL)
        strength += (
            f"; in the training, an sd below {low / WIDE:.2f} or above {high * WIDE:.2f} of "
            "what is told"
        )

    if _guesses_to_refute(guarantee, count) is None:
        told = (
            f"no guesses: even if all guesses on {count} canaries were right, epsilon "
            f"{guarantee.epsilon:g} would stand; about {room} can be told apart in these "
            f"rounds{beside}{seen.ended}"
        )
        found: JSON = {**figures, "canaries": len(in_M), "guesses": 0}
        return Part("canaries", claimed, "-", told, False if wrong else None, found, strength)
    verdict = attacks.one_run(
        seen.scores, in_M, _guess_count(count), guarantee.epsilon, guarantee.delta, CONFIDENCE
    )
    told = (
        f"{verdict.correct} of {verdict.guesses} guesses right on {count} canaries in a twin run "
        f"({verdict.notes}); at {CONFIDENCE:.0%} confidence this rules out epsilon up to "
        f"{verdict.refuted:.2f}{seen.ended}{beside}"
    )
    passed = None if verdict.passed and seen.ended else verdict.passed
    measured = f"epsilon > {verdict.refuted:.2f}"
    right = _guesses_to_refute(guarantee, count)
    strength = f"refutes the claim from {right} right guesses of {_guess_count(count)}; {strength}"
    found = {**verdict.to_json(), **figures}
    return Part("canaries", claimed, measured, told, False if wrong else passed, found, strength)


class _Residual(NamedTuple):
    """How many numbers were left unexplained,
    their deviation over what is told, and how likely that is.
    """

    numbers: int
    ratio: float
    p: float


@dataclass(frozen=True)
class _Seen:
    """What a training with canaries gave away:
    each attacker's scores [M], and what it left unexplained.
    """

    scores: dict[str, np.ndarray]
    ended: str  # why the training ended early
    # site ("": all) and the release [P] less everybody in it, in units of C
    rest: list[tuple[str, np.ndarray]]

    def residual(self, guarantee: Guarantee) -> "_Residual | None":
        """Test what is left of the releases as noise of the told deviation, within WIDE; None where
        nothing is left.
        """
        if not self.rest:
            return None
        rest_TP = np.stack([rest_P for _, rest_P in self.rest]) / GRID
        if guarantee.strategy:
            rest_TP = noise_tests.whiten(
                rest_TP, noise_tests.strategy_coefficients(guarantee.rounds, guarantee.separation)
            )
        rest_TP /= np.array([guarantee.sigma_units(name) for name, _ in self.rest])[:, None]
        square = float((rest_TP**2).sum())
        numbers = rest_TP.size
        if not math.isfinite(square):
            return None
        low = noise_tests.too_small(square * WIDE**2, numbers)
        high = noise_tests.too_large(square / WIDE**2, numbers)
        return _Residual(numbers, math.sqrt(square / numbers), min(1.0, 2 * low, 2 * high))


def _score_canaries(twin: Twin, in_M: np.ndarray, rng: np.random.Generator) -> _Seen:
    """Train with the canaries that are in, and score each of them from what was released."""
    count = len(in_M)
    plan = twin.plan
    homes = rng.permutation(list(twin.sites))[:count].tolist()
    place = {name: np.arange(k, count, len(homes)) for k, name in enumerate(homes)}
    evidence: dict[str, CoinEvidence] = defaultdict(CoinEvidence)
    training = TwinTraining(twin)
    ended = ""
    rest = list[tuple[str, np.ndarray]]()
    straight = _is_straight(twin)

    for _ in range(plan.study.training.rounds):
        made = {
            name: _make_canaries(twin, training.server.w_P, len(mine), rng)
            for name, mine in place.items()
        }
        added = {
            name: _add_canaries(twin.rows[name], made[name], in_M[mine])
            for name, mine in place.items()
        }
        try:
            seen = training.round({**twin.rows, **added})
        except QuorumError as error:  # judged by what was seen until then
            ended = f"; the training ended early: {error}"
            break

        for names, update_P in updates(seen, plan):
            if there := [name for name in names if name in place]:
                rest_P, add_MP = explain(
                    twin, seen, names, {name: made[name] for name in there}, update_P
                )
                which = np.concatenate([place[name] for name in there])
                gradient_MP = np.zeros((count, plan.parameters), np.float32)
                gradient_MP[which] = add_MP.numpy()
                evidence["" if plan.joint else there[0]].add(rest_P.numpy(), gradient_MP)
                if straight:
                    inside_P = torch.from_numpy(in_M[which]).double() @ add_MP.double()
                    rest.append(
                        ("" if plan.joint else there[0], (rest_P.double() - inside_P).numpy())
                    )

    scores = {
        "noise of each round its own": sum(
            (e.scores() for e in evidence.values()), np.zeros(count)
        ),
        "one noise for all rounds": sum(
            (e.scores_common_noise() for e in evidence.values()), np.zeros(count)
        ),
    }
    return _Seen(scores, ended, rest)


def _is_straight(twin: Twin) -> bool:
    """Say whether the attacker works out each release exactly:
    one step of plain SGD on every patient.
    """
    t = twin.plan.study.training
    releases = twin.guarantee.releases.values()
    plain = t.optimizer == "sgd" and t.momentum == 0
    return plain and all(r.steps == 1 and r.probability == 1 for r in releases)


def _guess_count(canaries: int) -> int:
    return canaries * 4 // 5


def _guesses_to_refute(guarantee: Guarantee, canaries: int) -> int | None:
    return attacks.correct_to_refute(
        guarantee.epsilon, _guess_count(canaries), canaries, guarantee.delta, EACH
    )


def _choose_count(guarantee: Guarantee) -> int:
    """Return how many canaries refute the claim even with three guesses wrong; 1000 at most."""
    enough = (
        n
        for n in (100, 200, 500)
        if (_guesses_to_refute(guarantee, n) or math.inf) <= _guess_count(n) - 3
    )
    return next(enough, 1000)


def _make_canaries(twin: Twin, w_P: Tensor, count: int, rng: np.random.Generator) -> Rows:
    """Return patients with large features and the label that the present model finds least likely.

    Each tenth has a second record, nearly the same, whose gradient takes back most of the first's:
    a norm that is worked out from products of pairs is 0 there.
    """
    x_MF = torch.from_numpy(
        LARGE * rng.standard_normal((count, len(twin.plan.encoding.names())))
    ).float()
    z_MC = outputs(twin.model, w_P, x_MF)
    twin.model.train()
    double_M = torch.arange(count) % TWINS == TWINS - 1

    match twin.plan.encoding.target.task:
        case "binary":
            y_M = (z_MC[:, 0] < 0).float()
            other_M = 1 - y_M
        case "multiclass":
            y_M = z_MC.argmin(1)
            other_M = z_MC.argmax(1)
        case "regression":
            y_M = z_MC[:, 0] + LARGE * torch.where(double_M, 1e3, 1.0)
            other_M = 2 * z_MC[:, 0] - y_M

    patient = torch.arange(count)
    rows = Rows(x_MF, y_M, patient, keys(count, rng))
    again = Rows(x_MF * (1 + 2.0**-20), other_M, patient, rows.key).at(double_M)

    return _join(rows, again)


def _join(rows: Rows, more: Rows) -> Rows:
    """Return the records of both, patients as they are numbered."""
    assert rows.key is not None and more.key is not None
    patient = torch.cat([rows.patient, more.patient])
    key = torch.cat([rows.key, more.key])
    return Rows(torch.cat([rows.x, more.x]), torch.cat([rows.y, more.y]), patient, key)


def _add_canaries(rows: Rows, made: Rows, in_M: np.ndarray) -> Rows:
    """Return the rows of a site's patients and of the canaries that are in."""
    mine = made.at(torch.from_numpy(in_M)[made.patient])
    after = int(rows.patient.max()) + 1 if len(rows) else 0
    return _join(rows, replace(mine, patient=mine.patient + after))


# Membership over many trainings -------------------------------------------------------------------


def membership(twin: Twin, rng: np.random.Generator, retrains: int = 64, fpr: float = 0.05) -> Part:
    """Train many times, each patient of a pool in half of them; tell members by the models' losses.

    Under (epsilon, delta) no attacker finds more than e^epsilon FPR + delta of the members. Raises
    PlanError for fewer than 8 retrains, and for an `fpr` outside (0, 1).

    Args:
        twin: the study's.
        rng: draws the pool and its halves.
        retrains: how often it trains.
        fpr: the false positive rate at which members are told.
    """
    if not 0 < fpr < 1:
        raise PlanError(f"fpr={fpr:g}; expected a rate in (0, 1). Set --fpr 0.05.")
    if retrains < 8:
        raise PlanError(
            f"retrains={retrains}; expected 8 or more, 64 for figures to quote. Set --retrains 64."
        )

    guarantee = twin.guarantee
    zero = dict.fromkeys(twin.rows, 0)
    everybody = People.of(twin.rows, zero, zero)
    people = len(everybody.weight_I)
    pool_M = rng.permutation(people)[: max(people // 2, min(people, round(3 / fpr)))]
    allowed = min(1.0, math.exp(guarantee.epsilon) * fpr + guarantee.delta)
    claimed = f"TPR <= {allowed:.1%} at FPR {fpr:.1%}"

    if fpr * (len(pool_M) // 2) < 1 or allowed == 1:
        why = f"{len(pool_M) // 2} non-members in a retrain are too few"
        if allowed == 1:
            why = "any rate is allowed"
        return Part(
            "membership", claimed, "-", f"not run: {why} at FPR {fpr:.1%}", None, {"retrains": 0}
        )

    in_RI = np.ones((retrains, people), dtype=bool)
    in_RI[:, pool_M] = np.stack([rng.permutation(retrains) < retrains // 2 for _ in pool_M], 1)
    score_RM = np.stack([_confidence(twin, everybody, in_I) for in_I in in_RI])[:, pool_M]
    in_RM = in_RI[:, pool_M]
    tpr = {
        "LiRA": attacks.tpr_at_fpr(*attacks.lira_scores(score_RM, in_RM), fpr, EACH),
        "loss threshold": attacks.tpr_at_fpr(*attacks.threshold_scores(score_RM, in_RM), fpr, EACH),
    }
    low = max(rate.low for rate in tpr.values())
    refuted = math.log(max((low - guarantee.delta) / fpr, 1.0))
    rates = ", ".join(
        f"{name} finds {r.value:.1%} ({r.low:.1%} to {r.high:.1%})" for name, r in tpr.items()
    )
    told = (
        f"of the members among {len(pool_M)} patients, {rates} at FPR {fpr:.1%}, over "
        f"{retrains} retrains"
    )
    figures: JSON = {
        "retrains": retrains,
        "pool": len(pool_M),
        "fpr": fpr,
        "allowed": allowed,
        "refuted": refuted,
    }
    figures |= {"tpr": {name: rate._asdict() for name, rate in tpr.items()}}
    measured = f"TPR > {low:.1%} (epsilon > {refuted:.2f})"

    return Part("membership", claimed, measured, told, low <= allowed, figures)


def _confidence(twin: Twin, everybody: People, in_I: np.ndarray) -> np.ndarray:
    """Train on the patients that are in;
    return how sure the released model is of each patient's label [I].
    """
    inside = torch.split(
        torch.from_numpy(in_I)[everybody.patient_N], [len(rows) for rows in twin.rows.values()]
    )
    held = {
        name: rows.at(mine) for (name, rows), mine in zip(twin.rows.items(), inside, strict=True)
    }
    training = TwinTraining(twin)
    task = twin.plan.encoding.target.task
    for _ in range(twin.plan.study.training.rounds):
        training.round(held)
    z_NC = outputs(twin.model, training.server.released_P, everybody.x_NF).double()
    y_N = everybody.y_N
    loss_N = sample_loss(task, z_NC, y_N.double() if y_N.is_floating_point() else y_N)
    loss_I = torch.zeros(len(in_I)).double().index_add_(0, everybody.patient_N, loss_N)
    loss = (loss_I / torch.bincount(everybody.patient_N)).numpy()

    return -loss if task == "regression" else attacks.logit_confidence(loss)


# Inversion of a gradient --------------------------------------------------------------------------


def inversion(twin: Twin, rng: np.random.Generator, records: int = 16) -> Part:
    """Read single records from what the first round releases of one site.

    With and without protection.

    Args:
        twin: the study's.
        rng: draws which records.
        records: how many are tried.
    """
    study = twin.plan.study
    name = _first_layer(twin.model)
    claimed = "no record is read"

    if name is None:
        told = (
            "not run: the model does not begin with a Linear layer with a bias, from which a "
            "record could be read"
        )
        return Part("inversion", claimed, "-", told, None, {"records": 0})

    plain = replace(
        study.training,
        algorithm="fedavg",
        local_steps=1,
        batch_size=0,
        optimizer="sgd",
        momentum=0.0,
    )
    bare = replace(study, privacy=Privacy(), training=replace(plain, weight_decay=0.0))
    everyone = [(site, n) for site, rows in twin.rows.items() for n in range(len(rows))]
    cosine: dict[str, list[float]] = {"without": [], "with": []}

    for k in rng.permutation(len(everyone))[:records]:
        guarded = twin.sites[everyone[k][0]]
        n = everyone[k][1]
        record = twin.rows[guarded.name].at(torch.tensor([n]))

        open_ = guarded.bare(bare)
        for kind, site in (("without", open_), ("with", guarded)):
            site.hold(record)
            site.forget()
            pieces = dict(Layout.of(twin.model).pieces(_release_first_round(twin, site)))
            weight_OI = pieces[f"{name}weight"].numpy()
            bias_O = pieces[f"{name}bias"].numpy()
            if bias_O.any():
                x_I = attacks.invert_first_layer(weight_OI, bias_O)
            else:
                x_I = np.zeros(weight_OI.shape[1])
            cosine[kind].append(attacks.similarity(x_I, record.x[0].numpy()).cosine)

    middle = {kind: float(np.median(values)) for kind, values in cosine.items()}
    read = {kind: sum(value > READ for value in values) for kind, values in cosine.items()}
    told = (
        f"of {len(cosine['with'])} records, {read['without']} are read from one row without "
        f"protection (median similarity {middle['without']:.3f}), {read['with']} under noise = "
        f"'{twin.guarantee.mode}' (median {middle['with']:.3f}, best {max(cosine['with']):.3f})"
    )
    figures: JSON = {
        "records": len(cosine["with"]),
        "similarity": middle,
        "read": read,
        "best": max(cosine["with"]),
    }
    passed = None
    if middle["without"] > READ:
        passed = middle["with"] <= READ

    return Part("inversion", claimed, f"similarity {middle['with']:.3f}", told, passed, figures)


def _first_layer(model: nn.Module) -> str | None:
    """Return what the names of the first layer's parameters begin with,
    where it is Linear and has a bias.
    """
    layers = (
        (name, m)
        for name, m in model.named_modules()
        if next(m.parameters(recurse=False), None) is not None
    )
    name, first = next(layers)
    if isinstance(first, nn.Linear) and first.bias is not None:
        return f"{name}.".lstrip(".")
    return None


def _release_first_round(twin: Twin, site: Site) -> Tensor:
    """Return what the first round releases of one site [P]: its row, or under joint noise the
    noised sum of it.
    """
    plan = twin.plan
    server = twin.plan.begin()
    header: dict[str, float] = {"round": 1}
    if "clip" in server.slots:
        header["clip"] = float(server.slots["clip"])
    slots = {f"slot.{name}": server.slots[name] for name in plan.algorithm.sent}
    row_M = codec.decode(site.handle("work", codec.encode(header, {"w": server.w_P, **slots})))[1][
        "row"
    ]
    if site.guarantee and plan.joint:
        row_M = combine(
            row_M[None], None, joint_links(twin.guarantee, plan.streams.key("noise")), 1
        )
    return row_M[: plan.parameters].double()
