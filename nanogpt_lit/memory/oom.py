"""Out of memory: which errors report it, and a limit at which they come in time."""

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nanogpt_lit.errors import UserError

MIB = 2**20

# RuntimeErrors of allocators that have no class of their own: cuBLAS and cuDNN, the CPU's, Apple's.
CPU_ALLOCATOR = "DefaultCPUAllocator"
WORDS = (
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    f"{CPU_ALLOCATOR}: not enough memory",  # Windows
    f"{CPU_ALLOCATOR}: can't allocate memory",  # elsewhere
    "MPS backend out of memory",
)


def oom_message(error: BaseException) -> str | None:
    """The beginning of what an allocator says; None for an error that is not about memory.

    torch.AcceleratorError is none, also where it reads "CUDA error: out of memory": it may come from any call, of a
    page-lock that the system refused for example, and what is computed after it is not to be trusted.
    """
    if isinstance(error, torch.AcceleratorError):
        return None
    if isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
    ):
        return ". ".join(" ".join(str(error).split()).split(". ")[:2]).removesuffix(".")
    return None


def free_unused() -> None:
    """Give memory that nobody uses back to the device, so that it can be had in other sizes."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def limit_device_memory(device: torch.device, budget_mib: int | None, system: str = sys.platform) -> Callable[[], None]:
    """Make PyTorch's allocator fail beyond budget_mib, or under Windows beyond what is free now. Returns the way back.

    Windows lends a full GPU memory of the host, some ten times slower, and tells nobody. A tighter limit that somebody
    else has set stays. Raises UserError for a budget that the device does not have.
    """
    if device.type != "cuda":
        return lambda: None
    free, total = torch.cuda.mem_get_info(device)
    if budget_mib is not None and budget_mib * MIB > total:
        raise UserError(
            f"model.elastic.budget_mib={budget_mib} is more than the {total // MIB} MiB of the GPU; leave it out."
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


@contextmanager
def oom_explained(module: nn.Module, casts_weights: bool) -> Iterator[None]:
    """Turn an allocator's error that ends a run into one sentence and the lines of YAML that need less.

    module: the LitNanoGPT of the run   casts_weights: whether autocast copies its weights to 16 bits
    """
    try:
        yield
    except Exception as error:
        reported = oom_message(error)
        if reported is None:
            raise
        from nanogpt_lit.memory.ladder import advice, phase_of  # late, for few runs come here

        raise UserError(advice(module, casts_weights, phase_of(error), reported)) from error
