"""`medfed alone`: would this site do better with a model of its own?"""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from medfed.cli.common import AsJson, DataFolder, RunFolder, console

if TYPE_CHECKING:
    from medfed.evidence.alone import Alone
    from medfed.monitor.metrics import Figure


def alone(
    run: RunFolder,
    site: Annotated[
        str, typer.Argument(metavar="SITE", help="The site that asks, on its own machine.")
    ],
    data: DataFolder = None,
    as_json: AsJson = False,
) -> None:
    """Train a site's own model, at the site and for its eyes only,
    and hold it against a finished run's.

    No claim covers what is printed: it follows from the site's records without noise. Nothing is
    written or sent.
    """
    from medfed.evidence.alone import compare

    found = compare(run, site, data)
    if as_json:
        print(json.dumps(found.to_json(), indent=2))
        return
    console().print(_table(found))
    console().print(found.verdict(), highlight=False, markup=False)
    console().print(
        "For this site alone: these figures follow from its records without noise.", highlight=False
    )


def _table(found: "Alone") -> Table:
    table = Table(
        title=escape(f"{found.site}: {found.records} held-out record{'s' * (found.records != 1)}"),
        title_justify="left",
        box=None,
    )
    for title in ("figure", "own model", "this run's"):
        table.add_column(title, justify="left" if title == "figure" else "right")
    for name, own in found.own.items():
        table.add_row(name, _format(own), _format(found.federated[name]))
    table.add_row("squared error, own less by", _format(found.own_better), "")
    return table


def _format(figure: "Figure") -> str:
    if figure.value is None:
        return "-"
    if figure.low is None or figure.high is None:
        return f"{figure.value:.4f}"
    return f"{figure.value:.4f} ({figure.low:.4f} to {figure.high:.4f})"
