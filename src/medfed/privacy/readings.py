"""Single readings, noised on the device that took them (local differential privacy): nobody else
need be trusted.

Each report comes with the event that it costs the device's patient, so that no report is made
uncounted: gather the events of a patient and ask the accountant, or charge them to a ledger. Who
estimates sees reports only.

    >>> from medfed.privacy.accounting import epsilon_of
    >>> from medfed.privacy.privacy_events import Composed
    >>> states = ("low", "in range", "high")
    >>> report, event = report_category("high", states, epsilon=0.5)
    >>> report in states
    True
    >>> month = Composed((event,) * 30)  # one report a day; the epsilons alone would add up to 15
    >>> round(epsilon_of(month, delta=1e-6), 1)
    12.4
    >>> glucose, event = report_number(131, low=40, high=400, unit=1, epsilon=0.5)
    >>> glucose.is_integer()
    True

How many reports a device makes, and when, is not hidden: report on a schedule that does not depend
on readings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from medfed.core.checks import DataError, PlanError, nearest
from medfed.core.entropy import Entropy
from medfed.privacy.mechanisms import (
    discrete_laplace,
    discrete_laplace_variance,
    randomised_response,
    randomised_response_frequencies,
)
from medfed.privacy.privacy_events import RandomisedResponse


@dataclass(frozen=True)
class Estimate:
    """An estimate without bias, and its standard error:
    that of the noise, for what is true of these devices.
    """

    value: float
    error: float


def report_category(
    value: str, categories: Sequence[str], epsilon: float, entropy: Entropy | None = None
) -> tuple[str, RandomisedResponse]:
    """Report a category: the true one with probability e^epsilon / (e^epsilon + k - 1), else one of
    the others alike.

    Guarantee: epsilon-locally private between any two categories, delta = 0. To hide that there is
    no reading, make that a category. Raises DataError, which quotes no value, where it is none of
    the categories.
    """
    code = _code(categories)
    if value not in code:
        raise DataError(
            f"value: none of the {len(code)} categories. Declare one for every reading, or send "
            "no report."
        )
    (drawn,) = randomised_response([code[value]], len(code), epsilon, entropy or Entropy())
    return categories[drawn], RandomisedResponse(len(code), epsilon)


def report_number(
    value: float,
    low: float,
    high: float,
    unit: float,
    epsilon: float,
    entropy: Entropy | None = None,
) -> tuple[float, RandomisedResponse]:
    """Report a number held in the public [low, high],
    rounded to steps of `unit`, plus discrete Laplace noise.

    Guarantee: epsilon-locally private between any two numbers, delta = 0. It is accounted as
    randomised response of two answers, the worst of all epsilon-private mechanisms (Kairouz, Oh and
    Viswanath 2015): the event `Laplace` would count too little, as on a grid the noise is likelier
    than 1/2 to give away all of epsilon. Errors as `mechanisms.discrete_laplace`.
    """
    (report,) = discrete_laplace([value], low, high, unit, epsilon, entropy or Entropy())
    return float(report), RandomisedResponse(2, epsilon)


def estimate_shares(
    reports: Sequence[str], categories: Sequence[str], epsilon: float
) -> dict[str, Estimate]:
    """Estimate each category's share among the devices that reported, one report each; it may lie
    outside 0 .. 1.
    """
    code = _code(categories)
    if unknown := set(reports) - code.keys():
        raise DataError(f"report {min(unknown)!r} is no category; {nearest(min(unknown), code)}")
    value, error = randomised_response_frequencies(
        [code[report] for report in reports], len(code), epsilon
    )
    return {name: Estimate(float(value[k]), float(error[k])) for name, k in code.items()}


def estimate_mean(
    reports: ArrayLike, low: float, high: float, unit: float, epsilon: float
) -> Estimate:
    """Estimate the mean of the devices' numbers, each held in [low, high]; rounding to steps adds
    at most unit/2.
    """
    report = np.asarray(reports, np.float64)
    if not report.size:
        raise DataError("reports: expected at least one, got none. Wait for the devices to report.")
    variance = discrete_laplace_variance(low, high, unit, epsilon)
    return Estimate(float(report.mean()), math.sqrt(variance / report.size))


def _code(categories: Sequence[str]) -> dict[str, int]:
    if len(set(categories)) != len(categories) or isinstance(categories, str):
        raise PlanError(
            f"categories={list(categories)!r}: expected each name once. List the public categories."
        )
    return {name: k for k, name in enumerate(categories)}
