"""A footer with as many cells as the header is no record: doubted, left out of all else, settled by
one line.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tests.tables import PRIVATE, STUDY, invented, real_tables, write_study
from tests.test_cli import medfed as command

import medfed
from medfed import runs
from medfed import study as studies
from medfed.core.checks import DataError
from medfed.data import footers, survey_doubts
from medfed.data.doubts import Doubt
from medfed.evidence import draft
from medfed.study import Study

pytestmark = pytest.mark.usefixtures("one_thread")

COLUMNS = list(invented().columns)
Row = dict[str, str]
FOOTERS: dict[str, list[Row]] = {
    "a total of patients": [{"subject": "Total", "age": "14400.5"}],
    "with its number": [{"subject": "Total (n = 240)", "died": "112"}],
    "in German": [{"subject": "Summe:", "age": "1", "lactate": "2"}],
    "of the sites": [{"hospital": "Totale", "died": "112"}],
    "of the target": [{"died": "Gesamt", "age": "1"}],
    "means": [
        {"subject": "Mittelwert", "age": "60.2", "lactate": "2.01"},
        {"subject": "SD", "age": "12", "lactate": "1"},
    ],
    "three lines": [
        {"subject": "N", "age": "9"},
        {"subject": "Mean", "age": "9"},
        {"subject": "max", "age": "9"},
    ],
    "without a word": [{"age": "60.2", "lactate": "2.01", "ward": "3"}],
    "one cell": [{"lactate": "312"}],
}
PLAIN = invented()


def with_rows(rows: list[Row]) -> pd.DataFrame:
    """Return the table with rows below it, as many cells each."""
    text = PLAIN.astype(object).where(PLAIN.notna(), "")
    below = [[row.get(name, "") for name in COLUMNS] for row in rows]
    return pd.concat([text, pd.DataFrame(below, columns=COLUMNS, dtype=object)], ignore_index=True)


def found(study: Study) -> list[Doubt]:
    return survey_doubts.find(runs.survey(study), study.data)


@pytest.mark.parametrize("name", FOOTERS)
def test_it_is_doubted_and_its_line_reads_the_table_as_without_it(
    tmp_path: Path, name: str
) -> None:
    rows = FOOTERS[name]
    study = medfed.load_study(write_study(tmp_path, STUDY, with_rows(rows)))
    (doubt,) = found(study)
    assert doubt.code == "footer" and not doubt.sites
    assert doubt.rows == tuple(range(242, 242 + len(rows))) and doubt.count == len(rows)
    assert f"data.format.footer = {len(rows)}" in doubt.sentence()
    with pytest.raises(DataError) as refused:
        medfed.simulate(study)
    assert str(refused.value) == doubt.sentence()

    settled = medfed.simulate(study.set("data.format.footer", len(rows)))
    assert settled.w_P.equal(
        medfed.simulate(medfed.load_study(write_study(tmp_path, STUDY, PLAIN))).w_P
    )


def test_all_else_is_told_beside_it(tmp_path: Path) -> None:
    frame = with_rows(FOOTERS["means"])
    frame["exitus"] = frame["died"].map({"yes": "tot", "no": "lebt"}).fillna("")
    study = medfed.load_study(write_study(tmp_path, STUDY, frame))
    assert [doubt.code for doubt in found(study)] == ["target-copy", "footer"]


def test_what_is_accepted_is_a_record(tmp_path: Path) -> None:
    row = {
        "subject": "Total",
        "hospital": "north",
        "age": "60",
        "lactate": "2",
        "ward": "icu",
        "died": "yes",
    }
    study = medfed.load_study(write_study(tmp_path, STUDY, with_rows([row])))
    assert [doubt.code for doubt in found(study)] == ["footer"]
    accepted = study.set("data.accept", ["footer:subject"])
    assert (
        found(accepted) == []
        and sum(s["train"] + s["test"] for s in runs.survey(accepted).values()) == 241
    )


@pytest.mark.parametrize("suffix", ["csv", "xlsx"])
def test_each_file_of_a_folder_may_have_one(tmp_path: Path, suffix: str) -> None:
    def write(footed: list[str]) -> Study:
        for name, rows in invented().groupby("hospital"):
            own = rows.drop(columns="hospital").astype(object)
            if name in footed:
                own = pd.concat(
                    [own, pd.DataFrame([{"subject": "Total", "age": 99.5}])], ignore_index=True
                )
            path = tmp_path / f"{name}.{suffix}"
            own.to_csv(path, index=False) if suffix == "csv" else own.to_excel(path, index=False)
        text = STUDY.replace("cohort.csv", f"*.{suffix}").replace(
            'site = "hospital"', "site_is_file = true"
        )
        (tmp_path / "study.toml").write_text(text, encoding="utf-8")
        return medfed.load_study(tmp_path / "study.toml")

    (doubt,) = found(write(["east", "north", "south"]))
    assert [str(row).partition(":")[0] for row in doubt.rows] == [
        f"{name}.{suffix}" for name in ("east", "north", "south")
    ]
    assert "data.format.footer = 1" in doubt.sentence()
    # a line that would take a record off the others is not proposed
    (doubt,) = found(write(["east"]))
    assert (
        "Correct the table" in doubt.sentence()
        and doubt.rows[0] == f"east.{suffix}:{doubt.rows[0].split(':')[1]}"
    )
    assert found(write([])) == []


RECORDS: dict[str, Row] = {
    "a last record": {"subject": "p9999", "hospital": "north", "died": "no", "age": "50"},
    "an only no": {"subject": "p9999", "hospital": "north", "died": "n", "age": "50"},
    "a name with the word in it": {"subject": "Totally", "hospital": "Media Clinic", "died": "no"},
    "few cells": {"subject": "p9999", "died": "no"},
}


@pytest.mark.parametrize("name", RECORDS)
def test_a_last_record_is_no_footer(name: str) -> None:
    assert footers.find(with_rows([RECORDS[name]]), ("subject", "hospital", "died")) is None


@pytest.mark.parametrize("row", [{"hospital": "Total", "died": "no"}, {"age": "3"}])
def test_what_records_above_look_like_is_no_footer(row: Row) -> None:
    frame = with_rows([row])
    frame.loc[7] = frame.loc[len(frame) - 1]
    assert footers.find(frame, ("subject", "hospital", "died")) is None


def test_no_real_table_and_no_table_cut_short_has_one(data_dir: Path) -> None:
    rng = np.random.default_rng(0)
    for name, table in real_tables(data_dir).items():
        text = table.head(3000).astype(str).replace("nan", "").rename(columns=str)
        for roles in ((), (text.columns[0], text.columns[-1])):
            for end in (len(text), *rng.integers(1, len(text), 10).tolist()):
                assert footers.find(text.head(end), roles) is None, name


def test_a_draft_declares_it_and_runs(tmp_path: Path) -> None:
    frame = with_rows(FOOTERS["a total of patients"])
    frame.to_csv(tmp_path / "cohort.csv", index=False)
    out = tmp_path / "study.toml"
    made = draft.draft(tmp_path / "cohort.csv", out, ["data.target=died"])
    study = studies.from_text(made.text, out)
    assert study.data.format.footer == 1 and not made.unread and runs.simulate(study).complete


def test_under_a_claim_nobody_looks_and_devices_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"subject": "Total", "hospital": "north", "age": "60"}]
    study = medfed.load_study(write_study(tmp_path, PRIVATE, with_rows(rows)))
    assert not any("footer" in text for text in medfed.simulate(study).summary["warnings"])
    assert [doubt.code for doubt in found(study)] == ["footer"]  # by who holds the table
    devices = medfed.load_study(
        write_study(tmp_path, STUDY + '[sites]\nkind = "device"\n', with_rows(rows))
    )
    with pytest.raises(DataError, match=r"data\.format\.footer = 1"):
        medfed.simulate(devices)


def test_data_show_tells_the_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_study(tmp_path, STUDY, with_rows(FOOTERS["means"]))
    assert command("data", "show", path) == 0
    assert "data.format.footer = 2" in capsys.readouterr().out
