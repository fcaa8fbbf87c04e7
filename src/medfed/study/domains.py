"""Which values a key may have, declared beside it:
one declaration feeds the check, the refusal and docs/study.md.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any, Protocol

from medfed.core import decision


class Domain(Protocol):
    """The values that are allowed, and how that is said behind "expected"."""

    @property
    def words(self) -> str: ...

    @property
    def told(self) -> bool:
        """Whether docs/study.md says it beside the key's type;
        where it does not, the key's own words do.
        """

    def holds(self, value: Any) -> bool:
        """Say whether a value is allowed; it has the key's type already."""

    def tell_expected(self, value: Any) -> str:
        """Return what is said to who gave a value that is not allowed."""


@dataclass(frozen=True)
class Interval:
    """The numbers between two ends.

    low, high: the ends. open_low, open_high: whether the end itself is left out; nan never belongs.
    special: what single values of it stand for, such as {0: "all"}. unit: what is counted, such as
    "seconds".
    why: why not further, where that needs saying.
    """

    low: float
    high: float
    open_low: bool = False
    open_high: bool = False
    special: Mapping[float, str] = field(default_factory=dict)
    unit: str = ""
    why: str = ""

    told = True

    def holds(self, value: float) -> bool:
        """Say whether a number lies between the ends."""
        above = self.low < value if self.open_low else self.low <= value
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def tell_expected(self, value: Any) -> str:
        """Return the interval in words that follow "expected"."""
        if self.words.startswith(("above", "in")):
            return f"a number {self.words}"
        return self.words

    @property
    def words(self) -> str:
        """The interval in words: "1 or more", "above 0 seconds",
        "in [0, 0.5)", "0 or more (0: all)".
        """
        if math.isfinite(self.high):
            left = "(" if self.open_low else "["
            right = ")" if self.open_high else "]"
            span = f"in {left}{_short(self.low)}, {_short(self.high)}{right}"
        else:
            span = f"above {self.low:g}" if self.open_low else f"{self.low:g} or more"
        if self.unit:
            span = f"{span} {self.unit}"
        if self.special:
            meanings = "; ".join(f"{value:g}: {meaning}" for value, meaning in self.special.items())
            span = f"{span} ({meanings})"
        return f"{span}: {self.why}" if self.why else span


def _short(number: float) -> str:
    """Return a number as it is written in a study: 1e6, not 1e+06."""
    return f"{number:g}".replace("e+0", "e").replace("e-0", "e-")


def at_least(
    low: float, special: Mapping[float, str] | None = None, unit: str = "", why: str = ""
) -> Interval:
    """Return [low, inf): every finite number from `low` on."""
    return Interval(low, math.inf, open_high=True, special=special or {}, unit=unit, why=why)


def above(
    low: float, special: Mapping[float, str] | None = None, unit: str = "", infinite: bool = False
) -> Interval:
    """Return (low, inf), or with `infinite` (low, inf]."""
    return Interval(
        low, math.inf, open_low=True, open_high=not infinite, special=special or {}, unit=unit
    )


def within(
    low: float, high: float, special: Mapping[float, str] | None = None, why: str = ""
) -> Interval:
    """Return [low, high)."""
    return Interval(low, high, open_high=True, special=special or {}, why=why)


def between(low: float, high: float) -> Interval:
    """Return (low, high)."""
    return Interval(low, high, open_low=True, open_high=True)


@dataclass(frozen=True)
class Such:
    """The values for which `test` says yes."""

    words: str
    test: Callable[[Any], bool]
    told: bool = True

    def holds(self, value: Any) -> bool:
        """Say whether `test` says yes."""
        return self.test(value)

    def tell_expected(self, value: Any) -> str:
        """Return the values in words."""
        return self.words


class SumToOne:
    """Shares of a whole, or none."""

    words = "shares that sum to 1"
    told = True

    def holds(self, shares: Sequence[float]) -> bool:
        """Say whether they sum to 1, but for rounding."""
        return not shares or abs(sum(shares) - 1) < 1e-6

    def tell_expected(self, shares: Sequence[float]) -> str:
        """Say to what they sum."""
        return f"{self.words}, not {sum(shares):g}"


def names_a_folder(name: str) -> bool:
    """Say whether a study's name can be part of a folder's name; the empty one is the file's."""
    whole = not {"/", "\\"} & set(name) and name not in (".", "..")
    return whole and name.isprintable() and len(name.encode("utf-8", "replace")) <= MOST_BYTES


MOST_BYTES = 200
"""Bytes of a study's name: file systems end names at 255."""


def is_day(text: str) -> bool:
    """Say whether a text is an ISO date."""
    try:
        return len(text) == 10 and bool(date.fromisoformat(text))
    except ValueError:
        return False


def _is_low_high(ends: tuple[float, ...]) -> bool:
    return len(ends) in (0, 2)


def _is_ordered(ends: tuple[float, ...]) -> bool:
    return len(ends) != 2 or -math.inf < ends[0] < ends[1] < math.inf


def _fits_float32(ends: tuple[float, ...]) -> bool:
    return all(abs(end) <= LARGEST for end in ends)


LARGEST = 3e38
"""Largest end of a range: about what float32 has."""

FOLDER_NAME = Such(
    f"a printable name without slashes, of at most {MOST_BYTES} bytes: runs are named by it",
    names_a_folder,
)
DAY = Such("such as 2024-01-01", lambda text: not text or is_day(text), told=False)
THRESHOLD = Such(
    "a number in (0, 1), 'prevalence', 'sensitivity>=S' or 'youden'",
    lambda text: decision.parse(text) is not None,
    told=False,
)
RANGE_ENDS = (
    Such("[low, high]", _is_low_high, told=False),
    Such("low below high", _is_ordered),
    Such("ends within 3e38, as float32 has", _fits_float32),
)
FINITE = Such("a number", math.isfinite, told=False)
NOT_ZERO = Such("a finite number but 0", lambda number: math.isfinite(number) and number != 0)


def each_once(what: str) -> Such:
    """Return the lists that name nothing twice; `what` is an item in words."""
    return Such(f"each {what} once", lambda items: len(set(items)) == len(items))


NO_EMPTY_NAME = Such("no empty name", all)
SHARES = (Such("shares above 0", lambda shares: all(share > 0 for share in shares)), SumToOne())
