"""Text to a folder of token shards, once, and never half.

The folder holds `train_000000.bin` ..., `val_000000.bin` ..., the tokenizer's files and `manifest.json`, which says
what they were made from. It is written as FOLDER.partial and renamed when complete.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from nanogpt_lit.data.bpe import train_ranks
from nanogpt_lit.data.encoder import Split, TokenBatch, check_val_fraction, encode_documents
from nanogpt_lit.data.shard_writer import ShardSeries, check_replaceable, discard, has_leftovers, old_folder, recover
from nanogpt_lit.data.shards import MANIFEST, MANIFEST_FORMAT, TokenShards, read_manifest
from nanogpt_lit.data.sources import FilesSource, Source, open_source
from nanogpt_lit.data.tokenizer import (
    EOT,
    GPT2_PATTERN,
    BytePairTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    gpt2_tokenizer,
)
from nanogpt_lit.data.tokenizer_files import (
    check_special_tokens,
    parse_tokenizer,
    read_tokenizer_files,
    tokenizer_from_file,
    with_special_tokens,
)
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.durable import check_writable, durable_folder

SAMPLE_CHARS = 1 << 20  # text that is encoded to see how large the shards will be
ROOM_MARGIN = 1.2  # the rest of the text may be denser, and every document has its end-of-text
TRAINING_BYTES = 1 << 26  # text that a bpe:N vocabulary is trained on; takes about 10 bytes of memory each


@dataclass(frozen=True)
class PrepareConfig:
    """Settings that decide the content of the shards; the fields are those of the YAML's `data` section."""

    source: str = "stdlib"
    tokenizer: str = "gpt2"
    text_key: str = "text"
    val_fraction: float = 0.01
    skip_undecodable: bool = False
    special_tokens: tuple[str, ...] = ()
    conversations: bool = False
    """data.documents=conversations"""

    def __post_init__(self) -> None:
        if parse_tokenizer(self.tokenizer)[0] == "char" and self.conversations:
            raise UserError(
                "data.documents=conversations needs special tokens between the messages, which data.tokenizer=char "
                "cannot have; byte works for any text."
            )
        check_special_tokens(self.special_tokens, self.tokenizer)
        check_val_fraction(self.val_fraction)

    def open_source(self) -> Source:
        return open_source(self.source, self.text_key, self.skip_undecodable, self.conversations)

    def request(self, source: Source) -> dict[str, Any]:
        """The request as the manifest keeps it: the same one makes the same shards."""
        kind, argument = parse_tokenizer(self.tokenizer)
        return {
            "source": source.fingerprint(),
            "tokenizer": tokenizer_from_file(Path(argument)).sha256 if kind == "file" else self.tokenizer,
            "text_key": self.text_key,
            "val_fraction": self.val_fraction,
            "skip_undecodable": self.skip_undecodable,
            "special_tokens": list(self.special_tokens) or None,
            "conversations": self.conversations or None,
        }


def stale_reason(config: PrepareConfig, folder: Path) -> str | None:
    """The reason to prepare the folder (again), or None when it is current. Reads no text.

    Raises UserError when the source is not there.
    """
    return _stale_reason(config.request(config.open_source()), Path(folder))


def _stale_reason(request: dict[str, Any], folder: Path) -> str | None:
    if not (folder / MANIFEST).is_file():
        return f"{folder} holds no prepared shards"
    try:
        manifest = read_manifest(folder)
        for key, wanted in request.items():
            found = manifest["request"].get(key)
            if found != wanted:
                return f"{folder} was prepared with another {key}: {found}, now {wanted}"
        for side in ("train", "val"):
            n_tokens = len(TokenShards.open(folder, side))
            if (turns := manifest["splits"][side].get("turns")) is not None:
                from nanogpt_lit.data.windows import Turns  # few shards are of conversations

                Turns(folder / turns["file"], n_tokens)
        read_tokenizer_files(folder, manifest)
    except (KeyError, TypeError, AttributeError) as error:
        return f"{folder / MANIFEST} lacks or garbles {error}"
    except UserError as error:
        return str(error)
    return None


def prepare(config: PrepareConfig, folder: Path, *, show_progress: bool = True) -> dict[str, Any]:
    """Make the folder hold the shards of this request, and return its manifest; nothing to do when it does already.

    Safe against interruption at any moment and against other processes doing the same: one works, the others wait.
    Raises UserError for anything that is wrong with the source, the tokenizer, the folder or the disk.
    """
    folder = Path(os.path.realpath(folder))  # Path.resolve raises for links that lead to each other
    source = config.open_source()
    request = config.request(source)
    if _stale_reason(request, folder) is None and not has_leftovers(folder):
        return read_manifest(folder)
    check_writable("data.shards_dir", folder)
    if isinstance(source, FilesSource) and folder.is_relative_to(source.root.resolve()):
        raise UserError(f"data.shards_dir={folder} lies inside data.source={config.source}; shards are not text.")
    split = Split.plan(source, config.val_fraction, by_document=config.conversations)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, show_progress):
            recover(folder)
            if _stale_reason(request, folder) is not None:
                check_replaceable(folder)
                _prepare(config, source, request, split, folder, show_progress)
            return read_manifest(folder)
    except OSError as error:  # those of reading the source are UserErrors already
        raise UserError(f"data.shards_dir={folder} cannot be written ({error.strerror or error}).") from error


def summary(manifest: dict[str, Any], folder: Path) -> str:
    """One line about prepared shards."""
    splits = manifest["splits"]
    documents = sum(split["documents"] for split in splits.values())
    skipped = f", {manifest['skipped']:,} skipped as undecodable" if manifest["skipped"] else ""
    return (
        f"{splits['train']['tokens']:,} tokens to train on and {splits['val']['tokens']:,} to validate on "
        f"({manifest['tokenizer']['name']}, {documents:,} documents{skipped}) in {folder}"
    )


@contextmanager
def _alone(folder: Path, show_progress: bool) -> Iterator[None]:
    """Hold the folder's lock, which the system takes back when a process dies."""
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        if show_progress:
            tqdm.write(f"another process prepares {folder}; waiting for it", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _prepare(
    config: PrepareConfig, source: Source, request: dict[str, Any], split: Split, folder: Path, show_progress: bool
) -> None:
    tokenizer = make_tokenizer(config, source, split, show_progress)
    check_room(folder, source, tokenizer)
    with durable_folder(folder, keep_as=old_folder(folder)) as partial:
        is_used = np.zeros(tokenizer.vocab_size, dtype=bool)
        batches = encode(config, source, split, tokenizer)
        splits = _write_shards(source, batches, is_used, partial, show_progress)
        manifest: dict[str, Any] = {
            "format": MANIFEST_FORMAT,
            "source": config.source,
            "request": request,
            "tokenizer": {"name": tokenizer.name, "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256},
            "dtype": tokenizer.dtype.name,
            "skipped": len(source.skipped),
            "splits": splits,
        }
        if config.conversations:
            from nanogpt_lit.data.conversations import unused_id

            manifest["document_end"] = unused_id(is_used, tokenizer.eot)
        for name, text in (*tokenizer.files().items(), (MANIFEST, json.dumps(manifest, indent=1) + "\n")):
            (partial / name).write_bytes(text.encode())  # no translation of line ends
    discard(old_folder(folder))


def make_tokenizer(config: PrepareConfig, source: Source, split: Split, show_progress: bool = False) -> Tokenizer:
    """The tokenizer of the request; `char` and `bpe:N` read the source for it."""
    tokenizer = with_special_tokens(_make_tokenizer(config, source, split, show_progress), config.special_tokens)
    if not config.conversations:
        return tokenizer
    from nanogpt_lit.data.conversations import able_to_chat

    return able_to_chat(tokenizer)


def _make_tokenizer(config: PrepareConfig, source: Source, split: Split, show_progress: bool) -> Tokenizer:
    match parse_tokenizer(config.tokenizer):
        case "byte", _:
            return ByteTokenizer()
        case "gpt2", _:
            return gpt2_tokenizer()
        case "char", _:
            # Of train and val: nanoGPT does the same, and a character unknown in val could not be encoded at all.
            return CharTokenizer.of(piece for document in source.documents() for piece in document.pieces())
        case "bpe", size:
            texts, quiet = training_text(source, split), None if show_progress else True
            with tqdm(texts, unit=" texts", desc=f"learn {config.tokenizer}", disable=quiet) as read:
                ranks = train_ranks(read, int(size) - 1)  # one id for end-of-text
            return BytePairTokenizer(config.tokenizer, ranks, GPT2_PATTERN, {EOT: len(ranks)})
        case _, path:
            return tokenizer_from_file(Path(path))


def training_text(source: Source, split: Split, budget: int = TRAINING_BYTES) -> Iterator[str]:
    """About `budget` bytes of the train side, spread evenly over the source; its beginning when its size is unknown."""
    share = min(1.0, budget / max(1, source.text_bytes() or 1))
    due, taken = 0.0, 0
    for document in source.documents():
        for side, pieces in split.parts(document):
            if side == "val":
                continue
            for piece in pieces:
                due += len(piece) * share
                if taken < due:
                    taken += len(piece)
                    yield piece
                if taken >= budget:
                    return


def check_room(folder: Path, source: Source, tokenizer: Tokenizer) -> None:
    """Raises UserError when the shards will hardly fit on the disk."""
    text_bytes = source.text_bytes()
    free = shutil.disk_usage(folder.parent).free
    if text_bytes is None or text_bytes * tokenizer.dtype.itemsize * ROOM_MARGIN < free:
        return  # no text has more tokens than bytes
    needed = int(text_bytes * tokens_per_byte(source, tokenizer) * tokenizer.dtype.itemsize * ROOM_MARGIN)
    if needed > free:
        raise UserError(
            f"data.shards_dir={folder} needs about {needed / 1e9:,.1f} GB for the shards, the disk has "
            f"{free / 1e9:,.1f} GB free; make room, or name a folder on another disk."
        )


def tokens_per_byte(source: Source, tokenizer: Tokenizer) -> float:
    """The mean over the first megabyte or so of the text."""
    sample = ""
    for piece in (piece for document in source.documents() for piece in document.pieces()):
        sample += piece
        if len(sample) >= SAMPLE_CHARS:
            break
    return len(tokenizer.encode(sample)) / len(sample.encode())


def encode(config: PrepareConfig, source: Source, split: Split, tokenizer: Tokenizer) -> Iterator[TokenBatch]:
    """The tokens of a source, by side."""
    if not config.conversations:
        return encode_documents(source.documents(), split, tokenizer)
    from nanogpt_lit.data.conversations import Chat, encode_conversations

    return encode_conversations(source.documents(), split, Chat(tokenizer))


def _write_shards(
    source: Source, batches: Iterator[TokenBatch], is_used: np.ndarray, folder: Path, show_progress: bool
) -> dict[str, dict[str, Any]]:
    """The manifest's `splits`. The bar is silent where nobody watches (stderr is no terminal).

    is_used: of each id of the vocabulary; set here for the ids of conversations
    """
    text_bytes, text_done = source.text_bytes(), 0
    with (
        tqdm(unit="tok", unit_scale=True, desc="prepare", disable=None if show_progress else True) as bar,
        ShardSeries(folder, "train", len(is_used)) as train,
        ShardSeries(folder, "val", len(is_used)) as val,
    ):
        for batch in batches:
            if batch.turns is not None:
                is_used[batch.tokens] = True
            (train if batch.side == "train" else val).write(batch)
            text_done += batch.text_bytes
            if text_bytes:  # what there is, at the tokens per byte so far: gives the time of arrival
                bar.total = max(bar.n, int((bar.n + len(batch.tokens)) * max(1.0, text_bytes / max(1, text_done))))
            bar.update(len(batch.tokens))
        bar.total = bar.n
        return {"train": train.close(), "val": val.close()}
