"""The child process in which CPU trials run: one server that loads the workload once and forks a process for each
trial.

A fork starts every trial from the same clean heap, whatever earlier ones left behind, and dies alone when memory runs
out. The server itself never runs a kernel or a backward pass, so no thread pool exists that a fork would break.

The conversation, over one socket: the parent sends settings and the workload, the server answers `Loaded`; then a
`Request` for each trial, answered with an `Outcome`.
"""

from __future__ import annotations

import os
import pickle
import random
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from autobatch.child import die_with, pipe_from
from autobatch.devices import process_memory
from autobatch.devices.timing import WARM_UP, Timing, timed

if TYPE_CHECKING:
    from autobatch.devices.oom import Diagnosis
    from autobatch.workload.runner import StepRunner
    from autobatch.workload.step import TrainingStep


@dataclass(frozen=True)
class Settings:
    """What makes the server's process like the caller's."""

    threads: int
    default_dtype: Any
    deterministic: bool
    matmul_precision: str | None


@dataclass(frozen=True)
class Loaded:
    """The workload arrived, or did not."""

    error: str | None
    """The traceback of what went wrong, or None."""


@dataclass(frozen=True)
class Settling:
    """How long a trial goes on while its peak grows."""

    passes: int
    """Micro-batches more, at most."""
    quiet: int
    """Of these without growth, after which the peak counts as settled: it may stand still on its way up."""


@dataclass(frozen=True)
class Request:
    """One trial to run."""

    sizes: tuple[int, ...]
    limit_bytes: int
    settle_above_bytes: int
    """A peak above this has to be settled: micro-batches are repeated until it no longer grows."""
    budget_bytes: int
    """A peak above this has failed, and need not settle."""
    settling: Settling | None = None
    """None: one step tells enough."""
    timing: Timing | None = None
    """The measured step is repeated and timed, and need not settle: it runs more often than that."""
    heap: int = 0
    """Which heap to start from: 0 as it is after loading, others disturbed, each in its own way."""


@dataclass(frozen=True)
class Outcome:
    """What a trial did."""

    samples: int = 0
    """What was pushed into the model, also where that failed."""
    seconds: float = 0.0
    step_seconds: float | None = None
    repeated_seconds: tuple[float, ...] = ()
    peak_bytes: int | None = None
    rest_bytes: int | None = None
    turn_bytes: int | None = None
    loss: float | None = None
    phase: str = ""
    """Where it was when it failed."""
    memory: Diagnosis | None = None
    """Which allocation failed, if that is what ended it."""
    error_text: str = ""
    """The traceback of the exception that ended it, or ""."""
    error: bytes | None = None
    """That exception, pickled, where it can be."""
    signal: int | None = None
    """The signal that killed it, or None."""
    exit_status: int | None = None
    """The status it exited with without an answer, or None."""
    output: str = ""
    """The end of what it wrote to stdout and stderr, where it died without an answer."""
    max_resident_bytes: int = 0


@dataclass
class _Progress:
    """How far a trial came, kept outside the frames of the step so that a failure can be told."""

    heap: list[bytearray]
    """What disturbs the heap, held for as long as the trial runs."""
    gradient_bytes: Callable[[], int]
    phase: str = "start"
    samples: int = 0
    rest_bytes: int | None = None
    turn_bytes: int | None = None
    most_seen: int = 0
    """The most bytes held as a phase began."""
    settling_seconds: float = 0.0
    """Spent on micro-batches that are no part of the step asked for."""
    batch_seconds: float = 0.0
    """Spent on making batches."""
    started: float = field(default_factory=time.perf_counter)
    _at_rest: int | None = None
    """Bytes in use as the step began."""

    def enter(self, phase: str) -> None:
        self.phase = phase
        self.most_seen = max(self.most_seen, process_memory.data_bytes())
        in_use = process_memory.in_use_bytes()
        if phase == "batch" and self._at_rest is None:
            self.rest_bytes = self._at_rest = in_use
        elif phase == "batch" and self._at_rest is not None:
            # Not what is held now: that has the earlier micro-batch's inputs in it, which grow with its size.
            self.rest_bytes = self._at_rest + self.gradient_bytes()
        elif phase == "backward":
            self.turn_bytes = process_memory.data_bytes() if in_use is None else in_use
        elif phase == "optimizer":
            self._at_rest = None


def main(descriptor: int, parent: int) -> None:
    """Serve trials on the socket `descriptor` until the other side, the process `parent`, closes it or ends."""
    die_with(parent)
    reader, writer = pipe_from(descriptor)
    settings: Settings = pickle.load(reader)
    step = _load(settings, reader, writer)
    if step is None:
        return
    while True:
        try:
            request: Request = pickle.load(reader)
        except EOFError:
            return
        pickle.dump(_in_a_fork(step, settings, request), writer)
        writer.flush()


def _load(settings: Settings, reader: BinaryIO, writer: BinaryIO) -> TrainingStep | None:
    import torch

    # One thread while loading: a pool of OpenMP threads made now would be missing in every fork.
    torch.set_num_threads(1)
    torch.set_default_dtype(settings.default_dtype)
    torch.use_deterministic_algorithms(settings.deterministic, warn_only=True)
    if settings.matmul_precision:
        torch.set_float32_matmul_precision(settings.matmul_precision)
    from autobatch.devices import oom  # noqa: F401  # imported here, so that no trial pays for it
    from autobatch.workload import runner, ship  # noqa: F401

    try:
        step: TrainingStep = ship.load(reader)
    except BaseException:  # noqa: BLE001  # whatever the user's modules raise while they are imported is told to the caller
        pickle.dump(Loaded(traceback.format_exc()), writer)
        writer.flush()
        return None
    process_memory.trim()
    process_memory.age_heap()
    pickle.dump(Loaded(None), writer)
    writer.flush()
    return step


def _in_a_fork(step: TrainingStep, settings: Settings, request: Request) -> Outcome:
    """Run one trial in a fork of this process and wait for it."""
    output = os.memfd_create("trial-output")
    read_end, write_end = os.pipe()
    sys.stdout.flush(), sys.stderr.flush()
    server = os.getpid()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read_end)
            os.dup2(output, 1), os.dup2(output, 2)
            die_with(server)
            process_memory.be_killed_first()
            with open(write_end, "wb") as answer:
                pickle.dump(_trial(step, settings, request), answer)
            status = 0
        finally:
            os._exit(status)
    os.close(write_end)
    with open(read_end, "rb") as stream:
        answer_bytes = stream.read()
    _, wait_status, usage = os.wait4(pid, 0)
    with open(output, "rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - 4000))
        text = stream.read().decode(errors="replace")
    if os.WIFSIGNALED(wait_status) or not answer_bytes:
        return Outcome(
            signal=os.WTERMSIG(wait_status) if os.WIFSIGNALED(wait_status) else None,
            exit_status=os.WEXITSTATUS(wait_status) if os.WIFEXITED(wait_status) else None,
            output=text,
            max_resident_bytes=usage.ru_maxrss * 1024,
        )
    outcome: Outcome = pickle.loads(answer_bytes)
    return outcome


def _trial(step: TrainingStep, settings: Settings, request: Request) -> Outcome:
    import torch

    from autobatch.workload.runner import gradient_bytes

    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    progress = _Progress(_disturb_heap(request.heap), partial(gradient_bytes, step.model))
    try:
        process_memory.limit_data(request.limit_bytes)
        return _steps(step, request, progress)
    except BaseException as error:  # noqa: BLE001  # memory or the user's bug: the caller judges
        process_memory.lift_limit()
        return Outcome(
            samples=progress.samples,
            seconds=time.perf_counter() - progress.started,
            phase=progress.phase,
            memory=_memory_failure(error),
            error_text=_users_part(error),
            error=_pickled(error),
        )


def _disturb_heap(seed: int) -> list[bytearray]:
    """Make the heap like another process's: some two MiB of small blocks, to be held, and gaps between them.

    Forks of one process repeat each other to the byte, while fresh processes differ.
    """
    sizes = random.Random(seed).choices(range(1 << 10, 64 << 10), k=128 if seed else 0)
    return [bytearray(size) for size in sizes][::2]


def _steps(step: TrainingStep, request: Request, progress: _Progress) -> Outcome:
    from autobatch.workload.runner import StepRunner

    def make_batch(samples: int) -> Any:
        progress.samples += samples
        began = time.perf_counter()
        batch = step.make_batch(samples)
        progress.batch_seconds += time.perf_counter() - began
        return batch

    runner = StepRunner(replace(step, make_batch=make_batch))
    if request.timing is not None:
        return _timed_steps(runner, request.sizes, request.timing, progress)
    *_, largest = request.sizes
    whole = len(request.sizes) == 1

    # The warm-up makes the optimizer's lazy state. Where the whole target is one micro-batch it is of that size, so
    # that the measured step is a second pass; with two micro-batches the measured step has its second pass in itself.
    runner.run(request.sizes if whole else (step.min_micro_batch,), progress.enter)
    began = time.perf_counter()
    # Peaks grow in passes beside the gradients of an earlier one, so further ones belong into the same step.
    more = () if whole else (largest for _ in _until_settled(request, progress))
    loss = runner.run(request.sizes, progress.enter, more)
    step_seconds = time.perf_counter() - began - progress.settling_seconds
    if whole:
        for _ in _until_settled(request, progress):
            runner.run(request.sizes, progress.enter)
    return Outcome(
        samples=progress.samples,
        seconds=time.perf_counter() - progress.started,
        step_seconds=step_seconds,
        peak_bytes=process_memory.peak_data_bytes(progress.most_seen),
        rest_bytes=progress.rest_bytes,
        turn_bytes=progress.turn_bytes,
        loss=loss,
    )


def _timed_steps(runner: StepRunner, sizes: tuple[int, ...], timing: Timing, progress: _Progress) -> Outcome:
    def enter(phase: str) -> None:
        progress.phase = phase  # looking at memory takes time

    def run_step() -> float:
        began, batches = time.perf_counter(), progress.batch_seconds
        runner.run(sizes, enter)
        return time.perf_counter() - began - (progress.batch_seconds - batches)

    runner.run(sizes[:WARM_UP], progress.enter)
    seconds = timed(run_step, timing)
    return Outcome(
        samples=progress.samples,
        seconds=time.perf_counter() - progress.started,
        step_seconds=statistics.median(seconds),
        repeated_seconds=seconds,
        peak_bytes=process_memory.peak_data_bytes(progress.most_seen),
    )


def _until_settled(request: Request, progress: _Progress) -> Iterator[None]:
    """One more pass while the peak is at the edge and still growing: a heap fragments over the first passes."""
    if request.settling is None:
        return
    peak, quiet = process_memory.peak_data_bytes(progress.most_seen), 0
    for _ in range(request.settling.passes):
        tight = request.settle_above_bytes < peak <= request.budget_bytes
        if not tight or quiet == request.settling.quiet:
            return
        began = time.perf_counter()
        yield
        progress.settling_seconds += time.perf_counter() - began
        peak, before = process_memory.peak_data_bytes(progress.most_seen), peak
        quiet = quiet + 1 if peak == before else 0


def _memory_failure(error: BaseException) -> Diagnosis | None:
    from autobatch.devices import oom

    diagnosis = oom.classify(error, cpu_limited=True)
    return diagnosis if diagnosis and diagnosis.is_memory else None


def _users_part(error: BaseException) -> str:
    """The traceback without the frames of autobatch itself."""
    told = traceback.TracebackException.from_exception(error)
    package = str(Path(__file__).parents[1])
    told.stack = traceback.StackSummary.from_list([f for f in told.stack if not f.filename.startswith(package)])
    return "".join(told.format())


def _pickled(error: BaseException) -> bytes | None:
    import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(error.with_traceback(None))
        pickle.loads(data)  # exceptions with arguments of their own often pickle but do not come back
    except Exception:  # noqa: BLE001  # an exception may fail in any way here; the caller still gets its text
        return None
    return data
