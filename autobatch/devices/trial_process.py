"""The parent's end of the child process in which CPU trials run; `trial_server` is the other end."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from contextlib import suppress

import torch

from autobatch.devices import ship
from autobatch.devices.trial_server import Loaded, Outcome, Request, Settings
from autobatch.errors import TrialCrashed, WorkloadNotPortable
from autobatch.workload.step import TrainingStep


class TrialProcess:
    """The child process that serves trials, as its parent sees it."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        code = (
            f"import sys; sys.path[:] = {json.dumps([p for p in sys.path if isinstance(p, str)])}\n"
            f"from autobatch.devices.trial_server import main; main({theirs.fileno()}, {os.getpid()})"
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
            matmul_precision=_matmul_precision(),
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
        """End the child, and the trial that may still be running. Returns its status, negative for a signal."""
        status = self._process.poll()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        for stream in (self._writer, self._reader, self._socket):
            with suppress(OSError):  # what it could not be told any more
                stream.close()
        return self._process.wait() if status is None else status


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's newer fp32_precision settings were used, which this older one cannot express
        return None
