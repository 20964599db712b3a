"""Activation checkpointing for models without a switch for it: of the blocks that they repeat."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch._dynamo  # checkpoint imports it in its first call: no trial has to pay the time of it
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

MOST = 0.5
"""Blocks are worth recomputing if at least this share of a model's layers is in them. Layers are counted, not
parameters: activations are what a layer makes, and the largest weights (embeddings, heads) often make few."""
AS_MANY = 0.9
"""Of nested choices that hold about as many layers (stages, and the blocks in them), the finest keeps the least."""


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The modules of one class that together are most of a model; [] where there is no such class."""
    layers = {id(module) for module in model.modules() if not any(module.children())}
    by_class: dict[type[nn.Module], list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        if module is not model and _can_be_a_block(module):
            by_class[type(module)].append(module)
    covered = {
        kind: len({id(part) for block in blocks for part in block.modules()} & layers) / len(layers)
        for kind, blocks in ((kind, _outermost(found)) for kind, found in by_class.items())
        if len(blocks) > 1
    }
    most = max(covered.values(), default=0.0)
    if most < MOST:
        return []
    best = (kind for kind, share in covered.items() if share >= AS_MANY * most)
    return max((_outermost(by_class[kind]) for kind in best), key=len)


def _can_be_a_block(module: nn.Module) -> bool:
    """A single layer of torch keeps its input either way; a list of modules is never called."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict, torch.jit.ScriptModule)):
        return False
    return any(module.children()) or not type(module).__module__.startswith("torch.nn.")


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    inside = {id(part) for module in modules for part in module.modules() if part is not module}
    return [module for module in modules if id(module) not in inside]


def recompute(block: nn.Module) -> None:
    """Have a module keep its inputs alone, and run again in the backward pass, with the same random numbers.

    Its `forward` is a bound method, which copies and other processes bind to their own module.
    """
    own = vars(block).get("forward")
    if getattr(own, "__func__", None) is _recomputed:
        return
    if own is not None:
        block._forward_once = own
    block.forward = MethodType(_recomputed, block)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = getattr(block, "_forward_once", None) or MethodType(type(block).forward, block)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, block), **kwargs)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For the forward pass, and for when it is run again."""
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    return nullcontext(), _statistics_stay(norms)


@contextmanager
def _statistics_stay(norms: list[_BatchNorm]) -> Iterator[None]:
    """BatchNorm's running statistics have seen this batch in the forward pass already."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm, _, count in before:
            norm.momentum = 0.0
            norm.num_batches_tracked = None if count is None else count.clone()
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum = momentum
            norm.num_batches_tracked = count
