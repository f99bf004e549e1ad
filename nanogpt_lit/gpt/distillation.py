"""Distillation: a network learns the probabilities that others give each token, in place of the one that follows.

Of Hinton et al. (arXiv:1503.02531), at a temperature of 1 and of the teachers alone.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanogpt_lit.gpt.average import Average
from nanogpt_lit.gpt.loss import IGNORE_INDEX, as_finite_as_its_gradients
from nanogpt_lit.gpt.network import Network


class TaughtLoss:
    """`Network.loss` of a network with teachers: in training by their probabilities, else by the targets.

    The teachers are no part of the network: not of its parameters, and of no checkpoint.
    """

    def __init__(self, gpt: Network, teachers: Average, compiled: bool = False) -> None:
        self.gpt = gpt
        self.teachers = teachers.requires_grad_(False).eval()
        self.by_targets: Callable[[Tensor, Tensor], Tensor] = gpt.compiled_loss() if compiled else gpt.loss
        self.by_teachers = torch.compile(self._by_teachers) if compiled else self._by_teachers

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """A scalar in float32. tokens, targets: (B, T) int64; of IGNORE_INDEX targets nothing is learned."""
        if not self.gpt.training:
            return self.by_targets(tokens, targets)
        self.teachers.to(tokens.device)  # where they stay; a loop moves only the network
        return as_finite_as_its_gradients(self.by_teachers(tokens, targets))

    def _by_teachers(self, tokens: Tensor, targets: Tensor) -> Tensor:
        documents = self.gpt.documents(tokens)
        hidden = self.gpt.hidden(tokens, documents=documents).flatten(0, 1)  # (N, C)
        with torch.no_grad():
            theirs = self.teachers.hidden(tokens, documents=documents).flatten(0, 1)  # (N, sum of C)
        targets = targets.flatten()  # (N,)
        chunked = self.gpt.cross_entropy  # by memory/techniques.py
        if isinstance(chunked, partial):
            chunk_tokens = chunked.keywords["chunk_tokens"]
            parts = zip(*(each.split(chunk_tokens) for each in (hidden, theirs, targets)), strict=True)
            total = torch.stack([checkpoint(self._sum, *part, use_reentrant=False) for part in parts]).sum()
        else:
            total = self._sum(hidden, theirs, targets)
        return total / (targets != IGNORE_INDEX).sum()

    def _sum(self, hidden: Tensor, theirs: Tensor, targets: Tensor) -> Tensor:
        """The sum over tokens of - sum over V of p * log q, for the teachers' p and the network's q."""
        with torch.no_grad():
            p = self.teachers.lm_head(theirs).exp()  # (N, V)
        losses = F.cross_entropy(self.gpt.lm_head(hidden).float(), p, reduction="none")  # (N,)
        return (losses * (targets != IGNORE_INDEX)).sum()
