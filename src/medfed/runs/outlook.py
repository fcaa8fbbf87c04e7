"""What is known before a run: what sites tell of their tables, what a claim will cost."""

import dataclasses
from pathlib import Path
from typing import Any

from medfed.core import quotes
from medfed.data.readers import Reading
from medfed.node.inprocess import InProcess
from medfed.planning.foretell import foretell, paid_test
from medfed.privacy.places import ledger_path
from medfed.rounds.prepare import ask_surveys, prepare
from medfed.runs import claims
from medfed.runs.opening import open_sites
from medfed.runs.simulation import Simulation
from medfed.study import Study


def survey(
    study: Study, data: Path | None = None, progress: bool = False, table: Reading | None = None
) -> dict[str, dict[str, Any]]:
    """Return what each site tells of its table, without training: sizes, gaps, classes.

    Under a claim too, as whoever holds the table sees all of it; but then no cell is quoted.
    `table` is the study's, where it is read already.
    """
    # whoever holds the table sees it all
    looked_at = Study(study.study, study.data, study.sites, folder=study.folder)
    with quotes.withhold(study.privacy.meant):
        sites = open_sites(looked_at, data, None, progress, table)
    fleet = InProcess(sites)
    told = ask_surveys(fleet, fleet.sites())
    # seen here, and told to nobody else
    written = {site.name: site.table.spellings for site in sites if site.table}
    return {name: {**one, "spellings": written[name]} for name, one in told.items()}


def privacy_outlook(
    study: Study, data: Path | None = None, progress: bool = False
) -> dict[str, Any]:
    """Return what a study's target asks for and what it will cost, without training.

    The noise as in `claims.outlook`; "chosen": what the recipe has chosen; "foretold": usefulness,
    see `foretell`.
    """
    simulation = Simulation.open(study, data, None, progress)
    plan = prepare(simulation.study, simulation.fleet, simulation.fleet.sites())
    found = claims.outlook(plan)
    told = [dataclasses.asdict(one) for one in foretell(plan)]
    test = paid_test(plan)

    return {
        **found,
        "chosen": plan.study.choices(),
        "foretold": told,
        "paid_test": dataclasses.asdict(test) if test else None,
        "ledger": _find_ledger(plan.study),
    }


def _find_ledger(study: Study) -> dict[str, Any]:
    """Return in which ledger a run of the study would be charged, and whether it would found it."""
    path = None if study.privacy.scope == "run" else ledger_path(study, None)
    return {"path": str(path) if path else None, "founded": path is not None and path.exists()}
