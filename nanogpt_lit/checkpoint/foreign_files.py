"""Files that others write: torch.save's, read where they are whole and hold nothing that could run; those that convert
does not read, known by how they begin; and the values by which one describes its network.
"""

import json
import math
import pickletools
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO

import torch

from nanogpt_lit.checkpoint.tensor_file import HEADER_DIGEST, LONGEST_HEADER
from nanogpt_lit.errors import UserError

BEGINNINGS = {
    b"lmgg": "a file of llama.cpp from before GGUF; give what it was made from",
    b"tjgg": "a file of llama.cpp from before GGUF; give what it was made from",
    b"<!DOCTYPE": "a web page, saved in the place of a file; download the file itself",
    b"<html": "a web page, saved in the place of a file; download the file itself",
    b"version https://git-lfs": "a pointer of Git LFS to a file that was not fetched; `git lfs pull` fetches it",
    b"\x89HDF": "an HDF5 file, as Keras and TensorFlow write; save the model with transformers for PyTorch first",
    b"\x93NUMPY": "an array of NumPy; weights come as safetensors or as a file of torch",
    b"\x80": "a pickle, which could run code when it is read; save the weights as safetensors",
}
LLM_C = {
    20240520: "token shards of llm.c; data.source reads the folder they are in",
    20240327: "llm.c's debug state, activations to compare with; give the model_*.bin beside it",
    20240328: "llm.c's tokenizer; give a model_*.bin, whose tokenizer is GPT-2's",
    20240527: "llm.c's optimizer state (state_*.bin), which is of one process; give the model_*.bin beside it",
    20240803: "llm.c's Llama 3; take Hugging Face's folder of it",
}
"""Kinds of llm.c's files, by their first four bytes."""
FOLDERS = {
    "lit_model.pth": "a checkpoint of LitGPT; `litgpt convert_from_litgpt` makes Hugging Face's weights of it",
    "consolidated.00.pth": "a Llama as Meta publishes it; take Hugging Face's folder of it",
    "saved_model.pb": "a SavedModel of TensorFlow; save the model with transformers for PyTorch first",
    "encoder.json": "GPT-2 as OpenAI published it, for TensorFlow; take Hugging Face's folder, openai-community/gpt2",
}
UNKNOWN = "of none of the formats that `convert --help` lists, or only the beginning of a file"


def read_torch_file(source: Path | BinaryIO) -> Any:
    """The content of a file of torch.save, on the CPU. Errors for any other file are not one family: zip's, pickle's.

    weights_only: the file may come from elsewhere, and an ordinary pickle can run code.
    """
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        # torch wrote a checksum of every part, and does not look at it when it reads.
        if (part := zipfile.ZipFile(file).testzip()) is not None:
            raise RuntimeError(f"{part} differs from its checksum")
        file.seek(0)
        # The open file and not its name, by which torch would choose another reader.
        return torch.load(file, map_location="cpu", weights_only=True)


def is_zip(path: Path) -> bool:
    """True for a zip archive, as files of torch.save are, whole or damaged."""
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # raised for some damage
        return True


def words_of(path: Path) -> set[str]:
    """The texts in a file's pickle, such as the keys of its dictionaries; none where there is no pickle.

    Builds nothing. Raises UserError, naming the file, for one that is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("data.pkl")), None)
            if name is None:
                return set()
            return {word for _, word, _ in pickletools.genops(archive.read(name)) if isinstance(word, str)}
    except Exception as error:  # what the readers of zip and of pickle raise is not one family
        raise UserError(f"{path} is a damaged file of torch.save ({type(error).__name__}).") from error


# Files and folders that convert does not read.


def known_as(path: Path) -> str | None:
    """The kind of a file or folder, with what to do about it; None for a file of ours and for any other folder."""
    if path.is_dir():
        return next((what for name, what in FOLDERS.items() if (path / name).exists()), None)
    with path.open("rb") as file:
        start = file.read(32)
    if start[8:9] == b"{":  # after the length of a header, which may begin as anything
        return safetensors_of_others(path)
    if is_zip(path):
        return zip_of_others(path)
    for beginning, what in BEGINNINGS.items():
        if start.startswith(beginning):
            return what
    return LLM_C.get(int.from_bytes(start[:4], "little"), UNKNOWN)


def zip_of_others(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith(".npy") for name in names):
        return "arrays of NumPy (.npz); weights come as safetensors or as a file of torch"
    if any(name.endswith(".weights.h5") for name in names):
        return "a model of Keras; save it with transformers for PyTorch first"
    if not any(name.endswith("data.pkl") for name in names):
        return "a zip archive; unpack it, and give what is in it"
    if "state_dict" in words_of(path):
        return "a checkpoint of another program than Lightning's Trainer; save its weights as Hugging Face's folder"
    return (
        f"a file of torch.save without the network that its weights are of; give the folder it came in, {path.parent}, "
        "with its config.json"
    )


def safetensors_of_others(path: Path) -> str | None:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= LONGEST_HEADER:
            return UNKNOWN
        header = file.read(length)
    if HEADER_DIGEST.encode() in header:
        return None
    try:
        names = json.loads(header).keys()
    except (ValueError, AttributeError, RecursionError):
        return UNKNOWN
    if any("lora_" in name for name in names):
        return "a LoRA adapter of PEFT; merge it into its model first (merge_and_unload), and save that"
    return f"weights without their network; give the folder it came in, {path.parent}, with its config.json"


# Values by which a file describes a network: read as sizes and numbers, or held to the one of ours.


NEEDED: Any = object()
"""In place of a default, for a key that has to be there."""


class ForeignValues:
    """Values by their keys. Raises UserError, naming the file and the key, for what is none.

    prefix: of the keys in the file
    """

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str = "") -> None:
        self.path, self.values, self.prefix = path, values, prefix

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(f"{self.prefix}{key}", default)
        if value is NEEDED:
            raise UserError(f"{self.path} lacks {self.prefix}{key}, which says the network's shape.")
        return value

    def size(self, key: str, default: int | None = NEEDED) -> Any:
        """A size. A default of None may stay None."""
        value = self.get(key, default)
        if not (value is None and default is None) and (type(value) is not int or not 1 <= value < 2**31):
            raise self.wrong(key, value, "which is no size")
        return value

    def number(self, key: str, default: float = NEEDED) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(key, value, "which is no number")
        return float(value)

    def check(self, only: Mapping[str, Any]) -> None:
        """Check the keys that our network has no choice of. only: its values, and those of a key that is not there"""
        for key, ours in only.items():
            if (value := self.get(key, ours)) != ours:
                raise self.wrong(key, value, f"and this network has {ours!r} and nothing else")

    def wrong(self, key: str, value: Any, why: str) -> UserError:
        return UserError(f"{self.path} has {self.prefix}{key}={value!r:.60}, {why}.")
