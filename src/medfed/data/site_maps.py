"""How one site's table differs from what the study expects: a file of the site's own, applied to
its rows alone.

    [rename]
    krea = "creatinine"     # its name here = its name in the study; "" leaves a column out

    [columns.creatinine]
    factor = 88.42          # mg/dl here, umol/l in the study

    absent = ["troponin"]   # features that are not measured here, before the first table

It comes before all else that the study declares, and each cell follows from its row alone. The same
file serves where all sites are in one process and at the hospital that wrote it.
"""

import hashlib
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import pandas as pd

from medfed.core import toml
from medfed.core.checks import DataError, StudyError, nearest, plain
from medfed.core.refusals import Refusal, refuse
from medfed.data import dates, mapping
from medfed.data.mapping import Fault, Texts
from medfed.study import Data, Feature, Study, read_as


@dataclass(frozen=True)
class SiteColumn:
    """How a column's cells differ at a site. Applied in this order;
    the column has the study's name already.
    """

    decimal: Literal[".", ","] = "."  # ",": 1,5 is one and a half and 1.234,5 has a thousand
    recode: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    suffix: tuple[str, ...] = ()  # what stands behind the numbers here, and is taken off
    date: str = ""  # the form of this site's dates; they are written as the study's
    factor: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class SiteMap:
    """A site's own file: renamed columns, cells, and what is not measured there."""

    rename: dict[str, str] = field(default_factory=dict)
    columns: dict[str, SiteColumn] = field(default_factory=dict)
    absent: tuple[str, ...] = ()

    def names(self) -> dict[str, str]:
        """Return the columns that keep a place, by their names here."""
        return {old: new for old, new in self.rename.items() if new}


Maps = Mapping[str, SiteMap]


# files --------------------------------------------------------------------------------------------


def texts(study: Study) -> dict[str, str]:
    """Return the text of each site's map, by site.

    Raises StudyError where one cannot be read, or is not the one that a run was begun with.
    """
    found: dict[str, str] = {}
    refusals: list[Refusal] = []
    for site, name in study.data.site_maps.items():
        where = f"{toml.key('data', 'site_maps', site)}={name!r}"
        path = study.folder / name
        try:
            found[site] = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            text = f"{where} cannot be read: {plain(error)}; its path is relative to the study file"
            refusals.append(Refusal(StudyError(text)))
            continue

        known = study.data.site_maps_sha256.get(site)
        now = sha256(found[site])
        if known and known != now:
            text = (
                f"{where} was changed: its sha256 is {now[:12]}..., the run began with "
                f"{known[:12]}...; start a new run"
            )
            refusals.append(Refusal(StudyError(text)))

    refuse(refusals)
    return found


def sha256(text: str) -> str:
    """Return the digest by which a study knows a map."""
    return hashlib.sha256(text.encode()).hexdigest()


def load(study: Study) -> dict[str, SiteMap]:
    """Return the map of each site that has one. Raises StudyError for all keys of all maps that
    cannot be used.
    """
    return _parse_all(texts(study), study)


def _parse_all(read: Mapping[str, str], study: Study) -> dict[str, SiteMap]:
    found: dict[str, SiteMap] = {}
    refusals: list[Refusal] = []
    for site, text in read.items():
        found[site], wrong = parse(text, study.data.site_maps[site])
        refusals += wrong
    refuse(refusals)
    return found


def parse(text: str, name: str) -> tuple[SiteMap, list[Refusal]]:
    """Read a map as far as it can be read, and return what stands against it;
    `name` is the file's, for errors.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        return SiteMap(), [
            Refusal(
                StudyError(
                    f"site map {name!r} cannot be read as TOML: "
                    f"{toml.explain_unreadable(text, error)}"
                )
            )
        ]

    read, refusals = read_as(SiteMap, tables)
    told = [Refusal(StudyError(f"site map {name!r}: {refusal.error}")) for refusal in refusals]
    for column, entry in read.columns.items():
        if entry.date and entry.date not in dates.FORMS:
            where = toml.key("columns", column, "date")
            expected = f"expected one of {', '.join(dates.FORMS)}"
            told.append(
                Refusal(StudyError(f"site map {name!r}: {where}={entry.date!r}; {expected}"))
            )

        if not (np.isfinite(entry.factor) and entry.factor and np.isfinite(entry.offset)):
            where = toml.key("columns", column, "factor")
            told.append(
                Refusal(
                    StudyError(
                        f"site map {name!r}: {where}={entry.factor:g}; expected a number but 0"
                    )
                )
            )

    return read, told


def complete(data: Data, study: Study) -> Data:
    """Return a data table that says which maps it goes by, and what they declare absent."""
    if not data.site_maps:
        return data
    read = texts(study)
    absent = {**data.absent}
    for site, one in _parse_all(read, study).items():
        if one.absent:
            absent[site] = tuple(dict.fromkeys((*absent.get(site, ()), *one.absent)))
    digests = {site: sha256(text) for site, text in read.items()}
    return replace(data, absent=absent, site_maps_sha256=digests)


# a table ------------------------------------------------------------------------------------------


def columns(header: Sequence[str], maps: Maps) -> list[str]:
    """Return a table's columns under the study's names."""
    new = [name for one in maps.values() for name in one.names().values()]
    gone = {old for one in maps.values() for old in one.rename} - set(new)
    return list(dict.fromkeys([*(name for name in header if name not in gone), *new]))


def misfits(header: Sequence[str], maps: Maps, data: Data) -> Iterator[Refusal]:
    """Yield what maps say of columns that the table's header does not bear out;
    for each its site is named.
    """
    if maps and not data.site:
        yield Refusal(
            StudyError(
                "data.site_maps is set, but no data.site says whose rows are whose; set data.site"
            )
        )

    known = set(header)
    here = set(columns(header, maps))
    for site, one in maps.items():
        where = f"site {site!r}: its map"
        for old, new in one.rename.items():
            if old not in known:
                yield Refusal(
                    DataError(
                        f"{where} renames {old!r}, no column of the table; {nearest(old, header)}"
                    )
                )
            if data.site in (old, new):
                yield Refusal(
                    DataError(
                        f"{where} renames {data.site!r}, which says whose rows are whose; take "
                        "it out"
                    )
                )

        twice = [
            name for name in one.names().values() if list(one.names().values()).count(name) > 1
        ]
        if twice:
            yield Refusal(
                DataError(
                    f"{where} renames two columns to {twice[0]!r}; give each a name of its own"
                )
            )

        for name in one.columns:
            if name not in here:
                yield Refusal(
                    DataError(
                        f"{where} has [columns.{toml.key(name)}], no column; {nearest(name, here)}"
                    )
                )

    for site, names in data.absent.items():
        for name in names:
            if name not in here:
                text = (
                    f"{toml.key('data', 'absent', site)} names {name!r}, no column of the "
                    f"table; {nearest(name, here)}"
                )
                yield Refusal(DataError(text))


def apply(
    frame: pd.DataFrame, maps: Maps, data: Data, site: pd.Series | None, private: bool = False
) -> pd.DataFrame:
    """Return the table under the study's names, each site's cells mapped by its own file; `site`
    [n] names each row's.

    Raises DataError for cells that a map leaves in doubt; `private`: they count as missing and are
    noted.
    """
    if site is None or not (maps or data.absent):
        return frame
    faults: list[Fault] = []
    frame = _rename_columns(frame, maps, site, faults)

    for name, one in maps.items():
        rows_N = (site == name).to_numpy(dtype=bool)
        for column, entry in one.columns.items():
            frame = _put(
                frame,
                column,
                rows_N,
                _cells(frame.loc[rows_N, column], column, entry, data, rows_N, faults),
            )

    for name, columns_ in data.absent.items():
        frame = _empty_absent(frame, columns_, (site == name).to_numpy(dtype=bool), data, faults)
    mapping.settle(faults, frame, private, site, data.patient)
    return frame


def _rename_columns(
    frame: pd.DataFrame, maps: Maps, site: pd.Series, faults: list[Fault]
) -> pd.DataFrame:
    new = columns([str(name) for name in frame.columns], maps)
    moved: dict[str, np.ndarray] = {}
    claimed = {old: np.zeros(len(frame), dtype=bool) for one in maps.values() for old in one.rename}

    for name, one in maps.items():
        rows_N = (site == name).to_numpy(dtype=bool)
        for old in one.rename:
            claimed[old] |= rows_N
    for name, one in maps.items():
        rows_N = (site == name).to_numpy(dtype=bool)
        for old, to in one.names().items():
            values = moved.get(to)
            if values is None:
                if to in frame.columns:
                    values = _objects(frame[to])
                else:
                    values = np.full(len(frame), None, dtype=object)
            if to in frame.columns and to not in one.rename:
                both = rows_N & _is_known(frame[to]) & _is_known(frame[old])
                _fault(
                    faults,
                    to,
                    both,
                    f"a value, and one in {old!r} too, which the map renames to it",
                    "Empty one",
                )
            moved[to] = np.where(rows_N, _objects(frame[old]), values)
    for old, rows_N in claimed.items():
        left_N = ~rows_N & _is_known(frame[old])
        if old not in new:  # else it is another site's name for something
            action = (
                f'Rename it in that site\'s map too: [rename] {toml.key(old)} = "NAME", or "" '
                "to leave it out"
            )
            _fault(
                faults, old, left_N, "a value in a column that another site's map renames", action
            )
    for name, one in maps.items():  # a column that is renamed away and not renamed to is empty here
        rows_N = (site == name).to_numpy(dtype=bool)
        for old in one.rename:
            if old in new and old not in one.names().values():
                left = moved.get(old, _objects(frame[old])).copy()
                left[rows_N] = None
                moved[old] = left
    frame = frame.assign(
        **{name: mapping.column_of(values, frame) for name, values in moved.items()}
    )
    return frame[new]


def _objects(values: pd.Series) -> np.ndarray:
    return values.to_numpy(dtype=object)


def _is_known(values: pd.Series) -> np.ndarray:
    known: np.ndarray = (values.notna() & (values.astype(str).str.strip() != "")).to_numpy(
        dtype=bool
    )
    return known


def _fault(faults: list[Fault], name: str, which_N: np.ndarray, what: str, action: str) -> None:
    if which_N.any():
        faults.append(Fault(name, which_N, what, action))


def _put(frame: pd.DataFrame, name: str, rows_N: np.ndarray, texts: np.ndarray) -> pd.DataFrame:
    values = _objects(frame[name])
    values = values.copy()
    values[rows_N] = texts
    return frame.assign(**{name: mapping.column_of(values, frame)})


def _cells(
    values: pd.Series,
    name: str,
    entry: SiteColumn,
    data: Data,
    rows_N: np.ndarray,
    faults: list[Fault],
) -> np.ndarray:
    """Return a site's cells of a column as the study expects them [n of the site]."""
    feature = data.dictionary.get(name, Feature())
    absent = {*data.missing_values, *feature.missing}
    code_N, text_U = mapping.find_different(values)
    if entry.decimal == ",":
        text_U = [set_point(text) for text in text_U]
    text_U = mapping.recode(text_U, entry.recode, set(entry.missing))
    if entry.suffix:
        sign = "," if "," in (entry.decimal, data.format.decimal) else "."
        text_U = [mapping.without_suffix(text, entry.suffix, sign) for text in text_U]

    if entry.date:
        text_U, bad_U = _dates(text_U, entry.date, feature.date or "iso", absent)
        which_N = np.zeros(len(rows_N), dtype=bool)
        which_N[rows_N] = bad_U[code_N]
        _fault(
            faults,
            name,
            which_N,
            f"no date of the form {entry.date}",
            "Correct the cells, or the map's date",
        )

    if (entry.factor, entry.offset) != (1.0, 0.0):
        known = [None if text in absent else text for text in text_U]
        changed = mapping.convert(known, entry.factor, entry.offset, absent)
        text_U = [text if new is None else new for text, new in zip(text_U, changed, strict=True)]

    found: np.ndarray = np.array([*text_U], dtype=object)[code_N]
    return found


def set_point(text: str | None) -> str | None:
    """Return a number with a decimal comma as one with a point:
    "1.234,5" as "1234.5"; any other text as it is.
    """
    if text is None:
        return None
    whole, comma, part = text.partition(",")
    digits = whole.lstrip("+-<>≤≥= ")
    groups = digits.split(".")
    grouped = (
        len(groups) > 1
        and 1 <= len(groups[0]) <= 3
        and all(len(group) == 3 for group in groups[1:])
    )
    if (
        not all(group.isdigit() for group in groups)
        or (comma and not part.isdigit())
        or (len(groups) > 1 and not grouped)
    ):
        return text

    return whole.replace(".", "") + (f".{part}" if comma else "")


def _dates(text_U: Texts, form: str, wanted: str, absent: set[str]) -> tuple[Texts, np.ndarray]:
    """Return dates [U] in the study's form, and which cannot be read [U]; they are missing."""
    known = [None if text in absent else text for text in text_U]
    moment_U = dates.read(known, form)
    bad_U = np.isnat(moment_U) & np.array([text is not None for text in known], dtype=bool)
    return dates.write(moment_U, wanted), bad_U


def _empty_absent(
    frame: pd.DataFrame, names: Sequence[str], rows_N: np.ndarray, data: Data, faults: list[Fault]
) -> pd.DataFrame:
    """Return a table in which a site lacks what it declares absent; a value there is told."""
    for name in names:
        absent = {*data.missing_values, *data.dictionary.get(name, Feature()).missing}
        known_N = ~mapping.is_missing(frame[name], absent)
        _fault(
            faults,
            name,
            rows_N & known_N,
            "a value where it is declared absent",
            "Take it out of `absent`",
        )
        frame = _put(frame, name, rows_N, np.full(int(rows_N.sum()), None, dtype=object))
    return frame
