"""Tables that read well and are wrong: each fault that passed in silence is named, with the line that settles it."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.tables import PRIVATE, SITES, STUDY, invented, write_study

import medfed
from medfed.core.checks import DataError
from medfed.data import doubts
from medfed.data.doubts import HARMS, Doubt
from medfed.prepare import ask_surveys
from medfed.study import Data, Study

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[pd.DataFrame], object]


def changed(folder: Path, change: Change, text: str = STUDY) -> Study:
    frame = invented()
    change(frame)
    return medfed.load_study(write_study(folder, text, frame))


def found(study: Study) -> list[Doubt]:
    from medfed import runs

    return doubts.of_all(runs.survey(study), study.data)


def an_index(frame: pd.DataFrame) -> None:
    frame.insert(0, "Unnamed: 0", range(len(frame)))


def a_shuffled_index(frame: pd.DataFrame) -> None:
    frame["index"] = np.random.default_rng(0).permutation(len(frame))


def a_case_number(frame: pd.DataFrame) -> None:
    frame["FallNr"] = np.random.default_rng(0).integers(10**6, 10**7, len(frame))


def a_copy(frame: pd.DataFrame) -> None:
    frame["exitus"] = frame["died"].map({"yes": "tot", "no": "lebt"})


def a_copy_in_numbers(frame: pd.DataFrame) -> None:
    frame["outcome"] = frame["died"].map({"yes": 7, "no": 3})


def a_date_of_death(frame: pd.DataFrame) -> None:
    days = np.random.default_rng(0).integers(1, 99, len(frame)).astype(str)
    frame["days to death"] = np.where(frame["died"] == "yes", days, "")


def a_discharge(frame: pd.DataFrame) -> None:
    """Several words for one label: the usual leak."""
    other = np.random.default_rng(0).choice(["home", "rehab", "nursing home"], len(frame))
    frame["discharge"] = np.where(frame["died"] == "yes", "deceased", other)


def units_in_cells(frame: pd.DataFrame) -> None:
    frame["ef"] = [f"{value} %" for value in np.random.default_rng(0).integers(20, 70, len(frame))]


def units_at_one_site(frame: pd.DataFrame) -> None:
    values = np.random.default_rng(0).integers(50, 99, len(frame)).astype(str).astype(object)
    frame["weight"] = np.where(frame["hospital"] == "east", values + " kg", values)


def words_at_one_site(frame: pd.DataFrame) -> None:
    coin = np.random.default_rng(0).integers(0, 2, len(frame))
    frame["flag"] = np.where(frame["hospital"] == "east", np.array(["nein", "ja"])[coin], coin.astype(str))


def sexes(frame: pd.DataFrame) -> None:
    coin = np.random.default_rng(0).integers(0, 2, len(frame))
    pair = {"north": ("m", "w"), "south": ("M", "W"), "east": ("male", "female")}
    frame["sex"] = [pair[site][one] for site, one in zip(frame["hospital"], coin, strict=True)]


def labels_by_case(frame: pd.DataFrame) -> None:
    at = frame["hospital"] == "south"
    frame.loc[at, "died"] = frame.loc[at, "died"].str.title()


def labels_in_numbers(frame: pd.DataFrame) -> None:
    at = frame["hospital"] == "south"
    frame.loc[at, "died"] = frame.loc[at, "died"].map({"yes": "1", "no": "0"})


def a_null_label(frame: pd.DataFrame) -> None:
    frame.loc[[3, 50], "died"] = "NULL"


def a_second_header(frame: pd.DataFrame) -> None:
    frame.loc[120, "died"] = "died"


def words_by_case(frame: pd.DataFrame) -> None:
    at = frame["hospital"] == "east"
    frame.loc[at, "ward"] = frame.loc[at, "ward"].str.upper()


def another_unit(frame: pd.DataFrame) -> None:
    frame["age"] = frame["age"] * 12


def a_clean_cut(frame: pd.DataFrame) -> None:
    frame["score"] = np.where(frame["died"] == "yes", 5, 1) + np.random.default_rng(0).random(len(frame))


def the_site_in_words(frame: pd.DataFrame) -> None:
    frame["city"] = frame["hospital"].str.upper()


def the_site_in_numbers(frame: pd.DataFrame) -> None:
    frame["site code"] = frame["hospital"].map({name: 10.5 * i for i, name in enumerate(SITES)})


def one_value(frame: pd.DataFrame) -> None:
    frame["version"] = 3


def nothing(frame: pd.DataFrame) -> None:
    frame["troponin"] = ""


CASES: list[tuple[Change, str, str, str]] = [
    (an_index, "row-number", "Unnamed: 0", 'data.exclude = ["Unnamed: 0"]'),
    (a_shuffled_index, "row-number", "index", 'data.exclude = ["index"]'),
    (a_case_number, "identifier", "FallNr", 'data.exclude = ["FallNr"]'),
    (a_copy, "target-copy", "exitus", 'data.exclude = ["exitus"]'),
    (a_copy_in_numbers, "target-copy", "outcome", 'data.exclude = ["outcome"]'),
    (a_date_of_death, "gaps-copy-target", "days to death", 'data.exclude = ["days to death"]'),
    (a_discharge, "target-copy", "discharge", 'data.exclude = ["discharge"]'),
    (units_in_cells, "units-in-cells", "ef", 'data.dictionary.ef.suffix = ["%"]'),
    (units_at_one_site, "units-in-cells", "weight", 'data.dictionary.weight.suffix = ["kg"]'),
    (words_at_one_site, "kinds", "flag", 'data.exclude = ["flag"]'),
    (sexes, "spelling", "sex", "data.dictionary.sex.recode = {"),
    (labels_by_case, "label-spelling", "died", "data.dictionary.died.recode = {"),
    (labels_in_numbers, "label-spelling", "died", "data.dictionary.died.recode = {"),
    (a_null_label, "label-missing", "died", '"NULL"'),
    (a_second_header, "label-header", "died", "Delete that row"),
    (words_by_case, "spelling", "ward", "data.dictionary.ward.recode = {"),
    (a_clean_cut, "separates", "score", 'data.exclude = ["score"]'),
    (the_site_in_words, "names-site", "city", 'data.exclude = ["city"]'),
    (the_site_in_numbers, "names-site", "site code", 'data.exclude = ["site code"]'),
    (one_value, "constant", "version", 'data.exclude = ["version"]'),
    (nothing, "empty", "troponin", 'data.exclude = ["troponin"]'),
]


def test_the_plain_table_raises_no_doubt(tmp_path: Path) -> None:
    assert found(changed(tmp_path, lambda frame: None)) == []


@pytest.mark.parametrize(("change", "code", "column", "way_out"), CASES, ids=[case[0].__name__ for case in CASES])
def test_it_is_named_once_and_stops_the_run_or_warns(
    tmp_path: Path, change: Change, code: str, column: str, way_out: str
) -> None:
    study = changed(tmp_path, change)
    (doubt,) = found(study)
    assert (doubt.code, doubt.column) == (code, column)
    assert way_out in doubt.sentence() and f'data.accept = ["{code}:{column}"]' in doubt.sentence()
    if HARMS[code] == "error":
        with pytest.raises(DataError) as refused:
            medfed.simulate(study)
        assert str(refused.value) == doubt.sentence()
    else:
        assert doubt.sentence() in medfed.simulate(study).summary["warnings"]


@pytest.mark.parametrize("accepted", ["target-copy", "target-copy:exitus"])
def test_what_the_study_accepts_is_not_doubted(tmp_path: Path, accepted: str) -> None:
    study = changed(tmp_path, a_copy).set("data.accept", [accepted])
    assert found(study) == []
    assert medfed.simulate(study).complete
    assert len(found(study.set("data.accept", ["target-copy:age"]))) == 1


def test_an_index_in_files_of_several_hospitals_is_one_too(tmp_path: Path) -> None:
    """Rows are named by file there: Bern.csv:17."""
    for name, rows in invented().groupby("hospital"):
        rows.drop(columns="hospital").assign(nr=range(len(rows))).to_csv(tmp_path / f"{name}.csv", index=False)
    text = STUDY.replace('table = "cohort.csv"', 'table = "*.csv"').replace('site = "hospital"', "site_is_file = true")
    path = tmp_path / "study.toml"
    path.write_text(text)
    (doubt,) = found(medfed.load_study(path))
    assert (doubt.code, doubt.column, doubt.sites) == ("row-number", "nr", ("east", "north", "south"))


def test_one_hospital_in_another_unit_is_doubted(tmp_path: Path) -> None:
    """Creatinine about 1 in one hospital and about 90 in the others: mg/dL beside umol/L."""

    def creatinine(frame: pd.DataFrame) -> None:
        values = np.exp(np.random.default_rng(0).normal(4.5, 0.4, len(frame)))
        frame["creatinine"] = np.where(frame["hospital"] == "south", values / 88.42, values).round(3)

    study = changed(tmp_path, creatinine)
    (doubt,) = found(study)
    assert (doubt.code, doubt.column) == ("units-differ", "creatinine")
    assert "south about 0.988" in doubt.sentence() and "as in mg/dL" in doubt.sentence()
    with pytest.raises(DataError, match="several units"):
        medfed.simulate(study)

    def other_patients(frame: pd.DataFrame) -> None:
        creatinine(frame)
        frame.loc[frame["hospital"] == "south", "creatinine"] *= 88.42 * 2.5  # a dialysis ward, in the same unit

    assert found(changed(tmp_path, other_patients)) == []


def test_numbers_as_labels_are_a_regression_or_are_accepted(tmp_path: Path) -> None:
    def days(frame: pd.DataFrame) -> None:
        frame["died"] = np.random.default_rng(0).integers(1, 20, len(frame))

    study = changed(tmp_path, days)
    (doubt,) = found(study)
    assert doubt.code == "label-numbers" and 'data.task = "regression"' in doubt.sentence()
    assert found(study.set("data.task", "regression")) == []


def test_units_are_taken_off_where_that_is_declared(tmp_path: Path) -> None:
    text = STUDY + '[data.dictionary.ef]\nsuffix = ["%"]\n[data.dictionary.weight]\nsuffix = ["kg"]\n'
    frame = invented()
    units_in_cells(frame)
    units_at_one_site(frame)
    study = medfed.load_study(write_study(tmp_path, text, frame))
    assert found(study) == []
    weights = medfed.simulate(study).w_P
    plain = frame.assign(ef=frame["ef"].str.removesuffix(" %"), weight=frame["weight"].str.removesuffix(" kg"))
    assert weights.equal(medfed.simulate(medfed.load_study(write_study(tmp_path, STUDY, plain))).w_P)


def test_several_doubts_are_told_at_once(tmp_path: Path) -> None:
    def several(frame: pd.DataFrame) -> None:
        an_index(frame)
        a_copy(frame)

    with pytest.raises(DataError, match="2 things stand against this study") as refused:
        medfed.simulate(changed(tmp_path, several))
    assert "Unnamed: 0" in str(refused.value) and "exitus" in str(refused.value)


def test_most_values_beyond_a_range_are_another_unit(tmp_path: Path) -> None:
    study = changed(tmp_path, another_unit, STUDY + "[data.dictionary.age]\nrange = [18, 110]\n")
    assert {doubt.code for doubt in found(study)} == {"outside-most"}
    with pytest.raises(DataError, match=r"east, north, south, column 'age' has \d+ of \d+ values outside"):
        medfed.simulate(study)


def test_numbers_among_words_for_no_value_are_no_categories(tmp_path: Path) -> None:
    def gaps(frame: pd.DataFrame) -> None:
        frame["lactate"] = frame["lactate"].astype(object)
        frame.loc[np.arange(len(frame)) % 3 > 0, "lactate"] = "k.A."

    with pytest.raises(
        DataError, match=r"column 'lactate': numbers, and more often 'k.A.', row .*missing = \[\"k.A.\"\]"
    ):
        medfed.simulate(changed(tmp_path, gaps))


@pytest.mark.parametrize("gap", ["NA", "NULL", "-", "k.A.", ""])
def test_a_word_for_no_value_is_no_hospital(tmp_path: Path, gap: str) -> None:
    def unnamed(frame: pd.DataFrame) -> None:
        frame.loc[[3, 7], "hospital"] = gap

    with pytest.raises(DataError, match="column 'hospital': no site named in row 5, 9"):
        medfed.simulate(changed(tmp_path, unnamed))


def test_few_records_look_like_anything_and_are_not_doubted() -> None:
    """Twelve patients of whom six died: one flag in some hundred agrees by chance."""
    rng = np.random.default_rng(0)
    for size in (12, 19):
        label = rng.integers(0, 2, size)
        assert not doubts._unlikely(label, 30)


def test_features_that_know_nothing_are_doubted_nowhere(tmp_path: Path) -> None:
    """Sixty columns of noise at sites of 60 to 120 records, one in eight positive: no false alarm."""
    rng = np.random.default_rng(0)

    def noise(frame: pd.DataFrame) -> None:
        frame["died"] = np.where(rng.random(len(frame)) < 0.13, "yes", "no")
        for i in range(30):
            frame[f"flag {i}"] = rng.integers(0, 2, len(frame))
            frame[f"rare {i}"] = (rng.random(len(frame)) < 0.02).astype(int)

    assert [doubt for doubt in found(changed(tmp_path, noise)) if doubt.harm == "error"] == []


def test_under_a_claim_nobody_is_told_of_any(tmp_path: Path) -> None:
    def several(frame: pd.DataFrame) -> None:
        frame["age"] = frame["died"].map({"yes": 90, "no": 30})
        another_unit(frame)

    study = changed(tmp_path, several, PRIVATE)
    summary = medfed.simulate(study).summary
    assert not any("age" in text for text in summary["warnings"])


def test_what_a_site_tells_comes_back_as_it_was() -> None:
    doubt = Doubt("identifier", "a b", "text", (2, 3), 9, {("data", "dictionary", "a b", "recode"): {"x": "y"}})
    heard = Doubt.heard(doubt.told(), "s")
    assert heard == Doubt(**{**vars(doubt), "sites": ("s",)})


def test_a_table_of_one_site_can_be_doubted_too() -> None:
    assert doubts.of_all({}, Data(target="y")) == []
    assert callable(ask_surveys)
