"""What stands against a study is told at once; `medfed study fix` makes of it one that is accepted
and runs.
"""

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import medfed
from medfed import runs
from medfed import study as studies
from medfed.core import toml
from medfed.core.checks import DataError, MedfedError, PlanError, StudyError
from medfed.data import bundled, sources
from medfed.planning import fix, objections
from tests.tables import PRIVATE, STUDY, invented, write_study
from tests.test_cli import medfed as command

SITES = [f'St. {number} "H"' for number in range(49)]
NUMBERS = [("lab {}", "größe.{}", "it's {}", 'a "{}" b')[n % 4].format(n) for n in range(186)]
ALONE = """
[data]
table = "cohort.csv"
target = "died"
site = "hospital"
[privacy]
epsilon = 1
"""


def foreign(rows: int = 49 * 12) -> pd.DataFrame:
    """Return a table that nobody tuned anything for: 49 sites, 189 columns beside patient
    and site.
    """
    rng = np.random.default_rng(0)
    numbers = pd.DataFrame(rng.normal(50, 9, (rows, len(NUMBERS))).round(1), columns=NUMBERS)
    others = {
        "subject": [f"p{i}" for i in range(rows)],
        "hospital": [SITES[i % 49] for i in range(rows)],
        "sex": rng.choice(["f", "m"], rows),
        "ward of stay": rng.choice(["icu", "er."], rows),
        "died": rng.choice(["no", "yes"], rows),
    }
    return pd.concat([pd.DataFrame(others), numbers], axis=1)


def filled(text: str, names: dict[str, Any]) -> str:
    """Return a mended study with its blanks filled in, as a person who knows the table would."""
    tables = tomllib.loads(text)
    tables["data"]["patient"] = "subject"
    for name, feature in tables["data"]["dictionary"].items():
        known = names.get(name, {"range": [0, 100]})
        feature |= known
    tables["privacy"]["sizes"] = dict.fromkeys(SITES, 9)
    return "\n".join(toml.document(tables))


def whole(folder: Path, fixed: fix.Fixed) -> Path:
    """Write a mended study of the foreign table, its blanks filled in."""
    texts = {"sex": {"categories": ["f", "m"]}, "ward of stay": {"categories": ["icu", "er."]}}
    path = folder / "whole.toml"
    path.write_text(filled(fixed.text, {**texts, "died": {"categories": ["no", "yes"]}}))
    return path


def told(call: Callable[[], object]) -> MedfedError:
    with pytest.raises(MedfedError) as caught:
        call()
    return caught.value


# a foreign table ----------------------------------------------------------------------------------


def test_a_foreign_table_is_refused_once_and_what_is_mended_and_filled_in_is_accepted(
    tmp_path: Path,
) -> None:
    path = write_study(tmp_path, ALONE, foreign())
    error = told(lambda: medfed.run(medfed.load_study(path), tmp_path / "run"))
    said = str(error).splitlines()
    assert said[0] == "4 things stand against this study:" and len(said) == 6  # and the way out
    for line, words in zip(
        said[1:], ("data.patient=''", "privacy.sizes", "labels", "189 features"), strict=False
    ):
        assert words in line

    fixed = fix.fix(path)
    assert fixed.stood == tuple(str(refusal.error) for refusal in error.refusals) and not fixed.left
    assert len(fixed.blanks) == 189 + 3  # and the patient's column, the labels, the sites
    (tmp_path / "blank.toml").write_text(fixed.text)
    again = told(lambda: medfed.run(medfed.load_study(tmp_path / "blank.toml"), tmp_path / "run"))
    assert str(again).startswith("4 things")  # each blank is refused until it is filled in

    study = fix.check(whole(tmp_path, fixed))
    assert set(study.data.dictionary) >= set(NUMBERS)
    assert "preprocess" not in fixed.text.split("[data]")[1]  # what the recipe chooses stays open
    assert len(runs.open_sites(study.set("privacy.scope", "run"), None)) == 49


@pytest.mark.slow
def test_what_is_mended_and_filled_in_runs(tmp_path: Path) -> None:
    path = whole(tmp_path, fix.fix(write_study(tmp_path, ALONE, foreign())))
    study = fix.check(
        path, ["training.rounds=2", "monitor.evaluate_every=2", 'privacy.scope="run"']
    )
    result = medfed.run(study, tmp_path / "run")
    assert result.complete and result.summary["test"]["n"] > 0


def test_no_row_is_read_to_mend_a_study(tmp_path: Path) -> None:
    path = write_study(tmp_path, ALONE, foreign())
    text = fix.fix(path).text
    foreign(0).to_csv(tmp_path / "cohort.csv", index=False)
    assert fix.fix(path).text == text
    with (tmp_path / "cohort.csv").open("ab") as file:
        file.write(b'"an open quote, \xff\xff\n1,2\n')
    assert fix.fix(path).text == text and not any(site in text for site in SITES)


@pytest.mark.parametrize("suffix", ["csv.gz", "parquet"])
def test_the_header_is_read_in_every_format(tmp_path: Path, suffix: str) -> None:
    path = write_study(tmp_path, ALONE, foreign(49))
    whole_text = fix.fix(path).text
    frame = foreign(49)
    if suffix == "parquet":
        frame.to_parquet(tmp_path / "cohort.parquet")
    else:
        frame.to_csv(tmp_path / "cohort.csv.gz", index=False)
    text = fix.fix(path, [f"data.table=cohort.{suffix}"]).text
    assert text == whole_text.replace('"cohort.csv"', f'"cohort.{suffix}"')


@pytest.mark.parametrize("name", bundled.SOURCES)
@pytest.mark.needs("data")
def test_a_sources_columns_are_known_without_its_records(name: str) -> None:
    study = medfed.load_study("heart").set("data", {"source": name})
    known = bundled.SOURCES[name].load(None, False).columns
    assert sorted(sources.columns_of(study, False)) == sorted(known)


# what is mended -----------------------------------------------------------------------------------


def test_a_sound_study_is_printed_as_it_is(tmp_path: Path) -> None:
    path = write_study(tmp_path, PRIVATE)
    fixed = fix.fix(path)
    assert (fixed.stood, fixed.blanks, fixed.left) == ((), (), ())
    (tmp_path / "again.toml").write_text(fixed.text)
    assert studies.load(tmp_path / "again.toml").set("study.name", "x") == studies.load(path).set(
        "study.name", "x"
    )


BREAKS: list[dict[str, Any]] = [
    {"data.split": "stratified", "data.on_missing": "refuse", "data.preprocess": "standard"},
    {"training.algorithm": "pooled", "privacy.noise": "site", "privacy.clipping": "adaptive"},
    {"training.local_epochs": 3, "training.momentum": 0.5, "training.weighting": "uniform"},
    {"privacy.accountant": "pld", "privacy.scope": "study", "data.missing_patient": "own"},
    {"data.test_is_public": False, "data.task": "binary", "privacy.evaluation_epsilon": 0.0},
    {"data.test_is_public": False, "privacy.evaluation_epsilon": 5.0, "training.rounds": 9},
    {"fleet.schedule": "cyclic", "fleet.clients_per_round": 2, "fleet.groups": 2},
    {"privacy.correlated": True, "training.batch_size": 8},
    {"privacy.max_sites_per_patient": 2, "training.batch_size": 8, "training.quorum": 0.5},
    {"security.aggregation": "masked", "privacy.noise": "central"},
    {
        "security.aggregation": "three-party",
        "security.aggregators": ["a", "a"],
        "robustness.rule": "krum",
    },
    {"robustness.bound": 3.0, "robustness.tolerance": -1.0},
    {"training.optimizer": "adam", "training.momentum": 0.3, "training.algorithm": "scaffoldd"},
    {"privacy.delta": 0.2, "training.average": 2.0, "training.learning_rate": 0.0},
    {"privacy.noise": "none"},
    {"training.optimizr": "adam", "data.preprocess": "dictionarry"},
]


@pytest.mark.parametrize("values", BREAKS, ids=lambda values: ", ".join(values))
def test_what_has_a_safe_answer_is_mended(tmp_path: Path, values: dict[str, Any]) -> None:
    settings = [f"{key}={toml.literal(value)}" for key, value in values.items()]
    fixed = fix.fix(write_study(tmp_path, PRIVATE), settings)
    assert fixed.stood and not fixed.left and not fixed.blanks, fixed.text
    (tmp_path / "mended.toml").write_text(fixed.text)
    runs.open_sites(fix.check(tmp_path / "mended.toml"), None)


def test_what_nobody_can_choose_for_a_person_is_a_blank_or_left(tmp_path: Path) -> None:
    path = write_study(tmp_path, PRIVATE)
    fixed = fix.fix(
        path,
        ["privacy.epsilon=inf", "privacy.noise=site", "robustness.malicious=0.3", "data.traget=1"],
    )
    assert fixed.blanks == ("privacy.epsilon",) and "epsilon = 0.0" in fixed.text
    assert "unknown key 'data.traget'" in fixed.left[0] and "robustness.attack=''" in fixed.left[1]
    assert len(fixed.left) == 2 and "Left for you to decide" in fixed.text
    assert '# mended; was "site"' not in fixed.text


def test_a_feature_that_is_the_target_is_taken_out(tmp_path: Path) -> None:
    text = PRIVATE.replace('[data.dictionary.died]\ncategories = ["no", "yes"]\n', "")
    path = write_study(
        tmp_path, text.replace("[data]", '[data]\nfeatures = ["age", "died", "lactat"]')
    )
    assert len(told(lambda: medfed.simulate(medfed.load_study(path))).refusals) == 4
    fixed = fix.fix(path)
    assert fixed.blanks == ("data.dictionary.died.categories",) and not fixed.left
    assert 'features = ["age", "lactate"]  # mended' in fixed.text


def test_what_is_no_table_is_left(tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text('training = 5\ndata = "x"\n[privacy]\nepsilon = 1\n')
    left = fix.fix(path, out=tmp_path / "there" / "odd.toml").left
    assert (
        "training=5; expected a table [training]" in left
        and "data='x'; expected a table [data]" in left
    )


def test_what_is_so_by_default_is_not_written(tmp_path: Path) -> None:
    fixed = fix.fix(write_study(tmp_path, PRIVATE), ["training.local_epochs=3"])
    assert (
        "local_epochs = 1  # mended; was 3" in fixed.text
        and "local_steps" not in fixed.text.split("[study]")[1]
    )


def test_regression_asks_for_public_test_data_and_a_range(tmp_path: Path) -> None:
    frame = invented().rename(columns={"lactate": "days of stay"})
    text = PRIVATE.replace("lactate", "age").replace(
        "[data.dictionary.age]\nrange = [0.1, 15]\nlog = true\n", ""
    )
    text = text.replace('target = "died"', 'target = "days of stay"\ntask = "regression"')
    text = text.replace("test_is_public = true", "test_is_public = false")
    fixed = fix.fix(write_study(tmp_path, text, frame.dropna()))
    assert fixed.blanks == ('data.dictionary."days of stay".range', "data.test_is_public")
    assert 'data.dictionary."days of stay".range = [low, high]' in "".join(fixed.stood)


def test_sites_without_a_size_are_one_refusal_and_a_line_each(tmp_path: Path) -> None:
    text = PRIVATE.replace('site = "hospital"\n', "").split("[privacy.sizes]")[0]
    text += (
        f"[sites]\nnames = {toml.literal(SITES)}\nshares = {[1 / 49] * 49}\n[privacy.sizes]\n"
        "'St. 3 \"h\"' = 4\n"
    )
    path = write_study(tmp_path, text, invented().drop(columns="hospital"))
    error = told(lambda: medfed.simulate(medfed.load_study(path)))
    assert len(error.refusals) == 2 and "49 sites have no declared size ('St. 0" in str(error)
    assert 'privacy.sizes."St. 3 \\"h\\""=4: no such site in sites.names; did you mean' in str(
        error
    )
    fixed = fix.fix(path)

    assert (
        len(fixed.blanks) == 48
        and '"St. 1 \\"H\\"" = 0' in fixed.text
        and '"St. 3 \\"H\\"" = 4' in fixed.text
    )
    (tmp_path / "blank.toml").write_text(fixed.text)
    assert "privacy.sizes of 48 sites" in str(told(lambda: studies.load(tmp_path / "blank.toml")))


# told at once -------------------------------------------------------------------------------------


def test_one_thing_is_told_as_it_is_and_several_with_settings_that_mend_them(
    tmp_path: Path,
) -> None:
    study = medfed.load_study(write_study(tmp_path, PRIVATE))
    one = told(lambda: objections.check(study.set("data.preprocess", "robust")))
    assert str(one).startswith(
        "privacy.epsilon=1 and data.preprocess='robust'"
    ) and "\n" not in str(one)
    both = told(
        lambda: objections.check(
            study.set("data.preprocess", "robust").set("data.split", "stratified")
        )
    )
    assert type(both) is PlanError and str(both.refusals[0].error) == str(one)
    assert '\n[data]\npreprocess = "dictionary"\nsplit = "patient"\n' in str(both)


def test_a_study_without_a_claim_is_told_at_once_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, STUDY)
    words = [
        "training.round=3",
        "training.learning_rate=-1",
        "data.targt=died",
        "training.optimizer=addam",
    ]
    words += [
        "training.algorithm=fedavgg",
        "data.site=hospitl",
        "fleet.schedule=cyclic",
        "fleet.clients_per_round=1",
    ]
    assert command("run", path, *(word for setting in words for word in ("--set", setting))) == 2
    said = capsys.readouterr().err

    for part in (
        "unknown key 'training.round'; did you mean 'rounds'?",
        "training.learning_rate=-1.0; expected a number in [0, 1e6) (0: chosen)",
        "unknown key 'data.targt'",
        "training.optimizer='addam'; expected one of",
        "training.algorithm='fedavgg' is unknown; did you mean 'fedavg'?",
        "data.site='hospitl' is no column of the table; did you mean 'hospital'?",
        "fleet.schedule='cyclic' and fleet.clients_per_round=1 do not compose",
    ):
        assert said.count(part) == 1

    assert "7 things stand against this study" in said


def test_what_cannot_be_read_as_a_study_is_not_told_twice(tmp_path: Path) -> None:
    path = write_study(tmp_path, STUDY)
    error = told(
        lambda: fix.load(
            path, ["fleet.clients_per_round=many", "fleet.schedule=cyclic", "training.mu=low"]
        )
    )
    assert {str(refusal.error).split(";")[0] for refusal in error.refusals} == {
        "fleet.clients_per_round='many'",
        "training.mu='low'",
    }
    assert "no privacy.epsilon" not in str(
        told(lambda: fix.load(path, ["privacy.epsilon=one", "privacy.delta=1e-6"]))
    )


def test_columns_and_sites_are_told_together_and_a_text_is_told_its_categories(
    tmp_path: Path,
) -> None:
    frame = invented()
    frame["age"] = frame["age"].astype(str)
    frame.loc[frame["hospital"] == "south", "age"] = "old"
    frame.loc[frame.index[frame["hospital"] == "north"][0], "lactate"] = np.inf
    text = STUDY + "[data.dictionary.ward]\nrange = [0, 1]\n"
    study = medfed.load_study(write_study(tmp_path, text, frame)).set(
        "data.dictionary.age.range", [0, 100]
    )
    error = told(lambda: medfed.simulate(study))
    # ward at three sites, lactate, age
    assert isinstance(error, DataError) and len(error.refusals) == 5
    assert "declared a number by data.dictionary.ward.range, and most of it is text" in str(error)
    assert "Declare data.dictionary.ward.categories in place of the range." in str(error)
    assert "site 'north', column 'lactate': infinite value" in str(error)


def test_ranges_that_numbers_lack_are_told_together(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY)).set("data.preprocess", "dictionary")
    error = told(lambda: medfed.simulate(study))
    assert str(error).startswith("no public range for 2 columns of numbers ('age', 'lactate')")


def test_a_table_that_is_not_there_is_told_with_the_rest(tmp_path: Path) -> None:
    study = (
        medfed.load_study(write_study(tmp_path, PRIVATE))
        .set("data.table", "no.csv")
        .set("data.split", "stratified")
    )
    error = told(lambda: medfed.simulate(study))
    assert len(error.refusals) == 2 and "does not exist" in str(error)
    nowhere = told(lambda: medfed.simulate(study.set("data.table", "")))
    assert len(nowhere.refusals) == 2 and "expected one of the two" in str(nowhere)


@pytest.mark.parametrize(
    "column", ["heart rate", "größe", "a.b", 'a "b"', "it's", "a = b", "#1", "[x]"]
)
def test_every_error_quotes_a_columns_key_so_that_it_can_be_pasted(
    tmp_path: Path, column: str
) -> None:
    frame = invented().rename(columns={"age": column})
    text = PRIVATE.replace("[data.dictionary.age]\nrange = [20, 100]\n", "")
    path = write_study(tmp_path, text, frame)
    error = str(told(lambda: medfed.simulate(medfed.load_study(path))))
    key = error.split("Declare ")[1].split(" or ")[0]
    assert toml.path(key) == ("data", "dictionary", column, "range")
    assert fix.check(path, [f"{key}=[20, 100]"]).data.dictionary[column].range == (20.0, 100.0)
    blank = tomllib.loads(fix.fix(path).text)["data"]["dictionary"][column]
    assert blank == {"range": [], "categories": []}


# from records -------------------------------------------------------------------------------------

PUBLIC = ["data.test_is_public=true", 'privacy.scope="run"']


def test_records_are_read_only_where_they_are_declared_public(tmp_path: Path) -> None:
    path = write_study(tmp_path, ALONE, foreign())
    for settings in ([], PUBLIC[:1], PUBLIC[1:]):
        with pytest.raises(
            PlanError, match=r"no claim covers.*data\.test_is_public=true and privacy\.scope='run'"
        ):
            fix.fix(path, settings, from_records=True)


def test_what_is_read_from_records_is_marked_and_the_claim_says_so(tmp_path: Path) -> None:
    path = write_study(tmp_path, ALONE, foreign())
    features = ["sex", "ward of stay", *NUMBERS[:4]]
    settings = [
        *PUBLIC,
        f"data.features={toml.literal(features)}",
        "data.patient=subject",
        "training.rounds=2",
    ]
    fixed = fix.fix(path, settings, from_records=True)
    assert not fixed.blanks and not fixed.left and "# WARNING" in fixed.text
    marked = [line for line in fixed.text.splitlines() if line.endswith(f"  # {fix.READ}")]
    assert len(marked) == len(features) + 1 + len(SITES)
    fix.write(fixed, tmp_path / "read.toml")
    study = fix.check(tmp_path / "read.toml")
    for name in NUMBERS[:4]:
        low, high = study.data.dictionary[name].range
        assert low <= foreign()[name].min() and foreign()[name].max() <= high < 1000

    assert study.data.dictionary["ward of stay"].categories == ("er.", "icu")
    assert study.privacy.sizes == dict.fromkeys(sorted(SITES), 9)  # 0.8 of 12
    medfed.run(study, tmp_path / "run")
    claim = json.loads((tmp_path / "run" / "privacy.json").read_text())
    assert "read off them (data.read_from_records=true)" in " ".join(claim["assumptions"])
    assert "not taken from these patients" not in " ".join(claim["assumptions"])

    with pytest.raises(
        PlanError, match=r"data\.read_from_records=true with privacy\.scope='study' do not compose"
    ):
        objections.check(study.set("privacy.scope", "study"))


def test_what_cannot_be_told_from_cells_stays_a_blank(tmp_path: Path) -> None:
    frame = foreign()[["hospital", "subject", "sex", "died", NUMBERS[0]]]
    frame = frame.assign(
        day=[f"2020-01-{i % 28 + 1:02d}" for i in range(len(frame))], same=3, none=""
    )
    fixed = fix.fix(write_study(tmp_path, ALONE, frame), PUBLIC, from_records=True)
    assert set(fixed.blanks) == {"data.dictionary.subject", "data.dictionary.none"}
    assert tomllib.loads(fixed.text)["data"]["dictionary"]["same"]["range"] == [2.0, 4.0]


# the command --------------------------------------------------------------------------------------


def test_fix_prints_writes_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, ALONE, foreign(49))
    assert command("study", "fix", path) == 0
    printed = capsys.readouterr()
    assert "stood against it: 4; blanks to be filled in: 192" in printed.err
    out = tmp_path / "there" / "fixed.toml"
    assert command("study", "fix", path, "--out", out) == 0
    assert capsys.readouterr().out == ""
    assert out.read_text() == printed.out.replace('"cohort.csv"', '"../cohort.csv"')
    before = path.read_text()
    assert command("study", "fix", path, "--out", path) == 2
    assert (
        "is there already; give the name of a new file" in capsys.readouterr().err
        and path.read_text() == before
    )
    assert command("study", "fix", path, "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] == printed.out


def test_check_says_that_nothing_stands_against_a_study_or_all_that_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_study(tmp_path, PRIVATE)
    assert command("study", "check", path) == 0
    assert capsys.readouterr().out == "invented private: nothing stands against it\n"
    assert (
        command(
            "study", "check", path, "--set", "data.split=stratified", "--set", "training.rounds=0"
        )
        == 2
    )
    assert "2 things stand against this study" in capsys.readouterr().err
    with pytest.raises(StudyError, match="is no file and no bundled study"):
        fix.fix(tmp_path / "no.toml")


def test_a_column_in_another_unit_is_not_described_as_the_one_that_is_missing(
    tmp_path: Path,
) -> None:
    frame = invented().rename(columns={"lactate": "lactate (mg/dl)"})
    text = STUDY + '[data.dictionary."lactate (mmol/l)"]\nrange = [0.1, 30]\nunit = "mmol/L"\n'
    with pytest.raises(DataError, match="It is in another unit") as caught:
        runs.simulate(medfed.load_study(write_study(tmp_path, text, frame)))
    assert all(not refusal.mend for refusal in caught.value.refusals)
    assert "study fix" not in str(caught.value)


def test_a_target_that_is_not_set_is_no_site_and_no_patient(tmp_path: Path) -> None:
    path = write_study(tmp_path, STUDY.replace('target = "died"', 'target = ""'))
    with pytest.raises(DataError, match=r"data\.target is not set; expected .* one of: ") as caught:
        runs.simulate(medfed.load_study(path))
    listed = str(caught.value).split("one of: ")[1]
    assert "died" in listed and "hospital" not in listed and "subject" not in listed
