"""`medfed compare`: algorithms side by side, with what is chance and what is not."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from medfed.cli.common import AsJson, DataFolder, Settings, StudyName, console

if TYPE_CHECKING:
    from medfed.evidence.compare import Comparison


def compare(
    study: StudyName,
    algorithms: Annotated[
        str, typer.Option(help="Which, with commas.")
    ] = "fedavg,fedprox,scaffold,fednova",
    seeds: Annotated[int, typer.Option(help="Runs of each, 2 or more.")] = 10,
    noise: Annotated[
        str, typer.Option(help="study: as the study says; none; site: each site's, at its epsilon.")
    ] = "study",
    workers: Annotated[
        int, typer.Option(help="Processes at once; 0: as many as there are cores.")
    ] = 0,
    settings: Settings = [],  # noqa: B006
    data: DataFolder = None,
    out: Annotated[Path | None, typer.Option(help="Write a page of it here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Train algorithms on the same splits and first weights, seed by seed, and say which
    differences are not chance.
    """
    from medfed.core import files
    from medfed.evidence.compare import compare as compared
    from medfed.planning import fix
    from medfed.screens.reports import comparison_page

    asked = fix.load(study, settings)
    found = compared(
        asked, algorithms.split(","), seeds, noise, data, workers or os.cpu_count() or 1
    )
    if out:
        files.make_folder(out.parent)
        files.write(out, comparison_page(found.to_json()))
    if as_json:
        print(json.dumps(found.to_json()))
        return
    console().print(_table(found))
    for line in found.verdicts():
        console().print(line, highlight=False, markup=False)
    if out:
        console().print(f"page: {out}", highlight=False, markup=False)


def _table(found: "Comparison") -> Table:
    lines = found.table()
    title = f"{escape(found.study)}, noise: {found.noise}; {lines[0]['seeds']} seeds, mean and sd"
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    table.add_column("algorithm")
    names = list(found.figures())
    for name in (f"final {lines[0]['score']}", *names[1:], "accuracy", "seconds", "MB up"):
        table.add_column(name, justify="right")
    for line in lines:
        cells = [f"{line[n]['mean']:.4g} ± {line[n]['sd']:.2g}" for n in names]
        accuracy = "-" if line["accuracy"] is None else f"{line['accuracy']:.3f}"
        table.add_row(
            line["algorithm"],
            *cells,
            accuracy,
            f"{line['seconds']:.2f}",
            f"{line['bytes_up'] / 1e6:.2f}",
        )
    return table
