"""Sends a workload to another process: objects through cloudpickle, tensor storages as raw bytes behind them.

Storages go straight from memory into a pipe and from the pipe into memory, so that the receiver holds each of them once
and no file is written. Tied weights stay tied; storages on other devices arrive on the CPU.
"""

from __future__ import annotations

import ctypes
import io
import pickle
from collections.abc import Collection
from functools import partial
from typing import Any, BinaryIO

import cloudpickle
import torch
from torch import nn
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from autobatch.errors import WorkloadNotPortable
from autobatch.workload import operators

_StorageId = tuple[int, int, "torch.dtype | None", bool]
"""Its number, its bytes, its type where it has one, and whether its bytes are sent."""


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    def __init__(self, stream: BinaryIO, without: Collection[int]) -> None:
        super().__init__(stream, protocol=pickle.HIGHEST_PROTOCOL)
        self._without = without
        self.storages: dict[int, torch.UntypedStorage] = {}
        self._numbers: dict[int, int] = {}

    def persistent_id(self, obj: object) -> _StorageId | None:
        """Name a storage by its number instead of pickling it."""
        if isinstance(obj, torch.storage.TypedStorage):
            storage, dtype = obj._untyped_storage, obj.dtype
        elif isinstance(obj, torch.UntypedStorage):
            storage, dtype = obj, None
        else:
            return None
        number = self._numbers.setdefault(storage._cdata, len(self._numbers))
        self.storages[number] = storage  # held, so that its address is not given to another one
        return number, storage.nbytes(), dtype, storage._cdata not in self._without

    def reducer_override(self, obj: Any) -> Any:
        if obj is torch.ops:  # which functions refer to as a submodule, but which is none
            return getattr, (torch, "ops")
        name = getattr(obj, "__name__", "")
        if isinstance(obj, type) and vars(torch._C).get(name) is obj:  # such as torch.nn.attention.SDPBackend
            return getattr, (torch._C, name)
        if isinstance(obj, FakeTensor):  # kept by the user's own code when its inputs were proved
            return partial(torch.empty, dtype=obj.dtype, device="meta"), (tuple(obj.shape),)
        if isinstance(obj, CustomOpDef):
            return operators.reduced(obj)
        if isinstance(obj, Optimizer):  # which leaves out attributes of its own
            return _rebuild_optimizer, (type(obj), obj.__getstate__() | _own_attributes(obj))
        # torch forbids pickling parametrized modules because their class is made at run time; it can be made again.
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            return _rebuild_parametrized, (type(obj).__mro__[1], obj.__dict__, list(obj.parametrizations))  # type: ignore[arg-type]
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: BinaryIO) -> None:
        super().__init__(stream)
        self.storages: dict[int, torch.UntypedStorage] = {}

    def persistent_load(self, pid: _StorageId) -> object:
        number, size, dtype, has_bytes = pid
        if number not in self.storages:
            self.storages[number] = torch.UntypedStorage(size, device="cpu" if has_bytes else "meta")
        storage = self.storages[number]
        return (
            storage if dtype is None else torch.storage.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)
        )


def _rebuild_parametrized(cls: type[nn.Module], state: dict[str, Any], names: list[str]) -> nn.Module:
    module: nn.Module = cls.__new__(cls)
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


def _own_attributes(optimizer: Optimizer) -> dict[str, Any]:
    """What the user's own class has put there beside what torch does."""
    # A learning-rate scheduler's wrapper around `step` counts calls for it, and holds a weak reference.
    wrapped = {name for name, value in vars(optimizer).items() if hasattr(value, "_wrapped_by_lr_sched")}
    return {name: value for name, value in vars(optimizer).items() if not name.startswith("_") and name not in wrapped}


def _rebuild_optimizer(cls: type[Optimizer], state: dict[str, Any]) -> Optimizer:
    optimizer: Optimizer = cls.__new__(cls)
    optimizer.__setstate__(state)
    return optimizer


def _memory_of(storage: torch.UntypedStorage) -> memoryview:
    return memoryview((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())).cast("B")


def hooks_left_behind(model: nn.Module) -> str:
    """A sentence about the hooks on parameters, which pickle leaves out; "" where there are none."""
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None)
    ]
    if not names:
        return ""
    named = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return (
        f"the hooks on parameters ({named}) did not run, as they cannot be sent to another process: the gradients are "
        "held until the optimizer's step, also where a hook would use and free them in the backward pass, and what "
        "hooks allocate is not counted."
    )


def dump(obj: object, stream: BinaryIO, without: Collection[int] = ()) -> None:
    """Write `obj` to `stream`, for `load` in another process.

    Of the storages in `without` (their `_cdata`) only the size is sent: their tensors arrive on the meta device.

    Raises:
        WorkloadNotPortable: something in it cannot be pickled; nothing has been written then.
    """
    objects = io.BytesIO()
    pickler = _Pickler(objects, without)
    try:
        pickler.dump((operators.of_the_script(), obj))
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, pickle.PicklingError) as error:
        raise WorkloadNotPortable(
            f"the workload cannot be sent to the process that runs it: {error}. "
            "Keep open files, locks, threads and generators out of the model, the data and the loss, "
            "or make them when they are first used."
        ) from error
    pickle.dump((objects.getbuffer().nbytes, operators.schemas()), stream)
    stream.write(objects.getbuffer())
    for storage in pickler.storages.values():
        if storage.nbytes() and storage._cdata not in without:
            on_host = storage.cpu()  # held while it is written: a copy, where it was on another device
            stream.write(_memory_of(on_host))
    stream.flush()


def load(stream: BinaryIO) -> Any:
    """Read what `dump` wrote. What the objects' own modules raise while they are imported passes through."""
    size, schemas = pickle.load(stream)
    objects = stream.read(size)
    while True:
        unpickler = _Unpickler(io.BytesIO(objects))
        try:
            _, obj = unpickler.load()
            break
        except RuntimeError as error:
            if not operators.define_if_missing(error, schemas):
                raise
    for _, storage in sorted(unpickler.storages.items()):
        if storage.nbytes() and storage.device.type != "meta":
            view, done = _memory_of(storage), 0
            while done < len(view):
                count = stream.readinto(view[done:])  # type: ignore[attr-defined]
                if not count:
                    raise EOFError("the workload was cut off on its way")
                done += count
    return obj
