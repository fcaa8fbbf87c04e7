"""Aggregation rules: how much each client's row counts, so that liars lose their influence.

A rule reads rows through their Gram matrix G = X X^T alone. So it costs one matrix product and K x
K work, needs no more than a block of columns in memory, and can run where rows are secret and only
G is opened. Three rules work coordinate by coordinate and need the rows themselves:
coordinate-median, trimmed-mean, bulyan.

Names compose from the left: "nnm+geometric-median" mixes rows, then takes the geometric median of
the mixtures. Mixing is linear, X' = T X, so G' = T G T^T and the weights of the rows are T^T w'.

Accuracy. `gram` gives squared distances to about 1e-6 of the rows' spread, also where rows share a
part 10^5 times as large: it centres each block. A noised Gram matrix need not belong to any rows;
negative squared distances count as 0, and every rule still gives finite weights.

K clients (with the reference, where a rule has one, last), J mixtures, M numbers in a row, m in a
block; f liars.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from medfed.core import streams
from medfed.core.checks import DataError, PlanError, nearest

_BLOCK = 1 << 14  # columns at a time: 50 rows of them stay in the cache
_TILE = 256  # rows at a time: what lies above the diagonal is not computed
_FAR = 1e6  # spreads; the geometric median feels no more than a row's direction from here on
_SUBSETS = 20_000  # the most that SMEA looks at
_REMOVED = 16  # the most rows that minimum-diameter averaging can leave out: 2^16 branches


# The Gram matrix


def blocks_of(row_KM: Tensor, width: int = _BLOCK) -> Iterator[Tensor]:
    """Yield rows [K, M] as blocks of columns [K, m], views of them."""
    yield from torch.split(row_KM, width, dim=1)


def gram(blocks: Iterable[Tensor]) -> Tensor:
    """Return G [K, K] (float64) of rows in blocks of columns [K, m], summed block by block.

    Float32 blocks are multiplied in float32, around one of their rows where all rows share a large
    part: this adds a_i + a_j to G_ij and an error in `a` leaves distances as they are. Other types,
    and blocks whose squares overflow float32, in float64. Rows that are not finite give a G that is
    not, which every rule refuses.
    """
    total_KK: Tensor | None = None
    for block_Km in blocks:
        part_KK = _block_gram(block_Km if block_Km.dtype == torch.float32 else block_Km.double())
        total_KK = part_KK if total_KK is None else total_KK.add_(part_KK)
    if total_KK is None:
        raise DataError(
            "blocks: expected at least one block of columns, got none. Pass blocks_of(rows)."
        )
    return total_KK


def _block_gram(x_Km: Tensor) -> Tensor:
    """Return the Gram matrix of one block, its distances accurate to the rows' spread."""
    g_KK = _product(x_Km)
    if not g_KK.isfinite().all():
        if x_Km.dtype == torch.float64:
            return g_KK
        return _product(x_Km.double())
    near = _rank(g_KK)
    centre = int(near.argmin())
    if g_KK[centre, centre] <= 16 * near[centre]:  # no large common part: nothing to win
        return g_KK
    row_m = x_Km[centre].clone()
    cross_K = (x_Km - row_m) @ row_m
    along_K = cross_K.double() + row_m.double().square().sum() / 2
    return _product(x_Km - row_m) + along_K[:, None] + along_K


def _product(x_Km: Tensor) -> Tensor:
    """Return x x^T (float64), from its tiles below the diagonal."""
    tiles = torch.split(x_Km, _TILE)
    if len(tiles) == 1:
        return (x_Km @ x_Km.T).double()
    g_KK = torch.zeros(len(x_Km), len(x_Km), dtype=torch.float64)
    for i, left in enumerate(tiles):
        for j, right in enumerate(tiles[: i + 1]):
            tile = left @ right.T
            g_KK[i * _TILE : i * _TILE + len(left), j * _TILE : j * _TILE + len(right)] = tile
            g_KK[j * _TILE : j * _TILE + len(right), i * _TILE : i * _TILE + len(left)] = tile.T
    return g_KK


def weigh(blocks: Iterable[Tensor], w_K: Tensor) -> Tensor:
    """Return the combined row [M], w X, from the same blocks [K, m], in their type (float64 for
    whole numbers).
    """
    return torch.cat(
        [
            _as(w_K, block) @ (block if block.is_floating_point() else block.double())
            for block in blocks
        ]
    )


def _as(w_K: Tensor, block_Km: Tensor) -> Tensor:
    return w_K.to(block_Km.dtype if block_Km.is_floating_point() else torch.float64)


def augment(g_KK: Tensor, cross_K: Tensor, square: float) -> Tensor:
    """Return G [K+1, K+1] with a reference r as last row: its products with rows [K], and |r|^2.

    The origin is the reference of zeros: augment(G, zeros, 0).
    """
    return torch.cat(
        [
            torch.cat([g_KK, cross_K[:, None]], 1),
            torch.cat([cross_K, cross_K.new_tensor([square])])[None],
        ]
    )


def distances(g_KK: Tensor) -> Tensor:
    """Return squared distances [K, K]; those that noise made negative, and the diagonal, are 0."""
    square_K = g_KK.diagonal()
    d_KK = (square_K[:, None] - g_KK + (square_K - g_KK)).clamp(min=0)
    return d_KK.fill_diagonal_(0)


def _rank(g_KK: Tensor) -> Tensor:
    """Return each row's squared distance to the nearest half of the rows [K]: no liar's is small,
    unless it is near.
    """
    return distances(g_KK).kthvalue(len(g_KK) // 2 + 1 if len(g_KK) > 1 else 1).values


# Mixing rows before a rule


def nearest_mixing(g_KK: Tensor, f: int, key: int) -> Tensor:
    """Return T [K, K]: each row becomes the mean of the K - f rows nearest to it, with itself."""
    count = len(g_KK) - f
    d_KK = distances(g_KK).fill_diagonal_(-1)  # a row is nearest to itself, also among equals
    chosen = d_KK.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros_like(g_KK).scatter_(1, chosen, 1 / count)


def bucketing(g_KK: Tensor, f: int, key: int) -> Tensor:
    """Return T [J, K]: means of pairs of rows,
    in an order drawn from the stream `key`; the last may be single.
    """
    order = streams.words(torch.tensor([key]), len(g_KK))[0].argsort()
    t_JK = g_KK.new_zeros((len(g_KK) + 1) // 2, len(g_KK))
    t_JK[torch.arange(len(g_KK)) // 2, order] = 1
    return t_JK / t_JK.sum(1, keepdim=True)


# Rules of the Gram matrix: G_KK, f, radius -> w_K


def mean(g_KK: Tensor, f: int, radius: float | None) -> Tensor:
    """Weigh all alike."""
    return _mean_of(torch.arange(len(g_KK)), g_KK)


def _mean_of(chosen: Tensor, g_KK: Tensor) -> Tensor:
    """Return weights [K] of the mean of the rows `chosen`."""
    w_K = torch.zeros_like(g_KK[0])
    w_K[chosen] = 1 / len(chosen)
    return w_K


def _scores(d_KK: Tensor, f: int) -> Tensor:
    """Return each row's sum of squared distances to its K - f - 1 nearest others [K]."""
    return d_KK.sort(dim=1).values[:, : len(d_KK) - f].sum(1)


def krum(g_KK: Tensor, f: int, radius: float | None) -> Tensor:
    """Take the row that is nearest to its K - f - 1 nearest others.

    Blanchard et al. sum over K - f - 2; this is the count of Allouah et al. 2023, whose bound holds
    for it.
    """
    return _mean_of(_scores(distances(g_KK), f).argmin()[None], g_KK)


def multi_krum(g_KK: Tensor, f: int, radius: float | None) -> Tensor:
    """Average the K - f rows with the best scores of Krum."""
    return _mean_of(_scores(distances(g_KK), f).argsort(stable=True)[: len(g_KK) - f], g_KK)


def geometric_median(g_KK: Tensor, f: int, radius: float | None, steps: int = 1000) -> Tensor:
    """Minimise the sum of distances by Weiszfeld's steps, smoothed at 1e-6 of the rows' spread, or
    at `radius` of it.

    A larger radius is for a noised matrix, where a distance that noise made 0 would give one row
    all the weight. Starts from the row nearest to half of the others. Rows 10^6 spreads away are
    drawn in to there, where their pull is the same to 1e-6: so a row of 1e30 costs neither digits
    nor steps.
    """
    near_K = _rank(g_KK)
    c = int(near_K.argmin())
    spread = float(near_K[c].sqrt()) or float(distances(g_KK)[c].max().sqrt())
    if spread == 0:
        return mean(g_KK, f, radius)
    b_KK = _center_on(g_KK, c)
    in_K = (_FAR * spread / b_KK.diagonal().clamp(min=0).sqrt()).clamp(max=1)
    b_KK = b_KK * in_K * in_K[:, None]
    w_K = torch.zeros_like(near_K)
    w_K[c] = 1

    for _ in range(steps):
        pull_K = 1 / _from_point(b_KK, w_K).clamp(min=(radius or 1e-6) * spread)
        before_K = w_K
        w_K = pull_K / pull_K.sum()
        step_K = w_K - before_K
        if float(step_K @ b_KK @ step_K) <= (1e-9 * spread) ** 2:
            break

    w_K = w_K * in_K
    w_K[c] += 1 - w_K.sum()  # what was drawn in lies on the way to row c
    return w_K


def _center_on(g_KK: Tensor, c: int) -> Tensor:
    """Return the Gram matrix of the rows less row c."""
    return g_KK - g_KK[c] - g_KK[:, c : c + 1] + g_KK[c, c]


def _from_point(b_KK: Tensor, w_K: Tensor) -> Tensor:
    """Return each row's distance [K] from the point w X."""
    product_K = b_KK @ w_K
    return (b_KK.diagonal() - 2 * product_K + w_K @ product_K).clamp(min=0).sqrt()


def centred_clipping(g_KK: Tensor, f: int, radius: float | None, steps: int = 3) -> Tensor:
    """Start at the reference;
    step by the mean of the rows' differences from there, each clipped to `radius`.

    One liar moves each step by at most radius / K. Without a radius: the rows' median distance from
    the reference.
    """
    count = len(g_KK) - 1
    b_KK = _center_on(g_KK, count)
    w_K = torch.zeros_like(g_KK[0])
    w_K[-1] = 1
    limit = float(_from_point(b_KK, w_K)[:count].median()) if radius is None else radius
    for _ in range(steps):
        clip_K = _clip(_from_point(b_KK, w_K)[:count], limit)
        w_K = w_K * (1 - clip_K.mean())
        w_K[:count] += clip_K / count
    return w_K


def _clip(norm_K: Tensor, radius: float) -> Tensor:
    """Return the factors [K] that bring norms to at most `radius`."""
    return torch.where(norm_K > radius, radius / norm_K, torch.ones_like(norm_K))


def norm_clipping(g_KK: Tensor, f: int, radius: float | None) -> Tensor:
    """Average the rows, each clipped to norm `radius`, or to their median norm; what is clipped
    away counts as 0.
    """
    norm_K = g_KK.diagonal().clamp(min=0).sqrt()
    return _clip(norm_K, float(norm_K.median()) if radius is None else radius) / len(g_KK)


def fltrust(g_KK: Tensor, f: int, radius: float | None) -> Tensor:
    """Average the rows at the reference's norm, each by its cosine with the reference, none where
    that is negative.

    Where no row points the reference's way the reference is taken.
    """
    norm_K = g_KK.diagonal().clamp(min=0).sqrt()
    scale_K = norm_K[-1] / norm_K
    cosine_K = torch.where(
        norm_K * norm_K[-1] > 0, g_KK[-1] / (norm_K * norm_K[-1]), torch.zeros_like(norm_K)
    )
    trust_K = cosine_K.clamp(0, 1)
    trust_K[-1] = 0
    if not trust_K.sum() > 0:
        return torch.zeros_like(norm_K).index_fill_(0, torch.tensor([len(norm_K) - 1]), 1.0)
    return torch.where(trust_K > 0, trust_K * scale_K, torch.zeros_like(trust_K)) / trust_K.sum()


def minimum_diameter(g_KK: Tensor, f: int, radius: float | None) -> Tensor:
    """Average the K - f rows whose largest distance is least; of several such sets, the one of
    least total distance.

    Exact: bisects over the distances, asking whether f rows can be left out so that no pair is
    farther apart.
    """
    if f > _REMOVED:
        raise PlanError(
            f"max_malicious: minimum-diameter leaves out f={f} rows; expected at most "
            f"{_REMOVED}, as it looks at up to 2^f sets. Set "
            "robustness.rule='nnm+geometric-median'."
        )

    d_KK = distances(g_KK)
    levels = torch.unique(d_KK)

    low = 0
    high = len(levels) - 1
    while low < high:
        middle = (low + high) // 2
        if next(_covers(d_KK > levels[middle], f), None) is None:
            low = middle + 1
        else:
            high = middle

    everyone = set(range(len(d_KK)))
    kept = [sorted(everyone - set(cover)) for cover in _covers(d_KK > levels[low], f)]
    best = min((k for k in kept), key=lambda k: (float(d_KK[k][:, k].sum()), k))

    spare = len(best) - (len(d_KK) - f)  # all distances equal, or zero: fewer than f had to go
    if spare:
        if d_KK.any():
            best = sorted(best, key=lambda i: float(d_KK[i, best].sum()))[: len(best) - spare]
        else:
            best = best

    return _mean_of(torch.tensor(best), g_KK)


def _covers(far_KK: Tensor, f: int) -> Iterator[tuple[int, ...]]:
    """Yield the sets of at most f rows without which no pair is far, by a bounded search tree."""
    links = {i: {int(j) for j in row.nonzero()} for i, row in enumerate(far_KK)}

    def search(gone: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        left = {i: far.difference(gone) for i, far in links.items() if i not in gone}
        worst = max(left, key=lambda i: len(left[i]))
        if not left[worst]:
            yield gone
        elif len(gone) < f:
            yield from search((*gone, worst))
            if 1 < len(left[worst]) <= f - len(gone) or (len(left[worst]) == 1 and len(gone) < f):
                yield from search((*gone, *left[worst]))

    return search(())


def smea(g_KK: Tensor, f: int, radius: float | None) -> Tensor:
    """Average the K - f rows whose covariance has the least largest eigenvalue,
    looking at every such set.
    """
    count = math.comb(len(g_KK), f)
    if count > _SUBSETS:
        raise PlanError(
            f"smea with n={len(g_KK)}, f={f} looks at {count} sets of rows; expected at most "
            f"{_SUBSETS}. Set robustness.rule='nnm+caf'."
        )
    kept_JK = torch.tensor(list(combinations(range(len(g_KK)), len(g_KK) - f)))
    b_JKK = g_KK[kept_JK[:, :, None], kept_JK[:, None]]
    b_JKK = b_JKK - b_JKK.mean(1, keepdim=True)
    b_JKK = b_JKK - b_JKK.mean(2, keepdim=True)
    largest_J = torch.linalg.eigvalsh(b_JKK)[:, -1]
    return _mean_of(kept_JK[largest_J.argmin()], g_KK)


def caf(g_KK: Tensor, f: int, radius: float | None) -> Tensor:
    """Weigh down what lies along the covariance's main direction until K - 2f is left;
    take the best mean met.

    With w the weights, the eigenvectors of sqrt(w) B sqrt(w) are those of the covariance, seen from
    the rows.
    """
    c_K = torch.ones_like(g_KK[0])
    best = math.inf
    best_K = c_K / len(c_K)

    while c_K.sum() > len(g_KK) - 2 * f:
        w_K = c_K / c_K.sum()
        away = torch.eye(len(g_KK), dtype=g_KK.dtype) - w_K
        b_KK = away @ g_KK @ away.T
        values, vectors = torch.linalg.eigh(b_KK * w_K.sqrt() * w_K.sqrt()[:, None])
        if values[-1] < best:
            best = float(values[-1])
            best_K = w_K
        along_K = (b_KK @ (w_K.sqrt() * vectors[:, -1])).square()
        if not along_K[w_K > 0].max() > 0:
            break
        c_K = c_K * (1 - along_K / along_K[w_K > 0].max()).clamp(min=0)

    return best_K


# Rules of the rows: row_KM, f -> row_M


def coordinate_median(row_KM: Tensor, f: int) -> Tensor:
    """Take each number's median; of an even count, the mean of the middle two."""
    return _middle(row_KM, (len(row_KM) - 1) // 2)


def trimmed_mean(row_KM: Tensor, f: int) -> Tensor:
    """Average each number without its f smallest and f largest."""
    return _middle(row_KM, f)


def _middle(row_KM: Tensor, off: int) -> Tensor:
    """Return each column's mean without its `off` smallest and largest."""
    return row_KM.sort(dim=0).values[off : len(row_KM) - off].mean(0)


def bulyan(row_KM: Tensor, f: int) -> Tensor:
    """Choose K - 2f rows by Krum, one after another;
    average each number's K - 4f values nearest to their median.
    """
    d_KK = distances(gram(blocks_of(row_KM)))
    left = list(range(len(row_KM)))
    chosen: list[int] = []
    for _ in range(len(row_KM) - 2 * f):
        best = int(_scores(d_KK[left][:, left], min(f, len(left) - 1)).argmin())
        chosen.append(left.pop(best))
    kept_KM = row_KM[chosen]
    off_KM = (kept_KM - coordinate_median(kept_KM, f)).abs()
    return kept_KM.gather(0, off_KM.argsort(dim=0, stable=True)[: len(chosen) - 2 * f]).mean(0)


# Names

Needs = Literal["gram", "reference", "rows"]
Kappa = Callable[[int, int], float]  # n, f -> kappa


@dataclass(frozen=True)
class Mixing:
    """A step before a rule: G_KK, f, key -> T_JK whose rows sum to 1; `size` rows become one."""

    matrix: Callable[[Tensor, int, int], Tensor]
    size: int
    paper: str
    mixes_most: bool = False  # each row becomes a mean over all but f


@dataclass(frozen=True)
class GramRule:
    """A rule of the Gram matrix; from a share `breakdown` of liars on it promises nothing."""

    weigh: Callable[[Tensor, int, float | None], Tensor]
    smallest_n: Callable[[int], int]
    breakdown: float
    paper: str
    needs: Needs = "gram"
    kappa: Kappa | None = None
    one_row: bool = False  # it may give all weight, or nearly all, to one row


@dataclass(frozen=True)
class RowRule:
    """A rule of the rows themselves, coordinate by coordinate."""

    fold: Callable[[Tensor, int], Tensor]
    smallest_n: Callable[[int], int]
    breakdown: float
    paper: str
    needs: Needs = "rows"
    kappa: Kappa | None = None


def _majority(f: int) -> int:
    return 2 * f + 1


def _any(f: int) -> int:
    return 1


def _ratio(n: int, f: int) -> float:
    return 1 + f / (n - 2 * f)


MIXINGS: dict[str, Mixing] = {
    "nnm": Mixing(nearest_mixing, 1, "Allouah et al. 2023, arXiv:2302.01772", mixes_most=True),
    "bucketing": Mixing(bucketing, 2, "Karimireddy et al. 2022, arXiv:2006.09365"),
}
"""Steps before a rule, by name."""

ALONE: dict[str, GramRule | RowRule] = {
    "mean": GramRule(mean, _any, 0.0, "McMahan et al. 2017, arXiv:1602.05629"),
    "krum": GramRule(
        krum,
        lambda f: 2 * f + 3,
        0.5,
        "Blanchard et al. 2017, arXiv:1703.02757",
        kappa=lambda n, f: 6 * _ratio(n, f),
        one_row=True,
    ),
    "multi-krum": GramRule(
        multi_krum, lambda f: 2 * f + 3, 0.5, "Blanchard et al. 2017, arXiv:1703.02757"
    ),
    "geometric-median": GramRule(
        geometric_median,
        _majority,
        0.5,
        "Pillutla et al. 2022, arXiv:1912.13445",
        kappa=lambda n, f: 4 * _ratio(n, f) ** 2,
        one_row=True,
    ),
    "centred-clipping": GramRule(
        centred_clipping, _majority, 0.5, "Karimireddy et al. 2021, arXiv:2012.10333", "reference"
    ),
    "norm-clipping": GramRule(norm_clipping, _majority, 0.5, "Sun et al. 2019, arXiv:1911.07963"),
    "fltrust": GramRule(fltrust, _any, 1.0, "Cao et al. 2021, arXiv:2012.13995", "reference"),
    "minimum-diameter": GramRule(
        minimum_diameter, _majority, 0.5, "El Mhamdi et al. 2018, arXiv:1802.07927"
    ),
    "smea": GramRule(smea, _majority, 0.5, "Allouah et al. 2023, arXiv:2302.04787"),
    "caf": GramRule(caf, _majority, 0.5, "Allouah et al. 2025, arXiv:2505.01874", one_row=True),
    "coordinate-median": RowRule(
        coordinate_median,
        _majority,
        0.5,
        "Yin et al. 2018, arXiv:1803.01498",
        kappa=lambda n, f: 4 * _ratio(n, f) ** 2,
    ),
    "trimmed-mean": RowRule(
        trimmed_mean,
        _majority,
        0.5,
        "Yin et al. 2018, arXiv:1803.01498",
        kappa=lambda n, f: 6 * f / (n - 2 * f) * _ratio(n, f),
    ),
    "bulyan": RowRule(bulyan, lambda f: 4 * f + 3, 0.25, "El Mhamdi et al. 2018, arXiv:1802.07927"),
}
"""Rules that a name ends with. The bounds kappa are those of Allouah et al.
2023, arXiv:2302.01772, table 1.
"""


@dataclass(frozen=True)
class RobustRule:
    """A rule for f liars: G_KK -> w_K, so that the combined row is w X.

    The weights sum to 1, but for norm-clipping and fltrust, which shrink or stretch rows. Where
    `needs` is "reference" G is [K+1, K+1], the reference last, and so are the weights. `kappa`
    bounds |combined - mean(H)|^2 by kappa times the mean of |x_i - mean(H)|^2 over i in H, for
    every set H of n - f rows and whatever the others are.
    """

    name: str
    f: int
    mixings: tuple[Mixing, ...]
    last: GramRule | RowRule
    radius: float | None = None

    @property
    def needs(self) -> Needs:
        """What the rule reads: the Gram matrix, also a reference row, or rows in plain sight."""
        return self.last.needs

    @property
    def weighs_few_rows(self) -> bool:
        """Whether all weight, or nearly all, may lie on one client's row, or on one bucket of two,
        so that their sum would be read.
        """
        return (
            isinstance(self.last, GramRule)
            and self.last.one_row
            and not any(m.mixes_most for m in self.mixings)
        )

    @property
    def papers(self) -> tuple[str, ...]:
        """Where each part comes from, in the order of the name."""
        return (*(mixing.paper for mixing in self.mixings), self.last.paper)

    @property
    def breakdown(self) -> float:
        """The share of liars from which on nothing is promised."""
        share = self.last.breakdown
        for mixing in reversed(self.mixings):
            share = min(share, 0.5) / mixing.size
        return share

    def smallest_n(self, f: int | None = None) -> int:
        """Return how many rows it takes to bear f liars, by default its own."""
        f = self.f if f is None else f
        n = self.last.smallest_n(f)
        for mixing in reversed(self.mixings):
            n = max(mixing.size * (n - 1) + 1, 2 * f + 1)
        return n

    def kappa(self, n: int) -> float | None:
        """Return the proved bound for n rows, or None where the papers named here give none."""
        if self.last.kappa is None or any(mixing.size > 1 for mixing in self.mixings):
            return None
        bound = self.last.kappa(n, self.f)
        for _ in self.mixings:
            bound = 8 * self.f / (n - self.f) * (bound + 1)  # arXiv:2302.01772, lemma 1
        return bound

    def check(self, n: int) -> None:
        """Raise PlanError where n rows are too few."""
        if n < self.smallest_n():
            raise PlanError(
                f"robustness.rule={self.name!r} with n={n} clients, f={self.f} of them "
                f"malicious: expected n >= {self.smallest_n()}. Enrol more clients, or set a "
                "lower robustness.max_malicious."
            )

    def __call__(self, gram_KK: Tensor, key: int = 0) -> Tensor:
        """Return the weights [K] (float64); bucketing draws its pairs from the stream `key`, a new
        one each round.
        """
        if isinstance(self.last, RowRule):
            raise PlanError(
                f"robustness.rule={self.name!r} works coordinate by coordinate and needs every "
                "row in plain sight; only the Gram matrix is at hand. Set "
                "robustness.rule='nnm+geometric-median'."
            )
        g_KK = self._check_gram(gram_KK)
        t_JK, g_JJ = self._mix(g_KK, key)
        return t_JK.T @ self.last.weigh(g_JJ, self.f, self.radius)

    def combine(self, row_KM: Tensor, key: int = 0) -> Tensor:
        """Return the combined row [M] of rows in plain sight; a reference, if the rule needs one,
        is the last row.
        """
        if isinstance(self.last, GramRule):
            return weigh(blocks_of(row_KM), self(gram(blocks_of(row_KM)), key))
        self.check(len(row_KM))
        if not self.mixings:
            return self.last.fold(row_KM, self.f)
        t_JK, _ = self._mix(self._check_gram(gram(blocks_of(row_KM))), key)
        return self.last.fold(t_JK.to(row_KM.dtype) @ row_KM, self.f)

    def _check_gram(self, gram_KK: Tensor) -> Tensor:
        if gram_KK.ndim != 2 or gram_KK.shape[0] != gram_KK.shape[1]:
            raise DataError(
                f"gram of shape {tuple(gram_KK.shape)}: expected [K, K]. Pass "
                "gram(blocks_of(rows))."
            )
        self.check(len(gram_KK) - (self.needs == "reference"))
        g_KK = gram_KK.double()
        bad = ~g_KK.diagonal().isfinite()
        if bad.any() or not g_KK.isfinite().all():
            which = bad.nonzero().flatten().tolist() or "none on the diagonal"
            raise DataError(
                f"the Gram matrix is not finite (rows {which}): expected finite rows. Leave "
                "those out before the rule."
            )
        return (g_KK + g_KK.T) / 2

    def _mix(self, g_KK: Tensor, key: int) -> tuple[Tensor, Tensor]:
        """Return all mixings as one matrix T_JK, and the Gram matrix of T X;
        a reference stays itself.
        """
        t_JK = torch.eye(len(g_KK), dtype=torch.float64)
        kept = int(self.needs == "reference")
        for mixing in self.mixings:
            n = len(g_KK) - kept
            mixed = mixing.matrix(g_KK[:n, :n], self.f, key)
            step = mixed.new_zeros(len(mixed) + kept, len(g_KK))
            step[: len(mixed), :n] = mixed
            step[len(mixed) :, n:] = 1
            t_JK = step @ t_JK
            g_KK = step @ g_KK @ step.T
        return t_JK, g_KK


def rule_of(name: str, f: int = 0, *, radius: float | None = None) -> RobustRule:
    """Return the rule of a name such as "krum",
    "nnm+geometric-median" or "bucketing+krum", for f liars.

    `radius` is the clipping norm of centred-clipping and norm-clipping, without one a median (see
    there); of the geometric median its smoothing.

    Raises PlanError for a name that is not known or does not compose, f < 0, or a radius that is no
    positive number.
    """
    *before, last = name.split("+")
    for part in before:
        if part not in MIXINGS:
            raise PlanError(
                f"robustness.rule={name!r}: {part!r} is no step before a rule; "
                f"{nearest(part, MIXINGS)} Write nnm+geometric-median, say."
            )

    if last not in ALONE:
        more = ""
        if last in MIXINGS:
            more = " A mixing needs a rule after it: write nnm+geometric-median, say."
        raise PlanError(
            f"robustness.rule={name!r}: {last!r} is no rule; {nearest(last, ALONE)}{more}"
        )

    if f < 0:
        raise PlanError(
            f"f={f}: expected 0 or more liars. Set robustness.max_malicious from 0 to below 0.5."
        )
    if radius is not None and not 0 < radius < math.inf:
        raise PlanError(
            f"radius={radius}: expected a number above 0. Set it to a public bound on an honest "
            "row's norm."
        )

    return RobustRule(name, f, tuple(MIXINGS[part] for part in before), ALONE[last], radius)


RULES: dict[str, RobustRule | None] = {"mean": None}
"""What a study's rule is without f. None takes the clients' public weights and needs no Gram
matrix: breakdown 0.
"""
