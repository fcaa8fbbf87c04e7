"""What `medfed serve` costs and bears: viewers of one run, and pages of a very long one in a real
browser.

    python benchmarks/serve.py [--viewers 50] [--seconds 20] [--million]

A server of its own; a run of 100 sites whose log grows four times a second; viewers that stream it.
Told are the time from a line's writing to its arrival at each viewer, and of a plain request
meanwhile. `--million`: a log of a million events, its pages made and opened in headless Chromium.
"""

import asyncio
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import common
import httpx

from medfed.monitor.events import (
    Event,
    Planned,
    RoundFinished,
    RoundStarted,
    RunFinished,
    RunStarted,
    line,
)
from medfed.screens import dashboards

TOKEN = "a-token-for-this-benchmark"
SITES = [f"site {i:03d}" for i in range(100)]


def begun(sites: list[str], rounds: int) -> list[Event]:
    sizes = {name: {"train": 100, "test": 25} for name in sites}
    return [
        RunStarted("benchmark", "HRESCH", "0", 1, rounds, {}, {}),
        Planned(
            "fedavg",
            "logistic",
            33,
            32,
            33,
            "rules",
            sizes,
            {},
            {"epsilon": None, "noise": "none"},
            1,
            1,
        ),
    ]


def finished(number: int, sites: list[str]) -> RoundFinished:
    n = len(sites)
    return RoundFinished(
        number, sites, 1 / number, [0.5] * n, [0.1] * n, [1] * n, 0.2 + number % 7, 1000, 2000
    )


async def viewers(folder: Path, address: str, count: int, seconds: float) -> dict[str, list[float]]:
    log = folder / "run" / "events.jsonl"
    written = {}
    arrived = []
    asked = []
    headers = {"Authorization": f"Bearer {TOKEN}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=address, headers=headers, timeout=60, limits=limits
    ) as browser:

        async def view() -> None:
            async with browser.stream("GET", "/runs/run/live") as stream:
                async for text in stream.aiter_lines():
                    if text.startswith("data: "):
                        now = time.perf_counter()
                        if (number := json.loads(text[6:])["rounds"]) in written:
                            arrived.append(now - written[number])

        watching = [asyncio.create_task(view()) for _ in range(count)]
        await asyncio.sleep(2)
        for number in range(1, round(seconds * 4) + 1):
            with open(log, "a") as file:
                file.write(line(finished(number, SITES)) + "\n")
            written[number] = time.perf_counter()
            await asyncio.sleep(0.15)
            began = time.perf_counter()
            (await browser.get("/runs/run/view")).raise_for_status()
            asked.append(time.perf_counter() - began)
            await asyncio.sleep(0.1)
        await asyncio.sleep(1)
        for task in watching:
            task.cancel()
        await asyncio.gather(*watching, return_exceptions=True)
    return {"arrival": arrived, "request": asked}


def quantiles(values: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(values, n=100)
    return {
        "n": len(values),
        "median_ms": 1e3 * cuts[49],
        "p95_ms": 1e3 * cuts[94],
        "max_ms": 1e3 * max(values),
    }


def million(folder: Path) -> dict[str, float]:
    from playwright.sync_api import sync_playwright

    told = begun(["a", "b"], 500_000)
    with open(folder / "events.jsonl", "w") as log:
        for event in told:
            log.write(line(event) + "\n")
        for number in range(1, 500_000):
            log.write(
                line(RoundStarted(number, ["a", "b"]))
                + "\n"
                + line(finished(number, ["a", "b"]))
                + "\n"
            )
        log.write(line(RunFinished("complete", 499_999, 1.0, "")) + "\n")
    began = time.perf_counter()
    pages = dashboards.write_dashboards(folder)
    made = time.perf_counter() - began
    found = {
        "make_s": made,
        "largest_mb": max(path.stat().st_size for path in pages.values()) / 1e6,
    }
    with sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        for name, path in pages.items():
            page = browser.new_page()
            began = time.perf_counter()
            page.goto(path.as_uri())
            if page.locator(".plotly-graph-div").count():
                page.locator(".main-svg").first.wait_for(state="attached")
            found[f"open_s_{name}"] = time.perf_counter() - began
        browser.close()
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--viewers", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args(argv)
    if asked.tiny:
        asked.viewers = 2
        asked.seconds = 0.5

    found: dict[str, object] = {
        "viewers": asked.viewers,
        "sites": len(SITES),
        "machine": platform.machine(),
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "run").mkdir()
        (folder / "run" / "events.jsonl").write_text(
            "".join(line(event) + "\n" for event in begun(SITES, 1000))
        )
        command = [sys.executable, "-m", "medfed", "serve", str(folder), "--port", "0"]

        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | {"MEDFED_TOKEN": TOKEN}
        ) as server:
            assert server.stdout
            address = server.stdout.readline().removeprefix("open ").split("/?")[0]
            told = asyncio.run(viewers(folder, address, asked.viewers, asked.seconds))
            server.terminate()

        found |= {name: quantiles(values) for name, values in told.items()}
        if asked.million:
            (folder / "long").mkdir()
            found["million"] = million(folder / "long")

    text = json.dumps(found, indent=1)
    print(text)
    if asked.out and not asked.tiny:
        asked.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
