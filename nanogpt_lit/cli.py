"""One YAML, one parser: the LightningCLI behind `fit`, `validate` and `test`, and what scripts read the YAML with."""

import logging
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only

from nanogpt_lit.checkpoint.newest import Newest, newest_checkpoint
from nanogpt_lit.checkpoint.run_file import check_run_file
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.elastic.elastic import ElasticConfig
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops.clock import awake_s
from nanogpt_lit.loops.curves import StepMeter, ValidationRecord, perplexity
from nanogpt_lit.loops.lightning_callbacks import StepProgressBar, TextSamples, TrainingCurves, add_text
from nanogpt_lit.loops.lightning_checkpoint import ExactResume, RunCheckpoint, with_run_files
from nanogpt_lit.loops.lightning_guards import FiniteSteps, SpikeRollback
from nanogpt_lit.loops.lightning_logger import PatientLogger, go_on
from nanogpt_lit.loops.lightning_observer import DropoutSeed, ElasticSteps
from nanogpt_lit.loops.lightning_precision import precision_plugin
from nanogpt_lit.loops.lightning_stops import StepStops
from nanogpt_lit.loops.machine import device_type, unused_card, usable_precision
from nanogpt_lit.loops.pieces import changed_settings, config_file
from nanogpt_lit.loops.report import closing_table, opening_lines
from nanogpt_lit.loops.slurm import requeue, was_requeued
from nanogpt_lit.loops.spikes import SpikeGuard
from nanogpt_lit.loops.stops import Reason, Stopped, seconds_of
from nanogpt_lit.memory.heap import keep_freed_memory
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parser import Parser
from nanogpt_lit.strategies.check import check_started, check_strategy, check_weights, complete_sizes, named_strategy
from nanogpt_lit.strategies.table import DDP, FSDP2, SINGLE
from nanogpt_lit.strategies.trainer_section import check_saves_whole_steps

TRAINER_DEFAULTS = {
    "default_root_dir": "runs",
    "gradient_clip_val": 1.0,
    "log_every_n_steps": 10,
    # The order of samples is endless and already split by rank (data/sampler.py): there is no epoch to wait for, and
    # Lightning's own sampler would replay or skip samples after a resume.
    "use_distributed_sampler": False,
    "check_val_every_n_epoch": None,
    "val_check_interval": 1000,
    "num_sanity_val_steps": 0,
    "enable_model_summary": False,
}


def run(arguments: list[str]) -> int:
    """`fit`, `validate` and `test`; arguments begin with the command. Returns the exit code."""
    quiet_lightning()
    try:
        NanoGPTCLI(args=arguments)
    except Stopped as stopped:
        rank_zero_print(str(stopped))
        if stopped.reason is Reason.PREEMPTED and stopped.first_rank:
            print(requeue(), flush=True)  # the job ends with it
        # Of Lightning's own processes the first speaks for all: it would take another's code for a crash.
        return stopped.reason.exit_code if stopped.first_rank else 0
    except MisconfigurationException as error:  # how Lightning says that a setting cannot be
        raise ValueError(" ".join(str(error).split())) from error
    finally:
        # Lightning leaves gloo's group, and its threads, to the interpreter's exit, which then now and then aborts.
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return 0


def prepare(arguments: list[str]) -> int:
    """`prepare`: the YAML and the options of fit."""
    quiet_lightning()
    ConfigOnlyCLI(args=arguments, run=False).prepare_data()
    return 0


class SaveConfig(SaveConfigCallback):
    """Keeps the run's full configuration in its folder, as config.yaml, and in TensorBoard's TEXT tab."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        add_text(trainer, "config", self.parser.dump(self.config))


class NanoGPTCLI(LightningCLI):
    """`LitNanoGPT`, `TokenDataModule` and a Trainer from one YAML.

    A number that would have to be written twice is written once: data.block_size gives model.gpt.block_size,
    trainer.max_steps gives model.schedule.total_steps, and the tokenizer gives model.gpt.vocab_size.
    """

    def __init__(self, args: list[str], run: bool = True) -> None:
        # Field docstrings become --help.
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        self.meter = StepMeter()
        self.validations = ValidationRecord()
        self.resumed: Newest | None = None
        self.spikes: SpikeGuard | None = None
        super().__init__(
            LitNanoGPT,
            TokenDataModule,
            save_config_callback=SaveConfig if run else None,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=1337,
            parser_kwargs={"allow_abbrev": False},
            parser_class=Parser,
            args=args,
            run=run,
            auto_configure_optimizers=False,
            # A checkpoint keeps plain dicts of our own (module.py), not Lightning's recipe for building classes.
            load_from_checkpoint_support=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        inherited = LightningCLI.subcommands()
        # Without it, Lightning unpickles nothing but tensors and plain values; with it, --weights_only=false would.
        return {name: inherited[name] | {"weights_only"} for name in ("fit", "validate", "test")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--resume",
            type=Literal["auto"] | None,
            default=None,
            help="auto: go on with the newest run below trainer.default_root_dir, from its newest whole checkpoint; "
            "without one, start. A job that SLURM has queued again does so by itself.",
        )
        parser.add_argument(
            "--spike_factor",
            type=float | None,
            default=None,
            help="When the loss of a step is above this many times the median of the 64 before, go back to the last "
            "checkpoint and leave out the samples since; 2 is usual.",
        )
        parser.link_arguments("data.block_size", "model.gpt.block_size")
        parser.link_arguments("trainer.max_steps", "model.schedule.total_steps")

    def _parse_ckpt_path(self) -> None:
        """Lightning lets a checkpoint's settings override the YAML and the command line; here the user has the word.

        The network must be the checkpoint's: LitNanoGPT.on_load_checkpoint refuses another.
        """

    @property
    def settings(self) -> Namespace:
        return self.config[self.subcommand] if self.subcommand else self.config

    @property
    def seed(self) -> int | None:
        """seed_everything, which Lightning has drawn where it was true; None where it is false."""
        seed = self.settings.seed_everything
        return None if isinstance(seed, bool) else seed

    # From text to a Trainer.

    def before_instantiate_classes(self) -> None:
        self.complete_settings()

    def complete_settings(self) -> None:
        """Fills in what the text and the machine decide. Raises ValueError for settings that cannot be."""
        settings = self.settings
        # What checks itself at construction is built here first, so that a mistake is named before the data is made.
        GPTConfig(**settings.model.gpt)
        MemoryConfig(**settings.model.memory)
        ElasticConfig(**settings.model.elastic)
        AdamWConfig(**settings.model.optim)
        ScheduleConfig(**settings.model.schedule)
        if self.subcommand in (None, "fit"):
            check_saves_whole_steps(vars(settings.trainer))
            seconds_of(settings.trainer.max_time)
            self._guard_against_spikes()
        self._find_resumed()
        if settings.get("ckpt_path") is not None and writes_run_files(settings.trainer):
            check_run_file(Path(settings.ckpt_path))
        if sentence := unused_card():
            rank_zero_print(sentence)
        self.device = device_type(settings.trainer.accelerator)
        if self.device == "cpu":
            keep_freed_memory()
        check_strategy(vars(settings.trainer), self.device)
        check_weights(vars(settings.trainer), settings.model.memory.get("weights", "card"), self.device)
        complete_sizes(settings.trainer)
        if self.subcommand is not None:  # the accelerate loop asks accelerate itself
            check_started(vars(settings.trainer))
        precision = settings.trainer.precision or "32-true"
        settings.trainer.precision = usable_precision(precision, self.device)
        if settings.trainer.precision != precision:
            rank_zero_print(f"precision: {precision} needs a GPU and there is none, training in 32-true")
        datamodule = self.prepare_data()
        if settings.model.gpt.vocab_size is None:
            settings.model.gpt.vocab_size = datamodule.vocab_size
        datamodule.check_vocabulary(settings.model.gpt.vocab_size)

    def _guard_against_spikes(self) -> None:
        factor, trainer = self.settings.get("spike_factor"), self.settings.trainer
        if factor is None:
            return
        if trainer.enable_checkpointing is False or not writes_run_files(trainer):
            raise ValueError(
                f"spike_factor={factor} goes back to a checkpoint of one file, and this run writes none; leave it out, "
                "or set trainer.enable_checkpointing=true and trainer.strategy=auto or ddp."
            )
        self.spikes = spikes = SpikeGuard(factor)
        self.meter.went_back = lambda: spikes.went_back

    def _find_resumed(self) -> None:
        """resume=auto: the checkpoint to go on from, as ckpt_path, and the run that it belongs to."""
        settings = self.settings
        if was_requeued() and settings.get("ckpt_path") is None and writes_run_files(settings.trainer):
            settings.resume = "auto"
        if settings.get("resume") is None or self.subcommand not in (None, "fit"):
            return
        if settings.get("ckpt_path") is not None:
            raise ValueError(
                f"resume=auto looks for a checkpoint and ckpt_path={settings.ckpt_path} names one; leave one out."
            )
        if not writes_run_files(settings.trainer):
            raise ValueError(
                f"resume=auto does not know the checkpoints of trainer.strategy={settings.trainer.strategy}; "
                "name one with ckpt_path."
            )
        root = Path(settings.trainer.default_root_dir)
        self.resumed = newest_checkpoint(root)
        if self.resumed is None:
            rank_zero_print(f"resume: no checkpoint in {root}, starting from the beginning")
            return
        for remark in self.resumed.remarks:
            rank_zero_print(remark)
        rank_zero_print(f"resume: going on from {self.resumed.path}, step {self.resumed.step:,}")
        settings.ckpt_path = str(self.resumed.path)

    def say_what_changed(self) -> None:
        """The command line wins over the checkpoint; the user should see where."""
        if self.resumed is not None:
            now = self._parser(self.subcommand).dump(self.settings)
            for line in changed_settings(self.resumed.run_folder, now):
                rank_zero_print(f"resume: {line}")

    def prepare_data(self) -> TokenDataModule:
        """Text to shards, when they are missing or were made from something else."""
        settings = self.settings
        if settings.data.shards_dir is None:
            settings.data.shards_dir = str(Path(settings.trainer.default_root_dir) / "shards")
        datamodule = TokenDataModule(**settings.data)
        datamodule.prepare_data()
        return datamodule

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        trainer = self._get(self.config_init, "trainer")
        plugin = precision_plugin(trainer.precision, self.device)
        # FSDPStrategy and DeepSpeedStrategy bring precision plugins of their own.
        if plugin is not None and named_strategy(trainer.strategy) in (SINGLE, DDP, FSDP2) and not trainer.plugins:
            kwargs |= {"plugins": [plugin], "precision": None}
        if writes_run_files(trainer):
            kwargs["plugins"] = with_run_files(kwargs.get("plugins", trainer.plugins))
        if self.subcommand != "fit":
            # Only a fit makes a run: the others leave no folder behind.
            self.save_config_callback = None
            return super().instantiate_trainer(logger=False, enable_checkpointing=False, **kwargs)
        if self.resumed is not None:
            self.say_what_changed()
            self.save_config_kwargs["config_filename"] = config_file(self.resumed.run_folder)
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
        callbacks: list[Callback] = list(trainer.callbacks or [])
        if self.spikes is not None:
            callbacks.append(SpikeRollback(self.spikes))
        callbacks.append(TrainingCurves(self.meter, self.validations))
        callbacks += [DropoutSeed(self.seed), ExactResume(self.spikes), ElasticSteps()]
        if not any(isinstance(callback, TextSamples) for callback in callbacks):
            callbacks.append(TextSamples())
        callbacks.append(FiniteSteps())
        callbacks.append(StepStops(seconds_of(trainer.max_time)))
        if trainer.enable_progress_bar is not False:
            callbacks.append(StepProgressBar(self.meter, self.validations))
        if trainer.enable_checkpointing is not False and not any(isinstance(c, ModelCheckpoint) for c in callbacks):
            callbacks += [RunCheckpoint("best", self.validations), RunCheckpoint("last", self.validations)]
        return callbacks

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
            )
        )
        self._started_s = awake_s()

    def after_fit(self) -> None:
        trainer = self.trainer
        sample = next((c.latest for c in callbacks(trainer) if isinstance(c, TextSamples)), None)
        saved = {c.filename or "": c.best_model_path for c in callbacks(trainer) if isinstance(c, ModelCheckpoint)}
        rank_zero_print(
            closing_table(
                steps=trainer.global_step,
                elapsed_s=awake_s() - self._started_s,
                meter=self.meter,
                validations=self.validations,
                sample=sample,
                checkpoints={name: relative_to_here(path) for name, path in saved.items()},
                run_folder=Path(relative_to_here(run_folder(trainer))),
            )
        )

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


class ConfigOnlyCLI(NanoGPTCLI):
    """The same parser and the same links, with nothing built: for what needs the settings and no Trainer."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def build(self) -> tuple[LitNanoGPT, TokenDataModule]:
        """The module and the data, as fit builds them, once the settings are complete."""
        built = self.parser.instantiate(self.config)
        return built.model, built.data


def quiet_lightning() -> None:
    """Leaves out what does not concern this run; our own lines say which device, precision and seed it has."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # a window is a copy out of a memory map: workers would only cost
        ".*LightningCLI's args parameter is intended.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # validating needs none of them
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
    ):
        warnings.filterwarnings("ignore", message)


def writes_run_files(trainer: Namespace) -> bool:
    """Whether checkpoints are in the format of every loop; a sharded strategy writes them its own way."""
    return named_strategy(trainer.strategy) in (SINGLE, DDP)


def callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]  # its connectors set it


def run_folder(trainer: Trainer) -> str:
    return trainer.log_dir or trainer.default_root_dir


@rank_zero_only
def rank_zero_print(text: str) -> None:
    print(text, flush=True)


def relative_to_here(path: str) -> str:
    """The path as a user would type it: relative when it is below the current folder."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path
