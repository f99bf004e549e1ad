"""One file of tokens on disk: our format, and the two foreign ones that are read too.

Ours is a header of 1024 bytes, all little-endian, then the tokens, little-endian, nothing after them:

| offset | size | field           | value                                                  |
|-------:|-----:|-----------------|--------------------------------------------------------|
|      0 |    8 | magic           | ``NGLSHARD``                                           |
|      8 |    4 | version         | 1                                                      |
|     12 |    4 | bytes per token | 2 when vocabulary size <= 65536, else 4                |
|     16 |    8 | token count     | so that a truncated copy is noticed before it is used  |
|     24 |    4 | vocabulary size | every id in the file is below it                       |
|     28 |  996 | zeros           | 1024 keeps the tokens aligned, and is llm.c's size too |

llm.c: 256 int32 (magic, version, token count), then uint16 (GPT-2) or uint32 (Llama 3); dev/data/data_common.py in
github.com/karpathy/llm.c. nanoGPT: bare uint16 tokens, no header at all (data/*/prepare.py there).
"""

import codecs
import struct
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Self

import numpy as np

from nanogpt_lit.errors import UserError

MAGIC = b"NGLSHARD"
VERSION = 1
HEADER = struct.Struct("<8sIIQI")
HEADER_BYTES = 1024

LLMC_HEADER = struct.Struct("<3i")
LLMC_TOKENS: dict[tuple[int, int], np.dtype] = {
    (20240520, 1): np.dtype("<u2"),
    (20240801, 7): np.dtype("<u4"),
}  # by (magic, version)

SCAN_TOKENS = 1 << 22  # tokens held at once while a whole file is scanned


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id of the vocabulary."""
    return np.dtype("<u2") if vocab_size <= 1 << 16 else np.dtype("<u4")


@dataclass(frozen=True)
class ShardFile:
    """The place of the tokens in one file. Holds no open file, so it travels to other processes by pickle."""

    path: Path
    dtype: np.dtype
    offset: int  # bytes before the first token
    n_tokens: int
    vocab_size: int | None  # None: the format does not say

    @classmethod
    def open(cls, path: Path, headerless: bool = False) -> Self:
        """Recognise the format by its first bytes and check the size against the header; reads 4 KB at most.

        headerless: a file without a header we know is nanoGPT's bare uint16. Raises UserError for anything else.
        """
        try:
            with path.open("rb") as file:
                head = file.read(4096)
            size = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}).") from error
        if size == 0:
            raise UserError(f"{path} is empty; write the shards again.")
        if head.startswith(MAGIC):
            return cls._ours(path, head).check_size(size)
        if is_llmc(head):
            return cls._llmc(path, head).check_size(size)
        other = _looks_like(head)
        if other:
            raise UserError(f"{path} looks like {other}, not like token shards; point data.source at the text itself.")
        if not headerless:
            raise UserError(
                f"{path} has neither our header nor llm.c's; nanoGPT's bare uint16 tokens are read from files named "
                "train.bin and val.bin."
            )
        return cls._bare(path, head, size).check_size(size)

    @classmethod
    def _ours(cls, path: Path, head: bytes) -> Self:
        if len(head) < HEADER_BYTES:
            raise UserError(f"{path} is truncated inside its header; write the shards again.")
        _, version, itemsize, n_tokens, vocab_size = HEADER.unpack_from(head)
        if version != VERSION:
            raise UserError(f"{path} is shard version {version}, this program reads {VERSION}; prepare the data again.")
        if vocab_size == 0 or itemsize != token_dtype(vocab_size).itemsize:
            raise UserError(
                f"{path} says {itemsize} bytes per token for a vocabulary of {vocab_size}: the header is damaged; "
                "prepare the data again."
            )
        return cls(path, token_dtype(vocab_size), HEADER_BYTES, n_tokens, vocab_size)

    @classmethod
    def _llmc(cls, path: Path, head: bytes) -> Self:
        if len(head) < HEADER_BYTES:
            raise UserError(f"{path} is truncated inside its header; copy the file again.")
        magic, version, n_tokens = LLMC_HEADER.unpack_from(head)
        dtype = LLMC_TOKENS.get((magic, version))
        if dtype is None:
            raise UserError(f"{path} is an llm.c file of version {version}; known are {sorted(LLMC_TOKENS)}.")
        return cls(path, dtype, HEADER_BYTES, n_tokens, None)

    @classmethod
    def _bare(cls, path: Path, head: bytes, size: int) -> Self:
        if size % 2:
            raise UserError(f"{path} holds {size:,} bytes, an odd number: no file of uint16 tokens; copy it again.")
        first = np.frombuffer(head[: len(head) // 2 * 2], dtype="<u2")
        # uint32 or int64 ids read as uint16 are ids with zeros between: all in range, and a model of nothing.
        if len(first) >= 32 and not first[1::2].any() and first[::2].any():
            raise UserError(
                f"{path} looks like tokens wider than uint16 (every second one is 0); "
                "nanoGPT's format is uint16, so write it again with dtype=np.uint16."
            )
        return cls(path, np.dtype("<u2"), 0, size // 2, None)

    def check_size(self, size: int) -> Self:
        """Raises UserError where the file has not the bytes that its header says. size: what it has"""
        expected = self.offset + self.n_tokens * self.dtype.itemsize
        if size != expected:
            raise UserError(
                f"{self.path} is {size:,} bytes, but {self.n_tokens:,} {self.dtype.name} tokens and the header make "
                f"{expected:,}: {'truncated' if size < expected else 'something was appended'}; copy or write it again."
            )
        if self.n_tokens <= 0:
            raise UserError(f"{self.path} holds no tokens; write the shards again.")
        return self

    def map(self) -> tuple[np.ndarray, mmap]:
        """The tokens, memory-mapped read-only, and the mapping, whose size() tells when the file has changed.

        The size is checked again: touching a page that is no longer there would end the process.
        """
        self.check_size(self.path.stat().st_size)
        with self.path.open("rb") as file:
            mapping = mmap(file.fileno(), 0, access=ACCESS_READ)
        return np.frombuffer(mapping, self.dtype, self.n_tokens, self.offset), mapping

    def largest_token(self) -> int:
        """The largest id in the file, in one pass and bounded memory."""
        largest = 0
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while (tokens := np.fromfile(file, dtype=self.dtype, count=SCAN_TOKENS)).size:
                largest = max(largest, int(tokens.max()))
        return largest


def is_llmc(head: bytes) -> bool:
    """True where these first bytes are an llm.c token file's, of whatever version.

    As GPT-2 tokens the magic would start with id 55432, beyond the vocabulary: no nanoGPT file is taken for one.
    """
    return len(head) >= LLMC_HEADER.size and LLMC_HEADER.unpack_from(head)[0] in {magic for magic, _ in LLMC_TOKENS}


def _looks_like(head: bytes) -> str | None:
    """A name for well-known formats that are not tokens; None when these may be tokens."""
    signatures = {
        b"PK\x03\x04": "a zip archive",
        b"\x1f\x8b": "a gzip archive",
        b"\x93NUMPY": "a NumPy .npy file",
        b"PAR1": "a Parquet file",
        b"\x28\xb5\x2f\xfd": "a zstd archive",
    }
    for signature, name in signatures.items():
        if head.startswith(signature):
            return name
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # incremental: the last character may be cut
    except UnicodeDecodeError:
        return None
    # Ids below 256 have a zero byte each, so tokens are hardly ever printable throughout.
    if len(head) >= 16 and all(c.isprintable() or c.isspace() for c in text):
        return "a web page" if text.lstrip().startswith("<") else "text"
    return None
