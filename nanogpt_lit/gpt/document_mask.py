"""Documents side by side in one sequence, each read as if it were alone."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the tokens of sequences stand in their documents, and which tokens each may attend to."""

    positions: Tensor
    """(B, T) int64: 0 for the first token of a document, and for the first of a sequence."""
    mask: Tensor
    """(B, 1, T, T), added to attention's logits: 0 for the tokens so far of the same document, -inf for all others.

    It holds B * T * T numbers of the dtype that attention computes in, once for all layers."""

    @classmethod
    def of(cls, tokens: Tensor, first: int, dtype: torch.dtype) -> Self:
        """tokens: (B, T) int64   first: the id that each document begins with   dtype: of the weights"""
        if torch.is_autocast_enabled(tokens.device.type):
            dtype = torch.get_autocast_dtype(tokens.device.type)
        index = torch.arange(tokens.size(1), device=tokens.device)  # (T,)
        starts = (index * (tokens == first)).cummax(dim=1).values  # (B, T): where the document of each token begins
        is_seen = (index >= starts[:, :, None]) & (index <= index[:, None])  # (B, T, T): [b, i, j], whether i sees j
        mask = torch.zeros(is_seen.shape, dtype=dtype, device=tokens.device)
        return cls(index - starts, mask.masked_fill_(~is_seen, -torch.inf).unsqueeze(1))
