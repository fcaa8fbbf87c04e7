"""Where records come from: a bundled source, a file or folder, a database.
Each site gets its own frame.

Here a study says who is where: the rows that name a site, or patients dealt to sites by a keyed
hash.
"""

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from medfed.core import toml
from medfed.core.checks import DataError, PlanError, StudyError, closest, nearest, some
from medfed.core.refusals import Refusal, refuse
from medfed.core.streams import Streams
from medfed.data import databases, doubts, footers, joins, mapping, readers, site_maps
from medfed.data.bundled import SOURCES
from medfed.data.doubts import Doubt
from medfed.data.frames import Frames, number_rows
from medfed.data.partition import site_of
from medfed.data.raw_columns import with_kinds
from medfed.data.readers import Reading
from medfed.data.tables import name_patients
from medfed.data.workbooks import SHEETS
from medfed.study import Data, Feature, Study

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows


def frames(
    study: Study,
    folder: Path | None = None,
    progress: bool = False,
    private: bool = False,
    table: Reading | None = None,
) -> tuple[Frames, Data]:
    """Return each site's frame, and the study's data table completed with what the source knows.

    Sites come in the order of their declared names (`sites.names`; `private`: `privacy.sizes`),
    else sorted: never in the order of a table's rows. `private`: a declared site without a row has
    an empty frame, and a row of a site that is not declared is refused without being quoted.
    `folder` is where downloaded data is looked for first (`--data`, or the environment's
    MEDFED_DATA). `table` is the study's, where it is read already. Raises DataError or StudyError
    before any training.
    """
    data = complete(study)
    reading = read(study, folder, progress, private, table)
    frame = reading.frame
    refuse(_misfits([str(name) for name in frame.columns], study, data, private))
    footed: list[Doubt] = []
    if not private:
        frame, footed = _take_off_footer(frame, study, data)

    # Which sites there are: those that rows name, or those that the study deals patients to.
    frame, site, nowhere = _name_sites(frame, data)
    names = study.sites.names
    if site is not None:
        names = _sites_of_rows(frame, site, study, data, private)

    # Cells as the study expects them: by each site's map,
    # then the columns by which rows are told apart.
    frame = site_maps.apply(frame, site_maps.load(study), data, site, private)
    frame = mapping.apply(
        frame, data, private, site, [name for name in mapping.roles_of(data) if name != data.site]
    )

    # Rows that the study leaves out.
    dropped: dict[str, dict[str, int]] = {name: {} for name in names}
    if nowhere:
        dropped = {name: {"rows without site": nowhere} for name in names}
    frame, site = _drop_rows(frame, site, study, data, private, dropped)

    # All other columns, and each row to its site.
    frame = mapping.apply(frame, data, private, site)
    if site is None:
        named = name_patients(frame, data, private)
        site = site_of(named, names, study.sites.shares, Streams(study.study.seed))
    if not private:
        data = with_kinds(frame, data)
    split = Frames.split(frame, site.to_numpy(dtype=object), names)
    if private:
        return replace(split, dropped=dropped), data

    # What was met before cells are looked at.
    met: dict[str, list[Doubt]] = {}
    if reading.unfound:
        met = {name: [*joins.doubt_unjoined(split[name], reading.unfound, data)] for name in names}
    if footed:
        met[names[0]] = [*footed, *met.get(names[0], ())]
    return replace(split, dropped=dropped, doubts=met), data


def _drop_rows(
    frame: pd.DataFrame,
    site: pd.Series | None,
    study: Study,
    data: Data,
    private: bool,
    dropped: dict[str, dict[str, int]],
) -> tuple[pd.DataFrame, pd.Series | None]:
    """Return the rows that stay, and their sites; how many are left out and why is put into
    `dropped`, by site. Where rows name no site each site is told the count of all.
    """
    for what in ("rows without target", "rows without patient", "rows without time"):
        if private and what == "rows without target":
            continue  # they take no part, whatever the study says
        frame, gone_N = mapping.drop(frame, what, data)
        if site is not None:
            for name, count in site[gone_N].value_counts().items():
                dropped.setdefault(str(name), {})[what] = int(count)
            site = site[~gone_N]
        elif gone_N.any():
            for each in study.sites.names:
                dropped.setdefault(each, {})[what] = int(gone_N.sum())
    return frame, site


def _sites_of_rows(
    frame: pd.DataFrame, site: pd.Series, study: Study, data: Data, private: bool
) -> tuple[str, ...]:
    """Return the names of the sites where rows say whose they are;
    `private`: those that the study declares.

    Raises DataError for rows of no site, or of one that is not declared, and for settings of a site
    that is none.
    """
    names: tuple[str, ...] = ()
    if private:
        if study.sites.kind == "hospital":
            names = tuple(study.privacy.sizes)
        _refuse_undeclared(site, names, data.site)
    elif len(unnamed := frame.index[nameless(site, data)]):
        raise DataError(
            f"column {data.site!r}: no site named in row {some(unnamed)}; name it, or leave the "
            "rows out: data.drop = ['rows without site']"
        )

    names = names or tuple(sorted(set(site)))
    if strange := [name for name in (*data.site_maps, *data.absent) if name not in names]:
        raise DataError(
            f"data.site_maps and data.absent: {some(map(repr, strange))} is no site; "
            f"{nearest(strange[0], names)}"
        )
    return names


def _take_off_footer(
    frame: pd.DataFrame, study: Study, data: Data
) -> tuple[pd.DataFrame, list[Doubt]]:
    """Return a table without a footer that reads like records,
    and the doubt about it, which stops a run.

    So all else is looked at without it. Devices have no doubts: there it is an error at once.
    """
    files = readers.files_of(study.folder / data.table, data) if data.table else []
    if not files or any(readers.kind_of(file) not in (*readers.TEXTS, *SHEETS) for file in files):
        return frame, []
    footer = footers.find(frame, [name for name in (data.patient, data.site, data.target) if name])
    doubt = footer.doubt(frame, data) if footer else None
    if footer is None or doubt is None or doubts.is_accepted(doubt, data):
        return frame, []
    if study.sites.kind == "device":
        refuse([Refusal(DataError(doubt.sentence()), dict(doubt.mend))])
    return frame[~footer.which_N], [doubt]


def _name_sites(frame: pd.DataFrame, data: Data) -> tuple[pd.DataFrame, pd.Series | None, int]:
    """Return the rows that name a site, the site of each, and how many were left out; "" is none,
    None no column.
    """
    if not data.site:
        return frame, None, 0
    frame = mapping.apply(frame, data, True, None, [data.site])
    frame, gone_N = mapping.drop(frame, "rows without site", data)
    absent = {"", *data.missing_values, *data.dictionary.get(data.site, Feature()).missing}
    code_N, text_U = mapping.find_different(frame[data.site])
    name_U = np.array(
        ["" if text is None or text in absent else text for text in text_U], dtype=object
    )
    return frame, pd.Series(name_U[code_N], index=frame.index, dtype=object), int(gone_N.sum())


def _misfits(header: Sequence[str], study: Study, data: Data, private: bool) -> Iterator[Refusal]:
    """Yield what stands against how a study says who is where and how cells are read, beside its
    table's header.
    """
    maps = site_maps.load(study)
    yield from site_maps.misfits(header, maps, data)
    mapped = site_maps.columns(header, maps)
    yield from refuse_misplaced(mapped, study, data, private)
    yield from mapping.misfits(mapped, data)


def misread(study: Study, private: bool) -> Iterator[Refusal]:
    """Yield what a study says of cells, and its sites' maps of columns, that its table's header
    does not bear out.
    """
    data = complete(study)
    maps = site_maps.load(study)
    header = _read_header(study, private)
    yield from site_maps.misfits(header, maps, data)
    yield from mapping.misfits(site_maps.columns(header, maps), data)
    if private:
        yield from mapping.refuse_kinds(data)


def refuse_misplaced(
    columns: Sequence[str], study: Study, data: Data, private: bool
) -> Iterator[Refusal]:
    """Yield what stands against how a study says who is where; `data` is its completed table.

    `private`: also that its sites are not declared.
    """
    for key, column in (("site", data.site), ("patient", data.patient)):
        if column and column not in columns:
            text = f"data.{key}={column!r} is no column of the table; {nearest(column, columns)}"
            close = closest(column, columns)
            yield Refusal(DataError(text), {("data", key): close} if close else {})

    if data.site and study.sites.names:
        text = (
            f"sites.names is set, but data.site={data.site!r} already says who is where; keep one"
        )
        yield Refusal(StudyError(text))

    if not data.site and not study.sites.names:
        text = "no site column and no [sites]; set data.site, or sites.names and sites.shares"
        yield Refusal(
            StudyError(text), {("data", "site"): toml.Ask("", "the column that names the site")}
        )

    if private and study.sites.kind == "hospital" and data.site and not study.privacy.sizes:
        text = (
            f"a privacy claim, data.site={data.site!r} and no [privacy.sizes] do not compose: "
            'sites are declared, not read from patients. Set privacy.sizes."NAME" = N for each '
            "site, N the number of its training patients that may be published; `medfed data show` "
            "lists the table's sites."
        )
        yield Refusal(PlanError(text), {("privacy", "sizes"): SITES})


def nameless(site: pd.Series, data: Data) -> np.ndarray:
    """Return which rows name no site [rows]: empty, or a word for what is missing."""
    gaps = {"", *data.missing_values, *doubts.gap_words(site.unique())}
    return site.isin(gaps).to_numpy(dtype=bool)


SITES = toml.Ask(
    {},
    'a line for each site: "its name in the table" = the number of its training patients that may '
    "be published.\n`medfed data show STUDY`, at the site, lists the names. The sizes need not be "
    "right, and never follow the data.",
)


def columns_of(study: Study, private: bool) -> list[str]:
    """Return the columns of a study's table once it is mapped; no row is read: of a source, what it
    is known to have.

    Raises DataError or StudyError where there is no such table.
    """
    data = complete(study)
    return mapping.columns(
        site_maps.columns(_read_header(study, private), site_maps.load(study)), data
    )


def _read_header(study: Study, private: bool) -> list[str]:
    data = complete(study)
    if data.table:
        names = readers.header(study.folder / data.table, data, private)
    elif data.database:
        names = databases.names(data, study.folder, private)
    else:
        known = SOURCES[data.source].data
        names = [
            *dict.fromkeys([*known.dictionary, *(n for n in (known.site, known.patient) if n)])
        ]
    return joins.header(names, data, study.folder, private)


def _refuse_undeclared(site: pd.Series, names: Sequence[str], column: str) -> None:
    """Refuse a table with rows of a site that is not declared: which sites there are is public,
    whose rows is not.
    """
    strange = (site == "" if not names else ~site.isin(names)).to_numpy(dtype=bool)
    if strange.any():
        logger.warning(
            "column %r: no declared site in row %s", column, some(site.index[strange], 50)
        )
        declared = f"one of privacy.sizes ({some(names, 20)})" if names else "a site"
        raise DataError(
            f"column {column!r} has rows that do not name {declared}; they are not quoted, as "
            "they are private. Declare the site's size in [privacy.sizes], or correct the rows; "
            "`medfed data show` lists the sites."
        )


def complete(study: Study) -> Data:
    """Return the study's data table completed with what its source knows and its keys imply; no
    record is read.
    """
    data = study.data
    if data.database and (data.source or data.table):
        raise StudyError(
            f"data.database={data.database!r} and data.table or data.source; expected one of them"
        )
    if bool(data.source) == bool(data.table) and not data.database:
        raise StudyError(
            f"data.source={data.source!r} and data.table={data.table!r}; expected one of the two"
        )
    if bool(data.database) != bool(data.query):
        raise StudyError(
            f"data.database={data.database!r} and data.query={data.query!r}; expected both or none"
        )

    if data.database:
        databases.check(data)
    if data.site_is_file and not data.table:
        raise StudyError(
            "data.site_is_file and no data.table; expected a folder or a pattern of files"
        )
    if data.site_is_file and data.site not in ("", readers.SITE):
        raise StudyError(
            f"data.site_is_file and data.site={data.site!r} both say who is where; keep one"
        )

    if data.site_is_file:
        data = dataclasses.replace(data, site=readers.SITE)
    if data.source and data.source not in SOURCES:
        raise StudyError(f"data.source={data.source!r} is unknown; {nearest(data.source, SOURCES)}")
    if data.source:
        data = _fill_in(data, SOURCES[data.source].data)

    return mapping.complete(site_maps.complete(data, study))


def read(
    study: Study,
    folder: Path | None = None,
    progress: bool = False,
    private: bool = False,
    table: Reading | None = None,
) -> Reading:
    """Return a study's rows as read, joined tables beside them,
    and how its files are written: see `readers`.

    Args:
        study: names the table, file, database or source.
        folder: where downloaded data is looked for first.
        progress: whether a download shows how far it is.
        private: under a claim, where an error quotes nothing.
        table: its table, where it is read already.

    Raises:
        DataError, StudyError: what cannot be read.
    """
    data = complete(study)
    if table is not None:
        found = table
    elif data.table:
        found = readers.read(study.folder / data.table, data, private)
    elif data.database:
        found = Reading(databases.read(data, study.folder, private))
    else:
        found = Reading(number_rows(SOURCES[data.source].load(folder, progress)))

    frame, unfound = joins.join(found.frame, data, study.folder, private)
    return dataclasses.replace(found, frame=frame, unfound=unfound)


def _fill_in(asked: Data, known: Data) -> Data:
    """Fill in from the source what the study leaves at its default;
    the study's own dictionary entries win.
    """
    default = Data()
    changes = {
        f.name: getattr(known, f.name)
        for f in dataclasses.fields(Data)
        if f.name not in ("source", "dictionary")
        and getattr(asked, f.name) == getattr(default, f.name)
    }
    return dataclasses.replace(
        asked, **changes, dictionary={**known.dictionary, **asked.dictionary}
    )
