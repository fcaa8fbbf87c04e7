"""Whether two sites write one column in different units, by a few quantiles alone: a factor apart,
and spread alike.
"""

import math
from collections.abc import Sequence

import numpy as np

FACTORS = (7.0, 10.0, 18.0182, 24.0, 38.67, 60.0, 88.42, 113.12, 365.0, 1000.0, 3600.0)
"""How far units of one quantity lie apart:
g/dL and g/L, glucose, cholesterol, creatinine, mg and g; durations.
"""

_SHARES = np.array([0.1, 0.25, 0.5, 0.75, 0.9])
_MOST = 2000  # values of a site, evenly taken, that are put in order

_SURE = 6.0  # standard errors of the medians' logarithms, by which they are apart
_NEAR = 1.25  # times, by which their ratio may miss a factor: hospitals differ
# times, by which the logarithms' middle halves and middle 80 % may differ in width
_QUARTILES = 2.0
_TENTHS = 1.6
_BENT = 0.35  # of the wider middle 80 %, by which a quantile may be off after rescaling


def spread(values: np.ndarray, few: int) -> list[float] | None:
    """Return how many values [n] there are, and their 10, 25, 50, 75 and 90 % quantiles.

    None for fewer than `few`, for a column with numbers below 0, and where quantiles fall together.
    """
    known = values[np.isfinite(values)]
    if len(known) < few or known.min() < 0:
        return None
    ordered = np.sort(known[:: max(1, len(known) // _MOST)])
    q = ordered[np.rint(_SHARES * (len(ordered) - 1)).astype(int)].tolist()
    if q[0] <= 0 or not (q[0] < q[2] < q[4] and q[1] < q[3]):
        return None
    return [float(len(known)), *q]


def factor(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Return the factor of FACTORS by which two spreads lie apart, None where they do not.

    Their middle 80 % do not meet, their medians differ by more than chance and by a factor, and by
    it all else agrees.
    """
    lower, upper = sorted((one, other), key=lambda told: told[3])
    if lower[5] >= upper[1]:
        return None
    low = np.log(lower[1:])
    high = np.log(upper[1:])
    ratio = float(high[2] - low[2])
    best = min(FACTORS, key=lambda factor: abs(math.log(factor) - ratio))
    if abs(math.log(best) - ratio) > math.log(_NEAR):
        return None
    halves = (low[3] - low[1], high[3] - high[1])
    wide = (low[4] - low[0], high[4] - high[0])
    errors = [
        1.25 * half / 1.349 / math.sqrt(told[0])
        for half, told in zip(halves, (lower, upper), strict=True)
    ]
    sure = ratio >= _SURE * math.hypot(*errors)
    alike = max(halves) <= _QUARTILES * min(halves) and max(wide) <= _TENTHS * min(wide)
    straight = np.abs(high - low - ratio).max() <= _BENT * max(wide)
    if sure and alike and straight:
        return best

    return None
