"""`estimate`: what a training step takes on a GPU that isn't here, and where every byte of it is from."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from operator import index
from typing import Any, SupportsIndex

import torch
from torch import nn
from torch.optim import Optimizer

import autobatch
from autobatch.devices.simulated import SimulatedDevice, precision_warnings
from autobatch.devices.target import Target, find_target
from autobatch.errors import InvalidInput
from autobatch.estimates import Estimate, Interval
from autobatch.precision import Precision
from autobatch.prediction import attribution
from autobatch.prediction.accuracy import ERROR_BOUND
from autobatch.prediction.attention import generation
from autobatch.prediction.bugs import bugs_as_they_are
from autobatch.prediction.predictor import Predictor
from autobatch.prediction.replay import replay
from autobatch.prediction.trace import Site
from autobatch.prediction.tracing import TracedStep, traced
from autobatch.units import format_bytes, parse_bytes
from autobatch.workload import Workload, as_workload, resolve
from autobatch.workload.state import preserved
from autobatch.workload.step import TrainingStep

MOST = 1 << 20
"""Samples beyond which nobody looks for the largest micro-batch."""
WORTH_SAYING = 10_000
"""What each step leaves behind is told where it is more than one part of the peak in so many."""


def estimate(
    model: nn.Module | Workload,
    batch_size: int | None = None,
    *,
    device: str,
    data: Any = None,
    loss: Callable[..., Any] | None = None,
    training_step: Callable[..., Any] | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    precision: Precision = "fp32",
    memory_limit: int | str | None = None,
    headroom: float = 0.05,
    accumulation: bool = False,
) -> Estimate:
    """Predict what a training step takes on a GPU, without one: no kernel runs, and parameters take no memory.

    Args:
        model: the model, which may be on the meta device; or a `Workload`.
        batch_size: samples of the micro-batch. None: as many as fit.
        device: the GPU: "rtx-3090", "24GiB", or the path of a profile saved on it.
        data, loss, training_step, optimizer, precision: as for `autobatch.fit`.
        memory_limit: bytes, or a string such as "8GiB", that the process may take there in all.
        headroom: the share of that limit to leave free.
        accumulation: hold the gradients of an earlier micro-batch meanwhile, which is also what a step takes whose
            gradients are zeroed and kept (`zero_grad(set_to_none=False)`). Otherwise the step has one micro-batch, and
            no gradients before it, as after `zero_grad()`.

    Raises:
        InvalidInput: an argument cannot be used, or the inputs of a bare model cannot be inferred.
        NotTraceable: the step cannot be traced; the error names operator, module and line.
        WorkloadNotPortable: it cannot be sent to the process that traces it.
        Exception: what the model's own code raises, as it is, with the micro-batch size in a note.
    """
    workload = as_workload(model, data, loss, training_step, optimizer, precision)
    (found,) = estimates(workload, batch_size, [device], memory_limit, headroom, accumulation)
    return found


def estimates(
    workload: Workload,
    batch_size: int | None,
    devices: Sequence[str | Target],
    memory_limit: int | str | None = None,
    headroom: float = 0.05,
    accumulation: bool = False,
    largest: bool = True,
) -> list[Estimate]:
    """The same for several GPUs, from one trace (or as many as kinds of attention kernels that they choose).

    Args:
        largest: whether to look for the largest micro-batch also where `batch_size` is given.

    Raises: as `estimate`.
    """
    whole = isinstance(batch_size, SupportsIndex) and not isinstance(batch_size, bool)
    if batch_size is not None and (not whole or index(batch_size) < 1):
        raise InvalidInput(f"batch_size must be a whole number of at least 1, but is {batch_size!r}.")
    if not 0 <= headroom < 1:
        raise InvalidInput(f"headroom is the share of memory to leave free, from 0 to below 1, but is {headroom!r}.")
    limit = None if memory_limit is None else parse_bytes(memory_limit)
    targets = [device if isinstance(device, Target) else find_target(device) for device in devices]
    found: dict[int, Estimate] = {}
    with preserved(workload, tensors=False):
        step = resolve(workload)
        for kind in dict.fromkeys(generation(target.capability) for target in targets):
            same = [i for i, target in enumerate(targets) if generation(target.capability) == kind]
            with bugs_as_they_are(step), traced(step, targets[same[0]].capability) as steps:
                for i in same:
                    question = _Question(step, steps, targets[i], limit, headroom, accumulation)
                    found[i] = question.answer(batch_size, largest or batch_size is None)
    return [found[i] for i in range(len(targets))]


class _Question:
    """One step on one GPU."""

    def __init__(
        self,
        step: TrainingStep,
        steps: TracedStep,
        target: Target,
        limit: int | None,
        headroom: float,
        accumulation: bool,
    ) -> None:
        self._step = step
        self._steps = steps
        self._target = target
        self._device = SimulatedDevice(target, limit)
        self._predictor = Predictor(steps, target.conditions)
        self._headroom = headroom
        self._accumulation = accumulation

    def answer(self, batch_size: int | None, with_largest: bool) -> Estimate:
        largest = self._largest() if with_largest else None
        n = batch_size or largest or self._step.min_micro_batch
        need = self._predictor.need(self._sizes(n))
        trace = self._predictor.trace(self._sizes(n))
        position = replay(trace, settings=self._predictor.conditions.settings).peak_position
        context, reserve = self._target.context, self._step.reserve_bytes
        peaks = attribution.phase_peaks(trace)
        grows = attribution.growth(trace)
        if grows and grows[0] * WORTH_SAYING < need.allocated_bytes:
            grows = None  # such as the losses of all steps
        return Estimate(
            device=self._device.info,
            batch_size=n,
            accumulation=self._accumulation,
            precision=self._step.precision,
            allocated_peak_bytes=need.allocated_bytes,
            capacity_bytes=need.capacity_bytes,
            reserved_peak_bytes=need.reserved_bytes,
            context=Interval(likely=context.likely, low=context.low, high=context.high),
            device_total=Interval(
                likely=need.capacity_bytes + context.likely + reserve,
                low=int(need.capacity_bytes * (1 - ERROR_BOUND)) + context.low + reserve,
                high=int(need.capacity_bytes * (1 + ERROR_BOUND)) + context.high + reserve,
            ),
            reserve_bytes=reserve,
            limit_bytes=self._device.limit_bytes,
            headroom=self._headroom,
            largest_micro_batch=largest,
            largest_was_sought=with_largest,
            by_category=attribution.by_category(trace, position),
            by_module=attribution.by_module(trace, position),
            by_operator=attribution.by_operator(trace, position),
            timeline=attribution.timeline(trace, trace.steady_from),
            origins=attribution.origins(trace, peaks),
            phases={phase.value: attribution.phase_peak(trace, at) for phase, at in peaks.items()},
            growth_bytes=grows[0] if grows else 0,
            versions={
                "autobatch": autobatch.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
            },
            assumptions=(*self._step.assumptions, *self._device.assumptions),
            warnings=(
                *self._step.warnings,
                *self._device.warnings,
                *precision_warnings(self._target, self._step),
                *self._steps.warnings,
                *([_growing(*grows)] if grows else []),
            ),
        )

    def _sizes(self, n: int) -> tuple[int, ...]:
        return (n, n) if self._accumulation else (n,)

    def _largest(self) -> int | None:
        """The most samples that fit, by bisection: needs grow with the batch, but for fragmentation."""
        beside = self._target.context.likely + self._step.reserve_bytes
        budget = int(self._device.limit_bytes * (1 - self._headroom)) - beside
        fits = self._step.min_micro_batch - 1
        fails = min(self._step.min_micro_batch, MOST)
        while fails < MOST and self._fits(fails, budget):
            fits, fails = fails, min(fails * 4, MOST)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self._fits(middle, budget) else (fits, middle)
        if fails == MOST and self._fits(MOST, budget):
            return MOST
        return fits if fits >= self._step.min_micro_batch else None

    def _fits(self, n: int, budget: int) -> bool:
        return budget > 0 and self._predictor.fits(self._sizes(n), budget)


def _growing(more: int, site: Site) -> str:
    place = ", ".join(filter(None, [site.operator, site.module, site.line]))
    return (
        f"each step leaves {format_bytes(more)} behind that it did not find, so memory grows with every step. Most of "
        f"it is made by {place}."
    )
