"""What a trace depends on: the step itself, and the code that runs in it."""

from __future__ import annotations

import io
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from autobatch import cache
from autobatch.prediction.kernels import attention_of
from autobatch.workload import ship
from autobatch.workload.step import TrainingStep

_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def fingerprint(step: TrainingStep, capability: tuple[int, int], without: set[int], switches: Mapping[str, Any]) -> str:
    """A key that is equal for steps with equal traces: same objects, same code, same versions.

    Args:
        step: the step.
        capability: of the GPU that it is traced for.
        without: storages whose values do not matter (their `_cdata`).
        switches: the caller's settings that decide what runs.

    Raises:
        WorkloadNotPortable: the step cannot be pickled.
    """
    content = io.BytesIO()
    ship.dump(step, content, without)
    settings = repr((torch.__version__, attention_of(capability), switches))
    return cache.key_of("trace", settings, content.getvalue(), *sorted(_code(step)))


def _code(step: TrainingStep) -> Iterator[str]:
    """The user's own modules as they were imported, and the versions of the packages that the model is from."""
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and not file.startswith(_INSTALLED):
            yield _as_it_is(file)
    for kind in {type(module) for module in step.model.modules()}:
        package = kind.__module__.partition(".")[0]
        yield f"{package} {getattr(sys.modules.get(package), '__version__', '')}"
        file = getattr(sys.modules.get(kind.__module__), "__file__", None)
        if file:
            yield _as_it_is(file)


def _as_it_is(file: str) -> str:
    try:
        stat = Path(file).stat()
    except OSError:
        return file
    return f"{file} {stat.st_mtime_ns} {stat.st_size}"
