"""`fit` on the fake GPU, beside what `plan` says of it. Started by run.py, under the preloaded device."""

import argparse
import json
import os
import resource
import sys
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from apart import FailedError, apart, command, peaks
from fake_device import configure
from networks import ROOT, Run, other_runs, runs_elsewhere, yaml_runs

from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.plan.command import own_rung, plan_rung

MIB = 2**20
LAGS = (0, 10_000, 1_000)
"""Launches that the device is behind Python. At 0 it has always finished; at 10,000 it is several steps behind."""
ALLOCATORS = ("native", "expandable")
STEPS = 10
"""As many as a plan is of: what is reserved grows for a few steps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for shards and runs")
    parser.add_argument("--out", type=Path, required=True, help="the rows, written after each run")
    parser.add_argument("--elsewhere", action="store_true", help="other GPUs and settings, in place of the YAMLs")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these runs")
    parser.add_argument("--lags", nargs="+", type=int, default=LAGS)
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=ALLOCATORS)
    options = parser.parse_args()
    found = runs_elsewhere() if options.elsewhere else [*yaml_runs(), *other_runs()]
    runs = [run for run in found if not options.only or run.name in options.only]
    text = options.work / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "nanogpt_lit").rglob("*.py"))))
    quiet_lightning()
    rows: list[dict[str, Any]] = []
    for run in runs:
        of_fit = arguments_of(run, options.work, text)
        planned = outcome(plan, run, of_fit, log=options.work / "plan.log")
        rows.append({"name": run.name, "changed": run.changed, "plan": planned, "fits": [], "arguments": of_fit})
    # All runs at one lag before the next: what is written half-way is a whole column.
    for allocator, lag in product(options.allocators, options.lags):
        for run, row in zip(runs, rows, strict=True):
            log = options.work / f"{run.name.replace(' ', '_')}_{lag}_{allocator}.log"
            measured = outcome(fit, run, row["arguments"], lag, allocator, log=log)
            row["fits"].append({"lag": lag, "allocator": allocator, **beside(row["plan"], measured, allocator)})
            print(run.name, row["fits"][-1], flush=True)
            short = [{key: value for key, value in row.items() if key != "arguments"} for row in rows]
            options.out.write_text(json.dumps(short, indent=1))
    return 0


def arguments_of(run: Run, work: Path, text: Path) -> list[str]:
    """Of fit: a few steps of at most two micro-batches, a validation at their end, and nothing that is written."""
    own = [f"--config={run.config}", *map(all_fields, run.options), f"--data.source={text}", "--data.val_fraction=0.2"]
    settings = SettingsCLI(args=own).settings
    accumulate = min(2, settings.trainer.accumulate_grad_batches)
    shards = work / "shards" / settings.data.tokenizer.replace(":", "_")
    return [
        *own, f"--trainer.default_root_dir={work / 'runs'}", f"--data.shards_dir={shards}",
        f"--trainer.max_steps={STEPS}", f"--trainer.accumulate_grad_batches={accumulate}",
        f"--trainer.log_every_n_steps={STEPS}", "--trainer.limit_val_batches=2",
        f"--trainer.val_check_interval={STEPS * accumulate}", "--model.schedule.warmup_steps=2",
        "--trainer.callbacks=null", "--trainer.enable_checkpointing=false", "--trainer.logger=false",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=nanogpt_lit.loops.lightning.TextSamples", "--trainer.callbacks.tokens=1",
    ]  # fmt: skip


def all_fields(option: str) -> str:
    """--model.memory with every field: what it leaves out would be the YAML's."""
    name, _, value = option.partition("=")
    if name != "--model.memory":
        return option
    return f"{name}={json.dumps(asdict(MemoryConfig(**json.loads(value))))}"


def outcome(work: Any, run: Run, *arguments: Any, log: Path) -> dict[str, Any]:
    try:
        return apart(work, run, *arguments, log=log)
    except FailedError as error:
        return {"failed": str(error).splitlines()[-1][:300]}


def plan(run: Run, arguments: list[str]) -> dict[str, Any]:
    os.environ.update(run.environment)
    if command(["prepare", *arguments], computes=False):  # some vocabularies are known from the text alone
        raise SystemExit("prepare failed")
    settings = SettingsCLI(args=arguments).settings
    footprint = plan_rung(settings, own_rung(settings), run.gpu)
    return {
        "native_allocated_mib": round(footprint.allocated_mib, 1),
        "native_reserved_mib": round(footprint.reserved_mib, 1),
        "expandable_allocated_mib": round(footprint.expandable.allocated / MIB, 1),
        "expandable_reserved_mib": round(footprint.expandable.reserved / MIB, 1),
        "host_mib": round(footprint.host_memory_mib),
        "fullest_phase": footprint.fullest_phase,
    }


def fit(run: Run, arguments: list[str], lag: int, allocator: str) -> dict[str, Any]:
    os.environ.update(run.environment)
    major, minor = run.gpu.capability
    # Before the device is first used: it reads them then.
    os.environ.update(
        FAKE_CUDA_MAJOR=str(major), FAKE_CUDA_MINOR=str(minor), FAKE_CUDA_MULTIPROCESSORS=str(run.gpu.multiprocessors)
    )
    configure(lag=lag)
    if allocator == "expandable":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # which the product asks for
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    torch.backends.cuda.enable_cudnn_sdp(False)  # which is not here
    started_s = time.perf_counter()
    code = command(["fit", *arguments], computes=False)
    if code:
        raise SystemExit(f"exit code {code}")
    assert torch.cuda.get_device_capability() == run.gpu.capability
    host_peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {**peaks(), "host_peak_mib": host_peak_mib, "seconds": round(time.perf_counter() - started_s, 1)}


def beside(planned: dict[str, Any], measured: dict[str, Any], allocator: str) -> dict[str, Any]:
    """measured, with the plan's error in percent of it."""
    if "failed" in planned or "failed" in measured:
        return measured
    errors = {
        f"{what}_error_percent": round(100 * (planned[f"{allocator}_{what}_mib"] / measured[f"{what}_mib"] - 1), 2)
        for what in ("allocated", "reserved")
    }
    return measured | errors


if __name__ == "__main__":
    sys.exit(main())
