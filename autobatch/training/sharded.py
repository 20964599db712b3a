"""`fully_shard` (FSDP2), whose ranks meet within every pass; also after one of them ran out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autobatch.devices import oom
from autobatch.training import fsdp2
from autobatch.training.sync import Ranks, Result, Stranded, average_statistics


class FullySharded(Ranks):
    """Ranks gather parameters and scatter gradients in every pass, so all run as many, or none.

    Where one runs out of memory, the others wait for it in the next collective. It catches up with them: it runs the
    passes of the step again on next to nothing, leaves out the collectives that it has been in, and takes part in the
    rest. What comes of that step is wrong on all ranks, and all throw it away; but they have come to its end, where
    they can tell each other. It relies on what `fully_shard` itself relies on: that every rank issues the same
    collectives in the same order, whatever its data.
    """

    alone = False
    equal_passes = True
    apart = False

    def __init__(self, model: Any, group: dist.ProcessGroup, recovers: bool) -> None:
        super().__init__(group)
        self.inner = model
        self._model = model
        self._modules = fsdp2.sharded_modules(model)
        self._readable = fsdp2.is_readable(model)
        self.recovers = recovers and self._readable and self._knows_all_collectives()

    @contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(last)
        try:
            yield
        finally:
            self._model.set_requires_gradient_sync(True)

    def attempt(self, run: Callable[[], Result], catch_up: Callable[[], Result]) -> Result | oom.Diagnosis:
        fsdp2.abandon_passes(self._model)  # which parameters are gathered must not depend on what was run before
        collectives = _Collectives()
        with self._counted(collectives):
            outcome = oom.attempt(run)
            latest: object = outcome
            been_in = -1
            while isinstance(latest, oom.Diagnosis):
                if collectives.entered:
                    raise Stranded(f"within a collective, which may have reached the other ranks ({latest.message})")
                if collectives.been_in == been_in:
                    raise Stranded(f"again in the smallest micro-batches ({latest.message})")
                been_in, ran_out = collectives.been_in, latest.message
                collectives.begin_again()
                fsdp2.abandon_passes(self._model)
                try:
                    latest = oom.attempt(catch_up)
                except Exception as error:
                    why = f"{type(error).__name__}: {error}"
                    raise Stranded(f"then the smallest, to catch up, failed ({ran_out}; {why})") from error
        return outcome

    def drop_gradients(self) -> None:
        if self._readable:
            fsdp2.drop_gradients(self._modules)

    def gradients(self) -> None: ...

    @torch.no_grad()
    def statistics(self, share: float) -> None:
        buffers = {id(buffer) for buffer in self._model.buffers()}
        average_statistics(self._model, share, self._group, buffers)

    @contextmanager
    def _counted(self, collectives: _Collectives) -> Iterator[None]:
        """Where collectives are counted."""
        own = [
            (module, group._all_gather_comm, group._reduce_scatter_comm)
            for module in self._modules
            for group in fsdp2.groups_of(module)
        ]
        for module, gather, scatter in own:
            module.set_custom_all_gather(_Counted(gather, collectives, _gather_alone))
            module.set_custom_reduce_scatter(_Counted(scatter, collectives, _scatter_alone))
        try:
            yield
        finally:
            for module, gather, scatter in own:
                module.set_custom_all_gather(gather)
                module.set_custom_reduce_scatter(scatter)

    def _knows_all_collectives(self) -> bool:
        """Whether the ranks meet nowhere in a pass but where it can be seen."""
        if any(isinstance(module, nn.SyncBatchNorm) for module in self._model.modules()):
            return False
        if any(len(fsdp2.groups_of(module)) > 1 for module in self._modules):  # whose collectives cannot be set
            return False
        groups = [group for module in self._modules for group in fsdp2.groups_of(module)]
        comms = [comm for group in groups for comm in (group._all_gather_comm, group._reduce_scatter_comm)]
        if any(type(comm).__name__.startswith("SymmMem") for comm in comms):  # which look into one another's memory
            return False
        with torch.no_grad():  # such as in fp8, whose scales are a maximum over all ranks
            local = [p.to_local() for p in self._model.parameters() if isinstance(p, DTensor)]
        return not any(hasattr(tensor, "fsdp_pre_all_gather") for tensor in local)


class _Collectives:
    """Those of one step, on this rank."""

    def __init__(self) -> None:
        self.been_in = 0
        """How many this rank has been in."""
        self.entered = False
        """Whether it is in one now, or failed there."""
        self._come_to = 0

    def begin_again(self) -> None:
        """The step is run again."""
        self._come_to = 0

    def next(self, together: Callable[[], Any], alone: Callable[[], None]) -> Any:
        """Take part, but only once."""
        self._come_to += 1
        if self._come_to <= self.been_in:
            return alone()
        self.entered = True
        work = together()
        self.entered = False
        self.been_in += 1
        return work


class _Counted:
    """What `set_custom_all_gather` and `set_custom_reduce_scatter` take: the collective that was there, counted."""

    def __init__(self, own: Any, collectives: _Collectives, alone: Callable[[Tensor, Tensor], None]) -> None:
        self._own = own
        self._collectives = collectives
        self._alone = alone
        self.allocate = own.allocate

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, **options: Any) -> Any:
        return self._collectives.next(
            partial(self._own, output_tensor=output_tensor, input_tensor=input_tensor, **options),
            partial(self._alone, output_tensor, input_tensor),
        )


def _gather_alone(output: Tensor, own: Tensor) -> None:
    """Have this rank's part stand for all: numbers that a model can run on, unlike those of fresh memory."""
    for part in output.split(own.numel()):
        if part.data_ptr() != own.data_ptr():  # the rank's own lies in the output already
            part.copy_(own)


def _scatter_alone(output: Tensor, whole: Tensor) -> None:
    output.copy_(whole[: output.numel()])
