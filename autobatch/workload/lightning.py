"""LightningModules: their own training step and optimizer. Lightning itself is never imported."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from autobatch.errors import InputsNotInferred, InvalidInput


def is_lightning(model: nn.Module) -> bool:
    """Whether this is a LightningModule with a training step."""
    ours = any(
        cls.__name__ == "LightningModule" and cls.__module__.split(".")[0] in ("lightning", "pytorch_lightning")
        for cls in type(model).__mro__
    )
    return ours and callable(getattr(model, "training_step", None))


class LightningStep:
    """The loss that `training_step` of a LightningModule returns."""

    def __call__(self, model: Any, batch: Any) -> Tensor:
        takes_index = len(inspect.signature(model.training_step).parameters) > 1
        result = model.training_step(batch, 0) if takes_index else model.training_step(batch)
        loss = result.get("loss") if isinstance(result, Mapping) else result
        if not isinstance(loss, Tensor):
            raise InvalidInput(
                f"{type(model).__name__}.training_step returned {type(result).__name__} instead of a loss."
            )
        return loss


def lightning_step(model: Any) -> LightningStep:
    """The training step of a LightningModule as a loss.

    Raises:
        InputsNotInferred: the module optimizes manually, so that its `training_step` steps optimizers of a Trainer.
    """
    if not model.automatic_optimization:
        raise InputsNotInferred(
            f"{type(model).__name__} uses manual optimization (automatic_optimization=False): its training_step needs "
            "a Trainer and steps optimizers itself. Pass training_step=callable(model, batch) that returns the loss."
        )
    return LightningStep()


@dataclass(frozen=True)
class ConfiguredOptimizer:
    """Makes the optimizer that `configure_optimizers` describes."""

    module: Any

    def __call__(self, params: Iterable[nn.Parameter]) -> Optimizer:
        return configured(self.module)


def configured(module: Any) -> Optimizer:
    """The one optimizer of a LightningModule.

    Raises:
        InvalidInput: `configure_optimizers` describes none, or several.
    """
    answer = module.configure_optimizers()
    if isinstance(answer, (tuple, list)) and len(answer) == 2 and isinstance(answer[0], list):
        answer = answer[0]  # ([optimizers], [schedulers])
    found = [
        one["optimizer"] if isinstance(one, Mapping) else one
        for one in (answer if isinstance(answer, (tuple, list)) else [answer])
    ]
    if len(found) != 1 or not isinstance(found[0], Optimizer):
        raise InvalidInput(f"configure_optimizers returned {len(found)} optimizers; one is needed.")
    return found[0]
