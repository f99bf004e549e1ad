"""The plan of a run: does it fit a GPU, where does its memory go, and what is the cheapest way to make it fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

from torch import nn

from nanogpt_lit.gpt import loss
from nanogpt_lit.memory.ladder import Rung, ladder
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.plan.allocator import MIB, Usage, replay
from nanogpt_lit.plan.budget import Budget
from nanogpt_lit.plan.kernels import Kernels, Roofline
from nanogpt_lit.plan.step import StepShape, long_run, trace_steps
from nanogpt_lit.plan.strategies import Strategy
from nanogpt_lit.plan.trace import CATEGORIES, Moment
from nanogpt_lit.runtime.collector import no_collector
from nanogpt_lit.runtime.gpus import Gpu
from nanogpt_lit.runtime.precision import PRECISIONS

PROCESS_MIB = 1500
"""Host memory of the process itself: Python, PyTorch and Lightning (370 MiB with a CPU build) and the CUDA libraries,
whose share is a budget and not a measurement."""

Build = Callable[[MemoryConfig], nn.Module]

STAYS: dict[Strategy, tuple[str, ...]] = {"single": (), "ddp": ("weights",), "fsdp2": ("weights", "optimizer_state")}
"""Fields of MemoryConfig of what a strategy exchanges between devices, and so leaves on them."""


@dataclass(frozen=True)
class Footprint:
    """Memory and time of one way of training. Memory in MiB."""

    allocated_mib: float
    """Peak of what tensors and kernels hold, in the allocator's blocks: torch.cuda.max_memory_allocated()."""
    reserved_mib: float
    """Peak of what the allocator takes from the GPU: torch.cuda.max_memory_reserved(). This must fit."""
    host_memory_mib: float
    page_locked_mib: float
    """The part of host_memory_mib that the GPU copies by itself. Windows and WSL2 lock about half of their memory."""
    categories_mib: dict[str, float]
    """allocated_mib by what it is for, at the fullest moment."""
    phases_mib: dict[str, float]
    """The fullest moment of forward, backward, optimizer and validation."""
    fullest_phase: str
    parameters: int
    step_s: float
    """An estimate, from the peaks of the GPU."""
    longest_step_s: float
    """Time of a step at the lowest clock of such a GPU."""
    timeline: tuple[Moment, ...]
    """One optimizer step, operation by operation; bytes."""
    events: list[tuple[int, int, int]]
    """Allocations and releases of several steps."""
    if_other: tuple[float, float] | None = None
    """(reserved_mib, step_s) with trainer.deterministic turned over, where measure was asked for it."""
    exchanged: dict[str, int] = field(default_factory=dict)
    """Bytes that each of several devices gathers, scatters or adds up in a step, by collective."""

    @cached_property
    def expandable(self) -> Usage:
        """Peaks with PYTORCH_ALLOC_CONF=expandable_segments:True, which Linux has; bytes."""
        return replay(self.events, expandable=True)

    @property
    def expandable_reserved_mib(self) -> float:
        return self.expandable.reserved / MIB


@dataclass(frozen=True)
class PlannedRung:
    rung: Rung
    footprint: Footprint
    slowdown: float
    """Estimated time per optimizer step against the plain step's."""
    same_bits: bool
    """The trained weights are those of the plain step, to the bit."""
    changes_numerics: bool
    """Rounds more than another order of summing does."""
    fits: bool
    yaml: tuple[str, ...]
    """Lines to put into the YAML to have it."""


@dataclass(frozen=True)
class Plan:
    shape: StepShape
    parameters: int
    max_steps: int
    budget: Budget
    own: PlannedRung
    """The YAML as it is."""
    price_of_determinism: tuple[float, float]
    """(MiB more that are reserved, time against that without it) with trainer.deterministic=true."""
    ladder: tuple[PlannedRung, ...]

    @property
    def cheapest(self) -> PlannedRung | None:
        """The rung that fits at the least time; None when none fits."""
        return min((rung for rung in self.ladder if rung.fits), key=lambda rung: rung.slowdown, default=None)

    def as_json(self) -> dict[str, Any]:
        own = self.own.footprint
        return {
            "fits": self.own.fits,
            "planned_allocated_mib": round(own.allocated_mib, 1),
            "planned_reserved_mib": round(own.reserved_mib, 1),
            "planned_reserved_expandable_mib": round(own.expandable_reserved_mib, 1),
            "usable_mib": self.budget.usable_mib,
            "host_memory_mib": round(own.host_memory_mib),
            "page_locked_mib": round(own.page_locked_mib),
            "categories_mib": {name: round(size, 1) for name, size in own.categories_mib.items()},
            "phases_mib": {name: round(size, 1) for name, size in own.phases_mib.items()},
            "estimated_step_s": round(own.step_s, 3),
            "estimated_run_s": round(own.step_s * self.max_steps),
            "estimated_step_s_at_lowest_clock": round(own.longest_step_s, 3),
            "deterministic_extra_mib": round(self.price_of_determinism[0], 1),
            "deterministic_slowdown": round(self.price_of_determinism[1], 3),
            "gpu": self.budget.gpu.name,
            "parameters": self.parameters,
            "ladder": [
                {
                    "name": planned.rung.name,
                    "planned_allocated_mib": round(planned.footprint.allocated_mib, 1),
                    "planned_reserved_mib": round(planned.footprint.reserved_mib, 1),
                    "host_memory_mib": round(planned.footprint.host_memory_mib),
                    "estimated_slowdown": round(planned.slowdown, 3),
                    "same_bits": planned.same_bits,
                    "changes_numerics": planned.changes_numerics,
                    "fits": planned.fits,
                    "cheapest": planned is self.cheapest,
                    "own": planned is self.own,
                    "yaml": list(planned.yaml),
                }
                for planned in self.ladder
            ],
        }


def make_plan(build: Build, own: Rung, shape: StepShape, max_steps: int, budget: Budget) -> Plan:
    """The plan of a run, and of all rungs above and below it.

    build: the module with the memory techniques it is given   own: what the YAML says
    """
    rungs: list[Rung] = []
    footprints: list[Footprint] = []
    casts_weights = PRECISIONS[shape.precision].autocast is not None
    for rung in ladder(own, shape.block_size, casts_weights, STAYS[shape.strategy]):
        if rung.last_resort(own) and any(other.reserved_mib <= budget.usable_mib for other in footprints):
            continue
        rungs.append(rung)
        footprints.append(measure(build, rung, shape, budget.gpu, and_other=own.same_training(rung)))
    plain = next(i for i, rung in enumerate(rungs) if rung.memory == MemoryConfig())
    planned = tuple(
        PlannedRung(
            rung,
            footprint,
            slowdown=footprint.step_s / footprints[plain].step_s,
            same_bits=rung.state_bits == 32 and rung.same_bits(rungs[plain]),
            changes_numerics=rung.state_bits != 32,
            fits=footprint.reserved_mib <= budget.usable_mib,
            yaml=tuple(rung.yaml(own)),
        )
        for rung, footprint in zip(rungs, footprints, strict=True)
    )
    yours = next(p for p in planned if own.same_training(p.rung))
    assert yours.footprint.if_other is not None, "it was asked for above"
    both = [(yours.footprint.reserved_mib, yours.footprint.step_s), yours.footprint.if_other]
    (free_mib, free_s), (fixed_mib, fixed_s) = both[::-1] if shape.deterministic else both
    price = fixed_mib - free_mib, fixed_s / free_s
    return Plan(shape, footprints[plain].parameters, max_steps, budget, yours, price, planned)


@no_collector()  # which would look through the events, a hundred thousand objects, again and again
def reserved_mib(build: Build, rung: Rung, shape: StepShape, gpu: Gpu) -> float:
    """Footprint.reserved_mib alone, in a part of the time: of many chunks of the loss, a few are traced."""
    shape = replace(shape, batch_size=rung.batch_size, accumulate_grad_batches=rung.accumulate_grad_batches)
    with patch.object(loss, "chunk_starts", few_chunk_starts):
        trace = trace_steps(lambda: build(rung.memory), shape, gpu)
    return replay(long_run(trace, shape.accumulate_grad_batches)).reserved / MIB


def few_chunk_starts(tokens: int, chunk_tokens: int) -> Sequence[int]:
    """loss.chunk_starts of the chunks that may differ from the one before: the first few, and the last."""
    starts = range(0, tokens, chunk_tokens)
    return [*starts[:3], *starts[3:][-1:]]


@no_collector()
def measure(build: Build, rung: Rung, shape: StepShape, gpu: Gpu, and_other: bool = False) -> Footprint:
    """Trace one rung. and_other: also as trainer.deterministic turned over would have it, from the same trace"""
    shape = replace(shape, batch_size=rung.batch_size, accumulate_grad_batches=rung.accumulate_grad_batches)
    roofline = Roofline(Kernels(gpu, shape.deterministic), shape.tf32)
    otherwise = Roofline(Kernels(gpu, not shape.deterministic), shape.tf32) if and_other else None
    trace = trace_steps(lambda: build(rung.memory), shape, gpu, roofline, otherwise)
    events = long_run(trace, shape.accumulate_grad_batches)
    if_other = None
    if otherwise is not None:
        events_otherwise = long_run(trace, shape.accumulate_grad_batches, otherwise=True)
        if_other = replay(events_otherwise).reserved / MIB, otherwise.seconds
    usage, peak = replay(events), trace.peak
    categories = {name: peak.bytes_by_category.get(name, 0) / MIB for name in CATEGORIES}
    # A block may be larger than what lies in it: what is too little to be cut off stays with it.
    categories["rounding"] = usage.allocated / MIB - sum(categories.values())
    return Footprint(
        allocated_mib=usage.allocated / MIB,
        reserved_mib=usage.reserved / MIB,
        host_memory_mib=PROCESS_MIB + max(categories["weights"], trace.host_peak_bytes / MIB),
        page_locked_mib=trace.page_locked_peak_bytes / MIB,
        categories_mib=categories,
        phases_mib={phase: moment.bytes / MIB for phase, moment in trace.peaks.items()},
        fullest_phase=peak.phase,
        parameters=trace.parameters,
        step_s=roofline.seconds,
        longest_step_s=roofline.seconds_at_lowest_clock,
        timeline=tuple(trace.timeline or ()),
        events=events,
        if_other=if_other,
        exchanged=dict(roofline.exchanged),
    )
