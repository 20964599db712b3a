"""The ranks of torch.distributed, where it is initialised: how many, and what they agree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from autobatch.errors import RankFailed

WIDTH = 3
"""Numbers that ranks exchange at once: a fixed count, so that one that fails need not know what the others expect."""
PATIENCE = timedelta(minutes=10)
"""How long ranks wait for one another."""


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


class Talk:
    """What the ranks of a group tell each other, on the host: no GPU waits for it, or is waited for."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """A collective: all ranks of the group have to call it."""
        own = dist.get_backend(group) == "gloo"
        members = dist.get_process_group_ranks(group)
        self._group = group if own else dist.new_group(members, backend="gloo", timeout=PATIENCE)

    def meet(self, numbers: Sequence[float], failure: str | None = None) -> list[list[float]]:
        """Every rank's numbers, by rank, or the news that one of them failed. Up to WIDTH numbers; the rest are 0.

        Raises:
            RankFailed: another rank failed, or is missing; not on the rank that says so itself.
        """
        own = torch.zeros(1 + WIDTH, dtype=torch.float64)
        own[: 1 + len(numbers)] = torch.tensor([float(failure is not None), *numbers])
        rows = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        with _missing_named():
            dist.all_gather(rows, own, group=self._group)
        if any(row[0] for row in rows):
            said = self._gather(failure)
            if failure is None:
                raise RankFailed("; ".join(f"rank {i} failed: {text}" for i, text in enumerate(said) if text))
        return [row[1:].tolist() for row in rows]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank.

        Raises: as `meet`.
        """
        self.meet([])  # a rank that failed is not here, but there
        return self._gather(value)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * dist.get_world_size(self._group)
        with _missing_named():
            dist.all_gather_object(values, value, group=self._group)
        return values


@cache
def talking(group: dist.ProcessGroup) -> Talk:
    """The talk of a group's ranks. A collective when it is first asked for."""
    return Talk(group)


@contextmanager
def _missing_named() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, dist.DistBackendError) as error:
        raise RankFailed(
            f"a rank is missing: the others waited for it in vain ({str(error).splitlines()[0]}). Its own output says "
            "why it ended; start all ranks again."
        ) from error
