"""Peer: one central iteration of FedAvg with the real package pfl-research (`pfl`), on the CPU.

Measures the wall-clock seconds of `FederatedAveraging.run` for one central iteration over a cohort
of all users, from the same initial weights in every repetition, and prints one JSON line. Needs pfl
0.6 and torch.

Chosen in pfl's favour: one ready-made in-memory `PyTorchTensorDataset` per user, whose batches pfl
makes once and keeps (it never shuffles); no evaluation, callback or report of metrics in the timed
part. pfl evaluates every user in its iteration 0 whatever is asked for, so iteration 0 is the
warm-up on a few users and the next ones are timed.

pfl's own multi-process simulation needs no change here: start one process per worker with
`PFL_WORKER_ADDRESSES` and `PFL_WORKER_RANK` set; the worker of rank 0 prints.
"""

import argparse
import json
import os
import platform
import time
from importlib.metadata import version

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

# isort: split
from torch_loop import WARM_UP_CLIENTS, make_data, make_mlp, mean_loss, parser


class Net(nn.Sequential):
    """The module with the two methods that pfl asks for."""

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """What local training minimises."""
        return bce(self(x), y)

    def metrics(self, x: Tensor, y: Tensor) -> dict[str, Weighted]:
        """Only used in the warm-up, where pfl insists on evaluating."""
        return {"loss": Weighted(self.loss(x, y).item() * len(x), len(x))}


def make_model(net: Net) -> PyTorchModel:
    """pfl's PyTorch adapter; a central SGD with rate 1 makes it plain federated averaging."""
    return PyTorchModel(
        model=net,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(net.parameters(), lr=1.0),
    )


def make_backend(x: Tensor, y: Tensor) -> SimulatedBackend:
    """Simulation over in-memory users, taken in turn, so a cohort of all users has each of them
    once.
    """
    users = [PyTorchTensorDataset((user_x, user_y)) for user_x, user_y in zip(x, y, strict=True)]
    sampler = get_user_sampler("minimize_reuse", list(range(len(users))))
    data = FederatedDataset(users.__getitem__, sampler)
    return SimulatedBackend(
        training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
    )


def run_to(
    iteration: int,
    cohort: int,
    algorithm: FederatedAveraging,
    backend: SimulatedBackend,
    model: PyTorchModel,
    args: argparse.Namespace,
) -> float:
    """Run the algorithm on to this number of central iterations; the seconds it took."""
    params = NNAlgorithmParams(
        central_num_iterations=iteration,
        evaluation_frequency=args.repeats + 1,  # no evaluation after iteration 0
        train_cohort_size=cohort,
        val_cohort_size=0,
    )
    local = NNTrainHyperParams(
        local_num_epochs=args.epochs, local_learning_rate=args.lr, local_batch_size=args.batch
    )
    start = time.perf_counter()
    algorithm.run(params, backend, model, local, send_metrics_to_platform=False)

    return time.perf_counter() - start


def main() -> None:
    """Warm up on a few users, time the iterations, print the JSON line."""
    args = parser(__doc__).parse_args()
    os.environ["PFL_PYTORCH_DEVICE"] = "cpu"  # also saves pfl a look for a GPU at every batch
    torch.set_num_threads(args.threads)
    np.random.seed(args.seed)
    x, y = make_data(args.clients, args.samples, args.features, args.seed)
    net = Net(*make_mlp(args.features, args.hidden, args.seed))
    model = make_model(net)
    backend = make_backend(x, y)
    algorithm = FederatedAveraging()
    loss_before = mean_loss(net, x, y)
    initial = model.get_parameters()

    run_to(1, min(WARM_UP_CLIENTS, args.clients), algorithm, backend, model, args)
    seconds = []
    for repeat in range(args.repeats):
        model.set_parameters(initial)
        seconds.append(run_to(repeat + 2, args.clients, algorithm, backend, model, args))

    result = {
        "who": "pfl-research",
        "seconds": seconds,
        "threads": args.threads,
        "workers": len(os.environ.get("PFL_WORKER_ADDRESSES", "one").split(",")),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pfl": version("pfl"),
        },
        "loss_before": loss_before,
        "loss_after": mean_loss(net, x, y),
    }
    if os.environ.get("PFL_WORKER_RANK", "0") == "0":
        print(json.dumps(result))


if __name__ == "__main__":
    main()
