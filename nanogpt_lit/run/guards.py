"""Steps whose gradients are not finite are left out before they touch the weights, and too many of them end the run.

So GradScaler does under float16, and goes on with a smaller scale. Here it is the rule at every precision.
"""

import math
from collections.abc import Callable
from typing import Any, NoReturn

from torch import Tensor, nn

from nanogpt_lit.errors import UserError

IN_A_ROW = 20
"""Steps left out before a run is given up: a scale of 65,536 has then been halved to 1/16."""


class NotFinite(UserError):  # noqa: N818 - a fact about the run
    """What a run is given up for."""


def drop_unless_finite(parameters: list[nn.Parameter], grad_norm: Tensor) -> None:
    """Takes the gradients away when their norm is nan or infinite: an optimizer's step then leaves all as it is.

    Waits for the device, once a step. On several processes the norm is that of all, and so is the decision.
    """
    whole = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # of a sharded network
    if not math.isfinite(whole.item()):
        for parameter in parameters:
            parameter.grad = None


class SkippedInARow:
    """Told of each step. schedule: counts the steps that did not happen (optim/schedule.py)"""

    def __init__(self, schedule: Any) -> None:
        self._schedule = schedule
        self._skipped_before = self._skipped()
        self._in_a_row = 0

    def _skipped(self) -> int:
        return getattr(self._schedule, "skipped_steps", 0)

    def add(self, step: int, loss_scale: Callable[[], float | None]) -> None:
        """Raises NotFinite after too many in a row.   loss_scale: GradScaler's, None without one; to ask is a wait"""
        skipped = self._skipped() > self._skipped_before
        self._skipped_before = self._skipped()
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        if self._in_a_row < IN_A_ROW:
            return
        if (scale := loss_scale()) is None:
            cause = "a lower model.optim.lr, or a longer model.schedule.warmup_steps, may help"
        else:
            cause = (
                f"the loss scale has sunk to {scale:g} and float16 still cannot hold them; "
                "trainer.precision=bf16-mixed or 32-true may"
            )
        raise NotFinite(f"the gradients of {IN_A_ROW} steps in a row, up to step {step:,}, are not finite; {cause}.")


def give_up(error: NotFinite, checkpoint: str | None) -> NoReturn:
    """Raises the same again, naming the checkpoint to go on from."""
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was saved before."
    raise NotFinite(f"{error} {kept}") from None
