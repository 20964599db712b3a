"""A GPU that isn't here: a step is traced once, and its allocations are replayed through the allocator of that GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from autobatch.devices.base import RunTrial, limit_too_high
from autobatch.devices.target import Target
from autobatch.devices.timing import Timing
from autobatch.errors import InvalidInput
from autobatch.prediction.predictor import Predictor
from autobatch.trial import DeviceInfo, Trial, Verdict

if TYPE_CHECKING:
    from autobatch.workload.step import TrainingStep

NATIVE_BF16 = (8, 0)
"""The first compute capability with bf16 in hardware."""


def precision_warnings(target: Target, in_bf16: bool) -> Iterator[str]:
    """What the user should know about a step's data types on that GPU, in sentences."""
    if in_bf16 and target.capability < NATIVE_BF16:
        yield (
            "bf16 needs compute capability {}.{}, and {} has {}.{}: torch emulates it there, slowly, where it runs at "
            'all. precision="fp16" is what such cards are made for.'.format(
                *NATIVE_BF16, target.title, *target.capability
            )
        )


class SimulatedDevice:
    """One GPU, known by its data alone.

    Args:
        target: the GPU.
        memory_limit: bytes that the training process may take on it in all; None for all that torch sees there.
    """

    least_headroom = 0.0
    jump_bytes = 0
    trials_are_cheap = True

    def __init__(self, target: Target, memory_limit: int | None = None) -> None:
        self.target = target
        self.limit_bytes = min(target.visible_bytes, memory_limit or target.visible_bytes)
        self.settled_bytes = self.limit_bytes
        self.info = DeviceInfo(
            type="simulated",
            name=target.title,
            total_bytes=target.visible_bytes,
            capability="{}.{}".format(*target.capability),
        )
        self.context_bytes = target.context.likely
        self.assumptions = (f"GPU taken from {target.provenance}.",)
        self.predicted: Callable[[tuple[int, ...]], int] | None = None
        self.warnings: list[str] = []
        if memory_limit is not None and memory_limit > self.limit_bytes:
            self.warnings.append(limit_too_high(memory_limit, self.limit_bytes, self.info.name))

    def prepare(self) -> None:
        """Nothing takes time before there is a step."""

    def close(self) -> None:
        """Nothing is left after `trials`."""

    @contextmanager
    def trials(self, step: TrainingStep, budget_bytes: int) -> Iterator[RunTrial]:
        """See `Device.trials`. The step is traced in a process beside this one.

        Raises:
            NotTraceable: it cannot be.
            Exception: the user's own code does, here and on a CPU.
        """
        from autobatch.prediction.bugs import bugs_as_they_are  # torch is not needed before
        from autobatch.prediction.tracing import traced

        with bugs_as_they_are(step), traced(step, self.target.capability) as steps:
            predictor = Predictor(steps, self.target.conditions)
            self.predicted = lambda sizes: self.context_bytes + predictor.need(sizes).capacity_bytes
            self.warnings.extend((*precision_warnings(self.target, step.in_bf16), *steps.warnings))
            yield lambda sizes, thorough=False, timing=None: self._run(predictor, sizes, budget_bytes, timing)

    def _run(self, predictor: Predictor, sizes: tuple[int, ...], budget_bytes: int, timing: Timing | None) -> Trial:
        if timing is not None:
            raise InvalidInput(
                f"how fast a step is cannot be predicted, and {self.info.name} is not here. Run this where it is."
            )
        started = time.perf_counter()
        need = predictor.need(sizes)
        context = self.context_bytes
        peak = context + need.capacity_bytes
        return Trial(
            micro_batch_sizes=sizes,
            verdict=Verdict.FITS if peak <= budget_bytes else Verdict.OVER_BUDGET,
            peak_bytes=peak,
            rest_bytes=context + need.rest_bytes,
            turn_bytes=context + need.turn_bytes,
            peak_allocated_bytes=need.allocated_bytes,
            peak_reserved_bytes=need.reserved_bytes,
            seconds=time.perf_counter() - started,
        )
