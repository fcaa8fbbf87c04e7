"""A run's log as flat tables (rounds, sites, tests, findings), to be evaluated elsewhere."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medfed.core import files
from medfed.core.checks import PlanError
from medfed.monitor.metrics import Figure
from medfed.screens.story import Story

FORMATS = ("json", "csv", "parquet")
TABLES = ("rounds", "sites", "tests", "findings")


def export_tables(
    folder: str | Path,
    out: str | Path | None = None,
    formats: Sequence[str] = FORMATS,
) -> list[Path]:
    """Write a run's log as flat tables (rounds, sites, tests, findings), each in every format.

    Raises PlanError for a format that is not one of json, csv, parquet.
    """
    _check(formats)
    folder = Path(folder)
    return write_tables(Story.of(folder), Path(out) if out else folder / "export", formats)


def write_tables(story: Story, place: Path, formats: Sequence[str]) -> list[Path]:
    """Write a run's tables into a folder, each in every format; return where. Raises PlanError for
    an unknown one.
    """
    _check(formats)
    files.make_folder(place)
    found = tables(story)
    with files.hold(place):
        written = {
            place / f"{name}.{kind}": serialise(kind, frame)
            for name, frame in found.items()
            for kind in formats
        }
        for path, content in written.items():
            files.write(path, content)
    return list(written)


def serialise(kind: str, frame: pd.DataFrame) -> bytes | str:
    """Return a table as the content of a file."""
    if kind == "csv":
        return frame.to_csv(index=False)
    if kind == "json":
        return frame.to_json(orient="records", indent=1)
    content = io.BytesIO()
    frame.to_parquet(content, index=False)
    return content.getvalue()


def _check(formats: Sequence[str]) -> None:
    if unknown := set(formats) - set(FORMATS):
        raise PlanError(f"formats={sorted(unknown)}; expected some of {', '.join(FORMATS)}")


def tables(story: Story) -> dict[str, pd.DataFrame]:
    """Return a run's log as flat tables."""
    named = set(story.sites)

    # A row each: of rounds, of sites in rounds, of figures in tests, of findings
    rounds = [
        {
            "round": one.round,
            "clients": len(one.clients),
            "loss": one.loss,
            "seconds": one.seconds,
            "bytes_up": one.bytes_up,
            "bytes_down": one.bytes_down,
            "epsilon": one.privacy.get("epsilon"),
        }
        for one in story.rounds.values()
    ]
    sites = [
        {"round": one.round, "site": name, "loss": loss, "seconds": seconds, "steps": steps}
        for one in story.rounds.values()
        for name, loss, seconds, steps in zip(
            one.clients, one.losses, one.site_seconds, one.steps, strict=True
        )
        if name in named
    ]
    tests = [
        {"round": one.round, "model": one.model, "site": site, "figure": name} | _ends(figure)
        for one in [*story.tests.values(), *story.baselines.values()]
        for site, figures in {"all": one.all_sites, **one.per_site}.items()
        for name, figure in figures.items()
    ]
    findings = [
        {"round": one.round, **finding}
        for one in story.inspected.values()
        for finding in one.findings
    ]

    # Their columns, also where there is no row
    columns: dict[str, list[str]] = {
        "rounds": ["round", "clients", "loss", "seconds", "bytes_up", "bytes_down", "epsilon"],
        "sites": ["round", "site", "loss", "seconds", "steps"],
        "tests": ["round", "model", "site", "figure", "value", "low", "high"],
        "findings": ["round", "client", "score", "kind", "evidence"],
    }
    rows: dict[str, list[Any]] = {
        "rounds": rounds,
        "sites": sites,
        "tests": tests,
        "findings": findings,
    }
    return {
        name: pd.DataFrame(rows[name], columns=pd.Index(head)) for name, head in columns.items()
    }


def _ends(figure: Figure) -> dict[str, float | None]:
    return {"value": figure.value, "low": figure.low, "high": figure.high}
