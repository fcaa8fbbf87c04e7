"""`medfed report`: a run's pages, its report, its log as tables."""

from pathlib import Path
from typing import Annotated

import typer

from medfed.cli.common import RunFolder, console


def report(
    run: RunFolder,
    out: Annotated[
        Path | None, typer.Option(help="Where to write; default: reports/ in the run's folder.")
    ] = None,
    export: Annotated[
        str, typer.Option(help="Also write the log as tables: json, csv, parquet, with commas.")
    ] = "",
) -> None:
    """Write a run's four pages and a report of them all for printing; each opens in a browser
    without a network.
    """
    from medfed.core.checks import advising
    from medfed.screens import dashboards, flat_logs
    from medfed.screens.story import Story

    story = Story.of(run)
    place = out or run / "reports"
    with advising("Nothing else was changed." if out else "Or name a folder of yours by --out."):
        written = list(dashboards.write_pages(story, place, tuple(dashboards.PAGES)).values())
        if export:
            written += flat_logs.write_tables(story, place / "export", export.split(","))
    for path in written:
        console().print(str(path), highlight=False, markup=False, soft_wrap=True)
