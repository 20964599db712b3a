"""Matrix products of groups (experts) on fake tensors of any type.

torch's fake implementation of `aten._grouped_mm` takes bfloat16 alone, as its fast kernel does. For other types the
real one multiplies group by group into one result, of the same shape and strides.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GROUPED_MM: Any = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)
"""The operator; None where torch has none."""


def grouped_mm(left: Tensor, right: Tensor, *others: Any, **options: Any) -> Tensor:
    """Its result for fake tensors."""
    if left.dtype is torch.bfloat16:
        return GROUPED_MM(left, right, *others, **options)
    stand_ins = [torch.empty(tensor.shape, dtype=torch.bfloat16, device=tensor.device) for tensor in (left, right)]
    result = GROUPED_MM(*stand_ins, *others, **options)
    return torch.empty_strided(result.shape, result.stride(), dtype=left.dtype, device=result.device)


class GroupedMatmul(TorchDispatchMode):
    """Has such products computed so."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (grouped_mm if func is GROUPED_MM else func)(*args, **(kwargs or {}))
