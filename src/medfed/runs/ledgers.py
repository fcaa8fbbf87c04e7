"""The ledgers of a site's operators: looked at, founded, decided on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medfed.core.checks import (
    LedgerError,
    PlanError,
    some,
)
from medfed.privacy import guarantee as guarantees
from medfed.privacy import ledger_file
from medfed.privacy.ledger import Ledger
from medfed.privacy.ledger_entries import Lifetime
from medfed.privacy.places import LEDGER, home, ledger_path
from medfed.privacy.statement import every
from medfed.rounds import checkpoints
from medfed.runs import claims
from medfed.runs.folders import read_plan


def ledger_accounts(
    place: Path | None, delta: float | None = None, heads: Sequence[str] = ()
) -> dict[str, Any]:
    """Return what a ledger holds, its chain checked: of a run's folder, a ledger's folder, or the
    lifetime ledger.

    `delta` None takes the ledger's own. Raises LedgerError where one of `heads`, or a head that the
    run was told, is no longer in the chain.
    """
    folder = place or home()
    path = next((p for p in (folder / "sites" / LEDGER, folder / LEDGER) if p.exists()), None)
    if (
        path is None
        and (folder / "plan.json").exists()
        and guarantees.asked(study := read_plan(folder)[0])
    ):
        path = ledger_path(study, folder / "sites")

    if path and not path.exists() and (own := sorted(folder.glob(f"sites/*/{LEDGER}"))):
        raise LedgerError(
            f"{folder}: each site of this run has a ledger of its own; give one's folder: "
            f"{some([str(one.parent) for one in own])}"
        )
    if path is None:
        ledger_file.rule_of(folder / LEDGER)  # says where one is lost
        raise LedgerError(
            f"{str(folder)!r} holds no {LEDGER}; give a run's folder, or the ledger's"
        )

    with Ledger.open(path, read_only=True) as ledger:
        for head in (*heads, *_read_heads(folder)):
            ledger.refuse_without(head)
        delta = delta or (ledger.lifetime.delta if ledger.lifetime else 1e-6)
        spent = [dataclasses.asdict(account) for account in ledger.list_spent(delta)]
        return {
            "delta": delta,
            "head": ledger.head(),
            "charges": len(ledger.rows()),
            "lifetime": dataclasses.asdict(ledger.lifetime) if ledger.lifetime else None,
            "decisions": ledger.decisions(),
            "accounts": spent,
        }


def _read_heads(folder: Path) -> list[str]:
    """Return the heads that a run's folder keeps: of its last checkpoint, and of its claim."""
    found: list[str] = []
    if (folder / "checkpoints").is_dir():
        found += every(checkpoints.read_last(folder / "checkpoints")[1].get("ledger"))
    if (folder / "privacy.json").exists():
        found += every(
            ((claims.read(folder).get("composition") or {}).get("ledger") or {}).get("head")
        )
    return found


def found_ledger(folder: Path | None, founding: Lifetime) -> Path:
    """Found a site's ledger by its operator's word; return its folder.

    Raises LedgerError where there is, or was, one; PlanError without a name.
    """
    path = (folder or home()) / LEDGER
    if not founding.operator.strip():
        raise PlanError("operator=''; expected who decides: it stays on record. Set --operator.")
    if path.exists():
        raise LedgerError(
            f"{path} is a ledger already; its budget changes by `medfed privacy budget`"
        )
    with Ledger.open(path, founding=founding) as ledger:
        if ledger.lifetime != founding:
            raise LedgerError(
                f"{path} was founded by somebody else just now; look at it by `medfed privacy "
                "ledger`"
            )
    return path.parent


def decide_budget(
    folder: Path | None, epsilon: float, delta: float | None, operator: str, reason: str
) -> Lifetime:
    """Have a site's operator change its lifetime budget, on record; without `delta` it stays."""
    path = (folder or home()) / LEDGER
    if not path.exists():
        raise LedgerError(f"{path} does not exist; found it by `medfed privacy found`")
    with Ledger.open(path) as ledger:
        if delta is None and ledger.lifetime is None:
            raise PlanError(
                "delta is not known: this ledger has no lifetime budget yet. Set --delta."
            )
        kept = ledger.lifetime.delta if ledger.lifetime else 0.0
        return ledger.decide(epsilon, kept if delta is None else delta, operator, reason)


def name_column(folder: Path | None, column: str, operator: str, reason: str) -> None:
    """Have a site's operator say that a column of tables names patients by the ids that its ledger
    knows, on record.
    """
    path = (folder or home()) / LEDGER
    if not path.exists():
        raise LedgerError(f"{path} does not exist; found it by `medfed privacy found`")
    with Ledger.open(path) as ledger:
        ledger.know_column(column, operator or " ", reason)


def accept_ledger(folder: Path | None, head: str, operator: str, reason: str) -> None:
    """Have a site's operator take a copy of its ledger as the newest there is, on record: see
    `Ledger.accept`.
    """
    Ledger.accept((folder or home()) / LEDGER, head, operator, reason)
