"""The bundled sources: how each is loaded, and what is publicly known of it.

`breast-cancer` is scikit-learn's copy of the Wisconsin diagnostic set: 569 patients, 30 features
measured on the nuclei of a fine-needle aspirate, 212 malignant. The brief says 563 patients and 32
features; no edition has 563, and 32 counts the file's id and diagnosis columns. The brief's "two
engineered interaction features" are not named there; ours are `area x concave points` (large nuclei
that are also indented) and `radius x texture`, products of the means, which makes 32 features in
all.

`heart` is the UCI heart disease set: 920 patients at four hospitals, 13 features. Absent
measurements are coded as 0 in two columns (serum cholesterol, resting blood pressure); Switzerland
measured no cholesterol at all.

`thyroid` is the Garavan Institute's archive of thyroid panels, 1984 to 1987: 9,172 records, 28
features, five referral sources (a sixth, WEST, has three records and is counted under `other`).
Four ages above 110 are typing errors and are taken as missing. A record's number stands for its
patient: the archive does not say which records are of one patient.

Dictionaries hold what is known without asking a patient: ranges that a physician would call
possible (heart, thyroid) or that were published long ago (breast-cancer).
"""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from medfed.core.checks import DataError, StudyError, nearest
from medfed.study import Data, Feature


@dataclass(frozen=True)
class Source:
    """A built-in source: how to load it, and what is publicly known of it."""

    summary: str
    # (folder of --data or None, progress) -> frame
    load: Callable[[Path | None, bool], pd.DataFrame]
    data: Data
    licence: str
    files: Mapping[str, str]  # file -> sha256; empty where a package brings the data


# breast-cancer ------------------------------------------------------------------------------------

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
    """Public ranges: the summary table published with the data set (scikit-learn's description),
    rounded outwards.
    """
    entries: dict[str, Feature] = {}
    for measure, (mean, error, worst, unit) in _MEASURES.items():
        for name, ends in (
            (f"mean {measure}", mean),
            (f"{measure} error", error),
            (f"worst {measure}", worst),
        ):
            entries[name] = Feature(
                range=ends, log=True, unit=unit, doc=f"{name} over the nuclei of one image"
            )

    entries[AREA_X_CONCAVE] = Feature(
        range=(0.0, 500.0), log=True, unit="pixels^2", doc="mean area x mean concave points"
    )
    entries[RADIUS_X_TEXTURE] = Feature(
        range=(50.0, 900.0), log=True, doc="mean radius x mean texture"
    )
    entries["diagnosis"] = Feature(categories=("benign", "malignant"))

    return entries


# heart --------------------------------------------------------------------------------------------

HEART_FILES = {
    "processed.cleveland.data": "a74b7efa387bc9d108d7d0115d831fe9b414b29ae7124f331b622b4efa0427c8",
    "processed.hungarian.data": "d1ad108f785768cd3d7e82dc522e6f5a61eea93cccfb3a46ee8076f73fc3d796",
    "processed.switzerland.data": (
        "834a405ccf5b66ab4056bb77794adc8df0b7125186454c0a1d002d33c6c3b314"
    ),
    "processed.va.data": "e7c93d8d0d2acdadfa4c5e8de768e2191e7f618b952e29623f1f0d5949ff6b8f",
}
HEART_URL = "https://archive.ics.uci.edu/ml/machine-learning-databases/heart-disease/"
_HEART_COLUMNS = "age sex cp trestbps chol fbs restecg thalach exang oldpeak slope ca thal num"


def _heart(folder: Path | None, progress: bool) -> pd.DataFrame:
    parts = []
    for name in HEART_FILES:
        path = fetch(
            "fed_heart_disease", name, HEART_URL + name, HEART_FILES[name], folder, progress
        )
        part = pd.read_csv(
            path, header=None, names=_HEART_COLUMNS.split(), dtype=str, keep_default_na=False
        )
        part["hospital"] = name.split(".")[1]
        part["disease"] = np.where(part.pop("num").astype(float) > 0, "yes", "no")
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


# An indicator where a hospital may not make the test at all:
# laboratory, fluoroscopy, scintigraphy, slope.
_HEART_DICTIONARY = {
    "age": Feature(range=(20, 100), unit="years"),
    "sex": Feature(categories=("0", "1"), doc="1 is male"),
    "cp": Feature(
        categories=("1", "2", "3", "4"),
        doc="chest pain: typical angina, atypical, non-anginal, none",
    ),
    "trestbps": Feature(
        range=(80, 220),
        missing=("0",),
        unit="mm Hg",
        doc="resting blood pressure; 0 is not measured",
    ),
    "chol": Feature(
        range=(80, 620),
        missing=("0",),
        indicator=True,
        unit="mg/dl",
        doc="serum cholesterol; 0 is not measured",
    ),
    "fbs": Feature(
        categories=("0", "1"), indicator=True, doc="fasting blood sugar above 120 mg/dl"
    ),
    "restecg": Feature(
        categories=("0", "1", "2"), doc="resting ECG: normal, ST-T abnormality, hypertrophy"
    ),
    "thalach": Feature(
        range=(60, 210), unit="1/min", doc="highest heart rate in the exercise test"
    ),
    "exang": Feature(categories=("0", "1"), doc="angina in the exercise test"),
    "oldpeak": Feature(range=(-3, 7), unit="mm", doc="ST depression by exercise"),
    "slope": Feature(
        categories=("1", "2", "3"), indicator=True, doc="slope of the ST segment: up, flat, down"
    ),
    "ca": Feature(range=(0, 3), indicator=True, doc="vessels coloured by fluoroscopy"),
    "thal": Feature(
        categories=("3", "6", "7"),
        indicator=True,
        doc="thallium scan: normal, fixed defect, reversible defect",
    ),
    "disease": Feature(
        categories=("no", "yes"), doc="a coronary artery narrowed by more than half"
    ),
}


# thyroid ------------------------------------------------------------------------------------------

THYROID_FILES = {
    "thyroid0387.data": "4a20d104d4607afd7b1a477af5aa4381a2027f36cc7027f44bc2bd5a50c6724d"
}
THYROID_TABLE = {
    "thyroid0387.csv": "63ecce1ca692af09f4ee7b4efa78a46abb5ca4c78cff79f473d78e694e9ec740"
}
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
    # assay: range in its unit, unit, what it is. Ranges: adult reference intervals, widened to the
    # gravest disease
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
    features = [
        "age",
        "sex",
        *_THYROID_FLAGS,
        *(c for assay in _THYROID_ASSAYS for c in (f"{assay}_measured", assay)),
    ]
    columns = [*features, "referral", "letters", "record"]
    if table:
        frame = pd.read_csv(path, header=0, names=columns, dtype=str, keep_default_na=False)
    else:
        frame = pd.read_csv(path, header=None, names=columns[:-1], dtype=str, keep_default_na=False)
        # -[840801013]
        frame[["letters", "record"]] = frame["letters"].str.extract(r"^(.*)\[(\d+)\]$")
    frame["age"] = frame["age"].mask(pd.to_numeric(frame["age"]) > _OLDEST, "?")
    frame["referral"] = frame["referral"].replace("WEST", "other")
    frame["condition"] = np.where(frame.pop("letters") == "-", "no", "yes")
    return frame


def _thyroid_dictionary() -> dict[str, Feature]:
    """Whether an assay was made is a column of its own, so an assay needs no indicator."""
    entries = {
        "age": Feature(range=(0, 100), unit="years"),
        "sex": Feature(categories=("F", "M"), indicator=True),
        "condition": Feature(
            categories=("no", "yes"), doc="whether the panel led to any diagnosis"
        ),
    }
    for flag, meaning in _THYROID_FLAGS.items():
        entries[flag] = Feature(categories=("f", "t"), doc=f"t: {meaning}")
    for assay, (low, high, unit, doc) in _THYROID_ASSAYS.items():
        entries[f"{assay}_measured"] = Feature(
            categories=("f", "t"), doc=f"t: {assay} was measured"
        )
        entries[assay] = Feature(range=(low, high), log=True, unit=unit, doc=doc)
    return entries


SOURCES: dict[str, Source] = {
    "breast-cancer": Source(
        "Wisconsin diagnostic breast cancer: 569 patients, 30 features and 2 products of them; "
        "no natural sites",
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
        Data(
            target="condition",
            positive="yes",
            site="referral",
            patient="record",
            dictionary=_thyroid_dictionary(),
        ),
        "CC BY 4.0 (UCI 102; Quinlan 1987)",
        THYROID_FILES,
    ),
}


def data_folder(folder: Path | None) -> Path | None:
    """Return where data was put by hand: `--data`, else the environment's MEDFED_DATA."""
    return folder or (Path(os.environ["MEDFED_DATA"]) if os.environ.get("MEDFED_DATA") else None)


def fetch(
    subfolder: str, name: str, url: str, sha256: str, folder: Path | None, progress: bool
) -> Path:
    """Return a source file whose sha256 is right: from the data folder, the cache, or by download.

    A download is written beside its place and moved there only when its checksum agrees. Raises
    DataError where the file in the data folder is damaged, the checksum of a download is wrong, or
    there is no connection.
    """
    import pooch

    place = data_folder(folder)
    if place and (place / subfolder / name).exists():
        path = place / subfolder / name
        if pooch.file_hash(str(path)) != sha256:
            raise DataError(
                f"{path}: sha256 is not {sha256[:12]}...; the file is damaged, replace it or "
                "move it away"
            )
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
            f"{url}: the download is damaged, its sha256 is not {sha256[:12]}...; nothing was "
            f"kept. {_by_hand(subfolder, name)}"
        ) from error
    except OSError as error:
        raise DataError(
            f"{url} cannot be downloaded ({type(error).__name__}). {_by_hand(subfolder, name)}"
        ) from error
    return Path(cached)


def _cache(subfolder: str, name: str) -> Path:
    """Return where downloads are kept. Raises DataError for a user without a home."""
    import pooch

    try:
        place = Path(pooch.os_cache("medfed")) / subfolder
    except RuntimeError:
        place = Path()
    if not place.is_absolute():
        raise DataError(
            f"this user has no home folder, where downloads are kept. {_by_hand(subfolder, name)}"
        )
    return place


def _by_hand(subfolder: str, name: str) -> str:
    return f"Try again, or put {name} into {subfolder}/ of a folder given by --data or MEDFED_DATA."


def get(name: str, folder: Path | None = None, progress: bool = True) -> int:
    """Make sure that the built-in source `name` is at hand, downloading it if need be; return its
    number of rows.

    `folder` is looked into first; `progress` shows the download.
    """
    if name not in SOURCES:
        raise StudyError(f"source={name!r} is unknown; {nearest(name, SOURCES)}")
    return len(SOURCES[name].load(folder, progress))
