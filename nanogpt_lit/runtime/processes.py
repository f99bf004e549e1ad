"""The processes that train together, if there are several."""

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def are_several() -> bool:
    return has_group() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if has_group() else 0


def has_group() -> bool:
    """Tell whether there is a process group, if only of this process."""
    return dist.is_available() and dist.is_initialized()


def mean_of_processes(loss: Tensor) -> Tensor:
    """Average a loss over the processes. All of them have to call it together."""
    if not are_several():
        return loss
    total = loss.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gathered(mine: T) -> list[T]:
    """Gather one object per process, by rank. All processes have to call it together."""
    if not are_several():
        return [mine]
    all_of_them: list[T] = [mine] * dist.get_world_size()
    dist.all_gather_object(all_of_them, mine)
    return all_of_them


def broadcast(mine: T) -> T:
    """Hand the first process's object to all. All processes have to call it together."""
    if not are_several():
        return mine
    its = [mine]
    dist.broadcast_object_list(its, src=0)
    return its[0]


def is_sharded(tensor: Tensor) -> bool:
    """Tell whether a tensor is a DTensor, of which each process holds a part."""
    return hasattr(tensor, "full_tensor")


def any_sharded(tensors: Iterable[Tensor]) -> bool:
    """Tell whether one of them is sharded, as the parameters of a module under FSDP2 are."""
    return any(is_sharded(tensor) for tensor in tensors)


def is_in_pieces(parameter: Tensor) -> bool:
    """Tell whether DeepSpeed's ZeRO 3 has left only a piece of a parameter in this process."""
    return hasattr(parameter, "ds_id")


def local_part(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; another tensor whole."""
    part: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return part


def whole(tensor: Tensor) -> Tensor:
    """Gather a sharded tensor; others stay as they are. All processes call it together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def by_first(work: Callable[[], None]) -> None:
    """Have the first process do something, and raise on all what went wrong. All processes have to call it together."""
    error: Exception | None = None
    if rank() == 0:
        try:
            work()
        except Exception as problem:
            error = problem
    if (error := broadcast(error)) is not None:
        raise error


class Agreement:
    """Agreement of all processes on the largest of the numbers that they hand in."""

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
