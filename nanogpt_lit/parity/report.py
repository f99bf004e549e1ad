"""The outcome of a comparison: the verdict in the terminal, and what is left in the folder of its report."""

import io
import json
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import quantiles
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from nanogpt_lit.parity.grid import FRAMEWORKS, Outcome, Point
from nanogpt_lit.parity.record import FINAL, Curves, Difference
from nanogpt_lit.parity.runs import LOOPS


def summary(outcomes: list[tuple[Point, Outcome]], memory: dict[str, float] | None) -> dict[str, Any]:
    """Prints the verdict and the costs; what report.json says."""
    differing = sum(not outcome.identical for _, outcome in outcomes)
    quantities = sum(outcome.quantities for _, outcome in outcomes)
    verdict = "all identical" if not differing else f"{differing} cases differ"
    print(f"\n{len(outcomes)} cases, {quantities:,} quantities in each loop: {verdict}")
    ratios = {}
    for name in FRAMEWORKS:
        of_cases = [o.seconds_per_step[name] / o.seconds_per_step["reference"] for _, o in outcomes]
        ratios[name] = quantiles(of_cases, n=4) if len(of_cases) > 1 else of_cases * 3
    middles = ", ".join(f"{name} {ratio[1]:.2f}" for name, ratio in ratios.items())
    print(f"time per step against plain PyTorch, median of {len(outcomes)} paired ratios: {middles}")
    if memory is not None:
        grown = ", ".join(f"{name} {memory[name]:.0f} MiB" for name in LOOPS)
        print(f"peak memory that a run adds to a process of its own: {grown}")
    rows = [
        point
        | {"skipped_steps": outcome.skipped_steps, "quantities": outcome.quantities}
        | {name: as_json(outcome.differences[name]) for name in FRAMEWORKS}
        | {"seconds_per_step": outcome.seconds_per_step}
        for point, outcome in outcomes
    ]
    return {
        "identical": not differing,
        "time_per_step_against_reference": ratios,
        "peak_memory_growth_mib": memory,
        "cases": rows,
    }


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def as_json(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else asdict(difference)


def write(out: Path, report: dict[str, Any], outcomes: list[tuple[Point, Outcome]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if outcomes:
        if (drawn := picture(outcomes)) is None:
            print('no curves.svg: matplotlib is missing (pip install "nanogpt_lit[plot]")')
        else:
            (out / "curves.svg").write_text(drawn, encoding="utf-8")
    for k, (_, outcome) in enumerate(outcomes, start=1):
        for loop, curves in outcome.curves.items():
            with SummaryWriter(str(out / f"case_{k:02}" / loop)) as writer:
                for step, values in curves:
                    for tag, value in values.items():
                        writer.add_scalar(tag, value, step)


# The training and validation losses of every case, in all three loops, as one picture.

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
