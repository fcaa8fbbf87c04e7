"""What `medfed audit` finds: planted bugs at epsilon 1 and 8, noise at sites and shared.

    python benchmarks/audit_power.py [--numbers 20000] [--bugs NAME ...] [--tiny]

The control is the code as it is, which must stand. Each bug is then planted in the code that runs
(tests/planted.py), a twin of breast-cancer of 10 rounds is prepared under it, and the exact parts
and canaries judge it: told are the verdict of each, the least p-value among the tests of the noise,
how far one patient moves the sum, and the seconds all three took. `one_holder_of_many` needs secure
aggregation and is a test (tests/evidence/test_exact.py).
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import common
import numpy as np
import pytest
import torch
from common import table, write_result

import medfed
from medfed.evidence import audit, exact
from medfed.evidence.twin import Twin
from medfed.privacy.attack_statistics import Part

sys.path.append(str(Path(__file__).parents[1]))
from tests import planted

STUDY = ("training.rounds=10", "security.aggregation='plain'")
HEAD = ("planted", "epsilon", "noise", "found", "by", "least p", "moved by C", "refuted", "seconds")


def nothing(patch: pytest.MonkeyPatch) -> None:
    """The control: plant nothing."""


BUGS = {
    bug.__name__: bug
    for bug in (nothing, *planted.NOISE, planted.one_noise_for_all_sites, *planted.SENSITIVITY)
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.parser(__doc__)
    parser.add_argument(
        "--numbers", type=int, default=exact.NUMBERS, help="numbers of noise that are drawn"
    )
    parser.add_argument("--bugs", nargs="*", default=list(BUGS), help=f"some of {', '.join(BUGS)}")
    args = parser.parse_args(argv)

    torch.set_num_threads(1)  # tiny tensors: waking a second thread would be most of the time
    bugs = ["nothing", "half_the_noise_in_resolve", "clipping_skipped"] if args.tiny else args.bugs
    numbers = 2000 if args.tiny else args.numbers
    epsilons = (1.0,) if args.tiny else (1.0, 8.0)

    with patch.object(exact, "NUMBERS", numbers):
        results = [
            judge(bug, epsilon, mode)
            for bug in bugs
            for epsilon in epsilons
            for mode in ("site", "shared")
        ]
    print(table(HEAD, [row(result) for result in results]))
    if not args.tiny:
        write_result("audit-power", {"numbers": numbers, "study": list(STUDY), "results": results})


def judge(name: str, epsilon: float, mode: str) -> dict[str, Any]:
    """Plant one bug, judge a twin under it, and take the bug out again."""
    rng = np.random.default_rng(1)
    study = medfed.load_study(
        "breast-cancer", (*STUDY, f"privacy.epsilon={epsilon}", f"privacy.noise={mode!r}")
    )
    with pytest.MonkeyPatch.context() as patch:
        BUGS[name](patch)
        twin = Twin.of(study, None, rng)
        began = time.perf_counter()
        parts = [exact.noise(twin), exact.sensitivity(twin, rng), audit.one_run(twin, rng)]
        seconds = time.perf_counter() - began

    return {
        "bug": name,
        "epsilon": epsilon,
        "noise": mode,
        "found": any(part.passed is False for part in parts),
        "by": [part.name for part in parts if part.passed is False],
        "seconds": seconds,
        **figures(parts),
    }


def figures(parts: Sequence[Part]) -> dict[str, Any]:
    """Return each part's own figure."""
    noise, moved, canaries = (part.to_json() for part in parts)
    return {
        "least_p": min(noise["p"].values()),
        "moved": moved["moved"],
        "refuted": canaries.get("refuted"),
        "finds": [noise["finds_below"], noise["finds_above"]],
    }


def row(result: dict[str, Any]) -> tuple[str, ...]:
    refuted = "-" if result["refuted"] is None else f"{result['refuted']:.2f}"
    return (
        result["bug"],
        f"{result['epsilon']:g}",
        result["noise"],
        "yes" if result["found"] else "no",
        ", ".join(result["by"]) or "-",
        f"{result['least_p']:.1g}",
        f"{result['moved']:.4g}",
        refuted,
        f"{result['seconds']:.1f}",
    )


if __name__ == "__main__":
    main()
