"""Simulated attacks: what a client that lies does to its records, its row, or its row's whole
steps on the wire. For simulation and tests only.

Every module here adds its attacks to ATTACKS when it is imported, and all are: one more attack is
a function in one of them, or a file beside them.
"""

from importlib import import_module
from pkgutil import iter_modules

from medfed.robust.attacks.attack import (
    ATTACKS,
    Attack,
    Records,
    Sight,
    Stage,
    add,
    find,
    liars,
)
from medfed.robust.attacks.records import TRIGGER, Trigger
from medfed.robust.attacks.rows import alie_z

__all__ = [
    "ATTACKS",
    "TRIGGER",
    "Attack",
    "Records",
    "Sight",
    "Stage",
    "Trigger",
    "add",
    "alie_z",
    "find",
    "liars",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
