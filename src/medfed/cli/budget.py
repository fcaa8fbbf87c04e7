"""`medfed privacy found`, `budget`, `column`, `accept`: what a site's operator decides about its
ledger, on record.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

from medfed.cli.common import console

Place = Annotated[
    Path | None,
    typer.Argument(
        metavar="FOLDER",
        help="The ledger's folder; default: MEDFED_HOME, or the user's data folder.",
    ),
]
Epsilon = Annotated[
    float,
    typer.Option("--lifetime-epsilon", help="What no patient may exceed over all studies, ever."),
]
Operator = Annotated[str, typer.Option(help="Who decides; it stays on record.")]
Reason = Annotated[str, typer.Option(help="Why; it stays on record.")]


def found(
    lifetime_epsilon: Epsilon,
    delta: Annotated[
        float, typer.Option(help="At which delta; below 1 / number of patients of the site.")
    ],
    operator: Operator,
    folder: Place = None,
    identity: Annotated[
        Literal["canonical", "exact"],
        typer.Option(
            help="When two ids are one patient, as data.identity says; it can never be changed."
        ),
    ] = "canonical",
    reason: Reason = "",
) -> None:
    """Found a site's budget ledger: the lifetime budget of its patients, and who is one patient."""
    from medfed import runs
    from medfed.privacy.ledger_entries import Lifetime

    place = runs.found_ledger(
        folder, Lifetime(lifetime_epsilon, delta, identity, operator.strip(), reason.strip())
    )
    console().print(f"ledger: {place}", highlight=False, soft_wrap=True, markup=False)
    console().print(
        "Back up the whole folder, and set MEDFED_HOME to it wherever studies run.",
        highlight=False,
        markup=False,
    )


def budget(
    lifetime_epsilon: Epsilon,
    operator: Operator,
    reason: Reason,
    folder: Place = None,
    delta: Annotated[float | None, typer.Option(help="At which delta; default: as it was.")] = None,
) -> None:
    """Change the lifetime budget of a site's patients, on record:
    for all studies, from the next charge on.
    """
    from medfed import runs

    now = runs.decide_budget(folder, lifetime_epsilon, delta, operator, reason)
    console().print(
        f"lifetime budget: epsilon {now.epsilon:g} at delta {now.delta:g}, decided by "
        f"{now.operator}: {now.reason}",
        highlight=False,
        markup=False,
    )


def column(
    name: Annotated[
        str, typer.Argument(metavar="COLUMN", help="A table's column, as data.patient names it.")
    ],
    operator: Operator,
    reason: Reason,
    folder: Place = None,
) -> None:
    """Say that another column names patients by the ids that the ledger knows, on record.

    A ledger takes the first study's column; under one with other ids the same people would look
    new.
    """
    from medfed import runs

    runs.name_column(folder, name, operator, reason)
    console().print(f"patients are also known by column {name!r}", highlight=False, markup=False)


def accept(
    head: Annotated[
        str,
        typer.Option(
            help="The head of this copy, as `medfed privacy ledger` and your claims tell."
        ),
    ],
    operator: Operator,
    reason: Reason,
    folder: Place = None,
) -> None:
    """Take an old copy of a lost ledger as the newest there is, on record: what was charged after
    it is forgotten.

    For when the newest copy of the folder is lost. Lower the budget by what patients may have spent
    since.
    """
    from medfed import runs

    runs.accept_ledger(folder, head, operator, reason)
    console().print("accepted; it stays on record in the ledger", highlight=False, markup=False)
