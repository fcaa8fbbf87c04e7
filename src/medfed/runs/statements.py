"""What the sites tell of their ledgers, asked by the coordinator."""

from collections.abc import Mapping

from medfed.core import codec
from medfed.core.checks import CodecError, LedgerError, SiteError, some
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
    for name in plan.present:
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
    """Raise SiteError for payments that no ledger of this plan knows, or that nobody could count.

    What is merely more than the plan holds stands, and ends the run by the site's name: a ledger
    may know of rounds that a crash lost.
    """
    strange = sorted(told.queries.keys() - guarantee.queries.keys())
    most = _FAR * guarantee.uses
    if strange or told.uses > most or any(n > most for n in told.queries.values()):
        raise SiteError(
            f"its statement tells of uses={told.uses}, queries={dict(told.queries)}; expected at "
            f"most {most}, and queries of {some(sorted(guarantee.queries)) or 'no kind'}. Nothing "
            "of it is counted."
        )


_FAR = 10  # times as many rounds as a plan holds are no count of it


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
