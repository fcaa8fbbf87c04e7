"""What a study says of a table's columns, held against the table's header."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import pandas as pd

from medfed.core import toml
from medfed.core.checks import DataError, closest, nearest, some
from medfed.core.refusals import LEAVE_OUT, Refusal, refuse
from medfed.data import units
from medfed.data.features import features_of, matching, no_features
from medfed.study import KINDS, Data, Feature, is_pattern

_MOST_MISNAMED = 10  # columns that are looked up one by one for a name that they may mean


def feature_names(frame: pd.DataFrame, data: Data) -> list[str]:
    """Return the feature columns;
    raise DataError for the columns that the study names and the table lacks.
    """
    columns = [str(name) for name in frame.columns]
    refuse(refuse_misnamed(columns, data))
    return features_of(columns, data)


def refuse_misnamed(columns: Sequence[str], data: Data) -> Iterator[Refusal]:
    """Yield what a study says of a table's columns that its header does not bear out."""
    roles = {"target": data.target, "site": data.site, "patient": data.patient, "test": data.test}
    if not data.target:
        left = [name for name in columns if name not in (data.site, data.patient, data.test)]
        text = f"data.target is not set; expected the column to predict, one of: {some(left, 20)}"
        yield Refusal(DataError(text), {("data", "target"): toml.Ask("", "the column to predict")})

    for key, name in roles.items():
        if name and name not in columns:
            text = f"data.{key}={name!r} is no column of the table; {nearest(name, columns)}"
            close = closest(name, columns)
            yield Refusal(DataError(text), {("data", key): close} if close else {})

    known = set(columns)
    yield from _misnamed_features(columns, data)
    for key, name in roles.items():
        if name and name in data.features:
            left = [feature for feature in data.features if feature not in roles.values()]
            text = f"data.features holds {name!r}, which is data.{key}; take it out"
            yield Refusal(DataError(text), {("data", "features"): left})

    strange = [name for name in data.dictionary if name not in known]
    if len(strange) > _MOST_MISNAMED:
        text = (
            f"data.dictionary describes {len(strange)} columns that the table lacks: "
            f"{some(map(repr, strange))}"
        )
        yield Refusal(DataError(text))

    for name in strange[:_MOST_MISNAMED]:
        if name not in columns:
            where = toml.key("data", "dictionary", name)
            close = _meant(name, columns)
            mend: dict[toml.Path, object] = {}
            if close and close not in data.dictionary:
                mend = {("data", "dictionary", close): asdict(data.dictionary[name])}
            if mend or data.dictionary[name] == Feature():
                mend[("data", "dictionary", name)] = LEAVE_OUT
            yield Refusal(DataError(f"{where}: no such column; {_nearest(name, columns)}"), mend)

    if not features_of(columns, data):
        yield Refusal(
            DataError(
                "the table has no feature column; it needs one beside target, site and patient"
            )
        )


def _meant(name: str, columns: Sequence[str]) -> str | None:
    """Return the column that a misspelt name means: none that names another unit, which a range
    would be wrong for.
    """
    close = closest(name, columns)
    if close and units.differ(name, close):
        return None
    return close


def _nearest(name: str, columns: Sequence[str]) -> str:
    close = closest(name, columns)
    if close and close != _meant(name, columns):
        other = " It is in another unit: set range and factor anew."
    else:
        other = ""
    return f"{nearest(name, columns)}{other}"


def _misnamed_features(columns: Sequence[str], data: Data) -> Iterator[Refusal]:
    """Yield the names and patterns of data.features and data.exclude that take no column."""
    known = set(columns)
    strange = [
        name
        for name in data.features
        if name not in known and not (is_pattern(name) and matching(name, columns))
    ]
    close = {name: _meant(name, columns) for name in strange[:_MOST_MISNAMED]}
    features = [close.get(name) or name for name in data.features]
    for number, name in enumerate(data.features):
        if name in close:
            if is_pattern(name):
                what = "matches no column of the table"
            else:
                what = "is no column of the table"
            text = f"data.features[{number}]={name!r} {what}; {_nearest(name, columns)}"
            yield Refusal(DataError(text), {("data", "features"): features} if close[name] else {})
    if len(strange) > _MOST_MISNAMED:
        text = (
            f"data.features names {len(strange)} columns that the table lacks: "
            f"{some(map(repr, strange))}"
        )
        yield Refusal(DataError(text))

    left = [name for name in columns if name not in no_features(data)]
    for number, name in enumerate(data.exclude):
        if name in known or (is_pattern(name) and name not in KINDS and matching(name, left)):
            continue
        yield Refusal(
            DataError(
                f"data.exclude[{number}]={name!r} matches no column of the table; "
                f"{nearest(name, left)}"
            )
        )
    for name in data.exclude:
        if name in data.features:
            text = (
                f"data.features holds {name!r}, and data.exclude takes it out; keep one of the two"
            )
            yield Refusal(DataError(text))
        if name and name in (data.target, data.site, data.patient, data.test, data.time):
            yield Refusal(
                DataError(f"data.exclude holds {name!r}, which the study needs; take it out")
            )
    for name in data.features:
        entry = data.dictionary.get(name, Feature())
        if entry.date and not entry.becomes:
            where = toml.key("data", "dictionary", name, "becomes")
            text = (
                f"data.features holds {name!r}, a date; set {where} = 'age' (or days since, "
                "year, month, weekday)"
            )
            yield Refusal(DataError(text))
