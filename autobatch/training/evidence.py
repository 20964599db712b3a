"""What a loss is, found out by running it: on a sample, on two others, and on all three together.

For losses that nothing is known of, such as a model's own. Everything in the batch that could be counted is a
candidate; the right one foretells the loss of all three from those of the parts.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autobatch import batches
from autobatch.training.reduction import SAMPLES, SUM, Reduction
from autobatch.training.undo import StepStart

IGNORED = -100
"""The label that PyTorch's and Hugging Face's losses ignore by default."""
TOLERANCE, COARSE = 1e-5, 1e-3
"""How far, as a share, a foretold loss may be off: float32 sums of other shapes differ by about 1e-6. The second is for
models in half precision."""
LOOKS = 3
"""Batches after which the likeliest of those that are left is taken: what differs so little weighs little."""


@dataclass
class Evidence:
    """Narrows down what a loss is, batch by batch: it is run only where the candidates disagree about a batch.

    The runs are without gradients, in evaluation mode, and leave model and random numbers as they were.
    """

    compute_loss: Callable[[nn.Module, Any], Tensor]
    model: nn.Module
    autocast: Callable[[], AbstractContextManager[object]]
    """Where training runs a forward pass. It is done without here, as it is more exact, where that runs."""
    start: StepStart
    """Puts back what a forward pass changes."""
    gather: Callable[[Any], list[Any]]
    """Gives every rank's value: ranks look together, and see the same."""
    candidates: list[Reduction] | None = None
    """What it may be, likeliest first; None before the first batch."""
    looks: int = 0
    """How often it was run."""

    def settle(self, batch: Any, layout: batches.Layout, micros: Sequence[Any], samples: Sequence[int]) -> Reduction:
        """What the loss is, as far as it matters for this batch.

        Args:
            batch: the whole batch, on the model's device, with `layout`.
            micros: its micro-batches, of so many `samples`.
        """
        if self.candidates is None:
            self.candidates = list(_candidates(batch, layout))
        if len(self.candidates) > 1:
            differ = len({_shares(one, micros, samples) for one in self.candidates}) > 1
            if any(self.gather(differ)):
                self._narrow(batch, layout)
        return self.candidates[0]

    def _narrow(self, batch: Any, layout: batches.Layout) -> None:
        """Keep the candidates that foretell the loss on every rank that can tell."""
        assert self.candidates is not None
        *apart, (together, size) = _parts(batch, layout, self.candidates)
        losses, problem = self._losses([*(part for part, _ in apart), together])
        whole, kept = losses[-1], {one.words for one in self.candidates}
        if not problem and all(map(math.isfinite, losses)):
            tolerance = (COARSE if _is_half(self.model) else TOLERANCE) * max(map(abs, losses))
            kept = {one.words for one in self.candidates if abs(_foretold(one, apart, losses) - whole) <= tolerance}
        if not kept:
            problem = (
                f"the loss of {size} samples together ({whole:.6g}) is no such mean of the losses of its parts "
                f"({losses[0]:.6g} and {losses[1]:.6g}), as where samples are compared with one another"
            )
        kept = set.intersection(*self.gather(kept))
        problem = next(filter(None, self.gather(problem)), "")
        if problem:
            _warn(problem)
            kept = set()
        self.candidates = [one for one in self.candidates if one.words in kept] or [SAMPLES]
        self.looks += 1
        if self.looks == LOOKS:
            self.candidates = self.candidates[:1]

    def _losses(self, parts: list[Any]) -> tuple[list[float], str]:
        """The losses of these parts of a batch, or nothing and why."""
        problem = ""
        for context in (nullcontext, self.autocast):
            try:
                return self._run(parts, context), ""
            except Exception as error:  # noqa: BLE001  # a training step may raise anything here: it is told
                problem = f"it could not be run in evaluation mode to find out ({type(error).__name__}: {error})"
        return [math.nan] * len(parts), problem

    def _run(self, parts: list[Any], context: Callable[[], AbstractContextManager[object]]) -> list[float]:
        flags = [(module, module.training) for module in self.model.modules()]
        self.start.keep()
        try:
            self.model.eval()
            with torch.no_grad(), context():
                return [float(self.compute_loss(self.model, part)) for part in parts]
        finally:
            self.start.restore()
            for module, training in flags:
                module.training = training


def _foretold(one: Reduction, parts: Sequence[tuple[Any, int]], losses: Sequence[float]) -> float:
    counts = one.counts([part for part, _ in parts], [n for _, n in parts])
    total = 1.0 if one.is_sum else sum(counts)
    return sum(c * loss for c, loss in zip(counts, losses, strict=False)) / total if total else math.nan


def _is_half(model: nn.Module) -> bool:
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())


def _warn(why: str) -> None:
    warnings.warn(
        f"the loss is taken for a mean over samples, but {why}. If it is a mean over something else, say what: "
        'plan.stepper(..., reduction=lambda batch: (batch["labels"] != -100).sum()).',
        stacklevel=7,
    )


def _shares(one: Reduction, micros: Sequence[Any], samples: Sequence[int]) -> tuple[float, ...]:
    """The weights of micro-batches, to compare: rounded, as they come from sums of other things."""
    counts = one.counts(micros, samples)
    total = 1.0 if one.is_sum else sum(counts)
    return tuple(round(count / total, 9) if total else 0.0 for count in counts)


def _candidates(batch: Any, layout: batches.Layout) -> Iterator[Reduction]:
    """Everything that a loss may be a mean over; where several are right for a batch, the earlier is likelier."""
    whole: list[tuple[str, batches.Path]] = []
    masks: list[tuple[str, batches.Path]] = []
    for path, leaf in batches.named_arrays(batch):
        if not isinstance(leaf, Tensor) or layout.cuts.get(path) != 0 or leaf.is_complex():
            continue
        name = ".".join(map(str, path)) or "the batch"
        if not leaf.is_floating_point() and leaf.dtype is not torch.bool:
            whole.append((name, path))
        if leaf.dtype is torch.bool or "mask" in name.lower():
            masks.append((name, path))
    for later in (False, True):
        for name, path in whole:
            words = f"a mean over {name} other than {IGNORED}" + (", from the second position on" if later else "")
            yield Reduction(words, partial(_other_than, IGNORED, path, later))
    yield SAMPLES
    yield SUM
    for later in (False, True):
        for name, path in masks:
            words = f"a mean over what {name} lets through" + (", from the second position on" if later else "")
            yield Reduction(words, partial(_let_through, path, later))
        for name, path in whole:
            words = f"a mean over {name} other than 0" + (", from the second position on" if later else "")
            yield Reduction(words, partial(_other_than, 0, path, later))


def _other_than(value: int, path: batches.Path, later: bool, batch: Any) -> Tensor:
    return (_at(path, later, batch) != value).sum()


def _let_through(path: batches.Path, later: bool, batch: Any) -> Tensor:
    return _at(path, later, batch).sum()


def _at(path: batches.Path, later: bool, batch: Any) -> Tensor:
    """The tensor there; without its first position, where a model foretells each from those before it."""
    tensor: Tensor = batches.at(batch, path)
    return tensor[:, 1:] if later and tensor.ndim > 1 else tensor


def _parts(batch: Any, layout: batches.Layout, candidates: Sequence[Reduction]) -> list[tuple[Any, int]]:
    """A sample, one or two others, and all together, with their sizes: about which candidates disagree."""
    singles = batches.split(batch, [1] * layout.size, layout)
    counted = [one.counts(singles, [1] * layout.size) for one in candidates if not one.is_sum]
    # As shares, so that no candidate drowns another.
    shares = [[counts[i] / (max(counts) or 1) for counts in counted] for i in range(layout.size)]
    *others, fuller, fullest = sorted(range(layout.size), key=lambda i: min(shares[i]))
    # A part in which nothing counts has no mean, so each has a sample of which much does.
    odd = max(others, key=lambda i: max(shares[i]) - min(shares[i]), default=None)
    two = [fuller] if odd is None else [fuller, odd]
    return [(batches.take(batch, layout, chosen), len(chosen)) for chosen in ([fullest], two, [fullest, *two])]
