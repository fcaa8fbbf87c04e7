"""`medfed report`: a run's pages, its report, its log as tables."""

from pathlib import Path
from typing import Annotated

import typer

from medfed.cli.common import RunFolder, console


def report(
    run: RunFolder,
    out: Annotated[Path | None, typer.Option(help="Where to write; default: reports/ in the run's folder.")] = None,
    export: Annotated[str, typer.Option(help="Also write the log as tables: json, csv, parquet, with commas.")] = "",
) -> None:
    """Write a run's four pages and a report of them all for printing; each opens in a browser without a network."""
    from medfed.monitor import dashboards

    place = out or run / "reports"
    written = list(dashboards.create_interactive_dashboards(run, place).values())
    written.append(dashboards.generate_comprehensive_report(run, place / "report.html"))
    if export:
        written += dashboards.export_training_logs(run, place / "export", export.split(","))
    for path in written:
        console().print(str(path), highlight=False, markup=False, soft_wrap=True)
