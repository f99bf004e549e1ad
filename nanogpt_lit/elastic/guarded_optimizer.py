"""An optimizer that is asked a second time when memory ends, and that says when a step begins anew."""

import gc
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from nanogpt_lit.elastic.shortage import MIB, attempt
from nanogpt_lit.errors import UserError


class GuardedOptimizer:
    """Takes the place of an optimizer's step and zero_grad, as a schedule does.

    on_step: called after each   on_zero_grad: whether to
    """

    def __init__(
        self,
        optimizer: Optimizer,
        say: Callable[[str], None],
        on_step: Callable[[], None],
        on_zero_grad: Callable[[], bool],
    ) -> None:
        self.optimizer = optimizer
        self.parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        self._say = say
        self._step, self._zero_grad = optimizer.step, optimizer.zero_grad

        @wraps(optimizer.step)  # which a schedule has marked
        def step(closure: Callable[[], Any] | None = None) -> Any:
            loss = None
            if closure is not None:  # Lightning's holds the last forward and backward of the step, which look after
                with torch.enable_grad():  # themselves
                    loss = closure()
            self._guarded_step()
            on_step()
            return loss

        @wraps(optimizer.zero_grad)
        def zero_grad(set_to_none: bool = True) -> None:
            if on_zero_grad():
                self._zero_grad(set_to_none=set_to_none)

        optimizer.step, optimizer.zero_grad = step, zero_grad  # type: ignore[method-assign]

    def release(self) -> None:
        self.optimizer.step, self.optimizer.zero_grad = self._step, self._zero_grad  # type: ignore[method-assign]

    def drop_gradients(self) -> None:
        self._zero_grad(set_to_none=True)

    def _guarded_step(self) -> None:
        state = self.optimizer.state
        had_state = [p for p in self.parameters if p in state]
        # A kernel writes to the weights without a trace; every kind of AdamW counts the step first.
        before = [_count(state[p].get("step")) for p in had_state]
        _, shortage = attempt(self._step)
        if shortage is None:
            return
        begun = [_count(state[p].get("step")) for p in had_state] != before
        # A count that was made in this step is 0 until the update of its group.
        new = [state[p]["step"] for p in set(state).difference(had_state) if "step" in state[p]]
        if begun or any(float(count) > 0 for count in new):
            raise UserError(
                f"memory ended inside an update of the weights ({shortage}), which cannot be done again; go on from "
                "the last checkpoint with model.optim.implementation=fused, which needs no memory of its own there."
            )
        for p in set(self.parameters).difference(had_state):
            state.pop(p, None)  # half of it may be there
        give_back()
        self._say(f"out of memory in the optimizer ({shortage}): its step is done again")
        _, shortage = attempt(self._step)
        if shortage is not None:
            mib = sum(8 * p.numel() for p in self.parameters) / MIB
            raise UserError(
                f"the optimizer's state, {mib:,.0f} MiB, does not fit beside weights and gradients ({shortage}); "
                "set model.memory.optimizer_state=host."
            )


def _count(step: Any) -> Any:
    """Differs after a further step; in place a tensor's version tells without waiting for the card."""
    return step._version if isinstance(step, torch.Tensor) else step


def give_back() -> None:
    """What nobody uses, so that it can be had in other sizes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
