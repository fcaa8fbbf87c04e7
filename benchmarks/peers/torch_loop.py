"""Peer: one round of FedAvg as a plain PyTorch loop over the clients, on the CPU.

Measures the wall-clock seconds of one whole round (every client trains, the server averages), from
the same initial weights in every repetition, and prints one JSON line. Needs only torch.
"""

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterable
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

WARM_UP_CLIENTS = 8


def parser(description: str) -> argparse.ArgumentParser:
    """The arguments that both peers take."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--clients", type=int, default=1000)
    result.add_argument("--samples", type=int, default=100, help="samples of each client")
    result.add_argument("--features", type=int, default=30)
    result.add_argument("--hidden", default="64,32", help="widths of the hidden layers")
    result.add_argument("--epochs", type=int, default=5, help="local epochs")
    result.add_argument("--batch", type=int, default=20, help="local batch size")
    result.add_argument("--lr", type=float, default=0.1, help="local learning rate")
    result.add_argument("--repeats", type=int, default=3)
    result.add_argument("--threads", type=int, default=1, help="torch.set_num_threads")
    result.add_argument(
        "--seed", type=int, default=0, help="of the data, the initial weights and the shuffles"
    )
    return result


def make_data(clients: int, samples: int, features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Synthetic clients with shifted features: x (clients, samples, features), y (clients, samples,
    1) of 0 and 1.
    """
    random = torch.Generator().manual_seed(seed)
    shift = 0.5 * torch.randn(clients, 1, features, generator=random)
    x = torch.randn(clients, samples, features, generator=random) + shift
    teacher = torch.randn(features, 1, generator=random) * (3.0 / features**0.5)
    return x, torch.bernoulli(torch.sigmoid(x @ teacher), generator=random)


def make_mlp(features: int, hidden: str, seed: int) -> nn.Sequential:
    """features - hidden - 1 with ReLU; the same initial weights for the same seed."""
    torch.manual_seed(seed)
    widths = [features, *(int(width) for width in hidden.split(","))]
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-1], 1))


@torch.no_grad()
def mean_loss(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Loss of a model over the samples of all clients."""
    return bce(model(x), y).item()


def train_client(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch: int,
    shuffle: bool,
) -> None:
    """Local training: shuffled mini-batches, in place."""
    for _ in range(epochs):
        if shuffle:
            order = torch.randperm(len(x))
            x = x[order]
            y = y[order]
        for xb, yb in zip(x.split(batch), y.split(batch), strict=True):
            optimizer.zero_grad()
            bce(model(xb), yb).backward()
            optimizer.step()


def run_round(
    x: Iterable[Tensor],
    y: Iterable[Tensor],
    model: nn.Module,
    *,
    epochs: int = 5,
    batch: int = 20,
    lr: float = 0.1,
    shuffle: bool = True,
) -> None:
    """One round of FedAvg, weighted by samples: updates `model` in place.

    x and y hold one tensor per client, (samples, features) and (samples, 1); clients may differ in
    samples.
    """
    worker = copy.deepcopy(model)
    # has no state, so one serves all clients
    optimizer = torch.optim.SGD(worker.parameters(), lr=lr)
    server = list(model.parameters())
    local = list(worker.parameters())
    sums = [torch.zeros_like(p) for p in server]
    total = 0
    for client_x, client_y in zip(x, y, strict=True):
        with torch.no_grad():
            for p, start in zip(local, server, strict=True):
                p.copy_(start)
        train_client(worker, optimizer, client_x, client_y, epochs, batch, shuffle)
        with torch.no_grad():
            for acc, p, start in zip(sums, local, server, strict=True):
                acc.add_(p - start, alpha=len(client_x))
        total += len(client_x)
    with torch.no_grad():
        for p, acc in zip(server, sums, strict=True):
            p.add_(acc, alpha=1.0 / total)


def main() -> None:
    """Warm up on a few clients, time the rounds, print the JSON line."""
    cli = parser(__doc__)
    cli.add_argument(
        "--no-shuffle", action="store_true", help="the same batches every epoch, as pfl does"
    )
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    x, y = make_data(args.clients, args.samples, args.features, args.seed)
    initial = make_mlp(args.features, args.hidden, args.seed)
    settings = {
        "epochs": args.epochs,
        "batch": args.batch,
        "lr": args.lr,
        "shuffle": not args.no_shuffle,
    }

    run_round(x[:WARM_UP_CLIENTS], y[:WARM_UP_CLIENTS], copy.deepcopy(initial), **settings)
    model = initial
    seconds = []
    for _ in range(args.repeats):
        model = copy.deepcopy(initial)
        start = time.perf_counter()
        run_round(x, y, model, **settings)
        seconds.append(time.perf_counter() - start)

    result = {
        "who": "torch-loop",
        "seconds": seconds,
        "threads": args.threads,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "loss_before": mean_loss(initial, x, y),
        "loss_after": mean_loss(model, x, y),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
