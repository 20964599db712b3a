"""Optimizer steps by a plan: batches cut into micro-batches that fit, with exactly the gradient of the whole."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from autobatch import batches
from autobatch.devices import oom
from autobatch.errors import InvalidInput, NothingFits, RankFailed
from autobatch.plan import TrainingPlan
from autobatch.training.evidence import Evidence
from autobatch.training.loss import TrainingLoss, training_loss
from autobatch.training.passes import MicroBatch, Passes
from autobatch.training.reduction import Given, given
from autobatch.training.results import Shrunk, StepResult
from autobatch.training.sync import Stranded, sync_of
from autobatch.training.undo import StepStart
from autobatch.training.window import Cutter, Window, sizes_for, smaller_size
from autobatch.units import format_bytes
from autobatch.workload.runner import autocast, on_device

_log = logging.getLogger("autobatch")


class Stepper:
    """Runs optimizer steps; made by `TrainingPlan.stepper`, which explains the arguments."""

    def __init__(
        self,
        plan: TrainingPlan,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        loss: Callable[..., Any] | None = None,
        training_step: Callable[..., Any] | None = None,
        reduction: Given | None = None,
        scheduler: Any = None,
        scaler: torch.amp.GradScaler | None = None,
        clip_grad_norm: float | None = None,
        recover: bool = True,
    ) -> None:
        if clip_grad_norm is not None and not clip_grad_norm > 0:
            raise InvalidInput(f"clip_grad_norm must be above 0, but is {clip_grad_norm!r}.")
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS):
            raise InvalidInput(
                "optimizer must be a torch optimizer that is stepped with the gradients that are there, but is "
                f"{optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__}."
            )
        if isinstance(scheduler, ReduceLROnPlateau):
            raise InvalidInput(
                "ReduceLROnPlateau is stepped with a metric, once an epoch. Do that yourself, and pass no scheduler."
            )
        if loss is not None and training_step is not None:
            raise InvalidInput(
                "loss and training_step are both given; training_step computes the loss. Pass one of them."
            )
        scheduled = getattr(scheduler, "optimizer", optimizer)
        if scheduled.param_groups is not optimizer.param_groups:  # of one that is wrapped these are the same
            raise InvalidInput(
                "scheduler moves the learning rates of another optimizer. Make it with the one that is passed here."
            )
        parameters = set(model.parameters())
        if parameters.isdisjoint(p for group in optimizer.param_groups for p in group["params"]):
            raise InvalidInput(
                "no parameter of the optimizer is one of the model, so that training would change nothing. Make the "
                "optimizer from the parameters of this model, after it was moved, wrapped or copied."
            )
        self._plan = plan
        self._model = model
        self._modules = list(model.modules())
        self._optimizer = optimizer
        self._device = optimizer.param_groups[0]["params"][0].device
        self._loss = (loss, training_step)
        self._told = None if reduction is None else given(reduction)
        self._scheduler = scheduler
        fp16 = plan.precision == "fp16"
        self._scaler = torch.amp.GradScaler(self._device.type) if scaler is None and fp16 else scaler
        if self._scaler:
            self._scaler.scale(torch.zeros((), device=self._device))  # has its state made, whatever this rank will run
        self._clip = clip_grad_norm
        self._sync = sync_of(model, plan.world_size, recover)
        self._start = StepStart(self._sync.inner, self._device)
        self._recover = recover
        self._parts: tuple[Cutter, Passes] | None = None
        self._shrunk_to: int | None = None
        self._open: Window | None = None
        """Of the micro-batches of which the caller has run some, but not all."""
        self.steps = 0
        """Optimizer steps so far."""
        self.events: list[Shrunk] = []
        """Every time that training ran out of memory."""

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """This rank's micro-batches of a full optimizer step, as they are run now."""
        return sizes_for(self._plan, sum(self._plan.micro_batch_sizes), self._largest)

    @property
    def _largest(self) -> int:
        """The samples of a micro-batch, at most."""
        own = max(self._plan.micro_batch_sizes)
        return own if self._shrunk_to is None else min(own, self._shrunk_to)

    def step(self, batch: Any) -> StepResult:
        """Do one optimizer step with this rank's share of the target, or with a loader's smaller last batch.

        Gradients are None before and after it, also where it fails. Where memory runs out, everything is put back as
        the step found it, and it is run again in smaller micro-batches, on all ranks.

        Raises:
            InvalidInput: the batch cannot be cut, has more samples than the plan's share, or comes amid the
                micro-batches of `accumulate`.
            NothingFits: memory runs out with the smallest micro-batches, too.
            RankFailed: another rank failed, or is missing.
            Exception: whatever the model's own code raises.
        """
        self._refuse_while_open()
        with self._leaving_no_gradients():
            return self._step(batch)

    def _step(self, batch: Any) -> StepResult:
        with self._failing_together():
            layout = self._plan.layout_of(batch)
            cutter, passes = self._parts_for(batch)
            self._drop_gradients()
            recovers = self._recover and self._sync.recovers
            window = cutter.cut(batch, layout, self._largest)
            if recovers:
                self._start.keep()
        if not recovers:
            return self._finish(passes.run(window), window)
        while True:
            outcome = self._attempt(cutter, passes, window)
            shrunk = self._shrunk(outcome, window)
            if isinstance(outcome, Tensor) and not shrunk:
                return self._finish(outcome, window)
            with self._failing_together():
                window = cutter.cut(batch, layout, self._largest)

    def accumulate(self, loader: Iterable[Any]) -> Iterator[MicroBatch]:
        """Train on a loader that yields micro-batches already: as many as make up the target are one optimizer step.

        They are looked at ahead, as what all of them count has to be known before the first goes backward.

        Yields:
            Each micro-batch in turn; call `backward` of it.

        Raises:
            InvalidInput: micro-batches do not add up to this rank's share of the target, or `backward` was not called.
        """
        share = sum(self._plan.micro_batch_sizes)
        micros: list[Any] = []
        samples = 0
        for micro in loader:
            with self._failing_together():
                size = self._plan.layout_of(micro, is_micro_batch=True).size
                if samples + size > share:
                    raise InvalidInput(
                        f"micro-batches do not add up to the {share} samples of one optimizer step: {samples} are "
                        f"there, and {size} come next. Have the loader yield the one size of plan.uniform()."
                    )
            micros.append(micro)
            samples += size
            if samples == share:
                yield from self._through(micros)
                micros, samples = [], 0
        if micros:
            yield from self._through(micros)

    def state_dict(self) -> dict[str, Any]:
        """What goes on from a checkpoint: steps, the size that micro-batches have shrunk to (None: they never have),
        events, the scaler. Model, optimizer and scheduler have states of their own."""
        return {
            "steps": self.steps,
            "largest": self._shrunk_to,
            "events": [asdict(event) for event in self.events],
            "scaler": self._scaler.state_dict() if self._scaler else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Micro-batches are no larger than this plan's own, nor than what they had
        shrunk to.

        Raises:
            InvalidInput: it is no such state.
        """
        try:
            steps, largest = int(state["steps"]), state["largest"]
            shrunk_to = None if largest is None else int(largest)
            events = [Shrunk(**event) for event in state["events"]]
            scaler = state["scaler"]
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(f"this is no state of a stepper: {error!r}. Pass what state_dict() gave.") from error
        if self._scaler and scaler:
            self._scaler.load_state_dict(scaler)
        self.steps, self.events, self._shrunk_to = steps, events, shrunk_to

    def _parts_for(self, batch: Any) -> tuple[Cutter, Passes]:
        """What cuts batches and runs them: made when the first batch shows what it is made of."""
        if self._parts is None:
            arrays = list(batches.arrays(batch))
            if arrays and not any(isinstance(array, Tensor) for array in arrays):
                raise InvalidInput(
                    f"the batch has NumPy arrays and no tensors: {batches.describe(batch)}. Make tensors of them, as "
                    "torch.utils.data.default_collate does, or torch.as_tensor."
                )
            if not self._model.training:
                warnings.warn(
                    "the model is in evaluation mode, without dropout and with fixed statistics, and is trained so. "
                    "The plan was made in training mode: model.train().",
                    stacklevel=3,
                )
            try:
                found = training_loss(self._sync.inner, batch, *self._loss)
            except InvalidInput as error:
                if self._told is None:
                    raise
                found = TrainingLoss(
                    partial(_raise, error)
                )  # which is not asked for where the caller brings the losses
            context = partial(autocast, self._plan.precision, self._device)
            # Ranks that wait for one another fail together in the first of these, or not at all.
            one = self._plan.precision == "fp32" or not self._sync.alone
            contexts: list[Callable[[], AbstractContextManager[object]]] = (
                [nullcontext] if one else [nullcontext, context]
            )
            evidence = Evidence(partial(_loss_there, found, self._device), self._sync, contexts, self._start)
            reduction = self._told or found.reduction or evidence
            self._parts = (
                Cutter(self._plan, self._sync, reduction),
                Passes(self._model, found.compute, self._plan.precision, self._device, self._scaler, self._sync),
            )
        return self._parts

    def _attempt(self, cutter: Cutter, passes: Passes, window: Window) -> Tensor | oom.Diagnosis:
        """Run the passes of a step, to the loss or to the end of memory; then wait for no other rank, nor it for this.

        Raises:
            NothingFits: others are left waiting.
        """

        def catch_up() -> Tensor:
            self._undo()
            return passes.run(cutter.least(window))

        try:
            # Ranks that wait for this one within the passes cannot be told that it failed.
            with self._failing_together() if self._sync.apart else nullcontext():
                return self._sync.attempt(partial(passes.run, window), catch_up)
        except Stranded as error:
            size = max(window.samples)
            smaller = smaller_size(self._plan, size, [window.whole])
            advice = f"smaller micro-batches: fit(..., max_micro_batch={smaller})" if smaller else "more head-room"
            raise NothingFits(
                f"memory ran out on rank {self._sync.rank} in optimizer step {self.steps} with micro-batches of {size} "
                f"sample{'s' if size > 1 else ''}, and {error}, while the other ranks wait for it within the step, "
                f"which can therefore not be undone. Start all ranks again from a checkpoint, by a plan with {advice}.",
                needed_bytes=None,
                budget_bytes=self._plan.budget_bytes,
            ) from error

    def _shrunk(self, outcome: Tensor | oom.Diagnosis, window: Window) -> bool:
        """Whether some rank ran out, so that all have undone the step, and go on with smaller micro-batches.

        Raises:
            NothingFits: there are none.
        """
        ran_out = not isinstance(outcome, Tensor)
        rows = self._sync.meet([float(ran_out), max(window.samples, default=0), window.whole])
        losers = [rank for rank, row in enumerate(rows) if row[0]]
        if not losers:
            return False
        self._undo()
        first = max(losers, key=lambda rank: rows[rank][1])  # from whose size they shrink
        message = self._sync.gather("" if isinstance(outcome, Tensor) else _in_words(outcome))[first]
        if self._plan.rank_shares:  # then ranks have sizes of their own, and each shrinks from its own
            smaller = {rank: smaller_size(self._plan, int(rows[rank][1]), [int(rows[rank][2])]) for rank in losers}
        else:
            to = smaller_size(self._plan, int(rows[first][1]), [int(row[2]) for row in rows])
            smaller = dict.fromkeys(range(len(rows)), to)
        size = int(rows[first][1])
        event = Shrunk(self.steps, size, smaller[first] or 0, first, message)
        if None in smaller.values():
            raise NothingFits(
                f"memory ran out in optimizer step {self.steps} with micro-batches of {size} "
                f"sample{'s' if size > 1 else ''}, the smallest that this batch can be cut into: {message}. The step "
                "was undone. Free memory on the device, or make a plan with more head-room.",
                needed_bytes=None,
                budget_bytes=self._plan.budget_bytes,
            )
        own = smaller.get(self._sync.rank)
        if own is not None:
            self._shrunk_to = min(self._largest, own)
        self.events.append(event)
        if self._sync.rank == first:  # once, not by every rank
            _log.warning(
                "Memory ran out in optimizer step %d%s with micro-batches of %d sample%s. The step was undone; it is "
                "run again, and training goes on, with at most %d. (%s)",
                event.step,
                f" on rank {event.rank}" if len(rows) > 1 else "",
                event.from_size,
                "s" if event.from_size > 1 else "",
                event.to_size,
                message,
            )
        return True

    def _undo(self) -> None:
        self._drop_gradients()
        self._start.restore()
        oom.release()

    def _finish(self, loss: Tensor, window: Window) -> StepResult:
        """Everything after the last backward pass."""
        self._sync.gradients()
        self._sync.statistics(window.share)
        norm = None
        if self._clip is not None:
            if self._scaler:
                self._scaler.unscale_(self._optimizer)
            parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
            norm = torch.nn.utils.clip_grad_norm_(parameters, self._clip)
            norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # what is sharded has its norm in parts
        skipped = False
        if self._scaler:
            scale = self._scaler.get_scale()
            self._scaler.step(self._optimizer)
            self._scaler.update()
            skipped = self._scaler.get_scale() < scale
        else:
            self._optimizer.step()
        self._drop_gradients()
        if self._scheduler is not None and not skipped:
            self._scheduler.step()
        self.steps += 1
        self._open = None
        return StepResult(self._sync.mean(loss), norm, skipped, window.whole, len(window.micros))

    def _through(self, micros: list[Any]) -> Iterator[MicroBatch]:
        """The micro-batches of one optimizer step, which ends with the last."""
        self._refuse_while_open()
        with self._leaving_no_gradients(), self._failing_together():
            cutter, passes = self._parts_for(micros[0])
            window = cutter.gathered(micros)
            self._drop_gradients()
        self._open = window
        # Ranks that wait for this one within the passes cannot be told that it failed.
        telling = self._failing_together if self._sync.apart else nullcontext
        try:
            with self._failing_together():
                yield from passes.in_turn(window, self._finish, telling)
        finally:
            if self._open is window:  # else it came to its end, and there may be gradients of another
                self._open = None
                self._drop_gradients()

    def _refuse_while_open(self) -> None:
        """Another step would drop what the micro-batches of `accumulate` have added up."""
        if self._open:
            raise InvalidInput(
                "an optimizer step of accumulate() is still open, and another one would drop its gradients. Run its "
                "micro-batches to the end first, or break it off: close() of what accumulate() returned."
            )

    def _drop_gradients(self) -> None:
        """Those of parameters that the optimizer does not know, too: they would add up from step to step."""
        for module in self._modules:  # `zero_grad` would look for all of them anew, which takes longer
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.grad = None
        self._sync.drop_gradients()
        self._optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def _leaving_no_gradients(self) -> Iterator[None]:
        """A step that fails, or is broken off, leaves none of what it had added up."""
        try:
            yield
        except BaseException:
            self._drop_gradients()
            raise

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Tell the other ranks, who wait for this one, when it fails."""
        try:
            yield
        except RankFailed:
            raise
        except Stranded as error:  # the others wait where they cannot be told
            raise InvalidInput(str(error)) from error
        except Exception as error:
            self._sync.meet([], f"{type(error).__name__}: {error}")
            raise


def _raise(error: Exception, *_: Any) -> Tensor:
    raise error


def _loss_there(loss: TrainingLoss, device: torch.device, model: nn.Module, micro: Any) -> Tensor:
    return loss.compute(model, on_device(micro, device))


def _in_words(ran_out: oom.Diagnosis) -> str:
    asked = ran_out.requested_bytes
    return ran_out.message if asked is None else f"could not allocate {format_bytes(asked)}"
