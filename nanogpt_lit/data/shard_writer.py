"""A folder of shards is written: each split in files of SHARD_TOKENS, and the folder appears whole or not at all.

FOLDER.partial is being written; FOLDER.old is the previous one between the two renames that put the new one in place
(runtime/durable.py), and what a process that was killed there left behind.
"""

import hashlib
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from nanogpt_lit.data.encoder import Side, TokenBatch
from nanogpt_lit.data.shard_file import HEADER, HEADER_BYTES, MAGIC, VERSION, token_dtype
from nanogpt_lit.data.shards import MANIFEST
from nanogpt_lit.data.tokenizer import TOKENIZER_FILES
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.durable import partial_of

SHARD_TOKENS = 100_000_000
NAMES = {MANIFEST, *TOKENIZER_FILES}
SHARD_NAME = re.compile(r"(train|val)_(\d+\.bin|turns\.npy)")


class ShardWriter:
    """Write one shard. Until `close` it has no header, so that an unfinished file is never taken for a shard."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self.path = path
        self.vocab_size = vocab_size
        self.dtype = token_dtype(vocab_size)
        self.n_tokens = 0
        self._sha256 = hashlib.sha256()
        self.file = path.open("wb")
        self.file.write(bytes(HEADER_BYTES))

    @property
    def sha256(self) -> str:
        """The digest of the token bytes written so far, without the header."""
        return self._sha256.hexdigest()

    def write(self, tokens: np.ndarray) -> None:
        """Append tokens (any integer dtype). Raises UserError for an id outside [0, vocab_size), writing nothing."""
        if tokens.size == 0:
            return
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise UserError(f"token id {wrong} is outside the vocabulary of {self.vocab_size} ({self.path.name}).")
        chunk = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")
        self.file.write(chunk)
        self._sha256.update(chunk)
        self.n_tokens += tokens.size

    def close(self) -> None:
        """Complete the shard. Its folder is brought to the disk as a whole."""
        self.file.seek(0)
        self.file.write(HEADER.pack(MAGIC, VERSION, self.dtype.itemsize, self.n_tokens, self.vocab_size))
        self.file.close()


class ShardSeries:
    """The shards of one side, each of SHARD_TOKENS but for the last."""

    def __init__(self, folder: Path, side: Side, vocab_size: int) -> None:
        self.folder, self.side, self.vocab_size = folder, side, vocab_size
        self.tokens = self.documents = self.text_bytes = 0
        self.shards: list[dict[str, Any]] = []
        self._turns: list[np.ndarray] = []
        self._writer: ShardWriter | None = None

    def write(self, batch: TokenBatch) -> None:
        tokens = batch.tokens
        while len(tokens):
            if self._writer is None:
                self._writer = ShardWriter(self.folder / f"{self.side}_{len(self.shards):06}.bin", self.vocab_size)
            room = SHARD_TOKENS - self._writer.n_tokens
            self._writer.write(tokens[:room])
            tokens = tokens[room:]
            if self._writer.n_tokens == SHARD_TOKENS:
                self._finish(self._writer)
        self.tokens += len(batch.tokens)
        self.documents += batch.documents
        self.text_bytes += batch.text_bytes
        if batch.turns is not None:
            self._turns.append(batch.turns)

    def _finish(self, writer: ShardWriter) -> None:
        writer.close()
        self.shards.append({"file": writer.path.name, "tokens": writer.n_tokens, "sha256": writer.sha256})
        self._writer = None

    def close(self) -> dict[str, Any]:
        """The entry of the series in the manifest. Raises UserError when nothing was written."""
        if self._writer is not None:
            self._finish(self._writer)
        if not self.shards:
            raise UserError(f"data.source holds too little text: nothing is left for {self.side}.")
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "bytes": self.text_bytes,
            "shards": self.shards,
            **({"turns": self._write_turns()} if self._turns else {}),
        }

    def _write_turns(self) -> dict[str, str]:
        path = self.folder / f"{self.side}_turns.npy"
        np.save(path, np.concatenate(self._turns))
        return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let go of a file that an error left open: Windows would not delete it."""
        if self._writer is not None:
            with suppress(OSError):  # of a full disk, which has been reported
                self._writer.file.close()


def old_folder(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")


def has_leftovers(folder: Path) -> bool:
    """True where a process was killed while it wrote this folder, or is writing it."""
    return old_folder(folder).exists() or partial_of(folder).exists()


def recover(folder: Path) -> None:
    """Undo what a killed process left: the previous folder comes back, half-written ones go."""
    old = old_folder(folder)
    if old.exists():
        if folder.exists():
            discard(old)
        else:
            old.replace(folder)
    discard(partial_of(folder))


def check_replaceable(folder: Path) -> None:
    """Raises UserError unless the folder is missing, empty, or holds our files and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"data.shards_dir={folder} is a file; name a folder.")
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if name not in NAMES and not SHARD_NAME.fullmatch(name)]
    if names and (foreign or MANIFEST not in names):
        raise UserError(
            f"data.shards_dir={folder} holds files that this program did not write ({(foreign or names)[0]}); "
            "name another folder, or empty this one."
        )


def discard(folder: Path) -> None:
    if folder.exists():
        # Without its manifest first: a deletion cut short must not leave something that looks finished.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
