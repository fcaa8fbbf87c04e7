"""The command line: what it prints, what it leaves, and its exit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from medfed import cli
from tests.tables import SITES, invented, write_study


def medfed(*words: object) -> int:
    """Run the command line in this process; return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["medfed", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return int(ended.value.code or 0)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    return write_study(tmp_path)


def test_run_tells_each_round_and_the_table(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medfed("run", study, "--out", tmp_path / "run", "--set", "monitor.baselines=true") == 0
    said = capsys.readouterr().out
    for number in range(1, 5):
        assert f"round {number}/4  3 sites  loss 0." in said
    assert "AUROC 0." in said and "each site's own" in said and "pooled rows (simulation)" in said
    assert f"run folder: {tmp_path / 'run'}" in said
    assert "privacy: none claimed" in said


def test_json_prints_the_summary_and_nothing_else(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medfed("run", study, "--out", tmp_path / "run", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert said == {"folder": str(tmp_path / "run"), **summary}
    assert medfed("show", tmp_path / "run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == summary


def test_quiet_prints_nothing_when_all_is_well(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medfed("run", study, "--out", tmp_path / "run", "--quiet") == 0
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_settings_change_the_study(study: Path, tmp_path: Path) -> None:
    words = [
        "--set",
        "training.rounds=2",
        "--set",
        "model.name=mlp",
        "--set",
        "model.options.hidden=[8]",
        "--quiet",
    ]
    assert medfed("run", study, "--out", tmp_path / "run", *words) == 0
    frozen = (tmp_path / "run" / "study.toml").read_text()
    assert "rounds = 2" in frozen and 'name = "mlp"' in frozen
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["rounds"] == 2


def test_what_is_wrong_is_one_line_on_stderr_and_exit_code_2(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medfed("run", study, "--set", "training.round=3", "--out", tmp_path / "run") == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        "error unknown key 'training.round'; did you mean 'rounds'?"
    ]
    assert not (tmp_path / "run").exists()


def test_brackets_in_names_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = invented()
    frame["hospital"] = frame["hospital"].map(
        {"north": "[bold]north[/]", "south": "<b>south</b>", "east": "[/red]"}
    )
    assert medfed("run", write_study(tmp_path, frame=frame), "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "[bold]north[/]" in said and "[/red]" in said
    assert medfed("run", tmp_path / "study.toml", "--set", "data.source=[/x]") == 2
    assert "[/x]" in capsys.readouterr().err


def test_an_incomplete_run_has_exit_code_1(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = [
        "training.learning_rate=1e5",
        "data.task='regression'",
        "data.target='age'",
        "training.local_epochs=50",
    ]

    words = [
        word for setting in [*wild, "data.features=['lactate']"] for word in ("--set", setting)
    ]
    assert medfed("run", study, "--out", tmp_path / "run", *words) == 1
    assert "incomplete: round 1: 0 of 3 sites answered" in capsys.readouterr().out.replace(
        "\n", " "
    )
    assert medfed("show", tmp_path / "run") == 0
    capsys.readouterr()
    assert medfed("run", study, "--out", tmp_path / "quiet", "--quiet", *words) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and "incomplete: round 1: 0 of 3 sites answered" in captured.err


def test_resume_of_a_finished_run_shows_it_again(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    medfed("run", study, "--out", tmp_path / "run", "--quiet")
    assert medfed("resume", tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "federated (fedavg)" in said and "round 4/4" not in said
    assert medfed("resume", tmp_path) == 2


def test_studies_lists_what_is_bundled(capsys: pytest.CaptureFixture[str]) -> None:
    assert medfed("studies") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in ("breast-cancer", "heart", "brief"))
    assert medfed("studies", "--json") == 0
    assert all(Path(path).exists() for path in json.loads(capsys.readouterr().out).values())


def test_data_show_and_its_figure(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medfed("data", "show", study, "--figure", tmp_path / "figure.html") == 0
    said = capsys.readouterr().out
    assert all(site in said for site in SITES) and "label skew" in said and "lactate" in said
    page = (tmp_path / "figure.html").read_text()
    assert "north" in page and "Rows of each site" in page
    assert not any(f'src="{scheme}' in page for scheme in ("http", "//"))  # opens without a network
    assert medfed("data", "show", study, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert sum(site["rows"] for site in found["sites"].values()) == 240


def test_data_show_tells_how_many_patients_are_at_several_sites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = invented()
    east = frame[frame["hospital"] == "east"].drop_duplicates("subject")
    shared = [
        east.head(3).assign(hospital="north"),
        east.head(1).assign(hospital="south"),
    ]
    path = write_study(tmp_path, frame=pd.concat([frame, *shared], ignore_index=True))
    assert medfed("data", "show", path) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "patients at more than one site: 3 (2 at 2 sites, 1 at 3 sites)" in said
    assert "privacy.max_sites_per_patient=3" in said
    assert medfed("data", "show", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)["sites"]
    assert {n: found["east"]["at_sites"][n] for n in "23"} == {"2": 2, "3": 1}


def test_data_show_is_silent_on_shared_patients_where_there_are_none_and_under_a_claim(
    study: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medfed("data", "show", study) == 0
    assert "more than one site" not in capsys.readouterr().out

    told = []
    for shared in (0, 3):
        frame = invented()
        moved = frame[frame["hospital"] == "east"].drop_duplicates("subject").head(shared)
        frame = pd.concat([frame, moved.assign(hospital="north")], ignore_index=True)
        path = write_study(tmp_path, frame=frame)
        assert medfed("data", "show", path, "--set", "privacy.epsilon=3") == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "patients at more than one site: not told under a privacy claim" in said
        assert "at 2 sites" not in said
        assert medfed("data", "show", path, "--json", "--set", "privacy.epsilon=3") == 0
        sites = json.loads(capsys.readouterr().out)["sites"].values()
        told.append([site["at_sites"] for site in sites])
    assert told == [[None] * 3] * 2


def test_data_show_tells_who_is_written_in_more_than_one_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = invented()
    twice = frame[frame["hospital"] == "east"].head(3)
    again = twice.assign(subject=twice["subject"].str.upper())
    path = write_study(tmp_path, frame=pd.concat([frame, again], ignore_index=True))
    assert medfed("data", "show", path) == 0
    assert (
        "patients written in more than one way (see data.identity): east 3"
        in capsys.readouterr().out
    )
    assert medfed("data", "show", path, "--json") == 0
    found = json.loads(capsys.readouterr().out)["sites"]
    assert {name: site["spellings"] for name, site in found.items()} == {
        "north": 0,
        "south": 0,
        "east": 3,
    }


def test_an_operator_founds_changes_and_accepts_a_ledger(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "budget"
    words = ["privacy", "found", folder, "--lifetime-epsilon", "2", "--delta", "1e-6"]
    assert medfed(*words) == 2  # nobody decides
    assert medfed(*words, "--operator", " ") == 2
    assert not folder.exists()
    assert (
        medfed(
            *words, "--operator", "Ada [the chief]", "--identity", "exact", "--reason", "board 3"
        )
        == 0
    )
    assert medfed(*words, "--operator", "Ada") == 2
    assert (
        "is a ledger already; its budget changes by `medfed privacy budget`"
        in capsys.readouterr().err.replace("\n", " ")
    )

    change = ["privacy", "budget", folder, "--lifetime-epsilon", "3.5"]
    assert medfed(*change, "--operator", "Bo") == 2
    assert medfed(*change, "--operator", "Bo", "--reason", "a second trial") == 0
    assert "epsilon 3.5 at delta 1e-06, decided by Bo: a second trial" in capsys.readouterr().out
    assert (
        medfed(
            "privacy",
            "budget",
            tmp_path / "none",
            *change[3:],
            "--operator",
            "Bo",
            "--reason",
            "why",
        )
        == 2
    )
    assert not (tmp_path / "none").exists()

    assert medfed("privacy", "ledger", folder) == 0
    said = capsys.readouterr().out
    assert (
        "lifetime budget: epsilon 3.5 at delta 1e-06 over all studies; identity rule 'exact'"
        in said
    )
    assert (
        "founded: epsilon 2 at delta 1e-06; Ada [the chief]: board 3" in said
        and "Bo: a second trial" in said
    )
    assert medfed("privacy", "ledger", folder, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["lifetime"]["epsilon"], len(found["decisions"]), found["charges"]) == (3.5, 2, 0)

    assert medfed("privacy", "ledger", folder, "--check-head", found["head"]) == 0
    assert medfed("privacy", "ledger", folder, "--check-head", "0" * 64) == 2
    (folder / "ledger.head").unlink()
    assert medfed("privacy", "ledger", folder) == 2
    capsys.readouterr()
    accept = [
        "privacy",
        "accept",
        folder,
        "--operator",
        "Bo",
        "--reason",
        "the disk died",
        "--head",
    ]
    assert medfed(*accept, "0" * 64) == 2
    assert medfed(*accept, found["head"]) == 0
    assert medfed("privacy", "ledger", folder) == 0
    assert "accepted: this copy is the newest; Bo: the disk died" in capsys.readouterr().out


def test_data_list_and_get(capsys: pytest.CaptureFixture[str]) -> None:
    assert medfed("data", "list") == 0
    assert "569 patients" in capsys.readouterr().out
    assert medfed("data", "get", "breast-cancer") == 0
    assert "569 rows" in capsys.readouterr().out
    assert medfed("data", "get", "breast-cancr") == 2
    assert "did you mean 'breast-cancer'?" in capsys.readouterr().err


@pytest.mark.needs("data")
def test_data_folder_comes_from_the_command_line(
    data_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MEDFED_DATA")
    assert medfed("data", "show", "heart", "--data", data_dir) == 0
    assert "switzerland" in capsys.readouterr().out


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv=['medfed','--help']\nimport medfed.cli\ntry: medfed.cli.main()\n"
        "except SystemExit: pass\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "resume" in done.stdout


def test_the_public_surface() -> None:
    import medfed as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    assert set(package.__all__) == {
        "BudgetError",
        "DataError",
        "LedgerError",
        "MedfedError",
        "MedicalNeuralNetwork",
        "PlanError",
        "PrivacyAccountingEntry",
        "QuorumError",
        "RenyiDPAccountant",
        "Result",
        "RunError",
        "SiteError",
        "Study",
        "StudyError",
        "adaptive_gradient_clipping",
        "compare_federated_algorithms",
        "create_interactive_dashboards",
        "create_medical_device_names",
        "estimate_mean",
        "estimate_shares",
        "export_training_logs",
        "generate_comprehensive_report",
        "generate_security_report",
        "generate_privacy_report",
        "load",
        "load_and_prepare_medical_data",
        "load_study",
        "report_category",
        "report_number",
        "resume",
        "run",
        "simulate",
        "verify_model_integrity",
    }  # fmt: skip
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing
