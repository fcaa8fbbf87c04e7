"""A first study of a table: who is where, what is predicted, what its columns are. Proposed, for a person to confirm.

Names and shapes of columns say it; what was guessed is said beside each line. A draft is made at the table, by whoever
may see all of it: it reads records, and a claim's ranges and categories must not follow from them. So ranges come from
the clinical dictionary by a column's name alone, and never from the numbers below it.
"""

import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd

from medfed import runs
from medfed import study as studies
from medfed.core import files, toml
from medfed.core.checks import DataError, MedfedError, StudyError, some
from medfed.core.toml import Ask
from medfed.data import clinical, doubts, readers, workbooks
from medfed.data.doubts import Doubt
from medfed.data.tables import canonical
from medfed.plan import NEGATIVE
from medfed.study import Data, Feature, Format, Study, put

_TARGETS = """
target label outcome class died death dead mortality mort exitus deceased expired verstorben tod décès deces decesso
muerte readmitted readmission relapse survived survival diagnosis diagnose disease event ergebnis zielgrösse issue esito
resultado status y
"""
_SITES = """
site hospital center centre clinic clinique klinik spital krankenhaus haus hopital hôpital ospedale clinica clínica
hospitalid institution institute standort einrichtung etablissement établissement centro
"""
_PATIENTS = """
patient patientid patid patnr pid mrn subject subjectid patientennummer patientnr person personid uniquepid nip ipp nhc
paziente paciente fallnr fallnummer caseid
"""
_MOST_LABELS = 10
_MOST_SITES = 500
_MOST_CATEGORIES = 64
_DATES = r"\d{4}-\d\d-\d\d.*|\d{1,2}[./-]\d{1,2}[./-]\d{4}.*"
_PASSES = 6


@dataclass(frozen=True)
class Draft:
    """A study as TOML, what it still asks for, and why its table cannot be looked at as it is; empty where it can."""

    text: str
    blanks: tuple[str, ...]
    unread: str


@dataclass(frozen=True)
class _Shape:
    """What a column's cells look like."""

    name: str
    known: int
    distinct: int
    numbers: float  # share of the known cells
    dates: bool
    labels: tuple[str, ...]  # the different cells, where they are few
    suffixes: tuple[str, ...]  # what stands behind the numbers, where most have something
    gaps: tuple[str, ...]  # words for what is missing that a study does not take for it by itself

    @property
    def words(self) -> set[str]:
        """The words of its name, and all of them as one."""
        parts = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.name).casefold())
        return {*parts, "".join(parts)}


def draft(table: Path, out: Path, settings: Sequence[str] = ()) -> Draft:
    """Return the draft of a study of a file, a folder or a pattern of files, for the place `out`.

    `settings` ("key=value") are taken as they are; nothing is proposed in their place. Raises DataError where the
    table cannot be read without being told how.
    """
    asked: dict[str, Any] = {"study": {"name": _name(table)}, "data": {"table": str(table)}}
    for setting in settings:
        key, _, value = toml.setting(setting)
        put(asked, toml.path(key), studies.parse_value(value))
    held = readers.files_of(table, Data())
    several = len(held) > 1
    if several and "site" not in asked["data"] and "site_is_file" not in asked["data"]:
        asked["data"]["site_is_file"] = True

    notes: dict[toml.Path, str] = {}
    if several:
        notes["data", "site_is_file"] = "each file is a hospital; if a column names it, set data.site instead"
    if any(workbooks.has_labels(file) for file in held) and "format" not in asked["data"]:
        put(asked, ("data", "format", "labels"), "labels")
        notes["data", "format", "labels"] = "the file names its codes: see which of them mean missing"
    reading = _read(table, _study(asked).data)
    shapes = [_shape(reading.frame[name]) for name in reading.frame.columns]
    _propose_format(asked, notes, reading)
    _propose_roles(asked, notes, shapes)
    _propose_columns(asked, notes, shapes)
    unread = _settle(asked, notes) if _complete(asked) else ""
    for shape in shapes:
        if shape.name == asked["data"]["target"]:
            recode = asked["data"].get("dictionary", {}).get(shape.name, {}).get("recode", {})
            labels = tuple(sorted({recode.get(label, label) for label in shape.labels}))
            _propose_positive(asked["data"], notes, replace(shape, labels=labels))
    asked["data"]["table"] = Path(os.path.relpath(table.resolve(), out.parent.resolve())).as_posix()
    blanks = [f"data.{key}" for key in ("target", "site") if isinstance(asked["data"].get(key), Ask)]
    lines = [*_preface(table, blanks), *toml.document(asked, notes), ""]
    return Draft("\n".join(lines), tuple(blanks), unread)


def _read(table: Path, data: Data) -> readers.Reading:
    """Read a table; where it has to be said how it is written, say where, as there is no study yet."""
    try:
        return readers.read(table, data, private=False)
    except DataError as error:
        if "[data.format]" not in str(error):
            raise
        raise DataError(f"{error} There is no study yet: --set data.format.KEY=VALUE says it.") from error


def write(made: Draft, out: Path) -> None:
    """Write a draft. Raises StudyError where there is such a file: none is ever overwritten."""
    if out.exists():
        raise StudyError(f"--write {str(out)!r} is there already; give the name of a new file")
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, made.text)


def is_table(name: str) -> bool:
    """Say whether a word names a table and no study: a folder, a pattern, or a file of a kind that is read."""
    path = Path(name)
    return not name.endswith(".toml") and (path.is_dir() or "*" in name or bool(readers.kind_of(path)))


def _name(table: Path) -> str:
    name = re.sub(r"[^\w -]+", " ", table.name.split(".")[0] or table.resolve().name)
    return unicodedata.normalize("NFC", name).strip() or "study"


def _study(asked: Mapping[str, Any]) -> Study:
    """Return the study as far as it goes, its table where the process stands."""
    settled = deepcopy(dict(asked))
    settled["data"] = {key: value for key, value in settled["data"].items() if not isinstance(value, Ask)}
    return replace(studies.from_tables(settled), folder=Path.cwd())


def _preface(table: Path, blanks: Sequence[str]) -> list[str]:
    lines = [
        f"# A draft, from the header and the records of {table.name}: confirm each line that says why.",
        "# Ranges are those of the clinical dictionary, by the column's name; for a privacy claim describe every",
        "# column by what is publicly known, never by these records: medfed study fix. Ranges of numbers that nobody",
        "# can say are found from noised counts: privacy.ranges_epsilon, at a quarter of epsilon about 4 % more noise.",
    ]
    if blanks:
        lines.append(f"# Still to be filled in: {', '.join(blanks)}.")
    return lines


# What columns look like -----------------------------------------------------------------------------------------------


def _shape(values: pd.Series) -> _Shape:
    texts = canonical(values)
    known_N = ~(values.isna() | texts.isin(Data().missing_values)).to_numpy(dtype=bool)
    texts = texts[known_N]
    gaps = tuple(doubts.gap_words(texts.unique()))
    texts = texts[~texts.isin(gaps)]
    number_N = pd.to_numeric(texts, errors="coerce").notna()
    share = float(number_N.mean()) if len(texts) else 0.0
    dated = len(texts) > 0 and bool(texts.str.fullmatch(_DATES).all())
    different = texts.unique()
    labels = tuple(sorted(different)) if len(different) <= _MOST_LABELS else ()
    return _Shape(
        str(values.name), len(texts), len(different), share, dated, labels, tuple(doubts.units_of(different)), gaps
    )


def _named(shapes: Sequence[_Shape], words: str) -> list[_Shape]:
    """Return the columns one of whose words is asked for, in the order of what is asked."""
    order = words.split()
    rank = {word: place for place, word in enumerate(order)}
    found = [(min(rank[w] for w in shape.words if w in rank), shape) for shape in shapes if shape.words & rank.keys()]
    return [shape for _, shape in sorted(found, key=lambda pair: pair[0])]


# What is proposed -----------------------------------------------------------------------------------------------------


def _propose_format(asked: dict[str, Any], notes: dict[toml.Path, str], reading: readers.Reading) -> None:
    """Write down how the files are written, so that every site reads them alike."""
    for layout in list(reading.layouts.values())[:1]:
        plain = Format()
        given = asked.get("format", {})
        found = {f.name: getattr(layout, f.name) for f in fields(Format) if hasattr(layout, f.name)}
        for key, value in found.items():
            declared = asked["data"].get("format", given)
            if key in declared or value == getattr(plain, key):
                continue
            put(asked, ("data", "format", key), value)
            if why := layout.guessed.get(key):
                notes["data", "format", key] = f"guessed: {why}"


def _propose_roles(asked: dict[str, Any], notes: dict[toml.Path, str], shapes: Sequence[_Shape]) -> None:
    data = asked["data"]
    free = [shape for shape in shapes if shape.name not in data.values() and shape.name != readers.SITE]
    if "patient" not in data:
        for shape in _named(free, _PATIENTS):
            if shape.distinct > _MOST_CATEGORIES or shape.distinct > 0.5 * shape.known:
                data["patient"] = shape.name
                notes["data", "patient"] = f"{shape.distinct} different ids in {shape.known} rows"
                break
    free = [shape for shape in free if shape.name not in data.values()]
    if "site" not in data and not data.get("site_is_file") and "sites" not in asked:
        found = [s for s in _named(free, _SITES) if 2 <= s.distinct <= min(_MOST_SITES, s.known / 4)]
        if found:
            data["site"] = found[0].name
            notes["data", "site"] = f"{found[0].distinct} sites"
        else:
            data["site"] = Ask("", "the column that names the hospital; or leave it out and name [sites].")
    free = [shape for shape in free if shape.name not in data.values()]
    if "target" not in data:
        labels = [shape for shape in free if 2 <= shape.distinct <= _MOST_LABELS]
        found = _named(labels, _TARGETS) or [shape for shape in labels if shape is free[-1]]
        if found:
            data["target"] = found[0].name
            others = [shape.name for shape in found[1:4]]
            also = f"; it may be {' or '.join(map(repr, others))}" if others else ""
            notes["data", "target"] = f"{found[0].distinct} different values{also}"
        else:
            names = [shape.name for shape in labels] or [shape.name for shape in free]
            data["target"] = Ask("", f"the column to predict, such as {some(map(repr, names), 8)}.")


def _propose_positive(data: dict[str, Any], notes: dict[toml.Path, str], target: _Shape) -> None:
    """Say which of two labels is meant by positive, where one of them says that it is not."""
    if len(target.labels) != 2 or "positive" in data:
        return
    positive = [label for label in target.labels if label.casefold() not in NEGATIVE]
    if len(positive) == 1:
        data["positive"] = positive[0]
        notes["data", "positive"] = "precision and recall are of it"


def _propose_columns(asked: dict[str, Any], notes: dict[toml.Path, str], shapes: Sequence[_Shape]) -> None:
    """Leave out what is no feature, take gap words for gaps, and describe what the clinical dictionary knows."""
    data = asked["data"]
    roles = {data.get(key) for key in ("target", "site", "patient", "test") if isinstance(data.get(key), str)}
    features = [shape for shape in shapes if shape.name not in roles and shape.name != readers.SITE]
    if gaps := sorted({word for shape in shapes for word in shape.gaps} - {"unknown", "missing"}):
        data.setdefault("missing_values", [*Data().missing_values, *gaps])
        notes.setdefault(("data", "missing_values"), f"{', '.join(gaps)}: met in the table")
    why = {shape.name: reason for shape in features if (reason := _no_feature(shape))}
    if why and "exclude" not in data and "features" not in data:
        data["exclude"] = list(why)
        told = "; ".join(f"{name}: {reason}" for name, reason in list(why.items())[:4])
        notes["data", "exclude"] = told + (f"; and {len(why) - 4} more" if len(why) > 4 else "")
    for shape in features:
        if shape.suffixes and shape.name not in data.get("dictionary", {}):
            put(asked, ("data", "dictionary", shape.name, "suffix"), list(shape.suffixes))
            notes["data", "dictionary", shape.name, "suffix"] = "its unit stands in the cells, and is taken off"
            continue
        if shape.name in why or shape.numbers < 0.9 or shape.distinct <= 2 or shape.name in data.get("dictionary", {}):
            continue
        entries = clinical.proposal(shape.name)
        if len(entries) == 1:
            entry = entries[0]
            path = ("data", "dictionary", shape.name)
            put(asked, path, _described(entry))
            notes[(*path, "range")] = f"{entry.doc}{f' in {entry.unit}' if entry.unit else ''}: confirm the unit"
        elif entries:
            units = " or ".join(f"{list(entry.range)} in {entry.unit or 'no unit'}" for entry in entries[:4])
            put(asked, ("data", "dictionary", shape.name, "doc"), f"{entries[0].doc}: set range to {units}")


def _described(entry: Feature) -> dict[str, Any]:
    ends = [int(end) if end == int(end) else end for end in entry.range]
    kept = {"range": ends, "log": entry.log, "unit": entry.unit}
    return {key: value for key, value in kept.items() if value}


def _no_feature(shape: _Shape) -> str:
    """Return why a column can be no feature as it is; empty where it may be one."""
    if not shape.known:
        return "empty"
    if shape.dates:
        return "dates; docs/cells.md makes an age or days of them"
    if shape.numbers < 0.5 and shape.distinct > _MOST_CATEGORIES and not shape.suffixes:
        return f"{shape.distinct} different texts"
    return ""


# What the table itself objects to -------------------------------------------------------------------------------------


def _complete(asked: Mapping[str, Any]) -> bool:
    return not any(isinstance(value, Ask) for value in asked["data"].values())


def _settle(asked: dict[str, Any], notes: dict[toml.Path, str]) -> str:
    """Put in what settles doubts about the table; return why it cannot be looked at, if so."""
    for _ in range(_PASSES):
        found = _doubts(asked)
        if isinstance(found, str):
            return found
        settled = [_mend(asked, notes, doubt) for doubt in found]
        if not any(settled):
            break
    return ""


def _doubts(asked: Mapping[str, Any]) -> list[Doubt] | str:
    """Return the doubts about the table under the study as it is; or why it cannot be looked at."""
    try:
        study = _study(asked)
        return doubts.of_all(runs.survey(study), study.data)
    except MedfedError as error:
        return str(error)


def _mend(asked: dict[str, Any], notes: dict[toml.Path, str], doubt: Doubt) -> bool:
    """Put in what settles a doubt and say why; False where no line does."""
    if not doubt.mend:
        return False
    path, value = next(iter(doubt.mend.items()))
    reason = doubt.text
    if path == ("data", "exclude"):
        reason = f"{doubt.column}: {doubt.text}"
        asked["data"].get("dictionary", {}).pop(doubt.column, None)
        value = [*asked["data"].get("exclude", []), *value]

    put(asked, path, value)
    notes[path] = f"{notes[path]}; {reason}" if path in notes else reason
    return True
