"""What every device can do: run whole training steps of one micro-batch size and say how it went."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from autobatch.devices.timing import Timing
from autobatch.trial import DeviceInfo, Trial
from autobatch.units import format_bytes

if TYPE_CHECKING:
    from autobatch.workload.step import TrainingStep


class RunTrial(Protocol):
    """Runs one trial."""

    def __call__(self, sizes: tuple[int, ...], thorough: bool = False, timing: Timing | None = None) -> Trial:
        """A warm-up step, then one measured optimizer step of these micro-batches.

        Args:
            sizes: `(n, n)`, so that the second forward pass happens with gradients held, or `(n,)` where the whole
                target is one micro-batch.
            thorough: near the budget, go on until the peak no longer grows, where the device's peaks do that.
            timing: run the measured step, here all of a plan's micro-batches, again and again, and say how long each
                run took (`Trial.repeated_seconds`). The time for making batches is left out.

        Raises:
            InvalidInput: a step is to be timed on a device that isn't here.
            Exception: what the user's own code raises, as it is.
        """
        ...


class Device(Protocol):
    """Where a training step runs."""

    @property
    def info(self) -> DeviceInfo: ...

    @property
    def limit_bytes(self) -> int:
        """Bytes that the training process may take there in all, before head-room."""
        ...

    @property
    def least_headroom(self) -> float:
        """The share of the limit that has to stay free for a result to hold in another process."""
        ...

    @property
    def jump_bytes(self) -> int:
        """How far the peaks of neighbouring sizes may jump: a search need not come closer to the budget."""
        ...

    @property
    def settled_bytes(self) -> int:
        """Up to this peak a trial needs no thorough look: as far as it may grow later, it stays within the limit."""
        ...

    @property
    def trials_are_cheap(self) -> bool:
        """Whether a search may as well go on until one more sample is seen not to fit."""
        ...

    @property
    def predicted(self) -> Callable[[tuple[int, ...]], int] | None:
        """While trials are open: the peak, in bytes, that a step with these micro-batches is predicted to have there;
        None where there is no prediction."""
        ...

    @property
    def assumptions(self) -> Sequence[str]:
        """What was taken for granted about this device, in sentences."""
        ...

    @property
    def context_bytes(self) -> int | None:
        """Bytes that this process takes there outside torch's allocator now, or None where there is no such thing."""
        ...

    @property
    def warnings(self) -> Sequence[str]:
        """What the user should know about the state of this device, in sentences."""
        ...

    def prepare(self) -> None:
        """Begin what takes time, such as starting a process, while the caller does something else."""
        ...

    def close(self) -> None:
        """End what `prepare` began. Nothing is left of the device afterwards."""
        ...

    def trials(self, step: TrainingStep, budget_bytes: int) -> AbstractContextManager[RunTrial]:
        """Get ready to run trials of `step`; leaving the context gives everything back as it was.

        A trial whose peak is above `budget_bytes` gets the verdict `over_budget`.
        """
        ...


def limit_too_high(asked_bytes: int, limit_bytes: int, name: str) -> str:
    """The warning that a memory limit is more than a GPU can give."""
    return (
        f"memory_limit is {format_bytes(asked_bytes)}, but a process can have no more than {format_bytes(limit_bytes)} "
        f"on {name}: that is the limit."
    )
