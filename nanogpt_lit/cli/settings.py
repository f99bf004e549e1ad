"""What a run is told: a YAML and the command line through one parser, completed by what text and machine decide."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import yaml  # type: ignore[import-untyped]
from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from nanogpt_lit.checkpoint.newest import CKPT, Newest, latest_of, newest_run, step_in
from nanogpt_lit.checkpoint.run_file import SUFFIX, step_of, validations_of
from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.cli.parser import Parser
from nanogpt_lit.data.datamodule import ORDER_FIELDS, TokenDataModule
from nanogpt_lit.data.shards import val_tokens_per_byte
from nanogpt_lit.data.tokenizer_files import parse_tokenizer
from nanogpt_lit.errors import NothingToDo, UserError
from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops.compatibility import (
    DDP,
    FSDP2,
    SINGLE,
    check_loggers,
    check_saves_whole_steps,
    check_together,
    keys_of,
)
from nanogpt_lit.loops.strategies import check_devices, check_started, complete_sizes, named_strategy, strategy_settings
from nanogpt_lit.loops.trainer_section import asked_processes, text_samples
from nanogpt_lit.memory.elastic import ElasticConfig
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig
from nanogpt_lit.optim.schedule import ScheduleConfig, short_of_peak
from nanogpt_lit.run.checkpoints import EVERY_MINUTES, SaveTimes
from nanogpt_lit.run.early_stopping import check_patience
from nanogpt_lit.run.pieces import changed_settings, latest_config, rate_change
from nanogpt_lit.run.samples import SampleConfig
from nanogpt_lit.run.spikes import check_spike_factor
from nanogpt_lit.run.stops import seconds_of
from nanogpt_lit.runtime.durable import check_writable
from nanogpt_lit.runtime.environment import was_requeued
from nanogpt_lit.runtime.machine import device_type, slow_precision, unused_gpu, usable_precision
from nanogpt_lit.runtime.precision import full_precision_name
from nanogpt_lit.runtime.process_settings import keep_freed_memory
from nanogpt_lit.runtime.processes import is_first, launched_processes
from nanogpt_lit.runtime.supervised import supervised

if TYPE_CHECKING:
    from nanogpt_lit.checkpoint.network import Described
    from nanogpt_lit.cli.fine_tuning import Beginning

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


class SettingsCLI(LightningCLI):
    """The settings of `LitNanoGPT`, `TokenDataModule` and a Trainer, and nothing built from them.

    A number that would have to be written twice is written once: data.block_size gives model.gpt.block_size,
    trainer.max_steps gives model.schedule.total_steps, and the tokenizer gives model.gpt.vocab_size.
    """

    def __init__(self, args: list[str], run: bool = False, lock: RunLock | None = None) -> None:
        """lock: taken on the run that is gone on with; None where nothing is trained"""
        self.lock = lock
        # Field docstrings become --help.
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        self.resumed: Newest | None = None
        self.beginning: Beginning | None = None
        self._chose_shards_dir = False
        super().__init__(
            LitNanoGPT,
            TokenDataModule,
            save_config_callback=None,  # it would write without bringing the file to the disk
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
            "--init_from",
            type=str | None,
            default=None,
            help="Fine-tune: begin at step 0 with the weights, the network and the tokenizer of any model that convert "
            "reads, or of hf:OWNER/NAME[@REVISION]. (ckpt_path goes on with a run, its step, schedule and best.)",
        )
        parser.add_argument(
            "--spike_factor",
            type=float | None,
            default=None,
            help="When the loss of a step is above this many times the median of the 64 before, go back to the last "
            "checkpoint and leave out the samples since; 2 is usual.",
        )
        parser.add_argument(
            "--early_stopping_patience",
            type=int | None,
            default=None,
            help="End the run after so many validations in a row without a better loss; best is kept. 3 is usual when "
            "a model is fine-tuned on a few megabytes.",
        )
        parser.add_argument(
            "--checkpoint_every_minutes",
            type=float | None,
            default=EVERY_MINUTES,
            help="Save last after so many minutes without a checkpoint, whether or not the run validates.",
        )
        parser.add_argument(
            "--checkpoint_every_steps",
            type=int | None,
            default=None,
            help="Save last after every so many optimizer steps, besides after each validation and at the end.",
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

    def instantiate_classes(self) -> None:
        pass

    def complete_settings(self) -> None:
        """Fills in what the text and the machine decide. Raises UserError for settings that cannot be."""
        settings = self.settings
        if settings.trainer.callbacks is not None and not isinstance(settings.trainer.callbacks, list):
            settings.trainer.callbacks = [settings.trainer.callbacks]  # one may stand alone
        # What checks itself at construction is built here first, so that a mistake is named before the data is made.
        GPTConfig(**settings.model.gpt)
        MemoryConfig(**settings.model.memory)
        ElasticConfig(**settings.model.elastic)
        AdamWConfig(**settings.model.optim)
        schedule = ScheduleConfig(**settings.model.schedule)
        if self.subcommand in (None, "fit"):
            if is_first():  # the others write nothing
                check_writable("trainer.default_root_dir", Path(settings.trainer.default_root_dir))
            if sentence := short_of_peak(schedule):
                rank_zero_print(sentence)
            check_loggers(vars(settings.trainer))
            check_saves_whole_steps(vars(settings.trainer))
            seconds_of(settings.trainer.max_time)
            self._guard_against_spikes()
            if (patience := settings.get("early_stopping_patience")) is not None:
                check_patience(patience, validates=settings.trainer.limit_val_batches != 0)
            self._plan_saves()
        if sentence := unused_gpu():
            rank_zero_print(sentence)
        self.device = device_type(settings.trainer.accelerator)
        self._find_resumed()
        if settings.get("ckpt_path") is not None and is_first():  # whose file is the one that counts
            if writes_run_files(settings.trainer):
                step_of(Path(settings.ckpt_path))  # raises where it is none, before anything is built
            if self.subcommand in (None, "fit") and resumable(settings.trainer) is not None:
                self._check_goes_on(Path(settings.ckpt_path), settings.trainer.max_steps)
        self.find_beginning()
        if self.beginning is not None and settings.get("ckpt_path") is None:
            rank_zero_print(str(self.beginning))
        if self.device == "cpu":
            keep_freed_memory()
        self._check_together()
        complete_sizes(settings.trainer)
        if self.subcommand is not None:  # the accelerate loop asks accelerate itself
            check_started(vars(settings.trainer))
        precision = full_precision_name(settings.trainer.precision)
        settings.trainer.precision = usable_precision(precision, self.device)
        if settings.trainer.precision != precision:
            rank_zero_print(f"precision: {precision} needs a GPU and there is none, training in 32-true")
        if sentence := slow_precision(settings.trainer.precision, self.device):
            rank_zero_print(sentence)
        datamodule = self.prepare_data()
        if settings.model.gpt.vocab_size is None:
            settings.model.gpt.vocab_size = datamodule.vocab_size
        datamodule.check_vocabulary(settings.model.gpt.vocab_size)
        settings.model.gpt.document_start = datamodule.document_start
        if self.beginning is not None:
            self.beginning.check_tokenizer(datamodule.tokenizer)
        if self.resumed is not None:
            self._check_not_ended(self.resumed.path, datamodule.text)

    def _check_together(self) -> None:
        """Raises UserError for settings that do not go together: Lightning would say so after the data is made, or with
        a traceback, or at the first step."""
        trainer = self.settings.trainer
        check_devices(trainer.devices, self.device)
        processes = asked_processes(vars(trainer)) or launched_processes()
        if processes == 1 and trainer.devices in ("auto", -1, "-1") and self.device == "cuda":
            processes = torch.cuda.device_count()
        check_together(
            {
                **strategy_settings(vars(trainer), self.device),
                **keys_of("model", self.settings.model.as_dict()),
                "trainer.devices": processes,
            }
        )

    def _guard_against_spikes(self) -> None:
        factor, trainer = self.settings.get("spike_factor"), self.settings.trainer
        if factor is None:
            return
        strategy = named_strategy(trainer.strategy)
        saves = {"trainer.enable_checkpointing": trainer.enable_checkpointing, "trainer.strategy": strategy}
        check_together({"spike_factor": factor, **saves})
        check_spike_factor(factor)

    def _plan_saves(self) -> None:
        settings = self.settings
        self.save_times = SaveTimes(settings.checkpoint_every_minutes, settings.checkpoint_every_steps)
        if settings.trainer.limit_val_batches == 0 and settings.trainer.enable_checkpointing is not False:
            rank_zero_print(
                "checkpoints: trainer.limit_val_batches=0 validates nothing, so there is no best; last is saved "
                f"{self.save_times}"
            )

    def features(self, data: TokenDataModule) -> dict[str, Any]:
        """What the settings say of a run's observers (run/observers.py), whichever loop drives it.

        Raises UserError for a sample that cannot be written.
        """
        trainer = self.settings.trainer
        samples = SampleConfig(**text_samples(vars(trainer)))
        data.tokenizer.encode(samples.prompt)
        return {
            "log_every_n_steps": trainer.log_every_n_steps,
            "max_time_s": seconds_of(trainer.max_time),
            "save_times": self.save_times,
            "samples": samples,
            "tokenizer": lambda: data.tokenizer,
            "spike_factor": self.settings.get("spike_factor"),
            "shows_progress": trainer.enable_progress_bar is not False,
            "early_stopping_patience": self.settings.get("early_stopping_patience"),
            "text": data.text,
            "tokens_per_byte": val_tokens_per_byte(data.folder, data.tokenizer),
        }

    def _find_resumed(self) -> None:
        """resume=auto: the checkpoint to go on from, as ckpt_path, and the run that it belongs to."""
        settings = self.settings
        if was_requeued() and settings.get("ckpt_path") is None and self.subcommand in (None, "fit"):
            settings.resume = "auto"
        if settings.get("resume") is None or self.subcommand not in (None, "fit"):
            return
        if settings.get("ckpt_path") is not None:
            raise UserError(
                f"resume=auto looks for a checkpoint and ckpt_path={settings.ckpt_path} names one; leave one out."
            )
        suffix = resumable(settings.trainer)
        if suffix is None:
            who = "fit --keep-alive" if supervised() else "a job queued again" if was_requeued() else "resume=auto"
            raise UserError(
                f"{who} goes on from the newest checkpoint that is whole, and those of trainer.strategy="
                f"{strategy_name(settings.trainer.strategy)} are folders or files that only its own engine reads; set "
                "trainer.strategy=ddp, or ModelParallelStrategy with save_distributed_checkpoint=false, or start fit "
                "alone with ckpt_path."
            )
        if not is_first():
            return  # the first process decides, and tells the others: they may have no disk in common
        root = Path(settings.trainer.default_root_dir)
        run = newest_run(root, suffix)
        if run is None and (other := newest_run(root, CKPT if suffix == SUFFIX else SUFFIX)) is not None:
            raise UserError(
                f"the checkpoints in {other} are of another trainer.strategy; `python -m nanogpt_lit convert` makes a "
                f"file{SUFFIX} of a {CKPT}, or set another trainer.default_root_dir."
            )
        if run is None:
            rank_zero_print(f"resume: no checkpoint in {root}, starting from the beginning")
            return
        if self.lock is not None:  # before its data or its checkpoints are looked at
            self.lock.acquire(run)
        self.resumed = latest_of(run, suffix)
        for remark in self.resumed.remarks:
            rank_zero_print(remark)
        rank_zero_print(f"resume: going on from {self.resumed.path}, step {self.resumed.step:,}")
        settings.ckpt_path = str(self.resumed.path)

    def _check_goes_on(self, checkpoint: Path, max_steps: int) -> None:
        """Raises NothingToDo where the run that is gone on with has all its steps."""
        step = step_in(checkpoint)
        if not 0 < max_steps <= step:
            return
        sentence = (
            f"{checkpoint} holds step {step:,}, and the run is complete with trainer.max_steps={max_steps}. To go on "
            f"with it, raise that: --trainer.max_steps {2 * step} would train as much again."
        )
        # A checkpoint that the user names may be of another run; and processes that are started already end together.
        if self.resumed is not None and launched_processes() == 1:
            raise NothingToDo(sentence)
        rank_zero_print(sentence)

    def _check_not_ended(self, checkpoint: Path, text: str) -> None:
        """Raises NothingToDo where the run that is gone on with has ended early."""
        patience = self.settings.get("early_stopping_patience")
        if patience is None or checkpoint.suffix != SUFFIX or launched_processes() > 1:
            return
        validations = validations_of(checkpoint)
        if validations.get("since_best", 0) >= patience and validations.get("text") in (None, text):
            raise NothingToDo(
                f"{checkpoint} is complete: the run ended early, after {patience} validations in a row without a "
                "better loss. To go on with it, raise early_stopping_patience, or leave it out."
            )

    def find_beginning(self) -> None:
        """init_from: the model to fine-tune, which brings its network and tokenizer.

        A run that has begun, and goes on by resume or ckpt_path, has them in its checkpoint.
        """
        settings = self.settings
        if settings.get("init_from") is None:
            return
        source = settings.get("ckpt_path") or settings.init_from
        from nanogpt_lit.cli.fine_tuning import Beginning  # late, with the formats of all others behind it

        self.beginning = Beginning.of(source, settings.data.special_tokens or ())
        if settings.get("ckpt_path") is None:
            settings.init_from = self.beginning.source
        self.beginning.choose(settings)

    def begin(self, module: LitNanoGPT) -> None:
        """Puts the weights of init_from into a new run's module; those of a resumed run come with its state."""
        if self.beginning is not None and self.settings.get("ckpt_path") is None:
            self.beginning.load_into(module, self.settings.data.block_size)
        self.beginning = None  # its weights need not be held twice

    def say_what_changed(self) -> None:
        """The command line wins over the checkpoint; the user should see where."""
        if self.resumed is None:
            return
        before, remarks = latest_config(self.resumed.run_folder)
        changes = changed_settings(before, yaml.safe_load(self.kept_settings())) if before is not None else []
        for line in (*remarks, *changes):
            rank_zero_print(f"resume: {line}")
        if before is not None and (rate := rate_change(before, self.settings.as_dict(), self.resumed.step)):
            rank_zero_print(f"resume: {rate}")

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
        datamodule = self._data()
        datamodule.prepare_data()
        return datamodule

    def _data(self) -> TokenDataModule:
        settings = self.settings
        if settings.data.shards_dir is None:
            self._chose_shards_dir = True
            settings.data.shards_dir = str(Path(settings.trainer.default_root_dir) / "shards")
        return TokenDataModule(**settings.data)

    def described(self) -> "Described":
        """What the settings say of a run. Raises UserError where a tokenizer that is made from text is not made yet."""
        from nanogpt_lit.checkpoint.network import Described, chosen_tokenizer  # convert alone asks for it

        settings = self.settings
        data = self._data()
        name = settings.data.tokenizer
        made_of_text = parse_tokenizer(name)[0] in ("char", "bpe")
        tokenizer = data.tokenizer if made_of_text else chosen_tokenizer(Path(name), 0, name)
        vocab_size = settings.model.gpt.vocab_size or tokenizer.vocab_size
        return Described(
            gpt=GPTConfig(**{**settings.model.gpt, "vocab_size": vocab_size}),
            optim=AdamWConfig(**settings.model.optim),
            schedule=ScheduleConfig(**settings.model.schedule),
            tokenizer=tokenizer,
            order={name: settings.data[name] for name in ORDER_FIELDS},
            accumulate_grad_batches=settings.trainer.accumulate_grad_batches,
        )

    def build(self) -> tuple[LitNanoGPT, TokenDataModule]:
        """The module and the data, as fit builds them, once the settings are complete."""
        built = self.parser.instantiate(self.config)
        self.begin(built.model)
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
        ".*Checkpoint directory .* exists and is not empty.*",  # that of the run that goes on
    ):
        warnings.filterwarnings("ignore", message)


def resumable(trainer: Namespace) -> str | None:
    """The suffix of the files that resume=auto goes on from; None where only the strategy's engine reads its own."""
    if writes_run_files(trainer):
        return SUFFIX
    if named_strategy(trainer.strategy) != FSDP2:
        return None
    arguments = Namespace() if isinstance(trainer.strategy, str) else trainer.strategy.get("init_args") or Namespace()
    whole = isinstance(trainer.strategy, str) or arguments.get("save_distributed_checkpoint") is False
    return CKPT if whole else None


def strategy_name(strategy: str | Namespace) -> str:
    return strategy if isinstance(strategy, str) else str(strategy.get("class_path")).rpartition(".")[2]


def writes_run_files(trainer: Namespace) -> bool:
    """Whether checkpoints are in the format of every loop; a sharded strategy writes them its own way."""
    return named_strategy(trainer.strategy) in (SINGLE, DDP)


@rank_zero_only
def rank_zero_print(text: str) -> None:
    print(text, flush=True)
