"""Units of measurement: how they are written, what one is of another. Facts are in units.toml."""

import re
import tomllib
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from medfed.core.checks import StudyError, nearest


@dataclass(frozen=True)
class Unit:
    """One unit: `scale` is how much of its kind's base it is."""

    name: str
    kind: str
    scale: Fraction


class Conversion(NamedTuple):
    """From one unit into another: value times factor, plus offset. Both are exact."""

    factor: Fraction
    offset: Fraction = Fraction(0)

    def __call__(self, value: Fraction) -> Fraction:
        """Return the value in the other unit."""
        return self.factor * value + self.offset

    def back(self) -> "Conversion":
        """Return the way back."""
        return Conversion(1 / self.factor, -self.offset / self.factor)

    def then(self, after: "Conversion") -> "Conversion":
        """Return this conversion with another behind it."""
        return Conversion(self.factor * after.factor, after(self.offset))


def facts(name: str) -> dict[str, Any]:
    """Read a file of facts beside this module;
    a number with a point is the fraction that is written there.
    """
    text = Path(__file__).with_name(name).read_text(encoding="utf-8")
    return tomllib.loads(text, parse_float=Fraction)


@cache
def units() -> Mapping[str, Unit]:
    """Return all units by name."""
    tables = facts("units.toml")
    del tables["spellings"]
    return {
        name: Unit(name, kind, Fraction(scale))
        for kind, table in tables.items()
        for name, scale in table.items()
    }


@cache
def units_by_spelling() -> Mapping[str, tuple[Unit, ...]]:
    """Return the units that a spelling may mean, by its `key`: lpm is litres or beats a minute."""
    found: dict[str, tuple[Unit, ...]] = {}
    more = facts("units.toml")["spellings"]
    for unit in units().values():
        for spelling in _spellings(unit.name, more.get(unit.name, ())):
            if spelling and unit not in found.get(spelling, ()):
                found[spelling] = (*found.get(spelling, ()), unit)
    return found


def conversion(unit: str, into: str, molar_mass: Fraction | None = None) -> Conversion:
    """Return how a number in one unit becomes one in another;
    mass and substance need a molar mass in g/mol.

    Raises StudyError where a unit is unknown, or no number of one is one of the other.
    """
    known = units()
    for name in (unit, into):
        if name not in known:
            raise StudyError(f"unit={name!r} is not known; {nearest(name, filter(None, known))}")
    source = known[unit]
    target = known[into]
    ratio = source.scale / target.scale

    if source.kind == target.kind:
        return Conversion(ratio)
    if molar_mass and (source.kind, target.kind) == ("mass_per_volume", "substance_per_volume"):
        return Conversion(ratio / molar_mass)
    if molar_mass and (source.kind, target.kind) == ("substance_per_volume", "mass_per_volume"):
        return Conversion(ratio * molar_mass)
    raise StudyError(
        f"unit={unit!r} into {into!r}; expected units of one kind, not {source.kind} and "
        f"{target.kind}"
    )


def apart(texts: Iterable[str]) -> list[list[str]]:
    """Return what stands behind numbers, parted by what it means: units of one size are one.

    What is no known unit is another than all else; case, dots and blanks make no other.
    """
    found: list[tuple[set[object], list[str]]] = []
    for text in texts:
        meant: set[object] = {
            (unit.kind, unit.scale) for unit in units_by_spelling().get(key(text), ())
        } or {key(text) or text}
        both = next((pair for pair in found if pair[0] & meant), None)
        if both is None:
            found.append((meant, [text]))
        else:
            both[0].intersection_update(meant)
            both[1].append(text)
    return [spellings for _, spellings in found]


def differ(one: str, other: str) -> bool:
    """Say whether two names of columns end in different units: Kreatinin
    (µmol/l), kreatinin_mg_dl.
    """
    ends = _end(one), _end(other)
    return all(ends) and len(apart(ends)) > 1


def _end(name: str) -> str:
    """Return the unit that a name ends in; "" for none."""
    parts = words(name)
    ends = ("".join(parts[start:]) for start in range(1, len(parts)))
    return next((end for end in ends if end in units_by_spelling()), "")


def words(text: str) -> list[str]:
    """Return the words of a name, whatever its case, accents, separators and camel case:
    HeartRate_max, Größe [cm].

    A slash with nothing before it is "per"; %, ° and letters that are no Latin ones are kept.
    """
    flat = text if text.isascii() else _ascii(text)
    return _WORD.findall(_CAMEL.sub(" ", _LEADING_SLASH.sub("per ", flat)).casefold())


def key(text: str) -> str:
    """Return what two spellings of one name share."""
    return "".join(words(text))


_LEADING_SLASH = re.compile(r"(?:(?<=^)|(?<=[\s\[(]))/")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_WORD = re.compile(r"[^\W_]+|[%°]")


def _ascii(text: str) -> str:
    """Return a text without accents, its micro signs as u; other scripts stay."""
    parts = unicodedata.normalize("NFKD", text.replace("µ", "u"))
    return "".join(sign for sign in parts if not unicodedata.combining(sign)).replace("μ", "u")


def _spellings(name: str, more: tuple[str, ...]) -> set[str]:
    """Return the keys of a unit's name and its other spellings."""
    texts = {name, *more}
    texts |= {text.replace("/", " per ") for text in texts if not text.startswith("/")}
    texts |= {text.replace("µ", micro) for text in texts for micro in ("mc", "mic", "micro")}
    return {key(text) for text in texts}
