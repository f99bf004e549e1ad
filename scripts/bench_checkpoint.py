"""What a checkpoint of GPT-2's 124M parameters costs a run: time added to its steps, and memory.

    python scripts/bench_checkpoint.py --json docs/bench_checkpoint.json

Steps without a save, with one in the background and with one that is waited for take turns, so that a busy machine
slows all of them alike. A save is what run/checkpoints.py makes of it: finite weights looked for, every number and
tensor of the run written with checksums, synced and renamed, the one before kept as `previous`. Linux only: the peak of
resident memory is read from /proc. The share of a run is that of the time it stands still for a save; what a save
adds to a step otherwise, by taking turns at the CPU, is in added_to_a_step_s, as far as the machine was quiet.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import torch

from nanogpt_lit.checkpoint.disk import BestEffortSaver
from nanogpt_lit.checkpoint.run_file import SUFFIX
from nanogpt_lit.checkpoint.state import RunState
from nanogpt_lit.gpt.gpt2 import GPTConfig
from nanogpt_lit.loops.contract import LoopSettings, Training, optimizer_and_schedule
from nanogpt_lit.module import LitNanoGPT
from nanogpt_lit.run.resume import capture
from nanogpt_lit.runtime.machine import hardware

GPT2 = GPTConfig(block_size=1024, vocab_size=50304, n_layer=12, n_head=12, n_embd=768)
VARIANTS = ("none", "background", "waited")
EVERY_S = 15 * 60
"""Between two saves of the run whose share is told."""
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8, help="measured steps of each (8)")
    parser.add_argument("--tokens", type=int, default=256, help="of a micro-batch (256)")
    parser.add_argument("--batches", type=int, default=4, help="micro-batches of a step (4)")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (the system's temporary folder)")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        record = {"hardware": hardware("lightning"), **measure(Run(Path(folder), args.tokens, args.batches), args)}
    print(json.dumps(record, indent=1))
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def measure(run: "Run", args: argparse.Namespace) -> dict[str, object]:
    run.step("none")  # the first one makes the optimizer's state
    content_bytes = run.save_alone()[1]
    alone_s, added_bytes = zip(*(run.save_alone()[::2] for _ in range(3)), strict=True)
    steps_s: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for turn in range(args.rounds):
        for variant in VARIANTS[turn % 3 :] + VARIANTS[: turn % 3]:
            steps_s[variant].append(run.step(variant))
    added_s = {
        variant: quantiles([a - b for a, b in zip(steps_s[variant], steps_s["none"], strict=True)], n=4)
        for variant in VARIANTS[1:]
    }
    return {
        "command": "python scripts/bench_checkpoint.py "
        f"--rounds {args.rounds} --tokens {args.tokens} --batches {args.batches}",
        "parameters": run.module.gpt.parameter_count(non_embedding=False),
        "file_mib": content_bytes / MIB,
        "save_alone_s": median(alone_s),
        "peak_memory_added_mib": max(added_bytes) / MIB,
        "step_stands_still_s": {v: median(run.held_s[v]) for v in added_s},
        "share_of_a_run_that_saves_every_15_min": {v: median(run.held_s[v]) / EVERY_S for v in added_s},
        "step_s": median(steps_s["none"]),
        "added_to_a_step_s": {variant: added_s[variant][1] for variant in added_s},
        "added_quartiles_s": {variant: added_s[variant][::2] for variant in added_s},
    }


class Run:
    """Steps of one module, as a loop takes them."""

    def __init__(self, folder: Path, tokens: int, batches: int) -> None:
        torch.manual_seed(0)
        self.module = LitNanoGPT(GPT2)
        self.training = Training(
            self.module, *optimizer_and_schedule(self.module), None, LoopSettings(10**6), torch.device("cpu")
        )
        self.saver = BestEffortSaver()
        self.training.optimizer.register_step_pre_hook(lambda *_: self._wait())
        self.held_s: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
        """Of each step: what the loop stood still for, in the call that saves and before the optimizer's step."""
        self.path = folder / f"last{SUFFIX}"
        self.windows = torch.randint(0, GPT2.vocab_size or 0, (batches, 1, tokens + 1))
        self.steps = 0

    def step(self, variant: str) -> float:
        """Seconds of a step, which begins with a save or without."""
        started_s = time.perf_counter()
        if variant != "none":
            self.saver.in_background = variant == "background"
            self.saver.save(self.path, self.state())
        self._waited_s = time.perf_counter() - started_s
        for window in self.windows:
            (self.module(window[:, :-1], window[:, 1:]) / len(self.windows)).backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.training.optimizer.step()
        self.training.schedule.step()
        self.training.optimizer.zero_grad()
        self.steps += 1
        self.held_s[variant].append(self._waited_s)
        return time.perf_counter() - started_s

    def _wait(self) -> None:
        started_s = time.perf_counter()
        self.saver.wait()
        self._waited_s += time.perf_counter() - started_s

    def save_alone(self) -> tuple[float, int, int]:
        """Seconds of a save, the bytes of its file, and those that it added to the peak of this process's memory."""
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew at what is held now
        before = peak_bytes()
        started_s = time.perf_counter()
        self.saver.in_background = False
        self.saver.save(self.path, self.state())
        return time.perf_counter() - started_s, self.path.stat().st_size, peak_bytes() - before

    def state(self) -> RunState:
        self.training.step = self.steps
        return capture(self.training, data={})


def peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    main()
