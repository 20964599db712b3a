"""Tensors of all ranks, summed or spread in buckets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 25 * 1024**2
"""Tensors that travel together: as many as in a bucket of DistributedDataParallel (its `bucket_cap_mb`)."""


def all_reduce(tensors: Sequence[Tensor], group: dist.ProcessGroup, divisor: int) -> None:
    """Sum tensors over the ranks, in place, and divide them; in buckets, of which the next fills while one travels."""
    travelling: list[tuple[Any, Tensor, list[Tensor]]] = []
    for bucket in _buckets(tensors):
        flat = _flat(bucket)
        if divisor > 1:
            flat /= divisor  # first, so that sums of half precision do not overflow, as in DistributedDataParallel
        travelling.append((dist.all_reduce(flat, group=group, async_op=True), flat, bucket))
        if len(travelling) > 1:
            _arrive(*travelling.pop(0))
    for one in travelling:
        _arrive(*one)


def broadcast(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Give all ranks the first one's tensors."""
    for bucket in _buckets(tensors):
        flat = _flat(bucket)
        work = dist.broadcast(flat, dist.get_global_rank(group, 0), group=group, async_op=True)
        _arrive(work, flat, bucket)


def _flat(bucket: list[Tensor]) -> Tensor:
    """Their values in one row: a copy, but of a large one that travels alone as it is."""
    if len(bucket) == 1 and bucket[0].is_contiguous():
        return bucket[0].view(-1)
    return torch.cat([tensor.reshape(-1) for tensor in bucket])


def _arrive(work: Any, flat: Tensor, bucket: list[Tensor]) -> None:
    work.wait()
    if flat.data_ptr() == bucket[0].data_ptr():
        return
    parts = flat.split([tensor.numel() for tensor in bucket])
    torch._foreach_copy_(bucket, [part.view_as(tensor) for part, tensor in zip(parts, bucket, strict=True)])


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one kind each, up to BUCKET_BYTES together."""
    open_buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    sizes: dict[tuple[torch.device, torch.dtype], int] = {}
    for tensor in tensors:
        if tensor.numel() * tensor.element_size() >= BUCKET_BYTES:
            yield [tensor]
            continue
        kind = (tensor.device, tensor.dtype)
        open_buckets.setdefault(kind, []).append(tensor)
        sizes[kind] = sizes.get(kind, 0) + tensor.numel() * tensor.element_size()
        if sizes[kind] >= BUCKET_BYTES:
            yield open_buckets.pop(kind)
            del sizes[kind]
    yield from open_buckets.values()
