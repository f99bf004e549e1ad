"""The guards of guards.py under Lightning's Trainer; the gradients are looked at in lightning_precision.py."""

from typing import Any, NoReturn

from lightning.pytorch import Callback, LightningModule, Trainer

from nanogpt_lit.loops.lightning_observer import parts_of
from nanogpt_lit.loops.lightning_stops import last_path
from nanogpt_lit.run.guards import NotFinite, SkippedInARow, give_up
from nanogpt_lit.run.spikes import SpikeGuard


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
        try:
            self._skipped.add(self._step, parts_of(trainer, module).loss_scale)
        except NotFinite as error:
            name_last(trainer, error)


class SpikeRollback(Callback):
    """Goes back to the last checkpoint where the loss jumps. Place it before TrainingCurves, which draw how often."""

    def __init__(self, guard: SpikeGuard) -> None:
        self.guard = guard

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        path = last_path(trainer)
        self.guard.folder = None if path is None else path.parent
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.guard.add_batch(outputs["loss"])  # already divided by the accumulation
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        try:
            self.guard.end_step(self._step, parts_of(trainer, module))
        except NotFinite as error:
            name_last(trainer, error)


def name_last(trainer: Trainer, error: NotFinite) -> NoReturn:
    path = last_path(trainer)
    give_up(error, str(path) if path is not None and path.exists() else None)
