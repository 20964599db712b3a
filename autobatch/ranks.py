"""The ranks of torch.distributed, where it is initialised: how many, and what they agree on."""

from __future__ import annotations

import torch.distributed as dist


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Ranks in the default group, or 1 where there is none."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's rank in the default group, or 0 where there is none."""
    return dist.get_rank() if _initialised() else 0


def smallest(value: int) -> int:
    """The smallest value over all ranks, on every rank. A collective: all ranks have to call it."""
    if not _initialised():
        return value
    values: list[int] = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return min(values)
