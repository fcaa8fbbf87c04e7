"""Which columns of a table are features, and which of them nothing public bounds: from the study
and column names.
"""

import re
from collections.abc import Sequence
from dataclasses import replace

from medfed.study import KINDS, Data, Feature, Study, described, is_pattern


def features_of(columns: Sequence[str], data: Data) -> list[str]:
    """Return the feature columns of a table:
    those that the study lists, else all that are nothing else.

    A pattern takes what it matches; what is excluded is none, and what is made beside a feature is
    one with it.
    """
    known = set(columns)
    none = no_features(data)
    chosen: list[str] = []
    for asked in data.features or ("*",):
        if asked in known or not is_pattern(asked):
            chosen.append(asked)
            made = limit_columns(asked, data.dictionary.get(asked, Feature()))
            chosen += [name for name in made if name in known]
        else:
            chosen += [name for name in matching(asked, columns) if name not in none]
    out = excluded_columns(columns, data)
    return [name for name in dict.fromkeys(chosen) if name not in out]


def no_features(data: Data) -> set[str]:
    """Return the columns that are something else: target, site, patient, test, and dates that
    become no number.
    """
    roles = {data.target, data.site, data.patient, data.test, data.time}
    roles |= {entry.reference for entry in data.dictionary.values() if entry.becomes}
    roles |= {name for name, entry in data.dictionary.items() if entry.date}
    numbers = {name for name, entry in data.dictionary.items() if entry.becomes}
    return (roles - numbers) | {data.target, data.site, data.patient, data.test}


def excluded_columns(columns: Sequence[str], data: Data) -> set[str]:
    """Return the columns that data.exclude names or matches."""
    return {
        name
        for asked in data.exclude
        for name in ([asked] if asked in columns else matching(asked, columns))
    }


def matching(pattern: str, columns: Sequence[str]) -> list[str]:
    """Return the columns that a pattern takes:
    * stands for any text, ? for a character; a kind may be any column.
    """
    if pattern in KINDS:
        return list(columns)
    wild = re.compile(
        "".join({"*": ".*", "?": "."}.get(part, re.escape(part)) for part in pattern), re.DOTALL
    )
    return [name for name in columns if wild.fullmatch(name)]


def limit_columns(name: str, feature: Feature) -> tuple[str, ...]:
    """Return the columns of 0 and 1 made beside one with detection limits: see `mapping`."""
    if feature.limits != "indicator":
        return ()
    return (f"{name} below limit", f"{name} above limit")


def open_columns(study: Study) -> tuple[str, ...]:
    """Return the numbers whose range noised counts of training patients are to find, sorted; none
    unless it is paid.

    Where `privacy.ranges_epsilon` pays, that is each feature that the dictionary does not describe.
    """
    data = study.data
    if not study.privacy.ranges_epsilon:
        return ()
    names = features_of(sorted(data.dictionary), data)
    return tuple(
        sorted(name for name in names if not described(data.dictionary.get(name, Feature())))
    )


def list_open(columns: Sequence[str], study: Study) -> Study:
    """Return the study with an entry in its dictionary for each feature of a table, where ranges
    are to be found.
    """
    data = study.data
    if not study.privacy.ranges_epsilon:
        return study
    entries = {
        name: Feature() for name in features_of(columns, data) if name not in data.dictionary
    }
    return replace(study, data=replace(data, dictionary={**data.dictionary, **entries}))
