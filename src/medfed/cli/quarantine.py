"""`medfed quarantine`: who sits out, and an operator's word on it."""

import getpass
import json
from pathlib import Path
from typing import Annotated

import typer

from medfed.cli.common import AsJson, console

app = typer.Typer(
    no_args_is_help=True, help="Clients under suspicion in a run: look, and grant an appeal."
)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder.")]


@app.command("list")
def quarantine_list(run: Run, as_json: AsJson = False) -> None:
    """Show who has something held against it, and until which round it sits out."""
    from medfed import runs

    found = runs.list_quarantined(run)
    if as_json:
        print(json.dumps(found))
        return
    for one in found:
        sits = f"sits out until round {one['until']}" if one["until"] else "takes part"
        console().print(
            f"{one['client']}  {one['total']:g} held against it; {sits}",
            highlight=False,
            markup=False,
        )
    if not found:
        console().print("nothing is held against anybody")


@app.command("lift")
def quarantine_lift(
    run: Run,
    client: Annotated[str, typer.Argument(help="The client, as `quarantine list` names it.")],
    reason: Annotated[str, typer.Option(help="Why; it stays on record.")],
    operator: Annotated[str, typer.Option(help="Who decides; default: who is logged in.")] = "",
) -> None:
    """Let a client take part from the next round on,
    with nothing held against it; the decision is an event.
    """
    from medfed import runs

    who = operator or _find_operator()
    runs.lift_quarantine(run, client, reason, who)
    console().print(
        f"{client} takes part from the next round on; on record: {who}: {reason}", markup=False
    )


def _find_operator() -> str:
    """Return who is logged in. Raises RunError where the system does not know."""
    from medfed.core.checks import RunError

    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError) as error:
        raise RunError(
            "operator=''; who is logged in is not known here, and it stays on record. Set "
            "--operator."
        ) from error
