"""What DistributedDataParallel needs when a backward fails half-way.

Hooks on the parameters send each gradient to the other processes, once, as soon as it is there. Those that were there
when memory ended are on their way and right; the others' processes wait for the rest.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class ArrivalRecord:
    """Which parameters have had their gradient in the backward that runs."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.arrived: set[Tensor] = set()
        self._hooks = [p.register_post_accumulate_grad_hook(self.arrived.add) for p in parameters]

    def clear(self) -> None:
        self.arrived.clear()

    def release(self) -> None:
        for hook in self._hooks:
            hook.remove()


@contextmanager
def stand_ins(module: nn.Module, constant: Collection[Tensor]) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
    """The module computes with others in the place of its parameters: the same memory, other gradients, no hooks.

    constant: parameters whose gradients are not wanted
    """
    places = [(part._parameters, name, p) for part in module.modules() for name, p in part._parameters.items()]
    others: dict[nn.Parameter, nn.Parameter] = {}
    for _, _, p in places:
        if p is not None and p not in others:  # a tied matrix stays one
            others[p] = nn.Parameter(p.detach(), p.requires_grad and p not in constant)
    try:
        for parameters, name, p in places:
            parameters[name] = None if p is None else others[p]
        yield others
    finally:
        for parameters, name, p in places:
            parameters[name] = p


def hand_over(parameters: Sequence[nn.Parameter], others: dict[nn.Parameter, nn.Parameter]) -> None:
    """Gives the parameters the gradients of the others, as a backward would: their hooks are called. No copies."""
    gradients = []
    for p in parameters:
        p.grad = None
        gradients.append(others[p].grad)
        others[p].grad = None
    with torch.enable_grad():
        _HandOver.apply(gradients, *parameters).backward()


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> tuple[Tensor | None, ...]:
        gradients = tuple(ctx.gradients)
        ctx.gradients.clear()
        return None, *gradients
