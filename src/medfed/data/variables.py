"""What is publicly known of usual clinical variables. The facts are in clinical.toml."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from typing import Any

from medfed.core.checks import StudyError, nearest
from medfed.data import units
from medfed.data.units import Conversion
from medfed.study import Feature

LOINC_NOTICE = (
    "This material contains content from LOINC (http://loinc.org). LOINC is copyright © "
    "Regenstrief Institute, Inc. and the Logical Observation Identifiers Names and Codes (LOINC) "
    "Committee and is available at no cost under the license at http://loinc.org/license. LOINC® "
    "is a registered United States trademark of Regenstrief Institute, Inc."
)
"""The notice that LOINC's licence asks of whoever shows its codes."""

SOURCES = {
    "limits": "limits of measurement and of survival, rounded outwards",
    "arithmetic": "what a share or a ratio can be",
    "definition": "the score's own definition",
    "device": "what devices can be set to, rounded outwards",
}
"""Where the ends of a range come from."""


@dataclass(frozen=True, eq=False)
class Variable:
    """A clinical variable: `range` is in the first of its usual `units`, `molar_mass` in g/mol."""

    name: str
    group: str
    doc: str
    units: tuple[str, ...]
    range: tuple[Fraction, Fraction]
    source: str
    names: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    log: bool = False
    whole: bool = False
    molar_mass: Fraction | None = None
    valence: int = 0
    factors: Mapping[str, Conversion] = field(default_factory=dict)
    loinc: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def conversion(self, unit: str, into: str) -> Conversion:
        """Return the exact conversion of this variable's numbers from one unit into another.

        Raises StudyError where either is no unit of this variable: creatinine has no mmHg.
        """
        return self._from_first(unit).back().then(self._from_first(into))

    def measured_in(self, unit: str) -> bool:
        """Say whether a unit is one of this variable, usual or not."""
        try:
            self._from_first(unit)
        except StudyError:
            return False
        return True

    def usual_in(self, unit: str) -> bool:
        """Say whether a unit is a usual one of this variable, or another name of one."""
        usual = [*self.units, *self.factors, *([_CHARGE] if self.valence else [])]
        return self.measured_in(unit) and any(
            self.conversion(unit, own) == Conversion(Fraction(1)) for own in usual
        )

    def range_in(self, unit: str) -> tuple[float, float]:
        """Return the plausible range in a unit;
        other than in the first, three digits, rounded outwards.
        """
        low, high = self.range
        if unit == self.units[0]:
            return float(low), float(high)
        convert = self._from_first(unit)
        return _outwards(convert(low), -1), _outwards(convert(high), 1)

    def feature(self, unit: str) -> Feature:
        """Return this variable in a unit as an entry of a study's dictionary."""
        return _entry(self, unit)

    def _from_first(self, unit: str) -> Conversion:
        if unit in self.factors:
            return self.factors[unit]
        if unit == _CHARGE and self.valence:
            return self._from_first("mmol/L").then(Conversion(Fraction(self.valence)))
        return units.conversion(self.units[0], unit, self.molar_mass)


_CHARGE = "mEq/L"


@cache
def variables() -> tuple[Variable, ...]:
    """Return all variables, in the order of the file."""
    groups = units.facts("clinical.toml")
    return tuple(
        _variable(group, name, entry)
        for group, table in groups.items()
        for name, entry in table.items()
    )


def conversion(variable: str, unit: str, into: str) -> Conversion:
    """Return the exact conversion of a variable, by name, from one unit into another.

    Raises StudyError naming what is not known.
    """
    known = {each.name: each for each in variables()}
    if variable not in known:
        raise StudyError(
            f"variable={variable!r} is not in the clinical dictionary; {nearest(variable, known)}"
        )
    return known[variable].conversion(unit, into)


def _variable(group: str, name: str, entry: dict[str, Any]) -> Variable:
    """Read one entry of clinical.toml."""
    lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    low, high = map(Fraction, entry["range"])
    factors = {unit: _factor(given) for unit, given in entry.get("factors", {}).items()}
    mass = Fraction(entry["molar_mass"]) if "molar_mass" in entry else None
    return Variable(
        name,
        group,
        **{**entry, **lists, "range": (low, high), "factors": factors, "molar_mass": mass},
    )


def _factor(given: Any) -> Conversion:
    """Read a factor, or [factor, offset]."""
    parts = given if isinstance(given, list) else [given]
    return Conversion(*map(Fraction, parts))


@cache
def _entry(variable: Variable, unit: str) -> Feature:
    """Return a variable in a unit; there are few of both, and many columns."""
    return Feature(range=variable.range_in(unit), log=variable.log, unit=unit, doc=variable.doc)


def _outwards(value: Fraction, side: int) -> float:
    """Return a value of three digits, not below (side 1) or not above (side -1) the given one."""
    if value == 0:
        return 0.0
    step = Fraction(10) ** (math.floor(math.log10(abs(value))) - 2)
    return float(step * (math.ceil(value / step) if side > 0 else math.floor(value / step)))
