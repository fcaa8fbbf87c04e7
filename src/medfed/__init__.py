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
    from medfed.core.checks import DataError, MedfedError, PlanError, QuorumError, RunError, SiteError, StudyError
    from medfed.data.names import create_medical_device_names
    from medfed.models import MedicalNeuralNetwork
    from medfed.runs import Result, load, load_and_prepare_medical_data, resume, run, simulate
    from medfed.study import Study
    from medfed.study import load as load_study

__version__ = "0.1.0"

_HOMES = {
    "medfed.core.checks": "DataError MedfedError PlanError QuorumError RunError SiteError StudyError",
    "medfed.data.names": "create_medical_device_names",
    "medfed.models": "MedicalNeuralNetwork",
    "medfed.runs": "Result load load_and_prepare_medical_data resume run simulate",
    "medfed.study": "Study",
}

__all__ = [
    "DataError",
    "MedfedError",
    "MedicalNeuralNetwork",
    "PlanError",
    "QuorumError",
    "Result",
    "RunError",
    "SiteError",
    "Study",
    "StudyError",
    "create_medical_device_names",
    "load",
    "load_and_prepare_medical_data",
    "load_study",
    "resume",
    "run",
    "simulate",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `medfed --help` need not wait for torch."""
    if name == "load_study":
        return importlib.import_module("medfed.study").load
    for home, names in _HOMES.items():
        if name in names.split():
            return getattr(importlib.import_module(home), name)
    raise AttributeError(f"module 'medfed' has no attribute {name!r}")
