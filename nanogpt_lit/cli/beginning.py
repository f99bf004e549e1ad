"""Beginnings of a fit: the checkpoint of its own run that it goes on from, or the weights and the tokenizer of another
model, with a step 0, a schedule and a best of its own.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]
from filelock import FileLock
from jsonargparse import Namespace
from torch import nn

from nanogpt_lit.checkpoint.exchange import size
from nanogpt_lit.checkpoint.newest import Newest, latest_of, newest_run
from nanogpt_lit.checkpoint.run_file import SUFFIX, StoredNetwork, description_in, step_of, validations_of
from nanogpt_lit.checkpoint.run_lock import RunLock
from nanogpt_lit.checkpoint.shards import sweep_shards
from nanogpt_lit.data.tokenizer import TOKENIZER_JSON, TOKENIZER_RANKS, Tokenizer
from nanogpt_lit.data.tokenizer_files import tokenizer_from_files, with_special_tokens
from nanogpt_lit.errors import NothingToDo, UserError
from nanogpt_lit.gpt.network import HEAD
from nanogpt_lit.gpt.networks import NETWORKS, config_of, described, section_of
from nanogpt_lit.loops.trainer_section import writes_run_files
from nanogpt_lit.run.resume import changed_settings, latest_config, rate_change
from nanogpt_lit.runtime.durable import sweep, write_durably
from nanogpt_lit.runtime.launch import is_first, launched_processes, supervised, was_requeued


@dataclass(frozen=True)
class Resumed(Newest):
    """The checkpoint that a run goes on from by itself."""

    def check_not_ended(self, patience: int | None, text: str) -> None:
        """Check that the run has not ended early, or raise NothingToDo. text: what identifies its text"""
        if patience is None or launched_processes() > 1:
            return
        validations = validations_of(self.path)
        if validations.get("since_best", 0) >= patience and validations.get("text") in (None, text):
            raise NothingToDo(
                f"{self.path} is complete: the run ended early, after {patience} validations in a row without a "
                "better loss. To go on with it, raise early_stopping_patience, or leave it out."
            )

    def changes(self, settings: Namespace, kept: str) -> Iterator[str]:
        """Lines on what is set otherwise than in the run so far: the command line wins over it.

        kept: the settings as the run keeps them, YAML
        """
        before, remarks = latest_config(self.run_folder)
        yield from remarks
        if before is not None:
            yield from changed_settings(before, yaml.safe_load(kept))
            if rate := rate_change(before, settings.as_dict(), self.step):
                yield rate


def go_on_from(settings: Namespace, is_fit: bool, lock: RunLock | None, say: Callable[[str], None]) -> Resumed | None:
    """Find and check the checkpoint of resume or ckpt_path, which becomes settings.ckpt_path; None for one by name.

    lock: taken on its run   say: takes the lines about it
    """
    resumed = None
    if is_fit and settings.get("resume") is not None:
        check_resumable(settings)
        root = Path(settings.trainer.default_root_dir)
        # The first process decides, and tells the others: they may have no disk in common.
        resumed = find_resumed(root, lock) if is_first() else None
        if resumed is None:
            say(f"resume: no checkpoint in {root}, starting from the beginning")
        else:
            for remark in resumed.remarks:
                say(remark)
            say(f"resume: going on from {resumed.path}, step {resumed.step:,}")
            settings.ckpt_path = str(resumed.path)
    if settings.get("ckpt_path") is None or not is_first():  # whose file is the one that counts
        return resumed
    if sentence := check_goes_on(settings, is_fit, found=resumed is not None):
        say(sentence)
    return resumed


def check_resumable(settings: Namespace) -> None:
    """Raises UserError where resume=auto has nothing to look for, or cannot find it by itself."""
    if settings.get("ckpt_path") is not None:
        raise UserError(
            f"resume=auto looks for a checkpoint and ckpt_path={settings.ckpt_path} names one; leave one out."
        )
    strategy = settings.trainer.strategy
    if not writes_run_files(settings.trainer):
        who = "fit --keep-alive" if supervised() else "a job queued again" if was_requeued() else "resume=auto"
        name = strategy if isinstance(strategy, str) else str(strategy.get("class_path")).rpartition(".")[2]
        raise UserError(
            f"{who} goes on from the newest checkpoint that is whole, and those of trainer.strategy={name} are folders "
            "or files that only its own engine reads; set trainer.strategy=ddp or ModelParallelStrategy, or start fit "
            "alone with ckpt_path."
        )


def find_resumed(root: Path, lock: RunLock | None) -> Resumed | None:
    """Find the newest checkpoint below root, and lock its run before anything in it is read; None where there is none.

    Raises UserError where the only checkpoints are another strategy's, and as `latest_of`.
    """
    run = newest_run(root)
    if run is None and (others := list(root.glob("*/checkpoints/*.ckpt"))):
        raise UserError(
            f"{others[0]} is a checkpoint of another trainer.strategy; `python -m nanogpt_lit convert` makes a file"
            f"{SUFFIX} of it, or set another trainer.default_root_dir."
        )
    if run is None:
        return None
    if lock is not None:
        lock.acquire(run)
    found = Resumed(**vars(latest_of(run)))
    if lock is not None:
        sweep(found.path.parent)  # also of a run that turns out to be complete
        sweep_shards(found.path.parent)
    return found


def check_goes_on(settings: Namespace, is_fit: bool, found: bool) -> str | None:
    """Check that there is something left to do after ckpt_path; a sentence where the run has all its steps.

    found: by resume=auto; a checkpoint that the user names may be of another run
    Raises NothingToDo in its place where no other process waits for this one, and UserError for a damaged file.
    """
    checkpoint, max_steps = Path(settings.ckpt_path), settings.trainer.max_steps
    if not writes_run_files(settings.trainer):
        return None
    step = step_of(checkpoint)  # raises where it is none, before anything is built
    if is_fit:
        check_same_optimizer(checkpoint, settings.model.optim)
    if not is_fit or not 0 < max_steps <= step:
        return None
    sentence = (
        f"{checkpoint} holds step {step:,}, and the run is complete with trainer.max_steps={max_steps}. To go on "
        f"with it, raise that: --trainer.max_steps {2 * step} would train as much again."
    )
    if found and launched_processes() == 1:
        raise NothingToDo(sentence)
    return sentence


OF_STATE = ("class_path", "matrices", "state_bits")
"""Settings of the optimizer that decide what it keeps of each weight."""


ADAMW = {None, "torch.optim.AdamW"}
"""Values of class_path that keep the same."""


def check_same_optimizer(checkpoint: Path, wanted: Mapping[str, Any]) -> None:
    """Raises UserError where the checkpoint's optimizer keeps another state. wanted: model.optim"""
    kept = description_in(checkpoint).get("hyper_parameters", {}).get("optim", {})
    for name in OF_STATE:
        if name in kept and kept[name] != wanted[name] and not {kept[name], wanted[name]} <= ADAMW:
            before, now = ("null" if value is None else value for value in (kept[name], wanted[name]))
            raise UserError(
                f"{checkpoint} was trained with model.optim.{name}={before}, and what that kept of each weight is of "
                f"no use to {now}; set it as it was, or begin at step 0 with the weights: --init_from {checkpoint}, "
                "with another trainer.default_root_dir."
            )


# init_from: another model.


POSITIONS = "transformer.wpe.weight"
EMBEDDINGS = tuple(network.EMBEDDING for _, network in NETWORKS.values())
ONES_OWN = ("dropout", "block_size", "document_start", "document_end")
"""Fields that a fine-tuned network need not have in common with the one it begins from."""

SUFFIXES = (".safetensors", ".gguf", ".pt", ".ckpt", ".bin")
"""Endings of files that hold a network; any other may be a name on the hub."""


@dataclass(frozen=True)
class Beginning:
    source: str
    """The path or name, with its revision where it is a model of the hub."""
    what: str
    stored: StoredNetwork
    known: int
    """Tokens that the model has learnt; those behind them are of the run's own."""
    tokenizer: Tokenizer

    @classmethod
    def of(cls, source: str, special_tokens: Sequence[str], chats: bool) -> "Beginning":
        """Reads any model that `convert` reads. Raises UserError as it does.

        chats: whether it is to have conversations, for which a tokenizer without a chat template gets one
        """
        from nanogpt_lit.checkpoint.convert import fetched, read_network  # late: all formats are behind it

        of_hub = re.fullmatch(r"gpt2(-\w+)?|[\w-]+/[\w.-]+", source) and Path(source).suffix not in SUFFIXES
        if of_hub and not Path(source).exists():
            name = f"openai-community/{source}" if "/" not in source else source
            raise UserError(
                f"init_from={source} is no file or folder here; a model of the hub is named as in hf:{name}."
            )
        path, source = fetched(source)
        what, stored = read_network(path)
        tokenizer = tokenizer_from_files(stored.tokenizer_files)
        known = tokenizer.vocab_size
        tokenizer = with_special_tokens(tokenizer, special_tokens)
        if chats:
            from nanogpt_lit.data.conversations import able_to_chat

            tokenizer = able_to_chat(tokenizer)
        return cls(source, what, stored, known, tokenizer)

    def choose(self, settings: Namespace) -> None:
        """Sets the network and the tokenizer in settings of fit. Raises UserError for a block_size it has no positions
        for."""
        try:
            config = config_of(self.stored.hyper_parameters)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"init_from={self.source} holds another network than LitNanoGPT's.") from error
        if settings.data.block_size > config.block_size:
            raise UserError(
                f"data.block_size={settings.data.block_size} is longer than the {config.block_size} positions of "
                f"init_from={self.source}; set data.block_size={config.block_size} or less."
            )
        before, settings.model.network = section_of(settings.model), described(config)["network"]
        shape = settings.model[config.SECTION]
        for name in ONES_OWN:  # which the YAML may have given below the other network
            shape[name] = settings.model[before][name]
        for name, value in asdict(config).items():
            if name not in ONES_OWN:
                shape[name] = value
        assert config.vocab_size is not None
        shape.vocab_size = max(config.vocab_size, self.tokenizer.vocab_size)
        settings.data.tokenizer = option_of(self.tokenizer, Path(settings.trainer.default_root_dir))

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Check the shards' tokenizer. Raises UserError where they were made with another one than the model."""
        if tokenizer.sha256 != self.tokenizer.sha256:
            raise UserError(
                f"init_from={self.source} was trained with another tokenizer than this text has ({tokenizer.name}); a "
                "char tokenizer knows the characters of its own text alone, and ready shards keep theirs."
            )

    def load_into(self, module: nn.Module, block_size: int) -> None:
        """The weights, with the first block_size positions, and with rows for new tokens.

        A new row is the mean of those that were learnt: its logit is the mean of theirs, so that it takes hardly any
        probability from them before it is learnt itself.
        """
        weights = dict(self.stored.weights)
        for name, tensor in weights.items():
            if name.endswith(POSITIONS):
                weights[name] = tensor[:block_size]
            elif name.endswith((HEAD, *EMBEDDINGS)) and self.tokenizer.vocab_size > self.known:
                learnt = tensor[: self.known]
                new = learnt.mean(dim=0, keepdim=True).expand(self.tokenizer.vocab_size - self.known, -1)
                weights[name] = torch.cat([learnt, new, tensor[self.tokenizer.vocab_size :]])
        module.load_state_dict(weights)

    def __str__(self) -> str:
        shape = size(config_of(self.stored.hyper_parameters))
        return f"init: the weights and the tokenizer of {self.source}, {self.what}: {shape}"


def option_of(tokenizer: Tokenizer, folder: Path) -> str:
    """The value of data.tokenizer for it; one of byte pairs is written into the folder, in a file of that name."""
    if tokenizer.kind != "bpe":
        return tokenizer.kind
    files = tokenizer.files()
    path = folder / f"tokenizer_{tokenizer.sha256[:12]}.tiktoken"
    beside = {**json.loads(files[TOKENIZER_JSON]), "chat_template": tokenizer.chat_template}
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):  # every process of a run comes here
        if not path.is_file():
            write_durably(path.with_suffix(".json"), json.dumps(beside, indent=1) + "\n")
            write_durably(path, files[TOKENIZER_RANKS])
    return str(path)
