"""Watches a step on the stand-in device: every storage's birth and death, and where in the user's code it was made."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as module_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from autobatch.prediction.affine import Run, Section
from autobatch.prediction.kernels import Call
from autobatch.prediction.layouts import CONVOLUTIONS, as_cudnn_leaves_them
from autobatch.prediction.obstacles import Obstacle
from autobatch.prediction.packed import PACK, pack
from autobatch.prediction.rules import hidden_in
from autobatch.prediction.stand_in import NAME
from autobatch.prediction.trace import ACCUMULATION, Category, HiddenCall, Phase, Site, Trace
from autobatch.prediction.values import DEPENDS_ON_VALUES, Values
from autobatch.workload import runner
from autobatch.workload.grouped import GROUPED_MM, grouped_mm

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
_BELOW_THE_USERS = (runner.__file__, str(Path(__file__).with_name("tracer.py")))
_CAST = torch.ops.aten._to_copy.default
_ITEM = torch.ops.aten._local_scalar_dense.default
_ADD = torch.ops.aten.add.Tensor
_AS_LIST = Tensor.tolist


class Recorder(TorchDispatchMode):
    """Records all that happens while it is active; see `trace`.

    Args:
        model: the model, whose modules are told apart.
        values: real tensors beside the fake ones, where the step needs them.
    """

    def __init__(self, model: nn.Module, values: Values | None = None) -> None:
        super().__init__()
        self._model = model
        self._values = values
        self._uses_once = _uses_of_a_gradient_held_once()
        self.phase = Phase.SETUP
        self.samples = 0
        """Those of the micro-batch that is running, or ran last."""
        self.events: list[int] = []
        self._sizes: list[int] = []
        self._made: list[tuple[str, str, str, Phase]] = []
        self._categories: dict[int, Category] = {}
        self._owners: dict[int, str] = {}
        self._alive: dict[int, int] = {}
        """Numbers of living storages, by address."""
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._stack: list[str] = []
        self._made_in: dict[int, tuple[str, str]] = {}
        """Module and line that made an autograd node, by its number: those of what runs in its backward pass."""
        self._hidden: list[HiddenCall] = []
        self._sections = [Section(0, 0, 0, 0)]
        self.failed: Obstacle | None = None
        """The operator that raised something."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _ITEM and self.phase is Phase.OPTIMIZER:
            return 1  # a step count: no bytes depend on it
        if func is _CAST and isinstance(args[0], FakeTensor) and _is_on_device(kwargs.get("device")):
            args[0].constant = None  # its value is known on the host, and would be moved by kernels that are not there
        if torch.is_grad_enabled():
            # The node was made just before. One that recomputes an activation has a number of its own.
            self._made_in.setdefault(torch._C._autograd._get_sequence_nr() - 1, self._where())
        if func is _ADD and (_accumulates_gradients() or self._adds_up_gradients(*args)):
            return args[0].add_(args[1])  # as the engine does itself with tensors that are no subclass, like fakes
        if func is PACK and self._values is not None and (lengths := self._values.run(_AS_LIST, args[1:2], {})):
            with self:  # what it is made of is recorded
                return pack(args[0], lengths, *args[2:])
        real = None
        try:
            result = (grouped_mm if func is GROUPED_MM else func)(*args, **kwargs)
            if self._values is not None and self._values.worth_computing(result):
                real = self._values.run(func, args, kwargs)
        except DEPENDS_ON_VALUES:
            real = self._values.run(func, args, kwargs) if self._values is not None else None
            if self._values is None or real is None:
                self.failed = Obstacle(str(func), *self._where())
                raise
            result = self._values.fakes_of(real, _device_of(args, kwargs))
        except Exception:
            self.failed = Obstacle(str(func), *self._where())
            raise
        if func in CONVOLUTIONS:
            result = as_cudnn_leaves_them(func, args, result)
        if self._values is not None:
            self._values.match(result, real)
        category = Category.CAST_COPY if func is _CAST and self._is_parameter(args[0]) else None
        operator = str(func)
        tensors = tuple(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        for tensor in tensors:
            self.see(tensor, operator, category)
        if tensors and tensors[0].device.type == NAME:
            for hidden in hidden_in(Call(operator, args, kwargs, tensors)):
                site = Site(operator, *self._where(), self.phase, Category.WORKSPACE)
                self._hidden.append(HiddenCall(len(self.events), site, hidden.rule, hidden.numbers))
        return result

    def _is_parameter(self, tensor: Tensor) -> bool:
        number = self._alive.get(tensor.untyped_storage()._cdata)
        return number is not None and self._categories.get(number) is Category.PARAMETER

    def see(self, tensor: Tensor, operator: str, category: Category | None = None) -> None:
        """Note the storage of a tensor, if it is a new one on the device."""
        if tensor.device.type != NAME:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._alive:
            return
        number = len(self._sizes)
        self._alive[address] = number
        self._sizes.append(storage.nbytes())
        operator = ACCUMULATION if _accumulates_gradients() else operator
        self._made.append((operator, *self._where(), self.phase))
        if category is not None:
            self._categories[number] = category
        self.events.append(number)
        weakref.finalize(storage, self._died, address)

    def is_a(self, tensors: Any, category: Category, module: str = "") -> None:
        """Say what living tensors are for, and whose they are where no module made them."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._alive:
                number = self._alive[tensor.untyped_storage()._cdata]
                self._categories.setdefault(number, category)
                self._owners.setdefault(number, module)

    def enter(self, phase: Phase, samples: int = 0) -> None:
        """Say where in the step the model is. What the forward pass leaves for the backward pass is saved.

        Args:
            phase: what begins.
            samples: those of the micro-batch that begins with `Phase.BATCH`.
        """
        if phase in (Phase.BATCH, Phase.OPTIMIZER):
            self._sections.append(Section(samples, len(self.events), len(self._sizes), len(self._hidden)))
        if phase is Phase.BATCH:
            self.samples = samples
        if phase is Phase.BACKWARD:
            for number in self._alive.values():
                if self._made[number][3] in (Phase.FORWARD, Phase.LOSS):
                    self._categories.setdefault(number, Category.SAVED)
        self.phase = phase

    def run(self) -> Run:
        """What was recorded, with its sections."""
        return Run(self.trace(), tuple(self._sections))

    def trace(self) -> Trace:
        """What was recorded."""
        inputs = {Phase.BATCH: Category.INPUT}
        sites = tuple(
            Site(
                operator,
                module or self._owners.get(i, ""),
                line,
                phase,
                self._categories.get(i, inputs.get(phase, Category.TEMPORARY)),
            )
            for i, (operator, module, line, phase) in enumerate(self._made)
        )
        return Trace(sites, tuple(self._sizes), tuple(self.events), tuple(self._hidden))

    @contextmanager
    def following_modules(self) -> Iterator[None]:
        """Follow which module's forward is running. The hooks are global: only in a process of our own."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(self._paths.get(id(module), type(module).__name__))
            if module is self._model and self.phase is Phase.LOSS:
                self.phase = Phase.FORWARD  # a step may run its model more than once

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()
            if module is self._model and self.phase is Phase.FORWARD:
                self.phase = Phase.LOSS

        before = module_hooks.register_module_forward_pre_hook(enter)
        after = module_hooks.register_module_forward_hook(leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _where(self) -> tuple[str, str]:
        """The module that is running, or whose backward pass is, and the line."""
        if not self._stack:  # in the backward pass there is one where checkpointing runs modules again
            node: Any = torch._C._current_autograd_node()
            if node is not None:
                return self._made_in.get(node._sequence_nr(), ("", ""))
        return self._stack[-1] if self._stack else "", _line()

    def _adds_up_gradients(self, held: Any, new: Any) -> bool:
        """Whether the autograd engine adds a gradient to one that nobody else holds (`InputBuffer::accumulate`)."""
        return (
            self.phase is Phase.BACKWARD
            and not self._stack
            and isinstance(held, Tensor)
            and isinstance(new, Tensor)
            and (held.shape, held.dtype) == (new.shape, new.dtype)
            and not _line()
            and held._use_count() <= self._uses_once  # type: ignore[attr-defined]
        )

    def _died(self, address: int) -> None:
        self.events.append(~self._alive.pop(address))


def _accumulates_gradients() -> bool:
    node: Any = torch._C._current_autograd_node()
    return node is not None and node.name() == "torch::autograd::AccumulateGrad"


@cache
def _uses_of_a_gradient_held_once() -> int:
    """References to a gradient that only the engine holds, as they are counted in a dispatch mode."""

    class Counting(TorchDispatchMode):
        uses = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is _ADD:
                self.uses = args[0]._use_count()
            return func(*args, **(kwargs or {}))

    counting = Counting()
    with _disable_current_modes(), torch.enable_grad():
        once = torch.ones(2, requires_grad=True).exp()
        total = torch.stack([once.sin(), once.cos()]).sum()
        with counting:
            total.backward()
    return counting.uses


def _device_of(*arguments: Any) -> torch.device:
    """Where an operator with these arguments runs."""
    tensors = (leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
    return torch.device(NAME, 0) if any(tensor.device.type == NAME for tensor in tensors) else torch.device("cpu")


def _is_on_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == NAME


def _line() -> str:
    """`file:line` of the innermost frame of the user's code: neither torch's nor ours."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename not in _BELOW_THE_USERS:
        if not frame.f_code.co_filename.startswith(_NOT_THE_USERS):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
