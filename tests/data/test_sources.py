"""Where records come from: the built-in sources, downloads, and any table shared out to sites."""

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pooch
import pytest

from medfed import load_and_prepare_medical_data
from medfed.core.checks import DataError, PlanError, StudyError
from medfed.data import bundled, sources
from medfed.data.bundled import (
    AREA_X_CONCAVE,
    HEART_FILES,
    RADIUS_X_TEXTURE,
    SOURCES,
    THYROID_FILES,
    THYROID_TABLE,
)
from medfed.planning.plan import make
from medfed.runs import open_sites, survey
from medfed.study import Study, from_tables, load

# breast-cancer ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def breast() -> pd.DataFrame:
    return SOURCES["breast-cancer"].load(None, False)


def test_breast_cancer_has_the_published_size(breast: pd.DataFrame) -> None:
    assert breast.shape == (569, 33)
    assert breast["diagnosis"].value_counts().to_dict() == {"benign": 357, "malignant": 212}


def test_the_products_are_exact(breast: pd.DataFrame) -> None:
    assert (breast[AREA_X_CONCAVE] == breast["mean area"] * breast["mean concave points"]).all()
    assert (breast[RADIUS_X_TEXTURE] == breast["mean radius"] * breast["mean texture"]).all()


def test_public_ranges_hold_every_patient(breast: pd.DataFrame) -> None:
    for name, feature in SOURCES["breast-cancer"].data.dictionary.items():
        assert not feature.range or breast[name].between(*feature.range).all(), name


@pytest.mark.needs("data")
def test_breast_cancer_is_the_published_file(breast: pd.DataFrame, data_dir: Path) -> None:
    published = pd.read_csv(data_dir / "breast_wisconsin" / "wdbc.data", header=None)
    assert np.array_equal(breast.iloc[:, :30].to_numpy(), published.iloc[:, 2:].to_numpy())
    assert ((published[1] == "M") == (breast["diagnosis"] == "malignant")).all()


# heart --------------------------------------------------------------------------------------------


@pytest.mark.needs("data")
def test_heart_has_the_published_sites_and_positives(data_dir: Path) -> None:
    frame = SOURCES["heart"].load(data_dir, False)
    assert frame.shape == (920, 15)
    sick = (frame["disease"] == "yes").groupby(frame["hospital"])
    assert sick.size().to_dict() == {
        "cleveland": 303,
        "hungarian": 294,
        "switzerland": 123,
        "va": 200,
    }
    assert sick.sum().to_dict() == {
        "cleveland": 139,
        "hungarian": 106,
        "switzerland": 115,
        "va": 149,
    }


@pytest.mark.needs("data")
@pytest.mark.parametrize("name", HEART_FILES)
def test_heart_files_have_their_checksums(data_dir: Path, name: str) -> None:
    content = (data_dir / "fed_heart_disease" / name).read_bytes()
    assert hashlib.sha256(content).hexdigest() == HEART_FILES[name]


@pytest.mark.needs("data")
def test_switzerland_measured_no_cholesterol(data_dir: Path) -> None:
    surveys = survey(load("heart"), data_dir)
    swiss = surveys["switzerland"]
    assert swiss["missing"]["chol"] == swiss["train"] + swiss["test"] == 123
    assert surveys["cleveland"]["missing"]["chol"] == 0
    prepared = load_and_prepare_medical_data("heart", data_dir)
    chol, gone = (prepared.features.index(name) for name in ("chol", "chol missing"))
    for x, _ in (prepared.train["switzerland"], prepared.test["switzerland"]):
        assert (x[:, chol] == 0).all() and (x[:, gone] == 1).all()


@pytest.mark.needs("data")
def test_a_damaged_file_in_the_data_folder_is_refused(data_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "fed_heart_disease"
    folder.mkdir()
    for name in HEART_FILES:
        (folder / name).write_bytes((data_dir / "fed_heart_disease" / name).read_bytes())
    with open(folder / "processed.va.data", "ab") as file:
        file.write(b"\n")
    with pytest.raises(DataError, match=r"processed\.va\.data: sha256 is not e7c93d8d0d2a"):
        bundled.get("heart", tmp_path, progress=False)


# thyroid ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def thyroid(data_dir: Path) -> pd.DataFrame:
    return SOURCES["thyroid"].load(data_dir, False)


def test_thyroid_has_the_published_sources_and_diagnoses(thyroid: pd.DataFrame) -> None:
    assert thyroid.shape == (9172, 28 + 3) and thyroid["record"].is_unique
    ill = (thyroid["condition"] == "yes").groupby(thyroid["referral"])
    # WEST: 3
    assert ill.size().to_dict() == {
        "other": 5493 + 3,
        "STMW": 255,
        "SVHC": 956,
        "SVHD": 71,
        "SVI": 2394,
    }
    assert ill.sum().to_dict() == {
        "other": 1409 + 1,
        "STMW": 133,
        "SVHC": 118,
        "SVHD": 19,
        "SVI": 721,
    }


def test_ages_that_are_typing_errors_are_missing(thyroid: pd.DataFrame) -> None:
    assert (thyroid["age"] == "?").sum() == 4
    assert pd.to_numeric(thyroid["age"], errors="coerce").max() == 97


def test_a_flag_says_whether_an_assay_was_made(thyroid: pd.DataFrame) -> None:
    for assay in ("TSH", "T3", "TT4", "T4U", "FTI", "TBG"):
        assert ((thyroid[f"{assay}_measured"] == "t") == (thyroid[assay] != "")).all()


def test_the_table_at_hand_is_the_publishers_file(
    thyroid: pd.DataFrame, data_dir: Path, tmp_path: Path
) -> None:
    """Written as the publisher writes it, it has the sha256 of the publisher's file, and it reads
    the same.
    """
    (name,) = THYROID_FILES
    (table,) = THYROID_TABLE
    rows = pd.read_csv(data_dir / "thyroid_garavan" / table, dtype=str, keep_default_na=False)
    *values, letters, record = (
        rows[column].replace("", "?").str.removesuffix(".0") for column in rows
    )
    lines = [",".join(line) for line in zip(*values, letters + "[" + record + "]", strict=True)]
    (tmp_path / "thyroid_garavan").mkdir()
    (tmp_path / "thyroid_garavan" / name).write_bytes(("\n".join(lines) + "\n").encode())
    assert bundled.get("thyroid", tmp_path, progress=False) == 9172  # its checksum agrees
    published = SOURCES["thyroid"].load(tmp_path, False)
    assert list(published) == list(thyroid)

    for column in thyroid:
        assert (
            published[column].replace("?", "")
            == thyroid[column].replace("?", "").str.removesuffix(".0")
        ).all()


def test_a_damaged_thyroid_table_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (table,) = THYROID_TABLE
    content = (data_dir / "thyroid_garavan" / table).read_bytes()
    (tmp_path / "thyroid_garavan").mkdir()
    (tmp_path / "thyroid_garavan" / table).write_bytes(content.replace(b"840801013", b"840801012"))
    with pytest.raises(DataError, match=r"thyroid0387\.csv: sha256 is not 63ecce1ca692"):
        bundled.get("thyroid", tmp_path, progress=False)


# public dictionaries ------------------------------------------------------------------------------


@pytest.mark.needs("data")
@pytest.mark.parametrize("name", SOURCES)
def test_a_dictionary_describes_every_column(name: str, data_dir: Path) -> None:
    data = SOURCES[name].data
    frame = SOURCES[name].load(data_dir, False)
    assert set(data.dictionary) == set(frame.columns) - {data.site, data.patient}
    assert all(bool(f.range) != bool(f.categories) for f in data.dictionary.values())
    assert set(frame[data.target]) == set(data.dictionary[data.target].categories)


@pytest.mark.needs("data")
@pytest.mark.parametrize("name", SOURCES)
def test_public_ranges_hold_nearly_every_value(name: str, data_dir: Path) -> None:
    """They are no patient's extremes, yet fewer than 2 % of values lie beyond and are held
    to them.
    """
    frame = SOURCES[name].load(data_dir, False)
    for column, feature in SOURCES[name].data.dictionary.items():
        if feature.range:
            values = pd.to_numeric(frame[column], errors="coerce").dropna()
        else:
            values = pd.Series(dtype=float)
        values = values[~values.isin([float(text) for text in feature.missing])]
        assert values.empty or values.between(*feature.range).mean() > 0.98, column


@pytest.mark.needs("data")
@pytest.mark.parametrize("name", SOURCES)
def test_a_dictionary_makes_the_encoding_without_asking_a_site(name: str, data_dir: Path) -> None:
    from medfed.data.preprocess import agree

    study = load("breast-cancer" if name == "breast-cancer" else "heart").set("data.source", name)
    study = study.set("data.preprocess", "dictionary").set("data.split", "patient")
    _, data = sources.frames(study, data_dir)
    encoding = agree(survey(study, data_dir), data, lambda *_: pytest.fail("asked"), public=True)
    declared = {name for name, feature in data.dictionary.items() if feature.indicator}
    assert {column.name for column in encoding.columns if column.indicator} == declared
    assert len(encoding.columns) == len(data.dictionary) - 1


# downloads ----------------------------------------------------------------------------------------

ROW = "63,1,1,145,233,1,2,150,0,2.3,3,0,6,{num}\n"


class _Handler(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, list[str]]]:
    """A web server with four small heart files, an empty cache, and no data folder: (its folder,
    paths asked).
    """
    folder = tmp_path / "web"
    folder.mkdir()
    for number, name in enumerate(HEART_FILES):
        (folder / name).write_text(ROW.format(num=0) + ROW.format(num=number + 1))
        monkeypatch.setitem(
            HEART_FILES, name, hashlib.sha256((folder / name).read_bytes()).hexdigest()
        )

    handler = type("Handler", (_Handler,), {"asked": []})
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(folder))
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(bundled, "HEART_URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(pooch, "os_cache", lambda name: tmp_path / "cache" / name)
    monkeypatch.delenv("MEDFED_DATA", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield folder, handler.asked
    server.shutdown()
    thread.join()
    server.server_close()


def _kept(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_a_download_is_kept_and_not_fetched_again(
    web: tuple[Path, list[str]], tmp_path: Path
) -> None:
    assert bundled.get("heart", progress=False) == 8
    assert web[1] == [f"/{name}" for name in HEART_FILES]
    assert _kept(tmp_path) == sorted(HEART_FILES)
    assert bundled.get("heart", progress=False) == 8
    assert len(web[1]) == 4


def test_a_corrupted_download_is_refused_and_not_kept(
    web: tuple[Path, list[str]], tmp_path: Path
) -> None:
    (web[0] / "processed.hungarian.data").write_text(ROW.format(num=3))
    with pytest.raises(
        DataError, match=r"hungarian\.data: the download is damaged.*nothing was kept"
    ):
        bundled.get("heart", progress=False)
    assert _kept(tmp_path) == ["processed.cleveland.data"]


def test_a_damaged_cache_is_fetched_again(web: tuple[Path, list[str]], tmp_path: Path) -> None:
    bundled.get("heart", progress=False)
    kept = next((tmp_path / "cache").rglob("processed.va.data"))
    kept.write_text("damaged")
    assert bundled.get("heart", progress=False) == 8
    assert web[1].count("/processed.va.data") == 2


def test_a_file_that_the_server_lacks_says_what_to_do(web: tuple[Path, list[str]]) -> None:
    (web[0] / "processed.cleveland.data").unlink()
    with pytest.raises(
        DataError, match=r"cannot be downloaded \(HTTPError\).*put processed\.cleveland\.data into"
    ):
        bundled.get("heart", progress=False)


def test_no_connection_says_what_to_do(
    web: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundled, "HEART_URL", "http://127.0.0.1:9/")
    with pytest.raises(
        DataError,
        match=r"cannot be downloaded \(ConnectionError\)\. Try again, or put processed\.clev",
    ):
        bundled.get("heart", progress=False)
    assert _kept(tmp_path) == []


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_file_put_by_hand_is_not_downloaded(
    web: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    (tmp_path / "mine").mkdir()
    web[0].rename(tmp_path / "mine" / "fed_heart_disease")
    if by == "environment":
        monkeypatch.setenv("MEDFED_DATA", str(tmp_path / "mine"))
    assert (
        bundled.get("heart", tmp_path / "mine" if by == "argument" else None, progress=False) == 8
    )
    assert web[1] == []


def test_an_unknown_source_offers_the_nearest() -> None:
    with pytest.raises(StudyError, match=r"source='hart' is unknown; did you mean 'heart'\?"):
        bundled.get("hart")
    with pytest.raises(StudyError, match=r"data\.source='hart' is unknown; did you mean 'heart'\?"):
        sources.frames(load("heart").set("data.source", "hart"))


# sites --------------------------------------------------------------------------------------------

CSV = "site,a,y\n" + "".join(f"{'nsn'[i % 3]},{i},{'01'[i % 2]}\n" for i in range(60))


def _study(folder: Path, csv: str = CSV, **data: object) -> Study:
    (folder / "t.csv").write_text(csv)
    study = from_tables({"data": {"table": str(folder / "t.csv"), "target": "y", **data}})
    return study


def test_a_site_column_makes_sites(tmp_path: Path) -> None:
    frames, _ = sources.frames(_study(tmp_path, site="site"))
    assert {name: len(frame) for name, frame in frames.items()} == {"n": 40, "s": 20}


def test_sites_are_in_the_order_of_their_names_not_of_rows(tmp_path: Path) -> None:
    csv = "site,a,y\ns,1,0\nn,2,1\ns,3,1\n"
    assert list(sources.frames(_study(tmp_path, csv, site="site"))[0]) == ["n", "s"]
    declared = _study(tmp_path, csv, site="site").set("privacy.sizes", {"s": 9, "e": 9, "n": 9})
    frames, _ = sources.frames(declared, private=True)
    assert list(frames) == ["s", "e", "n"] and [len(frame) for frame in frames.values()] == [
        2,
        0,
        1,
    ]


@pytest.mark.parametrize("site", ["x77", ""])
def test_under_a_claim_rows_of_a_site_that_is_not_declared_are_refused_unquoted(
    tmp_path: Path, site: str
) -> None:
    study = _study(tmp_path, f"site,a,y\nn,1,0\n{site},2,1\n", site="site").set(
        "privacy.sizes", {"n": 9}
    )
    with pytest.raises(DataError, match=r"do not name one of privacy\.sizes \(n\)") as caught:
        sources.frames(study, private=True)
    assert "77" not in str(caught.value) and "row 3" not in str(caught.value)


def test_under_a_claim_sites_must_be_declared(tmp_path: Path) -> None:
    with pytest.raises(
        PlanError, match=r"no \[privacy\.sizes\] do not compose: sites are declared"
    ):
        sources.frames(_study(tmp_path, site="site"), private=True)


def test_a_site_column_and_sites_are_refused(tmp_path: Path) -> None:
    study = from_tables(
        {**_study(tmp_path, site="site").tables(), "sites": {"names": ["x"], "shares": [1.0]}}
    )
    with pytest.raises(
        StudyError, match=r"sites\.names is set, but data\.site='site' already says who is where"
    ):
        sources.frames(study)


def test_no_site_column_and_no_sites_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"no site column and no \[sites\]; set data\.site"):
        sources.frames(_study(tmp_path))


@pytest.mark.parametrize("change", [{"table": ""}, {"source": "heart"}])
def test_one_of_source_and_table_is_needed(tmp_path: Path, change: dict[str, object]) -> None:
    tables = _study(tmp_path).tables()
    with pytest.raises(StudyError, match="expected one of the two"):
        sources.frames(from_tables({**tables, "data": {**tables["data"], **change}}))


@pytest.mark.parametrize("key", ["site", "patient"])
def test_no_such_site_or_patient_column_offers_the_nearest(tmp_path: Path, key: str) -> None:
    with pytest.raises(
        DataError, match=rf"data\.{key}='siet' is no column of the table; did you mean 'site'\?"
    ):
        sources.frames(_study(tmp_path, **{key: "siet"}))


def test_rows_without_a_site_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"column 'site': no site named in row 3, 5"):
        sources.frames(_study(tmp_path, "site,a,y\nn,1,0\n,2,1\nn,3,0\n  ,4,1\n", site="site"))


def test_shares_share_out_every_patient_once(tmp_path: Path) -> None:
    study = from_tables(
        {**_study(tmp_path).tables(), "sites": {"names": ["x", "z"], "shares": [0.5, 0.5]}}
    )
    frames, _ = sources.frames(study)
    assert sorted(row for frame in frames.values() for row in frame.index) == list(range(2, 62))
    assert min(len(frame) for frame in frames.values()) > 15


def test_a_site_that_gets_nobody_is_refused_by_name(tmp_path: Path) -> None:
    study = from_tables(
        {
            **_study(tmp_path).tables(),
            "sites": {"names": ["big", "tiny"], "shares": [0.999999, 1e-6]},
        }
    )
    with pytest.raises(DataError, match=r"site 'tiny' has no row; give it patients"):
        open_sites(study, None)


def test_a_site_of_one_class_warns(tmp_path: Path) -> None:
    csv = "site,a,y\n" + "".join(
        f"{'ns'[i % 2]},{i},{1 if i % 2 else i % 4 // 2}\n" for i in range(80)
    )
    study = _study(tmp_path, csv, site="site")
    assert _warnings(study) == [
        "site 's' trains on one class only ('1'); its own model cannot tell classes apart",
    ]
    assert _warnings(_study(tmp_path, CSV, site="site")) == []


def _warnings(study: Study) -> list[str]:
    from medfed.data.preprocess import agree

    surveys = survey(study)
    encoding = agree(
        surveys, study.set("data.preprocess", "none").data, lambda *_: pytest.fail("asked")
    )
    return list(make(study, surveys, encoding).warnings)


def test_what_a_study_says_wins_over_what_its_source_knows() -> None:
    study = load("breast-cancer").set("data.dictionary.mean radius.range", [1.0, 2.0])
    _, data = sources.frames(study)
    assert data.dictionary["mean radius"].range == (1.0, 2.0)
    assert data.dictionary["mean texture"].range == (9.0, 40.0)
    assert (data.target, data.positive, data.preprocess) == ("diagnosis", "malignant", "dictionary")


# the brief's function -----------------------------------------------------------------------------


def test_prepared_data_holds_every_patient_and_every_class_at_every_site() -> None:
    prepared = load_and_prepare_medical_data()
    assert prepared.labels == ("benign", "malignant")
    assert len(prepared.features) == 32 and list(prepared.train) == list(
        load("breast-cancer").sites.names
    )
    parts = [*prepared.train.values(), *prepared.test.values()]
    assert sum(len(y) for _, y in parts) == 569 and sum(int(y.sum()) for _, y in parts) == 212
    for x, y in parts:
        assert x.shape == (len(y), 32) and x.dtype == np.float32 and np.isfinite(x).all()
        assert set(y.tolist()) == {0.0, 1.0}
        assert np.abs(x).max() <= 2  # public ranges: nothing was fitted


def test_robust_preparation_centres_and_scales_over_all_sites() -> None:
    sites = {"names": ["x", "y"], "shares": [0.7, 0.3]}
    prepared = load_and_prepare_medical_data(
        from_tables({"data": {"source": "breast-cancer"}, "sites": sites})
    )
    pooled = np.concatenate([x for x, _ in prepared.train.values()])
    assert np.abs(np.median(pooled, 0)).max() < 1e-6
    assert np.quantile(pooled, 0.75, 0) - np.quantile(pooled, 0.25, 0) == pytest.approx(1, abs=1e-5)
