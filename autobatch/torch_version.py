"""Which torch is installed, also where importing it would take seconds."""

from __future__ import annotations

import importlib.metadata
import runpy
import sys
from functools import cache


@cache
def installed() -> tuple[str, str | None]:
    """Its version, such as "2.11.0+cu130", and the version of CUDA that it was built for, None for none."""
    torch = sys.modules.get("torch")
    if torch is not None:
        return str(torch.__version__), torch.version.cuda
    names = runpy.run_path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py")))
    return names["__version__"], names["cuda"]
