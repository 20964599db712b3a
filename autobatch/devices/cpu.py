"""This machine's CPU memory: trials in a child process under a real limit, so that running out is a real failure."""

from __future__ import annotations

import pickle
import platform
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from autobatch.devices import system_memory
from autobatch.devices.base import RunTrial
from autobatch.devices.judging import judge, worse
from autobatch.devices.timing import Timing
from autobatch.devices.trial_process import TrialProcess
from autobatch.devices.trial_server import Outcome, Request, Settling
from autobatch.errors import DeviceUnavailable
from autobatch.trial import DeviceInfo, Trial
from autobatch.units import format_bytes
from autobatch.workload import ship
from autobatch.workload.step import TrainingStep, require_values

HEAP_NOISE = 0.03
"""Two fresh processes that run the same steps peak some per cent apart: how glibc's heap fragments depends on addresses
and on the timing of threads. This share of the limit always stays free."""
JUMPS = 0.08
MOST_JUMP_BYTES = 8 * (32 << 20)
"""Sizes next to each other peak up to this share of the limit apart, on one heap too; but only blocks of up to 32 MiB
are there (glibc's `DEFAULT_MMAP_THRESHOLD_MAX`), so that it is no more than some of them."""
GROWTH = 1 / 6
"""How much a peak has been seen to grow over the first steps, as a heap of large blocks fragments. A thorough trial
that could so grow beyond the limit is run until it stands still."""
CAREFUL = Settling(passes=2, quiet=1)
"""How long a thorough trial goes on."""
AT_THE_EDGE = Settling(passes=6, quiet=3)
"""The same where no more than `HEAP_NOISE` is left free, so that nothing makes up for what comes later."""
HEAPS = 2
"""How many differently disturbed heaps a size has to survive there."""


class CpuDevice:
    """The CPU and its memory.

    Args:
        memory_limit: bytes that the training process may hold in all, interpreter and libraries included, as a
            container would limit it; None for what is really there now.

    Raises:
        DeviceUnavailable: this is not Linux, whose RLIMIT_DATA the trials run under.
    """

    least_headroom = HEAP_NOISE
    assumptions = ()
    trials_are_cheap = False
    predicted = None
    context_bytes = None

    def __init__(self, memory_limit: int | None = None) -> None:
        if not sys.platform.startswith("linux"):
            raise DeviceUnavailable(
                f"trials on CPU memory need Linux, which can limit a process's memory; this is {platform.system()}. "
                'Use device="cuda", or run in a Linux container.'
            )
        available = system_memory.available_bytes()
        self.limit_bytes = available if memory_limit is None else memory_limit
        self.settled_bytes = int(self.limit_bytes / (1 + GROWTH))
        self.jump_bytes = min(int(self.limit_bytes * JUMPS), MOST_JUMP_BYTES)
        self.warnings: list[str] = []
        if self.limit_bytes > available:
            self.warnings.append(
                f"memory_limit is {format_bytes(self.limit_bytes)}, but only {format_bytes(available)} is available "
                "here now: a trial may be killed before it reaches the limit."
            )
        self.info = DeviceInfo(
            type="cpu", name=_processor_name(), total_bytes=system_memory.total_bytes(), free_bytes=available
        )
        self._server: TrialProcess | None = None

    def prepare(self) -> None:
        """Start the child process now, so that it imports torch while the caller does something else."""
        if self._server is None:
            self._server = TrialProcess()

    def close(self) -> None:
        """End the child process, if there is one."""
        if self._server is not None:
            self._server.close()
            self._server = None

    @contextmanager
    def trials(self, step: TrainingStep, budget_bytes: int) -> Iterator[RunTrial]:
        """See `Device.trials`. The step is sent to the child process, so nothing of the caller's is touched."""
        require_values(step.model)
        if left_behind := ship.hooks_left_behind(step.model):
            self.warnings.append(left_behind)
        self.prepare()
        assert self._server is not None
        try:
            self._server.load(step)
            yield lambda sizes, thorough=False, timing=None: self._run(step, sizes, budget_bytes, thorough, timing)
        finally:
            self.close()

    def _run(
        self, step: TrainingStep, sizes: tuple[int, ...], budget_bytes: int, thorough: bool, timing: Timing | None
    ) -> Trial:
        at_the_edge = budget_bytes >= int(self.limit_bytes * (1 - self.least_headroom)) - step.reserve_bytes
        settling = (AT_THE_EDGE if at_the_edge else CAREFUL) if thorough else None
        request = Request(sizes, self.limit_bytes, self.settled_bytes - step.reserve_bytes, budget_bytes, settling)
        if timing is not None:
            return self._try(step, replace(request, timing=timing), budget_bytes)
        worst = self._try(step, request, budget_bytes)
        for heap in range(1, HEAPS if thorough and at_the_edge else 1):
            if not worst.fits or (worst.peak_bytes or 0) <= request.settle_above_bytes:
                break
            worst = worse(worst, self._try(step, replace(request, heap=heap), budget_bytes))
        return worst

    def _try(self, step: TrainingStep, request: Request, budget_bytes: int) -> Trial:
        kills = system_memory.oom_kills()
        outcome = self._ask(step, request)
        if outcome.signal == signal.SIGKILL and kills is not None and system_memory.oom_kills() == kills:
            # Somebody's kill, not the kernel's for memory. It says nothing about this size, so it is tried once more.
            outcome = self._ask(step, request)
        return judge(outcome, request.sizes, budget_bytes, self.limit_bytes)

    def _ask(self, step: TrainingStep, request: Request) -> Outcome:
        assert self._server is not None
        try:
            return self._server.ask(request)
        except (EOFError, ConnectionError, pickle.UnpicklingError):
            # The server itself died. A new one takes over; what killed it decides the trial.
            status = self._server.close()
            self._server = TrialProcess()
            self._server.load(step)
            return Outcome(signal=-status if status < 0 else None, exit_status=status if status >= 0 else None)


def _processor_name() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
