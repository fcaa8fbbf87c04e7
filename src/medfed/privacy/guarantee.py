"""The guarantee a study asks for, resolved:
which noise, how much of it, and what every round costs every patient.

A release is what one client's patients pay for: the noised sum of their clipped gradients, on an
integer grid. Its sensitivity is asked here and nowhere else, so that noise, accountant and claim
cannot disagree.

Everywhere a value of `Guarantee` is called `guarantee`. Where that name would hide this module,
what is needed of it is imported by name: `from medfed.privacy.guarantee import resolve`.

P parameters, m declared training patients of a client, z noise multiplier (standard deviation over
sensitivity).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from statistics import NormalDist
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from medfed.core import streams, toml
from medfed.core.checks import PlanError, StudyError, closest, nearest, some
from medfed.core.decision import CHOOSING_CELLS
from medfed.core.entropy import Entropy
from medfed.core.refusals import LEAVE_OUT, Refusal, refuse
from medfed.data.features import open_columns
from medfed.privacy import accounting, factorisation, quantiles
from medfed.privacy.mechanisms import DiscreteGaussian, delta_cost, worst_total_variation
from medfed.privacy.privacy_events import Composed, Event, Gaussian, PoissonGaussian, capped
from medfed.study import EPSILON, SIZE, Study

GRID = 2.0**-16
"""One step of the integer grid, as a share of the clipping norm."""

NARROW = 128
"""Slots of a step whose clipped gradients may be summed in float32;
wider steps are summed in float64.
"""

SLACK = 2.0**-12 + 2 * NARROW**2 * 2.0**-24 + 2.0**-20
"""How far rounding may lift what one patient moves above C, as a share of C.

The norm, in float32: fan-in plus fan-out times 2^-24, up to 4,096 units. The sum of n gradients in
float32: each sum is off by at most n 2^-24 times the sum of the terms' sizes, so by n^2 2^-24 in
norm, and twice that between neighbours; n is how many were drawn, whatever was declared. Above
NARROW it is n^2 2^-53, below that for 2 million patients. Projecting the sum of m declared patients
(`wire.into_ball`): m 2^-46 between neighbours, up to 67 million.
"""

COUNT_NOISE = 1.6
"""adaptive: sd of the noised count of small gradients, in units of z; the gradient's noise then
grows by 5.3 %.
"""

NOTHING: Mapping[str, int] = MappingProxyType({})

VOTE_SENSITIVITY = 1.0
"""How far one patient moves the sum of the sites' votes, each in [0, 1], at one of its sites."""

FULL_VOTE = 0.02
"""By how much a model's mean squared error must be less for a whole vote:
of chances, or of scaled numbers.
"""

Mode = Literal["site", "shared", "central"]


@lru_cache(maxsize=256)
def discrete_gaussian(sigma: float) -> DiscreteGaussian:
    """Return the sampler of noise of `sigma` grid units; its tables are made once."""
    return DiscreteGaussian(sigma)


@dataclass(frozen=True)
class Release:
    """What a client does with its patients in a round:
    `steps` noised sums, each patient in it with `probability`.
    """

    size: int  # m
    steps: int
    probability: float
    noise_multiplier: float
    cap: int = 0

    @property
    def expected(self) -> float:
        """How many declared patients a step sums over: what its sum is divided by."""
        return self.size * self.probability

    def event(self) -> Event:
        """Return what a round costs each patient of the client, as data for the accountant.

        It holds for any true number of patients: `size` is declared, and decides on steps and
        probability alone.
        """
        if self.probability == 1:
            return Gaussian(self.noise_multiplier, self.steps)
        if self.cap:
            return capped(self.probability, self.noise_multiplier, self.steps)
        return PoissonGaussian(self.probability, self.noise_multiplier, self.steps)


@dataclass(frozen=True)
class Query:
    """What training patients are asked beside the gradient:
    numbers of each answer, and how often they answer.
    """

    epsilon: float  # what all answers would cost alone
    numbers: int
    times: int = 1
    noise_multiplier: float = math.nan  # of each answer


@dataclass(frozen=True)
class Guarantee:
    """A study's (epsilon, delta) for every training patient, and what keeps it."""

    mode: Mode
    epsilon: float
    delta: float
    delta_sampler: float  # the part of delta that the noise sampler's distance from its ideal takes
    accountant: str
    releases: Mapping[str, Release]  # of each client
    uses: int  # rounds that one client's patients may pay for
    copies: int  # sites at which a patient may pay separately
    parameters: int
    clip: float
    clipping: str
    max_sites: int
    simulation_only: bool
    strategy: tuple[float, ...] = ()  # of correlated noise: c_0 .. c_(b-1)
    rounds: int = 0
    separation: int = 1
    queries: Mapping[str, Query] = field(default_factory=dict)  # by label

    @property
    def joint(self) -> bool:
        """Whether one noise is added to the sum of all sites."""
        return self.mode != "site"

    @property
    def covered_sites(self) -> int:
        """At how many of a patient's sites one noise hides it: at all if it is joint, else one."""
        if self.joint:
            return self.max_sites
        return 1

    def numbers(self) -> int:
        """Return how many numbers a noised sum has:
        the gradient, and for adaptive clipping one count.
        """
        return self.parameters + (self.clipping == "adaptive")

    def sensitivity_units(self) -> float:
        """Return how far one patient can move the sum of a step, in grid units and L2 norm: clip,
        slack, rounding.
        """
        each = (1 + SLACK) / GRID + math.sqrt(self.parameters)
        return each * self.covered_sites

    def run_sensitivity_units(self) -> float:
        """Return the same over a whole run of correlated noise; uncorrelated, of one step."""
        once = self.sensitivity_units()
        if not self.strategy:
            return once
        return factorisation.grid_sensitivity(
            self.strategy, self.rounds, self.separation, once, self.parameters
        )

    def sigma_units(self, client: str = "") -> float:
        """Return the standard deviation of the noise in grid units:
        of the joint noise, or of one site's.
        """
        if not client:
            client = next(iter(self.releases))
        multiplier = self.releases[client].noise_multiplier
        if self.clipping == "adaptive":  # part of the budget pays for the count
            multiplier /= math.sqrt(1 - 1 / (2 * COUNT_NOISE) ** 2)
        return multiplier * self.run_sensitivity_units()

    def count_sigma(self) -> float:
        """Return the standard deviation of the noised count
        of adaptive clipping (one patient moves it by 1/2).
        """
        return COUNT_NOISE * next(iter(self.releases.values())).noise_multiplier * self.max_sites

    def query_event(self, label: str) -> Event:
        """Return what one answer of a site to a query costs its patients."""
        return Gaussian(self.queries[label].noise_multiplier)

    def query_sd(self, label: str, sensitivity: float) -> float:
        """Return the standard deviation of the noise on each number of a query's answer: a site's
        own, or the sum's.

        A patient moves the answer by `sensitivity`, in L2 norm, at each of its sites; joint noise
        covers all of them.
        """
        return self.queries[label].noise_multiplier * sensitivity * self.covered_sites

    def compose_paid(
        self, release: Release, uses: int, asked: Mapping[str, int] = NOTHING
    ) -> Event | None:
        """Return what a patient has paid, at all its sites:
        `uses` rounds of a client, and queries as `asked`.

        None where that is nothing.
        """
        events: list[Event] = []
        if uses:
            events.append(repeat(release.event(), uses * self.copies))
        for label, answers in sorted(asked.items()):
            if answers:
                events.append(repeat(self.query_event(label), answers * self.copies))
        if not events:
            return None
        return Composed(tuple(events))

    def whole(self, client: str) -> Event:
        """Return what the whole plan costs a patient of a client at that client."""
        rounds = repeat(self.releases[client].event(), self.uses)
        return _compose(rounds, self._all_answers())

    def _all_answers(self) -> tuple[Event, ...]:
        """Return what all answers to all queries cost a patient at one site."""
        return tuple(
            repeat(self.query_event(label), one.times)
            for label, one in sorted(self.queries.items())
        )

    def cost(self, uses: Mapping[str, int], asked: Mapping[str, int] = NOTHING) -> float:
        """Return the epsilon, at the study's delta, of those who have paid most:
        `uses` rounds of each client.

        `asked` says how often each query was asked.

        Guarantee: no less than what a patient of several unlike sites has paid at all of them,
        whoever is at which.
        """
        # thousands of devices are of few kinds
        kinds = {(self.releases[name], n) for name, n in uses.items()}
        paid = {self.compose_paid(release, n, asked) for release, n in kinds}
        events = [event for event in paid if event]
        if self.copies > 1 and self.accountant == "rdp" and len(events) > 1:
            # Who is at two sites pays half of one event and half of another: its divergences lie
            # between theirs at each order, and yet its least epsilon may lie above both of theirs.
            return accounting.epsilon_of_any(events, self.delta - self.delta_sampler)
        return max(map(self.epsilon_of, events), default=0.0)

    def epsilon_of(self, event: Event) -> float:
        """Return the epsilon of an event at what the sampler leaves of delta,
        by the study's accountant.
        """
        return accounting.epsilon_of(event, self.delta - self.delta_sampler, self.accountant)

    def signal_to_noise(self, client: str) -> float:
        """Return the best possible signal-to-noise ratio of one step:
        all gradients alike, over the noise's norm.

        It is n C / (sigma sqrt(P)): below 1 a single step is mostly noise, and only the mean over
        many steps learns.
        """
        release = self.releases[client]
        counted = [release]
        if self.joint:
            counted = list(self.releases.values())

        patients = sum(one.expected for one in counted) / self.covered_sites
        return patients / (release.noise_multiplier * math.sqrt(self.parameters))


def repeat(event: Event, times: int) -> Event:
    """Return an event that happens `times` as often."""
    if isinstance(event, Composed):
        return Composed(tuple(repeat(e, times) for e in event.events))
    return replace(event, count=event.count * times)


def _compose(rounds: Event, beside: tuple[Event, ...]) -> Event:
    """Return what rounds cost, and what is asked beside them."""
    if not beside:
        return rounds
    return Composed((rounds, *beside))


def vote_noise(study: Study, epsilon: float, sites: int) -> float:
    """Return the standard deviation of the noise on a vote of so many sites that would cost
    `epsilon` alone.
    """
    each = vote_multiplier(study, epsilon)
    if mode(study) != "site":
        each *= study.privacy.max_sites_per_patient
    return summed_sd(study, each, sites)


def summed_sd(study: Study, each: float, sites: int) -> float:
    """Return the standard deviation of the noise on the sum of so many sites' answers.

    `each` is that of one answer (`Guarantee.query_sd`): of each site's, or of the one noise on
    their sum.
    """
    if counted_together(study):
        return each
    return each * math.sqrt(sites)


def _copies(study: Study) -> int:
    """Return at how many sites a patient may pay separately."""
    if mode(study) == "site":
        return study.privacy.max_sites_per_patient
    return 1


def vote_multiplier(study: Study, epsilon: float) -> float:
    """Return the noise multiplier of a vote that would cost `epsilon` alone,
    at all of a patient's sites.
    """
    return _query_noise(_copies(study), epsilon, study.privacy.delta)


def ranges_noise(study: Study, sites: int, epsilon: float = 0.0, columns: int = 0) -> float:
    """Return the standard deviation of the noise on a cell, over all sites, by which ranges are
    found, in patients.

    For so many open columns and at such a price; by default those of the study.
    """
    privacy = study.privacy
    columns = columns or len(open_columns(study))
    price = epsilon or privacy.ranges_epsilon
    multiplier = _query_noise(_copies(study) * quantiles.TIMES, price, privacy.delta)
    each = multiplier * ranges_sensitivity(columns)
    if mode(study) != "site":
        each *= privacy.max_sites_per_patient
    return summed_sd(study, each, sites)


def ranges_sensitivity(columns: int) -> float:
    """Return how far one patient moves the counts of so many columns: one count of each by one."""
    return math.sqrt(columns)


def vote_interval(sites: int, noise_sd: float) -> float:
    """Return half the width of a vote's 95 % interval:
    its noise, and the most that votes in [0, 1] may scatter.
    """
    return NormalDist().inv_cdf(0.975) * math.sqrt(noise_sd**2 + sites / 4)


def asked(study: Study) -> bool:
    """Say whether the study asks for a guarantee."""
    return mode(study) != "none"


def counted_together(study: Study) -> bool:
    """Say whether sites' counts are summed and noised once:
    whoever combines rows sees them without noise anyway.

    Under secure aggregation nobody may see a site's counts, so there each site noises its own.
    """
    return mode(study) in ("shared", "central") and study.security.aggregation == "plain"


def query_noise(
    guarantee: Guarantee, label: str, sensitivity: float, numbers: int, key: int
) -> np.ndarray:
    """Draw the noise [numbers] on a query's answer, in steps of GRID;
    in a simulation from the stream `key`.

    `label` names the query, whose answer one patient moves by `sensitivity` in L2 norm.
    """
    sigma = guarantee.query_sd(label, sensitivity)
    if guarantee.simulation_only:
        return sigma * streams.normal(torch.tensor([key]), numbers)[0].numpy()
    return discrete_gaussian(sigma / GRID).sample(numbers, Entropy()) * GRID


def mode(study: Study) -> Literal["site", "shared", "central", "none"]:
    """Return where noise is added; raise PlanError where epsilon, delta and noise do not fit."""
    refuse(refuse_unresolved(study))
    privacy = study.privacy
    if privacy.noise != "auto":
        return privacy.noise
    if privacy.epsilon < math.inf:
        return "shared"
    return "none"


def refuse_unresolved(study: Study) -> Iterator[Refusal]:
    """Yield why epsilon, delta and noise do not go together."""
    privacy = study.privacy
    bounded = privacy.epsilon < math.inf
    if bounded and privacy.delta >= 1:
        text = (
            f"privacy.epsilon={privacy.epsilon:g} and no privacy.delta; a guarantee needs both. "
            "Set privacy.delta=1e-06."
        )
        yield Refusal(PlanError(text), {("privacy", "delta"): 1e-6})

    elif not bounded and privacy.delta < 1:
        text = (
            f"privacy.delta={privacy.delta:g} and no privacy.epsilon; a guarantee needs both. "
            "Set privacy.epsilon=1."
        )
        yield Refusal(PlanError(text), {("privacy", "epsilon"): EPSILON})

    elif privacy.noise == "none" and bounded:
        text = (
            f"privacy.noise='none' and privacy.epsilon={privacy.epsilon:g} do not compose: "
            "without noise no epsilon holds. Set privacy.noise='shared', 'site' or 'central', "
            "or leave epsilon and delta out."
        )
        yield Refusal(PlanError(text), {("privacy", "noise"): "shared"})

    elif privacy.noise not in ("auto", "none") and not bounded:
        text = (
            f"privacy.noise={privacy.noise!r} and no privacy.epsilon; the noise follows from the "
            "target. Set privacy.epsilon=1.0 and privacy.delta=1e-6."
        )
        yield Refusal(
            PlanError(text), {("privacy", "epsilon"): EPSILON, ("privacy", "delta"): 1e-6}
        )


def refuse_unsized(names: Sequence[str], study: Study) -> Iterator[Refusal]:
    """Yield, as one, the sites whose number of training patients is not declared."""
    absent = [name for name in names if name not in study.privacy.sizes]
    if study.sites.kind == "device" or not absent:
        return
    who = f"site {absent[0]!r} has no declared size"
    whose = "its"
    settings = f'privacy.sizes."{absent[0]}" = N'
    if len(absent) > 1:
        who = f"{len(absent)} sites have no declared size ({some(map(repr, absent))})"
        whose = "each one's"
        settings = f"{settings} and so on"
    text = (
        f"{who}, and a sum may not be divided by what was counted. Set "
        f"{settings}, the number of {whose} training patients that may be published."
    )
    yield Refusal(PlanError(text), {("privacy", "sizes", name): SIZE for name in absent})


def unknown_sizes(study: Study) -> Iterator[Refusal]:
    """Yield declared sizes of sites that the study does not name."""
    names = study.sites.names
    sizes = study.privacy.sizes
    for name, size in sizes.items():
        if names and name not in names:
            close = closest(name, names)
            mend: dict[toml.Path, object] = {("privacy", "sizes", name): LEAVE_OUT}
            if close and close not in sizes:
                mend[("privacy", "sizes", close)] = size
            text = (
                f"{toml.key('privacy', 'sizes', name)}={size}: no such site in sites.names; "
                f"{nearest(name, names)}"
            )
            yield Refusal(StudyError(text), mend)


def large_delta(patients: int, study: Study) -> Iterator[Refusal]:
    """Yield why delta is too large for so many declared patients."""
    delta = study.privacy.delta
    if delta < 1 / patients:
        return
    small = 10.0 ** math.floor(math.log10(0.5 / patients))
    text = (
        f"privacy.delta={delta:g} with {patients} patients; expected below 1/{patients}, or a "
        f"guarantee may be met by publishing one patient. Set privacy.delta={small:g}."
    )
    yield Refusal(PlanError(text), {("privacy", "delta"): small})


def declared_size(study: Study, site: str) -> int:
    """Return a site's declared number of training patients; raise PlanError where there is none."""
    if study.sites.kind == "device":
        return 1
    refuse(refuse_unsized([site], study))
    return study.privacy.sizes[site]


def resolve(study: Study, sizes: Mapping[str, int], parameters: int) -> Guarantee:
    """Return the guarantee of a study whose clients have declared `sizes`,
    the noise calibrated to its target.

    Raises PlanError where the target cannot be met.

    Guarantee: whoever is there and however many, a patient who takes part in every round of the
    plan, spare ones too, and in every query pays at most epsilon at delta, the noise sampler's
    distance from its ideal included. Adding or removing one patient with all records is what is
    hidden.

    Edge cases:
    - `sizes` are declared, never counted: where they are wrong the learning rate is off, and the
      guarantee holds;
    - a delta of 1/n or more is refused, as is one that the sampler's share would half use up;
    - a draw of sites gains nothing, as it is seen; only coins of patients do;
    - `simulation_only`: the same numbers, and nothing is claimed.
    """
    refuse(large_delta(sum(sizes.values()), study))

    guarantee = _plan_releases(study, sizes, parameters)
    guarantee = _take_samplers_share(study, guarantee, clients=len(sizes))

    # Queries have their own price; the rounds get what these leave.
    delta = guarantee.delta - guarantee.delta_sampler
    queries = {
        label: replace(
            one, noise_multiplier=_query_noise(guarantee.copies * one.times, one.epsilon, delta)
        )
        for label, one in queries_of(study).items()
    }
    guarantee = replace(guarantee, queries=queries)
    noise = {name: _noise_for(guarantee, one) for name, one in guarantee.releases.items()}
    if guarantee.joint:  # one noise for all: the client that needs most decides
        noise = dict.fromkeys(noise, max(noise.values()))
    releases = {
        name: replace(one, noise_multiplier=noise[name]) for name, one in guarantee.releases.items()
    }
    return replace(guarantee, releases=releases)


def _plan_releases(study: Study, sizes: Mapping[str, int], parameters: int) -> Guarantee:
    """Return what is planned: how many rounds a client's patients pay for, and what each releases,
    its noise yet unknown.
    """
    privacy = study.privacy
    where = mode(study)
    assert where != "none"
    groups = study.fleet.groups if study.fleet.schedule == "cyclic" else 1
    planned = study.training.rounds + privacy.spare_rounds
    mean = sum(sizes.values()) / len(sizes)
    blank = {name: _release(study, size, where, mean) for name, size in sizes.items()}
    strategy: tuple[float, ...] = ()
    uses = -(-planned // groups)
    if privacy.correlated:
        strategy = tuple(factorisation.coefficients(planned, groups))
        uses = 1  # a correlated run is one release

    return Guarantee(
        mode=where,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        delta_sampler=0.0,
        accountant=_accountant(study, blank),
        releases=blank,
        uses=uses,
        copies=_copies(study),
        parameters=parameters,
        clip=privacy.clip,
        clipping=privacy.clipping,
        max_sites=privacy.max_sites_per_patient,
        simulation_only=privacy.simulation_only,
        strategy=strategy,
        rounds=planned,
        separation=groups,
    )


def _take_samplers_share(study: Study, guarantee: Guarantee, clients: int) -> Guarantee:
    """Return the guarantee with the sampler's share of delta: every number that is ever drawn may
    be a little off the ideal law. Raises PlanError where it is more than half.
    """
    privacy = study.privacy
    samples = _count_samples(study, guarantee, clients)
    if not privacy.simulation_only:
        worst = worst_total_variation(2.0**20 * guarantee.sensitivity_units())
        guarantee = replace(guarantee, delta_sampler=delta_cost(worst, samples, privacy.epsilon))
    if guarantee.delta_sampler > privacy.delta / 2:
        raise PlanError(
            f"privacy.delta={privacy.delta:g} with {samples:,} noise samples, whose sampler "
            f"takes {guarantee.delta_sampler:.2g} of it; expected at most half. Lower "
            "training.rounds, the local steps or epsilon, or raise privacy.delta."
        )
    return guarantee


def _count_samples(study: Study, guarantee: Guarantee, clients: int) -> int:
    """Return how many numbers the noise sampler draws for
    one patient over the whole plan, queries included.
    """
    steps = max(release.steps for release in guarantee.releases.values())
    samples = guarantee.numbers() * steps * guarantee.rounds * guarantee.copies
    samples += guarantee.copies * sum(one.numbers * one.times for one in queries_of(study).values())

    if study.security.aggregation != "plain":
        samples *= max(3, clients)  # who holds a part of each noise
    return samples


def _release(study: Study, size: int, where: str, mean: float) -> Release:
    """Return a client's release before its noise is known.
    Steps and sampling follow from declared sizes alone.

    Under joint noise all patients are drawn alike, batch_size of them at a site of the mean size:
    where a small site drew more of its own, its patients would need more noise, and all sites would
    get it.
    """
    training = study.training
    probability = 1.0
    if training.batch_size:
        drawn_from = size if where == "site" else mean
        probability = min(1.0, training.batch_size / drawn_from)

    steps = 1
    if where == "site":
        steps = training.local_steps or training.local_epochs * max(1, round(1 / probability))
    cap = study.privacy.batch_cap if probability < 1 else 0
    return Release(size, steps, probability, math.nan, cap)


def _noise_for(guarantee: Guarantee, release: Release) -> float:
    """Return the noise multiplier of a client's release
    at which its patients' whole plan meets the target.
    """
    # neither matters to what it costs
    alike = replace(release, size=0, cap=min(release.cap, 1), noise_multiplier=0)
    return _calibrate(
        alike,
        guarantee.uses * guarantee.copies,
        tuple(repeat(event, guarantee.copies) for event in guarantee._all_answers()),
        guarantee.epsilon,
        guarantee.delta - guarantee.delta_sampler,
        guarantee.accountant,
    )


@lru_cache(maxsize=4096)
def _calibrate(
    release: Release,
    times: int,
    beside: tuple[Event, ...],
    epsilon: float,
    delta: float,
    accountant: str,
) -> float:
    def plan_event(noise_multiplier: float) -> Event:
        rounds = repeat(replace(release, noise_multiplier=noise_multiplier).event(), times)
        return _compose(rounds, beside)

    try:
        return accounting.calibrate(plan_event, epsilon, delta, accountant)
    except PlanError as error:
        if not beside:
            raise
        raise PlanError(
            f"{error} What training patients are asked beside it (privacy.ranges_epsilon, "
            "threshold_epsilon, vote_epsilon) leaves too little to train with: lower it, to a "
            "quarter of privacy.epsilon, say."
        ) from error


def queries_of(study: Study) -> dict[str, Query]:
    """Return what training patients are asked beside the gradient, by label;
    their noise is not known yet.
    """
    privacy = study.privacy
    queries: dict[str, Query] = {}
    if columns := len(open_columns(study)):
        queries["ranges"] = Query(
            privacy.ranges_epsilon, columns * max(quantiles.CELLS), quantiles.TIMES
        )
    if study.rule().chosen:
        queries["threshold"] = Query(
            privacy.threshold_epsilon or privacy.epsilon / 4, 2 * CHOOSING_CELLS
        )
    if privacy.vote_epsilon:
        queries["vote"] = Query(privacy.vote_epsilon, 1)
    return queries


@lru_cache(maxsize=256)
def _query_noise(copies: int, epsilon: float, delta: float) -> float:
    """Return the noise multiplier at which a query,
    at all of a patient's sites, would cost `epsilon`.

    The answer's noise is Gaussian, as training's is, so that the two compose without loss.
    """
    return accounting.calibrate(lambda z: Gaussian(z, copies), epsilon, delta, "gdp")


def _accountant(study: Study, releases: Mapping[str, Release]) -> str:
    """Return the accountant that the study names;
    else the exact one where all that is released is Gaussian.
    """
    if study.privacy.accountant != "auto":
        return study.privacy.accountant
    if all(release.probability == 1 for release in releases.values()):
        return "gdp"
    return "rdp"
