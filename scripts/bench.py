"""Training steps side by side: ours, its options one by one, nanoGPT's, transformers'; and how the cost grows.

    python scripts/bench.py --nanogpt PATH_TO_NANOGPT --out docs/bench.json
    python scripts/bench.py --scaling --out docs/scaling.json --picture docs/scaling.svg
    python scripts/bench.py --start

Every variant lives in a process of its own (bench_variants.py), as when it is used, and takes one step in its turn, so
that a busy machine slows all of them: what is reported is the median of the paired ratios. A product of two square
matrices has its turn too; utilisation is the share of its rate that a step's arithmetic reaches, 6 N + 12 L C T
operations a token. nanoGPT's step is the one of its train.py on a CPU: float32, its own optimizer, compiled (its
default) or not (its README's advice); and once under autocast, which its train.py has for GPUs alone. On a machine
whose cores others use too, OMP_NUM_THREADS=1 and --clock cpu count the time that a step keeps a CPU busy, which waiting
does not lengthen.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

from nanogpt_lit.gpt.gpt2 import GPT, GPTConfig
from nanogpt_lit.runtime.machine import hardware, peak_flops_of

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Shape:
    n_layer: int
    n_head: int
    n_embd: int
    vocab_size: int
    block_size: int = 128
    batch_size: int = 4


SIZES = {
    "1M": Shape(1, 4, 256, 257),  # where a loop's own cost shows most
    "10M": Shape(6, 6, 384, 257),
    "10M, long": Shape(6, 6, 384, 257, 1024, 1),
    "30M": Shape(6, 6, 384, 50304),
    "124M": Shape(12, 12, 768, 50304),
}
VARIANTS = (
    "nanogpt", "nanogpt compiled", "nanogpt under autocast", "plain", "lightning", "transformers",
    "transformers trainer",
)  # fmt: skip
ABLATION = (
    "heap as it comes",
    "products by MKL",
    "loss at once",
    "chunks of 64",
    "chunks of 256",
    "foreach AdamW",
    "for-loop AdamW",
    "compiled",
)
SCALED = Shape(4, 4, 256, 257)
"""What grows, in one direction at a time."""
START_CONFIG = "configs/quickstart.yaml"
LIGHT_COMMANDS = ("", "generate", "plan", "convert", "doctor", "prepare", "accelerate-config", "keep-alive-unit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["30M"])
    parser.add_argument("--precision", nargs="+", choices=["32-true", "bf16-mixed", "16-mixed"], default=["32-true"])
    parser.add_argument(
        "--variants", nargs="+", metavar="NAME", default=VARIANTS, help="the others are compared with the first"
    )
    parser.add_argument("--options", action="store_true", help="also ours with one option changed at a time")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each (20)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before them (3)")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--gpu", action="store_true", help="on a CUDA GPU, with its share of the peak (MFU)")
    parser.add_argument("--nanogpt", type=Path, metavar="DIR", help="nanoGPT's folder; without it those are left out")
    parser.add_argument("--scaling", action="store_true", help="instead: cost over model size, block, batch and data")
    parser.add_argument(
        "--start",
        type=int,
        nargs="?",
        const=3,
        metavar="TIMES",
        help="instead: time to fit's first step and of --help",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the numbers to this file")
    parser.add_argument("--picture", type=Path, metavar="FILE.svg", help="draw the curves of --scaling")
    args = parser.parse_args()
    args.device = "cuda" if args.gpu else "cpu"
    if args.gpu and not torch_sees_a_card():
        parser.error("--gpu needs a CUDA GPU, and torch sees none; leave it out to measure the CPU.")
    if "16-mixed" in args.precision and not args.gpu:
        parser.error("--precision=16-mixed is for a GPU: add --gpu, or take bf16-mixed.")
    record: dict[str, Any] = {
        "command": " ".join(["python", "scripts/bench.py", *sys.argv[1:]]),
        "hardware": hardware("lightning", "transformers"),
        "clock": args.clock,
        "steps": args.steps,
    }
    print(record["hardware"])
    if args.start:
        record |= start_times(args.start)
    elif args.scaling:
        from bench_scaling import measure_scaling

        record |= measure_scaling(args, SCALED, measure, lambda shape: (flops_of_step(shape), flops_of_matmul()))
    else:
        record["runs"] = []
        for size, precision in itertools.product(args.sizes, args.precision):
            record["runs"].append(side_by_side(args, size, precision))
            save(record, args.out)  # what follows may take long
    save(record, args.out)


def torch_sees_a_card() -> bool:
    import torch

    return torch.cuda.is_available()


def save(record: dict[str, Any], path: Path | None) -> None:
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def side_by_side(args: argparse.Namespace, size: str, precision: str) -> dict[str, Any]:
    names = [*args.variants, *(ABLATION if args.options else ())]
    if not args.nanogpt:
        names = [name for name in names if not name.startswith("nanogpt")]
    if precision != "32-true":
        names += ["recast"] if args.options else []
    base = names[0]
    turns = measure(args, SIZES[size], names, precision)
    shape = SIZES[size]
    print(
        f"\n{size}, {precision}, {shape.batch_size} x {shape.block_size} tokens: medians of {args.steps} paired steps"
    )
    print(f"{'':<24}{'ms/step':>9}{'tokens/s':>10}{f'x {base}':>12}{'25..75 %':>16}{'utilisation':>12}{'peak MiB':>10}")
    rows = {}
    for name in names:
        row = rows[name] = summary(shape, turns[name], turns[base], turns["matmul"])
        if args.gpu:
            row["mfu"] = share_of_peak(shape, turns[name], precision)
        print(
            f"{name:<24}{row['ms_per_step']:>9.1f}{row['tokens_per_s']:>10.0f}{row['speed']:>12.3f}"
            f"{'{:.3f}..{:.3f}'.format(*row['quartiles']):>16}{row['utilisation']:>12.0%}{row['peak_mib']:>10.0f}"
            + (f"  MFU {row['mfu']:.1%}" if row.get("mfu") else "")
        )
    gflops = flops_of_matmul() / median(turns["matmul"].seconds) / 1e9
    print(f"products of square matrices: {gflops:.0f} GFLOP/s")
    return {"size": size, "precision": precision, "base": base, "matmul_gflops": gflops, "variants": rows}


@dataclass(frozen=True)
class Turn:
    """What one variant was measured at."""

    seconds: list[float]
    peak_mib: float


def summary(shape: Shape, turn: Turn, base: Turn, matmul: Turn) -> dict[str, Any]:
    low, speed, high = quantiles([b / a for a, b in zip(turn.seconds, base.seconds, strict=True)], n=4)
    flops, rates = flops_of_step(shape), [flops_of_matmul() / s for s in matmul.seconds]
    return {
        "ms_per_step": 1e3 * median(turn.seconds),
        "tokens_per_s": shape.batch_size * shape.block_size / median(turn.seconds),
        "speed": speed,
        "quartiles": [low, high],
        "utilisation": median(flops / s / rate for s, rate in zip(turn.seconds, rates, strict=True)),
        "peak_mib": turn.peak_mib,
    }


def share_of_peak(shape: Shape, turn: Turn, precision: str) -> float | None:
    """Of the GPU's peak; None where runtime/gpus.py does not know the GPU."""
    import torch

    peak = peak_flops_of(torch.device("cuda"), precision, 1)
    return flops_of_step(shape) / median(turn.seconds) / peak if peak else None


def flops_of_step(shape: Shape) -> float:
    config = GPTConfig(shape.block_size, shape.vocab_size, shape.n_layer, shape.n_head, shape.n_embd, bias=False)
    import torch

    with torch.device("meta"):
        per_token = GPT(config).flops_per_token(shape.block_size)
    return per_token * shape.batch_size * shape.block_size


def flops_of_matmul() -> float:
    from bench_variants import MATMUL_SIDE

    return 2 * MATMUL_SIDE**3


def measure(
    args: argparse.Namespace, shape: Shape, names: Sequence[str], precision: str, tokens: int = 1_000_000
) -> dict[str, Turn]:
    """Steps of every variant in turn, and of matmul. tokens: random ones, of which the steps read"""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = np.random.default_rng(0).integers(min(shape.vocab_size, 50257), size=tokens, dtype=np.uint16)
        data.tofile(folder / "tokens.bin")
        variants = {}
        for name in ("matmul", *names):
            variants[name] = Variant(name, shape, precision, args, folder / "tokens.bin")
            stack.callback(variants[name].end)
        for variant in variants.values():
            for _ in range(args.warm_up):
                variant.step()
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        for _ in range(args.steps):
            for name, variant in variants.items():
                seconds[name].append(variant.step())
        return {name: Turn(seconds[name], variant.peak_mib()) for name, variant in variants.items()}


class Variant:
    """A process that takes a step when it is told to."""

    def __init__(self, name: str, shape: Shape, precision: str, args: argparse.Namespace, tokens: Path) -> None:
        network = (shape.n_layer, shape.n_head, shape.n_embd, shape.vocab_size, shape.block_size)
        command = [
            sys.executable, str(Path(__file__).with_name("bench_variants.py")), name,
            "--network", *map(str, network), "--batch-size", str(shape.batch_size), "--tokens", str(tokens),
            "--precision", precision, "--clock", args.clock, "--device", args.device,
        ]  # fmt: skip
        if args.nanogpt:
            command += ["--nanogpt", str(args.nanogpt)]
        self.name = name
        self.card_mib: list[float] = []
        self.said = tokens.with_name(f"{name}.txt")
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, cwd=ROOT
            )

    def step(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{self.name} ended:\n{self.said.read_text()[-2000:]}")
        seconds, *self.card_mib = map(float, answer.split())
        return seconds

    def peak_mib(self) -> float:
        """Of the GPU's memory, or of the resident: nan on a system that does not tell."""
        if self.card_mib:
            return self.card_mib[0]
        status = Path(f"/proc/{self.process.pid}/status")
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.is_file() else float("nan")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def start_times(times: int) -> dict[str, Any]:
    """Seconds from the command to the first step of fit, with the shards yet to make and with them there; to --help."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "nanogpt_lit", "fit", "--config", START_CONFIG, "--trainer.max_steps=1"]
        command += ["--trainer.limit_val_batches=0", f"--trainer.default_root_dir={folder}"]
        first = [seconds_until(command, r"step 1/1") for _ in range(1 + times)]
    helps = {
        name or "(none)": median(
            seconds_until([sys.executable, "-m", "nanogpt_lit", *name.split(), "--help"], "usage") for _ in range(times)
        )
        for name in LIGHT_COMMANDS
    }
    print(f"fit at its first step after {first[0]:.1f} s, with shards there {median(first[1:]):.1f} s")
    for name, seconds in helps.items():
        print(f"{name + ' --help':<28}{seconds:.2f} s")
    return {"first_step_s": first[0], "first_step_with_shards_s": median(first[1:]), "help_s": helps}


def seconds_until(command: list[str], said: str) -> float:
    """Until a command says something that matches."""
    started_s = time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "80"},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if re.search(said, line):
                seconds = time.perf_counter() - started_s
                process.stdout.read()
                return seconds
    sys.exit(f"{' '.join(command)} did not say {said!r}")


if __name__ == "__main__":
    main()
