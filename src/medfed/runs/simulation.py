"""All parties in one process, for simulations: the only place beside a site's node that has its
records at hand.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from medfed import study as studies
from medfed.core.checks import (
    DataError,
    QuorumError,
)
from medfed.data.encoding import Encoding
from medfed.engine.port import Fleet
from medfed.learn.algorithms import Server
from medfed.learn.learners import LEARNERS
from medfed.monitor import events
from medfed.monitor.events import Log
from medfed.monitor.summary import BASELINES
from medfed.node.consent import Consent, everybody
from medfed.node.inprocess import InProcess
from medfed.node.own_model import without_protection
from medfed.node.site import Site
from medfed.planning.plan import Plan
from medfed.planning.rates import Pace
from medfed.rounds import ranges
from medfed.rounds.aggregation import Handler
from medfed.rounds.prepare import prepare
from medfed.rounds.round import compare_own, decide, run_round, test
from medfed.runs.opening import open_sites
from medfed.runs.pacing import ease
from medfed.study import Study


@dataclass(frozen=True)
class PreparedData:
    """Encoded rows of every site: site -> (x [n, M] float32, y [n])."""

    features: list[str]
    labels: tuple[str, ...]
    train: dict[str, tuple[np.ndarray, np.ndarray]]
    test: dict[str, tuple[np.ndarray, np.ndarray]]


def prepare_data(study: str | Study = "breast-cancer", data: Path | None = None) -> PreparedData:
    """Load a study's records, split them by patient and encode them as its sites would.

    For the default study: 569 patients, 30 features and 2 products of them, scaled by median and
    IQR over all sites. Everything comes back in one place, so this is for looking and for
    simulations.
    """
    simulation = Simulation.open(study if isinstance(study, Study) else studies.load(study), data)
    sites = simulation.sites
    fleet = simulation.fleet
    plan = prepare(simulation.study, fleet, fleet.sites())
    ranges.refuse_unfound(plan)
    return PreparedData(
        features=plan.encoding.names(),
        labels=plan.encoding.target.labels,
        train={site.name: (site.train.x.numpy(), site.train.y.numpy()) for site in sites},
        test={site.name: (site.test.x.numpy(), site.test.y.numpy()) for site in sites},
    )


class Baselines(Protocol):
    """What a federation is measured against: only a simulation, where all records are in one
    process, can train it.
    """

    def measure(self, plan: Plan, federated: Server, log: Log) -> None:
        """Train and test each baseline of a plan,
        and tell what it is worth beside the federated model.
        """
        ...


class Parties(Protocol):
    """The sites and aggregators of a run, wherever they live: nothing is at hand but messages."""

    @property
    def fleet(self) -> Fleet:
        """The sites."""
        ...

    @property
    def aggregators(self) -> Mapping[str, Handler]:
        """The three of a three-party study; none where they are to be made in this process."""
        ...

    @property
    def baselines(self) -> Baselines | None:
        """Who trains baselines; None where nobody can."""
        ...

    def resolve(self, study: Study) -> Study:
        """Return the study as its parties have it, from its file alone."""
        ...


Opener = Callable[[Study, Path], Parties]
"""What starts the parties of a study, each to keep what is its own under a folder."""


@dataclass(frozen=True)
class Simulation:
    """All sites of a study in this process, with their records at hand: no other code than a
    simulation has them.
    """

    study: Study
    sites: Sequence[Site]
    fleet: InProcess
    aggregators: Mapping[str, Handler] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        study: Study,
        data: Path | None = None,
        folder: Path | None = None,
        progress: bool = False,
        consent: Consent = everybody,
        pays: bool = True,
    ) -> "Simulation":
        """Open every site of a study. Where it is not to pay, no ledger is opened: its patients are
        public, or made up.

        Raises StudyError, DataError or PlanError for what is wrong with study or table.
        """
        sites = open_sites(study, data, folder, progress, consent=consent, pays=pays)
        return cls(sites[0].study, sites, InProcess(sites))

    def resolve(self, study: Study) -> Study:
        """Return the study as the sites have it."""
        return self.study

    @property
    def baselines(self) -> Baselines:
        """The baselines: each site alone, and all rows in one place."""
        return self

    def measure(self, plan: Plan, federated: Server, log: Log) -> None:
        """Train and test each baseline, and tell what it is worth."""
        for name in _list_baselines(plan.study):
            _measure(name, plan.study, self.sites, plan.encoding, log, federated)


def prepare_sites(
    study: Study, sites: Sequence[Site], encoding: Encoding | None = None
) -> tuple[InProcess, Plan]:
    """Return a fleet of sites of this process, prepared, and the plan."""
    fleet = InProcess(sites)
    return fleet, prepare(study, fleet, fleet.sites(), encoding)


def baseline_plan(
    name: str, study: Study, sites: Sequence[Site], encoding: Encoding
) -> tuple[InProcess, Plan]:
    """Return a fleet of these sites, and the plan by which a baseline is trained."""
    other = without_protection(study, name)
    return prepare_sites(other, [site.under(other) for site in sites], encoding)


def _train_in_silence(plan: Plan, fleet: Fleet) -> Server:
    """Run all rounds of a baseline; nobody is told. Raises QuorumError or DataError."""
    server = plan.begin()
    pace = Pace()
    quiet = Log()
    for _ in range(plan.study.training.rounds):
        server = run_round(server, plan, fleet, plan.budget(), quiet)
        server, pace = ease(server, pace, plan, quiet)
    return server


def _list_baselines(study: Study) -> tuple[str, ...]:
    """Return what a federation is measured against:
    no device trains alone, nor do learners without gradient.
    """
    if study.sites.kind == "device" or study.model.name in LEARNERS:
        return ("pooled",)
    return BASELINES


def _measure(
    name: str, study: Study, sites: Sequence[Site], encoding: Encoding, log: Log, federated: Server
) -> None:
    """Train a baseline and tell what it is worth;
    sites' own models also beside the federated one, by record.
    """
    try:
        fleet, plan = baseline_plan(name, study, sites, encoding)
        server = _train_in_silence(plan, fleet)
        decision = decide(server, plan, fleet, plan.budget(), log)
        test(server, plan, fleet, log, name, intervals=True, decision=decision)
        if name == "local":
            compare_own(server, federated, plan, fleet, log)
    except (QuorumError, DataError) as error:
        log.emit(events.Warned(f"baseline {name!r} was not measured: {error}"))
