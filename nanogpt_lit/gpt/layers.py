"""Layers in the place of torch's, or that it lacks: positions as rotations of queries and keys, a root mean square norm
that is quick on CPUs, and a table whose compiled gradient repeats to the bit there.

Su et al., RoFormer (arXiv:2104.09864), and as Llama 3 stretches them; Zhang and Sennrich (arXiv:1910.07467).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_lit.errors import UserError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3's way to longer sequences: slow rotations are slowed down, fast ones stay, those between are blended."""

    factor: float = 8.0
    """Factor by which slow rotations are slowed down."""

    low_freq_factor: float = 1.0
    """Slow is what turns less often than this in original_block_size tokens."""

    high_freq_factor: float = 4.0
    """Fast is what turns more often than this in original_block_size tokens."""

    original_block_size: int = 8192
    """The longest sequence that the network was first trained with."""

    def __post_init__(self) -> None:
        if self.factor <= 0 or not 0 < self.low_freq_factor < self.high_freq_factor or self.original_block_size < 1:
            raise UserError(
                f"model.llama.rope_scaling={self} must have positive values, and low_freq_factor below "
                "high_freq_factor; Llama 3.1 has 8, 1, 4 and 8192."
            )


class Rotary(nn.Module):
    """Turns each head's channels by angles that grow with the position, so that a product of a query and a key sees
    only how far apart they are.

    Channel i is paired with channel i + D / 2, as in transformers; the paper pairs neighbours, which is the same
    network with its channels in another order. There is nothing to learn and nothing in the state_dict.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, block_size: int, D: int, base: float, scaling: RopeScaling | None = None) -> None:
        """base: the slowest rotation turns once in about 2 pi * base tokens"""
        super().__init__()
        self.block_size, self.D, self.base, self.scaling = block_size, D, base, scaling
        self.fill()

    def fill(self) -> None:
        """Compute the angles, again where the network was first built without memory (on torch's meta device)."""
        angles = torch.outer(torch.arange(self.block_size).float(), frequencies(self.D, self.base, self.scaling))
        # Buffers go where the network goes; they are made again with it, so no checkpoint need hold them.
        self.register_buffer("cos", angles.cos(), persistent=False)  # (block_size, D / 2)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: Tensor, start: int) -> Tensor:
        """x: (B, heads, T, D), of the positions from start on. In float32, also where x is 16-bit."""
        end = start + x.size(2)
        cos, sin = self.cos[start:end], self.sin[start:end]  # (T, D / 2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def frequencies(D: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """Angles per token of each pair of a head's D channels, (D / 2,) float32."""
    inverse = base ** -(torch.arange(0, D, 2).float() / D)
    if scaling is None:
        return inverse
    turns = scaling.original_block_size * inverse / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    fast = ((turns - low) / (high - low)).clamp(0, 1)  # 0 where slow, 1 where fast
    return fast * inverse + (1 - fast) * inverse / scaling.factor


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


# The table of tokens or positions.


class CompiledEmbedding(nn.Embedding):
    """nn.Embedding, whose gradient repeats to the bit where it is compiled for a CPU as well.

    What torch.compile would make of it there lets threads add to the same row as they come, and float32 sums depend on
    their order: two runs of the same seed would part. PyTorch's own kernel gives each thread rows of its own.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        return rows_of(self.weight, tokens) if tokens.device.type == "cpu" else super().forward(tokens)


@torch.library.custom_op("nanogpt_lit::rows_of", mutates_args=())
def rows_of(table: Tensor, tokens: Tensor) -> Tensor:
    """Look up rows of a table: (V, C), (...) -> (..., C). torch.compile does not see into it."""
    return F.embedding(tokens, table)


@rows_of.register_fake
def _(table: Tensor, tokens: Tensor) -> Tensor:
    return table.new_empty(*tokens.shape, table.size(1))


@torch.library.custom_op("nanogpt_lit::rows_gradient", mutates_args=())
def rows_gradient(gradient: Tensor, tokens: Tensor, count: int) -> Tensor:
    """Add up the gradients of a table's rows: (..., C), (...) -> (count, C)."""
    return torch.ops.aten.embedding_dense_backward(gradient, tokens, count, -1, False)


@rows_gradient.register_fake
def _(gradient: Tensor, tokens: Tensor, count: int) -> Tensor:
    return gradient.new_empty(count, gradient.size(-1))


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    table, tokens = inputs
    ctx.save_for_backward(tokens)
    ctx.count = table.size(0)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return rows_gradient(gradient, *ctx.saved_tensors, ctx.count), None


rows_of.register_autograd(_backward, setup_context=_save)
