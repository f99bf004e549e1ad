"""Checkpoints under Lightning in the format of every loop, and what Lightning leaves out of them."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor
from torch.optim import Optimizer

from nanogpt_lit.checkpoint.disk import PatientSaver
from nanogpt_lit.checkpoint.lightning_format import RUN, from_lightning, loops, to_lightning
from nanogpt_lit.checkpoint.run_file import PREVIOUS, SUFFIX
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.lightning_folder import run_folder
from nanogpt_lit.run.curves import ValidationRecord, say
from nanogpt_lit.run.pieces import tidied
from nanogpt_lit.run.resume import (
    batches_done,
    choose_again,
    chosen_settings,
    load_together,
    random_states,
    restore_random_state,
)
from nanogpt_lit.run.spikes import SpikeGuard
from nanogpt_lit.runtime.durable import durable_file
from nanogpt_lit.runtime.process_settings import RandomState
from nanogpt_lit.runtime.processes import broadcast


class RunFileIO(CheckpointIO):
    """A plugin for the Trainer: ModelCheckpoint and ckpt_path then write and read the format of every loop.

    Lightning's own writer stages the file in the system's temporary folder and copies it over the old one when that is
    on another file system: killed there, both are lost.
    """

    def __init__(self) -> None:
        self.saver = PatientSaver()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.saver.save(Path(path), from_lightning(checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        self.saver.wait()
        state = load_together(Path(path))
        assert state is not None, "every process was told the path"
        return to_lightning(state)

    def teardown(self) -> None:
        self.saver.in_background = False
        self.saver.wait()

    def remove_checkpoint(self, path: Any) -> None:
        self.saver.wait()
        Path(path).unlink(missing_ok=True)


class DurableFileIO(TorchCheckpointIO):
    """Writes Lightning's own file, for a strategy that reads nothing else: whole, and beside the one before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with durable_file(path, path.with_stem(PREVIOUS) if path.stem == "last" else None) as file:
            torch.save(checkpoint, file)


def with_writer(plugins: Any, writer: CheckpointIO) -> list[Any]:
    """A Trainer's plugins, and `writer` where none of them writes checkpoints."""
    given = [] if plugins is None else plugins if isinstance(plugins, list) else [plugins]
    return given if any(isinstance(plugin, CheckpointIO) for plugin in given) else [*given, writer]


class RunCheckpoint(ModelCheckpoint):
    """Writes `best` or `last` after validations, of the whole run, also where it goes on in another folder.

    lightning_stops.py writes `last` at other times.
    """

    def __init__(self, name: Literal["best", "last"], validations: ValidationRecord) -> None:
        super().__init__(
            filename=name,
            monitor="val/loss" if name == "best" else None,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self._validations = validations

    @property
    def saved_step(self) -> int:
        return self._last_global_step_saved

    def note_saved(self, step: int) -> None:
        """Of a checkpoint of this name that was written without a validation."""
        self._last_global_step_saved = step

    @property
    def path(self) -> Path:
        return Path(self.dirpath or ".") / f"{self.filename}{self.FILE_EXTENSION}"

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        # Lightning's own record ends with the folder, and is unknown to the other loops.
        return self._validations.best == self._validations.latest

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_model_path = state_dict["best_model_path"]


class ExactResume(Callback):
    """Keeps the random state of every process in checkpoints, and goes on from it; holds the step while one is written.

    Place it after DropoutSeed.
    """

    def __init__(self, spikes: SpikeGuard | None = None) -> None:
        self._spikes = spikes
        self._random: list[RandomState] = []
        self._goes_on = False

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        connector = trainer._checkpoint_connector  # in no public place

        def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
            # Where machines have no disk in common, only the first process may have seen a checkpoint.
            type(connector).resume_start(connector, broadcast(checkpoint_path), weights_only=weights_only)

        connector.resume_start = resume_start  # type: ignore[method-assign]
        if isinstance(trainer.strategy.checkpoint_io, RunFileIO):
            for callback in trainer.checkpoint_callbacks:
                callback.FILE_EXTENSION = SUFFIX  # type: ignore[attr-defined]  # ModelCheckpoint's

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        folder = run_folder(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                check_trigger(callback, trainer.accumulate_grad_batches)
                if callback.dirpath and trainer.is_global_zero:
                    for stray in tidied(folder, Path(callback.dirpath)):
                        say(stray)
        self._chosen = [chosen_settings(optimizer) for optimizer in trainer.optimizers]

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()  # or the curves of a run that is killed would end before its checkpoint
            elif isinstance(logger, CSVLogger):
                logger.save()
        checkpoint[RUN] = {
            "random": random_states(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "elastic": dict(getattr(module, "fallback", {})),
            "spikes": {} if self._spikes is None else self._spikes.state_dict(),
        }
        # Lightning's own counters say where inside a batch or a validation it saves; every one of ours is a step's end.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        checkpoint["loops"] = loops(trainer.global_step, batches)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A sharded strategy has weights and moments elsewhere; they are not looked at here.
        state = from_lightning({**checkpoint, "state_dict": {}, "optimizer_states": [{}], "lr_schedulers": [{}]})
        batches = batches_done(state, module, trainer.accumulate_grad_batches, trainer.world_size)
        if batches != state.batches:
            checkpoint["loops"] = loops(state.step, batches)  # Lightning reads its counters after this
        self._random, self._goes_on = state.random, True
        module.fallback = dict(state.elastic)  # type: ignore[assignment]  # start_elastic looks at it
        if self._spikes is not None:
            self._spikes.load_state_dict(state.spikes)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        # Not by the optimizer's own hook, which comes before the last backward: Lightning runs it inside the step.
        if isinstance(writer := trainer.strategy.checkpoint_io, RunFileIO):
            writer.saver.let_go()

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if isinstance(writer := trainer.strategy.checkpoint_io, RunFileIO):
            writer.saver.in_background = True
        restore_random_state(self._random, trainer.global_rank, trainer.strategy.root_device)
        if self._goes_on:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer, schedule, chosen in zip(trainer.optimizers, schedules, self._chosen, strict=True):
                choose_again(optimizer, schedule, chosen)


def check_trigger(callback: ModelCheckpoint, accumulate_grad_batches: int) -> None:
    """Raises UserError for a ModelCheckpoint that saves at any moment.

    Gradients are in no checkpoint: one made between two micro-batches of a step goes on to other weights than its run.
    """
    if callback.save_on_exception:
        raise UserError(
            "trainer.callbacks holds a ModelCheckpoint with save_on_exception=true, which may save half a step; "
            "leave it out: the checkpoint of the last validation stays."
        )
    if callback._train_time_interval is not None and accumulate_grad_batches > 1:
        raise UserError(
            "trainer.callbacks holds a ModelCheckpoint with train_time_interval, which may save half a step of "
            f"trainer.accumulate_grad_batches={accumulate_grad_batches}; every_n_train_steps counts whole steps."
        )
