"""Everything in a batch that a loss may be a mean over, and samples by which that can be told apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autobatch import batches
from autobatch.training import reduction
from autobatch.workload.calls import TARGET_NAMES

IGNORED = (-100, 0, -1, 1, 255)
"""What losses ignore: by default (PyTorch, Hugging Face), as padding, or as the unlabelled class of images."""
NUMBERS = 1024
"""Up to how many floating-point numbers of a sample are looked at for those that may not count: more are inputs."""
READ = 4096
"""How many elements of a tensor are read, at regular distances, to see which values are common."""
COMMON = 0.02
"""As which share of them, and at least twice."""
VALUES = 16
"""How many values of one tensor are taken for what may not count, at most."""


@dataclass(frozen=True)
class Candidate:
    """What a loss may be: by default a mean over samples."""

    words: str
    is_sum: bool = False
    path: batches.Path | None = None
    """The tensor whose elements are counted; None: samples are."""
    cut: int = 0
    """Its batch dimension."""
    ignored: float | None = None
    """The value that does not count, which may be NaN; None: the values are those of a mask, and are added up."""
    later: bool = False
    """Whether the first position does not count, as where a model foretells each from those before it."""


SAMPLES = Candidate(reduction.SAMPLES.words)
SUM = Candidate(reduction.SUM.words, is_sum=True)


def candidates_in(batch: Any, layout: batches.Layout) -> Iterator[Candidate]:
    """What a loss may be a mean over, whatever values a batch has; where several are right for one, the earlier is
    likelier."""
    labels: list[tuple[str, batches.Path]] = []
    others: list[tuple[str, batches.Path]] = []
    masks: list[tuple[str, batches.Path]] = []
    flags: list[tuple[str, batches.Path]] = []
    numbers: list[tuple[str, batches.Path]] = []
    for name, path, leaf in _tensors(batch, layout):
        if leaf.dtype is torch.bool:
            flags.append((name, path))
        elif not leaf.is_floating_point():
            (labels if _is_target(batch, path) else others).append((name, path))
        elif _may_be_target(batch, path, leaf, layout):
            numbers.append((name, path))
        if leaf.dtype is torch.bool or "mask" in name.lower():
            masks.append((name, path))
    usual, *others_ignored = IGNORED
    yield from _of_each(layout, labels, usual)
    yield SAMPLES
    yield SUM
    yield from _of_each(layout, masks, None)
    yield from _of_each(layout, others, usual)
    yield from _of_each(layout, numbers, math.nan)
    yield from _of_each(layout, flags, True)
    for value in others_ignored:
        yield from _of_each(layout, labels + others, value)


def marked_in(batch: Any, layout: batches.Layout) -> Iterator[Candidate]:
    """What a loss may be a mean over by the values of this batch: those that tensors have often, or end with, such as
    the padding of a tokenizer or the mark of what has no label."""
    for name, path, leaf in _tensors(batch, layout):
        if leaf.dtype is torch.bool or (leaf.is_floating_point() and not _may_be_target(batch, path, leaf, layout)):
            continue
        for value in _repeated(leaf.movedim(layout.cuts[path], 0)):
            yield from _of_each(layout, [(name, path)], value)


def unknown(found: Iterable[Candidate], known: Sequence[Candidate]) -> list[Candidate]:
    """Those found that are not known, so many that no tensor has too many values that may not count."""
    words = {one.words for one in known}
    of_tensor = Counter((one.path, one.later) for one in known)
    new: list[Candidate] = []
    for one in found:
        if one.words not in words and of_tensor[one.path, one.later] < VALUES:
            words.add(one.words)
            of_tensor[one.path, one.later] += 1
            new.append(one)
    return new


def counts_by_sample(candidates: Sequence[Candidate], parts: Sequence[Any], samples: int) -> list[list[float]]:
    """What each candidate counts in each sample. What is counted on a device is read in one go.

    Args:
        parts: batches that have so many `samples` together.
    """
    tensors: dict[tuple[batches.Path, int, bool], dict[float | None, None]] = {}
    for one in candidates:
        if one.path is not None:
            tensors.setdefault((one.path, one.cut, one.ignored is None), {})[one.ignored] = None
    on: dict[torch.device, tuple[list[Tensor], list[tuple[batches.Path, float | None, bool]]]] = {}
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


def _counts(tensor: Tensor, cut: int, ignored: Sequence[float | None]) -> Tensor:
    """What counts in each sample of a tensor where each of these values does not: (values, samples), and below that the
    same without the first position. None: the tensor is a mask."""
    rows = tensor.movedim(cut, 0)
    counted = torch.stack([_counting(rows, value) for value in ignored])
    if tensor.ndim == 1:
        return torch.cat([counted, counted])
    dtype = torch.float64 if counted.is_floating_point() else torch.int64
    of_all = counted.flatten(2).sum(2, dtype=dtype)
    return torch.cat([of_all, counted[:, :, 1:].flatten(2).sum(2, dtype=dtype)])


def _counting(rows: Tensor, ignored: float | None) -> Tensor:
    if ignored is None:
        return rows
    return rows.isnan().logical_not() if math.isnan(ignored) else rows != ignored


def _repeated(rows: Tensor) -> list[float]:
    """Values that samples repeat at one of their ends, and the commonest, smallest and largest of the common ones."""
    found: list[float] = []
    if rows.ndim > 1 and rows[0].numel() > 1:
        flat = rows.flatten(1)
        for first, second in ((flat[:, -1], flat[:, -2]), (flat[:, 0], flat[:, 1])):
            ends = Counter(first[first == second].tolist())
            found += [value for value, _ in ends.most_common(1)]
    every = rows.numel() // READ | 1  # odd, so as not to meet the same places of all samples
    values, counts = rows.flatten()[::every].unique(return_counts=True)
    times = dict(zip(values.tolist(), counts.tolist(), strict=True))
    total = sum(times.values())
    common = [value for value, n in times.items() if n >= max(2, COMMON * total)]
    if common:
        found += [max(common, key=times.__getitem__), max(common), min(common)]
    # Where hardly anything else is left, nothing could be told.
    return [value for value in found if math.isfinite(value) and times.get(value, 0) <= (1 - COMMON) * total]


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
        counting = [i for i in others if min(shares[i]) and spread(i)]
        second = [max(counting or others, key=spread)]
    return [(batches.take(batch, layout, chosen), len(chosen)) for chosen in ([fullest], second, [fullest, *second])]


def _of_each(
    layout: batches.Layout, named: list[tuple[str, batches.Path]], ignored: float | None
) -> Iterator[Candidate]:
    """A candidate for each tensor; and without its first position."""
    for later in (False, True):
        for name, path in named:
            what = f"what {name} lets through" if ignored is None else f"{name} other than {ignored}"
            where = ", from the second position on" if later else ""
            yield Candidate(f"a mean over {what}{where}", False, path, layout.cuts[path], ignored, later)


def _tensors(batch: Any, layout: batches.Layout) -> Iterator[tuple[str, batches.Path, Tensor]]:
    """Those that have a batch dimension, with a name for people."""
    for path, leaf in batches.named_arrays(batch):
        if isinstance(leaf, Tensor) and path in layout.cuts and not leaf.is_complex():
            name = ".".join(map(str, path)) if path else "the batch"
            yield (f"batch[{name}]" if name.isdecimal() else name), path, leaf


def _may_be_target(batch: Any, path: batches.Path, leaf: Tensor, layout: batches.Layout) -> bool:
    """Whether some of a tensor's floating-point numbers may be marked not to count."""
    return _is_target(batch, path) or leaf.numel() <= NUMBERS * layout.size


def _is_target(batch: Any, path: batches.Path) -> bool:
    """Whether a tensor is what the model is to foretell: by its name, or as the last of several."""
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        return path[0] == len(batch) - 1
    return bool(path) and any(name in str(path[-1]).lower().split("_") for name in TARGET_NAMES)
