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
from autobatch.training.reduction import SAMPLES, SUM, Reduction, counts_of
from autobatch.training.undo import StepStart
from autobatch.workload.calls import TARGET_NAMES

IGNORED = (-100, 0, -1, 1, 255)
"""What losses ignore: by default (PyTorch, Hugging Face), as padding, or as the unlabelled class of images."""
TOLERANCE, COARSE = 1e-5, 1e-3
"""How far, as a share, a foretold loss may be off: float32 sums of other shapes differ by about 1e-6. The second is for
models in half precision."""
LITTLE = 0.02
"""Weights that differ by no more than this share of them are not worth a warning."""
LOOKS = 3
"""How often it is run at most before the likeliest of the candidates that are left is taken."""


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

    def settle(self, batch: Any, layout: batches.Layout, micros: Sequence[Any], samples: Sequence[int]) -> Reduction:
        """What the loss is, as far as it matters for this optimizer step. A collective.

        Args:
            batch: some of its samples, with their `layout`, to run the loss on.
            micros: this rank's micro-batches, of so many `samples`.
        """
        if self.candidates is None:
            self.candidates = list(_candidates(batch, layout))
        for _ in range(LOOKS):
            if len(self.candidates) == 1 or self._other(micros, samples) is None:
                return self.candidates[0]
            self._narrow(batch, layout)
        other = self._other(micros, samples, LITTLE)
        if other is not None:
            first = self.candidates[0]
            _warn(f"{first.words}, but may also be {other.words}: the samples at hand do not tell", depth=6)
        self.candidates = self.candidates[:1]
        return self.candidates[0]

    def _other(self, micros: Sequence[Any], samples: Sequence[int], by: float = 1e-9) -> Reduction | None:
        """A candidate that gives the micro-batches of all ranks other weights than the likeliest one, by more than that
        share of them, if there is any. A collective."""
        assert self.candidates is not None
        of_ranks = self.gather(counts_of(self.candidates, micros, samples))
        weights = []
        for i, one in enumerate(self.candidates):
            counts = [count for of_rank in of_ranks for count in of_rank[i]]
            total = 1.0 if one.is_sum else sum(counts)
            weights.append([count / total if total else 0.0 for count in counts])
        for candidate, own in zip(self.candidates, weights, strict=True):
            if any(abs(a - b) > by * max(a, b) for a, b in zip(own, weights[0], strict=True)):
                return candidate
        return None

    def _narrow(self, batch: Any, layout: batches.Layout) -> None:
        """Keep the candidates that foretell the loss on every rank that can tell."""
        assert self.candidates is not None
        kept, problem = {one.words for one in self.candidates}, ""
        if layout.size > 1:
            *apart, (together, size) = _parts(batch, layout, self.candidates)
            losses, problem = self._losses([*(part for part, _ in apart), together])
            whole = losses[-1]
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
        if not kept and not problem:
            problem = "ranks found it to be different things"
        if problem:
            _warn(f"{SAMPLES.words}, but {problem}")
        self.candidates = [one for one in self.candidates if one.words in kept and not problem] or [SAMPLES]

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
            self.start.forget()
            for module, training in flags:
                module.training = training


def _foretold(one: Reduction, parts: Sequence[tuple[Any, int]], losses: Sequence[float]) -> float:
    counts = one.counts([part for part, _ in parts], [n for _, n in parts])
    total = 1.0 if one.is_sum else sum(counts)
    return sum(c * loss for c, loss in zip(counts, losses, strict=False)) / total if total else math.nan


def _is_half(model: nn.Module) -> bool:
    return any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())


def _warn(what: str, depth: int = 7) -> None:
    warnings.warn(
        f"the loss is taken for {what}. If it is a mean over something else, say what: plan.stepper(..., "
        'reduction=lambda batch: (batch["labels"] != -100).sum()).',
        stacklevel=depth,
    )


def _candidates(batch: Any, layout: batches.Layout) -> Iterator[Reduction]:
    """Everything that a loss may be a mean over; where several are right for a batch, the earlier is likelier."""
    labels: list[tuple[str, batches.Path]] = []
    others: list[tuple[str, batches.Path]] = []
    masks: list[tuple[str, batches.Path]] = []
    for path, leaf in batches.named_arrays(batch):
        if not isinstance(leaf, Tensor) or path not in layout.cuts or leaf.is_complex():
            continue
        name = ".".join(map(str, path)) if path else "the batch"
        name = f"batch[{name}]" if name.isdecimal() else name
        if not leaf.is_floating_point() and leaf.dtype is not torch.bool:
            (labels if _is_target(batch, path) else others).append((name, path))
        if leaf.dtype is torch.bool or "mask" in name.lower():
            masks.append((name, path))
    usual, *others_ignored = IGNORED
    yield from _each(layout, labels, f"{{}} other than {usual}", partial(_other_than, usual))
    yield SAMPLES
    yield SUM
    yield from _each(layout, masks, "what {} lets through", _let_through)
    yield from _each(layout, others, f"{{}} other than {usual}", partial(_other_than, usual))
    for value in others_ignored:
        yield from _each(layout, labels + others, f"{{}} other than {value}", partial(_other_than, value))


def _each(
    layout: batches.Layout, named: list[tuple[str, batches.Path]], words: str, count: Callable[..., Tensor]
) -> Iterator[Reduction]:
    """A candidate for each tensor; and without its first position, where a model foretells each from those before."""
    for later in (False, True):
        for name, path in named:
            along = 1 if layout.cuts[path] == 0 else 0
            where = ", from the second position on" if later else ""
            yield Reduction(f"a mean over {words.format(name)}{where}", partial(count, path, along if later else None))


def _is_target(batch: Any, path: batches.Path) -> bool:
    """Whether a tensor is what the model is to foretell: by its name, or as the last of several."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return path[0] == len(batch) - 1
    return bool(path) and any(name in str(path[-1]).lower().split("_") for name in TARGET_NAMES)


def _other_than(value: int, path: batches.Path, later: int | None, batch: Any) -> Tensor:
    return (_at(path, later, batch) != value).sum()


def _let_through(path: batches.Path, later: int | None, batch: Any) -> Tensor:
    return _at(path, later, batch).sum()


def _at(path: batches.Path, later: int | None, batch: Any) -> Tensor:
    """The tensor there, or what comes after the first position along the dimension `later`."""
    tensor: Tensor = batches.at(batch, path)
    if later is None or tensor.ndim < 2:
        return tensor
    return tensor.narrow(later, 1, max(tensor.shape[later] - 1, 0)) if tensor.shape[later] else tensor


def _parts(batch: Any, layout: batches.Layout, candidates: Sequence[Reduction]) -> list[tuple[Any, int]]:
    """A sample, one or two others, and all together, with their sizes: about which candidates disagree."""
    singles = batches.split(batch, [1] * layout.size, layout)
    means = [one for one in candidates if not one.is_sum]
    counted = counts_of(means, singles, [1] * layout.size)
    # As shares, so that no candidate drowns another.
    shares = [[counts[i] / (max(counts) or 1) for counts in counted] for i in range(layout.size)]
    *others, fuller, fullest = sorted(range(layout.size), key=lambda i: min(shares[i]))
    # A part in which nothing counts has no mean, so each has a sample of which much does.
    odd = max(others, key=lambda i: max(shares[i]) - min(shares[i]), default=None)
    two = [fuller] if odd is None else [fuller, odd]
    return [(batches.take(batch, layout, chosen), len(chosen)) for chosen in ([fullest], two, [fullest, *two])]
