"""What CUDA kernels allocate out of sight, as arithmetic: the table in `rules` says why, and where it is from.

Functions come in pairs: one takes numbers from a call while a step is traced, one makes bytes of them for a GPU. Only
the first of them need torch, which is imported there: a trace that is kept is replayed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Gpu:
    """What the rules need to know of where a step runs."""

    capability: tuple[int, int] = (8, 0)
    torch: tuple[int, int] = (2, 13)
    multiprocessors: int = 100


def attention_of(capability: tuple[int, int]) -> int:
    """Equal for GPUs that choose the same kernels: 7 without flash attention, 8 with it, 9 with cuDNN's first."""
    return 7 if capability < (8, 0) else 9 if capability[0] in (9, 10) else 8


@dataclass(frozen=True)
class Call:
    """One dispatched operator. Its tensors may be fakes: only shapes, strides and data types are read."""

    operator: str
    """Such as `aten.sort.default`."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[Tensor, ...]
    """The tensors in its result, flattened."""


_INDEX = 8  # bytes of an int64


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _round(a: int, to: int) -> int:
    return _ceil(a, to) * to


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _copy(tensor: Tensor | None, layout: torch.memory_format | None = None) -> int:
    """Bytes of the copy that `contiguous` makes; 0 where there is no need for one."""
    if tensor is None or (tensor.is_contiguous() if layout is None else tensor.is_contiguous(memory_format=layout)):
        return 0
    return _bytes(tensor)


def _argument(call: Call, place: int, name: str, default: Any) -> Any:
    return call.args[place] if len(call.args) > place else call.kwargs.get(name, default)


# Embeddings


def embedding(call: Call) -> tuple[int, ...]:
    grad, indices, words, _, by_frequency = call.args
    count = indices.numel() if by_frequency else 0
    return indices.numel(), grad.shape[-1], words, indices.element_size(), grad.element_size(), count, _copy(grad)


def embedding_bag(call: Call) -> tuple[int, ...] | None:
    grad, indices, words, by_frequency, mode = (call.args[i] for i in (0, 1, 5, 6, 7))
    count = indices.numel() if by_frequency else 0
    numbers = indices.numel(), grad.shape[-1], words, indices.element_size(), grad.element_size(), count, _copy(grad)
    return None if mode == 2 else numbers  # the maximum is added up atomically


def sorted_embedding(
    gpu: Gpu, tokens: int, features: int, words: int, index: int, element: int, counts: int, copy: int
) -> Sequence[int]:
    segments = min(tokens, words)
    partial = tokens // 10 + segments
    positions = [index * tokens] * 3  # sorted tokens, where they were, and where a new one begins
    return [
        copy,
        *positions,
        index * counts,
        *([index * segments] * 2),
        index * partial,
        partial * features * max(element, 4),
    ]


def dense_embedding(gpu: Gpu, tokens: int, *numbers: int) -> Sequence[int]:
    copy, by_frequency = numbers[-1], numbers[-2] > 0
    return [copy] if tokens <= 3072 and not by_frequency else sorted_embedding(gpu, tokens, *numbers)


# Indexing and sorting


def index_put(call: Call) -> tuple[int, ...] | None:
    import torch

    target, indices, values = call.args[:3]
    used = [index for index in indices if index is not None]
    if not _argument(call, 3, "accumulate", False) or any(i.dtype in (torch.bool, torch.uint8) for i in used):
        return None
    count = prod(torch.broadcast_shapes(*(index.shape for index in used)))
    elements = count * prod(size for i, size in enumerate(target.shape) if i >= len(indices) or indices[i] is None)
    whole = values.numel() == elements and values.is_contiguous()
    return count, 0 if whole else elements * values.element_size()


def sorted_index_put(gpu: Gpu, count: int, values: int) -> Sequence[int]:
    return [values, *([_INDEX * count] * 4), 2 * _INDEX * count]


def sort(call: Call) -> tuple[int, ...] | None:
    tensor = call.args[0]
    dim = _argument(call, 1, "dim", -1) if call.operator == "aten.sort.default" else call.kwargs.get("dim", -1)
    if tensor.ndim == 0 or tensor.shape[dim] <= 4096:  # sorted in place, without memory
        return None
    dense = tensor.stride(dim) == 1
    return tensor.numel(), tensor.shape[dim], tensor.element_size(), 0 if dense else tensor.numel()


def segmented_sort(gpu: Gpu, elements: int, length: int, element: int, copied: int) -> Sequence[int]:
    pairs = element + _INDEX
    copies = [element * copied, pairs * copied]  # the input and both results with the sorted dimension last
    if elements == length or length >= 1_000_000:  # one slice after the other
        return [*copies, _INDEX * length, pairs * length]
    if elements // length < 128:  # all at once, and then again by slice
        return [*copies, _INDEX * elements, _INDEX * elements, element * elements, pairs * elements]
    return [*copies, _INDEX * elements, pairs * elements]


# Normalisation


def layer_norm(call: Call) -> tuple[int, ...]:
    grad, data, shape = call.args[:3]
    columns = prod(shape)
    wanted = sum(call.args[-1][1:])
    return data.numel() // columns, columns, data.element_size(), wanted, _copy(grad), _copy(data)


def tall_layer_norm(
    gpu: Gpu, rows: int, columns: int, element: int, wanted: int, grad_copy: int, data_copy: int
) -> Sequence[int]:
    copies = [grad_copy, data_copy]
    if rows <= 64 * 1024 or columns // 32 >= gpu.multiprocessors // 2:
        return copies
    blocks = min(32 * 1024 // _ceil(columns, 32), _ceil(rows, 32))
    return [*copies, *([blocks * columns * element] * wanted)]


def group_norm(call: Call) -> tuple[int, ...]:
    backward = call.operator == "aten.native_group_norm_backward.default"
    data = call.args[1] if backward else call.args[0]
    samples, channels, _, groups = call.args[5:9] if backward else call.args[3:7]
    return samples * channels, samples * groups, max(data.element_size(), 4), 3 if backward else 2


def group_norm_vectors(gpu: Gpu, channels: int, groups: int, element: int, count: int) -> Sequence[int]:
    return [*([channels * element] * count), *([groups * element] * 2)]


# Attention: heads come before positions


def attention(call: Call) -> tuple[int, ...]:
    grad, query, key = call.args[:3]
    samples, heads, queries, width = query.shape
    copy = _copy(grad.transpose(1, 2))
    return samples, heads, key.shape[1], queries, key.shape[2], width, query.element_size(), copy


def flash(
    gpu: Gpu, samples: int, heads: int, key_heads: int, queries: int, keys: int, width: int, element: int, copy: int
) -> Sequence[int]:
    rows = samples * heads * _round(queries, 128)
    expanded = samples * heads * keys * width * element if key_heads != heads else 0
    return [copy, 4 * rows, 4 * rows * _round(width, 32 if width <= 128 else 64), expanded, expanded]


def efficient(
    gpu: Gpu, samples: int, heads: int, key_heads: int, queries: int, keys: int, width: int, element: int, copy: int
) -> Sequence[int]:
    grads = _round(queries, 64) * _round(width, 64)
    if element == 2 and width > 128:  # too wide for registers
        grads += 2 * _round(keys, 64) * _round(width, 64)
    product = 0 if element == 2 else 4 * samples * heads * queries * width
    return [copy, 4 * samples * heads * queries, max(4 * samples * heads * grads, product)]


def cudnn_attention(
    gpu: Gpu, samples: int, heads: int, key_heads: int, queries: int, keys: int, width: int, element: int, copy: int
) -> Sequence[int]:
    scores = samples * heads * _round(queries, 64) * _round(keys, 64) * 2
    small = gpu.capability >= (9, 0) and scores <= 256 << 20
    return [4 * samples * heads * queries + (scores if small else 4 * samples * heads * queries * width)]


# Matrix products


def products(place: int) -> Callable[[Call], tuple[int, ...] | None]:
    """For operators whose factors are the arguments at `place` and after it."""

    def numbers(call: Call) -> tuple[int, ...] | None:
        copies = tuple(_bytes(tensor) for tensor in call.args[place : place + 2] if not _multiplicable(tensor))
        return copies or None

    return numbers


def _multiplicable(tensor: Tensor) -> bool:
    rows, columns = tensor.shape[-2:]
    down, right = tensor.stride()[-2:]
    by_row, by_column = right == 1 and down >= max(1, columns), down == 1 and right >= max(1, rows)
    return by_row or by_column or (tensor.is_contiguous() and down != 0 and right != 0)


def as_they_are(gpu: Gpu, *sizes: int) -> Sequence[int]:
    return sizes


# Convolutions


def _operands(call: Call) -> tuple[Tensor, Tensor, Tensor, int]:
    """Input, weight, output (or its gradient) and groups."""
    if call.operator == "aten.convolution_backward.default":
        grad, data, weight = call.args[:3]
        return data, weight, grad, call.args[9]
    return call.args[0], call.args[1], call.results[0], call.args[8]


def other_layout(call: Call) -> tuple[int, ...] | None:
    from autobatch.prediction.layouts import layout_of

    data, weight, output, _ = _operands(call)
    layout = layout_of(data, weight)
    copies = _copy(data, layout), _copy(weight, layout), _copy(output, layout)
    return copies if any(copies) else None


def tensor_cores(call: Call) -> tuple[int, ...] | None:
    import torch

    from autobatch.prediction.layouts import layout_of

    data, weight, output, groups = _operands(call)
    depthwise = groups > 1 and groups == data.shape[1]
    if (
        data.dtype not in (torch.float16, torch.bfloat16)
        or depthwise
        or layout_of(data, weight) is not torch.contiguous_format
    ):
        return None
    return _bytes(data), _bytes(weight), _bytes(output)


def together(gpu: Gpu, *sizes: int) -> Sequence[int]:
    return [sum(sizes)]


# Optimizers


def norms(call: Call) -> tuple[int, ...]:
    tensors = call.args[0]
    return len(tensors), max((tensor.numel() for tensor in tensors), default=0)


def chunked_norms(gpu: Gpu, tensors: int, largest: int) -> Sequence[int]:
    return [4 * tensors * _ceil(largest, 65536), 4 * 320]


# Recurrent layers


def recurrent_layer(call: Call) -> tuple[int, ...]:
    from autobatch.prediction import recurrent

    run = recurrent.Run.of(call.args)
    element, flip = call.args[0].element_size(), run.batch_first and not run.packed
    copy = _copy(call.args[0].transpose(0, 1) if flip else call.args[0])
    return run.network.workspace_elements(run.samples) * element, copy


def recurrent_layer_backward(call: Call) -> tuple[int, ...]:
    from autobatch.prediction import recurrent

    run = recurrent.Run.of(call.args, backward=True)
    data, h, c, grad, grad_h, grad_c = (call.args[i] for i in (0, 4, 5, 7, 8, 9))
    flip = run.batch_first and not run.packed
    tensors = [tensor.transpose(0, 1) if flip and tensor is not None else tensor for tensor in (data, grad)]
    zeros = (_bytes(h) if grad_h is None else 0) + (_bytes(c) if c is not None and grad_c is None else 0)
    no_biases = call.args[2] in (2, 3)
    flat = run.network.weight_elements() * data.element_size() if no_biases else 0
    workspace = run.network.workspace_elements(run.samples) * data.element_size()
    return workspace, *(_copy(tensor) for tensor in tensors), zeros, flat
