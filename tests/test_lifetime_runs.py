"""Ways out of a site's lifetime budget, each tried by a whole run: another name, another spelling,
another file.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import medfed
from medfed import runs
from medfed.core.checks import BudgetError, DataError, LedgerError, MedfedError, PlanError
from medfed.node import work
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Lifetime
from medfed.runs import drive
from medfed.study import Study
from tests.tables import PRIVATE, SITES, invented, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

LASTING = PRIVATE.replace('scope = "run"', 'scope = "study"')


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The operator's folder, with nothing in it yet."""
    monkeypatch.setenv("MEDFED_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def numbered_ids(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the table with whole numbers as ids."""
    return frame.assign(subject=np.arange(len(frame)) + 17)


def study_of(
    folder: Path, frame: pd.DataFrame | None = None, text: str = LASTING, **values: Any
) -> Study:
    """Write a table and its study, whose rounds are two, and read them."""
    folder.mkdir(exist_ok=True)
    study = medfed.load_study(write_study(folder, text, frame)).set("training.rounds", 2)
    study = study.set("monitor.evaluate_every", 2)
    for key, value in values.items():
        study = study.set(key.replace("__", "."), value)
    return study


# another name, another number ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "way",
    [
        {"study.name": "another"},
        {"study.name": "another", "privacy.lifetime_epsilon": 1e9},
        {"study.name": "another", "privacy.delta": 4e-3},
        {"study.name": "another", "privacy.delta": 4e-3, "privacy.epsilon": 0.9},
        {"study.name": "another", "study.seed": 4},  # who was held out for testing trains
        {"privacy.epsilon": 3.0, "study.name": "another"},
    ],
    ids=str,
)
def test_no_key_of_a_study_gives_a_second_budget(tmp_path: Path, way: dict[str, Any]) -> None:
    study = study_of(tmp_path / "data")
    medfed.simulate(study)
    for key, value in way.items():
        study = study.set(key, value)
    with pytest.raises(BudgetError, match=r"all studies .*medfed privacy budget"):
        medfed.simulate(study)


def test_what_the_operator_founded_is_what_all_studies_have(tmp_path: Path, home: Path) -> None:
    Ledger.open(home / "ledger.sqlite", founding=Lifetime(1.3, 1e-4, operator="Ada")).close()
    study = study_of(tmp_path / "data", privacy__lifetime_epsilon=1e9)
    medfed.simulate(study)
    medfed.simulate(study.set("study.name", "a second").set("privacy.epsilon", 0.5))
    with pytest.raises(BudgetError, match="all studies"):
        medfed.simulate(study.set("study.name", "a third").set("privacy.epsilon", 0.9))
    with Ledger.open(home / "ledger.sqlite", read_only=True) as book:
        assert book.worst(1e-4) <= 1.3
        assert book.lifetime == Lifetime(1.3, 1e-4, operator="Ada")


def test_the_first_run_founds_the_ledger_with_its_own_epsilon_and_says_so(
    tmp_path: Path, home: Path
) -> None:
    result = medfed.run(study_of(tmp_path / "data"), tmp_path / "run")
    (line,) = [text for text in result.summary["warnings"] if "medfed privacy budget" in text]
    assert "epsilon 1 at delta 0.0001" in line and str(tmp_path) not in line
    with Ledger.open(home / "ledger.sqlite", read_only=True) as book:
        assert book.lifetime is not None
        assert (book.lifetime.epsilon, book.lifetime.delta, book.lifetime.identity) == (
            1.0,
            1e-4,
            "canonical",
        )
    claim = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert claim["composition"]["ledger"]["lifetime"] == {
        "epsilon": 1.0,
        "delta": 1e-4,
        "identity": "canonical",
    }


# another spelling ---------------------------------------------------------------------------------

RESPELLED: dict[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "as a float": lambda frame: frame.assign(subject=frame["subject"].astype(float)),
    "with zeros": lambda frame: frame.assign(subject=[f"{i:05d}" for i in frame["subject"]]),
    "in blanks": lambda frame: frame.assign(subject=[f" {i}\u00a0" for i in frame["subject"]]),
    "with a sign": lambda frame: frame.assign(subject=[f"+{i}" for i in frame["subject"]]),
    "with an exponent": lambda frame: frame.assign(subject=[f"{i}0e-1" for i in frame["subject"]]),
    "renamed": lambda frame: frame.rename(columns={"subject": "id"}),
    "in another column order": lambda frame: frame[frame.columns[::-1]],
    "with one more column": lambda frame: frame.assign(noted="no"),
    "in another row order": lambda frame: frame[::-1],
}


@pytest.mark.parametrize("how", RESPELLED)
def test_another_spelling_makes_nobody_new(tmp_path: Path, how: str) -> None:
    frame = numbered_ids(invented())
    medfed.simulate(study_of(tmp_path / "data", frame))
    other = RESPELLED[how](frame)
    study = study_of(tmp_path / "other", other, data__patient="id" if "id" in other else "subject")
    study = study.set("data.features", ["age", "lactate", "ward"])
    told = "knows patients by 'subject'" if how == "renamed" else "left for one release"
    with pytest.raises(BudgetError, match=told):
        medfed.simulate(study)


def test_a_table_file_of_another_kind_makes_nobody_new(tmp_path: Path) -> None:
    frame = numbered_ids(invented())
    medfed.simulate(study_of(tmp_path / "data", frame))
    study = study_of(tmp_path / "other", frame)
    for kind in ("int64", "float64", "Int64", "string"):
        frame.assign(subject=frame["subject"].astype(kind)).to_parquet(
            tmp_path / "other" / "cohort.parquet"
        )
        with pytest.raises(BudgetError, match="left for one release"):
            medfed.simulate(study.set("data.table", "cohort.parquet"))


def test_another_case_makes_nobody_new(tmp_path: Path) -> None:
    frame = invented()
    medfed.simulate(study_of(tmp_path / "data", frame))
    with pytest.raises(BudgetError, match="left for one release"):
        medfed.simulate(
            study_of(tmp_path / "other", frame.assign(subject=frame["subject"].str.upper()))
        )


def test_where_zeros_and_case_carry_meaning_they_do(tmp_path: Path, home: Path) -> None:
    Ledger.open(home / "ledger.sqlite", founding=Lifetime(1.0, 1e-4, "exact", "Ada")).close()
    frame = invented()
    medfed.simulate(study_of(tmp_path / "data", frame))
    medfed.simulate(
        study_of(tmp_path / "other", frame.assign(subject=frame["subject"].str.upper()))
    )
    with pytest.raises(BudgetError, match="left for one release"):
        medfed.simulate(study_of(tmp_path / "again", frame.assign(subject=" " + frame["subject"])))


def test_a_study_cannot_choose_another_rule_than_the_ledgers(tmp_path: Path) -> None:
    study = study_of(tmp_path / "data")
    medfed.simulate(study)
    with pytest.raises(
        PlanError, match=r"data\.identity='exact'.*'canonical'.*Leave data\.identity out"
    ):
        medfed.simulate(study.set("data.identity", "exact"))


def test_one_person_in_two_spellings_is_clipped_and_split_as_one(tmp_path: Path) -> None:
    frame = numbered_ids(invented()).astype({"subject": str})
    again = frame[::2].assign(subject=[f"0{i}.0" for i in frame["subject"][::2]])
    both = study_of(tmp_path / "data", pd.concat([frame, again], ignore_index=True))
    tables = [node.table for node in runs.open_sites(both, None)]
    assert sum(len(table.ids) for table in tables if table) == len(frame)
    for table in tables:
        assert table is not None
        sides = pd.Series(table.test).groupby(table.patient).nunique()
        assert (sides == 1).all()


def test_one_person_in_two_spellings_at_two_sites_is_seen(tmp_path: Path) -> None:
    frame = invented()
    twice = frame[frame["hospital"] == "north"].head(5)
    moved = twice.assign(hospital="south", subject=twice["subject"].str.upper())
    with pytest.raises(PlanError, match="max_sites_per_patient=1") as told:
        medfed.simulate(study_of(tmp_path / "data", pd.concat([frame, moved], ignore_index=True)))
    assert "5 patients" not in str(told.value)


# nobody's name ------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", ["NA", "", "?", "nan", "null", "none", "N/A", " na "])
def test_rows_without_an_id_are_nobody(
    tmp_path: Path, gap: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Seven rows of three hospitals are not one person, and under a claim nobody is told how many
    there are.
    """
    frame = invented()
    frame.loc[frame.groupby("hospital").head(3).index[:7], "subject"] = gap
    with pytest.raises(DataError, match="no patient named in some rows") as told:
        medfed.simulate(study_of(tmp_path / "data", frame, privacy__max_sites_per_patient=3))
    assert "row 2" not in str(told.value)
    assert "no patient named in row 2" in caplog.text  # at the site, for whoever has to mend it


def test_rows_without_an_id_may_count_one_each_where_no_budget_lasts(tmp_path: Path) -> None:
    frame = invented()
    frame.loc[frame.groupby("hospital").head(3).index[:7], "subject"] = "NA"
    study = study_of(tmp_path / "data", frame, PRIVATE, data__missing_patient="own")
    tables = [node.table for node in runs.open_sites(study, None)]
    assert sum(len(table.ids) for table in tables if table) == len(frame)
    assert medfed.simulate(study).complete
    with pytest.raises(PlanError, match=r"data\.missing_patient='own'.*privacy\.scope='study'"):
        medfed.simulate(study.set("privacy.scope", "study"))


@pytest.mark.parametrize("kind", ["hospital", "device"])
def test_a_lifetime_budget_needs_names(tmp_path: Path, kind: str, home: Path) -> None:
    """Without, one more column in the table would make everybody new."""
    study = study_of(
        tmp_path / "data", data__patient="", data__features=["age", "lactate"], sites__kind=kind
    )
    with pytest.raises(PlanError, match=r"privacy\.scope='study'.*Set data\.patient"):
        medfed.simulate(study.set("privacy.sizes", {}) if kind == "device" else study)
    assert not home.exists()


# another file -------------------------------------------------------------------------------------


def refused(study: Study, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """See a run refused before it trains."""
    with monkeypatch.context() as patch:
        patch.setattr(work, "_train_or_sum", lambda *_: pytest.fail("a record was read"))
        with pytest.raises(MedfedError, match=words):
            medfed.simulate(study)


def test_a_study_cannot_name_a_fresh_ledger(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path / "data")
    medfed.simulate(study)
    refused(
        study.set("privacy.ledger", str(tmp_path / "elsewhere")),
        r"privacy\.ledger=.*MEDFED_HOME",
        monkeypatch,
    )
    assert not (tmp_path / "elsewhere").exists()
    # the same by its name
    refused(study.set("privacy.ledger", str(home)), "left for one release", monkeypatch)


def test_nor_where_the_operator_has_said_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDFED_HOME")
    monkeypatch.setattr("platformdirs.user_data_dir", lambda name: str(tmp_path / "user" / name))
    study = study_of(tmp_path / "data")
    fresh = study.set("privacy.ledger", str(tmp_path / "elsewhere"))
    refused(fresh, r"no ledger .*medfed privacy found", monkeypatch)
    Ledger.open(
        tmp_path / "elsewhere" / "ledger.sqlite", founding=Lifetime(1.0, 1e-4, operator="Ada")
    ).close()
    assert medfed.simulate(fresh).complete  # of the operator's own
    medfed.simulate(study)
    assert (tmp_path / "user" / "medfed" / "ledger.sqlite").exists()
    refused(fresh.set("study.name", "another"), "privacy.ledger=", monkeypatch)


def test_a_relative_home_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be another ledger for each folder that somebody starts from."""
    monkeypatch.setenv("MEDFED_HOME", "budget")
    refused(study_of(tmp_path / "data"), "MEDFED_HOME='budget'.*absolute", monkeypatch)


def test_scope_run_is_no_way_out_for_patients_who_have_a_lifetime_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path / "data")
    assert medfed.simulate(study.set("privacy.scope", "run")).complete  # nobody has one yet
    medfed.simulate(study)
    refused(
        study.set("privacy.scope", "run"),
        r"privacy\.scope='run'.*Set privacy\.scope='study'",
        monkeypatch,
    )
    others = invented().assign(subject=[f"q{i}" for i in range(240)])
    assert medfed.simulate(study_of(tmp_path / "other", others, privacy__scope="run")).complete


def test_yesterdays_ledger_is_refused(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path / "data")
    Ledger.open(home / "ledger.sqlite", founding=Lifetime(1.0, 1e-4, operator="Ada")).close()
    yesterday = (home / "ledger.sqlite").read_bytes()
    medfed.simulate(study)
    (home / "ledger.sqlite").write_bytes(yesterday)
    refused(study, "older than the last head", monkeypatch)


@pytest.mark.parametrize("kept", ["pseudonym.key", "ledger.head"])
def test_a_ledger_that_is_gone_is_not_founded_anew(
    tmp_path: Path, home: Path, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path / "data")
    medfed.simulate(study)
    for path in home.iterdir():
        if path.name != kept:
            path.unlink()
    refused(study, r"is missing, though .* Restore it from a copy", monkeypatch)
    assert [path.name for path in home.iterdir()] == [kept]


def _run_until_its_last_round(study: Study, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave a run that was stopped before its end was written."""
    with monkeypatch.context() as patch:
        patch.setattr(drive, "write_model", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            medfed.run(study, folder)


@pytest.mark.parametrize("how", ["restored", "deleted", "another site's"])
def test_a_run_knows_the_head_it_was_told(
    tmp_path: Path, home: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole folder is yesterday's, or gone, key and anchor too: only what lies elsewhere can
    tell.
    """
    study = study_of(tmp_path / "data", privacy__spare_rounds=1)
    lifetime = Lifetime(4.0, 1e-4, operator="Ada")
    Ledger.open(home / "ledger.sqlite", founding=lifetime).close()
    shutil.copytree(home, tmp_path / "yesterday")
    _run_until_its_last_round(study, tmp_path / "run", monkeypatch)
    assert runs.ledger_accounts(tmp_path / "run", None)["charges"] == 2 * len(SITES)
    shutil.rmtree(home)

    if how == "restored":
        shutil.copytree(tmp_path / "yesterday", home)
    else:
        Ledger.open(home / "ledger.sqlite", founding=lifetime).close()

    for use in (
        lambda: medfed.resume(tmp_path / "run"),
        lambda: runs.ledger_accounts(tmp_path / "run", None),
    ):
        with pytest.raises(LedgerError, match="of an earlier claim is not in it"):
            use()


@pytest.mark.parametrize("scope", ["study", "run"])
def test_a_run_whose_ledger_is_gone_founds_none_when_it_is_resumed(
    tmp_path: Path, home: Path, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(tmp_path / "data", privacy__spare_rounds=1, privacy__scope=scope)
    _run_until_its_last_round(study, tmp_path / "run", monkeypatch)
    place = home if scope == "study" else tmp_path / "run" / "sites"
    shutil.rmtree(place)
    with pytest.raises(LedgerError, match="is missing, though this run was charged there"):
        medfed.resume(tmp_path / "run")
    assert not place.exists() or [path.name for path in place.iterdir()] == [runs.OWN_LOG]


def test_a_resumed_run_is_the_same_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first process knew no ledger yet, its second one does; and the budget was
    founded once.
    """
    study = study_of(tmp_path / "data", privacy__spare_rounds=1)
    _run_until_its_last_round(study, tmp_path / "run", monkeypatch)
    frozen = json.loads((tmp_path / "run" / "plan.json").read_text())["digest"]
    result = medfed.resume(tmp_path / "run")
    assert result.complete and result.study.digest() == frozen
    assert sum("medfed privacy budget" in text for text in result.summary["warnings"]) == 1


def test_a_lost_ledger_is_told_by_whoever_looks(tmp_path: Path, home: Path) -> None:
    study = study_of(tmp_path / "data")
    medfed.simulate(study)
    (home / "ledger.sqlite").unlink()
    for look in (lambda: runs.ledger_accounts(None), lambda: runs.privacy_outlook(study)):
        with pytest.raises(LedgerError, match="is missing, though"):
            look()


def test_looking_founds_nothing(tmp_path: Path, home: Path) -> None:
    study = study_of(tmp_path / "data")
    runs.privacy_outlook(study)
    runs.survey(study)
    with pytest.raises(LedgerError, match="holds no ledger"):
        runs.ledger_accounts(None)
    with pytest.raises(PlanError, match="do not compose"):
        medfed.simulate(study.set("data.preprocess", "robust"))
    assert not home.exists()


def test_a_finished_runs_claim_is_compared_too(tmp_path: Path, home: Path) -> None:
    medfed.run(study_of(tmp_path / "data"), tmp_path / "run")
    assert runs.ledger_accounts(tmp_path / "run", None)["charges"] == 2 * len(SITES)
    claim = json.loads((tmp_path / "run" / "privacy.json").read_text())
    claim["composition"]["ledger"]["head"] = "0" * 64
    (tmp_path / "run" / "privacy.json").write_text(json.dumps(claim))
    with pytest.raises(LedgerError, match="of an earlier claim is not in it"):
        runs.ledger_accounts(tmp_path / "run", None)


def test_another_column_makes_nobody_new(tmp_path: Path, home: Path) -> None:
    """Each visit has an id of its own, too: by that column everybody had a second budget."""
    study = study_of(tmp_path / "data")
    medfed.run(study, tmp_path / "one")
    frame = pd.read_csv(tmp_path / "data" / "cohort.csv", dtype=str)
    frame["visit"] = [f"v{n}" for n in range(len(frame))]
    frame.to_csv(tmp_path / "data" / "cohort.csv", index=False)
    other = study.set("study.name", "other").set("data.patient", "visit")
    other = other.set(
        "data.features", [c for c in frame.columns if c in study.data.dictionary and c != "died"]
    )
    with pytest.raises(
        BudgetError,
        match=r"data\.patient='visit'.*knows patients by 'subject'.*medfed privacy column",
    ):
        medfed.run(other, tmp_path / "two")
    # by the operator's word alone
    runs.name_column(None, "visit", "J. Doe", "the same ids under another name")
    assert medfed.run(other, tmp_path / "two").complete


def test_a_run_of_its_own_does_not_get_around_the_ledger_without_a_patient_column(
    tmp_path: Path, home: Path
) -> None:
    study = study_of(tmp_path / "data")
    medfed.run(study, tmp_path / "one")
    nameless = (
        study.set("privacy.scope", "run")
        .set("data.patient", "")
        .set("data.features", ["age", "lactate", "ward"])
    )
    with pytest.raises(
        PlanError, match=r"without data\.patient and the site's ledger do not compose"
    ):
        medfed.run(nameless, tmp_path / "two")
