"""What a trace depends on: the step itself, and the code that runs in it."""

from __future__ import annotations

import io
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from autobatch import cache
from autobatch.prediction.kernels import attention_of
from autobatch.workload import ship
from autobatch.workload.step import TrainingStep

_NOT_THE_USERS = (
    *{sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")},
    str(Path(__file__).parents[1]),  # which every key has
)


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
    stream = io.BytesIO()
    ship.dump(step, stream, without)
    content = stream.getvalue()
    # cloudpickle numbers classes of scripts at random in each process.
    for number, name in enumerate(getattr(cloudpickle.cloudpickle, "_DYNAMIC_CLASS_TRACKER_BY_CLASS", {}).values()):
        content = content.replace(name.encode(), f"{number:032}".encode())
    settings = repr((torch.__version__, attention_of(capability), switches))
    return cache.key_of("trace", settings, content, *sorted({*users_code(), *_code(step)}))


def users_code() -> set[str]:
    """The modules that are imported here and not installed, as they are."""
    files = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    return {_as_it_is(file) for file in files if file and not file.startswith(_NOT_THE_USERS)}


def _code(step: TrainingStep) -> Iterator[str]:
    """The versions of the packages that the model is from."""
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
