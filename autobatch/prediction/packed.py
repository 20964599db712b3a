"""Packed sequences on the stand-in device, made as in `aten/src/ATen/native/PackedSequence.cpp` (torch 2.11 to 2.13).

Both operators read integers on the host, which torch's own code takes from a tensor's memory: of the lengths, or of the
samples that are left at each time step. Here the latter are a real tensor, also in the hands of fake ones.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._python_dispatch import _disable_current_modes

PACK = torch.ops.aten._pack_padded_sequence.default


def install() -> None:
    """Register unpacking for the stand-in device. Once in a process, for good."""
    autograd = Library("aten", "IMPL", "AutogradPrivateUse1")
    autograd.impl("_pad_packed_sequence", _padded)
    _libraries.append(autograd)


_libraries: list[Library] = []
"""Held, as what a library registers ends with it."""


def pack(padded: Tensor, lengths: list[int], batch_first: bool) -> tuple[Tensor, Tensor]:
    """Sequences one after another by time steps, and how many samples each step has.

    Args:
        padded: (steps, samples, ...), or with `batch_first` (samples, steps, ...).
        lengths: of each sample, the longest first.

    Raises:
        RuntimeError: they are not, as torch itself says.
    """
    if lengths != sorted(lengths, reverse=True) or lengths[-1] < 1:
        raise RuntimeError("lengths must be positive, and sorted in decreasing order unless enforce_sorted=False")
    by_step = padded.transpose(0, 1) if batch_first else padded
    parts, counts = [], []
    before = 0
    for samples in range(len(lengths), 0, -1):  # those with the shortest end first
        steps = lengths[samples - 1] - before
        if steps > 0:
            part = by_step[before : before + steps, :samples].contiguous()
            parts.append(part.view(steps * samples, *part.shape[2:]))
            counts += [samples] * steps
            before += steps
    return torch.cat(parts), _on_host(counts)


def _padded(data: Tensor, counts: Tensor, batch_first: bool, padding: float, most_steps: int) -> tuple[Tensor, Tensor]:
    samples_at: list[int] = counts.tolist()
    output = data.new_full((most_steps, samples_at[0], *data.shape[1:]), padding)
    step = row = 0
    for samples, alike in groupby(samples_at):
        steps = len(list(alike))
        part = data[row : row + steps * samples].view(steps, samples, *data.shape[1:])
        output[step : step + steps, :samples].copy_(part)
        step, row = step + steps, row + steps * samples
    lengths = [sum(samples > i for samples in samples_at) for i in range(samples_at[0])]
    return output.transpose(0, 1) if batch_first else output, _on_host(lengths)


def _on_host(numbers: list[int]) -> Tensor:
    with _disable_current_modes():
        return torch.tensor(numbers)
