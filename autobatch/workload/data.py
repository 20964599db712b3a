"""From the data in any of its forms to a function that makes a batch of n samples."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from autobatch.batches import Layout, arrays, compare_layouts, describe, find_layout, grow, is_array
from autobatch.errors import InvalidInput
from autobatch.workload.tensors import GrownBatch

MAX_SCANNED = 512
"""Samples looked at, at most, to find the largest."""
MAX_SCAN_SECONDS = 2.0
TEMPLATE_SAMPLES = 3
"""Samples kept to make batches from."""

Collate = Callable[[list[Any]], Any]


@dataclass(frozen=True)
class Source:
    """Where batches come from."""

    make_batch: Callable[[int], Any]
    layout: Layout
    """The batch dimensions of its batches."""
    max_samples: int | None = None
    """Samples that the data has, or None where that is not known."""
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class CollatedBatch:
    """Makes batches with the data's own collate function, for collations that are more than stacking."""

    collate: Collate
    samples: tuple[Any, ...]

    def __call__(self, n: int) -> Any:
        return self.collate([self.samples[i % len(self.samples)] for i in range(n)])


def read_data(data: Any) -> Source:
    """The source of batches that `data` stands for.

    Args:
        data: one collated batch, a map-style or iterable Dataset, a DataLoader (or another iterable of batches), or a
            callable(n) that returns a batch of n samples.

    Raises:
        InvalidInput: it is none of these, has no samples, makes batches that are not of n samples, or is an iterator
            (a generator, `iter(loader)`), from which batches that are read are gone.
    """
    if isinstance(data, DataLoader):
        return _from_loader(data)
    if isinstance(data, IterableDataset):
        return _from_samples(iter(data), default_collate, _length(data))
    if isinstance(data, Dataset):
        return _from_samples(_items(data), default_collate, _length(data))
    if _is_list_of_samples(data):
        return _from_samples(_items(data), default_collate, len(data))
    if (
        is_array(data)
        or isinstance(data, (Mapping, list, tuple))
        or (is_dataclass(data) and not isinstance(data, type))
    ):
        return _from_batch(data)
    if hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, (str, bytes)):
        return _from_samples(_items(data), default_collate, _length(data))
    if callable(data) and not isinstance(data, type):
        return _from_callable(data)
    if isinstance(data, Iterator):
        raise InvalidInput(
            f"data is a {type(data).__name__}, which gives each batch only once: reading from it would take batches "
            "from your training. Pass the DataLoader or Dataset itself, or one batch: next(...)."
        )
    if isinstance(data, Iterable) and not isinstance(data, (str, bytes)):
        return _from_batches(data)
    raise InvalidInput(
        f"data must be a batch, a Dataset, a DataLoader or a callable(n) that returns a batch of n samples, "
        f"but is {type(data).__name__}."
    )


def _is_list_of_samples(data: Any) -> bool:
    """Whether this is a list as a DataLoader takes it, of samples that are alike, rather than one collated batch."""
    if not isinstance(data, list) or len(data) < 2 or is_array(data[0]):
        return False
    shapes = {describe(sample) for sample in data[:MAX_SCANNED]}
    return len(shapes) == 1 and all(next(arrays(sample), None) is not None for sample in data[:MAX_SCANNED])


def _from_callable(make_batch: Callable[[int], Any]) -> Source:
    two, three = make_batch(2), make_batch(3)
    try:
        layout = compare_layouts(two, three, (2, 3))
    except InvalidInput as error:
        raise InvalidInput(
            f"data(n) must return a batch of n samples, but data(2) returned {describe(two)} "
            f"and data(3) {describe(three)}: {error}"
        ) from error
    return Source(make_batch, layout)


def _from_batch(batch: Any) -> Source:
    if next(arrays(batch), None) is None:
        raise InvalidInput(
            f"data is a {type(batch).__name__} without any tensor. Pass one collated batch, a Dataset, a DataLoader "
            "or a callable(n) that returns a batch of n samples."
        )
    layout = find_layout(batch)
    if layout.size == 0:
        raise InvalidInput(f"the batch given as data has no samples: {describe(batch)}.")
    kept = min(layout.size, TEMPLATE_SAMPLES)
    template = Layout(kept, layout.cuts)
    return Source(
        GrownBatch(grow(batch, layout, kept), template),
        template,
        assumptions=(f"Batch given as data read as {layout.size} samples: {describe(batch)}.",),
    )


def _from_batches(batches: Iterable[Any]) -> Source:
    batch = next(iter(batches), None)
    if batch is None:
        raise InvalidInput("the data has no batches: iterating over it gave nothing.")
    return _from_batch(batch)


def _from_loader(loader: DataLoader[Any]) -> Source:
    if loader.batch_sampler is None and loader.batch_size is None:
        return _from_batches(loader)  # the data set makes the batches itself
    collate: Collate = loader.collate_fn
    if isinstance(loader.dataset, IterableDataset):
        return _from_samples(iter(loader.dataset), collate, _length(loader.dataset))
    return _from_samples(_items(loader.dataset), collate, _length(loader.sampler) or _length(loader.dataset))


def _from_samples(samples: Iterator[Any], collate: Collate, length: int | None) -> Source:
    seen = _scan(samples)
    if not seen:
        raise InvalidInput("the data has no samples.")
    seen.sort(key=_elements, reverse=True)
    largest, smallest = _elements(seen[0]), _elements(seen[-1])
    assumptions: tuple[str, ...] = ()
    if largest != smallest:
        of = f" of {length}" if length else ""
        assumptions = (
            f"Samples differ in size ({smallest} to {largest} elements in the {len(seen)}{of} looked at): "
            "the largest ones seen are probed, as the worst case.",
        )
    kept = tuple(itertools.islice(itertools.cycle(seen[:TEMPLATE_SAMPLES]), TEMPLATE_SAMPLES))
    collated = CollatedBatch(collate, kept)
    two, three = collated(2), collated(3)
    try:
        layout = compare_layouts(two, three, (2, 3))
    except InvalidInput:  # packed or flattened: only collating again makes another size
        return Source(collated, find_layout(three), length, assumptions)
    return Source(GrownBatch(grow(three, layout, 3), layout), layout, length, assumptions)


def _items(dataset: Any) -> Iterator[Any]:
    """Samples spread evenly over a map-style data set."""
    length = _length(dataset)
    if length is None:
        return (dataset[i] for i in itertools.count())
    return (dataset[i] for i in range(0, length, max(1, -(-length // MAX_SCANNED))))


def _scan(samples: Iterator[Any]) -> list[Any]:
    """The first samples, as many as the bounds on number and time allow."""
    stop = time.monotonic() + MAX_SCAN_SECONDS
    seen = []
    for sample in itertools.islice(samples, MAX_SCANNED):
        seen.append(sample)
        if time.monotonic() > stop:
            break
    return seen


def _length(data: Any) -> int | None:
    try:
        return len(data)
    except TypeError:  # torch's data sets and samplers may define __len__ to raise it
        return None


def _elements(sample: Any) -> int:
    """How large a raw sample is: array elements, items, characters or pixels."""
    if is_array(sample):
        total = 1
        for size in sample.shape:
            total *= size
        return total
    if isinstance(sample, (str, bytes)):
        return len(sample)
    if isinstance(sample, Mapping):
        return sum(map(_elements, sample.values()))
    if isinstance(sample, (list, tuple)):
        return sum(map(_elements, sample))
    size = getattr(sample, "size", None)  # PIL: (width, height)
    return size[0] * size[1] if isinstance(size, tuple) and len(size) == 2 else 1
