"""The language-modelling loss, from the hidden states to one number: at once, or a chunk of tokens at a time.

Why not torch.nn.functional.linear_cross_entropy, which PyTorch has since 2.13. Its chunked path wants the weight in the
dtype of the states, so that under autocast the head's gradient is added up in 16 bits, and it returns the loss in them.
In float16, reduction "mean" folds 1/N into the gradients of the logits before a loss scale is known: those of rare
tokens are lost, and a scale of 65536 gives NaN. "sum" keeps them, but its loss has steps of 32 at 4096 tokens and is
infinite at 8192. It also leaves torch.compile, and on a CPU it is many times slower (scripts/bench_loss.py
--torch).
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100
"""A target with this value is not predicted and not counted; it is the default of PyTorch and Hugging Face."""

FLOAT16_SCALE = 256.0
"""Factor of the gradients of logits before they are rounded to float16.

They lie in [-1, 1] and most are probabilities of wrong tokens, about 1 / V = 2e-5 at first and less later. float16 gets
coarse below 6e-5 and ends at 6e-8 and 65504. Times 256, all from 2e-10 on are kept, and the gradient of a state,
at most 2 * 256 * max|W|, is finite for every weight below 127.
"""

CACHED_LOGITS = 2**21
"""Number of logits that a CPU works on at a time, 8 MiB in float32: they stay in its caches until all operations on
them are done. More would wait for memory; fewer are no faster, since each operation waits for all threads."""

PRODUCT_ROWS = 2048
"""Rows of a bfloat16 product that a CPU adds to its float32 total at a time, for the same reason."""


def cross_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy over the targets that are not IGNORE_INDEX, a float32 scalar.

    hidden: (B, T, C)   head_weight: (V, C)   targets: (B, T) int64
    NaN when every target is IGNORE_INDEX, as F.cross_entropy.
    """
    logits = F.linear(hidden, head_weight).flatten(0, 1)  # (B*T, V)
    # Under autocast the logits are 16-bit, and a sum over 50,000 exponentials needs more than 8 bits of mantissa.
    return F.cross_entropy(logits.float(), targets.flatten(), ignore_index=IGNORE_INDEX)


def as_finite_as_its_gradients(loss: Tensor) -> Tensor:
    """The loss, to the bit; one that is infinite becomes nan, and so do its gradients, which may have been finite.

    Whoever guards the weights then looks at the gradients alone, which all processes have in common.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan) if loss.requires_grad else loss


def chunked_cross_entropy(hidden: Tensor, head_weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    """cross_entropy without the (B*T, V) logits: those of chunk_tokens tokens are held at a time.

    The gradients are computed in the forward pass, while a chunk's logits are there; to compute the logits again in
    the backward pass would cost a third more. They wait for it in 4 bytes per weight of the head and 2 to 4 per hidden
    channel. The head's gradient is added up in float32, also where the head is tied to an embedding.
    Equal to cross_entropy up to rounding; it is differentiated once, not twice. For float64 states all is float64.
    """
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type):
        hidden = hidden.to(torch.get_autocast_dtype(device_type))
    # No sum over many tokens is to be 16-bit: what is cast, and when, is written out from here on.
    with torch.autocast(device_type, enabled=False):
        states, targets = hidden.flatten(0, 1), targets.flatten()  # (N, C), (N,)
        if torch.is_grad_enabled() and (states.requires_grad or head_weight.requires_grad):
            return ChunkedCrossEntropy.apply(states, head_weight, targets, chunk_tokens)
        return _loss_alone(states, head_weight, targets, chunk_tokens)


def _loss_alone(states: Tensor, head_weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
    weight = head_weight.to(states.dtype)
    chunks = zip(states.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    total = sum(
        F.cross_entropy(F.linear(x, weight).to(_wide(x.dtype)), t, ignore_index=IGNORE_INDEX, reduction="sum")
        for x, t in chunks
    )
    return total / (targets != IGNORE_INDEX).sum()


class ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor, head_weight: Tensor, targets: Tensor, chunk_tokens: int) -> Tensor:
        """states: (N, C)   head_weight: (V, C), of any dtype   targets: (N,)"""
        wide = _wide(states.dtype)
        scale = FLOAT16_SCALE if states.dtype == torch.float16 else 1.0
        weight = head_weight.to(states.dtype)
        counted = targets != IGNORE_INDEX  # (N,)
        losses = torch.empty(targets.shape, dtype=wide, device=states.device)  # (N,)
        d_states = torch.empty_like(states) if ctx.needs_input_grad[0] else None
        d_weight = torch.empty_like(head_weight, dtype=wide) if ctx.needs_input_grad[1] else None
        for start in chunk_starts(len(targets), chunk_tokens):
            here = slice(start, start + chunk_tokens)
            x, is_counted = states[here], counted[here, None]
            # An ignored target is any token here, and is multiplied by zero where that is cheap: in C columns, not V.
            losses[here], d_logits = _losses_and_gradients(x @ weight.t(), targets[here].clamp(min=0), scale)
            if d_states is not None:
                d_states[here] = (d_logits @ weight) * is_counted
            if d_weight is not None:
                add_product_(d_weight, d_logits.t(), x * is_counted, beta=float(start > 0))
            del d_logits  # or two chunks are held while the next is computed
        count = counted.sum()
        # Zero gradients, not 0 * inf, where nothing is counted.
        ctx.save_for_backward(d_states, d_weight, 1 / (scale * count.clamp(min=1)))
        return (losses * counted).sum() / count

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        # Only here is the loss scale known. The factor is applied in float32: 65536 is more than float16 can say.
        d_states, d_weight, factor = ctx.saved_tensors
        factor = d_loss * factor
        if d_states is not None:
            d_states = (d_states.to(factor.dtype) * factor).to(d_states.dtype)
        if d_weight is not None:
            # In place, for want of memory: a second backward pass is refused by the saved tensor's version.
            d_weight = d_weight.mul_(factor)
        return d_states, d_weight, None, None


def chunk_starts(tokens: int, chunk_tokens: int) -> Sequence[int]:
    """The first token of each chunk. A function of its own for the memory plan, to which most are alike."""
    return range(0, tokens, chunk_tokens)


def _losses_and_gradients(logits: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The loss of each token (n,) and the gradient of each by its logits, times scale: (n, V) in the logits' dtype.

    logits: (n, V), written over   targets: (n,)
    """
    on_cpu = logits.device.type == "cpu" and type(logits) is Tensor  # those of a memory plan stand for a GPU's
    rows = max(1, CACHED_LOGITS // logits.size(1))
    if not on_cpu or rows >= len(logits) or torch.compiler.is_compiling():
        return _of_rows(logits, targets, scale, on_cpu)
    losses = []
    for few, theirs in zip(logits.split(rows), targets.split(rows), strict=True):
        loss, gradients = _of_rows(few, theirs, scale, on_cpu)
        losses.append(loss)
        if gradients is not few:
            few.copy_(gradients)
    return torch.cat(losses), logits


def _of_rows(logits: Tensor, targets: Tensor, scale: float, on_cpu: bool) -> tuple[Tensor, Tensor]:
    """The same, of all rows at once. The gradients may be a tensor of their own."""
    wide = _wide(logits.dtype)
    targets = targets[:, None]  # (n, 1)
    if on_cpu:  # where the index of the largest takes five times as long as the largest itself
        largest = logits.amax(dim=-1, keepdim=True)
    else:
        largest, likeliest = logits.max(dim=-1, keepdim=True)
    distance = largest.to(wide) - logits.gather(1, targets).to(wide)
    # float16 becomes float32 inside CUDA's kernel, the rest before it.
    if logits.dtype == torch.float16:
        p = torch.softmax(logits, dim=-1, dtype=wide)
    else:
        p = torch.softmax(logits.to(wide), dim=-1)
    # The likeliest token has p = exp(0) / sum, and sum is what the loss lacks.
    highest = p.amax(dim=-1, keepdim=True) if on_cpu else p.gather(1, likeliest)
    losses = (distance - highest.log()).squeeze(1)
    p.scatter_(1, targets, p.gather(1, targets) - 1)
    if logits.dtype == wide:
        return losses, p
    if scale != 1:
        return losses, torch.mul(p, scale, out=logits)
    return losses, logits.copy_(p)  # on a CPU ten times as fast as a product of two dtypes


def _wide(dtype: torch.dtype) -> torch.dtype:
    """float32 for 16 bits, else the same."""
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("nanogpt_lit::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    """total (M, N) = beta * total + a (M, K) @ b (K, N). With beta 0 it does not matter what total holds.

    For 16-bit a and b, total is float32 and their product is not rounded to 16 bits, but where a CPU computes in
    bfloat16: it has no such product, and rounds each once, as autograd does. An operator of its own so that
    torch.compile and the memory plan see one step without temporaries: on CUDA it is one kernel.
    """
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif a.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        for few, theirs in zip(total.split(PRODUCT_ROWS), a.split(PRODUCT_ROWS), strict=True):
            product = theirs @ b
            few.add_(product) if beta else few.copy_(product)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype), beta=beta)


@add_product_.register_fake
def _(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None: ...
