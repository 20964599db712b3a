"""The micro-batches of one optimizer step, and by how much the loss of each counts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from autobatch import batches
from autobatch.errors import InvalidInput
from autobatch.plan import TrainingPlan
from autobatch.sizes import micro_batches, split_evenly
from autobatch.training.candidates import Candidate
from autobatch.training.evidence import Evidence
from autobatch.training.reduction import Reduction
from autobatch.training.sync import Sync


@dataclass(frozen=True)
class Window:
    """What one rank runs in one optimizer step."""

    micros: list[Any]
    samples: list[int]
    """Those of each micro-batch; 0 for one that only keeps others company."""
    weights: list[float]
    """By what the loss of each is multiplied: the mean of the sums over all ranks is the loss of the whole batch."""
    whole: int
    """This rank's samples, with those of micro-batches that are left out, as nothing in them counts."""
    share: float
    """Their share of the samples of all ranks."""

    @property
    def shares(self) -> list[float]:
        """The share of each micro-batch in this rank's samples."""
        return [n / sum(self.samples) for n in self.samples]


class Cutter:
    """Cuts batches into windows, with the same arithmetic on all ranks.

    Args:
        plan: says how large micro-batches may be.
        sync: the ranks.
        reduction: what the loss is, or what finds it out.
    """

    def __init__(self, plan: TrainingPlan, sync: Sync, reduction: Reduction | Evidence) -> None:
        self._plan = plan
        self._sync = sync
        self._reduction = reduction

    def cut(self, batch: Any, layout: batches.Layout, largest: int) -> Window:
        """A batch in as few micro-batches of at most `largest` samples as can be. A collective.

        Raises:
            InvalidInput: it cannot be cut so, or nothing in the batch counts.
        """
        sizes = sizes_for(self._plan, layout.size, largest)
        passes = len(sizes)
        if self._sync.equal_passes:
            passes = int(max(row[0] for row in self._sync.meet([len(sizes)])))
            if layout.size >= passes * self._plan.min_micro_batch_size:
                sizes = split_evenly(layout.size, passes)
        window = self._weighed(batch, layout, batches.split(batch, sizes, layout), sizes)
        return _filled(window, passes) if self._sync.equal_passes else window

    def gathered(self, micros: Sequence[Any]) -> Window:
        """Micro-batches that came as such. A collective."""
        layouts = [self._plan.layout_of(micro, is_micro_batch=True) for micro in micros]
        if self._sync.equal_passes and len({row[0] for row in self._sync.meet([len(micros)])}) > 1:
            raise InvalidInput(
                "the ranks have different numbers of micro-batches, and a sharded model runs only together."
            )
        samples, layout = [layout.size for layout in layouts], layouts[0]
        some = micros[0]
        if layout.size == 1 and len(micros) > 1:  # a single one would tell nothing about the loss
            with suppress(RuntimeError):  # others have other lengths
                some = batches.join(micros[:3], layout, torch.cat)
                layout = replace(layout, size=sum(samples[:3]))
        window = self._weighed(some, layout, micros, samples)
        return _filled(window, len(micros)) if self._sync.equal_passes else window

    def least(self, window: Window) -> Window:
        """As many micro-batches as in a window, each of as few samples as can be, to run but not to learn from."""
        micro, size = window.micros[0], min(self._plan.min_micro_batch_size, window.samples[0])
        layout = self._plan.layout_of(micro, is_micro_batch=True)
        few = batches.split(micro, [size, layout.size - size], layout)[0]
        passes = len(window.micros)
        return Window([few] * passes, [size] * passes, window.weights, window.whole, window.share)

    def _weighed(self, batch: Any, layout: batches.Layout, micros: Sequence[Any], samples: Sequence[int]) -> Window:
        reduction: Reduction | Candidate
        if isinstance(self._reduction, Evidence):
            reduction, counts = self._reduction.settle(batch, layout, micros, samples)
        else:
            reduction = self._reduction
            counts = reduction.counts(micros, samples)
        rows = self._sync.meet([sum(counts), sum(samples)])
        total = 1.0 if reduction.is_sum else sum(row[0] for row in rows)
        if not total:
            raise InvalidInput(
                f"nothing in this batch counts: its loss, {reduction.words}, is a mean over nothing. Leave such "
                "batches out."
            )
        idle = [rank for rank, row in enumerate(rows) if not row[0]]
        if idle and not self._sync.apart:
            raise InvalidInput(
                f"nothing in the batch of rank {idle[0]} counts ({reduction.words}), and ranks meet within the passes "
                "of this model, so that none can leave its own out. Leave such batches out."
            )
        kept = [i for i, count in enumerate(counts) if count]  # the others have no mean
        return Window(
            [micros[i] for i in kept],
            [samples[i] for i in kept],
            [counts[i] * self._sync.world_size / total for i in kept],
            sum(samples),
            sum(samples) / sum(row[1] for row in rows),
        )


def sizes_for(plan: TrainingPlan, samples: int, largest: int) -> tuple[int, ...]:
    """The micro-batches of a batch of so many samples, where they may be so large: the plan's own, if they may."""
    if samples == sum(plan.micro_batch_sizes) and max(plan.micro_batch_sizes) <= largest:
        return plan.micro_batch_sizes
    return micro_batches(samples, largest, plan.min_micro_batch_size)


def smaller_size(plan: TrainingPlan, size: int, samples: Sequence[int]) -> int | None:
    """The next size of micro-batches, a fifth less or as much more as has to be, that can cut batches of so many
    samples; None where there is none."""
    smallest = plan.min_micro_batch_size
    for candidate in range(min(size * 4 // 5, size - 1), smallest - 1, -1):
        with suppress(InvalidInput):
            for one in filter(None, samples):
                micro_batches(one, candidate, smallest)
            return candidate
    return None


def _filled(window: Window, passes: int) -> Window:
    """The window with as many micro-batches as other ranks run, of which those too many count for nothing."""
    more = passes - len(window.micros)
    return Window(
        window.micros + window.micros[:1] * more,
        window.samples + [0] * more,
        window.weights + [0.0] * more,
        window.whole,
        window.share,
    )
