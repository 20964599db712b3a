"""What is read and put back in FSDP2 (`fully_shard`) by private names: it has no public way to read what it gathers
with, to drop the whole gradients that it holds, or (before torch 2.13) to begin again after a pass that failed."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule

_OF_GROUPS = ("_all_gather_comm", "_reduce_scatter_comm", "fsdp_params")
_OF_PARAMETERS = ("sharded_param", "unsharded_accumulated_grad")


def sharded_modules(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def groups_of(module: Any) -> list[Any]:
    """The groups of parameters that a module gathers: none, one, or (from torch 2.12 on) several."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [state._fsdp_param_group] if state._fsdp_param_group else []


def is_readable(model: nn.Module) -> bool:
    """Whether this torch calls things as it is assumed here. Nothing else of this file may be called where not."""
    for module in sharded_modules(model):
        state = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        if not hasattr(state, "_is_root"):
            return False
        if not (hasattr(state, "_fsdp_param_groups") or hasattr(state, "_fsdp_param_group")):
            return False
        for group in groups_of(module):
            if not all(hasattr(group, name) for name in _OF_GROUPS):
                return False
            if not all(hasattr(parameter, name) for parameter in group.fsdp_params for name in _OF_PARAMETERS):
                return False
    return True


def drop_gradients(modules: list[Any]) -> None:
    """Have none: whole ones, as they are added up between micro-batches, or sharded ones."""
    for group in (group for module in modules for group in groups_of(module)):
        for parameter in group.fsdp_params:
            parameter.unsharded_accumulated_grad = parameter.sharded_param.grad = None
            if hasattr(parameter, "_unsharded_param"):  # since it was first gathered
                parameter._unsharded_param.grad = None


def abandon_passes(model: Any) -> None:
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
    for group in (group for module in sharded_modules(model) for group in groups_of(module)):
        gathered = group._all_gather_result
        if gathered is not None and gathered.all_gather_work is not None:
            gathered.all_gather_work.wait()
        group._all_gather_result = group._post_reduce_event = group._all_reduce_state = None
        group._reshard_after_forward_event = None
        group._post_forward_indices.clear()
        group._training_state = TrainingState.IDLE
        group._to_sharded()
