"""A device that is open, and a training step that is ready to run on it: what `fit` and `tune` both begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

from torch import nn

from autobatch import ranks
from autobatch.devices import get_device
from autobatch.devices.base import Device
from autobatch.errors import InvalidInput, NotTraceable
from autobatch.prediction.prior import line_near
from autobatch.probing import Attempts, Question
from autobatch.progress import OnProgress, SearchStarted
from autobatch.units import parse_bytes
from autobatch.workload import Workload, resolve
from autobatch.workload.state import preserved
from autobatch.workload.step import TrainingStep


@dataclass(frozen=True)
class Session:
    """One question about one training step on one device."""

    spot: Device
    step: TrainingStep
    question: Question
    progress: OnProgress
    unlimited: Callable[[], Device] | None
    """The same device without the caller's memory limit, where there is one."""

    @property
    def budget_bytes(self) -> int:
        """What a step may take."""
        headroom = max(self.question.headroom, self.spot.least_headroom)
        return int(self.spot.limit_bytes * (1 - headroom)) - self.step.reserve_bytes

    @contextmanager
    def trials(self, step: TrainingStep | None = None) -> Iterator[Attempts]:
        """Get ready to run trials.

        Args:
            step: the step in another configuration; None for the step itself.
        """
        step, spot, budget = step or self.step, self.spot, self.budget_bytes
        with spot.trials(step, budget) as run:
            attempt = Attempts(
                run,
                budget,
                self.progress,
                spot.settled_bytes - step.reserve_bytes,
                spot.jump_bytes,
                exact=self.question.exact or spot.trials_are_cheap,
                prior=_prior(spot, step, budget),
            )
            attempt.progress(SearchStarted(spot.info, budget, spot.limit_bytes, self.question.cap))
            yield attempt


@contextmanager
def opened(
    workload: Workload,
    question: Question,
    device: object,
    memory_limit: int | str | None,
    progress: OnProgress | None,
) -> Iterator[Session]:
    """Find the device and work out the step. Nothing of the caller's has changed afterwards.

    Raises:
        InvalidInput: an argument cannot be used, or the inputs of a bare model cannot be inferred.
        DeviceUnavailable: the device is not there.
    """
    if progress is not None and not callable(progress):
        raise InvalidInput(f"progress must be callable with one event, but is {progress!r}.")
    place = _device_of(workload.model) if device is None else device
    with (
        ExitStack() as stack,
        preserved(workload, tensors=False),
        ranks.failing_together(question.together),  # also where this one's device is not there
    ):
        spot = get_device(place, None if memory_limit is None else parse_bytes(memory_limit))
        stack.enter_context(closing(spot))
        spot.prepare()
        _same_on_all(question)
        yield Session(
            spot,
            resolve(workload),
            question,
            progress or (lambda event: None),
            None if memory_limit is None else lambda: get_device(place),
        )


def _same_on_all(question: Question) -> None:
    """Check that all ranks ask for the same thing.

    Raises:
        InvalidInput: they do not.
    """
    asked = question.gather((question.target, question.per_rank))
    if len(set(asked)) > 1:
        told = ", ".join(f"{target} on rank {rank}" for rank, (target, _) in enumerate(asked))
        raise InvalidInput(
            f"the ranks of a group share one target, but ask for different ones: {told}. Call fit with the same target "
            "and the same per_rank on all."
        )


def _device_of(model: nn.Module) -> object:
    """The GPU that the model is on already, or None: the choice is open."""
    on = next((tensor.device for tensor in model.parameters()), None)
    return on if on is not None and on.type == "cuda" else None


def _prior(spot: Device, step: TrainingStep, budget_bytes: int) -> Callable[[int], float] | None:
    predicted = spot.predicted
    if predicted is None:
        return None
    try:
        return line_near(lambda n: predicted((n, n)), budget_bytes, step.min_micro_batch)
    except NotTraceable:
        if spot.info.type == "simulated":
            raise
        return None  # a first guess is all that it would be
