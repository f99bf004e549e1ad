"""Estimate of the time that a GPU takes for the operations of a trace.

Each operation takes as long as its arithmetic or its traffic, whichever is longer, at a share of the GPU's peaks that
well-tuned kernels reach; launching it takes its time too, and many small operations are bound by that. Ratios between
two ways to train the same network are worth more than the seconds.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

import nanogpt_lit.gpt.loss  # noqa: F401 - defines the operator that is counted below
from nanogpt_lit.plan.kernels import Kernels
from nanogpt_lit.plan.trace import GPU, HOST, name_of, tensors_in

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
