"""Draws the curves of one or more runs from their TensorBoard files.

With --json it also writes a record of those that a busy machine does not change, and of what the run was told. So the
README's picture is made:

python scripts/plot_curves.py runs/quickstart/version_0 --json docs/quickstart.json --out docs/quickstart.svg
"""

import argparse
import json
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from matplotlib import rc_context
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanogpt_lit.runtime.machine import hardware

PANELS = (
    ("loss (nats per token)", ("train/loss", "val/loss")),
    ("learning rate", ("train/lr",)),
    ("gradient norm before clipping", ("train/grad_norm",)),
    ("tokens per second", ("throughput/tokens_per_s",)),
)
Curves = dict[str, tuple[list[int], list[float]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders with TensorBoard event files")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="the picture to write (curves.png)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write a record of one run, and draw that")
    args = parser.parse_args()
    if args.json is not None and len(args.runs) > 1:
        raise SystemExit(f"error: --json={args.json} holds one run, and {len(args.runs)} are named.")
    curves = {run.name: read_curves(run) for run in args.runs}
    if args.json is not None:
        record = record_of(args.runs[0])
        args.json.write_text(json.dumps(record) + "\n", encoding="utf-8")
        curves = {args.runs[0].name: record["curves"]}
    draw(curves, args.out)
    print(args.out)


def record_of(run: Path) -> dict[str, Any]:
    configuration = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    told = {section: configuration[section] for section in ("seed_everything", "trainer", "model", "data")}
    del (
        told["trainer"]["default_root_dir"],
        told["trainer"]["max_time"],
    )  # of the place and its hours, not of the curves
    steady = {tag: curve for tag, curve in read_curves(run).items() if tag in drawn(PANELS[:3])}
    return {"hardware": hardware("lightning"), "configuration": told, "curves": steady}


def read_curves(run: Path) -> Curves:
    """Tag to (steps, values), of the tags that are drawn."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = events.Tags()["scalars"]
    if not tags:
        raise SystemExit(f"error: there are no TensorBoard curves in {run}; give the folder that fit names as its run.")
    read = {tag: events.Scalars(tag) for tag in tags if tag in drawn(PANELS)}
    return {tag: ([e.step for e in scalars], [e.value for e in scalars]) for tag, scalars in read.items()}


def drawn(panels: tuple[tuple[str, tuple[str, ...]], ...]) -> set[str]:
    return {tag for _, tags in panels for tag in tags}


def draw(curves: dict[str, Curves], path: Path) -> None:
    """curves: of each run by its name; a panel that no run has curves of is left out"""
    panels = [
        (title, tags) for title, tags in PANELS if any(tag in of_run for of_run in curves.values() for tag in tags)
    ]
    rows, columns = (2, 2) if len(panels) == 4 else (1, len(panels))
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    for axes, (title, tags) in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        for run, of_run in curves.items():
            for tag in tags:
                if tag in of_run:
                    label = tag if len(curves) == 1 else f"{run} {tag}"
                    axes.plot(*of_run[tag], label=label, marker="o" if tag == "val/loss" else None, markersize=3)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("optimizer step", fontsize=9)
        axes.grid(alpha=0.3)
        if len(tags) > 1 or len(curves) > 1:
            axes.legend(fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    # Words stay words, and the same curves give the same file.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "curves"}):
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
