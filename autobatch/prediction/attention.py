"""Scaled-dot-product attention by the kernel that CUDA would choose, on the stand-in device, which has none.

The order of choice and each kernel's conditions are those of `ATen/native/transformers/cuda/sdp_utils.cpp` (torch
2.13); what is made around the kernels (padded heads, masks as floats) is that of `transformers/attention.cpp` there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

from autobatch.prediction.kernels import attention_of

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_libraries: list[Library] = []
"""Held, as what a library registers ends with it."""
_capability = (8, 0)


def install() -> None:
    """Register the choice for tensors on the stand-in device. Once in a process, for good."""
    library = Library("aten", "IMPL", "AutogradPrivateUse1")
    library.impl("scaled_dot_product_attention", _attention)
    _libraries.append(library)


def choose_for(capability: tuple[int, int]) -> None:
    """Choose as a GPU of this compute capability does, from now on."""
    global _capability
    _capability = capability


def capability() -> tuple[int, int]:
    """That of the GPU that is chosen for."""
    return _capability


@dataclass(frozen=True)
class _Call:
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    causal: bool
    scale: float | None
    gqa: bool

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def head_dims(self) -> set[int]:
        return {tensor.shape[-1] for tensor in self.tensors}

    def is_dense(self, gqa: bool) -> bool:
        """What every fused kernel asks for: (batch, heads, length, head dimension), contiguous heads, nothing empty."""
        if any(t.ndim != 4 or t.stride(-1) != 1 or 0 in t.shape for t in self.tensors):
            return False
        if len({t.shape[0] for t in self.tensors}) > 1 or len({t.dtype for t in self.tensors}) > 1:
            return False
        return (self.gqa and gqa) or len({t.shape[1] for t in self.tensors}) == 1

    @property
    def wants_statistics(self) -> bool:
        """Whether the backward pass will need the sums of the softmax."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -torch.inf)
    call = _Call(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    kernels = [(_suits_flash, _flash), (_suits_efficient, _efficient)]
    if attention_of(_capability) == 9:
        kernels.insert(0, (_suits_cudnn, _cudnn))
    kernel = next((run for suits, run in kernels if suits(call)), _math)
    return kernel(call)


def _suits_flash(call: _Call) -> bool:
    head = call.query.shape[-1]
    return (
        torch._C._get_flash_sdp_enabled()
        and _capability >= (8, 0)
        and call.query.dtype in _HALF
        and call.mask is None
        and call.is_dense(gqa=True)
        and len(call.head_dims) == 1
        and head <= 256
        and not (call.causal and call.query.shape[-2] != call.key.shape[-2])
        and not (_capability in ((8, 6), (8, 9), (12, 0)) and head > 192 and call.dropout > 0 and call.wants_statistics)
    )


def _suits_efficient(call: _Call) -> bool:
    half = call.query.dtype in _HALF
    alignment = 8 if half and _capability >= (7, 0) else 4 if _capability >= (8, 0) else 1
    return (
        torch._C._get_mem_efficient_sdp_enabled()
        and (call.query.dtype in (torch.float32, torch.float16) or (half and _capability >= (8, 0)))
        and call.is_dense(gqa=False)
        and call.query.shape[-1] == call.key.shape[-1]
        and all(dim % alignment == 0 for dim in call.head_dims)
    )


def _suits_cudnn(call: _Call) -> bool:
    return (
        torch._C._get_cudnn_sdp_enabled()
        and call.query.dtype in _HALF
        and call.is_dense(gqa=True)
        and all(dim % 8 == 0 and dim <= 128 for dim in call.head_dims)
        and not (call.mask is not None and call.mask.requires_grad)
    )


def _flash(call: _Call) -> Tensor:
    head = call.query.shape[-1]
    scale = call.scale if call.scale is not None else head**-0.5  # of the heads as they were, before padding
    padded = [_padded(tensor, 8) for tensor in call.tensors]
    result: Any = _ATEN._scaled_dot_product_flash_attention(*padded, call.dropout, call.causal, False, scale=scale)
    return result[0] if head % 8 == 0 else result[0][..., :head]


def _efficient(call: _Call) -> Tensor:
    mask = call.mask
    if mask is not None:
        batch, heads, length, _ = call.query.shape
        columns = call.key.shape[-2]
        mask = _padded(mask, 16)[..., :columns].expand(batch, heads, length, columns)
    result: Any = _ATEN._scaled_dot_product_efficient_attention(
        *call.tensors, mask, call.wants_statistics, call.dropout, call.causal, scale=call.scale
    )
    return result[0]


def _cudnn(call: _Call) -> Tensor:
    result: Any = _ATEN._scaled_dot_product_cudnn_attention(
        *call.tensors, call.mask, call.wants_statistics, call.dropout, call.causal, False, scale=call.scale
    )
    return result[0]


def _math(call: _Call) -> Tensor:
    result: Any = _ATEN._scaled_dot_product_attention_math(
        *call.tensors, call.mask, call.dropout, call.causal, None, scale=call.scale, enable_gqa=call.gqa
    )
    return result[0]


def _padded(tensor: Tensor, multiple: int) -> Tensor:
    """With the last dimension filled up, in a copy if it has to be."""
    missing = -tensor.shape[-1] % multiple
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor
