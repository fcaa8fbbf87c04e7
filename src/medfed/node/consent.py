"""Who may be read: asked at a site before every charge and every reading of its records."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

import numpy as np


class Consent(Protocol):
    """What a site asks: a register of who has agreed, or withdrawn. It stays at the site, like the
    ids it is asked of.

    Whoever it does not name is not enrolled, not trained on and not tested on. Who withdraws after
    being enrolled is charged with the cohort for the rounds of that run all the same. An error of
    it stops what was asked, and nothing is charged or read.
    """

    def __call__(self, ids: Sequence[str], purpose: str, time: datetime) -> np.ndarray:
        """Return who may be read.

        Args:
            ids: the site's patients, as its ledger names them.
            purpose: what the study says it is for (`study.purpose`).
            time: now, with its zone.

        Returns:
            A mask over `ids`, bool [patients].
        """
        ...


def everybody(ids: Sequence[str], purpose: str, time: datetime) -> np.ndarray:
    """Say that everybody may be read: the hospital asked its patients before it made the table."""
    return np.ones(len(ids), dtype=bool)
