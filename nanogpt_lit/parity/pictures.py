"""The training curves of all loops over each other, a panel a case."""

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[int, float]]

STYLES = {
    "reference": ("plain PyTorch", "#c9c9c9", 7.0),
    "lightning": ("Lightning", "#792ee5", 3.5),
    "accelerate": ("accelerate", "#ffb000", 1.2),
}
"""Name, colour and width of each loop's line, the widest first: lines that lie over each other stay visible."""
COLUMNS = 4


@dataclass(frozen=True)
class Panel:
    caption: str
    lines: Mapping[str, Points]
    """Training loss of each loop."""
    dots: Mapping[str, Points]
    """Validation loss of each loop."""
    parted_at: int | None = None
    """The step where a loop first differs from plain PyTorch."""


def sheet(panels: Sequence[Panel]) -> str | None:
    """One SVG; None without matplotlib, which is an extra."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return None
    rows = math.ceil(len(panels) / COLUMNS)
    figure = Figure(figsize=(3 * COLUMNS, 0.5 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for k, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False)):
        axes.set_gid(f"case_{k + 1}")
        for loop, (name, colour, width) in STYLES.items():
            (line,) = axes.plot(*_columns(panel.lines.get(loop, ())), color=colour, linewidth=width, label=name)
            line.set_gid(f"case_{k + 1}_{loop}")
            axes.plot(*_columns(panel.dots.get(loop, ())), "o", color=colour, markersize=1.5 + width)
        if panel.parted_at is not None:
            axes.axvline(panel.parted_at, color="#dd0000", linestyle="--", gid=f"case_{k + 1}_parted")
        axes.set_title("\n".join(textwrap.wrap(panel.caption, 38)), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step", fontsize=7)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False, fontsize=8)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "parity"}):
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def _columns(points: Points) -> tuple[list[int], list[float]]:
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in finite], [y for _, y in finite]
