"""Everything in a batch that a loss may be a mean over, and samples by which that can be told apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autobatch import batches
from autobatch.training import reduction
from autobatch.workload.calls import TARGET_NAMES

IGNORED = (-100, 0, -1, 1, 255)
"""What losses ignore: by default (PyTorch, Hugging Face), as padding, or as the unlabelled class of images."""


@dataclass(frozen=True)
class Candidate:
    """What a loss may be: by default a mean over samples."""

    words: str
    is_sum: bool = False
    path: batches.Path | None = None
    """The tensor whose elements are counted; None: samples are."""
    cut: int = 0
    """Its batch dimension."""
    ignored: int | None = None
    """The value that does not count; None: the values are those of a mask, and are added up."""
    later: bool = False
    """Whether the first position does not count, as where a model foretells each from those before it."""


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
    yield from _of_each(layout, labels, usual)
    yield SAMPLES
    yield SUM
    yield from _of_each(layout, masks, None)
    yield from _of_each(layout, others, usual)
    for value in others_ignored:
        yield from _of_each(layout, labels + others, value)


def counts_by_sample(candidates: Sequence[Candidate], parts: Sequence[Any], samples: int) -> list[list[float]]:
    """What each candidate counts in each sample. What is counted on a device is read in one go.

    Args:
        parts: batches that have so many `samples` together.
    """
    tensors: dict[tuple[batches.Path, int, bool], dict[int | None, None]] = {}
    for one in candidates:
        if one.path is not None:
            tensors.setdefault((one.path, one.cut, one.ignored is None), {})[one.ignored] = None
    on: dict[torch.device, tuple[list[Tensor], list[tuple[batches.Path, int | None, bool]]]] = {}
    for (path, cut, _), ignored in tensors.items():
        found = [_counts(batches.at(part, path), cut, list(ignored)) for part in parts]
        counted, places = on.setdefault(found[0].device, ([], []))
        counted.append(torch.cat(found, dim=1))
        places += [(path, value, later) for later in (False, True) for value in ignored]
    rows = {
        place: row
        for counted, places in on.values()
        for place, row in zip(places, torch.cat(counted).tolist(), strict=True)
    }
    ones = [1.0] * samples
    return [ones if one.path is None else rows[one.path, one.ignored, one.later] for one in candidates]


def _counts(tensor: Tensor, cut: int, ignored: Sequence[int | None]) -> Tensor:
    """What counts in each sample of a tensor where each of these values does not: (values, samples), and below that the
    same without the first position. None: the tensor is a mask."""
    rows = tensor.movedim(cut, 0)
    counted = torch.stack([rows if value is None else rows != value for value in ignored])
    if tensor.ndim == 1:
        return torch.cat([counted, counted])
    dtype = torch.float64 if counted.is_floating_point() else torch.int64
    of_all = counted.flatten(2).sum(2, dtype=dtype)
    return torch.cat([of_all, counted[:, :, 1:].flatten(2).sum(2, dtype=dtype)])


def telling_parts(
    batch: Any, layout: batches.Layout, candidates: Sequence[Candidate], most: int
) -> list[tuple[Any, int]]:
    """A sample, one or two others, and all together, with their sizes: about which candidates disagree.

    Args:
        most: samples together, 2 or 3.
    """
    means = [one for one in candidates if not one.is_sum]
    counted = [counts for counts in counts_by_sample(means, [batch], layout.size) if any(counts)]
    # As shares, so that no candidate drowns another.
    shares = [[counts[i] / max(map(abs, counts)) for counts in counted] or [1.0] for i in range(layout.size)]
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


def _of_each(layout: batches.Layout, named: list[tuple[str, batches.Path]], ignored: int | None) -> Iterator[Candidate]:
    """A candidate for each tensor; and without its first position."""
    for later in (False, True):
        for name, path in named:
            what = f"what {name} lets through" if ignored is None else f"{name} other than {ignored}"
            where = ", from the second position on" if later else ""
            yield Candidate(f"a mean over {what}{where}", False, path, layout.cuts[path], ignored, later)


def _is_target(batch: Any, path: batches.Path) -> bool:
    """Whether a tensor is what the model is to foretell: by its name, or as the last of several."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return path[0] == len(batch) - 1
    return bool(path) and any(name in str(path[-1]).lower().split("_") for name in TARGET_NAMES)
