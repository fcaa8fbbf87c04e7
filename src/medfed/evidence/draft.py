"""A first study of a table: who is where, what is predicted, what its columns are. Proposed, for a
person to confirm.

Names and shapes of columns say it; what was guessed is said beside each line. A draft is made at
the table, by whoever may see all of it: it reads records, and a claim's ranges and categories must
not follow from them. So ranges come from the clinical dictionary by a column's name alone, and
never from the numbers below it. How dates are written follows from the cells where one form alone
reads all of them; else whether day or month stands first is asked for.
"""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from medfed import runs
from medfed import study as studies
from medfed.core import files, quotes, toml
from medfed.core.checks import DataError, MedfedError, StudyError, some
from medfed.core.toml import Ask
from medfed.data import clinical, dates, footers, readers, sources, survey_doubts, workbooks
from medfed.data import units as measures
from medfed.data.doubts import Doubt
from medfed.evidence.column_shapes import MOST_LABELS, ColumnShape, describe_shape, find_named
from medfed.planning.survey_warnings import NEGATIVE
from medfed.study import Data, Feature, Format, Study, put

_TARGETS = """
target label outcome class died death dead mortality mort exitus deceased expired verstorben tod
décès deces decesso muerte readmitted readmission relapse survived survival diagnosis diagnose
disease event ergebnis zielgrösse issue esito resultado status y
"""
_SITES = """
site hospital center centre clinic clinique klinik spital krankenhaus haus hopital hôpital
ospedale clinica clínica hospitalid institution institute standort einrichtung etablissement
établissement centro
"""
_PATIENTS = """
patient patientid patid patnr pid mrn subject subjectid patientennummer patientnr person personid
uniquepid nip ipp nhc paziente paciente fallnr fallnummer caseid
"""
_BIRTHS = """
born birth dob birthday birthdate dateofbirth geburt geburtsdatum gebdat geboren geburtstag
naissance datenaissance datedenaissance nascita datanascita datadinascita nacimiento
fechanacimiento fechadenacimiento
"""
_ADMISSIONS = """
admission admitted admit admissiondate aufnahme aufnahmedatum eintritt eintrittsdatum entrée
entree dateentrée ricovero dataricovero ingreso fechaingreso encounter visit visitdate sampled
collected date datum data fecha
"""
_MOST_SITES = 500
_MOST_CATEGORIES = 64
_PASSES = 6


@dataclass(frozen=True)
class Draft:
    """A study as TOML, what it still asks for, and why its table cannot be looked at as it is;
    empty where it can.

    `left_out` says which columns it excludes, and why; `surveys` is
    what its sites tell of the table, where that has been asked (`runs.survey`).
    """

    text: str
    blanks: tuple[str, ...]
    unread: str
    left_out: str = ""
    surveys: Mapping[str, Mapping[str, Any]] | None = None


def draft(table: Path, out: Path, settings: Sequence[str] = ()) -> Draft:
    """Return the draft of a study of a file, a folder or a pattern of files, for the place `out`.

    `settings` ("key=value") are taken as they are; nothing is proposed in their place. Raises
    DataError where the table cannot be read without being told how.
    """
    asked: dict[str, Any] = {"study": {"name": _name(table)}, "data": {"table": str(table)}}
    for setting in settings:
        key, _, value = toml.setting(setting)
        put(asked, toml.path(key), studies.parse_value(value))
    with quotes.withhold(_study(asked).privacy.meant):
        return _draft(table, out, asked)


def _draft(table: Path, out: Path, asked: dict[str, Any]) -> Draft:
    held = readers.files_of(table, Data())
    several = len(held) > 1
    if several and "site" not in asked["data"] and "site_is_file" not in asked["data"]:
        asked["data"]["site_is_file"] = True

    notes: dict[toml.Path, str] = {}
    if several:
        notes["data", "site_is_file"] = (
            "each file is a hospital; if a column names it, set data.site instead"
        )
    if any(workbooks.has_labels(file) for file in held) and "format" not in asked["data"]:
        put(asked, ("data", "format", "labels"), "labels")
        notes["data", "format", "labels"] = (
            "the file names its codes: see which of them mean missing"
        )
    reading = _read(table, _study(asked).data)
    reading = _drop_footer(asked, notes, reading)
    shapes = [describe_shape(reading.frame[name]) for name in reading.frame.columns]
    _propose_format(asked, notes, reading)
    _propose_roles(asked, notes, shapes)
    _propose_task(asked, notes, shapes)
    _propose_columns(asked, notes, shapes)
    unread = ""
    surveys = None
    if _is_complete(asked):
        unread, surveys = _settle(asked, notes, reading if _is_plain(reading, held) else None)
    for shape in shapes:
        if shape.name == asked["data"]["target"]:
            recode = asked["data"].get("dictionary", {}).get(shape.name, {}).get("recode", {})
            labels = tuple(sorted({recode.get(label, label) for label in shape.labels}))
            _propose_positive(asked["data"], notes, replace(shape, labels=labels))
    asked["data"]["table"] = Path(os.path.relpath(table.resolve(), out.parent.resolve())).as_posix()
    blanks = [
        toml.key(*path)
        for path in sorted(_asks(asked), key=lambda path: path != ("data", "target"))
    ]
    lines = [*_preface(table, blanks), *toml.document(asked, notes), ""]
    return Draft(
        "\n".join(lines), tuple(blanks), unread, notes.get(("data", "exclude"), ""), surveys
    )


def _is_plain(reading: readers.Reading, held: Sequence[Path]) -> bool:
    """Say whether a table reads alike once it is known who is patient and site:
    no number of it was respelt.
    """
    layouts = [reading.layouts.get(file.name) for file in held]
    return all(
        layout is not None and (layout.decimal, layout.thousands) == (".", "none")
        for layout in layouts
    )


def _drop_footer(
    asked: dict[str, Any], notes: dict[toml.Path, str], reading: readers.Reading
) -> readers.Reading:
    """Return a table without the last rows that are no records, and declare them."""
    footer = footers.find(reading.frame, ())
    if footer is None or not footer.lines:
        return reading
    path = ("data", "format", "footer")
    already = max([0, *(layout.footer for layout in reading.layouts.values())])
    put(asked, path, already + footer.lines)
    words = footer.words(reading.frame)
    what = f"what {footer.column!r} holds"
    if words:
        what = f"{' and '.join(map(repr, words))} in {footer.column!r}"
    notes[path] = (
        f"row {some(reading.frame.index[footer.which_N])}: {what} shows that it is no record"
    )
    return replace(reading, frame=reading.frame[~footer.which_N])


def _read(table: Path, data: Data) -> readers.Reading:
    """Read a table; where it must be said how it is written, say where: there is no study yet."""
    try:
        return readers.read(table, data, private=False)
    except DataError as error:
        if "[data.format]" not in str(error):
            raise
        raise DataError(
            f"{error} There is no study yet: --set data.format.KEY=VALUE says it."
        ) from error


def write(made: Draft, out: Path) -> None:
    """Write a draft. Raises StudyError where there is such a file: none is ever overwritten."""
    if out.exists():
        raise StudyError(f"--write {str(out)!r} is there already; give the name of a new file")
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, made.text)


def is_table(name: str) -> bool:
    """Say whether a word names a table and no study:
    a folder, a pattern, or a file of a kind that is read.
    """
    path = Path(name)
    return not name.endswith(".toml") and (
        path.is_dir() or "*" in name or bool(readers.kind_of(path))
    )


def _name(table: Path) -> str:
    name = re.sub(r"[^\w -]+", " ", table.name.split(".")[0] or table.resolve().name)
    return unicodedata.normalize("NFC", name).strip() or "study"


def _study(asked: Mapping[str, Any]) -> Study:
    """Return the study as far as it goes, its table where the process stands."""
    settled = deepcopy(dict(asked))
    for *parents, last in _asks(asked):
        place = settled
        for name in parents:
            place = place[name]
        del place[last]
    return replace(studies.from_tables(settled), folder=Path.cwd())


def _asks(tables: Mapping[str, Any], at: toml.Path = ()) -> Iterator[toml.Path]:
    """Yield where there are blanks."""
    for name, value in tables.items():
        if isinstance(value, Ask):
            yield (*at, name)
        elif isinstance(value, Mapping):
            yield from _asks(value, (*at, name))


def _preface(table: Path, blanks: Sequence[str]) -> list[str]:
    lines = [
        f"# A draft, from the header and the records of {table.name}: confirm each line that "
        "says why.",
        "# Ranges are those of the clinical dictionary, by the column's name; for a privacy "
        "claim describe every",
        "# column by what is publicly known, never by these records: medfed study fix. Ranges of "
        "numbers that nobody",
        "# can say are found from noised counts: privacy.ranges_epsilon, at a quarter of epsilon "
        "about 4 % more noise.",
    ]
    if blanks:
        lines.append(f"# Still to be filled in: {', '.join(blanks)}.")
    return lines


# What is proposed ---------------------------------------------------------------------------------


def _propose_format(
    asked: dict[str, Any], notes: dict[toml.Path, str], reading: readers.Reading
) -> None:
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


def _propose_roles(
    asked: dict[str, Any], notes: dict[toml.Path, str], shapes: Sequence[ColumnShape]
) -> None:
    data = asked["data"]
    free = [
        shape for shape in shapes if shape.name not in data.values() and shape.name != readers.SITE
    ]
    if "patient" not in data:
        for shape in find_named(free, _PATIENTS):
            if shape.distinct > _MOST_CATEGORIES or shape.distinct > 0.5 * shape.known:
                data["patient"] = shape.name
                notes["data", "patient"] = f"{shape.distinct} different ids in {shape.known} rows"
                break

    free = [shape for shape in free if shape.name not in data.values()]
    if "site" not in data and not data.get("site_is_file") and "sites" not in asked:
        found = [
            s for s in find_named(free, _SITES) if 2 <= s.distinct <= min(_MOST_SITES, s.known / 4)
        ]
        if found:
            data["site"] = found[0].name
            notes["data", "site"] = f"{found[0].distinct} sites"
        else:
            data["site"] = Ask(
                "", "the column that names the hospital; or leave it out and name [sites]."
            )

    free = [shape for shape in free if shape.name not in data.values()]
    if "target" not in data:
        labels = [shape for shape in free if 2 <= shape.distinct <= MOST_LABELS]
        found = find_named(labels, _TARGETS) or [shape for shape in labels if shape is free[-1]]
        if found:
            data["target"] = found[0].name
            others = [shape.name for shape in found[1:4]]
            also = f"; it may be {' or '.join(map(repr, others))}" if others else ""
            notes["data", "target"] = f"{found[0].distinct} different values{also}"
        else:
            names = [shape.name for shape in labels] or [shape.name for shape in free]
            data["target"] = Ask("", f"the column to predict, such as {some(map(repr, names), 8)}.")


def _propose_task(
    asked: dict[str, Any], notes: dict[toml.Path, str], shapes: Sequence[ColumnShape]
) -> None:
    """Predict a number where the target's cells are so many numbers that they are no labels."""
    data = asked["data"]
    for shape in shapes:
        if shape.name != data["target"] or shape.distinct <= _MOST_CATEGORIES or shape.numbers < 1:
            continue
        if shape.spelt and "numbers" not in data.get("dictionary", {}).get(shape.name, {}):
            path = ("data", "dictionary", shape.name, "numbers")
            put(asked, path, shape.spelt)
            notes[path] = "its cells are numbers, spelt so as texts"
        if "task" not in data:
            data["task"] = "regression"
            notes["data", "task"] = f"{shape.distinct} different numbers"


def _propose_positive(
    data: dict[str, Any], notes: dict[toml.Path, str], target: ColumnShape
) -> None:
    """Say which of two labels is meant by positive, where one of them says that it is not."""
    if len(target.labels) != 2 or "positive" in data:
        return
    positive = [label for label in target.labels if label.casefold() not in NEGATIVE]
    if len(positive) == 1:
        data["positive"] = positive[0]
        notes["data", "positive"] = "precision and recall are of it"


def _propose_columns(
    asked: dict[str, Any], notes: dict[toml.Path, str], shapes: Sequence[ColumnShape]
) -> None:
    """Leave out what is no feature, take gap words for gaps, and describe what the clinical
    dictionary knows.
    """
    data = asked["data"]
    roles = {
        data.get(key)
        for key in ("target", "site", "patient", "test")
        if isinstance(data.get(key), str)
    }
    features = [shape for shape in shapes if shape.name not in roles and shape.name != readers.SITE]
    if gaps := sorted({word for shape in shapes for word in shape.gaps} - {"unknown", "missing"}):
        data.setdefault("missing_values", [*Data().missing_values, *gaps])
        notes.setdefault(("data", "missing_values"), f"{', '.join(gaps)}: met in the table")

    used = _propose_dates(asked, notes, features)
    why = {
        shape.name: reason
        for shape in features
        if shape.name not in used and (reason := _no_feature(shape))
    }
    if why and "exclude" not in data and "features" not in data:
        data["exclude"] = list(why)
        told = "; ".join(f"{name}: {reason}" for name, reason in list(why.items())[:4])
        notes["data", "exclude"] = told + (f"; and {len(why) - 4} more" if len(why) > 4 else "")

    for shape in features:
        if shape.name not in why and shape.name not in data.get("dictionary", {}):
            _propose_column(asked, notes, shape)


def _propose_column(asked: dict[str, Any], notes: dict[toml.Path, str], shape: ColumnShape) -> None:
    """Describe a feature: what stands beside its numbers,
    and its range where the dictionary knows its name.
    """
    path = ("data", "dictionary", shape.name)
    if len(apart := measures.apart(shape.suffixes)) > 1:
        told = " and ".join(" or ".join(map(repr, spellings)) for spellings in apart)
        what = "" if quotes.are_withheld() else f", {told}"
        ask = (
            f"several units{what}: the one of the range; in the map of a site with another, "
            "suffix and factor."
        )
        data = asked["data"]
        data.setdefault("dictionary", {}).setdefault(shape.name, {}).setdefault(
            "suffix", Ask([], ask)
        )
    elif shape.suffixes:
        put(asked, (*path, "suffix"), list(shape.suffixes))
        notes[(*path, "suffix")] = "its unit stands in the cells, and is taken off"

    if shape.spelt:
        put(asked, (*path, "numbers"), shape.spelt)
        notes[(*path, "numbers")] = "its cells are numbers, spelt so as texts"
    if shape.limits:
        put(asked, (*path, "limits"), "limit")
        what = (
            f"a result beyond a detection limit{quotes.quote(quotes.examples(shape.limits))}, "
            "becomes that limit"
        )
        notes[(*path, "limits")] = f"{what}; or 'half' of a lower one, or an 'indicator' beside it"
    if shape.suffixes or shape.distinct <= 2 or (shape.numbers < 0.9 and not shape.limits):
        return

    entries = clinical.proposal(shape.name)
    if len(entries) == 1:
        entry = entries[0]
        _put_range(asked, shape.name, entry)
        told = f"{entry.doc} in {entry.unit}" if entry.unit else entry.doc
        notes[(*path, "range")] = f"{told}: confirm the unit"
    elif entries:
        units = " or ".join(
            f"{list(entry.range)} in {entry.unit or 'no unit'}" for entry in entries[:4]
        )
        put(asked, (*path, "doc"), f"{entries[0].doc}: set range to {units}")


def _propose_dates(
    asked: dict[str, Any], notes: dict[toml.Path, str], features: Sequence[ColumnShape]
) -> set[str]:
    """Make ages of dates of birth, and say how the others are written;
    return the columns that are used so.

    What another date becomes is left to a person: days from it often tell what is to be predicted.
    """
    data = asked["data"]
    entries = data.get("dictionary", {})
    dated = [shape for shape in features if shape.forms and shape.forms != (dates.SHORT,)]
    births = [
        shape
        for shape in find_named(dated, _BIRTHS)
        if not entries.get(shape.name, {}).get("becomes")
    ]
    others = [shape for shape in dated if shape not in births]
    reference = next(iter(find_named(others, _ADMISSIONS) or others[: len(others) == 1]), None)
    used = set(entries) & {shape.name for shape in dated}

    for shape in births:
        path = ("data", "dictionary", shape.name)
        _put_form(asked, notes, shape)
        used.add(shape.name)
        if reference is None:
            put(asked, (*path, "becomes"), "year")
            notes[(*path, "becomes")] = (
                "the year of birth; 'age' needs a reference, a day or a column of dates"
            )
            continue
        _put_form(asked, notes, reference)
        used.add(reference.name)
        put(asked, (*path, "becomes"), "age")
        put(asked, (*path, "reference"), reference.name)
        notes[(*path, "becomes")] = (
            f"the age in years at {reference.name!r}, which is no feature itself"
        )
        _put_range(asked, shape.name, *clinical.proposal("age"))

    for shape in dated:
        if shape.name not in used and len(shape.forms) == 1:
            _put_form(asked, notes, shape)
    return used


def _put_form(asked: dict[str, Any], notes: dict[toml.Path, str], shape: ColumnShape) -> None:
    """Say in which form a column's dates are written, or ask whether day or month stands first."""
    path = ("data", "dictionary", shape.name, "date")
    if asked["data"].get("dictionary", {}).get(shape.name, {}).get("date"):
        return
    if len(shape.forms) == 1:
        put(asked, path, shape.forms[0])
        notes[path] = f"guessed: no other form reads all {shape.known} dates"
    else:
        ask = Ask("", f"{' or '.join(shape.forms)}: which is the day, no date of the column tells.")
        asked["data"].setdefault("dictionary", {}).setdefault(shape.name, {})["date"] = ask


def _put_range(asked: dict[str, Any], name: str, entry: Feature) -> None:
    for key, value in _describe(entry).items():
        put(asked, ("data", "dictionary", name, key), value)


def _describe(entry: Feature) -> dict[str, Any]:
    ends = [int(end) if end == int(end) else end for end in entry.range]
    kept = {"range": ends, "log": entry.log, "unit": entry.unit}
    return {key: value for key, value in kept.items() if value}


def _no_feature(shape: ColumnShape) -> str:
    """Return why a column can be no feature as it is; empty where it may be one."""
    if not shape.known:
        return "empty"
    if shape.forms == (dates.SHORT,):
        return "dates with years of two digits: write out the century"
    if shape.dated:
        which = "" if shape.forms else " of several forms"
        if len(shape.forms) > 1:
            which = f", {' or '.join(shape.forms)}"
        return f"dates{which}; docs/cells.md makes an age or days of them"
    if (
        shape.numbers < 0.5
        and not shape.limits
        and shape.distinct > _MOST_CATEGORIES
        and not shape.suffixes
    ):
        return f"{shape.distinct} different texts"
    return ""


# What the table itself objects to -----------------------------------------------------------------


def _is_complete(asked: Mapping[str, Any]) -> bool:
    return not any(_asks(asked))


_Surveys = Mapping[str, Mapping[str, Any]]


def _settle(
    asked: dict[str, Any], notes: dict[toml.Path, str], reading: readers.Reading | None
) -> tuple[str, _Surveys | None]:
    """Put in what settles doubts about the table; return why it cannot be looked at, if so, else
    what its sites tell.

    `reading` is the table, unless it has to be read anew now that it is known who is who.
    """
    for _ in range(_PASSES):
        try:
            study = _study(asked)
            reading = reading or readers.read(
                study.folder / study.data.table, sources.complete(study), private=False
            )
            surveys = runs.survey(study, table=reading)
        except MedfedError as error:
            return str(error), None

        found = survey_doubts.find(surveys, study.data, study.privacy.meant)
        if not any([_mend(asked, notes, doubt) for doubt in found]):
            if ("data", "site") in notes:
                # one may have been two by its spelling
                notes["data", "site"] = f"{len(surveys)} sites"
            return "", surveys
        if any(doubt.code == "footer" for doubt in found):
            reading = None  # what is declared of the file's lines
    return "", None


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
