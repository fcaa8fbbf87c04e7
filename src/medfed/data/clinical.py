"""The clinical dictionary: what is publicly known of usual variables, found by a column's name.

The facts are in clinical.toml, what they are and are not in docs/clinical-dictionary.md. A wrong range clips real
values in silence, so a name that may be something else is not known here: `alt` is German for old, `na` is missing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from typing import Any

from medfed.data import units
from medfed.data.units import Conversion
from medfed.study import Feature

LOINC_NOTICE = (
    "This material contains content from LOINC (http://loinc.org). LOINC is copyright © Regenstrief Institute, Inc. "
    "and the Logical Observation Identifiers Names and Codes (LOINC) Committee and is available at no cost under the "
    "license at http://loinc.org/license. LOINC® is a registered United States trademark of Regenstrief Institute, Inc."
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
    factors: Mapping[str, Conversion] = field(default_factory=dict)
    loinc: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    def conversion(self, unit: str, into: str) -> Conversion:
        """Return the exact conversion of this variable's numbers from one unit into another.

        Raises ValueError where either is no unit of this variable: creatinine has no mmHg.
        """
        return self._from_first(unit).back().then(self._from_first(into))

    def measured_in(self, unit: str) -> bool:
        """Say whether a unit is one of this variable, usual or not."""
        try:
            self._from_first(unit)
        except ValueError:
            return False
        return True

    def usual_in(self, unit: str) -> bool:
        """Say whether a unit is a usual one of this variable, or another name of one."""
        usual = (*self.units, *self.factors)
        return self.measured_in(unit) and any(self.conversion(unit, own) == Conversion(Fraction(1)) for own in usual)

    def range_in(self, unit: str) -> tuple[float, float]:
        """Return the plausible range in a unit; other than in the first, three digits, rounded outwards."""
        low, high = self.range
        if unit == self.units[0]:
            return float(low), float(high)
        convert = self._from_first(unit)
        return _outwards(convert(low), -1), _outwards(convert(high), 1)

    def feature(self, unit: str) -> Feature:
        """Return this variable in a unit as an entry of a study's dictionary."""
        return _entry(self, unit)

    def _from_first(self, unit: str) -> Conversion:
        return self.factors.get(unit) or units.conversion(self.units[0], unit, self.molar_mass)


@dataclass(frozen=True)
class Match:
    """What a column's name says: a variable, or the few that it may be; a unit, if any; what else stood there."""

    variables: tuple[Variable, ...]
    unit: str
    stripped: tuple[str, ...]

    @property
    def variable(self) -> Variable | None:
        """The variable, where the name leaves no choice."""
        return self.variables[0] if len(self.variables) == 1 else None


@cache
def variables() -> tuple[Variable, ...]:
    """Return all variables, in the order of the file."""
    groups = units.facts("clinical.toml")
    return tuple(_variable(group, name, entry) for group, table in groups.items() for name, entry in table.items())


def lookup(column: str) -> Match | None:
    """Return what a column's name says, or None where that is not certain.

    Case, accents, separators and camel case mean nothing. A unit, a statistic that stays within the range ("mean",
    "max", "first"), a time ("24h", "admission") and a specimen that fits are taken off. Any other word, such as
    "delta", "sd" or "count", makes it another variable: None. So does a unit that the variable does not have.
    """
    inside = _BRACKETS.findall(column)
    if len(inside) != 1:
        return _read(units.words(column), letters=2)
    outside = units.words(_BRACKETS.sub(" ", column))
    whole = [*outside, *units.words(inside[0])]
    return _read(whole, letters=1) or _confirmed(_read(outside, letters=2), units.key(inside[0]))


def proposal(column: str, median: float | None = None) -> tuple[Feature, ...]:
    """Return the dictionary entry of a column: one where its name is certain, several for a person to choose from.

    Several, where the name carries no unit and ranges differ, or where it may be either of two variables; each entry
    says its unit. None: the name is not known here. A public median ranks them, the likeliest first; it decides
    nothing. Under a privacy claim never pass one: it would be a patient's.
    """
    found = lookup(column)
    if found is None:
        return ()
    entries: dict[tuple[str, tuple[float, ...]], Feature] = {}
    for variable in found.variables:
        for unit in (found.unit,) if found.unit else variable.units:
            entry = variable.feature(unit)
            entries.setdefault((variable.name, entry.range), entry)

    if median is None:
        return tuple(entries.values())
    return tuple(sorted(entries.values(), key=lambda entry: _strangeness(median, entry)))


def conversion(variable: str, unit: str, into: str) -> Conversion:
    """Return the exact conversion of a variable, by name, from one unit into another.

    Raises ValueError naming what is not known.
    """
    for known in variables():
        if known.name == variable:
            return known.conversion(unit, into)
    raise ValueError(f"variable={variable!r} is not in the clinical dictionary; expected a name that it lists")


# ---------------------------------------------------------------------------------------- from facts to variables


def _variable(group: str, name: str, entry: dict[str, Any]) -> Variable:
    """Read one entry of clinical.toml."""
    lists = {key: tuple(value) for key, value in entry.items() if isinstance(value, list)}
    low, high = map(Fraction, entry["range"])
    factors = {unit: _factor(given) for unit, given in entry.get("factors", {}).items()}
    mass = Fraction(entry["molar_mass"]) if "molar_mass" in entry else None
    return Variable(name, group, **{**entry, **lists, "range": (low, high), "factors": factors, "molar_mass": mass})


def _factor(given: Any) -> Conversion:
    """Read a factor, or [factor, offset]."""
    parts = given if isinstance(given, list) else [given]
    return Conversion(*map(Fraction, parts))


@cache
def _entry(variable: Variable, unit: str) -> Feature:
    """Return a variable in a unit; there are few of both, and many columns."""
    return Feature(range=variable.range_in(unit), log=variable.log, unit=unit, doc=variable.doc)


def _outwards(value: Fraction, side: int) -> float:
    """Return a value of three digits that is not below (side 1) or not above (side -1) the given one."""
    if value == 0:
        return 0.0
    step = Fraction(10) ** (math.floor(math.log10(abs(value))) - 2)
    return float(step * (math.ceil(value / step) if side > 0 else math.floor(value / step)))


def _strangeness(median: float, entry: Feature) -> float:
    """Say how far a median lies from the middle of an entry's range: 0 in it, above 1 outside the range."""
    low, high = entry.range
    if entry.log and median > 0:
        low, high, median = math.log(low), math.log(high), math.log(median)
    return abs(2 * (median - low) / (high - low) - 1)


# ---------------------------------------------------------------------------------------- from a name to variables


@cache
def _named() -> Mapping[str, tuple[Variable, ...]]:
    """Return the variables by the keys of the names that need no unit."""
    found: dict[str, tuple[Variable, ...]] = {}
    for variable in variables():
        unsure = {each for name in variable.short for each in _keys(name)}
        own = {variable.name, *variable.names, *variable.shared}
        for each in {each for name in own for each in _keys(name)} - unsure:
            found[each] = (*found.get(each, ()), variable)
    return found


@cache
def _named_with_unit() -> Mapping[str, tuple[Variable, ...]]:
    """Return the variables by the keys of all names, which a unit beside them makes certain."""
    found = dict(_named())
    for variable in variables():
        for each in {each for name in variable.short for each in _keys(name)}:
            found[each] = (*found.get(each, ()), variable)
    return found


def _keys(name: str) -> set[str]:
    """Return the keys of a name: Größe is also written Groesse."""
    spelt_out = name.casefold()
    for umlaut, letters in (("ä", "ae"), ("ö", "oe"), ("ü", "ue")):
        spelt_out = spelt_out.replace(umlaut, letters)
    return {units.key(name), units.key(spelt_out)}


_BRACKETS = re.compile(r"[\[(]([^\[\]()]*)[\])]")
_LONGEST_UNIT = 6  # words: mL/min/1.73m² has five, and its capital makes six
_LONGEST_AFFIX = 3  # words: in the blood

_TIME = re.compile(
    r"(first|last|erste|letzte)?"
    r"(\d+(st)?(h|hr|hrs|hours?|std|d|days?|weeks?|months?)|(h|hour|d|day|tag|week|visit)\d+|t0)"
)


@cache
def _affixes() -> Mapping[str, frozenset[str]]:
    """Return by word the groups beside whose variables it may stand."""
    found: dict[str, frozenset[str]] = {}
    for table in units.facts("column_words.toml").values():
        groups = frozenset(table.get("of", _groups()))
        for each in {each for word in table["words"] for each in _keys(word)}:
            found[each] = found.get(each, frozenset()) | groups
    return found


@cache
def _groups() -> frozenset[str]:
    """Return the groups of all variables."""
    return frozenset(variable.group for variable in variables())


def _beside(word: str) -> frozenset[str]:
    """Return the groups beside whose variables a word or a time may stand; none where it makes them others."""
    return _affixes().get(word) or (_groups() if _TIME.fullmatch(word) else frozenset())


def _read(left: list[str], letters: int) -> Match | None:
    """Take words off a name, from its end first, until what is left is known.

    A unit of fewer `letters` makes no uncertain name certain: eta_a is no age, "Età (a)" is.
    """
    measured: tuple[units.Unit, ...] = ()
    clear = False
    taken: list[str] = []

    while left:
        found = _known("".join(left), measured, clear, taken)
        if found:
            return found

        affix, (unit, meant) = _affix_at_end(left), _unit_at_end(left)
        if unit > affix and not measured:
            measured = meant
            clear = left[-1] == "%" or len("".join(left[-unit:])) >= letters
            left = left[:-unit]
        elif affix:
            taken.append("".join(left[-affix:]))
            left = left[:-affix]
        else:
            affix = _affix_at_start(left)
            if not affix:
                return None
            taken.append("".join(left[:affix]))
            left = left[affix:]
    return None


def _confirmed(found: Match | None, abbreviation: str) -> Match | None:
    """Return what was found where an abbreviation in brackets behind it says the same: Prothrombin time (PT)."""
    if found is None:
        return None
    both = tuple(variable for variable in _named_with_unit().get(abbreviation, ()) if variable in found.variables)
    return replace(found, variables=both) if both else None


def _known(name: str, measured: tuple[units.Unit, ...], clear: bool, taken: list[str]) -> Match | None:
    """Return the variables of a bare name that have the unit, and that the words taken off can be said of.

    A unit makes an uncertain name certain only where it is clear and usual: pt_sec is a prothrombin time, pt_days not.
    """
    named = _named()
    meant = [variable for variable in named.get(name, ()) if _bears(variable, taken)]
    if not measured:
        return Match(tuple(meant), "", tuple(taken)) if meant else None

    certain = len(named.get(name, ())) == 1
    if not certain and not clear:
        return None
    if not certain:
        meant = [variable for variable in _named_with_unit().get(name, ()) if _bears(variable, taken)]
    fits = [
        (variable, unit.name)
        for variable in meant
        for unit in measured
        if (variable.measured_in(unit.name) if certain else variable.usual_in(unit.name))
    ]
    return Match(tuple(variable for variable, _ in fits), fits[0][1], tuple(taken)) if fits else None


def _bears(variable: Variable, taken: list[str]) -> bool:
    """Say whether the words taken off leave a variable what it is."""
    if variable.whole:
        return not taken
    return all(variable.group in _beside(word) for word in taken)


def _unit_at_end(left: list[str]) -> tuple[int, tuple[units.Unit, ...]]:
    """Return how many words at the end are a unit, and which it may be; the longest counts, and a name is left."""
    for cut in range(min(_LONGEST_UNIT, len(left) - 1), 0, -1):
        meant = units.spelt().get("".join(left[-cut:]))
        if meant:
            preposition = left[-cut - 1] == "in" and len(left) > cut + 1  # Größe in cm
            return cut + preposition, meant
    return 0, ()


def _affix_at_end(left: list[str]) -> int:
    """Return how many words at the end may be taken off; a name is left."""
    cuts = range(min(_LONGEST_AFFIX, len(left) - 1), 0, -1)
    return next((cut for cut in cuts if _beside("".join(left[-cut:]))), 0)


def _affix_at_start(left: list[str]) -> int:
    """Return how many words at the start may be taken off; a name is left."""
    cuts = range(min(_LONGEST_AFFIX, len(left) - 1), 0, -1)
    return next((cut for cut in cuts if _beside("".join(left[:cut]))), 0)
