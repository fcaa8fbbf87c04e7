"""Federated learning for hospitals and medical devices.

    import medfed

    study = medfed.load_study("breast-cancer").set("training.rounds", 5)
    result = medfed.run(study)
    result.summary["test"]["auroc"]

The names below are the public surface; everything else may move between versions.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medfed.brief import (
        MedicalNeuralNetwork,
        adaptive_gradient_clipping,
        compare_federated_algorithms,
        create_interactive_dashboards,
        create_medical_device_names,
        export_training_logs,
        generate_comprehensive_report,
        generate_privacy_report,
        generate_security_report,
        load_and_prepare_medical_data,
        verify_model_integrity,
    )
    from medfed.core.checks import (
        BudgetError,
        DataError,
        LedgerError,
        MedfedError,
        PlanError,
        QuorumError,
        RunError,
        SiteError,
        StudyError,
    )
    from medfed.privacy.accounting import PrivacyAccountingEntry, RenyiDPAccountant
    from medfed.privacy.readings import (
        estimate_mean,
        estimate_shares,
        report_category,
        report_number,
    )
    from medfed.runs import Result, load, resume, run, simulate
    from medfed.study import Study
    from medfed.study import load as load_study

__version__ = "0.2.0"

_HOMES = {
    "medfed.brief": (
        "MedicalNeuralNetwork adaptive_gradient_clipping compare_federated_algorithms "
        "create_interactive_dashboards create_medical_device_names export_training_logs "
        "generate_comprehensive_report generate_privacy_report generate_security_report "
        "load_and_prepare_medical_data verify_model_integrity"
    ),
    "medfed.core.checks": (
        "BudgetError DataError LedgerError MedfedError PlanError QuorumError RunError SiteError "
        "StudyError"
    ),
    "medfed.privacy.accounting": "PrivacyAccountingEntry RenyiDPAccountant",
    "medfed.privacy.readings": "estimate_mean estimate_shares report_category report_number",
    "medfed.runs": "Result load resume run simulate",
    "medfed.study": "Study",
}

__all__ = [
    "BudgetError",
    "DataError",
    "LedgerError",
    "MedfedError",
    "MedicalNeuralNetwork",
    "PlanError",
    "PrivacyAccountingEntry",
    "QuorumError",
    "RenyiDPAccountant",
    "Result",
    "RunError",
    "SiteError",
    "Study",
    "StudyError",
    "adaptive_gradient_clipping",
    "compare_federated_algorithms",
    "create_interactive_dashboards",
    "create_medical_device_names",
    "estimate_mean",
    "estimate_shares",
    "export_training_logs",
    "generate_comprehensive_report",
    "generate_privacy_report",
    "generate_security_report",
    "load",
    "load_and_prepare_medical_data",
    "load_study",
    "report_category",
    "report_number",
    "resume",
    "run",
    "simulate",
    "verify_model_integrity",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `medfed --help` need not wait for torch."""
    if name == "load_study":
        return importlib.import_module("medfed.study").load
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'medfed' has no attribute {name!r}")
