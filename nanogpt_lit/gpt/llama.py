"""The Llama family, under the names that transformers gives its parameters: Llama 2 and 3, SmolLM2, Qwen3.

Touvron et al., LLaMA (arXiv:2302.13971); Qwen3 (arXiv:2505.09388) adds a norm of queries and keys. What it is made of:
root mean square norms (Zhang and Sennrich, arXiv:1910.07467), positions as rotations (Su et al., arXiv:2104.09864),
a gated MLP (Shazeer, arXiv:2002.05202), and keys and values that several heads share (Ainslie et al.,
arXiv:2305.13245). No biases. Shapes as in network.py; K heads of keys and values.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.attention import Documents, KeyValueCache, LayerCache, attention
from nanogpt_lit.gpt.layers import RMSNorm, RopeScaling, Rotary
from nanogpt_lit.gpt.network import MOST_HEADS, Block, Network, NetworkConfig


@dataclass(frozen=True)
class LlamaConfig(NetworkConfig):
    """The shape of a network of the Llama family: Llama without qk_norm, Qwen3 with it."""

    SECTION: ClassVar[str] = "llama"

    n_kv_head: int | None = None
    """Heads of keys and values, each shared by n_head / n_kv_head heads of queries. None: as many as n_head."""

    head_size: int | None = None
    """Channels per head, an even number. None: n_embd / n_head."""

    n_hidden: int | None = None
    """Channels inside the MLP. None: 8/3 of n_embd, rounded up to a multiple of 32, which has as many weights as
    GPT-2's MLP."""

    qk_norm: bool = False
    """Norm queries and keys per head before they meet, with a learnt scale per channel, which bounds attention's
    logits: Henry et al. (arXiv:2010.04245)."""

    norm_eps: float = 1e-5
    """Added to the mean square in norms. Qwen3 has 1e-6."""

    rope_base: float = 10_000.0
    """The slowest rotation turns once in about 2 pi * rope_base tokens. Longer sequences take a larger one."""

    rope_scaling: RopeScaling | None = None
    """Llama 3's stretching of the rotations; null has none."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):  # as checkpoints and YAMLs have it
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        super().__post_init__()
        self.check_sizes("n_kv_head", "head_size", "n_hidden")
        if self.head_size is None:
            self.check_heads()
        if self.n_head % self.kv_heads != 0:
            works = max(n for n in range(1, min(self.kv_heads, MOST_HEADS) + 1) if self.n_head % n == 0)
            raise UserError(
                f"model.llama.n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}; n_kv_head={works} does."
            )
        if (D := self.channels_per_head) % 2 != 0:
            raise UserError(
                f"rotary positions turn pairs of channels, and model.llama has {D} channels per head; "
                f"model.llama.head_size={D + 1} gives an even number."
            )
        if self.rope_base <= 1 or self.norm_eps <= 0:
            raise UserError(
                f"model.llama.rope_base={self.rope_base} must be more than 1 and norm_eps={self.norm_eps} more than 0; "
                "Llama 2 has 10000 and 1e-5."
            )

    @property
    def channels_per_head(self) -> int:
        return self.head_size or self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """K."""
        return self.n_kv_head or self.n_head

    @property
    def hidden_channels(self) -> int:
        """Inside the MLP."""
        return self.n_hidden or -(-8 * self.n_embd // (3 * 32)) * 32


class Llama(Network):
    """A network of the Llama family with its head."""

    EMBEDDING: ClassVar[str] = "model.embed_tokens.weight"
    config: LlamaConfig

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        assert config.vocab_size is not None
        self.model = LlamaBody(config, config.vocab_size)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.tie()
        self.init_weights()

    def init_weights(self) -> None:
        """Initialise as gpt2.py does: N(0, 0.02), norms one, each projection into the residual stream scaled down by
        the network's depth."""
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer))
            else:
                nn.init.normal_(parameter, std=0.02)

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layers

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        if start + tokens.size(1) > self.config.block_size:
            raise self.too_long(start + tokens.size(1))
        # Of documents the mask is enough: a rotation sees only how far apart two tokens are.
        return self.model(tokens, cache, documents.mask if documents is not None else None)


class LlamaBody(nn.Module):
    """Everything of a Llama but its head."""

    def __init__(self, config: LlamaConfig, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, config.n_embd)
        self.drop = nn.Dropout(config.dropout)
        # The same in all blocks.
        rotary = Rotary(config.block_size, config.channels_per_head, config.rope_base, config.rope_scaling)
        self.layers = nn.ModuleList(LlamaBlock(config, rotary) for _ in range(config.n_layer))
        self.norm = RMSNorm(config.n_embd, eps=config.norm_eps)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = self.drop(self.embed_tokens(tokens))  # (B, T, C)
        for layer, block in enumerate(self.layers):
            x = block(x, cache.layers[layer] if cache is not None else None, mask)
        return self.norm(x)


class LlamaBlock(Block):
    def __init__(self, config: LlamaConfig, rotary: Rotary) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.self_attn = GroupedQueryAttention(config, rotary)
        self.post_attention_layernorm = RMSNorm(config.n_embd, eps=config.norm_eps)
        self.mlp = GatedMLP(config)
        self.draws = config.dropout > 0

    @property
    def attention_projection(self) -> nn.Linear:
        return self.self_attn.o_proj

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cache, mask)
        return x + self.mlp(self.post_attention_layernorm(x))

    def into_attention(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.self_attn.products(self.input_layernorm(x))

    def attend(self, *products: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = products
        return self.self_attn.attend(q, k, v, mask=mask)

    def into_mlp(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.post_attention_layernorm(x)
        return self.mlp.gate_proj(x), self.mlp.up_proj(x)

    def out_of_mlp(self, *products: Tensor) -> Tensor:
        gate, up = products
        return self.mlp.down_proj(F.silu(gate) * up)

    def drop(self, x: Tensor) -> Tensor:
        return self.mlp.dropout(x)


class GroupedQueryAttention(nn.Module):
    def __init__(self, config: LlamaConfig, rotary: Rotary) -> None:
        super().__init__()
        C, D, K = config.n_embd, config.channels_per_head, config.kv_heads
        self.head_size = D
        self.rotary = rotary
        self.q_proj = nn.Linear(C, config.n_head * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(config.n_head * D, C, bias=False)
        self.q_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(D, eps=config.norm_eps) if config.qk_norm else None
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attend(*self.products(x), cache=cache, mask=mask)

    def products(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H * D), keys and values (B, T, K * D)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        start = cache.length if cache is not None else 0
        q, k = self.placed(self.heads(q), self.q_norm, start), self.placed(self.heads(k), self.k_norm, start)
        v = self.heads(v)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, tokens so far, D)
        # A single query is the newest token and may see every key. Several are always as many as the keys.
        is_causal = mask is None and (cache is None or q.size(2) > 1)
        y = attention(q, k, v, is_causal=is_causal, mask=mask)
        return self.resid_dropout(self.o_proj(y.transpose(1, 2).flatten(2)))

    def heads(self, x: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)"""
        return x.unflatten(2, (-1, self.head_size)).transpose(1, 2)

    def placed(self, x: Tensor, norm: RMSNorm | None, start: int) -> Tensor:
        """Queries or keys normed, and turned by their positions, which begin at start; the dtype stays."""
        normed = x if norm is None else norm(x.to(norm.weight.dtype))  # no norm is to be computed in 16 bits
        return self.rotary(normed, start).to(x.dtype)


class GatedMLP(nn.Module):
    """SwiGLU: `up_proj` times the SiLU of `gate_proj`, brought back to C channels. Shazeer (arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.hidden_channels, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.hidden_channels, bias=False)
        self.down_proj = nn.Linear(config.hidden_channels, config.n_embd, bias=False)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)))
