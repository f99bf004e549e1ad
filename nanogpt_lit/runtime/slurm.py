"""A job of SLURM's that is about to be stopped saves, asks to be queued again, and goes on from there."""

import os
import signal
import subprocess

from nanogpt_lit.runtime.environment import whole_number


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
