"""A network that is sharded over processes, read from a checkpoint and as checkpoints have it: never whole in one."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nanogpt_lit.checkpoint.run_file import SHARED, STATES, decoded, incomplete, opened
from nanogpt_lit.checkpoint.shards import StoredTensors
from nanogpt_lit.checkpoint.state import UnreadRun
from nanogpt_lit.checkpoint.tensor_file import unflatten
from nanogpt_lit.errors import UserError
from nanogpt_lit.runtime.processes import is_in_pieces, is_sharded, rank

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


# DeepSpeed's ZeRO lays the parameters of a group behind each other and cuts that line into one piece for each process,
# in the middle of a row too. A checkpoint shares tensors out by rows, as FSDP2 does (shards.py). So a tensor is whole
# for a moment, on all processes, one after another, and each keeps its rows of it on the CPU.


class ZeroOptimizer:
    """The optimizer of a network as it was before DeepSpeed put pieces of the line into it.

    To be made before `deepspeed.initialize`. All processes ask it together.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer) -> None:
        self._module, self._optimizer = module, optimizer
        self._groups = optimizer.state_dict()["param_groups"]
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._shapes = [parameter.shape for parameter in self._parameters]  # stage 3 leaves nothing of them
        self._zero: Any = None

    def connect(self, engine: Any) -> None:
        """engine: that DeepSpeed has made of the module and the optimizer"""
        from torch.distributed.device_mesh import init_device_mesh

        self._mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        self._zero = engine.optimizer
        assert self._zero.optimizer is self._optimizer, "DeepSpeed steps another optimizer"
        if is_in_pieces(self._parameters[0]):
            self._module.register_state_dict_post_hook(partial(self._share_weights))  # torch marks it, not a method

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups with their settings; their parameters are pieces of the line."""
        return self._optimizer.param_groups

    @property
    def _pieces(self) -> list[Tensor]:
        of_stage_3 = getattr(self._zero, "fp32_partitioned_groups_flat", None)
        return of_stage_3 or self._zero.single_partition_of_fp32_groups

    def state_dict(self) -> dict[str, Any]:
        """The state by the numbers of the network's own parameters; each process has its rows of it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        groups = [
            {**{key: now[key] for key in before}, "params": before["params"]}
            for now, before in zip(self.param_groups, self._groups, strict=True)
        ]
        piece = self._pieces[0]
        kept = self._optimizer.state.get(piece, {})  # nothing before the first step
        self._find_pieces()
        alike = {key for key, value in kept.items() if isinstance(value, Tensor) and value.shape == piece.shape}
        state = {
            number: {
                key: self._rows_of(safe_get_full_optimizer_state(parameter, key)) if key in alike else value
                for key, value in kept.items()
            }
            for number, parameter in enumerate(self._parameters)
            if kept
        }
        return {"state": state, "param_groups": groups}

    def _share_weights(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        """Put this process's rows of the weights into a state_dict() of stage 3, which holds nothing of them."""
        from deepspeed.utils import safe_get_full_fp32_param

        rows: dict[int, Tensor] = {}  # by parameter, for a tied one has two names
        for name, parameter in module.named_parameters(remove_duplicate=False):
            if id(parameter) not in rows:
                rows[id(parameter)] = self._rows_of(safe_get_full_fp32_param(parameter))
            state[prefix + name] = rows[id(parameter)]

    def _rows_of(self, whole: Tensor) -> Tensor:
        """This process's share of the rows of a tensor that all have, on the CPU."""
        from torch.distributed.tensor import Shard, distribute_tensor

        return distribute_tensor(whole.cpu(), self._mesh, [Shard(0)], src_data_rank=None)

    def _find_pieces(self) -> None:
        """Have stages 1 and 2 know which part of which piece is a parameter's. They look once, after the first group's
        first step, when the others have no state yet."""
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        if not is_in_pieces(self._parameters[0]):
            for parameters, piece in zip(self._zero.bit16_groups, self._pieces, strict=True):
                lazy_init_hp_params_optimizer_state(parameters, piece, self._optimizer.state)

    def load_state_dict(self, named: Mapping[str, Any], stored: StoredTensors) -> None:
        """Read the state of a checkpoint, a tensor at a time.

        named: as `state_dict` has it, with the name of each tensor in its place
        """
        for group, read in zip(self.param_groups, named["param_groups"], strict=True):
            group.update({key: value for key, value in read.items() if key != "params"})
        if not named["state"]:
            return
        first = named["state"][0]
        tensors = {key: name for key, name in first.items() if isinstance(name, str)}  # a count may be a number
        alike = {key for key, name in tensors.items() if stored.described(name)[1] == self._shapes[0]}
        single = stored.read(name for key, name in tensors.items() if key not in alike)
        for piece in self._pieces:
            self._optimizer.state[piece] = {
                key: torch.zeros_like(piece) if key in alike else single[name].clone() if key in tensors else name
                for key, name in first.items()
            }
        self._find_pieces()
        for number, parameter in enumerate(self._parameters):
            for key in alike:
                name = named["state"][number][key]
                set_moment(parameter, key, stored.read([name])[name])


def set_weight(parameter: nn.Parameter, value: Tensor) -> None:
    """Put a whole tensor that all processes have into a parameter, where it computes and where it is stepped."""
    import deepspeed
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    if not is_in_pieces(parameter):
        parameter.data.copy_(value)
        safe_set_full_fp32_param(parameter, value.to(parameter.device))
        return
    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
        if rank() == 0:
            parameter.data.copy_(value)
    if hasattr(parameter, "_z3_optimizer"):  # which a network that is only evaluated lacks
        safe_set_local_fp32_param(parameter, piece_of(value, parameter))


def set_moment(parameter: nn.Parameter, key: str, value: Tensor) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if is_in_pieces(parameter):
        safe_set_local_optimizer_state(parameter, piece_of(value, parameter), key)
    else:
        safe_set_full_optimizer_state(parameter, value.to(parameter.device), key)


def piece_of(value: Tensor, parameter: Any) -> Tensor:
    """The piece of a whole tensor that stage 3 leaves in this process; the last one is filled up with zeros."""
    size = parameter.ds_tensor.numel()
    line = value.flatten()[rank() * size : (rank() + 1) * size]
    return nn.functional.pad(line, (0, size - line.numel()))
