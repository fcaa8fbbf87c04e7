"""What a coordinator of masked rounds tried, one lie a test: nobody's row is read."""

from pathlib import Path

import numpy as np
import pytest

import medfed
from medfed.core import codec
from medfed.core.checks import PlanError, SiteError
from medfed.node.inprocess import InProcess
from medfed.node.paying import charge
from medfed.rounds import aggregation
from medfed.rounds.prepare import enrol, prepare, send_encoding
from medfed.runs import open_sites
from tests.adversaries import bugs
from tests.adversaries.world import AGGREGATORS, BLINDING, COORDINATOR, World, names_of, sizes_of
from tests.tables import PRIVATE, invented, write_study

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("one_thread")


def said(world: World) -> str:
    return " | ".join(text for _, text in world.errors)


def test_a_round_without_lies_opens_its_sum(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "masked", claim=True)
    (opened,) = world.play_masked(1)
    assert {site for site, _, _ in opened.rows} == set(world.names) and not world.errors
    world.check()


@pytest.mark.parametrize(
    "told", [("s0", "s9", COORDINATOR), ("s0", "s1", "s9"), ("s0", "s1", AGGREGATORS[0])]
)
def test_the_server_does_not_say_who_takes_part(monkeypatch: Patch, told: tuple[str, ...]) -> None:
    """A victim among the server's own; a cohort of 3 out of 10, with too little noise."""
    world = World(monkeypatch, "masked", claim=True, sites=10, liars=("s9", AGGREGATORS[0]))
    assert not world.play_masked(1, told=told)
    assert "the study draws 10" in said(world)
    world.check()


def test_who_takes_part_is_believed_where_the_check_is_missing(monkeypatch: Patch) -> None:
    """The attack itself: it opens one row, and the bench says so."""
    bugs.believe_who_takes_part(monkeypatch)
    bugs.take_anybody_for_a_site(monkeypatch)
    world = World(monkeypatch, "masked", sites=10, liars=("s9",))
    (opened,) = world.play_masked(1, told=("s0", "s9", COORDINATOR))
    assert [site for site, _, _ in opened.rows] == ["s0"]
    with pytest.raises(AssertionError, match=r"a sum of \['s0'\]; expected 3 honest rows"):
        world.check()


def test_the_coordinator_is_nobodys_row(monkeypatch: Patch) -> None:
    """Told at once as participants: no site joins such a run."""
    told = sizes_of(("s0", "s1")) | {name: {"train": 9} for name in (COORDINATOR, AGGREGATORS[0])}
    world = World(monkeypatch, "masked", liars=AGGREGATORS[:1], told=told)
    assert "are no sites on the list of members" in said(world)
    assert not world.play_masked(1)


@pytest.mark.parametrize("restart", [False, True])
def test_a_round_played_again_with_other_survivors_opens_nothing(
    monkeypatch: Patch, restart: bool
) -> None:
    world = World(monkeypatch, "masked")
    assert len(world.play_masked(1)) == 1
    for name in world.names if restart else ():
        world.restart(name)
    assert not world.play_masked(1, lists=[("s1",)])
    assert "list was done for something else already" in said(world)
    world.check()


def test_a_round_played_again_for_the_same_list_is_paid_again(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "masked", claim=True)
    first, again = (*world.play_masked(1), *world.play_masked(1))
    assert first.rows == again.rows and first.total_M != again.total_M
    assert {till.paid[name, 1] for name, till in world.tills.items()} == {2}
    world.check()


@pytest.mark.parametrize("second", [("s0",), ("s0", "s1"), ("s0", "s1", "s2")])
def test_two_lists_in_one_attempt_open_one_sum_at_most(
    monkeypatch: Patch, second: tuple[str, ...]
) -> None:
    world = World(monkeypatch, "masked", liars=("s4",))
    assert len(world.play_masked(1, lists=[(), ("s3",)], second=second)) <= 1
    world.check()


@pytest.mark.parametrize("model", [1, BLINDING])
def test_rows_of_two_models_open_nothing(monkeypatch: Patch, model: int) -> None:
    """In the worst form all others' rows are 0, so that the sum is one row."""
    world = World(monkeypatch, "masked")
    assert not world.play_masked(1, models=dict.fromkeys(world.names[1:], model))
    assert len(world.rows) == 5  # all were masked, by hands that did no wrong
    world.check()


def test_rows_of_two_models_add_up_where_masks_are_not_bound(monkeypatch: Patch) -> None:
    bugs.mask_without_the_model(monkeypatch)
    world = World(monkeypatch, "masked")
    assert world.play_masked(1, models=dict.fromkeys(world.names[1:], BLINDING))
    with pytest.raises(AssertionError, match="several rounds or models"):
        world.check()


def test_a_second_model_in_one_round_is_refused(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "masked")
    assert len(world.play_masked(1)) == 1
    assert not world.play_masked(1, models=dict.fromkeys(world.names, 1))
    assert "has taken another model of round 1" in said(world)
    world.check()


def test_a_model_of_another_round_inside_is_refused(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "masked", claim=True)
    assert world.work("s0", 1, inner=2) is None
    assert "round=2 stands in the model that was signed for round 1" in said(world)
    assert not world.tills["s0"].paid and not world.rows


def test_fewer_rows_than_are_needed_besides_liars_open_nothing(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "masked", liars=("s4",))
    assert len(world.play_masked(1, lists=[("s0",)])) == 1  # three honest rows and the liar's
    assert not world.play_masked(2, lists=[("s0", "s1")])
    world.check()


def test_what_was_prepared_anew_is_joined_anew(monkeypatch: Patch, tmp_path: Path) -> None:
    """Asked to prepare for more clients behind its back, a site would add a smaller part of the noise."""
    names = names_of(8)
    frame = invented(240)
    frame["hospital"] = np.array(names)[np.arange(240) % 8]
    sizes = "".join(f"{name} = 24\n" for name in names)
    text = f"{PRIVATE.split('[privacy.sizes]')[0]}[privacy.sizes]\n{sizes}[monitor]\nbaselines = false\n"
    study = medfed.load_study(write_study(tmp_path, text, frame)).set(
        "security.aggregation", "masked"
    )
    sites = open_sites(study, None)
    fleet = InProcess(sites)
    small = prepare(sites[0].study, fleet, list(names[:4]))
    with pytest.raises(PlanError, match=r"differ from the sites that privacy\.sizes declares"):
        aggregation.introduce(small, fleet, "run")
    whole = prepare(sites[0].study, fleet, list(names))
    enrol(whole, fleet, "run")
    aggregation.introduce(whole, fleet, "run")
    send_encoding(small, fleet, names[:4])  # noise of four, in a round of eight

    header = {"phase": "keys", "round": 1, "told": list(names)}
    nothing = {"message": codec.as_tensor(b"")}
    with pytest.raises(SiteError, match="has agreed to no run"):
        sites[0].handle("phase", codec.encode(header, nothing))
    with pytest.raises(PlanError, match=r"differ from the sites that privacy\.sizes declares"):
        aggregation.introduce(small, fleet, "run")
    with pytest.raises(SiteError, match="it must enrol them anew"):
        charge(sites[:4], 1)
