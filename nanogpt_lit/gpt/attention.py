"""Attention, and what it looks at: the keys of tokens already read, documents kept apart.

PyTorch's kernels compute it, on a CPU with the arithmetic that is fastest there.
"""

from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_lit.runtime.process_settings import ONEDNN, by_mkl

_MKLDNN: Any = torch.backends.mkldnn

SHORT = 128
"""Tokens up to which a CPU's attention is faster in float32 than in bfloat16, whose units take larger tiles."""


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float = 0.0, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """F.scaled_dot_product_attention. q: (B, H, T, D)   k, v: (B, K, tokens so far, D)

    K divides H: each head of keys and values serves H / K heads of queries. k, v: in the dtype of q, or as the cache
    has them
    mask: (B, 1, T, tokens so far), added to the logits, in place of is_causal
    """
    on_cpu = type(q) is Tensor and q.device.type == "cpu"
    if on_cpu and q.dtype == torch.bfloat16 and q.size(2) <= SHORT:
        with torch.autocast("cpu", enabled=False):
            y = attention(q.float(), k.float(), v.float(), dropout_p=dropout_p, is_causal=is_causal, mask=mask)
        return y.to(q.dtype)
    k, v = k.to(q.dtype), v.to(q.dtype)
    if mask is not None:
        mask = mask.to(q.dtype)
    in_float32 = on_cpu and q.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if in_float32 and dropout_p == 0 and not torch.compiler.is_compiling() and _MKLDNN.matmul.fp32_precision == ONEDNN:
        return _InTiles.apply(q, k, v, is_causal, mask)
    if (shared := q.size(1) // k.size(1)) > 1:
        # As many keys as queries: of PyTorch's kernels not all share them, and which one it takes, the GPU decides.
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
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


# Keys and values of the tokens already read, so that each new token costs one column of attention.


class LayerCache:
    """One layer's keys and values, (B, H, block_size, D) each, allocated once by the first append."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) behind what is there; views of everything stored, (B, H, length, D).

        Attention's causal mask is aligned to the first key: several queries behind older keys would look at the wrong
        ones, and need the mask of Documents.behind.
        """
        B, H, T, D = k.shape
        # Allocated here and not in the constructor: k already has the dtype and device that attention computes in,
        # which under autocast is not that of the parameters. A CPU's attention reads few queries' bfloat16 keys in
        # float32: kept so, they are not converted again for each token.
        if self.keys is None or self.values is None:
            dtype = torch.float32 if k.device.type == "cpu" and k.dtype == torch.bfloat16 else k.dtype
            self.keys = k.new_empty(B, H, self.block_size, D, dtype=dtype)
            self.values = v.new_empty(B, H, self.block_size, D, dtype=dtype)
        start, self.length = self.length, self.length + T
        self.keys[:, :, start : self.length] = k
        self.values[:, :, start : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class KeyValueCache:
    """A LayerCache per layer of a GPT: 2 * n_layer * B * block_size * n_embd numbers.

    It is written in place, so it serves inference only, under torch.no_grad.
    """

    def __init__(self, n_layer: int, block_size: int) -> None:
        self.layers = [LayerCache(block_size) for _ in range(n_layer)]

    @property
    def length(self) -> int:
        """Tokens read so far, which is also the position of the next one."""
        return self.layers[0].length

    def of_layers(self, first: int, n_layer: int) -> "KeyValueCache":
        """The same memory of n_layer layers from `first` on, as a cache of a network that has no others."""
        part = KeyValueCache(0, 0)
        part.layers = self.layers[first : first + n_layer]
        return part

    def keep(self, length: int) -> None:
        """Forget the tokens after the first `length`, keep the memory."""
        for layer in self.layers:
            layer.length = length


# Documents side by side in one sequence, each read as if it were alone.


@dataclass(frozen=True)
class Documents:
    """Places of the tokens of sequences in their documents, and the tokens that each may attend to."""

    positions: Tensor
    """(B, T) int64: 0 for the first token of a document, and for the first of a sequence."""
    mask: Tensor
    """(B, 1, T, tokens so far), added to attention's logits: 0 for those of the same document, -inf for all others.

    It holds B * T * T numbers of the dtype that attention computes in, once for all layers."""

    @classmethod
    def of(cls, tokens: Tensor, first: int | None, dtype: torch.dtype, last: int | None = None) -> Self:
        """tokens: (B, T) int64   first: the id that each document begins with   dtype: of the weights
        last: in place of first, the id that each ends with
        """
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
        index = torch.arange(tokens.size(1), device=tokens.device)  # (T,)
        begins = tokens == first if last is None else F.pad(tokens == last, (1, -1))  # (B, T)
        starts = (index * begins).cummax(dim=1).values  # (B, T): where the document of each token begins
        is_seen = (index >= starts[:, :, None]) & (index <= index[:, None])  # (B, T, T): [b, i, j], whether i sees j
        mask = torch.zeros(is_seen.shape, dtype=dtype, device=tokens.device)
        return cls(index - starts, mask.masked_fill_(~is_seen, -torch.inf).unsqueeze(1))

    @classmethod
    def behind(cls, length: int, T: int, weight: Tensor) -> Self:
        """T tokens more of one document, of which a cache holds the first `length`. weight: any of the network's"""
        positions = torch.arange(length, length + T, device=weight.device)  # (T,)
        is_seen = torch.arange(length + T, device=weight.device) <= positions[:, None]  # (T, length + T)
        mask = torch.zeros(is_seen.shape, dtype=weight.dtype, device=weight.device)
        return cls(positions[None], mask.masked_fill_(~is_seen, -torch.inf)[None, None])
