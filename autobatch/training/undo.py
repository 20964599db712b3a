"""What the passes of an optimizer step change before its optimizer runs, kept so that the step can begin again."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch
from torch import Tensor, nn

LARGE_BYTES = 1024**2
"""Buffers from this size on, such as quantised weights, are copied only where torch has seen them change."""


class StepStart:
    """The start of an optimizer step: random numbers, and the model's buffers (such as BatchNorm's statistics).

    Buffers are held twice for it, on their device; large ones that never changed, on the host. Gradients need no
    keeping: there are none when a step begins.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._modules = [module for module in model.modules() if module._buffers]
        self._device = device
        self._held: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._small: list[Tensor] = []
        self._copies: list[Tensor] = []
        self._large: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._random: tuple[Any, ...] = ()

    @torch.no_grad()
    def keep(self) -> None:
        """Note how things are now."""
        cuda = torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None
        numpy = sys.modules.get("numpy")
        self._random = (random.getstate(), numpy and numpy.random.get_state(), torch.get_rng_state(), cuda)
        self._held = [(module._buffers, dict(module._buffers)) for module in self._modules]
        buffers = [b for _, were in self._held for b in were.values() if b is not None and _is_writable(b)]
        self._small = [b for b in buffers if b.numel() * b.element_size() < LARGE_BYTES]
        self._large = {id(b): self._copy_of(b) for b in buffers if b.numel() * b.element_size() >= LARGE_BYTES}
        if [(b.shape, b.dtype) for b in self._small] != [(c.shape, c.dtype) for c in self._copies]:
            self._copies = [buffer.detach().clone() for buffer in self._small]
        elif self._small:
            torch._foreach_copy_(self._copies, self._small)

    def _copy_of(self, buffer: Tensor) -> tuple[Tensor, Tensor, int]:
        """A large buffer, its copy, and the version that this is of."""
        version = buffer._version
        if id(buffer) not in self._large:
            return buffer, buffer.to("cpu", copy=True), version
        _, copy, was = self._large[id(buffer)]
        if version != was:  # it changes, and will again
            copy = copy.copy_(buffer) if copy.device == buffer.device else buffer.clone()
        return buffer, copy, version

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
        if self._small:
            torch._foreach_copy_(self._small, self._copies)
        for key, (buffer, copy, version) in self._large.items():
            if buffer._version != version:
                self._large[key] = (buffer, copy, buffer.copy_(copy)._version)

    def forget(self) -> None:
        """Hold no copies of small buffers any more, nor random numbers."""
        self._held, self._small, self._copies, self._random = [], [], [], ()


def _is_writable(buffer: Tensor) -> bool:
    """Whether it can be written in place: not where one element stands in several places, as in what was expanded."""
    if buffer.layout is not torch.strided:
        return True
    repeats = any(n > 1 and step == 0 for n, step in zip(buffer.shape, buffer.stride(), strict=True))
    return not (repeats or buffer.is_inference())
