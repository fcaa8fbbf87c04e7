"""Accounting: mechanisms as data, what they cost a patient, and the noise that a target needs.

An event says what was released. Add/remove adjacency throughout: neighbours differ in one patient,
with all records. Three accountants answer for the same events:

    rdp    Rényi divergences at ORDERS (Mironov 2017); they add up, so a ledger can keep them and
           filter on them
    gdp    Gaussian releases only: T of noise multiplier z are one of z / sqrt(T), whose
           (epsilon, delta) is exact
    pld    privacy loss distributions: near exact, for reports of a schedule that was fixed in
           advance, never a filter

rdp and pld are dp-accounting's; gdp is the closed form of Balle and Wang 2018 (arXiv:1805.06530,
theorem 8), our own.

O orders, N patients.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

from medfed.core.checks import PlanError, nearest
from medfed.privacy.privacy_events import (
    Event,
    Gaussian,
    Laplace,
    Leaf,
    PoissonGaussian,
    RandomisedResponse,
    TruncatedPoissonGaussian,
    capped,
    leaves_of,
)

Accountant = Literal["rdp", "gdp", "pld"]
Floats: TypeAlias = NDArray[np.float64]

ORDERS: tuple[float, ...] = (
    *(1 + i / 10 for i in range(1, 100)),
    *map(float, range(11, 64)),
    *map(
        float,
        (
            72,
            80,
            96,
            112,
            128,
            160,
            192,
            224,
            256,
            320,
            384,
            448,
            512,
            640,
            768,
            896,
            1024,
            1536,
            2048,
        ),
    ),
)
"""dp-accounting's default orders, and more above 64, which epsilons below 0.5 need."""

ORDERS_VERSION = 1
"""Written into ledgers beside what was spent; raise it with any change of ORDERS."""

_ORDERS = np.array(ORDERS)


# Rényi divergences --------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def rdp(event: Event) -> Floats:
    """Return the Rényi divergences [O] at ORDERS between neighbours,
    the larger of both directions; read-only.
    """
    total = _rdp(event, ORDERS)
    total.flags.writeable = False
    return total


def _rdp(event: Event, orders: tuple[float, ...]) -> Floats:
    return sum(
        (leaf.count * _once(replace(leaf, count=1), orders) for leaf in leaves_of(event)),
        np.zeros(len(orders)),
    )


@lru_cache(maxsize=4096)
def _once(leaf: Leaf, orders: tuple[float, ...]) -> Floats:
    import dp_accounting as dp

    match leaf:
        case Gaussian(z):
            return _engine(dp.GaussianDpEvent(z), orders)
        case Laplace(scale):
            return _engine(dp.LaplaceDpEvent(scale), orders)
        case RandomisedResponse(categories, epsilon):
            event = dp.RandomizedResponseDpEvent(_blur(categories, epsilon), categories)
            return _engine(event, orders, adjacency="REPLACE_ONE")
        case PoissonGaussian(q, z):
            return _price_sampled(q, z, orders)
        case TruncatedPoissonGaussian(_, q, _, z):
            return _once(capped(q, z), orders)


def _engine(event: object, orders: Sequence[float], adjacency: str = "ADD_OR_REMOVE_ONE") -> Floats:
    import dp_accounting as dp

    with _quiet():
        accountant = dp.rdp.RdpAccountant(orders, dp.NeighboringRelation[adjacency])
        return cast(Floats, accountant.compose(event).rdp)


def _blur(categories: int, epsilon: float) -> float:
    """Return the probability with which dp-accounting's randomised response draws any category,
    the true one too.
    """
    return categories / (math.exp(epsilon) + categories - 1)


def _price_sampled(q: float, z: float, orders: Sequence[float]) -> Floats:
    """Return the divergences of one Poisson-sampled Gaussian (Mironov, Talwar and Zhang 2019)."""
    import dp_accounting as dp

    event = dp.PoissonSampledDpEvent(q, dp.GaussianDpEvent(z))
    order = np.array(orders)
    found = _engine(event, orders)
    broken = order % 1 > 0
    # For broken orders dp-accounting sums a series of magnitudes: a bound, which need not converge.
    # Divergences grow with the order, so the next whole one is a bound as well.
    found[broken] = np.minimum(found[broken], _engine(event, np.ceil(order[broken])))
    # Room for rounding, 10 times the worst met:
    # a tiny divergence that came out as 0 would be free for ever.
    bound: Floats = found.clip(0) + 1e-14 * order / (order - 1)
    return bound


@contextmanager
def _quiet() -> Iterator[None]:
    """dp-accounting warns of every order whose series does not converge;
    `_price_sampled` needs none of them.
    """
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def epsilon_from_rdp(rdp: Floats, delta: float) -> float:
    """Return the least epsilon at `delta` over ORDERS, for divergences [O] of a schedule that was
    fixed in advance.

    Where later events were chosen after seeing earlier answers, only a filter's own target holds
    (`budget_rdp`). Canonne, Kamath and Steinke 2020, proposition 12.
    """
    from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon

    _check_target(delta=delta)
    return float(compute_epsilon(ORDERS, rdp, delta)[0])


def delta_from_rdp(rdp: Floats, epsilon: float) -> float:
    """Return the least delta at `epsilon` over ORDERS; the inverse of `epsilon_from_rdp`, under the
    same condition.
    """
    from dp_accounting.rdp.rdp_privacy_accountant import compute_delta

    _check_target(epsilon=epsilon)
    return float(compute_delta(ORDERS, rdp, epsilon)[0])


# The Rényi filter ---------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def budget_rdp(epsilon: float, delta: float) -> Floats:
    """Return what may be spent at each order [O] so that (epsilon, delta) holds however events are
    chosen; read-only.

    -inf at all orders but one. A filter holds for an order fixed before the first event (Feldman
    and Zrnic 2021, theorem 4.3). Going on while *some* order is within its budget lets answers pick
    the order, and an analyst who steers by them gets more than delta. The order is the one at which
    most Gaussian releases fit: a function of the target alone. epsilon = inf sets no bound.
    """
    if epsilon == math.inf:
        return np.full(len(ORDERS), math.inf)
    _check_target(epsilon, delta)
    by_order = epsilon - np.log1p(-1 / _ORDERS) + np.log(delta * _ORDERS) / (_ORDERS - 1)
    # a divergence so small is within (0, delta)
    by_total_variation = -math.log1p(-(delta**2)) * (1 - 1e-9)
    bound = np.maximum(by_order - 1e-12, by_total_variation)  # room for rounding in long sums
    fixed = np.argmax(bound / _ORDERS)
    budget = np.full(len(ORDERS), -math.inf)
    budget[fixed] = bound[fixed]
    budget.flags.writeable = False
    return budget


def fits(spent_rdp: Floats, event_rdp: Floats, epsilon: float, delta: float) -> bool:
    """Say whether an event may follow what was spent, within (epsilon, delta) for ever.

    Args:
        spent_rdp: divergences at ORDERS of what was paid: [O] by one patient, or [N, O], where it
        must fit for all.
        event_rdp: divergences [O] of the event.
        epsilon, delta: the filter's target, which fixes its order.
    """
    return bool((spent_rdp + event_rdp <= budget_rdp(epsilon, delta)).any(-1).all())


def left(spent_rdp: Floats, epsilon: float, delta: float) -> float:
    """Return what is left of `epsilon` after [O]: the epsilon at `delta` of the largest Gaussian
    that still fits.
    """
    if epsilon == math.inf:
        return math.inf
    rho = float(np.max((budget_rdp(epsilon, delta) - spent_rdp) / _ORDERS))
    if rho > 0:
        return min(epsilon, epsilon_from_rdp(rho * _ORDERS, delta))
    return 0.0


# Gaussian differential privacy --------------------------------------------------------------------


def gdp_mu(event: Event) -> float | None:
    """Return mu where the event is mu-GDP, as tight as can be;
    None unless it is made of Gaussians alone.

    mu^2 adds up, exactly (Dong, Roth and Su 2022, corollary 3.3), also where noise multipliers are
    chosen after seeing earlier answers: the sum against `budget_mu(...)**2` is a filter at no extra
    cost (Smith and Thakurta 2022, arXiv:2210.17520). That a filter is this one or `budget_rdp` must
    be settled before its first event.
    """
    leaves = leaves_of(event)
    gaussians = [leaf for leaf in leaves if isinstance(leaf, Gaussian)]
    if len(gaussians) < len(leaves):
        return None
    return math.sqrt(math.fsum(leaf.count / leaf.noise_multiplier**2 for leaf in gaussians))


@lru_cache(maxsize=256)
def budget_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu that is within (epsilon, delta):
    1 / noise multiplier of the single Gaussian.
    """
    _check_target(epsilon, delta)
    sigma = _smallest(lambda sigma: gaussian_delta(sigma, epsilon) <= delta, rtol=1e-12)
    return (1 - 1e-9) / sigma  # room for rounding in long sums


def gaussian_delta(sigma: float, epsilon: float) -> float:
    """Return the exact delta at `epsilon` of one Gaussian
    of noise multiplier `sigma` (Balle and Wang 2018).
    """
    from scipy.special import log_ndtr

    above = log_ndtr(0.5 / sigma - epsilon * sigma)
    below = epsilon + log_ndtr(-0.5 / sigma - epsilon * sigma)
    return float(math.exp(above) * -math.expm1(min(0.0, below - above)))


def gaussian_epsilon(sigma: float, delta: float) -> float:
    """Return the exact epsilon at `delta` of one Gaussian of multiplier `sigma`, rounded up."""
    _check_target(delta=delta)
    low = 0.0
    high = 1.0
    if gaussian_delta(sigma, low) <= delta:
        return low
    while gaussian_delta(sigma, high) > delta:
        low = high
        high = 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        if gaussian_delta(sigma, middle) <= delta:
            high = middle
        else:
            low = middle
    return high


# Privacy loss distributions -----------------------------------------------------------------------


@lru_cache(maxsize=1024)
def pld_epsilon(event: Event, delta: float) -> float:
    """Return epsilon at `delta` of a schedule that was fixed in advance, rounded up on a grid of
    privacy losses.

    Grid step 1e-4; time and memory grow with epsilon.
    Doroshenko et al. 2022 (connect the dots).
    """
    _check_target(delta=delta)
    first, *rest = (_pld(leaf) for leaf in leaves_of(event))
    for other in rest:
        first = first.compose(other)
    return float(first.get_epsilon_for_delta(delta))


def _pld(leaf: Leaf) -> Any:
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    match leaf:
        case Gaussian(z, count):
            return pld.from_gaussian_mechanism(z / math.sqrt(count))
        case PoissonGaussian(q, z):
            one = pld.from_gaussian_mechanism(z, sampling_prob=q)
        case TruncatedPoissonGaussian(_, q, _, z):
            return _pld(capped(q, z, leaf.count))
        case Laplace(scale):
            one = pld.from_laplace_mechanism(scale)
        case RandomisedResponse(categories, epsilon):
            any_two = NeighboringRelation.REPLACE_ONE
            one = pld.from_randomized_response(
                _blur(categories, epsilon), categories, neighboring_relation=any_two
            )
    return one.self_compose(leaf.count)


# Answers ------------------------------------------------------------------------------------------


def epsilon_of(event: Event, delta: float, accountant: str = "rdp") -> float:
    """Return the event's epsilon at `delta` by one accountant,
    for a schedule that was fixed in advance.

    Raises PlanError for an unknown accountant, and for "gdp" where the event is not made of
    Gaussians.
    """
    match accountant:
        case "rdp":
            return epsilon_from_rdp(rdp(event), delta)
        case "gdp":
            return gaussian_epsilon(1 / _mu(event), delta)
        case "pld":
            return pld_epsilon(event, delta)
    raise _refuse_accountant(accountant)


def epsilon_of_any(events: Sequence[Event], delta: float) -> float:
    """Return an epsilon at `delta`, by rdp, of whoever pays for any one of these events, or for
    parts of several that come to one: half of one and half of another.
    """
    return epsilon_from_rdp(np.max([rdp(event) for event in events], axis=0), delta)


def calibrate(
    event_of: Callable[[float], Event], epsilon: float, delta: float, accountant: str = "rdp"
) -> float:
    """Return the smallest noise multiplier,
    rounded up by at most 1e-4 of it, whose event is within the target.

    event_of: noise multiplier -> everything that one patient pays for, fixed in advance. By "rdp"
    it is what the filter (`budget_rdp`) lets through at its one order. Over many steps that asks
    for the noise of the best order, within 1 %; over few steps up to 10 % more, and up to 35 % more
    where the probability is 0.01 or less: there use "pld". Raises PlanError for a target out of
    bounds, or that no noise meets.
    """
    _check_target(epsilon, delta)
    if accountant == "rdp":
        return _smallest(lambda z: _event_fits(np.zeros(len(ORDERS)), event_of(z), epsilon, delta))
    if accountant == "gdp":
        return _smallest(lambda z: _mu(event_of(z)) <= budget_mu(epsilon, delta))
    # from RDP's answer down in small steps: far too little noise would need a huge grid
    if accountant == "pld":
        start = calibrate(event_of, epsilon, delta)
        return _smallest(lambda z: pld_epsilon(event_of(z), delta) <= epsilon, start, step=1.1)
    raise _refuse_accountant(accountant)


def _event_fits(spent_rdp: Floats, event: Event, epsilon: float, delta: float) -> bool:
    """Say what `fits` says, with the event's divergence worked out at the filter's order alone."""
    budget = budget_rdp(epsilon, delta)
    fixed = int(np.argmax(budget))
    return bool(spent_rdp[fixed] + _rdp(event, (ORDERS[fixed],))[0] <= budget[fixed])


def group(epsilon: float, delta: float, k: int) -> tuple[float, float]:
    """Return the (epsilon, delta) of k patients together where each alone has that given. Vadhan
    2017, lemma 2.2.
    """
    _check_target(epsilon, delta)
    return k * epsilon, min(1.0, delta * math.expm1(k * epsilon) / math.expm1(epsilon))


def _mu(event: Event) -> float:
    mu = gdp_mu(event)
    if mu is None:
        raise PlanError(
            "accountant='gdp' and an event that is not made of Gaussians alone do not compose. "
            "Set privacy.accountant='rdp', or draw all patients in every step."
        )
    return mu


def _refuse_accountant(accountant: str) -> PlanError:
    return PlanError(f"accountant={accountant!r}; {nearest(accountant, get_args(Accountant))}")


def _smallest(
    meets: Callable[[float], bool], start: float = 1.0, step: float = 2.0, rtol: float = 1e-4
) -> float:
    """Return a value that `meets`, at most 1 + rtol times the smallest one;
    `meets` must stay true from there on.
    """
    low = high = start
    while not meets(high):
        low = high
        high = step * high
        if high > 1e12:
            raise PlanError(
                "no noise multiplier up to 1e12 meets the target. Raise epsilon or delta, or "
                "plan less."
            )

    while low == high or meets(low):
        low, high = low / step, low
        if low < 1e-12:
            raise PlanError(
                "a noise multiplier of 1e-12 still meets the target; expected an event that "
                "depends on it."
            )

    while high > low * (1 + rtol):
        middle = math.sqrt(low * high)
        if meets(middle):
            high = middle
        else:
            low = middle

    return high


def _check_target(epsilon: float | None = 1.0, delta: float | None = 0.5) -> None:
    if epsilon is None or not 0 < epsilon < math.inf:
        raise PlanError(
            f"epsilon={epsilon}; expected a finite number above 0. Set privacy.epsilon=1.0."
        )
    if delta is None or not 0 < delta < 1:
        raise PlanError(
            f"delta={delta}; expected a number between 0 and 1, below 1/patients. Set "
            "privacy.delta=1e-6."
        )


# The accountant -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PrivacyAccountingEntry:
    """One charge, and the epsilon at delta of all charges up to and with it."""

    label: str
    event: Event
    epsilon: float
    delta: float


class RenyiDPAccountant:
    """What the same patients have paid so far, event by event, under add/remove adjacency.

    It counts; it refuses nothing that is known. The ledger is what stops a run.
    """

    def __init__(self, delta: float, adjacency: str = "add_remove") -> None:
        """`delta` is the one that epsilons are given at; raises PlanError for another adjacency
        than add/remove.
        """
        _check_target(delta=delta)
        if adjacency != "add_remove":
            raise PlanError(
                f"adjacency={adjacency!r}; expected 'add_remove'. For replace-one, whose "
                "accountants disagree (sigma 4.22 reads epsilon 1.08 by RDP and 2.12 by PLD), "
                "use the group of two patients."
            )
        self.delta = delta
        self.rdp: Floats = np.zeros(len(ORDERS))
        self.entries: tuple[PrivacyAccountingEntry, ...] = ()

    def charge(self, event: Event, label: str = "") -> PrivacyAccountingEntry:
        """Count an event and return its entry;
        raises PlanError, counting nothing, for an event it does not know.
        """
        self.rdp = self.rdp + rdp(event)
        entry = PrivacyAccountingEntry(label, event, self.epsilon(), self.delta)
        self.entries = (*self.entries, entry)
        return entry

    def epsilon(self, delta: float | None = None) -> float:
        """Return the epsilon of all charges together, at `delta` or at the accountant's own."""
        return epsilon_from_rdp(self.rdp, self.delta if delta is None else delta)

    def noise_for(self, event_of: Callable[[float], Event], epsilon: float) -> float:
        """Return the smallest noise multiplier whose event
        still fits into `epsilon` after what was charged.
        """
        return _smallest(lambda z: _event_fits(self.rdp, event_of(z), epsilon, self.delta))
