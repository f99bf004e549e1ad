"""The optimizer steps of a run, traced without a GPU and without their memory: two of them, then continued to more.

What is reserved grows until the allocator has seen a few steps; two tell what the others do.
"""

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from nanogpt_lit.errors import UserError
from nanogpt_lit.plan.cuda_paths import cuda_paths
from nanogpt_lit.plan.kernels import Kernels, Roofline
from nanogpt_lit.plan.shape_tensor import GPU, ShapeMode
from nanogpt_lit.plan.strategies import Strategies, Strategy, compute
from nanogpt_lit.plan.trace import MemoryTrace
from nanogpt_lit.runtime.collector import no_collector
from nanogpt_lit.runtime.gpus import GPUS, Gpu
from nanogpt_lit.runtime.precision import PRECISIONS, dtype_of

TRACED_STEPS = TRACED_MICRO_BATCHES = 2
"""The second step meets the optimizer's state, the second micro-batch the gradients of the first; more of either would
repeat itself."""
MORE_MICRO_BATCHES, MORE_STEPS = 2, 8
"""Beyond those traced. The gaps between blocks are others in each step, until a large block fits into none of them:
foreach AdamW of 30M parameters takes 394 MiB more in its seventh step. The native allocator has by then what it needs
for 200 steps, in every run of tests/fake_gpu; expandable segments may go on growing, by 20 MiB now and then."""


@dataclass(frozen=True)
class StepShape:
    """Settings of a run that change its memory or its time."""

    batch_size: int
    block_size: int
    vocab_size: int
    accumulate_grad_batches: int = 1
    precision: str = "32-true"
    clips: bool = True
    zeroes_after_forward: bool = False
    """Lightning frees the gradients of a step during the next one, between its first forward and backward; plain
    PyTorch and accelerate free them at the end of their own."""
    validates: bool = True
    tf32: bool = False
    deterministic: bool = False
    strategy: Strategy = "single"
    devices: int = 1
    """Devices that the strategy spreads the run over, of all machines together."""
    strategy_options: tuple[tuple[str, Any], ...] = ()
    """Arguments of DistributedDataParallel that change its memory."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise UserError(f"trainer.precision={self.precision} cannot be planned; {', '.join(PRECISIONS)} can.")
        for key, size in (
            ("data.batch_size", self.batch_size),
            ("trainer.accumulate_grad_batches", self.accumulate_grad_batches),
        ):
            if size < 1:
                raise UserError(f"{key}={size} must be at least 1.")


@no_collector()  # when it runs depends on all that ran before: a trace must not
def trace_steps(
    build: Callable[[], nn.Module],
    shape: StepShape,
    gpu: Gpu = GPUS[0],
    roofline: Roofline | None = None,
    otherwise: Roofline | None = None,
) -> MemoryTrace:
    """Two optimizer steps (three of DDP), of two micro-batches each where gradients accumulate, and a validation batch.

    build: makes the module; what it makes has no content, so that no memory is taken for it
    The trace's timeline is of the last step, and so are the operations that roofline adds up; otherwise adds them up
    for other kernels, whose workspaces the trace notes beside.
    """
    precision = PRECISIONS[shape.precision]
    autocast_dtype, weight_dtype = dtype_of(precision.autocast), dtype_of(precision.weights)
    assert weight_dtype is not None
    # DDP makes its buckets anew in the second step.
    last = TRACED_STEPS - 1 + (shape.strategy == "ddp")
    micro_batches = min(shape.accumulate_grad_batches, TRACED_MICRO_BATCHES)
    kernels = Kernels(gpu, shape.deterministic)
    other_kernels = None if otherwise is None else otherwise.kernels
    trace = MemoryTrace(kernels, other_kernels, vocab_size=shape.vocab_size, compute=compute)
    rooflines = [adds_up for adds_up in (roofline, otherwise) if adds_up is not None]

    def watch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        for adds_up in rooflines:
            adds_up.add(func, args, kwargs, result)

    many = Strategies(
        shape.strategy, shape.devices, dict(shape.strategy_options), own_stream=shape.zeroes_after_forward
    )
    with many.processes(), cuda_paths(kernels):
        with ShapeMode():
            with _default_dtype(weight_dtype):
                module = build()
            _cast_buffers(module, weight_dtype)
        autocast = torch.autocast("cpu", dtype=autocast_dtype, enabled=autocast_dtype is not None, cache_enabled=False)
        with trace, many.followed_by(trace):
            driven = many.spread(module, trace)
            optimizer = module.configure_optimizers()["optimizer"]  # type: ignore[operator]
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            on_gpu = parameters[0].device.type == GPU
            for step in range(last + 1):
                if step == last:
                    trace.timeline = []
                    trace.mark("step")
                scaler = GradScaler("cpu", enabled=precision.scales)
                for micro_batch in range(micro_batches):
                    if step == last and rooflines:
                        for adds_up in rooflines:
                            # The last of two stands for all that accumulate onto gradients that are there.
                            adds_up.weight = shape.accumulate_grad_batches - 1 if micro_batch else 1
                            adds_up.phase = "forward and backward"
                        trace.watch = watch
                    if micro_batch == micro_batches - 1 > 0:
                        trace.mark("micro-batch")
                    trace.phase = "forward"
                    tokens, targets = _batch(trace, shape)
                    exchanges = micro_batch == micro_batches - 1
                    with nullcontext() if exchanges else many.unsynchronized(driven):
                        with autocast:
                            loss = driven(tokens, targets)
                        if shape.zeroes_after_forward and micro_batch == 0:
                            optimizer.zero_grad()
                        trace.phase = "backward"
                        scaler.scale(loss / shape.accumulate_grad_batches).backward()
                    loss = loss.detach()
                    trace.label([parameter.grad for parameter in parameters], "gradients")
                trace.mark("optimizer")
                trace.phase = "optimizer"
                for adds_up in rooflines:
                    adds_up.weight, adds_up.phase = 1, "optimizer"
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(parameters, 1.0 if shape.clips else math.inf, foreach=on_gpu)
                optimizer.step()
                trace.label(list(optimizer.state.values()), "optimizer")
                if not shape.zeroes_after_forward:
                    optimizer.zero_grad()
            trace.mark("step end")
            trace.watch = None
            if shape.validates:
                trace.phase = "validation"
                module.eval()
                with torch.no_grad(), autocast:
                    driven(*_batch(trace, shape))
    return trace


def _batch(trace: MemoryTrace, shape: StepShape) -> tuple[Tensor, Tensor]:
    tokens = torch.zeros(shape.batch_size, shape.block_size, dtype=torch.int64)
    targets = torch.zeros(shape.batch_size, shape.block_size, dtype=torch.int64)
    trace.label([tokens, targets], "batch")
    return tokens, targets


def _cast_buffers(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast buffers as the Trainer does where weights are 16-bit, also those that were made in float32."""
    for part in module.modules():
        for name, buffer in part.named_buffers(recurse=False):
            if dtype != torch.float32 and buffer.is_floating_point():
                setattr(part, name, buffer.to(dtype))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def long_run(trace: MemoryTrace, accumulate_grad_batches: int, otherwise: bool = False) -> list[tuple[int, int, int]]:
    """The events of a run of several steps, from the trace of two. otherwise: with the trace's other kernels"""
    events: Sequence[tuple[int, int, int]] = trace.events
    if otherwise:
        other = trace.other_sizes
        events = [
            (serial, size if serial not in other else other[serial] if size > 0 else -other[serial], stream)
            for serial, size, stream in events
        ]
    marks = trace.marks
    end = marks["step end"]
    more = min(accumulate_grad_batches - 2, MORE_MICRO_BATCHES)
    if more > 0:
        traced = len(events)
        events = repeated(events, marks["micro-batch"], marks["optimizer"], more)
        end += len(events) - traced
    return repeated(events, marks["step"], end, MORE_STEPS)


def repeated(events: Sequence[tuple[int, int, int]], start: int, stop: int, times: int) -> list[tuple[int, int, int]]:
    """The events, with those of events[start:stop] happening `times` times more, at least once, to new blocks.

    What the stretch releases and did not allocate (the gradients of the step before, say) is in each repetition what
    the one before left over, matched by size, stream and age.
    """
    stretch = events[start:stop]
    born = {serial: (size, stream) for serial, size, stream in stretch if size > 0}
    released = {serial: (-size, stream) for serial, size, stream in stretch if size < 0}
    left_over: dict[tuple[int, int], deque[int]] = defaultdict(deque)
    for serial, kind in born.items():
        if serial not in released:
            left_over[kind].append(serial)
    takes_place_of: dict[int, int] = {}
    for serial in sorted(released.keys() - born.keys()):
        if left_over[released[serial]]:
            takes_place_of[serial] = left_over[released[serial]].popleft()
    piles_up = [serial for serials in left_over.values() for serial in serials]

    # A block by its number among those that a repetition allocates, or less than 0 among those of the one before.
    index = {serial: i for i, serial in enumerate(born)}
    before = {serial: index[other] - len(born) for serial, other in takes_place_of.items()}
    block = index | before
    again = [(block[serial], size, stream) for serial, size, stream in stretch if serial in block]
    # A run does not leak: what would be left once more in each repetition is replaced by the newest.
    again += [(index[serial] - len(born), -born[serial][0], born[serial][1]) for serial in piles_up]

    fresh, traced = 1 + max(event[0] for event in events), list(born)
    result = [*events[:stop], *((fresh + i if i >= 0 else traced[i], size, stream) for i, size, stream in again)]
    for first in range(fresh + len(born), fresh + times * len(born), len(born) or 1):
        result += [(first + i, size, stream) for i, size, stream in again]
    newest = fresh + (times - 1) * len(born)
    names = {serial: newest + i for serial, i in index.items()}
    return result + [(names.get(serial, serial), size, stream) for serial, size, stream in events[stop:]]
