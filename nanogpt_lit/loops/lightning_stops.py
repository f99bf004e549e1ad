"""Stops under Lightning's Trainer."""

import signal
import threading
from pathlib import Path
from typing import Any, TypeGuard

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nanogpt_lit.checkpoint import disk
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.lightning_checkpoint import RunCheckpoint, RunFileIO
from nanogpt_lit.run.save_times import SaveTimes
from nanogpt_lit.run.stops import Stopped, Stops, ignored_signals


class StepStops(Callback):
    """Ends a fit that is asked to stop, by raising Stopped, after a whole step and the validation that it may call for.

    In the place of Lightning's own ways, which end after any micro-batch: half a step is lost or, worse, saved; SIGTERM
    exits with 0, SIGHUP kills, SLURM's signal saves from within a handler.
    """

    def __init__(self, max_time_s: float | None = None, save_times: SaveTimes | None = None) -> None:
        self.max_time_s = max_time_s
        self.save_times = save_times or SaveTimes()
        self.unsaved: UserError | None = None
        """Why the end of the run is not saved; None where it is."""
        self._step = 0
        self._step_ended = False

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._ignored = ignored_signals()
        connector = trainer._signal_connector  # in no public place

        def register_signal_handlers() -> None:
            type(connector).register_signal_handlers(connector)
            self._listen(trainer)

        # Between its own handlers and the start of the loaders Lightning calls no hook; and it takes all handlers down
        # itself.
        connector.register_signal_handlers = register_signal_handlers  # type: ignore[method-assign]

    def _listen(self, trainer: Trainer) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in self._ignored:
                signal.signal(number, signal.SIG_IGN)  # Lightning has meanwhile taken SIGTERM
        folder = trainer.log_dir or trainer.default_root_dir
        self._stops = Stops(Path(folder), self.max_time_s, requeue_by=requeue_signal(trainer)).__enter__()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step_ended = trainer.global_step > self._step
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Not where the step ends: its validation follows there. trainer.should_stop would validate after any step.
        if not self._step_ended:
            return
        if self._stops.asked():
            assert self._stops.reason is not None
            saved = save_last(trainer)
            try:
                insist(trainer, disk.STOP_S)
            except UserError:
                saved = None
            raise Stopped(self._stops.reason, self._step, saved, last_path(trainer) is not None)
        if last_path(trainer) is None:
            return
        if saved_step(trainer) == self._step:
            self.save_times.saved()  # after a validation
        elif self.save_times.due(self._step):
            save_last(trainer)
            self.save_times.saved()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        save_last(trainer)
        try:
            insist(trainer, disk.END_S)
        except UserError as error:
            self.unsaved = error
        self._stops.__exit__()

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        if hasattr(self, "_stops"):
            self._stops.__exit__()


def requeue_signal(trainer: Trainer) -> int | None:
    environment = trainer._accelerator_connector.cluster_environment  # in no public place
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )


def save_last(trainer: Trainer) -> str | None:
    """Writes `last` unless it is of this step already. Returns its path, None where no checkpoints are kept."""
    path = last_path(trainer)
    if path is None:
        return None
    if saved_step(trainer) != trainer.global_step:
        trainer.save_checkpoint(path)
        for callback in trainer.checkpoint_callbacks:
            if is_last(callback):
                callback.note_saved(trainer.global_step)
    return str(path)


def saved_step(trainer: Trainer) -> int | None:
    """That `last` was written at; None where the YAML's own callbacks keep the checkpoints."""
    return next((callback.saved_step for callback in trainer.checkpoint_callbacks if is_last(callback)), None)


def insist(trainer: Trainer, patience_s: float) -> None:
    """Raises UserError where a checkpoint of this step is still not on the disk after so long."""
    if isinstance(writer := trainer.strategy.checkpoint_io, RunFileIO):
        writer.saver.insist(patience_s)


def last_path(trainer: Trainer) -> Path | None:
    """Where `last` is, or would be; None where no checkpoints are kept."""
    kept = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    kept.sort(key=lambda callback: not is_last(callback))
    if not kept or kept[0].dirpath is None:
        return None
    return Path(kept[0].dirpath) / f"last{kept[0].FILE_EXTENSION}"


def is_last(callback: Callback) -> TypeGuard[RunCheckpoint]:
    return isinstance(callback, RunCheckpoint) and callback.filename == "last"
