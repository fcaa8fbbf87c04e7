"""TOML values become the fields of dataclasses: any tables, by the types of their keys."""

import dataclasses
import tomllib
import types
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from medfed.core import toml
from medfed.core.checks import StudyError, closest, nearest
from medfed.core.refusals import LEAVE_OUT, Refusal
from medfed.core.toml import Ask

_T = TypeVar("_T")


def put(tables: dict[str, Any], path: toml.Path, value: Any) -> None:
    """Set one value in plain tables, a blank as it is refused; LEAVE_OUT takes the key out."""
    *parents, last = path
    place = tables
    for name in parents:
        place = place.setdefault(name, {})
        if not isinstance(place, dict):
            raise StudyError(f"unknown key {toml.key(*path)!r}; {name!r} is a value, not a table")
    if value is LEAVE_OUT:
        place.pop(last, None)
    else:
        place[last] = deepcopy(value.blank if isinstance(value, Ask) else value)


def parse_value(text: str) -> Any:
    """Read a command-line value as TOML; what is not TOML is a string."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def read_tables_as(kind: type[_T], tables: Mapping[str, Any]) -> "tuple[_T | None, list[Refusal]]":
    """Read plain tables into a dataclass, None where they are none,
    and return what cannot be used of them.
    """
    reader = _Reader([])
    read = reader.read(kind, tables, ())
    if read is _UNREAD:
        return None, reader.refusals
    return read, reader.refusals


def read_as(kind: type[_T], tables: Mapping[str, Any]) -> "tuple[_T, list[Refusal]]":
    """Read plain tables into a dataclass as a study's are read, and return what stands against its
    keys and values.
    """
    read, refusals = read_tables_as(kind, tables)
    return (kind() if read is None else read), refusals


def written(tables: Mapping[str, Any], prefix: str = "") -> frozenset[str]:
    """Return the dotted keys of all values, and of the tables that they lie in."""
    found: set[str] = set()
    for name, value in tables.items():
        found.add(prefix + name)
        if isinstance(value, Mapping):
            found |= written(value, f"{prefix}{name}.")
    return frozenset(found)


_hints = cache(get_type_hints)

_UNREAD: Any = object()
"""What cannot be read."""


@dataclass(frozen=True)
class _Reader:
    """Converts TOML values to fields' types, and keeps what cannot be read."""

    refusals: list[Refusal]

    def read(self, kind: Any, value: Any, path: toml.Path) -> Any:
        """Return a TOML value in a field's type, or _UNREAD, with a refusal that names its key."""
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return self._read_table(kind, value, path)

        origin = get_origin(kind)
        arguments = get_args(kind)
        if origin is Literal:
            if value in arguments:
                return value
            close = closest(value, arguments) if isinstance(value, str) else None
            return self._refuse(path, value, f"one of {', '.join(map(repr, arguments))}", close)
        if origin is dict:
            if not isinstance(value, Mapping):
                return self._refuse(path, value, f"a table [{toml.key(*path)}]")
            items = {
                name: self.read(arguments[1], item, (*path, name)) for name, item in value.items()
            }
            return {name: item for name, item in items.items() if item is not _UNREAD}
        if origin is tuple:
            listed = [value] if isinstance(value, str) else value
            if not isinstance(listed, Sequence):
                return self._refuse(path, value, "a list")
            read = tuple(self.read(arguments[0], item, path) for item in listed)
            if any(item is _UNREAD for item in read):
                return _UNREAD
            return read
        if origin in (Union, types.UnionType):
            raise AssertionError(f"{path}: union types are not read")
        return self._read_scalar(kind, value, path)

    def _read_table(self, kind: Any, value: Any, path: toml.Path) -> Any:
        if not isinstance(value, Mapping):
            return self._refuse(path, value, f"a table [{toml.key(*path)}]")
        hints = _hints(kind)
        known = {f.name for f in dataclasses.fields(kind) if not f.metadata.get("hidden")}
        fields = {
            name: self.read(hints[name], value[name], (*path, name))
            for name in value
            if name in known
        }

        for name in value:
            if name in known:
                continue
            meant = closest(name, known)
            error = StudyError(f"unknown key {toml.key(*path, name)!r}; {nearest(name, known)}")
            if meant is None or meant in value:
                self.refusals.append(Refusal(error))
            else:
                self.refusals.append(
                    Refusal(error, {(*path, name): LEAVE_OUT, (*path, meant): value[name]})
                )
                fields[meant] = _Reader([]).read(hints[meant], value[name], (*path, meant))
        return kind(**{name: item for name, item in fields.items() if item is not _UNREAD})

    def _read_scalar(self, kind: Any, value: Any, path: toml.Path) -> Any:
        if kind is Any:
            return value
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
            whole = isinstance(value, float) and value.is_integer()
            # `positive = 1`, or 1.0, means the label "1"
            return str(int(value) if whole else value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return self._refuse(path, value, "a number" if kind in (int, float) else kind.__name__)
        return value

    def _refuse(self, path: toml.Path, value: Any, expected: str, close: str | None = None) -> Any:
        mend = {path: close} if close else {}
        self.refusals.append(
            Refusal(StudyError(f"{toml.key(*path)}={value!r}; expected {expected}"), mend)
        )
        return _UNREAD
