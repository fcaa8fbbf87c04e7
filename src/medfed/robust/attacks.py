"""Simulated attacks: what a client that lies does to its records,
its row, or its row's whole steps on the wire.

For simulation and tests only. An attack without knowledge of honest rows judges by what the liars
would have sent honestly. One liar alone has one such row: it takes last round's beside it, or else
takes the spread of the row's own numbers for the spread between clients.

F liars at hand, H honest clients, K all of them, M numbers in a row, B basis rows; N records, D
features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import NormalDist
from typing import Literal

import torch
from torch import Tensor

from medfed.core import streams
from medfed.core.checks import PlanError, StudyError, nearest
from medfed.core.streams import Streams

Stage = Literal["data", "row", "wire"]


@dataclass(frozen=True)
class Records:
    """A liar's training records x_ND, y_N;
    `labels` counts the classes, 0 where a number is predicted.
    """

    x_ND: Tensor
    y_N: Tensor
    labels: int
    key: int  # of the liar's stream


@dataclass(frozen=True)
class Sight:
    """What liars see when they make their rows: what they would honestly send, and perhaps more.

    `clients` and `liars` are the whole cohort's n and f, even where one liar acts at a time. Raises
    PlanError unless 0 < f < n/2.
    """

    own_FM: Tensor
    names: Sequence[str]  # of the F liars: each has its own stream, and all share one
    streams: Streams
    round: int
    clients: int
    liars: int
    honest_HM: Tensor | None = None
    before_FM: Tensor | None = None  # their own honest rows of the round before
    # the Gram rule that "adaptive" knows; None is the mean
    rule: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        if not 0 < 2 * self.liars < self.clients:
            raise PlanError(
                f"liars={self.liars} of clients={self.clients}; an attack is simulated with at "
                "least one liar and fewer than half. Change robustness.malicious."
            )

    def seen_RM(self) -> Tensor:
        """Return the rows that the liars judge by:
        the honest ones, or their own of this round and the last.
        """
        if self.honest_HM is not None:
            return self.honest_HM
        if len(self.own_FM) > 1 or self.before_FM is None:
            return self.own_FM
        return torch.cat([self.own_FM, self.before_FM])

    def mean_M(self) -> Tensor:
        """Return what the liars take for the honest rows' mean."""
        seen_RM = self.seen_RM() if self.honest_HM is not None else self.own_FM
        return seen_RM.mean(0)

    def spread_M(self) -> Tensor:
        """Return what liars take for the standard deviation between clients, number by number."""
        seen_RM = self.seen_RM()
        if len(seen_RM) > 1:
            return seen_RM.std(0)
        return seen_RM.std(correction=0).expand(seen_RM.shape[1])

    def key_F(self) -> Tensor:
        """Return each liar's stream for this round."""
        return self.streams.key_K("attack", self.round, self.names)

    def shared_key(self) -> Tensor:
        """Return the stream [1] that all liars share, in all rounds."""
        return torch.tensor([self.streams.key("attack")], dtype=torch.int64)

    def all_send(self, lie_M: Tensor) -> Tensor:
        """Return lies [F, M], the same from everyone."""
        return lie_M.expand_as(self.own_FM)


def _honest_records(records: Records) -> Records:
    return records


def _honest_rows(sight: Sight) -> Tensor:
    return sight.own_FM


@dataclass(frozen=True)
class Attack:
    """One attack: where its lie is told, and the paper that it is from. A row may follow from
    changed records.
    """

    name: str
    paper: str
    stage: Stage
    on_data: Callable[[Records], Records] = _honest_records
    on_rows: Callable[[Sight], Tensor] = _honest_rows

    def records(self, records: Records) -> Records:
        """Return the records that the liar trains on."""
        return self.on_data(records)

    def rows(self, sight: Sight, stage: Stage = "row") -> Tensor:
        """Return the rows [F, M] that liars send, in the dtype of their own; an attack of another
        stage changes none.

        Whole steps are rounded to nearest and end at the largest word; a number that is none
        becomes that word too.
        """
        own_FM = sight.own_FM
        # a model that has run away needs no lie
        if stage != self.stage or not own_FM.isfinite().all():
            return own_FM
        if stage == "wire":
            return self.on_rows(sight)
        return _cast(self.on_rows(_widen(sight)), own_FM.dtype)


def _widen(sight: Sight) -> Sight:
    """Return the sight with float64 rows."""
    honest = sight.honest_HM
    before = sight.before_FM
    return replace(
        sight,
        own_FM=sight.own_FM.double(),
        honest_HM=None if honest is None else honest.double(),
        before_FM=None if before is None else before.double(),
    )


def _cast(lie_FM: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.is_floating_point:
        return lie_FM.to(dtype)
    most = torch.iinfo(dtype).max
    step_FM = torch.nan_to_num(lie_FM, nan=math.inf, posinf=math.inf, neginf=-math.inf).round()
    inside_FM = step_FM.abs() < float(most)  # a float of 2^63, which the largest word is below
    whole_FM = torch.where(inside_FM, step_FM, 0.0).to(dtype)
    return torch.where(inside_FM, whole_FM, torch.where(step_FM > 0, most, -most).to(dtype))


# On records


def _flip_labels(records: Records) -> Records:
    """Class c becomes class C - 1 - c; a number is mirrored at 0, which is the study's centre."""
    top = max(records.labels - 1, 0)
    return replace(records, y_N=top - records.y_N)


def _poison_features(records: Records) -> Records:
    """Keep labels, and move each class's records to where another class lies:
    x - mean_c + mean_(C-1-c).

    With one class alone, or a number to predict, records are mirrored at their mean.
    """
    x_ND = records.x_ND
    y_N = records.y_N
    if not len(y_N):
        return records
    mirrored_ND = 2 * x_ND.mean(0) - x_ND
    if not records.labels:
        return replace(records, x_ND=mirrored_ND)
    poisoned_ND = mirrored_ND.clone()

    for c in range(records.labels):
        here = y_N == c
        there = y_N == records.labels - 1 - c
        if c != records.labels - 1 - c and here.any() and there.any():
            poisoned_ND[here] = x_ND[here] - x_ND[here].mean(0) + x_ND[there].mean(0)

    return replace(records, x_ND=poisoned_ND)


@dataclass(frozen=True)
class Trigger:
    """A mark that a backdoored model obeys: `value` in the named columns means class `label`.

    Features are encoded: 0 is their centre, 1 their scale. Columns that the records lack are left
    out.
    """

    columns: tuple[int, ...] = (0, 1, 2)
    value: float = 4.0
    label: int = 0
    share: float = 0.5  # of a liar's records that are marked

    def stamp(self, x_ND: Tensor) -> Tensor:
        """Return the records with the mark."""
        marked_ND = x_ND.clone()
        marked_ND[:, [c for c in self.columns if c < x_ND.shape[1]]] = self.value
        return marked_ND

    def poison(self, records: Records) -> Records:
        """Mark a share of the records and call them `label`;
        raise PlanError where a number is predicted.
        """
        if not records.labels:
            raise PlanError(
                "attack='backdoor' needs classes; this study predicts a number. Use 'label-flip'."
            )
        drawn_N = streams.uniform(torch.tensor([records.key]), len(records.y_N))[0] < self.share
        x_ND = torch.where(drawn_N[:, None], self.stamp(records.x_ND), records.x_ND)
        y_N = torch.where(drawn_N, torch.full_like(records.y_N, self.label), records.y_N)
        return replace(records, x_ND=x_ND, y_N=y_N)

    def success(
        self, predict: Callable[[Tensor], Tensor], x_ND: Tensor, y_N: Tensor
    ) -> tuple[float, float]:
        """Return the shares of honest records of other classes that are called `label`: with the
        mark, and without.

        predict: x_ND -> classes [N]. The second share is what the model gets wrong anyway. Raises
        PlanError where all records are of that class.
        """
        x_ND = x_ND[y_N != self.label]
        if not len(x_ND):
            raise PlanError(
                f"all records are of class {self.label}; a backdoor to it needs a test record of "
                "another"
            )

        marked = predict(self.stamp(x_ND))
        plain = predict(x_ND)
        return float((marked == self.label).double().mean()), float(
            (plain == self.label).double().mean()
        )


TRIGGER = Trigger()
"""The mark of attack "backdoor"."""


# On rows


def _sign_flip(sight: Sight) -> Tensor:
    return -4 * sight.own_FM  # by 4, so that 30 % of the clients turn the mean: .7 - .3 x 4 < 0


def _scale(sight: Sight) -> Tensor:
    # n / eta with eta = 1: a row of flipped labels replaces the mean
    return sight.clients * sight.own_FM


def _gaussian(sight: Sight) -> Tensor:
    """Noise with 200 times the root mean square of the liar's own numbers."""
    size_F1 = sight.own_FM.square().mean(1, keepdim=True).sqrt()
    return 200 * size_F1 * streams.normal(sight.key_F(), sight.own_FM.shape[1])


def alie_z(clients: int, liars: int) -> float:
    """Return z_max of ALIE (eq. in algorithm 3): s honest clients lie further from the mean, so
    liars pass for them.

    Below 0 where the liars are too few for the paper's argument.
    """
    supporters = clients // 2 + 1 - liars
    return NormalDist().inv_cdf((clients - liars - supporters) / (clients - liars))


def _alie(sight: Sight) -> Tensor:
    return sight.all_send(sight.mean_M() - alie_z(sight.clients, sight.liars) * sight.spread_M())


def _ipm_large(sight: Sight) -> Tensor:
    """The mean becomes -(n - f)/n of the honest one:
    epsilon is twice the (n - f)/f that makes it zero.
    """
    return sight.all_send(-2 * (sight.clients - sight.liars) / sight.liars * sight.mean_M())


def _ipm(sight: Sight) -> Tensor:
    return sight.all_send(-0.5 * sight.mean_M())


def _min_max(sight: Sight) -> Tensor:
    """Go as far as no honest row is further from the lie
    than the two furthest honest rows are from each other.

    |m + g p - x_i|^2 = a_i + 2 g b_i + g^2 c is at most the diameter's square: the least root over
    i, no search.
    """
    seen_RM = sight.seen_RM()
    mean_M = sight.mean_M()
    p_M = -sight.spread_M()
    if len(seen_RM) == 1:
        # rows of that spread would be sqrt(2) spreads apart: g = 1
        return sight.all_send(mean_M + p_M)
    off_RM = mean_M - seen_RM
    c = p_M.square().sum()
    a_R = off_RM.square().sum(1)
    b_R = off_RM @ p_M
    room_R = (_distances_RR(seen_RM).max() - a_R).clamp(min=0)
    return sight.all_send(mean_M + _ratio((b_R.square() + c * room_R).sqrt() - b_R, c).min() * p_M)


def _min_sum(sight: Sight) -> Tensor:
    """Go as far as the lie's squared distances from honest rows sum to no more than those of the
    worst honest row.
    """
    seen_RM = sight.seen_RM()
    mean_M = sight.mean_M()
    p_M = -sight.spread_M()
    if len(seen_RM) == 1:
        return sight.all_send(mean_M + p_M)
    off_RM = mean_M - seen_RM
    c = p_M.square().sum()
    count = len(seen_RM)
    b = (off_RM @ p_M).mean()
    room = _distances_RR(seen_RM).sum(1).max() / count - off_RM.square().sum() / count
    return sight.all_send(mean_M + _ratio((b.square() + c * room.clamp(min=0)).sqrt() - b, c) * p_M)


def _distances_RR(seen_RM: Tensor) -> Tensor:
    """Return squared distances between rows, by differences from the first:
    no cancellation of a large mean.
    """
    off_RM = seen_RM - seen_RM[0]
    gram_RR = off_RM @ off_RM.T
    return (gram_RR.diagonal()[:, None] + gram_RR.diagonal() - 2 * gram_RR).clamp(min=0)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a / b, and 0 where b is 0: rows without spread leave no direction."""
    return a / b if b > 0 else torch.zeros_like(a)


def _mimic(sight: Sight) -> Tensor:
    """Send the row that is furthest out along the direction in which honest rows differ most.

    Over-represents one honest client, so that heterogeneous cohorts lean to it. A liar alone sends
    its own row.
    """
    seen_RM = sight.seen_RM()
    off_RM = seen_RM - seen_RM.mean(0)
    lead_R = torch.linalg.eigh(off_RM @ off_RM.T).eigenvectors[:, -1]
    along_R = seen_RM @ (lead_R @ off_RM)
    return sight.all_send(seen_RM[along_R.abs().argmax()])


def _free_rider(sight: Sight) -> Tensor:
    return torch.zeros_like(sight.own_FM)


def _stale(sight: Sight) -> Tensor:
    """Last round's row again; in the first round nothing."""
    if sight.before_FM is None:
        return _free_rider(sight)
    return sight.before_FM


def _colluding(sight: Sight) -> Tensor:
    """A random direction for all liars and rounds, a hundred times as long as the liar's row."""
    direction_M = streams.normal(sight.shared_key(), sight.own_FM.shape[1])[0]
    lies_FM: Tensor = (
        100 * sight.own_FM.norm(dim=1, keepdim=True) * direction_M / direction_M.norm()
    )
    return lies_FM


def _not_a_number(sight: Sight) -> Tensor:
    return torch.full_like(sight.own_FM, math.nan)


def _infinite(sight: Sight) -> Tensor:
    return torch.full_like(sight.own_FM, math.inf)


FIXED = (
    _sign_flip,
    _scale,
    _gaussian,
    _alie,
    _ipm_large,
    _ipm,
    _min_max,
    _min_sum,
    _mimic,
    _free_rider,
    _colluding,
)
"""What "adaptive" tries beside its own directions."""


def _adaptive(sight: Sight) -> Tensor:
    """Send what moves the rule's result furthest from the honest mean, the rule known and asked.

    Candidates are the fixed attacks, and m + g p for p against the mean and against the spread, g =
    2^-5 .. 2^10, then finer around the best. Every candidate is a combination of a few basis rows,
    so one Gram matrix serves all. Without honest rows the liars draw n - f from what they take for
    the mean and the spread.
    """
    if sight.honest_HM is None:
        sight = replace(sight, honest_HM=_imagined_HM(sight))
    assert sight.honest_HM is not None
    game = _Game.of(sight, sight.honest_HM)
    strengths = [2.0**e for e in range(-5, 11)]
    best = max(
        game.list_fixed() + [game.towards(p, g) for p, g in product(game.directions, strengths)],
        key=game.harm,
    )
    if best.direction is not None:
        finer = [best.strength * 2.0 ** (e / 8) for e in range(-7, 8)]
        best = max([game.towards(best.direction, g) for g in finer], key=game.harm)

    lie_FM: Tensor = best.mix_LB[: len(sight.own_FM)] @ game.basis_BM
    return lie_FM


def _imagined_HM(sight: Sight) -> Tensor:
    names = [f"imagined {i}" for i in range(sight.clients - sight.liars)]
    key_H = sight.streams.key_K("attack", sight.round, names)
    return sight.mean_M() + sight.spread_M() * streams.normal(key_H, sight.own_FM.shape[1])


@dataclass(frozen=True)
class _Lie:
    """A candidate: how the L liars' rows are mixed from the basis; its direction, if it has one."""

    mix_LB: Tensor
    direction: int | None = None
    strength: float = 0.0


@dataclass(frozen=True)
class _Game:
    """The honest rows, the fixed attacks' and the directions as one basis, and its Gram matrix."""

    basis_BM: Tensor
    gram_BB: Tensor
    honest: int
    liars: int
    at_hand: int
    rule: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, sight: Sight, honest_HM: Tensor) -> "_Game":
        mean_M = sight.mean_M()
        spread_M = sight.spread_M()
        lies = [attack(sight) for attack in FIXED]
        basis_BM = torch.cat([honest_HM, *lies, mean_M[None], -mean_M[None], -spread_M[None]])
        F = len(sight.own_FM)
        rule = sight.rule or _mean
        return cls(basis_BM, basis_BM @ basis_BM.T, len(honest_HM), max(sight.liars, F), F, rule)

    @property
    def directions(self) -> tuple[int, int]:
        B = len(self.basis_BM)
        return B - 2, B - 1

    def list_fixed(self) -> list[_Lie]:
        """Return the fixed attacks; liars that are not at hand send what those at hand do."""
        eye_BB = torch.eye(len(self.basis_BM), dtype=torch.float64)
        member_L = torch.arange(self.liars) % self.at_hand
        return [_Lie(eye_BB[self.honest + a * self.at_hand + member_L]) for a in range(len(FIXED))]

    def towards(self, direction: int, strength: float) -> _Lie:
        """Return the lie m + g p of all liars."""
        mix_B = torch.zeros(len(self.basis_BM), dtype=torch.float64)
        mix_B[-3] = 1
        mix_B[direction] = strength
        return _Lie(mix_B.expand(self.liars, -1), direction, strength)

    def harm(self, lie: _Lie) -> float:
        """Return the squared distance of the rule's result from the honest mean."""
        eye_HB = torch.eye(self.honest, len(self.basis_BM), dtype=torch.float64)
        mix_KB = torch.cat([eye_HB, lie.mix_LB])
        off_B = self.rule(mix_KB @ self.gram_BB @ mix_KB.T).double() @ mix_KB - eye_HB.mean(0)
        return float(off_B @ self.gram_BB @ off_B)


def _mean(gram_KK: Tensor) -> Tensor:
    return gram_KK.new_full((len(gram_KK),), 1 / len(gram_KK))


# On the wire


def _wrap(sight: Sight) -> Tensor:
    """Add 2^63 to half of the numbers, drawn by each liar:
    sums mod 2^64 are off by 2^63 in half of theirs.

    (x + 2^63)^2 = x^2 mod 2^64: a norm that is computed in words does not notice. Raises PlanError
    for rows that are not whole steps in 64 bits.
    """
    if sight.own_FM.dtype != torch.int64:
        raise PlanError(
            "attack='wrap' acts on whole steps (int64), and these rows are "
            f"{sight.own_FM.dtype}; use security.aggregation='three-party', where rows are "
            "words, or attack='scaled'."
        )
    chosen_FM = streams.words(sight.key_F(), sight.own_FM.shape[1]) < 0
    return torch.where(chosen_FM, sight.own_FM ^ -(1 << 63), sight.own_FM)


_ALL = (
    Attack(
        "label-flip",
        "Fang et al., USENIX Security 2020, arXiv:1911.11815",
        "data",
        on_data=_flip_labels,
    ),
    Attack(
        "feature-poison",
        "after Shafahi et al., NeurIPS 2018, arXiv:1804.00792",
        "data",
        on_data=_poison_features,
    ),
    Attack("backdoor", "Gu et al., BadNets 2017, arXiv:1708.06733", "data", on_data=TRIGGER.poison),
    Attack("sign-flip", "Li et al., RSA, AAAI 2019, arXiv:1811.03761", "row", on_rows=_sign_flip),
    Attack(
        "scaled", "Bagdasaryan et al., AISTATS 2020, arXiv:1807.00459", "row", _flip_labels, _scale
    ),
    Attack(
        "gaussian", "Blanchard et al., NeurIPS 2017, arXiv:1703.02757", "row", on_rows=_gaussian
    ),
    Attack("alie", "Baruch et al., NeurIPS 2019, arXiv:1902.06156", "row", on_rows=_alie),
    Attack("ipm", "Xie et al., Fall of Empires, UAI 2019, arXiv:1903.03936", "row", on_rows=_ipm),
    Attack(
        "ipm-large",
        "Xie et al., Fall of Empires, UAI 2019, arXiv:1903.03936",
        "row",
        on_rows=_ipm_large,
    ),
    Attack("min-max", "Shejwalkar and Houmansadr, NDSS 2021", "row", on_rows=_min_max),
    Attack("min-sum", "Shejwalkar and Houmansadr, NDSS 2021", "row", on_rows=_min_sum),
    Attack("mimic", "Karimireddy et al., ICLR 2022, arXiv:2006.09365", "row", on_rows=_mimic),
    Attack("free-rider", "Lin et al. 2019, arXiv:1911.12560", "row", on_rows=_free_rider),
    Attack("stale", "after Fraboni et al., AISTATS 2021, arXiv:2006.11901", "row", on_rows=_stale),
    Attack(
        "colluding",
        "after Blanchard et al., NeurIPS 2017, arXiv:1703.02757",
        "row",
        on_rows=_colluding,
    ),
    Attack("nan", "a broken or hostile client", "row", on_rows=_not_a_number),
    Attack("inf", "a broken or hostile client", "row", on_rows=_infinite),
    Attack("adaptive", "after Shejwalkar and Houmansadr, NDSS 2021", "row", on_rows=_adaptive),
    Attack("wrap", "arithmetic mod 2^64", "wire", on_rows=_wrap),
)

ATTACKS: Mapping[str, Attack] = {attack.name: attack for attack in _ALL}
"""The attacks by name."""


def find(name: str) -> Attack:
    """Return an attack; raise StudyError, with what is known, for a name that none has."""
    if name not in ATTACKS:
        raise StudyError(f"robustness.attack={name!r} is not an attack; {nearest(name, ATTACKS)}")
    return ATTACKS[name]


def liars(names: Sequence[str], fraction: float, seed: int) -> tuple[str, ...]:
    """Return who lies: floor(fraction n) of the names, in their order, drawn from the study's seed.

    A larger fraction adds liars and frees none. Raises StudyError for a fraction outside [0, .5).
    """
    if not 0 <= fraction < 0.5:
        raise StudyError(
            f"robustness.malicious={fraction:g}; expected a share from 0 to below .5 of the clients"
        )
    count = math.floor(fraction * len(names) + 1e-9)  # .3 x 10 is below 3 in floats of some shares
    key = Streams(seed).key
    drawn = set(sorted(names, key=lambda name: (key("liars", name), name))[:count])
    return tuple(name for name in names if name in drawn)
