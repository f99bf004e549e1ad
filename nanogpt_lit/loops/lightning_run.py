"""A run of ours under Lightning's Trainer: what is Lightning's own in its folder, checkpoints and signals."""

import signal
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from nanogpt_lit.checkpoint.lightning_format import CURVES, RUN, from_lightning, loops
from nanogpt_lit.checkpoint.run_file import SUFFIX
from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer
from nanogpt_lit.loops.lightning import Observed
from nanogpt_lit.loops.lightning_plugins import LoggerCurves, RunFileIO, run_plugins
from nanogpt_lit.loops.trainer_section import TRAINER_DEFAULTS
from nanogpt_lit.run.metrics import say
from nanogpt_lit.run.observers import RunObservers
from nanogpt_lit.run.resume import (
    batches_done,
    choose_again,
    chosen_settings,
    keep_config,
    random_state_of,
    tidied,
)
from nanogpt_lit.run.stops import ignored_signals, seconds_of
from nanogpt_lit.runtime.machine import device_type
from nanogpt_lit.runtime.precision import full_precision_name
from nanogpt_lit.runtime.process_settings import random_state
from nanogpt_lit.runtime.processes import broadcast, gathered


class LightningRun(Observed):
    """Keeps a run's folder, goes on with a run to the bit, and has it stop between two steps.

    config: YAML, kept in the folder   lock: on the folder; None locks nothing   saves: whether checkpoints are kept,
    by a ModelCheckpoint of the user's or else by ours   observers: besides the run's own   features: of RunObservers
    """

    state_key = CURVES  # a name in files, which no rename of a class may change

    def __init__(
        self, config: str | None = None, lock: RunLock | None = None, seed: int | None = None, saves: bool = True,
        observers: Sequence[Observer] = (),
        **features: Any,
    ) -> None:  # fmt: skip
        super().__init__(observers, seed)
        self._config, self._lock, self._saves, self._features = config, lock, saves, features
        self._state: Any = None

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        decay_over = getattr(module, "decay_over", None)
        if stage == "fit" and decay_over and trainer.max_steps != -1:  # data of the user's own have not called it
            decay_over(trainer.max_steps)
        connector = trainer._checkpoint_connector  # in no public place

        def resume_start(checkpoint_path: Any = None, weights_only: bool | None = None) -> None:
            # Where machines have no disk in common, only the first process may have seen a checkpoint.
            type(connector).resume_start(connector, broadcast(checkpoint_path), weights_only=weights_only)

        connector.resume_start = resume_start  # type: ignore[method-assign]
        self.folder = run_folder(trainer)
        self.run = RunObservers(
            curves=LoggerCurves(trainer),
            folder=self.folder,
            requeue_by=requeue_signal(trainer),
            **self._checkpoint_features(trainer),
            **self._features,
        )
        self.observers = [*self.run.in_order(), *self.observers]
        if trainer.is_global_zero and self._config is not None:
            if self._lock is not None:
                self._lock.acquire(self.folder)
            keep_config(self.folder, self._config)
        if trainer.is_global_zero:
            self.run.curves.begin(self._config, trainer.global_step)

    def _checkpoint_features(self, trainer: Trainer) -> dict[str, Any]:
        writer = trainer.strategy.checkpoint_io
        own = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        if isinstance(writer, RunFileIO):
            for callback in own:
                callback.FILE_EXTENSION = SUFFIX
        folder = Path(own[0].dirpath) if own and own[0].dirpath else checkpoints_folder(trainer)
        return {
            "checkpoints": folder if own or self._saves else None,
            "after_validations": not own,
            "suffix": SUFFIX if isinstance(writer, RunFileIO) else ModelCheckpoint.FILE_EXTENSION,
            "saver": writer.saver if isinstance(writer, RunFileIO) else None,
        }

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint):
                check_trigger(callback, trainer.accumulate_grad_batches)
        if self.run.checkpoints is not None and trainer.is_global_zero:
            for stray in tidied(self.folder, self.run.checkpoints.folder):
                say(stray)
        self._chosen = [chosen_settings(optimizer) for optimizer in trainer.optimizers]
        self._ignored = ignored_signals()
        connector = trainer._signal_connector  # in no public place

        def register_signal_handlers() -> None:
            type(connector).register_signal_handlers(connector)
            if threading.current_thread() is threading.main_thread():
                for number in self._ignored:
                    signal.signal(number, signal.SIG_IGN)  # Lightning has meanwhile taken SIGTERM
            self._run.enter_context(self.run.stops)

        # Between its own handlers and the start of the loaders Lightning calls no hook; and it takes all handlers down
        # itself.
        connector.register_signal_handlers = register_signal_handlers  # type: ignore[method-assign]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._state is not None:
            schedules = [config.scheduler for config in trainer.lr_scheduler_configs]
            for optimizer, schedule, chosen in zip(trainer.optimizers, schedules, self._chosen, strict=True):
                choose_again(optimizer, schedule, chosen)
            device = trainer.strategy.root_device
            self.random = random_state_of(self._state.random, trainer.global_rank, device)
            self._state = None
        super().on_train_start(trainer, module)

    def ended(self, trainer: Trainer) -> BaseException:
        return self.run.stopped() or super().ended(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.run.curves.flush()
        # Lightning calls this on every process, though only the first one writes.
        checkpoint[RUN] = {
            "random": gathered(random_state(trainer.strategy.root_device)),
            "processes": trainer.world_size,
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "elastic": dict(getattr(module, "fallback", {})),
            "spikes": {} if self.run.spikes is None else self.run.spikes.state_dict(),
        }
        # Lightning's own counters say where inside a batch or a validation it saves; every one of ours is a step's end.
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]
        checkpoint["loops"] = loops(trainer.global_step, batches)

    def state_dict(self) -> dict[str, Any]:
        return self.run.metrics.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # A sharded strategy has weights and moments elsewhere; they are not looked at here.
        state = from_lightning({**checkpoint, "state_dict": {}, "optimizer_states": [{}], "lr_schedulers": [{}]})
        batches = batches_done(state, module, trainer.accumulate_grad_batches, trainer.world_size)
        if batches != state.batches:
            checkpoint["loops"] = loops(state.step, batches)  # Lightning reads its counters after this
        module.fallback = dict(state.elastic)  # type: ignore[assignment]  # of memory/elastic.py
        self.run.restore(state)
        self._state = state

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if self._lock is not None:  # a process that Lightning has started ends without us
            self._lock.release()


# A Trainer of one's own that trains as `fit` does.


def trainer_options(
    precision: str = "32-true",
    accelerator: str = "auto",
    seed: int | None = None,
    callbacks: Sequence[Callback] = (),
    observers: Sequence[Observer] = (),
    **options: Any,
) -> dict[str, Any]:
    """Return the arguments of a Trainer, one process on one device, that trains to the bits of `fit`.

    With them it clips beside a fused optimizer, starts dropout where every loop starts it, survives a step that runs
    out of memory, saves checkpoints that every loop resumes from, and resumes from them to the bit (`ckpt_path`).

    precision: 32-true, bf16-mixed or 16-mixed   seed: of dropout, as seed_everything in a YAML
    callbacks: of your own, which come first   observers: of your own (loops/contract.py)
    options: any others of the Trainer; each wins over TRAINER_DEFAULTS. max_time ends the run as a signal
    does, between two steps and saved: trainer.fit then raises run.stops.Stopped

        Trainer(**trainer_options("bf16-mixed", seed=1337, max_steps=1000))
    """
    options = {**TRAINER_DEFAULTS, **options}
    max_time_s = seconds_of(options.pop("max_time", None))  # Lightning's timer ends inside a step
    run = LightningRun(
        seed=seed, observers=observers, log_every_n_steps=options["log_every_n_steps"], max_time_s=max_time_s
    )
    plugins = run_plugins(options.pop("plugins", None), full_precision_name(precision), device_type(accelerator))
    return {
        "accelerator": accelerator,
        "enable_checkpointing": False,  # Lightning's own, besides those of the run
        **options,
        **plugins,
        "callbacks": [*callbacks, run],  # which has drawn its random numbers before dropout is seeded
    }


# Folders.


def run_folder(trainer: Trainer) -> Path:
    """Every process has to ask: Lightning tells all of them the first one's."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def checkpoints_folder(trainer: Trainer) -> Path:
    """The folder of a ModelCheckpoint without one of its own. Every process has to ask."""
    folder = Path(trainer.default_root_dir)
    if trainer.loggers:
        logger = trainer.loggers[0]
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version
    return Path(trainer.strategy.broadcast(str(folder / "checkpoints")))


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


def requeue_signal(trainer: Trainer) -> int | None:
    """The signal that SLURM sends before it stops the job; None outside of it."""
    environment = trainer._accelerator_connector.cluster_environment  # in no public place
    return (
        environment.requeue_signal if isinstance(environment, SLURMEnvironment) and environment.auto_requeue else None
    )
