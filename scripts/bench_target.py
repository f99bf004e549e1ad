"""Seconds and tokens to a loss: nanoGPT's train.py, and `fit` with the two recipes, as commands in turn.

    OMP_NUM_THREADS=1 python scripts/bench_target.py --source input.txt --nanogpt PATH_TO_NANOGPT

A network this small is not faster on more than one thread.

The text is char-rnn's tiny Shakespeare, the network and batches are those of nanoGPT's README for a CPU. Each
recipe trains for as many steps as lead it to a loss of 1.88 or so: a schedule is over when its run is. Then modern
once more compiled, in bfloat16 where that is the faster (its command compiles in the first round, its steps never);
the same with the network, batch and rates that come to that loss soonest of those tried, for three seeds; and in
batches of twice the size, for about as long as nanoGPT. Losses are of the whole validation set,
nanoGPT's of as many random batches, measured once after the last step. Seconds are those that the whole command, start
and validation and all, kept a CPU busy, which other work on the machine does not lengthen (but for shared caches), and
those of its steps alone by the clock: their median, times their count.
nanoGPT's folder needs data/shakespeare_char prepared, as its README says; without --nanogpt it is left out.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from nanogpt_lit.runtime.machine import hardware, product_gflops

ROOT = Path(__file__).parents[1]
BLOCK_SIZE = 64
NANOGPT_STEPS = 2000
STEPS = 190
VALIDATION_BATCHES = 145  # of 12 x 64 tokens: the whole validation set
SOONEST = (
    "--model.llama.n_layer=1", "--model.llama.n_embd=96", "--model.llama.n_kv_head=1", "--model.llama.rope_base=100",
    "--model.optim.lr=2e-2", "--model.optim.muon_lr=1.5e-2", "--model.schedule.warmup_steps=10",
)  # fmt: skip
NANOGPT = (
    "compile=False", f"eval_iters={VALIDATION_BATCHES}", f"eval_interval={NANOGPT_STEPS}",
    "log_interval=1", "block_size=64", "batch_size=12", "n_layer=4", "n_head=4", "n_embd=128",
    f"max_iters={NANOGPT_STEPS}", f"lr_decay_iters={NANOGPT_STEPS}", "dropout=0.0",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="char-rnn's input.txt")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="nanoGPT's folder")
    parser.add_argument("--gpu", action="store_true", help="all of it on a CUDA GPU, in seconds by the clock")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each, in turn (3)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers to this file")
    args = parser.parse_args()
    device = "cuda" if args.gpu else "cpu"
    in_bfloat16 = args.gpu or product_gflops(torch.bfloat16) > product_gflops(torch.float32)
    precision = "bf16-mixed" if in_bfloat16 else "32-true"
    compiled = [f"--trainer.precision={precision}", "--model.compile=true"]
    modern = partial(fit, source=args.source, device=device, config="modern_char_cpu")
    runs: dict[str, Callable[[Path], dict[str, float]]] = {
        "recipe nanogpt": partial(modern, config="shakespeare_char_cpu", steps=1400),
        "recipe modern": partial(modern, steps=STEPS),
        f"modern, {precision}, compiled": partial(modern, steps=STEPS, options=compiled),
        **{
            f"modern, 1 x 96, {precision}, compiled, seed {seed}": partial(
                modern, steps=260, batch_size=16, options=[*compiled, *SOONEST, f"--seed_everything={seed}"]
            )
            for seed in (1337, 1, 2)  # the first is that of all others
        },
        "recipe modern, longer": partial(
            modern, steps=950, batch_size=24, options=["--model.optim.lr=1.4e-2", "--model.optim.muon_lr=7e-3"]
        ),
    }
    if args.nanogpt:
        runs = {"nanoGPT's train.py": partial(nanogpt, source=args.nanogpt, device=device), **runs}
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    record: dict[str, Any] = {
        "command": " ".join(["python", "scripts/bench_target.py", *sys.argv[1:]]),
        "hardware": hardware("lightning"),
        "runs": measured,
    }
    print(record["hardware"])
    for _ in range(args.rounds):
        for name, run in runs.items():
            with tempfile.TemporaryDirectory() as folder:
                measured[name].append(run(Path(folder)))
            last = measured[name][-1]
            print(f"{name:<46}{last['loss']:.3f} after {last['processor_s']:.1f} s", flush=True)
            if args.out:
                args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    base = next(iter(runs))
    print(f"\nmedians of {args.rounds} paired runs\n{'':<46}{'loss':>7}{'steps':>7}{'tokens':>10}", end="")
    print(f"{'processor s':>13}{'steps s':>9}   share of {base}'s: processor, clock of steps, tokens")
    for name, rows in measured.items():
        of = {key: median(row[key] for row in rows) for key in rows[0]}
        shares = [
            median(row[key] / first[key] for row, first in zip(rows, measured[base], strict=True))
            for key in ("processor_s", "steps_s", "tokens")
        ]
        print(
            f"{name:<46}{of['loss']:>7.3f}{of['steps']:>7.0f}{of['tokens']:>10,.0f}"
            f"{of['processor_s']:>13.1f}{of['steps_s']:>9.1f}   {', '.join(f'{share:.3f}' for share in shares)}"
        )


def nanogpt(folder: Path, source: Path, device: str) -> dict[str, float]:
    arguments = [f"--{argument}" for argument in (*NANOGPT, f"device={device}", f"out_dir={folder}")]
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *arguments]
    said, seconds = run_command(command, source, device)
    losses = re.findall(rf"step {NANOGPT_STEPS}: .*val loss ([\d.]+)", said)
    step_ms = [float(ms) for ms in re.findall(r"^iter \d+: .*time ([\d.]+)ms", said, re.MULTILINE)]
    return {
        "loss": float(losses[-1]),
        "steps": NANOGPT_STEPS,
        "tokens": NANOGPT_STEPS * 12 * BLOCK_SIZE,
        "processor_s": seconds,
        "steps_s": NANOGPT_STEPS * median(step_ms) / 1e3,
    }


def fit(
    folder: Path,
    source: Path,
    device: str,
    config: str,
    steps: int,
    batch_size: int = 12,
    options: Sequence[str] = (),
) -> dict[str, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    command = [sys.executable, "-m", "nanogpt_lit", "fit", "--config", f"configs/{config}.yaml"]
    command += [f"--data.source={source.resolve()}", f"--trainer.default_root_dir={folder}"]
    command += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    command += [f"--data.batch_size={batch_size}", f"--trainer.accelerator={device}", *options]
    _, seconds = run_command(command, ROOT, device)
    events = EventAccumulator(str(folder / "version_0"))
    events.Reload()
    loss = {event.step: event.value for event in events.Scalars("val/loss")}[steps]
    tokens_per_s = median(event.value for event in events.Scalars("throughput/tokens_per_s"))
    return {
        "loss": loss,
        "steps": steps,
        "tokens": steps * batch_size * BLOCK_SIZE,
        "processor_s": seconds,
        "steps_s": steps * batch_size * BLOCK_SIZE / tokens_per_s,
    }


def run_command(command: list[str], folder: Path, device: str) -> tuple[str, float]:
    """What it says, and the seconds of a CPU that it takes; where a GPU computes, seconds by the clock."""
    clock = children_s if device == "cpu" else time.perf_counter
    started_s = clock()
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = clock() - started_s
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended:\n{done.stdout[-2000:]}")
    return done.stdout, seconds


def children_s() -> float:
    """Of a CPU, by all commands that have ended; a system without POSIX's times has the clock instead."""
    times = os.times()
    return times.children_user + times.children_system if os.name == "posix" else time.perf_counter()


if __name__ == "__main__":
    main()
