"""`medfed watch`: a run in another process, shown as it goes."""

from contextlib import suppress
from typing import Annotated

import typer

from medfed.cli.common import RunFolder, console


def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option("--once", help="Show what is there, and end.")] = False,
) -> None:
    """Show a run's rounds as they happen, until it ends; Ctrl-C ends the watching, not the run."""
    from medfed.screens.console import Progressing
    from medfed.screens.live import follow

    shown = Progressing(console())
    try:
        with suppress(KeyboardInterrupt):
            for told in follow(run / "events.jsonl", once):
                shown(told.event)
    finally:
        shown.close()
