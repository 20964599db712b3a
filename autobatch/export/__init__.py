"""Plans in the words of other frameworks, and integrations where configuration alone would lose exactness.

No framework is imported before its own integration is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autobatch.export.executable import find_executable_batch_size
    from autobatch.export.lightning_callback import AccumulateToTarget
    from autobatch.export.trainer import fit_trainer

_HOMES = {
    "AccumulateToTarget": "autobatch.export.lightning_callback",
    "find_executable_batch_size": "autobatch.export.executable",
    "fit_trainer": "autobatch.export.trainer",
}

__all__ = ["AccumulateToTarget", "find_executable_batch_size", "fit_trainer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
