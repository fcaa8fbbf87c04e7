"""The pages in a real browser: they load, say what summary.json says, follow a run, and are
accessible.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect, sync_playwright

import medfed
from medfed.screens.dashboards import FOUR, PAGES
from tests.screens.serving import TOKEN, serving
from tests.screens.test_dashboards import LYING
from tests.tables import STUDY, write_study

pytestmark = [pytest.mark.needs("chromium"), pytest.mark.slow]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    medfed.run(
        medfed.load_study("breast-cancer-ten")._with({**LYING, "training.rounds": 8}),
        folder / "lied",
    )
    medfed.run(medfed.load_study("breast-cancer").set("training.rounds", 3), folder / "demo")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_playwright() as play:
        found = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page; at its end the browser must have had nothing to complain of."""
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    said = list[str]()
    opened.on("console", lambda message: said.append(message.text))
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    opened.close()
    assert said == []


def violations(page: Page) -> list[str]:
    return [f"{one['id']}: {one['impact']}" for one in Axe().run(page).response["violations"]]


def test_the_live_page_says_what_the_summary_says(runs: Path, page: Page) -> None:
    with serving(runs) as address:
        page.goto(f"{address}/?token={TOKEN}")
        assert "token" not in page.url and violations(page) == []
        for name in ("demo", "lied"):
            summary = json.loads((runs / name / "summary.json").read_text())
            page.goto(f"{address}/runs/{name}")
            expect(page.locator("#rounds")).to_have_text(
                f"{summary['rounds']} of {summary['rounds_asked']}"
            )
            expect(page.locator("#score")).to_have_text(f"{summary['test']['auroc']:.4f}")
            epsilon = summary["privacy"]["epsilon"]
            expect(page.locator("#epsilon")).to_have_text(
                "none claimed" if epsilon is None else f"{epsilon:.4f} of 1"
            )
            rows = {
                row.split("\t")[0]: row.split("\t")
                for row in page.locator("#site-rows tr").all_inner_texts()
            }
            assert {site: int(cells[3]) for site, cells in rows.items()} == summary["participation"]
            suspects = ", ".join(one["site"] for one in summary["suspects"])
            expect(page.locator("#suspects")).to_have_text(suspects or "nobody")
            assert violations(page) == []


def test_pages_are_drawn_in_their_sandbox_and_lead_to_each_other(runs: Path, page: Page) -> None:
    with serving(runs) as address:
        page.goto(f"{address}/?token={TOKEN}")
        for name in PAGES:
            page.goto(f"{address}/runs/lied/pages/{name}")
            if name == "training_dashboard.html" or page.locator(".plotly-graph-div").count():
                page.locator(".main-svg").first.wait_for(state="attached")
            assert violations(page) == []
        page.goto(f"{address}/runs/lied/pages/{FOUR[0]}")
        page.locator("nav a").nth(2).click()
        page.wait_for_url(f"**/{FOUR[2]}")


def test_pages_on_disk_open_without_a_server(runs: Path, page: Page) -> None:
    for path in medfed.create_interactive_dashboards(runs / "demo").values():
        page.goto(path.as_uri())
        assert violations(page) == []
    page.goto(medfed.generate_comprehensive_report(runs / "demo").as_uri())
    assert violations(page) == []


def test_a_run_is_followed_while_it_goes(tmp_path: Path, page: Page) -> None:
    """A real run in another process: it waits after each round until the page has shown
    the round.
    """
    study = write_study(tmp_path, STUDY)
    go = tmp_path / "go"
    go.mkdir()
    script = (
        "import sys, time, pathlib, medfed\nfrom medfed.monitor.events import RoundFinished\ndef "
        "wait(event):\n    if isinstance(event, RoundFinished):\n        while not "
        "pathlib.Path(sys.argv[3], str(event.round)).exists(): time.sleep(0.01)\nstudy = "
        "medfed.load_study(sys.argv[1]).set('training.rounds', 3)\nmedfed.run(study, "
        "sys.argv[2], listeners=[wait])\n"
    )
    run = tmp_path / "runs" / "going"
    run.parent.mkdir()

    with subprocess.Popen([sys.executable, "-c", script, str(study), str(run), str(go)]) as process:
        try:
            with serving(run.parent) as address:
                page.goto(f"{address}/?token={TOKEN}")
                while not (run / "events.jsonl").exists():
                    assert process.poll() is None
                    page.wait_for_timeout(50)
                page.goto(f"{address}/runs/going")
                for number in (1, 2, 3):
                    expect(page.locator("#rounds")).to_have_text(f"{number} of 3", timeout=60_000)
                    expect(page.locator("#status")).to_contain_text("so far")
                    (go / str(number)).touch()
                expect(page.locator("#status")).to_contain_text("complete", timeout=60_000)
                assert process.wait(60) == 0  # the summary is written after the last event
                test = json.loads((run / "summary.json").read_text())["test"]
                expect(page.locator("#score")).to_have_text(f"{test['auroc']:.4f}")
        finally:
            for number in (1, 2, 3):
                (go / str(number)).touch()
            process.wait(60)
