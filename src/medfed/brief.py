"""The names of the brief that asked for this system,
each a thin entry over the part that does the work.

For whoever comes with those names in hand; docs/from-the-brief.md maps all of them. Of the package
only `medfed` itself, which hands out some of these names, knows this module. Names whose part is
not built (consent, records, compliance frameworks, device selection, asynchronous rounds) are
absent: they raise an ImportError rather than pretend.
"""

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medfed import runs, study
from medfed.core import codec
from medfed.core.checks import PlanError, StudyError, some
from medfed.core.entropy import Entropy, Integers
from medfed.data.names import create_medical_device_names
from medfed.engine.port import gather
from medfed.evidence import compare
from medfed.learn import dpsgd, zoo
from medfed.monitor import events
from medfed.monitor.events import SecurityAudit
from medfed.privacy.accounting import PrivacyAccountingEntry, RenyiDPAccountant
from medfed.privacy.guarantee import GRID, discrete_gaussian
from medfed.privacy.mechanisms import grid_sensitivity, round_to_grid
from medfed.privacy.privacy_events import Gaussian
from medfed.robust import detection, reputation, rules
from medfed.robust.reputation import ThreatLevel
from medfed.rounds.prepare import prepare
from medfed.rounds.ranges import refuse_unfound
from medfed.runs import Result, claims
from medfed.screens import dashboards, flat_logs
from medfed.secure import three_party
from medfed.secure.identity import Identity, Post, Roster, Scope
from medfed.study import Privacy, Robustness, Security, Study

__all__ = [
    "AdvancedSecurityManager",
    "ComprehensiveMonitor",
    "EnhancedFederatedServer",
    "EnhancedMedicalIoMTDevice",
    "EnhancedPrivacyPreserver",
    "FederatedRoundConfig",
    "MedicalNeuralNetwork",
    "PerformanceMetrics",
    "PerformanceOptimizer",
    "PrivacyAccountingEntry",
    "PrivacyAudit",
    "RenyiDPAccountant",
    "SecurityAudit",
    "ThreatLevel",
    "adaptive_gradient_clipping",
    "compare_federated_algorithms",
    "create_interactive_dashboards",
    "create_medical_device_names",
    "export_training_logs",
    "generate_comprehensive_report",
    "generate_privacy_report",
    "generate_security_report",
    "load_and_prepare_medical_data",
    "verify_model_integrity",
]

# Functions that do under the brief's name what the house calls plainly.
MedicalNeuralNetwork = zoo.medical_mlp
adaptive_gradient_clipping = dpsgd.clip_factor
compare_federated_algorithms = compare.compare
create_interactive_dashboards = dashboards.write_dashboards
export_training_logs = flat_logs.export_tables
generate_comprehensive_report = dashboards.write_report
generate_privacy_report = claims.write_page
generate_security_report = dashboards.write_security_page
load_and_prepare_medical_data = runs.prepare_data
verify_model_integrity = runs.verify_model

PARTIES = ("aggregator 1", "aggregator 2", "aggregator 3")


@dataclass(frozen=True)
class EnhancedMedicalIoMTDevice:
    """One site of a study."""

    name: str
    study: Study
    data: Path | None = None

    @classmethod
    def network(cls, source: Study, data: Path | None = None) -> "list[EnhancedMedicalIoMTDevice]":
        """Return a device for every site of a study (the brief's cell 3)."""
        return [cls(site.name, source, data) for site in runs.open_sites(_open(source), data)]

    def train_local_model(self) -> Tensor:
        """Return the row [M] of the site's first local training:
        what it would send, before noise and sealing.

        It stays in this process. Raises StudyError for a site that the study does not have.
        """
        simulation = runs.Simulation.open(_open(self.study), self.data)
        fleet = simulation.fleet
        if self.name not in (names := fleet.sites()):
            raise StudyError(
                f"name={self.name!r} is no site of {self.study.study.name!r}; expected one of "
                f"{some(names)}"
            )

        plan = prepare(simulation.study, fleet, names)
        refuse_unfound(plan)
        payload = codec.encode({"round": 1}, {"w": plan.first_weights()})
        reply = gather(fleet, [self.name], "work", payload, self.study.training.deadline)[self.name]
        if reply.error:
            raise PlanError(f"site {self.name!r}: {reply.error}")

        return codec.decode(reply.payload)[1]["row"]

    def encrypt_model_updates(self, row_M: Tensor, bits: int = 20) -> bytes:
        """Return a row as a sealed upload: three envelopes, of which any one aggregator can open
        its own and learns nothing. Keys are made for this call."""
        keys = _keys([self.name])
        steps_M = torch.round(row_M.double() * 2.0**bits).to(torch.int64).numpy()
        bound = float(np.linalg.norm(steps_M.astype(float))) + 1
        return three_party.share(
            keys[self.name],
            _scope(),
            steps_M,
            three_party.SharingTerms(len(steps_M), bound, PARTIES),
        )

    def get_medical_privacy_report(self) -> dict[str, Any]:
        """Return what this site's patients will pay, before training:
        noise, epsilon of a round and of the run.
        """
        found = runs.privacy_outlook(self.study, self.data)
        mode = next(iter(found["modes"]))
        line = next(
            (one for one in found["modes"][mode] if one["site"] == self.name),
            found["modes"][mode][0],
        )
        return {"noise": mode, "delta": found["delta"], **line, "site": self.name}


@dataclass(frozen=True)
class FederatedRoundConfig:
    """What the brief sets for a run; a study says more. None leaves the study's own value."""

    rounds: int | None = None
    algorithm: str | None = None
    local_epochs: int | None = None
    epsilon: float | None = None
    delta: float | None = None
    byzantine_tolerance: float | None = None

    def apply(self, base: Study) -> Study:
        """Return the study with these values."""
        keys = {
            "training.rounds": self.rounds,
            "training.algorithm": self.algorithm,
            "training.local_epochs": self.local_epochs,
            "privacy.epsilon": self.epsilon,
            "privacy.delta": self.delta,
            "robustness.max_malicious": self.byzantine_tolerance,
        }
        if self.byzantine_tolerance:
            keys["robustness.rule"] = "auto"
        return base._with({key: value for key, value in keys.items() if value is not None})


class EnhancedFederatedServer:
    """Runs a study with the devices that were registered."""

    def __init__(self, source: Study | str = "breast-cancer", data: Path | None = None) -> None:
        self.study = source if isinstance(source, Study) else study.load(source)
        self.data = data
        self.devices: dict[str, EnhancedMedicalIoMTDevice] = {}

    def register_medical_device(self, device: EnhancedMedicalIoMTDevice) -> None:
        """Register a site; raises StudyError where it belongs to another study."""
        if device.study.study.name != self.study.study.name:
            raise StudyError(
                f"{device.name!r} belongs to {device.study.study.name!r}, not to "
                f"{self.study.study.name!r}"
            )
        self.devices[device.name] = device

    def run_enhanced_federated_learning(
        self, config: FederatedRoundConfig | None = None, out: Path | None = None
    ) -> Result:
        """Run the study, in a folder of its own;
        raises StudyError where a site of it is not registered.
        """
        sites = [site.name for site in runs.open_sites(_open(self.study), self.data)]
        if absent := [name for name in sites if name not in self.devices]:
            raise StudyError(
                f"not registered: {some(absent)}; register every site of {self.study.study.name!r}"
            )
        return runs.run((config or FederatedRoundConfig()).apply(self.study), out, self.data)

    def secure_aggregation(self, rows: Mapping[str, Tensor]) -> Tensor:
        """Return the sum [M] of rows that nobody sees:
        shared among three aggregators, checked, opened.
        """
        return AdvancedSecurityManager().secure_aggregation(rows)

    def privacy_preserving_update(
        self, total_M: Tensor, clip: float, preserver: "EnhancedPrivacyPreserver"
    ) -> Tensor:
        """Return a sum of clipped rows with the noise that
        the preserver's budget asks for, and count it.
        """
        return preserver.add_noise(total_M, clip)


class EnhancedPrivacyPreserver:
    """Noise for a number of releases that together cost (epsilon,
    delta), and the count of what was spent.
    """

    def __init__(self, epsilon: float = 1.0, delta: float = 1e-6, releases: int = 1) -> None:
        """Raises PlanError for a target that no noise reaches."""
        self.accountant = RenyiDPAccountant(delta)
        self.releases = releases
        self.noise_multiplier = self.accountant.noise_for(lambda z: Gaussian(z, releases), epsilon)
        self.epsilon = epsilon
        self._entropy = Entropy()

    def add_noise(self, total_M: Tensor, clip: float) -> Tensor:
        """Return a sum of rows, each clipped to norm `clip`, with discrete Gaussian noise on the
        grid; count it first.

        Raises PlanError where the planned releases are spent.
        """
        if len(self.accountant.entries) >= self.releases:
            raise PlanError(
                f"releases={self.releases} are spent; nothing is left of epsilon={self.epsilon:g}"
            )
        self.accountant.charge(
            Gaussian(self.noise_multiplier), f"release {len(self.accountant.entries) + 1}"
        )
        unit = 2.0 ** np.floor(np.log2(clip * GRID))
        sigma = self.noise_multiplier * grid_sensitivity(clip, unit, len(total_M))
        steps_M = round_to_grid(total_M, unit, sigma)
        noise_M: Integers = discrete_gaussian(sigma).sample(len(total_M), self._entropy)
        noised_M: Tensor = (steps_M + torch.from_numpy(noise_M)).double() * unit
        return noised_M

    def adaptive_gradient_clipping(self, *words: Any, **more: Any) -> Any:
        """Return the factors that clip gradients; see `medfed.adaptive_gradient_clipping`."""
        return adaptive_gradient_clipping(*words, **more)

    def track_privacy_usage(self) -> tuple[PrivacyAccountingEntry, ...]:
        """Return every charge so far."""
        return self.accountant.entries

    def generate_privacy_report(self, run: Path) -> Path:
        """Write a run's claim as a page and return where."""
        return generate_privacy_report(run)


class AdvancedSecurityManager:
    """Rules that bear liars, sums that nobody looks into, and models that nobody changed."""

    def __init__(self, max_malicious: float = 0.3) -> None:
        self.max_malicious = max_malicious

    def detect_byzantine_devices(self, rounds: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Return who is suspected after rounds of rows (name -> [M]), with the sum held against
        each, worst first.
        """
        told = []
        for rows in rounds:
            names = list(rows)
            f = int(self.max_malicious * len(rows) + 1e-9)
            gram_KK = rules.gram(rules.blocks_of(torch.stack(list(rows.values())).double()))
            told.append((names, detection.inspect(names, gram_KK, f)))
        most = max((int(self.max_malicious * len(rows) + 1e-9) for rows in rounds), default=0)
        return reputation.detect_byzantine_devices(told, most)

    def secure_aggregation(self, rows: Mapping[str, Tensor], bits: int = 20) -> Tensor:
        """Return the sum [M] of rows that nobody sees:
        shared among three aggregators, checked, opened.
        """
        steps = {
            name: torch.round(row.double() * 2.0**bits).to(torch.int64).numpy()
            for name, row in rows.items()
        }
        length = len(next(iter(steps.values())))
        bound = max(float(np.linalg.norm(row.astype(float))) for row in steps.values()) + 1
        keys = _keys(list(steps))
        opened = three_party.run_protocol(
            keys, _scope(), steps, three_party.SharingTerms(length, bound, PARTIES)
        )
        total_M: NDArray[np.int64] = opened.total_M
        return torch.from_numpy(total_M).double() * 2.0**-bits

    def verify_model_integrity(self, run: Path) -> dict[str, Any]:
        """Check a run's signed, chained models; see `medfed.verify_model_integrity`."""
        return runs.verify_model(run)

    def generate_security_report(self, run: Path) -> Path:
        """Write a run's page on security and return where."""
        return generate_security_report(run)


@dataclass(frozen=True)
class PerformanceMetrics:
    """What a run's rounds took, from its events. seconds, steps and losses by round."""

    rounds: int
    seconds: tuple[float, ...]
    bytes_up: int
    bytes_down: int
    participation: Mapping[str, int]
    losses: tuple[float | None, ...]


class PerformanceOptimizer:
    """What rounds cost. Selecting devices and asynchronous rounds are not built."""

    def performance_monitoring(self, run: Path) -> PerformanceMetrics:
        """Return a run's figures, recomputed from its event log."""
        recorded = list(events.read(Path(run) / "events.jsonl"))
        finished = [event for event in recorded if isinstance(event, events.RoundFinished)]
        took_part: dict[str, int] = {}
        for event in finished:
            for client in event.clients:
                took_part[client] = took_part.get(client, 0) + 1
        return PerformanceMetrics(
            rounds=len(finished),
            seconds=tuple(event.seconds for event in finished),
            bytes_up=sum(event.bytes_up for event in finished),
            bytes_down=sum(event.bytes_down for event in finished),
            participation=took_part,
            losses=tuple(event.loss for event in finished),
        )


@dataclass(frozen=True)
class PrivacyAudit:
    """A run's claim, and what attacks on its twin found (empty: `medfed audit RUN` was not run)."""

    epsilon: float | None
    delta: float
    claim: Mapping[str, Any]
    audit: Mapping[str, Any]

    @classmethod
    def of(cls, run: Path) -> "PrivacyAudit":
        """Read a run's claim; raises RunError where it has none."""
        found = claims.read(Path(run))
        return cls(found["epsilon"], found["target"]["delta"], found, found["audit"] or {})


@dataclass(frozen=True)
class ComprehensiveMonitor:
    """A run's pages, its report and its log as tables."""

    run: Path

    def create_interactive_dashboards(self) -> dict[str, Path]:
        """Write the four pages; return where each is."""
        return create_interactive_dashboards(self.run)

    def generate_comprehensive_report(self) -> Path:
        """Write one page of everything, an executive page first."""
        return generate_comprehensive_report(self.run)

    def export_training_logs(
        self, formats: Sequence[str] = ("json", "csv", "parquet")
    ) -> list[Path]:
        """Write the log as flat tables."""
        return export_training_logs(self.run, formats=formats)


def _open(source: Study) -> Study:
    """Return a study without claim, secrecy or rule: what one site computes by itself."""
    return dataclasses.replace(
        source, privacy=Privacy(), security=Security(), robustness=Robustness()
    )


def _keys(names: Sequence[str]) -> dict[str, Post]:
    """Return parties that know each other's keys, made for one call."""
    made = [Identity.new(name, "site") for name in names] + [
        Identity.new(name, "aggregator") for name in PARTIES
    ]
    roster = Roster.of(*(key.public for key in made))
    return {key.name: Post(key, roster) for key in made}


def _scope() -> Scope:
    return Scope("brief", secrets.token_hex(8), 1)
