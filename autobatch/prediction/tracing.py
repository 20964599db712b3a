"""A workload's traces: made in a process of its own, without memory for its parameters, and for any micro-batch."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from autobatch import cache
from autobatch.child import Child, die_with, pipe_from
from autobatch.errors import AutobatchError, NotTraceable, WorkloadNotPortable
from autobatch.prediction.affine import FEW_SAMPLES, STEPS, Run
from autobatch.prediction.fingerprint import fingerprint, users_code
from autobatch.prediction.obstacles import explained
from autobatch.prediction.traced import Steps, TracedStep
from autobatch.prediction.values import Known
from autobatch.workload import ship
from autobatch.workload.runner import make_optimizer
from autobatch.workload.step import TrainingStep

_NOT_LOADED = (
    "the workload could not be rebuilt in the process that traces it. Its modules must be importable there, and "
    "importing them must not start the training again (guard it with `if __name__ == '__main__':`)."
)

_this_process_is_ours = False


def claim_this_process() -> None:
    """Have steps traced in this process from now on, which is quicker and changes it for good: for a command of ours,
    and for nobody's notebook."""
    from autobatch.prediction import stand_in

    global _this_process_is_ours
    _this_process_is_ours = True
    stand_in.make()


@contextmanager
def traced(step: TrainingStep, capability: tuple[int, int] = (8, 0)) -> Iterator[TracedStep]:
    """Trace a step in a process beside this one, in which nothing is changed (unless it is claimed).

    What a step that was traced before takes is known at once.

    Args:
        step: what to trace.
        capability: the compute capability of the GPU, which decides between kernels for attention.

    Raises:
        NotTraceable: the step cannot be traced.
        WorkloadNotPortable: it cannot be sent.
    """
    _refuse_sparse_gradients(step)
    weights = _weights(step)
    key = fingerprint(step, capability, weights, _switches())
    in_the_key = users_code()
    known = _known(key)
    left_out = ship.hooks_left_behind(step.model)
    if known is not None:
        known.left_out = left_out
        yield known
        return
    with ExitStack() as stack:
        enough = step.max_samples is None or step.max_samples >= max(max(sizes) for sizes in STEPS)
        few_or_more = STEPS if enough else FEW_SAMPLES
        tracer = stack.enter_context(_tracing(step, capability, weights))
        try:
            steps = TracedStep(partial(tracer.run, Known.NOTHING), few_or_more)
        except NotTraceable as error:
            if not error.needs_values:
                raise
            try:
                steps = _with_lengths(error, TracedStep(partial(tracer.run, Known.LENGTHS), few_or_more))
            except NotTraceable as other:
                if not other.needs_values:
                    raise
                stack.close()
                tracer = stack.enter_context(_tracing(step, capability, ()))
                steps = _with_values(error, TracedStep(partial(tracer.run, Known.ALL), FEW_SAMPLES))
        # What was imported only while it was traced is not in the key.
        if steps.even is not None and not steps.caveat and tracer.users_code() <= in_the_key:
            cache.save(key, pickle.dumps(steps.even, protocol=pickle.HIGHEST_PROTOCOL))
        steps.left_out = left_out
        yield steps


def _known(key: str) -> TracedStep | None:
    """What was traced before; None where it was not, or where what is kept of it is damaged."""
    content = cache.load(key)
    try:
        return None if content is None else TracedStep.of(pickle.loads(content))
    except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError):
        return None


def _refuse_sparse_gradients(step: TrainingStep) -> None:
    """torch ends the whole process where a fake tensor has a sparse gradient."""
    for name, module in step.model.named_modules():
        if getattr(module, "sparse", False) is True and isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            raise NotTraceable(
                f"the step cannot be traced without its GPU: {name or 'the model'} has sparse gradients, whose size "
                "depends on the values of its inputs. Use sparse=False, or probe on the device itself.",
                module=name,
            )


def _with_lengths(error: NotTraceable, steps: TracedStep) -> TracedStep:
    """Those of a step that looks at no other values."""
    steps.caveat = (
        f"the step looks at the lengths in its batches ({_place(error)}): it was traced with those of the data, and "
        "longer ones take more."
    )
    return steps


def _with_values(error: NotTraceable, steps: TracedStep) -> TracedStep:
    """What small real batches show of a step that looks at values, if its storages grow evenly all the same.

    Raises:
        NotTraceable: they do not.
    """
    if steps.even is None:
        raise error
    steps.caveat = (
        f"the step looks at values ({_place(error)}): it was traced with those of small made-up batches, and other "
        "values may take it another way."
    )
    return steps


def _place(error: NotTraceable) -> str:
    return f"{error.operator} in {error.module or 'the step itself'}, {error.line}"


@contextmanager
def _tracing(step: TrainingStep, capability: tuple[int, int], without: Collection[int]) -> Iterator[_Tracer]:
    """What traces, for as long as the context is open; it knows no values of the storages in `without`."""
    if _this_process_is_ours:
        yield _Tracer(tracer_of(step, capability), users_code)
        return
    child = Child(__name__)
    try:
        with _its_death_explained(child):
            pickle.dump((_switches(), capability), child.writer)
            ship.dump(step, child.writer, without)
        yield _Tracer(lambda known, steps: _ask(child, (known, steps)), lambda: _ask(child, None))
    finally:
        child.close()


@dataclass(frozen=True)
class _Tracer:
    """What traces steps, here or in a process beside this one."""

    run: Callable[[Known, Steps], Run]
    users_code: Callable[[], set[str]]
    """The user's modules that are imported there."""


def _ask(child: Child, question: tuple[Known, Steps] | None) -> Any:
    with _its_death_explained(child):
        pickle.dump(question, child.writer)
        child.writer.flush()
        answer = pickle.load(child.reader)
    if isinstance(answer, AutobatchError):
        raise answer
    return answer


@contextmanager
def _its_death_explained(child: Child) -> Iterator[None]:
    try:
        yield
    except (EOFError, ConnectionError, pickle.UnpicklingError) as error:
        raise WorkloadNotPortable(
            f"the process that traces the workload died (status {child.close(failed=True)}). Check that the model's "
            "modules can be imported in a new Python process."
        ) from error


def main(descriptor: int, parent: int) -> None:
    """The process itself."""
    from autobatch.prediction import stand_in

    die_with(parent)
    reader, writer = pipe_from(descriptor)
    switches, capability = pickle.load(reader)
    for name, value in switches.items():
        _SWITCHES[name][1](value)
    try:
        stand_in.make()  # before modules are imported whose decorators ask for autocast
        run = tracer_of(ship.load(reader), capability)
    except BaseException:  # noqa: BLE001  # the user's modules may raise anything: the caller is told
        run = partial(_refuse, WorkloadNotPortable(f"{_NOT_LOADED}\n{traceback.format_exc()}"))
    with suppress(EOFError):
        while True:
            question: tuple[Known, Steps] | None = pickle.load(reader)
            if question is None:
                pickle.dump(users_code(), writer)
                writer.flush()
                continue
            try:
                answer: Run | AutobatchError = run(*question)
            except AutobatchError as error:
                answer = error
            except Exception as error:  # noqa: BLE001  # an optimizer may refuse its arguments: the caller is told
                answer = explained(error, None)
            pickle.dump(answer, writer)
            writer.flush()


_SDP = torch.backends.cuda
_SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], object]]] = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "flash": (_SDP.flash_sdp_enabled, _SDP.enable_flash_sdp),
    "memory-efficient": (_SDP.mem_efficient_sdp_enabled, _SDP.enable_mem_efficient_sdp),
    "cudnn attention": (_SDP.cudnn_sdp_enabled, _SDP.enable_cudnn_sdp),
    "math": (_SDP.math_sdp_enabled, _SDP.enable_math_sdp),
    "cudnn": (lambda: torch.backends.cudnn.enabled, lambda on: setattr(torch.backends.cudnn, "enabled", on)),
}
"""The caller's settings that decide what runs, and how they are set."""


def _switches() -> dict[str, Any]:
    return {name: read() for name, (read, _) in _SWITCHES.items()}


def _refuse(error: AutobatchError, known: Known, steps: Steps) -> Run:
    raise error


def tracer_of(step: TrainingStep, capability: tuple[int, int] = (8, 0)) -> Callable[[Known, Steps], Run]:
    """What traces a step here. It makes a device that cannot be unmade: only for a process of our own."""
    from autobatch.prediction import attention, stand_in
    from autobatch.prediction.tracer import trace_steps

    mode = stand_in.make()
    attention.choose_for(capability)
    return lambda known, steps: trace_steps(step, steps, mode, known)


def _weights(step: TrainingStep) -> set[int]:
    """The storages whose shapes are enough."""
    tensors = [*step.model.parameters(), *step.model.buffers()]
    if isinstance(step.optimizer, torch.optim.Optimizer):
        states = make_optimizer(step).state.values()
        tensors += [v for state in states for v in state.values() if isinstance(v, torch.Tensor) and v.ndim > 0]
    tensors += [p.grad for p in step.model.parameters() if p.grad is not None]
    return {tensor.untyped_storage()._cdata for tensor in tensors}
