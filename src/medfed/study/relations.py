"""What stands against a study's values:
out of the range that their key declares, or at odds with another key.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from medfed.core import toml
from medfed.core.checks import StudyError, some
from medfed.core.refusals import Refusal
from medfed.study.blanks import RANGE
from medfed.study.domains import Domain
from medfed.study.keys import CHOOSE, DEFAULT, Data, Feature, Privacy

if TYPE_CHECKING:
    from medfed.study.whole import Study

CHANGE_IT = "Change it in the study file or with --set."


def out_of_range(study: "Study") -> list[Refusal]:
    """Return what no plan could use: values out of their range, a key once."""
    found: dict[toml.Path, Refusal] = {}
    for path, refusal in (*beyond(study, ()), *_find_unrelated(study)):
        found.setdefault(path, refusal)
    return list(found.values())


def beyond(keys: Any, at: toml.Path) -> Iterator[tuple[toml.Path, Refusal]]:
    """Yield the path of each value that its key does not allow, and what is said of it.

    keys: a table of the study, or the whole of it; tables within are looked at too. at: the path of
    that table.
    """
    kind: Any = type(keys)
    for declared in _find_declared(kind):
        value = getattr(keys, declared.name)
        path = (*at, declared.name)

        if dataclasses.is_dataclass(value):
            yield from beyond(value, path)
        if each := declared.metadata.get("each"):
            yield from _entries_beyond(value, path, each, declared)
        if isinstance(value, Mapping):
            for name, entry in value.items():
                if dataclasses.is_dataclass(entry):
                    yield from beyond(entry, (*path, name))

        for domain in declared.metadata.get("domains", ()):
            if not domain.holds(value):
                yield _at(path, value, domain.tell_expected(value), _mend(declared))


@cache
def _find_declared(kind: Any) -> "tuple[dataclasses.Field[Any], ...]":
    """Return the keys of a table that say which values they may have, or hold tables that may."""
    fields = [one for one in dataclasses.fields(kind) if not one.metadata.get("hidden")]
    return tuple(one for one in fields if one.metadata.get("domains") or not _is_plain(one))


def _is_plain(declared: "dataclasses.Field[Any]") -> bool:
    """Say whether a key is no table."""
    return declared.default is not dataclasses.MISSING and not dataclasses.is_dataclass(
        declared.default
    )


def _mend(declared: "dataclasses.Field[Any]") -> Any:
    mend = declared.metadata["mend"]
    return declared.default if mend is DEFAULT else mend


def _at(path: toml.Path, value: Any, expected: str, mend: Any) -> tuple[toml.Path, Refusal]:
    """Return the path and the refusal of a value; `mend` takes its place, unless that is for a
    person to choose.
    """
    shown = list(value) if isinstance(value, tuple) else value
    error = StudyError(f"{toml.key(*path)}={shown!r}; expected {expected}. {CHANGE_IT}")
    return path, Refusal(error, {} if mend is CHOOSE else {path: mend})


def _entries_beyond(
    entries: Mapping[str, Any], path: toml.Path, each: Domain, declared: "dataclasses.Field[Any]"
) -> Iterator[tuple[toml.Path, Refusal]]:
    """Yield one refusal of all entries of a table that their key does not allow."""
    wrong = {name: value for name, value in entries.items() if not each.holds(value)}
    if not wrong:
        return

    first = next(iter(wrong))
    what = f"{toml.key(*path, first)}={wrong[first]!r}"
    if len(wrong) > 1:
        what = (
            f"{toml.key(*path)} of {len(wrong)} {declared.metadata['of']} "
            f"({some(map(repr, wrong))})"
        )
    error = StudyError(f"{what}; expected {each.tell_expected(wrong[first])}. {CHANGE_IT}")
    mend = declared.metadata["mend"]
    yield path, Refusal(error, {(*path, name): mend for name in wrong})


# what relates two keys ----------------------------------------------------------------------------


def _find_unrelated(study: "Study") -> Iterator[tuple[toml.Path, Refusal]]:
    """Yield the path of each value that is at odds with another key's, and what is said of it."""
    form = study.data.format
    if form.thousands == form.decimal != "auto":
        expected = f"another sign than data.format.decimal={form.decimal!r}"
        yield _at(("data", "format", "thousands"), form.thousands, expected, "auto")

    for name in ("threshold_epsilon", "ranges_epsilon", "vote_epsilon"):
        part = getattr(study.privacy, name)
        if part and not part < study.privacy.epsilon:
            yield _at(
                ("privacy", name),
                part,
                "0 or a number below privacy.epsilon",
                getattr(Privacy(), name),
            )

    names = study.sites.names
    shares = study.sites.shares
    if len(names) != len(shares):
        yield _at(("sites", "shares"), shares, f"{len(names)} shares, one a name", CHOOSE)

    for name, feature in study.data.dictionary.items():
        for last, expected in _odds_of(feature, name, study.data):
            mend = RANGE if last == "range" else CHOOSE
            yield _at(("data", "dictionary", name, last), getattr(feature, last), expected, mend)


def _odds_of(feature: Feature, name: str, data: Data) -> Iterator[tuple[str, str]]:
    """Yield the keys of a feature that do not go with its others, and what is expected of each."""
    if feature.becomes and not feature.date:
        yield "becomes", 'date = "dd.mm.yyyy", or another form'

    counted = feature.becomes in ("age", "days since", "days until")
    if counted and not feature.reference:
        yield "reference", "a date, or a date column"
    if feature.reference and not counted:
        yield "reference", "none, unless becomes is age or days"

    converted = feature.limits or feature.factor != 1.0 or feature.offset != 0.0
    if sum(map(bool, (feature.boolean, feature.date, converted))) > 1:
        yield "boolean", "one of boolean, date, and limits with factor and offset"
    if feature.boolean and feature.range:
        yield "boolean", "no range beside it"
    if feature.limits == "indicator" and name == data.target:
        yield "limits", "'limit' or 'half': columns beside the target would give it away"

    if feature.log and not (len(feature.range) == 2 and feature.range[0] >= 0):
        yield "range", "[low, high] from 0 for log = true"
