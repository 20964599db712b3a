"""Everything in a batch that a loss may be a mean over, and samples by which that can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autobatch import batches
from autobatch.training import reduction
from autobatch.workload.calls import TARGET_NAMES

IGNORED = (-100, 0, -1, 1, 255)
"""What losses ignore: by default (PyTorch, Hugging Face), as padding, or as the unlabelled class of images."""


@dataclass(frozen=True)
class Candidate(reduction.Reduction):
    """What a loss may be. Samples are counted apart, so that one look at a batch counts all its micro-batches."""

    each: Callable[[Any], Tensor] | None = None
    """What it counts in each sample of a batch (n,); None: samples, or for a sum."""


SAMPLES = Candidate(reduction.SAMPLES.words)
SUM = Candidate(reduction.SUM.words, is_sum=True)


def candidates_in(batch: Any, layout: batches.Layout) -> Iterator[Candidate]:
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
    yield from _of_each(layout, labels, f"{{}} other than {usual}", partial(_other_than, usual))
    yield SAMPLES
    yield SUM
    yield from _of_each(layout, masks, "what {} lets through", _let_through)
    yield from _of_each(layout, others, f"{{}} other than {usual}", partial(_other_than, usual))
    for value in others_ignored:
        yield from _of_each(layout, labels + others, f"{{}} other than {value}", partial(_other_than, value))


def counts_by_sample(candidates: Sequence[Candidate], parts: Sequence[Any], samples: int) -> Tensor:
    """What each candidate counts in each sample.

    Args:
        parts: batches that have so many `samples` together.

    Returns:
        (candidates, samples), in float64, on the host: what is counted on a GPU is read in one go.
    """
    ones = torch.ones(samples, dtype=torch.float64)
    counted = [one.each(part).double() for one in candidates if one.each is not None for part in parts]
    rows = iter(torch.cat(counted).view(-1, samples).cpu() if counted else ())
    return torch.stack([ones if one.each is None else next(rows) for one in candidates])


def telling_parts(
    batch: Any, layout: batches.Layout, candidates: Sequence[Candidate], most: int
) -> list[tuple[Any, int]]:
    """A sample, one or two others, and all together, with their sizes: about which candidates disagree.

    Args:
        most: samples together, 2 or 3.
    """
    means = [one for one in candidates if not one.is_sum]
    counted = counts_by_sample(means, [batch], layout.size)
    counted = counted[counted.amax(1) > 0] if counted.any() else torch.ones(1, layout.size)
    # As shares, so that no candidate drowns another.
    shares = (counted / counted.amax(1, keepdim=True)).T.tolist()
    order = sorted(range(layout.size), key=lambda i: min(shares[i]))
    *others, fullest = order
    others = others or order  # a single sample twice shows sums

    def spread(i: int) -> float:
        return max(shares[i]) - min(shares[i])

    # A part in which nothing counts has no mean, so each has a sample of which much does.
    if most > 2 and len(others) > 1:
        *others, fuller = others
        second = [fuller, max(others, key=spread)]
    else:
        second = [max((i for i in others if min(shares[i])), key=spread, default=others[-1])]
    return [(batches.take(batch, layout, chosen), len(chosen)) for chosen in ([fullest], second, [fullest, *second])]


def _of_each(
    layout: batches.Layout, named: list[tuple[str, batches.Path]], words: str, count: Callable[..., Tensor]
) -> Iterator[Candidate]:
    """A candidate for each tensor; and without its first position, where a model foretells each from those before."""
    for later in (False, True):
        for name, path in named:
            each = partial(_by_sample, count, path, layout.cuts[path], later)
            where = ", from the second position on" if later else ""
            yield Candidate(f"a mean over {words.format(name)}{where}", partial(_in_all, each), each=each)


def _is_target(batch: Any, path: batches.Path) -> bool:
    """Whether a tensor is what the model is to foretell: by its name, or as the last of several."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return path[0] == len(batch) - 1
    return bool(path) and any(name in str(path[-1]).lower().split("_") for name in TARGET_NAMES)


def _in_all(each: Callable[[Any], Tensor], batch: Any) -> Tensor:
    return each(batch).sum()


def _by_sample(count: Callable[[Tensor], Tensor], path: batches.Path, cut: int, later: bool, batch: Any) -> Tensor:
    """What is counted in each sample (n,) of a tensor that is cut along `cut`; without the first position along the
    other of its first two dimensions, if only the later ones count."""
    tensor: Tensor = batches.at(batch, path)
    along = 1 if cut == 0 else 0
    if later and tensor.ndim > 1 and tensor.shape[along]:
        tensor = tensor.narrow(along, 1, tensor.shape[along] - 1)
    counted = count(tensor)
    rest = [dim for dim in range(counted.ndim) if dim != cut]
    return counted.sum(rest, dtype=torch.float64) if rest else counted


def _other_than(value: int, tensor: Tensor) -> Tensor:
    return tensor != value


def _let_through(tensor: Tensor) -> Tensor:
    return tensor
