"""`medfed serve`: runs in a browser, as they happen."""

import os
from pathlib import Path
from typing import Annotated

import typer

from medfed.cli.common import console


def serve(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A folder that holds runs, or a run's.")
    ] = Path("runs"),
    host: Annotated[
        str, typer.Option(help="Where to listen; other than this machine needs TLS.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8642,
    certificate: Annotated[
        Path | None, typer.Option(help="TLS certificate (PEM, with its chain).")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="Its private key (PEM).")] = None,
    site: Annotated[
        str, typer.Option(help="Show what this site may see, and no other site's figures.")
    ] = "",
) -> None:
    """Show runs in a browser as they happen, with their pages,
    downloads and /metrics; read-only, until Ctrl-C.

    The address that is printed holds a token; without it nothing is shown. MEDFED_TOKEN sets it (20
    characters or more), as a scraper of /metrics needs.
    """
    from medfed.screens import serve as server

    def ready(address: str) -> None:
        console().print(f"open {address}", highlight=False, markup=False, soft_wrap=True)

    server.serve(
        folder, host, port, os.environ.get("MEDFED_TOKEN", ""), certificate, key, site, ready
    )
