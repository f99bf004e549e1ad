"""How products of float32 matrices are computed.

On a processor, by the quicker of PyTorch's two libraries. It asks MKL, which on AMD's processors does without AVX-512.
oneDNN's kernels have it: on a Zen 5 they are 2.2 times as fast, and as exact (scripts/bench.py --options). The one way
to them is to allow bfloat16 for products of float32 matrices, which oneDNN takes where a processor has tiles for that
(Intel's AMX). There MKL stays: a product tells. On a CUDA card the same setting allows TF32.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

MKL, ONEDNN = "highest", "medium"
"""PyTorch's names for the precision allowed, by what they lead to on a processor where `multiply_by_onednn` is True."""
TF32 = "high"
SHORT = 128
"""Tokens up to which a processor's attention is quicker in float32 than in bfloat16, whose units take larger tiles."""
_taken = False
"""Whether this process was given oneDNN, by us."""


def choose_products(x: Tensor, tf32: bool) -> None:
    """For what computes where x is, from now on, in this process. One without content, in a plan, changes nothing."""
    if type(x) is not Tensor:
        return
    if x.device.type == "cpu":
        multiply_by_onednn()
    elif tf32:
        torch.set_float32_matmul_precision(TF32)
    elif _taken:
        torch.set_float32_matmul_precision(MKL)  # on a card, what the processor was given would be TF32


def multiply_by_onednn() -> bool:
    """From now on, in this process, where that is exact; elsewhere nothing changes. Whether it is."""
    global _taken
    if _is_exact():
        torch.set_float32_matmul_precision(ONEDNN)
        _taken = True
    return _is_exact()


@contextmanager
def by_mkl(device: torch.device) -> Iterator[None]:
    """For products so small that oneDNN prepares longer than it multiplies: tiles, and single rows. On a card nothing
    changes."""
    if device.type != "cpu":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MKL)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """F.scaled_dot_product_attention, whose kernel multiplies tiles, forward and backward."""
    on_processor = type(q) is Tensor and q.device.type == "cpu"
    if on_processor and q.dtype == torch.bfloat16 and q.size(2) <= SHORT:
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), **options).to(q.dtype)
    if not on_processor or torch.compiler.is_compiling() or torch.get_float32_matmul_precision() != ONEDNN:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with by_mkl(q.device):
        y = F.scaled_dot_product_attention(q, k, v, **options)
    if y.grad_fn is not None:
        # A backward pass that ends in between leaves MKL; the next forward pass takes oneDNN again.
        y.grad_fn.register_prehook(lambda *_: torch.set_float32_matmul_precision(MKL))
        y.grad_fn.register_hook(lambda *_: torch.set_float32_matmul_precision(ONEDNN))
    return y


@cache
def _is_exact() -> bool:
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    with _disable_current_modes(), torch.no_grad(), torch.autocast("cpu", enabled=False):
        numbers = torch.full((256, 256), 1 + 2.0**-20, device="cpu", dtype=torch.float32)  # bfloat16 ends at 2**-8
        one = torch.eye(256, device="cpu", dtype=torch.float32)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(ONEDNN)
        try:
            return torch.equal(numbers @ one, numbers)
        finally:
            torch.set_float32_matmul_precision(before)
