"""autobatch: the largest micro-batch that fits, and a training plan that hits the target batch exactly.

The public names are imported when they are first used, so that `import autobatch` costs nothing and does not import
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autobatch.errors import (
        AutobatchError,
        DevicePoisoned,
        DeviceUnavailable,
        InputsNotInferred,
        InvalidInput,
        NothingFits,
        NotTraceable,
        PlanFileError,
        RankFailed,
        TrialCrashed,
        WorkloadNotPortable,
    )
    from autobatch.estimates import Estimate
    from autobatch.estimating import estimate
    from autobatch.fitting import fit
    from autobatch.plan import TrainingPlan
    from autobatch.trial import DeviceInfo, Trial, Verdict
    from autobatch.tuning.tune import tune
    from autobatch.workload.workload import Workload

__version__ = "0.1.0"

_HOMES = {
    "Estimate": "autobatch.estimates",
    "estimate": "autobatch.estimating",
    "fit": "autobatch.fitting",
    "tune": "autobatch.tuning.tune",
    "Workload": "autobatch.workload.workload",
    "TrainingPlan": "autobatch.plan",
    **dict.fromkeys(["DeviceInfo", "Trial", "Verdict"], "autobatch.trial"),
    **dict.fromkeys(
        [
            "AutobatchError",
            "DevicePoisoned",
            "DeviceUnavailable",
            "InputsNotInferred",
            "InvalidInput",
            "NothingFits",
            "NotTraceable",
            "PlanFileError",
            "RankFailed",
            "TrialCrashed",
            "WorkloadNotPortable",
        ],
        "autobatch.errors",
    ),
}

__all__ = [
    "AutobatchError",
    "DeviceInfo",
    "DevicePoisoned",
    "DeviceUnavailable",
    "Estimate",
    "InputsNotInferred",
    "InvalidInput",
    "NotTraceable",
    "NothingFits",
    "PlanFileError",
    "RankFailed",
    "TrainingPlan",
    "Trial",
    "TrialCrashed",
    "Verdict",
    "Workload",
    "WorkloadNotPortable",
    "estimate",
    "fit",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
