"""What is probably wrong with a table though every cell can be read: doubts, each with the line
that settles it.

A site doubts its own records (`site_doubts.find`) and tells codes, columns and rows; who compares
sites (`survey_doubts.find`) doubts what only shows between them: one label in two spellings, a
column that names the site. What would change a result in silence is an error unless the study
accepts it (`data.accept`); what merely may is a warning. Without a privacy claim alone: under one,
the dictionary decides what a cell is, and nobody is told of any.

A doubt quotes up to three cells as they were read (`quotes`), but those that may name a patient.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from medfed.core import quotes, toml
from medfed.core.checks import rows_of, those
from medfed.core.patient_ids import NOBODY
from medfed.study import Data

Harm = Literal["error", "warning"]

HARMS: dict[str, Harm] = {
    "row-number": "error",
    "identifier": "error",
    "target-copy": "error",
    "gaps-copy-target": "error",
    "site-spelling": "error",
    "label-spelling": "error",
    "label-missing": "error",
    "label-header": "error",
    "footer": "error",
    "label-numbers": "error",
    "missing-code": "error",
    "kinds": "error",
    "units-mixed": "error",
    "units-in-cells": "error",
    "numbers-as-text": "error",
    "spelling": "error",
    "outside-most": "error",
    "units-differ": "error",
    "units-apart": "warning",
    "unjoined": "warning",
    "separates": "warning",
    "names-site": "warning",
    "constant": "warning",
    "empty": "warning",
}
"""Every doubt that there is, in order of harm."""

FEW = 20
"""Records of a site, below which nothing of its own is doubted."""

_IDENTIFIERS = {
    "id", "ids", "pid", "mrn", "uuid", "guid", "patient", "patid", "patnr", "patnum", "patientid",
    "patientnr", "patientennummer", "subject", "subjectid", "fallnr", "fallnummer", "aufnahmenr",
    "caseid", "recordid", "encounterid", "visitid", "stayid", "hadm", "nip", "ipp", "nhc",
    "nosologico",
}  # fmt: skip

YES = frozenset({
    "yes", "y", "true", "t", "1", "ja", "j", "wahr", "oui", "vrai", "si", "sì", "sí", "vero",
    "verdadero",
})  # fmt: skip
NO = frozenset(("no", "n", "false", "f", "0", "nein", "falsch", "non", "faux", "falso"))
FEMALE = frozenset({
    "f", "w", "female", "weiblich", "woman", "frau", "femme", "femmina", "femenino", "mujer",
    "féminin", "femminile",
})  # fmt: skip
MALE = frozenset({
    "m", "male", "männlich", "man", "mann", "homme", "maschio", "masculino", "hombre", "masculin",
    "maschile", "h",
})  # fmt: skip
_ALSO_GAPS = ("k.A.", "k. A.", "n/d", "nd", "n.d.", "ns", "entfällt", "#NULL!")
GAPS = frozenset(text.casefold() for text in (*NOBODY, *_ALSO_GAPS))


Mend = Mapping[toml.Path, Any]


@dataclass(frozen=True)
class Doubt:
    """Something probably wrong with a column: what, where, cells of it, and what would mend it."""

    code: str
    column: str
    text: str  # a clause that follows the column's name
    rows: tuple[int, ...] = ()  # of the file, the first of them
    count: int = 0
    mend: Mend = field(default_factory=dict)
    sites: tuple[str, ...] = ()  # whose; none: of all together
    examples: tuple[str, ...] = ()  # cells, see `quotes`; none of what may name a patient

    @property
    def harm(self) -> Harm:
        """Whether it stops a run or warns."""
        return HARMS[self.code]

    def sentence(self) -> str:
        """Say it, with where it is and what settles it."""
        where = f"column {self.column!r}"
        if self.sites:
            if len(self.sites) > 1:
                where = f"{those(self.sites)}, {where}"
            else:
                where = f"site {self.sites[0]!r}, {where}"
        rows = f" (row {rows_of(self.rows, self.count)})" if self.rows else ""
        return f"{where} {self.text}{quotes.quote(self.examples)}{rows}. {self.way_out()}"

    def way_out(self) -> str:
        """Return what to write into the study: the mend, or that all is as it should be."""
        lines = [f"{toml.key(*path)} = {toml.literal(value)}" for path, value in self.mend.items()]
        mend = f"Set {' or '.join(lines)}; " if lines else "Correct the table; "
        accept = toml.literal([f"{self.code}:{self.column}"])
        return f"{mend}if it is right as it is, data.accept = {accept}."

    def to_json(self) -> dict[str, Any]:
        """Return what a site tells of it, as plain values."""
        mend = [[list(path), value] for path, value in self.mend.items()]
        return {
            **vars(self),
            "rows": list(self.rows),
            "mend": mend,
            "sites": [],
            "examples": list(self.examples),
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any], site: str) -> "Doubt":
        """Return a doubt that a site told."""
        mend = {tuple(path): value for path, value in told["mend"]}
        rows = tuple(told["rows"])
        examples = tuple(told["examples"])
        return cls(**{**told, "rows": rows, "mend": mend, "sites": (site,), "examples": examples})


def leave_out_column(name: str) -> Mend:
    return {("data", "exclude"): [name]}


def quote_cells(name: str, cells: Iterable[object]) -> tuple[str, ...]:
    if quotable(name):
        return quotes.examples(cells)
    return ()


def quotable(name: str) -> bool:
    """Say whether a feature's cells may be shown as examples:
    not where it sounds as if they named patients.
    """
    words = re.split(r"[^a-z0-9#]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).casefold())
    return _IDENTIFIERS.isdisjoint((*words, "".join(words)))


def is_accepted(doubt: Doubt, data: Data) -> bool:
    """Say whether the study says that it is right so:
    by the doubt's code, for all columns or for this one.
    """
    return doubt.code in data.accept or f"{doubt.code}:{doubt.column}" in data.accept


def name_mend(text: str, column: str, key: str, value: Any) -> tuple[str, Mend]:
    """Return a doubt's text and its mend, which is made of cells; where they are withheld the key
    is named alone.
    """
    path = ("data", "dictionary", column, key)
    if quotes.are_withheld():
        return (f"{text} ({toml.key(*path)})", {})
    return (text, {path: value})


def fold(text: str) -> str:
    """Return a text without case, width and outer blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def gap_words(texts: Iterable[str]) -> list[str]:
    """Return the texts that stand for no value in most tables."""
    return [text for text in texts if text.casefold().strip() in GAPS]
