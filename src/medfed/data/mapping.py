"""What stands in cells and rows, as the study declares it:
a step between reading a table and cleaning it.

A table of texts goes in and one comes out, its rows numbered as before. What becomes of a cell
follows from its row and from what is declared alone, never from another row: so a privacy claim
bears it. There a cell that cannot be read counts as missing, and the site's own log says so;
without a claim it is an error, all columns' at once.

Texts of a column are looked at once each, however many rows hold them. n rows, U different texts of
a column.
"""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from medfed.core import patient_ids, quotes, toml
from medfed.core.checks import DataError, PlanError, StudyError, nearest, some, those
from medfed.core.refusals import Refusal, refuse
from medfed.data import dates, numerals
from medfed.data.doubts import NO, YES, quotable
from medfed.data.features import features_of, limit_columns
from medfed.data.partition import id_texts
from medfed.data.raw_columns import canonical
from medfed.study import KINDS, Data, Feature

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows

_MORE_YES = ("o", "s", "+", "pos", "positive", "positiv", "positif", "positivo")
_MORE_NO = (
    "-",
    "\N{MINUS SIGN}",
    "\N{EN DASH}",
    "neg",
    "negative",
    "negativ",
    "négatif",
    "negativo",
)
BOOLEAN = {**dict.fromkeys((*YES, *_MORE_YES), "yes"), **dict.fromkeys((*NO, *_MORE_NO), "no")}
"""How yes and no are spelt, in lower case:
also as nobody would guess who is not told that a column is boolean.
"""

_LIMIT = re.compile(
    r"(<=|>=|=<|=>|[<>≤≥⩽⩾])\s*([+-]?(?:\d+(?:[.,]\d*)?|[.,]\d+)(?:e[+-]?\d+)?)", re.IGNORECASE
)
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2},\d{3}")  # or a decimal comma: nobody can tell

Texts = list[str | None]
"""Different texts of a column [U]; None for one that is missing."""


# what is declared ---------------------------------------------------------------------------------


def complete(data: Data) -> Data:
    """Return a data table with what follows from what it declares;
    completing it again changes nothing.

    A boolean's categories, the entries of columns that are made, and the column that marks rows by
    their date.
    """
    entries: dict[str, Feature] = {}
    for name, feature in data.dictionary.items():
        if feature.boolean and not feature.categories:
            feature = replace(feature, categories=("no", "yes"))
        entries[name] = feature
        for column in limit_columns(name, feature):
            entries.setdefault(
                column,
                Feature(
                    range=(0.0, 1.0), doc=f"1 where {name} is {column.removeprefix(name).strip()}"
                ),
            )

    return replace(data, dictionary=entries, test=data.test or _mark(data))


def _mark(data: Data) -> str:
    """Return the name of the column that marks rows by their date; "" for none."""
    if data.time and data.test_from:
        return f"{data.time} from {data.test_from}"
    return ""


def columns(header: Sequence[str], data: Data) -> list[str]:
    """Return the columns of a table once it is mapped; `data` is completed."""
    made = [
        column
        for name in features_of(header, data)
        for column in limit_columns(name, _entry(data, name))
    ]
    marked: list[str] = []
    if data.test_from:
        marked = [data.test]
    return [*header, *(name for name in (*made, *marked) if name not in set(header))]


def misfits(header: Sequence[str], data: Data) -> Iterator[Refusal]:
    """Yield what a study says of rows and cells that does not go together,
    or not with its table's header.

    The header is that before anything is made.
    """
    yield from _disagreements(data)
    known = set(header)
    for name in features_of(header, data):
        feature = _entry(data, name)
        other = feature.reference
        if feature.becomes and other and moment(other) is None and other not in known:
            where = toml.key("data", "dictionary", name, "reference")
            text = (
                f"{where}={other!r} is no date (2024-12-31) and no column of the table; "
                f"{nearest(other, header)}"
            )
            yield Refusal(DataError(text))

        if taken := [column for column in limit_columns(name, feature) if column in known]:
            text = (
                f"{toml.key('data', 'dictionary', name, 'limits')}='indicator' makes a column "
                f"{taken[0]!r}, which the table has already; rename that one, or set "
                "limits='limit'"
            )
            yield Refusal(DataError(text))

    if data.test_from and data.time and data.time not in known:
        yield Refusal(
            DataError(
                f"data.time={data.time!r} is no column of the table; {nearest(data.time, header)}"
            )
        )


def _disagreements(data: Data) -> Iterator[Refusal]:
    """Yield the keys about whole rows that do not go together."""
    for what, column in (("patient", data.patient), ("site", data.site), ("time", data.time)):
        if f"rows without {what}" in data.drop and not column:
            text = (
                f"data.drop holds 'rows without {what}', and no data.{what} names a column; set "
                "it, or take it out"
            )
            yield Refusal(StudyError(text))

    if "rows without patient" in data.drop and data.missing_patient == "own":
        text = (
            "data.drop leaves out rows without patient, and data.missing_patient='own' keeps "
            "them; keep one of the two"
        )
        yield Refusal(StudyError(text))

    if data.test_values and not data.test:
        text = (
            f"data.test_values={list(data.test_values)} and no data.test, the column that they "
            "stand in; set it"
        )
        yield Refusal(StudyError(text))

    if data.test_from and not data.time:
        text = (
            f"data.test_from={data.test_from!r} and no data.time, the column of the dates; set it"
        )
        yield Refusal(StudyError(text))

    if data.test_from and data.time and data.test != _mark(data):
        text = (
            f"data.test={data.test!r} and data.test_from={data.test_from!r} both say who is "
            "held out; keep one"
        )
        yield Refusal(StudyError(text))

    if data.test_from and data.test_values:
        yield Refusal(
            StudyError(
                "data.test_values is for a column that marks rows, and data.test_from for dates; "
                "keep one"
            )
        )


def _entry(data: Data, name: str) -> Feature:
    return data.dictionary.get(name, Feature())


def moment(text: str) -> np.datetime64 | None:
    """Return the day that a `reference` names; None where it names a column."""
    day: np.datetime64 = dates.read([text], "iso")[0]
    if np.isnat(day):
        return None
    return day


def maps(feature: Feature) -> bool:
    """Say whether an entry changes what stands in a cell."""
    kinds = (
        feature.recode,
        feature.boolean,
        feature.limits,
        feature.becomes,
        feature.suffix,
        feature.numbers,
    )
    return any(kinds) or (feature.factor, feature.offset) != (1.0, 0.0)


# a table ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """Cells of a column that are not what is declared:
    which rows [n], what they are not, and what to do.
    """

    column: str
    which_N: np.ndarray
    what: str
    action: str

    def error(self, frame: pd.DataFrame, site: pd.Series | None, patient: str) -> DataError:
        """Say it with site, column, rows and cells as examples; none of what names a patient."""
        where = f"column {self.column!r}"
        if site is not None:
            names = sorted(set(site[self.which_N]))
            if len(names) == 1:
                where = f"site {names[0]!r}, {where}"
            else:
                where = f"{where} at {those(names)}"
        cells = frame[self.column][self.which_N] if self.column in frame.columns else ()
        there = quotes.there(cells) if self.column != patient and quotable(self.column) else ""
        return DataError(
            f"{where}: {self.what} in row {some(frame.index[self.which_N])}. {self.action}{there}"
        )

    def note(self, index: pd.Index) -> None:
        """Write it into the site's own log."""
        rows = some(index[self.which_N], 50)
        logger.warning(
            "column %r: %s, so it counts as missing, in row %s", self.column, self.what, rows
        )


def settle(
    faults: Sequence[Fault],
    frame: pd.DataFrame,
    private: bool,
    site: pd.Series | None = None,
    patient: str = "",
) -> None:
    """Refuse all faults at once; `private`: note them.
    `site` names the site of each row, `patient` who it is.
    """
    if not private:
        refuse(Refusal(fault.error(frame, site, patient)) for fault in faults)
    for fault in faults:
        fault.note(frame.index)


def apply(
    frame: pd.DataFrame,
    data: Data,
    private: bool = False,
    site: pd.Series | None = None,
    names: Sequence[str] | None = None,
) -> pd.DataFrame:
    """Return a table whose cells are as the dictionary declares them; of columns `names` alone,
    else of all but those.

    What is excluded, or is no feature and no role, is not looked at. `data` is completed; `site`
    [n] names the site of each row, for errors. Raises DataError with all columns and rows;
    `private`: never for a cell.
    """
    header = [str(name) for name in frame.columns]
    roles = roles_of(data)
    if names is not None:
        chosen = names
    else:
        chosen = [n for n in (*features_of(header, data), data.test) if n not in roles]

    faults: list[Fault] = []
    made: dict[str, object] = {}
    for name in chosen:
        if name in frame.columns and maps(feature := _entry(data, name)):
            made |= _map_column(frame, name, feature, data, faults)

    if names is None and data.test_from:
        made[data.test] = _marks(frame, data, faults, private)
    settle(faults, frame, private, site, data.patient)
    if made:
        return frame.assign(**{name: column_of(values, frame) for name, values in made.items()})

    return frame


def roles_of(data: Data) -> list[str]:
    """Return the columns by which rows are told apart: they are mapped first, as rows without them
    may be dropped.
    """
    return [name for name in dict.fromkeys((data.site, data.patient, data.target)) if name]


def column_of(values: object, frame: pd.DataFrame) -> pd.Series:
    """Return texts [n] as a column in the type that the table's others have."""
    texts = any(isinstance(kind, pd.StringDtype) for kind in frame.dtypes)
    return pd.Series(values, index=frame.index, dtype="str" if texts else object)


def _map_column(
    frame: pd.DataFrame, name: str, feature: Feature, data: Data, faults: list[Fault]
) -> dict[str, object]:
    """Return a column as it is declared, and those that are made beside it."""
    absent = {*data.missing_values, *feature.missing}
    code_N, text_U = find_different(frame[name])
    if feature.boolean:  # "-" is no here, unless this column says otherwise
        spelt = {text for text in data.missing_values if text.casefold() not in BOOLEAN}
        text_U, bad_U = _booleans(recode(text_U, feature.recode, {*spelt, *feature.missing}))
        what = "neither yes nor no"
        action = (
            f"Correct the cells, or say what they mean: {_key(name, 'recode')} = {{ TEXT = 'yes' }}"
        )
        _tell(faults, name, bad_U, code_N, what, action)
        return {name: _at(text_U, code_N)}

    text_U = recode(text_U, feature.recode, absent)
    if feature.suffix:
        text_U = [without_suffix(text, feature.suffix, data.format.decimal) for text in text_U]
    if feature.numbers and not pd.api.types.is_numeric_dtype(frame[name].dtype):
        text_U = numerals.set_points(text_U, feature.numbers)
    if feature.becomes:
        number_N = _date_numbers(frame, name, feature, text_U, code_N, data, faults)
        return {name: write_numbers(number_N, absent)}

    side_U = np.zeros(len(text_U), dtype=np.int64)
    if feature.limits:
        text_U, side_U = _limits(text_U, feature.limits, absent)
    if (feature.factor, feature.offset) != (1.0, 0.0):
        text_U = convert(text_U, feature.factor, feature.offset, absent)
        if not feature.factor > 0:
            side_U = -side_U

    beside = zip(limit_columns(name, feature), (-1, 1), strict=False)
    return {name: _at(text_U, code_N)} | {
        column: _flags(side_U == side, code_N) for column, side in beside
    }


def without_suffix(text: str | None, suffixes: Sequence[str], decimal: str = ".") -> str | None:
    """Return a cell without what stands behind its number: "12,5 %" is 12.5 where the table has
    decimal commas.
    """
    ending = next((one for one in suffixes if text and text.endswith(one)), None)
    if text is None or ending is None:
        return text
    number = text.removesuffix(ending).rstrip()
    if decimal == "," and re.fullmatch(r"[+-]?\d+,\d+", number):
        return number.replace(",", ".")
    return number


def find_different(values: pd.Series) -> tuple[np.ndarray, Texts]:
    """Return which text each row holds [n],
    and the different texts [U] as `canonical` has them, None the last.
    """
    values = _apart(dates.texts(values))
    code_N, found = pd.factorize(values)
    texts: Texts = list(canonical(pd.Series(found, dtype=object)))
    return np.where(code_N < 0, len(texts), code_N), [*texts, None]


def _apart(values: pd.Series) -> pd.Series:
    """Return cells that are equal only where they say the same.

    -0.0 is 0.0, and in a column of objects True is 1: else the first of them met would say for all
    how they read.
    """
    if pd.api.types.is_float_dtype(values.dtype):
        return values + 0.0
    if values.dtype == object and not values.map(lambda cell: isinstance(cell, str)).all():
        return values.map(_spell_apart, na_action="ignore")
    return values


def _spell_apart(cell: object) -> str:
    if type(cell) is float:
        return str(cell + 0.0)
    return str(cell)


def _at(text_U: Texts, code_N: np.ndarray) -> np.ndarray:
    """Return the text of each row [n]."""
    found: np.ndarray = np.array([*text_U], dtype=object)[code_N]
    return found


def _flags(which_U: np.ndarray, code_N: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.where(which_U, "1", "0").astype(object)[code_N]
    return found


def _tell(
    faults: list[Fault], name: str, bad_U: np.ndarray, code_N: np.ndarray, what: str, action: str
) -> None:
    if (which_N := bad_U[code_N]).any():
        faults.append(Fault(name, which_N, what, action))


def _key(name: str, key: str) -> str:
    return toml.key("data", "dictionary", name, key)


# cells --------------------------------------------------------------------------------------------


def recode(text_U: Texts, recode: Mapping[str, str], absent: set[str]) -> Texts:
    """Return texts [U] as what they stand for; None for what is missing, before or after."""
    if recode:
        keys = canonical(pd.Series(list(recode), dtype=object))
        meaning = dict(zip(keys, recode.values(), strict=True))
        text_U = [meaning.get(text, text) if text is not None else None for text in text_U]
    return [None if text is None or not text or text in absent else text for text in text_U]


def _booleans(text_U: Texts) -> tuple[Texts, np.ndarray]:
    """Return texts [U] as "yes" and "no", and which are neither [U]."""
    found = [None if text is None else BOOLEAN.get(text.casefold()) for text in text_U]
    bad = [text is not None and yes is None for text, yes in zip(text_U, found, strict=True)]
    return found, np.array(bad, dtype=bool)


def is_limit(text: str) -> bool:
    """Say whether a text is a result beyond a detection limit: "<0.3", "> 100"."""
    return _limit(text) is not None


def _limit(text: str) -> tuple[int, float] | None:
    """Return on which side of its limit a result lies, -1 below and 1 above, and the limit."""
    match = _LIMIT.fullmatch(text.strip())
    if match is None or _THOUSANDS.fullmatch(match[2]):
        return None
    side = 1 if set(match[1]) & set(">≥⩾") else -1
    return side, float(match[2].replace(",", "."))


def _limits(text_U: Texts, kind: str, absent: set[str]) -> tuple[Texts, np.ndarray]:
    """Return texts [U] with a number in place of each limit, and on which side of it they lie [U],
    0 for the rest.
    """
    found = list(text_U)
    side_U = np.zeros(len(text_U), dtype=np.int64)
    for u, text in enumerate(text_U):
        if text is None or (beyond := _limit(text)) is None:
            continue
        side_U[u], limit = beyond
        half = kind == "half" and side_U[u] < 0
        (found[u],) = write_numbers(np.array([limit / 2 if half else limit]), absent)
    return found, side_U


def convert(text_U: Texts, factor: float, offset: float, absent: set[str]) -> Texts:
    """Return texts [U], of which those that are numbers are in another unit."""
    number_U = pd.to_numeric(pd.Series(text_U, dtype=object), errors="coerce").to_numpy(
        dtype=np.float64
    )
    known_U = np.isfinite(number_U)
    with np.errstate(over="ignore"):
        changed_U = write_numbers(np.where(known_U, number_U * factor + offset, np.nan), absent)
    return [
        new if known else text for new, known, text in zip(changed_U, known_U, text_U, strict=True)
    ]


def write_numbers(number_N: np.ndarray, absent: set[str]) -> np.ndarray:
    """Return numbers [n] as texts that give them back bit for bit, None for NaN.

    One that is spelt as a text that means missing is written with an exponent: it is a number and
    no code.
    """
    code_N, found = pd.factorize(number_N)
    texts: Texts = [None] * len(found)
    for u, number in enumerate(found.tolist()):
        text = str(int(number)) if abs(number) < 1e15 and number == int(number) else repr(number)
        texts[u] = f"{text}e0" if text in absent else text
    return np.array([*texts, None], dtype=object)[np.where(code_N < 0, len(texts), code_N)]


# dates --------------------------------------------------------------------------------------------


def _date_numbers(
    frame: pd.DataFrame,
    name: str,
    feature: Feature,
    text_U: Texts,
    code_N: np.ndarray,
    data: Data,
    faults: list[Fault],
) -> np.ndarray:
    """Return what a column's dates become, float64 [n]; NaN for one missing or unreadable."""
    moment_N = _moments(frame, name, text_U, code_N, feature.date, faults)
    reference_N = None
    if feature.reference and feature.becomes in ("age", "days since", "days until"):
        fixed = moment(feature.reference)
        if fixed is not None:
            reference_N = np.full(len(frame), fixed)
        else:
            reference_N = _dates_of(frame, feature.reference, data, faults)

    return dates.number(moment_N, feature.becomes, reference_N)


def _dates_of(frame: pd.DataFrame, name: str, data: Data, faults: list[Fault]) -> np.ndarray:
    """Return a column's dates, datetime64[s] [n]; NaT where one is missing or cannot be read."""
    feature = _entry(data, name)
    code_N, text_U = find_different(frame[name])
    text_U = recode(text_U, feature.recode, {*data.missing_values, *feature.missing})
    return _moments(frame, name, text_U, code_N, feature.date or "iso", faults)


def _moments(
    frame: pd.DataFrame,
    name: str,
    text_U: Texts,
    code_N: np.ndarray,
    form: str,
    faults: list[Fault],
) -> np.ndarray:
    if pd.api.types.is_datetime64_any_dtype(frame[name]):
        form = "iso"  # the column's type says it already
    moment_U = dates.read(text_U, form)
    bad_U = np.isnat(moment_U) & np.array([text is not None for text in text_U], dtype=bool)
    # a reference of several columns: told once
    if bad_U.any() and not any(fault.column == name for fault in faults):
        action = _date_action(
            name, form, [text for text, bad in zip(text_U, bad_U, strict=True) if bad and text]
        )
        _tell(faults, name, bad_U, code_N, f"no date of the form {form}", action)
    found: np.ndarray = moment_U[code_N]
    return found


def _date_action(name: str, form: str, bad: Sequence[str]) -> str:
    """Say what to do about texts that are not dates of the declared form."""
    others = dates.forms(bad)
    if others == [dates.SHORT]:
        return "A year has four digits: write out the century"
    if others:
        return (
            f"These are {' or '.join(others)}: declare that, {_key(name, 'date')} = "
            f"{others[0]!r}, or correct the cells"
        )
    return "Correct the cells, or add the text to data.missing_values"


def _marks(frame: pd.DataFrame, data: Data, faults: list[Fault], private: bool) -> np.ndarray:
    """Return which rows are of the day `data.test_from` or later: texts [n] "test" and "train".

    One without a date is told of; under a claim it is not held out.
    """
    moment_N = _dates_of(frame, data.time, data, faults)
    gone = np.isnat(moment_N)
    if gone.any() and not any(fault.column == data.time for fault in faults):
        action = (
            "Data are tested by time: correct the cells, or set data.drop = ['rows without time']"
        )
        faults.append(Fault(data.time, gone, "no date", action))
    later = moment_N >= moment(data.test_from)
    marks: np.ndarray = np.where(later, "test", "train").astype(object)
    return marks


# rows ---------------------------------------------------------------------------------------------


def lacking(frame: pd.DataFrame, what: str, data: Data) -> np.ndarray:
    """Say of each row [n] whether it is one of "rows without target", "...
    site", "... patient", "... time".
    """
    name = {"target": data.target, "site": data.site, "patient": data.patient, "time": data.time}[
        what.split()[-1]
    ]
    if name not in frame.columns:
        return np.zeros(len(frame), dtype=bool)
    if name == data.patient:
        absent = patient_ids.nobodies(data.missing_values)
        code_N, found = pd.factorize(id_texts(frame[name], f"column {name!r}"))
        nobody: np.ndarray = np.array(
            [patient_ids.is_nobody(text, absent) for text in found], dtype=bool
        )[code_N]
        return nobody
    return is_missing(frame[name], {*data.missing_values, *_entry(data, name).missing})


def is_missing(values: pd.Series, absent: set[str]) -> np.ndarray:
    """Say of each cell [n] whether it is missing: empty, or one of the texts that mean so."""
    code_N, text_U = find_different(values)
    gone: np.ndarray = np.array([text is None for text in recode(text_U, {}, absent)], dtype=bool)[
        code_N
    ]
    return gone


def drop(frame: pd.DataFrame, what: str, data: Data) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the rows that are not `what`, where the study drops those, and which go [n]."""
    if what not in data.drop:
        return frame, np.zeros(len(frame), dtype=bool)
    gone = lacking(frame, what, data)
    if gone.any():
        logger.warning("%s: left out, as data.drop says: row %s", what, some(frame.index[gone], 50))
    return (frame[~gone] if gone.any() else frame), gone


def refuse_kinds(data: Data) -> Iterator[Refusal]:
    """Yield the words that take features by what their cells hold:
    under a claim nothing follows from cells.
    """
    if words := [word for word in data.features if word in KINDS]:
        text = (
            f"data.features holds {words[0]!r} and a privacy claim do not compose: which columns "
            "are numbers would follow from patients' cells. Name the columns, or give a pattern "
            "('lab_*')."
        )
        yield Refusal(PlanError(text))
