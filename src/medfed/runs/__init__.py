"""Runs: a study executed in a folder of its own, resumed, simulated, looked at."""

from medfed.runs.decisions import GIVEN_UP, OVERRIDES
from medfed.runs.execute import resume, run, simulate
from medfed.runs.folders import OWN_LOG, SITE_MAPS, read_plan, versions
from medfed.runs.giving_up import give_up
from medfed.runs.ledgers import (
    accept_ledger,
    decide_budget,
    found_ledger,
    ledger_accounts,
    name_column,
)
from medfed.runs.opening import complete, open_site, open_sites
from medfed.runs.outlook import privacy_outlook, survey
from medfed.runs.quarantine import lift_quarantine, list_quarantined
from medfed.runs.results import Result, load
from medfed.runs.simulation import (
    Parties,
    PreparedData,
    Simulation,
    baseline_plan,
    prepare_data,
    prepare_sites,
)
from medfed.runs.verification import verify_model, verify_trail

__all__ = [
    "GIVEN_UP",
    "OVERRIDES",
    "OWN_LOG",
    "SITE_MAPS",
    "Parties",
    "PreparedData",
    "Result",
    "Simulation",
    "accept_ledger",
    "baseline_plan",
    "complete",
    "decide_budget",
    "found_ledger",
    "give_up",
    "ledger_accounts",
    "lift_quarantine",
    "list_quarantined",
    "load",
    "name_column",
    "open_site",
    "open_sites",
    "prepare_data",
    "prepare_sites",
    "privacy_outlook",
    "read_plan",
    "resume",
    "run",
    "simulate",
    "survey",
    "verify_model",
    "verify_trail",
    "versions",
]
