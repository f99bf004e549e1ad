"""The kernels that PyTorch chooses on a GPU, and the memory that they take for themselves, which no dispatch mode sees.

Read from PyTorch 2.13's host code, and compared with it in tests/fake_gpu. cuDNN's attention, which compute capability
9.0 and 10.0 take, is not among them: only a GPU can tell what it holds. FlashAttention is counted in its place.
"""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

import torch

from nanogpt_lit.runtime.gpus import GPUS, Gpu
from nanogpt_lit.runtime.process_settings import CUBLAS_WORKSPACE, REPEATABLE_WORKSPACES

Attention = Literal["flash", "efficient", "math"]

CUBLAS_BYTES, CUBLAS_BYTES_SINCE_HOPPER = 8_519_680, 32 << 20
"""Bytes that cuBLAS holds per thread: ":4096:2:16:8", and ":4096:8" on the capabilities below. Backward runs in a
second thread."""
HOPPER_AND_LATER = {(9, 0), (10, 0), (10, 3), (12, 0), (12, 1)}


@dataclass(frozen=True)
class Kernels:
    gpu: Gpu = GPUS[0]
    deterministic: bool = False
    """Kernels that add up in a fixed order, as trainer.deterministic has it."""

    def cublas_bytes(self) -> int:
        """Bytes of cuBLAS's workspace, as PyTorch reads them from the environment; a setting it cannot read is none."""
        setting = os.environ.get(CUBLAS_WORKSPACE, "")
        if self.deterministic and setting not in REPEATABLE_WORKSPACES:
            setting = REPEATABLE_WORKSPACES[0]
        chunks = re.findall(r":(\d+):(\d+)", setting)
        if chunks:
            return sum(int(kib) * 1024 * int(count) for kib, count in chunks)
        return CUBLAS_BYTES_SINCE_HOPPER if self.gpu.capability in HOPPER_AND_LATER else CUBLAS_BYTES

    def attention(self, dtype: torch.dtype, D: int, needs_grad: bool) -> Attention:
        """The kernel of attention without a mask. GPUs older than Ampere have neither FlashAttention nor bfloat16."""
        major = self.gpu.capability[0]
        if dtype == torch.bfloat16 and major < 8:
            return "math"
        # Between 192 and 224 channels a head its backward pass needs more shared memory than smaller GPUs have.
        too_wide = D > 256 or (
            192 < D <= 224 and needs_grad and self.gpu.capability in {(8, 6), (8, 9), (12, 0), (12, 1)}
        )
        return "efficient" if dtype not in (torch.float16, torch.bfloat16) or major < 8 or too_wide else "flash"

    def workspaces(self, operation: str, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Bytes that an operation takes while it runs, beside its results: one block after another."""
        if operation == "_scaled_dot_product_flash_attention_backward":
            return self._flash_backward(args)
        if operation == "_scaled_dot_product_efficient_attention_backward":
            return _efficient_backward(args)
        return _embedding_backward(args) if operation == "embedding_dense_backward" else ()

    def share_at_work(self, operation: str, args: tuple[Any, ...]) -> float:
        """The share of the multiprocessors that an operation keeps busy.

        To add up in a fixed order, attention's backward pass leaves the keys of a sequence and head to one of them, and
        they rarely come out even.
        """
        if not (self.deterministic and operation.endswith("_attention_backward")):
            return 1.0
        B, H = args[1].shape[:2]
        parts = B * H * (self._parts(B * H) if "flash" in operation else 1)
        return parts / _up(parts, self.gpu.multiprocessors)

    def _flash_backward(self, args: tuple[Any, ...]) -> tuple[int, ...]:
        """Row sums and the gradient of the queries in float32, as mha_bwd of flash_api.cpp allocates them; in a fixed
        order, a gradient for each part of the keys."""
        B, H, T, D = args[1].shape
        row_sums = B * H * _up(T, 128) * 4
        return row_sums, row_sums * self._parts(B * H) * _up(D, 32 if D <= 128 else 64)

    def _parts(self, heads: int) -> int:
        """Parts of the keys: one for every multiprocessor where the order is fixed."""
        return -(-self.gpu.multiprocessors // heads) if self.deterministic else 1


def _up(size: int, unit: int) -> int:
    return (size + unit - 1) // unit * unit


def _efficient_backward(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Row sums and the gradient of the queries in float32, the latter in tiles of 64 x 64 with a lock of 16 bytes
    each, as workspace_elements_gq of mem_eff_attention/kernel_backward.h counts them; for heads of more than
    128 channels it is more."""
    B, H, T, D = args[1].shape
    return B * H * T * 4, B * H * (_up(T, 64) // 64 * (_up(D, 64) // 64) * (64 * 64 * 4 + 16))


def _embedding_backward(args: tuple[Any, ...]) -> tuple[int, ...]:
    """Workspaces of an embedding: from 3072 tokens on they are sorted and each row is summed in parts of 10, as
    Embedding.cu and EmbeddingBackwardKernel.cu do: what numbers tokens, rows and parts, and the float32 parts."""
    tokens, vocab_size, channels = args[1].numel(), args[2], args[0].size(-1)
    if tokens <= 3072:
        return ()
    rows = min(tokens, vocab_size)
    parts = tokens // 10 + rows
    return 8 * tokens, 8 * tokens, 8 * tokens, 8 * rows, 8 * rows, 8 * parts, parts * channels * 4
