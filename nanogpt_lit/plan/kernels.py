"""Kernels of a GPU: those that PyTorch chooses for the operations of a trace, the memory that they take for themselves,
which no dispatch mode sees, and an estimate of their time.

Read from PyTorch 2.13's host code, and compared with it in tests/fake_gpu. cuDNN's attention, which compute capability
9.0 and 10.0 take, is not among them: only a GPU can tell what it holds. FlashAttention is counted in its place.
"""

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

import nanogpt_lit.gpt.loss  # noqa: F401 - defines the operator that is counted below
from nanogpt_lit.plan.shape_tensor import GPU, HOST, name_of, tensors_in
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


# Time. Each operation takes as long as its arithmetic or its traffic, whichever is longer, at a share of the peaks
# that well-tuned kernels reach; launching it takes its time too, and many small operations are bound by that. Ratios
# between two ways to train the same network are worth more than the seconds.


MATRIX_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.65, 0.45, 0.80
"""Shares of the peaks that are reached: large matrix products, FlashAttention, and streaming through memory."""
LAUNCH_S = 8e-6
WORK, WORK_AT_LOWEST_CLOCK = "work", "work at the lowest clock"
HOST_BANDWIDTH = 14.4e9
"""Bytes per second of a CPU's own arithmetic: what fused AdamW reached on one core of an AMD EPYC."""

# Operations that move nothing.
VIEWS = {
    "t", "view", "transpose", "expand", "split", "_unsafe_view", "alias", "unsqueeze", "squeeze", "as_strided",
    "select", "slice", "detach", "permute", "unbind", "split_with_sizes", "empty", "empty_like", "empty_strided",
    "reshape",
}  # fmt: skip


@register_flop_formula(torch.ops.nanogpt_lit.add_product_)
def _add_product_flops(
    total: tuple[int, ...], a: tuple[int, ...], b: tuple[int, ...], *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * a[0] * a[1] * b[1]


class Roofline:
    """Adds up operations; `seconds` is the estimate. `phase` and `weight` are set before the operations they are of."""

    def __init__(self, kernels: Kernels, tf32: bool = False) -> None:
        self.kernels, self.gpu = kernels, kernels.gpu
        self.tf32 = tf32
        self.phase = ""
        """Copies to and from the host run beside the computation of their phase, as far as that lasts."""
        self.weight = 1
        """Number of times that each of the operations that follow counts."""
        self.flops = 0
        self.exchanged: dict[str, int] = defaultdict(int)
        """Bytes of the whole tensors that devices gather, scatter or add up in a step, by collective."""
        self._phases: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # seconds, by what is busy

    @property
    def seconds(self) -> float:
        """The time at the GPU's highest clock."""
        return self._seconds(WORK)

    @property
    def seconds_at_lowest_clock(self) -> float:
        return self._seconds(WORK_AT_LOWEST_CLOCK)

    def _seconds(self, work: str) -> float:
        others = {WORK, WORK_AT_LOWEST_CLOCK} - {work}
        return sum(
            max((s for name, s in busy.items() if name not in others), default=0.0) for busy in self._phases.values()
        )

    def add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        name = name_of(func)
        if name in VIEWS:
            return
        if func.namespace == "c10d":
            # DDP adds up once a step, FSDP2 gathers and scatters with each micro-batch.
            times = 1 if name == "allreduce_" else self.weight
            self.exchanged[name] += times * max(sum(map(_traffic, tensors_in(argument))) for argument in args[:2])
            return
        inputs = tensors_in(args) + tensors_in(tuple(kwargs.values()))
        outputs = tensors_in(result)
        busy, traffic = self._phases[self.phase], sum(map(_traffic, inputs + outputs))
        places = {tensor.device.type for tensor in inputs + outputs}
        if places == {HOST}:
            busy["host"] += traffic / HOST_BANDWIDTH * self.weight
            return
        if HOST in places:
            direction = "arriving" if outputs[0].device.type == GPU else "leaving"
            busy[direction] += _traffic(outputs[0]) / self.gpu.host_bandwidth * self.weight
            return
        work_s = slow_s = traffic / (self.gpu.bandwidth * BANDWIDTH_SHARE)
        if func._overloadpacket in flop_registry:
            flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=result)
            self.flops += flops * self.weight
            attends = "attention" in name
            share = (ATTENTION_SHARE if attends else MATRIX_SHARE) * self.kernels.share_at_work(name, args)
            # Attention's backward ends in the numbers of its random state, a product that is added in what it adds.
            multiplied = inputs[0] if attends else inputs[-1]
            arithmetic_s = flops / (self._peak(multiplied.dtype) * share)
            work_s, slow_s = max(work_s, arithmetic_s), max(slow_s, arithmetic_s / self.gpu.lowest_clock)
        busy[WORK] += work_s * self.weight
        busy[WORK_AT_LOWEST_CLOCK] += slow_s * self.weight
        busy["launches"] += LAUNCH_S * self.weight

    def _peak(self, dtype: torch.dtype) -> float:
        by_dtype = {torch.float16: self.gpu.fp16, torch.bfloat16: self.gpu.bf16}
        return by_dtype.get(dtype) or (self.tf32 and self.gpu.tf32) or self.gpu.fp32


def _traffic(tensor: Tensor) -> int:
    """Bytes read or written; an expanded tensor is read from the few that it repeats."""
    if tensor.numel() > 1 and 0 in tensor.stride():
        return tensor.element_size()
    return tensor.numel() * tensor.element_size()
