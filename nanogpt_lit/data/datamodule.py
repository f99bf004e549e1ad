"""Shards to batches, for Lightning's Trainer and for any other loop."""

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from torch.utils.data import DataLoader, Sampler

from nanogpt_lit.data.prepare import PrepareConfig, prepare, stale_reason, summary
from nanogpt_lit.data.sampler import StreamPosition
from nanogpt_lit.data.shards import TokenShards, read_manifest, ready_format
from nanogpt_lit.data.tokenizer import Tokenizer, files_sha256
from nanogpt_lit.data.tokenizer_files import META, characters_of, tokenizer_of_shards
from nanogpt_lit.data.windows import Batch, ConversationWindows, TokenWindows, Turns, Windows
from nanogpt_lit.errors import UserError

SPLITS = ("train", "val")
ORDER_FIELDS = ("seed", "block_size", "batch_size")
"""Fields that the order of samples is a function of, besides the text and the number of processes."""


class TokenDataModule(LightningDataModule):
    """Text to token shards to batches.

    Args:
        source: What to train on: `stdlib` (the source of Python's own standard library), a file or folder of text,
            Markdown, source code, JSON Lines or Parquet, `hf:OWNER/NAME` (a Hugging Face dataset), or a folder of
            ready shards (ours, nanoGPT's train.bin and val.bin, llm.c's).
        tokenizer: `gpt2`, `byte`, `char`, a `.tiktoken` file, or `bpe:N`, which trains a vocabulary of N on the source.
        special_tokens: Words of your own that are one token each wherever the text has them, such as ["<|user|>",
            "<|assistant|>"], behind the tokenizer's vocabulary. A model that is fine-tuned grows by their rows, which
            begin as the mean of all others.
        text_key: The field or column of JSON Lines and Parquet that holds the text.
        val_fraction: Share of the documents kept for validation, above 0 and at most 0.5.
        skip_undecodable: Leave out files that are not valid UTF-8, instead of stopping at the first.
        shards_dir: Folder of the shards; by default `shards` in trainer.default_root_dir.
        block_size: Tokens per sequence.
        batch_size: Sequences per micro-batch.
        seed: Decides the order of samples, and nothing else.
        documents: joined: attention crosses the ends of documents inside a sequence, as GPT-2 was trained. separate:
            each document is read as if it stood alone, its positions beginning at 0. Costs a mask of block_size x
            block_size for each sequence, and on a GPU the kernel of attention that takes no mask. conversations: the
            source is JSON Lines of `messages`, or of `prompt` and `response`; they are written by the model's chat
            template (ChatML where it has none), the answers alone are learned, and a sequence holds several whole
            conversations, separate.
    """

    def __init__(
        self,
        source: str = "stdlib",
        tokenizer: str = "gpt2",
        text_key: str = "text",
        val_fraction: float = 0.01,
        skip_undecodable: bool = False,
        shards_dir: str | None = None,
        block_size: int = 1024,
        batch_size: int = 4,
        seed: int = 1337,
        documents: Literal["joined", "separate", "conversations"] = "joined",
        special_tokens: list[str] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("block_size", block_size), ("batch_size", batch_size)):
            if value < 1:
                raise UserError(f"data.{name}={value} must be at least 1.")
        self.prepare_config = PrepareConfig(
            source,
            tokenizer,
            text_key,
            val_fraction,
            skip_undecodable,
            tuple(special_tokens or ()),
            conversations=documents == "conversations",
        )
        self.shards_dir = Path(shards_dir or "shards")
        self.block_size = block_size
        self.batch_size = batch_size
        self.seed = seed
        self.documents = documents
        self.position: StreamPosition | None = None
        """The place in the stream, set by a loop other than Lightning's Trainer before it asks for a loader."""
        self._windows: dict[str, Windows] = {}

    # Text to shards.

    @property
    def _source_folder(self) -> Path | None:
        """data.source when it holds ready shards."""
        source = Path(self.prepare_config.source).expanduser()
        return source if ready_format(source) else None

    @property
    def folder(self) -> Path:
        """The folder where the shards are, or will be."""
        return self._source_folder or self.shards_dir

    def prepare_data(self) -> None:
        """Make the shards when they are missing or were made from something else, and check them."""
        if self._source_folder is None:
            self._prepare()
        elif (characters := characters_of(self.folder)) is not None and getattr(rank_zero_only, "rank", 0) == 0:
            print(f"data: tokens are the {len(characters.characters)} characters of {self.folder / META}", flush=True)
        self._windows = {split: self._open(split) for split in SPLITS}

    def remarks(self) -> list[str]:
        """Lines about how conversations share windows, once the data is prepared; none for other text."""
        return [f"data: {split}: {remark}" for split, windows in self._windows.items() if (remark := windows.remark())]

    def _prepare(self) -> None:
        reason = stale_reason(self.prepare_config, self.shards_dir)
        if reason is None:
            return
        speaks = getattr(rank_zero_only, "rank", 0) == 0
        if speaks:
            print(f"data: {reason}; preparing", flush=True)
        manifest = prepare(self.prepare_config, self.shards_dir, show_progress=speaks)
        if speaks:
            print(f"data: {summary(manifest, self.shards_dir)}", flush=True)

    def setup(self, stage: str | None = None) -> None:
        self._windows = {split: self._open(split) for split in SPLITS}
        if self.trainer is not None:
            self._check_trainer(self.trainer, fits=stage == "fit")

    def _check_trainer(self, trainer: Trainer, fits: bool) -> None:
        """Raises UserError for a Trainer that would not end, or for a network that lacks tokens."""
        network = getattr(trainer.lightning_module, "gpt", None)
        if network is not None:
            self.check_vocabulary(network.config.vocab_size, network.config.key("vocab_size"))
        if not fits:
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if trainer.max_steps == -1 and not any(isinstance(callback, Timer) for callback in callbacks):
            raise UserError("Trainer has no max_steps, and the order of samples is endless; give it max_steps=1000.")
        if (decay_over := getattr(trainer.lightning_module, "decay_over", None)) and trainer.max_steps != -1:
            decay_over(trainer.max_steps)
        if trainer.check_val_every_n_epoch is not None and trainer.limit_val_batches:
            rank_zero_warn(
                f"Trainer(check_val_every_n_epoch={trainer.check_val_every_n_epoch}) validates when an epoch ends, and "
                "there is none: nothing is validated. Give it check_val_every_n_epoch=None and val_check_interval=1000."
            )

    def _open(self, split: str) -> Windows:
        shards = TokenShards.open(self.folder, split)
        # Foreign shards are scanned for their largest id; the result stays with us, their folder may be read-only.
        shards.check_vocabulary(self.vocab_size, cache=self.shards_dir / "largest_ids.json")
        turns = self._manifest.get("splits", {}).get(split, {}).get("turns")
        if (turns is not None) != self.prepare_config.conversations:
            raise UserError(
                f"data.documents={self.documents} does not go with data.source={self.folder}, which holds "
                f"{'conversations' if turns else 'no conversations'}; name their JSON Lines themselves as data.source "
                "for other shards."
            )
        if turns is None:
            return TokenWindows(shards, self.block_size, split)
        document_end = self.document_end
        assert document_end is not None
        return ConversationWindows(
            shards, Turns(self.folder / turns["file"], len(shards)), self.block_size, document_end
        )

    @property
    def _manifest(self) -> dict[str, Any]:
        """The manifest of our shards; empty for those of others."""
        return read_manifest(self.folder) if ready_format(self.folder) == "ours" else {}

    # The vocabulary.

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that the shards were made with, once they are there."""
        tokenizer = tokenizer_of_shards(self.folder, self.prepare_config.tokenizer)
        known = getattr(tokenizer, "specials", {})
        if missing := [text for text in self.prepare_config.special_tokens if text not in known]:
            raise UserError(
                f"data.special_tokens has {missing[0]!r}, and data.source={self.folder} holds tokens that were made "
                "without it; name the text itself."
            )
        return tokenizer

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def text(self) -> str:
        """The identity of the text of the shards: 16 hexadecimal digits."""
        if ready_format(self.folder) == "ours":
            splits = read_manifest(self.folder)["splits"]
            parts = [shard.get("sha256") for split in SPLITS for shard in splits[split]["shards"]]
            parts += [splits[split]["turns"].get("sha256") for split in SPLITS if "turns" in splits[split]]
        else:  # whose contents would have to be read for it
            files = [file for split in SPLITS for file in TokenShards.open(self.folder, split).files]
            parts = [f"{file.path.name} {file.n_tokens}" for file in files]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    @property
    def document_start(self) -> int | None:
        """The model's gpt.document_start: what tells documents apart where they are separate."""
        return self.tokenizer.eot if self.documents == "separate" else None

    @property
    def document_end(self) -> int | None:
        """The model's gpt.document_end: the id that stands between conversations, and in none of them."""
        return self._manifest.get("document_end") if self.documents == "conversations" else None

    def check_vocabulary(self, model_vocab_size: int, key: str) -> None:
        """Raises UserError, naming the key of the network's size, when the data has ids that the model lacks."""
        if model_vocab_size < self.vocab_size:
            raise UserError(
                f"{key}={model_vocab_size} is smaller than the {self.vocab_size} of the tokenizer "
                f"{self.tokenizer.name}; {self.vocab_size} or more works, or leave it out."
            )

    # Shards to batches.

    def _current_position(self) -> StreamPosition:
        if self.position is not None:
            return self.position
        if self.trainer is None:
            return StreamPosition()
        trainer = self.trainer

        def batches_done() -> int:
            # `processed`, of the Trainer's counts, is right also in a checkpoint that was saved inside a batch: `ready`
            # counts the batch that was interrupted, `completed` lacks the one whose on_train_batch_end saves.
            return trainer.fit_loop.epoch_loop.batch_progress.total.processed  # type: ignore[attr-defined]

        return StreamPosition(trainer.global_rank, trainer.world_size, batches_done)

    def train_dataloader(self) -> DataLoader[Batch]:
        """Endless: trainer.max_steps ends a run."""
        windows = self._windows["train"]
        return self._loader(windows, windows.training_order(self.batch_size, self.seed, self._current_position()))

    @property
    def n_windows(self) -> int:
        """Sequences of one reading of the training text, once the data is prepared."""
        return self._windows["train"].n_windows

    def val_dataloader(self, limit: int | None = None) -> DataLoader[Batch]:
        """Every window of the validation split once, or as many as `limit` batches have.

        limit: batches of all processes together, so that a validation means the same on any number of them; under a
            Trainer its limit_val_batches, where that is a number
        """
        if limit is None and self.trainer is not None:
            limit = batch_count(self.trainer.limit_val_batches)
        windows, position = self._windows["val"], self._current_position()
        return self._loader(windows, windows.validation_order(self.batch_size, position.rank, position.world, limit))

    def test_dataloader(self) -> DataLoader[Batch]:
        """The validation split: there is no third one, and none is held back from the user."""
        return self.val_dataloader(None if self.trainer is None else batch_count(self.trainer.limit_test_batches))

    def _loader(self, windows: Windows, order: Sampler[list[int]]) -> DataLoader[Batch]:
        # Read in this process: a batch is a copy out of a memory map, about 0.1 ms, which processes that read ahead
        # would only slow down.
        return DataLoader(
            windows,
            batch_sampler=order,
            collate_fn=tuple,  # which leaves a batch as it is: they come stacked
            pin_memory=torch.cuda.is_available(),
            # Every iterator of a DataLoader draws a number. From a generator of its own, or dropout would depend on
            # how often a loop starts one.
            generator=torch.Generator().manual_seed(self.seed),
        )

    # What a checkpoint keeps.

    def state_dict(self) -> dict[str, Any]:
        """The tokenizer, and what the order of samples follows from; a resumed loop brings its own count of batches."""
        return {
            "tokenizer": self.tokenizer.files(),
            "text": self.text,
            "batches": self._current_position().batches_done(),
            **{name: getattr(self, name) for name in ORDER_FIELDS},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises UserError for a checkpoint whose token ids mean something else."""
        if files_sha256(state_dict["tokenizer"]) != self.tokenizer.sha256:
            raise UserError(
                f"the checkpoint was trained with another tokenizer than {self.tokenizer.name} in {self.folder}; "
                "use the data.source and data.tokenizer it was trained with."
            )
        fitting = self.trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if fitting and state_dict.get("text", self.text) != self.text and getattr(rank_zero_only, "rank", 0) == 0:
            print(
                "data: this text is another than the checkpoint's. ckpt_path goes on with the run: its step, its "
                "schedule, its optimizer; its best is counted anew, on this text. To fine-tune the weights alone, with "
                "a step 0, a schedule and a best of their own, name the checkpoint by init_from.",
                flush=True,
            )
        if fitting and self.trainer is not None:
            self._warn_of_dropout(self.trainer)
        for name in ORDER_FIELDS if fitting else ():
            here = getattr(self, name)
            saved = state_dict.get(name, here)  # a run that began elsewhere had no such order
            if saved != here:
                rank_zero_warn(
                    f"data.{name} was {saved} and is {here}: the run goes on in another order of samples, which may "
                    "repeat or leave out some of this epoch."
                )

    @staticmethod
    def _warn_of_dropout(trainer: Trainer) -> None:
        """Lightning itself keeps no random state."""
        network = getattr(trainer.lightning_module, "gpt", None)
        dropout = getattr(getattr(network, "config", None), "dropout", 0.0)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        keeps_random_state = any(type(callback).__module__.startswith("nanogpt_lit.") for callback in callbacks)
        if dropout > 0 and not keeps_random_state:
            rank_zero_warn(
                f"this Trainer resumes with other masks of dropout={dropout} than an undisturbed run draws; "
                "Trainer(**trainer_options(...)) resumes to the bit."
            )


def batch_count(limit: int | float | None) -> int | None:
    """A Trainer's limit where it is a number of batches; None where it is a share, which it takes of each process's,
    or takes none."""
    return limit if isinstance(limit, int) and limit > 0 else None
