"""Trials on a CUDA device, in this process, on the caller's own model and optimizer, given back as they were."""

from __future__ import annotations

import gc
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from autobatch.devices.base import RunTrial, limit_too_high
from autobatch.devices.cuda_memory import CudaMemory, open_gpu, pci_bus_id
from autobatch.devices.nvml import GpuProcess, GpuReading, read_gpu
from autobatch.devices.oom import Diagnosis, Failure, chain, classify
from autobatch.devices.prediction import Predictions, conditions_of, predictions
from autobatch.devices.timing import WARM_UP, Timing, timed
from autobatch.errors import DevicePoisoned, DeviceUnavailable, NothingFits, NotTraceable, WorkloadNotPortable, add_note
from autobatch.trial import DeviceInfo, Trial, Verdict
from autobatch.units import format_bytes
from autobatch.workload.runner import StepRunner, gradient_bytes
from autobatch.workload.state import preserved
from autobatch.workload.step import TrainingStep, require_values

MUCH_IN_USE = 1024**3
"""Bytes in use by nobody whom the driver names, above which the user is told: drivers keep some hundred MiB."""


class CudaDevice:
    """One GPU. This process' bytes on it: what torch's allocator reserves, and context and libraries outside that."""

    least_headroom = 0.0
    jump_bytes = 0
    assumptions = ()
    trials_are_cheap = False

    def __init__(
        self,
        index: int = 0,
        memory_limit: int | None = None,
        *,
        memory: CudaMemory | None = None,
        ask_driver: Callable[[str | None, str | None], GpuReading] = read_gpu,
        predictions: Predictions | None = predictions,
    ) -> None:
        """Look at the GPU; this creates a CUDA context on it.

        Args:
            index: the device's index in torch.
            memory_limit: bytes that this process may take on it in all, or None for what the device can give.
            memory: torch's view of the device's memory.
            ask_driver: the driver's view: `read_gpu(uuid, pci_bus_id)`.
            predictions: what makes predictions; None to do without.

        Raises:
            DeviceUnavailable: there is no such device, or it cannot be used.
        """
        self._memory = memory or open_gpu(index)
        self._ask_driver = ask_driver
        fresh = not self._memory.has_context()
        properties = self._memory.properties()
        self._uuid = str(properties.uuid) if getattr(properties, "uuid", None) else None
        self._bus = pci_bus_id(properties)
        before = self._reading()
        try:
            free, total = self._memory.free_and_total()
        except RuntimeError as error:
            first_line = str(error).splitlines()[0]
            raise DeviceUnavailable(
                f"{self._memory.device} cannot be used: {first_line}. Another process may hold all of its memory, or "
                "hold it exclusively; nvidia-smi shows which. Choose another device."
            ) from error
        reading = self._reading()
        self._limited = memory_limit is not None
        self._before_us = _held_bytes(before, total) if fresh else None
        """Bytes that others held before this process had a context, where that is known."""
        others = self._others_bytes(reading)
        limit = total - (others or 0)
        if self._memory.fraction() < 1:  # the caller's own limit
            limit = min(limit, int(self._memory.fraction() * total) + self._outside_bytes())
        self.limit_bytes = min(limit, memory_limit) if memory_limit is not None else limit
        self.settled_bytes = self.limit_bytes
        self.info = DeviceInfo(
            type="cuda",
            name=properties.name,
            total_bytes=total,
            free_bytes=free,
            index=index,
            uuid=reading.uuid or self._uuid,
            driver=reading.driver,
            capability=f"{properties.major}.{properties.minor}",
            mig=reading.mig,
        )
        neighbours = _neighbours(before if fresh else reading, fresh)
        self._predictions = predictions
        self._conditions = conditions_of(properties)
        self.predicted: Callable[[tuple[int, ...]], int] | None = None
        self.warnings = list(_warnings(reading, neighbours, others, self._limited))
        if memory_limit is not None and memory_limit > limit:
            self.warnings.append(limit_too_high(memory_limit, limit, properties.name))

    @property
    def context_bytes(self) -> int:
        """See `Device.context_bytes`."""
        return self._outside_bytes()

    def prepare(self) -> None:
        """Nothing: the context has been there since the device was made."""

    def close(self) -> None:
        """Nothing: `trials` gives everything back itself."""

    @contextmanager
    def trials(self, step: TrainingStep, budget_bytes: int) -> Iterator[RunTrial]:
        """See `Device.trials`. The model is on the GPU for the duration, and everything is afterwards as it was.

        Raises:
            NothingFits: the model itself does not fit on the GPU.
            DevicePoisoned: a kernel failed in a way that leaves the GPU beyond use for this process.
        """
        require_values(step.model)
        with ExitStack() as stack:
            self._predict(stack, step)
            stack.enter_context(_poisoning_reported())
            stack.enter_context(self._memory.as_current())
            self._free(2)
            stack.callback(self._free)
            self._enter_preserved(stack, step, budget_bytes)
            stack.callback(self._memory.set_fraction, self._memory.fraction())  # before the state needs its room again
            yield lambda sizes, thorough=False, timing=None: self._run(step, sizes, budget_bytes, timing)

    def _predict(self, stack: ExitStack, step: TrainingStep) -> None:
        """Have a prediction for the search to start from. It is no more than that: where there is none, the search
        starts with one sample."""
        self.predicted = None
        if self._predictions is None:
            return
        try:
            predictor = stack.enter_context(self._predictions(step, self._conditions))
        except (NotTraceable, WorkloadNotPortable) as error:
            self.warnings.append(f"nothing was predicted, and the search began with one sample: {_first_line(error)}")
            return
        # What makes the allocator empty its cache is over budget here, so what it takes with room enough counts.
        self.predicted = lambda sizes: self._outside_bytes() + predictor.reserved_bytes(sizes)
        stack.callback(setattr, self, "predicted", None)

    def _predicted_for(self, sizes: tuple[int, ...]) -> int | None:
        try:
            return self.predicted(sizes) if self.predicted is not None else None
        except NotTraceable:  # at this size; the trial itself may well run
            return None

    def _enter_preserved(self, stack: ExitStack, step: TrainingStep, budget_bytes: int) -> None:
        diagnosis, outside = None, sys.exc_info()[1]
        try:
            stack.enter_context(preserved(step, device=self._memory.device))
        except (RuntimeError, MemoryError) as error:
            diagnosis = classify(error, outside=outside)
            if diagnosis is None or not diagnosis.is_memory:
                raise
        if diagnosis is not None:
            self._free(2)
            held = [*step.model.parameters(), *step.model.buffers()]
            needed = self._outside_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in held)
            raise NothingFits(
                f"nothing fits: with the model alone this process takes {format_bytes(needed)} of {self.info.name}, "
                f"and may take {format_bytes(self.limit_bytes)} ({diagnosis.message}). Try a smaller model, or one "
                "with its parameters in bfloat16.",
                needed_bytes=needed,
                budget_bytes=budget_bytes,
            )

    def _run(self, step: TrainingStep, sizes: tuple[int, ...], budget_bytes: int, timing: Timing | None) -> Trial:
        started = time.perf_counter()
        predicted = self._predicted_for(sizes)
        progress = _Progress(self._memory, sizes, partial(gradient_bytes, step.model))
        self._free()
        self._cap_allocator()
        self._memory.reset_peaks()
        retries_before = self._memory.retries()
        with preserved(step, tensors=False):  # each trial begins with the same optimizer state and random numbers
            diagnosis = self._attempt(step, sizes, progress, timing)
        if diagnosis is not None:
            self._free(2)
            self._memory.synchronize()  # a failed kernel may have passed for a lack of memory
            return Trial(
                micro_batch_sizes=sizes,
                verdict=Verdict.OUT_OF_MEMORY,
                requested_bytes=diagnosis.requested_bytes,
                predicted_bytes=predicted,
                samples=progress.samples,
                seconds=time.perf_counter() - started,
                detail=f"{diagnosis.message} (in {progress.where})",
            )
        outside = self._outside_bytes()
        peak = outside + self._memory.peak_reserved()
        retries = self._memory.retries() - retries_before
        detail = "the loss is not a number" if progress.loss != progress.loss else ""
        if retries:
            detail = f"the allocator had to empty its cache {retries} times to get memory: it would run, but slowly"
        return Trial(
            micro_batch_sizes=sizes,
            verdict=Verdict.OVER_BUDGET if retries or peak > budget_bytes else Verdict.FITS,
            peak_bytes=peak,
            rest_bytes=outside + progress.rest_allocated,
            turn_bytes=outside + progress.turn_allocated,
            peak_allocated_bytes=self._memory.peak_allocated(),
            peak_reserved_bytes=self._memory.peak_reserved(),
            predicted_bytes=predicted,
            samples=progress.samples,
            seconds=time.perf_counter() - started,
            step_seconds=progress.step_seconds,
            repeated_seconds=progress.repeated_seconds,
            detail=detail,
        )

    def _attempt(
        self, step: TrainingStep, sizes: tuple[int, ...], progress: _Progress, timing: Timing | None
    ) -> Diagnosis | None:
        """Run the trial's steps, and say why memory ran out, if it did. Nothing of a failed step outlives this call."""
        outside = sys.exc_info()[1]
        try:
            with torch.inference_mode(False), torch.enable_grad():
                if timing is not None:
                    self._time(step, sizes, progress, timing)
                    return None
                runner = StepRunner(step, self._memory.device)
                progress.step = "the warm-up step"
                runner.run((max(sizes),), progress)
                self._memory.synchronize()
                self._cap_allocator()  # kernels and libraries that were loaded take their room from the same limit
                progress.step = "the measured step"
                started = time.perf_counter()
                progress.loss = runner.run(sizes, progress)
                self._memory.synchronize()
                progress.step_seconds = time.perf_counter() - started
                return None
        except Exception as error:
            diagnosis = classify(error, outside=outside)
            if diagnosis is None:
                add_note(error, f"autobatch: raised in {progress.where}, with micro-batches of {max(sizes)} samples.")
                raise
            if diagnosis.failure is Failure.POISONED:
                raise _poisoned(
                    diagnosis, f" in {progress.where}, with micro-batches of {max(sizes)} samples"
                ) from error
            for link in chain(error, outside):  # whoever else holds the error holds no tensors by it
                traceback.clear_frames(link.__traceback__)
            return diagnosis

    def _time(self, step: TrainingStep, sizes: tuple[int, ...], progress: _Progress, timing: Timing) -> None:
        # Each size's batch is made once: the GPU would wait for the others.
        runner = StepRunner(replace(step, make_batch=lru_cache(step.make_batch)), self._memory.device)
        enter = partial(setattr, progress, "phase")

        def run_step() -> float:
            seconds = self._memory.seconds_of(lambda: losses.append(runner.run_unread(sizes, enter)))
            progress.samples += sum(sizes)
            return seconds

        losses: list[torch.Tensor] = []
        progress.step = "the warm-up step"
        runner.run(sizes[:WARM_UP], enter)
        self._memory.synchronize()
        self._cap_allocator()
        progress.step = "a timed step"
        progress.repeated_seconds = timed(run_step, timing)
        progress.step_seconds = statistics.median(progress.repeated_seconds)
        progress.loss = float(losses[-1])

    def _cap_allocator(self) -> None:
        """Let the allocator reserve what the limit leaves beside the context, as a smaller card would."""
        if self._limited:
            room = (self.limit_bytes - self._outside_bytes()) / self.info.total_bytes
            self._memory.set_fraction(min(max(room, 0.0), 1.0))

    def _free(self, generation: int = 1) -> None:
        """Give back what nothing holds. A step that succeeded leaves young cycles at most; a failed one, any (2)."""
        gc.collect(generation)
        self._memory.release_cache()

    def _reading(self) -> GpuReading:
        return self._ask_driver(self._uuid, self._bus)

    def _outside_bytes(self) -> int:
        """Bytes this process holds on the device outside torch's allocator: its context, kernels, libraries' own."""
        free, total = self._memory.free_and_total()
        others = self._others_bytes(self._reading()) or 0
        return max(total - free - others - self._memory.reserved(), 0)

    def _others_bytes(self, reading: GpuReading) -> int | None:
        """Bytes in use on the device that are not this process', or None where nothing tells them apart."""
        free, total = self._memory.free_and_total()
        own = _own_bytes(reading)
        if own is not None and own >= self._memory.reserved():  # else it is another's number, in another namespace
            return max(total - free - own, 0)
        if self._before_us is None:
            return None
        return min(self._before_us, total - free - self._memory.reserved())


@dataclass
class _Progress:
    """Follows a trial through its phases; a `StepRunner` calls it as each begins.

    The warm-up step is one micro-batch of the largest size; the measured step has all sizes in their order.
    """

    memory: CudaMemory
    sizes: tuple[int, ...]
    gradient_bytes: Callable[[], int]
    step: str = "the start"
    phase: str = ""
    samples: int = 0
    rest_allocated: int = 0
    """Bytes in live tensors without a batch, with the gradients there were before the latest one."""
    turn_allocated: int = 0
    """Bytes in live tensors at the latest turn from forward to backward."""
    step_seconds: float | None = None
    repeated_seconds: tuple[float, ...] = ()
    loss: float = 0.0
    _micro_batch: int = 0
    _at_rest: int | None = None
    """Bytes in live tensors as the step began."""

    def __call__(self, phase: str) -> None:
        self.phase = phase
        if phase == "batch":
            if self._at_rest is None:
                self._at_rest = self.memory.allocated()
            # Not what is allocated now: that has the earlier micro-batch's inputs in it, which grow with its size.
            self.rest_allocated = self._at_rest + self.gradient_bytes()
        elif phase == "optimizer":
            self._at_rest = None
        elif phase == "forward":
            warming = self.step == "the warm-up step"
            self.samples += max(self.sizes) if warming else self.sizes[self._micro_batch]
            self._micro_batch += not warming
        elif phase == "backward":
            self.turn_allocated = self.memory.allocated()

    @property
    def where(self) -> str:
        return f"the {self.phase} phase of {self.step}" if self.phase else self.step


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _held_bytes(reading: GpuReading, total: int) -> int | None:
    """Bytes that processes hold, out of torch's `total`, which leaves out what the driver keeps for itself."""
    if reading.used_bytes is None or reading.total_bytes is None:
        return None
    if reading.reserved_bytes is not None:
        return reading.used_bytes
    return max(reading.used_bytes - max(reading.total_bytes - total, 0), 0)


def _own_bytes(reading: GpuReading) -> int | None:
    return next((p.used_bytes for p in reading.processes or () if p.pid == os.getpid()), None)


def _neighbours(reading: GpuReading, fresh: bool) -> list[GpuProcess]:
    """The other processes on the GPU, where this one can be told from them: in a container its number may differ."""
    processes = reading.processes or ()
    others = [process for process in processes if process.pid != os.getpid()]
    return others if fresh or len(others) < len(processes) else []


def _warnings(
    reading: GpuReading, neighbours: list[GpuProcess], others_bytes: int | None, limited: bool
) -> Iterator[str]:
    yield from reading.warnings
    if others_bytes is None and limited:
        yield (
            "what other processes hold on this GPU cannot be told from this process' own: all that is in use outside "
            "torch's allocator counts against the memory limit."
        )
    if neighbours:
        known = [process.used_bytes for process in neighbours if process.used_bytes is not None]
        held = sum(known) if len(known) == len(neighbours) else others_bytes
        amount = "an unknown part" if held is None else format_bytes(held)
        who = "1 other process holds" if len(neighbours) == 1 else f"{len(neighbours)} other processes hold"
        yield f"{who} {amount} of this GPU's memory. The plan leaves that to them, and no more than that."
    elif others_bytes is not None and others_bytes > MUCH_IN_USE:
        yield f"{format_bytes(others_bytes)} of this GPU's memory is in use outside this process, and left out."
    if reading.mig:
        yield "this is a slice of a partitioned GPU (MIG): the plan is for slices of this size."
    if sys.platform == "win32" or "microsoft" in platform.release().lower():
        yield (
            "on Windows and WSL the driver may use the host's memory instead of running out: a size can seem to fit "
            "and be very slow. Turn off the sysmem fallback in the NVIDIA control panel, or pass a memory_limit."
        )


def _poisoned(diagnosis: Diagnosis, where: str) -> DevicePoisoned:
    return DevicePoisoned(
        f"a kernel failed{where}, and no CUDA call can succeed in this process any more: {diagnosis.message}. This is "
        "not a lack of memory: look for an index out of range (labels, token ids); CUDA_LAUNCH_BLOCKING=1 shows where. "
        "Start a new process; what was on the GPU is lost."
    )


@contextmanager
def _poisoning_reported() -> Iterator[None]:
    """Say what it means when not even the restoring of state works any more."""
    outside = sys.exc_info()[1]
    try:
        yield
    except RuntimeError as error:
        diagnosis = classify(error, outside=outside)
        if diagnosis is None or diagnosis.is_memory:
            raise
        said = next((link for link in chain(error, outside) if isinstance(link, DevicePoisoned)), None)
        if said is not None:
            raise said  # noqa: B904  # it has its own cause
        raise _poisoned(diagnosis, "") from error
