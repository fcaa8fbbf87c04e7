"""Simulated attacks are what their papers say, by numbers; they are drawn from the seed, and change
nobody else.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from medfed.core.checks import PlanError, StudyError
from medfed.core.streams import Streams
from medfed.links.wire import into_ball
from medfed.robust.attacks import (
    ATTACKS,
    TRIGGER,
    Attack,
    Records,
    Sight,
    add,
    alie_z,
    find,
    liars,
)
from medfed.robust.rules import gram, rule_of

F = 3
H = 7
M = 40
MIN_MAX = [name for name in ATTACKS if name.startswith(("min-max", "min-sum"))]
ROWS = [name for name, attack in ATTACKS.items() if attack.stage == "row"]


def sight(**more: Any) -> Sight:
    random = torch.Generator().manual_seed(1)
    own = torch.randn(F, M, generator=random, dtype=torch.float64) + 1
    honest = torch.randn(H, M, generator=random, dtype=torch.float64) + 1
    known: dict[str, Any] = {"honest_HM": honest, "before_FM": own - 0.5, "round": 2} | more
    return Sight(own, ["a", "b", "c"], Streams(7), clients=F + H, liars=F, **known)


def send(name: str, seen: Sight) -> Tensor:
    return find(name).rows(seen)


def test_the_simple_ones_by_number() -> None:
    seen = sight()
    assert seen.honest_HM is not None
    torch.testing.assert_close(send("sign-flip", seen), -4 * seen.own_FM)
    torch.testing.assert_close(send("scaled", seen), 10 * seen.own_FM)
    assert not send("free-rider", seen).any()
    torch.testing.assert_close(send("stale", seen), seen.before_FM)
    assert send("nan", seen).isnan().all() and send("inf", seen).isinf().all()
    torch.testing.assert_close(send("ipm", seen)[0], -0.5 * seen.honest_HM.mean(0))
    torch.testing.assert_close(send("ipm-large", seen)[0], -2 * 7 / 3 * seen.honest_HM.mean(0))
    lie = send("alie", seen)[0]
    torch.testing.assert_close(lie, seen.honest_HM.mean(0) - alie_z(10, 3) * seen.honest_HM.std(0))
    assert (send("mimic", seen)[0] == seen.honest_HM).all(1).any()


def test_alies_z_is_the_papers() -> None:
    """n = 50, m = 12 (Baruch et al. 2019): s = 26 - 12 = 14, and z = the normal quantile of (38 -
    14) / 38.
    """
    assert alie_z(50, 12) == pytest.approx(0.3360, abs=1e-3)


@pytest.mark.parametrize("name", MIN_MAX)
def test_a_lie_is_as_far_as_an_honest_row_may_be_and_no_further(name: str) -> None:
    seen = sight()
    honest = seen.honest_HM
    assert honest is not None
    lie = send(name, seen)[0]
    square = ((honest[:, None] - honest) ** 2).sum(2)
    mine = ((honest - lie) ** 2).sum(1)
    got, room = (
        (mine.max(), square.max())
        if name.startswith("min-max")
        else (mine.sum(), square.sum(1).max())
    )
    assert float(got) == pytest.approx(float(room), rel=1e-9)


def test_min_max_and_min_sum_go_in_three_directions() -> None:
    """Each lie is off the mean along its own direction, and the other way along none."""
    seen = sight()
    assert len(MIN_MAX) == 6 and seen.honest_HM is not None
    mean = seen.honest_HM.mean(0)
    directions = {"": seen.honest_HM.std(0), "-unit": mean, "-sign": mean.sign()}
    for name in MIN_MAX:
        off = send(name, seen)[0] - mean
        cosine = {
            suffix: float(torch.cosine_similarity(off, -p_M, dim=0))
            for suffix, p_M in directions.items()
        }
        assert max(cosine, key=cosine.__getitem__) == name.removeprefix(name[:7])
        assert cosine[name[7:]] == pytest.approx(1, abs=1e-9)


def test_fang_lies_beyond_the_honest_extremes_and_turns_the_trimmed_mean() -> None:
    """The paper's law: each number on the side against the mean's sign, within b = 2 of the
    extreme; a rule that trims as many as lie then moves that way in every number.
    """
    shifted = sight().honest_HM
    assert shifted is not None
    honest = shifted - 1  # means of both signs
    seen = sight(honest_HM=honest)
    lie = send("fang", seen)
    mean = honest.mean(0)
    low, high = honest.amin(0), honest.amax(0)
    down = mean > 0
    assert bool(down.any()) and not bool(down.all())
    assert torch.where(down, lie <= low, lie >= high).all()
    far = torch.where(down, torch.minimum(low * 2, low / 2), torch.maximum(high * 2, high / 2))
    assert torch.where(down, lie >= far, lie <= far).all()
    assert (lie[0] != lie[1]).all()  # each liar draws its own

    trimmed = rule_of("trimmed-mean", F).combine(torch.cat([honest, lie]))
    assert torch.where(down, trimmed < mean, trimmed > mean).all()
    own = sight(honest_HM=None)
    off = (send("fang", own) - own.own_FM.mean(0)) / own.own_FM.std(0)
    assert bool((off.abs() >= 3).all() and (off.abs() <= 4).all())  # partial knowledge
    assert (off.sign() == -own.own_FM.mean(0).sign()).all()


def test_opposed_goes_straight_against_the_mean_as_long_as_may_be() -> None:
    seen = sight()
    assert seen.honest_HM is not None
    lie = send("opposed", seen)
    mean = seen.honest_HM.mean(0).expand(F, -1)
    torch.testing.assert_close(torch.cosine_similarity(lie, mean), -torch.ones(F).double())
    torch.testing.assert_close(lie.norm(dim=1), seen.honest_HM.norm(dim=1).max().expand(F))
    # where a row is cut to a length, to that of each
    limit_F = torch.tensor([1.0, 5.0, 99.0], dtype=torch.float64)
    held = send("opposed", sight(limit_F=limit_F))
    torch.testing.assert_close(held.norm(dim=1), limit_F)
    torch.testing.assert_close(into_ball(held, limit_F.tolist()), held)
    assert not send("opposed", sight(honest_HM=torch.zeros(H, M).double())).any()


def test_drift_is_small_and_the_same_step_in_all_rounds() -> None:
    """A round's step is one spread; those of ten rounds add up to ten, where noise of that size
    adds up to about three.
    """
    random = torch.Generator().manual_seed(2)
    steps = []
    for number in range(1, 11):
        honest = torch.randn(H, M, generator=random, dtype=torch.float64)
        own = torch.randn(F, M, generator=random, dtype=torch.float64)
        lies = send("drift", replace(sight(honest_HM=honest, round=number), own_FM=own))
        step = lies[0] - honest.mean(0)
        assert float(step.norm()) == pytest.approx(float(honest.std(0).norm()))
        assert (lies == lies[0]).all()
        steps.append(step / step.norm())
    assert float(torch.stack(steps).sum(0).norm()) == pytest.approx(10)
    noise = torch.randn(10, M, generator=random, dtype=torch.float64)
    assert float((noise / noise.norm(dim=1, keepdim=True)).sum(0).norm()) < 5


@pytest.mark.parametrize(
    ("name", "lying"),
    [
        ("on-off", {*range(1, 6), *range(11, 16)}),
        ("duty-cycle", {1, 6, 11, 16}),
        ("late", set(range(11, 21))),
        ("sign-flip", set(range(1, 21))),
    ],
)
def test_those_that_lie_in_some_rounds_are_honest_to_the_bit_in_the_others(
    name: str, lying: set[int]
) -> None:
    for number in range(1, 21):
        seen = sight(round=number, rounds=20)
        expected = send("sign-flip", seen) if number in lying else seen.own_FM
        assert torch.equal(send(name, seen), expected), number
    for rounds in (1, 2, 3):  # each lies once at least in however short a run
        sent = [sight(round=k, rounds=rounds) for k in range(1, rounds + 1)]
        assert any(not torch.equal(send(name, seen), seen.own_FM) for seen in sent)


def test_gaussian_and_colluding_have_the_size_they_say() -> None:
    seen = sight()
    root = seen.own_FM.square().mean(1).sqrt()
    assert (send("gaussian", seen).square().mean(1).sqrt() / root).tolist() == pytest.approx(
        [200] * F, rel=0.5
    )
    lies = send("colluding", seen)
    torch.testing.assert_close(lies.norm(dim=1), 100 * seen.own_FM.norm(dim=1))
    unit = lies / lies.norm(dim=1, keepdim=True)
    torch.testing.assert_close(unit, unit[:1].expand(F, -1))
    later = send("colluding", sight(round=9))[0]
    torch.testing.assert_close(later / later.norm(), unit[0])  # the same push in all rounds


def test_adaptive_does_more_harm_than_any_fixed_attack() -> None:
    rule = rule_of("geometric-median", 3)

    def harm(lies: Tensor, seen: Sight) -> float:
        assert seen.honest_HM is not None
        x_KM = torch.cat([seen.honest_HM, lies])
        return float((rule(gram([x_KM])) @ x_KM - seen.honest_HM.mean(0)).norm())

    seen = sight(rule=rule)
    worst = max(
        harm(send(name, seen), seen)
        for name in ("sign-flip", "scaled", "alie", "min-max", "ipm-large")
    )
    assert harm(send("adaptive", seen), seen) >= worst * (1 - 1e-9)
    blind = sight(rule=rule, honest_HM=None)
    assert send("adaptive", blind).isfinite().all()


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("knows", [True, False])
def test_rows_keep_their_shape_and_dtype_and_are_drawn_from_the_seed(
    name: str, knows: bool
) -> None:
    seen = sight() if knows else sight(honest_HM=None, before_FM=None)
    first = send(name, seen)
    again = send(name, seen)
    assert first.shape == (F, M) and first.dtype == torch.float64
    torch.testing.assert_close(first, again, equal_nan=True)
    steps = Sight((seen.own_FM * 1000).long(), seen.names, seen.streams, 2, 10, 3)
    assert find(name).rows(steps).dtype == torch.int64


@pytest.mark.parametrize("name", ROWS)
def test_one_liar_alone_can_lie(name: str) -> None:
    seen = Sight(torch.ones(1, M, dtype=torch.float64), ["a"], Streams(7), 1, 10, 1)
    assert find(name).rows(seen).shape == (1, M)


def test_wrap_moves_half_of_the_words_and_no_square() -> None:
    own = torch.arange(2 * M).reshape(2, M) - M
    seen = Sight(own, ["a", "b"], Streams(7), 1, 10, 2)
    lie = find("wrap").rows(seen, "wire")
    moved = lie != own
    assert 0.25 < moved.double().mean() < 0.75 and (lie[moved] ^ -(1 << 63) == own[moved]).all()
    assert (lie * lie == own * own).all()  # mod 2^64: what a norm computed in words would see
    with pytest.raises(PlanError, match="whole steps"):
        find("wrap").rows(sight(), "wire")
    torch.testing.assert_close(find("wrap").rows(seen), own)  # not on the wire yet


def test_records_are_changed_as_named() -> None:
    x = torch.tensor([[0.0, 0, 0, 9], [2, 2, 2, 9], [4, 4, 4, 9]])
    y = torch.tensor([0, 0, 1])
    records = Records(x, y, 2, key=5)
    assert find("label-flip").records(records).y_N.tolist() == [1, 1, 0]
    # the replaced model is of flipped labels
    assert find("scaled").records(records).y_N.tolist() == [1, 1, 0]
    poisoned = find("feature-poison").records(records)
    assert poisoned.y_N.tolist() == [0, 0, 1]
    assert poisoned.x_ND[:, 0].tolist() == [3, 5, 1]  # each class where the other lies
    # one class alone: the last becomes the first
    three = Records(torch.eye(4), torch.tensor([0, 2, 1, 2]), 3, key=5)
    flipped = find("class-flip").records(three)
    assert flipped.y_N.tolist() == [0, 0, 1, 0] and torch.equal(flipped.x_ND, three.x_ND)
    assert flipped.y_N.dtype == three.y_N.dtype
    with pytest.raises(PlanError, match="attack='class-flip' needs classes"):
        find("class-flip").records(Records(x, torch.tensor([1.0, -2, 0]), 0, 5))
    number = find("label-flip").records(Records(x, torch.tensor([1.0, -2, 0]), 0, 5)).y_N
    assert number.tolist() == [-1, 2, 0]


def test_a_backdoor_marks_a_share_and_counts_its_success() -> None:
    many = Records(torch.zeros(2000, 5), torch.ones(2000, dtype=torch.int64), 2, key=5)
    marked = find("backdoor").records(many)
    share = float((marked.y_N == TRIGGER.label).double().mean())
    assert share == pytest.approx(TRIGGER.share, abs=0.05)
    assert (marked.x_ND[marked.y_N == 0][:, :3] == TRIGGER.value).all() and not marked.x_ND[
        marked.y_N == 1
    ].any()
    obeys = TRIGGER.success(lambda x: (x[:, 0] < 1).long(), many.x_ND, many.y_N)
    assert obeys == (1.0, 0.0)
    with pytest.raises(PlanError, match="needs a test record"):
        TRIGGER.success(lambda x: x[:, 0].long(), many.x_ND, torch.zeros(2000))
    with pytest.raises(PlanError, match="needs classes"):
        find("backdoor").records(Records(many.x_ND, many.y_N, 0, 5))


def test_who_lies_is_drawn_and_more_liars_free_none() -> None:
    names = [f"site {i}" for i in range(20)]
    some = set(liars(names, 0.2, 7))
    more = set(liars(names, 0.4, 7))
    assert len(some) == 4 and len(more) == 8 and some < more
    assert liars(names, 0.3, 7) != liars(names, 0.3, 8)
    assert len(liars(names[:10], 0.3, 1)) == 3  # not 2, as floats would have it
    with pytest.raises(StudyError, match=r"below \.5"):
        liars(names, 0.5, 7)
    with pytest.raises(StudyError, match="not an attack"):
        find("flip")
    for wrong in ({"clients": 6}, {"liars": 0}):
        with pytest.raises(PlanError, match="fewer than half"):
            Sight(
                torch.ones(1, 2),
                ["a"],
                Streams(1),
                **{"round": 1, "clients": 10, "liars": 3} | wrong,
            )


def test_every_attack_says_where_it_is_from_and_acts_at_one_stage() -> None:
    assert len(ATTACKS) == 30 and {attack.stage for attack in ATTACKS.values()} == {
        "data",
        "row",
        "wire",
    }
    for attack in ATTACKS.values():
        assert attack.paper
        if attack.stage == "data":
            seen = sight()
            torch.testing.assert_close(attack.rows(seen), seen.own_FM)
    assert math.isinf(float(send("inf", sight())[0, 0]))


def test_two_attacks_of_one_name_are_refused() -> None:
    before = dict(ATTACKS)
    with pytest.raises(PlanError, match=r"attack='alie' is there already \(Baruch et al"):
        add(Attack("alie", "another", "row"))
    assert before == ATTACKS


def test_the_page_lists_every_attack_with_its_stage_and_its_paper() -> None:
    page = (Path(__file__).parents[2] / "docs" / "robustness.md").read_text(encoding="utf-8")
    section = page.partition("## Attacks, for simulation")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| (\w+) \| [^|]+ \| ([^|]+) \|$", section, re.MULTILINE)
    assert len(rows) == len(ATTACKS)
    assert {name: (stage, paper) for name, stage, paper in rows} == {
        name: (attack.stage, attack.paper) for name, attack in ATTACKS.items()
    }
