"""Every name of the brief that is built does the real work, and what it returns is in the events;
others are absent.
"""

import inspect
import math
from pathlib import Path

import pytest
import torch

import medfed
from medfed import brief
from medfed.brief import (
    AdvancedSecurityManager,
    EnhancedFederatedServer,
    EnhancedMedicalIoMTDevice,
    EnhancedPrivacyPreserver,
    FederatedRoundConfig,
    PerformanceOptimizer,
    PrivacyAudit,
)
from medfed.core.checks import PlanError, StudyError
from medfed.study import Study

pytestmark = pytest.mark.usefixtures("one_thread")

NOT_BUILT = (
    "MedicalDataRecord",
    "MedicalDataType",
    "ComplianceFramework",
    "PatientConsent",
    "IntelligentDeviceSelector",
    "DeviceProfile",
    "AsynchronousTrainingManager",
)


@pytest.fixture(scope="module")
def study() -> Study:
    return medfed.load_study("breast-cancer")._with(
        {"training.rounds": 3, "monitor.baselines": False}
    )


@pytest.fixture(scope="module")
def result(study: Study, tmp_path_factory: pytest.TempPathFactory) -> medfed.Result:
    server = EnhancedFederatedServer(study)
    for device in EnhancedMedicalIoMTDevice.network(study):
        server.register_medical_device(device)
    out = tmp_path_factory.mktemp("brief") / "run"
    return server.run_enhanced_federated_learning(FederatedRoundConfig(rounds=2, epsilon=2.0), out)


def folder(result: medfed.Result) -> Path:
    assert result.folder
    return result.folder


def test_every_name_is_there_or_absent() -> None:
    for name in brief.__all__:
        assert inspect.getdoc(getattr(brief, name))
    for name in NOT_BUILT:
        assert not hasattr(brief, name)
    for missing in ("select_optimal_devices", "async_federated_round", "optimize_communication"):
        assert not hasattr(PerformanceOptimizer, missing)
    assert not hasattr(EnhancedMedicalIoMTDevice, "get_compliance_status")


def test_the_server_runs_with_registered_devices_alone(result: medfed.Result, study: Study) -> None:
    assert result.complete and result.summary["rounds"] == 2
    assert 0 < result.summary["privacy"]["epsilon"] <= 2
    server = EnhancedFederatedServer(study)
    server.register_medical_device(EnhancedMedicalIoMTDevice.network(study)[0])
    with pytest.raises(StudyError, match="not registered"):
        server.run_enhanced_federated_learning()
    with pytest.raises(StudyError, match="belongs to"):
        server.register_medical_device(EnhancedMedicalIoMTDevice("a", medfed.load_study("heart")))


def test_tolerance_sets_a_rule(study: Study) -> None:
    applied = FederatedRoundConfig(byzantine_tolerance=0.25).apply(study)
    assert applied.robustness.rule == "auto" and applied.robustness.max_malicious == 0.25
    assert FederatedRoundConfig().apply(study) == study


def test_a_device_trains_seals_and_reports(study: Study) -> None:
    device = EnhancedMedicalIoMTDevice.network(study)[0]
    row_M = device.train_local_model()
    assert row_M.isfinite().all() and row_M.norm() > 0
    sealed = device.encrypt_model_updates(row_M)
    assert 8 * len(row_M) < len(sealed) < 8 * len(row_M) + 3000
    assert sealed != device.encrypt_model_updates(row_M)
    report = device.get_medical_privacy_report()
    assert (
        report["site"] == device.name
        and 0 < report["epsilon"] <= 1.0001
        and report["noise_multiplier"] > 1
    )
    with pytest.raises(StudyError, match="is no site"):
        EnhancedMedicalIoMTDevice("nowhere", study).train_local_model()


def test_the_preserver_counts_before_it_adds_and_stops() -> None:
    preserver = EnhancedPrivacyPreserver(epsilon=1.0, delta=1e-6, releases=2)
    total_M = torch.zeros(4000)
    noised = [preserver.add_noise(total_M, clip=1.0) for _ in range(2)]
    entries = preserver.track_privacy_usage()
    assert [entry.label for entry in entries] == ["release 1", "release 2"]
    assert 0.99 < entries[-1].epsilon <= 1.0
    z = preserver.noise_multiplier
    for noise_M in noised:  # 4,000 draws: the standard deviation is known to 1.1 %
        assert float(noise_M.std()) == pytest.approx(z * (1 + math.sqrt(4000) * 2**-16), rel=0.05)
    assert not torch.equal(*noised)
    with pytest.raises(PlanError, match="spent"):
        preserver.add_noise(total_M, 1.0)
    server = EnhancedFederatedServer()
    assert server.privacy_preserving_update(total_M, 1.0, EnhancedPrivacyPreserver()).std() > 1


def test_the_security_manager_sums_in_secret_and_names_liars(result: medfed.Result) -> None:
    random = torch.Generator().manual_seed(1)
    rows = {name: 1 + 0.1 * torch.randn(30, generator=random) for name in "abcdefghij"}
    manager = AdvancedSecurityManager(0.3)
    total_M = manager.secure_aggregation(rows)
    torch.testing.assert_close(
        total_M, sum(rows.values(), torch.zeros(30)).double(), atol=1e-4, rtol=1e-4
    )
    torch.testing.assert_close(
        EnhancedFederatedServer().secure_aggregation(rows), total_M, atol=1e-9, rtol=0
    )
    lied = {name: -4 * row if name in "abc" else row for name, row in rows.items()}
    assert set(manager.detect_byzantine_devices([lied] * 4)) == {"a", "b", "c"}
    assert manager.detect_byzantine_devices([rows] * 4) == {}
    assert manager.verify_model_integrity(folder(result))["rounds"] == 2


def test_the_monitor_writes_what_the_brief_names(result: medfed.Result) -> None:
    monitor = brief.ComprehensiveMonitor(folder(result))
    assert set(monitor.create_interactive_dashboards()) == {
        "training_dashboard.html", "device_analysis.html", "privacy_audit.html", "security_analysis.html"
    }  # fmt: skip
    assert "what was asked" in monitor.generate_comprehensive_report().read_text()
    assert len(monitor.export_training_logs(["json"])) == 4
    page = AdvancedSecurityManager().generate_security_report(folder(result)).read_text()
    assert "Highest level of threat" in page


def test_figures_are_those_of_the_events(result: medfed.Result) -> None:
    found = PerformanceOptimizer().performance_monitoring(folder(result))
    assert (
        found.rounds == result.summary["rounds"]
        and dict(found.participation) == result.summary["participation"]
    )
    assert sum(found.seconds) / 2 == pytest.approx(result.summary["seconds"]["per_round"], abs=1e-6)
    audit = PrivacyAudit.of(folder(result))
    assert (
        audit.epsilon == pytest.approx(result.summary["privacy"]["epsilon"]) and audit.delta == 1e-6
    )
    assert (
        EnhancedPrivacyPreserver()
        .generate_privacy_report(folder(result))
        .read_text()
        .startswith("<!doctype html>")
    )
