"""Loss and time of configs/shakespeare_char_2cores.yaml, one command for each seed, with nothing compiled before it.

    python scripts/bench_two_cores.py --source input.txt --json docs/two_cores.json

The text is char-rnn's tiny Shakespeare. On a CPU without fast bfloat16 it computes in float32, as fit proposes
there. Seconds are the whole command's by the clock, with its start, compilation,
validation and checkpoints, so nothing else should run. The loss is of the whole validation set after the last step,
for which no setting was chosen. A seed that the record has already is not run again. Then all are measured as one model
that predicts the mean of their probabilities.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nanogpt_lit.checkpoint.newest import newest_run
from nanogpt_lit.runtime.machine import hardware, product_gflops

CONFIG = Path(__file__).parents[1] / "configs" / "shakespeare_char_2cores.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="char-rnn's input.txt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4])
    parser.add_argument("--steps", type=int, help="in place of those of the YAML: more, for as much as an hour")
    parser.add_argument("--work", type=Path, default=Path("runs/two_cores"), help="where the runs are kept")
    parser.add_argument("--json", type=Path, default=Path("runs/two_cores/record.json"), help="the record")
    args = parser.parse_args()
    record: dict[str, Any] = {"hardware": hardware("lightning"), "runs": []}
    if args.json.exists():
        record = json.loads(args.json.read_text(encoding="utf-8"))
    for seed in args.seeds:
        if seed not in [run["seed"] for run in record["runs"]]:
            record["runs"].append(fit(seed, args.source, args.work / f"seed_{seed}", args.steps))
            print(record["runs"][-1], flush=True)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    together = mean_loss([args.work / f"seed_{seed}" for seed in args.seeds])
    record["together"] = {"seeds": args.seeds, "loss": together}
    args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    loss, seconds = (median(run[key] for run in record["runs"]) for key in ("loss", "seconds"))
    print(f"medians of {len(record['runs'])} seeds: loss {loss:.4f} after {seconds:.0f} s; together {together:.4f}")


def mean_loss(folders: list[Path]) -> float:
    command = [sys.executable, "-m", "nanogpt_lit", "eval", "--mean", "--json", "--ckpt"]
    command += [str(run / "checkpoints" / "last.safetensors") for folder in folders if (run := newest_run(folder))]
    *_, together = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout).values()
    return together["loss"]


def fit(seed: int, source: Path, folder: Path, steps: int | None) -> dict[str, float]:
    command = [sys.executable, "-m", "nanogpt_lit", "fit", "--config", str(CONFIG), f"--seed_everything={seed}"]
    command += [f"--data.source={source.resolve()}", f"--trainer.default_root_dir={folder}"]
    if product_gflops(torch.bfloat16) < product_gflops(torch.float32):
        command.append("--trainer.precision=32-true")
    command += [] if steps is None else [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={steps}"]
    with tempfile.TemporaryDirectory() as nothing_compiled:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": nothing_compiled}
        started_s = time.perf_counter()
        subprocess.run(command, env=environment, check=True)
        seconds = time.perf_counter() - started_s
    run = newest_run(folder)
    assert run is not None, "fit has made one"
    events = EventAccumulator(str(run))
    events.Reload()
    last = events.Scalars("val/loss")[-1]
    speed = median(event.value for event in events.Scalars("throughput/tokens_per_s"))
    return {"seed": seed, "steps": last.step, "loss": last.value, "seconds": seconds, "tokens_per_s": speed}


if __name__ == "__main__":
    main()
