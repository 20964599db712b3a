"""`fully_shard` (FSDP2), whose ranks meet within every pass; also after one of them ran out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from autobatch.devices import oom
from autobatch.training.sync import Ranks, Stranded


class FullySharded(Ranks):
    """Ranks gather parameters and scatter gradients in every pass, so all run as many, or none.

    Where one runs out of memory, the others wait for it in the next collective. It catches up with them: it runs the
    passes of the step again on next to nothing, leaves out the collectives that it has been in, and takes part in the
    rest. What comes of that step is wrong on all ranks, and all throw it away; but they have come to its end, where
    they can tell each other. It relies on what `fully_shard` itself relies on: that every rank issues the same
    collectives in the same order, whatever its data.
    """

    equal_passes = True
    apart = False

    def __init__(self, model: Any, group: dist.ProcessGroup, recovers: bool) -> None:
        super().__init__(group)
        self.inner = model
        self._model = model
        self._modules: list[Any] = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self.recovers = recovers and self._knows_all_collectives()

    @contextmanager
    def passing(self, last: bool) -> Iterator[None]:
        self._model.set_requires_gradient_sync(last)
        try:
            yield
        finally:
            self._model.set_requires_gradient_sync(True)

    def attempt(self, run: Callable[[], Tensor], catch_up: Callable[[], Tensor]) -> Tensor | oom.Diagnosis:
        _abandon_passes(self._model)  # which parameters are gathered must not depend on what was run before
        collectives = _Collectives()
        with self._counted(collectives):
            outcome = latest = oom.attempt(run)
            been_in = -1
            while isinstance(latest, oom.Diagnosis):
                if collectives.entered:
                    raise Stranded(f"within a collective, which may have reached the other ranks ({latest.message})")
                if collectives.been_in == been_in:
                    raise Stranded(f"again in the smallest micro-batches ({latest.message})")
                been_in = collectives.been_in
                collectives.begin_again()
                _abandon_passes(self._model)
                latest = oom.attempt(catch_up)
        return outcome

    def gradients(self) -> None: ...

    def statistics(self, share: float) -> None: ...

    @contextmanager
    def _counted(self, collectives: _Collectives) -> Iterator[None]:
        """Where collectives are counted."""
        own = [
            (module, group._all_gather_comm, group._reduce_scatter_comm)
            for module in self._modules
            for group in _groups(module)
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
        if any(len(_groups(module)) > 1 for module in self._modules):  # whose collectives cannot be set
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


# What follows looks into FSDP2, which has no public way to read what it gathers with, or (before torch 2.13) to begin
# again after a pass that failed.


def _groups(module: Any) -> list[Any]:
    """The groups of parameters that a module gathers: none, one, or (from torch 2.12 on) several."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def _abandon_passes(model: Any) -> None:
    """Have no pass under way, and every parameter sharded. Waits for the collectives that this rank is in."""
    root = model._get_fsdp_state()
    if root._is_root is None:  # nothing has run yet
        return
    if hasattr(model, "reset_iter_state"):
        model.reset_iter_state()
        return
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    passes, travelling = root._state_ctx, root._comm_ctx
    now = root._device_handle.current_stream()
    for stream in ("all_gather_copy_in_stream", "all_gather_stream", "reduce_scatter_stream", "all_reduce_stream"):
        now.wait_stream(getattr(travelling, stream))
    travelling.all_gather_state = None
    travelling.post_forward_order.clear()
    if hasattr(travelling, "reduce_scatter_states"):  # torch 2.12
        travelling.reduce_scatter_states.clear()
    else:
        travelling.reduce_scatter_state = None
    passes.iter_forward_root = None
    passes.post_backward_final_callback_queued = False
    for state in passes.all_states:
        state._modules_to_run_forward.clear()
        state._training_state = TrainingState.IDLE
    for group in (group for module in model.modules() if isinstance(module, FSDPModule) for group in _groups(module)):
        gathered = group._all_gather_result
        if gathered is not None and gathered.all_gather_work is not None:
            gathered.all_gather_work.wait()
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._reshard_after_forward_event = None
        group._post_forward_indices.clear()
        group._training_state = TrainingState.IDLE
        group._to_sharded()
