"""A torch device that is not there: tensors on it have shapes, but no memory and no kernels.

It is PyTorch's slot for other accelerators (PrivateUse1), which treats operators as CUDA does where the CPU differs:
dropout keeps a mask of booleans, BatchNorm and LayerNorm keep their statistics, LSTM cells are fused. It can be made
once in a process, and not undone: so only processes of our own import this module and call `make`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration

from autobatch.prediction import attention, autocast, fused, layouts, packed, recurrent

NAME = "sim"
DEVICE = f"{NAME}:0"


class _Module(backend_registration._DummyBackendModule):
    """What `torch.sim` offers."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


@cache
def make() -> FakeTensorMode:
    """Make the device, and the mode under which its tensors are made and used; once in a process."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, _Module())
    _autocast_as_cuda()
    autocast.install(NAME)
    recurrent.install(NAME)
    packed.install()
    attention.install()
    fused.install()
    layouts.install()
    return FakeTensorMode(allow_non_fake_inputs=True)


def _autocast_as_cuda() -> None:
    """Have `torch.autocast("cuda")` and questions about it mean the stand-in device, also in decorators to come."""
    begin = torch.autocast.__init__

    def begin_here(self: torch.autocast, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, _renamed(device_type).partition(":")[0], *args, **kwargs)

    torch.autocast.__init__ = begin_here  # type: ignore[method-assign]
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        setattr(torch, name, partial(_asked, getattr(torch, name)))
    torch.get_autocast_gpu_dtype = partial(torch.get_autocast_dtype, NAME)


def _asked(question: Callable[[str], Any], device_type: str = "cuda") -> Any:
    return question(NAME if device_type == "cuda" else device_type)


@contextmanager
def spoken_as_cuda() -> Iterator[None]:
    """What `torch.cuda` and the optimizers say where there is a GPU, while a step is traced."""
    there: dict[str, Any] = {
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_capability": lambda device=None: attention.capability(),
        "is_current_stream_capturing": lambda: False,
        "synchronize": lambda device=None: None,
        "empty_cache": lambda: None,
    }
    with ExitStack() as stack:
        for name, answer in there.items():
            stack.enter_context(patch.object(torch.cuda, name, answer))
        for module in list(sys.modules.values()):
            # The multi-tensor kernels, which hold a copy of all parameters for a moment: the choice on CUDA.
            if "_default_to_fused_or_foreach" in getattr(module, "__dict__", {}):
                stack.enter_context(patch.object(module, "_default_to_fused_or_foreach", _multi_tensor))
        yield


def _multi_tensor(params: Any, differentiable: bool, use_fused: bool = False) -> tuple[bool, bool]:
    return False, not differentiable


class Spelled(TorchFunctionMode):
    """Understands code that was written for CUDA: its device is the stand-in's.

    `torch.tensor(values, device=...)` makes its tensor below the reach of modes; here it is made on the host and moved.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {key: _renamed(value) for key, value in (kwargs or {}).items()}
        args = tuple(_renamed(value) for value in args)
        if func is Tensor.cuda:
            return args[0].to(DEVICE)
        if func == _IS_CUDA:
            return args[0].device.type == NAME
        if func is Tensor.new_tensor:
            like, values = args[:2]
            return torch.tensor(values, dtype=kwargs.get("dtype", like.dtype)).to(kwargs.get("device", like.device))
        if func in _FROM_VALUES:
            device = kwargs.pop("device", None)
            if device is not None and torch.device(device).type == NAME:
                return func(*args, **kwargs).to(device)
            return func(*args, **kwargs) if device is None else func(*args, device=device, **kwargs)
        return func(*args, **kwargs)


_IS_CUDA = Tensor.is_cuda.__get__  # type: ignore[attr-defined]
_FROM_VALUES = (torch.tensor, torch.as_tensor, torch.asarray)


def _renamed(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == "cuda":
        return torch.device(DEVICE)
    return DEVICE if isinstance(value, str) and (value == "cuda" or value.startswith("cuda:")) else value


class Fakes:
    """Fake tensors on the stand-in device for real ones, the same for the same; what shares memory goes on doing so."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._fakes: dict[int, Tensor] = {}
        self._storages: dict[int, Tensor] = {}
        self._held: list[Tensor] = []

    def of(self, tensor: Tensor) -> Tensor:
        """The fake of a tensor; parameters stay parameters."""
        if id(tensor) not in self._fakes:
            self._held.append(tensor)  # so that its id is not used again
            fake = self._make(tensor.detach())
            self._fakes[id(tensor)] = (
                nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
            )
        return self._fakes[id(tensor)]

    def _make(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        whole = self._storages.get(storage._cdata)
        with self._mode:
            if whole is None:
                whole = torch.empty(storage.nbytes(), dtype=torch.uint8, device=DEVICE)
                self._storages[storage._cdata] = whole
            typed = torch.empty(0, dtype=tensor.dtype, device=DEVICE)
            return typed.set_(whole.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
