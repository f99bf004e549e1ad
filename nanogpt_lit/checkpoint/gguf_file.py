"""A GGUF file of anyone, taken apart: its metadata, and its tensors in float32.

The layout is that of ggml's docs/gguf.md. A stranger's file is read within the bounds of its size, and of a header that
no model reaches; nothing in it is executed. The package gguf has a reader that trusts the counts in a file.
"""

import math
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanogpt_lit.errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
LONGEST_HEADER = 2**25
"""Bytes. 260,000 tokens with their merges take half of it."""
MOST_DIMENSIONS = 4
ALIGNMENT = "general.alignment"
SPLIT = "split.count"
SCALARS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""NumPy's types by the number that stands for each in a file."""
STRING, ARRAY = 8, 9
FLOATS = ("F32", "F16", "BF16")
"""Types of tensors that are not quantised."""


@dataclass(frozen=True)
class StoredTensor:
    name: str
    shape: tuple[int, ...]
    """Sizes in torch's order; in the file the innermost dimension comes first."""
    kind: Any
    """gguf.GGMLQuantizationType"""
    start: int
    nbytes: int


def recognises(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == MAGIC


class GGUFFile:
    """Raises UserError, naming the file, for one that is damaged, lies about its sizes, or is one part of several."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise UserError(f'{path} needs the package gguf to be read: `pip install "nanogpt_lit[gguf]"`.') from error
        self.path, self._gguf = path, gguf
        with path.open("rb") as file:
            header = Header(file.read(LONGEST_HEADER))
        version = header.number("<u4")
        if version not in VERSIONS:
            raise UserError(f"{path} is a GGUF file in version {version}; 2 and 3, which are of 2023, can be read.")
        try:
            tensors, values = header.number("<u8"), header.number("<u8")
            self.metadata: dict[str, Any] = {}
            for _ in range(values):
                key = header.text()
                self.metadata[key] = header.value(header.number("<u4"))
            listed = [header.tensor() for _ in range(tensors)]
            self.tensors = {tensor.name: tensor for tensor in self._placed(listed, header.place)}
        except (ValueError, struct.error) as error:
            raise UserError(f"{path} is a damaged GGUF file, or the beginning of one: {error}.") from error
        if (parts := self.metadata.get(SPLIT, 1)) != 1:
            raise UserError(
                f"{path} is one of {parts} parts of a model; `llama-gguf-split --merge` of llama.cpp makes one file of "
                "them."
            )

    def _placed(self, listed: list[tuple[str, list[int], int, int]], header: int) -> Iterator[StoredTensor]:
        """The tensors where they lie. Raises ValueError where that is not inside the file, or in each other."""
        alignment = self.metadata.get(ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20:
            raise ValueError(f"{ALIGNMENT}={alignment!r}")
        data, size = -(-header // alignment) * alignment, self.path.stat().st_size
        places = []
        for name, dimensions, number, offset in listed:
            kind = self._gguf.GGMLQuantizationType(number)
            per_block, block_bytes = self._gguf.GGML_QUANT_SIZES[kind]
            if not dimensions or min(dimensions) < 1 or dimensions[0] % per_block:
                raise ValueError(f"{name} of shape {dimensions} in {kind.name}")
            nbytes = math.prod(dimensions) // per_block * block_bytes
            if data + offset + nbytes > size:
                raise ValueError(f"{name} ends at byte {data + offset + nbytes:,} and the file has {size:,}")
            places.append((offset, offset + nbytes))
            yield StoredTensor(name, tuple(reversed(dimensions)), kind, data + offset, nbytes)
        if len({name for name, *_ in listed}) < len(listed):
            raise ValueError("two tensors have one name")
        if any(second[0] < first[1] for first, second in pairwise(sorted(places))):
            raise ValueError("two tensors lie in one place")

    def read(self) -> dict[str, Tensor]:
        """All tensors in float32. Raises UserError for a type that the package gguf cannot turn into numbers."""
        tensors = {}
        with self.path.open("rb") as file:
            for name, stored in self.tensors.items():
                file.seek(stored.start)
                content = np.fromfile(file, dtype=np.uint8, count=stored.nbytes)
                try:
                    numbers = self._gguf.quants.dequantize(content.reshape(*stored.shape[:-1], -1), stored.kind)
                except NotImplementedError as error:
                    raise UserError(f"{self.path} has {name} in {stored.kind.name}, which cannot be read.") from error
                tensors[name] = torch.from_numpy(numbers.astype(np.float32, copy=False)).view(stored.shape)
        return tensors

    @property
    def rounded(self) -> str | None:
        """The quantised types of its tensors, most frequent first; None where all are floating-point numbers."""
        counts = Counter(tensor.kind.name for tensor in self.tensors.values())
        kinds = [kind for kind, _ in counts.most_common() if kind not in FLOATS]
        return " and ".join(kinds) or None


class Header:
    """The first bytes of a file, read one value after another. Raises ValueError where one reaches beyond them."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.place = len(MAGIC)

    def take(self, count: int) -> bytes:
        end = self.place + count
        if end > len(self.content):
            raise ValueError(f"a value of its header ends at byte {end:,} and not within {len(self.content):,}")
        taken, self.place = self.content[self.place : end], end
        return taken

    def number(self, kind: str) -> int:
        return int(np.frombuffer(self.take(np.dtype(kind).itemsize), kind)[0])

    def text(self) -> str:
        return self.take(struct.unpack("<Q", self.take(8))[0]).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        """A number, a text, or a tuple of either."""
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            kind, count = self.number("<u4"), self.number("<u8")
            if kind == STRING:
                return tuple(self.text() for _ in range(count))
            dtype = np.dtype(SCALARS[kind]) if kind in SCALARS else None
            if dtype is None:
                raise ValueError(f"an array of values of type {kind}")
            return tuple(np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist())
        if kind not in SCALARS:
            raise ValueError(f"a value of type {kind}")
        return np.frombuffer(self.take(np.dtype(SCALARS[kind]).itemsize), SCALARS[kind])[0].item()

    def tensor(self) -> tuple[str, list[int], int, int]:
        """Name, dimensions, number of its type, and where its data begin."""
        name, dimensions = self.text(), self.number("<u4")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        sizes = [self.number("<u8") for _ in range(dimensions)]
        return name, sizes, self.number("<u4"), self.number("<u8")
