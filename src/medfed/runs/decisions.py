"""What operators decide about a run: who, why and when, on record."""

from datetime import UTC, datetime

from medfed.core.checks import RunError


def sign_off(reason: str, operator: str, kind: str) -> dict[str, str]:
    """Return an operator's word as it goes on record, with the time.

    Raises RunError without reason or name, which says what `kind` of decision stays on record.
    """
    if not reason.strip() or not operator.strip():
        raise RunError(
            f"reason={reason!r}, operator={operator!r}; expected both: {kind} stays on record"
        )
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"reason": reason.strip(), "operator": operator.strip(), "time": now}
