"""The learning rate where a study leaves it open: a step that cannot diverge, from how large the
encoded inputs are.

Gradient steps on a loss of curvature L shrink its error while the rate is below 2 / L. A linear
model's L follows from its inputs alone: the mean of c (x, 1)(x, 1)' has top eigenvalue at most L, c
being the largest second derivative of the loss by the output. Local steps see a batch, and one
site's rows, so L is that of batches, site by site. A deeper net's L is the linear model's times how
much larger its first gradients are on made-up rows of that size. One number a site is told, and
none under a privacy claim.

n rows, B batch, F inputs, C outputs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medfed.core.flat import select_trained
from medfed.core.types import Task
from medfed.learn.algorithms import Server
from medfed.learn.learners import LEARNERS
from medfed.learn.local import CURVATURE, LocalPlan
from medfed.privacy.guarantee import asked
from medfed.study import Study, Training

MOST = 0.1
"""The rate where inputs are small: none that is chosen is larger."""

MOST_ADAM = 0.01
"""Adam's steps have a length of their own, whatever the curvature."""

_BATCHES = 8
_WIDEST = 256
_TINY = 1e-6
# at 1 / L the noise of batches leaves a squared error about twice the least; here an eighth more
_MARGIN = 4.0

ROWS = 16
"""Made-up rows on which a deeper net is compared with a linear model."""


@dataclass(frozen=True)
class Chosen:
    """A rate, and why it is that: the curvature it bears, and the site whose rows have it ("" for
    the mean of all).
    """

    rate: float
    curvature: float
    site: str = ""

    def why(self) -> str:
        """Say in a few words where the rate comes from."""
        where = f"the rows of {self.site}" if self.site else "the mean of all sites"
        return f"the loss bends by at most {self.curvature:.3g} over {where}"


@dataclass(frozen=True)
class Pace:
    """The training losses so far: of the first round, and the lowest; None before there is one."""

    first: float | None = None
    lowest: float | None = None

    def step(self, loss: float | None, everybody: bool) -> "tuple[Pace, bool]":
        """Take in a round's loss (None: it was no number); return what follows, and whether the
        loss has grown.

        It has where it is above the first round's by a tenth, or has won back much of what was
        lost: half of the lowest and a tenth of the first. Where few sites are drawn their losses
        differ, and only twice the first counts.
        """
        if self.first is None or self.lowest is None:
            return Pace(loss, loss), loss is None
        if loss is None:
            return self, True
        if everybody:
            again = loss > 1.5 * self.lowest and loss > self.lowest + 0.1 * self.first
            grew = loss > 1.1 * self.first or again
        else:
            grew = loss > 2 * self.first
        return Pace(self.first, min(self.lowest, loss)), grew


def halve(server: Server) -> Server:
    """Return the state with its chosen rate halved.

    What is remembered between rounds bears it: control variates and momenta are of gradients or of
    whole rounds.
    """
    return replace(server, slots={**server.slots, "rate": server.slots["rate"] / 2})


def left_open(study: Study) -> bool:
    """Say whether the rate is to be chosen from the sites' inputs:
    nobody has set one, and nothing is claimed.
    """
    return (
        study.training.learning_rate == 0 and not asked(study) and study.model.name not in LEARNERS
    )


def settle(study: Study) -> Study:
    """Return the study with the rate `MOST` where it claims
    privacy and neither it nor the recipe has set one.
    """
    return at(study, MOST) if asked(study) else study


def at(study: Study, rate: float) -> Study:
    """Return the study with its rate, where it leaves that open."""
    if study.training.learning_rate:
        return study
    return replace(study, training=replace(study.training, learning_rate=rate))


def bend(x_nF: Tensor, batch: int) -> float:
    """Return the mean over batches of the top eigenvalue of their mean (x, 1)(x, 1)':
    one number of a site's rows.

    Batches are `batch` rows (0: all) taken at equal distances through the table, at most 8 of at
    most 256. Exact for them, as the eigenvalues of the B by B matrix of products.
    """
    n = len(x_nF)
    if n == 0:
        return 0.0
    width = min(batch or n, n, _WIDEST)
    if width == 1:
        return float(x_nF.flatten(1).double().square().sum(1).mean()) + 1
    count = min(_BATCHES, n // width)
    place = torch.linspace(0, n - 1, count * width).round().long()
    x_bBF = x_nF.flatten(1)[place].double().view(width, count, -1).transpose(0, 1)
    products_bBB = (x_bBF @ x_bBF.mT + 1) / width
    return float(torch.linalg.eigvalsh(products_bBB)[:, -1].mean())


def output_gradients(model: nn.Module, x_nF: Tensor, most: int | None = None) -> Iterator[Tensor]:
    """Yield the gradient [P] float64 of each output of each row in the weights it follows from, in
    evaluation mode.

    `most`: of so many outputs alone.
    """
    weights = list(select_trained(model.eval()).values())
    for z in model(x_nF.clone()).flatten()[:most]:
        parts = torch.autograd.grad(z, weights, retain_graph=True, allow_unused=True)
        yield torch.cat([part.flatten() for part in parts if part is not None]).double()


def stretch(model: nn.Module, x_nF: Tensor, bends: float) -> float:
    """Return how many times a model's loss bends more
    than a linear model's on the same rows, 1 or more.

    By the products of its outputs' gradients at the first weights, in evaluation mode, over at most
    16 made-up rows, made so large that a linear model's loss bends by `bends`: norm layers take
    large rows back.
    """
    x_nF = x_nF[:ROWS]
    x_nF = x_nF * math.sqrt(max(bends - 1, _TINY) / max(bend(x_nF, 0) - 1, _TINY))
    gradient_JP = torch.stack(list(output_gradients(model, x_nF)))
    top = float(torch.linalg.eigvalsh(gradient_JP @ gradient_JP.mT)[-1]) / len(x_nF)
    return max(1.0, top / bend(x_nF, 0))


def choose(
    task: Task,
    bends: Mapping[str, float],
    sizes: Mapping[str, int],
    plan: LocalPlan,
    training: Training,
    stretch: Callable[[float], float],
) -> Chosen:
    """Return a rate that no site's local steps make diverge, at most `MOST`, or `MOST_ADAM`.

    bends, sizes: by site, what `bend` told, and training rows. stretch: of the model, by the bend.
    A site of one step a round moves the model by its part of the mean step, so that the mean counts
    there; one of several steps walks alone.
    """
    # whose curvature counts: the mean's, or that of the site that walks alone and bends most
    total = sum(sizes.values())
    steps = plan.steps_K(torch.tensor([sizes[name] for name in bends])).tolist()
    walking = [name for name, taken in zip(bends, steps, strict=True) if taken > 1]
    site = max(walking, key=lambda name: bends[name], default="")
    mean = sum(bends[name] * sizes[name] for name in bends) / total
    if not site or bends[site] < mean:
        site = ""

    # how much the loss bends there
    pull = training.weight_decay
    if training.algorithm == "fedprox":
        pull += training.mu
    most = bends[site] if site else mean
    curvature = CURVATURE[task] * stretch(most) * most + pull

    if training.optimizer == "adam":
        return Chosen(MOST_ADAM, curvature, site)
    margin = _MARGIN if task == "regression" and training.batch_size else 1.0
    return Chosen(min(MOST, 1 / (margin * curvature)), curvature, site)
