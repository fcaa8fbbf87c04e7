"""The nodes of a study's sites, opened on its table: what stands against that is refused first."""

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from medfed.core import quotes
from medfed.core.checks import (
    PlanError,
    RunError,
    nearest,
)
from medfed.core.refusals import refuse
from medfed.data import partition, sources
from medfed.data.frames import Frames
from medfed.data.readers import Reading
from medfed.data.site_table import SiteTable
from medfed.node.consent import Consent, everybody
from medfed.node.site import Site, open_tables
from medfed.planning import rates, recipe
from medfed.privacy import guarantee as guarantees
from medfed.privacy import ledger_file
from medfed.privacy.ledger import Ledger
from medfed.privacy.places import LEDGER, ledger_path, operators_folder
from medfed.privacy.site_ledger import SiteLedger
from medfed.study import Study

logger = logging.getLogger(__name__)


def open_sites(
    study: Study,
    data: Path | None,
    folder: Path | None = None,
    progress: bool = False,
    table: Reading | None = None,
    consent: Consent = everybody,
    pays: bool = True,
) -> list[Site]:
    """Return a node for each site of the study;
    their study has its data table completed by the source.

    `table` is the study's, where it is read already; `consent` says who may be read. Without `pays`
    there is no ledger.
    """
    with quotes.withhold(study.privacy.meant):
        return _open_sites(study, data, folder, progress, table, consent, pays=pays)


def complete(study: Study) -> Study:
    """Return a study as its sites have it, from its file alone: what it leaves open chosen, its
    data completed.

    What a party that holds no record needs: the coordinator, an aggregator. Raises what stands
    against the study.
    """
    study, refusals = recipe.examine(study)
    refuse(refusals)
    return rates.settle(study)


def open_site(
    study: Study,
    name: str,
    data: Path | None = None,
    folder: Path | None = None,
    consent: Consent = everybody,
) -> Site:
    """Return the node of one site, with its own records and ledger alone;
    raise RunError where it has no record.
    """
    with quotes.withhold(study.privacy.meant):
        return _open_sites(study, data, folder, False, None, consent, only=name)[0]


def _open_sites(
    study: Study,
    data: Path | None,
    folder: Path | None,
    progress: bool,
    table: Reading | None,
    consent: Consent,
    only: str = "",
    pays: bool = True,
) -> list[Site]:
    # what needs no record is refused before one is read, and before a ledger is founded
    study = complete(study)
    private = guarantees.asked(study)
    if private:
        study = settle_identity(study, folder)
    frames, completed = sources.frames(study, data, progress, private, table)
    study = dataclasses.replace(study, data=completed)
    if only:
        if only not in frames:
            raise RunError(f"site {only!r} has no record in this table; {nearest(only, frames)}")
        frames = Frames.one(only, frames[only])
    tables = open_tables(frames, study)
    del frames
    # a large table's texts, which else stay resident while rows are encoded
    pa.default_memory_pool().release_unused()
    if study.sites.kind == "device":
        study = recipe.settle(
            study, [name for name, table in tables.items() if not table.test.all()]
        )

    account = None
    if private:
        _check_places(tables.values(), study)
        _check_scope(tables.values(), study)
    if private and pays:
        account = SiteLedger(ledger_path(study, folder), study)
    return [Site(name, table, study, folder, account, consent) for name, table in tables.items()]


def settle_identity(study: Study, folder: Path | None) -> Study:
    """Return the study with the identity rule of the site's ledger;
    refuse another: everybody would look new.
    """
    asked = study.data.identity
    mine = operators_folder()
    if study.privacy.simulation_only:
        path = None
    elif study.privacy.scope == "run":
        path = mine / LEDGER if mine else None
    else:
        path = ledger_path(study, folder)
    rule = ledger_file.rule_of(path) if path else None
    if rule and asked not in ("auto", rule):
        raise PlanError(
            f"data.identity={asked!r} and the site's ledger, which goes by {rule!r}, do not "
            "compose: patients who have paid would look new. Leave data.identity out."
        )
    # written out, so that a resumed run has it too
    rule = rule or ("exact" if asked == "exact" else "canonical")
    return dataclasses.replace(study, data=dataclasses.replace(study.data, identity=rule))


def _check_places(tables: Iterable[SiteTable], study: Study) -> None:
    """Refuse patients at more sites than the study attests,
    where their names can be compared: in one process.
    """
    if not study.data.patient:
        return
    seen = Counter(
        name for table in tables for name in table.ids if not str(name).startswith(partition.OWN)
    )

    most = study.privacy.max_sites_per_patient
    if many := sum(count > most for count in seen.values()):
        logger.warning(
            "%d patients have records at more than %d sites, up to %d",
            many,
            most,
            max(seen.values()),
        )
        raise PlanError(
            f"privacy.max_sites_per_patient={most}, but there are patients with records at more "
            "sites; the noise would hide less than it claims. Raise it, or correct the table: "
            f"they are those whose name in column {study.data.patient!r} stands at more sites."
        )


def _check_scope(tables: Iterable[SiteTable], study: Study) -> None:
    """Refuse a ledger for this run alone where some of its patients have a lifetime budget here."""
    mine = operators_folder()
    p = study.privacy
    if p.scope != "run" or p.simulation_only or not mine or not (mine / LEDGER).exists():
        return

    if not study.data.patient:
        if study.data.source:  # a built-in source is public
            return
        raise PlanError(
            "privacy.scope='run' without data.patient and the site's ledger do not compose: "
            "whether these patients have a lifetime budget cannot be told. Set "
            "data.patient='column', which names the patient."
        )

    with Ledger.open(mine / LEDGER, read_only=True) as book:
        known = book.knows(name for table in tables for name in table.ids)
    if known:
        logger.warning("%d patients of this table have a lifetime budget in %s", known, mine)
        raise PlanError(
            "privacy.scope='run' and the site's ledger do not compose: some of these patients "
            "have a lifetime budget, which this run would not count. Set privacy.scope='study'."
        )
