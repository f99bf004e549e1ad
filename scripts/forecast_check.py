"""How near a forecast comes: runs of ten or more times the work of the largest that it is made from, trained.

    OMP_NUM_THREADS=1 python scripts/forecast_check.py --text characters=input.txt bible=kjv.txt

The sizes of the runs follow from their work alone and not from seconds, so that the record does not depend on the
machine's load. A case that the record has is not made again, and one whose text is not given is left out.
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
from nanogpt_lit.forecast.law import Forecast, NoLawError, Point, law_of
from nanogpt_lit.forecast.pairs import UNLIKE, loss_of_pairs, unlikeness
from nanogpt_lit.forecast.sizes import Sized, SizedRuns, choose

CASES = (
    # recipe, text, layers, channels, steps, batch, times the work of the largest run
    ("modern", "characters", 4, 96, 450, 16, 10),
    ("modern", "python", 4, 64, 700, 16, 10),
    ("modern", "python", 4, 96, 450, 16, 10),
    ("modern", "bible", 3, 96, 500, 16, 10),
    ("modern", "german", 5, 80, 400, 16, 10),
    ("modern", "perl", 2, 128, 500, 16, 10),
    ("modern", "manual", 4, 96, 400, 16, 10),
    ("nanogpt", "bible", 2, 80, 6000, 12, 10),
    ("modern", "bible", 4, 64, 700, 16, 10),
    ("modern", "modules", 2, 128, 500, 16, 10),
    ("modern", "javascript", 4, 80, 500, 16, 10),
    ("modern", "french", 3, 112, 400, 16, 10),
    ("modern", "markdown", 4, 96, 450, 16, 10),
    ("modern", "headers", 3, 96, 500, 16, 10),
    ("modern", "unicode", 2, 128, 500, 16, 10),
    ("modern", "three", 3, 96, 450, 16, 10),
    ("modern", "mixed", 3, 96, 450, 16, 10),
    ("modern", "python", 4, 96, 450, 16, 30),
    ("modern", "bible", 3, 96, 500, 16, 30),
    ("nanogpt", "bible", 2, 80, 6000, 12, 30),
)
TEXTS = {
    "characters": ["--data.tokenizer=char", "--data.val_fraction=0.1"],
    "python": ["--data.source=stdlib", "--data.tokenizer=byte", "--data.val_fraction=0.02"],
}
OTHER_TEXT = ["--data.tokenizer=byte", "--data.val_fraction=0.05", "--data.skip_undecodable=true"]
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
    parser.add_argument("--text", nargs="*", default=[], metavar="NAME=FILE", help="characters is char-rnn's input.txt")
    parser.add_argument("--work", type=Path, default=Path("runs/forecast_check"), help="where to keep the tokens")
    parser.add_argument("--out", type=Path, default=Path("docs/forecast.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)  # a network this small is not faster on more
    quiet_lightning()
    texts = {"python": "stdlib", **dict(text.split("=", 1) for text in args.text)}
    record = json.loads(args.out.read_text(encoding="utf-8")) if args.out.is_file() else {"cases": {}}
    made_with = f"{platform.machine()}, 1 thread, Python {platform.python_version()}, torch {torch.__version__}"
    for recipe, text, n_layer, n_embd, steps, batch_size, times in CASES:
        name = f"{recipe}, {text}, {n_layer} x {n_embd}, 1/{times}"
        if name not in record["cases"] and text in texts:
            section = "llama" if recipe == "modern" else "gpt"
            options = [
                *RECIPES[recipe], *TEXTS.get(text, OTHER_TEXT), f"--data.source={texts[text]}",
                "--data.block_size=64", f"--data.batch_size={batch_size}",
                f"--model.{section}.n_layer={n_layer}", f"--model.{section}.n_head={n_embd // 16}",
                f"--model.{section}.n_embd={n_embd}", f"--model.schedule.warmup_steps={steps // 20}",
                f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=40",
                f"--trainer.default_root_dir={args.work / text}",
            ]  # fmt: skip
            record["cases"][name] = measured(options, times)
            write(record | {"hardware": made_with}, args.out)
    write(record, args.out)
    print(table(record["cases"]))


def measured(options: list[str], times: int) -> dict[str, Any]:
    """The losses of a forecast's runs and of the run that they are to foretell, and what a table of pairs tells."""
    cli = SettingsCLI(args=options)
    cli.complete_settings()
    runs = SizedRuns(cli.settings, cli.device, time.perf_counter)
    rows = []
    for seed, run in enumerate([*choose(runs.own, lambda run: run.flops, math.inf, times), runs.own]):
        result = runs.run(run, run.steps, runs.data.seed + seed, runs.val_batches)
        assert result is not None, "a run that nobody stops"
        rows.append(row(run, result[0]))
        print(rows[-1], flush=True)
    text = runs.data.folder, runs.data.vocab_size
    pairs, unlike = round(loss_of_pairs(*text), 4), round(unlikeness(*text), 4)
    return {"pairs": pairs, "unlike": unlike, "runs": rows[:-1], "own": rows[-1]}


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
    if case["unlike"] is not None and case["unlike"] > UNLIKE:
        return None
    try:
        law = law_of([Point(run["parameters"], run["tokens"], run["loss"]) for run in case["runs"]], case["pairs"])
    except NoLawError:
        return None
    return law.forecast(case["own"]["parameters"], case["own"]["tokens"])


def table(cases: dict[str, Any]) -> str:
    """Markdown."""
    rows = ["| recipe, text, network, largest run | forecast, 9 times in 10 | reached | off by |", "|---|---|---|---|"]
    for name, case in cases.items():
        reached = case["own"]["loss"]
        if case["forecast"] is None:
            told = f"cannot know | {reached:.3f} | "
        else:
            loss, low, high = case["forecast"]
            off = f"{loss / reached - 1:+.1%}".replace("%", " %")
            told = f"{loss:.3f}, {low:.3f} to {high:.3f} | {reached:.3f} | {off}"
        rows.append(f"| {name} | {told} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
