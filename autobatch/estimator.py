"""What a traced step takes on GPUs that aren't here. No torch: a trace that was kept is asked again without it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import TYPE_CHECKING, Any, SupportsIndex

import autobatch
from autobatch.devices.simulated import SimulatedDevice, precision_warnings
from autobatch.devices.target import Target, find_target
from autobatch.errors import InvalidInput
from autobatch.estimates import Estimate, Interval
from autobatch.precision import Precision
from autobatch.prediction import attribution
from autobatch.prediction.accuracy import ERROR_BOUND
from autobatch.prediction.kernels import attention_of
from autobatch.prediction.predictor import Predictor
from autobatch.prediction.replay import replay
from autobatch.prediction.trace import Site
from autobatch.prediction.traced import TracedStep
from autobatch.torch_version import installed
from autobatch.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from autobatch.workload.step import TrainingStep

MOST = 1 << 20
"""Samples beyond which nobody looks for the largest micro-batch."""
WORTH_SAYING = 10_000
"""What each step leaves behind is told where it is more than one part of the peak in so many."""


@dataclass(frozen=True)
class Question:
    """What to find out about a step, checked."""

    batch_size: int | None
    """Samples of the micro-batch; None: as many as fit."""
    targets: tuple[Target, ...]
    limit_bytes: int | None
    headroom: float
    accumulation: bool
    largest: bool = True
    """Whether to look for the largest micro-batch also where a batch size is given."""

    @classmethod
    def checked(
        cls,
        batch_size: Any,
        devices: Sequence[str | Target],
        memory_limit: int | str | None,
        headroom: Any,
        accumulation: bool,
        largest: bool = True,
    ) -> Question:
        """The question, if every part of it can be answered.

        Raises:
            InvalidInput: a number is out of its range, or there is no such GPU.
        """
        whole = isinstance(batch_size, SupportsIndex) and not isinstance(batch_size, bool)
        if batch_size is not None and (not whole or index(batch_size) < 1):
            raise InvalidInput(f"batch_size must be a whole number of at least 1, but is {batch_size!r}.")
        if not 0 <= headroom < 1:
            raise InvalidInput(
                f"headroom is the share of memory to leave free, from 0 to below 1, but is {headroom!r}."
            )
        targets = tuple(device if isinstance(device, Target) else find_target(device) for device in devices)
        limit = None if memory_limit is None else parse_bytes(memory_limit)
        return cls(batch_size, targets, limit, headroom, accumulation, largest or batch_size is None)

    @property
    def kinds(self) -> dict[int, list[Target]]:
        """The GPUs by the kind of attention kernels that they choose: each has a trace of its own."""
        kinds: dict[int, list[Target]] = {}
        for target in self.targets:
            kinds.setdefault(attention_of(target.capability), []).append(target)
        return kinds


@dataclass(frozen=True)
class Estimator:
    """What is known of a traced step: answers for any batch size, on any GPU that chooses the same kernels."""

    steps: TracedStep
    precision: Precision
    in_bf16: bool
    min_micro_batch: int
    reserve_bytes: int
    assumptions: tuple[str, ...]
    warnings: tuple[str, ...]

    @classmethod
    def of(cls, step: TrainingStep, steps: TracedStep) -> Estimator:
        """That of a step, and its traces."""
        return cls(
            steps=steps,
            precision=step.precision,
            in_bf16=step.in_bf16,
            min_micro_batch=step.min_micro_batch,
            reserve_bytes=step.reserve_bytes,
            assumptions=step.assumptions,
            warnings=step.warnings,
        )

    def answer(self, question: Question, target: Target) -> Estimate:
        """What the step takes on that GPU.

        Raises:
            NotTraceable: this very size had to be traced, and could not.
        """
        device = SimulatedDevice(target, question.limit_bytes)
        predictor = Predictor(self.steps, target.conditions)
        beside = target.context.likely + self.reserve_bytes
        budget = int(device.limit_bytes * (1 - question.headroom)) - beside
        largest = self._largest(predictor, question, budget) if question.largest else None
        n = question.batch_size or largest or self.min_micro_batch
        need = predictor.need(_sizes(n, question))
        trace = predictor.trace(_sizes(n, question))
        position = replay(trace, settings=predictor.conditions.settings).peak_position
        context, reserve = target.context, self.reserve_bytes
        peaks = attribution.phase_peaks(trace)
        grows = attribution.growth(trace)
        if grows and grows[0] * WORTH_SAYING < need.allocated_bytes:
            grows = None  # such as the losses of all steps
        return Estimate(
            device=device.info,
            batch_size=n,
            accumulation=question.accumulation,
            precision=self.precision,
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
            limit_bytes=device.limit_bytes,
            headroom=question.headroom,
            largest_micro_batch=largest,
            largest_was_sought=question.largest,
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
                "torch": installed()[0],
            },
            assumptions=(*self.assumptions, *device.assumptions),
            warnings=(
                *self.warnings,
                *device.warnings,
                *precision_warnings(target, self.in_bf16),
                *(self.steps.warnings if question.largest else self.steps.caveats),
                *([_growing(*grows)] if grows else []),
            ),
        )

    def _largest(self, predictor: Predictor, question: Question, budget_bytes: int) -> int | None:
        """The most samples that fit, by bisection: needs grow with the batch, but for fragmentation."""

        def fitting(n: int) -> bool:
            return budget_bytes > 0 and predictor.fits(_sizes(n, question), budget_bytes)

        fits = self.min_micro_batch - 1
        fails = min(self.min_micro_batch, MOST)
        while fails < MOST and fitting(fails):
            fits, fails = fails, min(fails * 4, MOST)
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if fitting(middle) else (fits, middle)
        if fails == MOST and fitting(MOST):
            return MOST
        return fits if fits >= self.min_micro_batch else None


def _sizes(n: int, question: Question) -> tuple[int, ...]:
    return (n, n) if question.accumulation else (n,)


def _growing(more: int, site: Site) -> str:
    place = ", ".join(filter(None, [site.operator, site.module, site.line]))
    return (
        f"each step leaves {format_bytes(more)} behind that it did not find, so memory grows with every step. Most of "
        f"it is made by {place}."
    )
