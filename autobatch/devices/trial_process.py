"""The parent's end of the child process in which CPU trials run; `trial_server` is the other end."""

from __future__ import annotations

import pickle

import torch

from autobatch.child import Child
from autobatch.devices.trial_server import Loaded, Outcome, Request, Settings
from autobatch.errors import TrialCrashed, WorkloadNotPortable
from autobatch.workload import ship
from autobatch.workload.step import TrainingStep


class TrialProcess:
    """The child process that serves trials, as its parent sees it."""

    def __init__(self) -> None:
        self._child = Child("autobatch.devices.trial_server")

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
        pickle.dump(settings, self._child.writer)
        try:
            ship.dump(step, self._child.writer)
            loaded: Loaded = pickle.load(self._child.reader)
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
        pickle.dump(request, self._child.writer)
        self._child.writer.flush()
        outcome: Outcome = pickle.load(self._child.reader)
        return outcome

    def close(self) -> int:
        """End the child, and the trial that may still be running. Returns its status, negative for a signal."""
        return self._child.close()


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's newer fp32_precision settings were used, which this older one cannot express
        return None
