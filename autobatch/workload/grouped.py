"""Matrix products of groups (experts) on fake tensors of any type."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_GROUPED_MM = getattr(torch.ops.aten, "_grouped_mm", None)


class GroupedMatmul(TorchDispatchMode):
    """torch's fake implementation of `aten._grouped_mm` takes bfloat16 alone, as its fast kernel does. For other types
    the real one multiplies group by group into one result, of the same shape and strides."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _GROUPED_MM is None or func is not _GROUPED_MM.default or args[0].dtype is torch.bfloat16:
            return func(*args, **kwargs)
        left, right, *others = args
        stand_ins = [torch.empty(tensor.shape, dtype=torch.bfloat16, device=tensor.device) for tensor in (left, right)]
        result = func(*stand_ins, *others, **kwargs)
        return torch.empty_strided(result.shape, result.stride(), dtype=left.dtype, device=result.device)
