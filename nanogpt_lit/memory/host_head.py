"""The loss with a head whose weight is in host memory."""

from typing import Any

import torch
from torch import Tensor, nn

from nanogpt_lit.gpt.loss import ChunkedCrossEntropy, chunked_cross_entropy, cross_entropy
from nanogpt_lit.memory.host_weights import HostWeights


class HostHead:
    """cross_entropy or, given chunk_tokens, chunked_cross_entropy: the same bits."""

    def __init__(self, host: HostWeights, chunk_tokens: int | None) -> None:
        self.host = host
        self.chunk_tokens = chunk_tokens

    def __call__(self, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
        assert isinstance(head_weight, nn.Parameter)
        if self.chunk_tokens is None:
            return cross_entropy(hidden, self.host.fetch(head_weight, hidden.device, keep=False), targets)
        with torch.no_grad():
            copy = self.host.fetch(head_weight, hidden.device, keep=False)
        if not torch.is_grad_enabled():
            return chunked_cross_entropy(hidden, copy, targets, self.chunk_tokens)
        device_type = hidden.device.type
        states = hidden.to(copy.dtype) if torch.is_autocast_enabled(device_type) else hidden
        # Its gradient comes in float32, and autograd wants the dtype of what it is the gradient of: that is not the
        # copy, but a tensor without memory of its own.
        for_gradient = copy.new_empty((), dtype=head_weight.dtype).expand(copy.shape)
        for_gradient = self.host.bind(head_weight, for_gradient)
        with torch.autocast(device_type, enabled=False):
            return _WithCopy.apply(states.flatten(0, 1), for_gradient, targets.flatten(), self.chunk_tokens, copy)


class _WithCopy(ChunkedCrossEntropy):
    """Computes with a copy of the head's weight, and gives the gradient to another tensor."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, states: Tensor, for_gradient: Tensor, targets: Tensor, chunk_tokens: int, copy: Tensor
    ) -> Tensor:
        return ChunkedCrossEntropy.forward(ctx, states, copy, targets, chunk_tokens)

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        return *ChunkedCrossEntropy.backward(ctx, d_loss), None
