"""Tables that read well and are wrong: each fault that passed in silence is named, with the line
that settles it.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.tables import PRIVATE, SITES, STUDY, invented, write_study
from tests.test_cli import medfed as command

import medfed
from medfed.core import quotes
from medfed.core.checks import DataError
from medfed.data import mapping, numerals, site_doubts, survey_doubts
from medfed.data import units as measures
from medfed.data.doubts import HARMS, Doubt
from medfed.rounds.prepare import ask_surveys
from medfed.study import Data, Feature, Study

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[pd.DataFrame], object]


def changed(folder: Path, change: Change, text: str = STUDY) -> Study:
    frame = invented()
    change(frame)
    return medfed.load_study(write_study(folder, text, frame))


def found(study: Study) -> list[Doubt]:
    from medfed import runs

    return survey_doubts.find(runs.survey(study), study.data, study.privacy.meant)


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


def two_units(frame: pd.DataFrame) -> None:
    values = np.random.default_rng(0).integers(50, 99, len(frame))
    pounds = [f"{value * 2.2046:.1f} lbs" for value in values]
    frame["weight"] = np.where(
        frame["hospital"] == "east", pounds, [f"{value} kg" for value in values]
    )


def degrees(frame: pd.DataFrame) -> None:
    values = np.random.default_rng(0).normal(37, 0.5, len(frame)).round(1)
    hot = [f"{value * 1.8 + 32:.1f} °F" for value in values]
    frame["temperature"] = np.where(
        frame["hospital"] == "east", hot, [f"{value} °C" for value in values]
    )


def decimal_commas(frame: pd.DataFrame) -> None:
    values = np.random.default_rng(0).normal(4, 0.5, len(frame))
    frame["potassium"] = [f"{value:.1f}".replace(".", ",") for value in values]
    # the table's own decimals
    frame["ratio"] = np.random.default_rng(1).normal(4, 0.5, len(frame)).round(1)


def thousands(frame: pd.DataFrame) -> None:
    frame["platelets"] = [
        f"{value}'000" for value in np.random.default_rng(0).integers(90, 140, len(frame))
    ]


def commas_at_one_site(frame: pd.DataFrame) -> None:
    values = np.random.default_rng(0).normal(4, 0.3, len(frame)).round(1).astype(str)
    frame["potassium"] = [
        value.replace(".", ",") if site == "east" else value
        for value, site in zip(values, frame["hospital"], strict=True)
    ]


def words_at_one_site(frame: pd.DataFrame) -> None:
    coin = np.random.default_rng(0).integers(0, 2, len(frame))
    frame["flag"] = np.where(
        frame["hospital"] == "east", np.array(["nein", "ja"])[coin], coin.astype(str)
    )


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
    frame["score"] = np.where(frame["died"] == "yes", 5, 1) + np.random.default_rng(0).random(
        len(frame)
    )


def the_site_in_words(frame: pd.DataFrame) -> None:
    frame["city"] = frame["hospital"].str.upper()


def the_site_in_numbers(frame: pd.DataFrame) -> None:
    frame["site code"] = frame["hospital"].map({name: 10.5 * i for i, name in enumerate(SITES)})


def one_value(frame: pd.DataFrame) -> None:
    frame["version"] = 3


def nothing(frame: pd.DataFrame) -> None:
    frame["troponin"] = ""


def a_code(frame: pd.DataFrame) -> None:
    frame["sodium"] = np.random.default_rng(0).normal(140, 4, len(frame)).round(1)
    frame.loc[np.arange(len(frame)) % 9 == 0, "sodium"] = -999


def hospitals_by_case(frame: pd.DataFrame) -> None:
    frame.loc[np.arange(len(frame)) % 3 == 0, "hospital"] = frame["hospital"].str.upper()


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
    (two_units, "units-mixed", "weight", "a site's map has suffix and factor"),
    (degrees, "units-mixed", "temperature", "a site's map has suffix and factor"),
    (words_at_one_site, "kinds", "flag", 'data.exclude = ["flag"]'),
    (sexes, "spelling", "sex", "data.dictionary.sex.recode = {"),
    (labels_by_case, "label-spelling", "died", "data.dictionary.died.recode = {"),
    (labels_in_numbers, "label-spelling", "died", "data.dictionary.died.recode = {"),
    (hospitals_by_case, "site-spelling", "hospital", "data.dictionary.hospital.recode = {"),
    (a_null_label, "label-missing", "died", '"NULL"'),
    (a_second_header, "label-header", "died", "Delete that row"),
    (words_by_case, "spelling", "ward", "data.dictionary.ward.recode = {"),
    (a_code, "missing-code", "sodium", 'data.dictionary.sodium.missing = ["-999"]'),
    (a_clean_cut, "separates", "score", 'data.exclude = ["score"]'),
    (the_site_in_words, "names-site", "city", 'data.exclude = ["city"]'),
    (the_site_in_numbers, "names-site", "site code", 'data.exclude = ["site code"]'),
    (one_value, "constant", "version", 'data.exclude = ["version"]'),
    (nothing, "empty", "troponin", 'data.exclude = ["troponin"]'),
]


def test_the_plain_table_raises_no_doubt(tmp_path: Path) -> None:
    assert found(changed(tmp_path, lambda frame: None)) == []


@pytest.mark.parametrize(
    ("change", "code", "column", "way_out"), CASES, ids=[case[0].__name__ for case in CASES]
)
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
        rows.drop(columns="hospital").assign(nr=range(len(rows))).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    text = STUDY.replace('table = "cohort.csv"', 'table = "*.csv"').replace(
        'site = "hospital"', "site_is_file = true"
    )
    path = tmp_path / "study.toml"
    path.write_text(text)
    (doubt,) = found(medfed.load_study(path))
    assert (doubt.code, doubt.column, doubt.sites) == (
        "row-number",
        "nr",
        ("east", "north", "south"),
    )


def test_one_hospital_in_another_unit_is_doubted(tmp_path: Path) -> None:
    """Creatinine about 1 in one hospital and about 90 in the others: mg/dL beside umol/L."""

    def creatinine(frame: pd.DataFrame) -> None:
        values = np.exp(np.random.default_rng(0).normal(4.5, 0.4, len(frame)))
        frame["creatinine"] = np.where(frame["hospital"] == "south", values / 88.42, values).round(
            3
        )

    study = changed(tmp_path, creatinine)
    (doubt,) = found(study)
    assert (doubt.code, doubt.column) == ("units-differ", "creatinine")
    assert "south about 0.988" in doubt.sentence() and "as in mg/dL" in doubt.sentence()
    with pytest.raises(DataError, match="several units"):
        medfed.simulate(study)

    def other_patients(frame: pd.DataFrame) -> None:
        creatinine(frame)
        # a dialysis ward, in the same unit
        frame.loc[frame["hospital"] == "south", "creatinine"] *= 88.42 * 2.5

    assert found(changed(tmp_path, other_patients)) == []


def test_numbers_as_labels_are_a_regression_or_are_accepted(tmp_path: Path) -> None:
    def days(frame: pd.DataFrame) -> None:
        frame["died"] = np.random.default_rng(0).integers(1, 20, len(frame))

    study = changed(tmp_path, days)
    (doubt,) = found(study)
    assert doubt.code == "label-numbers" and 'data.task = "regression"' in doubt.sentence()
    assert found(study.set("data.task", "regression")) == []


def test_units_are_taken_off_where_that_is_declared(tmp_path: Path) -> None:
    text = (
        STUDY + '[data.dictionary.ef]\nsuffix = ["%"]\n[data.dictionary.weight]\nsuffix = ["kg"]\n'
    )
    frame = invented()
    units_in_cells(frame)
    units_at_one_site(frame)
    study = medfed.load_study(write_study(tmp_path, text, frame))
    assert found(study) == []
    weights = medfed.simulate(study).w_P
    plain = frame.assign(
        ef=frame["ef"].str.removesuffix(" %"), weight=frame["weight"].str.removesuffix(" kg")
    )
    assert weights.equal(
        medfed.simulate(medfed.load_study(write_study(tmp_path, STUDY, plain))).w_P
    )


@pytest.mark.parametrize(
    ("change", "column", "form"),
    [
        (decimal_commas, "potassium", "1,5"),
        (commas_at_one_site, "potassium", "1,5"),
        (thousands, "platelets", "1'234.5"),
    ],
)
def test_numbers_as_texts_of_a_workbook_are_no_categories(
    tmp_path: Path, change: Change, column: str, form: str
) -> None:
    frame = invented()
    change(frame)
    study = medfed.load_study(
        write_study(tmp_path, STUDY.replace("cohort.csv", "cohort.xlsx"), frame)
    )
    frame.to_excel(tmp_path / "cohort.xlsx", index=False)
    (doubt,) = found(study)
    assert (doubt.code, doubt.column) == ("numbers-as-text", column)
    assert doubt.mend == {("data", "dictionary", column, "numbers"): form}
    with pytest.raises(DataError, match="spelt as texts"):
        medfed.simulate(study)

    ranged = study.set(f"data.dictionary.{column}.range", [0, 1e6])
    with pytest.raises(DataError, match=f"numbers = .{form}."):
        medfed.simulate(ranged)
    settled = medfed.simulate(study.set(f"data.dictionary.{column}.numbers", form))
    pointed = frame[column].str.replace(",", ".").str.replace("'", "").astype(float)
    frame.assign(**{column: pointed}).to_excel(tmp_path / "cohort.xlsx", index=False)
    assert settled.w_P.equal(medfed.simulate(study).w_P)


def test_numbers_that_are_no_texts_are_not_spelt_anew(tmp_path: Path) -> None:
    """1.234 in a column of numbers is no thousand, also where the study says that texts would spell
    it so.
    """
    frame = pd.DataFrame({"x": [1.234, 5.5], "y": ["1.234", "5,5"]})
    entry = Feature(numbers="1.234,5")
    told = mapping.apply(frame, Data(target="t", dictionary={"x": entry, "y": entry}))
    assert told["x"].astype(float).tolist() == [1.234, 5.5] and told["y"].tolist() == [
        "1234",
        "5.5",
    ]


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        (["4,5", "6,7", "8,9", "1.234"], ""),  # a number cell of three decimals, or a thousand
        (["1,234", "2,345", "4.5"], ""),
        (["104,000", "99,000"], ""),
        (["1.234,5", "1.234", "1.500"], "1.234,5"),
        (["4,5", "1,234", "2,345"], "1,5"),
        (["4,5", "4,6", "4.7"], "1,5"),
        (["1 234", "12 345", "7"], "1 234.5"),
    ],
)
def test_a_spelling_that_no_cell_decides_is_asked_for(texts: list[str], form: str) -> None:
    assert numerals.form_of(texts) == form


def test_hospitals_named_by_letters_are_not_sexes() -> None:
    told = {name: {"train": 9, "test": 3} for name in ("f", "m", "w", "1", "y", "n")}
    assert [*survey_doubts._find_site_spellings(told, Data(site="s"))] == []


def test_a_target_of_decimal_commas_is_no_label(tmp_path: Path) -> None:
    def stays(frame: pd.DataFrame) -> None:
        frame["age"] = frame["age"].astype(int)
        frame["lactate"] = 2
        frame["died"] = [
            f"{days / 2:.1f}".replace(".", ",")
            for days in np.random.default_rng(0).integers(0, 30, len(frame))
        ]

    study = (
        changed(tmp_path, stays).set("data.format.decimal", ".").set("data.accept", ["constant"])
    )
    (doubt,) = found(study)
    assert (doubt.code, doubt.column) == ("numbers-as-text", "died")
    study = study.set("data.dictionary.died.numbers", "1,5")
    assert [doubt.code for doubt in found(study)] == ["label-numbers"]
    assert medfed.simulate(study.set("data.task", "regression")).complete


@pytest.mark.parametrize(
    "words",
    [
        ["1+", "2+", "3+"],
        ["I", "II", "1"],
        ["2-3", "4-5"],
        ["1,2,3", "1,2"],
        ["1", "2", "1,2"],
        ["A,1", "B,2"],
    ],
)
def test_codes_are_no_numbers(words: list[str]) -> None:
    assert numerals.form_of(words) is None


@pytest.mark.parametrize("suffix", [["kg", "lbs"], ["kg"], ["lbs"]])
def test_several_units_are_no_one_suffix(tmp_path: Path, suffix: list[str]) -> None:
    """Also where the study takes them off: 80 kg and 176 lbs would be one column of numbers."""
    study = changed(tmp_path, two_units).set("data.dictionary.weight.suffix", suffix)
    (doubt,) = found(study)
    assert (doubt.code, doubt.column, doubt.mend) == ("units-mixed", "weight", {})
    with pytest.raises(DataError, match="several units"):
        medfed.simulate(study)
    if len(suffix) == 2:
        assert found(study.set("data.accept", ["units-mixed:weight"])) == []


def test_one_unit_in_several_spellings_is_one() -> None:
    assert len(measures.apart(["µg/l", "ug/L", "ng/ml", "mcg/l"])) == 1
    assert len(measures.apart(["Punkte", "punkte", "Punkte."])) == 1
    assert [*map(len, measures.apart(["kg", "lbs", "kg.", "Stone", "mg/l", "mg/dl"]))] == [
        2,
        1,
        1,
        1,
        1,
    ]


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
    with pytest.raises(
        DataError, match=r"east, north, south, column 'age' has \d+ of \d+ values outside"
    ):
        medfed.simulate(study)


def test_numbers_among_words_for_no_value_are_no_categories(tmp_path: Path) -> None:
    def gaps(frame: pd.DataFrame) -> None:
        frame["lactate"] = frame["lactate"].astype(object)
        frame.loc[np.arange(len(frame)) % 3 > 0, "lactate"] = "k.A."

    with pytest.raises(
        DataError,
        match=r"column 'lactate': numbers, and more often 'k.A.', row .*missing = \[\"k.A.\"\]",
    ):
        medfed.simulate(changed(tmp_path, gaps))


def test_one_hospital_in_two_spellings_is_one_as_its_line_says(tmp_path: Path) -> None:
    plain = (
        found(changed(tmp_path, lambda frame: None)),
        medfed.simulate(changed(tmp_path, lambda frame: None)),
    )

    def spelt(frame: pd.DataFrame) -> None:
        hospitals_by_case(frame)
        frame.loc[np.arange(len(frame)) % 5 == 0, "hospital"] += " "

    study = changed(tmp_path, spelt)
    (doubt,) = found(study)
    (recode,) = doubt.mend.values()
    assert recode == {name.upper(): name for name in SITES}
    study = study.set("data.dictionary.hospital.recode", recode)
    assert found(study) == plain[0] == [] and medfed.simulate(study).w_P.equal(plain[1].w_P)


def test_under_a_claim_the_declared_hospitals_decide(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows that do not name one of privacy\.sizes"):
        medfed.simulate(changed(tmp_path, hospitals_by_case, PRIVATE))


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
        assert not site_doubts._is_unlikely(label, 30)


def test_features_that_know_nothing_are_doubted_nowhere(tmp_path: Path) -> None:
    """Sixty columns of noise at sites of 60 to 120 records, one in eight positive: no
    false alarm.
    """
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
    doubt = Doubt(
        "identifier",
        "a b",
        "text",
        (2, 3),
        9,
        {("data", "dictionary", "a b", "recode"): {"x": "y"}},
    )
    heard = Doubt.from_json(doubt.to_json(), "s")
    assert heard == Doubt(**{**vars(doubt), "sites": ("s",)})


def test_a_table_of_one_site_can_be_doubted_too() -> None:
    assert survey_doubts.find({}, Data(target="y")) == []
    assert callable(ask_surveys)


def test_a_code_is_doubted_below_a_range_and_in_a_target_and_settled_by_its_line(
    tmp_path: Path,
) -> None:
    def codes(frame: pd.DataFrame) -> None:
        frame.loc[frame["hospital"] == "east", "age"] = 9999
        frame.loc[np.arange(len(frame)) % 9 == 0, "age"] = -999
        frame["died"] = np.random.default_rng(0).normal(5, 1, len(frame)).round(2)
        frame.loc[[4, 50, 90, 110, 130, 150, 170, 190, 210, 230], "died"] = -99

    text = STUDY + "[data.dictionary.age]\nrange = [18, 110]\n"
    study = changed(tmp_path, codes, text).set("data.task", "regression")
    age, died = found(study)
    assert (age.code, age.column, died.code, died.column) == (
        "missing-code",
        "age",
        "missing-code",
        "died",
    )
    assert [*age.mend.values()] == [["-999", "9999"]]  # each site's own, together
    assert [*died.mend.values()] == [[*Data().missing_values, "-99"]]
    for doubt in (age, died):
        for path, value in doubt.mend.items():
            study = study.set(".".join(path), value)
    study = study.set("data.drop", ["rows without target"])
    assert found(study) == []


def test_two_slips_or_few_records_are_no_code(tmp_path: Path) -> None:
    def slips(frame: pd.DataFrame) -> None:
        rows = [frame.index[frame["hospital"] == name][:2] for name in SITES]
        frame.loc[np.concatenate(rows), "age"] = 999

    assert found(changed(tmp_path, slips)) == []


# Examples -----------------------------------------------------------------------------------------

NO_CELLS = {
    "row-number",
    "site-spelling",
    "identifier",
    "empty",
    "label-header",
    "label-missing",
    "label-spelling",
    "spelling",
}
"""Doubts without a cell beside them: it may name a patient, there is none, or the text and its line
name it already.
"""

CLAIM = ("--set", "privacy.epsilon=1")  # meant, though nothing is claimed without a delta


def _printed(study: Study, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the lines about doubts that `medfed data show` prints, and as JSON."""
    told = ""
    for more in ([], ["--json"]):
        assert command("data", "show", folder / "study.toml", *options, *more) == 0
        out = capsys.readouterr().out
        told += json.dumps(json.loads(out)["doubts"]) if more else out[out.index(" doubt") :]
    return told


@pytest.mark.parametrize(
    ("change", "code", "column", "way_out"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_cells_are_quoted_as_they_stand_and_under_a_claim_nowhere(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Change,
    code: str,
    column: str,
    way_out: str,
) -> None:
    study = changed(tmp_path, change)
    (doubt,) = found(study)
    cells = pd.read_csv(tmp_path / "cohort.csv", dtype=str, keep_default_na=False)
    assert bool(doubt.examples) != (code in NO_CELLS)
    as_told = set(cells[column]) | set(cells[column].str.removesuffix(".0"))
    assert len(doubt.examples) <= 3 and set(doubt.examples) <= as_told
    assert not doubt.rows or set(cells[column][np.array(doubt.rows) - 2]) == {*doubt.examples}
    shown = _printed(study, tmp_path, capsys)
    assert all(repr(cell) in shown for cell in doubt.examples)

    claimed = _printed(study, tmp_path, capsys, *CLAIM)
    quoted = {*re.findall(r"'([^']*)'", claimed.replace(way_out, ""))} & {*cells[column]}
    # words of ours, not of a cell
    assert f"{code}:{column}" in claimed and quoted <= {"NULL", "died", column}
    assert '"examples": []' in claimed


def test_most_values_beyond_a_range_show_some_of_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = changed(tmp_path, another_unit, STUDY + "[data.dictionary.age]\nrange = [18, 110]\n")
    (doubt,) = found(study)
    cells = pd.read_csv(tmp_path / "cohort.csv", dtype=str)["age"]
    assert list(doubt.examples) == list(dict.fromkeys(cells[np.array(doubt.rows) - 2]))[:3]
    assert not any(cell in _printed(study, tmp_path, capsys, *CLAIM) for cell in doubt.examples)


def test_a_private_run_writes_no_cell_that_would_be_doubted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Copies of the target, a clean cut, one value, units in cells: with a claim as without, but
    for the examples.
    """
    columns = ("copy", "cut", "one", "units")

    def several(frame: pd.DataFrame) -> None:
        yes = frame["died"] == "yes"
        frame["copy"] = np.where(yes, 70.03117, 30.03117)
        frame["one"] = 50.03117
        frame["cut"] = np.where(yes, 70.03117, 1.03117) + np.arange(len(frame)) % 7
        frame["units"] = [f"{n}.03117 %" for n in np.arange(len(frame)) % 70]

    entries = "".join(f"[data.dictionary.{name}]\nrange = [0, 100]\n" for name in columns)
    text = PRIVATE.replace("[training]", entries + "[training]")
    study = changed(tmp_path, several, text)
    plain = changed(tmp_path, several)
    assert {doubt.column for doubt in found(plain)} == {*columns}
    assert all("03117" in "".join(doubt.examples) for doubt in found(plain))
    assert not any(doubt.examples for doubt in found(study.set("data.exclude", ["units"])))
    write_study(tmp_path, text, pd.read_csv(tmp_path / "cohort.csv", dtype=str))
    assert command("run", tmp_path / "study.toml", "--out", tmp_path / "run", "--quiet") == 0
    told = "".join(capsys.readouterr())
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file() and "sites" not in path.relative_to(tmp_path / "run").parts:
            told += path.read_bytes().decode("latin-1")
    assert "03117" not in told


UNREADABLE: list[tuple[str, str, str, str]] = [
    ("age", "50", "", "text in a numeric column"),
    (
        "age",
        "<5",
        "[data.dictionary.age]\nlimits = 'half'\nrange = [0, 120]\n",
        "text in a numeric column",
    ),
    ("ward", "yes", "[data.dictionary.ward]\nboolean = true\n", "neither yes nor no"),
    (
        "age",
        "2020-01-01",
        "[data.dictionary.age]\ndate = 'iso'\nbecomes = 'year'\n",
        "no date of the form iso",
    ),
    ("seen", "train", "[data]\ntest = 'seen'\n", "neither test nor train"),
]


@pytest.mark.parametrize(("column", "cell", "more", "what"), UNREADABLE)
def test_an_unreadable_cell_is_quoted_without_a_claim_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], column: str, cell: str, more: str, what: str
) -> None:
    canary = "CANARY-77031 and what else stands in a free text"

    def plant(frame: pd.DataFrame) -> None:
        frame[column] = pd.Series(cell, frame.index, dtype=object)
        frame.loc[[3, 4], column] = canary

    text = STUDY.replace("[data]", more) if more.startswith("[data]") else STUDY + more
    changed(tmp_path, plant, text)
    assert command("data", "show", tmp_path / "study.toml") != 0
    told = "".join(capsys.readouterr())
    assert what in told and "CANARY-77031 and what..." in told and "what else" not in told
    for action in (
        ["data", "show"],
        ["run", "--out", tmp_path / "run"],
        ["privacy", "plan"],
        ["study", "fix"],
    ):
        command(*action, tmp_path / "study.toml", *CLAIM)
        told = "".join(capsys.readouterr())
        assert "CANARY" not in told and (what in told or action[0] != "data")
        command(*action, tmp_path / "study.toml", *CLAIM, "--set", "privacy.delta=1e-5")
        assert "CANARY" not in "".join(capsys.readouterr())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["PatientID", "FallNr", "mrn"])
def test_what_may_name_a_patient_is_never_an_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """A forgotten id, numbers at one hospital and texts at another: its rows are told, not its
    cells.
    """

    def ids(frame: pd.DataFrame) -> None:
        number = np.arange(len(frame)) % 50 + 870000
        texts = np.array([f"X{n}" for n in number], dtype=object)
        frame[name] = np.where(frame["hospital"] == "east", texts, number.astype(str))

    assert "kinds" in {doubt.code for doubt in found(changed(tmp_path, ids))}
    assert "8700" not in _printed(medfed.load_study(tmp_path / "study.toml"), tmp_path, capsys)

    def stray(frame: pd.DataFrame) -> None:
        frame[name] = np.arange(len(frame)) % 50 + 870000
        frame[name] = frame[name].astype(object)
        frame.loc[3, name] = "X870003"

    with pytest.raises(DataError, match="text in a numeric column, row 5") as refused:
        found(changed(tmp_path, stray))
    assert "8700" not in str(refused.value)


def test_an_example_is_cut_and_told_once() -> None:
    assert quotes.examples(["a", "a", "b" * 99, 3, 4]) == ("a", "b" * 21 + "...", "3")
    with quotes.withhold(), quotes.withhold(False):
        assert quotes.examples(["a"]) == () and quotes.there(["a"]) == ""
    assert quotes.there(["a\nb"]) == " (there: 'a\\nb')"
