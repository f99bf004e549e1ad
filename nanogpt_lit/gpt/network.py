"""The part that all networks share, and all that the rest of the program sees of one: its shape, blocks and loss.

Shapes: B batch, T time, C channels (n_embd), V vocabulary, H heads, D channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.attention import Documents, KeyValueCache, LayerCache
from nanogpt_lit.gpt.layers import CompiledEmbedding
from nanogpt_lit.gpt.loss import as_finite_as_its_gradients, cross_entropy

HEAD = "lm_head.weight"
"""The name of the head's matrix in every network's state_dict()."""
MOST_HEADS = 2**16
"""Largest number of heads to propose in an error: a stranger's file may name billions."""
GPT2_SMALL = {"block_size": 1024, "vocab_size": 50257, "n_layer": 12, "n_head": 12, "n_embd": 768}
"""Sizes that an error names as an example."""


@dataclass(frozen=True)
class NetworkConfig:
    """The shape of a network, as far as all have it. A subclass is a section of the YAML, below `model`."""

    SECTION: ClassVar[str]
    """The name of that section."""

    block_size: int = 1024
    """Longest sequence in tokens."""

    vocab_size: int | None = None
    """Rows of the token embedding. None takes the tokenizer's size; the CLI fills it in before the model is built."""

    n_layer: int = 12
    """Transformer blocks."""

    n_head: int = 12
    """Attention heads per block."""

    n_embd: int = 768
    """Channels of the residual stream."""

    dropout: float = 0.0
    """Probability of dropping an embedding or what attention and MLP add, and in GPT-2's network an attention weight. 0
    for pretraining; try 0.1 or more when the text is seen many times."""

    tied_head: bool = True
    """One matrix for the token embedding and the output head."""

    document_start: int | None = None
    """The id that begins a document: training and evaluation then read each document of a sequence as if it stood
    alone. None lets attention cross documents. data.documents decides; the CLI fills it in."""

    document_end: int | None = None
    """The id that ends a document, in place of document_start: so conversations are kept apart, each of which begins
    as its chat template says."""

    def __post_init__(self) -> None:
        self.check_sizes("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"{self.key('dropout')}={self.dropout} is not in [0, 1); 0.0 turns dropout off.")

    @property
    def channels_per_head(self) -> int:
        """D."""
        return self.n_embd // self.n_head

    def key(self, name: str) -> str:
        """A field's key in the YAML."""
        return f"model.{self.SECTION}.{name}"

    def check_sizes(self, *names: str) -> None:
        """Raises UserError for a size below 1; None is none yet."""
        for name in names:
            size = getattr(self, name)
            if size is not None and size < 1:
                usual = GPT2_SMALL.get(name)
                works = f"; GPT-2 uses {usual}" if usual else ", or null"
                raise UserError(f"{self.key(name)}={size} must be at least 1{works}.")

    def check_heads(self) -> None:
        """Raises UserError where the channels cannot be shared out among the heads."""
        if self.n_embd % self.n_head != 0:
            divisors = [n for n in range(1, min(self.n_embd, MOST_HEADS) + 1) if self.n_embd % n == 0]
            n_head = min(divisors, key=lambda n: abs(n - self.n_head))
            raise UserError(
                f"{self.key('n_embd')}={self.n_embd} does not divide into n_head={self.n_head} equal heads; "
                f"n_head={n_head} gives {self.n_embd // n_head} channels per head."
            )


class Network(nn.Module):
    """tokens (B, T) -> logits (B, T, V). Raises UserError when config.vocab_size is None.

    A subclass has the modules, with `lm_head` the last of them, and says where its embedding and its blocks are.
    """

    EMBEDDING: ClassVar[str]
    """The name of the token embedding's matrix in state_dict()."""
    lm_head: nn.Linear

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        if config.vocab_size is None:
            raise UserError(f"{config.key('vocab_size')}=None leaves the embedding without a size; GPT-2's is 50257.")
        self.config = config
        # An attribute, so that memory/techniques.py can put the one in chunks here.
        self.cross_entropy: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy

    @property
    def embedding(self) -> nn.Embedding:
        """The embedding of the tokens, (V, C)."""
        raise NotImplementedError

    @property
    def blocks(self) -> nn.ModuleList:
        """Each a Block."""
        raise NotImplementedError

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        """The last hidden states (B, T, C), normed and ready for the head.

        tokens: (B, T) int64. With a cache, the tokens continue those it holds, and are added to it.
        documents: of the tokens; None reads each sequence as one
        Raises UserError when the sequence is longer than block_size.
        """
        raise NotImplementedError

    def tie(self) -> None:
        """Gives the head the embedding's matrix where config.tied_head asks for it."""
        if self.config.tied_head:
            self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (B, T, V) of the token after each position. Training calls `loss`, which need not keep them."""
        return self.lm_head(self.hidden(tokens))

    def next_logits(self, tokens: Tensor, cache: KeyValueCache | None, documents: Documents | None) -> Tensor:
        """Logits (B, V) of the token that follows the last, for generation. The arguments are those of `hidden`."""
        return self.lm_head(self.hidden(tokens, cache, documents)[:, -1])

    def documents(self, tokens: Tensor) -> Documents | None:
        """The documents of tokens (B, T) where config.document_start or document_end keeps them apart."""
        first, last = self.config.document_start, self.config.document_end
        if first is None and last is None:
            return None
        return Documents.of(tokens, first, self.lm_head.weight.dtype, last)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of targets (B, T) given tokens (B, T); IGNORE_INDEX targets are skipped."""
        hidden = self.hidden(tokens, documents=self.documents(tokens))
        return as_finite_as_its_gradients(self.cross_entropy(hidden, self.lm_head.weight, targets))

    def compiled_loss(self) -> Callable[[Tensor, Tensor], Tensor]:
        """`loss` by torch.compile. Its embeddings become CompiledEmbedding, so that it repeats itself to the bit."""
        for part in self.modules():
            if type(part) is nn.Embedding:
                part.__class__ = CompiledEmbedding
        return torch.compile(self.loss)

    def too_long(self, length: int) -> UserError:
        """The error of a sequence longer than block_size."""
        return UserError(
            f"A sequence of {length} tokens is longer than {self.config.key('block_size')}={self.config.block_size}; "
            "give shorter sequences or a larger block_size."
        )

    def parameter_count(self, non_embedding: bool) -> int:
        """Number of parameters, a tied matrix counted once.

        non_embedding leaves out what is only looked up and never multiplied, as nanoGPT's get_num_params: positions,
        and the token embedding unless it is also the head.
        """
        count = sum(p.numel() for p in self.parameters())
        if non_embedding:
            tables = [part.weight for part in self.modules() if isinstance(part, nn.Embedding)]
            count -= sum(table.numel() for table in tables if table is not self.lm_head.weight)
        return count

    def flops_per_token(self, T: int) -> int:
        """Forward and backward FLOPs per trained token at sequence length T.

        PaLM (arXiv:2204.02311), appendix B, as in nanoGPT's estimate_mfu: 6 N for the matrices, 12 L H D T for
        attention. Attention is counted in full, though half of it is masked; recomputed activations are not counted.
        """
        config = self.config
        attention = 12 * config.n_layer * config.n_head * config.channels_per_head * T
        return 6 * self.parameter_count(non_embedding=True) + attention


class Block(nn.Module):
    """x + attention of x, then x + MLP of that: (B, T, C) -> (B, T, C), with dropout.

    Beside forward it has the stages that forward consists of, cut where a memory technique comes between what is dear
    to compute and what is cheap.
    """

    draws: bool
    """True where dropout draws random numbers in training."""

    @property
    def attention_projection(self) -> nn.Linear:
        """The last product of `attend`."""
        raise NotImplementedError

    def into_attention(self, x: Tensor) -> tuple[Tensor, ...]:
        """The linear layers before attention, applied to the normed x: queries, keys and values, together or apart."""
        raise NotImplementedError

    def attend(self, *products: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention and its projection (B, T, C). mask: of documents (B, 1, T, T); None sees all tokens so far"""
        raise NotImplementedError

    def into_mlp(self, x: Tensor) -> tuple[Tensor, ...]:
        """The linear layers before the activation, applied to the normed x."""
        raise NotImplementedError

    def out_of_mlp(self, *products: Tensor) -> Tensor:
        """The rest of the MLP before its dropout, (B, T, C): so a product of matrices is the last that is computed."""
        raise NotImplementedError

    def drop(self, x: Tensor) -> Tensor:
        """Dropout of what the MLP adds."""
        raise NotImplementedError

    def forward(self, x: Tensor, cache: LayerCache | None = None, mask: Tensor | None = None) -> Tensor:
        """The block of a whole sequence, or with a cache of what follows those tokens that it holds."""
        raise NotImplementedError
