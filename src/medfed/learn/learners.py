"""Learners that no gradient trains: trees, counts, sums of squares, exact regression, survival.

A torch module is trained by an algorithm of `algorithms`; a learner here says by itself what its
state is, what a site's rows tell and how the state follows. A study names it by `model.name`. One
more is an entry in `LEARNERS`, wherever it is written. Its rows pass links, ways and rules as those
of any model do.

A phase is a round: what the next phase needs stands in the state (`w` and the slots that it sends),
so that every phase is drawn, recorded, signed, resumed and verified as a round is.

K clients, P numbers of the state, M numbers in a row, F inputs, C outputs.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medfed.core import types
from medfed.data.federated import Rows
from medfed.learn.algorithms import Memory, Server, Task
from medfed.study import Training


@dataclass(frozen=True)
class Shape:
    """What a learner learns: C outputs of F encoded inputs."""

    inputs: int
    outputs: int
    task: types.Task


@dataclass(frozen=True)
class Work:
    """What a cohort's work came to: rows [K, M], what each client will remember if its row counts,
    loss and steps.
    """

    message_KM: Tensor
    memory: Memory
    loss_K: Tensor  # NaN where none is known
    steps_K: Tensor


class Learner(ABC):
    """What every learner says;
    what stands here is right for one that remembers nothing and sends no slot.
    """

    paper: str = ""
    start: Mapping[str, float] = {}  # slots of the server's state, and what fills them
    sent: tuple[str, ...] = ()  # those that clients receive
    kept: tuple[str, ...] = ()  # what each client remembers between rounds: vectors [P]

    @abstractmethod
    def begin(self, shape: Shape) -> Tensor:
        """Return the state [P] before the first round, for rows and targets of this `shape`.

        Raises PlanError for a task that is not the learner's.
        """

    @abstractmethod
    def length(self, parameters: int) -> int:
        """Return M, the numbers of a row, for a state of so many `parameters`."""

    @abstractmethod
    def work(self, task: Task, memory: Memory, clients: Sequence[Rows]) -> Work:
        """Return what each client's training rows tell, client by client.

        No row may depend on another client.

        Args:
            task: what the round sends.
            memory: what each client remembers: name -> [K, P].
            clients: their training rows.
        """

    @abstractmethod
    def apply(self, server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
        """Return the state after a round.

        Args:
            server: the state before it.
            mean_M: the combined row.
            share: the weight of those who took part, of all participants': 0 to 1.
            h: the study's hyperparameters.
        """

    @abstractmethod
    def predict(self, w_P: Tensor, x_NF: Tensor) -> Tensor:
        """Return the outputs [N, C] of state `w_P` for rows `x_NF`: logits of labels or numbers."""


LEARNERS: dict[str, Learner] = {}
"""Learners by the name that `model.name` has."""


class Held(nn.Module):
    """A learner's state as those see it who test, save or serve a model: one parameter, and the
    outputs that follow.
    """

    def __init__(self, learner: Learner, shape: Shape) -> None:
        super().__init__()
        self.learner = learner
        self.state = nn.Parameter(learner.begin(shape))

    def forward(self, x_NF: Tensor) -> Tensor:
        return self.learner.predict(self.state.detach(), x_NF)


def work_of(learner: Learner, task: Task, memory: Memory, clients: Sequence[Rows]) -> Work:
    """Return a learner's work in float32, as rows are sent.

    Args:
        learner: the family of models.
        task: what the round sends.
        memory: what each client remembers: name -> [K, P].
        clients: their training rows.
    """
    with torch.no_grad():
        work = learner.work(task, memory, clients)
    return Work(work.message_KM.float(), work.memory, work.loss_K, work.steps_K)
