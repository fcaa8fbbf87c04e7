"""One round of 1,000 small clients, with patient-level privacy at each client and without.

    python benchmarks/private_cohort.py [--repeats 7]

1,000 clients x 100 patients x 5 local epochs, expected batch 20 by secret coins, MLP 30-64-32-1,
noise = "site". The private round is timed without noise generation, and with release-grade noise
(discrete Gaussian from AES-CTR) beside. Interleaved in one process; whole rounds, medians; the
ratio is to the round without privacy.
"""

import time
from collections.abc import Sequence
from statistics import median
from typing import Any
from unittest.mock import patch

import common
import torch
from common import bare_federation, table, without_privacy, write_result
from peers.torch_loop import make_data

import medfed
from medfed.core.flat import vector
from medfed.data.federated import Rows
from medfed.learn import dpsgd
from medfed.learn.algorithms import Server
from medfed.monitor.events import Log
from medfed.planning.building import build_model
from medfed.rounds.round import run_round

CLIENTS = 1000
PATIENTS = 100
FEATURES = 30
COMMON: dict[str, Any] = {"model.name": "mlp", "model.options.hidden": [64, 32]}
TRAINING = {"rounds": 1, "local_epochs": 5, "batch_size": 20, "learning_rate": 0.1}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args(argv)
    clients, patients, repeats = (4, 12, 1) if args.tiny else (CLIENTS, PATIENTS, args.repeats)
    torch.set_num_threads(2)
    xs, ys = make_data(clients, patients, FEATURES, seed=0)
    patient = torch.arange(patients)
    rows = {f"c{k}": Rows(x, y[:, 0], patient) for k, (x, y) in enumerate(zip(xs, ys, strict=True))}
    few = Rows(xs[0][:1], ys[0][:1, 0], patient[:1])
    plain = without_privacy(medfed.load_study("breast-cancer"), **TRAINING)._with(COMMON)
    private = plain._with(
        {
            "data.preprocess": "dictionary",
            "privacy.epsilon": 1.0,
            "privacy.delta": 1e-6,
            "privacy.noise": "site",
            "privacy.scope": "run",
            "privacy.sizes": dict.fromkeys(rows, patients),
        }
    )
    federations = {
        name: bare_federation(study, {site: (r, few) for site, r in rows.items()})
        for name, study in (("plain", plain), ("private", private))
    }
    seconds: dict[str, list[float]] = {
        "without privacy": [],
        "private, noise excluded": [],
        "private, release noise": [],
    }

    for _ in range(repeats + 1):  # the first warms up
        seconds["without privacy"].append(one(*federations["plain"]))
        with patch.object(dpsgd, "_make_noise", lambda *_: lambda total_AP, members, t: total_AP):
            seconds["private, noise excluded"].append(one(*federations["private"]))
        seconds["private, release noise"].append(one(*federations["private"]))

    results = report({name: found[1:] for name, found in seconds.items()})
    if not args.tiny:
        write_result(
            "private-cohort",
            {"clients": clients, "patients": patients, "threads": 2, "rows": results},
        )


def one(plan: Any, fleet: Any) -> float:
    w_P = vector(build_model(plan.study, plan.encoding))
    began = time.perf_counter()
    run_round(Server(0, w_P, {}), plan, fleet, plan.budget(), Log())
    return time.perf_counter() - began


def report(seconds: dict[str, list[float]]) -> list[dict[str, object]]:
    """Print the table; return its rows."""
    base = median(seconds["without privacy"])
    lines = []
    results = []
    for name, found in seconds.items():
        middle = median(found)
        lines.append(
            [name, f"{middle:.3f}", f"{min(found):.3f}-{max(found):.3f}", f"{middle / base:.2f}"]
        )
        results.append(
            {
                "what": name,
                "seconds": [round(s, 4) for s in found],
                "ratio": round(middle / base, 3),
            }
        )
    print(table(["round", "median s", "range", "ratio"], lines))
    return results


if __name__ == "__main__":
    main()
