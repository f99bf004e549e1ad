"""How the cost of a step grows: with the network, the block, the batch and the data. bench.py --scaling runs it."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

GROWTH: dict[str, dict[str, tuple[int, ...]]] = {
    "network": {"n_embd": (64, 128, 256, 512)},
    "block": {"block_size": (32, 128, 512)},
    "batch": {"batch_size": (1, 4, 16)},
}
TOKENS = (10_000, 1_000_000, 30_000_000)
"""Of the data: a step reads its windows out of a memory map, so that this should cost nothing."""


def measure_scaling(args: argparse.Namespace, shape: Any, measure: Callable[..., Any], flops: Any) -> dict[str, Any]:
    """Points of each curve: what grows, seconds a step, and seconds of the same arithmetic as matrix products."""
    curves: dict[str, list[dict[str, float]]] = {}

    @cache  # all curves pass through one point
    def at(shape: Any, tokens: int) -> dict[str, float]:
        return point(measure(args, shape, ["plain"], "32-true", tokens), *flops(shape))

    for name, ((field, sizes),) in ((name, growth.items()) for name, growth in GROWTH.items()):
        curves[name] = [{"size": size} | at(replace(shape, **{field: size}), 1_000_000) for size in sizes]
    curves["data"] = [{"size": tokens} | at(shape, tokens) for tokens in TOKENS]
    for name, points in curves.items():
        print(f"\n{name:<12}{'ms/step':>10}{'matmul ms':>11}{'utilisation':>13}")
        for p in points:
            print(f"{p['size']:<12,}{1e3 * p['s']:>10.2f}{1e3 * p['matmul_s']:>11.2f}{p['matmul_s'] / p['s']:>13.0%}")
    if args.picture:
        draw(curves, args.picture)
    return {"shape": vars(shape), "curves": curves}


def point(turns: dict[str, Any], of_step: float, of_matmul: float) -> dict[str, float]:
    # Paired, as everywhere: the rate of the moment in which the step was taken.
    ratio = median(m / s for m, s in zip(turns["matmul"].seconds, turns["plain"].seconds, strict=True))
    seconds = median(turns["plain"].seconds)
    return {"flops": of_step, "s": seconds, "matmul_s": seconds * ratio * of_step / of_matmul}


LABELS = {
    "network": "channels of the network",
    "block": "tokens per sequence",
    "batch": "sequences per batch",
    "data": "tokens of the data",
}


def draw(curves: dict[str, list[dict[str, float]]], path: Path) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(3.2 * len(curves), 3.4), layout="constrained")
    short = EngFormatter(sep="")  # 30,000,000 would lie over its neighbour
    for axis, (name, points) in zip(figure.subplots(1, len(curves), sharey=True), curves.items(), strict=True):
        sizes = [p["size"] for p in points]
        axis.loglog(sizes, [p["s"] for p in points], "o-", label="a step, measured")
        axis.loglog(
            sizes,
            [p["matmul_s"] for p in points],
            "--",
            color="gray",
            label="its arithmetic at the rate of large products",
        )
        axis.set_xticks(sizes, [short(size) if size >= 10_000 else f"{size}" for size in sizes])
        axis.minorticks_off()
        axis.set_xlabel(LABELS[name])
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds per optimizer step")
    figure.suptitle("How the cost of a step grows with one size, the others as they are", fontsize=11)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "scaling"}):
        figure.savefig(path, metadata={"Date": None})
