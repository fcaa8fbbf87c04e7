"""Which features the data dictionary describes, and the blanks that describe the others."""

from collections.abc import Mapping, Sequence

from medfed.core import toml
from medfed.core.toml import Ask
from medfed.study.blanks import CATEGORIES, FEATURE, RANGE
from medfed.study.keys import Feature

KINDS = ("numbers", "texts")
"""In data.features: every column of the kind."""


def is_pattern(name: str) -> bool:
    """Say whether an entry of data.features or data.exclude stands for many columns."""
    return "*" in name or "?" in name or name in KINDS


def described(feature: Feature) -> bool:
    """Say whether it is publicly known what may stand in a column."""
    return bool(feature.range or feature.categories or feature.boolean)


def describe(names: Sequence[str], dictionary: Mapping[str, Feature]) -> dict[toml.Path, Ask]:
    """Return the blanks that describe these features: a line each, or two keys more where an entry
    is there already.
    """
    blanks: dict[toml.Path, Ask] = {}
    for name in names:
        path = ("data", "dictionary", name)
        if dictionary.get(name, Feature()) == Feature():
            blanks[path] = FEATURE
        else:
            blanks |= {(*path, "range"): RANGE, (*path, "categories"): CATEGORIES}
    return blanks
