"""The guards of guards.py under Lightning's Trainer; the gradients are looked at in lightning_precision.py."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from nanogpt_lit.loops.guards import NotFinite, SkippedInARow, give_up
from nanogpt_lit.loops.lightning_stops import last_path


class FiniteSteps(Callback):
    """Gives a fit up after too many steps in a row without finite gradients."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._skipped = SkippedInARow(trainer.lr_scheduler_configs[0].scheduler)
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        try:
            self._skipped.add(self._step, None if scaler is None else scaler.get_scale())
        except NotFinite as error:
            path = last_path(trainer)
            give_up(error, str(path) if path is not None and path.exists() else None)
