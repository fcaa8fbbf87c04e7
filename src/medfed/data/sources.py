"""Where records come from: the built-in sources, and any table. Each gives every site its own frame.

`breast-cancer` is scikit-learn's copy of the Wisconsin diagnostic set: 569 patients, 30 features measured on the nuclei
of a fine-needle aspirate, 212 malignant. The brief says 563 patients and 32 features; no edition has 563, and 32 counts
the file's id and diagnosis columns. The brief's "two engineered interaction features" are not named there; ours are
`area x concave points` (large nuclei that are also indented) and `radius x texture`, products of the means, which makes
32 features in all.

`heart` is the UCI heart disease set: 920 patients at four hospitals, 13 features. Absent measurements are coded as 0 in
two columns (serum cholesterol, resting blood pressure); Switzerland measured no cholesterol at all.

`thyroid` is the Garavan Institute's archive of thyroid panels, 1984 to 1987: 9,172 records, 28 features, five referral
sources (a sixth, WEST, has three records and is counted under `other`). Four ages above 110 are typing errors and are
taken as missing. A record's number stands for its patient: the archive does not say which records are of one patient.

Dictionaries hold what is known without asking a patient: ranges that a physician would call possible (heart, thyroid)
or that were published long ago (breast-cancer).
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from medfed.core import toml
from medfed.core.checks import DataError, PlanError, StudyError, closest, nearest, some
from medfed.core.refusals import Refusal, refuse
from medfed.core.streams import Streams
from medfed.data import databases, doubts, footers, joins, mapping, readers, site_maps
from medfed.data.doubts import Doubt
from medfed.data.partition import site_of
from medfed.data.readers import Reading
from medfed.data.tables import Frames, named_patients, numbered, with_kinds
from medfed.data.workbooks import SHEETS
from medfed.study import Data, Feature, Study

logger = logging.getLogger(__name__)  # a site's own log: it may quote rows


@dataclass(frozen=True)
class Source:
    """A built-in source: how to load it, and what is publicly known of it."""

    summary: str
    load: Callable[[Path | None, bool], pd.DataFrame]  # (folder of --data or None, progress) -> frame
    data: Data
    licence: str
    files: Mapping[str, str]  # file -> sha256; empty where a package brings the data


def frames(
    study: Study,
    folder: Path | None = None,
    progress: bool = False,
    private: bool = False,
    table: Reading | None = None,
) -> tuple[Frames, Data]:
    """Return each site's frame, and the study's data table completed with what the source knows.

    Sites come in the order of their declared names (`sites.names`; `private`: `privacy.sizes`), else sorted: never in
    the order of a table's rows. `private`: a declared site without a row has an empty frame, and a row of a site that
    is not declared is refused without being quoted. `folder` is where downloaded data is looked for first (`--data`,
    or the environment's MEDFED_DATA). `table` is the study's, where it is read already. Raises DataError or StudyError
    before any training.
    """
    data = completed(study)
    read = reading(study, folder, progress, private, table)
    frame = read.frame
    refuse(_misfits([str(name) for name in frame.columns], study, data, private))
    frame, footed = (frame, []) if private else _without_footer(frame, study, data)
    frame, site, nowhere = _sited(frame, data)
    names = study.sites.names
    if site is not None:
        declared = private and study.sites.kind == "hospital"
        names = tuple(study.privacy.sizes) if declared else ()
        if private:
            _refuse_undeclared(site, names, data.site)
        elif len(unnamed := frame.index[nameless(site, data)]):
            raise DataError(
                f"column {data.site!r}: no site named in row {some(unnamed)}; name it, or leave the rows out: "
                "data.drop = ['rows without site']"
            )
        names = names or tuple(sorted(set(site)))
        if strange := [name for name in (*data.site_maps, *data.absent) if name not in names]:
            text = (
                f"data.site_maps and data.absent: {some(map(repr, strange))} is no site; {nearest(strange[0], names)}"
            )
            raise DataError(text)

    frame = site_maps.apply(frame, site_maps.load(study), data, site, private)
    frame = mapping.apply(frame, data, private, site, [name for name in mapping.roles_of(data) if name != data.site])
    dropped: dict[str, dict[str, int]] = {name: {"rows without site": nowhere} if nowhere else {} for name in names}
    for what in ("rows without target", "rows without patient", "rows without time"):
        if private and what == "rows without target":
            continue  # they take no part, whatever the study says
        frame, gone_N = mapping.drop(frame, what, data)
        if site is not None:
            for name, count in site[gone_N].value_counts().items():
                dropped.setdefault(str(name), {})[what] = int(count)
            site = site[~gone_N]
        elif gone_N.any():
            dropped |= {name: {**dropped.get(name, {}), what: int(gone_N.sum())} for name in study.sites.names}
    frame = mapping.apply(frame, data, private, site)

    if site is None:
        named = named_patients(frame, data, private)
        site = site_of(named, names, study.sites.shares, Streams(study.study.seed))
    if not private:
        data = with_kinds(frame, data)
    split = Frames.split(frame, site.to_numpy(dtype=object), names)
    if private:
        return replace(split, dropped=dropped), data
    met = {name: [*joins.doubted(split[name], read.unfound, data)] for name in names} if read.unfound else {}
    if footed:
        met[names[0]] = [*footed, *met.get(names[0], ())]
    return replace(split, dropped=dropped, doubts=met), data


def _without_footer(frame: pd.DataFrame, study: Study, data: Data) -> tuple[pd.DataFrame, list[Doubt]]:
    """Return a table without a footer that reads like records, and the doubt about it, which stops a run.

    So all else is looked at without it. Devices have no doubts: there it is an error at once.
    """
    files = readers.files_of(study.folder / data.table, data) if data.table else []
    if not files or any(readers.kind_of(file) not in (*readers.TEXTS, *SHEETS) for file in files):
        return frame, []
    footer = footers.found(frame, [name for name in (data.patient, data.site, data.target) if name])
    doubt = footer.doubt(frame, data) if footer else None
    if footer is None or doubt is None or doubts.accepted(doubt, data):
        return frame, []
    if study.sites.kind == "device":
        refuse([Refusal(DataError(doubt.sentence()), dict(doubt.mend))])
    return frame[~footer.which_N], [doubt]


def _sited(frame: pd.DataFrame, data: Data) -> tuple[pd.DataFrame, pd.Series | None, int]:
    """Return the rows that name a site, the site of each, and how many were left out; "" is none, None no column."""
    if not data.site:
        return frame, None, 0
    frame = mapping.apply(frame, data, True, None, [data.site])
    frame, gone_N = mapping.drop(frame, "rows without site", data)
    absent = {"", *data.missing_values, *data.dictionary.get(data.site, Feature()).missing}
    code_N, text_U = mapping.different(frame[data.site])
    name_U = np.array(["" if text is None or text in absent else text for text in text_U], dtype=object)
    return frame, pd.Series(name_U[code_N], index=frame.index, dtype=object), int(gone_N.sum())


def _misfits(header: Sequence[str], study: Study, data: Data, private: bool) -> Iterator[Refusal]:
    """Yield what stands against how a study says who is where and how cells are read, beside its table's header."""
    maps = site_maps.load(study)
    yield from site_maps.misfits(header, maps, data)
    mapped = site_maps.columns(header, maps)
    yield from misplaced(mapped, study, data, private)
    yield from mapping.misfits(mapped, data)


def misread(study: Study, private: bool) -> Iterator[Refusal]:
    """Yield what a study says of cells, and its sites' maps of columns, that its table's header does not bear out."""
    data, maps = completed(study), site_maps.load(study)
    header = _header(study, private)
    yield from site_maps.misfits(header, maps, data)
    yield from mapping.misfits(site_maps.columns(header, maps), data)
    if private:
        yield from mapping.refuse_kinds(data)


def misplaced(columns: Sequence[str], study: Study, data: Data, private: bool) -> Iterator[Refusal]:
    """Yield what stands against how a study says who is where; `data` is its completed table.

    `private`: also that its sites are not declared.
    """
    for key, column in (("site", data.site), ("patient", data.patient)):
        if column and column not in columns:
            text = f"data.{key}={column!r} is no column of the table; {nearest(column, columns)}"
            close = closest(column, columns)
            yield Refusal(DataError(text), {("data", key): close} if close else {})
    if data.site and study.sites.names:
        text = f"sites.names is set, but data.site={data.site!r} already says who is where; keep one"
        yield Refusal(StudyError(text))
    if not data.site and not study.sites.names:
        text = "no site column and no [sites]; set data.site, or sites.names and sites.shares"
        yield Refusal(StudyError(text), {("data", "site"): toml.Ask("", "the column that names the site")})
    if private and study.sites.kind == "hospital" and data.site and not study.privacy.sizes:
        text = (
            f"a privacy claim, data.site={data.site!r} and no [privacy.sizes] do not compose: sites are declared, "
            'not read from patients. Set privacy.sizes."NAME" = N for each site, N the number of its training '
            "patients that may be published; `medfed data show` lists the table's sites."
        )
        yield Refusal(PlanError(text), {("privacy", "sizes"): SITES})


def nameless(site: pd.Series, data: Data) -> np.ndarray:
    """Return which rows name no site [rows]: empty, or a word for what is missing."""
    gaps = {"", *data.missing_values, *doubts.gap_words(site.unique())}
    return site.isin(gaps).to_numpy(dtype=bool)


SITES = toml.Ask(
    {},
    'a line for each site: "its name in the table" = the number of its training patients that may be published.\n'
    "`medfed data show STUDY`, at the site, lists the names. The sizes need not be right, and never follow the data.",
)


def columns_of(study: Study, private: bool) -> list[str]:
    """Return the columns of a study's table once it is mapped; no row is read: of a source, what it is known to have.

    Raises DataError or StudyError where there is no such table.
    """
    data = completed(study)
    return mapping.columns(site_maps.columns(_header(study, private), site_maps.load(study)), data)


def _header(study: Study, private: bool) -> list[str]:
    data = completed(study)
    if data.table:
        names = readers.header(study.folder / data.table, data, private)
    elif data.database:
        names = databases.names(data, study.folder, private)
    else:
        known = SOURCES[data.source].data
        names = [*dict.fromkeys([*known.dictionary, *(n for n in (known.site, known.patient) if n)])]
    return joins.header(names, data, study.folder, private)


def _refuse_undeclared(site: pd.Series, names: Sequence[str], column: str) -> None:
    """Refuse a table with rows of a site that is not declared: which sites there are is public, whose rows is not."""
    strange = (site == "" if not names else ~site.isin(names)).to_numpy(dtype=bool)
    if strange.any():
        logger.warning("column %r: no declared site in row %s", column, some(site.index[strange], 50))
        declared = f"one of privacy.sizes ({some(names, 20)})" if names else "a site"
        raise DataError(
            f"column {column!r} has rows that do not name {declared}; they are not quoted, as they are private. "
            "Declare the site's size in [privacy.sizes], or correct the rows; `medfed data show` lists the sites."
        )


def completed(study: Study) -> Data:
    """Return the study's data table completed with what its source knows and its keys imply; no record is read."""
    data = study.data
    if data.database and (data.source or data.table):
        raise StudyError(f"data.database={data.database!r} and data.table or data.source; expected one of them")
    if bool(data.source) == bool(data.table) and not data.database:
        raise StudyError(f"data.source={data.source!r} and data.table={data.table!r}; expected one of the two")
    if bool(data.database) != bool(data.query):
        raise StudyError(f"data.database={data.database!r} and data.query={data.query!r}; expected both or none")
    if data.database:
        databases.check(data)
    if data.site_is_file and not data.table:
        raise StudyError("data.site_is_file and no data.table; expected a folder or a pattern of files")
    if data.site_is_file and data.site not in ("", readers.SITE):
        raise StudyError(f"data.site_is_file and data.site={data.site!r} both say who is where; keep one")
    if data.site_is_file:
        data = dataclasses.replace(data, site=readers.SITE)
    if data.source and data.source not in SOURCES:
        raise StudyError(f"data.source={data.source!r} is unknown; {nearest(data.source, SOURCES)}")
    if data.source:
        data = _completed(data, SOURCES[data.source].data)
    return mapping.completed(site_maps.completed(data, study))


def reading(
    study: Study,
    folder: Path | None = None,
    progress: bool = False,
    private: bool = False,
    table: Reading | None = None,
) -> Reading:
    """Return a study's rows as read, joined tables beside them, and how its files are written: see `readers`.

    `table` is its table, where it is read already. Raises DataError or StudyError for what cannot be read.
    """
    data = completed(study)
    if table is not None:
        found = table
    elif data.table:
        found = readers.read(study.folder / data.table, data, private)
    elif data.database:
        found = Reading(databases.read(data, study.folder, private))
    else:
        found = Reading(numbered(SOURCES[data.source].load(folder, progress)))
    frame, unfound = joins.joined(found.frame, data, study.folder, private)
    return dataclasses.replace(found, frame=frame, unfound=unfound)


def _completed(asked: Data, known: Data) -> Data:
    """Fill in from the source what the study leaves at its default; the study's own dictionary entries win."""
    default = Data()
    changes = {
        f.name: getattr(known, f.name)
        for f in dataclasses.fields(Data)
        if f.name not in ("source", "dictionary") and getattr(asked, f.name) == getattr(default, f.name)
    }
    return dataclasses.replace(asked, **changes, dictionary={**known.dictionary, **asked.dictionary})


# breast-cancer ------------------------------------------------------------------------------------------------------

_Range = tuple[float, float]
_MEASURES: dict[str, tuple[_Range, _Range, _Range, str]] = {
    # measure: public range of its mean, its standard error, its worst value; unit
    "radius": ((6, 30), (0.1, 3), (7, 40), "pixels"),
    "texture": ((9, 40), (0.3, 5), (12, 50), "grey levels"),
    "perimeter": ((40, 200), (0.7, 25), (50, 260), "pixels"),
    "area": ((140, 2600), (6, 550), (180, 4500), "pixels^2"),
    "smoothness": ((0.05, 0.2), (0.0015, 0.04), (0.07, 0.25), ""),
    "compactness": ((0.015, 0.4), (0.002, 0.15), (0.025, 1.1), ""),
    "concavity": ((0, 0.5), (0, 0.4), (0, 1.3), ""),
    "concave points": ((0, 0.25), (0, 0.06), (0, 0.3), ""),
    "symmetry": ((0.1, 0.4), (0.007, 0.1), (0.15, 0.7), ""),
    "fractal dimension": ((0.045, 0.1), (0.0008, 0.03), (0.05, 0.25), ""),
}
AREA_X_CONCAVE = "area x concave points"
RADIUS_X_TEXTURE = "radius x texture"


def _breast_cancer(folder: Path | None, progress: bool) -> pd.DataFrame:
    from sklearn.datasets import load_breast_cancer

    bunch = load_breast_cancer(as_frame=True)
    frame: pd.DataFrame = bunch.data.copy()
    frame[AREA_X_CONCAVE] = frame["mean area"] * frame["mean concave points"]
    frame[RADIUS_X_TEXTURE] = frame["mean radius"] * frame["mean texture"]
    frame["diagnosis"] = np.where(bunch.target == 1, "benign", "malignant")
    return frame


def _breast_cancer_dictionary() -> dict[str, Feature]:
    """Public ranges: the summary table published with the data set (scikit-learn's description), rounded outwards."""
    entries: dict[str, Feature] = {}
    for measure, (mean, error, worst, unit) in _MEASURES.items():
        for name, ends in ((f"mean {measure}", mean), (f"{measure} error", error), (f"worst {measure}", worst)):
            entries[name] = Feature(range=ends, log=True, unit=unit, doc=f"{name} over the nuclei of one image")
    entries[AREA_X_CONCAVE] = Feature(
        range=(0.0, 500.0), log=True, unit="pixels^2", doc="mean area x mean concave points"
    )
    entries[RADIUS_X_TEXTURE] = Feature(range=(50.0, 900.0), log=True, doc="mean radius x mean texture")
    entries["diagnosis"] = Feature(categories=("benign", "malignant"))
    return entries


# heart --------------------------------------------------------------------------------------------------------------

HEART_FILES = {
    "processed.cleveland.data": "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
    "processed.hungarian.data": "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
    "processed.switzerland.data": "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314",
    "processed.va.data": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
}
HEART_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/"
_HEART_COLUMNS = "age sex cp trestbps chol fbs restecg thalach exang oldpeak slope ca thal num"


def _heart(folder: Path | None, progress: bool) -> pd.DataFrame:
    parts = []
    for name in HEART_FILES:
        path = fetch("fed_heart_disease", name, HEART_URL + name, HEART_FILES[name], folder, progress)
        part = pd.read_csv(path, header=None, names=_HEART_COLUMNS.split(), dtype=str, keep_default_na=False)
        part["hospital"] = name.split(".")[1]
        part["disease"] = np.where(part.pop("num").astype(float) > 0, "yes", "no")
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


# An indicator where a hospital may not make the test at all: laboratory, fluoroscopy, scintigraphy, slope.
_HEART_DICTIONARY = {
    "age": Feature(range=(20, 100), unit="years"),
    "sex": Feature(categories=("0", "1"), doc="1 is male"),
    "cp": Feature(categories=("1", "2", "3", "4"), doc="chest pain: typical angina, atypical, non-anginal, none"),
    "trestbps": Feature(range=(80, 220), missing=("0",), unit="mm Hg", doc="resting blood pressure; 0 is not measured"),
    "chol": Feature(
        range=(80, 620), missing=("0",), indicator=True, unit="mg/dl", doc="serum cholesterol; 0 is not measured"
    ),
    "fbs": Feature(categories=("0", "1"), indicator=True, doc="fasting blood sugar above 120 mg/dl"),
    "restecg": Feature(categories=("0", "1", "2"), doc="resting ECG: normal, ST-T abnormality, hypertrophy"),
    "thalach": Feature(range=(60, 210), unit="1/min", doc="highest heart rate in the exercise test"),
    "exang": Feature(categories=("0", "1"), doc="angina in the exercise test"),
    "oldpeak": Feature(range=(-3, 7), unit="mm", doc="ST depression by exercise"),
    "slope": Feature(categories=("1", "2", "3"), indicator=True, doc="slope of the ST segment: up, flat, down"),
    "ca": Feature(range=(0, 3), indicator=True, doc="vessels coloured by fluoroscopy"),
    "thal": Feature(
        categories=("3", "6", "7"), indicator=True, doc="thallium scan: normal, fixed defect, reversible defect"
    ),
    "disease": Feature(categories=("no", "yes"), doc="a coronary artery narrowed by more than half"),
}


# thyroid ------------------------------------------------------------------------------------------------------------

THYROID_FILES = {"thyroid0387.data": "4a20d104d4607afd7b1a477af5aa4381a2027f36cc7027f44bc2bd5a50c6724d"}
THYROID_TABLE = {"thyroid0387.csv": "63ecce1ca692af09f4ee7b4efa78a46abb5ca4c78cff79f473d78e694e9ec740"}
"""The same records with a header, as they go round; read where they lie in the data folder."""
THYROID_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/thyroid-disease/"
_THYROID_FLAGS = {
    # column: what `t` means
    "on_thyroxine": "takes thyroxine",
    "query_on_thyroxine": "may take thyroxine",
    "on_antithyroid_meds": "takes antithyroid medication",
    "sick": "is ill otherwise",
    "pregnant": "is pregnant",
    "thyroid_surgery": "has had thyroid surgery",
    "I131_treatment": "has had radioiodine",
    "query_hypothyroid": "hypothyroidism is suspected",
    "query_hyperthyroid": "hyperthyroidism is suspected",
    "lithium": "takes lithium",
    "goitre": "has a goitre",
    "tumor": "has a tumour",
    "hypopituitary": "has hypopituitarism",
    "psych": "is under psychiatric care",
}
_THYROID_ASSAYS: dict[str, tuple[float, float, str, str]] = {
    # assay: range in its unit, unit, what it is. Ranges: adult reference intervals, widened to the gravest disease
    "TSH": (0.01, 150, "mU/l", "thyrotropin; 0.4 to 4 in health"),
    "T3": (0.3, 12, "nmol/l", "total triiodothyronine; 1.2 to 2.8 in health"),
    "TT4": (20, 450, "nmol/l", "total thyroxine; 60 to 150 in health"),
    "T4U": (0.4, 2.5, "", "thyroxine uptake ratio; 0.8 to 1.2 in health"),
    "FTI": (20, 450, "", "free thyroxine index, TT4 / T4U; 60 to 150 in health"),
    "TBG": (3, 120, "mg/l", "thyroxine-binding globulin; 12 to 30 in health"),
}
_OLDEST = 110


def _thyroid(folder: Path | None, progress: bool) -> pd.DataFrame:
    place = data_folder(folder)
    table = place is not None and (place / "thyroid_garavan" / "thyroid0387.csv").exists()
    ((name, sha256),) = (THYROID_TABLE if table else THYROID_FILES).items()
    path = fetch("thyroid_garavan", name, THYROID_URL + name, sha256, folder, progress)
    features = ["age", "sex", *_THYROID_FLAGS, *(c for assay in _THYROID_ASSAYS for c in (f"{assay}_measured", assay))]
    columns = [*features, "referral", "letters", "record"]
    if table:
        frame = pd.read_csv(path, header=0, names=columns, dtype=str, keep_default_na=False)
    else:
        frame = pd.read_csv(path, header=None, names=columns[:-1], dtype=str, keep_default_na=False)
        frame[["letters", "record"]] = frame["letters"].str.extract(r"^(.*)\[(\d+)\]$")  # -[840801013]
    frame["age"] = frame["age"].mask(pd.to_numeric(frame["age"]) > _OLDEST, "?")
    frame["referral"] = frame["referral"].replace("WEST", "other")
    frame["condition"] = np.where(frame.pop("letters") == "-", "no", "yes")
    return frame


def _thyroid_dictionary() -> dict[str, Feature]:
    """Whether an assay was made is a column of its own, so an assay needs no indicator."""
    entries = {
        "age": Feature(range=(0, 100), unit="years"),
        "sex": Feature(categories=("F", "M"), indicator=True),
        "condition": Feature(categories=("no", "yes"), doc="whether the panel led to any diagnosis"),
    }
    for flag, meaning in _THYROID_FLAGS.items():
        entries[flag] = Feature(categories=("f", "t"), doc=f"t: {meaning}")
    for assay, (low, high, unit, doc) in _THYROID_ASSAYS.items():
        entries[f"{assay}_measured"] = Feature(categories=("f", "t"), doc=f"t: {assay} was measured")
        entries[assay] = Feature(range=(low, high), log=True, unit=unit, doc=doc)
    return entries


SOURCES: dict[str, Source] = {
    "breast-cancer": Source(
        "Wisconsin diagnostic breast cancer: 569 patients, 30 features and 2 products of them; no natural sites",
        _breast_cancer,
        Data(target="diagnosis", positive="malignant", dictionary=_breast_cancer_dictionary()),
        "CC BY 4.0 (UCI 17); comes with scikit-learn",
        {},
    ),
    "heart": Source(
        "UCI heart disease: 920 patients, 13 features, four hospitals in three countries",
        _heart,
        Data(target="disease", positive="yes", site="hospital", dictionary=_HEART_DICTIONARY),
        "CC BY 4.0 (UCI 45; Janosi, Steinbrunn, Pfisterer, Detrano 1988)",
        HEART_FILES,
    ),
    "thyroid": Source(
        "Garavan Institute thyroid panels: 9,172 records, 28 features, five referral sources",
        _thyroid,
        Data(target="condition", positive="yes", site="referral", patient="record", dictionary=_thyroid_dictionary()),
        "CC BY 4.0 (UCI 102; Quinlan 1987)",
        THYROID_FILES,
    ),
}


def data_folder(folder: Path | None) -> Path | None:
    """Return where data was put by hand: `--data`, else the environment's MEDFED_DATA."""
    return folder or (Path(os.environ["MEDFED_DATA"]) if os.environ.get("MEDFED_DATA") else None)


def fetch(subfolder: str, name: str, url: str, sha256: str, folder: Path | None, progress: bool) -> Path:
    """Return a source file whose sha256 is right: from the data folder, the cache, or by download.

    A download is written beside its place and moved there only when its checksum agrees. Raises DataError where the
    file in the data folder is damaged, the checksum of a download is wrong, or there is no connection.
    """
    import pooch

    place = data_folder(folder)
    if place and (place / subfolder / name).exists():
        path = place / subfolder / name
        if pooch.file_hash(str(path)) != sha256:
            raise DataError(f"{path}: sha256 is not {sha256[:12]}...; the file is damaged, replace it or move it away")
        return path
    pooch.get_logger().setLevel(logging.INFO if progress else logging.ERROR)
    try:
        cached = pooch.retrieve(
            url,
            known_hash=f"sha256:{sha256}",
            fname=name,
            path=_cache(subfolder, name),
            progressbar=progress,
        )
    except ValueError as error:
        raise DataError(
            f"{url}: the download is damaged, its sha256 is not {sha256[:12]}...; nothing was kept. "
            f"{_by_hand(subfolder, name)}"
        ) from error
    except OSError as error:
        raise DataError(f"{url} cannot be downloaded ({type(error).__name__}). {_by_hand(subfolder, name)}") from error
    return Path(cached)


def _cache(subfolder: str, name: str) -> Path:
    """Return where downloads are kept. Raises DataError for a user without a home."""
    import pooch

    try:
        place = Path(pooch.os_cache("medfed")) / subfolder
    except RuntimeError:
        place = Path()
    if not place.is_absolute():
        raise DataError(f"this user has no home folder, where downloads are kept. {_by_hand(subfolder, name)}")
    return place


def _by_hand(subfolder: str, name: str) -> str:
    return f"Try again, or put {name} into {subfolder}/ of a folder given by --data or MEDFED_DATA."


def get(name: str, folder: Path | None = None, progress: bool = True) -> int:
    """Make sure that a built-in source is at hand, downloading it if need be; return its number of rows."""
    if name not in SOURCES:
        raise StudyError(f"source={name!r} is unknown; {nearest(name, SOURCES)}")
    return len(SOURCES[name].load(folder, progress))
