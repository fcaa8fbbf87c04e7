"""What an attacker measures: canaries in one run,
membership over many retrains, and inversion of a gradient.

A claim is an upper bound on epsilon, proved; an audit is a lower bound, measured. A lower bound
above the claim proves a bug; one below it proves little. The one-run audit finds gross bugs (no
noise, no clipping, the same noise in every round). At epsilon 1, half the noise would need over
10,000 canaries: that bug is for a test of the noise's variance.

Nothing here trains: callers bring what was released, and the coins they tossed before training.

M canaries or examples, T rounds, P parameters, R retrains, N = R M pooled scores, J directions that
the canaries span, O outputs and I inputs of a Linear layer.
"""

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from scipy import special, stats

from medfed.core.checks import PlanError
from medfed.core.types import JSON

_BLOCK = 1 << 14  # columns turned to float64 at once
_TINY = 1e-300


@dataclass(frozen=True)
class Part:
    """One part of an audit: what is claimed, what was measured, what it would have found.

    `passed` is None where it could not have told.
    """

    name: str
    claimed: str
    measured: str
    told: str
    passed: bool | None
    figures: JSON
    power: str = "-"

    def to_json(self) -> JSON:
        """Return every field, the figures beside them."""
        return {
            **self.figures,
            **{name: value for name, value in vars(self).items() if name != "figures"},
        }


# One run: as many coins as canaries (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846)


@dataclass(frozen=True)
class Verdict:
    """One audit beside its claim:
    `refuted` is the largest epsilon that the attack rules out at `confidence`.

    The claim (`epsilon`, `delta`) is broken where `refuted` lies above it. `epsilon` None claims
    nothing. The counts are None for attacks without canaries.
    """

    name: str
    epsilon: float | None
    delta: float
    refuted: float
    confidence: float
    canaries: int | None = None
    guesses: int | None = None
    correct: int | None = None
    notes: str = ""

    @property
    def passed(self) -> bool:
        """Whether the measured lower bound leaves the claim standing."""
        return self.epsilon is None or self.refuted <= self.epsilon

    def to_json(self) -> JSON:
        """Return every field, and whether the audit passed."""
        return {**asdict(self), "passed": self.passed}


def p_value(correct: int, epsilon: float, guesses: int, canaries: int, delta: float) -> float:
    """Bound the chance of `correct` or more right guesses under (epsilon, delta)-DP, add/remove.

    Each of the canaries was in by a fair coin of its own. Steinke et al. 2023.
    """
    # randomised response is right this often, and nothing private is more often
    likely = special.expit(epsilon)
    chance = float(stats.binom.sf(correct - 1, guesses, likely))
    # P[correct - i <= B < correct]
    below = np.cumsum(stats.binom.pmf(np.arange(correct - 1, -1, -1), guesses, likely))
    worst = float(np.max(below / np.arange(1, correct + 1), initial=0.0))
    return min(1.0, chance + 2 * canaries * delta * worst)


def refuting_epsilon(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95
) -> float:
    """Return the largest epsilon that `correct` right guesses refute at `confidence`;
    0 where they refute none.

    A mechanism that is (epsilon, delta)-DP gives a larger answer than epsilon with probability 1 -
    confidence at most. Errors: PlanError unless 0 <= correct <= guesses <= canaries, 0 <= delta < 1
    and 0.5 <= confidence < 1.
    """
    _check(guesses, canaries, delta, confidence)
    if not 0 <= correct <= guesses:
        raise PlanError(
            f"correct={correct}; expected 0 to guesses={guesses}. Count only the guesses that "
            "were made."
        )

    def refutes(epsilon: float) -> bool:
        return p_value(correct, epsilon, guesses, canaries, delta) <= 1 - confidence

    low = 0.0
    high = 1.0
    if not refutes(low):
        return 0.0
    while refutes(high):
        low = high
        high = 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        if refutes(middle):
            low = middle
        else:
            high = middle
    return low


def correct_to_refute(
    epsilon: float, guesses: int, canaries: int, delta: float, confidence: float = 0.95
) -> int | None:
    """Return how many right guesses refute `epsilon` at `confidence`;
    None where even all of them would not.
    """
    _check(guesses, canaries, delta, confidence)
    counts = range(guesses + 1)
    least = bisect_left(
        counts, True, key=lambda c: p_value(c, epsilon, guesses, canaries, delta) <= 1 - confidence
    )
    if least in counts:
        return least
    return None


def guess(scores_M: np.ndarray, in_M: np.ndarray, guesses: int) -> tuple[int, int]:
    """Call the highest scores in and the lowest out,
    half of `guesses` each, and return (correct, guesses).

    The middle is not guessed. `guesses` must be fixed before the coins are seen: the bound holds
    for one number, and the best of several is right too often by selection alone (for several
    attackers see `best_of`). Ties are ordered by a fixed shuffle, because an order of the caller's
    could tell who is in.
    """
    if not 1 <= guesses <= len(in_M) or len(scores_M) != len(in_M) or np.isnan(scores_M).any():
        raise PlanError(
            f"guesses={guesses} of {len(scores_M)} scores for {len(in_M)} canaries; expected at "
            "most one guess for each canary and a score without NaN for each. Set more canaries "
            "or fewer guesses."
        )

    shuffle = np.random.default_rng(0).permutation(len(in_M))
    in_order = np.asarray(in_M, dtype=bool)[
        shuffle[np.argsort(np.asarray(scores_M)[shuffle], kind="stable")]
    ]
    out = guesses // 2

    return int((~in_order[:out]).sum() + in_order[len(in_M) - (guesses - out) :].sum()), guesses


def best_of(
    tries: Sequence[tuple[int, int]], canaries: int, delta: float, confidence: float = 0.95
) -> tuple[float, int]:
    """Return the largest epsilon that any of several attackers' (correct, guesses) refutes, and
    that attacker's number.

    Each is judged at 1 - (1 - confidence)/len(tries), so that together they err as rarely as one
    (Bonferroni).
    """
    each = 1 - (1 - confidence) / len(tries)
    refuted = [
        refuting_epsilon(correct, guesses, canaries, delta, each) for correct, guesses in tries
    ]
    best = int(np.argmax(refuted))
    return refuted[best], best


def one_run(
    scores: Mapping[str, np.ndarray],
    in_M: np.ndarray,
    guesses: int,
    epsilon: float | None,
    delta: float,
    confidence: float = 0.95,
) -> Verdict:
    """Judge a claim by each attacker's scores [M] of canaries that were `in_M` by fair coins tossed
    before training.

    Leave a fifth of the canaries or more without a guess: the coins seldom fall half and half.
    Errors: PlanError where the claim would pass even if every guess were right.
    """
    each = 1 - (1 - confidence) / len(scores)
    if epsilon is not None and correct_to_refute(epsilon, guesses, len(in_M), delta, each) is None:
        raise PlanError(
            f"guesses={guesses} cannot refute epsilon={epsilon:g} at confidence {confidence:g} "
            "even if all are right. Plan more canaries and guesses."
        )

    tries = [guess(scores_M, in_M, guesses) for scores_M in scores.values()]
    refuted, best = best_of(tries, len(in_M), delta, confidence)
    notes = f"best of {len(scores)} attackers: {list(scores)[best]}"

    return Verdict(
        "one run", epsilon, delta, refuted, confidence, len(in_M), guesses, tries[best][0], notes
    )


def _check(guesses: int, canaries: int, delta: float, confidence: float) -> None:
    if not (0 <= guesses <= canaries and 0 <= delta < 1 and 0.5 <= confidence < 1):
        raise PlanError(
            f"guesses={guesses}, canaries={canaries}, delta={delta:g}, "
            f"confidence={confidence:g}; expected 0 <= guesses <= canaries, 0 <= delta < 1 and "
            "0.5 <= confidence < 1. Set them within these."
        )


# Linear reconstruction: which canaries are in a released sum


class CoinEvidence:
    """What T releases tell of M coins b:
    the normal equations of residual_t = sum_i b_i gradient_ti + noise_t.

    A residual [P] is the released sum less the sum without canaries; gradients [M, P] are the
    clipped rows that the canaries would have added (under Poisson sampling times its rate). Where
    noise differs between rounds, divide both by the round's standard deviation. Canaries are told
    apart only where they span M directions over all rounds: where gradients hardly turn, plan no
    more canaries than the model has parameters.

    `add` may be called as the rounds go by: kept are one mean [M, P], of the gradients' own type,
    and the Gram matrix [M, M] of the gradients less that mean (Welford's update, so that noise
    shared by all rounds leaves no trace).
    """

    def __init__(self) -> None:
        self._rounds = 0
        self._square = 0.0

    def add(self, residual_P: np.ndarray, gradient_MP: np.ndarray) -> None:
        """Take in one round."""
        if self._rounds == 0:
            canaries, width = gradient_MP.shape
            self._gram_MM = np.zeros((canaries, canaries))
            self._moment_M = np.zeros(canaries)
            self._gradient_MP = np.zeros_like(gradient_MP)
            self._residual_P = np.zeros(width)

        if (
            gradient_MP.shape != self._gradient_MP.shape
            or residual_P.shape != self._residual_P.shape
        ):
            raise ValueError(
                f"residual {residual_P.shape}, gradients {gradient_MP.shape}; expected "
                f"{self._residual_P.shape}, {self._gradient_MP.shape} as in the first round"
            )

        self._rounds += 1
        share = 1 / self._rounds
        for columns in _blocks(len(residual_P)):
            step_MB = gradient_MP[:, columns].astype(np.float64) - self._gradient_MP[:, columns]
            step_B = residual_P[columns].astype(np.float64) - self._residual_P[columns]
            self._gram_MM += (1 - share) * (step_MB @ step_MB.T)
            self._moment_M += (1 - share) * (step_MB @ step_B)
            self._square += (1 - share) * float(step_B @ step_B)
            self._gradient_MP[:, columns] += share * step_MB
            self._residual_P[columns] += share * step_B

    def scores(self) -> np.ndarray:
        """Return estimates [M] of b - 1/2, if every round had noise of its own."""
        gram_MM = self._gram_MM.copy()
        moment_M = self._moment_M.copy()
        for columns in _blocks(len(self._residual_P)):
            mean_MB = self._gradient_MP[:, columns].astype(np.float64)
            gram_MM += self._rounds * (mean_MB @ mean_MB.T)
            moment_M += self._rounds * (mean_MB @ self._residual_P[columns])
        square = self._square + self._rounds * float(self._residual_P @ self._residual_P)
        return _ridge(gram_MM, moment_M, square, self._rounds * len(self._residual_P))

    def scores_common_noise(self) -> np.ndarray:
        """Return estimates [M] of b - 1/2, if all rounds had one noise:
        what is left of it less the mean is none.

        It lives from gradients that change between rounds; where they do not, it knows nothing.
        """
        return _ridge(
            self._gram_MM, self._moment_M, self._square, (self._rounds - 1) * len(self._residual_P)
        )


def canary_scores(
    residual_TP: Iterable[np.ndarray], gradient_TMP: Iterable[np.ndarray]
) -> np.ndarray:
    """Return estimates [M] of b - 1/2, up to scale,
    from a residual [P] and gradients [M, P] of each round.

    Ridge regression of the residuals on the gradients: of linear estimates the nearest, where noise
    is white. See `CoinEvidence` for both arguments.
    """
    return _evidence(residual_TP, gradient_TMP).scores()


def canary_scores_common_noise(
    residual_TP: Iterable[np.ndarray], gradient_TMP: Iterable[np.ndarray]
) -> np.ndarray:
    """Return the same estimates [M] after taking the mean over rounds from both:
    exact where noise was reused.
    """
    return _evidence(residual_TP, gradient_TMP).scores_common_noise()


def _evidence(
    residual_TP: Iterable[np.ndarray], gradient_TMP: Iterable[np.ndarray]
) -> CoinEvidence:
    evidence = CoinEvidence()
    for residual_P, gradient_MP in zip(residual_TP, gradient_TMP, strict=True):
        evidence.add(residual_P, gradient_MP)
    return evidence


def _blocks(width: int) -> list[slice]:
    return [slice(start, start + _BLOCK) for start in range(0, width, _BLOCK)]


def _ridge(gram_MM: np.ndarray, moment_M: np.ndarray, square: float, observed: int) -> np.ndarray:
    """Return the posterior mean of b - 1/2,
    its prior white and the ridge the likeliest for what was observed.

    `square` is the sum of squares of the `observed` residuals. Along eigenvector j with eigenvalue
    l_j they have variance s^2 (l_j + ridge), everywhere else s^2 ridge, s^2 profiled out. The
    likelihood looks at what was released and never at the coins, so that choosing by it is part of
    the attack and costs no confidence.
    """
    value_J, vector_MJ = np.linalg.eigh(gram_MM)
    kept = value_J > len(value_J) * np.finfo(np.float64).eps * max(value_J[-1], _TINY)
    if not kept.any():
        return np.zeros_like(moment_M)
    value_J = value_J[kept]
    vector_MJ = vector_MJ[:, kept]
    y_J = vector_MJ.T @ (moment_M - gram_MM.sum(1) / 2) / np.sqrt(value_J)
    elsewhere = max(square - moment_M.sum() + gram_MM.sum() / 4 - float(y_J @ y_J), 0.0)
    ridge_L = value_J[-1] * np.logspace(-12, 6, 73)
    variance_LJ = value_J + ridge_L[:, None]
    scale_L = (y_J**2 / variance_LJ).sum(1) + elsewhere / ridge_L + _TINY
    misfit_L = (
        observed * np.log(scale_L)
        + np.log(variance_LJ).sum(1)
        + (observed - len(y_J)) * np.log(ridge_L)
    )
    estimate_M: np.ndarray = vector_MJ @ (np.sqrt(value_J) * y_J / variance_LJ[np.argmin(misfit_L)])

    return estimate_M


# Membership inference over many retrains


class Rate(NamedTuple):
    """A rate with the interval that holds it at the confidence asked for."""

    value: float
    low: float
    high: float


def logit_confidence(loss: np.ndarray) -> np.ndarray:
    """Return log(p / (1 - p)) for cross-entropy -log p: nearly Gaussian over retrains (Carlini et
    al. 2022, eq. 4).
    """
    loss = np.maximum(loss, _TINY)
    confidence: np.ndarray = -loss - np.log(-np.expm1(-loss))
    return confidence


def lira_scores(
    score_RM: np.ndarray, in_RM: np.ndarray, prior: float = 16.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score membership by how much likelier a confidence is among the other retrains with the
    example than without.

    LiRA, online (Carlini et al. 2022, arXiv:2112.03570), each retrain attacked in turn by all
    others. `score_RM`: the `logit_confidence` of example m under retrain r; `in_RM`: whether r was
    trained on m. A Gaussian for each side of each example; its variance is drawn to that of all
    examples by `prior` degrees of freedom (inf: one for all). Returns scores [N], labels [N] (bool)
    and groups [N, 2]: retrain and example. Errors: ValueError where an example is in, or out of,
    fewer than 3 retrains.
    """
    member_RM = np.asarray(in_RM, dtype=bool)
    if np.minimum(member_RM.sum(0), (~member_RM).sum(0)).min() < 3:
        raise ValueError(
            "an example is in, or out of, fewer than 3 retrains; expected 3 of each. Retrain "
            "more often."
        )

    score_RM = score_RM - score_RM.mean(0)  # sums of squares stay small
    ratio_RM = _log_density(score_RM, member_RM, prior) - _log_density(score_RM, ~member_RM, prior)
    return _pool(ratio_RM, member_RM)


def threshold_scores(
    score_RM: np.ndarray, in_RM: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Score membership by the confidence alone (Yeom et al. 2018), pooled as by `lira_scores`."""
    return _pool(score_RM, np.asarray(in_RM, dtype=bool))


def tpr_at_fpr(
    scores_N: np.ndarray,
    labels_N: np.ndarray,
    groups_N2: np.ndarray,
    fpr: float = 0.05,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Rate:
    """Return the share of members above the threshold that at most `fpr` of the non-members pass.

    The interval holds two percentile bootstraps, each finding the threshold anew: over retrains,
    whose scores move together with their model, and over examples, whose scores share what LiRA
    learnt of them (by retrains alone it held the truth in 86 % of simulations without any leak,
    with both in 95 %). Errors: PlanError for an `fpr` finer than one non-member of a retrain:
    pooling repeats the same people, it does not add any.
    """
    labels_N = np.asarray(labels_N, dtype=bool)
    retrains = len(np.unique(groups_N2[:, 0]))
    outside = max((~labels_N).sum() / retrains, 1.0)
    if not 1 / outside <= fpr < 1:
        raise PlanError(
            f"fpr={fpr:g} with {outside:.0f} non-members in a retrain; expected "
            f"{1 / outside:.2g} or more, below 1. Set fpr=0.05, or hold out more."
        )
    order_N = np.argsort(-scores_N, kind="stable")
    member_N = labels_N[order_N]
    scores_N = scores_N[order_N]
    # a threshold never parts equal scores
    end_N = np.flatnonzero(np.append(np.diff(scores_N) != 0, True))

    def rate(weight_N: np.ndarray) -> float:
        members = np.cumsum(np.where(member_N, weight_N, 0))
        others = np.cumsum(np.where(member_N, 0, weight_N))
        passing = int(np.searchsorted(others[end_N], fpr * others[-1] * (1 + 1e-12), side="right"))
        if passing:
            return float(members[end_N[passing - 1]] / members[-1])
        return 0.0

    rng = np.random.default_rng(seed)
    value = rate(np.ones(len(scores_N)))
    low = value
    high = value
    for group_N in groups_N2[order_N].T:
        number_N = np.unique(group_N, return_inverse=True)[1]
        groups = int(number_N.max()) + 1
        weight_BG = rng.multinomial(groups, np.full(groups, 1 / groups), resamples)
        tails = [(1 - confidence) / 2, (1 + confidence) / 2]
        bounds = np.quantile([rate(weight_G[number_N]) for weight_G in weight_BG], tails)
        low = min(low, float(bounds[0]))
        high = max(high, float(bounds[1]))
    return Rate(value, low, high)


def epsilon_from_rate(
    hits: int, members: int, alarms: int, non_members: int, delta: float, confidence: float = 0.95
) -> float:
    """Return the epsilon that a fixed test's `hits` among members and `alarms` among non-members
    refute; 0 if none.

    DP bounds both TPR <= e^epsilon FPR + delta and 1 - FPR <= e^epsilon (1 - TPR) + delta. The
    rates are replaced by their Clopper-Pearson bounds, each at half the error. Trials must be
    independent (one example of a retrain, not the pooled scores) and the threshold chosen on
    others.
    """
    each = (1 - confidence) / 2
    tpr = float(stats.beta.ppf(each, hits, members - hits + 1)) if hits else 0.0
    if alarms < non_members:
        fpr = float(stats.beta.ppf(1 - each, alarms + 1, non_members - alarms))
    else:
        fpr = 1.0
    ratios = [(tpr - delta) / fpr, (1 - fpr - delta) / (1 - tpr)]
    return max(0.0, math.log(max(*ratios, _TINY)))


def _log_density(score_RM: np.ndarray, member_RM: np.ndarray, prior: float) -> np.ndarray:
    """Return each score's log density, less a constant,
    under the Gaussian of the other retrains in `member_RM`.
    """
    n_RM = member_RM.sum(0) - member_RM
    mean_RM = _sum_others(score_RM, member_RM) / n_RM
    squares_RM = np.maximum(_sum_others(score_RM**2, member_RM) - n_RM * mean_RM**2, 0)
    all_examples = squares_RM.sum() / (n_RM - 1).sum()
    own_RM = (n_RM - 1) / (n_RM - 1 + prior)
    variance_RM = own_RM * squares_RM / (n_RM - 1) + (1 - own_RM) * all_examples + _TINY
    density_RM: np.ndarray = -0.5 * ((score_RM - mean_RM) ** 2 / variance_RM + np.log(variance_RM))
    return density_RM


def _sum_others(value_RM: np.ndarray, member_RM: np.ndarray) -> np.ndarray:
    """Sum over the retrains in `member_RM`, each without itself."""
    value_RM = np.where(member_RM, value_RM, 0)
    others: np.ndarray = value_RM.sum(0) - value_RM
    return others


def _pool(score_RM: np.ndarray, member_RM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    retrains, examples = score_RM.shape
    return score_RM.ravel(), member_RM.ravel(), np.indices((retrains, examples)).reshape(2, -1).T


# Gradient inversion


class Similarity(NamedTuple):
    """How near a reconstruction came: 1 and 0 where it is exact."""

    cosine: float
    max_error: float


def invert_first_layer(weight_grad_OI: np.ndarray, bias_grad_O: np.ndarray) -> np.ndarray:
    """Return the input [I] of a Linear layer from one patient's gradient:
    dW = db x^T, so x = dW_o / db_o.

    The row with the largest |db| is read, which noise disturbs least (Phong et al. 2017). A
    gradient of several patients gives a weighted mean of them. Errors: ValueError where every db is
    0.
    """
    row = int(np.argmax(np.abs(bias_grad_O)))
    if bias_grad_O[row] == 0:
        raise ValueError(
            "the bias gradient is 0 in every row; expected one that is not. Choose another patient."
        )
    x_I: np.ndarray = weight_grad_OI[row] / bias_grad_O[row]
    return x_I


def similarity(x: np.ndarray, truth: np.ndarray) -> Similarity:
    """Compare a reconstruction with what it should be; a vector of zeros has cosine 0."""
    lengths = float(np.linalg.norm(x) * np.linalg.norm(truth))
    cosine = float(np.vdot(x, truth)) / lengths if lengths else 0.0
    return Similarity(cosine, float(np.max(np.abs(x - truth))))
