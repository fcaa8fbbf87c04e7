"""Every federated algorithm, side by side. One round serves them all.

An algorithm is what a client adds to its gradients (`correct`), what it sends after training
(`message`, one row a client), and what the server does with the weighted mean of the rows
(`apply`). What a server or a client remembers are named vectors of P numbers that start at zero.

K clients, P parameters, M numbers in a row.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from medfed.learn.local import Correction, LocalResult
from medfed.study import Training

COMMON = ("average", "clip", "rate")
"""Server slots that belong to no algorithm:
the averaged model, the norm of adaptive clipping, a chosen rate.
"""

Joint = Literal["refused", "server step", "coincides"]
"""What becomes of an algorithm where a round is one joint, noised step of all sites and clients do
no more than add up clipped gradients. server step: all that it is lies in `apply`. coincides: with
one step from the common model it is FedAvg. refused: its `correct` or `message` would be left out
in silence.
"""

Memory = Mapping[str, Tensor]
"""What each client of a stack remembers between rounds: name -> [K, P]."""


@dataclass(frozen=True)
class Server:
    """The server's state after a round; written to disk it is a checkpoint."""

    round: int
    w_P: Tensor
    slots: Mapping[str, Tensor]  # momentum, second moment, control variate: name -> [P]; clip: [1]

    @property
    def released_P(self) -> Tensor:
        """The model to test and to keep: the averaged one where the study averages, else w."""
        return self.slots.get("average", self.w_P)


@dataclass(frozen=True)
class Task:
    """What every client of a round receives."""

    w_P: Tensor
    slots: Mapping[str, Tensor]


@dataclass(frozen=True)
class Algorithm:
    """The parts in which algorithms differ; the defaults are FedAvg's."""

    paper: str
    apply: "Callable[[Server, Tensor, float, Training], Server]"
    correct: "Callable[[Task, Memory, Training], Correction]" = lambda task, memory, h: Correction()
    message: "Callable[[Task, Memory, LocalResult, Training], tuple[Tensor, Memory]]" = (
        lambda task, memory, local, h: (local.theta_KP - task.w_P, memory)
    )
    start: "Callable[[Training], Mapping[str, float]]" = lambda h: {}  # server slots, filled
    sent: tuple[str, ...] = ()  # which server slots the clients receive
    kept: tuple[str, ...] = ()  # what each client remembers
    joint: Joint = "refused"
    length: "Callable[[int], int]" = lambda parameters: parameters  # M, numbers in a row
    # how the weights move by a combined row
    update: "Callable[[Tensor, int], Tensor]" = lambda row_M, parameters: row_M[:parameters]
    baseline: bool = False  # nothing is federated: no claim, no secrecy, no rule
    personal: bool = False  # the model to test is the site's own, w + memory["offset"]
    plain_sgd: str = ""  # why the local optimiser must be plain SGD, where it must
    any_sgd: str = ""  # why it must be SGD, with or without momentum, where it must

    def begin(self, w_P: Tensor, h: Training) -> Server:
        """Return the state before the first round, from weights `w_P` and hyperparameters `h`."""
        slots = {name: torch.full_like(w_P, value) for name, value in self.start(h).items()}
        return Server(0, w_P, slots | ({"average": w_P} if h.average else {}))

    def step(self, server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
        """Return the state after a round.

        With training.average, the mean of the last rounds' models goes along.

        Args:
            server: the state before it.
            mean_M: the combined row.
            share: the weight of those whose rows count, of all participants': 0 to 1.
            h: the study's hyperparameters.
        """
        after = self.apply(server, mean_M, share, h)
        common = {name: server.slots[name] for name in COMMON if name in server.slots}
        if "average" in common:
            n = max(1, after.round - (h.rounds - math.ceil(h.average * h.rounds)))
            common["average"] = common["average"] + (after.w_P - common["average"]) / n
        return replace(after, slots={**after.slots, **common})

    def task(self, server: Server) -> Task:
        """Return what the clients of the round after `server` receive."""
        return Task(server.w_P, {name: server.slots[name] for name in self.sent})

    def blank(self, w_P: Tensor) -> dict[str, Tensor]:
        """Return what a client with weights `w_P` remembers before its first round: name -> [P]."""
        return {name: torch.zeros_like(w_P) for name in self.kept}

    def starts_KP(self, task: Task, memory: Memory, clients: int) -> Tensor:
        """Return the weights that each of so many `clients` starts from: the sent ones of `task`,
        or, with a personal model, its own by `memory`.
        """
        w_KP = task.w_P.expand(clients, -1)
        return w_KP + memory["offset"] if self.personal else w_KP


# Weighted mean: McMahan et al. 2017, algorithm 1;
# with a server step, Reddi et al. 2021, algorithm 1.


def average(server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
    return _move(server, (h.server_learning_rate or 1.0) * mean_M)


# FedProx: Li et al. 2020, eq. 2: the local objective gains mu/2 |w - w_server|^2.


def proximal(task: Task, memory: Memory, h: Training) -> Correction:
    return Correction(mu=h.mu)


# SCAFFOLD: Karimireddy et al. 2020, algorithm 1, option II. A client descends along g - c_k + c,
# then sets c_k+ = c_k - c + (w - y_k) / (steps lr). Means are weighted like the objective; `share`
# is the drawn clients' weight.


def control_shift(task: Task, memory: Memory, h: Training) -> Correction:
    return Correction(shift_KP=task.slots["control"] - memory["control"])


def control_message(
    task: Task, memory: Memory, local: LocalResult, h: Training
) -> tuple[Tensor, Memory]:
    delta_KP = local.theta_KP - task.w_P
    travel_K1 = local.steps_K.clamp(min=1)[:, None] * h.learning_rate
    change_KP = -task.slots["control"] - delta_KP / travel_K1
    change_KP = torch.where(local.steps_K[:, None] > 0, change_KP, 0)
    return torch.cat([delta_KP, change_KP], 1), {"control": memory["control"] + change_KP}


def control_average(server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
    delta_P, change_P = mean_M.chunk(2)
    moved = average(server, delta_P, share, h)
    return replace(moved, slots={"control": server.slots["control"] + share * change_P})


# FedNova: Wang et al. 2020, section 4. A client sends its update per unit of local work |a_k|_1;
# the server multiplies the mean by the mean work tau_eff, so that sites that take more steps no
# longer bend the objective.


def local_work(steps_K: Tensor, h: Training) -> Tensor:
    """Return |a_k|_1 [K]: of `steps_K` steps their number, or with momentum rho (in `h`) the sum of
    the weights its gradients get.
    """
    tau = steps_K.double()
    rho = h.momentum
    if rho == 0:
        return tau
    return (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)


def normalise(task: Task, memory: Memory, local: LocalResult, h: Training) -> tuple[Tensor, Memory]:
    delta_KP = local.theta_KP - task.w_P
    work_K1 = local_work(local.steps_K, h).to(delta_KP.dtype)[:, None]
    return torch.cat([delta_KP / work_K1.clamp(min=1), work_K1], 1), memory


def nova_average(server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
    return average(server, mean_M[-1] * mean_M[:-1], share, h)


# FedAvgM: Hsu et al. 2019, section 4.3.


def momentum_average(server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
    velocity_P = h.server_momentum * server.slots["momentum"] + mean_M
    moved = average(server, velocity_P, share, h)
    return replace(moved, slots={"momentum": velocity_P})


# FedAdagrad, FedYogi, FedAdam: Reddi et al. 2021, algorithm 2. The mean update is the
# pseudo-gradient; v starts at tau^2. FedAdagrad has beta1 = 0, as in the paper's experiments.


def adaptive(
    second_moment: Callable[[Tensor, Tensor, Training], Tensor], momentum: bool
) -> Callable[..., Server]:
    def apply(server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
        beta1 = h.server_momentum if momentum else 0.0
        m_P = beta1 * server.slots["m"] + (1 - beta1) * mean_M
        v_P = second_moment(server.slots["v"], mean_M.square(), h)
        moved = _move(
            server, (h.server_learning_rate or 0.1) * m_P / (v_P.sqrt() + h.server_epsilon)
        )
        return replace(moved, slots={"m": m_P, "v": v_P})

    return apply


def adagrad(v_P: Tensor, square_P: Tensor, h: Training) -> Tensor:
    return v_P + square_P


def yogi(v_P: Tensor, square_P: Tensor, h: Training) -> Tensor:
    return v_P - (1 - h.server_beta2) * square_P * torch.sign(v_P - square_P)


def adam(v_P: Tensor, square_P: Tensor, h: Training) -> Tensor:
    return h.server_beta2 * v_P + (1 - h.server_beta2) * square_P


def moments(h: Training) -> Mapping[str, float]:
    return {"m": 0.0, "v": h.server_epsilon**2}


# Baseline: each site alone. Nothing leaves; a row has no numbers.


def nothing(task: Task, memory: Memory, local: LocalResult, h: Training) -> tuple[Tensor, Memory]:
    return local.theta_KP[:, :0], {"offset": local.theta_KP - task.w_P}


def hold(server: Server, mean_M: Tensor, share: float, h: Training) -> Server:
    return replace(server, round=server.round + 1)


def _move(server: Server, step_P: Tensor) -> Server:
    return replace(server, round=server.round + 1, w_P=server.w_P + step_P)


ALGORITHMS: dict[str, Algorithm] = {
    "fedavg": Algorithm("McMahan et al. 2017, arXiv:1602.05629", average, joint="server step"),
    "fedprox": Algorithm(
        "Li et al. 2020, arXiv:1812.06127", average, correct=proximal, joint="coincides"
    ),
    "scaffold": Algorithm(
        "Karimireddy et al. 2020, arXiv:1910.06378",
        control_average,
        correct=control_shift,
        message=control_message,
        start=lambda h: {"control": 0.0},
        sent=("control",),
        kept=("control",),
        plain_sgd="its control variate is the mean gradient of plain SGD steps",
        joint="coincides",
        length=lambda parameters: 2 * parameters,
    ),
    "fednova": Algorithm(
        "Wang et al. 2020, arXiv:2007.07481",
        nova_average,
        message=normalise,
        any_sgd="it divides by the weight that SGD gives each gradient",
        joint="coincides",
        length=lambda parameters: parameters + 1,
        update=lambda row_M, parameters: row_M[:parameters] * row_M[-1],
    ),
    "fedavgm": Algorithm(
        "Hsu et al. 2019, arXiv:1909.06335",
        momentum_average,
        start=lambda h: {"momentum": 0.0},
        joint="server step",
    ),
    "fedadagrad": Algorithm(
        "Reddi et al. 2021, arXiv:2003.00295",
        adaptive(adagrad, False),
        start=moments,
        joint="server step",
    ),
    "fedyogi": Algorithm(
        "Reddi et al. 2021, arXiv:2003.00295",
        adaptive(yogi, True),
        start=moments,
        joint="server step",
    ),
    "fedadam": Algorithm(
        "Reddi et al. 2021, arXiv:2003.00295",
        adaptive(adam, True),
        start=moments,
        joint="server step",
    ),
    "local": Algorithm(
        "baseline: each site alone",
        hold,
        message=nothing,
        kept=("offset",),
        length=lambda parameters: 0,
        baseline=True,
        personal=True,
    ),
    "pooled": Algorithm(
        "baseline: one model on all sites' rows in one place; a simulation only",
        average,
        baseline=True,
    ),
}
