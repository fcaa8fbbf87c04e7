"""The validation gate:
a round that makes the model worse on the coordinator's own public records is taken back.

The reference is a table that is nobody's secret, so that looking at it costs no privacy. The gate
sees harm that rules and signatures do not: enough liars, or honest rows that do not go together.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from medfed.core.checks import DataError
from medfed.core.streams import Streams
from medfed.core.types import Task
from medfed.data.federated import Rows
from medfed.data.frames import number_rows
from medfed.data.tables import clean, read
from medfed.learn.algorithms import Server
from medfed.learn.local import outputs, sample_loss
from medfed.planning.building import build_model
from medfed.planning.plan import Plan


@dataclass(frozen=True)
class Rollback:
    """The reference's encoded records, and by which share of itself their loss may grow a round."""

    model: nn.Module
    task: Task
    rows: Rows
    tolerance: float

    @classmethod
    def of(cls, plan: Plan) -> "Rollback | None":
        """Return the gate that a study asks for;
        raise DataError where its table cannot be read or has no row.
        """
        robust = plan.study.robustness
        data = plan.study.data
        if not robust.reference:
            return None
        frame = number_rows(read(plan.study.folder / robust.reference))
        if not len(frame):
            raise DataError(
                f"robustness.reference={robust.reference!r} has no row; expected public records. "
                "Add some."
            )

        features = tuple(column.name for column in plan.encoding.columns)
        named = dataclasses.replace(data, site="", patient="", test="", features=features)
        table = clean("reference", frame, named, Streams(0))
        every = np.ones(len(frame), dtype=bool)
        rows = plan.encoding.encode(table, every, ~every)

        return cls(build_model(plan.study, plan.encoding), plan.local.task, rows, robust.tolerance)

    def loss(self, w_P: Tensor) -> float:
        """Return the model's mean loss on the reference."""
        return float(
            sample_loss(self.task, outputs(self.model, w_P, self.rows.x), self.rows.y).mean()
        )

    def passes(self, before: Server, after: Server) -> tuple[bool, float, float]:
        """Say whether a round's model stands, with the losses before and after;
        what is no number never does.
        """
        was = self.loss(before.w_P)
        now = self.loss(after.w_P)
        return math.isfinite(now) and now <= was * (1 + self.tolerance), was, now
