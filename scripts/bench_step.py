"""One training step: under Lightning's Trainer, in a bare PyTorch loop, and of transformers' GPT-2.

    python scripts/bench_step.py --json docs/bench_step.json

The three take turns at every micro-batch, in one process, so that a busy machine slows all of them; what is reported is
the median of the paired ratios. The Trainer runs with the curves and the progress line of `fit`, and without
validation, so without samples and checkpoints. The bare loop drives a copy of the same module, and transformers'
network has the same weights and the same optimizer. Peak memory is that of a process that runs one of them alone.
"""

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from nanogpt_lit.gpt.model import GPTConfig
from nanogpt_lit.loops.curves import StepMeter, ValidationRecord
from nanogpt_lit.loops.lightning_callbacks import StepProgressBar, TrainingCurves
from nanogpt_lit.loops.lightning_precision import precision_plugin
from nanogpt_lit.loops.machine import hardware
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.optim.adamw import AdamWConfig, build_optimizer
from nanogpt_lit.optim.schedule import ScheduleConfig

BATCH_SIZE, BLOCK_SIZE = 4, 128
SIZES = {
    "1M": GPTConfig(BLOCK_SIZE, vocab_size=257, n_layer=1, n_head=4, n_embd=256),  # where a loop's own cost shows most
    "10M": GPTConfig(BLOCK_SIZE, vocab_size=257, n_layer=6, n_head=6, n_embd=384),
    "30M": GPTConfig(BLOCK_SIZE, vocab_size=50304, n_layer=6, n_head=6, n_embd=384),
}
VARIANTS = ("trainer", "bare", "transformers")
WARM_UP = 5
Batch = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["10M", "30M"])
    parser.add_argument("--steps", type=int, default=60, help="measured steps of each (60)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--alone", choices=VARIANTS, help=argparse.SUPPRESS)  # a child that measures its memory
    args = parser.parse_args()
    if args.alone:
        run_alone(SIZES[args.sizes[0]], args.alone)
        return
    record: dict = {"hardware": hardware("lightning", "transformers"), "sizes": {}}
    print(record["hardware"])
    print(f"{BATCH_SIZE} x {BLOCK_SIZE} tokens, float32, fused AdamW, clip 1.0; medians of {args.steps} paired steps")
    print(f"{'size':<6}{'variant':<14}{'ms/step':>9}{'to bare':>9}{'25..75 %':>16}{'peak MiB':>10}")
    for size in args.sizes:
        times_s = measure(SIZES[size], args.steps)
        rows = {}
        for variant in VARIANTS:
            ratios = [a / b for a, b in zip(times_s[variant], times_s["bare"], strict=True)]
            low, middle, high = quantiles(ratios, n=4)
            rows[variant] = {
                "ms_per_step": 1e3 * median(times_s[variant]),
                "ratio_to_bare": middle,
                "quartiles": [low, high],
                "peak_mib": peak_mib(size, variant),
            }
            row = rows[variant]
            print(
                f"{size:<6}{variant:<14}{row['ms_per_step']:>9.1f}{middle:>9.3f}"
                f"{f'{low:.3f}..{high:.3f}':>16}{row['peak_mib']:>10.0f}"
            )
        record["sizes"][size] = rows
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(config: GPTConfig, steps: int) -> dict[str, list[float]]:
    """Seconds of each measured step, by variant."""
    module = build(config)
    loader = TakingTurns(config, {"bare": bare_step(copy.deepcopy(module)), "transformers": transformers_step(module)})
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, WARM_UP + steps).fit(module, loader)
    return {variant: times_s[WARM_UP : WARM_UP + steps] for variant, times_s in loader.times_s.items()}


def build(config: GPTConfig) -> LitNanoGPT:
    torch.manual_seed(0)
    return LitNanoGPT(config, AdamWConfig(), ScheduleConfig(warmup_steps=10, total_steps=1000))


def trainer(folder: str, steps: int) -> Trainer:
    meter, validations = StepMeter(), ValidationRecord()
    plugin = precision_plugin("32-true", "cpu")
    assert plugin is not None
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        gradient_clip_val=1.0,
        log_every_n_steps=10,
        plugins=[plugin],
        logger=TensorBoardLogger(folder, name=""),
        callbacks=[TrainingCurves(meter, validations), StepProgressBar(meter, validations)],
        enable_model_summary=False,
        limit_val_batches=0,
    )


class TakingTurns(IterableDataset):
    """A loader whose batches are preceded by one step of each other variant.

    The Trainer's own step lasts from the moment it is handed a batch to the moment it asks for the next one: the loop,
    the callbacks and the logger are in it, the others' steps are not.
    """

    def __init__(self, config: GPTConfig, others: dict[str, Callable[[Batch], None]]) -> None:
        self.times_s: dict[str, list[float]] = {"trainer": [], **{name: [] for name in others}}
        self.others = others
        generator = torch.Generator().manual_seed(0)
        windows = torch.randint(0, config.vocab_size or 0, (BATCH_SIZE, BLOCK_SIZE + 1), generator=generator)
        self.batch = (windows[:, :-1].contiguous(), windows[:, 1:].contiguous())

    def __iter__(self) -> Iterator[Batch]:
        while True:
            for name, step in self.others.items():
                started_s = time.perf_counter()
                step(self.batch)
                self.times_s[name].append(time.perf_counter() - started_s)
            started_s = time.perf_counter()
            yield self.batch
            self.times_s["trainer"].append(time.perf_counter() - started_s)


def bare_step(module: LitNanoGPT) -> Callable[[Batch], None]:
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    parameters = list(module.parameters())

    def step(batch: Batch) -> None:
        module(*batch).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step


def transformers_step(module: LitNanoGPT) -> Callable[[Batch], None]:
    """GPT2LMHeadModel with the same weights, driven the same way; it shifts the targets itself and returns logits."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ours = module.gpt.config
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=ours.vocab_size or 0, n_positions=ours.block_size, n_embd=ours.n_embd, n_layer=ours.n_layer,
            n_head=ours.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        )
    )  # fmt: skip
    weights = module.gpt.state_dict()
    for name, tensor in theirs.state_dict().items():
        transposed = weights[name].dim() == 2 and ".h." in name  # GPT-2's Conv1D keeps its weight transposed
        tensor.copy_(weights[name].T if transposed else weights[name])
    optimizer = build_optimizer(theirs.named_parameters(), AdamWConfig())
    parameters = list(theirs.parameters())

    def step(batch: Batch) -> None:
        tokens, _ = batch
        theirs(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def run_alone(config: GPTConfig, variant: str) -> None:
    """A few steps of one variant in this process; prints the peak resident memory in MiB."""
    module = build(config)
    if variant == "trainer":
        with tempfile.TemporaryDirectory() as folder:
            trainer(folder, WARM_UP).fit(module, TakingTurns(config, {}))
    else:
        step = bare_step(module) if variant == "bare" else transformers_step(module)
        batch = TakingTurns(config, {}).batch
        for _ in range(WARM_UP):
            step(batch)
    # Not getrusage: its maximum is handed down from the parent through exec.
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmHWM:")[1].split()[0]) / 1024)


def peak_mib(size: str, variant: str) -> float:
    command = [sys.executable, __file__, "--sizes", size, "--alone", variant]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
