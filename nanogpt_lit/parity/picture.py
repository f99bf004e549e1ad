"""The training and validation losses of every case, in all three loops, as one picture."""

import io
import math
import textwrap
from collections.abc import Sequence

from nanogpt_lit.parity.grid import Outcome, Point
from nanogpt_lit.parity.record import FINAL, Curves

STYLES = {
    "reference": ("plain PyTorch", "#c9c9c9", 7.0),
    "lightning": ("Lightning", "#792ee5", 3.5),
    "accelerate": ("accelerate", "#ffb000", 1.2),
}
"""Name, colour and width of each loop's line, the widest first: lines that lie over each other stay visible."""
PANELS_A_ROW = 4


def picture(outcomes: Sequence[tuple[Point, Outcome]]) -> str | None:
    """The curves of every case as one SVG; None without matplotlib, which is an extra."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        return None
    rows = math.ceil(len(outcomes) / PANELS_A_ROW)
    figure = Figure(figsize=(3 * PANELS_A_ROW, 0.5 + 2.3 * rows), layout="constrained")
    grid = figure.subplots(rows, PANELS_A_ROW, squeeze=False)
    for k, (axes, (point, outcome)) in enumerate(zip(grid.flat, outcomes, strict=False), start=1):
        axes.set_gid(f"case_{k}")
        for loop, (name, colour, width) in STYLES.items():
            curves = outcome.curves[loop]
            (line,) = axes.plot(*columns(curves, "train/loss"), color=colour, linewidth=width, label=name)
            line.set_gid(f"case_{k}_{loop}")
            axes.plot(*columns(curves, "val/loss"), "o", color=colour, markersize=1.5 + width)
        last = outcome.curves["reference"][-1][0]
        found = [difference.when for difference in outcome.differences.values() if difference is not None]
        if steps := [last if when == FINAL else int(when.removeprefix("step ")) for when in found]:
            axes.axvline(min(steps), color="#dd0000", linestyle="--", gid=f"case_{k}_parted")
        axes.set_title("\n".join(textwrap.wrap(named(point), 38)), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid.flat[len(outcomes) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step", fontsize=7)
    for axes in grid[:, 0]:
        axes.set_ylabel("loss", fontsize=7)
    figure.suptitle("The same run in three loops: lines that lie over each other are the same losses", fontsize=10)
    of_loops, names = grid[0, 0].get_legend_handles_labels()
    what = [Line2D([], [], color="#555555"), Line2D([], [], color="#555555", marker="o", markersize=4, linestyle="")]
    labels = [*names, "line: training loss", "dot: validation loss"]
    figure.legend([*of_loops, *what], labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "parity"}):
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()


def columns(curves: Curves, tag: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one curve."""
    points = [(step, values[tag]) for step, values in curves if math.isfinite(values.get(tag, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def named(point: Point) -> str:
    words = [str(point["precision"]), f"accumulate {point['accumulate']}", f"clip {point['clip']}"]
    words += [f"dropout {point['dropout']}", str(point["optimizer"])]
    words += ["ragged"] if point["ragged"] == "yes" else []
    words += [f"{point['processes']} processes"] if point["processes"] != "1" else []
    return ", ".join(words)
