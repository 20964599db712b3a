"""Micro-batches, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.devices import oom
from autobatch.errors import InvalidInput, add_note
from autobatch.precision import Precision
from autobatch.training.batchnorm import RunningStatistics
from autobatch.training.results import StepResult
from autobatch.training.sync import Sync
from autobatch.training.window import Window
from autobatch.workload.runner import autocast, check_loss, on_device


@dataclass(frozen=True)
class MicroBatch:
    """One of the micro-batches that make up an optimizer step; `batch` is on the model's device."""

    batch: Any
    weight: float
    """By what its loss counts in that of the whole batch (of which ranks take the mean)."""
    _own_loss: Callable[[], Tensor]
    _backward: Callable[[Tensor], StepResult | None]
    _telling: Callable[[], AbstractContextManager[object]]
    """Tells the other ranks of a failure."""

    def backward(self, loss: Tensor | None = None) -> StepResult | None:
        """Go backward from the loss of this micro-batch, as it is: it is weighed here.

        Args:
            loss: what the caller made of `batch`; None: the loss that the stepper knows.

        Returns:
            What the optimizer step came to, with the last of its micro-batches; else None.
        """
        with self._telling():
            try:
                return self._backward(self._own_loss() if loss is None else loss)
            except Exception as error:
                if oom.classify(error) is not None:
                    add_note(
                        error,
                        "autobatch: micro-batches of accumulate() are the loader's, so that this step cannot be run "
                        "again in smaller ones. Have the loader yield those of a plan by "
                        "fit(..., max_micro_batch=...), or give whole batches to stepper.step(batch), which recovers.",
                    )
                raise


class Passes:
    """Runs the micro-batches of a window; their gradients add up in the parameters."""

    def __init__(
        self,
        model: nn.Module,
        compute_loss: Callable[[nn.Module, Any], Tensor],
        precision: Precision,
        device: torch.device,
        scaler: torch.amp.GradScaler | None,
        sync: Sync,
    ) -> None:
        self._model = model
        self._compute_loss = compute_loss
        self._precision = precision
        self._device = device
        self._scaler = scaler
        self._sync = sync
        self._statistics = RunningStatistics(model, compute_loss)

    def run(self, window: Window) -> Tensor:
        """All of them; gives this rank's part of the whole batch's loss, on the device."""
        total = self._nothing()
        self._statistics.begin(window.shares)
        try:
            for i, (micro, weight) in enumerate(zip(window.micros, window.weights, strict=True)):
                self._statistics.micro_batch(i)
                with self._sync.passing(last=i == len(window.micros) - 1):
                    total = total + self.backward(self.loss(micro), weight)
        finally:
            self._statistics.end()
        return total

    def in_turn(
        self,
        window: Window,
        finish: Callable[[Tensor, Window], StepResult],
        telling: Callable[[], AbstractContextManager[object]],
    ) -> Iterator[MicroBatch]:
        """One after another, for the caller to run, `telling` others of failures; `finish` is called after the last.

        Raises:
            InvalidInput: the caller did not go backward from one of them.
        """
        total = self._nothing()
        last = len(window.micros) - 1
        ran = 0

        def backward(weight: float, loss: Tensor) -> StepResult | None:
            nonlocal total, ran
            total = total + self.backward(loss, weight)
            ran += 1
            if ran <= last:
                return None
            self._statistics.end()
            return finish(total, window)

        if last < 0:  # nothing in them counts: only the other ranks need this one
            finish(total, window)
        self._statistics.begin(window.shares)
        try:
            for i, (micro, weight) in enumerate(zip(window.micros, window.weights, strict=True)):
                self._statistics.micro_batch(i)
                there = on_device(micro, self._device)
                with self._sync.passing(last=i == last):
                    yield MicroBatch(there, weight, partial(self.loss, there), partial(backward, weight), telling)
                if ran != i + 1:
                    raise InvalidInput("call backward() of each micro-batch that accumulate() yields, once.")
        finally:
            if ran <= last:  # else that was done, and the model may be in another step
                self._statistics.end()

    def _nothing(self) -> Tensor:
        """The sum of no losses; the same type on all ranks, whatever they have run."""
        return torch.zeros((), device=self._device, dtype=torch.float64)

    def loss(self, micro: Any) -> Tensor:
        """The loss of one micro-batch, which is taken to the device first."""
        with autocast(self._precision, self._device):
            return self._compute_loss(self._model, on_device(micro, self._device))

    def backward(self, loss: Tensor, weight: float) -> Tensor:
        """Go backward from the loss of one micro-batch; gives it weighed, and without its graph."""
        loss = check_loss(loss)
        loss = loss.reshape(()) if loss.ndim else loss
        if loss.dtype in (torch.float16, torch.bfloat16):
            loss = loss.float()  # so that the sum over micro-batches is not rounded each time
        loss = loss * weight
        (self._scaler.scale(loss) if self._scaler else loss).backward()
        return loss.detach()
