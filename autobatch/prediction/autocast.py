"""Autocast as CUDA does it, on the stand-in device, which has no rules of its own.

The lists are those of `ATen/autocast_mode.h` (`AT_FORALL_LOWER_PRECISION_FP` and its neighbours, torch 2.13), which
CUDA registers; the CPU's differ. Names that a version of torch does not have are passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel
from torch.utils._pytree import tree_map

LOWER_PRECISION = """
_convolution conv1d conv2d conv3d conv_tbc conv_transpose1d conv_transpose2d.input conv_transpose3d.input convolution
prelu addmm addmv addr matmul einsum mm mv linalg_vecdot linear addbmm baddbmm bmm chain_matmul linalg_multi_dot
_thnn_fused_lstm_cell _thnn_fused_gru_cell lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell scaled_dot_product_attention
""".split()  # noqa: SIM905

SINGLE_PRECISION = """
acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow.Tensor_Scalar pow.Tensor_Tensor
pow.Scalar softplus layer_norm native_layer_norm group_norm nuclear_norm nuclear_norm.dim cosine_similarity
poisson_nll_loss cosine_embedding_loss nll_loss nll_loss2d hinge_embedding_loss kl_div l1_loss smooth_l1_loss
huber_loss mse_loss margin_ranking_loss multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss
binary_cross_entropy_with_logits dist pdist cdist renorm logsumexp upsample_nearest1d upsample_nearest2d
upsample_nearest3d upsample_linear1d upsample_bilinear2d _upsample_bilinear2d_aa upsample_trilinear3d
upsample_bicubic2d _upsample_bicubic2d_aa
""".split()  # noqa: SIM905

SINGLE_PRECISION_RESULT = """
prod prod.dim_int softmax.int log_softmax.int cumprod cumsum linalg_vector_norm linalg_matrix_norm sum sum.dim_IntList
""".split()  # noqa: SIM905

WIDEST = """
addcdiv addcmul atan2 bilinear cross dot vdot grid_sampler index_put tensordot scatter_add
""".split()  # noqa: SIM905

_KEYS = torch._C.DispatchKeySet(torch._C._parse_dispatch_key("AutocastPrivateUse1"))  # type: ignore[arg-type]
_libraries: list[Library] = []
"""Held, as what a library registers ends with it."""
_copies: dict[int, tuple[Tensor, Tensor]] = {}
"""Low-precision copies of weights, with the weights, until the outermost autocast ends."""


def install(device: str) -> None:
    """Register the rules for tensors on the stand-in device of that name. Once in a process, for good."""
    fallback = Library("_", "IMPL", "AutocastPrivateUse1")
    fallback.fallback(fallthrough_kernel)
    aten = Library("aten", "IMPL", "AutocastPrivateUse1")
    _libraries.extend((fallback, aten))

    def low(tensor: Tensor) -> Tensor:
        return _cached(tensor, torch.get_autocast_dtype(device))

    def register(names: list[str], rule: Callable[..., Any]) -> None:
        for name in names:
            packet, _, overload = name.partition(".")
            operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
            if operator is not None:
                aten.impl(name, _ruled(operator, rule))

    def cast_to(cast: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
        def rule(operator: Any, args: Any, kwargs: Any) -> Any:
            args, kwargs = tree_map(lambda leaf: cast(leaf) if _eligible(leaf, device) else leaf, (args, kwargs))
            return operator(*args, **kwargs)

        return rule

    def widest(operator: Any, args: Any, kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if _eligible(a, device)]
        single = any(tensor.dtype == torch.float32 for tensor in tensors)
        return cast_to(_single if single else low)(operator, args, kwargs)

    def result(operator: Any, args: Any, kwargs: Any) -> Any:
        if not _eligible(args[0], device) or _asked_dtype(operator, args, kwargs) or args[0].dtype == torch.float32:
            return operator(*args, **kwargs)
        if operator in _SOFTMAX and args[0].dtype == torch.float16:  # one kernel, without a copy of the input
            return _SOFTMAX[operator](args[0], args[1] % args[0].ndim, True)
        return operator(*args[: _place_of_dtype(operator)], **{**kwargs, "dtype": torch.float32})

    register(LOWER_PRECISION, cast_to(low))
    register(SINGLE_PRECISION, cast_to(_single))
    register(SINGLE_PRECISION_RESULT, result)
    register(WIDEST, widest)
    clear = torch.clear_autocast_cache

    def clear_ours_too() -> None:
        _copies.clear()
        clear()

    torch.clear_autocast_cache = clear_ours_too


_SOFTMAX = {
    torch.ops.aten.softmax.int: torch.ops.aten._softmax.default,
    torch.ops.aten.log_softmax.int: torch.ops.aten._log_softmax.default,
}


def _ruled(operator: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return rule(operator, args, kwargs)

    return kernel


def _place_of_dtype(operator: Any) -> int:
    """How many arguments come before `dtype`, which some operators take by position."""
    return [argument.name for argument in operator._schema.arguments].index("dtype")


def _asked_dtype(operator: Any, args: Any, kwargs: Any) -> torch.dtype | None:
    """The dtype that the caller asked for, which autocast leaves alone."""
    place = _place_of_dtype(operator)
    asked: torch.dtype | None = args[place] if len(args) > place else kwargs.get("dtype")
    return asked


def _eligible(value: Any, device: str) -> bool:
    return (
        isinstance(value, Tensor)
        and value.device.type == device
        and value.is_floating_point()
        and value.dtype != torch.float64
    )


def _single(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float32)


def _cached(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if tensor.dtype == dtype:
        return tensor
    if not (tensor.dtype == torch.float32 and tensor.requires_grad and tensor.is_leaf and not tensor._is_view()):
        return tensor.to(dtype)
    if not torch.is_autocast_cache_enabled():
        return tensor.to(dtype)
    if id(tensor) not in _copies:
        _copies[id(tensor)] = (tensor, tensor.to(dtype))
    return _copies[id(tensor)][1]
