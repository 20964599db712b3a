"""How a batch becomes a loss: the caller's criterion, the model's own loss, or a stand-in that fits the outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from autobatch.batches import arrays, describe
from autobatch.errors import InvalidInput
from autobatch.workload.calls import Reading


@dataclass(frozen=True)
class CriterionLoss:
    """criterion(output, target)."""

    reading: Reading
    criterion: Callable[[Any, Any], Tensor]

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return self.criterion(self.reading.call(model, batch), self.reading.target_of(batch))


@dataclass(frozen=True)
class OwnLoss:
    """The loss that the model itself returns."""

    reading: Reading

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        output = self.reading.call(model, batch)
        loss = own_loss(output)
        if loss is None:
            raise InvalidInput(f"{type(model).__name__} returned no loss: {describe(output)}.")
        return loss


@dataclass(frozen=True)
class StandInLoss:
    """A loss of the usual kind for outputs of these shapes; its value means nothing, its memory is what it is for."""

    reading: Reading
    tokens: bool = False
    """The model reads token ids, so the last dimension of (n, T, C) outputs holds classes."""

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        return stand_in_loss(self.reading.call(model, batch), self.reading.target_of(batch), self.tokens)


def own_loss(output: Any) -> Tensor | None:
    """The loss in a model's output: a scalar, a field or key `loss`, the only scalar of a tuple, or the sum of a
    mapping of scalars, as detection models return. None if there is none to go backward from."""
    found: Any = None
    if isinstance(output, Mapping):
        values = list(output.values())
        found = sum(values) if values and all(_is_loss(value) for value in values) else output.get("loss")
    elif isinstance(output, (list, tuple)) and not hasattr(output, "loss"):
        scalars = [item for item in output if _is_loss(item)]
        found = scalars[0] if len(scalars) == 1 else None
    else:
        found = output if isinstance(output, Tensor) else getattr(output, "loss", None)
    return found if _is_loss(found) else None


def stand_in_loss(output: Any, target: Any, tokens: bool) -> Tensor:
    """The sum over all differentiable outputs: cross entropy against random classes where an output holds class scores,
    else the mean squared error against the target, or against random values where the target has another shape.

    Raises:
        InvalidInput: no output depends on the parameters.
    """
    outputs = trainable_outputs(output)
    if not outputs:
        raise InvalidInput(f"no output of the model depends on its parameters: {describe(output)}.")
    losses = [_stand_in(one, target, tokens) for one in outputs]
    return torch.stack(losses).sum() if len(losses) > 1 else losses[0]


def describe_stand_in(output: Any, target: Any, tokens: bool) -> str:
    """What `stand_in_loss` does with such outputs, in words."""
    kinds = []
    for one in trainable_outputs(output):
        dim = class_dim(one, target, tokens)
        per = " per token" if dim is not None and tokens and one.ndim > 2 else ""
        kinds.append(
            "mean squared error" if dim is None else f"cross entropy{per} against random classes (of {one.shape[dim]})"
        )
    return ", plus ".join(dict.fromkeys(kinds)) + (", summed over the outputs" if len(kinds) > 1 else "")


def trainable_outputs(output: Any) -> list[Tensor]:
    """The floating point tensors of an output that gradients flow back from."""
    found = (leaf for leaf in arrays(output) if isinstance(leaf, Tensor))
    return [leaf for leaf in found if leaf.is_floating_point() and leaf.requires_grad and leaf.numel()]


def class_dim(output: Tensor, target: Any, tokens: bool) -> int | None:
    """The dimension of an output that holds class scores, or None for an output that holds values."""
    if isinstance(target, Tensor):
        if target.is_floating_point():
            return None
        for dim in (-1, 1) if tokens else (1, -1):
            if output.ndim > 1 and output.shape[dim] > 1 and _without(output.shape, dim) == tuple(target.shape):
                return dim
    if output.ndim == 2:
        return 1 if output.shape[1] > 1 else None
    return -1 if tokens and output.ndim > 2 and output.shape[-1] > 1 else None


def _stand_in(output: Tensor, target: Any, tokens: bool) -> Tensor:
    dim = class_dim(output, target, tokens)
    if dim is None:
        same = isinstance(target, Tensor) and target.is_floating_point() and target.numel() == output.numel()
        return functional.mse_loss(output, target.view_as(output) if same else torch.rand_like(output))
    if dim == -1:
        output = output.reshape(-1, output.shape[-1])
    classes = torch.randint(output.shape[1], _without(output.shape, 1), device=output.device)
    return functional.cross_entropy(output, classes)


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    sizes = list(shape)
    del sizes[dim]
    return tuple(sizes)


def _is_loss(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 0 and (value.requires_grad or not torch.is_grad_enabled())
