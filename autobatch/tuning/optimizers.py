"""Which of torch's implementations an optimizer runs: for each parameter, for lists of them, or in one kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autobatch.errors import InvalidInput

FLAGS = {
    "for-loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True, "fused": False},
    "fused": {"foreach": False, "fused": True},
}
"""What torch's constructors call them."""


def lacks(optimizer: Optimizer, implementation: str) -> str | None:
    """Why an optimizer cannot run so, in a few words; None if it can."""
    kind = type(optimizer).__name__
    flag = "fused" if implementation == "fused" else "foreach"
    groups = optimizer.param_groups
    if not all(flag in group for group in groups):
        return f"{kind} has no {flag} implementation"
    if any(group.get("differentiable") for group in groups):
        return f"the {kind} is differentiable"
    if any(group.get(flag) is not None for group in groups for flag in FLAGS[implementation]):
        return f"the {kind} was given an implementation of its own"
    return None


def use(optimizer: Optimizer, implementation: str) -> None:
    """Have an optimizer run so from its next step on."""
    for group in optimizer.param_groups:
        group.update({flag: on for flag, on in FLAGS[implementation].items() if flag in group})
    if implementation != "fused":
        return
    # As its constructor does with `fused=True`.
    optimizer._step_supports_amp_scaling = True  # type: ignore[attr-defined]
    optimizer._need_device_dtype_check_for_fused = True  # type: ignore[attr-defined]
    for parameter, state in optimizer.state.items():
        count = state.get("step") if isinstance(state, dict) else None
        if isinstance(count, torch.Tensor):
            state["step"] = count.to(device=parameter.device, dtype=torch.float32)


@dataclass(frozen=True)
class Implemented:
    """Makes the same optimizer with another implementation."""

    make: Callable[[Iterable[nn.Parameter]], Optimizer]
    implementation: str

    def __call__(self, parameters: Iterable[nn.Parameter]) -> Any:
        optimizer = self.make(parameters)
        if isinstance(optimizer, Optimizer):  # else whoever asked for it says so
            if missing := lacks(optimizer, self.implementation):
                raise InvalidInput(f"{missing}, so it cannot run as {self.implementation!r}.")
            use(optimizer, self.implementation)
        return optimizer
