"""A checkpoint read into a network that is sharded over processes: no process ever holds the whole."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from nanogpt_lit.checkpoint.run_file import SHARED, STATES, decoded, incomplete, opened
from nanogpt_lit.checkpoint.shards import StoredTensors
from nanogpt_lit.checkpoint.state import UnreadRun
from nanogpt_lit.checkpoint.tensor_file import unflatten
from nanogpt_lit.checkpoint.zero import ZeroOptimizer, set_weight
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.processes import is_in_pieces, is_sharded

MOMENTS = "optimizer.state."
"""The beginning of the names of an optimizer's tensors; the number of the parameter follows."""


def unread_run(path: Path) -> UnreadRun:
    """Read a checkpoint of any strategy but for its weights and the optimizer's state. Raises UserError as `load_run`
    does."""
    description, stored = opened(path)
    with stored:
        beside = tuple(f"{name}." for name in STATES if name != "optimizer")
        rest = stored.read(name for name in stored.names if name.startswith(beside))
        state = decoded(path, {**description, "optimizer": {}, SHARED: {}}, rest)
    return UnreadRun(**vars(state), path=path)


def load_into(run: UnreadRun, module: nn.Module, optimizer: Optimizer | None) -> None:
    """Put the weights and moments of a run into a sharded network; all processes together, each its part.

    optimizer: None leaves its state where it is
    Raises UserError, on all processes, as `load_run` does, and for the state of another optimizer.
    """
    description, stored = opened(run.path)
    with stored:
        shared = description[SHARED]
        in_lines = isinstance(optimizer, ZeroOptimizer) or any(map(is_in_pieces, module.parameters()))
        named = dict(module.named_parameters()) if in_lines else module.state_dict()
        places: dict[str, Any] = {shared.get(name, name): tensor for name, tensor in named.items()}
        if missing := places.keys() - set(stored.names):
            raise incomplete(run.path, KeyError(min(missing)))
        if optimizer is not None:
            groups = [group["params"] for group in unflatten(description["optimizer"]["param_groups"], {})]
            if groups != [group["params"] for group in optimizer.state_dict()["param_groups"]]:
                raise UserError(f"{run.path} holds the state of another optimizer; set model.optim as it was.")
        if in_lines:
            for name, parameter in places.items():
                set_weight(parameter, stored.read([name])[name])
        else:
            if optimizer is not None:
                places |= moments(stored, optimizer)
            for name, tensor in stored.read(name for name in places if not is_sharded(places[name])).items():
                places[name].copy_(tensor)
            stored.read_into({name: tensor for name, tensor in places.items() if is_sharded(tensor)})
        if isinstance(optimizer, ZeroOptimizer):
            names = {name: name for name in stored.names}
            optimizer.load_state_dict(unflatten(description["optimizer"], names), stored)
        elif optimizer is not None:
            optimizer.load_state_dict(unflatten(description["optimizer"], places))


def moments(stored: StoredTensors, optimizer: Optimizer) -> dict[str, Tensor]:
    """Empty tensors for an optimizer's state: those of a parameter's shape are sharded as the parameter is."""
    parameters: list[Any] = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places = {}
    for name in (name for name in stored.names if name.startswith(MOMENTS)):
        dtype, shape = stored.described(name)
        parameter = parameters[int(name.removeprefix(MOMENTS).partition(".")[0])]
        alike = is_sharded(parameter) and shape == parameter.shape
        places[name] = torch.empty_like(parameter, dtype=dtype) if alike else torch.empty(shape, dtype=dtype)
    return places
