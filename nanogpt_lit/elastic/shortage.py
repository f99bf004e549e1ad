"""When memory ends: which errors say so, and a limit at which they come before the card turns slow."""

import sys
from collections.abc import Callable
from typing import Any

import torch

from nanogpt_lit.errors import UserError

MIB = 2**20

# RuntimeErrors of allocators that have no class of their own: cuBLAS and cuDNN, the driver, the processor's, Apple's.
WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "DefaultCPUAllocator: not enough memory",  # Windows
    "DefaultCPUAllocator: can't allocate memory",  # elsewhere
    "MPS backend out of memory",
)


def shortage_of(error: BaseException) -> str | None:
    """The beginning of what an allocator says; None for an error that is not about memory."""
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    ):
        return ". ".join(" ".join(str(error).split()).split(". ")[:2]).removesuffix(".")
    return None


def attempt(action: Callable[..., Any], *arguments: Any) -> tuple[Any, str | None]:
    """(action's result, None), or (None, what its allocator says). Other errors pass.

    The error itself ends here: its traceback holds the frames, and these the tensors, that are to be freed.
    """
    try:
        return action(*arguments), None
    except Exception as error:
        shortage = shortage_of(error)
        if shortage is None:
            raise
        return None, shortage


def cap_card_memory(device: torch.device, budget_mib: int | None, system: str = sys.platform) -> Callable[[], None]:
    """Makes PyTorch's allocator fail beyond budget_mib, or under Windows beyond what is free now. Returns the way back.

    Windows lends a card that is full memory of the host, some ten times slower, and nobody is told. A tighter limit
    that somebody else has set stays. Raises UserError for a budget that the card does not have.
    """
    if device.type != "cuda":
        return lambda: None
    free, total = torch.cuda.mem_get_info(device)
    if budget_mib is not None and budget_mib * MIB > total:
        raise UserError(
            f"model.elastic.budget_mib={budget_mib} is more than the {total // MIB} MiB of the card; leave it out."
        )
    if budget_mib is not None:
        usable = budget_mib * MIB
    elif system == "win32":
        # Loaded weights are reserved by this process already, and count.
        usable = min(total, free + torch.cuda.memory_reserved(device))
    else:
        return lambda: None
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(before, usable / total), device)
    return lambda: torch.cuda.set_per_process_memory_fraction(before, device)
