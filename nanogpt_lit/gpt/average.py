"""Several networks that answer as one: the mean of their probabilities of the next token."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt_lit.gpt.attention import Documents, KeyValueCache
from nanogpt_lit.gpt.loss import IGNORE_INDEX
from nanogpt_lit.gpt.network import Network, NetworkConfig


class Average(Network):
    """Networks of the same tokens; their shapes may differ. It predicts and is not trained.

    Its hidden states are theirs side by side, and its logits the logarithm of their mean probabilities. It reads as
    many tokens as the shortest of their block_sizes.
    """

    def __init__(self, gpts: Sequence[Network]) -> None:
        configs = [gpt.config for gpt in gpts]
        (vocab_size,) = {config.vocab_size for config in configs}
        (document_start,) = {config.document_start for config in configs}
        super().__init__(
            NetworkConfig(
                block_size=min(config.block_size for config in configs),
                vocab_size=vocab_size,
                n_layer=sum(config.n_layer for config in configs),
                n_embd=sum(config.n_embd for config in configs),
                document_start=document_start,
            )
        )
        self.gpts: Any = nn.ModuleList(gpts)  # whose elements have no type
        self.lm_head = MeanOfHeads([gpt.lm_head for gpt in gpts])  # type: ignore[assignment]

    def hidden(self, tokens: Tensor, cache: KeyValueCache | None = None, documents: Documents | None = None) -> Tensor:
        states, first = [], 0
        for gpt in self.gpts:
            part = None if cache is None else cache.of_layers(first, gpt.config.n_layer)
            states.append(gpt.hidden(tokens, part, documents))
            first += gpt.config.n_layer
        return torch.cat(states, dim=-1)  # (B, T, sum of C)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        # Not by one matrix of a head, of which there are several.
        logits = self.lm_head(self.hidden(tokens, documents=self.documents(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)


class MeanOfHeads(nn.Module):
    """The hidden states of several networks side by side -> the logarithm of their mean probabilities, in float32."""

    def __init__(self, heads: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.heads: Any = nn.ModuleList(heads)

    @property
    def weight(self) -> Tensor:
        """The first head's, which stands for the dtype and the device of all."""
        return self.heads[0].weight

    def forward(self, states: Tensor) -> Tensor:
        parts = states.split([head.in_features for head in self.heads], dim=-1)
        logs = [head(part).float().log_softmax(dim=-1) for head, part in zip(self.heads, parts, strict=True)]
        return torch.stack(logs).logsumexp(dim=0) - math.log(len(logs))
