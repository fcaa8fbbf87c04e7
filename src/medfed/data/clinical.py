"""The clinical dictionary: public facts of usual variables, proposed by a column's name.

What the facts are and are not is in docs/clinical-dictionary.md. A wrong range clips real values in
silence, so a name that may be something else is not known here: `alt` is German for old, `na` is
missing.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache

from medfed.data import units
from medfed.data.variables import LOINC_NOTICE, SOURCES, Variable, conversion, variables
from medfed.study import Feature

__all__ = [
    "LOINC_NOTICE",
    "SOURCES",
    "Match",
    "Variable",
    "conversion",
    "lookup",
    "may_be_in_several_units",
    "proposal",
    "variables",
]


@dataclass(frozen=True)
class Match:
    """What a column's name says: a variable, or the few that it may be;
    a unit, if any; what else stood there.
    """

    variables: tuple[Variable, ...]
    unit: str
    stripped: tuple[str, ...]

    @property
    def variable(self) -> Variable | None:
        """The variable, where the name leaves no choice."""
        if len(self.variables) == 1:
            return self.variables[0]
        return None


def lookup(column: str) -> Match | None:
    """Return what a column's name says, or None where that is not certain.

    Case, accents, separators and camel case mean nothing. A unit, a statistic that stays within the
    range ("mean", "max", "first"), a time ("24h", "admission") and a specimen that fits are taken
    off. Any other word, such as "delta", "sd" or "count", makes it another variable: None. So does
    a unit that the variable does not have.
    """
    inside = _BRACKETS.findall(column)
    if len(inside) != 1:
        return _read(units.words(column), letters=2)
    outside = units.words(_BRACKETS.sub(" ", column))
    whole = [*outside, *units.words(inside[0])]
    return _read(whole, letters=1) or _confirm_abbreviation(
        _read(outside, letters=2), units.key(inside[0])
    )


def proposal(column: str, median: float | None = None) -> tuple[Feature, ...]:
    """Return what a column's dictionary entry may be: one where its name is certain, several for a
    person to choose.

    Several, where the name carries no unit and ranges differ, or where it may be either of two
    variables; each entry says its unit. Empty: the name is not known here. A public median leaves
    out the ranges that it is not in, as codes or other units are not, and ranks the others, the
    likeliest first. Under a privacy claim never pass one: it would be the patients'.
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
    likely = [entry for entry in entries.values() if entry.range[0] <= median <= entry.range[1]]
    return tuple(sorted(likely, key=lambda entry: _strangeness(median, entry)))


@lru_cache(maxsize=65536)
def may_be_in_several_units(column: str) -> bool:
    """Say whether a column is a variable of the clinical dictionary, its unit not in its name."""
    return len({entry.unit for entry in proposal(column)}) > 1


def _strangeness(median: float, entry: Feature) -> float:
    """Say how far a median lies from the middle of an entry's range: 0 in it, 1 at its ends."""
    low, high = entry.range
    if entry.log:
        low = math.log(low)
        high = math.log(high)
        median = math.log(median)
    return abs(2 * (median - low) / (high - low) - 1)


# ---------------------------------------------------------------------------------------- from a
# name to variables


@cache
def _index_names() -> Mapping[str, tuple[Variable, ...]]:
    """Return the variables by the keys of the names that need no unit."""
    found: dict[str, tuple[Variable, ...]] = {}
    for variable in variables():
        unsure = {each for name in variable.short for each in _keys(name)}
        own = {variable.name, *variable.names, *variable.shared}
        for each in {each for name in own for each in _keys(name)} - unsure:
            found[each] = (*found.get(each, ()), variable)
    return found


@cache
def _index_names_with_unit() -> Mapping[str, tuple[Variable, ...]]:
    """Return the variables by the keys of all names, which a unit beside them makes certain."""
    found = dict(_index_names())
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
_LONGEST_UNIT = 8  # words: mL/min/1.73 m^2 has seven with its capital
_NO_UNIT = 0
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
    """Return the groups beside whose variables a word or a time may stand;
    none where it makes them others.
    """
    return _affixes().get(word) or (_groups() if _TIME.fullmatch(word) else frozenset())


def _read(words: list[str], letters: int) -> Match | None:
    """Take words off a name, from its end first, until what is left is known.

    A unit of fewer `letters` makes no uncertain name certain: eta_a is no age, "Età (a)" is.
    """
    left = words
    measured: tuple[units.Unit, ...] = ()
    clear = False
    taken: list[str] = []

    while left:
        found = _find_variables("".join(left), measured, clear, taken)
        if found:
            return found

        at_end = _affix_at_end(left)
        at_start = _affix_at_start(left)
        (unit, meant) = _unit_at_end(left)
        if unit > at_end and letters and not measured:
            measured = meant
            clear = left[-1] == "%" or len("".join(left[-unit:])) >= letters
            left = left[:-unit]
        elif at_end:
            taken.append("".join(left[-at_end:]))
            left = left[:-at_end]
        elif at_start:
            taken.append("".join(left[:at_start]))
            left = left[at_start:]
        else:
            break
    return _read(words, letters=_NO_UNIT) if measured else None  # mean_hr: no hours


def _confirm_abbreviation(found: Match | None, abbreviation: str) -> Match | None:
    """Return what was found where an abbreviation in brackets behind it says the same:
    Prothrombin time (PT).
    """
    if found is None:
        return None
    both = tuple(
        variable
        for variable in _index_names_with_unit().get(abbreviation, ())
        if variable in found.variables
    )
    if both:
        return replace(found, variables=both)
    return None


def _find_variables(
    name: str, measured: tuple[units.Unit, ...], clear: bool, taken: list[str]
) -> Match | None:
    """Return the variables of a bare name that have the unit,
    and that the words taken off can be said of.

    A unit makes an uncertain name certain only where it is clear and usual: pt_sec is a prothrombin
    time, pt_days not.
    """
    sure = _index_names().get(name, ())
    certain = len(sure) == 1
    meant = sure
    if measured and not certain:
        meant = _index_names_with_unit().get(name, ())
    if taken and any(variable.whole for variable in meant):
        return None
    meant = tuple(
        variable for variable in meant if all(variable.group in _beside(word) for word in taken)
    )

    if not measured:
        if meant:
            return Match(meant, "", tuple(taken))
        return None
    if not certain and not clear:
        return None
    fits = [
        (variable, unit.name)
        for variable in meant
        for unit in measured
        if (variable.measured_in(unit.name) if certain else variable.usual_in(unit.name))
    ]
    if fits:
        return Match(tuple(variable for variable, _ in fits), fits[0][1], tuple(taken))
    return None


def _unit_at_end(left: list[str]) -> tuple[int, tuple[units.Unit, ...]]:
    """Return how many words at the end are a unit, and which it may be;
    the longest counts, and a name is left.
    """
    for cut in range(min(_LONGEST_UNIT, len(left) - 1), 0, -1):
        meant = units.units_by_spelling().get("".join(left[-cut:]))
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
