"""The ledger: what has been spent of the patients' privacy, paid before data is touched."""

from collections.abc import Sequence
from typing import Protocol

from medfed.core.types import JSON


class Ledger(Protocol):
    """Charged before each round; refuses by raising what the budget cannot bear."""

    def charge(self, round: int, clients: Sequence[str]) -> None:
        """Pay for one round of these clients, before they are asked to work."""
        ...

    def claim(self) -> JSON:
        """Return what is guaranteed so far: epsilon, delta, unit, noise; None where nothing is."""
        ...


class NoClaim:
    """The ledger of privacy.noise = "none": charges nothing and claims nothing."""

    def charge(self, round: int, clients: Sequence[str]) -> None:
        """Let every round pass."""

    def claim(self) -> JSON:
        """Say that no epsilon was computed."""
        return {"epsilon": None, "delta": None, "unit": "patient", "noise": "none"}
