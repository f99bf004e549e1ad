"""The plan as a student reads it: does it fit, what to do, where the memory goes, what else there is."""

from collections.abc import Callable
from typing import Any

from nanogpt_lit.plan.plan import Plan, PlannedRung

BAR = 40
LOCKED_BY_ALL_MIB = 2048
"""Half of what the smallest machines have that train with a GPU."""


def report(plan: Plan, title: str) -> str:
    """title: what was planned, such as the name of the YAML"""
    return "\n".join(
        [*_head(plan, title), "", *_verdict(plan), "", *_categories(plan), "", *_ladder(plan), "", *_notes(plan)]
    )


def _head(plan: Plan, title: str) -> list[str]:
    shape, budget = plan.shape, plan.budget
    tokens = shape.batch_size * shape.block_size * shape.accumulate_grad_batches
    system = {"linux": "under Linux", "windows": "under Windows", None: "under any system"}[budget.system]
    desktop = " with the desktop on the GPU" if budget.desktop_on_gpu else ""
    usable = f"{budget.usable_mib:,} usable " + ("as you measured" if budget.measured_mib else system + desktop)
    batches = f"{shape.accumulate_grad_batches} x {shape.batch_size} x {shape.block_size:,} = {tokens:,} tokens a step"
    return [
        f"{title}: {plan.parameters / 1e6:,.0f}M parameters, {shape.precision}, {batches}",
        f"{budget.gpu.name}: {budget.gpu.vram_mib:,} MiB, {usable}",
    ]


def _verdict(plan: Plan) -> list[str]:
    own, cheapest = plan.own, plan.cheapest
    needs = f"needs {own.footprint.reserved_mib:,.0f} of {plan.budget.usable_mib:,} MiB"
    if own.fits and (cheapest is own or cheapest is None):
        return [f"FITS: {needs}.", _time(plan, own)]
    if own.fits:
        assert cheapest is not None
        return [
            f"FITS: {needs}.",
            _time(plan, own),
            f"Cheaper in time, and fitting too ({cheapest.footprint.reserved_mib:,.0f} MiB): {cheapest.rung.name}.",
        ]
    if cheapest is None:
        least = min(plan.ladder, key=lambda planned: planned.footprint.reserved_mib)
        return [
            f"DOES NOT FIT: {needs}, and no rung below fits; the least is {least.footprint.reserved_mib:,.0f} MiB.",
            "Take a smaller network or a shorter data.block_size; --largest says which.",
        ]
    return [
        f"DOES NOT FIT: {needs}. Put this into the YAML:",
        "",
        *(f"    {line}" for line in cheapest.yaml),
        "",
        f"It then needs {cheapest.footprint.reserved_mib:,.0f} MiB. " + _time(plan, cheapest),
    ]


def _time(plan: Plan, planned: PlannedRung) -> str:
    tokens = plan.shape.batch_size * plan.shape.block_size * plan.shape.accumulate_grad_batches
    shortest_s, longest_s = planned.footprint.step_s, planned.footprint.longest_step_s
    peaks = "its peaks" if shortest_s == longest_s else "its peaks, from the highest power limit to the lowest"
    return (
        f"About {_range(_duration, shortest_s, longest_s)} per step "
        f"({_range(lambda s: f'{tokens / s:,.0f}', shortest_s, longest_s)} tokens/s), "
        f"{_range(_duration, shortest_s * plan.max_steps, longest_s * plan.max_steps)} for {plan.max_steps:,} steps: "
        f"an estimate from {peaks}, until its first steps say better."
    )


def _range(text: Callable[[float], str], first: float, last: float) -> str:
    """Both as text, or one where they read the same."""
    return " to ".join(dict.fromkeys([text(first), text(last)]))


def _duration(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"


def _categories(plan: Plan) -> list[str]:
    own = plan.own.footprint
    sizes = {name: size for name, size in own.categories_mib.items() if size >= 0.5}
    sizes |= {"not allocated": own.reserved_mib - own.allocated_mib}
    longest = max(sizes.values())
    lines = [f"where it goes, MiB at the fullest moment (in {own.fullest_phase})"]
    for name, size in sizes.items():
        lines.append(f"  {name:<14}{size:>8,.0f}  {'#' * round(size / longest * BAR)}")
    lines.append(f"  {'reserved':<14}{own.reserved_mib:>8,.0f}")
    phases = ", ".join(f"{name} {size:,.0f}" for name, size in own.phases_mib.items() if name != "setup")
    return [*lines, f"  by phase: {phases}"]


def _ladder(plan: Plan) -> list[str]:
    lines = [
        "ways to need less, each with those above it        MiB     time  bits     host MiB",
    ]
    for planned in plan.ladder:
        mark = "->" if planned is plan.cheapest else "  "
        name = planned.rung.name + (" (yours)" if planned is plan.own else "")
        bits = "same" if planned.same_bits else "numerics" if planned.changes_numerics else "rounding"
        fits = "fits" if planned.fits else ""
        lines.append(
            f"{mark} {name:<45}{planned.footprint.reserved_mib:>8,.0f}  x{planned.slowdown:5.2f}  {bits:<9}"
            f"{planned.footprint.host_memory_mib:>8,.0f}  {fits}".rstrip()
        )
    if plan.cheapest is not None:
        lines.append("-> is the quickest that fits. time: against the first line. bits: of the trained weights.")
    return lines


def _notes(plan: Plan) -> list[str]:
    saved = plan.own.footprint.reserved_mib - plan.own.footprint.expandable_reserved_mib
    notes = ["MiB is what PyTorch reserves: allocations, rounded, and the gaps between them."]
    if plan.own.changes_numerics:
        notes.append("numerics: model.optim.state_bits=8 rounds AdamW's moments, and trains to other weights.")
    extra_mib, slowdown = plan.price_of_determinism
    notes.append(
        f"trainer.deterministic=true, with which a run repeats to the bit, takes {extra_mib:,.0f} MiB more and "
        f"x{slowdown:.2f} of the time{' (counted above)' if plan.shape.deterministic else ''}."
    )
    if abs(saved) >= 16 and plan.budget.system != "windows":
        effect = f"closes gaps: {saved:,.0f} MiB less" if saved > 0 else f"needs {-saved:,.0f} MiB more"
        notes.append(f"Under Linux, PYTORCH_ALLOC_CONF=expandable_segments:True {effect} for yours.")
    if (locked_mib := plan.own.footprint.page_locked_mib) >= LOCKED_BY_ALL_MIB and plan.budget.system != "linux":
        notes.append(
            f"{locked_mib:,.0f} MiB of host memory are page-locked. Windows and WSL2 lock about half of theirs: with "
            f"less than {2 * locked_mib / 1024:,.0f} GiB the rest is copied more slowly."
        )
    return notes


def report_largest(found: list[dict[str, Any]], plan: Plan) -> str:
    """found: what `planning.largest_that_fits` answers"""
    usable = plan.budget.usable_mib
    lines = [f"the largest that fits {usable:,} MiB"]
    for of_rung in found:
        setting = "with these lines in the YAML, all techniques" if of_rung["yaml"] else "as configured"
        lines += ["", f"{setting}:", *(f"    {line}" for line in of_rung["yaml"]), *_largest_of(of_rung, plan)]
    return "\n".join(lines)


def _largest_of(found: dict[str, Any], plan: Plan) -> list[str]:
    batch_size, block_size, name = found["batch_size"], found["block_size"], found["network"]
    sizes = ", ".join(f"{key}: {value}" for key, value in (found["gpt"] or {}).items())
    return [
        f"  batch    data.batch_size: {batch_size or 'not even 1'}, at {plan.shape.block_size:,} tokens each",
        f"  block    data.block_size: {f'{block_size:,}' if block_size else 'not even 64'}, at batch_size 1",
        f"  network  {f'{name} ({sizes}), at batch_size 1' if name else 'not even GPT-2 small'}",
    ]
