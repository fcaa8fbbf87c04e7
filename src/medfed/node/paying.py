"""What a site's patients pay, and what it tells of its ledger."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from medfed.core import codec
from medfed.core.checks import SiteError
from medfed.data.site_table import SiteTable
from medfed.node.site import Answer, Header, Site, operation, table_of, tell_nothing
from medfed.privacy.site_ledger import SiteLedger
from medfed.privacy.statement import Statement


@operation("enrol")
def _enrol(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Enrol the sites' training patients in their ledger;
    refuse a plan that their budget does not bear.
    """
    account = sites[0].account
    guarantee = sites[0].guarantee
    if account and guarantee:
        rosters = {site.name: _training_ids(table_of(site)) for site in sites}
        account.enrol(header["run"], rosters, guarantee, header["fresh"])
    return tell_nothing(sites)


@operation("statement", blind=True)
def _state(sites: Sequence[Site], header: Header, tensors: Mapping[str, Tensor]) -> list[Answer]:
    """Tell of each site's ledger what the coordinator needs, once it holds the head that the
    coordinator was told.

    Where no ledger is paid from, nothing is told. `whole` False tells the head alone.
    """
    answers: list[Answer] = []
    # by account: the sites of one ledger share it
    told: dict[int, tuple[Statement, Mapping[str, int]]] = {}
    alike: dict[tuple[int, int], bytes] = {}  # thousands may say the same
    for site in sites:
        account = site.account
        if account is None or site.guarantee is None or site.guarantee.simulation_only:
            answers.append(codec.encode({"statement": None}))
            continue
        if id(account) not in told:
            told[id(account)] = _of_ledger(account, header)
        statement, uses_of = told[id(account)]
        uses = uses_of.get(site.name, 0)
        key = id(account), uses
        if key not in alike:
            alike[key] = codec.encode({"statement": replace(statement, uses=uses).to_json()})
        answers.append(alike[key])
    return answers


def _of_ledger(account: SiteLedger, header: Header) -> tuple[Statement, Mapping[str, int]]:
    """Return what an account tells of its ledger, and how many rounds each of its sites has paid.

    Raises LedgerError where the ledger does not hold a head that the coordinator was told.
    """
    if head := header.get("holds"):
        account.refuse_without(head)
    # nobody is enrolled, and nothing known of this run
    if not header.get("whole") or account.guarantee is None:
        return Statement(account.ledger.head()), {}
    found: Any = account.report()
    guarantee = account.guarantee
    uses = account.uses()
    queries = account.queries()
    # who has paid most follows from who is there: never less is told than whoever could be there
    # has paid in this run, a function of public facts
    known = {name: uses.get(name, 0) for name in guarantee.releases}
    statement = Statement(
        head=found["head"],
        queries=queries,
        epsilon=max(found["epsilon_all_runs"], guarantee.cost(known, queries)),
        lifetime=found["lifetime"],
        founded=account.read_founded(),
    )
    return statement, uses


def _training_ids(table: SiteTable) -> np.ndarray:
    ids: np.ndarray = table.ids[np.unique(table.patient[~table.test])]
    return ids


def charge(sites: Sequence[Site], round: int) -> dict[str, SiteError]:
    """Charge the patients of each site for a round,
    all sites of one ledger at once; return who refuses.
    """
    paying = [
        site
        for site in sites
        if site.account and site.guarantee and not site.guarantee.simulation_only
    ]
    if not paying:
        return {}
    account = paying[0].account
    assert account is not None
    _refuse_unenrolled(account, paying)
    return {
        name: SiteError(str(reason))
        for name, reason in account.pay(round, [s.name for s in paying]).items()
    }


def _refuse_unenrolled(account: SiteLedger, sites: Sequence[Site]) -> None:
    """Raise SiteError where a site was prepared for another guarantee than its patients pay for:
    its noise would be of one, and the charge of the other.
    """
    enrolled = account.guarantee
    if enrolled is None:
        return  # who pays says so
    prepared = {id(site.guarantee): site.guarantee for site in sites}
    if any(one is not enrolled and one != enrolled for one in prepared.values()):
        raise SiteError(
            "the coordinator had sites prepared for other participants than patients are enrolled "
            "for; it must enrol them anew"
        )
