"""One file per checkpoint: tensors as any safetensors reader sees them, everything else as JSON beside them.

Weights have the names of module.state_dict(). The other tensors begin with `optimizer.`, `random.`, `data.` or
`lightning.`, and the JSON under the key `nanogpt_lit` says where each belongs. Nothing in it is a pickle. Those of a
sharded network lie in a folder beside the file (shards.py), which whoever reads the file does not notice.
"""

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from nanogpt_lit.checkpoint.shards import FOLDER, SHARDS, Index, StoredTensors, write_shards
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.checkpoint.tensor_file import HEADER_DIGEST, TensorFile, flatten, unflatten, write_tensors
from nanogpt_lit.checkpoint.tensor_file import SUFFIX as SUFFIX
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.durable import durable_file
from nanogpt_lit.runtime.processes import any_sharded, broadcast, by_first, gathered, is_sharded, local_part

FORMAT = 1
DESCRIPTION = "nanogpt_lit"
"""The key of the metadata."""
SHARED = "shared_weights"
PREVIOUS = "previous"
TOKENIZER = "tokenizer"
"""The key of `data` under which the tokenizer's files are: kept as bytes, they may be megabytes."""
COUNTS = {"step": 0, "batches": 0, "tokens": 0, "processes": 1, "accumulate_grad_batches": 1}
"""Counts that a run is continued by, and the least that each can be."""
STATES = [field.name for field in fields(RunState) if field.name != "weights"]


def save_run(path: Path, state: RunState) -> None:
    """Write a checkpoint, which appears whole and on the disk or not at all.

    A file called `last` makes the one that it replaces `previous`, so that there is always one that no write touches.
    All processes call it together where the network is sharded, and the first alone otherwise.
    Raises UserError for weights that are not finite, and leaves the file alone.
    """
    check_finite(path, state.weights)
    RunContent.of(state).write(path)


@dataclass(frozen=True)
class RunContent:
    """The content of a file to write: every number of the run as it was, and its own tensors, which must not change
    before."""

    tensors: Mapping[str, Tensor]
    sharded: Mapping[str, Tensor]
    """Tensors of which each process holds a part."""
    description: str
    """JSON"""
    step: int

    @classmethod
    def of(cls, state: RunState) -> Self:
        tensors, shared = stored_once(state.weights)
        described: dict[str, Any] = {}
        for name in STATES:
            value = getattr(state, name)
            if name == "data" and TOKENIZER in value:
                value = {**value, TOKENIZER: {key: as_bytes(text) for key, text in value[TOKENIZER].items()}}
            described[name] = flatten(value, name, tensors)
        description = {"format": FORMAT, "written_by": written_by(), SHARED: shared, **described}
        sharded = {name: tensor for name, tensor in tensors.items() if is_sharded(tensor)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in sharded}
        return cls(tensors, sharded, json.dumps(description, allow_nan=False), state.step)

    @property
    def nbytes(self) -> int:
        """The size of the file or a little more, without its shards."""
        header = 2 * len(self.description) + 512 * (len(self.tensors) + 1)  # as JSON in JSON, and digests
        return sum(tensor.nbytes for tensor in self.tensors.values()) + header

    def write(self, path: Path, shards: Index | None = None) -> Index | None:
        """Write the file, and before it the shards, whose index is returned; None where there are none.

        shards: those of another file of the same step, in their place
        """
        if not self.sharded:
            self._write_file(path, {})
            return None
        if shards is not None:
            by_first(lambda: self._write_file(path, shards))
            return shards
        index: Index = {}  # and so it stays on all processes but the first

        def finish(of_all: Index) -> None:
            index.update(of_all)
            self._write_file(path, index)

        write_shards(path.parent / f"step_{self.step}-{broadcast(secrets.token_hex(4))}{FOLDER}", self.sharded, finish)
        return index

    def _write_file(self, path: Path, shards: Index) -> None:
        keep_as = path.with_stem(PREVIOUS) if path.stem == "last" else None
        metadata = {DESCRIPTION: self.description} | ({SHARDS: json.dumps(shards)} if shards else {})
        with durable_file(path, keep_as) as file:
            write_tensors(file, self.tensors, metadata)


def check_finite(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Raises UserError for weights that are not finite; of a sharded network on all processes, which call it
    together."""
    mine = next((name for name, tensor in weights.items() if not is_finite(tensor)), None)
    found = gathered(mine) if any_sharded(weights.values()) else [mine]
    if (name := next(filter(None, found), None)) is not None:
        raise UserError(
            f"{name} holds numbers that are not finite, and {path} is not written with them; go on from a "
            "checkpoint that was written before, with a lower model.optim.lr."
        )


def is_finite(tensor: Tensor) -> bool:
    """Tell whether all numbers of a tensor are finite; of a sharded one, all that this process holds."""
    local = local_part(tensor)
    # The two ends tell of all, nan too, and hold no mask the size of the tensor.
    return not (local.is_floating_point() and local.numel() and not torch.isfinite(torch.stack(local.aminmax())).all())


def load_run(path: Path) -> RunState:
    """Read a checkpoint and compare every byte of it with its checksums.

    Raises UserError, naming the file, for one that is missing, damaged, or not a checkpoint.
    """
    description, stored = opened(path)
    with stored:
        tensors = stored.read(stored.names)
    return decoded(path, description, tensors)


def description_in(path: Path) -> dict[str, Any]:
    """A checkpoint without its tensors, by its header, which is checked. Raises UserError as `load_run` does."""
    with open_run(path) as file:
        return description_of(file)


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its header. Raises UserError as `load_run` does."""
    step = description_in(path).get("step")
    if not isinstance(step, int):
        raise incomplete(path, KeyError("step"))
    return step


def validations_of(path: Path) -> dict[str, Any]:
    """A checkpoint's record of its run's validations, by its header. Raises UserError as `load_run` does."""
    validations = description_in(path).get("validations")
    return validations if isinstance(validations, dict) else {}


def verify_run(path: Path) -> int:
    """Compare every byte of a checkpoint with its checksums, a tensor at a time, and return its step.

    Raises UserError as `load_run` does.
    """
    _, stored = opened(path)
    with stored:
        for name in stored.names:
            stored.read([name])
    return step_of(path)


@dataclass(frozen=True)
class StoredNetwork:
    """The part of a checkpoint that it takes to write text."""

    weights: Mapping[str, Tensor]
    hyper_parameters: Mapping[str, Any]
    tokenizer_files: Mapping[str, str]


def load_stored_network(path: Path) -> StoredNetwork:
    """Read the weights and the tokenizer, a third of the file. Raises UserError as `load_run` does."""
    description, stored = opened(path)
    with stored:
        elsewhere = ("optimizer.", "random.", "lightning.")
        tensors = stored.read(name for name in stored.names if not name.startswith(elsewhere))
    try:
        weights = {n: t for n, t in tensors.items() if not n.startswith("data.")}
        files = unflatten(description["data"][TOKENIZER], tensors)
        return StoredNetwork(
            weights={**weights, **{name: weights[first] for name, first in description[SHARED].items()}},
            hyper_parameters=unflatten(description["hyper_parameters"], tensors),
            tokenizer_files={name: as_text(content) for name, content in files.items()},
        )
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise incomplete(path, error) from error


def opened(path: Path) -> tuple[dict[str, Any], StoredTensors]:
    """The description of a checkpoint, and its tensors, to read. Raises UserError as `load_run` does."""
    while True:
        file = open_run(path)
        description = description_of(file)
        try:
            return description, StoredTensors(file)
        except UserError:
            # A run that goes on may have given the name to its next checkpoint, and removed the shards of this one.
            if TensorFile(path).metadata[HEADER_DIGEST] == file.metadata[HEADER_DIGEST]:
                raise
        except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
            raise incomplete(path, error) from error


def open_run(path: Path) -> TensorFile:
    if path.is_dir():
        raise UserError(
            f"{path} is a folder; a checkpoint is one file, and `python -m nanogpt_lit convert {path} FILE{SUFFIX}` "
            "makes one of accelerate's folder."
        )
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob(f"*{SUFFIX}"))
        raise UserError(
            f"{path} does not exist; "
            + (f"there are {', '.join(beside)} beside it." if beside else f"fit writes best{SUFFIX} and last{SUFFIX}.")
        )
    return TensorFile(path)


def description_of(file: TensorFile) -> dict[str, Any]:
    try:
        description = json.loads(file.metadata[DESCRIPTION])
        number = description["format"]
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise incomplete(file.path, error) from error
    if number != FORMAT:
        raise UserError(
            f"{file.path} has format {number} and this nanogpt_lit reads {FORMAT}; it was written by "
            f"{description.get('written_by')}."
        )
    return description


def decoded(path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> RunState:
    try:
        elsewhere = tuple(f"{name}." for name in STATES)
        weights = {name: tensor for name, tensor in tensors.items() if not name.startswith(elsewhere)}
        weights |= {name: weights[first] for name, first in description[SHARED].items()}
        states = {name: unflatten(description[name], tensors) for name in STATES}
        if TOKENIZER in states["data"]:
            files = states["data"][TOKENIZER]
            states["data"][TOKENIZER] = {name: as_text(content) for name, content in files.items()}
        state = RunState(weights=weights, **states)
        check_counts(state)
        return state
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise incomplete(path, error) from error


def check_counts(state: RunState) -> None:
    """Raises TypeError for a run that no loop can have written."""
    for name, least in COUNTS.items():
        count = getattr(state, name)
        if type(count) is not int or count < least:
            raise TypeError(f"{name}={count!r}")


def incomplete(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} is a checkpoint without all that nanogpt_lit keeps in one ({type(error).__name__}).")


def stored_once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The weights without those that are another one under a second name (a tied head), and which those are."""
    first_of: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in weights.items():
        if name.startswith(tuple(f"{state}." for state in STATES)):
            raise UserError(f"the weight {name} has a name that a checkpoint uses for something else.")
        local = local_part(tensor)
        place = (local.device, local.data_ptr(), local.dtype, tensor.shape, tensor.stride())
        first = first_of.setdefault(place, name) if local.numel() else name
        if first == name:
            tensors[name] = tensor
        else:
            shared[name] = first
    if any_sharded(weights.values()):
        shared = broadcast(shared)  # of a small tensor a process may hold nothing, which has no place in memory
        tensors = {name: tensor for name, tensor in weights.items() if name not in shared}
    return tensors, shared


def written_by() -> str:
    return ", ".join(f"{package} {version(package)}" for package in ("nanogpt_lit", "torch"))


def as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def as_text(content: Tensor) -> str:
    return content.numpy().tobytes().decode()
