"""The settings of a run: a YAML and the command line through one parser, completed by what text and machine decide."""

import logging
import os
import re
import warnings
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.cli.parser import Parser
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.data.shards import first_words, val_tokens_per_byte
from nanogpt_lit.errors import UserError
from nanogpt_lit.gpt.networks import NETWORKS, config_of, section_of
from nanogpt_lit.loops.compatibility import (
    check_loggers,
    check_saves_whole_steps,
    check_together,
    keys_of,
)
from nanogpt_lit.loops.trainer_section import (
    TRAINER_DEFAULTS,
    asked_processes,
    check_choices,
    check_devices,
    check_started,
    complete_sizes,
    strategy_settings,
    text_samples,
)
from nanogpt_lit.memory.elastic import ElasticConfig
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig, short_of_peak
from nanogpt_lit.run.curves import SampleConfig
from nanogpt_lit.run.observers import RunConfig
from nanogpt_lit.run.overfitting import overfitting
from nanogpt_lit.run.stops import seconds_of
from nanogpt_lit.runtime.clock import command_began_s
from nanogpt_lit.runtime.durable import check_writable
from nanogpt_lit.runtime.launch import (
    RANKS,
    SIZES,
    is_first,
    launched_processes,
    lost_restart,
    was_requeued,
    whole_number,
)
from nanogpt_lit.runtime.machine import device_type, precision_remark, unused_gpu, usable_precision
from nanogpt_lit.runtime.precision import full_precision_name
from nanogpt_lit.runtime.process_settings import keep_freed_memory

if TYPE_CHECKING:
    from nanogpt_lit.cli.beginning import Beginning, Resumed
    from nanogpt_lit.cli.teachers import Teachers

ROOT = "runs"
"""trainer.default_root_dir where it is not set, or null."""


COMMANDS = ["fit", "validate", "test"]
WORDED = re.compile(r"^-h$|help\b|^--print_config")
"""Arguments that are answered with what options mean: --help, a class's --trainer.strategy.help, a commented YAML."""


class SettingsCLI(LightningCLI):
    """The settings of `LitNanoGPT`, `TokenDataModule` and a Trainer, and nothing built from them.

    A number that would have to be written twice is written once: data.block_size gives the network's block_size,
    trainer.max_steps gives model.schedule.total_steps, and the tokenizer gives the network's vocab_size.
    """

    def __init__(
        self, args: list[str], run: bool = False, lock: RunLock | None = None, describes_options: bool = False
    ) -> None:
        """lock: taken on the run that is gone on with; None where nothing is trained
        describes_options: whether the parser's options have their descriptions also when the user asks for no help
        """
        self.lock = lock
        self._commands = [name for name in COMMANDS if name in args[:1]] or COMMANDS
        # Field docstrings become --help. To read them out of the source takes longer than all else of the parser.
        describes = describes_options or any(WORDED.search(argument) for argument in args)
        set_parsing_settings(docstring_parse_attribute_docstrings=describes)
        self.resumed: Resumed | None = None
        self.beginning: Beginning | None = None
        self.teachers: Teachers | None = None
        self._chose_shards_dir = False
        for name in (*SIZES, *RANKS):  # before Lightning and accelerate read them
            whole_number(name, os.environ)
        super().__init__(
            LitNanoGPT,
            TokenDataModule,
            save_config_callback=None,  # it would write without bringing the file to the disk
            trainer_defaults={"default_root_dir": ROOT, **TRAINER_DEFAULTS},
            seed_everything_default=1337,
            parser_kwargs={"allow_abbrev": False},
            parser_class=Parser,
            args=args,
            run=run,
            auto_configure_optimizers=False,
            # A checkpoint keeps plain dicts of our own (module.py), not Lightning's recipe for building classes.
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning asks its own instance
        """The command that is called alone: each has a parser of its own, which takes half a second to make."""
        inherited = LightningCLI.subcommands()
        # Without it, Lightning unpickles nothing but tensors and plain values; with it, --weights_only=false would.
        return {name: inherited[name] | {"weights_only"} for name in self._commands}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_class_arguments(RunConfig, None)
        for config, _ in NETWORKS.values():
            parser.link_arguments("data.block_size", f"model.{config.SECTION}.block_size")
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

    def instantiate_classes(self) -> None:
        pass

    def complete_settings(self) -> None:
        """Fills in what the text and the machine decide. Raises UserError for settings that cannot be."""
        self.check_settings()
        self._follow(self.prepare_data())

    def check_settings(self) -> None:
        """Fills in what the machine decides. Raises UserError for what is wrong whatever the text; makes nothing."""
        settings = self.settings
        if settings.trainer.callbacks is not None and not isinstance(settings.trainer.callbacks, list):
            settings.trainer.callbacks = [settings.trainer.callbacks]  # one may stand alone
        self._check_values()
        for sentence in (unused_gpu(), lost_restart()):
            if sentence:
                rank_zero_print(sentence)
        self.device = device_type(settings.trainer.accelerator)
        self._find_resumed()
        self.find_beginning()
        if self.beginning is not None and settings.get("ckpt_path") is None:
            rank_zero_print(str(self.beginning))
        if settings.get("teachers") and self.subcommand in (None, "fit"):
            from nanogpt_lit.cli.teachers import Teachers  # late, for few runs have any

            self.teachers = Teachers.of(settings.teachers)
        if self.device == "cpu":
            keep_freed_memory()
        self._check_together()
        complete_sizes(settings.trainer)
        if self.subcommand is not None:  # the accelerate loop asks accelerate itself
            check_started(vars(settings.trainer))
        self._choose_precision()

    def _check_values(self) -> None:
        """Build what checks itself at construction, so that a mistake is named before the data is made."""
        settings, trainer = self.settings, self.settings.trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = ROOT
        for name in (section_of(settings.model), "memory", "elastic", "optim", "schedule"):
            if not isinstance(keys := settings.model[name], Namespace | dict):
                raise UserError(f"model.{name}={keys} holds no keys; write them below it, or leave it out.")
        config_of(settings.model)
        MemoryConfig(**settings.model.memory)
        ElasticConfig(**settings.model.elastic)
        AdamWConfig(**settings.model.optim)
        check_choices(vars(trainer))
        if self.subcommand in ("validate", "test") and trainer.max_steps == -1:  # where no rate decays
            settings.model.schedule.total_steps = ScheduleConfig().total_steps
        schedule = ScheduleConfig(**settings.model.schedule)
        self.run_config = RunConfig(**{field.name: settings[field.name] for field in fields(RunConfig)})
        if self.subcommand not in (None, "fit"):
            return
        if is_first():  # the others write nothing
            check_writable("trainer.default_root_dir", Path(trainer.default_root_dir))
        if sentence := short_of_peak(schedule):
            rank_zero_print(sentence)
        check_loggers(vars(trainer))
        check_saves_whole_steps(vars(trainer))
        seconds_of(trainer.max_time)
        if trainer.limit_val_batches == 0 and trainer.enable_checkpointing is not False:
            rank_zero_print(
                "checkpoints: trainer.limit_val_batches=0 validates nothing, so there is no best; last is saved "
                f"{self.run_config.save_times()}"
            )

    def _choose_precision(self) -> None:
        trainer = self.settings.trainer
        asked = full_precision_name(trainer.precision)
        trainer.precision = usable_precision(asked, self.device)
        if trainer.precision != asked:
            rank_zero_print(f"precision: {asked} needs a GPU and there is none, training in 32-true")
        if self.subcommand not in (None, "fit") or not is_first():
            return
        if sentence := precision_remark(trainer.precision, self.device):
            rank_zero_print(sentence)

    def _follow(self, data: TokenDataModule) -> None:
        """Set what the data decides about the network, and check that the run goes with it."""
        self._n_windows = data.n_windows
        section = section_of(self.settings.model)
        gpt = self.settings.model[section]
        if gpt.vocab_size is None:
            gpt.vocab_size = data.vocab_size
        data.check_vocabulary(gpt.vocab_size, f"model.{section}.vocab_size")
        gpt.document_start, gpt.document_end = data.document_start, data.document_end
        if self.beginning is not None:
            self.beginning.check_tokenizer(data.tokenizer)
        if self.teachers is not None:
            self.teachers.check(data, gpt.vocab_size)
        if self.resumed is not None:
            self.resumed.check_not_ended(self.run_config.early_stopping_patience, data.text)

    def _check_together(self) -> None:
        """Raises UserError for settings that do not go together: Lightning would say so after the data is made, or with
        a traceback, or at the first step."""
        trainer = self.settings.trainer
        check_devices(trainer.devices, self.device)
        processes = asked_processes(vars(trainer)) or launched_processes()
        if processes == 1 and trainer.devices in ("auto", -1, "-1") and self.device == "cuda":
            processes = torch.cuda.device_count()
        settings = {
            **strategy_settings(vars(trainer), self.device),
            **keys_of("model", self.settings.model.as_dict()),
            "trainer.devices": processes,
        }
        if self.subcommand in (None, "fit"):
            settings |= vars(self.run_config)
            settings |= {f"trainer.{name}": trainer[name] for name in ("enable_checkpointing", "limit_val_batches")}
        check_together(settings)

    def features(self, data: TokenDataModule) -> dict[str, Any]:
        """Arguments of a run's observers (run/observers.py), whichever loop drives it.

        Raises UserError for a sample that cannot be written.
        """
        trainer = self.settings.trainer
        samples = SampleConfig(**text_samples(vars(trainer)))
        prompt = sample_prompt(data, samples.prompt)
        data.tokenizer.encode(prompt)
        return {
            "log_every_n_steps": trainer.log_every_n_steps,
            "max_time_s": seconds_of(trainer.max_time),
            "run_config": self.run_config,
            "samples": replace(samples, prompt=prompt),
            "tokenizer": lambda: data.tokenizer,
            "shows_progress": trainer.enable_progress_bar is not False,
            "began_s": command_began_s(),
            "text": data.text,
            "tokens_per_byte": val_tokens_per_byte(data.folder, data.tokenizer),
        }

    def _find_resumed(self) -> None:
        """resume=auto: the checkpoint to go on from, as ckpt_path, and the run that it belongs to."""
        settings, is_fit = self.settings, self.subcommand in (None, "fit")
        if was_requeued() and settings.get("ckpt_path") is None and is_fit:
            settings.resume = "auto"
        if settings.get("resume") is None and settings.get("ckpt_path") is None:
            return
        from nanogpt_lit.cli.beginning import go_on_from  # late, for a new run goes on from nothing

        self.resumed = go_on_from(settings, is_fit, self.lock, rank_zero_print)

    def find_beginning(self) -> None:
        """init_from: the model to fine-tune, which brings its network and tokenizer.

        A run that has begun, and goes on by resume or ckpt_path, has them in its checkpoint.
        """
        settings = self.settings
        if settings.get("init_from") is None:
            return
        source = settings.get("ckpt_path") or settings.init_from
        from nanogpt_lit.cli.beginning import Beginning  # late, as above

        chats = settings.data.documents == "conversations"
        self.beginning = Beginning.of(source, settings.data.special_tokens or (), chats)
        if settings.get("ckpt_path") is None:
            settings.init_from = self.beginning.source
        self.beginning.choose(settings)

    def begin(self, module: LitNanoGPT) -> None:
        """Puts the weights of init_from into a new run's module; those of a resumed run come with its state."""
        if self.beginning is not None and self.settings.get("ckpt_path") is None:
            self.beginning.load_into(module, self.settings.data.block_size)
        self.beginning = None  # its weights need not be held twice
        if self.teachers is not None:
            self.teachers.teach(module)

    def say_if_it_overfits(self, module: LitNanoGPT, processes: int) -> None:
        """Print that a new run will read its text too often. A run that fine-tunes learns from few readings
        anyway, and one with teachers may read it often."""
        trainer, data = self.settings.trainer, self.settings.data
        learns_otherwise = self.settings.get("init_from") is not None or self.teachers is not None
        if self.resumed is not None or learns_otherwise or trainer.max_steps == -1:
            return
        sequences = trainer.max_steps * trainer.accumulate_grad_batches * processes * data.batch_size
        readings, tokens = sequences / self._n_windows, self._n_windows * data.block_size
        if sentence := overfitting(module.gpt, readings, trainer.max_steps, tokens, module.optim_config):
            rank_zero_print(sentence)

    def say_what_changed(self) -> None:
        """Print what is set otherwise than in the run that is gone on with."""
        if self.resumed is not None:
            for line in self.resumed.changes(self.settings, self.kept_settings()):
                rank_zero_print(f"resume: {line}")

    def kept_settings(self) -> str:
        """The configuration that a run keeps in its folder, YAML.

        A data.shards_dir that was not set stays so: the YAML may be used again for another run, which is to make
        shards of its own.
        """
        settings = self.settings.clone()
        if self._chose_shards_dir:
            settings.data.shards_dir = None
        return self._parser(self.subcommand).dump(settings, skip_unset=False)

    def prepare_data(self) -> TokenDataModule:
        """Text to shards, when they are missing or were made from something else."""
        datamodule = self.data_module()
        datamodule.prepare_data()
        for remark in datamodule.remarks():
            rank_zero_print(remark)
        return datamodule

    def data_module(self) -> TokenDataModule:
        settings = self.settings
        if settings.data.shards_dir is None:
            self._chose_shards_dir = True
            settings.data.shards_dir = str(Path(settings.trainer.default_root_dir) / "shards")
        return TokenDataModule(**settings.data)

    def build(self) -> tuple[LitNanoGPT, TokenDataModule]:
        """The module and the data, as fit builds them, once the settings are complete."""
        built = self.parser.instantiate(self.config)
        self.begin(built.model)
        return built.model, built.data


def sample_prompt(data: TokenDataModule, asked: str | None) -> str:
    """The beginning of samples. asked: a text, or a question to answer; None takes that of the validation part"""
    if data.documents != "conversations":
        return first_words(data.folder, data.tokenizer) if asked is None else asked
    from nanogpt_lit.data.conversations import Chat  # few runs learn to answer
    from nanogpt_lit.data.windows import first_question

    if asked is None:
        return first_question(data.folder, data.tokenizer)
    return Chat(data.tokenizer).render([{"role": "user", "content": asked}], add_generation_prompt=True)


def quiet_lightning() -> None:
    """Leaves out what does not concern this run; our own lines say which device, precision and seed it has."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",  # a window is a copy out of a memory map: workers would only cost
        ".*LightningCLI's args parameter is intended.*",
        ".*callbacks used to create the checkpoint need to be provided.*",  # validating needs none of them
        ".*isinstance.treespec, LeafSpec.. is deprecated.*",
        ".*Checkpoint directory .* exists and is not empty.*",  # that of the run that goes on
    ):
        warnings.filterwarnings("ignore", message)


@rank_zero_only
def rank_zero_print(text: str) -> None:
    print(text, flush=True)
