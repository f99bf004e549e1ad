"""A search as a picture: loss by learning rate, and the last comparison by seconds."""

import math
from pathlib import Path

from nanogpt_lit.tune.search import UNITS, Decision, Found

COLOURS = ("#33548f", "#e08f3e", "#1e8449")


def draw(found: Found, decision: Decision, path: Path) -> bool:
    """Writes the picture. Whether it could: matplotlib is an extra."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    by_rate, by_time = figure.subplots(1, 2)
    recipes = list(dict.fromkeys(run.candidate.recipe for run in found.runs))
    for recipe, colour in zip(recipes, COLOURS, strict=False):
        for round, style in ((1, "o--"), (2, "s-")):
            ranked = [run for run in found.ranking(round) if run.candidate.recipe == recipe]
            points = sorted((run.candidate.lr, run.loss) for run in ranked)
            if points:
                label = f"{recipe}, {ranked[0].given_s:.3g} s"
                by_rate.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=4)
    for run in found.runs:
        if math.isinf(run.loss):
            by_rate.axvline(run.candidate.lr, color="#c0392b", alpha=0.2)
    by_rate.axvline(found.own.lr, color="#999999", linestyle=":", label="yours")
    by_rate.set(xscale="log", xlabel="learning rate", title="validation loss of short runs; red: diverged")
    final = [run for run in found.runs if run.round == len(UNITS)]
    for run in final:
        is_own = run.candidate == found.own
        window = max(1, len(run.curve) // 50)
        smooth = [sum(run.curve[n : n + window]) / window for n in range(0, len(run.curve) - window + 1, window)]
        seconds = [(n + 1) * window * run.given_s / max(1, run.steps) for n in range(len(smooth))]
        name = "yours" if is_own else str(decision.challenger)
        colour = "#999999" if is_own else "#33548f"
        by_time.plot(
            seconds, smooth, color=colour, alpha=0.6, linewidth=1, label=name if run.seed == final[0].seed else None
        )
        if math.isfinite(run.loss):
            by_time.plot(run.given_s, run.loss, "D", color=colour, markersize=5)
    by_time.set(xlabel="seconds", title="the last comparison: training, and validation (diamonds)")
    for axes in (by_rate, by_time):
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:  # a search that was stopped early has no last comparison
            axes.legend(fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return True
