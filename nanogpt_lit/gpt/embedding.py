"""The table of tokens or positions, with a gradient that torch.compile adds up in a fixed order on CPUs."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Embedding(nn.Embedding):
    """nn.Embedding, whose gradient repeats to the bit where it is compiled for a CPU as well.

    What torch.compile would make of it there lets threads add to the same row as they come, and float32 sums depend on
    their order: two runs of the same seed would part. PyTorch's own kernel gives each thread rows of its own.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and tokens.device.type == "cpu":
            return rows_of(self.weight, tokens)
        return super().forward(tokens)


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
