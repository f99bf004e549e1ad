"""The plan as a student reads it: does it fit, what to do, where the memory goes, what else there is; and a picture."""

from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from nanogpt_lit.errors import UserError
from nanogpt_lit.plan.allocator import MIB
from nanogpt_lit.plan.plan import Plan, PlannedRung
from nanogpt_lit.plan.trace import CATEGORIES, Moment

BAR = 40
LOCKED_BY_ALL_MIB = 2048
"""Half of what the smallest machines have that train with a GPU."""
COLOURS = {
    "weights": "#33548f", "gradients": "#6c8ebf", "optimizer": "#a9c0e0", "activations": "#e08f3e",
    "logits": "#c0392b", "casts": "#e5c07b", "temporaries": "#8e9aa6", "workspace": "#c9ced6", "batch": "#555555",
    "communication": "#5f9e6e",
}  # fmt: skip
COLUMNS = 800
"""Moments to draw; a step has thousands of operations."""


def report(plan: Plan, title: str) -> str:
    """The plan in lines for a terminal. title: what was planned, such as the name of the YAML"""
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
    if shape.devices > 1:
        batches += f" of each of {shape.devices} devices, {shape.strategy}"
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
    if plan.shape.devices > 1:
        return f"Computation alone takes {_range(_duration, shortest_s, longest_s)} per step; see below for the rest."
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
    for planned in worth_showing(plan):
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


def worth_showing(plan: Plan) -> list[PlannedRung]:
    """The rungs that need less than all above them, and the YAML's own: the others cost time and save nothing."""
    shown: list[PlannedRung] = []
    for planned in plan.ladder:
        less = all(planned.footprint.reserved_mib < above.footprint.reserved_mib for above in shown)
        if less or planned is plan.own or planned is plan.cheapest:
            shown.append(planned)
    return shown


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
    """The largest that fit, in lines for a terminal. found: what `largest_that_fits` returns"""
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
        f"  block    data.block_size: {block_size or 'not even 64'}, at batch_size 1",
        f"  network  {f'{name} ({sizes}), at batch_size 1' if name else 'not even GPT-2 small'}",
    ]


# One optimizer step as a picture: memory by category, operation by operation.


def check_picture(path: Path) -> None:
    """Raises UserError where write_picture could not write to path."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"--picture={path} must end in .svg or .png.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f'--picture={path} needs matplotlib; pip install "nanogpt_lit[plot]".') from error


def write_picture(plan: Plan, title: str, path: Path) -> None:
    """Draw the memory of one optimizer step. Raises ImportError without matplotlib: see check_picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    moments = _fullest_of_each(plan.own.footprint.timeline, COLUMNS)
    usable, reserved = plan.budget.usable_mib, plan.own.footprint.reserved_mib
    top_mib = 1.08 * max(usable, reserved)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots()
    sizes = {name: [moment.bytes_by_category.get(name, 0) / MIB for moment in moments] for name in CATEGORIES}
    shown = [name for name in CATEGORIES if max(sizes[name]) >= 0.002 * top_mib]
    axes.stackplot(
        range(len(moments)),
        *(sizes[name] for name in shown),
        labels=shown,
        colors=[COLOURS[name] for name in shown],
        linewidth=0,
    )
    for mib, label, colour in ((usable, "usable", "#1e8449"), (reserved, "reserved", "#c0392b")):
        axes.axhline(mib, color=colour, linestyle="--", linewidth=1.2, label=f"{label}, {mib:,.0f} MiB")
    start = 0
    for phase, run in groupby(moments, key=lambda moment: moment.phase):
        axes.axvline(start, color="#999999", linewidth=0.7)
        axes.text(start, -0.02, f" {phase}", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
        start += len(list(run))
    axes.set(xlim=(0, max(1, len(moments) - 1)), ylim=(0, top_mib), xticks=[], ylabel="MiB")
    axes.set_xlabel("the operations of one optimizer step, in their order", labelpad=16, fontsize=9)
    axes.set_title(f"{title}: planned device memory during one optimizer step", fontsize=11)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right center", frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Words stay words, and the same plan gives the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "plan"}):
        figure.savefig(path, dpi=120, metadata={"Date": None} if path.suffix == ".svg" else None)


def _fullest_of_each(timeline: tuple[Moment, ...], columns: int) -> list[Moment]:
    """No more moments than there are columns, and no peak lost."""
    size = -(-len(timeline) // columns)
    return [max(timeline[i : i + size], key=lambda moment: moment.bytes) for i in range(0, len(timeline), size)]
