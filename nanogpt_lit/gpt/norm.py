"""The root mean square norm: Zhang and Sennrich (arXiv:1910.07467)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x squared + eps) * weight, over the last dimension, (..., C) -> (..., C).

    PyTorch has one kernel for it on a GPU. On a CPU it multiplies step by step, forward and backward, which takes more
    than twice as long as the few steps here. They are equal up to rounding.
    """
    on_cpu = type(x) is Tensor and x.device.type == "cpu" and x.dtype == weight.dtype
    if on_cpu and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        return _InFewSteps.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm with a learnt scale per channel, by `rms_norm`."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class _InFewSteps(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rstd = x.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd
        product = dy * normed
        d_weight = product.flatten(0, -2).sum(0)
        # What the norm took away along x itself: the mean of dy * weight * normed.
        along = torch.matmul(product, weight / -x.size(-1)).unsqueeze(-1)
        return torch.addcmul(dy * weight, normed, along).mul_(rstd), d_weight, None
