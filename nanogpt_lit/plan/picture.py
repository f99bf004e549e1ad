"""One optimizer step as a picture: memory by category, operation by operation."""

from itertools import groupby
from pathlib import Path

from nanogpt_lit.errors import UserError
from nanogpt_lit.plan.allocator import MIB
from nanogpt_lit.plan.plan import Plan
from nanogpt_lit.plan.trace import CATEGORIES, Moment

COLOURS = {
    "weights": "#33548f", "gradients": "#6c8ebf", "optimizer": "#a9c0e0", "activations": "#e08f3e",
    "logits": "#c0392b", "casts": "#e5c07b", "temporaries": "#8e9aa6", "workspace": "#c9ced6", "batch": "#555555",
}  # fmt: skip
COLUMNS = 800
"""Moments to draw; a step has thousands of operations."""


def check_picture(path: Path) -> None:
    """Raises UserError where write_picture could not write to path."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"--picture={path} must end in .svg or .png.")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError(f'--picture={path} needs matplotlib; pip install "nanogpt_lit[plot]".') from error


def write_picture(plan: Plan, title: str, path: Path) -> None:
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
    axes.set_title(f"{title}: device memory during one optimizer step", fontsize=11)
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
