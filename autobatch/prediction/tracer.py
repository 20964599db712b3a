"""Traces the whole steps of a workload on the stand-in device. Runs in a process of its own; see `stand_in`."""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer

from autobatch.batches import map_arrays
from autobatch.errors import AutobatchError
from autobatch.prediction.affine import Run
from autobatch.prediction.obstacles import explained
from autobatch.prediction.recorder import Recorder
from autobatch.prediction.stand_in import DEVICE, Fakes, Spelled, spoken_as_cuda
from autobatch.prediction.trace import Category, Phase
from autobatch.prediction.values import Known, Values
from autobatch.workload.proof import Shadows, uncompiled
from autobatch.workload.runner import StepRunner, make_optimizer
from autobatch.workload.step import TrainingStep


def trace_steps(
    step: TrainingStep, steps: Sequence[Sequence[int]], mode: FakeTensorMode, known: Known = Known.NOTHING
) -> Run:
    """All storages of some optimizer steps, each of these micro-batches; parameters and buffers first.

    The model and the optimizer are not touched: fakes of their tensors are used.

    Args:
        step: what to trace.
        steps: optimizer steps by their micro-batches.
        mode: what makes fakes.
        known: which real values to compute beside the fakes, for a step whose course depends on them.

    Raises:
        NotTraceable: the user's code raised something, as it does where it looks at values.
    """
    step = replace(step, model=getattr(step.model, "_orig_mod", step.model))  # what torch.compile would fuse
    fakes = Fakes(mode)
    shadow = Shadows(fakes.of).of(step.model)
    optimizer = _rebound(make_optimizer(replace(step, model=shadow)), fakes)
    values = Values(mode, DEVICE, known) if known is not Known.NOTHING else None
    recorder = Recorder(shadow, values)
    _see_what_is_there(recorder, shadow, optimizer)
    _note_optimizer_state(recorder, shadow, optimizer)
    # Made on the host and with real values, as training makes them.
    batches = {}
    for n in set().union(*steps):
        with _failures_explained(recorder, n):
            batches[n] = map_arrays(partial(_on_host, mode, values), step.make_batch(n))
    if values is not None:
        for tensor in (*step.model.parameters(), *step.model.buffers()):
            if not tensor.is_meta:
                values.know_input(fakes.of(tensor), tensor.detach().clone())
    collecting = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there already need not be looked at each time
    gc.disable()  # tensors die when they are let go, not when the collector happens to run
    try:
        # One thread, so that autograd's nodes are numbered in one row.
        one_thread = torch.autograd.set_multithreading_enabled(False)
        with (
            one_thread,
            uncompiled(step.model),
            spoken_as_cuda(),
            Spelled(),
            mode,
            recorder,
            recorder.following_modules(),
        ):
            fake_step = replace(step, model=shadow, optimizer=optimizer, make_batch=batches.__getitem__)
            runner = StepRunner(fake_step, DEVICE)

            for sizes in steps:
                remaining = iter(sizes)

                def on_phase(phase: str, remaining: Iterator[int] = remaining) -> None:
                    if phase == "optimizer":
                        recorder.is_a([p.grad for p in shadow.parameters()], Category.GRADIENT)
                    recorder.enter(Phase(phase), next(remaining) if phase == "batch" else 0)

                with _failures_explained(recorder):
                    runner.run_unread(sizes, on_phase)
                _note_optimizer_state(recorder, shadow, optimizer)
                gc.collect()
        return recorder.run()
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


@contextmanager
def _failures_explained(recorder: Recorder, samples: int | None = None) -> Iterator[None]:
    try:
        yield
    except AutobatchError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the user's code raises is explained, and stays an error
        raise explained(error, recorder.failed, recorder.samples if samples is None else samples) from None


def _on_host(mode: FakeTensorMode, values: Values | None, leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    fake = mode.from_tensor(leaf, static_shapes=True)
    if values is not None:
        values.know_input(fake, leaf)
    return fake


def _see_what_is_there(recorder: Recorder, shadow: nn.Module, optimizer: Optimizer) -> None:
    for name, parameter in shadow.named_parameters():
        recorder.see(parameter, f"parameter {name}")
        recorder.is_a(parameter, Category.PARAMETER, _module_of(name))
    for name, buffer in shadow.named_buffers():
        recorder.see(buffer, f"buffer {name}")
        recorder.is_a(buffer, Category.BUFFER, _module_of(name))
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, Tensor):
                recorder.see(value, f"optimizer state {name}")


def _note_optimizer_state(recorder: Recorder, shadow: nn.Module, optimizer: Optimizer) -> None:
    names: dict[Tensor, str] = {parameter: name for name, parameter in shadow.named_parameters()}
    for parameter, state in optimizer.state.items():
        recorder.is_a(list(state.values()), Category.OPTIMIZER_STATE, _module_of(names.get(parameter, "")))


def _module_of(name: str) -> str:
    """The path of the module that a parameter or buffer of that name belongs to."""
    return name.rpartition(".")[0]


def _rebound(optimizer: Optimizer, fakes: Fakes) -> Optimizer:
    """The optimizer over fakes of its parameters, with fakes of its state."""
    rebound = type(optimizer).__new__(type(optimizer))
    rebound.__dict__.update(optimizer.__dict__)  # a copy would leave out attributes of an optimizer of the user's
    rebound.param_groups = [
        {**group, "params": [p if _is_fake(p) else fakes.of(p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    rebound.state = defaultdict(dict)
    for parameter, state in optimizer.state.items():
        rebound.state[fakes.of(parameter)] = {key: _state(value, fakes) for key, value in state.items()}
    return rebound


def _is_fake(tensor: Tensor) -> bool:
    return tensor.device.type == torch.device(DEVICE).type


def _state(value: Any, fakes: Fakes) -> Any:
    """Step counts stay on the host, as they do with CUDA."""
    return fakes.of(value) if isinstance(value, Tensor) and value.ndim > 0 else value
