"""How a batch becomes the loss that training goes backward from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from autobatch.errors import InputsNotInferred, InvalidInput
from autobatch.training.reduction import Reduction, of_criterion
from autobatch.workload.data import read_data
from autobatch.workload.losses import CriterionLoss, StandInLoss
from autobatch.workload.proof import Prover
from autobatch.workload.recipes import read_batches


@dataclass(frozen=True)
class TrainingLoss:
    """A loss, and what it is by definition."""

    compute: Callable[[nn.Module, Any], Tensor]
    """The loss of a model and a micro-batch."""
    reduction: Reduction | None = None
    """None: not known."""


def training_loss(
    model: nn.Module,
    batch: Any,
    loss: Callable[..., Any] | None,
    training_step: Callable[..., Any] | None,
) -> TrainingLoss:
    """What the caller says; or else what the model itself says, proved on fake tensors.

    Args:
        model: the module itself, out of its wrappers.
        batch: one collated batch, by which the inputs and the target are told apart.

    Raises:
        InvalidInput: none is given, and the model has no loss of its own.
    """
    if training_step is not None:
        return TrainingLoss(training_step)
    model = getattr(model, "_orig_mod", model)
    say = "Pass loss=criterion(output, target), or training_step=callable(model, batch) that returns the loss."
    try:
        compute = read_batches(model, Prover(model), read_data(batch), loss).compute_loss
    except InputsNotInferred as error:
        why = str(error).splitlines()[0]
        raise InvalidInput(
            f"how {type(model).__name__} takes this batch could not be worked out ({why}). {say}"
        ) from error
    if isinstance(compute, StandInLoss):
        raise InvalidInput(f"{type(model).__name__} returns no loss of its own, and none is given. {say}")
    known = of_criterion(compute.criterion, compute.reading) if isinstance(compute, CriterionLoss) else None
    return TrainingLoss(compute, known)
