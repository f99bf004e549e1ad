"""The processes that train together, if there are several."""

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def are_several() -> bool:
    return has_group() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if has_group() else 0


def has_group() -> bool:
    """Also where this process is the only one in it."""
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
