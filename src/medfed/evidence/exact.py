"""Exact tests of a claim on a study's twin: the noise that is drawn, and how far one patient moves
what is released.

Guesses about canaries find what is grossly wrong. Here the attacker needs no guess. Sites without
patients release their noise and nothing else, so it can be held to its law; and without noise worth
the name, a site's row is what its patients add to it, so the oddest patient can be weighed against
what the noise was made for.

Both go through the code that runs: `Site.handle("work")`, the links, `run_round`, masks and
aggregators. What the noise should be is worked out from the study alone (privacy/noise_tests.py),
not read from the guarantee.

V vectors of noise, K sites, P parameters, R records of one patient, F features.
"""

import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from medfed.core import codec
from medfed.core.checks import SiteError
from medfed.core.types import JSON
from medfed.core.types import Task as Kind
from medfed.data.federated import Rows
from medfed.evidence.twin import Twin, TwinTraining, keys
from medfed.learn.local import outputs
from medfed.node.site import Site, handle_many
from medfed.planning.cohorts import cohort
from medfed.planning.plan import Plan
from medfed.planning.resolved import holders
from medfed.privacy import noise_tests, odd_patients
from medfed.privacy.attack_statistics import Part
from medfed.privacy.guarantee import GRID, Guarantee, declared_size
from medfed.privacy.run_meter import NoClaim
from medfed.study import Study, Training

ALPHA = 5e-4
"""Chance that the tests of the noise together refuse noise that follows its law."""

NUMBERS = 20_000
"""Numbers of noise to draw; more where the model has more."""

ROUNDS = (8, 1000)
"""Rounds to draw at least and at most."""

PATIENCE = 15.0
"""Seconds after which no more rounds are drawn, once there are the fewest."""

SLACK = 0.01
"""How far rounding may lift what one patient moves above C,
as a share of C, before it is called a bug.
"""

SHORT = 0.99
LONG = 1.5
"""Told noise over what is needed: below, the claim does not hold;
above, something else than the claim was met.

A Renyi accountant asks for up to 35 % more than the loss distributions of the second reckoning."""

DRAWN = 40
"""Odd patients drawn at random, beside those of the catalogue."""

_QUIET = 1e-9  # a noise multiplier with which a site's row is its patients' sum


# The noise ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Drawn:
    """Noise vectors [V, P] in grid units, what is told of each one's deviation [V], and adaptive
    clipping's counts.
    """

    noise_VP: np.ndarray
    told_V: np.ndarray
    needed_V: np.ndarray
    count_V: np.ndarray | None
    whole: float | None
    rounds: int


def noise(twin: Twin) -> Part:
    """Draw the noise of many rounds of a `twin` without patients; hold it to its law and claim."""
    drawn = _draw_jointly(twin) if twin.plan.joint else _draw_by_sites(twin)
    law = noise_tests.against_law(drawn.noise_VP, drawn.told_V)
    p = dict(law.p)
    square = float(((drawn.noise_VP / (SHORT * drawn.needed_V[:, None])) ** 2).sum())
    p["less than needed"] = noise_tests.too_small(square, law.numbers)
    if drawn.count_V is not None:
        expected = twin.guarantee.count_sigma() / GRID * _excess(twin.plan)
        counts = noise_tests.against_law(
            drawn.count_V[:, None], np.full(len(drawn.count_V), expected)
        )
        p["variance of the counts"] = counts.p["variance"]
    each = ALPHA / len(p)
    broken = {name: value for name, value in p.items() if value < each}

    needed = float((drawn.told_V / drawn.needed_V).min())
    most = math.inf if twin.plan.study.privacy.batch_cap else LONG
    measured = law.ratio * float((drawn.told_V / drawn.needed_V).mean())
    wrong = [
        f"{name} (p = {value:.1g})"
        for name, value in sorted(broken.items(), key=lambda one: one[1])
    ]
    if not SHORT <= needed <= most:
        wrong.append(f"what is told of it is {needed:.3g} of what the claim needs")
    if drawn.whole is not None and drawn.whole < 0.9:
        wrong.append(f"only {drawn.whole:.0%} of the numbers lie on the grid")

    low, high = noise_tests.power(law.numbers, each)
    told = (
        f"{law.numbers:,} numbers in {law.vectors:,} vectors over {drawn.rounds:,} rounds "
        f"through sites without patients; sd {law.ratio:.4f} of what is told, {measured:.4f} of "
        f"what epsilon {twin.guarantee.epsilon:g} needs"
    )
    if wrong:
        told += f"; refused: {'; '.join(wrong)}"
    else:
        told += "; no test refuses it"
    figures: JSON = {
        "numbers": law.numbers,
        "vectors": law.vectors,
        "ratio_to_told": law.ratio,
        "ratio_to_needed": measured,
        "told_to_needed": needed,
        "on_grid": drawn.whole,
        "p": p,
        "alpha": ALPHA,
        "finds_below": low,
        "finds_above": high,
        "refused": wrong,
    }
    strength = (
        f"finds an sd below {low:.3f} or above {high:.3f} of what is told, each with "
        "probability .95"
    )
    claimed = "its law; sd as needed"
    return Part("noise", claimed, f"sd {measured:.3f} of need", told, not wrong, figures, strength)


def _draw_jointly(twin: Twin) -> _Drawn:
    """Open sums of sites without patients, the way that the study opens them."""
    guarantee = twin.guarantee
    plan = twin.plan
    training = _start_idle(twin)
    began = time.monotonic()
    opened = []

    for number in range(_count_rounds(plan.parameters)):
        if number >= ROUNDS[0] and time.monotonic() - began > PATIENCE:
            break
        _play_empty_round(training, number)
        opened.append(training.heard.opened_M.double().numpy() / GRID)

    noise_VM = np.stack(opened)
    noise_VP = noise_VM[:, : plan.parameters]
    counts = None
    if guarantee.clipping == "adaptive":
        counts = noise_VM[:, -1]
    whole = noise_tests.on_grid(noise_VP)
    if guarantee.strategy:
        band = noise_tests.strategy_coefficients(guarantee.rounds, guarantee.separation)
        noise_VP = noise_tests.whiten(noise_VP, band)

    excess = _excess(plan)
    need = max(
        needed_deviation(plan.study, name, plan.parameters, twin.guarantee)
        for name in _kinds(guarantee)
    )
    told_V = np.full(len(noise_VP), guarantee.sigma_units() * excess)
    needed_V = np.full(len(noise_VP), need * excess)

    return _Drawn(noise_VP, told_V, needed_V, counts, whole, len(noise_VP))


def _draw_by_sites(twin: Twin) -> _Drawn:
    """Take the rows of sites without patients after one step from weights of 0:
    each is its noise, scaled.
    """
    plan = twin.plan
    still = _limit_to_one_step(twin)
    training = _start_idle(still)
    began = time.monotonic()
    rate = still.plan.study.training.learning_rate
    guarantee = still.guarantee
    vectors = []
    names = list[str]()
    rounds = 0

    for number in range(_count_rounds(plan.parameters * cohort(plan.study, plan.participants))):
        if number >= ROUNDS[0] and time.monotonic() - began > PATIENCE:
            break
        _play_empty_round(training, number)
        for name, payload in training.tap.reply.items():
            release = guarantee.releases[name]
            step = rate * guarantee.clip / release.expected * GRID
            vectors.append(-codec.decode(payload)[1]["row"].double().numpy() / step)
            names.append(name)
        rounds += 1

    noise_VP = np.stack(vectors)
    told_V = np.array([twin.guarantee.sigma_units(name) for name in names])
    need = {
        name: needed_deviation(plan.study, name, plan.parameters, twin.guarantee)
        for name in set(names)
    }
    needed_V = np.array([need[name] for name in names])

    return _Drawn(noise_VP, told_V, needed_V, None, noise_tests.on_grid(noise_VP), rounds)


def _count_rounds(numbers: int) -> int:
    return min(max(ROUNDS[0], -(-NUMBERS // numbers)), ROUNDS[1])


def _start_idle(twin: Twin) -> TwinTraining:
    """Return a training whose budget bears any number of rounds: nobody's patients are in them."""
    training = TwinTraining(twin)
    training.budget = NoClaim()
    return training


def _play_empty_round(training: TwinTraining, number: int) -> None:
    """Play round `number` + 1 from weights of 0, no site holding a patient."""
    plan = training.plan
    training.server = replace(plan.begin(), round=number, w_P=torch.zeros(plan.parameters))
    training.round(
        {
            name: rows.at(torch.zeros(len(rows), dtype=torch.bool))
            for name, rows in training.twin.rows.items()
        }
    )


def _limit_to_one_step(twin: Twin, multiplier: float | None = None) -> Twin:
    """Return the twin under the same guarantee, its sites taking one step of plain SGD; with
    another multiplier.
    """
    plan = twin.plan
    guarantee = twin.guarantee
    releases = {
        name: replace(r, steps=1, noise_multiplier=multiplier or r.noise_multiplier)
        for name, r in guarantee.releases.items()
    }
    guarantee = replace(guarantee, releases=releases)
    study = replace(plan.study, training=_simplify(plan.study.training))
    sites = {name: site.like(study, guarantee) for name, site in twin.sites.items()}
    message = plan.message if plan.joint else plan.parameters
    plan = replace(plan, study=study, guarantee=guarantee, message=message)

    return replace(twin, plan=plan, guarantee=guarantee, sites=sites)


def _simplify(t: Training) -> Training:
    return replace(
        t,
        algorithm="fedavg",
        local_steps=1,
        optimizer="sgd",
        momentum=0.0,
        weight_decay=0.0,
    )


def _kinds(guarantee: Guarantee) -> list[str]:
    """Name one client of each kind: thousands of devices are of few."""
    return list(
        {
            (r.size, r.steps, r.probability, r.cap): name for name, r in guarantee.releases.items()
        }.values()
    )


def _excess(plan: Plan) -> float:
    """Return the deviation of all parts of the joint noise together,
    over that of those that must suffice.
    """
    if not plan.joint or plan.study.security.aggregation == "plain":
        return 1.0
    parts = cohort(plan.study, plan.participants)
    if plan.study.security.aggregation == "three-party":
        parts = 3
    return math.sqrt(parts / holders(plan.study, plan.participants))


def needed_deviation(study: Study, name: str, parameters: int, guarantee: Guarantee) -> float:
    """Return the standard deviation, in grid units, that a client's claim needs.

    It is worked out from the study.

    Args:
        study: the study.
        name: the client's.
        parameters: P of the model.
        guarantee: asked for one thing: how noise is split between the gradient and adaptive
            clipping's count. The deviation told for the count is taken as it is, and the gradient's
            must make up for the rest.
    """
    p = study.privacy
    t = study.training
    fleet = study.fleet
    size = declared_size(study, name)
    clients = list(guarantee.releases)
    groups = fleet.groups if fleet.schedule == "cyclic" else 1
    planned = t.rounds + p.spare_rounds

    # Under joint noise all draw alike, and a patient at several sites moves one sum several times;
    # under a site's own noise it moves several sums once.
    alone = p.noise == "site"
    if alone:
        population: float = size
        moves, sums = 1, p.max_sites_per_patient
    else:
        population = sum(declared_size(study, each) for each in clients) / len(clients)
        moves, sums = p.max_sites_per_patient, 1
    probability = 1.0
    if t.batch_size:
        probability = min(1.0, t.batch_size / population)
    steps = 1
    if alone:
        steps = t.local_steps or t.local_epochs * max(1, round(1 / probability))
    once = (1 / GRID + math.sqrt(parameters)) * moves

    if p.correlated:
        band = noise_tests.strategy_coefficients(planned, groups)
        return (
            noise_tests.strategy_norm(band, planned, groups)
            * once
            * noise_tests.needed_multiplier(p.epsilon, p.delta, 1)
        )

    uses = -(-planned // groups) * steps * sums
    capped = (p.batch_cap, size) if p.batch_cap and probability < 1 else (0, 0)
    multiplier = noise_tests.needed_multiplier(p.epsilon, p.delta, uses, probability, *capped)
    if guarantee.clipping == "adaptive":
        count = 0.5 * p.max_sites_per_patient / guarantee.count_sigma()
        if multiplier * count >= 1:
            return math.inf
        multiplier /= math.sqrt(1 - (multiplier * count) ** 2)
    return multiplier * once


# How far one patient moves the sum ----------------------------------------------------------------


@dataclass(frozen=True)
class Odd:
    """A patient as no hospital has one: x [R, F], y [R]."""

    name: str
    x_RF: Tensor
    y_R: Tensor


def catalogue(width: int, kind: Kind, labels: int, rng: np.random.Generator) -> list[Odd]:
    """Return patients that break clipping where it can be broken.

    Near-duplicates, cancellations, extremes, of 1 to 64 records. Behind those with names come DRAWN
    of `privacy.odd_patients`, of up to eight records.

    Args:
        width: F of a record.
        kind: the target's.
        labels: how many there are, at least 2.
        rng: draws the records.
    """
    plain_F = torch.from_numpy(rng.standard_normal(width)).float()
    found: list[Odd] = []

    def add(name: str, x_RF: Tensor, y_R: Sequence[float] | Tensor) -> None:
        y = torch.as_tensor(y_R)
        found.append(Odd(name, x_RF.float(), y.long() if kind == "multiclass" else y.float()))

    def alternating(records: int, size: float) -> Tensor:
        sign_R = 1.0 - 2.0 * (torch.arange(records) % 2)
        if kind == "regression":
            return sign_R * size
        return (sign_R > 0).double() * (labels - 1)

    ones_F = torch.ones(width)
    ones_F[-1] = 0
    huge = (1.0, 1e3, 1e6, 1e9, 1e12, 1e14) if kind == "regression" else (1.0,)
    for size in huge:
        for apart in (1e-8, 1e-6, 1e-4):
            moved_F = ones_F.clone()
            moved_F[-1] = apart
            x_2F = torch.stack([ones_F, moved_F])
            add(f"two records {apart:g} apart, labels +-{size:g}", x_2F, alternating(2, size))
    for scale in (1e2, 1e4, 1e6, 1e9, 1e12):
        for apart in (2.0**-23, 2.0**-20, 2.0**-12):
            x_2F = scale * torch.stack([plain_F, plain_F * (1 + apart)])
            add(f"two records of size {scale:g}, alike to {apart:.1g}", x_2F, alternating(2, scale))
    # apart in one feature only, by less than products of pairs can hold
    for scale in (1e6, 1e8, 1e10, 1e12):
        for share in (1e-9, 1e-8, 1e-7):
            for turn in range(3):
                x_2F = scale * torch.from_numpy(rng.standard_normal(width)).expand(2, width).clone()
                x_2F[:, -1] = torch.tensor([0.0, scale * share])
                name = (
                    f"two records of size {scale:g}, {scale * share:g} apart in one feature "
                    f"({turn + 1})"
                )
                add(name, x_2F, alternating(2, 1.0))
    for records in (1, 2, 3, 8, 64):
        same_RF = plain_F.expand(records, width)
        add(f"{records} records, all one", same_RF, alternating(2, 10.0)[:1].expand(records))
        add(f"{records} records, all one, labels in turn", same_RF, alternating(records, 10.0))
        many_RF = torch.from_numpy(rng.standard_normal((records, width)))
        add(f"{records} records", many_RF, alternating(records, 3.0))
    for power in (-30, -20, -10, -3, 0, 3, 6, 10, 18, 25, 30, 38):
        for label in (0, 1):
            scale = 10.0**power
            y = float(label * (labels - 1))
            if kind == "regression":
                y = scale * (1 - 2 * label)
            add(f"a record of size 1e{power}", scale * plain_F[None], [y])
            one_F = torch.zeros(width)
            one_F[rng.integers(width)] = scale
            add(f"one feature of size 1e{power}", one_F[None], [y])
    for value in (math.inf, math.nan):
        add(
            f"a feature that is {value}",
            torch.where(torch.arange(width) == 0, value, plain_F)[None],
            [0.0],
        )
    for number in range(DRAWN):
        x_RF, y_R = odd_patients.draw(rng, width, kind, labels, finite=False, most=8)
        add(f"drawn {number + 1}", torch.from_numpy(x_RF), torch.from_numpy(y_R))
    return found


def sensitivity(twin: Twin, rng: np.random.Generator) -> Part:
    """Put odd patients into a site's rows, one at a time; measure how far each moves its release.

    Args:
        twin: the study's.
        rng: draws the patients.
    """
    bare = _limit_to_one_step(twin, _QUIET)
    plan = bare.plan
    guarantee = bare.guarantee
    name = max(bare.sites, key=lambda name: (guarantee.releases[name].size, name))
    site = bare.sites[name]
    release = replace(guarantee.releases[name], probability=1.0, cap=0)
    guarantee = replace(guarantee, releases={name: release})
    rate = release.size / guarantee.clip  # a row is the sum, turned round
    study = replace(
        plan.study,
        training=replace(
            plan.study.training,
            learning_rate=rate,
            batch_size=0,
            path=twin.plan.study.training.path,
        ),
    )
    site = site.like(study, guarantee)

    target = plan.encoding.target
    patients = catalogue(len(plan.encoding.names()), target.task, max(2, target.outputs), rng)
    weights = [
        plan.begin().w_P,
        torch.zeros(plan.parameters),
        torch.from_numpy(rng.standard_normal(plan.parameters)).float(),
    ]
    crowd = twin.rows[name].at(torch.arange(len(twin.rows[name])) < _crowd_size(plan.parameters))
    moved: dict[str, float] = {}
    for w_P in weights:
        for company in (_drop_everybody(twin.rows[name]), crowd):
            worst = _worst_labels(twin, w_P, patients)
            for odd, far in _measure_moves(twin, site, w_P, company, worst, rng):
                moved[odd.name] = max(far, moved.get(odd.name, 0.0))
    if not moved:
        why = "not run: the site answers nothing, whoever is in its rows"
        return Part("sensitivity", "one patient <= C", "-", why, None, {"patients": 0})
    return _judge_moves(
        moved, 1 + SLACK + GRID * math.sqrt(plan.parameters), len(crowd), len(weights)
    )


def _judge_moves(moved: Mapping[str, float], allowed: float, records: int, weights: int) -> Part:
    """Return what odd patients' moves say:
    how far each `moved` a site's sum, in clips, beside what is `allowed`.
    """
    worst = max(moved, key=lambda which: moved[which])
    beyond = {which: far for which, far in moved.items() if not far <= allowed}
    told = (
        f"{len(moved)} odd patients, alone and among {records} records, at {weights} "
        f"sets of weights; {worst!r} moves a site's sum most, by {moved[worst]:.5g} C (at most "
        f"{allowed:.4g} C is allowed)"
    )
    if beyond:
        told += f"; {len(beyond)} of them move it further"
    figures: JSON = {
        "patients": len(moved),
        "worst": worst,
        "moved": min(moved[worst], 1e300),
        "allowed": allowed,
        "beyond": {
            which: min(far, 1e300)
            for which, far in sorted(beyond.items(), key=lambda one: -one[1])[:8]
        },
    }
    strength = (
        f"finds any of these patients that moves the sum by more than {allowed:.4g} C; of "
        "others it says nothing"
    )
    return Part(
        "sensitivity",
        f"one patient <= {allowed:.4g} C",
        f"{moved[worst]:.5g} C",
        told,
        not beyond,
        figures,
        strength,
    )


def _crowd_size(parameters: int) -> int:
    return min(40, max(4, (1 << 21) // parameters))


def _drop_everybody(rows: Rows) -> Rows:
    return rows.at(torch.zeros(len(rows), dtype=torch.bool))


def _worst_labels(twin: Twin, w_P: Tensor, patients: Sequence[Odd]) -> list[Odd]:
    """Return the patients,
    and those of one record once more with the label that the model finds least likely.
    """
    kind = twin.plan.encoding.target.task
    if kind == "regression":
        return list(patients)
    single = [odd for odd in patients if len(odd.y_R) == 1]
    z_MC = outputs(twin.model, w_P, torch.cat([odd.x_RF for odd in single]))
    twin.model.train()
    y_M = (z_MC[:, 0] < 0).float() if kind == "binary" else z_MC.nan_to_num().argmin(1)
    return [*patients, *(replace(odd, y_R=y[None]) for odd, y in zip(single, y_M, strict=True))]


def _measure_moves(
    twin: Twin,
    site: Site,
    w_P: Tensor,
    company: Rows,
    patients: Sequence[Odd],
    rng: np.random.Generator,
) -> list[tuple[Odd, float]]:
    """Return by how many C each patient moves the site's row;
    a site that then refuses tells of the patient: inf.

    Patients of one number of records go together: more records of another would be padding to them,
    and lead the code another way.
    """
    found: list[tuple[Odd, float]] = []
    for records in sorted({len(odd.y_R) for odd in patients}):
        alike = [odd for odd in patients if len(odd.y_R) == records]
        held = [company, *(_add_patient(company, odd, rng) for odd in alike)]
        size = max(2, (1 << 22) // twin.plan.parameters)
        rows: list[np.ndarray | None] = []
        for first in range(0, len(held), size):
            rows += _ask_site(site, w_P, held[first : first + size], twin.plan.joint)
        without = rows[0]
        if without is None:  # nothing to compare with
            continue
        found += [
            (odd, _distance(row, without, twin)) for odd, row in zip(alike, rows[1:], strict=True)
        ]

    return found


def _distance(row: np.ndarray | None, without: np.ndarray, twin: Twin) -> float:
    """Return how far two rows are apart, in C; not finite, or refused for one patient's sake, is
    infinitely far.
    """
    if row is None:
        return math.inf
    numbers = twin.plan.parameters
    far = float(np.linalg.norm((row - without)[:numbers]))
    # adaptive clipping's count: a half at most, and half a step
    if len(row) > numbers and twin.plan.joint:
        far = max(far, 2 * float(abs(row[-1] - without[-1])) - GRID)
    if not math.isfinite(far):
        return math.inf
    return far


def _add_patient(rows: Rows, odd: Odd, rng: np.random.Generator) -> Rows:
    number = int(rows.patient.max()) + 1 if len(rows) else 0
    assert rows.key is not None
    patient = torch.cat([rows.patient, torch.full((len(odd.y_R),), number)])
    key = torch.cat([rows.key, keys(1, rng).expand(len(odd.y_R))])
    x = torch.cat([rows.x, odd.x_RF.to(rows.x.dtype)])
    y = torch.cat([rows.y, odd.y_R.to(rows.y.dtype)])
    return Rows(x, y, patient, key)


@contextmanager
def _mute() -> Iterator[None]:
    """Keep a site from warning of patients who were made to be left out."""
    log = logging.getLogger("medfed.node.work")
    before = log.disabled
    log.disabled = True
    try:
        yield
    finally:
        log.disabled = before


def _ask_site(
    site: Site, w_P: Tensor, held: Sequence[Rows], joint: bool
) -> list[np.ndarray | None]:
    """Return what the site would release [P] in units of C,
    holding each of these rows; None where it refuses.
    """
    assert site.guarantee is not None
    nodes = [site.like(site.study, site.guarantee) for _ in held]
    for node, rows in zip(nodes, held, strict=True):
        node.hold(rows)
    header: Mapping[str, float] = {"round": 1}
    if site.guarantee.clipping == "adaptive":
        header = {**header, "clip": site.guarantee.clip}
    payload = codec.encode(header, {"w": w_P})

    with _mute():
        replies = handle_many(nodes, "work", payload)
        if any(
            isinstance(reply, SiteError) for reply in replies
        ):  # one can fail a stack: each by itself, as at its site
            replies = [handle_many([node], "work", payload)[0] for node in nodes]

    found: list[np.ndarray | None] = []
    for reply in replies:
        if isinstance(reply, SiteError):
            found.append(None)
            continue
        row_M = codec.decode(reply)[1]["row"].double().numpy()
        found.append(row_M * GRID if joint else -row_M)

    return found
