"""Whose an error is: what ends a trace may be a limit of tracing, or a bug of the user's, which is raised as it is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from autobatch.errors import NotTraceable, add_note
from autobatch.workload.proof import Prover
from autobatch.workload.runner import check_loss, make_optimizer
from autobatch.workload.step import AUTOCAST_DTYPES, TrainingStep


@contextmanager
def bugs_as_they_are(step: TrainingStep) -> Iterator[None]:
    """Raise what the user's own code raises, where that is what a `NotTraceable` is about.

    The micro-batch that could not be traced runs again in this process, on fake tensors on the CPU, where nothing
    stands in for CUDA. What is raised there too, with the same type, is the user's own. It costs no memory, and the
    model may be on the meta device.

    Raises:
        NotTraceable: it runs there, or what it does there depends on values.
        Exception: the user's own.
    """
    try:
        yield
    except NotTraceable as error:
        own = _bug_behind(error, step)
        if own is None:
            raise
        raise own from None


def _bug_behind(error: NotTraceable, step: TrainingStep) -> Exception | None:
    if not error.raised:
        return None
    samples = error.samples or step.min_micro_batch
    own = _raised_by(step, samples)
    if own is None or type(own).__name__ != error.raised:
        return None
    size = f"with a micro-batch of {samples} samples"
    add_note(own, f"autobatch: raised {size} while the step was traced, and on the CPU too: it is not about the GPU.")
    return own


def _raised_by(step: TrainingStep, samples: int) -> Exception | None:
    """What one forward and backward pass raises on the CPU, or what making the optimizer does."""

    def run(shadow: nn.Module, batch: Any) -> None:
        make_optimizer(replace(step, model=shadow))
        device, dtype = next(shadow.parameters()).device.type, AUTOCAST_DTYPES.get(step.precision)
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = step.compute_loss(shadow, batch)
        check_loss(loss).backward()

    try:
        batch = step.make_batch(samples)
    except Exception as error:  # noqa: BLE001  # the user's own function may raise anything: it is handed on
        return error
    proof = Prover(getattr(step.model, "_orig_mod", step.model)).run(run, batch)
    return proof.error if isinstance(proof.error, Exception) and not proof.undecided else None
