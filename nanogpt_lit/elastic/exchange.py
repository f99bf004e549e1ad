"""What the processes of a DistributedDataParallel tell each other when memory ends in one of them.

Hooks on the parameters send each gradient to the other processes, once, as soon as it is there, while the backward goes
on. Where it fails half-way, the others wait for the rest. They are given zeros: then all know that the step is to be
done again, and what was exchanged is dropped by all.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

FAILED, FITS = 1, 2
"""What a process says of its step; less than FAILED: it cannot go on."""
LOST = 0


class Exchange:
    """replica: the module as the loop calls it, in as many processes, all of which have to build this."""

    def __init__(self, replica: DistributedDataParallel, parameters: Sequence[nn.Parameter]) -> None:
        self.replica = replica
        self.is_first = dist.get_rank() == 0
        self._parameters = parameters
        self._arrived: set[Tensor] = set()
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived.add) for p in parameters]
        # Numbers of the host, which wait for no card: it has not begun with the step that its process has prepared.
        on_host = "gloo" in dist.get_backend(replica.process_group)
        self._group = replica.process_group if on_host else dist.new_group(backend="gloo")

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def is_due(self) -> bool:
        """Whether the backward of this micro-batch exchanges gradients: that of the last one of a step."""
        return bool(self.replica.require_backward_grad_sync)

    def begin_backward(self) -> None:
        self._arrived.clear()

    def complete(self) -> None:
        """After a backward that failed: sends zeros in the place of what the others wait for."""
        missing = [p for p in self._parameters if p not in self._arrived]
        if missing:
            zeros: list[Tensor | None] = [p.new_zeros(()).expand(p.shape) for p in missing]
            with torch.enable_grad():
                handed_over(missing, zeros, missing[0].new_zeros(())).backward()

    def agree(self, numbers: Sequence[int]) -> list[int]:
        """The least that any process says, number by number."""
        least = torch.tensor(numbers)
        dist.all_reduce(least, dist.ReduceOp.MIN, group=self._group)
        return least.tolist()


def handed_over(parameters: Sequence[nn.Parameter], gradients: list[Tensor | None], value: Tensor) -> Tensor:
    """A scalar of this value, whose backward gives the parameters these gradients and so calls their hooks.

    Makes no copies: the list is empty afterwards.
    """
    return _HandOver.apply(gradients, value, *parameters)


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], value: Tensor, *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, None, *gradients
