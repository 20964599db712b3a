"""The knobs: what can be changed about a training step, as data.

A knob's first value, `PLAIN`, is the step as the caller has it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

from autobatch.errors import InvalidInput
from autobatch.tuning import channels_last, optimizers
from autobatch.workload.blocks import recompute, repeated_blocks
from autobatch.workload.checkpointing import switch_checkpointing
from autobatch.workload.proof import Prover
from autobatch.workload.recipes import prove_loss
from autobatch.workload.runner import make_optimizer
from autobatch.workload.state import preserved
from autobatch.workload.step import TrainingStep

PLAIN = "plain"


@dataclass(frozen=True)
class Situation:
    """A training step, on a kind of device: what decides which knobs there are."""

    step: TrainingStep
    device: str
    """"cpu" or "cuda"."""

    @property
    def model(self) -> nn.Module:
        """The model as it was written, also where it is compiled."""
        return getattr(self.step.model, "_orig_mod", self.step.model)

    @cached_property
    def optimizer(self) -> Optimizer:
        """The step's optimizer, or one as it would make it."""
        with preserved(self.step, tensors=False):
            return make_optimizer(self.step)

    @cached_property
    def attends(self) -> bool:
        """Whether the model calls torch's scaled_dot_product_attention; looked at on fake tensors."""
        watch = _Watch()

        def loss(model: nn.Module, batch: Any) -> Tensor:
            with watch:
                return self.step.compute_loss(model, batch)

        prove_loss(Prover(self.model), loss, self.step.make_batch(self.step.min_micro_batch))
        return watch.seen


class _Watch(TorchFunctionMode):
    """Looks for calls of scaled_dot_product_attention."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Knob:
    """One thing that can be changed about a training step."""

    name: str
    changes: str
    """What it changes, in a sentence."""
    values: tuple[str, ...]
    """The first is the step as it is."""
    obstacle: Callable[[Situation, str], str | None]
    """Why a value cannot be used on a step there, in a few words; None if it can."""
    apply: Callable[[ExitStack, TrainingStep, str], TrainingStep]
    """The step with that value. Modules and optimizers may be changed in their attributes and hooks, which whoever
    applies it puts back; how anything else is undone is noted down in the stack."""
    keeps_mathematics: bool = True
    """Whether the same numbers are computed, but for rounding."""
    automatic: Callable[[str], bool] = lambda device: True
    """Whether it is tried on such a device without being named."""


def _no_checkpointing(situation: Situation, value: str) -> str | None:
    model = situation.model
    on = ("is_gradient_checkpointing", "grad_checkpointing")
    if any(getattr(module, name, False) is True for module in model.modules() for name in on):
        return "the model has it switched on already"
    if _has_switch(model) or repeated_blocks(model):
        return None
    return "the model has no switch for it, and does not repeat blocks"


def _has_switch(model: nn.Module) -> bool:
    """Whether to use the model's own switch. Those of libraries let BatchNorm see each batch twice."""
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        return False
    if hasattr(model, "gradient_checkpointing_enable"):
        return bool(getattr(model, "supports_gradient_checkpointing", False))
    return hasattr(model, "set_grad_checkpointing")


def _checkpoint(undo: ExitStack, step: TrainingStep, value: str) -> TrainingStep:
    model = getattr(step.model, "_orig_mod", step.model)
    if _has_switch(model):
        switch_checkpointing(model, True)
    else:
        for block in repeated_blocks(model):
            recompute(block)
    return step


def _no_implementation(situation: Situation, value: str) -> str | None:
    return optimizers.lacks(situation.optimizer, value)


def _implement(undo: ExitStack, step: TrainingStep, value: str) -> TrainingStep:
    optimizer = step.optimizer
    if not isinstance(optimizer, Optimizer):
        return replace(step, optimizer=optimizers.Implemented(optimizer, value))
    for state in optimizer.state.values():
        if isinstance(state, dict):
            undo.callback(state.update, {name: count for name, count in state.items() if name == "step"})
    optimizers.use(optimizer, value)
    return step


def _no_channels_last(situation: Situation, value: str) -> str | None:
    if not channels_last.dimensions(situation.model):
        return "the model has no convolutions over images or volumes"
    return None


def _channels_last(undo: ExitStack, step: TrainingStep, value: str) -> TrainingStep:
    channels_last.convert(undo, getattr(step.model, "_orig_mod", step.model))
    return step


BACKENDS = {"flash": "flash", "efficient": "mem_efficient", "cudnn": "cudnn", "math": "math"}
"""What they are called in `torch.backends.cuda`."""


def _no_attention(situation: Situation, value: str) -> str | None:
    if situation.device != "cuda":
        return "attention has several backends on CUDA only"
    return None if situation.attends else "the model does not call scaled_dot_product_attention"


def _attend_by(undo: ExitStack, step: TrainingStep, value: str) -> TrainingStep:
    # For the whole process: what checkpointing runs again in the backward pass has to be the same kernel.
    for backend, name in BACKENDS.items():
        switch = getattr(torch.backends.cuda, f"enable_{name}_sdp")
        undo.callback(switch, getattr(torch.backends.cuda, f"{name}_sdp_enabled")())
        switch(backend == value)
    return step


def _not_compiled(situation: Situation, value: str) -> str | None:
    modules = situation.step.model.modules()
    if any(getattr(module, "_compiled_call_impl", None) or hasattr(module, "_orig_mod") for module in modules):
        return "the model is compiled already"
    return None


def _compile(undo: ExitStack, step: TrainingStep, value: str) -> TrainingStep:
    compiled: Any = torch.compile(step.model)
    return replace(step, model=compiled)


def _no_precision(situation: Situation, value: str) -> str | None:
    return "the step has it already" if value == situation.step.precision else None


def _compute_in(undo: ExitStack, step: TrainingStep, value: str) -> TrainingStep:
    return replace(step, precision=value)  # type: ignore[arg-type]  # one of the knob's values


_KNOBS = (
    Knob(
        "checkpointing",
        "Activations are recomputed in the backward pass instead of kept: less memory, a second forward pass.",
        (PLAIN, "on"),
        _no_checkpointing,
        _checkpoint,
    ),
    Knob(
        "optimizer",
        "Which of torch's implementations of the optimizer runs.",
        (PLAIN, *optimizers.FLAGS),
        _no_implementation,
        _implement,
    ),
    Knob(
        "channels_last",
        "Images and weights of convolutions lie in memory with their channels last.",
        (PLAIN, "on"),
        _no_channels_last,
        _channels_last,
    ),
    Knob(
        "attention",
        "Which backend scaled_dot_product_attention runs.",
        (PLAIN, *BACKENDS),
        _no_attention,
        _attend_by,
    ),
    Knob(
        "compile",
        "torch.compile: kernels are fused, after a time of compiling for each micro-batch size.",
        (PLAIN, "on"),
        _not_compiled,
        _compile,
        automatic=lambda device: device == "cuda",  # on a CPU every trial is a process that compiles anew
    ),
    Knob(
        "precision",
        "The forward pass computes in another precision, by autocast.",
        (PLAIN, "bf16", "fp16"),
        _no_precision,
        _compute_in,
        keeps_mathematics=False,
        automatic=lambda device: False,
    ),
)
KNOBS = {knob.name: knob for knob in _KNOBS}


def knob_named(name: str) -> Knob:
    """The knob of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in KNOBS:
        raise InvalidInput(f"there is no knob {name!r}; there are {', '.join(KNOBS)}.")
    return KNOBS[name]
