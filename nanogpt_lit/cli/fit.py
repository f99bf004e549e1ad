"""The LightningCLI behind `fit`, `validate` and `test`."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI

from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning, rank_zero_print, relative_to_here, writes_run_files
from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.compatibility import DDP, FSDP2, SINGLE
from nanogpt_lit.loops.lightning_callbacks import StepProgressBar, TextSamples, TrainingCurves
from nanogpt_lit.loops.lightning_checkpoint import DurableFileIO, ExactResume, RunCheckpoint, RunFileIO, with_writer
from nanogpt_lit.loops.lightning_folder import RunFolder, run_folder
from nanogpt_lit.loops.lightning_guards import FiniteSteps, SpikeRollback
from nanogpt_lit.loops.lightning_logger import PatientLogger, go_on
from nanogpt_lit.loops.lightning_observer import DropoutSeed, ElasticSteps
from nanogpt_lit.loops.lightning_precision import precision_plugin
from nanogpt_lit.loops.lightning_stops import StepStops
from nanogpt_lit.loops.strategies import named_strategy
from nanogpt_lit.memory.oom import oom_explained
from nanogpt_lit.run.curves import StepMeter, ValidationRecord, perplexity
from nanogpt_lit.run.report import closing_table, opening_lines
from nanogpt_lit.run.stops import Reason, Stopped, go_on_line, seconds_of
from nanogpt_lit.runtime.clock import awake_s
from nanogpt_lit.runtime.environment import requeue
from nanogpt_lit.runtime.process_settings import restored_process_settings, set_for_process
from nanogpt_lit.runtime.processes import has_group


def run(arguments: list[str]) -> int:
    """`fit`, `validate` and `test`; arguments begin with the command. Returns the exit code."""
    quiet_lightning()
    lock = RunLock()
    try:
        with restored_process_settings():
            NanoGPTCLI(args=arguments, lock=lock)
    except Stopped as stopped:
        rank_zero_print(str(stopped))
        if stopped.saved is not None:
            rank_zero_print(go_on_line(["-m", "nanogpt_lit"], arguments))
        if stopped.reason is Reason.PREEMPTED and stopped.first_rank:
            sharded = stopped.saved is not None and Path(stopped.saved).is_dir()  # no start finds it by itself
            print(f"sbatch it with --ckpt_path {stopped.saved}" if sharded else requeue(), flush=True)
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


def prepare(arguments: list[str]) -> int:
    """`prepare`: the YAML and the options of fit."""
    quiet_lightning()
    SettingsCLI(arguments).prepare_data()
    return 0


class NanoGPTCLI(SettingsCLI):
    """Builds `LitNanoGPT`, `TokenDataModule` and a Trainer, and runs them."""

    def __init__(self, args: list[str], lock: RunLock | None = None) -> None:
        self.meter = StepMeter()
        self.validations = ValidationRecord()
        super().__init__(args, run=True, lock=lock)

    def before_instantiate_classes(self) -> None:
        self.complete_settings()

    def instantiate_classes(self) -> None:
        LightningCLI.instantiate_classes(self)
        self.begin(self.model)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        # Before the Trainer looks at the GPU, and for validate and test too.
        set_for_process(self.model, torch.device(self.device), trainer.deterministic)
        plugin = precision_plugin(trainer.precision, self.device)
        # FSDPStrategy and DeepSpeedStrategy bring precision plugins of their own.
        if plugin is not None and named_strategy(trainer.strategy) in (SINGLE, DDP, FSDP2) and not trainer.plugins:
            kwargs |= {"plugins": [plugin], "precision": None}
        if writes_run_files(trainer):
            kwargs["plugins"] = with_writer(kwargs.get("plugins", trainer.plugins), RunFileIO())
        elif named_strategy(trainer.strategy) == FSDP2:
            kwargs["plugins"] = with_writer(kwargs.get("plugins", trainer.plugins), DurableFileIO())
        if self.subcommand != "fit":
            # Only a fit makes a run: the others leave no folder behind.
            return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)
        if self.resumed is not None:
            self.say_what_changed()
            for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
                go_on(logger, self.resumed.run_folder, self.resumed.step)
        if trainer.logger in (None, True):
            # An empty name and no version: the run is default_root_dir/version_N, checkpoints and all.
            options: dict[str, Any] = {"name": "", "default_hp_metric": False}
            if self.resumed is not None:
                # What the piece before this one drew past its checkpoint is drawn again: TensorBoard forgets it.
                options |= {"version": self.resumed.run_folder.name, "purge_step": self.resumed.step + 1}
            kwargs["logger"] = PatientLogger(trainer.default_root_dir, **options)
        kwargs["max_time"] = None  # Lightning's timer ends inside a step; StepStops has it
        return super().instantiate_trainer(**kwargs, callbacks=self._callbacks(trainer))

    def _callbacks(self, trainer: Namespace) -> list[Callback]:
        """The YAML's callbacks and those of every run; one of the YAML's takes the place of ours of the same kind."""
        callbacks: list[Callback] = [RunFolder(self.kept_settings(), self.lock), *(trainer.callbacks or [])]
        if self.spikes is not None:
            spikes = self.spikes
            self.meter.went_back = lambda: spikes.went_back
            callbacks.append(SpikeRollback(spikes))
        callbacks.append(TrainingCurves(self.meter, self.validations))
        callbacks += [DropoutSeed(self.seed), ExactResume(self.spikes), ElasticSteps()]
        if not any(isinstance(callback, TextSamples) for callback in callbacks):
            callbacks.append(TextSamples())
        for callback in callbacks:
            if isinstance(callback, TextSamples):
                callback.check(self.datamodule)
        callbacks.append(FiniteSteps())
        callbacks.append(StepStops(seconds_of(trainer.max_time), self.save_times))
        if trainer.enable_progress_bar is not False:
            callbacks.append(StepProgressBar(self.meter, self.validations))
        if trainer.enable_checkpointing is not False and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks += [RunCheckpoint("best", self.validations), RunCheckpoint("last", self.validations)]
        return callbacks

    def _run_subcommand(self, subcommand: str) -> None:
        with oom_explained(self.model, casts_weights="mixed" in str(self.trainer.precision)):
            super()._run_subcommand(subcommand)

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
                run_folder=relative_to_here(str(run_folder(trainer))),
                seed=self.seed,
                deterministic=self.settings.trainer.deterministic,
            )
        )
        self._started_s = awake_s()

    def after_fit(self) -> None:
        trainer = self.trainer
        sample = next((c.latest for c in callbacks(trainer) if isinstance(c, TextSamples)), None)
        saved = {
            c.filename or "": str(c.path) if isinstance(c, RunCheckpoint) else c.best_model_path
            for c in callbacks(trainer)
            if isinstance(c, ModelCheckpoint)
        }
        rank_zero_print(
            closing_table(
                steps=trainer.global_step,
                elapsed_s=awake_s() - self._started_s,
                meter=self.meter,
                validations=self.validations,
                sample=sample,
                checkpoints={name: relative_to_here(path) for name, path in saved.items()},
                run_folder=Path(relative_to_here(str(run_folder(trainer)))),
            )
        )
        for callback in callbacks(trainer):
            if isinstance(callback, StepStops) and callback.unsaved is not None:
                raise callback.unsaved

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


def callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]  # its connectors set it
