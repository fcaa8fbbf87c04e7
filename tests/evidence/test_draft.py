"""A table drafts its own study: two commands from an export to a model, and nothing decided in
silence.
"""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import medfed
from medfed import runs
from medfed import study as studies
from medfed.core.checks import MedfedError
from medfed.data import readers
from medfed.evidence import draft
from tests.tables import STUDY, invented, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")


def exports(folder: Path, rows: int = 90) -> Path:
    """Write three hospitals' exports as a German spreadsheet does: semicolons, decimal commas,
    cp1252.
    """
    rng = np.random.default_rng(1)
    place = folder / "exports"
    place.mkdir()

    for k, hospital in enumerate(("Zürich", "Genève", "Lugano")):
        age = rng.integers(18, 95, rows)
        creatinine = np.exp(rng.normal(4.4, 0.4, rows)).round(1)
        risk = 0.08 * (age - 60) + 2 * (np.log(creatinine) - 4.4)
        frame = pd.DataFrame(
            {
                "Fallnummer": [f"{k}{i:06d}" for i in range(rows)],
                "Alter": age,
                "Geschlecht": rng.choice(["männlich", "weiblich"], rows),
                "Kreatinin (µmol/l)": [str(value).replace(".", ",") for value in creatinine],
                "Aufnahme": pd.date_range("2023-01-01", periods=rows).strftime("%d.%m.%Y"),
                "Diagnosetext": [f"Text {i} Größe" for i in range(rows)],
                "verstorben": np.where(rng.random(rows) < 1 / (1 + np.exp(-risk)), "ja", "nein"),
            }
        )
        frame.loc[3, "Kreatinin (µmol/l)"] = "k.A."
        frame.to_csv(place / f"{hospital}.csv", sep=";", index=False, encoding="cp1252")

    return place


def test_two_commands_from_an_export_to_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exports(tmp_path)
    out = tmp_path / "studies" / "study.toml"
    assert command("data", "show", tmp_path / "exports", "--write", out) == 0
    told = capsys.readouterr().out
    assert "then: medfed run" in told and "nothing doubtful was found" in told

    study = medfed.load_study(out)
    data = study.data
    assert (data.target, data.positive, data.patient, data.site_is_file) == (
        "verstorben",
        "ja",
        "Fallnummer",
        True,
    )
    assert (data.format.separator, data.format.decimal, data.format.encoding) == (
        ";",
        ",",
        "cp1252",
    )
    assert set(data.exclude) == {"Aufnahme", "Diagnosetext"} and "k.A." in data.missing_values
    creatinine = data.dictionary["Kreatinin (µmol/l)"]
    assert creatinine.log and creatinine.unit == "µmol/L" and creatinine.range[1] > 2000
    assert command("run", out, "--out", tmp_path / "run", "--quiet") == 0
    assert medfed.load(tmp_path / "run").summary["test"]["auroc"] > 0.6


def test_every_proposal_says_why_and_a_choice_stays_open(tmp_path: Path) -> None:
    frame = invented().rename(columns={"lactate": "creatinine"})
    frame.to_csv(tmp_path / "cohort.csv", index=False)
    made = draft.draft(tmp_path / "cohort.csv", tmp_path / "study.toml")
    lines = made.text.splitlines()
    for key in ("target", "site", "patient"):
        assert any(line.startswith(f"{key} = ") and "  # " in line for line in lines)
    (choice,) = [line for line in lines if "set range to" in line]
    # the unit is not in the name: nobody guesses it
    assert "mg/dL" in choice and "µmol/L" in choice
    assert not made.blanks and not made.unread


def test_what_nobody_can_guess_is_asked_for(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pd.DataFrame(rng.normal(size=(50, 3)), columns=["a", "b", "c"]).to_csv(
        tmp_path / "t.csv", index=False
    )
    made = draft.draft(tmp_path / "t.csv", tmp_path / "study.toml")
    assert made.blanks == ("data.target", "data.site")
    assert "FILL IN: the column to predict" in made.text
    with pytest.raises(MedfedError, match=r"data\.target is not set"):
        runs.simulate(medfed.load_study(_written(made.text, tmp_path)))


def test_doubts_are_settled_in_the_draft_with_their_reason(tmp_path: Path) -> None:
    frame = invented()
    frame.insert(0, "row", range(len(frame)))
    frame["exitus"] = frame["died"].map({"yes": "tot", "no": "lebt"})
    frame.loc[frame["hospital"] == "south", "ward"] = frame["ward"].str.upper()
    frame.to_csv(tmp_path / "cohort.csv", index=False)
    made = draft.draft(tmp_path / "cohort.csv", tmp_path / "study.toml", ['data.target="died"'])
    study = studies.from_text(made.text, tmp_path / "study.toml")
    assert set(study.data.exclude) == {"row", "exitus"}
    assert study.data.dictionary["ward"].recode == {"ICU": "icu", "WARD": "ward", "ER": "er"}
    assert "counts the rows" in made.text and "in other words" in made.text
    assert runs.simulate(study).complete


def test_what_is_set_by_hand_is_not_proposed_again(tmp_path: Path) -> None:
    invented().to_csv(tmp_path / "cohort.csv", index=False)
    settings = ['data.target="ward"', 'data.patient=""', 'data.format.separator=","']
    made = draft.draft(tmp_path / "cohort.csv", tmp_path / "study.toml", settings)
    study = studies.from_text(made.text, tmp_path / "study.toml")
    assert (
        study.data.target == "ward"
        and study.data.patient == ""
        and study.data.format.separator == ","
    )


def test_where_the_file_does_not_say_how_it_is_written_it_can_be_set(tmp_path: Path) -> None:
    frame = invented()
    with pd.ExcelWriter(tmp_path / "cohort.xlsx") as book:
        frame.to_excel(book, sheet_name="Data", index=False)
        frame.head(2).to_excel(book, sheet_name="Codebook", index=False)
    with pytest.raises(MedfedError, match=r"has 2 sheets.*--set data\.format\.KEY=VALUE"):
        draft.draft(tmp_path / "cohort.xlsx", tmp_path / "study.toml")
    made = draft.draft(
        tmp_path / "cohort.xlsx", tmp_path / "study.toml", ['data.format.sheet="Data"']
    )
    assert runs.simulate(studies.from_text(made.text, tmp_path / "study.toml")).complete


def test_a_draft_overwrites_nothing_and_is_for_tables(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, STUDY)
    assert command("data", "show", tmp_path / "cohort.csv", "--write", path) == 2
    assert "is there already" in capsys.readouterr().err
    assert command("data", "show", path, "--write", tmp_path / "other.toml") == 2
    assert "expected a table" in capsys.readouterr().err


def test_the_doctor_tells_every_doubt_in_order_of_harm(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = invented()
    frame["version"] = 3
    frame["exitus"] = frame["died"].map({"yes": 1, "no": 0})
    path = write_study(tmp_path, STUDY, frame)
    assert command("data", "show", path) == 0
    told = capsys.readouterr().out
    assert "2 doubts; 1 would stop a run" in told
    assert told.index("exitus") < told.index("column 'version'")
    assert command("data", "show", path, "--json") == 0
    doubts = json.loads(capsys.readouterr().out)["doubts"]
    assert [(one["code"], one["harm"]) for one in doubts] == [
        ("target-copy", "error"),
        ("constant", "warning"),
    ]


def test_with_many_sites_gaps_are_summed_up(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = invented(600)
    frame["hospital"] = [f"h{i % 49:02d}" for i in range(len(frame))]
    path = write_study(tmp_path, STUDY, frame)
    assert command("data", "show", path) == 0
    told = capsys.readouterr().out
    assert "the worst first" in told and max(map(len, told.splitlines())) <= 120
    assert command("data", "show", path, "--all") == 0
    assert "the worst first" not in capsys.readouterr().out


def stays(folder: Path, rows: int = 200) -> pd.DataFrame:
    """Return and write a table with detection limits and dates of every kind."""
    rng = np.random.default_rng(3)
    frame = invented(rows).astype({"lactate": object})
    troponin = np.exp(rng.normal(2, 1, rows)).round(1)
    frame["troponin"] = np.where(
        troponin < 3, "<3", np.where(troponin > 40, ">40", troponin.astype(str))
    )
    frame["crp"] = [
        "<5 mg/l" if value < 5 else f"{value} mg/l" for value in rng.integers(1, 90, rows)
    ]
    frame["geburtsdatum"] = pd.to_datetime(rng.integers(-10_000, 9_000, rows), unit="D").strftime(
        "%d.%m.%Y"
    )
    frame["aufnahme"] = pd.date_range("2023-01-01", periods=rows).strftime("%Y-%m-%d %H:%M")
    frame["entlassung"] = pd.date_range("2023-02-01", periods=rows).strftime("%Y%m%d")
    frame.to_csv(folder / "stays.csv", index=False)
    return frame


def test_limits_and_dates_go_through_in_two_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stays(tmp_path)
    out = tmp_path / "study.toml"
    assert (
        command("data", "show", tmp_path / "stays.csv", "--write", out, "--set", "data.target=died")
        == 0
    )
    assert "not yet" not in capsys.readouterr().out
    entries = medfed.load_study(out).data.dictionary
    assert entries["troponin"].limits == "limit" and entries["troponin"].suffix == ()
    assert (entries["crp"].limits, entries["crp"].suffix) == ("limit", ("mg/l",))
    born = entries["geburtsdatum"]
    assert (born.date, born.becomes, born.reference, born.unit) == (
        "dd.mm.yyyy",
        "age",
        "aufnahme",
        "years",
    )
    assert (entries["aufnahme"].date, entries["aufnahme"].becomes) == ("iso", "")
    assert (entries["entlassung"].date, entries["entlassung"].becomes) == ("yyyymmdd", "")
    for line in out.read_text(encoding="utf-8").splitlines():
        assert "  # " in line or not line.startswith(("limits", "date", "becomes", "suffix")), line

    assert command("run", out, "--out", tmp_path / "run", "--quiet") == 0
    columns = {column.name: column for column in medfed.load(tmp_path / "run").encoding.columns}
    assert {"troponin", "crp", "geburtsdatum"} <= {*columns} and not {"aufnahme", "entlassung"} & {
        *columns
    }
    assert columns["geburtsdatum"].kind == "number"


def test_decimal_commas_of_a_workbook_are_numbers_and_what_is_left_out_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = invented()

    frame["Potassium"] = [
        f"{value:.1f}".replace(".", ",")
        for value in np.random.default_rng(0).normal(4, 0.4, len(frame))
    ]
    frame["ASA"] = np.where(
        frame["hospital"] == "east", "3", np.random.default_rng(1).choice(["II", "III"], len(frame))
    )
    frame.to_excel(tmp_path / "table.xlsx", index=False)
    out = tmp_path / "study.toml"
    assert command("data", "show", tmp_path / "table.xlsx", "--write", out) == 0
    entry = medfed.load_study(out).data.dictionary["Potassium"]
    assert entry.numbers == "1,5" and entry.unit == "mmol/L" and len(entry.range) == 2
    told = capsys.readouterr().out
    assert (
        "left out: ASA: is a number at east and text at north, south" in told
        and "of them text: ward" in told
    )


def test_a_draft_takes_two_spellings_of_a_hospital_for_one(tmp_path: Path) -> None:
    frame = invented()
    frame.loc[np.arange(len(frame)) % 3 == 0, "hospital"] = frame["hospital"].str.upper()
    frame.to_csv(tmp_path / "table.csv", index=False)
    made = draft.draft(tmp_path / "table.csv", tmp_path / "study.toml")
    assert made.surveys is not None and sorted(made.surveys) == ["east", "north", "south"]
    assert (
        'site = "hospital"  # 3 sites' in made.text
        and "[data.dictionary.hospital.recode]" in made.text
    )


def test_a_target_of_decimals_is_a_regression(tmp_path: Path) -> None:
    frame = invented()
    frame["stay"] = np.random.default_rng(0).gamma(2, 3, len(frame)).round(2)
    frame.to_csv(tmp_path / "table.csv", index=False)
    out = tmp_path / "study.toml"
    assert (
        command("data", "show", tmp_path / "table.csv", "--set", "data.target=stay", "--write", out)
        == 0
    )
    assert 'task = "regression"' in out.read_text(encoding="utf-8")
    assert command("run", out, "--out", tmp_path / "run", "--quiet") == 0


def test_a_draft_that_cannot_run_ends_with_1_and_says_what_all_sites_lack_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = invented()
    frame["note"] = [f"text {i}" for i in range(len(frame))]
    frame.to_csv(tmp_path / "table.csv", index=False)
    sets = ("--set", "data.target=note", "--set", "data.task=multiclass")
    assert (
        command("data", "show", tmp_path / "table.csv", *sets, "--write", tmp_path / "study.toml")
        == 1
    )
    told = capsys.readouterr().out
    assert (
        told.count("different values") == 1
        and "sites 'north', 'south'" in told
        and ", target 'note': " in told
    )


def test_the_word_that_shows_a_footer_is_said(tmp_path: Path) -> None:
    frame = invented().astype(object)
    frame.insert(0, "case", [f"c{i}" for i in range(len(frame))])
    frame.loc[len(frame)] = ["Total", *[""] * (frame.shape[1] - 1)]
    frame.to_csv(tmp_path / "table.csv", index=False)
    text = draft.draft(tmp_path / "table.csv", tmp_path / "study.toml").text
    assert "footer = 1  # row 242: 'Total' in 'case' shows that it is no record" in text


def test_which_of_several_units_is_the_columns_is_asked_for(tmp_path: Path) -> None:
    """80 kg here and 176 lbs there: a draft takes no unit for another."""
    frame = invented()
    weights = np.random.default_rng(0).integers(50, 99, len(frame))
    pounds = [f"{weight * 2.2046:.1f} lbs" for weight in weights]
    frame["weight"] = np.where(
        frame["hospital"] == "east", pounds, [f"{weight} kg" for weight in weights]
    )
    frame.to_csv(tmp_path / "table.csv", index=False)
    made = draft.draft(tmp_path / "table.csv", tmp_path / "study.toml")
    assert made.blanks == ("data.dictionary.weight.suffix",)
    assert "'kg'" in made.text and "'lbs'" in made.text


def test_whether_day_or_month_stands_first_is_asked_for(tmp_path: Path) -> None:
    """No birthday after the twelfth of a month: both forms read all of them."""
    frame = invented()
    frame["born"] = [
        f"{1 + i % 12:02d}/{1 + i % 11:02d}/19{40 + i % 50}" for i in range(len(frame))
    ]
    frame["seen"] = [f"{1 + i % 12:02d}/{1 + i % 7:02d}/2020" for i in range(len(frame))]
    frame.to_csv(tmp_path / "t.csv", index=False)
    made = draft.draft(tmp_path / "t.csv", tmp_path / "study.toml", ["data.target=died"])
    assert made.blanks == ("data.dictionary.born.date", "data.dictionary.seen.date")
    assert (
        "# FILL IN: dd/mm/yyyy or mm/dd/yyyy: which is the day, no date of the column tells."
        in made.text
    )
    with pytest.raises(MedfedError, match=r"born\.becomes='age'"):
        medfed.load_study(_written(made.text, tmp_path))
    settings = [f"data.dictionary.{name}.date=mm/dd/yyyy" for name in ("born", "seen")]
    made = draft.draft(tmp_path / "t.csv", tmp_path / "study.toml", ["data.target=died", *settings])
    assert not made.blanks and not made.unread
    frame = frame.drop(columns="born")
    # a date that nothing needs is left out, and not asked for
    frame.to_csv(tmp_path / "t.csv", index=False)
    made = draft.draft(tmp_path / "t.csv", tmp_path / "study.toml", ["data.target=died"])
    assert not made.blanks and "seen: dates, dd/mm/yyyy or mm/dd/yyyy" in made.text
    assert runs.simulate(studies.from_text(made.text, tmp_path / "study.toml")).complete


def test_a_birthday_alone_becomes_its_year_and_two_digit_years_are_left_out(tmp_path: Path) -> None:
    frame = invented()
    frame["date of birth"] = pd.date_range("1950-01-01", periods=len(frame), freq="90D").strftime(
        "%d.%m.%Y"
    )
    frame["seen"] = pd.date_range("2020-01-01", periods=len(frame)).strftime("%d.%m.%y")
    frame.to_csv(tmp_path / "t.csv", index=False)
    made = draft.draft(tmp_path / "t.csv", tmp_path / "study.toml", ["data.target=died"])
    study = studies.from_text(made.text, tmp_path / "study.toml")
    assert study.data.dictionary["date of birth"].becomes == "year" and study.data.exclude == (
        "seen",
    )
    assert "write out the century" in made.text and runs.simulate(study).complete


AGES = [
    ["<40", ">60"],
    ["<40", "40", ">60"],
    ["<40", "40-60", ">60"],
    ["<1,234", "5", "7"],
    ["< few", "5", "7"],
]


@pytest.mark.parametrize("cells", AGES)
def test_what_is_no_detection_limit_is_not_taken_for_one(tmp_path: Path, cells: list[str]) -> None:
    frame = invented()
    frame["band"] = np.random.default_rng(0).choice(cells, len(frame))
    frame.to_csv(tmp_path / "t.csv", index=False)
    made = draft.draft(tmp_path / "t.csv", tmp_path / "study.toml", ["data.target=died"])
    assert "limits" not in made.text.split("not yet")[0]


def test_a_draft_with_a_claim_quotes_no_cell(tmp_path: Path) -> None:
    stays(tmp_path)
    settings = ["data.target=died", "privacy.epsilon=1", "privacy.delta=1e-5"]
    made = draft.draft(tmp_path / "stays.csv", tmp_path / "study.toml", settings)
    plain = draft.draft(tmp_path / "stays.csv", tmp_path / "study.toml", settings[:1])
    assert "'<3'" in plain.text and "'<3'" not in made.text and "limits" in made.text


@pytest.mark.parametrize(
    ("kind", "reads"), [("csv", 1), ("footed", 1), ("exports", 2), ("xlsx", 2)]
)
def test_a_table_is_read_once_and_what_is_shown_is_what_its_study_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, reads: int
) -> None:
    """Once more where numbers are respelt or rounded: then it matters which column names the
    patient.
    """
    table = tmp_path / f"cohort.{kind}"
    frame = invented().assign(
        nr=range(240), exitus=lambda rows: rows["died"].map({"yes": "tot", "no": "lebt"})
    )
    if kind == "exports":
        table = exports(tmp_path)
    elif kind == "xlsx":
        frame.to_excel(table, index=False)
    else:
        table = tmp_path / "cohort.csv"
        frame.to_csv(table, index=False)
        with table.open("a", encoding="utf-8") as file:
            file.write("Total,,9,9,,,,\n" if kind == "footed" else "")

    read = readers.read
    seen = []
    monkeypatch.setattr(
        readers, "read", lambda *given, **more: seen.append(given) or read(*given, **more)
    )
    settings = [] if kind == "exports" else ["data.target=died"]
    made = draft.draft(table, tmp_path / "study.toml", settings)
    assert len(seen) == reads and made.surveys is not None
    assert made.surveys == runs.survey(studies.from_text(made.text, tmp_path / "study.toml"))


def _written(text: str, folder: Path) -> Path:
    path = folder / "draft.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_regression_is_told_as_a_linear_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = invented()
    frame["died"] = frame["age"] * 0.1 + np.random.default_rng(0).normal(0, 1, len(frame))
    path = write_study(tmp_path, STUDY.replace('"died"', '"died"\ntask = "regression"'), frame)
    assert command("run", path, "--out", tmp_path / "run") == 0
    told = capsys.readouterr().out
    assert "model linear: " in told and "model logistic" not in told
