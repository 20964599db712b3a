"""Puts back everything of the caller's that running training steps changes, bit for bit, however the steps ended."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _python_dispatch

from autobatch.errors import InvalidInput
from autobatch.workload.reach import Reach, reach


@contextmanager
def preserved(*objects: Any, tensors: bool = True, device: torch.device | None = None) -> Iterator[None]:
    """Leave the caller's objects as they were: after success, an exception, running out of memory or Ctrl-C.

    Modules, optimizers and random generators are found in `objects` and in what those hold: a `TrainingStep` or any
    other object, bound methods, partials, closures, and modules that a function uses by a global name. Kept are: every
    attribute of the modules and optimizers (train/eval flags, hooks, caches, lazily made optimizer state; containers in
    them too), gradients (the same tensor objects, or None), `requires_grad`, tensor hooks, and random state: Python's,
    NumPy's, torch's on the CPU and on all GPUs, and that of every generator found (such as a DataLoader's). Likewise
    grad mode, the default dtype and cuDNN's flags.

    Args:
        tensors: also keep what is in parameters, buffers, other tensors of the modules, and optimizer state; gradients
            are None for the duration, and take no memory on a GPU. Without it nothing is copied: for work that does not
            write to tensors, or within another `preserved` that has it.
        device: run there. Parameters, buffers and optimizer state that lie elsewhere are there for the duration, as
            `model.to(device)` would put them, and their originals are not touched; those already there are copied to
            the host and back. A CUDA device has its index.

    Raises:
        InvalidInput: a tensor subclass that wraps other tensors (such as DTensor) lies on another device.
        RuntimeError: the device has no room for the model, in torch's words; everything is as it was.
    """
    undo = ExitStack()
    try:
        try:
            with sigint_deferred():
                _keep_rng(undo)
                _keep_settings(undo)
                _keep_objects(undo, reach(objects), tensors or device is not None, device)
            yield
        finally:
            with sigint_deferred():
                undo.close()
    finally:  # a Ctrl-C that struck before the shield was up; nothing is left to do otherwise
        with sigint_deferred():
            undo.close()


@contextmanager
def sigint_deferred() -> Iterator[None]:
    """Hold Ctrl-C back until the end of the block. Only the main thread receives it."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    pending: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: pending.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if pending:
            signal.raise_signal(signal.SIGINT)


_MUTABLE = {dict, OrderedDict, defaultdict, list, set, deque}


# Each of these notes down how to undo a change before the change is made.


def _keep_rng(undo: ExitStack) -> None:
    undo.callback(random.setstate, random.getstate())
    if numpy := sys.modules.get("numpy"):
        undo.callback(numpy.random.set_state, numpy.random.get_state())
    undo.callback(torch.set_rng_state, torch.get_rng_state())
    if torch.cuda.is_initialized():  # asking for the state would initialise it
        undo.callback(torch.cuda.set_rng_state_all, torch.cuda.get_rng_state_all())


def _keep_settings(undo: ExitStack) -> None:
    undo.callback(torch.set_grad_enabled, torch.is_grad_enabled())
    undo.callback(torch.set_default_dtype, torch.get_default_dtype())
    for flag in ("benchmark", "deterministic", "enabled"):
        undo.callback(setattr, torch.backends.cudnn, flag, getattr(torch.backends.cudnn, flag))


def _keep_generator(undo: ExitStack, generator: Any) -> None:
    if isinstance(generator, torch.Generator):
        undo.callback(generator.set_state, generator.get_state())
    elif isinstance(generator, random.Random):
        if not isinstance(generator, random.SystemRandom):  # it has no state
            undo.callback(generator.setstate, generator.getstate())
    elif hasattr(generator, "bit_generator"):
        undo.callback(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    else:
        undo.callback(generator.set_state, generator.get_state())


def _keep_objects(undo: ExitStack, found: Reach, values: bool, device: torch.device | None) -> None:
    for generator in found.generators:
        _keep_generator(undo, generator)
    for module in found.modules:
        _keep_containers(undo, vars(module), depth=2)
    for optimizer in found.optimizers:
        _keep_containers(undo, vars(optimizer), depth=5)  # as deep as param_groups > group > params > one of a list
    registered = _unique(_registered_tensors(found))
    for tensor in registered:
        _keep_leaf(undo, tensor, set_grad_aside=values)
    if not values:
        return
    movable = registered + _unique(_optimizer_tensors(found.optimizers, movable=True))
    kept = _Values(undo, device)
    for tensor in _unique(movable):
        kept.move(tensor)
    loose = [held for module in found.modules for held in _tensors_in(vars(module), depth=2)]
    moved = {id(tensor) for tensor in movable}
    for tensor in _unique(loose + list(_optimizer_tensors(found.optimizers, movable=False))):
        if id(tensor) not in moved:
            kept.keep(tensor)
    for module in found.modules:
        if isinstance(module, nn.RNNBase) and kept.was_moved(module.parameters()):
            module.flatten_parameters()


def _registered_tensors(found: Reach) -> Iterator[Tensor]:
    for module in found.modules:
        yield from module.parameters(recurse=False)
        yield from module.buffers(recurse=False)
    for optimizer in found.optimizers:
        for group in optimizer.param_groups:
            yield from group["params"]


def _optimizer_tensors(optimizers: list[Optimizer], movable: bool) -> Iterator[Tensor]:
    """Tensors of the optimizer's state: those that lie with the parameters, or the others (Adam's count of steps)."""
    for optimizer in optimizers:
        counts_on_device = any(group.get("capturable") or group.get("fused") for group in optimizer.param_groups)
        for state in optimizer.state.values():
            for name, value in state.items() if isinstance(state, dict) else ():
                if (name != "step" or counts_on_device) == movable:
                    yield from _tensors_in(value, depth=2)


def _tensors_in(value: Any, depth: int) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif depth and isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item, depth - 1)


def _unique(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _keep_containers(undo: ExitStack, container: Any, depth: int) -> None:
    """Keep what is in a container and in the containers within it: the same objects, in the same order."""
    if not depth or type(container) not in _MUTABLE:  # a subclass may have rules of its own
        return
    undo.callback(_put_back, container, container.copy())
    for value in container.values() if isinstance(container, dict) else container:
        _keep_containers(undo, value, depth - 1)


def _put_back(container: Any, copy: Any) -> None:
    if _identities(container) == _identities(copy):
        return  # another thread may be reading it
    container.clear()
    if isinstance(container, (dict, set)):
        container.update(copy)
    else:
        container.extend(copy)


def _identities(container: Any) -> list[int]:
    """What is in it, in order, by identity: `==` means something else to tensors."""
    return [*map(id, container), *map(id, container.values() if isinstance(container, dict) else ())]


_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _keep_leaf(undo: ExitStack, tensor: Tensor, set_grad_aside: bool) -> None:
    """Keep a parameter's or buffer's gradient, flag, attributes and hooks."""
    _keep_containers(undo, vars(tensor), depth=2)
    for name in _TENSOR_HOOKS:
        hooks = getattr(tensor, name)
        _keep_containers(undo, hooks, depth=1)
        undo.callback(_put_back_attribute, tensor, name, hooks)
    if not tensor.is_leaf:
        return
    undo.callback(_put_back_leaf, tensor, tensor.requires_grad)
    grad = tensor.grad
    undo.callback(setattr, tensor, "grad", grad)
    if set_grad_aside and grad is not None:
        tensor.grad = None
        if _owns_its_storage(grad) and grad.device.type != "cpu":
            undo.callback(_to_device, grad, grad.device)
            _to_device(grad, torch.device("cpu"))


def _put_back_leaf(tensor: Tensor, requires_grad: bool) -> None:
    if not tensor.is_leaf:  # written to in place, in a forward pass
        tensor.detach_()
    tensor.requires_grad_(requires_grad)


def _wraps_tensors(tensor: Any) -> bool:
    """Whether it is a tensor subclass that wraps other tensors, and has no memory of its own."""
    return _python_dispatch.is_traceable_wrapper_subclass(tensor)


def _put_back_attribute(tensor: Tensor, name: str, value: Any) -> None:
    if getattr(tensor, name) is not value:
        setattr(tensor, name, value)


def _owns_its_storage(tensor: Tensor) -> bool:
    """Whether no other tensor can share the memory (as the gradients in a DistributedDataParallel bucket do)."""
    if tensor.layout is not torch.strided or _wraps_tensors(tensor):
        return False
    return not tensor._is_view() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


def _to_device(tensor: Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)


class _Values:
    """Keeps what is in tensors: storages that stay in place are copied to the host, once each; others are swapped."""

    def __init__(self, undo: ExitStack, device: torch.device | None) -> None:
        self._undo = undo
        self._device = device
        self._storages: set[tuple[str, int]] = set()
        self._moved: set[int] = set()

    def move(self, tensor: Tensor) -> None:
        """Put a tensor on the device for the duration, if it lies elsewhere; its own memory is not touched."""
        if self._device is None or tensor.device == self._device or tensor.is_meta:
            self.keep(tensor)
            return
        if _wraps_tensors(tensor):
            raise InvalidInput(
                f"a {type(tensor).__name__} lies on {tensor.device} and cannot be taken to {self._device} and back. "
                f'Move the model there first: model.to("{self._device}").'
            )
        original = tensor.data
        self._undo.callback(setattr, tensor, "data", original)
        tensor.data = original.to(self._device, copy=True)
        self._moved.add(id(tensor))

    def keep(self, tensor: Tensor) -> None:
        """Copy what is in a tensor, to be written back in place."""
        if _wraps_tensors(tensor):
            for name in tensor.__tensor_flatten__()[0]:  # type: ignore[attr-defined]
                self.keep(getattr(tensor, name))
        elif tensor.layout is not torch.strided:
            self._undo.callback(setattr, tensor, "data", tensor.detach().clone())
        elif not tensor.is_meta:
            self._undo.callback(setattr, tensor, "data", tensor.data)  # it may be pointed at other memory
            storage = tensor.untyped_storage()
            key = (str(storage.device), storage.data_ptr())
            if key not in self._storages and storage.nbytes():
                self._storages.add(key)
                copy = torch.UntypedStorage(storage.nbytes())
                self._undo.callback(storage.copy_, copy.copy_(storage))

    def was_moved(self, tensors: Iterable[Tensor]) -> bool:
        return any(id(tensor) in self._moved for tensor in tensors)
