"""Sites that differ: a file of each site's own makes its rows those that the study expects, and no
others.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tables import PRIVATE, STUDY, invented, write_study

from medfed import runs
from medfed.core.checks import DataError, MedfedError, RunError, StudyError
from medfed.data import site_maps, sources, survey_doubts
from medfed.data.site_maps import set_point
from medfed.planning import fix
from medfed.study import Data, Study, load

MAP = """
[rename]
laktat = "lactate"

[columns.lactate]
decimal = ","
factor = 0.111
missing = ["k.A."]

[columns.died]
recode = { verstorben = "yes", lebt = "no" }
"""


def _differing(rows: int = 60) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a table, and the same as the site "south" writes it: another name, unit, decimal sign
    and label.
    """
    clean = invented(rows).astype(object)
    clean["lactate"] = pd.Series(clean["lactate"].astype(float).round(2), dtype=object)
    table = clean.copy()
    south = (clean["hospital"] == "south").to_numpy()
    table["laktat"] = [
        f"{value / 0.111:.6f}".replace(".", ",") if pd.notna(value) else "k.A."
        for value in clean["lactate"]
    ]
    table.loc[~south, "laktat"] = ""
    table.loc[south, "lactate"] = ""
    table.loc[south, "died"] = clean.loc[south, "died"].map({"yes": "verstorben", "no": "lebt"})
    return clean, table


def _study(folder: Path, frame: pd.DataFrame, text: str = MAP, study: str = STUDY) -> Study:
    (folder / "maps").mkdir(exist_ok=True)
    (folder / "maps" / "south.toml").write_text(text, encoding="utf-8")
    mapped = load(write_study(folder, study, frame)).set(
        "data.site_maps", {"south": "maps/south.toml"}
    )
    return mapped.set(
        "data.format.decimal", "."
    )  # one file of both kinds is asked about; a map says which site's is which


def _frame(study: Study, private: bool = False) -> pd.DataFrame:
    return sources.frames(study, private=private)[0].frame.sort_index()


@pytest.mark.parametrize("sign", [".", ","])
def test_a_site_takes_its_own_unit_off_and_converts(tmp_path: Path, sign: str) -> None:
    clean = invented(60)
    clean["weight"] = np.arange(60) + 50.5
    table = clean.copy()
    south = clean["hospital"] == "south"
    pounds = [f"{value / 0.45359237:.9f} lbs".replace(".", sign) for value in clean["weight"]]
    table["weight"] = np.where(south, pounds, [f"{value} kg" for value in clean["weight"]])
    text = f'[columns.weight]\ndecimal = "{sign}"\nsuffix = ["lbs"]\nfactor = 0.45359237\n'
    study = _study(tmp_path, table, text, STUDY + '[data.dictionary.weight]\nsuffix = ["kg"]\n')
    np.testing.assert_allclose(_frame(study)["weight"].astype(float), clean["weight"], rtol=1e-9)
    assert survey_doubts.find(runs.survey(study), study.data) == []


def test_a_mapped_site_is_the_site_that_the_study_expects(tmp_path: Path) -> None:
    clean, table = _differing()
    found = _frame(_study(tmp_path, table))
    assert list(found) == list(clean) and found["died"].tolist() == clean["died"].tolist()
    got = pd.to_numeric(found["lactate"]).to_numpy()
    assert np.allclose(got, clean["lactate"].astype(float), atol=1e-5, equal_nan=True)
    others = (clean["hospital"] != "south").to_numpy()
    assert (got == clean["lactate"].to_numpy(dtype=float))[others & ~np.isnan(got)].all()


def test_without_its_map_the_site_is_named_with_what_it_has_instead(tmp_path: Path) -> None:
    _, table = _differing()
    table["died"] = invented(60)["died"].to_numpy()
    table["laktat"] = table["laktat"].str.replace(",", ".").replace("k.A.", "")
    study = load(write_study(tmp_path, STUDY, table))
    with pytest.raises(DataError) as caught:
        runs.simulate(study)
    told = (
        "site 'south', column 'lactate': expected a number, as at other sites, found no value; "
        "'laktat' of the same"
    )
    assert told in str(caught.value)
    assert '[rename] laktat = "lactate"' in str(
        caught.value
    ) and 'data.absent.south = ["lactate"]' in str(caught.value)


def test_what_a_site_does_not_measure_stays_possible_by_declaration(tmp_path: Path) -> None:
    frame = invented(60)
    frame.loc[frame["hospital"] == "south", "lactate"] = np.nan
    study = load(write_study(tmp_path, STUDY, frame)).set("training.rounds", 1)
    warned = runs.simulate(study).summary["warnings"]
    assert any("site 'south' has no value at all of lactate" in text for text in warned)
    declared = study.set("data.absent", {"south": ["lactate"]})
    assert not any(
        "no value at all" in text for text in runs.simulate(declared).summary["warnings"]
    )
    mapped = _study(tmp_path, frame, 'absent = ["lactate"]').set("training.rounds", 1)
    assert not any("no value at all" in text for text in runs.simulate(mapped).summary["warnings"])

    with pytest.raises(
        DataError, match=r"site 'south', column 'lactate': expected a number.*found no value"
    ):
        runs.simulate(_study(tmp_path, frame, ""))  # who has a map says what is absent

    values = load(write_study(tmp_path, STUDY, invented(60))).set(
        "data.absent", {"south": ["lactate"]}
    )
    with pytest.raises(
        DataError,
        match=r"site 'south', column 'lactate': a value where it is declared absent in row",
    ):
        runs.simulate(values)


def test_a_claim_bears_a_map_and_no_cell_stops_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clean, table = _differing()
    table.loc[table.index[table["hospital"] == "north"][0], "laktat"] = "CANARY"
    study = _study(tmp_path, table, study=PRIVATE)
    found = _frame(study, private=True)
    got = pd.to_numeric(found["lactate"]).to_numpy()
    assert np.allclose(got, clean["lactate"].astype(float), atol=1e-5, equal_nan=True)
    assert "column 'laktat': a value in a column that another site's map renames" in caplog.text
    with pytest.raises(
        DataError, match="site 'north', column 'laktat': a value in a column that another"
    ):
        _frame(study)


@settings(max_examples=30)
@given(
    cells=st.lists(
        st.one_of(st.text(max_size=10), st.sampled_from(["1,5", "1.234,5", "12/31/1999"])),
        min_size=2,
    )
)
def test_no_cell_stops_a_claim(cells: list[str]) -> None:
    text = (
        '[rename]\nb = "a"\n[columns.a]\ndecimal = ","\nfactor = 1e300\n[columns.c]\ndate = '
        '"mm/dd/yyyy"'
    )
    frame = pd.DataFrame({"a": cells, "b": cells[::-1], "c": cells}, dtype=object)
    site = pd.Series(["bern", "ulm"] * len(cells), dtype=object)[: len(cells)]
    maps = {"bern": site_maps.parse(text, "bern")[0]}
    data = Data(absent={"ulm": ("c",)})
    found = site_maps.apply(frame, maps, data, site, private=True)
    assert list(found) == ["a", "c"] and found["c"].isna()[1::2].all()


def test_a_site_is_mapped_alike_alone(tmp_path: Path) -> None:
    """Row-local, so a site's rows come out as they would at its own hospital."""
    _, table = _differing()
    whole = _frame(_study(tmp_path, table))
    south = table["hospital"] == "south"
    alone = _frame(_study(tmp_path, table[south]))
    assert alone.to_numpy().tolist() == whole[whole["hospital"] == "south"].to_numpy().tolist()


def test_a_site_writes_its_dates_in_its_own_form(tmp_path: Path) -> None:
    frame = invented(60).assign(born="31.12.1960")
    frame.loc[frame["hospital"] == "south", "born"] = "12/31/1960"
    entry = {"born": {"date": "dd.mm.yyyy", "becomes": "age", "reference": "2020-12-31"}}
    study = _study(tmp_path, frame, '[columns.born]\ndate = "mm/dd/yyyy"').set(
        "data.dictionary", entry
    )
    assert set(_frame(study)["born"]) == {"60"}
    with pytest.raises(
        DataError, match=r"site 'south', column 'born': no date of the form dd\.mm\.yyyy"
    ):
        _frame(study.set("data.site_maps", {}))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            '[rename]\nlaktad = "lactate"',
            "site 'south': its map renames 'laktad', no column of the table; did you mean",
        ),
        ("[columns.lactat]\nfactor = 2", "[columns.lactat], no column; did you mean 'lactate'?"),
        (
            "[colums.lactate]\nfactor = 2",
            "site map 'maps/south.toml': unknown key 'colums'; did you mean 'columns'?",
        ),
        ("[columns.lactate]\nfactor = 0", "columns.lactate.factor=0; expected a number but 0"),
        ('[columns.age]\ndate = "dmy"', "columns.age.date='dmy'; expected one of iso"),
        ("= 3", "site map 'maps/south.toml' cannot be read as TOML"),
        ('[rename]\nhospital = "place"', "renames 'hospital', which says whose rows are whose"),
        ('[rename]\nlaktat = "lactate"\nage = "lactate"', "renames two columns to 'lactate'"),
        ('absent = ["lactat"]', "names 'lactat', no column of the table; did you mean 'lactate'?"),
    ],
)
def test_a_map_that_cannot_be_is_refused_before_a_cell_is_read(
    tmp_path: Path, text: str, told: str
) -> None:
    _, table = _differing()
    with pytest.raises(MedfedError) as caught:
        runs.open_sites(_study(tmp_path, table, text), None)
    assert told in str(caught.value)


def test_a_map_that_is_not_there_is_named(tmp_path: Path) -> None:
    study = load(write_study(tmp_path)).set("data.site_maps", {"south": "south.toml"})
    with pytest.raises(
        StudyError, match=r"data.site_maps.south='south.toml' cannot be read.*relative to the study"
    ):
        runs.open_sites(study, None)


def test_a_map_of_nobody_is_refused(tmp_path: Path) -> None:
    _, table = _differing()
    study = _study(tmp_path, table).set("data.site_maps", {"soth": "maps/south.toml"})
    with pytest.raises(DataError, match="'soth' is no site; did you mean 'south'"):
        sources.frames(study)


def test_a_run_writes_its_maps_down_and_refuses_to_go_on_with_others(tmp_path: Path) -> None:
    _, table = _differing()
    study = _study(tmp_path, table).set("training.rounds", 1)
    result = runs.run(study, tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "sites" / runs.SITE_MAPS).read_text(encoding="utf-8"))
    assert kept == {
        "south": {"file": "maps/south.toml", "sha256": site_maps.sha256(MAP), "text": MAP}
    }
    assert (
        result.study.digest()
        != study.digest()
        == _study(tmp_path, table).set("training.rounds", 1).digest()
    )
    (tmp_path / "run" / "summary.json").unlink()
    assert runs.resume(tmp_path / "run").complete
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "maps" / "south.toml").write_text(MAP.replace("0.111", "0.112"))

    with pytest.raises(
        (StudyError, RunError), match=r"data.site_maps.south='maps/south.toml' was changed"
    ):
        runs.resume(tmp_path / "run")


def test_a_mended_study_elsewhere_finds_its_maps(tmp_path: Path) -> None:
    _study(tmp_path, invented(40), "")
    settings = ['data.site_maps.south="maps/south.toml"']
    fixed = fix.fix(tmp_path / "study.toml", settings, out=tmp_path / "mended" / "study.toml")
    assert 'south = "../maps/south.toml"' in fixed.text


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("1,5", "1.5"),
        ("1.234,5", "1234.5"),
        ("<0,3", "<0.3"),
        ("1.234", "1234"),
        ("12.34", "12.34"),
        ("a,b", "a,b"),
    ],
)
def test_a_decimal_comma_is_a_point(text: str, told: str) -> None:
    assert set_point(text) == told


def test_a_file_of_a_mapped_site_has_names_of_its_own(tmp_path: Path) -> None:
    """Files of a folder are compared but for those whose site has a map: that is what a map
    is for.
    """
    clean = invented(120)
    for name, rows in clean.groupby("hospital"):
        own = rows.drop(columns="hospital")
        own = own.rename(columns={"lactate": "laktat", "subject": "id"}) if name == "south" else own
        own.to_csv(tmp_path / f"{name}.csv", index=False)

    (tmp_path / "south.toml").write_text(
        '[rename]\nlaktat = "lactate"\nid = "subject"\n', encoding="utf-8"
    )
    text = STUDY.replace('table = "cohort.csv"', 'table = "*.csv"').replace(
        'site = "hospital"', "site_is_file = true"
    )
    (tmp_path / "study.toml").write_text(text, encoding="utf-8")
    study = load(tmp_path / "study.toml")
    with pytest.raises(DataError, match=r"(?s)4 things stand.*give the site a map") as refused:
        runs.simulate(study)
    assert "'laktat'" in str(refused.value) and "'id'" in str(refused.value)  # all at once
    mapped = runs.simulate(study.set("data.site_maps", {"south": "south.toml"}))
    pd.testing.assert_series_equal(
        pd.Series(mapped.w_P.numpy()),
        pd.Series(runs.simulate(load(write_study(tmp_path, STUDY, clean))).w_P.numpy()),
        check_exact=True,
    )
