"""Attention by PyTorch's kernels, on a CPU by the arithmetic that is fastest there."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_lit.runtime.matmul import ONEDNN, by_mkl

_MKLDNN: Any = torch.backends.mkldnn

SHORT = 128
"""Tokens up to which a CPU's attention is faster in float32 than in bfloat16, whose units take larger tiles."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """F.scaled_dot_product_attention. q: (B, H, T, D)   k, v: (B, H, tokens so far, D)

    mask: (B, 1, T, T), added to the logits, in place of is_causal
    """
    on_cpu = type(q) is Tensor and q.device.type == "cpu"
    if on_cpu and q.dtype == torch.bfloat16 and q.size(2) <= SHORT:
        with torch.autocast("cpu", enabled=False):
            y = attention(q.float(), k.float(), v.float(), dropout_p=dropout_p, is_causal=is_causal, mask=mask)
        return y.to(q.dtype)
    if mask is not None:
        mask = mask.to(q.dtype)
    in_float32 = on_cpu and q.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if in_float32 and dropout_p == 0 and not torch.compiler.is_compiling() and _MKLDNN.matmul.fp32_precision == ONEDNN:
        return _InTiles.apply(q, k, v, is_causal, mask)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal)


class _InTiles(torch.autograd.Function):
    """The kernel that F.scaled_dot_product_attention takes on a CPU, whose tiles MKL multiplies faster than oneDNN."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mask: Tensor | None) -> Tensor:
        with by_mkl(q.device):
            y, logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, is_causal, attn_mask=mask
            )
        ctx.save_for_backward(q, k, v, y, logsumexp, mask)
        ctx.is_causal = is_causal
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, logsumexp, mask = ctx.saved_tensors
        with by_mkl(q.device):
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                dy, q, k, v, y, logsumexp, 0.0, ctx.is_causal, attn_mask=mask
            )
        return *gradients, None, None
