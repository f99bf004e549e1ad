"""A run that is asked to stop ends between two optimizer steps, with its state saved.

Asked by Ctrl-C, by a signal of the system, by a file called `stop` in the run's folder, or by trainer.max_time.
"""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import Any, Self

from nanogpt_lit.errors import UserError
from nanogpt_lit.loops.contract import Observer, Training
from nanogpt_lit.runtime.launch import requeue, resume_command
from nanogpt_lit.runtime.processes import Agreement, rank

STOP_FILE = "stop"
LAUNCHED = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", "ACCELERATE_MIXED_PRECISION")
"""Variables of torchrun, srun and accelerate launch."""
NOT_SAVED = 2
"""The exit code of a stop in peace that the disk took no checkpoint of."""
SAME_KEYSTROKE_S = 1.0
"""torchrun sends its processes a Ctrl-C that the terminal has sent them already."""


class Reason(Enum):
    """Reasons to stop a run, each with its name and exit code. The later ones outrank the earlier ones."""

    MAX_TIME = ("trainer.max_time", 0)
    STOP_FILE = ("the stop file", 0)
    PREEMPTED = ("SLURM's signal", 0)
    HANGUP = ("SIGHUP", 129)
    TERMINATE = ("SIGTERM", 143)
    INTERRUPT = ("Ctrl-C", 130)

    def __init__(self, called: str, exit_code: int) -> None:
        self.called = called
        self.exit_code = exit_code


RANKED = list(Reason)
SIGNALS = {
    getattr(signal, name): reason
    for name, reason in {
        "SIGINT": Reason.INTERRUPT,
        "SIGBREAK": Reason.INTERRUPT,  # Windows: Ctrl-Break, and a console that is closed
        "SIGTERM": Reason.TERMINATE,
        "SIGHUP": Reason.HANGUP,
    }.items()
    if hasattr(signal, name)
}


class Stopped(Exception):  # noqa: N818 - it is no error
    """Raised between two steps, once the run is saved. saved: the checkpoint, None where it is not

    keeps: whether the run keeps checkpoints
    """

    def __init__(self, reason: Reason, step: int, saved: str | None, keeps: bool) -> None:
        kept = f"saved {saved}"
        if saved is None:
            kept = "nothing was saved: " + ("the disk took no checkpoint" if keeps else "checkpoints are off")
        super().__init__(f"stopped by {reason.called} after step {step:,}; {kept}")
        self.exit_code = reason.exit_code or (NOT_SAVED if keeps and saved is None else 0)
        self.reason = reason
        self.saved = saved
        self.first_rank = rank() == 0  # while there are processes: they part before this is read


def print_stopped(stopped: Stopped, arguments: Sequence[str]) -> None:
    """Print what is left of a run that was asked to end, and how to go on with it; in the first process alone."""
    if not stopped.first_rank:
        return
    print(stopped, flush=True)
    if stopped.saved is not None:
        print(go_on_line(arguments), flush=True)
    if stopped.reason is Reason.PREEMPTED:
        sharded = stopped.saved is not None and Path(stopped.saved).is_dir()  # no start finds it by itself
        print(f"sbatch it with --ckpt_path {stopped.saved}" if sharded else requeue(), flush=True)


def go_on_line(arguments: Sequence[str]) -> str:
    """The line with the command that goes on with a run that was stopped."""
    by = ", by what has started it," if any(name in os.environ for name in LAUNCHED) else ""
    python = [sys.orig_argv[0], *safe_path(), "-m", "nanogpt_lit"]
    return f"go on{by} with: {resume_command(python, arguments)}"


def safe_path() -> list[str]:
    return ["-P"] if sys.flags.safe_path else []


class Stops(Observer):
    """Observer that ends a run when it is asked to. It listens while it is entered, or else during a training.

    A second Ctrl-C ends the process at once; what was saved stays.

    A signal that the process ignores stays ignored: so a run under nohup outlives its terminal.

    folder: where the stop file is looked for   max_time_s: counted from when it is entered, each time a run is started
    requeue_by: the signal that SLURM sends to a job before it stops it (runtime/launch.py)
    """

    def __init__(
        self,
        folder: Path | None,
        max_time_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        requeue_by: int | None = None,
    ) -> None:
        self.reason: Reason | None = None
        """The reason that all processes have agreed to stop by."""
        self.step = 0
        """The step after which they stop."""
        self._folder = folder
        self._max_time_s = max_time_s
        self._clock = clock
        self._started_s: float | None = None
        self._signalled: Reason | None = None
        self._signalled_s = 0.0
        self._replaced: dict[int, Any] = {}
        self._reasons = SIGNALS if requeue_by is None else {**SIGNALS, requeue_by: Reason.PREEMPTED}
        self._agreement: Agreement | None = Agreement()

    def __enter__(self) -> Self:
        self._started_s = self._clock()
        if threading.current_thread() is threading.main_thread():  # Python lets no other thread do it
            heard = self._reasons.keys() - ignored_signals()
            self._replaced = {number: signal.signal(number, self._on_signal) for number in heard}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._replaced = {}

    def on_train_start(self, training: Training) -> None:
        if self._started_s is None:
            self.__enter__()
        if training.processes == 1:
            self._agreement = None

    def on_exit(self) -> None:
        self.__exit__()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        reason, now_s = self._reasons[number], self._clock()
        if self._signalled is Reason.INTERRUPT is reason and now_s - self._signalled_s > SAME_KEYSTROKE_S:
            os._exit(Reason.INTERRUPT.exit_code)  # no clearing up, which could wait for a device or a disk
        if self._signalled is None:
            self._signalled_s = now_s
            # Not print, which may be what the signal has interrupted.
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, self._announcement(reason).encode())
        self._signalled = reason

    def signalled(self) -> bool:
        """Tell whether a signal has come to this process."""
        return self._signalled is not None

    def _announcement(self, reason: Reason) -> str:
        if rank() == 0:
            return f"\n{reason.called}: finishing this step, then saving; a second Ctrl-C stops at once\n"
        return ""

    def between_steps(self, step: int = 0) -> bool:
        """Decide whether to stop here. Each process asks after each step, and all get the same answer."""
        asking = [] if self._signalled is None else [self._signalled]
        if self._folder is not None and (self._folder / STOP_FILE).is_file():
            asking.append(Reason.STOP_FILE)
        if self._max_time_s is not None and self._clock() - (self._started_s or 0.0) >= self._max_time_s:
            asking.append(Reason.MAX_TIME)
        strongest = max(map(RANKED.index, asking)) if asking else -1
        if self._agreement is not None:
            strongest = self._agreement.highest(strongest)
        if strongest < 0:
            return False
        self.reason, self.step = RANKED[strongest], step
        if self._folder is not None and rank() == 0 and (self._folder / STOP_FILE).is_file():
            (self._folder / STOP_FILE).unlink(missing_ok=True)  # or it would stop the run that goes on
        return True


def ignored_signals() -> set[signal.Signals]:
    return {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN}


def seconds_of(max_time: str | timedelta | Mapping[str, int] | None) -> float | None:
    """trainer.max_time as Lightning reads it: DD:HH:MM:SS, or the arguments of a timedelta."""
    if max_time is None:
        return None
    if isinstance(max_time, str):
        parts = re.fullmatch(r"([0-9]{1,9}):([0-9]{2}):([0-9]{2}):([0-9]{2})", max_time.strip())
        if parts is None:
            raise UserError(f"trainer.max_time={max_time} should be DD:HH:MM:SS; 00:08:00:00 is eight hours.")
        max_time = dict(zip(("days", "hours", "minutes", "seconds"), map(int, parts.groups()), strict=True))
    if isinstance(max_time, Mapping):
        parts_of_it = dict(max_time)
        try:
            max_time = timedelta(**parts_of_it)
        except (TypeError, OverflowError) as error:
            raise UserError(f"trainer.max_time={parts_of_it} is not a time ({error}); hours: 8 is.") from error
    return max_time.total_seconds()
