"""The comparison as one HTML file that needs nothing else: a verdict, the curves, a table and what its words mean."""

import io
import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from nanogpt_lit.parity.grid import FRAMEWORKS, MEMORY_MEASURED, Outcome, Point
from nanogpt_lit.parity.record import FINAL, Curves, Difference

COLUMNS = {
    "precision": "Lightning's names; accelerate's are no, bf16 and fp16. overflow: fp16 whose loss scale starts so "
    "high that steps are skipped, and grows again later.",
    "accumulate": "Micro-batches per optimizer step: accumulate_grad_batches, gradient_accumulation_steps.",
    "clip": "Gradients clipped by their global norm: gradient_clip_val, accelerator.clip_grad_norm_.",
    "dropout": "Its probability: with it, random states are compared too.",
    "optimizer": "The implementation of torch's AdamW.",
    "ragged": "The training loader ends inside an accumulation window, and starts again.",
    "processes": "Two train together under DistributedDataParallel (gloo), each with its share of the batches; fsdp2: "
    "each with its share of the weights, too.",
    "skipped": "Optimizer steps that the loss scaler skipped because gradients overflowed.",
    "compared": "Quantities compared bit for bit, over all processes.",
}

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:1180px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px}td,th{padding:3px 10px;border-bottom:1px solid #ddd;text-align:left}"
    "dt{font-weight:600;float:left;clear:left;width:7em}dd{margin-left:7.5em}.differs{color:#c00;font-weight:600}"
    "svg{max-width:100%;height:auto}"
)


STYLES = {
    "reference": ("plain PyTorch", "#c9c9c9", 7.0),
    "lightning": ("Lightning", "#792ee5", 3.5),
    "accelerate": ("accelerate", "#ffb000", 1.2),
}
"""Name, colour and width of each loop's line, the widest first: lines that lie over each other stay visible."""
PANELS_A_ROW = 4


def page(report: Mapping[str, Any], outcomes: Sequence[tuple[Point, Outcome]]) -> str:
    """The whole page. report: the content of report.json"""
    parts = comparison(report, outcomes) if outcomes else explanation(report["explained"])
    return (
        '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8"><title>Parity of the loops</title>'
        f"<style>{STYLE}</style>\n"
        + "\n".join(parts)
        + f"\n<h2>How it was run</h2><p>{escape(report['hardware'])}.</p><p>{escape(report['compared'])}</p></html>\n"
    )


def comparison(report: Mapping[str, Any], outcomes: Sequence[tuple[Point, Outcome]]) -> Iterable[str]:
    differing = sum(not outcome.identical for _, outcome in outcomes)
    verdict = "all identical" if not differing else f"{differing} differ"
    yield f"<h1>Lightning, accelerate and plain PyTorch: {len(outcomes)} cases, {verdict}</h1>"
    yield (
        "<p>Each case trains the same module from the same weights, on the same batches, in three loops: Lightning's "
        "Trainer, raw accelerate, and a loop of plain PyTorch. Identical means the same bits, not close: the loss of "
        "every micro-batch, the gradient norm, learning rate and loss scale of every step, every validation loss, and "
        "at the end every parameter, the states of optimizer, schedule and scaler, and the random state.</p>"
    )
    if (drawn := picture(outcomes)) is not None:
        yield "<h2>The training loss of each case</h2>"
        yield "<p>Dots are validation losses. A line that hides another lies on it; "
        yield f"a red line is the first step where a loop differs from plain PyTorch.</p>{drawn[drawn.index('<svg') :]}"
    yield "<h2>The cases</h2>"
    heads = [*outcomes[0][0], "skipped", "compared", *FRAMEWORKS]
    rows = [
        [*point.values(), outcome.skipped_steps, f"{outcome.quantities:,}"]
        + [outcome.differences[name] for name in FRAMEWORKS]
        for point, outcome in outcomes
    ]
    yield table(heads, rows)
    yield "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(meaning)}</dd>" for name, meaning in COLUMNS.items()) + "</dl>"
    yield "<h2>What each loop costs</h2>"
    yield from costs(report)


def costs(report: Mapping[str, Any]) -> Iterable[str]:
    times, memory = report["time_per_step_against_reference"], report["peak_memory_growth_mib"]
    rows = [["plain PyTorch", "1", f"{memory['reference']:.0f} MiB" if memory else "not measured"]]
    for name in FRAMEWORKS:
        low, middle, high = times[name]
        rows.append(
            [name, f"{middle:.2f} ({low:.2f} to {high:.2f})", f"{memory[name]:.0f} MiB" if memory else "not measured"]
        )
    yield table(["loop", "time per step", "peak memory"], rows)
    yield (
        "<p>Time: the ratio to plain PyTorch in the same case, its median over the cases and in brackets its "
        "quartiles; recording is in it, the same in each loop. The networks compared are small, so that this is mostly "
        f"what a framework spends per step, not what it adds to a real run. Memory: {escape(MEMORY_MEASURED)}</p>"
    )


def explanation(rows: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    yield "<h1>What differs between the frameworks by default</h1>"
    yield (
        "<p>Each row brings one known difference back, in one loop, and compares that loop with plain PyTorch: what "
        "shows is what a user of that framework gets by default.</p>"
    )
    yield table(
        ["difference", "what happens", "loop", "what shows"],
        [[row["difference"], row["what_happens"], row["loop"], row["seen"]] for row in rows],
    )


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


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def cell(value: Any) -> str:
        if value is None:
            return "<td>identical</td>"
        return f"<td{' class=differs' if isinstance(value, Difference) else ''}>{escape(str(value))}</td>"

    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows) + "</table>"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
