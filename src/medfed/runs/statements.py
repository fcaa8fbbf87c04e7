"""What the sites tell of their ledgers, asked by the coordinator."""

import math
from collections.abc import Mapping

from medfed.core import codec
from medfed.core.checks import CodecError, LedgerError, SiteError
from medfed.engine.port import Fleet, gather
from medfed.monitor import events
from medfed.planning.plan import Plan
from medfed.privacy.guarantee import Guarantee
from medfed.privacy.statement import Statement
from medfed.rounds.prepare import explain_failures


def ask_statements(
    plan: Plan, fleet: Fleet, holds: str | Mapping[str, str] | None = None, whole: bool = True
) -> dict[str, Statement]:
    """Return what each site tells of its ledger; nothing of a site that pays from none.

    `holds` are the heads that sites told before: each looks for its own in its ledger, and refuses
    where it is gone. `whole` False asks for the head alone. Raises LedgerError with the reasons of
    those who refuse.
    """
    told, refused = hear_statements(plan, fleet, holds, whole)
    if refused:
        raise LedgerError(explain_failures(refused))
    return told


def hear_statements(
    plan: Plan, fleet: Fleet, holds: str | Mapping[str, str] | None, whole: bool
) -> tuple[dict[str, Statement], dict[str, str]]:
    """Return the statements of those who give one, and of the others why not."""
    if plan.guarantee is None or plan.guarantee.simulation_only:
        return {}, {}
    groups: dict[str | None, list[str]] = {}
    for name in plan.participants:
        groups.setdefault(holds.get(name) if isinstance(holds, Mapping) else holds, []).append(name)

    told: dict[str, Statement] = {}
    refused: dict[str, str] = {}
    known: dict[bytes, Statement] = {}  # thousands may say the same
    for head, names in groups.items():
        payload = codec.encode({"holds": head, "whole": whole})
        for name, reply in gather(fleet, names, "statement", payload, _PATIENCE).items():
            try:
                if reply.error:
                    raise SiteError(reply.error)
                if reply.payload not in known:
                    known[reply.payload] = Statement.read(
                        codec.decode(reply.payload)[0].get("statement")
                    )
                    _refuse_beyond(known[reply.payload], plan.guarantee)
                told[name] = known[reply.payload]
            except (SiteError, CodecError) as error:
                refused[name] = str(error)
    return told, refused


def _refuse_beyond(told: Statement, guarantee: Guarantee) -> None:
    """Raise SiteError for payments that no ledger under this guarantee takes: of one site's word
    nothing may be claimed of all.
    """
    planned = {label: query.times for label, query in guarantee.queries.items()}
    strange = any(n > planned.get(label, 0) for label, n in told.queries.items())
    bound = told.lifetime["epsilon"] if told.lifetime else math.inf
    if strange or _spends_more(told, guarantee) or (told.epsilon or 0.0) > bound * (1 + 1e-9):
        raise SiteError(
            f"its statement tells of uses={told.uses}, queries={dict(told.queries)}, "
            f"epsilon={told.epsilon}, which no ledger of this plan takes. Nothing of it is counted."
        )


def _spends_more(told: Statement, guarantee: Guarantee) -> bool:
    """Say whether so many rounds cost more than a ledger lets anybody spend."""
    if told.uses <= guarantee.uses:
        return False
    if told.uses > 10 * guarantee.uses:
        return True
    kinds = {release: name for name, release in guarantee.releases.items()}
    spent = guarantee.cost(dict.fromkeys(kinds.values(), told.uses), told.queries)
    return spent > guarantee.epsilon * (1 + 1e-6)


_PATIENCE = 600.0  # seconds; nothing is trained meanwhile


def tell_founding(told: Mapping[str, Statement]) -> list[events.Event]:
    """Say with which budget ledgers were founded by this run, as nobody has been asked."""
    bounds = dict.fromkeys(one.founded for one in told.values() if one.founded)
    return [
        events.Warned(
            "the site's budget ledger was founded: no patient may spend more than epsilon "
            f"{bound.epsilon:g} at delta {bound.delta:g} over all studies, ever. Its operator "
            "changes that: medfed privacy budget --lifetime-epsilon E --operator NAME --reason "
            "TEXT"
        )
        for bound in bounds
    ]
