"""What optimizer steps come to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step came to. `float(result)` is its loss."""

    loss: Tensor
    """The loss of the whole batch, over all ranks; on the model's device, where reading it waits for it."""
    grad_norm: Tensor | None
    """The norm of the gradients before they were clipped; None without `clip_grad_norm`."""
    skipped: bool
    """fp16: whether gradients overflowed, so that neither optimizer nor scheduler took the step."""
    samples: int
    """This rank's samples."""
    micro_batches: int
    """In how many parts this rank ran them."""

    def __float__(self) -> float:
        return float(self.loss)


@dataclass(frozen=True)
class Shrunk:
    """Training ran out of memory, and goes on with smaller micro-batches."""

    step: int
    """The optimizer step, from 0."""
    from_size: int
    """The largest micro-batch of the attempt that ran out, in samples."""
    to_size: int
    """The largest from then on."""
    rank: int
    """The rank that ran out; of several, that with the largest micro-batch."""
    message: str
    """What torch said."""
