"""A workload's trace, made in a process of its own, without memory for its parameters."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass

import torch

from autobatch.child import Child, die_with, pipe_from
from autobatch.errors import WorkloadNotPortable
from autobatch.prediction.trace import AffineTrace, Trace
from autobatch.workload import ship
from autobatch.workload.runner import make_optimizer
from autobatch.workload.step import TrainingStep

SIZES = (2, 3, 5)
"""Micro-batches that are traced: two for the line, and one to check it. None of one sample, which code may squeeze."""


@dataclass(frozen=True)
class Answer:
    """What the process has to say."""

    traces: dict[int, Trace] | None = None
    error: str = ""
    """The traceback of what went wrong, or ""."""


def trace(step: TrainingStep) -> AffineTrace:
    """The storages of two optimizer steps of two micro-batches each, for any micro-batch size.

    The step is sent without the bytes of its parameters, buffers and optimizer state, and nothing of the caller's
    process is changed.

    Raises:
        WorkloadNotPortable: the step cannot be sent, or not be traced; the message has the traceback.
        NotAffine: its storages do not grow evenly with the batch.
    """
    child = Child(__name__)
    try:
        pickle.dump(torch.get_default_dtype(), child.writer)
        ship.dump(step, child.writer, without=_weights(step))
        answer: Answer = pickle.load(child.reader)
    except (EOFError, ConnectionError) as error:
        raise WorkloadNotPortable(
            f"the process that traces the workload died (status {child.close()}). Check that the model's modules can "
            "be imported in a new Python process."
        ) from error
    finally:
        child.close()
    if answer.traces is None:
        raise WorkloadNotPortable(f"the workload cannot be traced without its GPU.\n{answer.error}")
    return AffineTrace.through(answer.traces)


def main(descriptor: int, parent: int) -> None:
    """The process itself."""
    die_with(parent)
    reader, writer = pipe_from(descriptor)
    torch.set_default_dtype(pickle.load(reader))
    try:
        answer = Answer(_traces(ship.load(reader)))
    except BaseException:  # noqa: BLE001  # whatever the user's code raises is told to the caller
        answer = Answer(error=traceback.format_exc())
    pickle.dump(answer, writer)
    writer.flush()


def _traces(step: TrainingStep) -> dict[int, Trace]:
    from autobatch.prediction import stand_in  # makes a device that cannot be unmade: only here
    from autobatch.prediction.tracer import trace_step

    mode = stand_in.make()
    return {n: trace_step(step, (n, n), mode) for n in SIZES}


def _weights(step: TrainingStep) -> set[int]:
    """The storages whose shapes are enough."""
    tensors = [*step.model.parameters(), *step.model.buffers()]
    if isinstance(step.optimizer, torch.optim.Optimizer):
        states = make_optimizer(step).state.values()
        tensors += [v for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.ndim > 0]
    tensors += [p.grad for p in step.model.parameters() if p.grad is not None]
    return {tensor.untyped_storage()._cdata for tensor in tensors}
