"""Attacks on records: what a liar trains on.

N records, D features.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medfed.core import streams
from medfed.core.checks import PlanError
from medfed.robust.attacks.attack import Attack, Records, add


def flip_labels(records: Records) -> Records:
    """Class c becomes class C - 1 - c; a number is mirrored at 0, which is the study's centre."""
    top = max(records.labels - 1, 0)
    return replace(records, y_N=top - records.y_N)


add(
    Attack(
        "label-flip",
        "Fang et al., USENIX Security 2020, arXiv:1911.11815",
        "data",
        on_data=flip_labels,
    )
)


def _need_classes(records: Records, attack: str) -> None:
    if not records.labels:
        raise PlanError(
            f"attack={attack!r} needs classes; this study predicts a number. Use 'label-flip'."
        )


def _flip_last_class(records: Records) -> Records:
    """The last class, of two the positive one, becomes the first; all other labels stay.

    Raises PlanError where a number is predicted.
    """
    _need_classes(records, "class-flip")
    y_N = records.y_N
    return replace(records, y_N=torch.where(y_N == records.labels - 1, torch.zeros_like(y_N), y_N))


add(
    Attack(
        "class-flip",
        "Tolpegin et al., ESORICS 2020, arXiv:2007.08432",
        "data",
        on_data=_flip_last_class,
    )
)


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


add(
    Attack(
        "feature-poison",
        "after Shafahi et al., NeurIPS 2018, arXiv:1804.00792",
        "data",
        on_data=_poison_features,
    )
)


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
        _need_classes(records, "backdoor")
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

add(Attack("backdoor", "Gu et al., BadNets 2017, arXiv:1708.06733", "data", on_data=TRIGGER.poison))
