"""How long rules take, against ByzFL 0.0.11; and a round of three parties whose Gram matrix is
opened with noise.

    python benchmarks/robust_speed.py

ByzFL runs in an environment of its own (benchmarks/.venvs/byzfl, made on first use), on the same
rows and threads, in turns with ours. Ours includes the Gram matrix and the weighted sum. Its
geometric median takes 3 steps of Weiszfeld's, ours goes on until it stands still.
"""

import json
import statistics
import subprocess
import time
import venv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from common import absent, table, write_result

from medfed.privacy.guarantee import discrete_gaussian
from medfed.robust.rules import rule_of
from medfed.secure.three_party import Selection
from secure import three

HERE = Path(__file__).parent
THREADS = 2
RULES = ("nnm+geometric-median", "multi-krum")


def ours(clients: int, numbers: int, f: int) -> dict[str, float]:
    """Return seconds of each rule."""
    row_KM = torch.randn(clients, numbers, generator=torch.Generator().manual_seed(0))
    found: dict[str, float] = {}
    for name in RULES:
        rule = rule_of(name, f)
        began = time.perf_counter()
        rule.combine(row_KM)
        found[name] = time.perf_counter() - began
    return found


def byzfl(clients: int, numbers: int, f: int) -> dict[str, float]:
    """Return ByzFL's seconds, the second of two."""
    folder = HERE / ".venvs/byzfl"
    if not folder.exists():
        venv.create(folder, with_pip=True)
        pip = [str(folder / "bin/python"), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "torch==2.13.0", "byzfl==0.0.11"], check=True)
    script = [
        str(folder / "bin/python"),
        str(HERE / "peers/byzfl_rules.py"),
        f"--clients={clients}",
        f"--liars={f}",
    ]
    script += [f"--numbers={numbers}", "--repeats=2", f"--threads={THREADS}"]
    told = subprocess.run(script, check=True, capture_output=True, text=True).stdout
    return {name: seconds[-1] for name, seconds in json.loads(told.splitlines()[-1]).items()}


def private_round(clients: int = 10, numbers: int = 200_000, rounds: int = 5) -> list[float]:
    """Return seconds of rounds of three parties, in one process, whose Gram matrix and sum carry
    noise.
    """

    rule = rule_of("nnm+geometric-median", 3)
    chosen = Selection(
        lambda gram_KK: rule(torch.from_numpy(gram_KK)).numpy(),
        {},
        lambda K, entropy: discrete_gaussian(1e12).sample(K * (K + 1) // 2, entropy),
        lambda K: 1e12,
        lambda length, most, entropy: discrete_gaussian(1e9 / np.sqrt(2)).sample(length, entropy),
    )
    return [three(clients, numbers, number, chosen)[0] for number in range(1, rounds + 1)]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and keep."""
    args = common.parser(__doc__).parse_args(argv)
    shape = (50, 1_000_000, 15)
    crowd = (1000, 100_000, 300)
    parties = (10, 200_000, 5)
    repeats = (3, 5)

    if args.tiny:
        shape = (8, 100, 2)
        crowd = (12, 100, 3)
        parties = (10, 50, 1)
        repeats = (1, 1)
        absent("ByzFL", "a tiny run installs nothing")

    torch.set_num_threads(THREADS)
    result: dict[str, Any] = {}
    lines = []
    pairs = [(ours(*shape), {} if args.tiny else byzfl(*shape)) for _ in range(repeats[0])]

    for name in RULES:
        mine = [a[name] for a, _ in pairs]
        theirs = [b[name] for _, b in pairs if b]
        lines.append(
            [f"{name}, n={shape[0]}, d={shape[1]:,}", f"{statistics.median(mine):.3f}", "-", "-"]
        )
        result[f"{name} | {shape[0]} x {shape[1]}"] = told = {"ours": mine, "byzfl": theirs}
        if theirs:
            ratio = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
            lines[-1][2:] = [f"{statistics.median(theirs):.2f}", f"{ratio:.0f}"]
            told["ratio"] = ratio

    many = [ours(*crowd) for _ in range(repeats[1])]
    for name in RULES:
        middle = statistics.median(one[name] for one in many)
        lines.append([f"{name}, n={crowd[0]:,}, d={crowd[1]:,}", f"{middle:.2f}", "", ""])
        result[f"{name} | {crowd[0]} x {crowd[1]}"] = [one[name] for one in many]

    print(table(["rule", "ours s", "ByzFL s", "times"], lines))
    rounds = private_round(*parties)
    what = f"three parties, n={parties[0]}, M={parties[1]:,}, noised Gram matrix and noised sum"
    print(f"{what}: {statistics.median(rounds):.2f} s (aim 2)")
    result["three-party, noised"] = rounds
    if not args.tiny:
        write_result("robust-speed", result)


if __name__ == "__main__":
    main()
