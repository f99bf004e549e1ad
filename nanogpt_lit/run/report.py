"""What is printed when a run begins and when it ends, the same from every loop."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch

from nanogpt_lit.checkpoint import lightning_format
from nanogpt_lit.checkpoint.run_file import SUFFIX, step_of
from nanogpt_lit.gpt.model import GPT
from nanogpt_lit.gpt.sampling import printable
from nanogpt_lit.run.metrics import perplexity
from nanogpt_lit.run.observers import RunObservers, relative_to_here
from nanogpt_lit.runtime.machine import device_name
from nanogpt_lit.runtime.process_settings import Deterministic, repeatability


def opening_lines(
    *,
    gpt: GPT,
    precision: str,
    processes: int,
    device: torch.device,
    accumulate_grad_batches: int,
    batch_size: int,
    run_folder: str,
    seed: int | None,
    deterministic: Deterministic,
) -> str:
    """What will run: the network, the size of a step, where it is kept, and whether it can be repeated."""
    batches_per_step, T = accumulate_grad_batches * processes, gpt.config.block_size
    tokens_per_step = batches_per_step * batch_size * T
    return (
        f"network: {gpt.parameter_count(non_embedding=False):,} parameters, {precision} on "
        f"{processes} x {device_name(device)}\n"
        f"step: {batches_per_step} x {batch_size} x {T} = {tokens_per_step:,} tokens\n"
        f"run: {run_folder}, seed {seed}\n"
        f"repeatable: {repeatability(device, processes, deterministic)}"
    )


def closing_table(run: RunObservers, folder: Path, checkpoints: Mapping[str, Path] | None = None) -> str:
    """Steps, tokens, time, losses, a sample, and where everything is.

    checkpoints: in place of the run's own, what each is and its file; those that are not there are left out
    """
    metrics, validations = run.metrics, run.metrics.validations
    time = str(timedelta(seconds=round(run.elapsed_s)))
    if metrics.earlier_s:
        time += f", {timedelta(seconds=round(metrics.trained_s))} in all pieces of the run"
    if checkpoints is None:
        checkpoints = run.checkpoints.files() if run.checkpoints is not None else {}
    rows = [
        ("steps", f"{metrics.step:,}"),
        ("tokens", f"{metrics.tokens:,}"),
        ("time", time),
    ]
    if validations.latest is not None and validations.best is not None:
        loss = validations.latest[1]
        rows.append(("validation loss", f"{loss:.4f}, perplexity {perplexity(loss):.2f}"))
        best_step, best = validations.best
        rows.append(("best", f"{best:.4f} at step {best_step:,}"))
    if run.early_stopping is not None and run.early_stopping.has_ended:
        rows.append(("ended early", run.early_stopping.sentence()))
    files = {name: Path(relative_to_here(path)) for name, path in checkpoints.items() if path.exists()}
    rows += [(f"{name} checkpoint", f"{path}{held_step(path)}") for name, path in files.items()]
    rows.append(("curves", f"tensorboard --logdir {Path(relative_to_here(folder)).parent}"))
    for path in list(files.values())[:1]:
        if path.is_file() or lightning_format.is_sharded(path):  # of a folder of another kind no command can write
            rows.append(("write more", f"python -m nanogpt_lit generate --ckpt {path}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if run.samples is not None and run.samples.latest is not None:
        lines = ["", *("  | " + line for line in printable(run.samples.latest).splitlines()), "", *lines]
    return "\n".join(lines)


def held_step(checkpoint: Path) -> str:
    """Told of the file itself: the disk may not have taken a later one."""
    if checkpoint.suffix != SUFFIX:
        return ""
    try:
        return f" (step {step_of(checkpoint):,})"
    except (ValueError, OSError):
        return " (damaged)"
