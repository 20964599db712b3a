"""`estimate`: what a training step takes on a GPU that isn't here, and where every byte of it is from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from autobatch.devices.target import Target
from autobatch.estimates import Estimate
from autobatch.estimator import Estimator, Question
from autobatch.precision import Precision
from autobatch.prediction.bugs import bugs_as_they_are
from autobatch.prediction.tracing import traced
from autobatch.workload import Workload, as_workload, resolve
from autobatch.workload.state import preserved


def estimate(
    model: nn.Module | Workload,
    batch_size: int | None = None,
    *,
    device: str,
    data: Any = None,
    loss: Callable[..., Any] | None = None,
    training_step: Callable[..., Any] | None = None,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    precision: Precision = "fp32",
    memory_limit: int | str | None = None,
    headroom: float = 0.05,
    accumulation: bool = False,
) -> Estimate:
    """Predict what a training step takes on a GPU, without one: no kernel runs, and parameters take no memory.

    Args:
        model: the model, which may be on the meta device; or a `Workload`.
        batch_size: samples of the micro-batch. None: as many as fit.
        device: the GPU: "rtx-3090", "24GiB", or the path of a profile saved on it.
        data, loss, training_step, optimizer, precision: as for `autobatch.fit`.
        memory_limit: bytes, or a string such as "8GiB", that the process may take there in all.
        headroom: the share of that limit to leave free.
        accumulation: hold the gradients of an earlier micro-batch meanwhile, which is also what a step takes whose
            gradients are zeroed and kept (`zero_grad(set_to_none=False)`). Otherwise the step has one micro-batch, and
            no gradients before it, as after `zero_grad()`.

    Raises:
        InvalidInput: an argument cannot be used, or the inputs of a bare model cannot be inferred.
        NotTraceable: the step cannot be traced; the error names operator, module and line.
        WorkloadNotPortable: it cannot be sent to the process that traces it.
        Exception: what the model's own code raises, as it is, with the micro-batch size in a note.
    """
    workload = as_workload(model, data, loss, training_step, optimizer, precision)
    (found,) = estimates(workload, Question.checked(batch_size, [device], memory_limit, headroom, accumulation))
    return found


def estimates(
    workload: Workload, question: Question, keep: Callable[[int, Estimator], None] = lambda kind, estimator: None
) -> list[Estimate]:
    """The same for several GPUs, from one trace (or as many as kinds of attention kernels that they choose).

    Args:
        workload: what to train.
        question: what to find out about it.
        keep: called with each kind of attention kernels, and what answers for GPUs that choose them.

    Raises: as `estimate`.
    """
    found: dict[Target, Estimate] = {}
    with preserved(workload, tensors=False):
        step = resolve(workload)
        for kind, targets in question.kinds.items():
            with bugs_as_they_are(step), traced(step, targets[0].capability) as steps:
                estimator = Estimator.of(step, steps)
                found |= {target: estimator.answer(question, target) for target in targets}
                keep(kind, estimator)
    return [found[target] for target in question.targets]
