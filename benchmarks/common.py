"""What every benchmark shares: its table, its machine, and where its result is written."""

import argparse
import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medfed import Study
    from medfed.data.federated import Rows
    from medfed.node.inprocess import InProcess
    from medfed.planning.plan import Plan

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a benchmark's parser with `--tiny`, by which the tests see that each one
    still runs.
    """
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument(
        "--tiny", action="store_true", help="as small as can be, and no file: that it still runs"
    )
    return found


def absent(peer: str, place: str) -> None:
    """Say that a peer is left out."""
    print(f"{peer} is not installed ({place}): left out")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a plain table, columns aligned."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in [head, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def machine() -> dict[str, Any]:
    """Return what decides a timing: processor, cores, versions."""
    from medfed.runs import versions

    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "versions": versions(),
    }


def write_result(name: str, result: dict[str, Any]) -> None:
    """Write a result with machine and date to benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    day = datetime.now(UTC).date().isoformat()
    content = {"benchmark": name, "date": day, "machine": machine(), **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def without_privacy(study: "Study", **training: Any) -> "Study":
    """Return a bundled study with no guarantee, plain rows and robust scaling, to time and compare
    training.
    """
    from medfed.study import Privacy, Security, Training

    plain = dataclasses.replace(
        study, privacy=Privacy(), training=Training(**training), security=Security()
    )
    return plain.set("data.preprocess", "robust")


def bare_federation(
    study: "Study", rows: "dict[str, tuple[Rows, Rows]]"
) -> "tuple[Plan, InProcess]":
    """Return plan and fleet for rows that are numbers already: site -> (training rows, test rows);
    binary target.

    Rows come together in plain sight, as no keys are made for these sites.
    """

    from medfed.data.encoding import Column, Encoding, Target
    from medfed.node.inprocess import InProcess
    from medfed.node.site import Site
    from medfed.planning.plan import build_model, make

    study = study.set("security.aggregation", "plain")
    width = next(iter(rows.values()))[0].x.shape[1]
    encoding = Encoding(
        tuple(Column(f"x{i}", "number") for i in range(width)),
        Target("y", "binary", ("0", "1")),
        public=True,
    )
    model = build_model(study, encoding)
    sites = []
    surveys = {}
    for name, (train, test) in rows.items():
        site = Site(name, None, study)
        site.encoding = encoding
        site.model = model
        site.train = train
        site.test = test
        site.forget()
        sites.append(site)
        labels = {str(k): int((train.y == k).sum()) for k in (0, 1)}
        surveys[name] = {
            "train": len(train),
            "test": len(test),
            "labels": labels,
            "train_labels": labels,
            "missing": {},
        }
    plan = make(study, surveys, encoding)
    for site in sites:
        site.guarantee = plan.guarantee
        site.links = plan.links
    return plan, InProcess(sites)
