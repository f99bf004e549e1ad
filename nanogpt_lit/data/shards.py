"""Token shards: a split of the data as one long stream of tokens over several memory-mapped files.

A folder of shards is one of
- ours: files of `shard_file`'s format listed in `manifest.json`, which says what they were made from;
- nanoGPT's: `train.bin` and `val.bin`, bare uint16;
- llm.c's: files with its header, named `*train*.bin` and `*val*.bin`, read in the order of their names.
"""

import json
import os
import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from mmap import mmap
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

from nanogpt_lit.data.shard_file import ShardFile, is_llmc
from nanogpt_lit.data.tokenizer import Tokenizer
from nanogpt_lit.errors import UserError
from nanogpt_lit.untrusted.config_values import file_inside

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

MOST_TOKENS = 1 << 22
"""Tokens that are read of shards whose bytes of text are not known: enough for a ratio."""

# Mapped pages count as this process's memory until they are unmapped, and each window brings up to 64 KB of
# neighbours with it (the kernel's fault-around). Mapping anew after so many windows bounds that at 64 MB for ever.
WINDOWS_PER_MAPPING = 1024


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of our shards, checked as far as readers rely on it. Raises UserError."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); prepare the data again.") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); prepare the data again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise UserError(f'{path} is no manifest of ours ("format": {MANIFEST_FORMAT}); prepare the data again.')
    try:
        _check_manifest(manifest, folder)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} lacks or garbles {error}; prepare the data again.") from error
    return manifest


def _check_manifest(manifest: dict[str, Any], folder: Path) -> None:
    for part in ("request", "tokenizer"):
        if not isinstance(manifest.get(part, {}), dict):
            raise TypeError(f"{part}={manifest[part]!r}")
    for split in manifest["splits"].values():
        tokens = [shard["tokens"] for shard in split["shards"]]
        for count in (split["tokens"], *tokens):
            if type(count) is not int or count < 0:
                raise TypeError(f"tokens={count!r}")
        if split["tokens"] != sum(tokens):
            raise TypeError(f"tokens={split['tokens']}, whose shards have {sum(tokens)}")
        for part in (*split["shards"], *([split["turns"]] if "turns" in split else [])):
            file_inside(folder, part["file"], MANIFEST)
        end = manifest.get("document_end")
        if "turns" in split and (type(end) is not int or not 0 <= end < manifest["tokenizer"]["vocab_size"]):
            raise TypeError(f"document_end={end!r}")


def ready_format(folder: Path) -> Literal["ours", "nanogpt", "llm.c"] | None:
    """The kind of ready shards in a folder; None when it holds none, so that it may be a source of text."""
    if (folder / MANIFEST).is_file():
        return "ours"
    train = sorted(folder.glob("*train*.bin"))
    if not train:
        return None
    with train[0].open("rb") as file:
        if is_llmc(file.read(12)):
            return "llm.c"
    if (folder / "train.bin").is_file():
        return "nanogpt"
    # Named like a pair of llm.c's: to be opened, and refused with its reason, rather than passed over.
    return "llm.c" if any(folder.glob("*val*.bin")) else None


class TokenShards:
    """A split as one stream of tokens. Opening reads the headers alone; files are mapped when first touched."""

    def __init__(self, files: Sequence[ShardFile]) -> None:
        self.files = list(files)
        # Where each file starts in the stream, and after the last one where the stream ends.
        self.starts = [0, *accumulate(file.n_tokens for file in files)]
        sizes = {file.vocab_size for file in files}
        if len(sizes) > 1:
            raise UserError(f"{files[0].path.parent} mixes shards of vocabularies {sizes}; prepare the data again.")
        self.vocab_size = sizes.pop() if sizes else None
        # Ids at or above it never leave `read`. Foreign files do not name theirs: check_vocabulary sets it.
        self.vocab_limit = self.vocab_size
        self._maps: dict[int, tuple[np.ndarray, mmap]] = {}
        self._windows_mapped = 0

    @classmethod
    def open(cls, folder: Path, split: str) -> Self:
        """The split `train` or `val` of a folder in any of the three formats.

        Takes time by the number of files, not by their size. Raises UserError naming the file that is wrong.
        """
        kind = ready_format(folder)
        if kind is None:
            raise UserError(f"{folder} holds no token shards: no {MANIFEST}, no train.bin, no *train*.bin.")
        if kind == "ours":
            return cls._ours(folder, split)
        if kind == "nanogpt":
            paths = [folder / f"{split}.bin"]
        else:
            paths = sorted(folder.glob(f"*{split}*.bin"))
            if not paths:
                raise UserError(f"{folder} holds no file named *{split}*.bin.")
        return cls([ShardFile.open(path, headerless=kind == "nanogpt") for path in paths])

    @classmethod
    def _ours(cls, folder: Path, split: str) -> Self:
        shards = read_manifest(folder)["splits"].get(split, {}).get("shards", [])
        if not shards:
            raise UserError(f"{folder / MANIFEST} lists no shards of the split {split!r}; prepare the data again.")
        files = [ShardFile.open(file_inside(folder, shard["file"], MANIFEST)) for shard in shards]
        for file, shard in zip(files, shards, strict=True):
            if file.n_tokens != shard["tokens"]:
                raise UserError(
                    f"{file.path} holds {file.n_tokens:,} tokens, {MANIFEST} says {shard['tokens']:,}: "
                    "it belongs to another preparation; prepare the data again."
                )
        return cls(files)

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, length: int) -> np.ndarray:
        """Tokens start .. start+length of the stream, int64 (length,), across files where need be."""
        return self.read_windows([start], length)[0]

    def read_windows(self, starts: Sequence[int], length: int) -> np.ndarray:
        """One window per start, int64 (len(starts), length).

        Raises IndexError beyond the stream, UserError for an id outside the vocabulary: a file that changed
        underneath is reported here rather than as an illegal access on the GPU.
        """
        self._windows_mapped += len(starts)
        if self._windows_mapped > WINDOWS_PER_MAPPING:
            self._maps.clear()
            self._windows_mapped = len(starts)
        windows = np.empty((len(starts), length), dtype=np.int64)
        for window, start in zip(windows, starts, strict=True):
            self._read_into(window, start)
        if self.vocab_limit is not None and windows.size and windows.max() >= self.vocab_limit:
            row, column = divmod(int(windows.argmax()), length)
            k, position = self._locate(starts[row] + column)
            raise UserError(
                f"{self.files[k].path} holds token id {windows[row, column]} at position {position:,}, beyond the "
                f"vocabulary of {self.vocab_limit}: the file is damaged or has changed; write the shards again."
            )
        return windows

    def _read_into(self, window: np.ndarray, start: int) -> None:
        if start < 0 or start + len(window) > self.starts[-1]:
            raise IndexError(f"tokens {start}..{start + len(window)} of a stream of {len(self)}")
        k, position = self._locate(start)
        filled = 0
        while filled < len(window):
            if k not in self._maps:
                self._maps[k] = self.files[k].map()
            tokens, mapping = self._maps[k]
            if mapping.size() != len(mapping):  # cut in place while it is read: a page that is gone ends the process
                self.files[k].check_size(mapping.size())
            piece = tokens[position : position + len(window) - filled]
            window[filled : filled + len(piece)] = piece
            filled, k, position = filled + len(piece), k + 1, 0

    def _locate(self, position: int) -> tuple[int, int]:
        """(file, position in it) of a position in the stream."""
        k = bisect_right(self.starts, position) - 1
        return k, position - self.starts[k]

    def check_vocabulary(self, vocab_size: int, cache: Path | None = None) -> None:
        """Raises UserError unless every token id is below `vocab_size`, the tokenizer's.

        Ours say it in the header. Foreign files are scanned once, in one pass; `cache` (a JSON file) keeps each
        one's largest id for as long as its name, size and time of change stay.
        """
        for file, needed in zip(self.files, self._vocabularies(cache), strict=True):
            if needed > vocab_size:
                raise UserError(
                    f"{file.path} needs a vocabulary of {needed}, its tokenizer has {vocab_size}; set data.tokenizer "
                    "to the one these tokens were made with."
                )
        if self.vocab_size is None:
            self.vocab_limit = vocab_size

    def _vocabularies(self, cache: Path | None) -> list[int]:
        """The smallest vocabulary that holds the ids of each file."""
        if self.vocab_size is not None:
            return [self.vocab_size] * len(self.files)
        known = _read_cache(cache)
        keys = []
        for file in self.files:
            stat = file.path.stat()
            keys.append(f"{file.path.name} {stat.st_size} {stat.st_mtime_ns}")
            if keys[-1] not in known:
                known[keys[-1]] = file.largest_token()
        if cache is not None:
            cache.parent.mkdir(parents=True, exist_ok=True)
            unfinished = cache.with_name(f".{cache.name}.{os.getpid()}.tmp")
            unfinished.write_text(json.dumps(known, indent=1), encoding="utf-8")
            unfinished.replace(cache)
        return [known[key] + 1 for key in keys]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}  # another process maps the files itself; mappings do not travel


def _read_cache(cache: Path | None) -> dict[str, int]:
    """The results of earlier scans; none when the cache is missing or damaged, for it can be made again."""
    try:
        known = json.loads(cache.read_text(encoding="utf-8")) if cache else {}
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in known.items() if isinstance(v, int)} if isinstance(known, dict) else {}


def val_tokens_per_byte(folder: Path, tokenizer: Tokenizer) -> float | None:
    """Tokens for each byte of UTF-8 in the validation part of a folder of shards, without end-of-text.

    It turns a loss per token into bits per byte of text, which can be compared between tokenizers.
    None where the tokens stand for no text, and for conversations, whose loss is that of answers alone.
    """
    if ready_format(folder) == "ours":
        val = read_manifest(folder)["splits"]["val"]
        counts = [val.get(name) for name in ("tokens", "documents", "bytes")]
        if "turns" in val or not all(type(count) is int for count in counts):
            return None
        tokens, text_bytes = counts[0] - counts[1], counts[2]
    else:
        shards = TokenShards.open(folder, "val")
        ids = shards.read(0, min(len(shards), MOST_TOKENS))
        lengths = tokenizer.byte_lengths()
        ids = ids[(ids != tokenizer.eot) & (ids < len(lengths))]
        tokens, text_bytes = len(ids), int(np.sum(lengths[ids]))
    return tokens / text_bytes if tokens > 0 and text_bytes > 0 else None


def first_words(folder: Path, tokenizer: Tokenizer, most_characters: int = 24) -> str:
    """The beginning of the validation part of a folder of shards: whole words of its first document."""
    shards = TokenShards.open(folder, "val")
    ids = shards.read(0, min(len(shards), 8 * most_characters))
    begins = int(ids[0] == tokenizer.eot)
    ends = next(iter(np.flatnonzero(ids[begins:] == tokenizer.eot)), len(ids)) + begins
    text = tokenizer.decode_bytes(ids[begins:ends]).decode("utf-8", errors="ignore").strip()
    if len(text) <= most_characters:
        return text
    *words, _ = re.split(r"(?<=\s)", text[: most_characters + 1])  # the last one is cut
    return "".join(words).rstrip() or text[:most_characters]
