"""BatchNorm's running statistics, moved as far by the micro-batches of a step together as by the whole batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class RunningStatistics:
    """Sets the momentum for each micro-batch of a step, and the caller's own when it ends.

    A running mean is moved to (1 - m) * r + m * mean(whole batch) exactly if micro-batch i of k, with the share w_i of
    the samples, moves it by the momentum m_i = m * w_i / (1 - m * (w_i+1 + … + w_k)). The running variance gets the
    mean of the micro-batches' variances; how far their means lie apart is not in it.
    """

    def __init__(self, model: nn.Module, compute_loss: Any = None) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, _NormBase)]
        # A compiled model is compiled anew for another momentum: it gets one for all.
        self._compiled = hasattr(compute_loss, "_torchdynamo_orig_callable") or any(
            getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in model.modules()
        )
        self._own: list[tuple[_NormBase, float | None, float]] = []
        self._counters: list[Tensor] = []
        self._counted: list[Tensor] = []

    def begin(self, shares: Sequence[float]) -> None:
        """A step begins, whose micro-batches have these shares of its samples."""
        self._shares = shares
        self._own = []
        for layer in self._layers:
            if layer.training and layer.track_running_stats and layer.running_mean is not None and len(shares) > 1:
                momentum = layer.momentum
                # Without one, the average is over all steps: this is the next.
                effective = momentum if momentum is not None else 1 / (float(_steps(layer)) + 1)
                self._own.append((layer, momentum, effective))
        self._counters = [_steps(layer) for layer, _, _ in self._own if layer.num_batches_tracked is not None]
        self._counted = list(torch._foreach_add(self._counters, 1)) if self._counters else []

    def micro_batch(self, i: int) -> None:
        """Micro-batch `i` is next."""
        for layer, _, momentum in self._own:
            if self._compiled:
                layer.momentum = 1 - (1 - momentum) ** (1 / len(self._shares))
            else:
                layer.momentum = momentum * self._shares[i] / (1 - momentum * sum(self._shares[i + 1 :]))

    @torch.no_grad()
    def end(self) -> None:
        """The step has ended, or failed: it counts as one."""
        for layer, momentum, _ in self._own:
            layer.momentum = momentum
        if self._counted:
            torch._foreach_copy_(self._counters, self._counted)
        self._own, self._counters, self._counted = [], [], []


def _steps(layer: _NormBase) -> Tensor:
    steps = layer.num_batches_tracked
    return steps if steps is not None else torch.zeros(())
