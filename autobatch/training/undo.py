"""What the passes of an optimizer step change before its optimizer runs, kept so that the step can begin again."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor, nn


class StepStart:
    """The start of an optimizer step: random numbers, and the model's buffers (such as BatchNorm's statistics).

    Buffers are held twice for it, on their device. Gradients need no keeping: there are none when a step begins.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._modules = [module for module in model.modules() if module._buffers]
        self._device = device
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._copies: list[Tensor] = []
        self._random: tuple[Any, ...] = ()

    @torch.no_grad()
    def keep(self) -> None:
        """Note how things are now."""
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        numpy = sys.modules.get("numpy")
        self._random = (random.getstate(), numpy and numpy.random.get_state(), torch.get_rng_state(), cuda)
        self._held = [(module._buffers, dict(module._buffers)) for module in self._modules]
        buffers = self._buffers()
        if [(b.shape, b.dtype) for b in buffers] != [(c.shape, c.dtype) for c in self._copies]:
            self._copies = [buffer.detach().clone() for buffer in buffers]
        elif buffers:
            torch._foreach_copy_(self._copies, buffers)

    @torch.no_grad()
    def restore(self) -> None:
        """Put things back as they were when they were kept."""
        python, numpy, host, cuda = self._random
        random.setstate(python)
        if numpy is not None:
            sys.modules["numpy"].random.set_state(numpy)
        torch.set_rng_state(host)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, self._device)
        for buffers, were in self._held:
            buffers.clear()
            buffers.update(were)
        if self._copies:
            torch._foreach_copy_(self._buffers(), self._copies)

    def forget(self) -> None:
        """Hold no copies any more."""
        self._held, self._copies, self._random = [], [], ()

    def _buffers(self) -> list[Tensor]:
        return [buffer for _, were in self._held for buffer in were.values() if buffer is not None]
