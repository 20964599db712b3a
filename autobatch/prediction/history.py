"""Torch's own record of what its caching allocator did on a GPU, against the simulated one.

`torch.cuda.memory._record_memory_history()` before the first CUDA tensor, and `_dump_snapshot(path)` after some steps,
write a pickle with a list of actions for each device. It is data of plain types; it is read as such, and nothing in it
is run.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autobatch.errors import InvalidInput
from autobatch.prediction.allocator import AllocatorSettings, CachingAllocator
from autobatch.prediction.blocks import Block

_MAPS = {"segment_alloc": 1, "segment_map": 1, "segment_free": -1, "segment_unmap": -1}
_FREES = ("free_completed", "free")
_IGNORED = ("free_requested", "snapshot", "oom", "user_defined", "workspace_snapshot")


@dataclass(frozen=True)
class Action:
    """One thing that the allocator did."""

    kind: str
    """As torch names it: "alloc", "free_completed", "segment_alloc", "segment_map" and so on."""
    address: int
    size: int
    """Bytes; of an allocation, as requested."""
    stream: int


@dataclass(frozen=True)
class Comparison:
    """The simulated allocator beside the recorded one, over the same requests."""

    allocations: int
    measured_peak_reserved_bytes: int
    simulated_peak_reserved_bytes: int
    largest_difference_bytes: int
    """Between the two reserved counts, after any event."""
    differs_after: int | None
    """The number of allocations after which the counts first differed, or None: they never did."""

    @property
    def identical(self) -> bool:
        """Whether the same bytes were reserved at all times."""
        return self.differs_after is None


class _PlainData(pickle.Unpickler):
    """Reads pickles of numbers, texts, lists, tuples and dicts, and refuses all else."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it refers to {module}.{name}")


def load(path: Path, device: int = 0) -> list[Action]:
    """The actions that a snapshot recorded on one device, oldest first.

    Raises:
        InvalidInput: the file is not such a snapshot, or has no history of that device.
    """
    try:
        with path.open("rb") as file:
            snapshot = _PlainData(file).load()
        entries = snapshot["device_traces"][device]
        actions = [Action(e["action"], e["addr"], e["size"], e.get("stream", 0)) for e in entries if "addr" in e]
    except (OSError, pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{path} cannot be read as a memory snapshot of device {device}: {type(error).__name__}: {error}. Make one "
            "with torch.cuda.memory._dump_snapshot(path)."
        ) from error
    if not actions:
        raise InvalidInput(
            f"{path} has no history of device {device}. Call torch.cuda.memory._record_memory_history() before the "
            "first CUDA tensor is made."
        )
    return actions


def compare(
    actions: list[Action], capacity_bytes: int | None = None, settings: AllocatorSettings | None = None
) -> Comparison:
    """Give the recorded requests to the simulated allocator, and compare what the two reserve.

    Raises:
        InvalidInput: the history begins in the middle, with blocks that it does not know.
        OutOfMemory: the simulated allocator finds no room where the recorded one did.
    """
    allocator = CachingAllocator(capacity_bytes, settings)
    blocks: dict[int, Block | None] = {}
    measured = measured_peak = largest = allocations = 0
    differs_after = None
    for action in actions:
        if action.kind in _MAPS:
            measured += _MAPS[action.kind] * action.size
            measured_peak = max(measured_peak, measured)
            continue  # the request that asked for it, or made it free, is recorded next
        if action.kind == "alloc":
            blocks[action.address] = allocator.malloc(action.size, action.stream)
            allocations += 1
        elif action.kind in _FREES:
            if action.address not in blocks:
                raise InvalidInput(
                    f"the history frees a block at {action.address:#x} that it never saw allocated: it begins in the "
                    "middle. Start recording before the first CUDA tensor is made, with room for all entries."
                )
            allocator.free(blocks.pop(action.address))
            continue  # a cache that is emptied by hand is seen at the next request
        elif action.kind not in _IGNORED:
            raise InvalidInput(f"the history has an action of an unknown kind, {action.kind!r}.")
        difference = abs(measured - allocator.reserved_bytes)
        largest = max(largest, difference)
        if difference and differs_after is None:
            differs_after = allocations
    return Comparison(allocations, measured_peak, allocator.peak_reserved_bytes, largest, differs_after)
