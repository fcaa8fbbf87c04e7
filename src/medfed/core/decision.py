"""Where a probability becomes a call:
a threshold that is declared, or chosen on training rows by a declared rule.

What a rule needs of training rows is a vector of counts that adds up over sites, so that one sum
can be noised once.

C cells of logits, between C - 1 ascending edges; L numbers of a rule's vector.
"""

import math
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

EXACT_EDGES = np.linspace(-12, 12, 769)
"""Between cells where no noise is added: a threshold is within 1/32 of a logit."""


CELLS = 32
"""Cells of a noised test: few, as each has noise of its own;
enough that ties within one hardly matter.
"""

CHOOSING_CELLS = 16
"""Cells of the noised counts that choose a threshold: fewer, as they are added up from the top."""

_MOST_CELLS = 4096


def tally(logit_N: np.ndarray, label_N: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return how many records lie in each cell under each label, int64 [C, 2]; an edge belongs to
    the cell above.
    """
    cell = np.searchsorted(edges, logit_N, side="right")
    return np.bincount(2 * cell + label_N.astype(np.int64), minlength=2 * len(edges) + 2).reshape(
        -1, 2
    )


def sound(edges: np.ndarray) -> bool:
    """Say whether these are edges that a site may count by: finite, ascending, not too many."""
    return bool(
        0 < len(edges) < _MOST_CELLS and np.isfinite(edges).all() and (np.diff(edges) > 0).all()
    )


def logit(p: float) -> float:
    """Return the logit of a probability in (0, 1)."""
    return math.log(p / (1 - p))


@dataclass(frozen=True)
class ThresholdRule:
    """How the threshold is found. level:
    the probability itself, or the least share of positives to be called.
    """

    name: Literal["fixed", "prevalence", "sensitivity", "youden"]
    level: float = 0.0

    @property
    def chosen(self) -> bool:
        """Whether training rows decide."""
        return self.name != "fixed"

    def sensitivity(self) -> float:
        """Return how far one patient moves the vector, in L2 norm."""
        return math.sqrt(2) if self.name == "prevalence" else 1.0

    def vector(self, count_C2: np.ndarray) -> np.ndarray:
        """Return what the rule needs [L] of the counts by cell and label.

        prevalence: records of each cell, then all positives; sensitivity: positives of each cell;
        youden: all counts.
        """
        if self.name == "prevalence":
            return np.append(count_C2.sum(1), count_C2[:, 1].sum())
        if self.name == "sensitivity":
            return count_C2[:, 1].copy()
        return count_C2.ravel()

    def choose(self, edges: np.ndarray, vector: np.ndarray, sd: float = 0.0) -> float | None:
        """Return the probability from which records are called positive;
        None where the noise `sd` hides it.

        prevalence: as many are called as are positive. sensitivity: the highest edge above which at
        least `level` of the positives lie, by two standard deviations of the noise. youden: the
        edge with the largest sensitivity + specificity, where that gain is more than two standard
        deviations. One class alone says nothing.
        """
        cells = len(edges) + 1
        if self.name == "prevalence":
            called = _count_above(vector[:cells])
            positives = float(vector[cells])
            if not 3 * sd < positives < called[0] or called[0] <= 3 * sd * math.sqrt(cells):
                return None
            return _expit(float(np.interp(positives, called[:0:-1], edges[::-1])))
        count = vector.reshape(cells, -1)
        doubt = 3 * sd * math.sqrt(cells)
        above = np.stack([_count_above(column) for column in count.T], 1)
        if (above[0] <= doubt).any() or (above[0] == 0).any():
            return None
        # twice the sd of a share of positives
        share = above / above[0]
        margin = float(2 * doubt / 3 / above[0, -1])
        if self.name == "sensitivity":
            if sd and self.level + margin >= 1:
                return None
            enough = np.flatnonzero(share[1:, 0] >= self.level + margin)
            highest = enough[-1] if len(enough) else 0
            return _expit(float(edges[highest]))
        gain = share[1:, 1] - share[1:, 0]
        if gain.max() < margin:
            return None
        return _expit(float(edges[np.argmax(gain)]))


def parse(text: str) -> ThresholdRule | None:
    """Read a rule: a probability in (0, 1), "prevalence",
    "sensitivity>=S" or "youden"; None for anything else.
    """
    if text in ("prevalence", "youden"):
        return ThresholdRule(text)  # type: ignore[arg-type]
    bound = re.fullmatch(r"sensitivity\s*>=\s*(\S+)", text)
    try:
        level = float(bound[1] if bound else text)
    except ValueError:
        return None
    if not 0 < level < 1:
        return None
    return ThresholdRule("sensitivity" if bound else "fixed", level)


def _count_above(count_C: np.ndarray) -> np.ndarray:
    """Return how many lie in each cell and above [C];
    noise must not make it grow from one cell to the next.
    """
    return np.maximum.accumulate(np.maximum(np.cumsum(count_C[::-1]), 0))[::-1]


def _expit(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))
