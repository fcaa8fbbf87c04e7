"""What a terminal shows: a line a round, and every name as it is written."""

import io
from collections.abc import Iterable
from typing import Any

import pytest
from rich.console import Console

from medfed.monitor.events import (
    Event,
    Planned,
    Resumed,
    RoundFinished,
    RunFinished,
    RunStarted,
    SiteExcluded,
    Warned,
)
from medfed.monitor.events import Tested as ModelTested
from medfed.monitor.metrics import CLASS_METRICS, NUMBER_METRICS, Figure
from medfed.monitor.summary import summarise
from medfed.privacy.run_meter import NoClaim
from medfed.screens.console import Progressing, Warnings, results

UNCLAIMED = NoClaim().claim()
NAMES = ["north", "[bold]x[/]", "[red]", "[/]", "[/bold]", "a\\", "[link=x]y[/link]"]


def _run(name: str, rounds: int = 3, metrics: Iterable[str] = CLASS_METRICS) -> list[Event]:
    figures = {m: Figure(0.75, 0.5, 1.0) for m in metrics}
    sizes = {name: {"train": 30, "test": 10}, "other": {"train": 20, "test": 5}}
    events: list[Event] = [
        RunStarted(name, "HRESCH", "d", 7, rounds, {}, {}),
        Planned("fedavg", name, 3, 2, 3, "rules", sizes, {name: {"0": 1}}, UNCLAIMED, 1, 2),
        Warned(f"careful with {name}"),
    ]

    for number in range(1, rounds + 1):
        events.append(SiteExcluded(number, name, f"it is {name}"))
        events.append(RoundFinished(number, ["other"], 0.5, [0.5], [0.1], [4], 0.25, 1, 2))
        if number % 2:
            events.append(ModelTested(number, "federated", 15, 0.1, figures, figures, dict.fromkeys(sizes, figures),
                                 {name: 10, "other": 5}, 0.1, 1, 2))  # fmt: skip

    both = dict.fromkeys(sizes, figures)
    events.append(
        ModelTested(
            rounds, "local", 15, 0.1, figures, figures, both, {name: 10, "other": 5}, 0.1, 1, 2
        )
    )
    events.append(Resumed(rounds, rounds, f"{name} is damaged"))

    return [*events, RunFinished("incomplete", rounds, 1.0, f"without {name}")]


def _shown(events: Iterable[Event], terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
    progress = Progressing(console)
    for event in events:
        progress(event)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_a_line_a_round(rounds: int) -> None:
    lines = [
        text for text in _shown(_run("north", rounds)).splitlines() if text.startswith("round ")
    ]
    told = [text for text in lines if "without" not in text]
    assert [text.split()[1] for text in told] == [f"{n}/{rounds}" for n in range(1, rounds + 1)]
    assert all("loss 0.5000" in text for text in told)
    assert ["AUROC 0.7500" in text for text in told] == [
        n % 2 == 1 or n == rounds for n in range(1, rounds + 1)
    ]


def test_a_round_without_a_test_is_told_too() -> None:
    events = [event for event in _run("north") if not isinstance(event, ModelTested)]
    assert _shown(events).count("loss 0.5000") == 3


def test_a_regression_shows_its_error() -> None:
    assert "RMSE 0.7500" in _shown(_run("north", metrics=NUMBER_METRICS))


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_as_they_are(name: str, terminal: bool) -> None:
    text = _shown(_run(name), terminal)
    spoken = [
        f"{name}  seed 7",
        f"model {name}:",
        f"{name} 30+10",
        f"careful with {name}",
        f"({name} is damaged)",
    ]
    for expected in [
        *spoken,
        f"round 1: without {name}: it is {name}",
        f"incomplete: without {name}",
    ]:
        assert expected in text


@pytest.mark.parametrize("name", NAMES)
def test_the_quiet_listener_tells_what_went_wrong_and_no_more(name: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    listener = Warnings(console)
    for event in _run(name, 1):
        listener(event)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        f"warning: careful with {name}",
        f"round 1: without {name}: it is {name}",
        f"incomplete: without {name}",
    ]


def _table(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=200)
    console.print(results(summary))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("name", NAMES)
def test_the_results_table_names_sites_as_they_are(name: str) -> None:
    text = _table(summarise(_run(name)))
    assert name in text and "federated (fedavg)" in text and "each site's own" in text
    assert "0.750" in text and ".500-1.000" in text


def test_a_noised_count_is_not_shown_as_exact() -> None:
    summary = summarise(_run("north"))
    count = summary["test"]["n"]
    assert f"about {count}" not in _table(summary)
    noised = _table({**summary, "test_noised": True})
    assert f"about {count}" in noised and "a noised count" in noised
    for line in noised.splitlines():
        assert ("federated" in line) == (" about " in line)  # baselines are counted


def test_what_was_not_measured_is_a_dash() -> None:
    events = _run("north", 1)
    tested = next(event for event in events if isinstance(event, ModelTested))
    object.__setattr__(tested, "all_sites", dict.fromkeys(CLASS_METRICS, Figure(None)))
    assert "AUROC -" in _shown(events)
    assert " - " in _table(summarise(events))


def test_many_sites_are_counted_not_listed() -> None:
    events = _run("north", 1)
    sizes = {f"s{i}": {"train": 1, "test": 1} for i in range(30)}
    for event in events:
        if isinstance(event, Planned):
            object.__setattr__(event, "sizes", sizes)
        if isinstance(event, ModelTested):
            figures = next(iter(event.per_site.values()))
            object.__setattr__(event, "per_site", dict.fromkeys(sizes, figures))
            object.__setattr__(event, "site_n", dict.fromkeys(sizes, 1))
    assert "and 22 more" in _shown(events)
    assert "18 more sites in summary.json" in _table(summarise(events))


def _without(sites: int) -> list[Event]:
    """Return a run whose only round ends with as many sites left out as drawn, one of them for a
    reason of its own.
    """
    lost: list[Event] = [
        SiteExcluded(1, f"c{n}", f"site 'c{n}': its disk is full") for n in range(sites)
    ]
    return [RunStarted("s", "HRESCH", "d", 7, 1, {}, {}), *lost, SiteExcluded(1, "d", "late")]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_reason_that_many_sites_share_is_told_once_with_their_number(quiet: bool) -> None:
    ended = RunFinished("incomplete", 0, 1.0, "too few")
    console = Console(file=io.StringIO(), width=200)
    listener = Warnings(console) if quiet else Progressing(console)
    for event in [*_without(1000), ended]:
        listener(event)
    assert isinstance(console.file, io.StringIO)
    told = [text for text in console.file.getvalue().splitlines() if "without" in text]
    assert told == [
        "round 1: without 1,000 sites, c0, c1, c2, c3, c4 and 995 more: the site: its disk is full",
        "round 1: without d: late",
    ]


def test_the_summary_tells_an_equal_reason_once_and_every_site_by_itself() -> None:
    found = summarise(
        [*_without(1000), SiteExcluded(2, "d", "late"), SiteExcluded(2, "d", "not tested: late")]
    )
    assert len(found["excluded"]) == 1003
    assert found["left_out"] == [
        {
            "round": 1,
            "reason": "the site: its disk is full",
            "sites": 1000,
            "first": ["c0", "c1", "c2", "c3", "c4"],
        },
        {"round": 1, "reason": "late", "sites": 1, "first": ["d"]},
        {"round": 2, "reason": "late", "sites": 1, "first": ["d"]},
        {"round": 2, "reason": "not tested: late", "sites": 1, "first": ["d"]},
    ]
