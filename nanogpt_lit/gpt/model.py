"""GPT-2 as published and as nanoGPT trains it, under GPT-2's own parameter names.

Shapes: B batch, T time, C channels (n_embd), V vocabulary, H heads, D = C / H channels per head.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.attention import Documents, KeyValueCache, LayerCache, Rotary, attention
from nanogpt_lit.gpt.loss import as_finite_as_its_gradients, cross_entropy


@dataclass(frozen=True)
class GPTConfig:
    """The shape of the network. The defaults are GPT-2 small, 124M parameters."""

    block_size: int = 1024
    """Longest sequence in tokens."""

    vocab_size: int | None = None
    """Rows of the token embedding. None takes the tokenizer's size; the CLI fills it in before the model is built."""

    n_layer: int = 12
    """Transformer blocks."""

    n_head: int = 12
    """Attention heads per block; must divide n_embd."""

    n_embd: int = 768
    """Channels of the residual stream."""

    dropout: float = 0.0
    """Probability of dropping an embedding, an attention weight or a block's output. 0 for pretraining; try 0.1 or
    more when the text is seen many times."""

    bias: bool = True
    """Biases in linear layers and layer norms, as in GPT-2. False is a little faster and about as good."""

    tied_head: bool = True
    """One matrix for the token embedding and the output head, as in GPT-2."""

    gelu: Literal["tanh", "erf"] = "tanh"
    """GPT-2 was published with the tanh approximation; nanoGPT trains with the exact (erf) one."""

    activation: Literal["gelu", "relu2"] = "gelu"
    """Between the two matrices of the MLP. relu2 is the square of ReLU: So et al., Primer (arXiv:2109.08668)."""

    positions: Literal["learned", "rotary"] = "learned"
    """learned: an embedding per position, as in GPT-2. rotary: queries and keys are turned by their position, and
    nothing is learned: Su et al., RoFormer (arXiv:2104.09864)."""

    qk_norm: bool = False
    """Scale each query and key to length sqrt(n_embd / n_head) before they meet, which bounds attention's logits:
    Henry et al. (arXiv:2010.04245), as Dehghani et al., ViT-22B (arXiv:2302.05442), but with nothing learned."""

    document_start: int | None = None
    """The id that begins a document: training and evaluation then read each document of a sequence as if it stood
    alone. None lets attention cross documents, as GPT-2 was trained. data.documents decides; the CLI fills it in."""

    def __post_init__(self) -> None:
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            size = getattr(self, name)
            if size is not None and size < 1:
                default = GPTConfig.__dataclass_fields__[name].default
                raise UserError(f"model.gpt.{name}={size} must be at least 1; GPT-2 uses {default or 50257}.")
        if self.n_embd % self.n_head != 0:
            divisors = [n for n in range(1, self.n_embd + 1) if self.n_embd % n == 0]
            n_head = min(divisors, key=lambda n: abs(n - self.n_head))
            raise UserError(
                f"model.gpt.n_embd={self.n_embd} does not divide into n_head={self.n_head} equal heads; "
                f"n_head={n_head} gives {self.n_embd // n_head} channels per head."
            )
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.gpt.dropout={self.dropout} is not in [0, 1); 0.0 turns dropout off.")
        if self.gelu not in ("tanh", "erf"):
            raise UserError(f"model.gpt.gelu={self.gelu!r} is not known; use 'tanh' (GPT-2) or 'erf' (nanoGPT).")
        for name, known in (("activation", ("gelu", "relu2")), ("positions", ("learned", "rotary"))):
            if (value := getattr(self, name)) not in known:
                raise UserError(f"model.gpt.{name}={value!r} is not known; use {known[0]!r} (GPT-2) or {known[1]!r}.")
        if self.positions == "rotary" and (self.n_embd // self.n_head) % 2 != 0:
            raise UserError(
                f"model.gpt.positions=rotary turns pairs of channels, and n_embd={self.n_embd} over "
                f"n_head={self.n_head} gives each head {self.n_embd // self.n_head}; n_embd={2 * self.n_embd} gives an "
                "even number."
            )


def config_of_checkpoint(saved: Mapping[str, Any]) -> GPTConfig:
    """The network that a checkpoint names. Raises UserError for one that this version does not have."""
    for name in saved.keys() - GPTConfig.__dataclass_fields__.keys():
        raise UserError(
            f"the checkpoint's network has model.gpt.{name}={saved[name]}, which this version of nanogpt_lit does not "
            "know; use the version that wrote it."
        )
    return GPTConfig(**saved)


def check_same_network(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raises UserError where a checkpoint holds another network. saved, here: fields of GPTConfig"""
    before = asdict(config_of_checkpoint(saved))
    differing = [
        f"{name} is {before[name]} there and {value} here"
        for name, value in here.items()
        if before[name] != value and name not in ("dropout", "document_start")
    ]
    if differing:
        raise UserError(
            f"The checkpoint holds another network: model.gpt.{', '.join(differing)}; "
            "use the YAML that it was trained with."
        )


class GPT(nn.Module):
    """tokens (B, T) -> logits (B, T, V). Raises UserError when config.vocab_size is None."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError("model.gpt.vocab_size=None leaves the embedding without a size; GPT-2's is 50257.")
        self.config = config
        self.transformer = Transformer(config, config.vocab_size)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.lm_head.weight = self.transformer.wte.weight
        # An attribute, so that memory/techniques.py can put the one in chunks here.
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each position. Training calls `loss`, which need not keep them."""
        return self.lm_head(self.hidden(tokens))

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        """The last hidden states (B, T, C), normed and ready for the head.

        tokens: (B, T) int64. With a cache, the tokens continue those it holds, and are added to it.
        documents: of the tokens; None reads each sequence as one
        Raises UserError when the sequence is longer than block_size.
        """
        return self.transformer(tokens, cache, documents)

    def documents(self, tokens: Tensor) -> Documents | None:
        """The documents of tokens (B, T) where config.document_start keeps them apart."""
        first = self.config.document_start
        return None if first is None else Documents.of(tokens, first, self.lm_head.weight.dtype)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets (B, T) given tokens (B, T); IGNORE_INDEX targets are skipped."""
        documents = None if self.config.document_start is None else self.documents(tokens)
        hidden = self.hidden(tokens, documents=documents)
        return as_finite_as_its_gradients(self.cross_entropy(hidden, self.lm_head.weight, targets))

    def parameter_count(self, non_embedding: bool) -> int:
        """Number of parameters, a tied matrix counted once.

        non_embedding leaves out what is only looked up and never multiplied, as nanoGPT's get_num_params: the
        positions, and the token embedding unless it is also the head.
        """
        count = sum(p.numel() for p in self.parameters())
        if non_embedding:
            count -= sum(p.numel() for name, p in self.named_parameters() if "wpe" in name)
            if not self.config.tied_head:
                count -= self.transformer.wte.weight.numel()
        return count

    def flops_per_token(self, T: int) -> int:
        """Forward and backward FLOPs per trained token at sequence length T.

        PaLM (arXiv:2204.02311), appendix B, as in nanoGPT's estimate_mfu: 6 N for the matrices, 12 L H D T for
        attention. Attention is counted in full, though half of it is masked; recomputed activations are not counted.
        """
        L, C = self.config.n_layer, self.config.n_embd  # C = H * D
        return 6 * self.parameter_count(non_embedding=True) + 12 * L * C * T


class Transformer(nn.Module):
    """Everything of GPT-2 but its head."""

    def __init__(self, config: GPTConfig, vocab_size: int) -> None:
        super().__init__()
        self.block_size = config.block_size
        self.wte = nn.Embedding(vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)

    def forward(self, tokens: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        start = cache.length if cache is not None else 0
        end = start + tokens.size(1)
        if end > self.block_size:
            raise UserError(
                f"A sequence of {end} tokens is longer than model.gpt.block_size={self.block_size}; "
                "give shorter sequences or a larger block_size."
            )
        x = self.wte(tokens)  # (B, T, C)
        if self.wpe is not None:
            # Made where they are looked up: from the device to host memory they would wait for all that it computes.
            positions = torch.arange(start, end, device=self.wpe.weight.device)
            x = x + self.wpe(positions if documents is None else documents.positions).to(x.device)
        x = self.drop(x)
        mask = documents.mask if documents is not None else None
        for layer, block in enumerate(self.h):
            x = block(x, cache.layers[layer] if cache is not None else None, mask)
        return self.ln_f(x)


class Block(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache, mask)
        return x + self.mlp(self.ln_2(x))


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.qk_norm = config.qk_norm
        D = config.n_embd // config.n_head
        self.rotary = Rotary(config.block_size, D) if config.positions == "rotary" else None
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        return self.attend(self.c_attn(x), cache, mask)

    def attend(self, qkv: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, 3 * C) -> (B, T, C)   mask: of documents (B, 1, T, T); None attends to all tokens so far"""
        B, T, C = qkv.size(0), qkv.size(1), qkv.size(2) // 3
        H, D = self.n_head, C // self.n_head
        q, k, v = qkv.split(C, dim=2)  # each (B, T, C)
        q = q.view(B, T, H, D).transpose(1, 2)  # (B, H, T, D)
        k = k.view(B, T, H, D).transpose(1, 2)
        v = v.view(B, T, H, D).transpose(1, 2)
        if self.qk_norm:
            q, k = (F.rms_norm(x, (D,)) for x in (q, k))
        if self.rotary is not None:
            start = cache.length if cache is not None else 0
            q, k = self.rotary(q, start), self.rotary(k, start)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, tokens so far, D)
        # A single query is the newest token and may see every key. Several are always as many as the keys.
        dropout = self.dropout if self.training else 0.0
        is_causal = mask is None and (cache is None or T > 1)
        y = attention(q, k, v, dropout_p=dropout, is_causal=is_causal, mask=mask)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        gelu = nn.GELU(approximate="tanh" if config.gelu == "tanh" else "none")
        self.activation = SquaredReLU() if config.activation == "relu2" else gelu
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class SquaredReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x).square()
