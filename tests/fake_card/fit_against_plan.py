"""`fit` on the fake CUDA device, beside what `plan` says of it. Started by run.py, under the preloaded device.

Each fit, and each plan, is a process of its own, forked from this one, which has imported everything and has not
touched CUDA: its allocator begins empty, and one import serves all.
"""

import argparse
import gc
import json
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch
from fake_device import configure, report
from networks import ROOT, Run, other_runs, yaml_runs

from nanogpt_lit.cli.fit import NanoGPTCLI
from nanogpt_lit.cli.settings import SettingsCLI, quiet_lightning
from nanogpt_lit.memory.techniques import MemoryConfig
from nanogpt_lit.plan.budget import choose_budget
from nanogpt_lit.plan.command import own_rung, plan_rung

MIB = 2**20
LAGS = (0, 10_000, 1_000)
ALLOCATORS = ("native", "expandable")
STEPS = 4


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="a folder for shards and runs")
    parser.add_argument("--out", type=Path, required=True, help="the rows, written after each run")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="these runs")
    parser.add_argument("--lags", nargs="+", type=int, default=LAGS)
    options = parser.parse_args()
    runs = [run for run in [*yaml_runs(), *other_runs()] if not options.only or run.name in options.only]
    text = options.work / "text.txt"
    text.write_text("\n".join(path.read_text() for path in sorted((ROOT / "nanogpt_lit").rglob("*.py"))))
    quiet_lightning()
    arguments = [arguments_of(run, options.work, text) for run in runs]
    rows: list[dict[str, Any]] = []
    for run, of_fit in zip(runs, arguments, strict=True):
        planned = in_a_process(plan, of_fit, log=options.work / "plan.log")
        rows.append({"name": run.name, "changed": run.changed, "plan": planned, "fits": []})
    # All runs at one lag before the next: what is written half-way is a whole column.
    for allocator, lag in product(ALLOCATORS, options.lags):
        for row, of_fit in zip(rows, arguments, strict=True):
            log = options.work / f"{row['name'].replace(' ', '_')}_{lag}_{allocator}.log"
            found = in_a_process(fit, of_fit, lag, allocator, log=log)
            row["fits"].append({"lag": lag, "allocator": allocator, **beside(row["plan"], found, allocator)})
            print(row["name"], row["fits"][-1], flush=True)
            options.out.write_text(json.dumps(rows, indent=1))
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
    ]  # fmt: skip


def all_fields(option: str) -> str:
    """--model.memory with every field: what it leaves out would be the YAML's."""
    name, _, value = option.partition("=")
    if name != "--model.memory":
        return option
    return f"{name}={json.dumps(asdict(MemoryConfig(**json.loads(value))))}"


def plan(arguments: list[str]) -> dict[str, Any]:
    settings = SettingsCLI(args=arguments).settings
    footprint = plan_rung(settings, own_rung(settings), choose_budget("rtx2050").card)
    return {
        "allocated_mib": round(footprint.allocated_mib, 1),
        "native_mib": round(footprint.reserved_mib, 1),
        "expandable_mib": round(footprint.expandable_reserved_mib, 1),
        "host_mib": round(footprint.host_memory_mib),
        "fullest_phase": footprint.fullest_phase,
    }


def fit(arguments: list[str], lag: int, allocator: str) -> dict[str, Any]:
    if allocator == "expandable":
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # which the product asks for
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
    configure(lag=lag)
    positions_from_the_host()
    started_s = time.perf_counter()
    cli = NanoGPTCLI(args=["fit", *arguments])
    assert cli.device == "cuda"
    statistics = torch.cuda.memory_stats()
    return {
        "steps": cli.trainer.global_step,
        "allocated_mib": round(torch.cuda.max_memory_allocated() / MIB, 1),
        "reserved_mib": round(torch.cuda.max_memory_reserved() / MIB, 1),
        "driver_mib": round(report()["peak_mib"], 1),
        "page_locked_mib": round(report()["page_locked_peak_mib"]),
        "host_peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "out_of_memory": statistics["num_ooms"],
        "retries": statistics["num_alloc_retries"],
        "seconds": round(time.perf_counter() - started_s, 1),
    }


def positions_from_the_host() -> None:
    """torch.arange's kernel writes nothing here, and an embedding in host memory reads the positions it was to make."""
    arange = torch.arange

    def on_host(*bounds: int, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            return arange(*bounds, device=device, **options)
        return arange(*bounds, **options).to(device)

    torch.arange = on_host


def beside(planned: dict[str, Any], found: dict[str, Any], allocator: str) -> dict[str, Any]:
    """found, with the plan's error in percent of what was measured."""
    if "failed" in planned or "failed" in found:
        return found
    errors = {
        "allocated_error_percent": round(100 * (planned["allocated_mib"] / found["allocated_mib"] - 1), 2),
        "reserved_error_percent": round(100 * (planned[f"{allocator}_mib"] / found["reserved_mib"] - 1), 2),
    }
    return found | errors


def in_a_process(work: Callable[..., dict[str, Any]], *arguments: Any, log: Path) -> dict[str, Any]:
    """What work answers, or {"failed": the last line it wrote}."""
    gc.collect()
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def child() -> None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        there.send(work(*arguments))

    process = context.Process(target=child)
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        lines = log.read_text(errors="replace").strip().splitlines() or ["without a word"]
        return {"failed": lines[-1][:300]}
    finally:
        process.join()


if __name__ == "__main__":
    sys.exit(main())
