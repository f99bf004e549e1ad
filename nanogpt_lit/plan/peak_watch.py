"""Watch over a run: the peak and the time that were planned for it, beside those that the GPU measures.

A run of several devices is planned in a process of its own: it has a process group already, and the trace of its
strategy needs one of processes that are not there.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from nanogpt_lit.errors import in_brief
from nanogpt_lit.memory.ladder import Rung
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.plan.allocator import MIB
from nanogpt_lit.plan.budget import gpu_here
from nanogpt_lit.plan.plan import Footprint, measure
from nanogpt_lit.plan.step import StepShape
from nanogpt_lit.runtime.gpus import GPUS, Gpu

TOLERANCE = 0.05
LONGEST_S = 300
"""Time that a plan in a process of its own may take, for which the run waits."""
SETTLED_STEPS = 6
"""Steps after which the allocator has met all that repeats; before, less memory than planned proves nothing."""


class PeakWatch:
    """Plan a run at its first micro-batch, and report once if the GPU measures something else.

    Nothing is trained or changed. A run that cannot be planned goes on without a plan.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, shape: Callable[..., StepShape], report: Callable[[str], None]
    ) -> None:
        """module: a LightningModule of ours; its like is built, without content, from its hyperparameters
        shape: makes the run's StepShape of a batch_size, a block_size and a vocab_size, of one device's micro-batch
        report: takes a line"""
        self.is_planned = False
        """True once `plan` was called, with success or without."""
        self.planned_mib: float | None = None
        """Most memory that PyTorch is expected to reserve; None where the run cannot be planned."""
        self._footprint: Footprint | None = None
        self._module: Any = module
        self._optimizer, self._shape, self._report = optimizer, shape, report
        self._steps = 0
        self._exchanges = False
        """True where devices exchange anything: how long that takes is not in the footprint."""
        self._has_reported = self._has_reported_time = False

    def plan(self, tokens: int) -> None:
        """Plan the run for micro-batches of so many tokens. Takes seconds of a CPU."""
        self.is_planned = True
        try:
            of_run, gpu = shape_of_run(self._module, self._shape, tokens), gpu_here() or GPUS[0]
            self._exchanges = of_run.strategy != "single"
            plan = plan_apart if self._exchanges else plan_like
            memory = self._module.memory_config
            self._footprint, self.planned_mib = plan(type(self._module), self._module.hparams, memory, of_run, gpu)
        except Exception as error:  # a run is worth more than its plan
            self._report(f"memory/planned_mib is left out, because planning failed: {in_brief(error)}")

    def end_step(self) -> None:
        self._steps += 1

    def compare_time(self, step_s: float, steps: int) -> None:
        """Report once the measured time of a step beside the estimate. step_s: seconds of each of the last `steps`"""
        warmed_up = self._steps > steps
        if self._footprint is None or self._has_reported_time or self._exchanges:
            return
        if not warmed_up or self._has_fallen_back():
            return
        self._has_reported_time = True
        here = gpu_here()
        if here is not None and here.name in {gpu.name for gpu in GPUS}:  # of another nothing was estimated
            planned_s = dict.fromkeys(f"{s:.3g}" for s in (self._footprint.step_s, self._footprint.longest_step_s))
            self._report(f"time: {step_s:.3g} s per step, {' to '.join(planned_s)} were planned")

    def compare(self, allocated_mib: float, reserved_mib: float) -> None:
        """Report once when the peaks so far are not those that were planned."""
        footprint, planned_mib = self._footprint, self.planned_mib
        if footprint is None or planned_mib is None or self._has_reported or self._has_fallen_back():
            return
        excess = reserved_mib / planned_mib - 1
        # A validation may be far away.
        has_settled = self._steps >= SETTLED_STEPS and footprint.fullest_phase != "validation"
        if excess > TOLERANCE or (excess < -TOLERANCE and has_settled):
            self._has_reported = True
            name, measured, planned = self._at_fault(footprint, allocated_mib, reserved_mib - allocated_mib)
            self._report(
                f"memory: PyTorch reserved {reserved_mib:,.0f} MiB, {planned_mib:,.0f} were planned ({excess:+.0%}); "
                f"most of the difference is in {name}: {measured:,.0f} for {planned:,.0f} MiB"
            )

    def _has_fallen_back(self) -> bool:
        """True once memory has run out, and steps are done in another way than was planned."""
        return bool(getattr(self._module, "fallback", None))

    def _at_fault(self, footprint: Footprint, allocated_mib: float, gaps_mib: float) -> tuple[str, float, float]:
        """The category that differs most, with its measured and its planned size.

        Weights and the optimizer's state are there all the time: they are counted, tensor by tensor. What is reserved
        and not allocated are gaps. The rest of the peak cannot be told apart once it is over.
        """
        assert self.planned_mib is not None
        of_plan = footprint.categories_mib
        weights_mib = on_gpu_mib([*self._module.parameters(), *self._module.buffers()])
        optimizer_mib = on_gpu_mib(tree_leaves(list(self._optimizer.state.values())))
        passing = {name: size for name, size in of_plan.items() if name not in ("weights", "optimizer")}
        largest = sorted(passing, key=lambda name: -passing[name])[:3]
        sizes = {
            "the weights": (weights_mib, of_plan["weights"]),
            "the optimizer's state": (optimizer_mib, of_plan["optimizer"]),
            f"what comes and goes with a step, such as {', '.join(largest)}": (
                allocated_mib - weights_mib - optimizer_mib,
                sum(passing.values()),
            ),
            "gaps between blocks": (gaps_mib, self.planned_mib - footprint.allocated_mib),
        }
        name = max(sizes, key=lambda name: abs(sizes[name][0] - sizes[name][1]))
        return name, *sizes[name]


def shape_of_run(module: Any, shape: Callable[..., StepShape], tokens: int) -> StepShape:
    gpt = module.gpt.config
    batch_size = max(1, tokens // gpt.block_size)
    of_run = shape(
        batch_size=batch_size, block_size=gpt.block_size, vocab_size=gpt.vocab_size, tf32=module.hparams["tf32"]
    )
    return replace(of_run, deterministic=torch.are_deterministic_algorithms_enabled())


def plan_like(
    kind: type, hparams: Mapping[str, Any], memory: MemoryConfig, shape: StepShape, gpu: Gpu
) -> tuple[Footprint, float]:
    """The footprint of a module of these hyperparameters, and the MiB that PyTorch's allocator reserves for it."""
    rung = Rung("as configured", memory, shape.batch_size, shape.accumulate_grad_batches)

    def build(memory: MemoryConfig) -> nn.Module:
        # As for `plan`, without torch.compile.
        module: nn.Module = kind(**{**hparams, "memory": memory, "compile": False})
        return module

    footprint = measure(build, rung, shape, gpu)
    planned_mib = footprint.expandable_reserved_mib if expandable_segments() else footprint.reserved_mib
    return replace(footprint, timeline=(), events=[]), planned_mib  # which are large, and done with


def plan_apart(
    kind: type, hparams: Mapping[str, Any], memory: MemoryConfig, shape: StepShape, gpu: Gpu
) -> tuple[Footprint, float]:
    """plan_like, in a process that has no part in the run."""
    asked = {
        "kind": [kind.__module__, kind.__qualname__],
        "hparams": dict(hparams),
        "memory": asdict(memory),
        "shape": asdict(shape),
        "gpu": asdict(gpu),
    }
    own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "CUDA_VISIBLE_DEVICES": ""}
    answer = subprocess.run(
        [sys.executable, "-c", f"from {__name__} import answer; print(answer(input()))"],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        env={**os.environ, **own},
        timeout=LONGEST_S,
    )
    if answer.returncode != 0:
        raise RuntimeError(answer.stderr.strip().rpartition("\n")[2])
    footprint, planned_mib = json.loads(answer.stdout.strip().rpartition("\n")[2])
    return Footprint(**footprint), planned_mib


def answer(asked: str) -> str:
    """plan_apart's question, answered; both are JSON."""
    given = json.loads(asked)
    module, name = given["kind"]
    kind: Any = reduce(getattr, name.split("."), importlib.import_module(module))
    shape, gpu = StepShape(**with_tuples(given["shape"])), Gpu(**with_tuples(given["gpu"]))
    footprint, planned_mib = plan_like(kind, given["hparams"], MemoryConfig(**given["memory"]), shape, gpu)
    return json.dumps([asdict(footprint), planned_mib])


def with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields as they were before they were JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}


def on_gpu_mib(tensors: list[Any]) -> float:
    """MiB that tensors hold on a GPU; a storage that several share counts once."""
    parts = (getattr(tensor, "_local_tensor", tensor) for tensor in tensors)  # of a DTensor, what this process has
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in parts
        if isinstance(tensor, Tensor) and tensor.is_cuda
    }
    return sum(storages.values()) / MIB


def expandable_segments() -> bool:
    """True where the environment asks PyTorch's allocator for expandable segments."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
    return any("expandable_segments:true" in os.environ.get(name, "").lower().replace(" ", "") for name in names)
