"""Proof by fake tensors: run a piece of a training step on shapes alone, without memory, arithmetic or side effects."""

from __future__ import annotations

import copy
import functools
import logging
import sys
import types
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch.overrides import TorchFunctionMode

from autobatch.batches import map_arrays
from autobatch.workload.grouped import GroupedMatmul

_BEYOND_FAKES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)
_BEYOND_FAKES_WORDS = ("FakeTensor", "tensor subclass", "data pointer", "fake")
"""In the message of a RuntimeError: the code reads a tensor's memory, which a fake tensor does not have."""


@dataclass(frozen=True)
class Proof:
    """How a run on fake tensors ended."""

    value: Any = None
    """What the code returned, its tensors fake, where it ran."""
    error: BaseException | None = None
    """Why it does not run, or None."""
    undecided: bool = False
    """The code looks at values, which fake tensors do not have: it may or may not run."""

    @property
    def holds(self) -> bool:
        """Whether the code ran."""
        return self.error is None

    @property
    def reason(self) -> str:
        """The error in one line."""
        text = str(self.error).strip().splitlines()
        return f"{type(self.error).__name__}: {text[0][:200]}" if text else type(self.error).__name__


class Prover:
    """Runs code against a shadow of a model, whose parameters and buffers are fake; the model itself is never
    touched."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._mode = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
        self._device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
        self._fakes: dict[int, Tensor] = {}

    def run(self, code: Callable[..., Any], *batches: Any, training: bool = True) -> Proof:
        """`code(shadow, *batches)` with fake tensors and gradients, in training mode or, for the shapes alone, in
        evaluation mode, which looks at values less often."""
        try:
            with _quiet(), torch.enable_grad(), _collections_kept(self.model), uncompiled(self.model):
                shadow = Shadows(self._fake).of(self.model)
                if shadow.training != training:
                    shadow.train(training)
                with self._mode, GroupedMatmul(), _OneTimeStep():
                    fakes = [map_arrays(self._fake_input, batch) for batch in batches]
                    return Proof(code(shadow, *fakes))
        except _BEYOND_FAKES as error:
            return Proof(error=error, undecided=True)
        # A wrong guess may fail in any way, and a model may call exit; what went wrong is in the proof.
        except (Exception, SystemExit) as error:  # noqa: BLE001
            return Proof(error=error, undecided=_reads_memory(error))

    def _fake(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._fakes:
            self._fakes[id(tensor)] = self._mode.from_tensor(self._somewhere(tensor), static_shapes=True)
        return self._fakes[id(tensor)]

    def _somewhere(self, tensor: Tensor) -> Tensor:
        """A tensor on the meta device as if it were where the others are."""
        if not tensor.is_meta:
            return tensor
        with self._mode:
            fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self._device)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def _fake_input(self, leaf: Any) -> Any:
        return self._mode.from_tensor(leaf, static_shapes=True).to(self._device) if isinstance(leaf, Tensor) else leaf


def uncompiled(model: nn.Module) -> AbstractContextManager[object]:
    """Have compiled modules run as they were written: compiled kernels would read the memory that fakes do not have."""
    if any(getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return nullcontext()


def _is_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to it: its hooks belong to the model itself, also when a shadow calls them."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # else nothing was
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


def _reads_memory(error: BaseException) -> bool:
    return isinstance(error, (RuntimeError, NotImplementedError, TypeError)) and any(
        word in str(error) for word in _BEYOND_FAKES_WORDS
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and torch's log of what does not run on fake tensors away from the user: wrong guesses are
    expected."""
    log = logging.getLogger(fake_tensor.__name__)
    disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = disabled


@contextmanager
def _collections_kept(model: nn.Module) -> Iterator[None]:
    """Take what the model's hooks collect during a proof out of their lists, dicts and sets again: it is fake."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooks = [hook for module in model.modules() for table in tables for hook in getattr(module, table).values()]
    kept = [(held, copy.copy(held)) for hook in hooks for held in _collections_of(hook)]
    try:
        yield
    finally:
        for held, before in kept:
            if isinstance(held, list):
                held[:] = before
            else:
                held.clear()
                held.update(before)


def _collections_of(hook: Any) -> Iterator[Any]:
    """The lists, dicts and sets that a hook knows: in its closure, its defaults, its object, or as global variables."""
    if isinstance(hook, functools.partial):
        known = [*hook.args, *hook.keywords.values(), *_collections_of(hook.func)]
    elif isinstance(hook, types.MethodType):
        known = [*vars(hook.__self__).values()] if hasattr(hook.__self__, "__dict__") else []
    elif isinstance(hook, types.FunctionType):
        known = [*map(hook.__globals__.get, hook.__code__.co_names), *(hook.__defaults__ or ())]
        for cell in hook.__closure__ or ():
            with suppress(ValueError):  # a variable that has no value yet
                known.append(cell.cell_contents)
    else:
        known = [*getattr(hook, "__dict__", {}).values()]
    return (value for value in known if type(value) in (list, dict, set, OrderedDict, defaultdict))


class _OneTimeStep(TorchFunctionMode):
    """Runs recurrent layers for one time step and repeats its output: the shapes are the same, and a fake step costs
    as much as a real one, hundreds of times over."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recurrent = getattr(func, "__name__", "") in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        if not recurrent or not isinstance(args[3], bool):  # packed sequences have their weights there
            return func(*args, **(kwargs or {}))
        dim = 1 if args[-1] else 0
        output, *states = func(args[0].narrow(dim, 0, 1), *args[1:])
        repeats = [1] * output.ndim
        repeats[dim] = args[0].shape[dim]
        return (output.repeat(repeats), *states)


class Shadows:
    """Copies of modules that share nothing mutable with the originals and hold other tensors.

    `copy.deepcopy` would also copy what a module merely refers to, such as a trainer or a data set.
    """

    def __init__(self, replace: Callable[[Tensor], Tensor]) -> None:
        self._replace = replace
        self._done: dict[int, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            raise fake_tensor.UnsupportedFakeTensorException("TorchScript does not run on fake tensors")
        if _is_sharded(module):
            raise fake_tensor.UnsupportedFakeTensorException("fully_shard would gather fake tensors into the model")
        if id(module) not in self._done:
            shadow = self._done[id(module)] = object.__new__(type(module))
            shadow.__dict__.update((name, self._value(value)) for name, value in module.__dict__.items())
        return self._done[id(module)]

    def _value(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._replace(value)
        if isinstance(value, nn.Module):
            return self.of(value)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._value(item)) for key, item in value.items())
        if type(value) in (list, tuple, set):
            return type(value)(self._value(item) for item in value)
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return types.MethodType(value.__func__, self.of(value.__self__))
        return value
