"""TOML as people paste it: keys quoted where a name needs it,
values on one line, blanks with what they ask for.
"""

import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tomli_w

Path = tuple[str, ...]
"""The names of a dotted key, from the outermost table in."""


@dataclass(frozen=True)
class Ask:
    """A blank for what only a person knows:
    `blank` is refused until it is filled in, `what` says with what.
    """

    blank: Any
    what: str


def key(*names: str) -> str:
    """Return the dotted key of these names: data.dictionary."heart rate".range."""
    return ".".join(tomli_w.dumps({name: 0}).removesuffix(" = 0\n") for name in names)


def path(dotted: str) -> Path:
    """Return the names of a dotted key; what is no TOML is split at its dots."""
    try:
        value: Any = tomllib.loads(f"{dotted} = 0")
    except tomllib.TOMLDecodeError:
        return tuple(dotted.split("."))
    names: list[str] = []
    while isinstance(value, dict):
        ((name, value),) = value.items()
        names.append(name)
    return tuple(names)


def setting(text: str) -> tuple[str, str, str]:
    """Part "key=value" at the first equals sign that no quoted name of the key holds, as
    str.partition does.
    """
    places = (place for place, character in enumerate(text) if character == "=")
    place = next((place for place in places if _is_key(text[:place])), None)
    if place is None:
        return text.partition("=")
    return text[:place], "=", text[place + 1 :]


def _is_key(text: str) -> bool:
    """Say whether a text is a whole key, which an open quote keeps it from being."""
    try:
        tomllib.loads(f"{text} = 0")
    except tomllib.TOMLDecodeError:
        return not {'"', "'"} & set(text)
    return True


def explain_unreadable(text: str, error: tomllib.TOMLDecodeError) -> str:
    """Say why a text is no TOML: the line, and that a name needs quotes where that is why."""
    place = re.search(r"at line (\d+)", str(error))
    lines = text.splitlines()
    if place is None or not 0 < int(place[1]) <= len(lines):
        return str(error)
    line = lines[int(place[1]) - 1].strip()
    name = re.match(r"([^\s=\"'\[\]#.][^=\"'\[\]#]*?)\s*=", line) or re.match(
        r"\[+\s*([^\"']+?)\s*\]", line
    )
    names = [part.strip() for part in name[1].split(".")] if name else []
    wrong = next(
        (part for part in names if part and not re.fullmatch(r"[A-Za-z0-9_-]+", part)), None
    )
    hint = f". A name with other letters than A-Z needs quotes: {key(wrong)}" if wrong else ""
    return f"{error}: {line}{hint}"


def literal(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key(name)} = {literal(item)}" for name, item in value.items())
        if not inside:
            return "{}"
        return f"{{ {inside} }}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(literal, value))}]"
    return tomli_w.dumps({"a": value}).removeprefix("a = ").removesuffix("\n")


def nest(settings: Mapping[Path, Any]) -> dict[str, Any]:
    """Return settings by path as tables in tables."""
    tables: dict[str, Any] = {}
    for (*parents, last), value in settings.items():
        place = tables
        for name in parents:
            place = place.setdefault(name, {})
        place[last] = value
    return tables


def document(
    tables: Mapping[str, Any], notes: Mapping[Path, str] | None = None, at: Path = ()
) -> Iterator[str]:
    """Yield the lines of tables that may hold blanks (`Ask`);
    `notes` are said beside the value of their path.

    What a blank asks for stands above it, once for neighbours that ask alike.
    """
    inner = {name: value for name, value in tables.items() if _is_table(value)}
    leaves = {name: value for name, value in tables.items() if name not in inner}
    if at and (leaves or not inner):
        yield ""
        yield f"[{key(*at)}]"

    asked = ""
    for name, value in sorted(leaves.items(), key=lambda item: isinstance(item[1], Ask)):
        if isinstance(value, Ask):
            if value.what != asked:
                yield from _comment(value.what)
            asked = value.what
            yield f"{key(name)} = {literal(value.blank)}"
            continue
        line = f"{key(name)} = {literal(value)}"
        if note := (notes or {}).get((*at, name)):
            line += f"  # {note}"
        yield line

    for name, value in inner.items():
        if isinstance(value, Ask):
            yield from ("", f"[{key(*at, name)}]", *_comment(value.what))
        else:
            yield from document(value, notes, (*at, name))


def _is_table(value: Any) -> bool:
    """Say whether a value has its own header; a blank table has, a blank feature is one line."""
    return isinstance(value, Mapping) or (isinstance(value, Ask) and value.blank == {})


def _comment(what: str) -> Iterator[str]:
    """Yield what a blank asks for."""
    for line in f"FILL IN: {what}".split("\n"):
        yield from textwrap.wrap(line, 118, initial_indent="# ", subsequent_indent="# ")
