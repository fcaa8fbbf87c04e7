"""`medfed quarantine`: who sits out, and an operator's word on it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from medfed.cli.common import AsJson, Operator, Reason, console, find_operator

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
    reason: Reason,
    operator: Operator = "",
) -> None:
    """Let a client take part from the next round on,
    with nothing held against it; the decision is an event.
    """
    from medfed import runs

    who = operator or find_operator()
    runs.lift_quarantine(run, client, reason, who)
    console().print(
        f"{client} takes part from the next round on; on record: {who}: {reason}", markup=False
    )
