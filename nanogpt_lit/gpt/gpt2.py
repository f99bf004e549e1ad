"""GPT-2 as published and as nanoGPT trains it, under GPT-2's own parameter names.

Radford et al., Language Models are Unsupervised Multitask Learners, 2019. Shapes as in network.py.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.attention import Documents, KeyValueCache, LayerCache, attention
from nanogpt_lit.gpt.network import Block, Network, NetworkConfig


@dataclass(frozen=True)
class GPTConfig(NetworkConfig):
    """The shape of a GPT-2. The defaults are GPT-2 small, 124M parameters; n_head must divide n_embd."""

    SECTION: ClassVar[str] = "gpt"

    bias: bool = True
    """Biases in linear layers and layer norms, as in GPT-2. False is a little faster and about as good."""

    gelu: Literal["tanh", "erf"] = "tanh"
    """GPT-2 was published with the tanh approximation; nanoGPT trains with the exact (erf) one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_heads()
        if self.gelu not in ("tanh", "erf"):
            raise UserError(f"model.gpt.gelu={self.gelu!r} is not known; use 'tanh' (GPT-2) or 'erf' (nanoGPT).")


class GPT(Network):
    """GPT-2 with its head."""

    EMBEDDING: ClassVar[str] = "transformer.wte.weight"
    config: GPTConfig

    def __init__(self, config: GPTConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None
        self.transformer = Transformer(config, config.vocab_size)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, 0.02), biases zero, each projection into the residual stream scaled down.

        The stream is the sum of 2 * n_layer such projections; 1/sqrt(2 * n_layer) keeps its variance from growing
        with depth (GPT-2 paper, section 2.3).
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif ".ln_" in name:
                nn.init.ones_(parameter)
            elif name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def embedding(self) -> nn.Embedding:
        return self.transformer.wte

    @property
    def blocks(self) -> nn.ModuleList:
        return self.transformer.h

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        if start + tokens.size(1) > self.config.block_size:
            raise self.too_long(start + tokens.size(1))
        return self.transformer(tokens, start, cache, documents)


class Transformer(nn.Module):
    """Everything of GPT-2 but its head."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(GPTBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, tokens: Tensor, start: int, cache: KeyValueCache | None, documents: Documents | None) -> Tensor:
        """start: the position of the first of the tokens (B, T)"""
        if documents is not None:
            positions = documents.positions  # (B, T)
        else:
            # Made where they are looked up: from the device to host memory they would wait for all that it computes.
            positions = torch.arange(start, start + tokens.size(1), device=self.wpe.weight.device)
        x = self.wte(tokens)  # (B, T, C)
        x = self.drop(x + self.wpe(positions).to(x.device))
        mask = documents.mask if documents is not None else None
        for layer, block in enumerate(self.h):
            x = block(x, cache.layers[layer] if cache is not None else None, mask)
        return self.ln_f(x)


class GPTBlock(Block):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.draws = config.dropout > 0

    @property
    def attention_projection(self) -> nn.Linear:
        return self.attn.c_proj

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))

    def into_attention(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.attn.c_attn(self.ln_1(x)),)

    def attend(self, *products: Tensor, mask: Tensor | None = None) -> Tensor:
        (qkv,) = products
        return self.attn.attend(qkv, mask=mask)

    def into_mlp(self, x: Tensor) -> tuple[Tensor, ...]:
        return (self.mlp.c_fc(self.ln_2(x)),)

    def out_of_mlp(self, *products: Tensor) -> Tensor:
        (inside,) = products
        return self.mlp.c_proj(self.mlp.activation(inside))

    def drop(self, x: Tensor) -> Tensor:
        return self.mlp.dropout(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attend(self.c_attn(x), cache, mask)

    def attend(self, qkv: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        """Queries, keys and values (B, T, 3 * C) -> (B, T, C)"""
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        H, D = self.n_head, C // self.n_head
        q, k, v = qkv.split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)
        v = v.view(B, T, H, D).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, tokens so far, D)
        dropout = self.dropout if self.training else 0.0
        # A single query is the newest token and may see every key. Several are always as many as the keys.
        is_causal = mask is None and (cache is None or T > 1)
        y = attention(q, k, v, dropout_p=dropout, is_causal=is_causal, mask=mask)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.activation = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))
