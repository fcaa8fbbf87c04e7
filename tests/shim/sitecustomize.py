"""Puts a fault under a real process before it begins: MEDFED_FAULT is its name, when it strikes,
and where.
"""

import os
from pathlib import Path

if told := os.environ.get("MEDFED_FAULT"):
    from tests.faults import FAULTS, Fault

    name, at, root = told.split(":", 2)
    FAULTS[name](Fault(Path(root), setattr, int(at)))
