"""The starters of this process: a launcher of several, SLURM, or the supervisor of `fit --keep-alive`.

Each is recognised by environment variables. A fit reports to its supervisor through two files in a folder that the
environment names: its output goes to the terminal as always, and a supervisor that read it would take the progress line
away.
"""

import json
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path

from nanogpt_lit.errors import UserError

RANKS = (
    "RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK",
)  # fmt: skip
"""The variables in which torchrun, Lightning, srun and mpirun tell a process which one it is."""
SIZES = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
"""The variables in which they tell it how many there are."""
KEEP_ALIVE = "--keep-alive"
"""The option of fit that starts it under a supervisor."""
FOLDER, COMMAND = "NANOGPT_LIT_SUPERVISED", "NANOGPT_LIT_KEPT_ALIVE_BY"
"""The supervisor's variables: the folder of reports, and its own command, a list in JSON."""
TOKENS, ERROR = "tokens", "error"
"""The files of the folder: tokens trained on so far, and the error that ended the process."""


def is_first() -> bool:
    """Tell whether this process is the first of its run, before the processes know each other."""
    return launched_processes() == 1 or all(os.environ.get(name, "0") in ("", "0") for name in RANKS)


def launched_processes(environ: Mapping[str, str] = os.environ) -> int:
    """The number of processes that a launcher has started, this one included; 1 without a launcher."""
    return max((int(environ[name]) for name in SIZES if environ.get(name, "").isdecimal()), default=1)


def whole_number(name: str, environ: Mapping[str, str], least: int = 0) -> int | None:
    """The number that a variable holds; None where it is unset or empty. Raises UserError for anything else."""
    text = environ.get(name, "").strip()
    if not text:
        return None
    # Nothing that is counted here has more digits, and int() refuses thousands of them in its own words.
    if not (text.isascii() and text.isdigit() and len(text) < 10) or int(text) < least:
        raise UserError(f"{name}={text[:40]} in the environment is not a whole number from {least} up; unset it.")
    return int(text)


def lost_restart(environ: Mapping[str, str] = os.environ) -> str | None:
    """Say that a restart by torchrun would not work; None where it would, or none was asked for.

    torch 2.13 keeps the store of a group for the next one: its processes find addresses of those that are gone. With
    --node_rank and --master_addr it does so always, otherwise unless a variable forbids it.
    """
    restarts = whole_number("TORCHELASTIC_MAX_RESTARTS", environ)
    if not restarts or environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return (
        f"torchrun --max-restarts={restarts}: restarted processes would look for those that are gone; start it with "
        "--standalone or --rdzv_backend c10d, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment, and fit with "
        "--resume auto"
    )


def requeue_signal() -> int | None:
    """The signal that `#SBATCH --signal=USR1@120` sends to a job; None where this is none."""
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


def resume_command(program: Sequence[str], arguments: Sequence[str]) -> str:
    """The command that goes on with a run, quoted for the shell. program, arguments: that it was started with

    A run that is kept alive is gone on with by the command that keeps it alive.
    """
    if COMMAND in os.environ:
        words = json.loads(os.environ[COMMAND])
    else:
        words = [*program, *without(arguments, ("--resume", "--ckpt_path")), "--resume", "auto"]
    return as_typed(words)


def as_typed(words: Sequence[str]) -> str:
    """A command line, quoted for the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """The arguments without these options and their values."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in options:
            next(words, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def supervised() -> bool:
    return FOLDER in os.environ


def report_error(error: BaseException) -> None:
    """Leaves the error for the supervisor; of several processes of one run, the first has the cause."""
    with suppress(OSError), Path(os.environ[FOLDER], ERROR).open("x", encoding="utf-8", errors="replace") as file:
        file.write(" ".join(f"{type(error).__name__}: {error}".split()))


class TokensReport:
    """Leaves, after every optimizer step, how far the run is. A killed process can no longer say it."""

    def __init__(self) -> None:
        self._file: FileIO | None = None
        if supervised():
            self._file = FileIO(Path(os.environ[FOLDER], TOKENS), "w")
        self.is_read = self._file is not None
        """True where there is a supervisor to read it."""

    def write(self, tokens: int) -> None:
        """Costs microseconds: the page stays in memory, and survives the process."""
        assert self._file is not None, "nobody reads it"
        self._file.seek(0)
        self._file.write(b"%20d" % tokens)


def stop_with_supervisor() -> None:
    """Ends this process as SIGTERM does once its supervisor is gone; otherwise two would write one run after a restart.

    The supervisor holds the other end of standard input.
    """

    def wait() -> None:
        # Not sys.stdin, whose lock a waiting thread would hold when the interpreter ends.
        with suppress(OSError):
            while os.read(0, 1):
                pass
        signal.raise_signal(signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()
