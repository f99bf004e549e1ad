"""The matmul backend of float32 matrices: a process-wide setting, made where a run starts and undone where it ends.

On a CPU by the faster of PyTorch's two libraries. It takes MKL, which on AMD's CPUs does without AVX-512. oneDNN's
kernels use it: on a Zen 5 they are 2.2 times as fast, and as exact (scripts/bench.py --options). The one way to them is
to allow bfloat16 for products of float32 matrices, which oneDNN takes where a CPU has tiles for that (Intel's AMX).
There MKL stays: a product tells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

MKL, ONEDNN = "ieee", "bf16"
"""PyTorch's names for the precision allowed, by what they lead to on a CPU where `onednn_is_exact()`."""
_CUDA: Any = torch.backends.cuda
_MKLDNN: Any = torch.backends.mkldnn


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
    """Whether oneDNN is the faster library on this CPU, and rounds no more than float32 does."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False), restored_matmul_backend():
        numbers = torch.full((256, 256), 1 + 2.0**-20, device="cpu", dtype=torch.float32)  # bfloat16 ends at 2**-8
        one = torch.eye(256, device="cpu", dtype=torch.float32)
        _MKLDNN.matmul.fp32_precision = ONEDNN
        return torch.equal(numbers @ one, numbers)
