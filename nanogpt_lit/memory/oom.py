"""Out of memory: which errors say so, what to tell when a run ends of it, and a limit at which it comes in time."""

import gc
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from nanogpt_lit.errors import UserError
from nanogpt_lit.memory.ladder import next_technique, yaml_lines
from nanogpt_lit.memory.techniques import MemoryConfig

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
ON_HOST = ("optimizer_state", "weights", "block_inputs")
"""The fields of MemoryConfig that move something from the device to host memory."""


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


# What a run is told that ends of it.


@contextmanager
def oom_explained(module: nn.Module, casts_weights: bool) -> Iterator[None]:
    """Turn an allocator's error that ends a run into one sentence and the lines of YAML that need less.

    module: the LitNanoGPT of the run   casts_weights: whether autocast copies its weights to 16 bits
    """
    try:
        yield
    except Exception as error:
        said = oom_message(error)
        if said is None:
            raise
        raise UserError(advice(module, casts_weights, phase_of(error), said)) from error


def phase_of(error: BaseException) -> str:
    """The innermost part of a step that the error's traceback goes through."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        if isinstance(frame.f_locals.get("self"), Optimizer):
            return "the optimizer"
        if frame.f_code is torch.autograd.backward.__code__:
            return "backward"
        if frame.f_code is nn.Module._call_impl.__code__:
            return "forward"
    return "training"


def advice(module: Any, casts_weights: bool, phase: str, said: str, in_force: MemoryConfig | None = None) -> str:
    """One sentence: where memory ended, and the next technique of the ladder, with its lines for the YAML.

    in_force: where the run uses techniques that its YAML does not have
    """
    own: MemoryConfig = module.memory_config
    memory = in_force or own
    ended = f"memory ended in {phase} ({said})"
    kept = [f"model.memory.{name}={where}" for name in ON_HOST if (where := getattr(memory, name)) != "card"]
    if CPU_ALLOCATOR in said and kept:
        return f"host {ended}; close other programs, or set =card what can be of {', '.join(kept)}."
    idle = useless(module, casts_weights, on_cpu=CPU_ALLOCATOR in said or "MPS" in said)
    if phase == "the optimizer":
        idle |= vars(memory).keys() - {"optimizer_state", "weights"}
    found = next_technique(memory, idle)
    if found is None:
        return f"{ended}, and no technique is left; set a smaller data.block_size or model.gpt, or take a larger GPU."
    name, less = found
    lines = "\n".join(f"    {line}" for line in yaml_lines(less, own))
    return f"{ended}; what needs less is {name}, with these lines in the YAML:\n\n{lines}\n"


def useless(module: Any, casts_weights: bool, on_cpu: bool) -> set[str]:
    """The fields of model.memory that do nothing in a run, or are refused in it."""
    fields = set() if casts_weights else {"recast_weights"}
    if on_cpu:  # where host memory is all there is
        return {*fields, *ON_HOST}
    if not module.optim_config.state_moves or module.device_mesh is not None:
        return {*fields, "optimizer_state", "weights"}
    has_others = dist.is_available() and dist.is_initialized()  # DDP exchanges gradients between GPUs
    return {*fields, "weights"} if has_others or module.hparams["compile"] else fields
