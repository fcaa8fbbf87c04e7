"""How far each client's row of one round lies from the others',
read from the rows' Gram matrix alone.

One unit for all evidence: a client three times as far out as the median scores `TOLERATED`,
whatever the measure. That is how odd an honest hospital with unusual patients may be, round after
round; `reputation` adds up what lies above. A score is evidence and no proof: a row may be odd
because its patients are.

K clients; G_KK = X X^T is the Gram matrix of their rows, perhaps with noise on its entries.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medfed.core.checks import PlanError

TOLERATED = 2.5
"""The score of an honest client that is odd for good:
three times the median distance, norm or closeness.
"""

SURE = 10.0
"""The largest score, and that of a row that could not be used at all."""

NOTED = 2.0
"""Findings below this score are not told."""

_LOG_UNIT = math.log(3) / TOLERATED
# an honest row drawn at right angles to a centre that the others follow at 45 degrees
_COS_UNIT = 0.7 / TOLERATED
_ROUNDING = 1e-6  # of a squared norm: where float32 rows still differ

INCONCLUSIVE = frozenset({"alike", "small"})
"""Kinds that accuse an honest client as easily:
the victim of a mimic, a site that has nothing left to learn.
"""


@dataclass(frozen=True)
class Finding:
    """What one round says against one client. kind: far, turned, large, small, alike or refused."""

    client: str
    score: float
    kind: str
    evidence: str

    def __post_init__(self) -> None:
        if not 0 <= self.score <= SURE:  # NaN fails too
            raise PlanError(
                f"score={self.score} of {self.client!r}; expected 0 to {SURE:g}. Clamp the score."
            )


@dataclass(frozen=True)
class _Measured:
    """One measure of all rows: its value beside the others' median, and what that scores."""

    kind: str
    value_K: Tensor
    usual: float
    score_K: Tensor

    def words(self, k: int, dense: int) -> str:
        value = float(self.value_K[k])
        usual = self.usual
        if self.kind == "turned":
            return (
                f"cosine {value:.2f} to the centre of the densest {dense} rows; the median is "
                f"{usual:.2f}"
            )
        if self.kind == "alike":
            return f"{value / usual:.2g} times the median distance from its nearest row"
        if self.kind == "far":
            return (
                f"{value / usual:.2g} times the median distance from the centre of the densest "
                f"{dense} rows"
            )
        return f"{value / usual:.2g} times the median length"


def suspicion(gram_KK: Tensor, f: int, noise: float = 0.0) -> Tensor:
    """Return each client's score [K] in 0 .. SURE:
    the strongest of all evidence against it in this round.

    f of the K rows may lie. noise: the standard deviation of the noise on each entry of gram_KK,
    which then need not be positive semidefinite; what noise alone would show scores low. A row
    whose entries are not finite scores SURE. Fewer than three usable rows score 0: there is nothing
    to compare. Rows may be permuted, rotated or all scaled alike.

    Raises PlanError unless gram_KK is square, 0 <= f < K/2 and noise is finite and not negative.
    """
    usable_K, measures = _measure(gram_KK, f, noise)
    score_K = torch.full((len(gram_KK),), SURE, dtype=torch.float64)
    score_K[usable_K] = torch.stack([m.score_K for m in measures]).amax(0) if measures else 0.0
    return score_K


def inspect(
    clients: Sequence[str],
    gram_KK: Tensor,
    f: int,
    noise: float = 0.0,
    refused: Mapping[str, str] | None = None,
) -> tuple[Finding, ...]:
    """Return what a round says against its clients, in their order:
    every measure that scores NOTED or more.

    clients: the names of gram_KK's rows. refused: clients without a row there, and why (out of
    range, unsigned, not a number); each is a finding of score SURE. For f and noise see
    `suspicion`. Raises PlanError where names do not fit.
    """
    refused = refused or {}
    if (
        len(set(clients)) != len(gram_KK)
        or len(clients) != len(gram_KK)
        or refused.keys() & set(clients)
    ):
        raise PlanError(
            f"clients={list(clients)} for {len(gram_KK)} rows, refused={sorted(refused)}; "
            "expected one name a row, each once, and no refused client among them. Name the "
            "rows."
        )

    usable_K, measures = _measure(gram_KK, f, noise)
    row_of = {int(k): i for i, k in enumerate(usable_K.nonzero())}
    dense = len(row_of) - max(0, f - (len(clients) - len(row_of)))
    found: list[Finding] = []

    for k, client in enumerate(clients):
        if k not in row_of:
            found.append(Finding(client, SURE, "refused", "its row is not finite"))
            continue
        i = row_of[k]
        for m in measures:
            if (score := float(m.score_K[i])) >= NOTED:
                found.append(Finding(client, score, m.kind, m.words(i, dense)))

    return (
        *found,
        *(Finding(client, SURE, "refused", reason) for client, reason in refused.items()),
    )


def _measure(gram_KK: Tensor, f: int, noise: float) -> tuple[Tensor, list[_Measured]]:
    """Return which rows [K] can be used, and the measures of those."""
    K = len(gram_KK)
    if gram_KK.shape != (K, K):
        raise PlanError(
            f"gram has shape {tuple(gram_KK.shape)}; expected one row and column a client. Pass "
            "X @ X.T."
        )
    if not 0 <= 2 * f < max(K, 1):
        raise PlanError(
            f"f={f} liars of {K} clients; expected 0 <= f and at least {2 * f + 1} clients. "
            "Lower robustness.max_malicious or enrol more clients."
        )
    if not (math.isfinite(noise) and noise >= 0):
        raise PlanError(
            f"noise={noise}: expected a finite standard deviation of 0 or more. Pass what the "
            "plan adds."
        )
    gram_KK = gram_KK.double()
    usable_K = gram_KK.diagonal().isfinite()
    usable_K &= (gram_KK.isfinite() | ~usable_K).all(1)
    rest_KK = gram_KK[usable_K][:, usable_K]
    if len(rest_KK) < 3:
        return usable_K, []
    # a row that is out lies already
    return usable_K, _measures(rest_KK, max(0, f - int((~usable_K).sum())), noise)


def _measures(G_KK: Tensor, f: int, noise: float) -> list[_Measured]:
    xx_K = G_KK.diagonal()
    # most rows are zero: nobody stands out by not being
    if float(xx_K.median()) <= 0 and noise == 0:
        return []
    D_KK = (xx_K[:, None] + xx_K - 2 * G_KK).clamp(min=0)
    inside_K = _densest(D_KK, len(G_KK) - f)
    # each client's centre leaves its own row out
    w_KK = inside_K.double().repeat(len(G_KK), 1).fill_diagonal_(0)
    m = float(w_KK.sum(1).min())
    w_KK /= w_KK.sum(1, keepdim=True)
    xc_K = (w_KK * G_KK).sum(1)
    cc_K = (w_KK @ G_KK * w_KK).sum(1)
    nearest_K = (
        D_KK + torch.full_like(xx_K, math.inf).diag().nan_to_num(0.0, posinf=math.inf)
    ).amin(1)
    rounding_K = _ROUNDING * xx_K.abs()

    far_K = xx_K - 2 * xc_K + cc_K
    far, far_score_K = _log_score(
        far_K, noise * math.sqrt(1 + 4 / m + 2 / m**2), float(rounding_K.median())
    )
    length, large_score_K = _log_score(xx_K, noise, 0.0)
    near, near_score_K = _log_score(nearest_K, noise * math.sqrt(6), float(rounding_K.median()))
    cos_K = (
        xc_K
        / (xx_K.clamp(min=max(noise, 1e-300)) * cc_K.clamp(min=max(noise * 1.5 / m, 1e-300))).sqrt()
    )
    # a zero row points nowhere
    cos_K = torch.where(xx_K > max(noise, 0.0), cos_K.clamp(-1, 1), cos_K.median())
    blur = (
        noise
        / math.sqrt(m)
        / math.sqrt(max(float(xx_K.median()), noise, 1e-300) * max(float(cc_K.median()), 1e-300))
    )
    turned_score_K = (cos_K.median() - cos_K) / math.hypot(max(_COS_UNIT, _mad(cos_K)), blur)

    def measure(kind: str, value_K: Tensor, usual: float, score_K: Tensor) -> _Measured:
        return _Measured(kind, value_K, usual, score_K.clamp(0, SURE))

    return [
        measure("far", far_K.clamp(min=0).sqrt(), far, far_score_K),
        measure("turned", cos_K, float(cos_K.median()), turned_score_K),
        measure("large", xx_K.clamp(min=0).sqrt(), length, large_score_K),
        measure("small", xx_K.clamp(min=0).sqrt(), length, -large_score_K),
        measure("alike", nearest_K.sqrt(), near, -near_score_K),
    ]


def _densest(D_KK: Tensor, count: int) -> Tensor:
    """Say who [K] belongs to the `count` rows nearest to the row that has `count` rows nearest to
    it (itself among them): the centre that nearest-neighbour mixing (Allouah et al. 2023) and Krum
    (Blanchard et al. 2017) look for."""
    near_KC, index_KC = D_KK.sort(dim=1)
    medoid = int(near_KC[:, :count].sum(1).argmin())
    inside_K = torch.zeros(len(D_KK), dtype=torch.bool)
    inside_K[index_KC[medoid, :count]] = True
    return inside_K


def _log_score(square_K: Tensor, noise: float, rounding: float) -> tuple[float, Tensor]:
    """Return the median's root,
    and how many units [K] each root lies above it on the logarithmic scale.

    The unit widens with the round's own spread (MAD) and with the noise on the squares; nothing is
    read below either noise or rounding.
    """
    least = max(noise, rounding)
    usual = max(float(square_K.median()), least)
    if usual <= 0:
        return 1.0, torch.zeros_like(square_K)
    log_K = 0.5 * (square_K.clamp(min=max(least, usual * 1e-12)) / usual).log()
    return math.sqrt(usual), log_K / math.hypot(max(_LOG_UNIT, _mad(log_K)), noise / (2 * usual))


def _mad(value_K: Tensor) -> float:
    """Return the median absolute deviation, scaled to a normal's standard deviation."""
    return 1.4826 * float((value_K - value_K.median()).abs().median())
