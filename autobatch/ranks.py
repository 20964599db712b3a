"""The ranks of torch.distributed: how many, and what they tell each other on the host, beside gradients.

Where a rank ends or hangs, the others do not wait for ever, and say which one is missing.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch
import torch.distributed as dist

from autobatch.errors import RankFailed

PATIENCE = timedelta(minutes=30)
"""How long ranks wait for one another where their group's own timeout cannot be read: torch's default for gloo."""
GRACE_SECONDS = 5.0
"""How long those that waited in vain give each other to say that they are still there."""
WIDTH = 3
"""Numbers that ranks exchange at once: a fixed count, so that one that fails need not know what the others expect."""


def _initialised() -> bool:
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Ranks in the default group, or 1 where there is none."""
    return dist.get_world_size() if _initialised() else 1


def rank() -> int:
    """This process's rank in the default group, or 0 where there is none."""
    return dist.get_rank() if _initialised() else 0


class Talk:
    """What the ranks of a group tell each other, over gloo: no GPU waits for it, or is waited for."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        """A collective: all ranks of the group have to call it."""
        self._members = dist.get_process_group_ranks(group)
        self._name = group.group_name
        self._met = 0
        with self._missing_named():
            # Only these ranks have to be here: there may be other groups, which train something else.
            self._group = dist.new_group(
                self._members, timeout=_patience(group), backend="gloo", use_local_synchronization=True
            )

    def meet(self, numbers: Sequence[float] = (), failure: str | None = None) -> list[list[float]]:
        """Every rank's numbers, by rank, or the news that one of them failed. Up to WIDTH numbers; the rest are 0.

        Raises:
            RankFailed: another rank failed, or is missing; not on the rank that says so itself.
        """
        self._met += 1
        own = torch.zeros(1 + WIDTH, dtype=torch.float64, device="cpu")  # whatever the default is
        own[: 1 + len(numbers)] = torch.tensor([float(failure is not None), *numbers], device="cpu")
        rows = [torch.empty_like(own) for _ in self._members]
        with self._missing_named():
            dist.all_gather(rows, own, group=self._group)
        if any(row[0] for row in rows):
            said = self._gather(failure)
            if failure is None:
                told = zip(self._members, said, strict=True)
                raise RankFailed("; ".join(f"rank {i} failed: {text}" for i, text in told if text))
        return [row[1:].tolist() for row in rows]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank.

        Raises: as `meet`.
        """
        self.meet()  # a rank that failed is not here, but there
        return self._gather(value)

    def _gather(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * len(self._members)
        with self._missing_named():
            dist.all_gather_object(values, value, group=self._group)
        return values

    @contextmanager
    def _missing_named(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, dist.DistError) as error:
            missing = self._missing()
            who = f"rank {', '.join(map(str, missing))} is missing" if missing else "a rank is missing"
            raise RankFailed(
                f"{who}: the others waited in vain ({str(error).splitlines()[0]}). Its own output says why it ended, "
                "or where it waits. Start all ranks again."
            ) from error

    def _missing(self) -> list[int]:
        """The ranks that do not say, in the store that brought all together, that they miss one, too."""
        keys = {member: f"autobatch/{self._name}/{self._met}/{member}" for member in self._members}
        from torch.distributed.distributed_c10d import _get_default_store  # not there in builds without distributed

        deadline = time.monotonic() + GRACE_SECONDS
        try:
            store = _get_default_store()
            store.set(keys[dist.get_rank()], "here")
            while missing := [member for member, key in keys.items() if not store.check([key])]:
                if time.monotonic() > deadline:
                    return missing
                time.sleep(0.05)
        except (RuntimeError, dist.DistError):  # the store is gone with the rank that kept it
            pass
        return []


def _patience(group: dist.ProcessGroup) -> timedelta:
    """The timeout that the group was made with: for the ranks' talk it is as right as for their gradients."""
    with suppress(AttributeError, RuntimeError):  # torch shows it of most backends, and by private names alone
        timeout = group._get_backend(group._device_types[0]).options._timeout
        if isinstance(timeout, timedelta):
            return timeout
    return PATIENCE


@cache
def talk_of(group: dist.ProcessGroup) -> Talk:
    """The talk of a group's ranks. A collective when it is first asked for."""
    return Talk(group)


def gather(value: Any) -> list[Any]:
    """The values of all ranks, by rank, on every one; only its own where there is no group. A collective.

    Raises:
        RankFailed: another rank failed before it came here, or is missing.
    """
    return talk_of(dist.group.WORLD).gather(value) if _initialised() else [value]


@contextmanager
def failing_together(together: bool) -> Iterator[None]:
    """Tell the other ranks, who are waiting for this one, when it fails, so that nobody waits for ever.

    The ranks meet at the start: communication is set up then, and is there, with its buffers, when memory is measured.
    """
    if not together or not _initialised():
        yield
        return
    talk = talk_of(dist.group.WORLD)
    talk.meet()
    try:
        yield
    except RankFailed:
        raise
    except Exception as error:
        talk.meet(failure=f"{type(error).__name__}: {error}")
        raise
