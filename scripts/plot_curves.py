"""Draws the curves of one or more runs from their TensorBoard files: the README's picture.

python scripts/plot_curves.py runs/quickstart/version_0 --out docs/quickstart.png
"""

import argparse
from pathlib import Path

from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = (
    ("loss (nats per token)", ("train/loss", "val/loss")),
    ("learning rate", ("train/lr",)),
    ("gradient norm before clipping", ("train/grad_norm",)),
    ("tokens per second", ("throughput/tokens_per_s",)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with TensorBoard event files")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the picture to write (curves.png)")
    args = parser.parse_args()
    curves = {run: read_curves(run) for run in args.runs}
    draw(curves).savefig(args.out, dpi=110)
    print(args.out)


def read_curves(run: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Tag to (steps, values)."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if not tags:
        raise SystemExit(f"error: there are no TensorBoard curves in {run}; give the folder that fit names as its run.")
    return {tag: ([e.step for e in events.Scalars(tag)], [e.value for e in events.Scalars(tag)]) for tag in tags}


def draw(curves: dict[Path, dict[str, tuple[list[int], list[float]]]]) -> Figure:
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axes, (title, tags) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        for run, of_run in curves.items():
            for tag in tags:
                if tag in of_run:
                    label = tag if len(curves) == 1 else f"{run.name} {tag}"
                    axes.plot(*of_run[tag], label=label, marker="o" if tag == "val/loss" else None, markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.grid(alpha=0.3)
        if len(tags) > 1 or len(curves) > 1:
            axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
