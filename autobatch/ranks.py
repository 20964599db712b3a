"""The ranks of torch.distributed, where it is initialised: how many, and what they agree on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from autobatch.errors import RankFailed


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Ranks in the default group, or 1 where there is none."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's rank in the default group, or 0 where there is none."""
    return dist.get_rank() if _initialised() else 0


def smallest(value: int) -> int:
    """The smallest value over all ranks, on every rank. A collective: all ranks have to call it.

    Raises:
        RankFailed: another rank failed before it came here.
    """
    if not _initialised():
        return value
    values: list[int | str] = [0] * dist.get_world_size()
    dist.all_gather_object(values, value)
    failures = {number: said for number, said in enumerate(values) if isinstance(said, str)}
    if failures:
        raise RankFailed("; ".join(f"rank {number} failed: {said}" for number, said in failures.items()))
    return min(number for number in values if isinstance(number, int))


@contextmanager
def failing_together(together: bool) -> Iterator[None]:
    """Tell the other ranks, who are waiting in `smallest`, when this one fails, so that nobody waits for ever.

    The ranks meet at the start: communication is set up then, and is there, with its buffers, when memory is measured.
    """
    if not together or not _initialised():
        yield
        return
    smallest(0)
    try:
        yield
    except RankFailed:
        raise
    except Exception as error:
        values: list[object] = [None] * dist.get_world_size()
        dist.all_gather_object(values, f"{type(error).__name__}: {error}")
        raise
