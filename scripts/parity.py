"""Lightning, accelerate and plain PyTorch on the same module: are they the same bits?

    python scripts/parity.py --config configs/parity.yaml
    python scripts/parity.py --config configs/parity.yaml --all --precision bf16-mixed --steps 20
    python scripts/parity.py --config configs/parity.yaml --explain

Runs a grid of cases in each of the three loops, on the processor, and compares the loss of every micro-batch, the
gradient norm, learning rate and loss scale of every step, the validation losses, and at the end every parameter, the
states of optimizer, schedule and scaler, and the random state: bit for bit. The network, its optimizer and the text are
the YAML's; every option of fit works here too. The exit code is 0 only when every case is identical.
float16 is slow on processors: for a network of millions add --steps 6 --data.batch_size 2 --data.block_size 64.
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from nanogpt_lit.__main__ import exit_code
from nanogpt_lit.cli import ConfigOnlyCLI, quiet_lightning
from nanogpt_lit.data.datamodule import TokenDataModule
from nanogpt_lit.loops.contract import LoopSettings
from nanogpt_lit.loops.machine import hardware
from nanogpt_lit.optim.schedule import ScheduleConfig
from nanogpt_lit.parity.grid import AXES, Point, case_of, every_combination, every_pair, skipped_steps
from nanogpt_lit.parity.record import Difference, compare
from nanogpt_lit.parity.runs import LOOPS, Case, Run
from nanogpt_lit.parity.settled import SETTLED

FRAMEWORKS = ("lightning", "accelerate")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for axis, values in AXES.items():
        kind = type(values[0])
        parser.add_argument(f"--{axis}", nargs="+", type=kind, choices=values, default=values, help="only these")
    parser.add_argument("--all", action="store_true", help="every combination, not only enough to have every pair")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each run (8)")
    parser.add_argument("--explain", action="store_true", help="turn each settled difference off: what drifts?")
    parser.add_argument("--out", type=Path, help="the report to write (report.json in trainer.default_root_dir)")
    options, of_the_yaml = parser.parse_known_args(arguments)

    quiet()
    cli = ConfigOnlyCLI(args=of_the_yaml, run=False)
    base, clip, data = from_yaml(cli, options.steps)
    report: dict[str, Any] = {"hardware": hardware("lightning", "accelerate"), "steps": options.steps}
    if options.explain:
        report["explained"] = explain(base, data)
        identical = all(row["drift"] is not None for row in report["explained"])
    else:
        axes = {axis: tuple(getattr(options, axis)) for axis in AXES}
        points = every_combination(axes) if options.all else every_pair(axes)
        report |= compare_all(points, base, clip, data)
        identical = report["identical"]
    out = options.out or Path(cli.settings.trainer.default_root_dir) / "report.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{out}\n{report['hardware']}")
    return 0 if identical else 1


def from_yaml(cli: ConfigOnlyCLI, steps: int) -> tuple[Case, float, TokenDataModule]:
    """The case that the grid varies, the limit of clipping, and the data."""
    cli.settings.trainer.precision = "32-true"  # the grid chooses
    cli.complete_settings()
    module, data = cli.build()
    data.setup()
    schedule = asdict(module.schedule_config) | {"total_steps": steps}
    schedule["warmup_steps"] = min(schedule["warmup_steps"], steps // 4)
    settings = LoopSettings(steps, val_check_interval=2, limit_val_batches=2, seed=cli.seed or 0)
    case = Case(settings, module.gpt.config, module.optim_config, ScheduleConfig(**schedule))
    return case, cli.settings.trainer.gradient_clip_val or 1.0, data


def compare_all(points: list[Point], base: Case, clip: float, data: TokenDataModule) -> dict[str, Any]:
    """Prints a row for each case; what report.json says of them."""
    widths = {axis: max(len(axis), *(len(str(point[axis])) for point in points)) for axis in AXES}
    heads = [f"{axis:<{width}}" for axis, width in widths.items()]
    print("  ".join([*heads, "skipped", f"{'lightning':<28}", "accelerate"]))
    for run in LOOPS.values():  # what happens once only is not counted
        run(case_of(points[0], base, clip), data)
    rows, ratios = [], {name: [] for name in FRAMEWORKS}  # type: ignore[var-annotated]
    for k, point in enumerate(points):
        case = case_of(point, base, clip)
        names = list(LOOPS)
        names = names[k % 3 :] + names[: k % 3]  # each is as often the first
        runs: dict[str, Run] = {name: LOOPS[name](case, data) for name in names}
        reference = runs["reference"]
        differences = {name: compare(reference.entries, runs[name].entries) for name in FRAMEWORKS}
        skipped = skipped_steps(reference.entries)
        for name in FRAMEWORKS:
            ratios[name].append(runs[name].seconds_per_step / reference.seconds_per_step)
        cells = [f"{point[axis]!s:<{width}}" for axis, width in widths.items()]
        verdicts = [verdict(differences[name]) for name in FRAMEWORKS]
        print("  ".join([*cells, f"{skipped:>7}", f"{verdicts[0]:<28}", verdicts[1]]), flush=True)
        rows.append(
            point
            | {"skipped_steps": skipped, "quantities": len(reference.entries)}
            | {name: as_json(differences[name]) for name in FRAMEWORKS}
            | {"seconds_per_step": {name: run.seconds_per_step for name, run in runs.items()}}
        )
    differing = sum(any(row[name] is not None for name in FRAMEWORKS) for row in rows)
    ratio = {name: median(ratios[name]) for name in FRAMEWORKS}
    quantities = sum(row["quantities"] for row in rows)
    print(
        f"\n{len(rows)} cases, {quantities:,} quantities in each loop: "
        + ("all identical" if not differing else f"{differing} cases differ")
        + "\ntime per step against plain PyTorch, median of paired ratios: "
        + ", ".join(f"{name} {value:.2f}" for name, value in ratio.items())
    )
    return {"identical": not differing, "time_per_step_against_reference": ratio, "cases": rows}


def explain(base: Case, data: TokenDataModule) -> list[dict[str, Any]]:
    """Prints what drifts when a settled difference is turned off."""
    rows = []
    for settled in SETTLED:
        drift = settled.drift(base, data)
        print(
            f"{settled.name}\n  {settled.breaks}\n  {settled.loop} without it: {drift or 'no drift here'}", flush=True
        )
        rows.append(
            {
                "difference": settled.name,
                "breaks": settled.breaks,
                "loop": settled.loop,
                "drift": as_json(drift) if isinstance(drift, Difference) else drift,
            }
        )
    return rows


def verdict(difference: Difference | None) -> str:
    return "identical" if difference is None else str(difference)


def as_json(difference: Difference | None) -> dict[str, Any] | None:
    return None if difference is None else asdict(difference)


def quiet() -> None:
    quiet_lightning()
    warnings.filterwarnings("ignore")
    logging.getLogger("accelerate").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: main(sys.argv[1:])))
