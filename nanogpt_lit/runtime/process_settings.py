"""Settings of a whole process, made by every loop: matrix products, determinism, random state, the C heap.

Products of float32 matrices on a CPU are computed by the faster of PyTorch's two libraries. It takes MKL, which on
AMD's CPUs does without AVX-512. oneDNN's kernels use it: on a Zen 5 they are 2.2 times as fast, and as exact
(scripts/bench.py --options). The one way to them is to allow bfloat16 for products of float32 matrices, which oneDNN
takes where a CPU has tiles for that (Intel's AMX). There MKL stays: a product tells.

Many kernels of a GPU add up in whatever order their threads arrive, attention's backward pass among them: a run on a
GPU differs from itself, by rounding. PyTorch has slower ones that do not. trainer.deterministic is Lightning's key for
them, and means the same in the other loops.
"""

import ctypes
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal

import torch
import torch.utils.deterministic
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

MKL, ONEDNN = "ieee", "bf16"
"""PyTorch's names for the precision allowed, by what they lead to on a CPU where `onednn_is_exact()`."""
_CUDA: Any = torch.backends.cuda
_MKLDNN: Any = torch.backends.mkldnn
Deterministic = bool | Literal["warn"] | None
"""Values of trainer.deterministic: "warn" goes on with a warning, None leaves the process as it is."""

CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE_WORKSPACES = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS repeats itself (NVIDIA's documentation, "Results Reproducibility")."""
_DETERMINISTIC: Any = torch.utils.deterministic


@contextmanager
def restored_process_settings() -> Iterator[None]:
    """Put back at the end of a run, however it ends, what it has set for its process. Also a decorator."""
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = _DETERMINISTIC.fill_uninitialized_memory
    workspace = os.environ.get(CUBLAS_WORKSPACE)
    with restored_matmul_backend():
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(strict, warn_only=warns)
            _DETERMINISTIC.fill_uninitialized_memory = fills
            if workspace is None:
                os.environ.pop(CUBLAS_WORKSPACE, None)
            else:
                os.environ[CUBLAS_WORKSPACE] = workspace


def set_for_process(module: nn.Module, device: torch.device, deterministic: Deterministic = None) -> None:
    """Set up the process for a run; every loop calls it before its first batch. device: where the module computes"""
    set_matmul_backend(device, tf32=bool(getattr(module, "tf32", False)))
    if deterministic is None:
        return
    torch.use_deterministic_algorithms(bool(deterministic), warn_only=deterministic == "warn")
    if deterministic:
        # PyTorch would fill all new memory, to show who reads what nobody wrote. Here nobody does, and it takes time.
        _DETERMINISTIC.fill_uninitialized_memory = False
        # cuBLAS and PyTorch read it when the process first multiplies on a GPU.
        if os.environ.get(CUBLAS_WORKSPACE) not in REPEATABLE_WORKSPACES:
            os.environ[CUBLAS_WORKSPACE] = REPEATABLE_WORKSPACES[0]


@contextmanager
def restored_matmul_backend() -> Iterator[None]:
    """Put back what the block sets for the process, also where it raises."""
    cuda, mkldnn = _CUDA.matmul, _MKLDNN.matmul
    before = cuda.fp32_precision, mkldnn.fp32_precision
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # it does not answer where the newer settings differ from it
        older = "highest"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(older)
        cuda.fp32_precision, mkldnn.fp32_precision = before


def set_matmul_backend(device: torch.device, tf32: bool) -> None:
    """Select how products of float32 matrices on the device are computed, process-wide.

    tf32: let a GPU round what it multiplies to 10 bits; False leaves it as the user has set it
    """
    if device.type == "cpu":
        # Not torch.set_float32_matmul_precision, which would allow TF32 on GPUs too.
        if onednn_is_exact():
            _MKLDNN.matmul.fp32_precision = ONEDNN
        return
    # PyTorch's older setting raises at being read where the newer one says something else, and Lightning and
    # torch.compile read it on a GPU: both say the same from here on.
    tf32 = tf32 or _CUDA.matmul.fp32_precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    _MKLDNN.matmul.fp32_precision = MKL


def is_by_onednn() -> bool:
    return _MKLDNN.matmul.fp32_precision == ONEDNN


@contextmanager
def by_mkl(device: torch.device) -> Iterator[None]:
    """Multiply by MKL what is so small that oneDNN prepares longer than it multiplies: tiles, and single rows."""
    if device.type != "cpu" or not is_by_onednn():
        yield
        return
    _MKLDNN.matmul.fp32_precision = MKL
    try:
        yield
    finally:
        _MKLDNN.matmul.fp32_precision = ONEDNN


@cache
def onednn_is_exact() -> bool:
    """Tell whether oneDNN is the faster library on this CPU, and rounds no more than float32 does."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False), restored_matmul_backend():
        numbers = torch.full((256, 256), 1 + 2.0**-20, device="cpu", dtype=torch.float32)  # bfloat16 ends at 2**-8
        one = torch.eye(256, device="cpu", dtype=torch.float32)
        _MKLDNN.matmul.fp32_precision = ONEDNN
        return torch.equal(numbers @ one, numbers)


def repeatability(device: torch.device, processes: int, deterministic: Deterministic) -> str:
    """Say whether another run of the same settings ends with the same bits."""
    if device.type == "cpu":
        return f"to the bit on this CPU, with {torch.get_num_threads()} thread(s)"
    if device.type != "cuda":
        return f"not known for {device.type}"
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    if deterministic is not None:
        strict = deterministic is True
    if not strict:
        return "up to rounding, since a GPU adds up in no fixed order; trainer.deterministic=true repeats to the bit"
    if processes > 1:
        return f"to the bit, as far as NCCL adds up the gradients of {processes} GPUs in a fixed order"
    return "to the bit on this GPU"


RandomState = Mapping[str, torch.Tensor]
"""Device type to the state of its generator, uint8: "cpu", and "cuda" or "mps" where that is trained on."""


def random_state(device: torch.device) -> RandomState:
    """The state of the CPU's generator, and of the device's where it is another. Waits for no GPU, whose state is
    a seed and a count that the host keeps."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: RandomState, device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(state["mps"])


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""glibc's <malloc.h>"""
NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep large freed blocks in this process, for the next of their size. Returns whether the system can.

    For the start of a program that trains on a CPU; `fit` calls it. Without it glibc gives every tensor of more than
    32 MiB (logits, the gradient of the embedding) back to the system and fetches it again, page by page, zeroed: of a
    step on a CPU with GPT-2's vocabulary that was a fifth. The same as MALLOC_MMAP_MAX_=0 and
    MALLOC_TRIM_THRESHOLD_=2147483647 in the environment. Bits do not change. Elsewhere than with glibc (Windows, macOS,
    musl) it does nothing.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # musl has no mallopt, or one that returns 0.
    return mallopt is not None and mallopt(M_MMAP_MAX, 0) == 1 and mallopt(M_TRIM_THRESHOLD, NEVER) == 1
