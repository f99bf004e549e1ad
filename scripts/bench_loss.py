"""The loss of GPT-2's vocabulary and its gradients: at once, in chunks, and by PyTorch's linear_cross_entropy.

    python scripts/bench_loss.py --json docs/bench_loss.json

All take turns in one process, so that a busy machine slows all of them; what is reported is the median of the paired
ratios to the loss at once. Memory is the growth of a process's peak while it runs one of them alone.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F
from torch import Tensor

from nanogpt_lit.gpt.loss import chunked_cross_entropy, cross_entropy
from nanogpt_lit.parity.processes import peak_bytes
from nanogpt_lit.runtime.machine import hardware
from nanogpt_lit.runtime.process_settings import keep_freed_memory, set_matmul_backend

C, V = 768, 50257
DTYPES = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024, help="targets of a micro-batch (1024)")
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512], help="sizes in tokens (256 512)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of autocast (float32: none)")
    parser.add_argument("--repeats", type=int, default=11, help="measurements of each (11)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--torch", action="store_true", help="also linear_cross_entropy, slow on a CPU")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--alone", help=argparse.SUPPRESS)  # a child that measures its memory
    args = parser.parse_args()
    if args.device == "cpu":  # as fit does
        keep_freed_memory()
        set_matmul_backend(torch.device("cpu"), tf32=False)
    variants = {"at once": cross_entropy} | {f"chunks of {n}": partial(in_chunks, n) for n in args.chunks}
    if args.torch:
        variants["linear_cross_entropy"] = of_torch
    steps = {name: step(loss, args) for name, loss in variants.items() if args.alone in (None, name)}
    if args.alone:
        print(peak_growth_mib(steps[args.alone], args.device))
        return

    print(hardware())
    print(f"{args.tokens} tokens, C {C}, V {V}, {args.dtype} on {args.device}; medians of {args.repeats} paired steps")
    print(f"{'loss':<22}{'ms':>9}{'to at once':>12}{'25..75 %':>16}{'peak MiB':>10}")
    times_s = measure(steps, args.repeats, args.device)
    rows = {}
    for name in variants:
        ratios = [a / b for a, b in zip(times_s[name], times_s["at once"], strict=True)]
        low, middle, high = quantiles(ratios, n=4)
        child = subprocess.run([sys.executable, *sys.argv, "--alone", name], capture_output=True, text=True, check=True)
        peak_mib = float(child.stdout)
        rows[name] = {
            "ms": 1e3 * median(times_s[name]), "ratio": middle, "quartiles": [low, high], "peak_mib": peak_mib,
        }  # fmt: skip
        quartiles = f"{low:.3f}..{high:.3f}"
        print(f"{name:<22}{rows[name]['ms']:>9.0f}{middle:>12.3f}{quartiles:>16}{peak_mib:>10.0f}")
    if args.json:
        settings = {name: getattr(args, name) for name in ("tokens", "dtype", "device", "repeats")}
        record = {"hardware": hardware(), "C": C, "V": V, **settings, "losses": rows}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def in_chunks(chunk_tokens: int, hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    return chunked_cross_entropy(hidden, head_weight, targets, chunk_tokens)


def of_torch(hidden: Tensor, head_weight: Tensor, targets: Tensor) -> Tensor:
    """It is not on autocast's lists, so what autocast would cast is cast here; "sum" for the sake of float16."""
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, head_weight = hidden.to(dtype), head_weight.to(dtype)
    options = torch.nn.LinearCrossEntropyOptions()
    total = F.linear_cross_entropy(
        hidden.flatten(0, 1), head_weight, targets.flatten(), reduction="sum", options=options
    )
    return total.float() / targets.numel()


def step(loss_function: Callable[..., Tensor], args: argparse.Namespace) -> Callable[[], None]:
    """Forward and backward on inputs of its own."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, args.tokens, C, generator=generator).to(args.device).requires_grad_()
    head_weight = (0.02 * torch.randn(V, C, generator=generator)).to(args.device).requires_grad_()
    targets = torch.randint(V, (1, args.tokens), generator=generator).to(args.device)
    dtype = DTYPES[args.dtype]

    def run() -> None:
        hidden.grad = head_weight.grad = None
        with torch.autocast(args.device, dtype=dtype or torch.bfloat16, enabled=dtype is not None, cache_enabled=False):
            loss = loss_function(hidden, head_weight, targets)
        loss.backward()

    return run


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: str) -> dict[str, list[float]]:
    times_s: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, run in steps.items():
            started_s = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat > 0:  # the first warms up
                times_s[name].append(time.perf_counter() - started_s)
    return times_s


def peak_growth_mib(run: Callable[[], None], device: str) -> float:
    """What a step adds to the most memory held; nan on a system that does not tell (Windows)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    before = peak_bytes()
    run()
    after = peak_bytes()
    return (after - before) / 2**20 if before is not None and after is not None else float("nan")


if __name__ == "__main__":
    main()
