"""What is known before a run: what sites tell of their tables, what a claim will cost."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medfed.core import quotes
from medfed.data import partition
from medfed.data.readers import Reading
from medfed.node.inprocess import InProcess
from medfed.node.site import Site
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
    "at_sites": at how many sites its patients have records, and how many of them have at so many;
    None under a claim, where nothing compares patients without noise.
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
    at_sites = {name: None for name in told} if study.privacy.meant else _count_sites(sites)
    return {
        name: {**one, "spellings": written[name], "at_sites": at_sites[name]}
        for name, one in told.items()
    }


def _count_sites(sites: Sequence[Site]) -> dict[str, dict[int, int]]:
    """Return for each site at how many sites its patients have records, and how many have at so
    many; nothing where no column names patients.
    """
    named = {
        site.name: [name for name in site.table.ids if not str(name).startswith(partition.OWN)]
        for site in sites
        if site.table
    }
    seen = Counter(name for names in named.values() for name in names)
    return {
        site: dict(sorted(Counter(seen[name] for name in names).items()))
        for site, names in named.items()
    }


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
