"""Lightning's checkpoint, to and from a RunState: a plain dictionary, in a file or in a folder of shards.

It needs no Lightning. The shards are what torch.distributed.checkpoint writes, one file per process. PyTorch's own
reader unpickles whatever such a folder holds; this one reads the index without doing what it says, the values as
tensors and plain values alone, and no file outside of the folder.
"""

import io
import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tensor_file import DTYPES
from nanogpt_lit.untrusted.config_values import file_inside

SCALER = "MixedPrecision"
"""Lightning files a scaler under the class name of its precision plugin."""
DATA = "TokenDataModule"
CURVES = "TrainingCurves"
"""The callback whose state is what a run has counted."""
MARKS = {"pytorch-lightning_version", "state_dict", "global_step"}
"""Keys that tell its files from others of torch.save."""
RUN = "nanogpt_lit"
"""The key under which a checkpoint of ours keeps what Lightning does not: random states, processes, accumulation."""
INDEX, REST = ".metadata", "meta.pt"
"""Files of a folder of shards: the place of each value, and what is neither weights nor optimizers."""
DTYPE_OF = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}


def from_lightning(checkpoint: dict[str, Any]) -> RunState:
    """The run of a checkpoint. Raises KeyError where it lacks what every Lightning checkpoint of a training has."""
    rest = dict(checkpoint)
    step = rest.pop("global_step")
    weights = rest.pop("state_dict")
    (optimizer,) = rest.pop("optimizer_states")
    (schedule,) = rest.pop("lr_schedulers")
    rest.pop("pytorch-lightning_version", None)
    callbacks = dict(rest.pop("callbacks", {}))
    counted = callbacks.pop(CURVES, {})
    run = rest.pop(RUN, {})
    processes = run.get("processes", 1)
    data = {name: value for name, value in rest.pop(DATA, {}).items() if name != "batches"}
    batches = rest["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
    return RunState(
        weights=weights,
        hyper_parameters=dict(rest.pop("hyper_parameters", {})),
        data=data,
        optimizer=optimizer,
        schedule=schedule,
        scaler=rest.pop(SCALER, None),
        random=run.get("random", []),
        step=step,
        batches=batches,
        processes=processes,
        accumulate_grad_batches=run.get("accumulate_grad_batches", max(1, batches // max(1, step))),
        tokens=counted.get("tokens", batches * processes * data.get("batch_size", 0) * data.get("block_size", 0)),
        trained_s=counted.get("trained_s", 0.0),
        validations=counted.get("validations", {"latest": None, "best": None}),
        elastic=run.get("elastic", {}),
        spikes=run.get("spikes", {}),
        lightning={**rest, "callbacks": callbacks},
    )


def numbered(optimizer: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state by the numbers that it gives its own parameters, which go through the groups.

    Under FSDP2, Lightning numbers them as the network does, and in a folder of shards it keeps their names.
    """
    names = [name for group in optimizer["param_groups"] for name in group["params"]]
    number_of = {name: number for number, name in enumerate(names)}
    return {
        "state": {number_of[name]: moments for name, moments in optimizer["state"].items()},
        "param_groups": [
            {**group, "params": [number_of[name] for name in group["params"]]} for group in optimizer["param_groups"]
        ],
    }


def to_lightning(state: RunState) -> dict[str, Any]:
    """The checkpoint that Trainer.fit goes on from, and LitNanoGPT.load_from_checkpoint reads."""
    lightning = dict(state.lightning or {"epoch": 0, "loops": loops(state.step, state.batches)})
    checkpoint = {
        **lightning,
        "pytorch-lightning_version": version("lightning"),
        "global_step": state.step,
        "state_dict": state.weights,
        "optimizer_states": [state.optimizer],
        "lr_schedulers": [state.schedule],
        "hyper_parameters": dict(state.hyper_parameters),
        "callbacks": {
            **lightning.get("callbacks", {}),
            CURVES: {
                "tokens": state.tokens,
                "trained_s": state.trained_s,
                "validations": dict(state.validations),
            },
        },
        RUN: {
            "random": [dict(random) for random in state.random],
            "processes": state.processes,
            "accumulate_grad_batches": state.accumulate_grad_batches,
            "elastic": dict(state.elastic),
            "spikes": dict(state.spikes),
        },
    }
    if state.data:
        checkpoint[DATA] = {**state.data, "batches": state.batches}
    if state.scaler is not None:
        checkpoint[SCALER] = state.scaler
    return checkpoint


def loops(step: int, batches: int) -> dict[str, Any]:
    """Lightning's counters where it would have saved after a validation, in the one endless epoch of our data."""
    idle = {"state_dict": {}, "batch_progress": {**at(counts(0, "started", "processed")), "is_last_batch": False}}
    return {
        "fit_loop": {
            "state_dict": {},
            "epoch_progress": at({"ready": 1, "completed": 0, "started": 1, "processed": 0}),
            # One less: Lightning counts a step here after the validation that follows it.
            "epoch_loop.state_dict": {"_batches_that_stepped": max(0, step - 1)},
            "epoch_loop.batch_progress": {**at(counts(batches, "started", "processed")), "is_last_batch": False},
            "epoch_loop.scheduler_progress": at(counts(step)),
            "epoch_loop.automatic_optimization.state_dict": {},
            "epoch_loop.automatic_optimization.optim_progress": {
                "optimizer": {"step": at(counts(step)), "zero_grad": at(counts(step, "started"))}
            },
            "epoch_loop.manual_optimization.state_dict": {},
            "epoch_loop.manual_optimization.optim_step_progress": at(counts(0)),
            "epoch_loop.val_loop.state_dict": {},
            "epoch_loop.val_loop.batch_progress": idle["batch_progress"],
        },
        "validate_loop": idle,
        "test_loop": idle,
        "predict_loop": {"state_dict": {}, "batch_progress": at(counts(0, "started", "processed"))},
    }


def counts(n: int, *more: str) -> dict[str, int]:
    return dict.fromkeys(("ready", "completed", *more), n)


def at(counted: dict[str, int]) -> dict[str, Any]:
    return {"total": counted, "current": dict(counted)}


# A folder of shards.


def is_sharded(folder: Path) -> bool:
    return (folder / INDEX).is_file() and (folder / REST).is_file()


def read_sharded(folder: Path) -> dict[str, Any]:
    """Lightning's checkpoint, as its Trainer would have written it whole.

    What a damaged folder, or one that holds more than tensors and plain values, raises is not one family.
    """
    from nanogpt_lit.checkpoint.foreign_files import read_torch_file  # as in read_values: a folder of shards is rare

    stored = read_values(folder)
    optimizers = [stored[name] for name in sorted(stored) if name.startswith("optimizer_")]
    return {**read_torch_file(folder / REST), "state_dict": stored["state_dict"], "optimizer_states": optimizers}


def read_values(folder: Path) -> dict[str, Any]:
    """The nested state, each tensor whole."""
    from nanogpt_lit.checkpoint.foreign_files import read_torch_file
    from nanogpt_lit.untrusted.imports import pickled_tree

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
        if described.name != "TensorStorageMetadata":
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


def size_of(made: Any) -> tuple[int, ...] | None:
    """The numbers of a torch.Size in the index; None for None."""
    return None if made is None else tuple(made.arguments[0])


def put(tree: Any, path: Sequence[Any], value: Any) -> None:
    """Set a value of nested dictionaries and lists, which are made where they are missing. path: keys and numbers"""
    key, *below = path
    if isinstance(tree, list):
        tree.extend([None] * (key + 1 - len(tree)))
    if not below:
        tree[key] = value
        return
    if (tree[key] if isinstance(tree, list) else tree.get(key)) is None:
        tree[key] = [] if isinstance(below[0], int) else {}
    put(tree[key], below, value)
