"""Write vectors/byzfl.json: what ByzFL 0.0.11 makes of some rows. Needs byzfl; not run by the
tests.

Without SMEA and CAF: there ByzFL looks at one step of the power method from a random direction,
ours at eigenvalues.

benchmarks/.venvs/byzfl/bin/python tests/robust/make_vectors.py
"""

import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np

# byzfl's own training loops want it
for unused in ("torchvision", "torchvision.datasets", "torchvision.transforms"):
    sys.modules[unused] = MagicMock()

import byzfl  # noqa: E402

CASES = [(9, 2, 4, 1), (10, 3, 6, 2), (13, 2, 3, 3)]  # n, f, numbers, seed


def main() -> None:
    """Ask ByzFL for every rule on every case."""
    cases = []
    for n, f, numbers, seed in CASES:
        rows = np.random.default_rng(seed).normal(size=(n, numbers)) + 1
        rows[:f] *= -4
        reference = rows[f:].mean(0)
        clipping = byzfl.CenteredClipping(L=3, tau=1.5)
        clipping.m = reference  # its constructor refuses every array
        rules = {
            "krum": byzfl.Krum(f),
            "multi-krum": byzfl.MultiKrum(f),
            "geometric-median": byzfl.GeometricMedian(nu=1e-9, T=5000),
            "centred-clipping": clipping,
            "minimum-diameter": byzfl.MDA(f),
            "coordinate-median": byzfl.Median(),
            "trimmed-mean": byzfl.TrMean(f),
        }
        found = {name: np.asarray(rule(rows)).tolist() for name, rule in rules.items()}
        mixed = np.asarray(byzfl.NNM(f)(rows))
        found["nnm+trimmed-mean"] = np.asarray(byzfl.TrMean(f)(mixed)).tolist()
        found["nnm+geometric-median"] = np.asarray(
            byzfl.GeometricMedian(nu=1e-9, T=5000)(mixed)
        ).tolist()
        cases.append(
            {"f": f, "rows": rows.tolist(), "reference": reference.tolist(), "found": found}
        )

    path = Path(__file__).parent / "vectors" / "byzfl.json"
    path.write_text(
        json.dumps({"source": "ByzFL 0.0.11", "radius": 1.5, "cases": cases}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
