"""A run on many devices: what they exchange, how long that takes, and how a run grows with their number.

What is exchanged comes from the trace (strategies.py). Its time is that of rings at the bandwidth of the slowest link
on their way; the latency of a collective, which counts with hundreds of devices and small networks, is left out. How
much of it the computation hides, no trace can tell: all times are a range from all to nothing.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.plan.plan import Footprint
from nanogpt_lit.plan.step import StepShape
from nanogpt_lit.runtime.gpus import Gpu

# Bytes per second of one device each way: half of what NVIDIA's data sheets of the A100, H100 and B200 call the
# bandwidth of NVLink, which counts both; and PCI-SIG's 8, 16 and 32 GT/s per lane, less their 128b/130b encoding.
WITHIN = {
    "nvlink3": 300e9, "nvlink4": 450e9, "nvlink5": 900e9, "pcie3-x8": 7.88e9, "pcie3-x16": 15.75e9,
    "pcie4-x8": 15.75e9, "pcie4-x16": 31.5e9, "pcie5-x16": 63e9,
}  # fmt: skip
# Of one adapter each way: InfiniBand (NVIDIA's data sheets of ConnectX-6 and 7), Ethernet (IEEE 802.3).
BETWEEN = {
    "hdr": 25e9, "ndr": 50e9, "400gbe": 50e9, "200gbe": 25e9, "100gbe": 12.5e9, "25gbe": 3.125e9, "10gbe": 1.25e9,
    "1gbe": 0.125e9,
}  # fmt: skip
OF_GPU = {"a100": "nvlink3", "h100": "nvlink4"}
"""Default connection of such GPUs in one machine; others have PCIe."""
REACHED = 0.8
"""The share of these rates that collectives reach: an assumption, as for PCIe in runtime/gpus.py."""
PASSES = {"allreduce_": 2, "_allgather_base_": 1, "_reduce_scatter_base_": 1, "broadcast_": 1}
"""Passes of a ring: how often it sends its bytes through each device, but for the share of one."""
COUNTS = (1, 2, 8, 32, 128, 512)
COLUMNS = {
    "devices": 7, "accumulate": 12, "tokens/step": 13, "MiB each": 10, "step, s": 20, "tokens/s": 26, "GPU-hours": 20,
}  # fmt: skip


@dataclass(frozen=True)
class Machines:
    nodes: int
    per_node: int
    within: str
    between: str
    adapters: int = 1

    @property
    def devices(self) -> int:
        return self.nodes * self.per_node

    @property
    def bandwidth(self) -> float:
        """Bytes per second each way through each device of a ring: that of the slowest link. As many rings leave a node
        as it has adapters."""
        within, between = WITHIN[self.within], self.adapters * BETWEEN[self.between]
        slowest = within if self.nodes == 1 else between if self.per_node == 1 else min(within, between)
        return REACHED * slowest

    def of(self, devices: int) -> "Machines":
        """The same machines with another number of devices, in nodes of the same size."""
        return replace(self, nodes=-(-devices // self.per_node), per_node=min(devices, self.per_node))

    def __str__(self) -> str:
        within = f"{self.within} ({WITHIN[self.within] / 1e9:,.1f} GB/s) within a node"
        rate = self.adapters * BETWEEN[self.between] / 1e9
        name = f"{self.adapters}x{self.between}" if self.adapters > 1 else self.between
        return f"{within}, {name} ({rate:,.1f} GB/s a node) between nodes"


def machines(nodes: int, per_node: int, gpu: Gpu, interconnect: str | None = None) -> Machines:
    """The machines of `plan --interconnect`, such as "nvlink4,8xndr": names of what connects the devices of a node, and
    of the adapters of each node; either may be left out. Raises UserError for a name that is not known."""
    within = OF_GPU.get(gpu.name, "pcie4-x16")
    between, adapters = "25gbe", 1
    for name in (interconnect or "").lower().split(","):
        found = re.fullmatch(r"(?:(\d{1,2})x)?(\S+)", name.strip())
        if found and found[2] in BETWEEN:
            between, adapters = found[2], int(found[1] or 1)
        elif found and found[1] is None and found[2] in WITHIN:
            within = found[2]
        elif name.strip() or interconnect == "":
            raise UserError(
                f"--interconnect={interconnect} is not known; within a node there are {', '.join(WITHIN)}, "
                f"between nodes {', '.join(BETWEEN)}, and 8xndr is eight adapters a node: nvlink4,8xndr."
            )
    return Machines(nodes, per_node, within, between, max(1, adapters))


@dataclass(frozen=True)
class Step:
    """One optimizer step of all devices together."""

    machines: Machines
    accumulate_grad_batches: int
    tokens: int
    reserved_mib: float
    exchanged_bytes: float
    """Sent, and received, by each device."""
    communication_s: float
    shortest_s: float
    """All communication hidden behind the computation, as far as that lasts."""
    longest_s: float
    """Time of a step with no communication hidden, at the GPU's lowest clock."""

    def hours(self, tokens: int) -> tuple[float, float]:
        """The shortest and the longest time of a run of so many tokens."""
        return self.shortest_s * tokens / self.tokens / 3600, self.longest_s * tokens / self.tokens / 3600

    def as_json(self, tokens: int) -> dict[str, Any]:
        hours = self.hours(tokens)
        return {
            "devices": self.machines.devices,
            "nodes": self.machines.nodes,
            "accumulate_grad_batches": self.accumulate_grad_batches,
            "tokens_per_step": self.tokens,
            "planned_reserved_mib": round(self.reserved_mib, 1),
            "exchanged_gb_per_step": round(self.exchanged_bytes / 1e9, 3),
            "communication_s": round(self.communication_s, 4),
            "estimated_step_s": [round(self.shortest_s, 4), round(self.longest_s, 4)],
            "tokens_per_s": [round(self.tokens / self.longest_s), round(self.tokens / self.shortest_s)],
            "hours": [round(number, 2) for number in hours],
            "gpu_hours": [round(number * self.machines.devices, 2) for number in hours],
        }


def step_of(machines: Machines, shape: StepShape, footprint: Footprint) -> Step:
    """shape, footprint: of one of the devices"""
    share = (machines.devices - 1) / machines.devices
    sent = sum(share * PASSES[kind] * size for kind, size in footprint.exchanged.items())
    communication_s = sent / machines.bandwidth
    return Step(
        machines=machines,
        accumulate_grad_batches=shape.accumulate_grad_batches,
        tokens=shape.batch_size * shape.block_size * shape.accumulate_grad_batches * machines.devices,
        reserved_mib=footprint.reserved_mib,
        exchanged_bytes=sent,
        communication_s=communication_s,
        shortest_s=max(footprint.step_s, communication_s),
        longest_s=footprint.longest_step_s + communication_s,
    )


def growth(own: Step, shape: StepShape, measure: Callable[[StepShape], Footprint]) -> list[Step]:
    """The same run on 1 to 512 devices in nodes of the same size. It takes as many tokens a step as on its own
    machines, or, where devices are too many for that, one micro-batch each.

    shape: of own   measure: the footprint of a shape, of whose fields those of the strategy are others
    """
    micro_batches = own.accumulate_grad_batches * own.machines.devices
    steps = {own.machines.devices: own}
    for devices in COUNTS:
        if devices not in steps:
            sized = replace(
                shape,
                devices=devices,
                strategy=shape.strategy if devices > 1 else "single",
                accumulate_grad_batches=max(1, micro_batches // devices),
            )
            steps[devices] = step_of(own.machines.of(devices), sized, measure(sized))
    return [steps[devices] for devices in sorted(steps)]


def report_many(steps: list[Step], own: Step, strategy: str, tokens: int) -> str:
    """Lines for a terminal. steps: of `growth`   tokens: of the whole run"""
    where = own.machines
    shortest_h, longest_h = own.hours(tokens)
    rate = f"{own.tokens / own.longest_s:,.0f} to {own.tokens / own.shortest_s:,.0f} tokens/s"
    seconds = f"{own.shortest_s:,.3g} s where computation hides all of that, {own.longest_s:,.3g} s where it hides none"
    cost = f"{shortest_h * where.devices:,.0f} to {longest_h * where.devices:,.0f} GPU-hours"
    sent = f"{own.exchanged_bytes / 1e9:,.1f} GB a step, in {own.communication_s:,.3g} s at {REACHED:.0%}"
    lines = [
        f"on {where.nodes} x {where.per_node} devices, {strategy}; {where}",
        f"  each sends {sent} of the slowest link",
        f"  a step takes {seconds}",
        f"  {rate}; {tokens / 1e9:,.2f}B tokens in {shortest_h:,.1f} to {longest_h:,.1f} hours, {cost}",
        "  NCCL's own buffers are not in any MiB here: PyTorch does not allocate them.",
        "",
    ]
    table = [tuple(COLUMNS)]
    for step in steps:
        hours = [number * step.machines.devices for number in step.hours(tokens)]
        table.append((
            f"{step.machines.devices}",
            f"{step.accumulate_grad_batches}",
            f"{step.tokens:,}",
            f"{step.reserved_mib:,.0f}",
            f"{step.shortest_s:,.3g} to {step.longest_s:,.3g}",
            f"{step.tokens / step.longest_s:,.0f} to {step.tokens / step.shortest_s:,.0f}",
            f"{hours[0]:,.0f} to {hours[1]:,.0f}",
        ))  # fmt: skip
    widths = [max(width, *(len(row[i]) + 2 * (i > 0) for row in table)) for i, width in enumerate(COLUMNS.values())]
    rows = ("".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)) for row in table)
    return "\n".join([*lines, *rows])
