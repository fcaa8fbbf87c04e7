"""A round that does not count says why, site by site, whichever way rows come together and whatever
ends it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import medfed
from medfed import cli
from medfed.core import codec
from medfed.core.checks import AbortError, DataError, QuorumError, SiteError, naming, reasons
from medfed.engine.port import Reply
from medfed.monitor import events
from medfed.monitor.events import Event, SiteExcluded
from medfed.node import site
from medfed.node.inprocess import InProcess
from medfed.runs import simulation
from medfed.study import Study
from tests.tables import STUDY, write_study

pytestmark = pytest.mark.usefixtures("one_thread")

Change = Callable[[Reply], Reply | None]


def _scaled(factor: float) -> Change:
    def change(reply: Reply) -> Reply:
        header, tensors = codec.decode(reply.payload)
        return replace(
            reply, payload=codec.encode(header, {**tensors, "row": tensors["row"] * factor})
        )

    return change


def _torn(reply: Reply) -> Reply:
    header, tensors = codec.decode(reply.payload)
    return replace(
        reply, payload=codec.encode(header, {name: tensor[:-9] for name, tensor in tensors.items()})
    )


KINDS: dict[str, tuple[Change, str]] = {
    # what becomes of the site's work -> the reason that must be told
    "error": (lambda reply: replace(reply, error="its disk is full"), "its disk is full"),
    "late": (lambda reply: None, "no answer within 1 s"),
    "not finite": (_scaled(float("nan")), "its row is not finite"),
    "out of bound": (_scaled(1e4), "its row is out of bound: robustness.bound=3"),
    "unreadable": (lambda reply: replace(reply, payload=b"no reply"), "its reply cannot be read"),
    "torn": (_torn, ""),
}
PLAIN_ONLY = ("not finite", "out of bound")


def _meddle(patch: pytest.MonkeyPatch, changes: dict[str, Change]) -> None:
    """Change what the coordinator gets of some sites' work."""

    class Meddling(InProcess):
        def submit_many(self, sites: Any, op: str, payload: bytes, deadline: float) -> list[int]:
            tickets = super().submit_many(sites, op, payload, deadline)
            self.working: set[int] = getattr(self, "working", set()) | (
                set(tickets) if op == "work" else set()
            )
            return tickets

        def poll(self, wait: float) -> list[Reply]:
            told = []
            for reply in super().poll(wait):
                change = changes.get(reply.site) if reply.ticket in self.working else None
                changed = change(reply) if change else reply
                told += [changed] if changed else []
            return told

    patch.setattr(simulation, "InProcess", Meddling)


def _study(folder: Path, way: str, **settings: Any) -> Study:
    study = medfed.load_study(write_study(folder, STUDY))
    return study._with(
        {"security.aggregation": way, "training.deadline": 1.0, "training.rounds": 2, **settings}
    )


RULED = {"robustness.rule": "multi-krum", "training.quorum": 0.5, "security.min_group": 2}
ENDS: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    # what ends the round -> the ways in which it can, settings, words
    "quorum": (("plain", "masked", "three-party"), {}, "2 of 3"),
    "rule": (("plain", "three-party"), RULED, "2 came"),
    "group": (("three-party",), {"training.quorum": 0.5}, "2 rows are left"),
    "protocol": (("masked",), {"training.quorum": 0.3}, "masked round, phase"),
}
CASES = [
    pytest.param(way, end, kind, id=f"{way}-{end}-{kind}")
    for end, (ways, _, _) in ENDS.items()
    for way in ways
    for kind in KINDS
    if way == "plain" or kind not in PLAIN_ONLY
]


@pytest.mark.parametrize(("way", "end", "kind"), CASES)
def test_who_was_left_out_and_why_is_told_wherever_the_round_ends(
    tmp_path: Path, way: str, end: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the run's last words, in an event, in the summary and by `medfed show`."""
    _, settings, words = ENDS[end]
    # one more is lost on the way, so that the protocol stops by its own threshold
    if end == "protocol":
        settings = settings | {"security.colluding": 0.0}
    if kind == "out of bound":
        settings = settings | {"robustness.bound": 3.0}
    change, reason = KINDS[kind]
    lost = ("south", "east") if end == "protocol" else ("east",)
    _meddle(monkeypatch, dict.fromkeys(lost, change))
    told: list[Event] = []
    result = medfed.run(
        _study(tmp_path, way, **settings), tmp_path / "run", listeners=[told.append]
    )
    assert not result.complete
    summary = result.summary
    # the coordinator counts it; the aggregators cannot read it
    if kind == "torn" and way == "three-party":
        words = {"quorum": "2 rows are left"}.get(end, words)
    assert words in summary["reason"]
    assert reason in summary["reason"] and all(name in summary["reason"] for name in lost)
    excluded = [event for event in told if isinstance(event, SiteExcluded)]
    assert {event.site for event in excluded} == set(lost) and all(
        reason in event.reason for event in excluded
    )
    assert {(one["round"], one["site"]) for one in summary["excluded"]} == {
        (1, name) for name in lost
    }
    shown = CliRunner().invoke(cli.app, ["show", str(tmp_path / "run")]).output
    assert summary["reason"].split(".")[0] in " ".join(shown.split()) and shown.count(
        "without"
    ) == len(lost)


def test_words_that_wrap_are_named_where_a_rule_then_stops_the_round(tmp_path: Path) -> None:
    """The three aggregators leave a row out of bound out, and the rule has too few: the one is the
    other's cause.
    """
    settings = {**RULED, "robustness.attack": "wrap", "robustness.malicious": 0.34}
    told: list[Event] = []
    result = medfed.simulate(_study(tmp_path, "three-party", **settings), listeners=[told.append])
    (liar,) = {event.site for event in told if isinstance(event, SiteExcluded)}
    assert (
        "2 came" in result.summary["reason"]
        and f"{liar}: its row is out of bound" in result.summary["reason"]
    )
    assert result.summary["excluded"] == [
        {"round": 1, "site": liar, "reason": "its row is out of bound"}
    ]


def test_a_reason_that_several_share_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _meddle(
        monkeypatch,
        dict.fromkeys(("north", "south"), KINDS["error"][0]) | {"east": KINDS["not finite"][0]},
    )
    summary = medfed.simulate(_study(tmp_path, "plain")).summary
    assert "north, south: its disk is full; east: its row is not finite" in summary["reason"]


def test_a_site_without_fault_lets_the_run_say_nothing(tmp_path: Path) -> None:
    summary = medfed.simulate(_study(tmp_path, "plain")).summary
    assert summary["status"] == "complete" and summary["reason"] == ""


def test_a_model_that_nobody_can_test_is_told_with_the_causes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "medfed.node.evaluation.outputs", lambda model, w, x: torch.full((len(x), 1), float("nan"))
    )
    summary = medfed.simulate(_study(tmp_path, "plain")).summary
    assert (
        "no site could test the model. east, north, south: the model's outputs are not finite"
        in summary["reason"]
    )


# the parts ----------------------------------------------------------------------------------------


def test_reasons_are_grouped_and_a_site_named_in_its_own_reason_is_named_once() -> None:
    own = {name: f"op 'work' failed at site {name!r}: ValueError" for name in ("a", "b")}
    assert reasons(own) == "a, b: op 'work' failed: ValueError"
    assert reasons({"a": "x", "b": "y", "c": "x"}) == "a, c: x; b: y"
    assert reasons({}) == ""
    # who pays together
    paid = {name: f"site {name!r}: study 's', site 'b': refused" for name in ("a", "b")}
    assert reasons(paid) == "a, b: study 's', site 'b': refused"
    many = reasons({f"device {n}": "late" for n in range(1000)})
    assert "and 980 more: late" in many and len(many) < 400


def test_a_reason_that_a_thousand_share_comes_with_their_number() -> None:
    many = reasons(
        {f"c{n}": "the coordinator has not signed its model" for n in range(1000)} | {"d": "late"},
        most=3,
    )
    assert many == (
        "1,000 sites, c0, c1, c2 and 997 more: the coordinator has not signed its model; d: late"
    )


def test_naming_keeps_the_kind_of_error_and_says_nothing_twice() -> None:
    with (
        pytest.raises(AbortError) as stopped,
        naming({"a": "late", "b": "silent"}),
        naming({"c": "false"}),
    ):
        raise AbortError("the round ends. b: silent", {"b": "silent"})
    assert str(stopped.value) == "the round ends. b: silent c: false a: late"
    assert stopped.value.excluded == {"a": "late", "b": "silent", "c": "false"}
    with pytest.raises(QuorumError, match=r"^nobody came$"), naming({}):
        raise QuorumError("nobody came")


def test_the_summary_of_an_unfinished_run_gives_no_reason() -> None:
    from medfed.monitor.summary import summarise

    assert summarise([])["reason"] is None
    ended = events.RunFinished("incomplete", 1, 1.0, "2 came")
    assert summarise([ended])["reason"] == "2 came"


@pytest.mark.parametrize("op", ["prepare", "survey"])
def test_what_every_site_answers_before_the_first_round_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, op: str
) -> None:
    def refused(sites: Any, *_: Any) -> list[Any]:
        return [SiteError(f"site {one.name!r}: its disk is full") for one in sites]

    monkeypatch.setitem(site.OPS, op, refused)
    with pytest.raises(DataError, match=r"^east, north, south: its disk is full$"):
        medfed.simulate(_study(tmp_path, "plain"))
