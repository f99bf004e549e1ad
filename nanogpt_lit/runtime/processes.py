"""The processes that train together, if there are several."""

import os
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

RANKS = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK",
)  # fmt: skip
"""The variables in which torchrun, Lightning, srun and mpirun tell a process which one it is."""


def is_first(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is the first of its run, before the processes know each other."""
    return launched_processes(environ) == 1 or all(environ.get(name, "0") in ("", "0") for name in RANKS)


SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")


def launched_processes(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes that a launcher has started, this one included; 1 without a launcher."""
    return max((int(environ[name]) for name in SIZES if environ.get(name, "").isdecimal()), default=1)


def are_several() -> bool:
    return has_group() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if has_group() else 0


def has_group() -> bool:
    """Whether there is a process group, if only of this process."""
    return dist.is_available() and dist.is_initialized()


def mean_of_processes(loss: Tensor) -> Tensor:
    """All processes have to ask for it together."""
    if not are_several():
        return loss
    total = loss.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gathered(mine: T) -> list[T]:
    """What each process hands in, by rank. All have to ask together."""
    if not are_several():
        return [mine]
    all_of_them: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    return all_of_them


def broadcast(mine: T) -> T:
    """What the first process hands in. All have to ask together."""
    if not are_several():
        return mine
    its = [mine]
    dist.broadcast_object_list(its, src=0)
    return its[0]


class Agreement:
    """The largest of a number that every process hands in."""

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None

    def highest(self, mine: int) -> int:
        if not are_several():
            return mine
        if self._group is None:
            # Between CPUs: with a GPU's own group, each step would wait for the GPU.
            self._group = dist.new_group(backend="gloo")
        number = torch.tensor(mine)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return int(number)
