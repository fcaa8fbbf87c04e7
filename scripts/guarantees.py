"""The registry of guarantees, docs/guarantees.toml: read, and held to code and tests. make_docs.py
makes pages of it.

A row says what is promised or can go wrong, what in the code keeps it, and which tests attack it.
`faults` yields what does not hold of a row: a symbol or a test that is not there, a severity that
is none, the same told twice. Nothing is imported and nothing collected, so that the check takes a
second; `tests/test_house.py` imports every symbol as well.
"""

import ast
import functools
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = ROOT / "docs" / "guarantees.toml"

SEVERITIES = ("critical", "high", "medium", "low", "refused")
"""What each means, the page says: docs/sharp-edges.md."""


@dataclass(frozen=True)
class Guarantee:
    """One row: a sentence and how it is handled, or a party and what it learns; what keeps it and
    what attacks it.
    """

    sentence: str = ""
    handled: str = ""
    severity: str = ""
    party: str = ""
    learns: str = ""
    symbol: str = ""
    tests: tuple[str, ...] = ()
    untested: str = ""

    @property
    def told(self) -> str:
        """What the row is known by: two rows that say the same are one too many."""
        return self.sentence or f"{self.party}: {self.learns}"


@dataclass(frozen=True)
class Section:
    """A heading, prose, a table (none where the section is prose alone), more prose.

    `head` names the columns of party, learns and, where a row says more, `handled`; without it rows
    are sentences.
    """

    title: str
    introduction: str = ""
    closing: str = ""
    head: tuple[str, ...] = ()
    rows: tuple[Guarantee, ...] = ()


@dataclass(frozen=True)
class Page:
    """One page under docs/, of its sections in order."""

    file: str
    title: str
    introduction: str
    sections: tuple[Section, ...]


def read(path: Path = REGISTRY) -> tuple[Page, ...]:
    """Return the registry's pages.

    Raises:
        TypeError: An entry has a key that no field of it is named.
    """
    pages = tomllib.loads(path.read_text(encoding="utf-8"))["page"]
    return tuple(
        Page(**page | {"sections": tuple(_section(section) for section in page["sections"])})
        for page in pages
    )


def _section(values: Mapping[str, Any]) -> Section:
    rows = tuple(
        Guarantee(**row | {"tests": tuple(row.get("tests", ()))}) for row in values.get("rows", ())
    )
    return Section(**values | {"head": tuple(values.get("head", ())), "rows": rows})


# what holds of an entry ---------------------------------------------------------------------------


def faults(pages: Sequence[Page]) -> Iterator[str]:
    """Yield what does not hold of the registry, a line each."""
    seen: set[str] = set()
    for page in pages:
        for section in page.sections:
            for row in section.rows:
                where = f"docs/guarantees.toml, {section.title!r}, {row.told[:60]!r}"
                yield from (f"{where}: {fault}" for fault in _faults_of(row))
                if row.party and row.handled and len(section.head) < 3:
                    yield f"{where}: `handled` has no column; name it in the section's head"
                if row.told.casefold() in seen:
                    yield f"{where}: stands there twice"
                seen.add(row.told.casefold())

        for path in re.findall(r"\btests/\w+(?:/\w+)*\.py", _prose(page)):
            if not (ROOT / path).is_file():
                yield f"docs/guarantees.toml, {page.file}: {path} is no file"


def _faults_of(row: Guarantee) -> Iterator[str]:
    """Yield what does not hold of one row."""
    pair = (row.party, row.learns) if row.party or row.learns else (row.sentence, row.handled)
    if not all(pair) or (row.sentence and row.party):
        yield "expected `sentence` and `handled`, or `party` and `learns`"
    if row.sentence and row.severity not in SEVERITIES:
        yield f"severity={row.severity!r}; expected one of {', '.join(SEVERITIES)}"

    if row.symbol and not _is_defined(row.symbol):
        yield f"symbol={row.symbol!r} is nothing in src/"
    if bool(row.tests) == bool(row.untested):
        yield "expected `tests`, or `untested` with the reason, and not both"
    if not row.symbol and not row.untested:
        yield "expected `symbol`; empty only where nothing in the code can keep it"

    if len(set(row.tests)) < len(row.tests):
        yield "a test stands there twice"
    for test in row.tests:
        file, _, name = test.partition("::")
        if not re.fullmatch(r"tests/.*test_\w+\.py", file) or not name.startswith("test_"):
            yield f"{test!r} is no test id; expected tests/test_FILE.py::test_NAME"
        elif name not in names_in(ROOT / file):
            yield f"{test} does not exist"


def _is_defined(symbol: str) -> bool:
    """Return whether a dotted path names a module under src/, or a function or class in one."""
    parts = symbol.split(".")
    for cut in range(len(parts), 0, -1):
        place = ROOT / "src" / Path(*parts[:cut])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            return cut == len(parts) or ".".join(parts[cut:]) in names_in(file)
    return False


@functools.cache
def names_in(file: Path) -> frozenset[str]:
    """Return the functions and classes that a file defines, those of a class as Class.name; none
    without the file.
    """
    if not file.is_file():
        return frozenset()
    return frozenset(_names(ast.parse(file.read_text(encoding="utf-8")).body, ""))


def _names(body: Sequence[ast.stmt], within: str) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield within + node.name
        elif isinstance(node, ast.ClassDef):
            yield within + node.name
            yield from _names(node.body, f"{within}{node.name}.")


def _prose(page: Page) -> str:
    """Return all that a page says outside its tables."""
    texts = [getattr(part, f.name) for part in (page, *page.sections) for f in fields(part)]
    return "\n".join(text for text in texts if isinstance(text, str))
