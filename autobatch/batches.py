"""Batches of any shape: nests of containers with arrays in them, their batch dimension, and how to cut and grow them.

A batch is any nest of tuples, named tuples, lists, mappings and dataclasses. Its arrays are torch tensors or numpy
arrays, recognised by what they can do, so that this module needs neither library. All other leaves are kept as they
are.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from autobatch.errors import InvalidInput

Path = tuple[Any, ...]
"""Where a node stands in a nest: the keys and positions that lead to it."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the samples of a batch are."""

    size: int
    """Samples in the batch that this was read from."""
    cuts: Mapping[Path, int]
    """The batch dimension of every node that has one; 0 for a list or tuple with one item per sample. What is not named
    here is shared by all samples."""


def map_arrays(fn: Callable[[Any], Any], batch: Any) -> Any:
    """The same nest with every array replaced by `fn(array)`."""
    return _rebuild(batch, lambda path, node: fn(node) if is_array(node) else _DESCEND)


def arrays(batch: Any) -> Iterator[Any]:
    """Every array of the nest, in order."""
    return (node for _, node in _walk(batch) if is_array(node))


def named_arrays(batch: Any) -> Iterator[tuple[Path, Any]]:
    """Every array of the nest with the keys that lead to it, in order; `at` finds it again."""
    return ((path, node) for path, node in _walk(batch) if is_array(node))


def at(batch: Any, path: Path) -> Any:
    """What stands there in a nest."""
    for key in path:
        batch = batch[key] if isinstance(batch, Mapping) or _is_sequence(batch) else getattr(batch, key)
    return batch


def is_array(value: Any) -> bool:
    """Whether this is a tensor or a numpy array."""
    return (
        hasattr(value, "shape") and hasattr(value, "ndim") and hasattr(value, "dtype") and not isinstance(value, type)
    )


def batch_size(batch: Any) -> int:
    """The number of samples in a collated batch, by the rule of `find_layout`."""
    return find_layout(batch).size


def find_layout(batch: Any, expected: int | None = None) -> Layout:
    """Find the batch dimension of every array in one collated batch.

    Where something in the batch is `expected` long, that is the batch size. Else it has to be guessed:

    A list or tuple of mappings holds one mapping per sample, so its length is the batch size. Otherwise every array
    votes for each of its sizes and once more for its first one, so that `(8, 512), (8, 512), (1, 512)` has 8 samples
    and `(20, 8, 5), (8,)` has 8 too; lists of strings or numbers, and of arrays too unlike to be stacked, vote with
    their length. At a tie the first dimension wins, then the array that comes first.

    Raises:
        InvalidInput: nothing in the batch has a dimension.
    """
    nodes = list(_walk(batch))
    records = [len(node) for _, node in nodes if _is_plain_sequence(node) and _all_are(node, Mapping)]
    if expected is not None and any(expected in _sizes(node) for _, node in nodes):
        size = expected
    elif records:
        size = Counter(records).most_common(1)[0][0]
    else:
        votes: Counter[int] = Counter()
        first: Counter[int] = Counter()
        for _, node in nodes:
            shape = _sizes(node)
            votes.update(set(shape))
            votes.update(shape[:1])
            first.update(shape[:1])
        if not votes:
            raise InvalidInput(
                f"this batch has no dimension to split: {describe(batch)}. Pass a batch of at least one sample."
            )
        size = max(votes, key=lambda size: (votes[size], first[size]))
    return Layout(size, dict(_cuts(batch, size, prefer_lists=bool(records))))


def compare_layouts(smaller: Any, larger: Any, sizes: tuple[int, int]) -> Layout:
    """Find the batch dimensions exactly, from two batches of known, different sizes; the layout is that of `larger`.

    Raises:
        InvalidInput: the nests differ, nothing grows with the batch, or something grows by other than one per sample.
    """
    cuts = dict(_grown(smaller, larger, sizes, ()))
    if not cuts:
        raise InvalidInput(
            f"nothing in the batch grows with the number of samples: {sizes[0]} samples gave {describe(smaller)}, "
            f"{sizes[1]} gave {describe(larger)}."
        )
    return Layout(sizes[1], cuts)


def dims_of(batch: Any, layout: Layout) -> dict[str, int | None]:
    """The batch dimension of every array by its name, None where samples share it; `layout_like` reads it back.

    Empty where samples are items of lists, which have no dimension.
    """
    named = {_name(path): layout.cuts.get(path) for path, node in _walk(batch) if is_array(node)}
    return named if sum(dim is not None for dim in named.values()) == len(layout.cuts) else {}


def layout_like(batch: Any, dims: Mapping[str, int | None]) -> Layout | None:
    """The layout of a batch whose arrays have these names and batch dimensions; None where they are others. Where some
    are missing or more, those that are there say how many samples there are.

    Raises:
        InvalidInput: the arrays disagree about how many samples there are.
    """
    found = {_name(path): (path, node) for path, node in _walk(batch) if is_array(node)}
    cuts = {name: dim for name, dim in dims.items() if dim is not None and name in found}
    if not cuts or any(found[name][1].ndim <= dim for name, dim in cuts.items()):
        return None
    sizes = {name: found[name][1].shape[dim] for name, dim in cuts.items()}
    size, known = next(iter(sizes.values())), {found[name][0]: dim for name, dim in cuts.items()}
    if found.keys() != dims.keys():
        if len(set(sizes.values())) > 1:
            return None
        guessed = find_layout(batch, expected=size).cuts
        return Layout(size, {path: dim for path, dim in guessed.items() if _name(path) not in dims} | known)
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{size} in {name or 'the tensor'} (dimension {cuts[name]})" for name, size in sizes.items())
        raise InvalidInput(f"the parts of this batch disagree about its samples: {told}. All need as many.")
    return Layout(size, known)


def _name(path: Path) -> str:
    return ".".join(map(str, path))


def grow(batch: Any, layout: Layout, n: int) -> Any:
    """A new batch of `n` samples, made by cycling through the samples of `batch`. Shares no memory with it where it has
    samples."""
    return take(batch, layout, [i % layout.size for i in range(n)])


def take(batch: Any, layout: Layout, index: list[int]) -> Any:
    """A new batch of these samples of `batch`, copied."""

    def taken(path: Path, node: Any) -> Any:
        if path not in layout.cuts:
            return _DESCEND
        if is_array(node):
            return node[(slice(None),) * layout.cuts[path] + (index,)]
        return type(node)([node[i] for i in index])

    return _rebuild(batch, taken)


def split(batch: Any, sizes: Sequence[int], layout: Layout | None = None) -> list[Any]:
    """Cut a batch into consecutive batches of `sizes` samples. Arrays are cut as views: nothing is copied.

    Raises:
        InvalidInput: the sizes do not add up to the samples in the batch.
    """
    layout = layout or find_layout(batch)
    if sum(sizes) != layout.size:
        raise InvalidInput(
            f"the batch has {layout.size} samples, but the sizes to split it into add up to {sum(sizes)}: "
            f"{describe(batch)}."
        )
    pieces, start = [], 0
    for size in sizes:
        pieces.append(_rebuild(batch, _slicer(layout, start, start + size)))
        start += size
    return pieces


def join(parts: Sequence[Any], layout: Layout, concatenate: Callable[[list[Any], int], Any]) -> Any:
    """Batches of one layout as one, in order: the opposite of `split`.

    Args:
        concatenate: joins arrays along a dimension, as `torch.cat` does; it raises what it raises where their other
            dimensions differ.
    """

    def joined(path: Path, node: Any) -> Any:
        if path not in layout.cuts:
            return _DESCEND
        nodes = [at(part, path) for part in parts]
        if is_array(node):
            return concatenate(nodes, layout.cuts[path])
        return type(node)([item for part in nodes for item in part])

    return _rebuild(parts[0], joined)


def describe(batch: Any) -> str:
    """The shapes of a batch in a few words, such as `(float32 (8, 3), int64 (8,))`."""
    if is_array(batch):
        return f"{str(batch.dtype).removeprefix('torch.')} {tuple(batch.shape)}"
    parts = _children(batch)
    if parts is None:
        return type(batch).__name__
    named = not _is_sequence(batch) or hasattr(batch, "_fields")
    shown = [f"{key}: {describe(child)}" if named else describe(child) for key, child in parts[:8]]
    return f"{type(batch).__name__}({', '.join(shown + ['…'] * (len(parts) > 8))})"


_DESCEND = object()
_Visit = Callable[[Path, Any], Any]


def _rebuild(node: Any, visit: _Visit, path: Path = ()) -> Any:
    """The nest with each node replaced by what `visit` returns for it, or rebuilt from its parts where that is
    _DESCEND."""
    new = visit(path, node)
    if new is not _DESCEND:
        return new
    parts = _children(node)
    if parts is None:
        return node
    return _like(node, {key: _rebuild(child, visit, (*path, key)) for key, child in parts})


def _walk(node: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    yield path, node
    for key, child in _children(node) or ():
        yield from _walk(child, (*path, key))


def _children(node: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a container with their keys, or None for a leaf."""
    if is_array(node):
        return None
    if isinstance(node, Mapping):
        return list(node.items())
    if _is_sequence(node):
        return list(enumerate(node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(field.name, getattr(node, field.name)) for field in dataclasses.fields(node)]
    return None


def _like(node: Any, parts: dict[Any, Any]) -> Any:
    """A container like `node` with other parts."""
    if type(node) is dict:
        return parts
    if _is_sequence(node):
        return type(node)(*parts.values()) if hasattr(node, "_fields") else type(node)(parts.values())
    if isinstance(node, Mapping) and not hasattr(node, "__setitem__"):
        return parts
    clone = copy.copy(node)  # keeps what a subclass knows beside its items, and runs no __init__ or __post_init__
    for key, value in parts.items():
        if isinstance(node, Mapping):
            clone[key] = value
        else:
            object.__setattr__(clone, key, value)
    return clone


def _slicer(layout: Layout, start: int, stop: int) -> _Visit:
    def visit(path: Path, node: Any) -> Any:
        if path not in layout.cuts:
            return _DESCEND
        if is_array(node):
            return node[(slice(None),) * layout.cuts[path] + (slice(start, stop),)]
        return type(node)(node[start:stop])

    return visit


def _is_sequence(node: Any) -> bool:
    return isinstance(node, (list, tuple))


def _is_plain_sequence(node: Any) -> bool:
    """Whether a list or tuple could hold one item per sample: not a named tuple, whose fields are a structure."""
    return _is_sequence(node) and len(node) > 0 and not hasattr(node, "_fields")


def _all_are(node: Sequence[Any], kind: type) -> bool:
    return all(isinstance(item, kind) for item in node)


def _are_samples(node: Any) -> bool:
    """Whether a list or tuple could hold one item per sample: its items are alike."""
    if not _is_plain_sequence(node):
        return False
    if all(is_array(item) for item in node):
        return node[0].ndim > 0 and len({(item.ndim, item.dtype) for item in node}) == 1
    return _all_are(node, Mapping) or not any(is_array(item) or _children(item) is not None for item in node)


def _sizes(node: Any) -> tuple[int, ...]:
    """The sizes that one node votes for."""
    if is_array(node):
        return tuple(node.shape)
    if not _are_samples(node):
        return ()
    stackable = len({tuple(item.shape) for item in node}) == 1 if is_array(node[0]) else False
    return () if stackable else (len(node),)


def _cuts(node: Any, size: int, prefer_lists: bool, path: Path = ()) -> Iterator[tuple[Path, int]]:
    if is_array(node):
        if size in node.shape:
            yield path, tuple(node.shape).index(size)
    elif _are_samples(node) and len(node) == size and (prefer_lists or 2 * sum(_carries(i, size) for i in node) < size):
        yield path, 0
    else:
        for key, child in _children(node) or ():
            yield from _cuts(child, size, prefer_lists, (*path, key))


def _carries(item: Any, size: int) -> bool:
    """Whether an array in `item` has a dimension of that size, so that cutting it would cut the batch."""
    return any(size in array.shape for array in arrays(item))


def _grown(a: Any, b: Any, sizes: tuple[int, int], path: Path) -> Iterator[tuple[Path, int]]:
    if is_array(a) and is_array(b) and a.ndim == b.ndim:
        changes = [(i, pair) for i, pair in enumerate(zip(a.shape, b.shape, strict=True)) if pair[0] != pair[1]]
        exact = [i for i, pair in changes if pair == sizes]
        if changes and not exact:
            raise InvalidInput(f"a dimension does not grow by one per sample: {describe(a)} became {describe(b)}.")
        if exact:
            yield path, exact[0]
        return
    parts_a, parts_b = _children(a), _children(b)
    if parts_a is None and parts_b is None:
        return
    if _is_plain_sequence(a) and _is_plain_sequence(b) and (len(a), len(b)) == sizes:
        yield path, 0
    elif parts_a is None or parts_b is None or [key for key, _ in parts_a] != [key for key, _ in parts_b]:
        raise InvalidInput(f"two batches of the same data differ in structure: {describe(a)} and {describe(b)}.")
    else:
        for (key, child_a), (_, child_b) in zip(parts_a, parts_b, strict=True):
            yield from _grown(child_a, child_b, sizes, (*path, key))
