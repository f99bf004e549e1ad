"""A safetensors file that knows its checksums: any reader of the format reads it, ours notices a flipped bit.

The format (huggingface.co/docs/safetensors) is the length of a header, the header in JSON, and the bytes of the
tensors. `safetensors.torch.save_file` writes it too, but wants the checksums before it begins, which is a second pass
over all bytes, and brings all of a GPU to the host at once. Here one tensor after another is hashed and written.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanogpt_lit.errors import UserError

SUFFIX = ".safetensors"
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}
HEADER_DIGEST, TENSOR_DIGESTS = "sha256_header", "sha256_tensors"
UNKNOWN_DIGEST = "0" * 64
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Write tensors, on whichever device they are, one after another, and text about them.

    Returns the digest of the header, which holds those of all else.
    """
    # Larger elements first, so that each tensor begins at a multiple of its element's size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    digests = dict.fromkeys(ordered, UNKNOWN_DIGEST)
    # Its length is known before the digests are.
    header = header_bytes(ordered, metadata, digests)
    file.write(header)
    with ThreadPoolExecutor(1) as hashing:  # hashing and writing both leave the interpreter to others
        for name, tensor in ordered.items():
            content = content_of(tensor)
            hashed = hashing.submit(sha256, content)
            file.write(content)
            digests[name] = hashed.result()
    header = header_bytes(ordered, metadata, digests)
    digest = sha256(header)
    file.seek(0)
    file.write(header.replace(header_digest_entry(UNKNOWN_DIGEST), header_digest_entry(digest), 1))
    return digest


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], digests: Mapping[str, str]) -> bytes:
    """The file's beginning, in which the header's own digest is still unknown."""
    texts = {HEADER_DIGEST: UNKNOWN_DIGEST, TENSOR_DIGESTS: json.dumps(digests), "format": "pt", **metadata}
    header: dict[str, Any] = {"__metadata__": texts}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def header_digest_entry(digest: str) -> bytes:
    return f'"{HEADER_DIGEST}":"{digest}"'.encode()


def content_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: of a CPU's, its own memory."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def sha256(content: memoryview | bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class TensorFile:
    """A file to read from, whose header has been checked. Tensors are checked when they are read.

    Raises UserError, naming the file, for one that is damaged or was not written by `write_tensors`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # safetensors opens by name alone, and a run that goes on may give the name to its next checkpoint in between.
        while not self._open():
            self._file.__exit__(None, None, None)

    def _open(self) -> bool:
        """Open the file twice, for its header and for its tensors. Returns whether both times it was the same."""
        with self.path.open("rb") as file:
            self.metadata = self._checked_metadata(file)
            try:
                self._digests: dict[str, str] = json.loads(self.metadata[TENSOR_DIGESTS])
                self._file = safe_open(self.path, framework="pt")
            except (SafetensorError, KeyError, ValueError, RecursionError) as error:
                raise self._damaged("what it holds is not what its header says") from error
            return os.path.samestat(os.fstat(file.fileno()), self.path.stat())

    def _checked_metadata(self, file: BinaryIO) -> dict[str, str]:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 2 <= length <= LONGEST_HEADER:
            raise self._foreign()
        text = file.read(length)
        try:
            metadata = json.loads(text)["__metadata__"]
            digest = metadata[HEADER_DIGEST]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            # A header that is ours to see, but cut short or with a flipped bit in it, still bears the mark.
            raise self._damaged("its header") if HEADER_DIGEST.encode() in text else self._foreign() from error
        unsigned = text.replace(header_digest_entry(digest), header_digest_entry(UNKNOWN_DIGEST), 1)
        if sha256(start + unsigned) != digest:
            raise self._damaged("its header")
        return metadata

    @property
    def names(self) -> list[str]:
        return list(self._file.keys())

    def described(self, name: str) -> tuple[torch.dtype, torch.Size]:
        """The type and the shape of a tensor, by the header."""
        tensor = self._file.get_slice(name)
        return DTYPE_OF[tensor.get_dtype()], torch.Size(tensor.get_shape())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, on the CPU, each compared with its checksum."""
        try:
            mapped = {name: self._file.get_tensor(name) for name in names}
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise self._damaged("its tensors") from error
        with ThreadPoolExecutor() as hashing:
            digests = hashing.map(lambda tensor: sha256(content_of(tensor)), mapped.values())
            for name, digest in zip(mapped, digests, strict=True):
                if digest != self._digests.get(name):
                    raise self._damaged(name)
        # Copies, not views of the file: Windows lets nobody replace a file that somebody has mapped.
        return {name: tensor.clone() for name, tensor in mapped.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.__exit__(kind, error, traceback)

    def _damaged(self, what: str) -> UserError:
        return UserError(
            f"{self.path} is damaged: {what} differs from its checksum; take another checkpoint of the run."
        )

    def _foreign(self) -> UserError:
        return UserError(
            f"{self.path} is not a checkpoint of nanogpt_lit, or only the beginning of one; those of Lightning, "
            "accelerate, Hugging Face, nanoGPT and llm.c become one by `python -m nanogpt_lit convert FROM TO`."
        )


# Nested states, as optimizers and schedules give them, as tensors and JSON.

# A dictionary with one of these as its only key stands for what JSON lacks.
TENSOR, TUPLE, PAIRS, NUMBER = "$tensor", "$tuple", "$pairs", "$number"


def flatten(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """JSON of a nested state; its tensors go to `tensors`, named after where they stand.

    path: where the value stands, "optimizer" for a whole optimizer
    Raises UserError for anything but tensors, numbers, strings, None, lists, tuples and dictionaries.
    """
    match value:
        case Tensor():
            assert path not in tensors, path
            tensors[path] = value
            return {TENSOR: path}
        case bool() | int() | str() | None:
            return value
        case float():
            return value if math.isfinite(value) else {NUMBER: str(value)}  # JSON knows neither nan nor inf
        case list():
            return [flatten(item, f"{path}.{n}", tensors) for n, item in enumerate(value)]
        case tuple():
            return {TUPLE: flatten(list(value), path, tensors)}
        case Mapping():
            pairs = [(key, flatten(item, f"{path}.{key}", tensors)) for key, item in value.items()]
            if all(isinstance(key, str) and not key.startswith("$") for key, _ in pairs):
                return dict(pairs)
            return {PAIRS: [[flatten(key, path, tensors), item] for key, item in pairs]}
    raise UserError(f"{path} holds a {type(value).__name__}, which a checkpoint cannot keep; numbers and tensors can.")


def unflatten(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested state that `flatten` made this JSON of."""
    match value:
        case list():
            return [unflatten(item, tensors) for item in value]
        case dict() if len(value) == 1:
            ((key, item),) = value.items()
            match key:
                case "$tensor":
                    return tensors[item]
                case "$tuple":
                    return tuple(unflatten(item, tensors))
                case "$pairs":
                    return {unflatten(k, tensors): unflatten(v, tensors) for k, v in item}
                case "$number":
                    return float(item)
            return {key: unflatten(item, tensors)}
        case dict():
            return {key: unflatten(item, tensors) for key, item in value.items()}
    return value
