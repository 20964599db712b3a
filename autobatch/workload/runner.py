"""Runs training steps as training runs them: micro-batches, gradients held between them, then the optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autobatch.batches import map_arrays
from autobatch.errors import InvalidInput
from autobatch.precision import Precision
from autobatch.workload.step import AUTOCAST_DTYPES, TrainingStep, require_trainable

OnPhase = Callable[[str], None]
"""Called as each phase begins: "batch", "forward", "backward", "optimizer"."""


class StepRunner:
    """Optimizer steps of one `TrainingStep` on one torch device, which the model is already on.

    The optimizer lives as long as the runner, so its lazy state is there from the second step on. A model that is in
    eval mode as a whole is put in train mode; single layers in eval mode were put there on purpose, and stay.
    """

    def __init__(self, step: TrainingStep, device: str | torch.device = "cpu") -> None:
        self.step = step
        self.device = torch.device(device)
        if not step.model.training:
            step.model.train()
        self.optimizer = make_optimizer(step)
        self._scaler = torch.amp.GradScaler(self.device.type) if step.precision == "fp16" else None
        if self._scaler:
            self._scaler.scale(torch.zeros((), device=self.device))  # has it make its state now, not in the first step

    def run(self, sizes: Sequence[int], on_phase: OnPhase = lambda phase: None, more: Iterable[int] = ()) -> float:
        """Run one optimizer step over micro-batches of these sizes, and give its loss.

        Gradients are None before and after it, as `zero_grad()` leaves them.

        Args:
            sizes: samples of each micro-batch.
            on_phase: called as each phase begins.
            more: further micro-batches of the same step, each asked for when the one before it is done. The loss is
                weighed as without them.
        """
        return float(self.run_unread(sizes, on_phase, more))

    def run_unread(
        self, sizes: Sequence[int], on_phase: OnPhase = lambda phase: None, more: Iterable[int] = ()
    ) -> torch.Tensor:
        """The same, with the loss left on its device: reading it waits for that, and on a fake one it is impossible."""
        total = torch.zeros((), device=self.device)
        for size in itertools.chain(sizes, more):
            on_phase("batch")
            batch = on_device(self.step.make_batch(size), self.device)
            on_phase("forward")
            with autocast(self.step.precision, self.device):
                loss = self.step.compute_loss(self.step.model, batch)
            loss = check_loss(loss).reshape(()) * (size / sum(sizes))
            total += loss.detach()
            on_phase("backward")
            (self._scaler.scale(loss) if self._scaler else loss).backward()
        on_phase("optimizer")
        if self._scaler:
            # As GradScaler.step does, but never skipped: training skips a step whose gradients overflow, and then makes
            # the optimizer's state in a later one.
            self._scaler.unscale_(self.optimizer)
            self._scaler.update()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def on_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors there; from pinned memory they travel while the host goes on."""

    def moved(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=device.type == "cuda") if isinstance(leaf, torch.Tensor) else leaf

    return map_arrays(moved, batch)


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[object]:
    """Where the forward pass runs."""
    dtype = AUTOCAST_DTYPES.get(precision)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def gradient_bytes(model: nn.Module) -> int:
    """Bytes in the gradients that are there."""
    gradients = (parameter.grad for parameter in model.parameters())
    return sum(g.numel() * g.element_size() for g in gradients if g is not None and not g.is_sparse)


def make_optimizer(step: TrainingStep) -> Optimizer:
    """The caller's optimizer, or a new one over the trainable parameters.

    Raises:
        InvalidInput: the model has no trainable parameters, or it is no optimizer that can be used.
    """
    if isinstance(step.optimizer, Optimizer):
        return step.optimizer
    optimizer = step.optimizer(require_trainable(step.model))
    if not isinstance(optimizer, Optimizer):
        raise InvalidInput(f"optimizer must make a torch.optim.Optimizer, but made {type(optimizer).__name__}.")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidInput(
            "LBFGS runs the model as often as it likes in each step, so micro-batches cannot be fitted to it."
        )
    return optimizer


def check_loss(loss: object) -> torch.Tensor:
    """The loss, if a training step can go backward from it.

    Raises:
        InvalidInput: it is not a scalar tensor that depends on trainable parameters.
    """
    if not isinstance(loss, torch.Tensor):
        kind = type(loss).__name__
        raise InvalidInput(f"the loss must be a scalar tensor, but is {kind}. Return the loss from training_step.")
    if loss.numel() != 1:
        raise InvalidInput(
            f"the loss must be a scalar, but has the shape {tuple(loss.shape)}. Reduce it, as loss.mean() does."
        )
    if not loss.requires_grad:
        raise InvalidInput("the loss does not depend on any trainable parameter, so there is nothing to train.")
    return loss
