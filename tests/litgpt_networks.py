"""Networks of Lightning-AI/litgpt as they ran in the spring of 2024: what is held, and in which precision, follows from
the code. Fabric hands logits on in float32."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class Shape:
    layers: int
    channels: int
    heads: int
    groups: int
    """Of heads that share their key and value."""
    inside: int
    """Channels of the MLP."""
    vocab: int
    tokens: int
    """Length of a sequence."""
    rotated: int
    """Channels of a head that are rotated."""
    gated: bool = True
    """MLP of three matrices, RMSNorm and no biases; otherwise two matrices, LayerNorm and biases."""
    gelu: bool = False
    parallel: bool = False
    """Attention and MLP beside each other."""
    shares_norm: bool = False
    head_bias: bool = False
    offset: bool = False
    """RMSNorm adds 1 to its weight."""

    @property
    def head_size(self):
        return self.channels // self.heads


def tiny_llama(tokens):
    return Shape(22, 2048, 32, 4, 5632, 32000, tokens, rotated=64)


GEMMA_2B = Shape(18, 2048, 8, 1, 16384, 256000, 512, rotated=256, gelu=True, offset=True)
PHI_2 = Shape(32, 2560, 32, 32, 10240, 51200, 512, 32, False, True, True, shares_norm=True, head_bias=True)
STABLELM_3B = Shape(16, 4096, 32, 32, 16384, 50688, 512, 32, False, True, True)


class LitGPT(nn.Module):
    """finetunes: the loss in chunks, and logits that the loop holds until it has the next ones   fused: AdamW
    recomputes: each block"""

    def __init__(self, shape, finetunes=False, fused=False, recomputes=False):
        super().__init__()
        self.shape, self.finetunes, self.fused, self.recomputes = shape, finetunes, fused, recomputes
        self.tokens = nn.Embedding(shape.vocab, shape.channels)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = norm(shape)
        self.head = nn.Linear(shape.channels, shape.vocab, bias=shape.head_bias)
        self.register_buffer("rotation", torch.ones(2, shape.tokens, shape.rotated))

    def forward(self, tokens, targets):
        logits = self.head(self.norm(self.hidden(tokens))).float()
        if not self.finetunes:
            return F.cross_entropy(logits.reshape(-1, self.shape.vocab), targets.reshape(-1))
        self.held = logits
        logits, targets = logits[..., :-1, :].reshape(-1, self.shape.vocab), targets[..., 1:].reshape(-1)
        chunks = zip(logits.split(128), targets.split(128), strict=True)
        losses = [F.cross_entropy(some, theirs, reduction="none") for some, theirs in chunks]
        return torch.cat(losses).sum() / targets.numel()

    def hidden(self, tokens):
        x = self.tokens(tokens)
        for block in self.blocks:
            if self.recomputes:
                x = checkpoint(block, x, self.rotation, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, self.rotation)
        return x

    def configure_model(self):
        """FSDP2 in the place of FSDP, block by block."""
        from torch.distributed.fsdp import fully_shard

        for block in self.blocks:
            fully_shard(block, mesh=self._device_mesh["data_parallel"])
        fully_shard(self, mesh=self._device_mesh["data_parallel"], reshard_after_forward=False)
        self.no_sync = self.without_exchange

    @contextmanager
    def without_exchange(self):
        """Fabric's no_backward_sync: whole gradients add up on each device until the last micro-batch of a step."""
        self.set_requires_gradient_sync(False)
        yield
        self.set_requires_gradient_sync(True)

    def configure_optimizers(self):
        return {"optimizer": torch.optim.AdamW(self.parameters(), fused=self.fused, foreach=not self.fused)}


def norm(shape):
    return RMSNorm(shape) if shape.gated else nn.LayerNorm(shape.channels)


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape, bias = shape, not shape.gated
        self.norm1, self.norm2 = norm(shape), None if shape.shares_norm else norm(shape)
        self.qkv = nn.Linear(shape.channels, (shape.heads + 2 * shape.groups) * shape.head_size, bias=bias)
        self.out = nn.Linear(shape.channels, shape.channels, bias=bias)
        self.up = nn.Linear(shape.channels, shape.inside, bias=bias)
        self.gate = nn.Linear(shape.channels, shape.inside, bias=False) if shape.gated else None
        self.down = nn.Linear(shape.inside, shape.channels, bias=bias)

    def forward(self, x, rotation):
        normed = self.norm1(x)
        attended = self.attention(normed, rotation)
        if self.shape.parallel:
            return self.mlp(normed if self.norm2 is None else self.norm2(x)) + attended + x
        x = attended + x
        return self.mlp(self.norm2(x)) + x

    def mlp(self, x):
        if self.gate is None:
            return self.down(F.gelu(self.up(x)))
        gate = self.gate(x)
        return self.down((F.gelu(gate) if self.shape.gelu else F.silu(gate)) * self.up(x))

    def attention(self, x, rotation):
        B, T, C = x.shape
        groups, D = self.shape.groups, self.shape.head_size
        shared = self.shape.heads // groups
        q, k, v = self.qkv(x).view(B, T, groups, shared + 2, D).permute(0, 2, 3, 1, 4).split((shared, 1, 1), dim=2)
        if shared > 1:
            k, v = (part.expand(B, groups, shared, T, D) for part in (k, v))
        q, k, v = (part.reshape(B, -1, T, D) for part in (q, k, v))
        y = F.scaled_dot_product_attention(self.rotated(q, *rotation), self.rotated(k, *rotation), v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, C))

    def rotated(self, x, cos, sin):
        n = self.shape.rotated
        part = x[..., :n]
        turned = torch.cat((-part[..., n // 2 :], part[..., : n // 2]), dim=-1)
        return torch.cat((part * cos + turned * sin, x[..., n:]), dim=-1)


class RMSNorm(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.ones(shape.channels)), shape.offset

    def forward(self, x):
        wide = x.float()
        normed = (wide * torch.rsqrt(torch.mean(wide * wide, dim=-1, keepdim=True) + 1e-5)).to(x.dtype)
        return normed * (1 + self.weight) if self.offset else normed * self.weight
