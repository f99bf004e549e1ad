"""CUDA's code paths for tensors that are on a CPU.

A build of PyTorch without CUDA cannot run a backward pass on fake CUDA tensors, so the trace uses fake CPU ones. A few
things then differ from the GPU and change memory: autocast's lists of operations, attention, dropout, softmax and RMS
norm. Each is replaced in the dispatcher for as long as `cuda_paths` is open. Composite operations (a cross-entropy, a
layer norm) run PyTorch's own code and meet the replacements on their way, also when a checkpoint recomputes them.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet, _ExcludeDispatchKeyGuard
from torch.library import Library

from nanogpt_lit.plan.kernels import Kernels

aten = torch.ops.aten

# Operations that autocast runs in float32 on CUDA and leaves alone on a CPU (AT_FORALL_FP32 of
# ATen/autocast_mode.h, less image resampling).
FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt",
    "sinh", "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm",
    "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim",
    "cosine_similarity", "dist", "pdist", "renorm", "logsumexp",
)  # fmt: skip

# Those that compute in float32 unless the caller names a dtype (AT_FORALL_FP32_SET_OPT_DTYPE). cross_entropy names
# one, that of the logits: its softmax stays in 16 bits.
FLOAT32_UNLESS_NAMED = (
    "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm", "sum", "sum.dim_IntList",
)  # fmt: skip

# Those that run in the autocast dtype on CUDA and not on a CPU (AT_FORALL_LOWER_PRECISION_FP).
LOWER_PRECISION = ("addmv", "addr", "mv", "einsum", "chain_matmul", "linalg_multi_dot")

# On a CPU's list and not on CUDA's; of these a language model meets one.
LEFT_ALONE = ("cross_entropy_loss",)

_BELOW_AUTOCAST = DispatchKeySet(DispatchKey.AutocastCPU)


@contextmanager
def cuda_paths(kernels: Kernels | None = None) -> Iterator[None]:
    """Send CPU tensors through CUDA's code paths until the block ends: those of a GPU, or of an RTX 2050.

    It concerns the whole process: train nothing inside.
    """
    library = Library("aten", "IMPL")
    try:
        for name in FLOAT32:
            library.impl(name, _in_float32(_operation(name)), "AutocastCPU")
        for name in FLOAT32_UNLESS_NAMED:
            library.impl(name, _in_float32_unless_named(_operation(name)), "AutocastCPU")
        for name in LOWER_PRECISION:
            library.impl(name, _in_autocast_dtype(_operation(name)), "AutocastCPU")
        with _silence_of_overriding():
            for name in LEFT_ALONE:
                library.impl(name, _operation(name).decompose, "AutocastCPU")
            library.impl("scaled_dot_product_attention", _attention_below_autocast, "AutocastCPU")
        library.impl("scaled_dot_product_attention", partial(_attention, kernels or Kernels()), "AutogradCPU")
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("_fused_rms_norm", _rms_norm, "AutogradCPU")
        library.impl("softmax.int", _softmax(aten.softmax.int, aten._softmax), "AutogradCPU")
        library.impl("log_softmax.int", _softmax(aten.log_softmax.int, aten._log_softmax), "AutogradCPU")
        yield
    finally:
        library._destroy()


def _operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(aten, packet), overload or "default")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Tensors, and lists of them, in another floating-point dtype; float64 stays what it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != torch.float64 else value
    if isinstance(value, list | tuple):
        return type(value)(_cast(item, dtype) for item in value)
    return value


def _in_float32(operation: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with _ExcludeDispatchKeyGuard(_BELOW_AUTOCAST):
            kwargs = {name: _cast(value, torch.float32) for name, value in kwargs.items()}
            return operation(*_cast(args, torch.float32), **kwargs)

    return kernel


def _in_float32_unless_named(operation: Any) -> Callable[..., Any]:
    names = [argument.name for argument in operation._schema.arguments]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        first = args[0]
        if given.get("dtype") is None and first.dtype in (torch.float16, torch.bfloat16):
            given["dtype"] = torch.float32
        with _ExcludeDispatchKeyGuard(_BELOW_AUTOCAST):
            return operation(**given)

    return kernel


def _in_autocast_dtype(operation: Any) -> Callable[..., Any]:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        dtype = torch.get_autocast_dtype("cpu")
        with _ExcludeDispatchKeyGuard(_BELOW_AUTOCAST):
            return operation(*_cast(args, dtype), **kwargs)

    return kernel


def _dropout(x: Tensor, p: float, train: bool) -> Tensor:
    """Dropout by CUDA's operation, which keeps a mask of one byte an element; a CPU keeps the noise as floats."""
    return torch.native_dropout(x, p, True)[0] if train and 0 < p < 1 else x


def _softmax(operation: Any, in_one_kernel: Any) -> Callable[..., Tensor]:
    """CUDA's softmax, which needs no float32 copy of an input in float16."""

    def kernel(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        if x.dtype == torch.float16 and dtype == torch.float32:
            return in_one_kernel(x, dim, True)
        return operation.decompose(x, dim, dtype)

    return kernel


def _rms_norm(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, eps: float | None
) -> tuple[Tensor, Tensor]:
    return _FusedRMSNorm.apply(x, weight, len(normalized_shape))


class _FusedRMSNorm(torch.autograd.Function):
    """RMS norm by CUDA's kernel (_fused_rms_norm_cuda of layer_norm_kernel.cu), which keeps its input as it is; a
    CPU multiplies step by step, and keeps what is 16-bit in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, dims: int) -> tuple[Tensor, Tensor]:
        y = torch.empty_like(x.contiguous())
        rstd = torch.empty(x.shape[:-dims] + (1,) * dims, dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, weight, rstd)
        ctx.mark_non_differentiable(rstd)
        return y, rstd

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, _ = ctx.saved_tensors
        x, dy = x.contiguous(), dy.contiguous()  # held while the kernel runs
        return torch.empty_like(x), None if weight is None else torch.empty_like(weight), None


def _attention_below_autocast(*args: Any, **kwargs: Any) -> Tensor:
    args = _cast(args, torch.get_autocast_dtype("cpu"))
    with _ExcludeDispatchKeyGuard(_BELOW_AUTOCAST):
        return aten.scaled_dot_product_attention(*args, **kwargs)


def _attention(
    kernels: Kernels,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The kernel that PyTorch picks: Kernels.attention, and the memory-efficient one where there is a mask.

    Builds without FlashAttention take the memory-efficient kernel too. It saves the same tensors.
    """
    D = q.size(-1)
    needs_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
    kernel = kernels.attention(q.dtype, D, needs_grad)
    if kernel == "math":
        return aten._scaled_dot_product_attention_math(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if kernel == "flash" and attn_mask is None and not enable_gqa:
        if D % 8:  # the kernel wants multiples of 8, PyTorch pads
            scale = D**-0.5 if scale is None else scale
            q, k, v = (F.pad(tensor, (0, 8 - D % 8)) for tensor in (q, k, v))
        out = aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal, scale=scale)[0]
        return out[..., :D] if D % 8 else out
    if attn_mask is not None:
        B, H, T, keys = q.size(0), q.size(1), q.size(2), k.size(2)
        if keys % 8:  # the kernel wants rows of a multiple of 8: PyTorch copies the mask into longer ones
            attn_mask = F.pad(attn_mask, (0, 8 - keys % 8))[..., :keys]
        attn_mask = attn_mask.expand(B, H, T, keys)
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, attn_mask, needs_grad, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def _silence_of_overriding() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*Overriding a previously registered kernel")
        yield
