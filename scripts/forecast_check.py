"""How near a forecast comes: runs of ten times the work of the largest that it is made from, trained and compared.

    OMP_NUM_THREADS=1 python scripts/forecast_check.py --shakespeare input.txt

Two recipes on two texts. The sizes of the runs follow from their work alone and not from seconds, so that the record
does not depend on the machine's load. A case that the record has is not made again.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch

from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.forecast.law import LEAST_RUNS, Forecast, Law, Point
from nanogpt_lit.forecast.pairs import BEGINS, loss_of_pairs
from nanogpt_lit.forecast.sizes import Sized, SizedRuns, choose

TIMES = 10
SIZES: dict[str, list[dict[str, int]]] = {
    "modern": [
        {"n_layer": 4, "n_head": 4, "n_embd": 64, "steps": 700, "batch_size": 16},
        {"n_layer": 3, "n_head": 3, "n_embd": 48, "steps": 1200, "batch_size": 16},
        {"n_layer": 4, "n_head": 6, "n_embd": 96, "steps": 450, "batch_size": 16},
    ],
    "nanogpt": [{"n_layer": 4, "n_head": 4, "n_embd": 64, "steps": 2000, "batch_size": 12}],
}
TEXTS = {
    "characters": ["--data.tokenizer=char", "--data.val_fraction=0.1"],
    "python": ["--data.source=stdlib", "--data.tokenizer=byte", "--data.val_fraction=0.02"],
}
RECIPES = {
    "nanogpt": ["--model.gpt.bias=false", "--model.optim.lr=3e-3", "--model.optim.beta2=0.99"],
    "modern": [
        "--model.network=llama", "--model.llama.qk_norm=true", "--model.llama.tied_head=false",
        "--model.optim.matrices=muon", "--model.optim.lr=5e-3", "--model.optim.muon_momentum=0.9",
        "--model.optim.beta2=0.99", "--model.schedule.decay=cooldown", "--model.schedule.min_lr_ratio=0",
    ],
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shakespeare", type=Path, required=True, help="char-rnn's input.txt")
    parser.add_argument("--only", nargs="+", help="names of cases")
    parser.add_argument("--work", type=Path, default=Path("runs/forecast_check"), help="where to keep the tokens")
    parser.add_argument("--out", type=Path, default=Path("docs/forecast.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster on more
    quiet_lightning()
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"cases": {}}
    made_with = f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}"
    for n, recipe, text in sorted((n, r, t) for r in RECIPES for n in range(len(SIZES[r])) for t in TEXTS):
        shape = SIZES[recipe][n]
        name = "{}, {}, {n_layer} x {n_embd}".format(recipe, text, **shape)
        if name not in record["cases"] and (not args.only or name in args.only):
            record["cases"][name] = measured(recipe, text, shape, args)
            write(record | {"hardware": made_with}, args.out)
    write(record, args.out)
    print(table(record["cases"]))


def measured(recipe: str, text: str, shape: dict[str, int], args: argparse.Namespace) -> dict[str, Any]:
    """The losses of a forecast's runs and of the run that they are to foretell, and that of a table of pairs."""
    section = "llama" if recipe == "modern" else "gpt"
    options = [*TEXTS[text], *RECIPES[recipe], "--data.block_size=64", f"--data.batch_size={shape['batch_size']}"]
    options += [f"--model.{section}.{key}={value}" for key, value in shape.items() if key.startswith("n_")]
    options += [f"--trainer.max_steps={shape['steps']}", f"--model.schedule.warmup_steps={shape['steps'] // 20}"]
    options += [f"--trainer.default_root_dir={args.work / text}", "--trainer.limit_val_batches=40"]
    options += [f"--data.source={args.shakespeare}"] if text == "characters" else []
    cli = SettingsCLI(args=options)
    cli.complete_settings()
    runs = SizedRuns(cli.settings, cli.device, time.perf_counter)
    made = []
    for n, run in enumerate([*choose(runs.own, lambda run: run.flops, math.inf, TIMES), runs.own]):
        result = runs.run(run, run.steps, runs.data.seed + n, runs.val_batches)
        assert result is not None, "a run that nobody stops"
        made.append(row(run, result[0]))
        print(recipe, text, made[-1], flush=True)
    pairs = loss_of_pairs(runs.data.folder, runs.data.vocab_size)
    return {"pairs": round(pairs, 4), "runs": made[:-1], "own": made[-1]}


def row(run: Sized, loss: float) -> dict[str, Any]:
    return {"run": str(run), "parameters": run.parameters, "tokens": run.tokens, "flops": run.flops,
            "loss": round(loss, 5)}  # fmt: skip


def write(record: dict[str, Any], out: Path) -> None:
    """Write the record, with what a forecast says of its losses today."""
    for case in record["cases"].values():
        forecast = said(case)
        case["forecast"] = forecast and [round(value, 4) for value in (forecast.loss, forecast.low, forecast.high)]
    out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def said(case: dict[str, Any]) -> Forecast | None:
    """What `forecast` says of a case today; None where it cannot know."""
    own, begins = case["own"], BEGINS * case["pairs"]
    points = [Point(run["parameters"], run["tokens"], run["loss"]) for run in case["runs"] if run["loss"] < begins]
    if len(points) < LEAST_RUNS:
        return None
    return Law(points, own["parameters"], own["tokens"]).forecast(own["parameters"], own["tokens"])


def table(cases: dict[str, Any]) -> str:
    """Markdown."""
    rows = [
        "| recipe, text, network | largest run | forecast, 9 times in 10 | reached | off by |",
        "|---|---|---|---|---|",
    ]
    for name, case in cases.items():
        largest = f"1/{case['own']['flops'] / max(run['flops'] for run in case['runs']):.0f}"
        reached = case["own"]["loss"]
        if case["forecast"] is None:
            told = f"cannot know | {reached:.3f} | "
        else:
            loss, low, high = case["forecast"]
            off = f"{loss / reached - 1:+.1%}".replace("%", " %")
            told = f"{loss:.3f}, {low:.3f} to {high:.3f} | {reached:.3f} | {off}"
        rows.append(f"| {name} | {largest} | {told} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
