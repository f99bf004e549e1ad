"""What schedulers and launchers say by environment variables, and SLURM's answer to being asked for more time."""

import os
import signal
import subprocess
from collections.abc import Mapping

from nanogpt_lit.errors import UserError


def whole_number(name: str, environ: Mapping[str, str], least: int = 0) -> int | None:
    """The number that a variable holds; None where it is unset or empty. Raises UserError for anything else."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    # Nothing that is counted here has more digits, and int() refuses thousands of them in its own words.
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise UserError(f"{name}={text[:40]} in the environment is not a whole number from {least} up; unset it.")
    return int(text)


def requeue_signal() -> int | None:
    """What `#SBATCH --signal=USR1@120` sends to such a job; None where this is none."""
    return getattr(signal, "SIGUSR1", None) if "SLURM_JOB_ID" in os.environ else None


def was_requeued() -> bool:
    return bool(whole_number("SLURM_RESTART_COUNT", os.environ))


def requeue() -> str:
    """Queues this job again; SLURM then ends it here. Returns what came of it."""
    job = os.environ["SLURM_JOB_ID"]
    if (array := os.environ.get("SLURM_ARRAY_JOB_ID")) is not None:
        job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        reason = " ".join(str(getattr(error, "stderr", None) or error).split())
        return f"job {job} could not be queued again ({reason}); `sbatch` it with --resume auto"
    return f"job {job} is queued again"
