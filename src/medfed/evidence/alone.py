"""Would a site do better alone? Asked at the site and answered to the site: nothing of it leaves.

A site's own model hangs on each of its patients without bound, so a claim that covers telling how
good it is would cost a second private training. At home it costs nothing: no claim stands between a
hospital and its own records.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medfed import runs
from medfed.core.checks import PlanError, RunError, nearest
from medfed.learn.algorithms import ALGORITHMS
from medfed.monitor.events import Event, Log, Tested
from medfed.monitor.metrics import Figure, mean_difference
from medfed.node.own_model import errs_less, train_own
from medfed.rounds.round import test


@dataclass(frozen=True)
class Alone:
    """A site's own model beside the run's, on the same held-out records of that site."""

    site: str
    records: int
    own: dict[str, Figure]
    federated: dict[str, Figure]
    # by how much its squared error is less, a record on average, with the 95 % interval over pairs
    own_better: Figure

    def verdict(self) -> str:
        """Say in a sentence which of the two errs less, if that can be told."""
        low = self.own_better.low
        high = self.own_better.high
        if low is None or high is None or low <= 0 <= high:
            return "Which of the two is better here cannot be told from these records."
        errs = "less" if low > 0 else "more"
        return f"On these records the site's own model errs {errs} than the run's, beyond chance."

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {**dataclasses.asdict(self), "verdict": self.verdict()}


def compare(folder: str | Path, site: str, data: Path | None = None) -> Alone:
    """Train `site`'s own model on its own records,
    without noise, and hold it against a finished run's.

    It gets the run's encoding and model, and is trained by `own_model.train_own`: under a claim to
    its own end. Nothing is written and no budget is touched: the answer is for the site alone.
    Raises RunError for a run that has not finished or does not know the site; PlanError where
    clients are single devices, or models the sites' own.
    """
    result = runs.load(folder)
    study = result.study
    if study.sites.kind == "device":
        raise PlanError(
            "sites.kind='device': a device holds one patient, from whom no own model can be tested"
        )
    if ALGORITHMS[study.training.algorithm].personal:
        raise PlanError(
            f"training.algorithm={study.training.algorithm!r} keeps a model at each site already"
        )
    sites = {one.name: one for one in runs.open_sites(study, data, Path(folder))}
    if site not in sites:
        raise RunError(f"site {site!r} is not in this run; {nearest(site, sites)}")

    fleet, plan = runs.baseline_plan("fedavg", study, [sites[site]], result.encoding)
    node = fleet.site(site)
    own_P = train_own(site, node.train, node.encoding, study)
    told: list[Event] = []
    with Log(None, [told.append]) as log:
        for model, w_P in (("federated", result.w_P), ("own", own_P)):
            test(
                dataclasses.replace(plan.begin(), w_P=w_P), plan, fleet, log, model, intervals=True
            )
    less_N = errs_less(node.model, own_P, result.w_P, node.test, node.encoding.target)
    if not torch.isfinite(less_N).all():
        raise RunError("a model's outputs are not finite, so the two cannot be compared")

    tested = {event.model: dict(event.all_sites) for event in told if isinstance(event, Tested)}
    better = mean_difference(len(less_N), float(less_N.sum()), float(less_N.square().sum()))
    return Alone(site, len(less_N), tested["own"], tested["federated"], better)
