"""Stand-in tensors and batches of any number of samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autobatch.batches import Layout, grow


@dataclass(frozen=True)
class RandomTensor:
    """Makes random tensors of n samples."""

    shape: tuple[int, ...]
    """The shape of one sample."""
    dtype: torch.dtype = torch.float32
    high: int = 2
    """Integers are drawn from [0, high)."""
    batch_dim: int = 0
    constant: int | None = None
    """Fill with this instead, for masks and lengths."""
    step: int | None = None
    """Sample i gets i * step instead, for offsets."""
    flat: bool = False
    """The samples follow each other in one dimension."""
    last: int | None = None
    """Integers: the value of each sample's last item and of no other, for models that look for an end-of-text token."""

    def __call__(self, n: int) -> Tensor:
        shape = self.of(n)
        if self.constant is not None:
            return torch.full(shape, self.constant, dtype=self.dtype)
        if self.step is not None:
            return torch.arange(n, dtype=self.dtype) * self.step
        if self.dtype.is_floating_point:
            return torch.rand(shape, dtype=self.dtype)
        values = torch.randint(self.high, shape, dtype=self.dtype)
        if self.last is not None:
            values[values == self.last] = (self.last + 1) % self.high
            values[..., -1] = self.last
        return values

    def of(self, n: int | str) -> tuple[Any, ...]:
        """The shape of a tensor of n samples."""
        if self.flat:
            return (n * self.shape[0] if isinstance(n, int) else f"{n} * {self.shape[0]}",)
        return (*self.shape[: self.batch_dim], n, *self.shape[self.batch_dim :])

    def to(self, dtype: torch.dtype) -> RandomTensor:
        """The same with this dtype, where it is a floating point one."""
        return replace(self, dtype=dtype) if self.dtype.is_floating_point else self

    def __str__(self) -> str:
        sizes = self.of("n")
        shape = f"({', '.join(map(str, sizes))}{',' if len(sizes) == 1 else ''})"
        values = f", values in [0, {self.high})" if self._is_drawn and not self.dtype.is_floating_point else ""
        return f"{str(self.dtype).removeprefix('torch.')} {shape}{values}"

    @property
    def _is_drawn(self) -> bool:
        return self.constant is None and self.step is None


@dataclass(frozen=True)
class RandomBatch:
    """Makes batches whose tensors are random; everything that is not a RandomTensor is kept."""

    parts: Any
    """A nest of tuples and mappings with RandomTensors (or other makers of batches) in it."""

    def __call__(self, n: int) -> Any:
        return _make(self.parts, n)

    def __str__(self) -> str:
        if isinstance(self.parts, Mapping):
            return ", ".join(f"{name}: {part}" for name, part in self.parts.items())
        if isinstance(self.parts, tuple):
            return " and ".join(map(str, self.parts))
        return str(self.parts)


@dataclass(frozen=True)
class GrownBatch:
    """Makes batches by cycling through the samples of a small one."""

    template: Any
    layout: Layout

    def __call__(self, n: int) -> Any:
        return grow(self.template, self.layout, n)


def _make(parts: Any, n: int) -> Any:
    if isinstance(parts, RandomTensor):
        return parts(n)
    if isinstance(parts, Mapping):
        return {name: _make(part, n) for name, part in parts.items()}
    if isinstance(parts, tuple):
        return tuple(_make(part, n) for part in parts)
    if isinstance(parts, (RandomBatch, GrownBatch)):
        return parts(n)
    return parts
