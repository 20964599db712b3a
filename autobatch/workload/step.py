"""A training step, ready to run: the one description that probing, prediction, tuning and training share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import Optimizer

from autobatch.errors import InvalidInput
from autobatch.precision import Precision

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainingStep:
    """What one optimizer step runs. Made by `autobatch.workload.resolve` from a `Workload`."""

    model: nn.Module
    make_batch: Callable[[int], Any]
    """A batch of n samples, on the CPU (or wherever the caller's own function puts it)."""
    compute_loss: Callable[[nn.Module, Any], Tensor]
    """The scalar loss of one micro-batch."""
    optimizer: Optimizer | Callable[[Iterable[nn.Parameter]], Optimizer]
    """The caller's own optimizer, or what makes one from the trainable parameters."""
    precision: Precision = "fp32"
    min_micro_batch: int = 1
    """The fewest samples that the model can run on (2 where BatchNorm refuses a single one)."""
    max_samples: int | None = None
    """How many samples the data has, or None where that is not known."""
    batch_dims: Mapping[str, int | None] = field(default_factory=dict)
    """The batch dimension of every tensor in a batch by its name, None where samples share it; empty where that is not
    known."""
    reserve_bytes: int = 0
    """Bytes that training holds beside this step and no trial sees, such as DistributedDataParallel's gradient
    buckets."""
    assumptions: tuple[str, ...] = ()
    """What was inferred rather than given, in sentences."""
    warnings: tuple[str, ...] = ()
    """What the caller should know about this step, in sentences."""

    @property
    def in_bf16(self) -> bool:
        """Whether it computes in bf16, which older GPUs cannot."""
        return self.precision == "bf16" or any(p.dtype is torch.bfloat16 for p in self.model.parameters())


def require_values(model: nn.Module) -> None:
    """Check that a model can run. On the meta device it has shapes only: enough for a simulated GPU, but no other.

    Raises:
        InvalidInput: a parameter or buffer is on the meta device.
    """
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    empty = next((name for name, tensor in named if tensor.is_meta), None)
    if empty is not None:
        raise InvalidInput(
            f"{empty!r} of the {type(model).__name__} is on the meta device, where tensors have no values. "
            'Build the model on the CPU, without torch.device("meta"), or call model.to_empty(device="cpu") first. '
            'A GPU that is simulated (device="rtx-4090") needs no values.'
        )


def require_trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes.

    Raises:
        InvalidInput: there are none, or none yet.
    """
    if any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        raise InvalidInput(
            f"{type(model).__name__} has lazy layers without parameters yet: run it once on a batch first."
        )
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise InvalidInput(
            f"{type(model).__name__} has no trainable parameters, so there is no training step to fit. "
            "Pass a model with parameters whose requires_grad is True."
        )
    return parameters
