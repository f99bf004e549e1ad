"""Checkpoints under Lightning in the format of every loop, and what Lightning leaves out of them."""

from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nanogpt_lit.checkpoint.durable import sweep
from nanogpt_lit.checkpoint.lightning_format import RUN, from_lightning, loops, to_lightning
from nanogpt_lit.checkpoint.run_file import SUFFIX, load_run, save_run
from nanogpt_lit.checkpoint.state import RandomState
from nanogpt_lit.loops.resume import batches_done, random_states, restore_random_state


class RunFileIO(CheckpointIO):
    """A plugin for the Trainer: ModelCheckpoint and ckpt_path then write and read the format of every loop.

    Lightning's own writer stages the file in the system's temporary folder and copies it over the old one when that is
    on another file system: killed there, both are lost.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_run(Path(path), from_lightning(checkpoint))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return to_lightning(load_run(Path(path)))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)


class ExactResume(Callback):
    """Keeps the random state of every process in checkpoints, and goes on from it. Place it after DropoutSeed."""

    def __init__(self) -> None:
        self._random: list[RandomState] = []

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                check_saves_whole_steps(callback, trainer.accumulate_grad_batches)
                if callback.dirpath and trainer.is_global_zero:
                    sweep(Path(callback.dirpath))

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Lightning calls this on every process, though only the first one writes.
        checkpoint[RUN] = {
            "random": random_states(trainer.strategy.root_device),
            "processes": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
        }

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        state = from_lightning(checkpoint)
        batches = batches_done(state, module, trainer.accumulate_grad_batches, trainer.world_size)
        if batches != state.batches:
            checkpoint["loops"] = loops(state.step, batches)  # Lightning reads its counters after this
        self._random = state.random

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        restore_random_state(self._random, trainer.global_rank, trainer.strategy.root_device)


def check_saves_whole_steps(callback: ModelCheckpoint, accumulate_grad_batches: int) -> None:
    """Raises ValueError for a ModelCheckpoint that saves at any moment.

    Gradients are in no checkpoint: one made between two micro-batches of a step goes on to other weights than its run.
    """
    if callback.save_on_exception:
        raise ValueError(
            "trainer.callbacks holds a ModelCheckpoint with save_on_exception=true, which may save half a step; "
            "leave it out: the checkpoint of the last validation stays."
        )
    if callback._train_time_interval is not None and accumulate_grad_batches > 1:
        raise ValueError(
            "trainer.callbacks holds a ModelCheckpoint with train_time_interval, which may save half a step of "
            f"trainer.accumulate_grad_batches={accumulate_grad_batches}; every_n_train_steps counts whole steps."
        )


def use_suffix(callback: ModelCheckpoint) -> ModelCheckpoint:
    """The same callback, writing files that say what they are."""
    callback.FILE_EXTENSION = SUFFIX
    return callback
