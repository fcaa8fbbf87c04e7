"""What is probably wrong with a table though every cell can be read: doubts, each with the line that settles it.

A site doubts its own records (`of_site`) and tells codes, columns and rows; who compares sites (`of_all`) doubts what
only shows between them: one label in two spellings, a column that names the site. What would change a result in silence
is an error unless the study accepts it (`data.accept`); what merely may is a warning. Without a privacy claim alone:
under one, the dictionary decides what a cell is, and nobody is told of any.

Few records look like anything: what could be chance once in a million tables is not doubted.

A doubt quotes up to three cells as they were read (`quotes`), but those that may name a patient.
"""

import math
import re
import statistics
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from medfed.core import quotes, toml
from medfed.core.checks import DataError, rows_of, some, those
from medfed.core.patient_ids import NOBODY
from medfed.core.refusals import Refusal, refuse
from medfed.data import cells, clinical, numerals, scales
from medfed.data import units as measures
from medfed.study import Data, Feature, described

if TYPE_CHECKING:
    from medfed.data.tables import SiteTable

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

CHANCE = 1e-6

_IDENTIFIERS = {
    "id", "ids", "pid", "mrn", "uuid", "guid", "patient", "patid", "patnr", "patnum", "patientid", "patientnr",
    "patientennummer", "subject", "subjectid", "fallnr", "fallnummer", "aufnahmenr", "caseid", "recordid",
    "encounterid", "visitid", "stayid", "hadm", "nip", "ipp", "nhc", "nosologico",
}  # fmt: skip
_COUNTS = re.compile(r"(unnamed: ?\d+|index|level_0|row|rownum|row_?number|row_?id|lfd\.? ?nr\.?|#)?")

YES = frozenset(("yes", "y", "true", "t", "1", "ja", "j", "wahr", "oui", "vrai", "si", "sì", "sí", "vero", "verdadero"))
NO = frozenset(("no", "n", "false", "f", "0", "nein", "falsch", "non", "faux", "falso"))
FEMALE = frozenset("f w female weiblich woman frau femme femmina femenino mujer féminin femminile".split())  # noqa: SIM905
MALE = frozenset("m male männlich man mann homme maschio masculino hombre masculin maschile h".split())  # noqa: SIM905
_ALSO_GAPS = ("k.A.", "k. A.", "n/d", "nd", "n.d.", "ns", "entfällt", "#NULL!")
GAPS = frozenset(text.casefold() for text in (*NOBODY, *_ALSO_GAPS))


Mend = Mapping[toml.Path, Any]


@dataclass(frozen=True)
class Doubt:
    """Something about a column that is probably wrong: what, where, cells of it, and what would mend it."""

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
            where = f"{those(self.sites)}, {where}" if len(self.sites) > 1 else f"site {self.sites[0]!r}, {where}"
        rows = f" (row {rows_of(self.rows, self.count)})" if self.rows else ""
        return f"{where} {self.text}{quotes.quote(self.examples)}{rows}. {self.way_out()}"

    def way_out(self) -> str:
        """Return what to write into the study: the mend, or that all is as it should be."""
        lines = [f"{toml.key(*path)} = {toml.literal(value)}" for path, value in self.mend.items()]
        mend = f"Set {' or '.join(lines)}; " if lines else "Correct the table; "
        accept = toml.literal([f"{self.code}:{self.column}"])
        return f"{mend}if it is right as it is, data.accept = {accept}."

    def told(self) -> dict[str, Any]:
        """Return what a site tells of it, as plain values."""
        mend = [[list(path), value] for path, value in self.mend.items()]
        return {**vars(self), "rows": list(self.rows), "mend": mend, "sites": [], "examples": list(self.examples)}

    @classmethod
    def heard(cls, told: Mapping[str, Any], site: str) -> "Doubt":
        """Return a doubt that a site told."""
        mend = {tuple(path): value for path, value in told["mend"]}
        rows, examples = tuple(told["rows"]), tuple(told["examples"])
        return cls(**{**told, "rows": rows, "mend": mend, "sites": (site,), "examples": examples})


def _leave_out(name: str) -> Mend:
    return {("data", "exclude"): [name]}


# Of one site ----------------------------------------------------------------------------------------------------------


def of_site(table: "SiteTable", frame: pd.DataFrame, data: Data) -> Iterator[Doubt]:
    """Yield what is doubtful about a site's cleaned records; `frame` are their cells, its index their rows [rows]."""
    for doubt in _of_site(table, frame, data):
        yield replace(doubt, examples=_examples(doubt.column, frame.loc[list(doubt.rows), doubt.column]))


def _examples(name: str, cells: Iterable[object]) -> tuple[str, ...]:
    return quotes.examples(cells) if quotable(name) else ()


def quotable(name: str) -> bool:
    """Say whether a feature's cells may be shown as examples: not where it sounds as if they named patients."""
    words = re.split(r"[^a-z0-9#]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).casefold())
    return _IDENTIFIERS.isdisjoint((*words, "".join(words)))


def _of_site(table: "SiteTable", frame: pd.DataFrame, data: Data) -> Iterator[Doubt]:
    row_N = frame.index.to_numpy()
    coded = {} if len(table) < FEW else {doubt.column: doubt for doubt in _coded(table, frame, data)}
    yield from coded.values()
    yield from (doubt for doubt in _outside(table, data) if doubt.column not in coded)
    if len(table) < FEW:
        return
    label_N = np.unique(table.label, return_inverse=True)[1] if data.task != "regression" else table.label
    for name in table.features():
        values = table.numbers.get(name)
        if not described(data.dictionary.get(name, Feature())) and (doubt := _identifier(name, values, row_N, data)):
            yield doubt
            continue
        if doubt := _copies(name, table, label_N, row_N, data):
            yield doubt


def _outside(table: "SiteTable", data: Data) -> Iterator[Doubt]:
    """Yield the columns of which most values lie beyond their declared range: another unit, a lost decimal sign."""
    for name, rows in table.found.outside.items():
        values = table.numbers.get(name)
        known = len(table) if values is None else int(np.isfinite(values).sum())
        if len(rows) * 2 > known:
            low, high = data.dictionary[name].range
            text = f"has {len(rows)} of {known} values outside the declared range [{low:g}, {high:g}]: another unit?"
            yield Doubt("outside-most", name, text, tuple(rows[:5]), len(rows))


def _coded(table: "SiteTable", frame: pd.DataFrame, data: Data) -> Iterator[Doubt]:
    """Yield the columns of numbers in which a number stands for what was not measured: -999, 9999."""
    numbers = {**table.numbers, **({data.target: table.label} if data.task == "regression" else {})}
    for name, values in numbers.items():
        feature, beyond = data.dictionary.get(name, Feature()), None
        if rows := table.found.outside.get(name):  # held to the range's ends, which a code is not
            beyond = frame.index.isin(rows)
            values = values.copy()
            values[beyond] = pd.to_numeric(frame.loc[beyond, name], errors="coerce")
        found = cells.codes(values, beyond)
        if not len(found):
            continue
        where = np.flatnonzero(np.isin(values, found))
        first = np.sort([np.flatnonzero(values == code)[0] for code in found])[: quotes.MOST]
        meant = {f"{code:.0f}" for code in found if code % 1 == 0}
        meant |= {str(cell).strip() for cell in frame[name].iloc[where] if float(cell) % 1}
        text = "holds what stands for no value in other tables, and far from all other values"
        text, mend = _of_cells(text, name, "missing", [*feature.missing, *sorted(meant)])
        if name == data.target and mend:
            mend = {("data", "missing_values"): [*data.missing_values, *sorted(meant)]}
        yield Doubt("missing-code", name, text, tuple(frame.index[first].tolist()), len(where), mend)


def _identifier(name: str, values: np.ndarray | None, row_N: np.ndarray, data: Data) -> Doubt | None:
    """Return that a column of whole numbers counts rows, or names records."""
    if values is None or not np.isfinite(values[:FEW]).all() or (values[:FEW] % 1).any():
        return None
    if not np.isfinite(values).all() or (values % 1).any():
        return None
    leave = _leave_out(name)
    steps = np.diff(values)
    if (steps == 1).all() or (row_N.dtype != object and (steps == np.diff(row_N)).all()):
        text = "counts the rows of the file, as an index does; it is no measurement"
        return Doubt("row-number", name, text, mend=leave)
    distinct = len(np.unique(values))
    if distinct > 0.9 * len(values) and _COUNTS.fullmatch(name.strip().casefold()):
        return Doubt("row-number", name, "numbers the rows, as an index does; it is no measurement", mend=leave)
    if quotable(name) or distinct < min(64, 0.5 * len(values)):
        return None
    text = f"looks like what names patients or records: {distinct} different whole numbers in {len(values)} rows"
    names: Mend = {} if data.patient else {("data", "patient"): name}
    return Doubt("identifier", name, text, mend={**names, **leave})


def _copies(name: str, table: "SiteTable", label_N: np.ndarray, row_N: np.ndarray, data: Data) -> Doubt | None:
    """Return that a column, or its gaps, says what is to be predicted."""
    columns = len(table.features())
    cells = table.texts[name] if name in table.texts else table.numbers[name]
    known = ~pd.isna(cells)

    def doubt(code: str, text: str) -> Doubt:
        first = np.sort(np.unique(cells[known].astype(str), return_index=True)[1])[: quotes.MOST]
        return Doubt(code, name, text, tuple(row_N[known][first].tolist()), int(known.sum()), _leave_out(name))

    if data.task == "regression":
        if name in table.numbers and known.sum() >= FEW and _linear(cells[known], label_N[known]):
            return doubt("target-copy", f"is {data.target!r} itself, or a multiple of it")
        return None
    if not known.all() and _one_to_one(known, label_N) and _unlikely(label_N, columns):
        text = f"is empty exactly where {data.target!r} is one label, and filled where it is the other"
        return doubt("gaps-copy-target", f"{text}: its gaps tell the answer")
    if _decides(cells[known], label_N[known], columns):
        return doubt("target-copy", f"says {data.target!r} in other words: each of its values goes with one label")
    if name in table.numbers and _separates(cells[known], label_N[known]) and _unlikely(label_N[known], columns):
        return doubt("separates", f"alone tells the labels of {data.target!r} apart, in every row")
    return None


def _linear(values: np.ndarray, target: np.ndarray) -> bool:
    spread = np.ptp(values)
    if spread == 0 or np.ptp(target) == 0:
        return False
    with np.errstate(all="ignore"):
        return bool(abs(np.corrcoef(values, target)[0, 1]) > 1 - 1e-12)


def _unlikely(label_N: np.ndarray, columns: int) -> bool:
    """Say whether labels could hardly fall so that a column that knows nothing of them tells them apart."""
    counts = np.unique(label_N, return_counts=True)[1]
    if len(counts) < 2:
        return False
    ways = math.lgamma(counts.sum() + 1) - sum(math.lgamma(count + 1) for count in counts)
    return ways > math.log(2 * columns / CHANCE)


def _one_to_one(cells: np.ndarray, label_N: np.ndarray) -> bool:
    """Say whether each value goes with one label and each label with one value, of two or more.

    Hardly any column looks so in its first rows; only then all are looked at.
    """
    for some_N in (slice(_GLANCE), slice(None)):
        pairs = set(zip(cells[some_N].tolist(), label_N[some_N].tolist(), strict=True))
        values, labels = ({pair[side] for pair in pairs} for side in (0, 1))
        if not len(pairs) == len(values) == len(labels):
            return False
    return len(pairs) > 1


def _decides(cells: np.ndarray, label_N: np.ndarray, columns: int) -> bool:
    """Say whether each value goes with one label, where chance would hardly have it so.

    Of a value in s rows all have one label by a chance of the sum of the labels' shares to the power s.
    """
    for some_N in (slice(_GLANCE), slice(None)):
        pairs = set(zip(cells[some_N].tolist(), label_N[some_N].tolist(), strict=True))
        if len(pairs) > len({value for value, _ in pairs}):
            return False
        if len(pairs) > _MOST_VALUES:
            return False
    counts = np.unique(cells.astype(str), return_counts=True)[1]
    shares = np.unique(label_N, return_counts=True)[1] / max(1, len(label_N))
    if len(shares) < 2:
        return False
    log_chance = np.log(np.power(shares[None, :], counts[:, None]).sum(1)).sum()
    return bool(len(counts) > 1 and log_chance < math.log(CHANCE / columns))


def _separates(values: np.ndarray, label_N: np.ndarray) -> bool:
    """Say whether two labels lie on two sides of a number."""
    for some_N in (slice(_GLANCE), slice(None)):
        labels = np.unique(label_N[some_N])
        if len(labels) != 2:
            continue
        first = values[some_N][label_N[some_N] == labels[0]]
        second = values[some_N][label_N[some_N] == labels[1]]
        if not (first.max() < second.min() or second.max() < first.min()):
            return False
    return len(labels) == 2


_GLANCE = 64
_MOST_VALUES = 48  # of a column that may say a label in other words


# Between sites --------------------------------------------------------------------------------------------------------


def of_all(surveys: Mapping[str, Mapping[str, Any]], data: Data, claimed: bool = False) -> list[Doubt]:
    """Return what is doubtful about the sites' tables, from what they tell (`preprocess.survey`), in order of harm.

    Under a claim, which is for who holds the table alone, no cell is quoted.
    """
    with quotes.withhold(claimed):
        found = [
            *_together(surveys),
            *_sites(surveys, data),
            *_labels(surveys, data),
            *_mixed(surveys, data),
            *_kinds(surveys, data),
        ]
        found += [*_texts(surveys, data), *_units(surveys, data), *_scales(surveys), *_columns(surveys)]
    order = list(HARMS)
    wrong = {doubt.column for doubt in found if doubt.harm == "error"}
    told = [doubt for doubt in found if doubt.harm == "error" or doubt.column not in wrong]
    kept = [doubt for doubt in told if not accepted(doubt, data)]
    return sorted(kept, key=lambda doubt: (order.index(doubt.code), doubt.column))


def accepted(doubt: Doubt, data: Data) -> bool:
    """Say whether the study says that it is right so: by the doubt's code, for all columns or for this one."""
    return doubt.code in data.accept or f"{doubt.code}:{doubt.column}" in data.accept


def check(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> None:
    """Raise every doubt that would change a result in silence."""
    errors = [doubt for doubt in of_all(surveys, data) if doubt.harm == "error"]
    refuse([Refusal(DataError(doubt.sentence()), dict(list(doubt.mend.items())[:1])) for doubt in errors])


def warnings(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> list[str]:
    """Return what a run goes on with, said in sentences."""
    return [doubt.sentence() for doubt in of_all(surveys, data) if doubt.harm == "warning"]


def _together(surveys: Mapping[str, Mapping[str, Any]]) -> Iterator[Doubt]:
    """Yield what sites doubt of their own, once where several doubt alike."""
    alike: dict[tuple[str, str, str], list[Doubt]] = {}
    for site, survey in surveys.items():
        for told in survey.get("doubts", ()):
            doubt = Doubt.heard(told, site)
            which = doubt.text if doubt.code == "unjoined" else ""  # several tables are joined by one column
            alike.setdefault((doubt.code, doubt.column, which), []).append(doubt)
    for doubts in alike.values():
        sites = tuple(doubt.sites[0] for doubt in doubts if doubt.code != "footer")  # whose it is, no site knows
        mend: dict[toml.Path, Any] = {}
        for path, value in (item for doubt in doubts for item in doubt.mend.items()):
            several = isinstance(value, list) and path in mend  # sites may have codes of their own
            mend[path] = [*dict.fromkeys([*mend[path], *value])] if several else mend.get(path, value)
        yield replace(doubts[0], sites=sites, count=sum(doubt.count for doubt in doubts), mend=mend)


def _sites(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield that one site is two by the spelling of its name."""
    if data.site:
        words = YES | NO | FEMALE | MALE  # of which several mean one, but not as names
        rows = {site: survey["train"] + survey["test"] for site, survey in surveys.items() if fold(site) not in words}
        yield from _spelt("site-spelling", data.site, rows)


def _labels(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    counts = Counter[str]()
    for survey in surveys.values():
        counts.update(survey.get("labels", {}))
    if data.dictionary.get(data.target) and data.dictionary[data.target].categories:
        return
    yield from _header(counts, data)
    if len(counts) > _MOST_LABELS and (respelt := _respelt(data.target, counts)):
        yield respelt
        return
    if data.task == "auto" and len(counts) > _MOST_LABELS and all(_NUMBER.fullmatch(label) for label in counts):
        text = f"has {len(counts)} different numbers, which would be as many classes without an order"
        mend: Mend = {("data", "task"): "regression"}
        yield Doubt("label-numbers", data.target, text, mend=mend, examples=quotes.examples(counts))
    yield from _spelt("label-spelling", data.target, counts)
    if gaps := [label for label in counts if label.casefold() in GAPS]:
        text = f"has the label {some(map(repr, gaps))}, which stands for no value in other tables"
        mend = {("data", "missing_values"): [*data.missing_values, *gaps]}
        yield Doubt("label-missing", data.target, text, count=sum(counts[g] for g in gaps), mend=mend)


_MOST_LABELS = 10
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_WITH_UNIT = re.compile(r"[<>≤≥]?\s*[+-]?\d+(?:[.,]\d+)?\s*(%|°?[^\W\d_][\w/%²³°.-]{0,11})")


def units_of(texts: Iterable[str]) -> list[str]:
    """Return what stands behind numbers, the longest first, where it does so in most texts; else nothing."""
    every = list(texts)
    units = Counter(match[1] for text in every if (match := _WITH_UNIT.fullmatch(str(text))))
    return sorted(units, key=len, reverse=True) if units.total() * 2 > len(every) else []


def _kinds(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield the columns that are numbers at one site and texts at another, and numbers with their unit in the cell."""
    for name in dict.fromkeys(name for survey in surveys.values() for name in survey.get("texts", ())):
        if described(data.dictionary.get(name, Feature())):
            continue
        texts = {site: survey["texts"][name] for site, survey in surveys.items() if survey.get("texts", {}).get(name)}
        every = [text for found in texts.values() for text in found]
        declared = data.dictionary.get(name, Feature()).suffix
        if (units := units_of(every)) and len(measures.apart([*declared, *units])) > 1:
            if len(measures.apart(declared)) < 2:  # else it is told already
                one_each = [next(text for text in every if text.endswith(unit)) for unit in units]
                doubt = _several_units(name, "" if quotes.are_withheld() else some(map(repr, [*declared, *units])))
                yield replace(doubt, examples=_examples(name, one_each))
            continue
        if units:
            units = [*declared, *units]
            text, mend = _of_cells("holds numbers with their unit in the cell", name, "suffix", units)
            yield Doubt("units-in-cells", name, text, mend=mend, examples=_examples(name, every))
            continue
        if respelt := _respelt(name, every):
            yield respelt
            continue
        rows = {site: survey["train"] + survey["test"] for site, survey in surveys.items()}
        numbers = [s for s, one in surveys.items() if name in one["numbers"] and one["missing"][name] < rows[s]]
        if numbers and texts:
            text = f"is a number at {those(numbers)} and text at {those(list(texts))}"
            yield Doubt("kinds", name, text, mend=_leave_out(name), examples=_examples(name, every))


def _respelt(name: str, texts: Collection[str]) -> Doubt | None:
    """Return that most texts of a column are numbers, once their decimal signs or thousands are taken as such."""
    if (form := numerals.form_of(texts)) is None:
        return None
    path = ("data", "dictionary", name, "numbers")
    either = "" if form else f"; decimals or thousands, no cell says: {toml.key(*path)} = '1,5' or '1,234.5'"
    text = f"holds numbers spelt as texts, which would be categories{either}"
    mend: Mend = {path: form} if form else {}
    return Doubt("numbers-as-text", name, text, mend=mend, examples=_examples(name, texts))


def _mixed(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield the columns of which a study takes off several units as if they were one."""
    used = {data.target, *(name for survey in surveys.values() for name in survey.get("missing", ()))}
    for name, feature in data.dictionary.items():
        if name in used and len(measures.apart(feature.suffix)) > 1:
            yield _several_units(name, some(map(repr, feature.suffix)))


def _several_units(name: str, told: str) -> Doubt:
    text = f"holds numbers in several units{f' ({told})' if told else ''}, which would be taken for one"
    return Doubt("units-mixed", name, f"{text}: a site's map has suffix and factor")


def _header(counts: Mapping[str, int], data: Data) -> Iterator[Doubt]:
    """Yield that a label is the column's own name: two exports were pasted together, with both headers."""
    names = [label for label in counts if fold(label) == fold(data.target)]
    if names:
        text = f"has its own name as a label ({names[0]!r}): a second header among the records. Delete that row"
        yield Doubt("label-header", data.target, text)


def _texts(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield the text columns whose categories differ by spelling alone."""
    for name in dict.fromkeys(name for survey in surveys.values() for name in survey.get("texts", ())):
        if name in data.dictionary and data.dictionary[name].categories:
            continue
        counts = Counter(text for survey in surveys.values() for text in survey.get("texts", {}).get(name, ()))
        yield from _spelt("spelling", name, counts)


@lru_cache(maxsize=65536)
def may_be_in_several_units(column: str) -> bool:
    """Say whether a column is a variable of the clinical dictionary whose unit its name does not say."""
    return len({entry.unit for entry in clinical.proposal(column)}) > 1


def _units(surveys: Mapping[str, Mapping[str, Any]], data: Data) -> Iterator[Doubt]:
    """Yield the columns whose sites' medians belong to different units of the variable that the name says."""
    for name in dict.fromkeys(name for survey in surveys.values() for name in survey.get("medians", ())):
        units: dict[str, list[tuple[str, float]]] = {}
        for site, survey in surveys.items():
            median = survey.get("medians", {}).get(name)
            if median is not None and (likely := clinical.proposal(name, median)):
                units.setdefault(likely[0].unit, []).append((site, median))
        typical = [statistics.median(median for _, median in found) for found in units.values()]
        if len(units) < 2 or min(typical) <= 0 or max(typical) < _APART * min(typical):
            continue
        told = "; ".join(
            f"{those([site for site, _ in found])} about {found[0][1]:.3g}, as in {unit or 'no unit'}"
            for unit, found in units.items()
        )
        yield Doubt("units-differ", name, f"seems to be in several units: {told}; a site's map has factor")


def _scales(surveys: Mapping[str, Mapping[str, Any]]) -> Iterator[Doubt]:
    """Yield the columns whose medians lie a factor between units apart, while all sites are spread alike."""
    for name in dict.fromkeys(name for survey in surveys.values() for name in survey.get("spreads", ())):
        spreads = {site: told for site, survey in surveys.items() if (told := survey.get("spreads", {}).get(name))}
        usual = sorted(spreads.values(), key=lambda told: told[3])[(len(spreads) - 1) // 2]
        apart: dict[tuple[float, bool], list[str]] = {}
        for site, told in spreads.items():
            if times := scales.factor(usual, told):
                apart.setdefault((times, told[3] > usual[3]), []).append(site)
        if not apart:
            continue
        odd = {site for sites in apart.values() for site in sites}
        told_of = [f"about {_three(usual[3])} at {those([site for site in spreads if site not in odd])}"]
        told_of += [
            f"about {_three(spreads[sites[0]][3])} at {those(sites)}, {'' if more else '1/'}{times:,.6g} times as much"
            for (times, more), sites in apart.items()
        ]
        text = f"is spread alike at all sites, and its median is {' and '.join(told_of)}: another unit?"
        yield Doubt("units-apart", name, f"{text} A site's map has factor")


def _three(number: float) -> str:
    """Return a number with three digits, or all of a large one's before the point."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.3g}"


_APART = 5.0  # times, by which medians of sites in one unit hardly differ


def _columns(surveys: Mapping[str, Mapping[str, Any]]) -> Iterator[Doubt]:
    """Yield the columns that hold nothing, or one value, at all sites."""
    for name in dict.fromkeys(name for survey in surveys.values() for name in survey.get("missing", ())):
        told = [survey for survey in surveys.values() if name in survey.get("missing", ())]
        leave = _leave_out(name)
        if all(survey["missing"][name] == survey["train"] + survey["test"] for survey in told):
            yield Doubt("empty", name, "has no value at any site", mend=leave)
            continue
        single = [survey.get("single", {}).get(name) for survey in told]
        held = [value for value in single if value is not None]
        if len(held) < len(told) or not held:
            continue
        cells = _examples(name, (f"{value:.15g}" if isinstance(value, float) else value for value in held))
        if len(set(held)) == 1:
            yield Doubt("constant", name, "has one value in all rows", mend=leave, examples=cells)
        elif len(set(held)) == len(held):
            text = "has one value at each site, and another at each: it names the site"
            yield Doubt("names-site", name, text, mend=leave, examples=cells)


def _spelt(code: str, column: str, counts: Mapping[str, int]) -> Iterator[Doubt]:
    """Yield that texts mean the same: they differ in case, width or blanks, or are yes and no in several ways."""
    groups: dict[str, list[str]] = {}
    for text in counts:
        groups.setdefault(fold(text), []).append(text)
    for one, other in ((YES, NO), (FEMALE, MALE)):
        if len(groups) > 2 and set(groups) <= one | other:
            sides = [[text for text in counts if fold(text) in words] for words in (one, other)]
            groups = {side[0]: side for side in sides if side}
    recode: dict[str, str] = {}
    for texts in groups.values():
        best = max(texts, key=lambda text: (counts[text], text.islower(), text))
        recode |= {text: best for text in sorted(texts) if text != best}
    if recode:
        told = some(f"{text!r} beside {best!r}" for text, best in recode.items())
        text = "spells one value in several ways" + ("" if quotes.are_withheld() else f": {told}")
        text, mend = _of_cells(text, column, "recode", recode)
        yield Doubt(code, column, text, mend=mend)


def _of_cells(text: str, column: str, key: str, value: Any) -> tuple[str, Mend]:
    """Return a doubt's text and its mend, which is made of cells; where they are withheld the key is named alone."""
    path = ("data", "dictionary", column, key)
    return (f"{text} ({toml.key(*path)})", {}) if quotes.are_withheld() else (text, {path: value})


def fold(text: str) -> str:
    """Return a text without case, width and outer blanks."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def gap_words(texts: Iterable[str]) -> list[str]:
    """Return the texts that stand for no value in most tables."""
    return [text for text in texts if text.casefold().strip() in GAPS]
