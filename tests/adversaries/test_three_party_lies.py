"""What a coordinator tried with three aggregators, one lie a test: no upload is opened twice, no row alone."""

from collections.abc import Callable

import numpy as np
import pytest

from medfed.planning.terms import terms_of
from medfed.privacy.guarantee import GRID
from medfed.secure import three_party
from tests.adversaries import bugs
from tests.adversaries.programs import alter, told_of
from tests.adversaries.world import (
    AGGREGATORS,
    BLINDING,
    COORDINATOR,
    Three,
    World,
    facts_of,
    names_of,
    sizes_of,
    study_of,
    tell,
)

Patch = pytest.MonkeyPatch
pytestmark = pytest.mark.usefixtures("one_thread")


def said(world: World) -> str:
    return " | ".join(text for _, text in world.errors)


def rows(world: World, round: int = 1, models: dict[str, float] | None = None) -> dict[str, bytes]:
    """Ask all honest sites for their rows."""
    models = models or {}
    uploads = {name: world.work(name, round, models.get(name, 0)) for name in world.sites}
    return {name: upload for name, upload in uploads.items() if upload is not None}


def without(uploads: dict[str, bytes], *names: str) -> dict[str, bytes]:
    return {name: upload for name, upload in uploads.items() if name not in names}


@pytest.mark.parametrize("claim", [False, True])
def test_a_round_without_lies_opens_its_sum(monkeypatch: Patch, claim: bool) -> None:
    world = World(monkeypatch, "three-party", claim=claim)
    opened = world.open_aggregators().play(1, rows(world))
    assert opened and len(opened.rows) == 5 and not world.errors
    world.check()


def begin_a_later_round(three: Three) -> None:
    three.play(7, {}, stop_at=0)


def restart_all(three: Three) -> None:
    for name in AGGREGATORS:
        three.restart(name)


def join_with_others(three: Three) -> None:
    for name in AGGREGATORS:
        three.join(name, told_of("fewer"))


def join_with_other_sizes(three: Three) -> None:
    for name in AGGREGATORS:
        three.join(name, told_of("one size"))


@pytest.mark.parametrize(
    "between", [begin_a_later_round, restart_all, join_with_others, join_with_other_sizes]
)
@pytest.mark.parametrize("claim", [False, True])
def test_shares_are_not_opened_again_over_another_subset(
    monkeypatch: Patch, between: Callable[[Three], None], claim: bool
) -> None:
    world = World(monkeypatch, "three-party", claim=claim)
    three = world.open_aggregators()
    uploads = rows(world)
    assert three.play(1, uploads)
    between(three)
    assert three.play(1, without(uploads, "s3")) is None
    assert "done for something else already" in said(world)
    world.check()


def test_shares_are_opened_again_where_nothing_is_written_down(monkeypatch: Patch) -> None:
    """The attack itself: two sums that differ by one row."""
    bugs.forget("rows", "weights")(monkeypatch)
    world = World(monkeypatch, "three-party")
    three = world.open_aggregators()
    uploads = rows(world)
    assert three.play(1, uploads) and three.play(1, without(uploads, "s3"))
    with pytest.raises(AssertionError, match="the row of s0, round 1, is in 2 different sums"):
        world.check()


def test_an_aborted_round_opens_the_same_number_or_none(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party", claim=True)
    three = world.open_aggregators()
    uploads = rows(world)
    assert three.play(1, uploads, stop_at=9) is None
    first, again = three.play(1, uploads), three.play(1, uploads)
    restart_all(three)
    third = three.play(1, uploads)
    assert first and first == again == third
    world.check()


def test_a_round_before_the_last_is_not_begun(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party")
    three = world.open_aggregators()
    before = rows(world, 1)
    assert three.play(2, rows(world, 2)) and three.play(1, before) is None
    assert "round=1 was begun at 'aggregator 1'; expected 2 or later" in said(world)
    world.check()


def test_a_question_asked_again_gets_the_same_bytes_and_is_not_paid(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party", claim=True)
    first = rows(world)
    assert rows(world) == first and {till.paid.total() for till in world.tills.values()} == {1}
    world.restart("s0")
    assert world.work("s0", 1) == first["s0"] and len(world.rows) == 5


def test_a_study_without_noise_opens_no_upload_made_for_one_with_it(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party", claim=True)
    bare = world.open_aggregators(study_of("three-party", False))
    assert bare.play(1, rows(world)) is None
    assert "expected" in said(world) and not world.opened
    world.check()


def test_an_old_greeting_brings_no_key_back(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party")
    three = world.open_aggregators()
    uploads = rows(world)
    assert three.play(1, uploads, stop_at=3) is None
    assert three.play(1, uploads, old_greeting=True) is None
    assert three.play(1, uploads)
    world.check()


def test_an_old_key_of_the_line_is_found(monkeypatch: Patch) -> None:
    bugs.keep_one_key_for_the_line(monkeypatch)
    world = World(monkeypatch, "three-party")
    three = world.open_aggregators()
    uploads = rows(world)
    three.play(1, uploads, stop_at=3)
    three.play(1, uploads, stop_at=3)
    with pytest.raises(AssertionError, match="one key and nonce"):
        world.check()


@pytest.mark.parametrize("who", [COORDINATOR, AGGREGATORS[2]])
def test_nobody_but_a_site_is_counted_as_a_row(monkeypatch: Patch, who: str) -> None:
    """Neither among those that train, nor as one who sends shares beside them."""
    told = sizes_of(("s0", "s1")) | {who: {"train": 9}}
    world = World(monkeypatch, "three-party", liars=(AGGREGATORS[2],), told=told)
    three = world.open_aggregators()
    assert all(node._side is None for node in three.nodes.values())
    assert f"participants={who} are no sites" in said(world) and world.sites["s0"].party is None


@pytest.mark.parametrize("liar", [COORDINATOR, AGGREGATORS[2]])
def test_rows_of_strangers_do_not_fill_a_small_group(monkeypatch: Patch, liar: str) -> None:
    world = World(monkeypatch, "three-party", liars=(AGGREGATORS[2],))
    uploads = without(rows(world), "s2", "s3", "s4") | world.rows_of_liars(1, (liar,))
    assert world.open_aggregators().play(1, uploads) is None
    assert "2 rows are left; expected 4 or more" in said(
        world
    ) and "is no site that this round draws" in said(world)
    world.check()


def test_a_row_sent_under_another_name_does_not_count_twice(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party")
    uploads = without(rows(world), "s2", "s3", "s4")
    uploads["s4"] = uploads["s1"].replace(b"s1", b"s4", 1)  # the name in its front
    assert world.open_aggregators().play(1, uploads) is None
    world.check()


@pytest.mark.parametrize("model", [1, BLINDING])
def test_rows_of_two_models_are_not_added(monkeypatch: Patch, model: float) -> None:
    """In the worst form all others' rows are 0: then they are the sum, and the victim's is left out."""
    world = World(monkeypatch, "three-party")
    uploads = rows(world, models=dict.fromkeys(world.names[1:], model))
    opened = world.open_aggregators().play(1, uploads)
    assert opened and {site for site, _, _ in opened.rows} == set(world.names[1:])
    world.check()


def test_a_second_model_in_one_round_is_refused(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party", claim=True)
    rows(world)
    assert not rows(world, models=dict.fromkeys(world.names, 1))
    assert "has taken another model of round 1" in said(world) and len(world.rows) == 5


def test_a_model_of_another_round_inside_is_refused(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party", claim=True)
    assert world.work("s0", 1, inner=2) is None
    assert "round=2 stands in the model that was signed for round 1" in said(world)
    assert not world.tills["s0"].paid and not world.rows


def test_sizes_that_the_study_does_not_declare_are_refused(monkeypatch: Patch) -> None:
    """Under a claim noise follows from them."""
    world = World(monkeypatch, "three-party", claim=True)
    world.told_to = dict.fromkeys(AGGREGATORS, told_of("one size"))
    three = world.open_aggregators()
    assert all(node._side is None for node in three.nodes.values())
    assert "1000 patients for site 's1' were told; the study declares 45" in said(world)


@pytest.mark.parametrize("kind", ["one size", "all small but one", "fewer"])
def test_aggregators_told_otherwise_than_sites_open_nothing(monkeypatch: Patch, kind: str) -> None:
    """Without a claim sizes weigh rows: all but one at 0, and the sum would be that one's."""
    world = World(monkeypatch, "three-party")
    world.told_to = dict.fromkeys(AGGREGATORS, told_of(kind))
    assert world.open_aggregators().play(1, rows(world)) is None
    assert "takes another study, other participants or other sizes for agreed" in said(world)
    world.check()


def test_other_weights_open_one_row_where_facts_are_not_compared(monkeypatch: Patch) -> None:
    bugs.share_without_the_facts(monkeypatch)
    world = World(monkeypatch, "three-party")
    world.told_to = dict.fromkeys(AGGREGATORS, told_of("all small but one"))
    assert world.open_aggregators().play(1, rows(world))
    with pytest.raises(AssertionError, match="opened"):
        world.check()


def test_one_aggregator_alone_restarted_with_an_empty_record_opens_nothing_more(
    monkeypatch: Patch,
) -> None:
    """It forgets on purpose, with the coordinator; the other two do not."""
    world = World(monkeypatch, "three-party", claim=True, liars=(AGGREGATORS[2],))
    three = world.open_aggregators()
    uploads = rows(world)
    assert three.play(1, uploads)
    three.restart(AGGREGATORS[2])
    assert three.play(1, without(uploads, "s0")) is None
    world.check()


@pytest.mark.parametrize("step", [0, 1, 2, 5, 12])
def test_who_ends_a_round_blames_nobody_for_what_the_relay_did(
    monkeypatch: Patch, step: int
) -> None:
    world = World(monkeypatch, "three-party")
    three = world.open_aggregators()
    uploads = rows(world)

    def spoil(now: int, sender: str, to: str, message: bytes) -> bytes:
        return alter(message, 40) if (now, sender) == (step, AGGREGATORS[0]) else message

    assert three.play(1, uploads, meddle=spoil) is None
    assert "or the coordinator did not carry it" in said(world)
    world.check()


def test_min_group_counts_rows_besides_those_of_colluding_sites(monkeypatch: Patch) -> None:
    world = World(monkeypatch, "three-party", liars=("s3", "s4"))
    three = world.open_aggregators()
    uploads = without(rows(world), "s1", "s2") | world.rows_of_liars(1, ("s3", "s4"))
    assert three.play(1, uploads) is None
    assert "3 rows are left; expected 4 or more" in said(world)
    world.check()


def world_of_a_rule(patch: Patch) -> World:
    """Return six sites of which two lie, in the midst of all rows: a rule leaves out another's."""
    settings = {
        "robustness.rule": "multi-krum",
        "robustness.max_malicious": 0.2,
        "security.colluding": 0.35,
    }
    return World(patch, "three-party", sites=6, liars=("s4", "s5"), settings=settings)


def rows_beside_liars(world: World, round: int) -> dict[str, bytes]:
    return rows(world, round) | world.rows_of_liars(round, ("s4", "s5"))


def test_a_rule_keeps_min_group_rows_besides_those_of_colluding_sites(monkeypatch: Patch) -> None:
    world = world_of_a_rule(monkeypatch)
    three = world.open_aggregators()
    assert three.play(1, without(rows_beside_liars(world, 1), "s3")) is None
    assert "the rule keeps 4 rows; expected 5 or more" in said(world)
    opened = three.play(2, rows_beside_liars(world, 2))
    assert opened and len(opened.rows) == 3
    world.check()


def test_a_rule_that_keeps_two_rows_beside_those_of_liars_is_found(monkeypatch: Patch) -> None:
    bugs.keep_any_number_of_honest_rows(monkeypatch)
    world = world_of_a_rule(monkeypatch)
    three = world.open_aggregators()
    assert three.play(1, without(rows_beside_liars(world, 1), "s3"))
    with pytest.raises(AssertionError, match=r"opened: a sum of .*; expected 3 honest rows"):
        world.check()


def test_a_site_that_the_round_does_not_draw_is_not_counted_as_a_row(monkeypatch: Patch) -> None:
    """It works with the coordinator, which has nobody else to fill a small group with."""
    settings = {"fleet.clients_per_round": 4}
    facts = facts_of(study_of("three-party", False, 6)._with(settings), tell(sizes_of(names_of(6))))
    (liar, *_) = sorted(set(facts.participants) - set(facts.draw(1)))
    world = World(monkeypatch, "three-party", sites=6, liars=(liar,), settings=settings)
    three = world.open_aggregators()
    honest = rows(world)
    assert sorted(honest) == sorted(facts.draw(1))
    least = terms_of(facts).fewest
    few = dict(list(honest.items())[: least - 1])
    assert three.play(1, few | world.rows_of_liars(1, (liar,))) is None
    assert f"{least - 1} rows are left; expected {least} or more" in said(world)
    assert f"'{liar}' (site) is no site that this round draws" in said(world)
    world.check()


@pytest.mark.parametrize(("times", "counts"), [(0.9, True), (1.01, False)])
def test_under_a_claim_a_liars_row_is_no_longer_than_the_largest_declared_sum(
    monkeypatch: Patch, times: float, counts: bool
) -> None:
    """Else it moves the model as a site of any size would."""
    world = World(monkeypatch, "three-party", claim=True, liars=("s4",))
    three = world.open_aggregators()
    honest = rows(world)
    agreed = terms_of(world.facts())
    longest_M = np.zeros(agreed.length, np.int64)
    longest_M[0] = int(times * max(size["train"] for size in world.told.values()) / GRID)
    with world.watcher.quiet():
        liars = three_party.share(
            world.post("s4"), world.scope(1), longest_M, agreed, world.rows[-1].model
        )
    opened = three.play(1, honest | {"s4": liars})
    assert (opened is None) == counts  # the sum is of honest rows alone, or of no such
    assert not opened or len(opened.rows) == 4
    world.check()
