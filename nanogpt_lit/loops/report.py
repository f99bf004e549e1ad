"""What is printed when a run ends, the same from every loop."""

from datetime import timedelta
from pathlib import Path

from nanogpt_lit.loops.curves import StepMeter, ValidationRecord, perplexity


def closing_table(
    *,
    steps: int,
    elapsed_s: float,
    meter: StepMeter,
    validations: ValidationRecord,
    sample: str | None,
    checkpoints: dict[str, str],
    run_folder: Path,
) -> str:
    """Steps, tokens, time, losses, a sample, and where everything is.

    checkpoints: what each is ("best", "last") and its file; those with an empty path are left out
    """
    rows = [
        ("steps", f"{steps:,}"),
        ("tokens", f"{meter.tokens:,}"),
        ("time", str(timedelta(seconds=round(elapsed_s)))),
    ]
    if validations.latest is not None and validations.best is not None:
        loss = validations.latest[1]
        rows.append(("validation loss", f"{loss:.4f}, perplexity {perplexity(loss):.2f}"))
        best_step, best = validations.best
        rows.append(("best", f"{best:.4f} at step {best_step:,}"))
    files = {name: path for name, path in checkpoints.items() if path}
    rows += [(f"{name} checkpoint", path) for name, path in files.items()]
    rows.append(("curves", f"tensorboard --logdir {run_folder.parent}"))
    if files:
        rows.append(("write more", f"python -m nanogpt_lit generate --ckpt {next(iter(files.values()))}"))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if sample is not None:
        lines = ["", *("  | " + line for line in sample.splitlines()), "", *lines]
    return "\n".join(lines)
