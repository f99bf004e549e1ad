"""Whether the checkpoints of a run can be gone on from."""

from collections.abc import Iterator
from pathlib import Path

from nanogpt_lit.doctor.finding import Finding
from nanogpt_lit.errors import UserError

SUFFIX = ".safetensors"
"""As checkpoint/run_file.py has it, which imports torch."""
PARTIAL = ".partial"


def checkpoint_files(run: Path) -> list[Path]:
    return sorted(run.rglob(f"*{SUFFIX}"))


def check_checkpoints(run: Path) -> Iterator[Finding]:
    files = checkpoint_files(run)
    if not files:
        yield Finding("look", "checkpoint", f"none is in {run} yet")
    for path in files:
        yield check_checkpoint(path)
    for path in sorted(run.rglob(f"*{SUFFIX}{PARTIAL}")):
        if not path.is_dir():
            told = f"{path} is left of a write that was cut short, or under way; fit removes it"
            yield Finding("look", "checkpoint", told)


def largest_checkpoint(run: Path) -> int | None:
    """Its bytes."""
    return max((path.stat().st_size for path in checkpoint_files(run) if path.is_file()), default=None)


def check_strays(root: Path) -> Iterator[Finding]:
    """What lies in a run's folder and means nothing there. fit passes it over."""
    for path in sorted(root.rglob(f"checkpoints/*{PARTIAL}")):
        if path.is_dir():
            yield Finding("look", "run", f"{path} is a folder, of no use to the run: remove it")
    for path in sorted(root.rglob("stop")):
        if path.is_dir():
            yield Finding("look", "run", f"{path} is a folder, and only a file of that name stops a run: remove it")


def check_checkpoint(path: Path) -> Finding:
    """Reads one, tensor by tensor, so that the memory it takes is that of the largest."""
    import torch

    from nanogpt_lit.checkpoint.run_file import STATES, description_of, open_run

    if path.is_symlink() and not path.exists():
        return Finding("wrong", "checkpoint", f"{path} is a link to {path.readlink()}, which is not there")
    try:
        with open_run(path) as file:
            description = description_of(file)
            for name in file.names:
                tensor = file.read([name])[name]
                if name.startswith(tuple(f"{state}." for state in STATES)) or not tensor.is_floating_point():
                    continue
                if not torch.isfinite(tensor).all():
                    return Finding(
                        "wrong",
                        "checkpoint",
                        f"{path} holds weights that are not numbers ({name}): go on from another one",
                    )
    except (UserError, OSError) as error:
        return Finding("wrong", "checkpoint", str(error).rstrip("."))
    size = path.stat().st_size
    step = description.get("step")
    told = f"{path}: step {step:,}, " if isinstance(step, int) else f"{path}: "
    return Finding("ok", "checkpoint", f"{told}{size / 1e6:,.1f} MB, every byte as it was written")
