"""What the commands share: options, and where they print."""

import getpass
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

StudyName = Annotated[
    str, typer.Argument(metavar="STUDY", help="A study file, or the name of a bundled study.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]
Settings = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Change a study value; repeatable.")
]
DataFolder = Annotated[
    Path | None, typer.Option("--data", help="Folder with downloaded data; default: MEDFED_DATA.")
]
Apart = Annotated[
    bool,
    typer.Option(
        "--processes",
        help="Each site and each aggregator as a process of its own on this machine; no baselines.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON, and nothing else.")]
LogForm = Annotated[
    Literal["json", "text"] | None,
    typer.Option("--log", help="Write a line an event on standard error, in place of progress."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print only warnings and errors, on standard error.")
]
Reason = Annotated[str, typer.Option(help="Why; it stays on record.")]
Operator = Annotated[str, typer.Option(help="Who decides; default: who is logged in.")]


def find_operator() -> str:
    """Return who is logged in. Raises RunError where the system does not know."""
    from medfed.core.checks import RunError

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError) as error:
        raise RunError(
            "operator=''; who is logged in is not known here, and it stays on record. Set "
            "--operator."
        ) from error


def console(quiet: bool = False) -> Console:
    """Return where a command prints: 120 columns where nobody watches."""
    wide = None if sys.stdout and sys.stdout.isatty() else 120
    return Console(quiet=quiet, width=wide)


def passphrase(twice: bool = False) -> str:
    """Return MEDFED_PASSPHRASE, or what is typed where somebody sits at the keyboard;
    empty: none.
    """
    if (given := os.environ.get("MEDFED_PASSPHRASE")) is not None:
        return given
    if not sys.stdin.isatty():
        return ""
    return str(
        typer.prompt(
            "passphrase", hide_input=True, default="", show_default=False, confirmation_prompt=twice
        )
    )
