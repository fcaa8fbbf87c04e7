"""`medfed study check`, `fix`: what stands against a study,
all at once, and the study that would be accepted.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from medfed.cli.common import AsJson, DataFolder, Settings, StudyName, console

app = typer.Typer(
    no_args_is_help=True, help="Whether a study would be accepted, and the one that would."
)


@app.command()
def check(study: StudyName, set: Settings = []) -> None:  # noqa: B006
    """Tell all that stands against a study,
    from its file and its table's header; no record is read.

    Sites and cells are looked at by `medfed data show`, and by a run before it trains.
    """
    from medfed.planning import fix as fixes

    name = fixes.check(study, set).study.name
    console().print(f"{name}: nothing stands against it", highlight=False, markup=False)


@app.command()
def fix(
    study: StudyName,
    set: Settings = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(help="Write it to a new file; none is overwritten.")
    ] = None,
    from_data: Annotated[
        bool,
        typer.Option(
            "--from-data",
            help=(
                "Read ranges, categories and sizes off the records: for public or simulated "
                "ones alone, which no claim covers."
            ),
        ),
    ] = False,
    data: DataFolder = None,
    as_json: AsJson = False,
) -> None:
    """Print the study that would be accepted:
    what has a safe answer is set, what only you know is a blank.

    A blank (range = [], categories = [], a size of 0) is refused until it is filled in. Columns are
    named from the table's header; no record is read but by --from-data. Comments of the file are
    not kept.
    """
    from medfed.planning import fix as fixes

    fixed = fixes.fix(study, set, data, from_data, out)
    if out:
        fixes.write(fixed, out)
    if as_json:
        print(json.dumps(asdict(fixed), indent=2))
        return
    if not out:
        print(_escape_unprintable(fixed.text), end="")
    said = Console(stderr=True)
    told = [f"stood against it: {len(fixed.stood)}; blanks to be filled in: {len(fixed.blanks)}"]
    told += [f"left for you to decide: {text}" for text in fixed.left]
    told += [f"written to {out}"] if out else []
    for line in told:
        said.print(line, highlight=False, markup=False, soft_wrap=True)


def _escape_unprintable(text: str) -> str:
    """Return TOML that standard output can say: what its encoding lacks in TOML's own escapes,
    which read the same.
    """
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return "".join(c if c.encode(encoding, "ignore") else f"\\U{ord(c):08X}" for c in text)
