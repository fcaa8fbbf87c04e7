"""Pages say what the event log says, escape what they are told, and stay small; a cut log is shown
up to its cut.
"""

import json
import re
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

import medfed
from medfed.core.checks import PlanError, RunError
from medfed.monitor import events
from medfed.monitor.events import (
    Event,
    Inspected,
    Planned,
    RoundFinished,
    RunFinished,
    RunStarted,
    SiteExcluded,
    line,
)
from medfed.screens import dashboards, flat_logs
from medfed.screens.story import Story, thin
from tests.tables import PRIVATE, STUDY, write_study
from tests.test_cli import medfed as command

pytestmark = pytest.mark.usefixtures("one_thread")

PAGES = (
    "training_dashboard.html",
    "device_analysis.html",
    "privacy_audit.html",
    "security_analysis.html",
)
LYING = {"robustness.attack": "sign-flip", "robustness.malicious": 0.3}


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("private")
    medfed.run(
        medfed.load_study(write_study(folder, PRIVATE)).set("training.rounds", 3), folder / "run"
    )
    return folder / "run"


@pytest.fixture(scope="module")
def lied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled study with liars, as the README runs it, baselines too."""
    folder = tmp_path_factory.mktemp("lied") / "run"
    assert medfed.run(medfed.load_study("breast-cancer-ten")._with(LYING), folder).complete
    return folder


def pages(folder: Path) -> dict[str, str]:
    return {name: path.read_text() for name, path in dashboards.write_dashboards(folder).items()}


def text(page: str) -> str:
    """What a reader without scripts sees."""
    return unescape(
        re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style).*?</\1>", "", page, flags=re.S))
    )


def rows(page: str, title: str) -> list[list[str]]:
    """The cells of the table under a heading."""
    part = page[page.index(f"<h2>{title}</h2>") :]
    body = part[part.index("<tbody>") : part.index("</tbody>")]
    return [
        [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row)]
        for row in re.findall(r"<tr>(.*?)</tr>", body)
    ]


def test_every_number_of_a_curve_is_the_logs(private: Path) -> None:
    log = list(events.read(private / "events.jsonl"))
    found = pages(private)
    finished = [event for event in log if isinstance(event, RoundFinished)]
    told = rows(found["training_dashboard.html"], "Time of a round")
    assert [int(t) for t, _ in told] == [event.round for event in finished]
    assert [float(s) for _, s in told] == pytest.approx(
        [event.seconds for event in finished], rel=1e-5
    )
    tested = [e for e in log if isinstance(e, events.Tested) and e.model == "federated"]
    curve = rows(found["training_dashboard.html"], "How well the model does, round by round")
    assert [float(row[1]) for row in curve] == pytest.approx(
        [e.all_sites["auroc"].value for e in tested], rel=1e-5
    )
    spent = rows(found["privacy_audit.html"], "Budget spent, round by round")
    assert [float(e) for _, e in spent] == pytest.approx(
        [float(str(e.privacy["epsilon"])) for e in finished], rel=1e-5
    )


def test_key_figures_are_the_summarys(private: Path) -> None:
    summary = json.loads((private / "summary.json").read_text())
    found = pages(private)
    assert f"auroc {summary['test']['auroc']:.3f}" in text(found["training_dashboard.html"])
    claim = json.loads((private / "privacy.json").read_text())
    privacy = text(found["privacy_audit.html"])
    assert f"{claim['epsilon']:.4f}" in privacy and claim["unit"] in privacy
    sites = {row[0]: row for row in rows(found["device_analysis.html"], "The sites")}
    assert {name: int(row[3]) for name, row in sites.items()} == summary["participation"]


def test_what_patients_spent_is_the_claims(private: Path) -> None:
    claim = json.loads((private / "privacy.json").read_text())
    page = pages(private)["privacy_audit.html"]
    spent = rows(page, "Patients by what they spent")
    assert max(float(epsilon) for epsilon, _ in spent) == pytest.approx(claim["epsilon"], abs=1e-4)
    assert sum(int(count) for _, count in spent) == claim["patients"]["declared"]


def test_right_and_wrong_add_up_to_the_figures(lied: Path) -> None:
    summary = json.loads((lied / "summary.json").read_text())
    page = pages(lied)["training_dashboard.html"]
    counts = [[int(cell) for cell in row[1:]] for row in rows(page, "Right and wrong, counted")]
    n = sum(map(sum, counts))
    assert n == summary["test"]["n"]
    assert (counts[0][0] + counts[1][1]) / n == summary["test"]["accuracy"]
    assert counts[1][1] / sum(counts[1]) == summary["test"]["recall"]
    last = [
        e
        for e in events.read(lied / "events.jsonl")
        if isinstance(e, events.Tested) and e.model == "federated"
    ][-1]
    assert sum(count for count, _, _ in last.calibration) == n
    gap = sum(count * abs(said - so) for count, said, so in last.calibration) / n
    assert gap == pytest.approx(summary["test"]["ece"])


def test_liars_are_shown_with_evidence(lied: Path) -> None:
    summary = json.loads((lied / "summary.json").read_text())
    page = pages(lied)["security_analysis.html"]
    assert len(summary["suspects"]) == 3 and set(summary["baselines"]) == {"local", "pooled"}
    done = rows(page, "What was done about whom")
    assert {row[1] for row in done} == {one["site"] for one in summary["suspects"]}
    story = Story.of(lied)
    log = [event for event in events.read(lied / "events.jsonl") if isinstance(event, Inspected)]
    shown = {name: values for name, values in story.suspicion().items()}
    for event in log:
        for finding in event.findings:
            assert shown[str(finding["client"])][event.round] >= finding["score"]  # type: ignore[operator]
    assert "signed entries in the trail" in text(page)


def test_a_run_without_privacy_says_that_nothing_is_claimed(lied: Path) -> None:
    found = pages(lied)["privacy_audit.html"]
    assert "Nothing is claimed" in text(found) and "Budget spent" not in found


def test_pages_are_whole_in_themselves(private: Path) -> None:
    for name, page in pages(private).items():
        assert len(page) < 10e6 and "<main>" in page and 'lang="en"' in page, name
        outside = re.sub(r"<script.*?</script>", "", page, flags=re.S)
        assert (
            not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", outside)
            and "<script src" not in page
        ), name
        assert page.count("<h2") <= page.count("<table") + 2


def test_the_report_begins_with_what_was_asked(private: Path) -> None:
    page = dashboards.write_report(private).read_text()
    for item in (
        "what was asked",
        "what came out",
        "what protects patients",
        "what is not promised",
    ):
        assert item in page
    assert all(
        f"<h1>{title}</h1>" in page
        for title in ("Training", "Sites and devices", "Privacy", "Security")
    )
    assert page.count("Plotly.newPlot") >= 4 and len(page) < 10e6
    assert "Highest level of threat" in dashboards.write_security_page(private).read_text()


# bad input ----------------------------------------------------------------------------------------

EVIL = "<script>alert('x')</script>"


def invented(rounds: int, sites: list[str], evil: str = "") -> list[Event]:
    sizes = {name: {"train": 10, "test": 5} for name in sites}
    told: list[Event] = [
        RunStarted(f"study{evil}", "HRESCH", "abc", 7, rounds, {"torch": "2"}, {"threads": 2}),
        Planned(
            "fedavg",
            "logistic",
            3,
            2,
            3,
            "rules",
            sizes,
            {},
            {"epsilon": None},
            1,
            2,
            {"a": f"all{evil}"},
            "one",
        ),
    ]
    for t in range(1, rounds + 1):
        n = len(sites)
        told.append(
            RoundFinished(t, sites, 1 / t, [0.5] * n, [0.1] * n, [1] * n, 0.2 + t % 7, 100, 200)
        )

    if evil:
        told.append(SiteExcluded(1, sites[0], f"late {evil}"))
        told.append(
            Inspected(
                1,
                dict.fromkeys(sites, 1.0),
                [{"client": sites[0], "score": 5.0, "kind": "far", "evidence": evil}],
                1,
            )
        )
        told.append(events.SecurityAudit(1, sites[0], 3, 12.0, "quarantine", [evil]))

    return [*told, RunFinished("complete", rounds, 1.0, f"done {evil}")]


def written(folder: Path, told: list[Event]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "events.jsonl").write_text("".join(line(event) + "\n" for event in told))
    return folder


def test_what_looks_like_a_script_stays_text(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", invented(3, [f'"a" {EVIL}', "b"], EVIL))
    for page in [*pages(folder).values(), dashboards.write_report(folder).read_text()]:
        assert EVIL not in page and "alert('x')</script>" not in page
        assert page.count("<script") == page.count("</script>")


def test_a_cut_log_is_shown_up_to_its_cut(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", invented(5, ["a", "b"])[:-1])
    whole = (folder / "events.jsonl").read_bytes()
    (folder / "events.jsonl").write_bytes(whole[:-40])
    page = pages(folder)["training_dashboard.html"]
    assert "ends within a line" in page and len(rows(page, "Time of a round")) == 4
    assert "incomplete after 4 of 5" in text(page)


def test_a_newer_schema_or_no_log_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", invented(1, ["a"]))
    log = folder / "events.jsonl"
    log.write_text(log.read_text().replace('"schema": 1', '"schema": 9'))
    with pytest.raises(RunError, match="schema"):
        pages(folder)
    with pytest.raises(RunError, match="cannot be read"):
        pages(tmp_path)
    log.write_text("")
    with pytest.raises(RunError, match="tells nothing yet"):
        pages(folder)


def test_many_points_are_thinned_with_lowest_and_highest_kept() -> None:
    curve: dict[int, float | None] = {t: float((t * 7919) % 1000) for t in range(100_000)}
    curve[54_321] = 5000.0
    curve[7] = -5000.0
    curve[50] = None
    kept = dict(thin(curve))
    assert (
        len(kept) <= 1002
        and kept[54_321] == 5000
        and kept[7] == -5000
        and 0 in kept
        and 99_999 in kept
    )
    assert thin({1: 0.5, 2: None}) == [(1, 0.5)]


@pytest.mark.slow
def test_a_long_log_gives_small_pages(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", invented(50_000, ["a", "b"]))
    assert all(len(page) < 10e6 for page in pages(folder).values())


def test_one_site_and_a_fleet_of_devices(tmp_path: Path) -> None:
    assert (
        "The sites" in pages(written(tmp_path / "one", invented(2, ["a"])))["device_analysis.html"]
    )
    fleet = [f"clinic {i:016x}" for i in range(300)]
    told = invented(2, fleet)
    assert isinstance(told[1], Planned)
    told[1] = replace(told[1], sizes={name: {"train": 1, "test": 0} for name in fleet})
    page = pages(written(tmp_path / "fleet", told))["device_analysis.html"]
    assert "none is named" in page and fleet[0] not in page


# the log as tables --------------------------------------------------------------------------------


def test_tables_agree_in_every_format(private: Path, tmp_path: Path) -> None:
    written_to = flat_logs.export_tables(private, tmp_path)
    assert len(written_to) == 12
    reader: dict[str, Any] = {"json": pd.read_json, "csv": pd.read_csv, "parquet": pd.read_parquet}
    for name in ("rounds", "sites", "tests", "findings"):
        frames = [reader[kind](tmp_path / f"{name}.{kind}") for kind in ("json", "csv", "parquet")]
        assert len({len(frame) for frame in frames}) == 1
    rounds = pd.read_parquet(tmp_path / "rounds.parquet")
    finished = [e for e in events.read(private / "events.jsonl") if isinstance(e, RoundFinished)]
    assert rounds["bytes_up"].tolist() == [e.bytes_up for e in finished]
    with pytest.raises(PlanError, match="expected some of json, csv, parquet"):
        flat_logs.export_tables(private, tmp_path, ["xlsx"])


def test_the_command_writes_all(
    private: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("report", private, "--out", tmp_path / "pages", "--export", "csv") == 0
    out = capsys.readouterr().out
    assert all(
        (tmp_path / "pages" / name).exists() and name in out for name in (*PAGES, "report.html")
    )
    assert (tmp_path / "pages" / "export" / "rounds.csv").exists()


def test_a_study_without_claim_has_pages_too(tmp_path: Path) -> None:
    study = medfed.load_study(write_study(tmp_path, STUDY)).set("monitor.baselines", True)
    medfed.run(study, tmp_path / "run")
    found = pages(tmp_path / "run")
    assert "training loss" in text(found["training_dashboard.html"]).lower()
    assert "baseline: pooled" in text(found["training_dashboard.html"])


def test_noised_counts_of_a_test_are_not_shown_as_exact(lied: Path) -> None:
    story = Story.of(lied)
    last = story.last_test()
    assert last and last.confusion
    exact = dashboards._table_of_tests(story, last) + dashboards._confusion(last)
    assert f">{last.n}<" in exact and "about" not in exact
    last = replace(last, noised=True)
    table = dashboards._table_of_tests(story, last)
    for count in (last.n, *last.site_n.values()):
        assert f">about {count}<" in table
    assert "counts are noised" in dashboards._confusion(last)
