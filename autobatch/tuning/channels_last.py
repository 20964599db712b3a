"""Models with convolutions in the memory format that many kernels are fastest in: channels last."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from autobatch.batches import map_arrays

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""By the number of dimensions."""
_CONVOLUTIONS = {nn.Conv2d: 4, nn.Conv3d: 5, nn.ConvTranspose2d: 4, nn.ConvTranspose3d: 5}


def dimensions(model: nn.Module) -> set[int]:
    """The dimensions of the inputs of a model's convolutions that have such a format."""
    return {dims for module in model.modules() for kind, dims in _CONVOLUTIONS.items() if isinstance(module, kind)}


def convert(undo: ExitStack, model: nn.Module) -> None:
    """Put a model's weights in that format, and have it put its inputs there. The undoing leaves values as they are by
    then, in the strides of before; the hook is for the caller to take away."""
    kinds = dimensions(model)
    for parameter in dict.fromkeys(model.parameters()):
        if parameter.dim() in kinds and _stands_alone(parameter):
            undo.callback(_restride, parameter, parameter.stride())
            parameter.data = parameter.data.contiguous(memory_format=FORMATS[parameter.dim()])
    model.register_forward_pre_hook(convert_inputs, with_kwargs=True)


def convert_inputs(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """The inputs of a model, with its images or volumes in the format."""
    kinds = dimensions(model)

    def converted(leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() in kinds:
            return leaf.contiguous(memory_format=FORMATS[leaf.dim()])
        return leaf

    return map_arrays(converted, args), map_arrays(converted, kwargs)


def _stands_alone(tensor: Tensor) -> bool:
    """Whether no other tensor can share its memory: a view that moved would part from it."""
    return (
        type(tensor) is nn.Parameter
        and not tensor._is_view()
        and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    )


def _restride(parameter: Tensor, strides: tuple[int, ...]) -> None:
    if parameter.stride() != strides:
        as_before = torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)
        parameter.data = as_before.copy_(parameter.data)
