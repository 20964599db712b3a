"""How the losses of micro-batches add up to the loss of the whole batch: what a mean loss is a mean over.

With losses L_i that are means over c_i things each, the mean over all of them is sum(c_i * L_i) / sum(c_i): so its
gradient is that of the whole batch, whatever the sizes. A loss that is a sum adds up as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.loss import _Loss

from autobatch.errors import InvalidInput
from autobatch.workload.calls import Reading

Count = Callable[[Any], Any]
"""How many things a micro-batch's mean loss is a mean over, as a number or a scalar tensor."""
Given = Literal["mean", "sum"] | Count


@dataclass(frozen=True)
class Reduction:
    """What losses are: a sum, a mean over samples, or a mean over something that can be counted in a batch."""

    words: str
    """What it is, such as "a mean over samples"."""
    count: Count | None = None
    """None: samples."""
    is_sum: bool = False

    def counts(self, micros: Sequence[Any], samples: Sequence[int]) -> list[float]:
        """The weight of every micro-batch before it is divided by the sum over all of them (but for sums).

        Raises:
            InvalidInput: the count is not a number of at least 0.
        """
        if self.is_sum:
            return [1.0] * len(micros)
        if self.count is None:
            return list(map(float, samples))
        found = [self.count(micro) for micro in micros]
        tensors = [i for i, value in enumerate(found) if isinstance(value, Tensor) and value.numel() == 1]
        if tensors:  # what is counted on a GPU is read in one go
            read = torch.stack([found[i].detach().reshape(()).double() for i in tensors]).tolist()
            for i, value in zip(tensors, read, strict=True):
                found[i] = value
        return [_number(value) for value in found]


SAMPLES = Reduction("a mean over samples")
SUM = Reduction("a sum", is_sum=True)


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(
            f"reduction must count a micro-batch's things as one number, but gave {type(value).__name__}. For example: "
            'lambda batch: (batch["labels"] != -100).sum()'
        ) from None
    if not math.isfinite(number) or number < 0:
        raise InvalidInput(f"reduction must count at least 0 things in a micro-batch, but counted {number}.")
    return number


def given(reduction: Given) -> Reduction:
    """What the caller says that the loss is.

    Raises:
        InvalidInput: it is none of the things that can be said.
    """
    if reduction == "mean":
        return SAMPLES
    if reduction == "sum":
        return SUM
    if callable(reduction):
        return Reduction("a mean over what reduction counts", reduction)
    raise InvalidInput(
        'reduction is what the loss is: "mean" (over samples), "sum", or a callable(batch) that counts what it is a '
        f"mean over, but is {reduction!r}."
    )


def of_criterion(criterion: Any, reading: Reading) -> Reduction | None:
    """What a criterion of torch's is by its definition; None for any other."""
    function, settings = _unwrapped(criterion)
    if function is None:
        return None
    reduction = settings.get("reduction", "mean")
    if reduction == "sum":
        return SUM
    if function not in (functional.cross_entropy, functional.nll_loss):
        return SAMPLES  # means over samples, or over elements, of which all samples have as many
    return Reduction(
        "a mean over targets" + (", by their class weights" if settings.get("weight") is not None else ""),
        partial(_targets, reading, settings.get("ignore_index", -100), settings.get("weight")),
    )


def _unwrapped(criterion: Any) -> tuple[Any, dict[str, Any]]:
    """The function of torch's behind a criterion, and its settings; (None, {}) where it is another's."""
    settings: dict[str, Any] = {}
    while isinstance(criterion, partial):
        settings = criterion.keywords | settings
        criterion = criterion.func
    if isinstance(criterion, _Loss):
        inherited = next(cls for cls in type(criterion).__mro__ if "forward" in vars(cls))
        if inherited.__module__ != nn.modules.loss.__name__:
            return None, {}
        names = ("reduction", "ignore_index", "weight")
        found = {name: getattr(criterion, name) for name in names if hasattr(criterion, name)}
        functions = {nn.CrossEntropyLoss: functional.cross_entropy, nn.NLLLoss: functional.nll_loss}
        return functions.get(inherited, inherited), found | settings
    if getattr(criterion, "__module__", None) == functional.__name__ and criterion.__name__ in _LOSSES:
        return criterion, settings
    return None, {}


_ENDINGS = ("_loss", "_entropy", "_div", "_logits")
_LOSSES = {name for name in vars(functional) if name.endswith(_ENDINGS)} - {"linear_cross_entropy"}
"""The losses of `torch.nn.functional` that take an output and a target."""


def _targets(reading: Reading, ignore_index: int, weight: Tensor | None, batch: Any) -> Tensor | int:
    """What cross entropy divides by: targets that are not ignored, by the weights of their classes."""
    target = reading.target_of(batch)
    if not isinstance(target, Tensor):
        raise InvalidInput(f"cross entropy needs a tensor of targets, but got {type(target).__name__}.")
    if target.is_floating_point():  # probabilities, which all count
        return len(target)
    counts = target != ignore_index
    if weight is None:
        return counts.sum()
    # Without picking out those that count, for which the host would wait. What is ignored need be no class.
    weights = weight.detach().to(target.device, torch.float64)
    return (weights[target.where(counts, 0)] * counts).sum()
