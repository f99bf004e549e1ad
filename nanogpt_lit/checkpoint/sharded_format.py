"""The folder of shards that torch.distributed.checkpoint writes, one file per process, put together in one process.

PyTorch's own reader unpickles whatever such a folder holds. This one reads the index without doing what it says, the
values as tensors and plain values alone, and no file outside of the folder.
"""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nanogpt_lit.checkpoint.tensor_file import DTYPES
from nanogpt_lit.checkpoint.torch_file import read_torch_file
from nanogpt_lit.untrusted.config_paths import file_inside
from nanogpt_lit.untrusted.pickled import Made, pickled_tree

INDEX = ".metadata"
REST = "meta.pt"
"""What Lightning keeps besides weights and optimizers."""
DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def recognises(folder: Path) -> bool:
    return (folder / INDEX).is_file() and (folder / REST).is_file()


def read_checkpoint(folder: Path) -> dict[str, Any]:
    """Lightning's checkpoint, as its Trainer would have written it whole.

    What a damaged folder, or one that holds more than tensors and plain values, raises is not one family.
    """
    stored = read_values(folder)
    optimizers = [stored[name] for name in sorted(stored) if name.startswith("optimizer_")]
    return {**read_torch_file(folder / REST), "state_dict": stored["state_dict"], "optimizer_states": optimizers}


def read_values(folder: Path) -> dict[str, Any]:
    """The nested state, each tensor whole."""
    index = pickled_tree((folder / INDEX).read_bytes()).state
    places = {
        (key.state["fqn"], size_of(key.state.get("offset"))): place.state
        for key, place in index["storage_data"].items()
    }
    files = {place["relative_path"] for place in places.values()}
    contents = {name: file_inside(folder, name, INDEX).read_bytes() for name in files}
    size = sum(map(len, contents.values()))

    def read(name: str, offset: tuple[int, ...] | None) -> Any:
        place = places[name, offset]
        start = place["offset"]
        return read_torch_file(io.BytesIO(contents[place["relative_path"]][start : start + place["length"]]))

    stored: dict[str, Any] = {}
    for name, described in index["state_dict_metadata"].items():
        value: Any
        if described.by.name != "TensorStorageMetadata":
            value = read(name, None)
        else:
            shape = size_of(described.state["size"]) or ()
            if math.prod(shape) > size:
                raise ValueError(f"{name} has the shape {shape}, more than the folder holds")
            value = torch.empty(shape, dtype=DTYPE_OF[described.state["properties"].state[0].name])
            left = value.numel()
            for chunk in described.state["chunks"]:
                offsets, sizes = (size_of(chunk.state[key]) or () for key in ("offsets", "sizes"))
                part = value[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]
                part.copy_(read(name, offsets))
                left -= part.numel()
            if left != 0:
                raise ValueError(f"{name} lacks {left:,} of {value.numel():,} numbers")
        put(stored, index["planner_data"][name], value)
    return stored


def size_of(made: Made | None) -> tuple[int, ...] | None:
    """Of torch.Size, in the index."""
    return None if made is None else tuple(made.arguments[0])


def put(tree: Any, path: Sequence[Any], value: Any) -> None:
    """Sets a value of nested dictionaries and lists, which are made where they are missing. path: keys and numbers"""
    key, *below = path
    if isinstance(tree, list):
        tree.extend([None] * (key + 1 - len(tree)))
    if not below:
        tree[key] = value
        return
    if (tree[key] if isinstance(tree, list) else tree.get(key)) is None:
        tree[key] = [] if isinstance(below[0], int) else {}
    put(tree[key], below, value)
