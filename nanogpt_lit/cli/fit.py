"""The LightningCLI behind `fit`, `validate` and `test`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningCLI

from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.checkpoint.state import perplexity
from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning, rank_zero_print
from nanogpt_lit.errors import UserError, refused_by
from nanogpt_lit.loops.compatibility import DEEPSPEED, FSDP2
from nanogpt_lit.loops.lightning import Ended
from nanogpt_lit.loops.lightning_plugins import BestEffortLogger, RunFileIO, go_on, run_plugins
from nanogpt_lit.loops.lightning_run import LightningRun, run_folder
from nanogpt_lit.loops.trainer_section import named_strategy, strategy_arguments, writes_run_files
from nanogpt_lit.memory.oom import oom_explained
from nanogpt_lit.run.stops import Stopped, print_stopped
from nanogpt_lit.run.terminal import closing_table, opening_lines, relative_to_here
from nanogpt_lit.runtime.process_settings import restored_process_settings, set_for_process
from nanogpt_lit.runtime.processes import has_group


def run(arguments: list[str]) -> int:
    """`fit`, `validate` and `test`; arguments begin with the command. Returns the exit code."""
    quiet_lightning()
    lock = RunLock()
    try:
        with restored_process_settings(), refused_by("lightning.pytorch.callbacks"):
            NanoGPTCLI(args=arguments, lock=lock)
    except Stopped as stopped:
        print_stopped(stopped, arguments)
        # Of Lightning's own processes the first speaks for all: it would take another's code for a crash.
        return stopped.exit_code if stopped.first_rank else 0
    except MisconfigurationException as error:  # how Lightning says that a setting cannot be
        raise UserError(" ".join(str(error).split())) from error
    finally:
        lock.release()
        # Lightning leaves gloo's group, and its threads, to the interpreter's exit, which then now and then aborts.
        if has_group():
            dist.destroy_process_group()
    return 0


class NanoGPTCLI(SettingsCLI):
    """Builds `LitNanoGPT`, `TokenDataModule` and a Trainer, and runs them."""

    lightning_run: LightningRun

    def __init__(self, args: list[str], lock: RunLock | None = None) -> None:
        super().__init__(args, run=True, lock=lock)

    def before_instantiate_classes(self) -> None:
        self.complete_settings()
        if named_strategy(self.settings.trainer.strategy) == DEEPSPEED:
            from nanogpt_lit.loops.sharded import compute_on  # late, for few runs are DeepSpeed's

            compute_on(self.device)

    def instantiate_classes(self) -> None:
        LightningCLI.instantiate_classes(self)
        self.begin(self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        # Before the Trainer looks at the GPU, and for validate and test too.
        set_for_process(self.model, torch.device(self.device), trainer.deterministic)
        if writes_run_files(trainer):  # FSDPStrategy has precisions and checkpoints of its own
            kwargs |= run_plugins(trainer.plugins, trainer.precision, self.device, named_strategy(trainer.strategy))
            ours = any(isinstance(plugin, RunFileIO) for plugin in kwargs["plugins"])
            if named_strategy(trainer.strategy) in (FSDP2, DEEPSPEED) and ours:
                from nanogpt_lit.loops.lightning_sharded import sharded_strategy  # late, for few runs are sharded

                strategy = self.settings.trainer.strategy
                kwargs["strategy"] = sharded_strategy(named_strategy(strategy), strategy_arguments(strategy))
        if self.subcommand != "fit":
            # Only a fit makes a run: the others leave no folder behind.
            with refused_by("lightning"):
                return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)
        if self.resumed is not None:
            self.say_what_changed()
            for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
                go_on(logger, self.resumed.run_folder, self.resumed.step)
        if trainer.logger in (None, True):
            # An empty name and no version: the run is default_root_dir/version_N, checkpoints and all.
            options: dict[str, Any] = {"name": "", "default_hp_metric": False}
            if self.resumed is not None:
                # What an earlier start logged past its checkpoint is logged again: TensorBoard forgets it.
                options |= {"version": self.resumed.run_folder.name, "purge_step": self.resumed.step + 1}
            kwargs["logger"] = BestEffortLogger(trainer.default_root_dir, **options)
        kwargs["max_time"] = None  # Lightning's timer ends inside a step; run/stops.py has it
        saves = trainer.enable_checkpointing is not False
        own = any(isinstance(callback, ModelCheckpoint) for callback in trainer.callbacks or [])
        kwargs["enable_checkpointing"] = saves and own  # or Lightning would keep checkpoints besides ours
        features = self.features(self.datamodule)
        # Lightning's bar counts micro-batches of an epoch; it is left out unless the YAML names one.
        kwargs["enable_progress_bar"] = any(isinstance(callback, ProgressBar) for callback in trainer.callbacks or [])
        features["shows_progress"] &= not kwargs["enable_progress_bar"]
        # Last, so that the user's callbacks have drawn their random numbers before dropout is seeded.
        self.lightning_run = LightningRun(
            self.kept_settings(),
            self.lock,
            self.seed,
            saves,
            **features,
        )
        with refused_by("lightning"):
            return super().instantiate_trainer(**kwargs, callbacks=[*(trainer.callbacks or []), self.lightning_run])

    def _run_subcommand(self, subcommand: str) -> None:
        with oom_explained(self.model, casts_weights="mixed" in str(self.trainer.precision)):
            try:
                super()._run_subcommand(subcommand)
            except Ended:  # by itself, before max_steps
                self.after_fit()

    # What the user reads.

    def before_fit(self) -> None:
        trainer = self.trainer
        rank_zero_print(
            opening_lines(
                gpt=self.model.gpt,
                precision=str(trainer.precision),
                processes=trainer.world_size,
                device=trainer.strategy.root_device,
                accumulate_grad_batches=trainer.accumulate_grad_batches,
                batch_size=self.datamodule.batch_size,
                run_folder=relative_to_here(run_folder(trainer)),
                seed=self.seed,
                deterministic=self.settings.trainer.deterministic,
            )
        )
        self.say_if_it_overfits(self.model, trainer.world_size)

    def after_fit(self) -> None:
        if not self.lightning_run.has_begun:
            return  # there was nothing left to do, as was said
        users = [callback for callback in self.trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        files = {c.filename or "": Path(c.best_model_path) for c in users if c.best_model_path}
        run = self.lightning_run.run
        if self.trainer.is_global_zero:  # it reads the files that this process alone writes
            print(closing_table(run, self.lightning_run.folder, files if users else None), flush=True)
        if (kept := run.checkpoints) is not None and kept.unsaved is not None:
            raise kept.unsaved

    def before_validate(self) -> None:
        self.config_init[self.subcommand].verbose = False  # our line says it, with the perplexity

    before_test = before_validate

    def after_validate(self) -> None:
        self._print_loss("validation loss", "val/loss")

    def after_test(self) -> None:
        self._print_loss("test loss", "test/loss")

    def _print_loss(self, name: str, metric: str) -> None:
        loss = float(self.trainer.callback_metrics[metric])
        rank_zero_print(f"{name} {loss:.4f}, perplexity {perplexity(loss):.2f}")
