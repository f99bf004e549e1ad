"""Steps whose gradients are not finite are left out before they touch the weights, and too many of them end the run.

So GradScaler does under float16, and goes on with a smaller scale. Here it is the rule at every precision.
"""

import math
from collections.abc import Callable
from typing import NoReturn

from torch import Tensor

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer, Training, clipping_order

IN_A_ROW = 20
"""Steps left out before a run is given up: a scale of 65,536 has then been halved to 1/16."""


class NotFinite(UserError):  # noqa: N818 - a fact about the run
    """What a run is given up for."""


class FiniteGuard(Observer):
    """Leaves such steps out, and gives the run up after too many in a row.

    last_checkpoint: the one to go on from, if there is any
    """

    def __init__(self, last_checkpoint: Callable[[], str | None] = lambda: None) -> None:
        self._last_checkpoint = last_checkpoint
        self._in_a_row = 0

    def on_train_start(self, training: Training) -> None:
        self._training = training
        self._parameters = clipping_order(training.optimizer)
        self._skipped = getattr(training.schedule, "skipped_steps", 0)

    def on_before_step(self, grad_norm: Tensor) -> None:
        """Waits for the device, once a step. On several processes the norm is that of all, and so is the decision."""
        whole = grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm  # of a sharded network
        if not math.isfinite(whole.item()):
            for parameter in self._parameters:
                parameter.grad = None  # an optimizer's step then leaves all as it is

    def on_step_end(self, step: int, lr: float, grad_norm: Tensor) -> None:
        # The schedule counts the steps that did not happen (optim/schedule.py).
        before, self._skipped = self._skipped, getattr(self._training.schedule, "skipped_steps", 0)
        self._in_a_row = self._in_a_row + 1 if self._skipped > before else 0
        if self._in_a_row >= IN_A_ROW:
            give_up(self._sentence(step), self._last_checkpoint())

    def _sentence(self, step: int) -> str:
        if (scale := self._training.loss_scale()) is None:
            cause = "a lower model.optim.lr, or a longer model.schedule.warmup_steps, may help"
        else:
            cause = (
                f"the loss scale has sunk to {scale:g} and float16 still cannot hold them; "
                "trainer.precision=bf16-mixed or 32-true may"
            )
        return f"the gradients of {IN_A_ROW} steps in a row, up to step {step:,}, are not finite; {cause}."


def give_up(sentence: str, checkpoint: str | None) -> NoReturn:
    """Raises NotFinite, naming the checkpoint to go on from."""
    kept = f"The last good checkpoint is {checkpoint}." if checkpoint else "No checkpoint was saved before."
    raise NotFinite(f"{sentence} {kept}")
