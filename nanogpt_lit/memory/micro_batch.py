"""A micro-batch as a step can do it again: its pieces, their shares of the loss, and its backward."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nanogpt_lit.gpt.loss import IGNORE_INDEX
from nanogpt_lit.memory.oom import oom_message

Piece = tuple[Tensor, Tensor, Tensor | None]


@dataclass
class MicroBatch:
    tokens: Tensor  # (B, T)
    targets: Tensor  # (B, T)
    autocast_dtype: torch.dtype | None
    """The dtype that the loop's autocast casts to; None without one."""
    value: Tensor | None = None
    """The loss, without a graph."""
    pending: Tensor | None = None
    """The part of the loss that is still to be differentiated; it holds the activations."""
    gradients: list[Tensor | None] | None = None
    """The parameters' gradients of the other parts."""
    d_loss: Tensor | None = None
    """The gradient that the loop's backward gave the loss: its loss scale over its accumulation."""

    @property
    def casts_weights(self) -> bool:
        """True where autocast copies the weights to 16 bits."""
        return self.autocast_dtype is not None

    def autocast(self) -> Any:
        """Autocast as in the loop's forward, wherever this is called."""
        kind, on = self.tokens.device.type, self.casts_weights
        return torch.autocast(kind, dtype=self.autocast_dtype, enabled=on, cache_enabled=False)

    def pieces(self, sequences: int | None) -> Iterator[Piece]:
        """(tokens, targets, share) of at most so many sequences each; None: all at once.

        share: of the piece's targets in all, which its mean loss counts for, a scalar; None for all
        """
        if sequences is None or sequences >= self.tokens.size(0):
            yield self.tokens, self.targets, None
            return
        counted = (self.targets != IGNORE_INDEX).sum()
        for some, theirs in zip(self.tokens.split(sequences), self.targets.split(sequences), strict=True):
            yield some, theirs, (theirs != IGNORE_INDEX).sum() / counted

    def differentiate(self, part: Tensor, d_part: Tensor | None = None) -> None:
        """Backward of a part of the loss."""
        with torch.autocast(self.tokens.device.type, enabled=False):  # which loops leave before backward
            part.backward(d_part)

    def differentiate_pending(self) -> None:
        part, self.pending = self.pending, None
        assert part is not None
        part.backward(self.d_loss)


def share_of(loss: Tensor, share: Tensor | None) -> Tensor:
    """Weigh a piece's loss in the mean: nothing when all its targets are ignored, and its own mean is NaN."""
    return loss if share is None else torch.where(share == 0, 0.0, loss * share)


def loss_of(batch: MicroBatch, backward: Callable[[], None]) -> Tensor:
    """batch.value as the loss that a loop gets: its backward notes batch.d_loss and calls `backward`.

    What is needed there is not in the graph of this loss, so that a loop which still holds it does not hold that too.
    """
    anchor = torch.zeros((), requires_grad=True)
    return _Value.apply(_Backward.apply(anchor, backward), batch.value, batch)


# The loop's backward in two stages of the graph. The first notes the gradient of the loss. The second belongs to the
# CPU: the engine runs it on the thread that called backward, and what it calls there is shared out between that thread
# and the device's as if the loop had called it.


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, value: Tensor, batch: MicroBatch) -> Tensor:
        ctx.batch = batch
        return value.clone()

    @staticmethod
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        ctx.batch.d_loss = d_loss
        return torch.zeros(()), None, None


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, backward: Callable[[], None]) -> Tensor:
        ctx.call = backward
        return anchor.detach().clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        ctx.call()
        return None, None


def catch_oom(action: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """(action's result, None), or (None, what an allocator says). Other errors pass.

    The error itself ends here: its traceback holds the frames, and these the tensors, that are to be freed.
    """
    try:
        return action(*arguments), None
    except Exception as error:
        reported = oom_message(error)
        if reported is None:
            raise
        return None, reported
