"""Products of float32 matrices on a processor, by the quicker of PyTorch's two libraries.

PyTorch asks MKL, which on AMD's processors does without AVX-512. oneDNN's kernels have it: on a Zen 5 they are 2.2
times as fast, and as exact (scripts/bench.py --options). The one way to them is to let oneDNN take bfloat16 for float32
matrices, which it does where a processor has tiles for that (Intel's AMX). There MKL stays: a product tells.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

_matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
MKL, ONEDNN = "none", "bf16"
"""What _matmul.fp32_precision is set to, by what that means where oneDNN is exact."""


def multiply_by_onednn() -> bool:
    """From now on, in this process, where that is exact; elsewhere nothing changes. Whether it is."""
    if _is_exact():
        _set(ONEDNN)
    return _is_exact()


@contextmanager
def by_mkl() -> Iterator[None]:
    """For products so small that oneDNN prepares longer than it multiplies: tiles, and single rows."""
    before = _matmul.fp32_precision
    _set(MKL)
    try:
        yield
    finally:
        _set(before)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """F.scaled_dot_product_attention, whose kernel multiplies tiles, forward and backward."""
    if torch.compiler.is_compiling() or _matmul.fp32_precision != ONEDNN:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with by_mkl():
        y = F.scaled_dot_product_attention(q, k, v, **options)
    if y.grad_fn is not None:
        # A backward pass that ends in between leaves MKL; the next forward pass takes oneDNN again.
        y.grad_fn.register_prehook(lambda *_: _set(MKL))
        y.grad_fn.register_hook(lambda *_: _set(ONEDNN))
    return y


@cache
def _is_exact() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        numbers = torch.full((256, 256), 1 + 2.0**-20, device="cpu", dtype=torch.float32)  # bfloat16 ends at 2**-8
        one = torch.eye(256, device="cpu", dtype=torch.float32)
        before = _matmul.fp32_precision
        _set(ONEDNN)
        try:
            return torch.equal(numbers @ one, numbers)
        finally:
            _set(before)


def _set(precision: Any) -> None:
    _matmul.fp32_precision = precision
