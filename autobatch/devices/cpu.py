"""This machine's CPU memory: trials in a child process under a real limit, so that running out is a real failure."""

from __future__ import annotations

import json
import math
import pickle
import platform
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from autobatch.devices import oom, ship, system_memory
from autobatch.devices.base import RunTrial
from autobatch.devices.oom import Diagnosis, Failure
from autobatch.devices.trial_server import Loaded, Outcome, Request, Settings
from autobatch.errors import DeviceUnavailable, TrialCrashed, WorkloadNotPortable
from autobatch.plan import DeviceInfo, Trial, Verdict
from autobatch.units import format_bytes
from autobatch.workload.step import TrainingStep

HEAP_NOISE = 0.03
"""The same steps in two fresh processes peak some per cent apart: how glibc's heap fragments depends on addresses and
on the timing of threads. This share of the limit always stays free, and takes in the growth over many steps."""
EDGE = 0.9
"""Where no more than that is left free, a peak above this share of the limit is looked at harder: run until it no
longer grows, and from several heaps."""
HEAPS = 3
"""How many differently disturbed heaps a size at the edge has to survive."""


class CpuDevice:
    """The CPU and its memory.

    Args:
        memory_limit: bytes that the training process may hold in all, interpreter and libraries included, as a
        container
            would limit it; None for what is really there now.

    Raises:
        DeviceUnavailable: this is not Linux, whose RLIMIT_DATA the trials run under.
    """

    least_headroom = HEAP_NOISE

    def __init__(self, memory_limit: int | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise DeviceUnavailable(
                f"trials on CPU memory need Linux, which can limit a process's memory; this is {platform.system()}. "
                'Use device="cuda", or run in a Linux container.'
            )
        available = system_memory.available_bytes()
        self.limit_bytes = available if memory_limit is None else memory_limit
        self.warnings: list[str] = []
        if self.limit_bytes > available:
            self.warnings.append(
                f"memory_limit is {format_bytes(self.limit_bytes)}, but only {format_bytes(available)} is available "
                "here now: a trial may be killed before it reaches the limit."
            )
        self.info = DeviceInfo(
            type="cpu", name=_processor_name(), total_bytes=system_memory.total_bytes(), free_bytes=available
        )
        self._server: _Server | None = None

    def prepare(self) -> None:
        """Start the child process now, so that it imports torch while the caller does something else."""
        if self._server is None:
            self._server = _Server()

    def close(self) -> None:
        """End the child process, if there is one."""
        if self._server is not None:
            self._server.close()
            self._server = None

    @contextmanager
    def trials(self, step: TrainingStep, budget_bytes: int) -> Iterator[RunTrial]:
        """See `Device.trials`. The step is sent to the child process, so nothing of the caller's is touched."""
        self.prepare()
        assert self._server is not None
        try:
            self._server.load(step)
            yield lambda sizes: self._run(step, sizes, budget_bytes)
        finally:
            self.close()

    def _run(self, step: TrainingStep, sizes: tuple[int, ...], budget_bytes: int) -> Trial:
        at_the_edge = budget_bytes >= int(self.limit_bytes * (1 - self.least_headroom))
        edge = int(self.limit_bytes * EDGE) if at_the_edge else self.limit_bytes
        worst = self._try(step, Request(sizes, self.limit_bytes, edge), budget_bytes)
        for heap in range(1, HEAPS):
            if not worst.fits or (worst.peak_bytes or 0) <= edge:
                break
            trial = self._try(step, Request(sizes, self.limit_bytes, edge, heap), budget_bytes)
            worst = _worse(worst, trial)
        return worst

    def _try(self, step: TrainingStep, request: Request, budget_bytes: int) -> Trial:
        kills = system_memory.oom_kills()
        outcome = self._ask(step, request)
        if outcome.signal == signal.SIGKILL and kills is not None and system_memory.oom_kills() == kills:
            # Somebody's kill, not the kernel's for memory. It says nothing about this size, so it is tried once more.
            outcome = self._ask(step, request)
        if outcome.error_text and outcome.memory is None:
            _raise_user_error(outcome, request.sizes)
        return _judge(outcome, request.sizes, budget_bytes, self.limit_bytes)

    def _ask(self, step: TrainingStep, request: Request) -> Outcome:
        assert self._server is not None
        try:
            return self._server.ask(request)
        except (EOFError, ConnectionError, pickle.UnpicklingError):
            # The server itself died. A new one takes over; what killed it decides the trial.
            status = self._server.close()
            self._server = _Server()
            self._server.load(step)
            return Outcome(signal=-status if status < 0 else None, exit_status=status if status >= 0 else None)


class _Server:
    """The child process that runs trials; see `trial_server`."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {json.dumps(sys.path)}\n"
            f"from autobatch.devices.trial_server import main; main({theirs.fileno()})"
        )
        # In a session of its own, so that Ctrl-C reaches only the caller, which then ends the child.
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._socket = ours
        self._reader, self._writer = ours.makefile("rb"), ours.makefile("wb")

    def load(self, step: TrainingStep) -> None:
        """Send the workload.

        Raises:
            WorkloadNotPortable: it cannot be pickled, or not be rebuilt in the child.
        """
        settings = Settings(
            threads=torch.get_num_threads(),
            default_dtype=torch.get_default_dtype(),
            deterministic=torch.are_deterministic_algorithms_enabled(),
            matmul_precision=torch.get_float32_matmul_precision(),
        )
        pickle.dump(settings, self._writer)
        try:
            ship.dump(step, self._writer)
            loaded: Loaded = pickle.load(self._reader)
        except (EOFError, ConnectionError) as error:
            raise TrialCrashed(
                f"the trial process died while it loaded the workload (status {self.close()}). "
                "Check that the model's modules can be imported in a new Python process, and that there is memory for "
                "a second copy of the model."
            ) from error
        if loaded.error:
            raise WorkloadNotPortable(
                "the workload could not be rebuilt in the process that tries it. Its modules must be importable there, "
                "and importing them must not start the training again (guard it with `if __name__ == '__main__':`).\n"
                f"{loaded.error}"
            )

    def ask(self, request: Request) -> Outcome:
        """Run one trial."""
        pickle.dump(request, self._writer)
        self._writer.flush()
        outcome: Outcome = pickle.load(self._reader)
        return outcome

    def close(self) -> int:
        """End the child; a trial that is still running dies with it. Returns its status, negative for a signal."""
        self._socket.close()
        status = self._process.poll()
        if status is None:
            self._process.kill()
            status = self._process.wait()
        return status


def _judge(outcome: Outcome, sizes: tuple[int, ...], budget_bytes: int, limit_bytes: int) -> Trial:
    verdict, detail, requested = Verdict.FITS, "", None
    if outcome.peak_bytes is None:
        failure = outcome.memory or _death_by_memory(outcome, limit_bytes)
        if failure is None:
            raise _crash(outcome, sizes)
        verdict, requested = Verdict.OUT_OF_MEMORY, failure.requested_bytes
        # The allocator's own words name a line of its source; what it wanted says more.
        detail = failure.message if requested is None else f"could not allocate {format_bytes(requested)}"
        detail += f" (in {outcome.phase})" if outcome.phase else ""
    elif outcome.peak_bytes > budget_bytes:
        verdict = Verdict.OVER_BUDGET
    if outcome.loss is not None and math.isnan(outcome.loss):
        detail = "the loss is not a number"
    return Trial(
        micro_batch_sizes=sizes,
        verdict=verdict,
        peak_bytes=outcome.peak_bytes,
        turn_bytes=outcome.turn_bytes,
        requested_bytes=requested,
        samples=outcome.samples,
        seconds=outcome.seconds,
        step_seconds=outcome.step_seconds,
        detail=detail,
    )


def _worse(one: Trial, other: Trial) -> Trial:
    """The trial that took more, with the samples and the time of both."""
    worse = other if not other.fits or (other.peak_bytes or 0) > (one.peak_bytes or 0) else one
    return worse.model_copy(update={"samples": one.samples + other.samples, "seconds": one.seconds + other.seconds})


def _crash(outcome: Outcome, sizes: tuple[int, ...]) -> TrialCrashed:
    how = f"signal {signal.Signals(outcome.signal).name}" if outcome.signal else f"exit status {outcome.exit_status}"
    return TrialCrashed(
        f"a training step with micro-batches of {max(sizes)} samples ended its process with {how}. This is not a lack "
        f"of memory; look for it in the model's own code or its libraries.\n{outcome.output}".rstrip()
    )


def _death_by_memory(outcome: Outcome, limit_bytes: int) -> Diagnosis | None:
    """Whether a process that died without an answer died for memory.

    Libraries abort, or use a null pointer, when an allocation fails under the limit: their last words tell, or else how
    close to the limit the process was.
    """
    if outcome.signal == signal.SIGKILL:
        return Diagnosis(Failure.HOST, "the process was killed, as the kernel does when memory runs out")
    last_words = oom.classify(RuntimeError(outcome.output), cpu_limited=True)
    if last_words and last_words.is_memory:
        return last_words
    for words in ("libgomp: thread creation failed", "cannot allocate memory"):  # OpenMP's threads; glibc's own data
        if words in outcome.output.lower():
            return Diagnosis(Failure.HOST, f"the process ended itself: {words}")
    if (
        outcome.signal in (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)
        and outcome.max_resident_bytes > 0.8 * limit_bytes
    ):
        return Diagnosis(Failure.HOST, f"the process died of {signal.Signals(outcome.signal).name} close to the limit")
    return None


def _raise_user_error(outcome: Outcome, sizes: tuple[int, ...]) -> None:
    """Raise what the user's code raised in the child, with the child's traceback and the size as a note."""
    where = outcome.phase or "the start"
    note = f"autobatch: raised in {where} of a trial with micro-batches of {max(sizes)} samples.\n{outcome.error_text}"
    if outcome.error is None:
        raise TrialCrashed(note)
    error: BaseException = pickle.loads(outcome.error)
    oom.add_note(error, note)
    raise error


def _processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
