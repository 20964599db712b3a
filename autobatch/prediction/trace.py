"""What a training step allocates and frees, in order, as numbers: no torch, no tensors.

In all that eager PyTorch does with dense tensors, a storage's bytes are an affine function of the micro-batch. So a
step is traced at two small sizes, which give every other one, and a third says whether that holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Phase(str, Enum):
    """Where in the step."""

    SETUP = "setup"
    BATCH = "batch"
    FORWARD = "forward"
    LOSS = "loss"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"


class Category(str, Enum):
    """What the bytes are for."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    GRADIENT = "gradient"
    OPTIMIZER_STATE = "optimizer state"
    INPUT = "input"
    CAST_COPY = "cast copy"
    SAVED = "saved activation"
    TEMPORARY = "temporary"


@dataclass(frozen=True, slots=True)
class Site:
    """What made a storage."""

    operator: str
    """As dispatched, such as `aten.addmm.default`."""
    module: str
    """The path of the innermost module, such as `encoder.layers.0.linear1`; empty outside all."""
    line: str
    """`file:line` of the user's code."""
    phase: Phase
    category: Category


@dataclass(frozen=True)
class Trace:
    """The storages of one or more whole steps with one micro-batch size."""

    sites: tuple[Site, ...]
    """Where each storage was made."""
    sizes: tuple[int, ...]
    """Bytes of each storage, as requested."""
    events: tuple[int, ...]
    """In order: i where storage i is made, ~i where it is freed."""

    def allocated_bytes(self) -> Iterator[int]:
        """Bytes alive after each event, as requested: no rounding, no cache."""
        alive = 0
        for event in self.events:
            alive += self.sizes[event] if event >= 0 else -self.sizes[~event]
            yield alive

    def alive_at(self, position: int) -> list[int]:
        """The storages alive after the event at `position`, in the order that they were made."""
        alive: dict[int, None] = {}
        for event in self.events[: position + 1]:
            if event >= 0:
                alive[event] = None
            else:
                del alive[~event]
        return list(alive)


class NotAffine(Exception):
    """Traces of different sizes are not those of one step whose storages grow evenly."""

    def __init__(self, reason: str, sites: tuple[Site, ...] = ()) -> None:
        super().__init__(reason)
        self.sites = sites
        """Those that do not grow evenly, where the order of events is the same."""


@dataclass(frozen=True)
class AffineTrace:
    """The same for any micro-batch size: storage i has `fixed[i] + per_sample[i] * n` bytes."""

    sites: tuple[Site, ...]
    fixed: tuple[int, ...]
    per_sample: tuple[int, ...]
    events: tuple[int, ...]

    @classmethod
    def through(cls, traces: dict[int, Trace]) -> AffineTrace:
        """The step that all of these traces, by micro-batch size, are of; three or more check each other.

        Raises:
            NotAffine: they are not of one step, or a size does not grow evenly.
            ValueError: there are fewer than two.
        """
        if len(traces) < 2:
            raise ValueError("a line needs traces of at least two sizes")
        small, large, *others = sorted(traces)
        one, two = traces[small], traces[large]
        for n in (large, *others):
            _same_step(one, small, traces[n], n)
        slopes = [divmod(b - a, large - small) for a, b in zip(one.sizes, two.sizes, strict=True)]
        per_sample = tuple(slope for slope, _ in slopes)
        fixed = tuple(size - slope * small for size, slope in zip(one.sizes, per_sample, strict=True))
        uneven = {i for i, (_, rest) in enumerate(slopes) if rest}
        for n in others:
            uneven |= {i for i, size in enumerate(traces[n].sizes) if fixed[i] + per_sample[i] * n != size}
        if uneven:
            first = one.sites[min(uneven)]
            raise NotAffine(
                f"{len(uneven)} of {len(one.sizes)} storages do not grow evenly with the batch, the first made by "
                f"{first.operator} in {first.module or 'the step itself'} ({first.line})",
                tuple(one.sites[i] for i in sorted(uneven)),
            )
        return cls(one.sites, fixed, per_sample, one.events)

    def at(self, n: int) -> Trace:
        """The step with micro-batches of n samples."""
        sizes = tuple(a + b * n for a, b in zip(self.fixed, self.per_sample, strict=True))
        return Trace(self.sites, sizes, self.events)


def _same_step(one: Trace, n: int, other: Trace, m: int) -> None:
    if one.events == other.events and one.sites == other.sites:
        return
    pairs = zip(one.sites, other.sites, strict=False)
    different = next(((a, b) for a, b in pairs if a != b), None)
    where = f": {different[0].operator} against {different[1].operator}" if different else ""
    raise NotAffine(
        f"with {n} samples the step makes {len(one.sizes)} storages in {len(one.events)} events, with {m} it makes "
        f"{len(other.sizes)} in {len(other.events)}{where}"
    )
